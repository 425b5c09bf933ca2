"""The weights and moments in DeepSpeed's files of an engine, by parameter: whole, whatever ranks and ZeRO stage wrote
them. Nothing but tensors and numbers is unpickled."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsalign.checkpoint.shards import known_classes

MASTER = "weight"  # the key of a parameter's float32 weight beside those of its moments


@dataclass(frozen=True)
class Piece:
    """Some neighbouring elements of a parameter in a rank's flat tensors: from `start` on, `count` of them."""

    flat: Mapping[str, Tensor]  # MASTER and each moment -> a 1-D tensor of which this is a part
    start: int
    count: int


class ByParameter:
    """The state of an engine that `save_checkpoint` wrote to `folder`, read as it is asked for.

    order: the names of the trained parameters in the order of the optimizer's groups, which ZeRO stage 0 numbers.
    counters: the engine's own (global_steps, ...). module: name -> tensor of what it saved of its module; at stage 3
    parameters are empty there. loss_scaler: of float16, else None.
    Raises ValueError where files are missing or hold something else.
    """

    def __init__(self, folder: Path, order: Sequence[str]) -> None:
        files = sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank)
        model = folder / "mp_rank_00_model_states.pt"
        if not model.exists():
            model = folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"
        if not model.exists():
            raise ValueError(f"resume: {folder} has no model_states.pt; take another checkpoint")
        content = _read(model)
        self.folder, self.module = folder, content["module"]
        self.counters = {name: content[name] for name in ("global_steps", "global_samples", "skipped_steps")}
        self.loss_scaler: Any = None
        self.steps: dict[str, float] = {}
        self._pieces: dict[str, list[Piece]] = {}
        if not files:
            self._of_torch(content["optimizer"], order)
        for file in files:
            state = _read(file)["optimizer_state_dict"]
            self.loss_scaler = state.get("loss_scaler")
            if "fp32_flat_groups" in state:
                self._of_stage_3(state, content["param_shapes"], _rank(file), len(files))
            else:
                self._of_stage_1_and_2(state)

    def _of_torch(self, state: Mapping[str, Any], order: Sequence[str]) -> None:
        """Stage 0: torch's own state, a parameter a number."""
        for number, name in enumerate(order):
            flat = {MASTER: self.module[name].flatten()}
            of = state["state"].get(number, {})
            self._add(
                name, {**flat, **{k: v.flatten() for k, v in of.items() if k != "step"}}, 0, len(flat[MASTER]), of
            )

    def _of_stage_1_and_2(self, state: Mapping[str, Any]) -> None:
        """Stages 1 and 2, and DeepSpeed's optimizer of bfloat16: a group is one flat tensor, of which a rank has a part
        and knows where each parameter lies in it."""
        of = state["base_optimizer_state"]
        for number, master in enumerate(state["single_partition_of_fp32_groups"]):
            own = of["state"].get(of["param_groups"][number]["params"][0], {})
            flat = {MASTER: master, **{k: v for k, v in own.items() if k != "step"}}
            for name, place in state["param_slice_mappings"][number].items():
                self._add(name, flat, place.start, place.numel, own)

    def _of_stage_3(self, state: Mapping[str, Any], shapes: Sequence[Mapping[str, Any]], rank: int, ranks: int) -> None:
        """Stage 3: each parameter is cut into as many equal parts as there are ranks, the last one padded; a rank's
        parts of a sub-group lie one behind the other."""
        of = state["optimizer_state_dict"]
        numbers = [number for group in of["param_groups"] for number in group["params"]]
        for master, number, group in zip(state["fp32_flat_groups"], numbers, shapes, strict=True):
            own, start = of["state"].get(number, {}), 0
            flat = {MASTER: master, **{k: v for k, v in own.items() if k != "step"}}
            for name, shape in group.items():
                size = torch.Size(shape).numel()
                part = -(-size // ranks)
                self._add(name, flat, start, max(0, min(part, size - rank * part)), own)
                start += part

    def _add(self, name: str, flat: Mapping[str, Any], start: int, count: int, state: Mapping[str, Any]) -> None:
        tensors = {key: value for key, value in flat.items() if isinstance(value, Tensor)}
        self._pieces.setdefault(name, []).append(Piece(tensors, start, count))
        if "step" in state:
            self.steps[name] = float(state["step"])

    def names(self) -> set[str]:
        """The names of the parameters."""
        return set(self._pieces)

    def keys(self, name: str) -> list[str]:
        """MASTER, and the moments that the parameter has."""
        return list(self._pieces[name][0].flat)

    def get(self, name: str, key: str) -> Tensor:
        """A parameter's weight or moment: 1-D, float32, whole. Raises KeyError where it has none of that name."""
        parts = [one.flat[key][one.start : one.start + one.count] for one in self._pieces[name]]
        return torch.cat(parts).float()


def _rank(file: Path) -> int:
    found = re.search(r"zero_pp_rank_(\d+)_", file.name)
    assert found is not None
    return int(found[1])


def _read(path: Path) -> dict[str, Any]:
    """A file of DeepSpeed's, tensors mapped from disk. Raises ValueError where it holds other things than those."""
    try:
        with known_classes():
            content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # whatever torch or pickle raises for a file that is not what it should be
        raise ValueError(
            f"resume: {path} cannot be read: {str(error).splitlines()[0]}; take another checkpoint"
        ) from error
    return content
