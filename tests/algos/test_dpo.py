"""What DPO does beyond its formulas: partners sorted over the global batch, held exponents, weights of tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from fakes import CPU, Drawn, Ids, divided, output, pairs, prepared_on, table
from hypothesis import given, settings
from hypothesis import strategies as st
from support import random_groups

from dsalign.algos.dpo import DPO
from dsalign.contract.groups import Group, Prepared
from dsalign.contract.preference_losses import partners
from dsalign.data.batches.packing import cut, micro_batch

AOT = DPO(beta=0.5, loss_type=("aot", "aot_unpaired"), rpo_alpha=0.0)


def paired(index: int, chosen: Ids, rejected: Ids) -> Group:
    return Group(index=index, where="", prompt=(7,), completions=(chosen, rejected), prompt_text="")


def three_pairs(order: list[int]) -> tuple[list[Group], Any]:
    """Pairs 0, 1, 2 of one-token completions in this order. Policy c - r: 1, 1, 0; reference c - r: 9, 3, 5;
    Delta_c = -1, -2, -1; Delta_r = 7, 0, 4."""
    numbers = {
        0: {"policy": (-1.0, -2.0), "reference": (0.0, -9.0)},
        1: {"policy": (-3.0, -4.0), "reference": (-1.0, -4.0)},
        2: {"policy": (-2.0, -2.0), "reference": (-1.0, -6.0)},
    }
    groups = [paired(i, (10 + i,), (20 + i,)) for i in range(3)]
    rows = {
        ((7,), ids): tuple([numbers[g.index][role][side]] for role in ("policy", "reference"))
        for g in groups
        for side, ids in enumerate(g.completions)
    }
    return [groups[i] for i in order], table(rows)


def by_index(found: list[tuple[Prepared, Any]], name: str) -> dict[int, float]:
    return {g.index: float(x) for p, _ in found for g, x in zip(p.groups, p.fields[name], strict=True)}


@pytest.mark.parametrize("order", [[0, 1, 2], [1, 2, 0], [2, 1, 0]])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_partners_by_hand_with_ties_by_example_index(order: list[int], world: int) -> None:
    """Whatever the order of the batch and however ranks share it, by three sorts with ties broken by index:
    policy 0 (pair 2), 1 (pair 0), 1 (pair 1) against reference 3, 5, 9;
    Delta_c -2 (pair 1), -1 (pair 0), -1 (pair 2) against Delta_r 0, 4, 7;
    Delta_r 0 (pair 1), 4 (pair 2), 7 (pair 0) against Delta_c -2, -1, -1.
    """
    groups, model = three_pairs(order)
    found = prepared_on(AOT, groups, model, world=world)
    assert by_index(found, "aot") == {2: 3.0, 0: 5.0, 1: 9.0}
    assert by_index(found, "rejected") == {1: 0.0, 0: 4.0, 2: 7.0}
    assert by_index(found, "chosen") == {1: -2.0, 2: -1.0, 0: -1.0}
    assert [g.index for p, _ in found for g in p.groups] == [i for r in range(world) for i in order[r::world]]


def test_aot_by_hand() -> None:
    """Gaps 0 - 3, 1 - 5, 1 - 9 with beta 0.5: log(1 + e^1.5) = 1.701413278, log(1 + e^2) = 2.126928011,
    log(1 + e^4) = 4.018149928; the mean is 2.615497072. aot_unpaired has gaps -2 - 0, -1 - 4, -1 - 7:
    1.313261688 + 2.578889734 + 4.018149928 over 3."""
    groups, model = three_pairs([0, 1, 2])
    for loss_type, want in (("aot", 2.615497072), ("aot_unpaired", 2.636767117)):
        algorithm = replace(AOT, loss_type=(loss_type,))
        ((prepared, _),) = prepared_on(algorithm, groups, model)
        total = divided(algorithm, "policy", output(model, groups), cut(prepared, range(3), CPU))
        assert float(total.detach()) == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_partners_over_ragged_ranks_are_those_of_the_oracle(world: int) -> None:
    """Seven pairs, with tokens beyond the shorter length weighed: each rank gets its own pairs' partners."""
    groups, model = random_groups("pairs", 7, seed=5), Drawn()
    policy, reference = pairs(model, "policy", groups), pairs(model, "reference", groups)
    who = oracle.aot_partners(policy, reference, order=range(7), ld_alpha=0.5)
    found = prepared_on(replace(AOT, ld_alpha=0.5), groups, model, world=world)

    def side(role: list[Any], i: int, k: int) -> float:
        short = min(len(x) for x in role[i])
        return float(role[i][k][:short].sum() + 0.5 * role[i][k][short:].sum())

    ref = [side(reference, i, 0) - side(reference, i, 1) for i in range(7)]
    rejected = [side(policy, i, 1) - side(reference, i, 1) for i in range(7)]
    assert by_index(found, "aot") == {i: ref[j] for i, j in enumerate(who["aot"])}
    assert by_index(found, "rejected") == {i: rejected[j] for i, j in enumerate(who["aot_unpaired"])}


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8), st.randoms())
def test_partners_do_not_depend_on_the_order_of_the_batch(rows: list[tuple[int, int]], random: Any) -> None:
    """Few values, so many ties: the partner of an example is the same for every permutation."""
    n = len(rows)
    order = list(range(n))
    random.shuffle(order)
    left, right = torch.tensor(rows, dtype=torch.float64).unbind(1)
    index, moved = torch.arange(n, dtype=torch.float64), torch.tensor(order)
    found = partners(right[moved], left[moved], index[moved])
    assert torch.equal(found, partners(right, left, index)[moved])
    by_left = sorted(range(n), key=lambda i: (rows[i][0], i))
    assert partners(right, left, index)[by_left].tolist() == sorted(right.tolist())


