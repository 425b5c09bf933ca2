"""Weights gathered a layer at a time give the samples of whole weights, whatever work each rank has."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import layer_cases
import pytest
import torch
from support import RankPool, quick_if
from torch import nn

from dsalign.contract.rollout_options import RolloutOptions
from dsalign.rollout import in_process
from dsalign.rollout.in_process import InProcess
from dsalign.rollout.layers import Gathered, Turns


@pytest.mark.parametrize(
    ("tuner", "name", "few"),
    [
        ("lora", "local", 0),
        ("lora", "plain", 3),
        quick_if(False, "full", "local", 2),
        quick_if(False, "full", "plain", 0),
    ],
)
def test_samples_are_those_of_whole_weights(tuner: str, name: str, few: int, tiny: Path, two_ranks: RankPool) -> None:
    """Both ranks take part in as many gathers, each of one of the model's layers, and nothing is left of them."""
    (same, count, single, kept), other = two_ranks.run(layer_cases.as_whole, tiny, tuner, name, few)
    assert same and single and kept and other == (same, count, single, kept)
    assert count >= 2 * 7, "two layers, seven tokens"


def test_a_pass_that_runs_out_of_memory_does_not_leave_the_others_waiting(tiny: Path, two_ranks: RankPool) -> None:
    assert two_ranks.run(layer_cases.out_of_memory, tiny) == [(True, 2), (True, 4)]


def test_a_rank_that_fails_lets_the_others_end(tiny: Path, two_ranks: RankPool) -> None:
    assert two_ranks.run(layer_cases.broken, tiny) == ["done", "no more"]


def test_layers_out_of_turn_are_refused() -> None:
    """Other ranks would gather another layer."""
    engine: Any = SimpleNamespace(module=nn.Linear(1, 1), zero_optimization_stage=lambda: 0)
    turns = Turns(engine, [nn.Linear(1, 1), nn.Linear(1, 1)])
    turns.begin()
    with pytest.raises(RuntimeError, match="expected layer 0 of the pass, got layer 1"), turns.whole(1):
        pass


def test_a_gathered_layer_tells_what_kind_it_is_and_hands_out_no_module() -> None:
    layer = nn.Sequential(nn.Linear(1, 1))
    layer.attention_type = "full_attention"  # type: ignore[assignment]
    turns: Any = None
    gathered = Gathered(layer, 0, turns, lambda module: module)
    assert gathered.attention_type == "full_attention" and not list(gathered.parameters())
    with pytest.raises(AttributeError):
        _ = gathered.weight
    with pytest.raises(AttributeError):
        _ = getattr(gathered, "0")


@pytest.mark.parametrize(
    ("stage", "gather", "free", "want"),
    [
        (3, "auto", 8 * 4 + 1, False),  # six float32 numbers: 24 bytes are 3/4 of 32
        (3, "auto", 8 * 4 - 1, True),
        (3, "auto", None, False),
        (3, "layers", None, True),
        (3, "whole", 1, False),
        (2, "layers", 1, False),
    ],
)
def test_layers_are_gathered_where_the_whole_does_not_fit(
    stage: int, gather: str, free: int | None, want: bool
) -> None:
    weight = torch.zeros(6)
    weight.ds_numel = 6  # type: ignore[attr-defined]
    module = SimpleNamespace(parameters=lambda: iter([weight]))
    engine = SimpleNamespace(module=module, zero_optimization_stage=lambda: stage)
    machine = SimpleNamespace(free=None if free is None else lambda: free)
    with patch.object(in_process.Machine, "of", lambda device: machine):
        found = InProcess(engine, "local", 4)._by_layer(RolloutOptions(rollout_gather=gather))
    assert found == want
