"""What an online algorithm computes does not depend on how a batch is shared by ranks and cut into micro-batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import CPU, metrics_of, precision
from recorded import ONLINE, PLAYS, Recorded, prepared_from, tensor

from dsalign import algos
from dsalign.contract.groups import Group, Output, Prepared
from dsalign.data.batches.packing import cut

TIED = {**PLAYS, 1: [replace(p, score=0.5) for p in PLAYS[1]]}  # one prompt without signal
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, ONLINE[name]) for name in ("grpo", "rloo", "reinforce", "online_dpo")),
    *(("grpo", {"num_generations": 2, "loss_norm": norm, "kl_estimator": "k2"}) for norm in ("token", "constant")),
    ("grpo", {"num_generations": 2, "dynamic_sampling": 2, "beta": 0.0}),
    ("rloo", {"num_generations": 2, "kl_estimator": "k3", "kl_coef": 0.5}),
    ("reinforce", {"num_generations": 1}),
    ("online_dpo", {"loss_type": "ipo"}),
]
each_case = pytest.mark.parametrize(("name", "options"), CASES, ids=str)
Summed = tuple[dict[str, float], dict[str, int], dict[str, float]]


def policy_of(group: Group) -> torch.Tensor:
    """The policy's log-probabilities of a group's completions."""
    return tensor([x for ids in group.completions for x in np.random.default_rng([5, *ids]).uniform(-4, 0, len(ids))])


def summed(algorithm: Any, found: Sequence[tuple[Prepared, Recorded]], cuts: Sequence[Sequence[int]] | None) -> Summed:
    """(terms, units, means of metrics) of all ranks; cuts: positions of a lone rank's micro-batches, None = each group
    by itself."""
    terms, units = Counter[str](), Counter[str]()
    sums: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for prepared, _ in found:
        n = len(prepared.groups)
        parts = [[i] for i in range(n)] or [[]] if cuts is None else [[i for i in part if i < n] for part in cuts]
        losses = []
        for part in parts:
            logps = torch.cat([*(policy_of(prepared.groups[i]) for i in part), torch.empty(0)])
            micro = cut(prepared, part, CPU)
            losses.append(algorithm.policy_loss(Output(logps=logps, entropy=logps**2), micro))
            units.update(algorithm.units(micro))
        for metrics in (prepared.metrics, *(loss.metrics for loss in losses)):
            for metric, (total, count) in metrics_of(metrics).items():
                sums[metric] += total  # type: ignore[assignment]
                counts[metric] += count  # type: ignore[assignment]
        for loss in losses:
            for unit, term in loss.terms.items():
                terms[unit] += float(term)  # type: ignore[assignment]
    return dict(terms), dict(units), {name: sums[name] / counts[name] for name in sums}


def assert_same(found: Summed, want: Summed) -> None:
    assert found[1] == want[1]
    for mine, theirs in ((found[0], want[0]), (found[2], want[2])):
        assert mine == pytest.approx(theirs, rel=1e-12, abs=1e-12)


@each_case
@pytest.mark.parametrize(
    "cuts",
    [
        [[0], [1], [2], [3]],
        [[3, 1], [], [0, 2]],
        [[2], [3, 0, 1]],
        [[0, 1], [2, 3]],
        [[], [0, 1, 2], [3]],
        [[3, 2, 1, 0], []],
    ],
    ids=str,
)
def test_cuts_of_a_batch_add_up(name: str, options: dict[str, Any], cuts: list[list[int]]) -> None:
    algorithm = algos.load(name)(**options)
    with precision(torch.float64):
        found = prepared_from(algorithm, TIED)
        assert_same(summed(algorithm, found, cuts), summed(algorithm, found, [[0, 1, 2, 3]]))


@each_case
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_add_up(name: str, options: dict[str, Any], world: int) -> None:
    """Terms, units and metrics of 1, 2 and 3 ranks; the same groups stand at the same places of the batch."""
    algorithm = algos.load(name)(**options)
    with precision(torch.float64):
        alone, shared = (prepared_from(algorithm, TIED, world=n) for n in (1, world))
        assert_same(summed(algorithm, shared, None), summed(algorithm, alone, None))
    places = [
        sorted((position, g.index) for p, _ in found for position, g in zip(p.positions or (), p.groups, strict=True))
        for found in (alone, shared)
    ]
    assert places[0] == places[1]
    dropped = name == "online_dpo" or options.get("dynamic_sampling")
    assert [position for position, _ in places[0]] == ([0, 2, 3] if dropped else [0, 1, 2, 3])
