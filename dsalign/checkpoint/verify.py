"""Checkpoints held against their manifests before anything in them is used, by all ranks together."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dsalign.checkpoint import manifest, run_folders, shards
from dsalign.checkpoint.manifest import MANIFEST, BrokenError, Entry, Manifest
from dsalign.config.file_rules import PROGRESS_FILE
from dsalign.engines import dist

logger = logging.getLogger(__name__)
THREADS = 4  # that read and hash files, at most


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that may be loaded: its folder, its manifest (None where the user vouches for a folder without one),
    and whether the user trusts what its pickles may run."""

    folder: Path
    listed: Manifest | None
    trusted: bool


def choose(found: Iterable[Path], output_dir: Path, *, latest: bool, trusted: bool) -> Checkpoint:
    """The first checkpoint of `found`, the best first, that is whole and the run's own. Collective.

    output_dir: the run's. latest: whether the others are skipped, with a warning that names the file, or refused.
    trusted: whether one of another run will do, and one without a manifest.
    Raises ValueError on every rank where none will do, with the reason for each.
    """
    reasons = []
    for folder in dist.from_rank_0(list(found)):
        try:
            return _usable(folder, output_dir, trusted=trusted)
        except BrokenError as error:
            if not latest:
                others = [path.name for path in run_folders.newest_first(output_dir) if path != folder]
                more = f"; in {output_dir} are {', '.join(others)} too: --resume takes the newest whole one"
                raise _refused(f"resume: {folder} cannot be used: {error}{more if others else ''}") from None
            reasons.append(f"{folder.name}: {error}")
            if dist.rank() == 0:
                logger.warning("resume: skipping %s: %s", folder, error)
    raise _refused(
        f"resume: no checkpoint in {output_dir} can be used: {'; '.join(reasons)}. Nothing was started: put a whole "
        "copy there, or give another --output_dir to begin from step 0"
    )


def _refused(text: str) -> ValueError:
    """The error to raise on every rank alike, of which only rank 0's is shown."""
    return ValueError(text) if dist.rank() == 0 else dist.ElsewhereError(text)


def _usable(folder: Path, output_dir: Path, *, trusted: bool) -> Checkpoint:
    try:
        listed = _manifest(folder)
    except BrokenError:
        if not trusted or dist.from_rank_0((folder / MANIFEST).exists()):
            raise
        if dist.rank() == 0:
            logger.warning("resume: %s has no %s: nothing says whether its files are whole", folder, MANIFEST)
        return Checkpoint(folder, None, trusted=True)
    if PROGRESS_FILE not in listed.files:
        raise BrokenError(f"{MANIFEST} lists no {PROGRESS_FILE}")
    inside = folder.resolve().is_relative_to(output_dir.resolve())
    run = dist.together(lambda: run_folders.run_of(output_dir) if inside and dist.rank() == 0 else None)
    if not dist.from_rank_0(run == listed.run) and not trusted:
        raise BrokenError(
            f"it is no checkpoint of the run in {output_dir}, and DeepSpeed's files may run code when they are opened; "
            "if you know who wrote them, give --trust_checkpoint true"
        )
    check(folder, listed.files, trusted=trusted)
    return Checkpoint(folder, listed, trusted)


def check(folder: Path, files: Mapping[str, Entry], *, trusted: bool = False) -> None:
    """Read the files of a folder and compare them with their entries; every rank reads a share. Collective.

    trusted: whether a pickle among them may hold more than tensors, plain values and DeepSpeed's classes.
    Raises BrokenError on every rank where one differs, naming the first.
    """

    def fault(name: str) -> str | None:
        said = manifest.fault_of(folder, name, files[name])
        if said is None and not trusted and name.startswith("engines/"):
            try:
                unknown = shards.unknown_classes(folder / name)
            except BrokenError as error:
                return str(error)
            if unknown:
                return (
                    f"{name} would import {', '.join(unknown)}, which is no part of a checkpoint and may run code; "
                    "--trust_checkpoint true allows it"
                )
        return said

    with shards.known_classes():
        said = _faults(sorted(files, key=lambda name: (-files[name].size, name)), fault)
    if said:
        raise BrokenError(said[0] + (f", and {len(said) - 1} more" if len(said) > 1 else ""))


def _faults(names: list[str], fault: Callable[[str], str | None]) -> list[str]:
    """What `fault` says of the names, dealt to the ranks in turn, so that each has large and small files."""
    mine = names[dist.rank() :: dist.world_size()]
    here = "" if dist.world_size() == 1 else f" (as rank {dist.rank()} on {socket.gethostname()} sees it)"
    with ThreadPoolExecutor(min(THREADS, len(os.sched_getaffinity(0)))) as threads:
        said = [f"{one}{here if one.endswith('missing') else ''}" for one in threads.map(fault, mine) if one]
    return sorted(one for part in dist.everyones(said) for one in part)


def _manifest(folder: Path) -> Manifest:
    """The manifest as rank 0 reads it, for every rank. Raises BrokenError on every rank."""
    found: Manifest | str = ""
    if dist.rank() == 0:
        try:
            found = manifest.read(folder)
        except BrokenError as error:
            found = str(error)
    found = dist.from_rank_0(found)
    if isinstance(found, str):
        raise BrokenError(found)
    return found
