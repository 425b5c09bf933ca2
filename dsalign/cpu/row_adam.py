"""AdamW for an embedding whose weight is looked up and used for nothing else, by the rows that were looked up.

In a step the gradient of such a weight [V, D] has one row a token id that occurs, and 0 elsewhere. In a row that has
never had a gradient both moments are 0, and AdamW then does nothing but decay the row (Loshchilov and Hutter,
arXiv:1711.05101, algorithm 2, with g = m = v = 0). So the gradient stays a sparse tensor, AdamW runs on the rows that
some step has looked up, and the moments of all others are memory that the system never has to provide. Weights,
optimizer state and checkpoints are those of torch.optim.AdamW to the last bit.
"""

from __future__ import annotations

from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

SHARE = 0.25  # of the V rows: once more than that have been looked up, it is cheaper to step all of them


def only_looks_up(module: nn.Module, embedding: nn.Embedding) -> None:
    """Note for `step_by_rows` that nothing in `module` but the embedding itself computes with its weight."""
    vars(module)["_only_looks_up"] = embedding  # past nn.Module, which would register it as a child once more


def step_by_rows(module: nn.Module, optimizer: torch.optim.AdamW) -> None:
    """Make the gradient of the embedding that `only_looks_up` noted for `module` sparse, and let the optimizer of its
    weight step it by rows. Nothing happens where none was noted, or the weight is not trained in float32 on a CPU."""
    embedding: nn.Embedding | None = vars(module).get("_only_looks_up")
    if embedding is None:
        return
    weight: Tensor = embedding.weight
    if weight.requires_grad and weight.dtype is torch.float32 and weight.device.type == "cpu":
        embedding.sparse = True
        optimizer.register_step_pre_hook(RowSteps())


def gradient_values(parameter: Tensor) -> Tensor:
    """The values of a parameter's gradient, to measure and to scale in place: the gradient, or where it is sparse the
    rows [n, D] in which it is not 0, each once."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = parameter.grad.coalesce()
    return parameter.grad.values()


class RowSteps:
    """What an AdamW runs before each of its steps, for parameters whose gradients are sparse.

    It steps them and takes their gradients away, so that the optimizer's own step passes them over; or, once more than
    SHARE of the rows have been looked up, makes the gradient dense and leaves the step to the optimizer.
    """

    def __init__(self) -> None:
        self._seen: dict[Tensor, tuple[Tensor, Tensor]] = {}  # parameter -> (its first moment, mask of rows [V])

    @torch.no_grad()
    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, more: Any) -> None:
        """The signature of a torch step pre-hook: `args` and `more` are what the step was called with."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    self._step(parameter, group, optimizer.state[parameter])

    def _step(self, parameter: Tensor, group: dict[str, Any], state: dict[str, Tensor]) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.coalesce()
        if not state:
            self._start(parameter, state)
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
            parameter.mul_(1 - group["lr"] * group["weight_decay"])  # right for rows never seen; the others come below
        beta1, beta2 = group["betas"]
        adamw(
            some[:1], [full], some[1:2], some[2:], [], [state["step"]],
            fused=True, amsgrad=False, maximize=False, beta1=beta1, beta2=beta2,
            lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
        )  # fmt: skip
        for whole, changed in zip((parameter, state["exp_avg"], state["exp_avg_sq"]), some, strict=True):
            whole[rows] = changed

    def _start(self, parameter: Tensor, state: dict[str, Tensor]) -> None:
        """Fill the optimizer's state of a parameter before its first step, as AdamW itself would."""
        state["step"] = torch.zeros((), dtype=torch.float32)
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = _zeros(parameter.shape)
        self._seen[parameter] = state["exp_avg"], torch.zeros(len(parameter), dtype=torch.bool)

    def _rows_seen(self, parameter: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The mask [V] of rows that a step has looked up. After a checkpoint was read the moments are other tensors:
        then it is made of the rows whose moments are not 0."""
        moment, seen = self._seen.get(parameter, (None, None))
        if seen is None or moment is not state["exp_avg"]:
            seen = state["exp_avg"].any(1) | state["exp_avg_sq"].any(1)
            self._seen[parameter] = state["exp_avg"], seen
        return seen


def _zeros(shape: torch.Size) -> Tensor:
    """float32 zeros that take no memory until they are written. torch.zeros writes them all, and numpy.zeros asks for
    huge pages, of which one row that is written fills 2 MiB."""
    memory = mmap(-1, 4 * shape.numel(), flags=MAP_PRIVATE | MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)
