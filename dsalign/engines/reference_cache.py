"""Log-probabilities of the frozen reference, computed once and kept on disk: every epoch and evaluation reads them."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

from dsalign.config.cache import cache_folder
from dsalign.contract.groups import Group
from dsalign.data.batches.loader import Loader
from dsalign.data.tokens.group_store import LazyGroups
from dsalign.engines import dist
from dsalign.engines.roles import Models
from dsalign.models.names import Source

logger = logging.getLogger(__name__)
PART = 1024  # groups a file
WEIGHTS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
READ_BYTES = 1 << 24
FORMAT = "1"  # of the files; another one is another key


class Asked(LazyGroups):
    """What `prepare` asks the reference about in the batches of a loader, put together when it is read: in the first
    epoch each group and behind it the other one of the same prompt, so that this is computed once; later the others.

    asks: the groups of a global batch -> as many others (KTO's mismatched ones).
    """

    def __init__(self, asks: Callable[[Sequence[Group]], list[Group]], loader: Loader, num_batches: int) -> None:
        self._asks, self._loader, self._last = asks, loader, (-1, list[Group]())
        first = min(num_batches, loader.steps_per_epoch)
        self._starts = [loader.seen(step) + loader.seen(min(step, first)) for step in range(num_batches + 1)]

    def __len__(self) -> int:
        return self._starts[-1]

    def _at(self, index: int) -> Group:
        step = bisect_right(self._starts, index) - 1
        if self._last[0] != step:
            own = self._loader.groups_of(step)
            others = self._asks(own)
            both = [group for two in zip(own, others, strict=True) for group in two]
            self._last = step, both if step < self._loader.steps_per_epoch else others
        return self._last[1][index - self._starts[step]]


class ReferenceCache:
    """The token log-probabilities of every group of some sets under one reference, a folder a set.

    A group is known by its token ids: one that is put together elsewhere is computed when it is asked for.
    """

    def __init__(self, sets: Sequence[Sequence[Group]], key: str) -> None:
        """key: of the reference's weights and dtype, see `weights_key`."""
        self.folder = cache_folder() / "reference"
        self._sets = [_CachedSet(groups, key) for groups in sets if len(groups)]

    def complete(self, device: torch.device) -> bool:
        """Whether everything is there, on every rank. device: this rank's. Collective."""
        return all([one.complete(device) for one in self._sets])

    def fill(self, models: Models) -> int:
        """Compute what is missing on any rank; returns how many groups that were. Collective.

        A part appears under its name when it is whole, so a run that was stopped goes on where it was.
        """
        return sum(one.fill(models) for one in self._sets)

    def get(self, group: Group) -> Tensor | None:
        """[tokens of the group's completions] float32 nats, or None for a group that is no part of the cache."""
        wanted = np.uint64(digest(group))
        found = (one.get(wanted) for one in self._sets)
        return next((logps for logps in found if logps is not None), None)

    def logps(self, models: Models, groups: Sequence[Group], batch_size: int | None = None) -> list[Tensor]:
        """One tensor a group: read where it is part of the cache, else computed. Collective."""
        found = [self.get(group) for group in groups]
        missing = [i for i, one in enumerate(found) if one is None]
        if dist.largest(len(missing), models.device):
            computed = models.each_group("reference", [groups[i] for i in missing], batch_size)
            for i, one in zip(missing, computed, strict=True):
                found[i] = one
        return [one for one in found if one is not None]


class _CachedSet:
    """The log-probabilities of one set of groups, in files of PART groups."""

    def __init__(self, groups: Sequence[Group], key: str) -> None:
        self._groups = groups
        known = ((digest(group), sum(group.lengths)) for group in groups)
        read = np.fromiter(known, dtype=[("digest", np.uint64), ("length", np.int64)], count=len(groups))
        digests, lengths = read["digest"].copy(), read["length"]
        self.folder = cache_folder() / "reference" / hashlib.sha256(key.encode() + digests.tobytes()).hexdigest()[:32]
        self._order = np.argsort(digests, kind="stable")
        self._sorted = digests[self._order]
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        self._files: list[Any] = [self._open(part) for part in self._parts()]

    def _parts(self) -> range:
        return range(-(-len(self._groups) // PART))

    def _path(self, part: int) -> Path:
        return self.folder / f"part-{part:05}.safetensors"

    def complete(self, device: torch.device) -> bool:
        return dist.largest(self._files.count(None), device) == 0

    def fill(self, models: Models) -> int:
        computed = 0
        for part in self._parts():
            if not dist.largest(int(self._files[part] is None), models.device):
                continue
            first = part * PART
            count = min(PART, len(self._groups) - first)
            start, end = (first + count * rank // dist.world_size() for rank in (dist.rank(), dist.rank() + 1))
            found = models.each_group("reference", [self._groups[i] for i in range(start, end)])
            flat = torch.cat([torch.empty(0), *found]).double()
            self._write(part, dist.gather(flat, models.device).float())
            computed += count
        return computed

    def _write(self, part: int, flat: Tensor) -> None:
        """flat: the tokens of the part's groups."""
        path = self._path(part)
        for turn in (True, False):  # rank 0, then ranks that do not see its file system
            missing = self._files[part] is None and (dist.rank() == 0) is turn
            dist.together(lambda missing=missing: _save(flat, path) if missing else None)  # type: ignore[misc]
            self._files[part] = self._files[part] or self._open(part)

    def _length(self, position: int) -> int:
        return int(self._starts[position + 1] - self._starts[position])

    def _open(self, part: int) -> Any:
        """The part's file; None where there is none, or it does not verify, which is said."""
        path = self._path(part)
        if not path.exists():
            return None
        last = min((part + 1) * PART, len(self._groups))
        try:
            file: Any = safe_open(path, framework="pt")
            logps, want = file.get_tensor("logps"), (file.metadata() or {}).get("sha256")
        except (SafetensorError, OSError) as error:
            logps, want = torch.empty(0), str(error)
        if want == _checksum(logps) and len(logps) == int(self._starts[last] - self._starts[part * PART]):
            return file
        logger.warning("reference cache: %s does not match its checksum and is computed again", path)
        return None

    def get(self, wanted: np.uint64) -> Tensor | None:
        """The log-probabilities of the group with that digest, or None."""
        at = int(np.searchsorted(self._sorted, wanted))
        if at == len(self._sorted) or self._sorted[at] != wanted:
            return None
        position = int(self._order[at])
        part = position // PART
        file = self._files[part]
        assert file is not None, "fill comes first"
        start = int(self._starts[position] - self._starts[part * PART])
        found: Tensor = file.get_slice("logps")[start : start + self._length(position)]
        return found


def digest(group: Group) -> int:
    """64 bits of what the model sees of a group and of which tokens count."""
    hashed = hashlib.blake2b(digest_size=8)
    for ids in (group.prompt, *group.completions):
        hashed.update(array("i", [len(ids), *ids]).tobytes())
    for mask in group.masks or ():
        hashed.update(bytes(mask))
    return int.from_bytes(hashed.digest(), sys.byteorder)


def weights_key(source: Source, dtype: torch.dtype) -> str:
    """A hash of every byte of a source's weights, configuration and adapter, and of the dtype they compute in."""
    hashed = hashlib.sha256(f"{FORMAT} {dtype}".encode())
    for path in _weight_files(source):
        hashed.update(f"{path.name} {path.stat().st_size} ".encode())
        with path.open("rb") as file:
            while block := file.read(READ_BYTES):
                hashed.update(block)
    return hashed.hexdigest()


def _weight_files(source: Source) -> Iterator[Path]:
    folder = Path(source.weights)
    if not folder.is_dir():  # a hub name, whose files transformers has in its cache by now
        folder = Path(str(cached_file(source.weights, "config.json"))).parent
    for where in (folder, source.adapter):
        if where is not None:
            yield from sorted({path for pattern in WEIGHTS for path in where.glob(pattern)})


def _checksum(logps: Tensor) -> str:
    return hashlib.sha256(logps.numpy().tobytes()).hexdigest()


def _save(logps: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{dist.rank()}.{os.getpid()}")
    save_file({"logps": logps}, staging, metadata={"sha256": _checksum(logps)})
    staging.replace(path)
