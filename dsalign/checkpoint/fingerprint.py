"""The settings that a resumed run must share with the run it continues."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsalign.config.schema import RunConfig
from dsalign.engines import dist

WORDS = {  # setting of a fingerprint -> how its user calls it
    "algo": "--algo", "algorithm": "the algorithm's options", "rollout": "the options of sampling", "tuner": "--tuner",
    "seed": "--seed", "rows": "the number of rows", "global_batch": "rows a step (--batch_size x "
    "--gradient_accumulation_steps x ranks)", "ranks": "the number of ranks", "deepspeed": "--deepspeed",
    "epochs": "--num_train_epochs", "batches": "the number of batches", "max_steps": "--max_steps",
}  # fmt: skip


def settings(config: RunConfig, num_rows: int, total_batches: int) -> dict[str, Any]:
    """The settings that a resumed run must share with the run it continues, by name, JSON-able.

    num_rows: groups of the training set. total_batches: batches of the run.
    """
    return {
        "algo": config.algo,
        "algorithm": repr(config.algorithm),
        "rollout": repr(config.rollout),
        "tuner": config.models.tuner,
        "seed": config.seed,
        "rows": num_rows,
        "global_batch": config.global_batch(dist.world_size()),
        "ranks": dist.world_size(),
        "deepspeed": config.optim.deepspeed,
        "epochs": config.optim.num_train_epochs,
        "batches": total_batches,
        "max_steps": config.optim.max_steps,
    }


def compare(theirs: Mapping[str, Any], mine: Mapping[str, Any], folder: Path) -> None:
    """Compare the settings of a checkpoint with those of this run. folder: the checkpoint's.

    Raises ValueError where they differ, naming each with both values.
    """
    older = {"epochs"} - theirs.keys()  # not yet written by an earlier version; batches tell the same
    other = {k: (theirs.get(k), v) for k, v in mine.items() if theirs.get(k) != v and k not in older}
    if "epochs" in other:
        other.pop("batches", None)  # follows from them
    if other:
        lines = "; ".join(f"{WORDS.get(k, k)} was {a}, is {b}" for k, (a, b) in other.items())
        raise ValueError(
            f"resume: {folder} comes from a run with other settings: {lines}; resume with what it was, or start a "
            f"new run from its model with --model {folder} and another --output_dir"
        )
