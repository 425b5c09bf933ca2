"""The folders checkpoint-N/ of a run: written under another name, renamed when whole, rotated, read by --resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from dsalign.checkpoint import fingerprint, folders
from dsalign.checkpoint.export import export
from dsalign.checkpoint.progress import Progress
from dsalign.checkpoint.random_state import random_state, restore_random_state
from dsalign.config.rules import PROGRESS_FILE
from dsalign.config.schema import OutputOptions, RunConfig
from dsalign.endings import Diverged
from dsalign.engines import dist
from dsalign.engines.finite import non_finite


class Checkpoints:
    """The checkpoints of one run.

    options: where, and how many are kept. engines: trained role -> its engine, the main role first; a checkpoint has
    each one's DeepSpeed state and its model as a folder. bases: role -> the model that its adapter belongs to.
    settings: those that a resumed run must share, see `fingerprint.settings`. adapters_only: whether frozen base
    weights are left out of the DeepSpeed state.
    """

    def __init__(
        self,
        options: OutputOptions,
        engines: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        bases: Mapping[str, str],
        settings: Mapping[str, Any],
        *,
        adapters_only: bool,
    ) -> None:
        self.output_dir, self.keep = Path(options.output_dir), options.save_total_limit
        self.engines, self.tokenizer, self.bases = engines, tokenizer, bases
        self.settings, self.adapters_only = dict(settings), adapters_only

    def export(self, folder: Path) -> None:
        """Write the trained models as folders: the first role's is `folder`, another's is `folder`/ROLE. Collective.

        Raises Diverged as `refuse_non_finite` does.
        """
        self.refuse_non_finite(str(folder))
        self._export(folder)

    def refuse_non_finite(self, what: str) -> None:
        """Raise Diverged on every rank where a trained weight or a number of an optimizer is not finite on any, so that
        none is ever written. Collective. what: that is not written, for the message."""
        if broken := non_finite(self.engines):
            last = max(folders.checkpoints(self.output_dir), default=None)
            back = (
                "start again" if last is None else f"go on from {self.output_dir / f'checkpoint-{last}'} with --resume"
            )
            raise Diverged(
                f"{what} is not written, as numbers of the model are no longer finite: {broken}; {back} and a lower "
                "--learning_rate"
            )

    def _export(self, folder: Path) -> None:
        for i, (role, engine) in enumerate(self.engines.items()):
            export(engine, folder if i == 0 else folder / role, self.tokenizer, self.bases[role])

    def save(self, progress: Progress) -> Path:
        """Write checkpoint-<step> and return its folder, which gets this name when every rank's part is in it; then
        remove old checkpoints. Collective. Raises Diverged as `refuse_non_finite` does."""
        self.refuse_non_finite(f"checkpoint-{progress.step}")
        final = self.output_dir / f"checkpoint-{progress.step}"
        staging = self.output_dir / f".staging-{progress.step}"
        if dist.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        dist.barrier()
        self._export(staging)
        for role, engine in self.engines.items():
            engine.save_checkpoint(
                str(staging / "engines"), tag=role, save_latest=False, exclude_frozen_parameters=self.adapters_only
            )
        save_file(random_state(), staging / f"random-{dist.rank()}.safetensors")
        dist.barrier()
        if dist.rank() == 0:
            content = {"progress": progress.as_dict(), "fingerprint": self.settings}
            (staging / PROGRESS_FILE).write_text(json.dumps(content, indent=2))
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
            self._rotate(progress)
        dist.barrier()
        return final

    def _rotate(self, progress: Progress) -> None:
        """Remove all checkpoints but the newest `keep` and the one with the lowest evaluation loss."""
        found = folders.checkpoints(self.output_dir)
        for step in sorted(found)[: -self.keep or None]:
            if step != progress.best_step:
                shutil.rmtree(found[step])

    def load(self, folder: Path) -> Progress:
        """Restore the engines and the random state from a checkpoint's folder; returns its progress. Collective.

        Raises ValueError where the checkpoint's run had other settings, naming each key with both values, or where the
        folder has no DeepSpeed state for a role.
        """
        content = json.loads((folder / PROGRESS_FILE).read_text())
        fingerprint.compare(content["fingerprint"], self.settings, folder)
        for role, engine in self.engines.items():
            if not (folder / "engines" / role).is_dir():
                raise ValueError(f"resume: {folder} has no DeepSpeed state for the {role}")
            engine.load_checkpoint(str(folder / "engines"), tag=role, load_module_strict=not self.adapters_only)
        restore_random_state(load_file(folder / f"random-{dist.rank()}.safetensors"))
        return Progress(**content["progress"])


def begin(config: RunConfig, store: Checkpoints, command: str) -> Progress:
    """Open a run's output folder and return the progress from which it trains: that of the checkpoint that --resume
    names, with engines restored as by `Checkpoints.load`, or zero.

    A new run gets a new folder with its configuration and command. Raises ValueError as `Checkpoints.load`, `find` and
    `move_aside` do. Collective.
    """
    if config.output.resume:
        return store.load(folders.find(config.output.resume, store.output_dir))
    dist.together(lambda: folders.new_folder(config, command) if dist.rank() == 0 else None)
    return Progress()
