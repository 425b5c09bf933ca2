"""How long a run is and how its steps are taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """How long a run is and how its steps are taken. learning_rates: role -> peak rate."""

    total_batches: int
    world_size: int
    seed: int
    learning_rates: Mapping[str, float]
    schedule: str
    warmup_ratio: float
    max_grad_norm: float  # 0 = no clipping
    fp16: bool = False
