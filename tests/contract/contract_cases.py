"""One more algorithm as one file of a user's own, and a rank that trains it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from support import tiny_folder

from dsalign import algos
from dsalign.config.parse import Parsed, parse
from dsalign.engines import dist
from dsalign.ranks import Process
from dsalign.verbs import train as run

IPO = '''"""IPO: the squared distance of a pair's log-ratio from a fixed margin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from dsalign.contract.algorithm import Algorithm, Context, Traits, check_range, with_reference
from dsalign.contract.groups import Batch, Group, Loss, MicroBatch, Output, Prepared
from dsalign.contract.maths import pair, reward_metrics


@dataclass(frozen=True, kw_only=True)
class IPO(Algorithm):
    """Identity preference optimisation, arXiv:2310.12036, eq. 17."""

    tau: float = 0.1  # weight of the KL penalty, 1 / nat, > 0
    per_token: bool = True  # whether log-ratios are divided by lengths: true or false

    traits: ClassVar[Traits] = Traits(data="pairs", roles={"policy": "train", "reference": "frozen"}, needs=frozenset())

    def __post_init__(self) -> None:
        check_range("tau", self.tau, 0, 1, open_low=True)

    def notes(self, groups: Sequence[Group]) -> list[str]:
        return [f"ipo: the margin is {0.5 / self.tau:g} nats"]

    def prepare(self, ctx: Context, batch: Batch) -> Prepared:
        return with_reference(ctx, batch)

    def units(self, batch: MicroBatch) -> Mapping[str, int]:
        return {"pairs": len(batch.groups)}

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """(Delta_c - Delta_r - 1 / (2 tau))^2, summed over pairs."""
        assert out.logps is not None
        delta = batch.sum(out.logps - batch.fields["reference"])
        chosen, rejected = pair(delta / batch.lengths if self.per_token else delta)
        loss = (chosen - rejected - 0.5 / self.tau) ** 2
        return Loss({"pairs": loss.sum()}, reward_metrics(self.tau * chosen, self.tau * rejected))
'''


@contextmanager
def one_more(folder: Path) -> Iterator[None]:
    """While this is open, the files of `folder` are algorithms too."""
    importlib.invalidate_caches()
    try:
        with mock.patch.object(algos, "__path__", [*algos.__path__, str(folder)]):
            yield
    finally:
        for file in folder.glob("*.py"):
            sys.modules.pop(f"{algos.__name__}.{file.stem}", None)
            vars(algos).pop(file.stem, None)


def arguments(folder: Path) -> list[str]:
    """A short run on 16 pairs whose chosen answer is aaa and whose rejected one is zzz."""
    data = folder / "pairs.jsonl"
    rows = [{"prompt": "abcdefghijklmnop"[i:] + "?", "chosen": "aaa", "rejected": "zzz"} for i in range(16)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = "--tuner full --batch_size 4 --gradient_accumulation_steps 2 --num_train_epochs 6 --learning_rate 3e-3 "
    words += "--lr_scheduler_type constant --logging_steps 1 --max_length 64 --deepspeed zero0"
    return ["--dataset", str(data), "--output_dir", str(folder / "out"), *words.split()]


def parsed(folder: Path, *more: str) -> Parsed:
    """The configuration of that run; `folder` holds the model too."""
    return parse(["--algo", "ipo", "--model", str(folder / "model"), *arguments(folder), *more], world_size=1)


def train(algorithms: Path, folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl after the run, in a rank that stays in its process group."""
    tiny_folder(folder / "model")
    with one_more(algorithms), mock.patch.object(dist, "shutdown"):
        run.train(parsed(folder, "--tau", "0.5").config, Process(0, 0, 1), "a test")
    return [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
