"""Folders that appear whole or not at all: all ranks write under another name, rank 0 checks each part and renames."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors.torch import save_file

from dsalign import faults
from dsalign.checkpoint import durable, manifest
from dsalign.checkpoint.manifest import Entry, Manifest
from dsalign.endings import Ending
from dsalign.engines import dist

STAGING, REPLACED, TRASH = ".staging-", ".replaced-", ".trash-"  # in front of the name of the folder that it stands for
_OURS = re.compile(r"(?:checkpoint-)?\d+|final")  # the names behind these marks
THREADS = 2  # that hash and flush while the rank writes on


class NotSavedError(Ending):
    """The error of a checkpoint or an export that could not be written; earlier ones are as they were."""


class Parts:
    """What this rank writes into a staged folder: every file is hashed and flushed to the disk by threads, and a
    failure is kept in place of raised, as the other ranks are in the same collectives. After a failure nothing more is
    written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.error: Exception | None = None
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="dsalign-save")
        self._sealing: dict[str, Future[Entry]] = {}

    def attempt(self, call: Callable[[], Any]) -> None:
        """Call a function that writes, and keep what it raises; it is left out after a failure."""
        if self.error is None:
            try:
                call()
            except Exception as error:  # whatever it is: the other ranks are waiting
                self.error = error

    def pickle(self, value: Any, path: Path) -> None:
        """Write a value as DeepSpeed would, by torch.save, without the zip's own checksums, which sha256 replaces."""
        self.attempt(lambda: self._pickle(value, path))

    def _pickle(self, value: Any, path: Path) -> None:
        faults.at("before_shard")
        file = durable.PatientFile(path)
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            torch.save(value, cast(IO[bytes], file))
        finally:
            torch.serialization.set_crc32_options(before)
            file.close()
        if file.error is not None:
            raise OSError(file.error.errno, file.error.strerror, str(path))
        self.seal(path)

    def tensors(self, values: Mapping[str, torch.Tensor], name: str) -> None:
        """Write tensors as `name`, a safetensors file."""
        self.attempt(lambda: save_file(dict(values), self.folder / name))
        self.seal(self.folder / name)

    def text(self, content: str, name: str) -> None:
        """Write a text file called `name`."""
        self.attempt(lambda: (self.folder / name).write_text(content, encoding="utf-8"))
        self.seal(self.folder / name)

    def seal(self, *paths: Path) -> None:
        """Hash and flush files that this rank has written, in the background."""
        for path in paths if self.error is None else ():
            self._sealing[self._name(path)] = self.threads.submit(_sealed, path)

    def sealed(self) -> bool:
        """Whether all files that this rank has written are on the disk by now, or one has failed."""
        return all(future.done() for future in self._sealing.values())

    def entries(self) -> dict[str, Entry]:
        """Path inside the folder -> entry, of each file of this rank, when all are on the disk."""
        found: dict[str, Entry] = {}
        self.attempt(lambda: found.update((name, future.result()) for name, future in self._sealing.items()))
        return found

    def close(self) -> None:
        """End the threads when their work is done."""
        self.threads.shutdown()

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


