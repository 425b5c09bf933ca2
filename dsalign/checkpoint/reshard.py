"""A checkpoint goes on with another number of ranks, another ZeRO stage or another dtype: its weights and moments are
dealt to the new ranks as DeepSpeed would have laid them out, bit for bit.

DeepSpeed's own universal checkpoint does not serve: it is written to disk once more, holds Adam's moments alone, and
does not know ZeRO stage 0. Here each rank maps the files of all old ranks, takes its part, and hands it to DeepSpeed's
own loading in the form of a shard; nothing is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsalign.checkpoint.by_parameter import MASTER, ByParameter
from dsalign.checkpoint.export import whole_state
from dsalign.engines import dist


def differs(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's files do not fit this run's engines as they are. theirs, mine: see
    `fingerprint.settings`."""
    return any(name in theirs and theirs[name] != mine.get(name) for name in ("ranks", "layout"))


def load(engine: Any, folder: Path) -> None:
    """Restore a trained engine from the DeepSpeed files of any number of ranks and any ZeRO stage. Collective.

    Weights, moments and step counts are those of the files, bit for bit; where the run computes in another dtype its
    weights are rounded from the float32 ones. Raises ValueError on every rank where the files lack a parameter, or the
    weights in memory are not those of the files.
    """
    named = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    saved = dist.together(lambda: _read(folder, named))
    optimizer = engine.optimizer
    if hasattr(optimizer, "checkpoint_event_prologue"):
        optimizer.checkpoint_event_prologue()
    buffers = {name for name, _ in engine.module.named_buffers()}  # weights that are not trained are those of the start
    engine.module.load_state_dict({n: t for n, t in saved.module.items() if n in buffers}, strict=False)
    if engine.zero_optimization_stage() == 3:
        _into_stage_3(optimizer, saved, engine.param_names)
    elif isinstance(optimizer, torch.optim.Optimizer):
        _into_weights(named, saved)
        _into_torch(optimizer, saved, named)
    else:
        _into_weights(named, saved)
        _into_flat_groups(optimizer, saved, engine.param_names)
    if hasattr(optimizer, "checkpoint_event_epilogue"):
        optimizer.checkpoint_event_epilogue()
    for name, value in saved.counters.items():
        setattr(engine, name, value)
    if engine.fp16_enabled() and saved.loss_scaler is not None:
        optimizer.loss_scaler = saved.loss_scaler
    _check(engine, saved)


def _read(folder: Path, named: Mapping[str, nn.Parameter]) -> ByParameter:
    """The files' state, with every trained parameter in its size."""
    many = [name for name, p in named.items() if len(_shape(p)) > 1]
    saved = ByParameter(folder, [*many, *(name for name in named if name not in set(many))])
    if lacking := sorted(set(named) ^ saved.names()):
        raise ValueError(
            f"resume: {folder}: expected the trained parameters of this run, got a difference: {lacking[:5]}"
        )
    for name, parameter in named.items():
        size = saved.get(name, MASTER).numel()
        if size != _shape(parameter).numel():
            raise ValueError(f"resume: {folder}: {name} has {size} elements, expected {_shape(parameter).numel()}")
    return saved


def _shape(parameter: Any) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@torch.no_grad()
def _into_weights(named: Mapping[str, nn.Parameter], saved: ByParameter) -> None:
    for name, parameter in named.items():
        parameter.copy_(saved.get(name, MASTER).view_as(parameter))


def _into_torch(optimizer: torch.optim.Optimizer, saved: ByParameter, named: Mapping[str, nn.Parameter]) -> None:
    """Stage 0: every rank has the whole state of each parameter."""
    names = {id(p): name for name, p in named.items()}
    content, state = optimizer.state_dict(), dict[int, dict[str, Any]]()
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        name = names[id(parameter)]
        moments = {key: saved.get(name, key).view_as(parameter) for key in saved.keys(name) if key != MASTER}
        if moments:
            state[number] = {"step": torch.tensor(saved.steps[name]), **moments}
    optimizer.load_state_dict({"state": state, "param_groups": content["param_groups"]})


