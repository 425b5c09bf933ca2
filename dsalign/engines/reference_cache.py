"""The log-probabilities of the frozen reference, computed once and kept on disk for every epoch, evaluation and run."""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import cached_file

from dsalign.config.cache import cache_folder
from dsalign.config.schema import RunConfig
from dsalign.contract.algorithm import Algorithm, Context
from dsalign.contract.groups import Batch, Group
from dsalign.data.batches.loader import Loader
from dsalign.data.tokens.group_store import LazyGroups
from dsalign.engines import dist
from dsalign.engines.roles import Roles
from dsalign.models.load import resolve_dtype
from dsalign.models.names import Source
from dsalign.report import screen

logger = logging.getLogger(__name__)
PART = 1024  # groups a file
WEIGHTS = ("*.safetensors", "*.bin", "config.json", "adapter_config.json")
READ_BYTES = 1 << 24
FORMAT = "1"  # of the files; another one is another key


class Recorder:
    """A stand-in for `Context` with one rank and no models: it records the groups whose reference log-probabilities an
    algorithm's `prepare` asks for, and returns zeros. It has no method that only online algorithms call."""

    def __init__(self, max_length: int) -> None:
        self.max_length, self.state, self.step = max_length, dict[str, Any](), 0
        self.groups: list[Group] = []

    def logps(self, role: str, groups: Sequence[Group]) -> list[Tensor]:
        if role == "reference":
            self.groups += groups
        return [torch.zeros(sum(group.lengths)) for group in groups]

    def total(self, numbers: Sequence[float]) -> list[float]:
        return list(numbers)

    def gather(self, numbers: Tensor) -> Tensor:
        return numbers

    def warn(self, text: str) -> None:
        pass


def asked_of(algorithm: Algorithm, loader: Loader, num_batches: int, max_length: int) -> Sequence[Group]:
    """The groups whose reference log-probabilities an algorithm needs in the loader's first `num_batches` batches, each
    once.

    Mostly these are the loader's groups: they are returned in their own order, so that the cache is the same for any
    seed and batch size. Where `prepare` builds further groups (KTO's mismatched pairs) it is replayed to find them.
    """
    replayed = Replayed(algorithm, loader, max_length)
    rows = set(map(digest, loader.groups_of(0)))
    if rows.issuperset(map(digest, replayed.asked(0))):
        return loader.groups
    replayed.replay(num_batches)
    return replayed


class Replayed(LazyGroups):
    """The groups whose reference log-probabilities an algorithm's `prepare` asks for, found by replaying `prepare` with
    a `Recorder` over a loader's batches: once by `replay`, to count the groups, and again for the batch of a group that
    is read, so that none is kept in memory. Groups of one prompt are neighbours, so its forward pass is computed once.
    """

    def __init__(self, algorithm: Algorithm, loader: Loader, max_length: int) -> None:
        self._algorithm, self._loader, self._max_length = algorithm, loader, max_length
        self._last: tuple[int, list[Group]] = (-1, [])
        self._starts, self._new = [0], list[list[int]]()  # a batch's first index; its groups that are new

    def asked(self, batch: int) -> list[Group]:
        """The groups that `prepare` asks for in a batch, those of one prompt next to each other."""
        recorder, groups = Recorder(self._max_length), self._loader.groups_of(batch)
        recorder.step = batch
        self._algorithm.prepare(cast(Context, recorder), Batch(groups, range(len(groups)), self._loader.seen(batch)))
        by_prompt: dict[tuple[int, ...], list[Group]] = {}
        for group in recorder.groups:
            by_prompt.setdefault(tuple(group.prompt), []).append(group)
        return [group for alike in by_prompt.values() for group in alike]

    def replay(self, num_batches: int) -> None:
        """Replay the first `num_batches` batches, to find the groups of each that no earlier batch asked for."""
        seen = set[int]()
        for batch in range(num_batches):
            new: dict[int, int] = {}
            for i, group in enumerate(self.asked(batch)):
                new.setdefault(digest(group), i)
            self._new.append([i for one, i in new.items() if one not in seen])
            self._starts.append(self._starts[-1] + len(self._new[-1]))
            seen.update(new)

    def __len__(self) -> int:
        return self._starts[-1]

    def _at(self, index: int) -> Group:
        batch = bisect_right(self._starts, index) - 1
        if self._last[0] != batch:
            asked = self.asked(batch)
            self._last = batch, [asked[i] for i in self._new[batch]]
        return self._last[1][index - self._starts[batch]]


