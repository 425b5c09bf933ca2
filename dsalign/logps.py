"""Hidden states -> log-probabilities of completion tokens: the seam to the kernels, and their only importer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsalign_kernels import selective_logps


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
    gathers its weight; temperature > 0 divides the logits.
    Returns [N] float32 nats, and [N] float32 nats without gradient or None.
    """
    logits = transform(head(hidden))
    return selective_logps(logits if temperature == 1.0 else logits / temperature, targets, entropy=entropy)
