"""The folders checkpoint-N/ of a run: written under another name, renamed when whole, rotated, read by --resume."""

from __future__ import annotations

import itertools
import json
import logging
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from dsalign.checkpoint import folder_lock
from dsalign.checkpoint.export import export
from dsalign.checkpoint.progress import Progress
from dsalign.config.rules import PROGRESS_FILE
from dsalign.config.schema import OutputOptions, RunConfig
from dsalign.config.secrets import redacted
from dsalign.engines import dist

logger = logging.getLogger(__name__)
WORDS = {  # setting of a fingerprint -> how its user calls it
    "algo": "--algo", "algorithm": "the algorithm's options", "rollout": "the options of sampling", "tuner": "--tuner",
    "seed": "--seed", "rows": "the number of rows", "global_batch": "rows a step (--batch_size x "
    "--gradient_accumulation_steps x ranks)", "ranks": "the number of ranks", "deepspeed": "--deepspeed",
    "epochs": "--num_train_epochs", "batches": "the number of batches", "max_steps": "--max_steps",
}  # fmt: skip


class Checkpoints:
    """The checkpoints of one run.

    options: where, and how many are kept. engines: trained role -> its engine, the main role first; a checkpoint has
    each one's DeepSpeed state and its model as a folder. bases: role -> the model that its adapter belongs to.
    fingerprint: the settings that a resumed run must share, see `fingerprint`. adapters_only: whether frozen base
    weights are left out of the DeepSpeed state.
    """

    def __init__(
        self,
        options: OutputOptions,
        engines: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        bases: Mapping[str, str],
        fingerprint: Mapping[str, Any],
        *,
        adapters_only: bool,
    ) -> None:
        self.output_dir, self.keep = Path(options.output_dir), options.save_total_limit
        self.engines, self.tokenizer, self.bases = engines, tokenizer, bases
        self.fingerprint, self.adapters_only = dict(fingerprint), adapters_only

    def export(self, folder: Path) -> None:
        """Write the trained models as folders: the first role's is `folder`, another's is `folder`/ROLE. Collective."""
        for i, (role, engine) in enumerate(self.engines.items()):
            export(engine, folder if i == 0 else folder / role, self.tokenizer, self.bases[role])

    def save(self, progress: Progress) -> Path:
        """Write checkpoint-<step> and return its folder, which gets this name when every rank's part is in it; then
        remove old checkpoints. Collective."""
        final = self.output_dir / f"checkpoint-{progress.step}"
        staging = self.output_dir / f".staging-{progress.step}"
        if dist.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        dist.barrier()
        self.export(staging)
        for role, engine in self.engines.items():
            engine.save_checkpoint(
                str(staging / "engines"), tag=role, save_latest=False, exclude_frozen_parameters=self.adapters_only
            )
        save_file(_random_state(), staging / f"random-{dist.rank()}.safetensors")
        dist.barrier()
        if dist.rank() == 0:
            content = {"progress": progress.as_dict(), "fingerprint": self.fingerprint}
            (staging / PROGRESS_FILE).write_text(json.dumps(content, indent=2))
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
            self._rotate(progress)
        dist.barrier()
        return final

    def _rotate(self, progress: Progress) -> None:
        """Remove all checkpoints but the newest `keep` and the one with the lowest evaluation loss."""
        found = checkpoints(self.output_dir)
        for step in sorted(found)[: -self.keep or None]:
            if step != progress.best_step:
                shutil.rmtree(found[step])

    def load(self, folder: Path) -> Progress:
        """Restore the engines and the random state from a checkpoint's folder; returns its progress. Collective.

        Raises ValueError where the checkpoint's run had other settings, naming each key with both values, or where the
        folder has no DeepSpeed state for a role.
        """
        content = json.loads((folder / PROGRESS_FILE).read_text())
        theirs = content["fingerprint"]
        older = {"epochs"} - theirs.keys()  # not yet written by an earlier version; batches tell the same
        other = {k: (theirs.get(k), v) for k, v in self.fingerprint.items() if theirs.get(k) != v and k not in older}
        if "epochs" in other:
            other.pop("batches", None)  # follows from them
        if other:
            lines = "; ".join(f"{WORDS.get(k, k)} was {a}, is {b}" for k, (a, b) in other.items())
            raise ValueError(
                f"resume: {folder} comes from a run with other settings: {lines}; resume with what it was, or start a "
                f"new run from its model with --model {folder} and another --output_dir"
            )
        for role, engine in self.engines.items():
            if not (folder / "engines" / role).is_dir():
                raise ValueError(f"resume: {folder} has no DeepSpeed state for the {role}")
            engine.load_checkpoint(str(folder / "engines"), tag=role, load_module_strict=not self.adapters_only)
        _restore_random_state(load_file(folder / f"random-{dist.rank()}.safetensors"))
        return Progress(**content["progress"])


