"""The folders checkpoint-N/ of a run: written under another name, renamed when whole, rotated, read by --resume."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from dsalign import faults
from dsalign.checkpoint import fingerprint, prepared_file, reshard, run_folders, shards, staged, verify
from dsalign.checkpoint.export import written
from dsalign.checkpoint.manifest import Entry, Manifest
from dsalign.checkpoint.progress import Progress
from dsalign.checkpoint.random_state import random_state, restore_random_state, seed_random_state
from dsalign.checkpoint.verify import Checkpoint
from dsalign.config.file_rules import PROGRESS_FILE
from dsalign.config.schema import OutputOptions, RunConfig
from dsalign.endings import Diverged
from dsalign.engines import dist
from dsalign.engines.finite import non_finite

logger = logging.getLogger(__name__)


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
        self.settings, self.adapters_only, self.trusted = dict(settings), adapters_only, options.trust_checkpoint
        self.changes: list[str] = []  # of the settings that a resumed run changes, a line each
        self._started: tuple[staged.Staged, int | None] | None = None  # not named yet; the step that was the best then

    def export(self, folder: Path, step: int = 0, card: Callable[[Path], None] | None = None) -> None:
        """Write the trained models as folders: the first role's is `folder`, another's is `folder`/ROLE. An earlier
        `folder` is replaced when the new one is whole. step: optimizer steps taken. card: called on rank 0 with the
        folder in which all is, before it gets its name, to add what describes it. Collective.

        Raises NotSavedError as `staged.Staged` does, and Diverged as `refuse_non_finite` does.
        """
        self.settle()
        self.refuse_non_finite(str(folder))

        def fill(parts: staged.Parts) -> None:
            self._models(parts)
            if card is not None and dist.rank() == 0:
                parts.attempt(lambda: card(parts.folder))

        staged.write(folder, fill, lambda files: self._about(files, step))

    def refuse_non_finite(self, what: str) -> None:
        """Raise Diverged on every rank where a trained weight or a number of an optimizer is not finite on any, so that
        none is ever written. Collective. what: that is not written, for the message."""
        if broken := non_finite(self.engines):
            last = next(iter(run_folders.newest_first(self.output_dir)), None)
            back = "start again" if last is None else f"go on from {last} with --resume"
            raise Diverged(
                f"{what} is not written, as numbers of the model are no longer finite: {broken}; {back} and a lower "
                "--learning_rate"
            )

    def _models(self, parts: staged.Parts) -> None:
        for i, (role, engine) in enumerate(self.engines.items()):
            folder = parts.folder if i == 0 else parts.folder / role
            error = written(engine, folder, self.tokenizer, self.bases[role])
            if error is not None:
                parts.error = parts.error or error
            elif dist.rank() == 0:
                parts.seal(*(path for path in folder.iterdir() if path.is_file()))

    def save(self, progress: Progress) -> Path:
        """Write checkpoint-<step> and return its folder, which gets this name when every rank's part is in it; then
        remove old checkpoints. Collective. Raises NotSavedError as `staged.Staged` does, and Diverged as
        `refuse_non_finite` does."""
        final = self.start(progress)
        self.settle()
        return final

    def start(self, progress: Progress) -> Path:
        """Do the part of `save` for which training must wait: write the files. They are hashed and flushed to the disk
        while training goes on, and the folder has its name after `settle`. One at a time: an earlier one is settled
        first. Collective; returns and raises as `save` does."""
        self.settle()
        self.refuse_non_finite(f"checkpoint-{progress.step}")
        final = self.output_dir / f"checkpoint-{progress.step}"

        def fill(parts: staged.Parts) -> None:
            self._models(parts)
            for role, engine in self.engines.items():
                shards.save(engine, role, parts, adapters_only=self.adapters_only)
            parts.tensors(random_state(), f"random-{dist.rank()}.safetensors")
            if (prepared := progress.prepared) is not None:
                path = parts.folder / prepared_file.name_of(dist.rank())
                parts.attempt(lambda: prepared_file.write(prepared, path))
                parts.seal(path)
            if dist.rank() == 0:
                content = {"progress": progress.as_dict(), "fingerprint": self.settings}
                parts.text(json.dumps(content, indent=2), PROGRESS_FILE)

        step = progress.step
        self._started = staged.Staged(final, fill, lambda files: self._about(files, step)), progress.best_step
        return final

    @property
    def unsettled(self) -> bool:
        """Whether a checkpoint was started that has no name yet; the same on every rank."""
        return self._started is not None

    def ready(self) -> bool:
        """Whether `settle` has nothing to wait for on this rank."""
        return self._started is None or self._started[0].ready()

    def settle(self) -> None:
        """Give a checkpoint that was started its name, and remove old ones; nothing where there is none. Collective.
        Raises NotSavedError as `staged.Staged` does."""
        if self._started is None:
            return
        (one, best_step), self._started = self._started, None
        one.finish()
        if dist.rank() == 0:
            self._rotate(best_step)
        dist.barrier()

    def _about(self, files: Mapping[str, Entry], step: int) -> Manifest:
        run, serial = run_folders.begun_run(self.output_dir), run_folders.last_serial(self.output_dir) + 1
        return Manifest(files, run=run, serial=serial, step=step)

    def _rotate(self, best_step: int | None) -> None:
        """Remove all checkpoints but the `keep` that were written last and the one with the lowest evaluation loss. A
        checkpoint that cannot be removed is left, with a warning: the run has lost nothing."""
        best = self.output_dir / f"checkpoint-{best_step}"
        for folder in run_folders.newest_first(self.output_dir)[self.keep :]:
            if folder != best:
                try:
                    staged.discard(folder)
                except OSError as error:
                    logger.warning("%s was not removed: %s", folder, error)

    def load(self, folder: Path) -> Progress:
        """Restore the engines and the random state from a checkpoint's folder, when every file in it is as it was
        written; returns its progress. Collective.

        Raises ValueError as `verify.choose` and `restore` do.
        """
        return self.restore(verify.choose([folder], self.output_dir, latest=False, trusted=self.trusted))

    def restore(self, found: Checkpoint) -> Progress:
        """Restore the engines and the random state from a checkpoint that was verified; returns its progress.
        Collective.

        Weights and moments of another number of ranks or another ZeRO stage are dealt anew, see `reshard.load`.
        Raises ValueError where the checkpoint's run had other settings, naming each key with both values, or where the
        folder has no DeepSpeed state for a role.
        """
        folder = found.folder
        content = json.loads((folder / PROGRESS_FILE).read_text())
        theirs = content["fingerprint"]
        try:
            progress = Progress(**content["progress"])
        except TypeError as error:
            raise ValueError(f"resume: {folder} was written by another version of dsalign ({error})") from None
        self.changes = fingerprint.compare(theirs, self.settings, folder)
        moved = reshard.differs(theirs, self.settings)
        for role, engine in self.engines.items():
            if not (folder / "engines" / role).is_dir():
                raise ValueError(f"resume: {folder} has no DeepSpeed state for the {role}")
            if moved:
                reshard.load(engine, folder / "engines" / role)
            else:
                shards.load(engine, role, folder, found.listed, trusted=found.trusted, strict=not self.adapters_only)
        ranks = theirs.get("ranks", dist.world_size())
        if ranks == dist.world_size():
            restore_random_state(load_file(folder / f"random-{dist.rank()}.safetensors"))
        else:
            seed_random_state(int(self.settings["options"]["seed"]), progress.step, dist.rank())
        if progress.taken:
            progress.prepared = prepared_file.read_dealt(folder, ranks, dist.rank(), dist.world_size())
        if fingerprint.evaluates_others(theirs, self.settings):
            progress.best_step = progress.best_loss = None
        return progress


def begin(config: RunConfig, store: Checkpoints, command: str) -> Progress:
    """Open a run's output folder and return the progress from which it trains: that of the checkpoint that --resume
    names, with engines restored as by `Checkpoints.load`, or zero.

    A new run gets a new folder with its configuration and command. In the folder of a resumed run, what it wrote after
    the step from which it goes on is set aside, and what changes is written down. Raises ValueError as `verify.choose`,
    `Checkpoints.restore`, `run_folders.find` and `move_aside` do. Collective.
    """
    output_dir, resume, lead = store.output_dir, config.output.resume, dist.rank() == 0
    dist.together(lambda: staged.purge(output_dir) if lead else None)
    found = dist.from_rank_0(dist.together(lambda: run_folders.find(resume, output_dir) if lead else []))
    if not found:
        dist.together(lambda: run_folders.new_folder(config, command) if lead else None)
        return Progress()
    chosen = verify.choose(found, output_dir, latest=resume in run_folders.NEWEST, trusted=store.trusted)
    progress = store.restore(chosen)
    for line in store.changes:
        logger.warning("resume: %s", line)
    faults.at("before_aside")
    dist.together(lambda: run_folders.set_aside(output_dir, progress.step, chosen.folder) if lead else None)
    dist.together(lambda: run_folders.record(config, command, progress.step, store.changes) if lead else None)
    return progress