class ReferenceCache:
    """The reference's log-probabilities of the completion tokens of several sets of groups, a folder on disk a set.

    Groups are found by a hash of their token ids and masks, see `digest`; a group of no set is computed when needed.
    """

    def __init__(self, sets: Sequence[Sequence[Group]], key: str) -> None:
        """Open the files on disk. sets: of groups, as training and held out. key: the reference's `weights_key`."""
        self.folder = cache_folder() / "reference"
        self._sets = [_CachedSet(groups, key) for groups in sets if len(groups)]

    def complete(self, device: torch.device) -> bool:
        """Whether every rank finds all log-probabilities on disk. device: this rank's. Collective."""
        return all([one.complete(device) for one in self._sets])

    def fill(self, roles: Roles) -> int:
        """Compute the files that are missing on any rank; returns the number of groups computed. Collective.

        A file gets its name when it is whole, so a run that was stopped goes on with the next file.
        """
        return sum(one.fill(roles) for one in self._sets)

    def get(self, group: Group) -> Tensor | None:
        """The log-probabilities of a group's completion tokens, [completion tokens] float32, nats; None where the group
        is in no set."""
        wanted = np.uint64(digest(group))
        found = (one.get(wanted) for one in self._sets)
        return next((logps for logps in found if logps is not None), None)

    def logps(self, roles: Roles, groups: Sequence[Group], batch_size: int | None = None) -> list[Tensor]:
        """The reference's log-probabilities, one [completion tokens] float32 tensor a group, nats: read from disk for
        groups of the sets, computed for any other group. batch_size: groups in a forward pass. Collective."""
        found = [self.get(group) for group in groups]
        missing = [i for i, one in enumerate(found) if one is None]
        if dist.largest(len(missing), roles.device):
            computed = roles.each_group("reference", [groups[i] for i in missing], batch_size)
            for i, one in zip(missing, computed, strict=True):
                found[i] = one
        return [one for one in found if one is not None]


def cache_of(
    config: RunConfig,
    loader: Loader,
    held_out: Loader | None,
    total_batches: int,
    reference: Source | None,
    device: torch.device,
) -> ReferenceCache | None:
    """The reference cache of a run, or None where it has none.

    With --ref_cache auto it has one if that saves a forward pass over the rows or the memory of a model, and the run is
    at least one epoch long. total_batches: how many batches of `loader` the run takes. Collective.
    """
    if reference is None or config.algorithm.traits.roles["reference"] != "frozen" or config.algorithm.traits.online:
        return None
    own_model = config.models.tuner == "full" or config.models.ref_model is not None
    epochs = total_batches / loader.steps_per_epoch
    pays = epochs >= 1 and (own_model or epochs >= 2 or held_out is not None)
    if config.models.ref_cache == "off" or (config.models.ref_cache == "auto" and not pays):
        return None
    dtype = resolve_dtype(config.models.dtype, device)
    packed = config.models.load_in_4bit and not own_model
    key = dist.together(lambda: weights_key(reference, dtype, four_bit=packed) if dist.rank() == 0 else "")
    batches = [(loader, total_batches)]
    if held_out is not None:
        batches.append((held_out, held_out.steps_per_epoch))
    sets = [asked_of(config.algorithm, *one, config.data.max_length) for one in batches]
    return ReferenceCache(sets, dist.from_rank_0(key))


def fill(cache: ReferenceCache, roles: Roles) -> None:
    """Compute the log-probabilities that the cache lacks, then free the reference model, which no one needs any more.
    Collective."""
    computed = cache.fill(roles)
    if dist.rank() == 0:
        what = f"computed for {computed} rows" if computed else "read"
        logger.info("reference log-probabilities %s: %s", what, cache.folder)
    roles.release("reference")


class _CachedSet:
    """The log-probabilities of one set of groups, in files of PART groups each."""

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

    def fill(self, roles: Roles) -> int:
        computed = 0
        for part in self._parts():
            if not dist.largest(int(self._files[part] is None), roles.device):
                continue
            first = part * PART
            count = min(PART, len(self._groups) - first)
            start, end = (first + count * rank // dist.world_size() for rank in (dist.rank(), dist.rank() + 1))
            found = roles.each_group("reference", [self._groups[i] for i in range(start, end)])
            flat = torch.cat([torch.empty(0), *found]).double()
            self._write(part, dist.gather(flat, roles.device).float())
            computed += count
            screen.progress(first + count, len(self._groups))
        return computed

    def _write(self, part: int, flat: Tensor) -> None:
        """Write a part's file where it is missing. flat: log-probabilities of its groups' tokens, one after another."""
        path = self._path(part)
        for turn in (True, False):  # rank 0, then ranks that do not see its file system
            missing = self._files[part] is None and (dist.rank() == 0) is turn
            dist.together(lambda missing=missing: _save(flat, path) if missing else None)  # type: ignore[misc]
            self._files[part] = self._files[part] or self._open(part)

    def _length(self, position: int) -> int:
        return int(self._starts[position + 1] - self._starts[position])

    def _open(self, part: int) -> Any:
        """The part's file, opened; None where there is none, or where it fails its checksum, which is logged."""
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
        """The log-probabilities of the group with the digest `wanted`; None where no group of the set has it."""
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
    """A 64-bit hash of a group's token ids and masks: equal where the log-probabilities must be."""
    hashed = hashlib.blake2b(digest_size=8)
    for ids in (group.prompt, *group.completions):
        hashed.update(array("i", [len(ids), *ids]).tobytes())
    for mask in group.masks or ():
        hashed.update(bytes(mask))
    return int.from_bytes(hashed.digest(), sys.byteorder)


def weights_key(source: Source, dtype: torch.dtype, *, four_bit: bool = False) -> str:
    """A hash over every byte of a source's weights, configuration and adapter, over the dtype they compute in, and over
    whether they compute in 4 bits."""
    hashed = hashlib.sha256(f"{FORMAT} {dtype}{' 4 bits' if four_bit or source.four_bit else ''}".encode())
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