def _into_flat_groups(optimizer: Any, saved: ByParameter, names: Mapping[Any, str]) -> None:
    """Stages 1 and 2: this rank's part of the flat tensor of each group."""
    content = optimizer.state_dict()
    groups = optimizer.bf16_groups if hasattr(optimizer, "bf16_groups") else optimizer.bit16_groups
    partitions = (
        optimizer.fp32_groups_flat_partition
        if hasattr(optimizer, "fp32_groups_flat_partition")
        else optimizer.single_partition_of_fp32_groups
    )
    flats, state = [], dict[int, dict[str, Any]]()
    for number, (group, partition) in enumerate(zip(groups, partitions, strict=True)):
        flat = _zeros(saved, [names[p] for p in group], partition.numel())
        for parameter in group:
            mapping = parameter._hp_mapping
            if mapping is not None:
                source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
                for key, tensor in flat.items():
                    part = _of(saved, names[parameter], key)[source.start : source.start + source.numel]
                    tensor[target.start : target.start + target.numel] = part
        flats.append(flat.pop(MASTER))
        if flat:
            state[number] = {"step": _step(saved, [names[p] for p in group]), **flat}
    base = {"state": state, "param_groups": content["base_optimizer_state"]["param_groups"]}
    content |= {"base_optimizer_state": base, "single_partition_of_fp32_groups": flats}
    optimizer.load_state_dict([content] * dist.world_size(), load_optimizer_states=True, load_from_fp32_weights=True)


def _into_stage_3(optimizer: Any, saved: ByParameter, names: Mapping[Any, str]) -> None:
    """Stage 3: this rank's part of every parameter of each sub-group, one behind the other."""
    content = optimizer.state_dict()
    flats, state = [], dict[int, dict[str, Any]]()
    for number, (group, partition) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        flat, start = _zeros(saved, [names[p] for p in group], partition.numel()), 0
        for parameter in group:
            part = parameter.ds_tensor.ds_numel
            for key, tensor in flat.items():
                mine = _of(saved, names[parameter], key)[dist.rank() * part : (dist.rank() + 1) * part]
                tensor[start : start + len(mine)] = mine
            start += part
        flats.append(flat.pop(MASTER))
        if flat:
            state[number] = {"step": _step(saved, [names[p] for p in group]), **flat}
    base = {"state": state, "param_groups": content["optimizer_state_dict"]["param_groups"]}
    content |= {"optimizer_state_dict": base, "fp32_flat_groups": flats}
    optimizer.load_state_dict([content] * dist.world_size())


def _zeros(saved: ByParameter, names: list[str], size: int) -> dict[str, Tensor]:
    """A flat float32 tensor for the weights of a group, and for each moment that one of its parameters has."""
    keys = dict.fromkeys([MASTER, *(key for name in names for key in saved.keys(name))])
    return {key: torch.zeros(size) for key in keys}


def _of(saved: ByParameter, name: str, key: str) -> Tensor:
    """A parameter's weight or moment; a moment that it has not yet is 0."""
    return saved.get(name, key) if key in saved.keys(name) else torch.zeros_like(saved.get(name, MASTER))


def _step(saved: ByParameter, names: list[str]) -> Tensor:
    """The steps that a group's moments have seen, of which a flat group has one count: the largest."""
    return torch.tensor(max((saved.steps[name] for name in names if name in saved.steps), default=0.0))


def _check(engine: Any, saved: ByParameter) -> None:
    """Compare the weights that the engine has with those of the files, on rank 0. Collective."""
    found = whole_state(engine, trained_only=True)
    wrong = [
        name
        for name, tensor in found.items()
        if not torch.equal(tensor.flatten(), saved.get(name, MASTER).to(tensor.dtype))
    ]
    error = f"resume: {saved.folder}: weights are not as saved after dealing them anew: {wrong[:5]}" if wrong else ""
    dist.agree(ValueError(error) if error else None)
