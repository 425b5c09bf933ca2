"""A model in the place of a DeepSpeed engine: for one process that computes with it and never takes a step."""

from __future__ import annotations

from typing import Any

from dsalign.models.heads import CausalModel, ValueModel


class Alone:
    """What `Roles`, rollout engines and exports ask of a DeepSpeed engine, over a model that is whole on this process.

    module: the model with its head. global_steps: the version of its weights, which stays 0.
    """

    global_steps = 0

    def __init__(self, module: CausalModel | ValueModel) -> None:
        self.module = module

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The forward pass of the module, with what it takes and returns."""
        return self.module(*inputs, **options)

    def zero_optimization_stage(self) -> int:
        """The ZeRO stage, 0: no weight is sharded."""
        return 0
