"""Truncated importance weights: by hand, in a rollout and dynamic sampling, on the gradient alone, and refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from fakes import CPU, metrics_of
from recorded import END, PLAYS, PROMPTS, Recorded, played, prompts
from support import groups_of

from dsalign.config.parse import ConfigError, parse
from dsalign.contract.groups import Batch, Output
from dsalign.contract.importance import WEIGHTS, truncated_weights, weighted
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.contract.rollouts import sample, sample_until_full
from dsalign.data.batches.packing import micro_batch


def test_weights_by_hand() -> None:
    """The trainer finds tokens 1, 1/2, 3/2, 3 and e^-30 times as probable: the fourth is held at 2, and the last at
    e^-20. The mean is 5 / 5 to 1e-9, and one of five tokens is capped."""
    sampler = [torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -3.0, -1.0])]
    gaps = [torch.tensor([0.0, -math.log(2)]), torch.tensor([math.log(1.5), math.log(3), -30.0])]
    old = [s + g for s, g in zip(sampler, gaps, strict=True)]
    weights, metrics = truncated_weights(sampler, old, 2.0)
    assert weights[0].tolist() == pytest.approx([1, 0.5])
    assert weights[1].tolist() == pytest.approx([1.5, 2, math.exp(-20)])
    assert metrics_of(metrics) == {"rollout/is_weight": (pytest.approx(5), 5), "rollout/is_capped": (1, 5)}
    assert truncated_weights([], [], 2.0) == ([], {"rollout/is_weight": (0, 0), "rollout/is_capped": (0, 0)})


def test_only_the_gradient_is_weighted() -> None:
    """f = (a + b)^2 + c at 1, 2, 3: 12, slopes 6, 6 and 1; weights 1/2, 2 and 0 make them 3, 12 and 0. The entropy and
    other fields stay, and so does the output of a critic."""
    batch = micro_batch(groups_of(((5, 6), (2,))), CPU, {WEIGHTS: [torch.tensor([0.5, 2.0, 0.0])]})
    leaf, entropy = torch.tensor([1.0, 2.0, 3.0], requires_grad=True), torch.ones(3)
    out = weighted(Output(logps=leaf, entropy=entropy), batch)
    assert out.logps is not None and out.entropy is entropy and torch.equal(out.logps, leaf)
    f = out.logps[:2].sum() ** 2 + out.logps[2]
    f.backward()
    assert float(f.detach()) == 12 and leaf.grad is not None and leaf.grad.tolist() == [3, 12, 0]
    critic = Output(values=torch.ones(5, requires_grad=True))
    assert weighted(critic, batch) is critic
    plain, frozen = Output(logps=leaf), Output(logps=leaf.detach())
    assert weighted(plain, replace(batch, fields={})) is plain and weighted(frozen, batch) is frozen


def rolled(**options: Any) -> Any:
    """A rollout in which the trainer finds every token of the first prompt e times as probable as the sampler did."""
    plays = PLAYS | {0: [replace(p, sampler=p.old - 1) for p in PLAYS[0]]}
    rollout = RolloutOptions(max_new_tokens=5, **options)
    return sample(Recorded(plays, rollout=rollout), Batch(PROMPTS, range(len(PROMPTS))), 2)


def test_a_rollout_has_weights_where_a_cap_is_set() -> None:
    """The first prompt has 5 of 22 tokens, at the cap of 2: 17 + 10 over 22. Without a cap there are none."""
    found = rolled(rollout_is_cap=2.0)
    assert [w.tolist() for w in found.weights] == [[2.0] * 5, [1.0] * 3, [1.0] * 8, [1.0] * 6]
    assert found.prepared().fields[WEIGHTS] is found.weights
    metrics = metrics_of(found.metrics)
    assert (metrics["rollout/is_weight"], metrics["rollout/is_capped"]) == ((27.0, 22.0), (5.0, 22.0))
    assert found.select([1, 3]).weights == [found.weights[1], found.weights[3]]
    without = rolled()
    assert set(without.prepared().fields) == {"old"} and "rollout/is_weight" not in without.metrics


def test_weights_stay_with_their_groups_in_dynamic_sampling() -> None:
    """Prompt 0 has equal scores and goes; 1 stays, and 2 comes in the place of 0. Sampler and trainer differ by log 2
    at prompt 0, log 1.25 at 1 and log 1.5 at 2. Means are over all that was sampled, 2, 1.25 and 1.5."""
    scores, factors = {0: (1, 1), 1: (1, 2), 2: (0, 0, 3, 4)}, {0: 2.0, 1: 1.25, 2: 1.5}
    plays = {i: [played((10 + i, 20 + n, END), i, score) for n, score in enumerate(each)] for i, each in scores.items()}
    plays = {i: [replace(p, sampler=p.old - math.log(factors[i])) for p in each] for i, each in plays.items()}
    given = prompts(3)
    options = RolloutOptions(rollout_is_cap=4.0)
    found = sample_until_full(Recorded(plays, rollout=options, stream=given[2:]), Batch(given[:2], range(2)), 2, 1)
    assert [g.index for g in found.groups] == [1, 2]
    for weights, factor in zip(found.prepared().fields[WEIGHTS], (1.25, 1.5), strict=True):
        assert weights.tolist() == pytest.approx([factor] * 6, rel=1e-6)
    assert metrics_of(found.metrics)["rollout/is_weight"] == (pytest.approx(6 * 4.75), 18)


@pytest.mark.parametrize("cap", [0.5, -1.0, math.nan])
def test_a_cap_below_1_is_refused(cap: float) -> None:
    """It would hold down every token, also where sampler and trainer agree; 1 and infinity are caps."""
    with pytest.raises(ValueError, match=f"^rollout_is_cap: expected none or a number >= 1, got {cap}$"):
        RolloutOptions(rollout_is_cap=cap)
    assert RolloutOptions(rollout_is_cap=1.0).rollout_is_cap == 1 and RolloutOptions(rollout_is_cap=math.inf)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("ppo --old_logps sampler", "and old_logps sampler takes the sampler's for both"),
        ("online_dpo", "rollout_is_cap: expected none with online_dpo"),
    ],
)
def test_a_cap_that_would_do_nothing_is_refused(words: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(["--algo", *words.split(), "--model", "m", "--rollout_is_cap", "2"], world_size=1)
    assert said in str(caught.value)
