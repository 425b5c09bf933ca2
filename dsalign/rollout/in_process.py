"""The engines `local` and `plain`: they sample from the training weights themselves, through a view of the model."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from dsalign.contract.rollout_options import RolloutOptions
from dsalign.engines import dist
from dsalign.engines.engine import version
from dsalign.engines.memory import out_of_memory
from dsalign.models import attention
from dsalign.rollout import local, plain
from dsalign.rollout.api import Completion, Request
from dsalign.rollout.machine import GIB, Machine, warn_once
from dsalign.rollout.view import generation_view

logger = logging.getLogger(__name__)


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
        """Sample the completions of each request, as `dsalign.rollout.api.Rollout` says. Collective.

        Where memory is not enough, fewer completions run at a time from then on: the same ones, as a sample is a
        function of its key. Raises ValueError where it is not enough for one.
        """
        with generation_view(self.engine, by_layer=self._by_layer(options)) as model:
            if self.name == "local" or (self.name == "auto" and attention.share(model)):  # of the view, not the model
                model = local.prepare(model)
                found = self._fitting(lambda rows: local.decode(model, requests, options, end_ids, rows))
            else:
                found = self._fitting(lambda rows: plain.decode(model, requests, options, end_ids, rows))
        now = version(self.engine)
        return [[replace(one, version=now) for one in answer] for answer in found]

    def _by_layer(self, options: RolloutOptions) -> bool:
        """Whether weights are gathered a layer at a time: as is wanted, or, for "auto", where all of them, and the
        second copy into which adapters are merged, would take more than GATHERED of the memory that is free on any
        rank. Collective."""
        if self.engine.zero_optimization_stage() < 3 or options.rollout_gather == "whole":
            return False
        parameters: list[Any] = list(self.engine.module.parameters())
        free = Machine.of(parameters[0].device).free
        copies = 2 if isinstance(getattr(self.engine.module, "model", None), PeftModel) else 1
        need = copies * sum(p.ds_numel * p.element_size() for p in parameters)
        tight = options.rollout_gather == "layers" or (free is not None and need > options.GATHERED * free())
        if not dist.largest(int(tight), parameters[0].device):
            return False
        if dist.rank() == 0:
            warn_once(
                f"rollout: {need / GIB:.1f} GiB of weights are gathered a layer at a time, for each token anew; "
                "--rollout vllm with servers of its own is faster"
            )
        return True

    def _fitting(self, sample: Callable[[int], list[list[Completion]]]) -> list[list[Completion]]:
        """What `sample` returns for as many rows at a time as memory holds. A rank decides alone, as it samples."""
        while True:
            try:
                return sample(self.rows)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                reason = str(error).strip().splitlines()[0][:200]
            if self.rows == 1:  # behind the except clause, which would keep what the pass held alive
                raise ValueError(
                    f"rollout: out of memory with one completion at a time: {reason}; lower --max_new_tokens or "
                    "--max_length, or free memory with --tuner lora, --deepspeed zero3 or zero3_offload"
                )
            before, self.rows = self.rows, self.rows // 2
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning(
                "warning: rollout: out of memory with %d completions at a time, from here on %d, which are the same "
                "samples; --local_rollout_forward_batch_size %d begins there", before, self.rows, self.rows,
            )  # fmt: skip
