"""DeepSpeed's files of an engine: written through a staged folder, and read without running what a pickle may hold."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointCommitInfo, CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from dsalign import faults
from dsalign.checkpoint.manifest import BrokenError, Manifest
from dsalign.checkpoint.staged import Parts

CLASSES = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]  # all that DeepSpeed 0.19.8 pickles
PICKLES = (".pt", ".bin", ".pth", ".pkl")


class _Files(CheckpointEngine):  # type: ignore[misc]  # DeepSpeed has no types
    """What DeepSpeed writes and reads through in place of its own: `parts` for a save, `folder` for a load."""

    def __init__(self, parts: Parts | None = None, folder: Path | None = None, listed: Manifest | None = None,
                 *, trusted: bool = False) -> None:  # fmt: skip
        self.name, self._parts, self._folder, self._listed, self._trusted = "dsalign", parts, folder, listed, trusted

    def create(self, info: CheckpointCommitInfo) -> None:
        """Do nothing: the staged folder is there."""

    def commit(self, info: CheckpointCommitInfo) -> bool:
        """Do nothing: `staged.Staged` commits what all engines wrote at once."""
        return True

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder; a failure is kept, not raised."""
        assert self._parts is not None
        self._parts.attempt(lambda: Path(path).mkdir(parents=True, exist_ok=exist_ok))

    def save(self, state_dict: Any, path: str) -> None:
        """Write a file; a failure is kept, not raised."""
        assert self._parts is not None
        self._parts.pickle(state_dict, Path(path))

    def load(self, path: str, map_location: Any = None) -> Any:
        """The content of a file that the manifest lists. Raises BrokenError for another one."""
        assert self._folder is not None
        name = Path(path).relative_to(self._folder).as_posix()
        if self._listed is not None and name not in self._listed.files:
            raise BrokenError(f"{name} is not listed in the manifest")
        with known_classes():
            return torch.load(path, map_location=map_location, weights_only=not self._trusted)


@contextmanager
def _instead(engine: Any, files: _Files) -> Iterator[None]:
    before = engine.checkpoint_engine
    engine.checkpoint_engine = files
    engine._copy_recovery_script = lambda path: None  # a script that opens pickles; the model is beside them anyway
    try:
        yield
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script


def save(engine: Any, role: str, parts: Parts, *, adapters_only: bool) -> None:
    """Write an engine's DeepSpeed state to engines/ROLE of a staged folder. Failures of files go to `parts`.
    Collective."""
    with _instead(engine, _Files(parts)):
        engine.save_checkpoint(
            str(parts.folder / "engines"), tag=role, save_latest=False, exclude_frozen_parameters=adapters_only
        )
    faults.at(f"after_{role}")


def load(engine: Any, role: str, folder: Path, listed: Manifest | None, *, trusted: bool, strict: bool) -> None:
    """Restore an engine from engines/ROLE of a checkpoint's folder. Collective.

    listed: the manifest that the files were checked against, None where there is none. trusted: whether a pickle may
    run whatever it holds; if not, only tensors, plain Python values and `CLASSES` are made. strict: whether every
    weight must be there, which is not so where frozen ones were left out.
    """
    with _instead(engine, _Files(folder=folder, listed=listed, trusted=trusted)):
        engine.load_checkpoint(str(folder / "engines"), tag=role, load_module_strict=strict)


@contextmanager
def known_classes() -> Iterator[None]:
    """A context in which pickles may make objects of `CLASSES`, in all threads."""
    with torch.serialization.safe_globals(CLASSES):
        yield


def unknown_classes(path: Path) -> list[str]:
    """What a file of DeepSpeed's would import beyond `CLASSES`, by dotted name, found without running it; a file that
    is no pickle has none. To be called within `known_classes`. Raises BrokenError where torch did not write it."""
    if path.suffix not in PICKLES:
        return []
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (ValueError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise BrokenError(f"{path.name} is no file of torch.save ({str(error).splitlines()[0][:100]})") from None
