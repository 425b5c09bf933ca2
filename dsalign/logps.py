"""Hidden states -> log-probabilities of completion tokens: the seam to the kernels, and their only importer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsalign_kernels import linear_logps, selective_logps


@dataclass(frozen=True)
class LogitTransform:
    """What a model does between its head and its logits: z -> softcap * tanh(scale * z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """Read from a transformers configuration: Cohere multiplies, Granite divides, Gemma 2 caps."""
        settings = config.to_dict()
        scale = settings.get("logit_scale") or 1.0
        return cls(
            scale=float(scale) / float(settings.get("logits_scaling") or 1.0),
            softcap=settings.get("final_logit_softcapping"),
        )

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def token_logps(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    transform: LogitTransform,
    *,
    entropy: bool,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target, and the entropy of its distribution where asked for.

    hidden: [N, D] states that predict the N targets [N] int64; head: D -> V logits, called as a module so that ZeRO-3
    gathers its weight; temperature > 0 divides the logits. No N x V logits are kept where the head is a plain linear
    layer; where it is not (an adapter on it), they are.
    Returns [N] float32 nats, and [N] float32 nats without gradient or None.
    """
    more: dict[str, Any] = {"entropy": entropy, "temperature": temperature}
    if type(head) is nn.Linear and head.weight.dtype == hidden.dtype:
        more |= {"scale": transform.scale, "softcap": transform.softcap}

        def fused(states: Tensor) -> tuple[Tensor, Tensor | None]:
            found = linear_logps(states, head.weight, targets, bias=head.bias, **more)
            return found.logps, found.entropy

        with _forward_of(head, fused):
            found: tuple[Tensor, Tensor | None] = head(hidden)
        return found
    logps = selective_logps(transform(head(hidden)), targets, **more)
    return logps.logps, logps.entropy


@contextmanager
def _forward_of(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within it `module(...)` calls `function`, its hooks around it as ever."""
    before = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