def test_only_sorting_losses_ask_for_a_policy_pass() -> None:
    groups = random_groups("pairs", 3)
    for loss_type, roles in (("sigmoid", ["reference"]), ("aot", ["reference", "policy"])):
        ((prepared, ctx),) = prepared_on(DPO(loss_type=(loss_type,)), groups, Drawn())
        assert [role for role, _ in ctx.asked] == roles
        assert set(prepared.fields) == {"reference"} | ({"aot", "chosen", "rejected"} if "policy" in roles else set())
        lengths = [len(x) for x in prepared.fields["reference"]]
        assert lengths == [sum(map(len, g.completions)) for g in groups]


def one_loss(algorithm: DPO, chosen: tuple[list[float], list[float]], rejected: tuple[list[float], list[float]]) -> Any:
    """(loss, gradient a token) of one pair, given (policy, reference) of each side."""
    group = paired(0, tuple(range(10, 10 + len(chosen[0]))), tuple(range(30, 30 + len(rejected[0]))))
    model = table({((7,), group.completions[0]): chosen, ((7,), group.completions[1]): rejected})
    ((prepared, _),) = prepared_on(algorithm, [group], model)
    out = output(model, [group])
    total = divided(algorithm, "policy", out, cut(prepared, [0], CPU))
    total.backward()
    return float(total.detach()), out.logps.grad.tolist()


@pytest.mark.parametrize(
    ("kind", "policy", "reference", "want"),
    [("forward_kl", -101.0, -1.0, 1.008070405), ("alpha", -1.0, -101.0, 0.454008167)],
)
def test_exponents_of_f_divergences_are_held_at_80(kind: str, policy: float, reference: float, want: float) -> None:
    """Delta_c = -100 gives -e^80 for forward_kl, Delta_c = 100 gives e^80 for alpha 2, instead of infinity in float32.
    With beta 1e-35 and Delta_r = 0, z = -+0.554062: log(1 + e^+-0.554062) = 1.008..., 0.454... No slope beyond 80."""
    algorithm = DPO(beta=1e-35, rpo_alpha=0.0, f_divergence_type=kind, f_alpha_divergence_coef=2.0)
    loss, gradient = one_loss(algorithm, ([policy], [reference]), ([-1.0], [-1.0]))
    assert loss == pytest.approx(want, rel=1e-6)
    assert gradient[0] == 0.0


def test_ld_alpha_weighs_what_is_beyond_the_shorter_completion() -> None:
    """Chosen of 3 tokens against 1: with ld_alpha 0.25 its Delta is 2 + 0.25 (4 + 8) = 5, of the rejected -1, so
    z = 0.5 * 6 = 3; slopes -0.5 sigmoid(-3) = -0.023712937, a quarter of it beyond the first token."""
    algorithm = DPO(beta=0.5, rpo_alpha=0.0, ld_alpha=0.25)
    loss, gradient = one_loss(algorithm, ([-1.0, -1.0, -1.0], [-3.0, -5.0, -9.0]), ([-2.0], [-1.0]))
    assert loss == pytest.approx(math.log1p(math.exp(-3)), rel=1e-6)
    assert gradient == pytest.approx([-0.023712937, -0.005928234, -0.005928234, 0.023712937], rel=1e-6)


def test_ld_alpha_leaves_the_nll_of_the_chosen_alone() -> None:
    """With both completions as the reference has them the loss is log 2 + (1 + 2 + 3) / 3, at every ld_alpha."""
    for ld_alpha in (0.0, 0.5, 1.0):
        tokens = [-1.0, -2.0, -3.0]
        loss, _ = one_loss(DPO(ld_alpha=ld_alpha), (tokens, tokens), ([-2.0], [-2.0]))
        assert loss == pytest.approx(math.log(2) + 2.0, rel=1e-6)


def test_weights_of_one_type_scale_it() -> None:
    """2 log 2 at policy = reference; a type given without weights counts once."""
    same = ([-1.0], [-1.0])
    assert one_loss(DPO(rpo_alpha=0.0, loss_weights=(2.0,)), same, same)[0] == pytest.approx(2 * math.log(2))
    both = DPO(rpo_alpha=0.0, loss_type=("sigmoid", "hinge"))
    assert one_loss(both, same, same)[0] == pytest.approx(math.log(2) + 1.0)


def test_discopop_far_from_its_mixture_is_finite() -> None:
    """z = -50: the mixture's weight is e^-1000 = 0 in any float, and -log sigmoid(z) = 50 is left."""
    loss, gradient = one_loss(
        DPO(beta=0.5, rpo_alpha=0.0, loss_type=("discopop",)), ([-101.0], [-1.0]), ([-1.0], [-1.0])
    )
    assert loss == pytest.approx(50.0)
    assert gradient == pytest.approx([-0.5, 0.5])


def test_one_pair_is_enough_and_nothing_is_said_of_the_data() -> None:
    groups = random_groups("pairs", 5)
    assert (DPO().traits.min_groups, DPO().notes(groups)) == (1, [])
    assert DPO().units(micro_batch(groups, CPU)) == {
        "pairs": 5,
        "chosen_tokens": sum(len(g.completions[0]) for g in groups),
    }
    assert np.isfinite(one_loss(AOT, ([-1.0], [-2.0]), ([-3.0], [-3.0]))[0])
