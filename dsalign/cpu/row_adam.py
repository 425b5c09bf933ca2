"""AdamW for an embedding that is looked up and nothing else: in the memory and time of the rows that were looked up.

Its gradient has one row a token of the step, and both moments of a row that no step has seen are 0: what AdamW does to
such a row is weight decay alone (Loshchilov and Hutter, arXiv:1711.05101, algorithm 2, with g = m = v = 0). So the
gradient stays sparse, and the moments of those rows stay pages that the system never had to fill. Numbers, state and
checkpoints are those of torch.optim.AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

SHARE = 0.25  # of the rows: with more of them it is cheaper to treat all alike


def keep_sparse(embeddings: Iterable[nn.Embedding]) -> None:
    """Let the gradients of these embeddings hold the rows that were looked up; float32 on a CPU, else as ever."""
    for embedding in embeddings:
        weight: Tensor = embedding.weight
        embedding.sparse = weight.requires_grad and weight.dtype is torch.float32 and weight.device.type == "cpu"


def numbers(parameter: Tensor) -> Tensor:
    """A parameter's gradient: the tensor itself, or [rows, D] of a sparse one, whose other rows are 0."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = parameter.grad.coalesce()
    return parameter.grad.values()


class RowAdam:
    """Steps the parameters of an AdamW whose gradients are sparse, before that one steps the others."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._seen: dict[Tensor, tuple[Tensor, Tensor]] = {}  # parameter -> (its first moment, mask of rows [V])

    @torch.no_grad()
    def step(self) -> None:
        """Step them, and leave them without a gradient; or with a dense one, where too many rows have been seen."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._step(parameter, group)

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.coalesce()
        state = self._state(parameter)
        now, seen = gradient.indices()[0], self._rows_seen(parameter, state)
        seen[now] = True
        rows = seen.nonzero()[:, 0]
        if len(rows) > SHARE * len(seen):
            parameter.grad = gradient.to_dense()
            return
        parameter.grad = None
        some = [whole[rows] for whole in (parameter, state["exp_avg"], state["exp_avg_sq"])]
        full = torch.zeros_like(some[0]).index_copy(0, torch.searchsorted(rows, now), gradient.values())
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])  # of which the rows seen are written below
        beta1, beta2 = group["betas"]
        adamw(
            some[:1], [full], some[1:2], some[2:], [], [state["step"]],
            fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
        for whole, changed in zip((parameter, state["exp_avg"], state["exp_avg_sq"]), some, strict=True):
            whole[rows] = changed

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        """As AdamW keeps it."""
        state: dict[str, Tensor] = self._optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = _zeros(parameter.shape)
            self._seen[parameter] = state["exp_avg"], torch.zeros(len(parameter), dtype=torch.bool)
        return state

    def _rows_seen(self, parameter: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Mask of the rows that a step has seen; of moments that come from a checkpoint, those that are not 0."""
        moment, seen = self._seen.get(parameter, (None, None))
        if seen is None or moment is not state["exp_avg"]:
            seen = state["exp_avg"].any(1) | state["exp_avg_sq"].any(1)
            self._seen[parameter] = state["exp_avg"], seen
        return seen


def _zeros(shape: torch.Size) -> Tensor:
    """float32 zeros in pages that the system gives once they are written: torch writes its zeros, and numpy asks for
    pages so large that one row brings hundreds."""
    memory = mmap(-1, 4 * shape.numel(), flags=MAP_PRIVATE | MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)
