"""A weight that both embeds tokens and predicts them: its two gradients in one piece of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Tied(torch.autograd.Function):
    """A weight [V, D] twice: for the embedding, whose gradient is sparse, and for the head, whose gradient is not.

    Autograd itself adds a sparse gradient to a dense one out of place, and copies the sum once more.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.detach(), weight.detach()

    @staticmethod
    def backward(ctx: Any, of_embedding: Tensor | None, of_head: Tensor | None) -> Tensor | None:
        if of_embedding is None or of_head is None:
            return of_head if of_embedding is None else of_embedding.to_dense()
        return of_head.add_(of_embedding)  # nobody else holds it: the head made it for this one use


class OneGradient:
    """A forward of an embedding and a head on a CPU, in one piece or in two, whose backward adds the gradient of the
    rows that were looked up to that of the head, [V, D], and makes no second tensor of that size.

    As ever where they are not tied, and under ZeRO-3, which holds a weight in memory only while its module runs.
    """

    def __init__(self, embedding: nn.Embedding, head: nn.Module) -> None:
        weight: Tensor = embedding.weight
        tied = getattr(head, "weight", None) is weight and weight.device.type == "cpu" and not hasattr(weight, "ds_id")
        self._views: tuple[tuple[nn.Module, dict[str, Any]], ...] = ()
        if tied and weight.requires_grad and torch.is_grad_enabled():
            of_embedding, of_head = _Tied.apply(weight)  # type: ignore[no-untyped-call]
            self._views = (embedding, {"weight": of_embedding, "sparse": True}), (head, {"weight": of_head})

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within it the two modules compute with their own view of the weight."""
        with ExitStack() as stack:
            for module, values in self._views:
                stack.enter_context(_seen(module, **values))
            yield


@contextmanager
def _seen(module: nn.Module, **values: Any) -> Iterator[None]:
    """Within it `module.<name>` is the value; what is registered under that name stays registered."""
    own = vars(module)
    before = {name: own[name] for name in values if name in own}
    own.update(values)
    try:
        yield
    finally:
        for name in values:
            del own[name]
        own.update(before)
