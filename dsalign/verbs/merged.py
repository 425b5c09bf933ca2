"""A LoRA adapter merged into its base's weights, held against the adapter on real text, and written as a folder."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig

from dsalign import assets
from dsalign.checkpoint import plain_folder
from dsalign.checkpoint.export import export
from dsalign.contract.groups import Group
from dsalign.data.batches.packing import padded
from dsalign.engines.alone import Alone
from dsalign.models import adapters, load
from dsalign.models.heads import CausalModel, ValueModel, num_ids
from dsalign.models.names import Source, resolve
from dsalign.models.tokenizer import load_tokenizer
from dsalign.report.run_log import quiet
from dsalign.verbs import opened, places

BOUND = 1e-3  # of the largest number: float32 sums in another order differ by less, a wrong merge by far more
ROUNDED = 0.1  # the same for weights that were rounded to half precision
TEXTS, TOKENS = 8, 128  # rows of demo text that are compared, and tokens of each at most


@dataclass(frozen=True)
class Merged:
    """What was merged and how exactly. what: logits or scores. gap: the largest difference in float32; stored: that of
    the files as they were read back; largest: the largest number; count: numbers compared; dtype: of the files;
    four_bit: whether the base is what 4 bits hold of it."""

    adapter: str
    base: str
    folder: Path
    what: str
    gap: float
    stored: float
    largest: float
    count: int
    dtype: str
    four_bit: bool = False

    def text(self) -> str:
        """The result as lines of text, with the command that tries it."""
        folder = shlex.quote(str(self.folder))
        use = f"dsalign chat {folder}" if self.what == "logits" else f"dsalign eval {folder} --dataset demo:pairs"
        held = ", as 4 bits hold it, which is what the adapter was trained on" if self.four_bit else ""
        return (
            f"merged {self.adapter} into {self.base}{held}: {self.folder}, {self.dtype}\n"
            f"{self.what} of {self.count} tokens of real text: largest difference from the adapter {self.gap:.2g} in "
            f"float32 (bound {BOUND * max(1.0, self.largest):.2g}), {self.stored:.2g} with the files as written\n"
            f"try it: {use}"
        )


def merge(name: str, output_dir: Path | None, dtype: str, *, trust: bool = False) -> Merged:
    """Merge the adapter that `name` means into its base, compare both on real text, and write the folder `output_dir`
    (None: the adapter's own name and -merged).

    dtype: of the weights written; auto is that of the base. trust: whether code of the base may run.
    Raises ValueError where `name` is no adapter, the folder is there already, or numbers differ by more than the bound.
    """
    quiet(0)
    source = resolve(places.model_of(name))
    if source.adapter is None:
        raise ValueError(
            f"merge: expected an adapter, a folder with adapter_config.json, got {name}, which has all its weights; "
            f"copy it with dsalign export {name} DIR"
        )
    folder = output_dir or source.adapter.with_name(f"{source.adapter.name}-merged")
    plain_folder.refuse_taken(folder, "output_dir")
    how = opened.options("float32", trust=trust)
    role = "reward" if opened.is_reward(source) else "policy"
    tokenizer = load_tokenizer(source, how)
    module = load.load_as_stored(role, source, how, device=torch.device("cpu")).eval()
    size = num_ids(module.model)
    rows = [[i for i in tokenizer(text)["input_ids"] if i < size][:TOKENS] for text in real_texts()]
    before = numbers_of(module, rows)
    module.model = adapters.merged(module.model, source.adapter)
    gap, largest = float((numbers_of(module, rows) - before).abs().max()), float(before.abs().max())
    what = "logits" if role == "policy" else "scores"
    _refuse(gap, BOUND, largest, f"{what} of the merged model and of the adapter {source.adapter}", "merged in float32")
    chosen = dtype_of(source, dtype, trust=trust)
    if (source.adapter / "generation_config.json").exists():
        module.model.generation_config = GenerationConfig.from_pretrained(source.adapter)
    stored = [0.0]

    def fill(staging: Path) -> None:
        module.model.to(chosen)
        export(Alone(module), staging, tokenizer, source.weights)
        there = Source(str(staging), value_head=staging)
        again = load.load_frozen(role, there, how, device=torch.device("cpu")).eval()
        stored[0] = float((numbers_of(again, rows) - before).abs().max())
        bound = BOUND if chosen == torch.float32 else ROUNDED
        _refuse(stored[0], bound, largest, f"{what} of the files and of the adapter {source.adapter}", f"as {chosen}")

    plain_folder.write(folder, fill)
    count = sum(map(len, rows))
    names = str(source.adapter), source.weights, folder, what
    return Merged(*names, gap, stored[0], largest, count, _name(chosen), source.four_bit)


def real_texts() -> list[str]:
    """Questions and answers of the demo rows, on which two models are compared."""
    with assets.find("demo:pairs").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in islice(lines, TEXTS)]
    return [f"{row['prompt']}\n{row['chosen']}" for row in rows]


@torch.no_grad()
def numbers_of(module: CausalModel | ValueModel, rows: Sequence[Sequence[int]]) -> Tensor:
    """What a model says of rows of token ids, each by itself: all its logits, or all values of its head, flat, float32
    on the CPU."""
    if isinstance(module, CausalModel):
        found = [module.whole_logits(torch.tensor([list(row)])) for row in rows]
    else:
        groups = [Group(i, "", tuple(row[:1]), (tuple(row[1:]),), "") for i, row in enumerate(rows)]
        found = [module(padded([group], torch.device("cpu"))) for group in groups]
    return torch.cat([one.flatten().float() for one in found])


def _refuse(gap: float, bound: float, largest: float, what: str, how: str) -> None:
    """Raise ValueError where two models differ by more than a share `bound` of the largest number, or by NaN."""
    if not gap <= bound * max(1.0, largest):
        raise ValueError(
            f"merge: expected the {what} to be the same, {how}, got a difference of {gap:.3g} (bound "
            f"{bound * max(1.0, largest):.2g}); nothing was written: use the adapter unmerged, and report this"
        )


def dtype_of(source: Source, name: str, *, trust: bool) -> torch.dtype:
    """The dtype called `name`; auto is that in which the weights of a source are stored."""
    if name == "auto":
        given: Any = AutoConfig.from_pretrained(source.weights, trust_remote_code=trust).dtype
        name = _name(given) if given is not None else "float32"
    found: torch.dtype = getattr(torch, name)
    return found


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
