"""Where a run is."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Progress:
    """Where a run is: all of it JSON, in every checkpoint."""

    batches: int = 0  # prepared batches done
    step: int = 0  # optimizer steps done
    num_tokens: int = 0  # real input tokens of all ranks, each prompt once
    best_step: int | None = None  # the checkpoint with the lowest evaluation loss
    best_loss: float | None = None
    state: dict[str, Any] = field(default_factory=dict)  # the algorithm's

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)
