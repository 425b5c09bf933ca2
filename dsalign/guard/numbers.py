"""What is kept of an optimizer step that was skipped as its numbers were not finite: RUN/bad/step-N/, for `replay`.

step.json says which step, and why; rank-R.json has the groups of rank R as token ids, rank-R.safetensors what `prepare`
made of them: each field of `Prepared` twice, all groups' numbers in one tensor, and NAME.sizes with how many are whose.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dsalign.contract.groups import Group, Prepared
from dsalign.engines import dist

FOLDER = "bad"  # in a run's output folder
STEP_FILE = "step.json"
KEPT = 20  # folders, behind which steps are counted and not kept: a disk is not to fill up with them
NAMED = 5  # rows that a message names
SIZES = ".sizes"


@dataclass(frozen=True)
class BadStep:
    """An optimizer step that is skipped. why: what was not finite, in words. step: its number, from 1. batch: of the
    global batch, from 0. rows: of all ranks, those from which it comes, where that is known, else all of the step."""

    why: str
    step: int
    batch: int
    rows: tuple[str, ...]

    def text(self) -> str:
        """What is not finite, and where it comes from."""
        more = [f"and {len(self.rows) - NAMED} more"] if len(self.rows) > NAMED else []
        rows = f" from {', '.join([*self.rows[:NAMED], *more])}" if self.rows else ""
        return f"{self.why}{rows}"


def flawed(prepared: Prepared, state: Mapping[str, Any]) -> bool:
    """Whether a prepared batch of this rank, or the algorithm's state, holds a number that is not finite."""
    fields = (torch.cat(list(each)) for each in prepared.fields.values() if len(each))
    numbers = [*prepared.shared.values(), *_floats(state)]
    return not (all(map(math.isfinite, numbers)) and all(bool(torch.isfinite(x).all()) for x in fields))


def flawed_rows(prepared: Prepared) -> list[str]:
    """The rows of this rank's groups that have a field which is not finite."""
    bad = {i for each in prepared.fields.values() for i, x in enumerate(each) if not bool(torch.isfinite(x).all())}
    return [prepared.groups[i].where for i in sorted(bad)]


def _floats(thing: Any) -> list[float]:
    """The numbers anywhere in a thing that JSON can hold."""
    if isinstance(thing, Mapping):
        return [x for one in thing.values() for x in _floats(one)]
    if isinstance(thing, (list, tuple)):
        return [x for one in thing for x in _floats(one)]
    return [float(thing)] if isinstance(thing, float) else []


def keep(output_dir: Path, bad: BadStep, prepared: Prepared, positions: Sequence[int]) -> str:
    """Write this rank's part of a skipped step, its groups of `prepared` at `positions`; returns where it lies, or why
    it is not kept. Collective, but a rank that cannot write stops nobody."""
    parent = output_dir / FOLDER
    folder = parent / f"step-{bad.step}"
    full = dist.from_rank_0(parent.is_dir() and len(list(parent.iterdir())) >= KEPT)
    if full:
        return f"not kept: {parent} has {KEPT} already"
    problem = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if dist.rank() == 0:
            (folder / STEP_FILE).write_text(json.dumps({**asdict(bad), "ranks": dist.world_size()}, indent=2) + "\n")
        _write(folder, prepared, positions)
    except OSError as error:
        problem = f"not kept: {folder}: {error.strerror}"
    return next(filter(None, dist.everyones(problem)), f"kept in {folder}")


def _write(folder: Path, prepared: Prepared, positions: Sequence[int]) -> None:
    groups = [prepared.groups[i] for i in positions]
    tensors: dict[str, Tensor] = {}
    for name, each in prepared.fields.items():
        some = [each[i].detach().cpu() for i in positions]
        if some:
            tensors |= {name: torch.cat(some), f"{name}{SIZES}": torch.tensor([len(x) for x in some])}
    content = {"groups": [_plain(group) for group in groups], "shared": dict(prepared.shared)}
    (folder / f"rank-{dist.rank()}.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    save_file(tensors, folder / f"rank-{dist.rank()}.safetensors")


def _plain(group: Group) -> dict[str, Any]:
    """What a loss may read of a group, and where it comes from."""
    names = ("index", "where", "prompt", "completions", "prompt_text", "label", "margin", "masks")
    return {name: getattr(group, name) for name in names}


def read(folder: Path) -> tuple[dict[str, Any], Prepared]:
    """(the content of step.json, the groups and fields of all ranks) of a folder that `keep` wrote.

    Raises ValueError where it is none, or a rank's part is missing or cannot be read.
    """
    try:
        step = json.loads((folder / STEP_FILE).read_text(encoding="utf-8"))
        groups: list[Group] = []
        fields: dict[str, list[Tensor]] = {}
        shared: dict[str, float] = {}
        for rank in range(step["ranks"]):
            content = json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8"))
            tensors = load_file(folder / f"rank-{rank}.safetensors")
            groups += [_group(one) for one in content["groups"]]
            shared |= content["shared"]
            for name in tensors:
                if not name.endswith(SIZES):
                    sizes = tensors[f"{name}{SIZES}"].tolist()
                    fields.setdefault(name, []).extend(tensors[name].split(sizes))
    except Exception as error:  # safetensors has an error of its own
        raise ValueError(
            f"{folder}: expected a step that a run skipped, RUN/{FOLDER}/step-N with {STEP_FILE} and each rank's, "
            f"got {type(error).__name__}: {error}"
        ) from error
    return step, Prepared(groups, fields, shared)


def _group(plain: Mapping[str, Any]) -> Group:
    masks = plain["masks"]
    return Group(
        **{
            **plain,
            "prompt": tuple(plain["prompt"]),
            "completions": tuple(map(tuple, plain["completions"])),
            "masks": masks and tuple(map(tuple, masks)),
        }
    )


def advice(bad: BadStep, most: int, kept: str, learning_rate: float) -> str:
    """The message of a run that ends: `most` steps in a row were skipped, and this one more. kept: of `keep`."""
    folder = kept.removeprefix("kept in ")
    replay = (
        f"`dsalign replay {shlex.quote(folder)}` says which number is the first that is not finite; "
        if folder != kept
        else ""
    )
    return (
        f"step {bad.step}: {bad.text()}; more steps in a row had to be skipped than --max_bad_steps {most}. {replay}"
        f"correct or leave out these rows, or go on by dsalign resume with a --learning_rate below {learning_rate:g}"
    )
