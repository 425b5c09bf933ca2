"""The progress of a run, as its checkpoints keep it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsalign.contract.groups import Prepared


@dataclass
class Progress:
    """The progress of a run: counters and the algorithm's state, written as JSON into every checkpoint, and the batch
    that the next optimizer step trains on, where that is prepared already."""

    batches: int = 0  # global batches prepared
    step: int = 0  # optimizer steps taken
    num_tokens: int = 0  # input tokens of all ranks without padding, a group's prompt counted once
    bad_steps: int = 0  # optimizer steps that were skipped, as a loss or a gradient was not finite
    bad_in_a_row: int = 0  # of these, the ones since a step was last taken
    best_step: int | None = None  # optimizer step of the lowest evaluation loss
    best_loss: float | None = None  # that loss
    state: dict[str, Any] = field(default_factory=dict)  # `Context.state` of the algorithm
    taken: int = 0  # optimizer steps taken over `prepared`: 0 between two batches
    owes_evaluation: bool = False  # whether a stop broke off the evaluation after this step
    log: dict[str, Any] = field(default_factory=dict)  # metrics of steps that no log line has yet
    prepared: Prepared | None = field(default=None, repr=False)  # this rank's part; None between two batches

    def as_dict(self) -> dict[str, Any]:
        """The counters as a dictionary that JSON can hold; `prepared` is a file of its own."""
        return {one.name: deepcopy(getattr(self, one.name)) for one in fields(self) if one.name != "prepared"}