def begin(config: RunConfig, store: Checkpoints, command: str) -> Progress:
    """Open a run's output folder and return the progress from which it trains: that of the checkpoint that --resume
    names, with engines restored as by `Checkpoints.load`, or zero.

    A new run gets a new folder with its configuration and command. Raises ValueError as `Checkpoints.load`, `find` and
    `move_aside` do. Collective.
    """
    if config.output.resume:
        return store.load(find(config.output.resume, store.output_dir))
    dist.together(lambda: _new_folder(config, command) if dist.rank() == 0 else None)
    return Progress()


def _new_folder(config: RunConfig, command: str) -> None:
    """Make the output folder, with config.yaml and command.txt; an earlier run's folder of that name is moved aside."""
    output_dir, models = Path(config.output.output_dir), config.models
    read = [models.model, models.ref_model, models.reward_model, *config.data.dataset, *config.data.val_dataset]
    if moved := move_aside(output_dir, read):
        logger.warning("%s holds an earlier run: moved to %s", output_dir, moved)
    output_dir.mkdir(parents=True, exist_ok=True)
    if moved:
        folder_lock.keep(moved, output_dir)
    config.to_yaml(output_dir / "config.yaml")
    (output_dir / "command.txt").write_text(redacted(command) + "\n")


def fingerprint(config: RunConfig, num_rows: int, total_batches: int) -> dict[str, Any]:
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


def checkpoints(output_dir: Path) -> dict[int, Path]:
    """Step -> folder of each whole checkpoint in an output folder."""
    found = (re.fullmatch(r"checkpoint-(\d+)", p.name) for p in output_dir.glob("checkpoint-*"))
    return {int(m[1]): output_dir / m[0] for m in found if m and (output_dir / m[0] / PROGRESS_FILE).exists()}


def find(resume: str, output_dir: Path) -> Path:
    """The checkpoint folder that the value of --resume names: a path, or `latest` for the newest in `output_dir`.

    Raises ValueError where the path is no checkpoint, or `output_dir` has none.
    """
    if resume != "latest":
        folder = Path(resume).expanduser()
        if not (folder / PROGRESS_FILE).exists():
            raise ValueError(f"resume: {resume} is no checkpoint folder (it has no {PROGRESS_FILE})")
        return folder
    found = checkpoints(output_dir)
    if not found:
        raise ValueError(f"resume: no checkpoint-N in {output_dir}; leave --resume out to start a new run")
    return found[max(found)]


def move_aside(output_dir: Path, inputs: Sequence[str | None]) -> Path | None:
    """Rename the folder of an earlier run to NAME.1, NAME.2, ...; returns its new path, or None where there was no run.

    Raises ValueError where one of `inputs` (paths or names) lies inside it, as it would be gone from its place.
    """
    if not (output_dir / "metrics.jsonl").exists():
        return None
    for name in inputs:
        if name and Path(name).expanduser().resolve().is_relative_to(output_dir.resolve()):
            raise ValueError(
                f"output_dir: {output_dir} holds an earlier run that this one reads from ({name}); give another "
                "--output_dir"
            )
    number = next(n for n in itertools.count(1) if not output_dir.with_name(f"{output_dir.name}.{n}").exists())
    return output_dir.rename(output_dir.with_name(f"{output_dir.name}.{number}"))


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    text = json.dumps(random.getstate())
    state["python"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return state


def _restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    version, internal, gauss = json.loads(bytes(state["python"].tolist()).decode())
    random.setstate((version, tuple(internal), gauss))
