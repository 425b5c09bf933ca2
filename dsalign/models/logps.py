"""From hidden states to log-probabilities of completion tokens: the one place that calls the kernels of the head."""

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
    """What a model does to the output z of its head to make logits: softcap * tanh(scale * z / softcap), or scale * z
    where softcap is None."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """The transform in a transformers configuration: Cohere multiplies, Granite divides, Gemma 2 caps."""
        settings = config.to_dict()
        scale = settings.get("logit_scale") or 1.0
        return cls(
            scale=float(scale) / float(settings.get("logits_scaling") or 1.0),
            softcap=settings.get("final_logit_softcapping"),
        )

    def __call__(self, logits: Tensor) -> Tensor:
        """The logits of what the head gave, of any shape."""
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@dataclass(frozen=True)
class HeadLoss:
    """A loss that is a sum over groups, so that the head can compute it for a few groups at a time.

    sizes: how many targets (completion tokens to predict) each group has, in order. of: called with a slice of
    neighbouring groups, the log-probabilities of their targets [n] and the entropies [n] or None; returns their part of
    the loss, a scalar.
    """

    sizes: Sequence[int]
    of: Callable[[slice, Tensor, Tensor | None], Tensor]

    def over_unique_targets(self, copies: Tensor, sizes: Sequence[int]) -> HeadLoss:
        """The same loss over unique targets. Completions of a pair often begin alike; copies[i] is the unique target
        that target i repeats.

        copies: [sum(self.sizes)] int64. sizes: how many unique targets each group has, in order.
        """
        many, few = ([0, *accumulate(x)] for x in (self.sizes, sizes))

        def of(part: slice, logps: Tensor, entropies: Tensor | None) -> Tensor:
            which = copies[many[part.start] : many[part.stop]] - few[part.start]
            return self.of(part, logps[which], None if entropies is None else entropies[which])

        return HeadLoss(sizes, of)


@dataclass(frozen=True)
class Head:
    """How the last hidden states of a model become log-probabilities. head_bytes: the most memory that logits may take
    at a time, None = the device's default."""

    transform: LogitTransform
    head_bytes: int | None = None

    def token_logps(
        self, hidden: Tensor, head: nn.Module, targets: Tensor, *, entropy: bool, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probability of each target, and with `entropy` the entropy of the distribution it comes from.

        hidden: [N, D], the states that predict the targets, [N] int64 ids. head: the layer from D to V logits, called
        as a module so that ZeRO-3 gathers its weight. temperature: logits are divided by it, > 0. Where the head is a
        plain linear layer, logits exist a chunk at a time; where it is not (an adapter on it), all N x V are kept.
        Returns ([N] float32 nats, [N] float32 nats without gradient or None).
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
        """The loss of all groups, scalar float32, over log-probabilities as `token_logps` gives them.

        Where the kernel's plan is to go by parts, a few groups at a time go all the way to their gradient while their
        logits are in memory, so that a backward does not compute the logits again.
        """
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
        """The parts in which `linear_loss` takes the groups, each whole and small enough for its logits to fit into
        head_bytes; None where the kernel's plan for this size is another than to go by parts ("local")."""
        vocabulary, size = head.out_features, self.head_bytes or default_bytes(hidden.device)
        trained = head.weight.requires_grad
        gradient = torch.is_grad_enabled() and (hidden.requires_grad or trained)
        plan = scheme(
            len(hidden), vocabulary, hidden.dtype,
            gradient=gradient, trained=trained, head_bytes=size, largest_part=max(sizes, default=0),
        )  # fmt: skip
        rows = chunk_rows(vocabulary, hidden.element_size(), size)
        if gradient:
            logger.debug("head: %s, %d matrix products, --head_memory %d", plan.name, plan.products, size // 2**20)
        return whole_groups(sizes, rows) if plan.name == "local" else None


def whole_groups(sizes: Sequence[int], most: int) -> list[slice]:
    """Slices of neighbouring groups whose sizes add up to at most `most`; a larger group is a slice by itself."""
    found: list[slice] = []
    start, held = 0, 0
    for i, size in enumerate(sizes):
        if i > start and held + size > most:
            found.append(slice(start, i))
            start, held = i, 0
        held += size
    return [*found, slice(start, len(sizes))] if sizes else []


def _linear(head: nn.Module, hidden: Tensor) -> nn.Linear | None:
    """The head, if it is a plain linear layer with weights in the dtype of the states; else None."""
    if type(head) is nn.Linear and head.weight.dtype == hidden.dtype:
        return head
    _say(f"head: a {type(head).__name__} is no plain linear layer: the logits of all completion tokens are in memory")
    return None


@cache
def _say(text: str) -> None:
    """Log a line, once a run."""
    logger.info(text)


@contextmanager
def _forward_of(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, `module(...)` runs `function` in place of the module's forward, between the module's hooks: those of
    ZeRO-3 gather the weight that `function` reads."""
    before = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
