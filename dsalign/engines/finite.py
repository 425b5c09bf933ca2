"""Whether the numbers that an engine trains are finite: weights, and what its optimizer keeps of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dsalign.engines import dist

NAMED = 5  # tensors that a message names


def non_finite(engines: Mapping[str, Any]) -> str:
    """What is not finite in the trained weights and the optimizer state of engines, by role, in words that are the same
    on every rank; empty where all is finite. Collective.

    Each rank looks at the parts that it holds itself, so nothing is gathered, and waits for its device once.
    """
    named = [(f"{role} {name}", part) for role, engine in engines.items() for name, part in flat_parts(engine)]
    bad = _with_flaws(named)
    device = next((engine.device for engine in engines.values()), torch.device("cpu"))
    if not dist.total([float(len(bad))], device)[0]:
        return ""
    found: dict[str, int] = {}
    for rank, names in enumerate(dist.everyones(bad)):
        for name in names:
            found.setdefault(name, rank)
    listed = [f"{name} (rank {rank})" for name, rank in list(found.items())[:NAMED]]
    return ", ".join([*listed, *([f"and {len(found) - NAMED} more"] if len(found) > NAMED else [])])


def _with_flaws(named: list[tuple[str, Tensor]]) -> list[str]:
    """The names of the tensors that hold a NaN or an infinity. Their smallest and largest number tell, without a tensor
    of their size."""
    ends: dict[torch.device, list[Tensor]] = {}
    places: dict[torch.device, list[str]] = {}
    for name, part in named:
        if part.is_floating_point() and part.numel():
            smallest, largest = torch.aminmax(part.detach())
            ends.setdefault(part.device, []).append(torch.stack([smallest, largest]).float())
            places.setdefault(part.device, []).append(name)
    finite = {device: torch.isfinite(torch.stack(some)).all(1).tolist() for device, some in ends.items()}
    return [n for device, names in places.items() for n, good in zip(names, finite[device], strict=True) if not good]


def flat_parts(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what this rank holds of the engine's trained weights, and of what its optimizer keeps of them:
    moments, and ZeRO's float32 weights. What is on an NVMe disk is left out.

    The padding of a weight that ZeRO-3 has cut into shards is left out too, as it is memory that nobody wrote.
    """
    outer = engine.optimizer
    trained = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
    if engine.zero_optimization_stage() < 3:
        yield from trained
        inner = outer if isinstance(outer, torch.optim.Optimizer) else outer.optimizer
        names = {p: name for name, p in trained}
        for i, part in enumerate(p for group in inner.param_groups for p in group["params"]):
            if part not in names:
                yield f"float32 weights of group {i}", part
            for kind, moment in _moments(inner.state.get(part, {})):
                yield f"{kind} of {names.get(part, f'group {i}')}", moment
        return
    for name, p in trained:
        size, filled = int(p.ds_tensor.ds_numel), _filled(p)
        if p.ds_tensor.numel() == size:
            yield name, p.ds_tensor.view(-1)[:filled]
        group, start, _ = outer.grad_position[outer.get_param_id(p)]
        flat = outer.fp32_partitioned_groups_flat[group]
        for kind, kept in [("float32 weights", flat), *_moments(outer.optimizer.state.get(flat, {}))]:
            if kept.numel() >= start + size:
                yield f"{kind} of {name}", kept.view(-1)[start : start + filled]


def _moments(state: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
    """(name, tensor) of an optimizer's state of one tensor, without the count of steps."""
    return [(kind, x) for kind, x in state.items() if isinstance(x, Tensor) and x.dim()]


def _filled(parameter: Any) -> int:
    """How many numbers of this rank's shard of a ZeRO-3 parameter are the parameter's own."""
    size = int(parameter.ds_tensor.ds_numel)
    return max(0, min(size, int(parameter.ds_numel) - size * dist.rank()))
