"""What KTO does beyond its formula: the mismatched pairs, one z0 for all ranks, and what it says of the data set."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
from fakes import CPU, Drawn, Ids, prepared_on
from hypothesis import given, settings
from hypothesis import strategies as st
from support import random_groups

from dsalign.algos.kto import KTO, mismatch_shift
from dsalign.contract.groups import Group
from dsalign.data.batches.packing import micro_batch

MODEL = Drawn(gap_low=-0.25, gap_high=0.5)  # the policy is above the reference: z0 > 0


def labelled(index: int, prompt: Ids, completion: Ids, text: str, label: bool = True) -> Group:
    return Group(index=index, where="", prompt=prompt, completions=(completion,), prompt_text=text, label=label)


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [("ab", (1, 0)), ("aabb", (2, 0)), ("aaaa", (1, 4)), ("aab", (1, 1)), ("abab", (1, 0)), ("aabcbc", (3, 0))],
)
def test_shift_by_hand(prompts: str, expected: tuple[int, int]) -> None:
    """aabb: shift 1 meets a-a and b-b, shift 2 nothing. aab: shift 1 meets the two a once, shift 2 too: the smaller.
    aabcbc: 1 meets aa; 2 meets bb and cc; 3 pairs a-c, a-b, b-c and back."""
    assert mismatch_shift(prompts) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from("abcd"), min_size=2, max_size=12))
def test_shift_is_that_of_the_oracle(prompts: list[str]) -> None:
    shift, matches = mismatch_shift(prompts)
    n = len(prompts)
    assert shift == oracle.kto_shift(prompts)
    assert matches == sum(prompts[i] == prompts[(i + shift) % n] for i in range(n))


def test_prompt_i_meets_the_completion_of_example_i_plus_shift() -> None:
    """Prompts a a b b, so a shift of 2: the policy is asked for a-b, a-b, b-a, b-a, the reference for those and for the
    rows in one go; nothing else of the group changes."""
    groups = [labelled(i, (i + 4,), (i + 10, 2), text) for i, text in enumerate("aabb")]
    ((_, ctx),) = prepared_on(KTO(), groups, MODEL)
    want = [replace(g, completions=groups[j].completions) for g, j in zip(groups, (2, 3, 0, 1), strict=True)]
    assert ctx.asked == [("reference", [*groups, *want]), ("policy", want)]
    assert ctx.warnings == []


def test_equal_prompts_everywhere_are_warned_of() -> None:
    groups = [labelled(i, (4,), (i + 10, 2), "a") for i in range(3)]
    ((_, ctx),) = prepared_on(KTO(), groups, MODEL)
    assert ctx.warnings == ["kto: some mismatched completions answer an equal prompt, which biases z0 upwards"]


def test_a_mismatched_completion_is_cut_to_fit() -> None:
    """At most 6 tokens: 4 of the prompt leave 2 of the other's 5; a prompt of 6 still gets one token."""
    groups = [
        labelled(0, (4, 5, 6, 7), (10, 2), "a"),
        labelled(1, (4,), (11, 12, 13, 14, 2), "b"),
        labelled(2, (4, 5, 6, 7, 8, 9), (15, 16, 2), "c"),
    ]
    ((prepared, ctx),) = prepared_on(KTO(), groups, MODEL, max_length=6)
    mixed = ctx.asked[1][1]
    assert [g.completions for g in mixed] == [((11, 12),), ((15, 16, 2),), ((10,),)]
    assert list(prepared.groups) == groups


def test_z0_is_the_same_on_every_rank_and_for_every_number_of_ranks() -> None:
    """Seven rows on 1, 2 and 3 ranks, so ragged: mean Delta of the mismatched pairs over all seven."""
    groups = random_groups("labels", 7, seed=4)
    shift = oracle.kto_shift([g.prompt_text for g in groups])
    mixed = [(groups[i].prompt, groups[(i + shift) % 7].completions[0]) for i in range(7)]
    want = oracle.kto_z0(*([MODEL(role, *one) for one in mixed] for role in ("policy", "reference")))
    assert want > 0
    found = [prepared_on(KTO(), groups, MODEL, world=world) for world in (1, 2, 3)]
    assert [p.shared["z0"] for ranks in found for p, _ in ranks] == [pytest.approx(want, rel=1e-14)] * 6
    assert len({p.shared["z0"] for ranks in found for p, _ in ranks}) == 1
    for ranks in found:  # the metric is a mean over examples, each rank with its share
        total, count = (sum(p.metrics["kl"][k] for p, _ in ranks) for k in (0, 1))
        assert (total / count, count) == (pytest.approx(want, rel=1e-14), 7)


