"""The progress of a run, as its checkpoints keep it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Progress:
    """The progress of a run: counters and the algorithm's state, written as JSON into every checkpoint."""

    batches: int = 0  # global batches prepared
    step: int = 0  # optimizer steps taken
    num_tokens: int = 0  # input tokens of all ranks without padding, a group's prompt counted once
    bad_steps: int = 0  # optimizer steps that were skipped, as a loss or a gradient was not finite
    bad_in_a_row: int = 0  # of these, the ones since a step was last taken
    best_step: int | None = None  # optimizer step of the lowest evaluation loss
    best_loss: float | None = None  # that loss
    state: dict[str, Any] = field(default_factory=dict)  # `Context.state` of the algorithm

    def as_dict(self) -> dict[str, Any]:
        """The counters as a dictionary that JSON can hold."""
        return asdict(self)
