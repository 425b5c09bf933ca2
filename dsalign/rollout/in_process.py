"""The engines `local` and `plain`: they sample from the training weights themselves, through a view of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dsalign.contract.rollouts import RolloutOptions
from dsalign.engines.engine import version
from dsalign.models import attention
from dsalign.rollout import local, plain
from dsalign.rollout.api import Completion, Request
from dsalign.rollout.view import generation_view


class InProcess:
    """A rollout engine over a DeepSpeed engine of this process. It holds nothing between two rollouts: the view, merged
    adapters, gathered weights and the key-value cache go when one ends.

    name: local, plain, or auto: local where the model's attention can take packed rows. rows: completions that run at a
    time.
    """

    def __init__(self, engine: Any, name: str, rows: int) -> None:
        self.engine, self.name, self.rows = engine, name, rows
        self.dtype = next(engine.module.parameters()).dtype

    def generate(
        self, requests: Sequence[Request], options: RolloutOptions, end_ids: frozenset[int]
    ) -> list[list[Completion]]:
        """Sample the completions of each request, as `dsalign.rollout.api.Rollout` says. Collective."""
        with generation_view(self.engine) as model:
            if self.name == "local" or (self.name == "auto" and attention.share(model)):  # of the view, not the model
                found = local.decode(local.prepare(model), requests, options, end_ids, self.rows)
            else:
                found = plain.decode(model, requests, options, end_ids, self.rows)
        now = version(self.engine)
        return [[replace(one, version=now) for one in answer] for answer in found]