def test_a_negative_mean_is_held_at_0_after_the_sum_over_ranks() -> None:
    """The policy is below the reference; ranks do not clip their own share."""
    groups = random_groups("labels", 4)
    for ranks in (1, 2):
        assert {p.shared["z0"] for p, _ in prepared_on(KTO(), groups, Drawn(gap_high=-0.01), world=ranks)} == {0.0}

    def opposite(role: str, prompt: Ids, completion: Ids) -> object:
        """Delta of the mismatched pairs: 3, -1, 3, -1 (by prompt), so z0 = 1."""
        return Drawn()("policy", prompt, completion)[:1] - (role == "reference") * (3.0 if prompt[0] % 2 == 0 else -1.0)

    rows = [labelled(i, (4 + i,), (20 + i,), f"{i}") for i in range(4)]
    for world in (1, 2):
        assert {p.shared["z0"] for p, _ in prepared_on(KTO(), rows, opposite, world=world)} == {1.0}


def test_apo_zero_unpaired_needs_no_mismatched_pairs() -> None:
    groups = random_groups("labels", 3)
    ((prepared, ctx),) = prepared_on(KTO(loss_type="apo_zero_unpaired"), groups, MODEL)
    assert [role for role, _ in ctx.asked] == ["reference"]
    assert (dict(prepared.shared), dict(prepared.metrics)) == ({}, {})


def test_kto_needs_two_examples_and_apo_zero_unpaired_one() -> None:
    assert KTO().traits.min_groups == 2
    assert KTO(loss_type="apo_zero_unpaired").traits.min_groups == 1


def test_units_are_examples_of_both_classes() -> None:
    assert KTO().units(micro_batch(random_groups("labels", 5), CPU)) == {"examples": 5}


def test_margins_are_the_difference_of_both_means_and_absent_without_one_of_them() -> None:
    """0.5 - -0.25; the trainer leaves a mean out that nothing was counted for."""
    both = {"rewards/chosen": 0.5, "rewards/rejected": -0.25}
    assert KTO().derived(both) == {"rewards/margins": 0.75}
    assert [KTO().derived({name: both[name]}) for name in both] == [{}, {}]


def rows(desirable: int, undesirable: int) -> list[Group]:
    return [labelled(i, (4,), (5,), "", label=i < desirable) for i in range(desirable + undesirable)]


@pytest.mark.parametrize(("desirable", "undesirable"), [(1, 1), (4, 3), (5, 4), (3, 0), (0, 3)])
def test_balanced_or_one_sided_rows_are_counted_without_a_warning(desirable: int, undesirable: int) -> None:
    """1, 4/3 and 5/4 lie in [1, 4/3]; one class alone is legal and has no ratio."""
    lines = KTO().notes(rows(desirable, undesirable))
    assert lines == [f"kto: {desirable} desirable and {undesirable} undesirable rows"]


def test_unbalanced_rows_come_with_the_weights_that_would_balance_them() -> None:
    """10 : 4 with weights 1 : 1 is 2.5; 0.4 x 10 / 4 = 1 and 0.533 x 10 / 4 = 4/3. 3 : 2 and 9 : 10 are outside too."""
    assert [len(KTO().notes(rows(*counts))) for counts in ((3, 2), (9, 10))] == [2, 2]
    assert KTO().notes(rows(10, 4)) == [
        "kto: 10 desirable and 4 undesirable rows",
        "kto: desirable_weight x desirable / (undesirable_weight x undesirable) = 2.5 is outside [1, 4/3]; "
        "--desirable_weight between 0.4 and 0.533 would balance the classes",
    ]


def test_weights_count_in_the_balance() -> None:
    """0.5 x 10 / (1 x 4) = 1.25; 1 x 1 / (2 x 2) = 0.25, so desirable_weight should be 4 to 5.33."""
    assert len(KTO(desirable_weight=0.5).notes(rows(10, 4))) == 1
    (_, line) = KTO(undesirable_weight=2.0).notes(rows(1, 2))
    assert "= 0.25 is outside" in line and "between 4 and 5.33 would" in line
