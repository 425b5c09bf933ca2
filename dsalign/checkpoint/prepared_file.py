"""A rank's prepared batch as one file of a checkpoint that is saved between two optimizer steps over it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dsalign.contract.groups import Group, Prepared
from dsalign.data.batches.loader import deal
from dsalign.data.batches.packing import num_computed

KEPT = ("index", "where", "prompt_text", "label", "margin", "masks")  # of a group, beside its token ids


def name_of(rank: int) -> str:
    """The name of a rank's file in a checkpoint's folder."""
    return f"prepared-{rank}.safetensors"


def write(prepared: Prepared, path: Path) -> None:
    """Write a prepared batch, whose `positions` are set, to a safetensors file with JSON in its header.

    What only `prepare` and the log read is left out: the columns, turns and tools of groups, and the samples.
    """
    ids = [each for group in prepared.groups for each in (group.prompt, *group.completions)]
    tensors = {"ids": torch.tensor([i for each in ids for i in each], dtype=torch.int64)}
    for name, parts in prepared.fields.items():
        flat = torch.cat(list(parts)) if parts else torch.empty(0)
        tensors[f"field {name}"] = flat.detach().cpu().contiguous()
    content = {
        "groups": [{name: getattr(group, name) for name in KEPT} for group in prepared.groups],
        "lengths": [[len(group.prompt), *map(len, group.completions)] for group in prepared.groups],
        "fields": {name: [len(part) for part in parts] for name, parts in prepared.fields.items()},
        "shared": {name: float(number) for name, number in prepared.shared.items()},
        "metrics": {name: [float(part) for part in parts] for name, parts in prepared.metrics.items()},
        "positions": prepared.positions if prepared.positions is None else list(prepared.positions),
    }
    save_file(tensors, path, metadata={"prepared": json.dumps(content)})


def read(path: Path) -> Prepared:
    """The prepared batch that `write` wrote: every number that the losses read is the same, bit for bit.

    Raises OSError or SafetensorError where the file is not there or not whole.
    """
    with safe_open(path, framework="pt") as file:
        content = json.loads((file.metadata() or {})["prepared"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
    lengths = content["lengths"]
    ids = iter(_split(tensors["ids"], [n for each in lengths for n in each]))
    groups = [
        _group(kept, [next(ids).tolist() for _ in each]) for kept, each in zip(content["groups"], lengths, strict=True)
    ]
    return Prepared(
        groups,
        {name: _split(tensors[f"field {name}"], sizes) for name, sizes in content["fields"].items()},
        content["shared"],
        {name: (total, count) for name, (total, count) in content["metrics"].items()},
        positions=content["positions"],
    )


def read_dealt(folder: Path, written: int, rank: int, ranks: int) -> Prepared:
    """The part of a rank in the prepared batch that `written` ranks wrote to a checkpoint's folder. ranks: their number
    now: where it is another one, the groups of all are dealt anew, and the sums of metrics are rank 0's."""
    if written == ranks:
        return read(folder / name_of(rank))
    parts = [read(folder / name_of(one)) for one in range(written)]
    places = sorted((at, p, i) for p, part in enumerate(parts) for i, at in enumerate(part.positions or ()))
    hands = deal([num_computed(parts[p].groups[i]) for _, p, i in places], ranks)
    mine = [places[k] for k in hands[rank]]
    metrics = {
        name: _added([part.metrics[name] for part in parts if name in part.metrics], rank) for name in _named(parts)
    }
    return Prepared(
        [parts[p].groups[i] for _, p, i in mine],
        {name: [parts[p].fields[name][i] for _, p, i in mine] for name in parts[0].fields},
        parts[0].shared,
        metrics,
        positions=[at for at, _, _ in mine],
    )


def _named(parts: Sequence[Prepared]) -> dict[str, None]:
    return dict.fromkeys(name for part in parts for name in part.metrics)


def _added(sums: Sequence[tuple[Any, Any]], rank: int) -> tuple[float, float]:
    """(total, count) over all ranks on rank 0, and nothing on the others, as they are added up in the log."""
    return (sum(float(a) for a, _ in sums), sum(float(b) for _, b in sums)) if rank == 0 else (0.0, 0.0)


def _group(kept: dict[str, Any], ids: Sequence[Sequence[int]]) -> Group:
    masks = kept.pop("masks")
    prompt, *completions = map(tuple, ids)
    group = Group(prompt=prompt, completions=tuple(completions), **kept)
    return group if masks is None else dataclasses.replace(group, masks=tuple(map(tuple, masks)))


def _split(flat: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The parts of a flat tensor, each with memory of its own, as they were before they were joined."""
    return [flat[start:end].clone() for start, end in pairwise(accumulate(sizes, initial=0))]
