"""One case of each algorithm with a calculator: loss, gradient and every metric; and a rank that has no rows."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from fakes import CPU, divided, metrics_of, output, prepared_on, table
from support import ALGORITHMS, from_rows, random_groups

from dsalign import algos
from dsalign.contract.algorithm import loss_of
from dsalign.contract.groups import Group, Output
from dsalign.data.batches.packing import cut, micro_batch

PROMPT, CHOSEN, REJECTED = (7,), (10, 11), (12,)
PAIR = Group(index=0, where="rows.jsonl:1", prompt=PROMPT, completions=(CHOSEN, REJECTED), prompt_text="a")
# logp_c = -2 in 2 tokens, logp_r = -4 in 1 token; the reference has -3 and -2: Delta_c = 1, Delta_r = -2, h = 3
NUMBERS = table({(PROMPT, CHOSEN): ([-0.5, -1.5], [-1.0, -2.0]), (PROMPT, REJECTED): ([-4.0], [-2.0])})


def close(expected: Any) -> Any:
    return pytest.approx(expected, rel=1e-6, abs=1e-7)


def computed(algorithm: Any, groups: list[Group], model: Any) -> tuple[float, list[float], dict[str, Any]]:
    """(loss, its gradient a token, metrics) of these groups as one global batch, with an entropy of 0.5 a token."""
    ((prepared, _),) = prepared_on(algorithm, groups, model)
    micro = cut(prepared, range(len(groups)), CPU)
    out = output(model, prepared.groups)
    out = replace(out, entropy=torch.full((len(out.logps),), 0.5))
    total = divided(algorithm, "policy", out, micro)
    total.backward()
    metrics = {**prepared.metrics, **algorithm.policy_loss(out, micro).metrics}
    assert not any(isinstance(x, torch.Tensor) and x.requires_grad for pair in metrics.values() for x in pair)
    return float(total.detach()), out.logps.grad.tolist(), metrics_of(metrics)


def test_sft() -> None:
    """(1 + 2 + 3 + 6) / 4 = 3 a token, each with a slope of -1/4."""
    groups = [replace(PAIR, completions=(c,)) for c in ((10, 11, 12), (13,))]
    model = table({(PROMPT, (10, 11, 12)): ([-1, -2, -3], []), (PROMPT, (13,)): ([-6], [])})
    loss, gradient, metrics = computed(algos.load("sft")(), groups, model)
    assert (loss, gradient) == (3.0, [-0.25] * 4)
    assert metrics == {"nll_loss": (12.0, 4.0), "entropy": (2.0, 4.0)}


def test_rm() -> None:
    """s 2 and 1, margin 0: log(1 + e^-1) = 0.313261688, centring 0.1 * 3^2 = 0.9.
    s 0 and 1, margin 0.5: log(1 + e^1.5) = 1.701413276, centring 0.1 * 1^2 = 0.1. The sum is 3.014674964, over 2 pairs.
    Slopes of the first: -sigmoid(-1) + 0.6 = 0.331058579 and 0.868941421; of the second -0.617574476 and 1.017574476.
    """
    groups = [PAIR, replace(PAIR, index=1, margin=0.5)]
    scores = torch.tensor([2.0, 1.0, 0.0, 1.0], requires_grad=True)
    algorithm, micro = algos.load("rm")(center_rewards_coefficient=0.1), micro_batch(groups, CPU)
    loss = divided(algorithm, "reward", Output(scores=scores), micro)
    loss.backward()
    assert float(loss.detach()) == close(3.014674964 / 2)
    slopes = [0.331058579, 0.868941421, -0.617574476, 1.017574476]
    assert scores.grad is not None and scores.grad.tolist() == close([x / 2 for x in slopes])
    metrics = metrics_of(algorithm.reward_loss(Output(scores=scores), micro).metrics)
    assert metrics == {
        "rewards/chosen": (2.0, 2.0),
        "rewards/rejected": (2.0, 2.0),
        "rewards/accuracies": (1.0, 2.0),
        "rewards/margins": (0.0, 2.0),
    }


def test_dpo() -> None:
    """z = 0.5 * 3: log(1 + e^-1.5) = 0.201413278, and 0.3 of NLL(chosen) = 2/2. Slopes -0.5 sigmoid(-1.5) =
    -0.091212762, for the chosen less 0.3 / 2. R_c = 0.5, R_r = -1."""
    loss, gradient, metrics = computed(algos.load("dpo")(beta=0.5, rpo_alpha=0.3), [PAIR], NUMBERS)
    assert loss == close(0.501413278)
    assert gradient == close([-0.241212762, -0.241212762, 0.091212762])
    assert metrics == {
        "rewards/chosen": (0.5, 1.0),
        "rewards/rejected": (-1.0, 1.0),
        "rewards/accuracies": (1.0, 1.0),
        "rewards/margins": (1.5, 1.0),
        "logps/chosen": (-2.0, 1.0),
        "logps/rejected": (-4.0, 1.0),
        "nll_loss": (2.0, 2.0),
        "entropy": (1.5, 3.0),
    }


def test_dpo_at_policy_equal_to_reference_is_log_2() -> None:
    """z = 0, and equal rewards count as wrong."""
    same = table({(PROMPT, CHOSEN): ([-0.5, -1.5], [-0.5, -1.5]), (PROMPT, REJECTED): ([-4.0], [-4.0])})
    loss, _, metrics = computed(algos.load("dpo")(rpo_alpha=0.0), [PAIR], same)
    assert loss == close(math.log(2))
    assert metrics["rewards/accuracies"] == (0.0, 1.0)


@pytest.mark.parametrize(
    "options",
    [{"loss_type": ("hinge",)}, {"loss_type": ("ipo",)}, {"f_divergence_type": "js"}, {"loss_type": ("aot_unpaired",)}],
    ids=str,
)
def test_rewards_of_dpo_are_beta_delta_whatever_the_loss(options: dict[str, Any]) -> None:
    """As above; ipo, which works on means, reports -2/2 and -4/1 too."""
    _, _, metrics = computed(algos.load("dpo")(beta=0.5, **options), [PAIR], NUMBERS)
    assert (metrics["rewards/chosen"], metrics["rewards/rejected"]) == ((0.5, 1.0), (-1.0, 1.0))
    means = {name: metrics[name] for name in metrics if name.startswith("logps/mean")}
    assert means == ({"logps/mean_chosen": (-1, 1), "logps/mean_rejected": (-4, 1)} if "ipo" in str(options) else {})


KTO_GROUPS = [
    replace(PAIR, prompt=(7,), completions=((10,),), prompt_text="a", label=True),
    replace(PAIR, prompt=(8,), completions=((11, 12),), prompt_text="b", label=False, index=1),
]
# Deltas 2 and -1; the mismatched pairs have 1 and 0.2, so z0 = 0.6
KTO_NUMBERS = table(
    {
        ((7,), (10,)): ([-1.0], [-3.0]),
        ((8,), (11, 12)): ([-2.0, -2.0], [-1.0, -2.0]),
        ((7,), (11, 12)): ([-1.0, -1.0], [-1.5, -1.5]),
        ((8,), (10,)): ([-2.0], [-2.2]),
    }
)


def test_kto() -> None:
    """2 sigmoid(-0.5 (2 - 0.6)) = 2 * 0.331812228 and 3 sigmoid(-0.5 (0.6 - -1)) = 3 * 0.310025519, over 2 examples:
    0.796850506. Slopes -2 * 0.5 * 0.331812228 * 0.668187772 / 2 and 3 * 0.5 * 0.310025519 * 0.689974481 / 2."""
    algorithm = algos.load("kto")(beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    loss, gradient, metrics = computed(algorithm, KTO_GROUPS, KTO_NUMBERS)
    assert loss == close(0.796850506)
    assert gradient == close([-0.110856437, 0.160432272, 0.160432272])
    assert metrics == {
        "kl": (close(1.2), 2.0),
        "rewards/chosen": (1.0, 1.0),
        "rewards/rejected": (-0.5, 1.0),
        "logps/chosen": (-1.0, 1.0),
        "logps/rejected": (-4.0, 1.0),
        "entropy": (1.5, 3.0),
    }


@pytest.mark.parametrize(("label", "missing"), [(True, "rejected"), (False, "chosen")])
def test_kto_metrics_of_a_missing_class_are_absent(label: bool, missing: str) -> None:
    """Counts of 0 on one side, of 2 on the other: rewards 0.5 (2 - 1), logps -1 - 4."""
    groups = [replace(g, label=label) for g in KTO_GROUPS]
    _, _, metrics = computed(algos.load("kto")(beta=0.5), groups, KTO_NUMBERS)
    there = "chosen" if label else "rejected"
    assert (metrics[f"rewards/{missing}"], metrics[f"logps/{missing}"]) == ((0.0, 0.0), (0.0, 0.0))
    assert (metrics[f"rewards/{there}"], metrics[f"logps/{there}"]) == ((0.5, 2.0), (-5.0, 2.0))


def test_kto_without_a_reference_point_reports_no_kl() -> None:
    """apo_zero_unpaired: sigmoid(-0.5 * 2) = 0.268941421 and sigmoid(0.5 * -1) = 0.377540669, over 2."""
    loss, _, metrics = computed(algos.load("kto")(beta=0.5, loss_type="apo_zero_unpaired"), KTO_GROUPS, KTO_NUMBERS)
    assert loss == close(0.323241045)
    assert "kl" not in metrics


def test_cpo() -> None:
    """z = 0.5 (-2 - -4) = 1: log(1 + e^-1) = 0.313261688, and 0.3 of NLL(chosen) = 1. Slopes -0.5 sigmoid(-1) =
    -0.134470711, for the chosen less 0.15. Rewards 0.5 * -2 and 0.5 * -4."""
    loss, gradient, metrics = computed(algos.load("cpo")(beta=0.5, cpo_alpha=0.3), [PAIR], NUMBERS)
    assert loss == close(0.613261688)
    assert gradient == close([-0.284470711, -0.284470711, 0.134470711])
    assert metrics == {
        "rewards/chosen": (-1.0, 1.0),
        "rewards/rejected": (-2.0, 1.0),
        "rewards/accuracies": (1.0, 1.0),
        "rewards/margins": (1.0, 1.0),
        "logps/chosen": (-2.0, 1.0),
        "logps/rejected": (-4.0, 1.0),
        "nll_loss": (2.0, 2.0),
        "entropy": (1.5, 3.0),
    }


def test_cpo_ipo_reports_means_too() -> None:
    """(-2/2 - -4/1 - 1)^2 = 4."""
    loss, _, metrics = computed(algos.load("cpo")(beta=0.5, cpo_alpha=0.0, loss_type="ipo"), [PAIR], NUMBERS)
    assert loss == close(4.0)
    assert (metrics["logps/mean_chosen"], metrics["logps/mean_rejected"]) == ((-1.0, 1.0), (-4.0, 1.0))


def test_orpo() -> None:
    """Means log 0.8 and log 0.5: log odds log 4 and 0, -log sigmoid(log 4) = log(5/4) = 0.223143551, and
    NLL = -log 0.8 = 0.223143551. With lambda 0.1: 1.1 * 0.223143551."""
    chosen, rejected = math.log(0.8), math.log(0.5)
    model = table({(PROMPT, CHOSEN): ([chosen, chosen], []), (PROMPT, REJECTED): ([rejected], [])})
    loss, _, metrics = computed(algos.load("orpo")(beta=0.1), [PAIR], model)
    assert loss == close(0.245457906)
    assert metrics == {
        "rewards/chosen": (close(-0.0223143551), 1.0),
        "rewards/rejected": (close(-0.0693147181), 1.0),
        "rewards/accuracies": (1.0, 1.0),
        "rewards/margins": (close(0.0470003629), 1.0),
        "logps/chosen": (close(-0.446287103), 1.0),
        "logps/rejected": (close(-0.693147181), 1.0),
        "logps/mean_chosen": (close(-0.223143551), 1.0),
        "logps/mean_rejected": (close(-0.693147181), 1.0),
        "nll_loss": (close(0.446287103), 2.0),
        "log_odds_ratio": (close(-0.223143551), 1.0),
        "log_odds_chosen": (close(1.386294361), 1.0),
        "entropy": (1.5, 3.0),
    }


def test_simpo() -> None:
    """Means -1 and -4 with beta 2: margin 6, less gamma 1: log(1 + e^-5) = 0.006715348, and 0.5 of NLL(chosen) = 1.
    Slopes -2 sigmoid(-5) = -0.013385702, over 2 tokens, less 0.5 / 2; and +0.013385702 over 1."""
    loss, gradient, metrics = computed(algos.load("simpo")(cpo_alpha=0.5), [PAIR], NUMBERS)
    assert loss == close(0.506715348)
    assert gradient == close([-0.256692851, -0.256692851, 0.013385702])
    assert metrics == {
        "rewards/chosen": (-2.0, 1.0),
        "rewards/rejected": (-8.0, 1.0),
        "rewards/accuracies": (1.0, 1.0),
        "rewards/margins": (6.0, 1.0),
        "logps/chosen": (-2.0, 1.0),
        "logps/rejected": (-4.0, 1.0),
        "logps/mean_chosen": (-1.0, 1.0),
        "logps/mean_rejected": (-4.0, 1.0),
        "nll_loss": (2.0, 2.0),
        "entropy": (1.5, 3.0),
    }


@pytest.mark.parametrize("name", [name for name in from_rows() if name != "rm"])
def test_entropy_is_reported_only_where_the_model_gives_it(name: str) -> None:
    algorithm = algos.load(name)()
    groups = random_groups(algorithm.traits.data, 3)
    ((prepared, _),) = prepared_on(algorithm, groups, lambda role, prompt, completion: np.full(len(completion), -1.0))
    micro = cut(prepared, range(3), CPU)
    assert "entropy" not in algorithm.policy_loss(Output(logps=torch.full((len(micro.segment),), -1.0)), micro).metrics


@pytest.mark.parametrize("name", from_rows())
def test_a_rank_without_rows_has_loss_0_and_a_zero_gradient(name: str) -> None:
    """Three ranks share two groups: the last one still prepares, counts 0 units, and its backward reaches a weight."""
    algorithm = algos.load(name)(**ALGORITHMS.get(name, {}))
    groups = random_groups(algorithm.traits.data, 2)
    found = prepared_on(algorithm, groups, lambda role, prompt, ids: np.full(len(ids), -1.0), world=3)
    prepared, _ = found[2]
    micro = cut(prepared, [], CPU)
    assert (list(prepared.groups), set(algorithm.units(micro).values())) == ([], {0})
    (role,) = algorithm.traits.trained
    weight = torch.ones(3, requires_grad=True)
    nothing = weight[torch.zeros(0, dtype=torch.int64)]
    out = Output.of(role, nothing, nothing.detach())
    loss = loss_of(algorithm, role, out, micro)
    assert [float(term.detach()) for term in loss.terms.values()] == [0.0] * len(loss.terms)
    (sum(loss.terms.values()) + 0.0 * nothing.sum()).backward()
    assert weight.grad.tolist() == [0.0, 0.0, 0.0]
    assert set(metrics_of({**prepared.metrics, **loss.metrics}).values()) == {(0.0, 0.0)}


def test_an_empty_rank_reports_the_names_of_the_others() -> None:
    """The means are taken over names that every rank must know, in the same order."""
    for name in from_rows():
        algorithm = algos.load(name)(**ALGORITHMS.get(name, {}))
        groups = random_groups(algorithm.traits.data, 2)
        names = []
        for prepared, _ in prepared_on(algorithm, groups, lambda role, prompt, ids: np.full(len(ids), -1.0), world=3):
            micro = cut(prepared, range(len(prepared.groups)), CPU)
            n, s = len(micro.segment), len(micro.lengths)
            out = Output(logps=torch.zeros(n), entropy=torch.zeros(n), scores=torch.zeros(s))
            (role,) = algorithm.traits.trained
            names.append([*prepared.metrics, *loss_of(algorithm, role, out, micro).metrics])
        assert names[0] == names[1] == names[2]
