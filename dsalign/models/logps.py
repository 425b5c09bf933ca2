"""Hidden states -> log-probabilities of completion tokens: the seam to the head's kernels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from dsalign_kernels import chunk_rows, default_bytes, linear_logps, linear_loss, scheme, selective_logps

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class HeadLoss:
    """A loss that adds over groups.

    sizes: numbers of targets of each group, in order. of: called with some neighbouring groups, the log-probabilities
    of their targets and the entropies or None; gives their part of the loss, a scalar.
    """

    sizes: Sequence[int]
    of: Callable[[slice, Tensor, Tensor | None], Tensor]

    def of_fewer(self, copies: Tensor, sizes: Sequence[int]) -> HeadLoss:
        """This loss as one of fewer targets, `sizes` of each group; copies: [sum(self.sizes)] int64, which of those
        each target is."""
        many, few = ([0, *accumulate(x)] for x in (self.sizes, sizes))

        def of(part: slice, logps: Tensor, entropies: Tensor | None) -> Tensor:
            which = copies[many[part.start] : many[part.stop]] - few[part.start]
            return self.of(part, logps[which], None if entropies is None else entropies[which])

        return HeadLoss(sizes, of)


@dataclass(frozen=True)
class Head:
    """How a model's states become log-probabilities. head_bytes: memory for logits, None = the device's default."""

    transform: LogitTransform
    head_bytes: int | None = None

    def token_logps(
        self, hidden: Tensor, head: nn.Module, targets: Tensor, *, entropy: bool, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each target, and the entropy of its distribution where asked for.

        hidden: [N, D] states that predict the N targets [N] int64; head: D -> V logits, called as a module so that
        ZeRO-3 gathers its weight; temperature > 0 divides the logits. No N x V logits are kept where the head is a
        plain linear layer; where it is not (an adapter on it), they are.
        Returns [N] float32 nats, and [N] float32 nats without gradient or None.
        """
        more: dict[str, Any] = {"entropy": entropy, "temperature": temperature}
        linear = _linear(head, hidden)
        if linear is None:
            logps = selective_logps(self.transform(head(hidden)), targets, **more)
            return logps.logps, logps.entropy

        def fused(states: Tensor) -> tuple[Tensor, Tensor | None]:
            found = linear_logps(
                states, linear.weight, targets, bias=linear.bias, head_bytes=self.head_bytes, **more, **self._logits
            )
            return found.logps, found.entropy

        with _forward_of(linear, fused):
            found: tuple[Tensor, Tensor | None] = linear(hidden)
        return found

    def token_loss(
        self,
        hidden: Tensor,
        head: nn.Module,
        targets: Tensor,
        loss: HeadLoss,
        *,
        entropy: bool,
        temperature: float = 1.0,
    ) -> Tensor:
        """The loss of all groups, scalar float32, of log-probabilities as in `token_logps`: their gradient is taken a
        few groups at a time, while the logits are there, where that saves a look at them."""
        more: dict[str, Any] = {"entropy": entropy, "temperature": temperature}
        linear = _linear(head, hidden)
        slices = None if linear is None else self._slices(hidden, linear, loss.sizes)
        if linear is None or slices is None:
            logps, entropies = self.token_logps(hidden, head, targets, **more)
            # 0 x output: a backward reaches every trained parameter, whatever the loss made of it.
            return loss.of(slice(0, len(loss.sizes)), logps, entropies) + 0.0 * logps.sum()
        parts = [sum(loss.sizes[part]) for part in slices]

        def fused(states: Tensor) -> Tensor:
            def of(i: int, logps: Tensor, entropies: Tensor | None) -> Tensor:
                return loss.of(slices[i], logps, entropies)

            return linear_loss(states, linear.weight, targets, parts, of, bias=linear.bias, **more, **self._logits)

        with _forward_of(linear, fused):
            found: Tensor = linear(hidden)
        return found

    @property
    def _logits(self) -> dict[str, Any]:
        return {"scale": self.transform.scale, "softcap": self.transform.softcap}

    def _slices(self, hidden: Tensor, head: nn.Linear, sizes: Sequence[int]) -> list[slice] | None:
        """Whole groups whose logits fit into the work space, where `linear_loss` is the scheme; else None."""
        vocabulary, size = head.out_features, self.head_bytes or default_bytes(hidden.device)
        trained = head.weight.requires_grad
        gradient = torch.is_grad_enabled() and (hidden.requires_grad or trained)
        plan = scheme(
            len(hidden), vocabulary, hidden.dtype,
            gradient=gradient, trained=trained, head_bytes=size, largest_part=max(sizes, default=0),
        )  # fmt: skip
        rows = chunk_rows(vocabulary, hidden.element_size(), size)
        if gradient:
            _say(f"head: {plan.name}, {plan.products} matrix products (--head_memory {size // 2**20})")
        return whole_groups(sizes, rows) if plan.name == "local" else None


def whole_groups(sizes: Sequence[int], most: int) -> list[slice]:
    """Neighbours together as long as their sizes add up to at most `most`; a larger one by itself."""
    found: list[slice] = []
    start, held = 0, 0
    for i, size in enumerate(sizes):
        if i > start and held + size > most:
            found.append(slice(start, i))
            start, held = i, 0
        held += size
    return [*found, slice(start, len(sizes))] if sizes else []


def _linear(head: nn.Module, hidden: Tensor) -> nn.Linear | None:
    """The head, where it is a plain linear layer of the states' dtype."""
    if type(head) is nn.Linear and head.weight.dtype == hidden.dtype:
        return head
    _say(f"head: a {type(head).__name__} is no plain linear layer: the logits of all completion tokens are in memory")
    return None


@cache
def _say(text: str) -> None:
    """Once a run."""
    logger.info(text)


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
