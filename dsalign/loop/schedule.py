"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate_factor(kind: str, step: int, total: int, warmup_ratio: float) -> float:
    """The factor of the peak learning rate at optimizer step `step`, counted from 0, of `total`.

    Warm-up is linear over ceil(warmup_ratio * total) steps and its first step is above 0. Then `cosine` and `linear`
    fall to 0 at `total`; `constant` has no warm-up, `constant_with_warmup` stays at 1.
    """
    warmup = math.ceil(warmup_ratio * total) if kind != "constant" else 0
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind.startswith("constant"):
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return 0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1 - done