class Staged:
    """A folder that is written, and has its name when `finish` was called.

    fill: called on every rank to write its files, in collectives that it shares with the others; it keeps failures in
    its `Parts`. When it returns, the caller's tensors may change. about: files -> the manifest, asked on rank 0 alone.
    Collective. Raises NotSavedError on the first rank that failed and dist.ElsewhereError on the others; nothing is
    left then.
    """

    def __init__(
        self, final: Path, fill: Callable[[Parts], None], about: Callable[[dict[str, Entry]], Manifest]
    ) -> None:
        self.final, self._about = final, about
        self._parts = parts = Parts(final.with_name(f"{STAGING}{final.name}"))
        with self._or_nothing():
            parts.attempt(lambda: purge(final.parent) if dist.rank() == 0 else None)
            _agree(parts, final)
            parts.attempt(lambda: parts.folder.mkdir(parents=True, exist_ok=True))  # also where the disk is not shared
            fill(parts)
            _agree(parts, final)

    def ready(self) -> bool:
        """Whether `finish` would find every file of this rank on the disk, and not wait for it."""
        return self._parts.sealed()

    def finish(self) -> None:
        """Give the folder its name, in place of an older one, when all ranks' files are hashed and on the disk.
        Collective. Raises as the constructor does."""
        parts, final = self._parts, self.final
        with self._or_nothing():
            mine = parts.entries()
            faults.at("after_shards")
            _agree(parts, final)
            every = dist.everyones((mine, socket.gethostname()))
            parts.attempt(lambda: _commit(parts, final, self._about, every) if dist.rank() == 0 else None)
            _agree(parts, final)
        parts.close()

    @contextmanager
    def _or_nothing(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._parts.close()
            shutil.rmtree(self._parts.folder, ignore_errors=True)
            raise


def write(final: Path, fill: Callable[[Parts], None], about: Callable[[dict[str, Entry]], Manifest]) -> None:
    """Write the folder `final`, of which nothing is seen before it is whole; an older one is replaced. Collective.
    Arguments and errors are those of `Staged`."""
    Staged(final, fill, about).finish()


def _agree(parts: Parts, final: Path) -> None:
    error = parts.error
    if error is not None and not isinstance(error, Ending):
        error = NotSavedError(_sentence(error, parts.folder, final))
        error.__cause__ = parts.error
    dist.agree(error)


def _sentence(error: Exception, folder: Path, final: Path) -> str:
    """What failed, where, and what to do."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError):
        text = f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror or error)
    text = text.replace(f"{folder}{os.sep}", "").splitlines()[0][:300]
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        with suppress(OSError):
            text += f"; {shutil.disk_usage(final.parent).free / 1e6:,.0f} MB are free in {final.parent}"
        text += "; make room there"
    return (
        f"{final} was not saved: {text}. Earlier checkpoints are as they were; when the cause is gone, go on from the "
        "last one with --resume"
    )


def _commit(
    parts: Parts,
    final: Path,
    about: Callable[[dict[str, Entry]], Manifest],
    every: Sequence[tuple[dict[str, Entry], str]],
) -> None:
    """Check every rank's part, write the manifest, flush all, and rename."""
    folder, files = parts.folder, dict[str, Entry]()
    for rank, (entries, host) in enumerate(every):
        for name, entry in entries.items():
            path = folder / name
            if not path.is_file() or path.stat().st_size != entry.size:
                there = f"{path.stat().st_size} bytes" if path.is_file() else "nothing"
                raise NotSavedError(
                    f"{final} was not saved: rank {rank} on {host} wrote {entry.size} bytes to {name}, and rank 0 on "
                    f"{every[0][1]} finds {there} there. Expected one disk for all ranks: give an --output_dir that "
                    "every machine shares"
                )
        files |= entries
    paths = [path for path in folder.rglob("*") if path.is_file()]
    rest = [path for path in paths if path.relative_to(folder).as_posix() not in files]
    sealed = parts.threads.map(_sealed, rest)
    files |= {path.relative_to(folder).as_posix(): entry for path, entry in zip(rest, sealed, strict=True)}
    faults.at("before_manifest")
    manifest.write(folder, about(files))
    faults.at("after_manifest")
    for one in sorted({path.parent for path in paths} - {folder}):
        durable.sync(one)
    faults.at("before_rename")
    old = final.with_name(f"{REPLACED}{final.name}")
    if final.exists():
        final.rename(old)
        faults.at("mid_replace")
    folder.rename(final)
    durable.sync(final.parent)
    faults.at("after_commit")
    shutil.rmtree(old, ignore_errors=True)


def _sealed(path: Path) -> Entry:
    faults.at("in_seal")
    durable.sync(path)
    return manifest.entry_of(path)


def discard(folder: Path) -> None:
    """Remove a folder so that a kill in the middle leaves no half of it under its name. Raises OSError."""
    trash = folder.with_name(f"{TRASH}{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    faults.at("in_rotation")
    shutil.rmtree(trash)


def purge(output_dir: Path) -> None:
    """Remove what a killed save, rotation or export has left in an output folder. A folder that was about to be
    replaced gets its name back, if the new one has not come to have it. Raises OSError."""
    for mark in (REPLACED, STAGING, TRASH):
        for path in output_dir.glob(f"{mark}*"):
            name = path.name.removeprefix(mark)
            if not _OURS.fullmatch(name):
                continue
            if mark == REPLACED and not path.with_name(name).exists():
                path.rename(path.with_name(name))
            else:
                shutil.rmtree(path, ignore_errors=True)
