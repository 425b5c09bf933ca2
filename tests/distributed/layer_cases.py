"""What test_layers.py runs on every rank: rollouts at ZeRO-3 whose weights are gathered a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import rollout_cases
import torch

from dsalign.contract.rollout_options import RolloutOptions
from dsalign.engines import dist
from dsalign.models.heads import unwrap
from dsalign.models.last_layer import layers_of
from dsalign.rollout import in_process, layers
from dsalign.rollout.generate import Keys, Sampler


def sampled(trainer: Any, groups: Any, name: str, gather: str) -> Any:
    """(ids, log-probabilities) of two completions of each prompt, three at a time: rows wait and are refilled."""
    options = RolloutOptions(max_new_tokens=7, rollout=name, rollout_gather=gather, local_rollout_forward_batch_size=3)
    rollout = Sampler(trainer.roles, "policy", options, frozenset({2}))
    filled, logps, _ = rollout.sample(groups, 2, Keys(1, 0, 0), options)
    return [group.completions for group in filled], logps


@contextmanager
def counted(found: list[int]) -> Iterator[None]:
    """A context that notes how many numbers each gather of layers makes whole."""
    inner = layers.whole

    def whole(engine: Any, parameters: Any) -> Any:
        found.append(sum(p.ds_numel for p in parameters))
        return inner(engine, parameters)

    with patch.object(layers, "whole", whole):
        yield


def as_whole(folder: Path, tuner: str, name: str, few: int) -> Any:
    """(whether the samples are those of whole weights, of `plain` to the last bit; the number of gathers of this rank;
    whether each was of one layer; whether the model is as it was). Rank 1 has `few` prompts, rank 0 its eight."""
    trainer, mine = rollout_cases.rollouts_of(folder, "3", tuner)
    mine = mine[:few] if dist.rank() else mine
    engine = trainer.roles.engines["policy"]
    before, gathers = rollout_cases.weights(engine), list[int]()
    want = sampled(trainer, mine, name, "whole")
    with counted(gathers):
        found = sampled(trainer, mine, name, "layers")
    off = max((float((a - b).abs().max()) for a, b in zip(found[1], want[1], strict=True)), default=0.0)
    same = found[0] == want[0] and off <= (0 if name == "plain" else 1e-5)  # `local` has other products on a CPU
    each = {sum(p.ds_numel for p in layer.parameters()) for layer in decoder_layers(engine)}
    kept = all(torch.equal(a, b) for a, b in zip(before, rollout_cases.weights(engine), strict=True))
    freed = all(p.data.numel() == 0 for layer in decoder_layers(engine) for p in layer.parameters())
    return dist.everyones((same, len(gathers), set(gathers) == each, kept and freed and engine.module.training))


def decoder_layers(engine: Any) -> Any:
    return layers_of(unwrap(engine.module.model).get_decoder())


def out_of_memory(folder: Path) -> Any:
    """The same where rank 0's memory is not enough in the second layer of its third pass: (whether the samples are
    those of whole weights, how many completions run at a time then)."""
    trainer, mine = rollout_cases.rollouts_of(folder, "3", "full")
    want = sampled(trainer, mine, "local", "whole")
    inner, passes = layers.Gathered.forward, [0]

    def forward(self: Any, *args: Any, **more: Any) -> Any:
        passes[0] += self._number == 1
        if dist.rank() == 0 and self._number == 1 and passes[0] == 3:
            with self._turns.whole(1):
                raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(self, *args, **more)

    options = RolloutOptions(max_new_tokens=7, rollout_gather="layers", local_rollout_forward_batch_size=4)
    rollout = in_process.InProcess(trainer.roles.engines["policy"], "local", 4)
    with patch.object(layers.Gathered, "forward", forward):
        sampler = Sampler(trainer.roles, "policy", options, frozenset({2}))
        sampler.engine = rollout
        filled, _, _ = sampler.sample(mine, 2, Keys(1, 0, 0), options)
    return dist.everyones(([group.completions for group in filled] == want[0], rollout.rows))


def broken(folder: Path) -> list[str]:
    """What each rank says where rank 1's sampling fails for good in the middle of a pass."""
    trainer, mine = rollout_cases.rollouts_of(folder, "3", "full")
    inner = layers.Gathered.forward

    def forward(self: Any, *args: Any, **more: Any) -> Any:
        if dist.rank() == 1 and self._number == 1:
            raise ValueError("no more")
        return inner(self, *args, **more)

    with patch.object(layers.Gathered, "forward", forward):
        try:
            sampled(trainer, mine, "local", "layers")
            said = "done"
        except ValueError as error:
            said = str(error)
    return dist.everyones(said)
