"""From groups to tensors, by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import random_groups

from dsalign.contract.groups import Group, Prepared
from dsalign.data.batches.packing import (
    Span,
    alike,
    bins,
    chunks,
    cut,
    joined,
    micro_batch,
    num_computed,
    num_shared,
    num_tokens,
    packed,
    padded,
)

CPU = torch.device("cpu")
PAIR = Group(0, "a:1", prompt=(5, 6), completions=((7, 8, 2), (9,)), prompt_text="x")
TURN = tuple(range(10, 20))  # with which prompts begin
LONE = Group(1, "a:2", prompt=(4,), completions=((3, 2),), prompt_text="y")


def test_rows_by_hand() -> None:
    """Width 5. Row 0: 5 6 7 8 2, row 1: 5 6 9, row 2: 4 3 2. The state of token i predicts token i + 1: row 0 predicts
    from 1, 2, 3, row 1 from 5 + 1, row 2 from 10 + 0, 1; states go one further each."""
    found = padded([PAIR, LONE], CPU)
    assert found.ids.tolist() == [[5, 6, 7, 8, 2], [5, 6, 9, 0, 0], [4, 3, 2, 0, 0]]
    assert found.predict.tolist() == [1, 2, 3, 6, 10, 11]
    assert found.targets.tolist() == [7, 8, 2, 9, 3, 2]
    assert found.states.tolist() == [1, 2, 3, 4, 6, 7, 10, 11, 12]


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_every_position_predicts_its_own_target(kind: str) -> None:
    """ids one position on from `predict` are the targets, and the states are `predict` with the ends."""
    groups = random_groups(kind, 5, seed=9)
    found = padded(groups, CPU)
    assert torch.equal(found.ids.flatten()[found.predict + 1], found.targets)
    lengths = [len(c) for g in groups for c in g.completions]
    parts = found.states.split([n + 1 for n in lengths])
    assert torch.equal(torch.cat([p[:-1] for p in parts]), found.predict)
    assert found.ids.flatten()[[int(p[-1]) for p in parts]].eq(2).all()


def test_no_groups_are_one_row_of_one_token() -> None:
    found = padded([], CPU)
    assert found.ids.tolist() == [[0]]
    assert [x.tolist() for x in (found.predict, found.targets, found.states)] == [[], [], []]
    assert {x.dtype for x in (found.ids, found.predict, found.targets, found.states)} == {torch.int64}


def test_micro_batch_by_hand() -> None:
    """Three completions of 3, 1 and 2 tokens."""
    fields = {"reference": [torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([5.0, 6.0])]}
    micro = micro_batch([PAIR, LONE], CPU, fields, {"z": 0.5})
    assert micro.lengths.tolist() == [3, 1, 2]
    assert micro.segment.tolist() == [0, 0, 0, 1, 2, 2]
    assert micro.position.tolist() == [0, 1, 2, 0, 0, 1]
    assert micro.fields["reference"].tolist() == [1, 2, 3, 4, 5, 6]
    assert micro.shared == {"z": 0.5}
    assert micro.sum(micro.fields["reference"]).tolist() == [6, 4, 11]


def test_a_micro_batch_of_nothing() -> None:
    """Fields are there and empty; sums are of no completions."""
    micro = micro_batch([], CPU, {"reference": []})
    assert [x.shape for x in (micro.lengths, micro.segment, micro.position)] == [(0,)] * 3
    assert micro.fields["reference"].shape == (0,)
    assert micro.sum(torch.empty(0)).shape == (0,)


def test_cut_takes_groups_and_their_fields() -> None:
    """Positions 1 and 0 of two groups; an empty cut still has the field."""
    prepared = Prepared([PAIR, LONE], {"score": [torch.tensor([1.0]), torch.tensor([2.0])]}, {"z": 1.0})
    micro = cut(prepared, [1, 0], CPU)
    assert list(micro.groups) == [LONE, PAIR]
    assert micro.fields["score"].tolist() == [2.0, 1.0]
    assert micro.lengths.tolist() == [2, 3, 1]
    assert cut(prepared, [], CPU).fields["score"].shape == (0,)
    assert cut(prepared, [], CPU).shared == {"z": 1.0}


def test_a_packed_row_by_hand() -> None:
    """5 6 | 7 8 2 | 9 and 4 | 3 2 in one row of nine. 7 is predicted at 1, 8 and 2 at 2 and 3, 9 at 1 again, 3 and 2 at
    6 and 7; each completion's positions go on from its prompt's."""
    found = packed([PAIR, LONE], CPU)
    assert found.ids.tolist() == [[5, 6, 7, 8, 2, 9, 4, 3, 2]]
    assert found.positions is not None
    assert found.positions.tolist() == [[0, 1, 2, 3, 4, 2, 0, 1, 2]]
    assert found.spans == (Span(2, (Span(3), Span(1))), Span(1, (Span(2),)))
    assert found.predict.tolist() == [1, 2, 3, 1, 6, 7]
    assert found.targets.tolist() == [7, 8, 2, 9, 3, 2]
    assert found.states.tolist() == [1, 2, 3, 4, 1, 5, 6, 7, 8]


def test_a_packed_row_of_nothing_is_one_token() -> None:
    found = packed([], CPU)
    assert found.ids.tolist() == [[0]] and found.spans == (Span(1),)
    assert [x.tolist() for x in (found.predict, found.targets, found.states)] == [[], [], []]
    assert found.ids.dtype == found.predict.dtype == torch.int64


def test_what_completions_begin_with_stands_once_in_a_packed_row() -> None:
    """5 6 | 7 8 | 2 and 9, then 4 | 3 2: stems of three, of a prompt of two and the 7, and of one. The state of the 6
    predicts the 7 of both completions, that of the 7 both 8 and 9; all tokens are one of five predictions, in which the
    second completion's 7 is the first's. Behind the stem both go on at position 3."""
    pair = dataclasses.replace(PAIR, completions=((7, 8, 2), (7, 9)))
    found = packed([pair, LONE], CPU)
    assert found.ids.tolist() == [[5, 6, 7, 8, 2, 9, 4, 3, 2]]
    assert found.positions is not None and found.copies is not None and found.read is not None
    assert found.positions.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert found.spans == (Span(3, (Span(2), Span(1))), Span(1, (Span(2),)))
    assert (found.predict.tolist(), found.targets.tolist()) == ([1, 2, 3, 2, 6, 7], [7, 8, 2, 9, 3, 2])
    assert (found.copies.tolist(), found.sizes) == ([0, 1, 2, 0, 3, 4, 5], (4, 2))
    assert found.states.tolist() == [1, 2, 3, 4, 1, 2, 5, 6, 7, 8]
    assert found.read.tolist() == [1, 2, 3, 4, 5, 6, 7, 8], "all but the 5"
    ends = packed([pair, LONE], CPU, ends=True)
    assert ends.states.tolist() == [4, 5, 8] and ends.read is not None and ends.read.tolist() == [4, 5, 8]
    assert padded([pair, LONE], CPU, ends=True).states.tolist() == [4, 8, 12]


def test_what_prompts_begin_with_stands_once_in_a_packed_row() -> None:
    """Ten tokens, from which two groups go on, of a token and one with completions 7 8 and 7 9, and of two with 3; the
    second one in order, 4 | 3 2, stands behind them."""
    first = dataclasses.replace(PAIR, prompt=(*TURN, 5), completions=((7, 8), (7, 9)))
    third = dataclasses.replace(LONE, prompt=(*TURN, 6, 6), completions=((3,),))
    found = packed([first, LONE, third], CPU)
    assert found.ids.tolist() == [[*TURN, 5, 7, 8, 9, 6, 6, 3, 4, 3, 2]]
    assert found.positions is not None and found.copies is not None
    assert found.positions.tolist() == [[*range(10), 10, 11, 12, 12, 10, 11, 12, 0, 1, 2]]
    assert found.spans == (
        Span(10, (Span(2, (Span(1), Span(1))), Span(2, (Span(1),)))),
        Span(1, (Span(2),)),
    )
    assert (found.predict.tolist(), found.targets.tolist()) == ([10, 11, 11, 17, 18, 15], [7, 8, 9, 3, 2, 3])
    assert (found.copies.tolist(), found.sizes) == ([0, 1, 0, 2, 3, 4, 5], (3, 2, 1))
    assert found.states.tolist() == [10, 11, 12, 10, 11, 13, 17, 18, 19, 15, 16]
    whole = packed([first, LONE, third], CPU, whole=True)
    assert whole.ids.numel() == 10 + found.ids.numel() and len(whole.spans) == 3


def test_eight_tokens_are_enough_to_share_and_seven_are_not() -> None:
    assert alike([(*TURN[:7], 1), (*TURN[:7], 2)]) == [(0, [0]), (0, [1])]
    assert alike([(*TURN[:8], 1), (*TURN[:8], 2)]) == [(8, [0, 1])]


def test_a_prompt_joins_only_where_that_saves_tokens() -> None:
    """Two system turns that themselves begin alike: three prompts that share 30 tokens save 60; a fourth prompt, which
    shares 10 with them, would make that 30."""
    long = TURN + tuple(range(30, 50))
    prompts = [(*long, 1), (*long, 2), (*long, 3), (*TURN, 90, 1)]
    assert alike(prompts) == [(30, [0, 1, 2]), (0, [3])]
    assert alike([(*long[:15], 50), (*long[:15], 51), (*TURN, 90)]) == [(10, [0, 1, 2])], "20 tokens in place of 15"
    assert alike([]) == []


@given(st.lists(st.lists(st.integers(4, 5), min_size=1, max_size=14).map(tuple), max_size=5))
def test_groups_keep_their_predictions_whatever_their_prompts_begin_with(prompts: list[tuple[int, ...]]) -> None:
    """Each group's targets, in its order, at as many places as the row without sharing has."""
    groups = [dataclasses.replace(PAIR, prompt=prompt) for prompt in prompts]
    ours, theirs = packed(groups, CPU), packed(groups, CPU, whole=True)
    assert ours.targets.tolist() == theirs.targets.tolist() and ours.sizes == theirs.sizes
    assert ours.positions is not None and theirs.positions is not None and ours.read is not None
    assert ours.positions[0, ours.predict].tolist() == theirs.positions[0, theirs.predict].tolist()
    assert ours.ids[0, ours.states].tolist() == theirs.ids[0, theirs.states].tolist()
    assert ours.ids.numel() == max(1, sum(span.size for span in ours.spans)) <= theirs.ids.numel()


def test_completions_that_begin_alike_may_count_differently() -> None:
    """7 counts in the second completion alone, 8 in both; and of equal completions, or where one is the beginning of
    the other, nothing but the ends differ."""
    pair = dataclasses.replace(
        PAIR, completions=((7, 8, 2), (7, 8, 9)), masks=((False, True, True), (True, True, True))
    )
    found = packed([pair], CPU)
    assert found.copies is not None
    assert (found.predict.tolist(), found.targets.tolist()) == ([2, 3, 1, 3], [8, 2, 7, 9])
    assert (found.copies.tolist(), found.sizes) == ([0, 1, 2, 0, 3], (4,))
    for completions, stem, branches in [(((7, 2), (7, 2)), 4, (0, 0)), (((7,), (7, 2)), 3, (0, 1))]:
        pair = dataclasses.replace(PAIR, completions=completions)
        found = packed([pair], CPU, ends=True)
        assert found.spans == (Span(stem, tuple(map(Span, branches))),)
        assert found.states.tolist() == [stem - 1, stem - 1 + branches[1]]


@given(st.lists(st.lists(st.integers(4, 5), min_size=1, max_size=5).map(tuple), max_size=4).map(tuple))
def test_a_row_has_what_is_computed_once(completions: tuple[tuple[int, ...], ...]) -> None:
    """Every token of every completion is predicted, and the size that rows are cut by is the row's own."""
    group = dataclasses.replace(PAIR, completions=completions)
    found = packed([group], CPU)
    assert num_computed(group) == found.ids.numel() == found.spans[0].size
    if completions:
        assert num_computed(group, shared=False) == sum(2 + len(c) for c in completions)
    copies = torch.arange(len(found.targets)) if found.copies is None else found.copies
    assert found.targets[copies].tolist() == [token for c in completions for token in c]
    shared = num_shared(group)
    assert len({c[:shared] for c in completions}) <= 1
    if len(completions) > 1:
        assert len({c[: shared + 1] for c in completions}) > 1 or min(map(len, completions)) == shared


@pytest.mark.parametrize("layout", [padded, packed])
def test_only_tokens_that_count_are_predicted(layout: Any) -> None:
    """Of 7 8 2 the 8 is somebody else's turn: it is read, not predicted; lengths and segments count two."""
    group = dataclasses.replace(PAIR, completions=((7, 8, 2),), masks=((True, False, True),))
    found = layout([group], CPU)
    assert found.ids.tolist() == [[5, 6, 7, 8, 2]]
    assert (found.predict.tolist(), found.targets.tolist()) == ([1, 3], [7, 2])
    assert found.states.tolist() == [1, 2, 3, 4]
    micro = micro_batch([group], CPU)
    assert (micro.lengths.tolist(), micro.segment.tolist(), micro.position.tolist()) == ([2], [0, 0], [0, 1])


def test_chunks_by_hand() -> None:
    """Five positions in twos: 2, 2, 1."""
    assert [list(c) for c in chunks([4, 3, 2, 1, 0], 2)] == [[4, 3], [2, 1], [0]]
    assert chunks([], 2) == []


def test_bins_by_hand() -> None:
    """Room for 10: 7 alone leaves 3, 6 leaves 4, 4 fits there best, 3 with the 7; 12 is larger than any and alone."""
    assert bins([0, 1, 2, 3, 4], [3, 7, 12, 4, 6], 10) == [[0, 1], [2], [3, 4]]
    assert bins([5, 9], [5, 5], 10) == [[5, 9]]
    assert bins([], [], 10) == []


@given(st.lists(st.integers(1, 50)), st.integers(1, 60))
def test_bins_hold_everything_once_and_no_more_than_they_may(sizes: list[int], most: int) -> None:
    """No two of the bins could be one: at least half of the room of all bins but one is used."""
    found = bins(range(len(sizes)), sizes, most)
    assert sorted(i for one in found for i in one) == list(range(len(sizes)))
    loads = sorted(sum(sizes[i] for i in one) for one in found)
    assert all(load <= most or len(one) == 1 for one in found for load in [sum(sizes[i] for i in one)])
    assert len(loads) < 2 or loads[0] + loads[1] > most


def test_num_tokens_counts_each_prompt_once() -> None:
    """2 + 3 + 1, and 1 + 2; what completions have in common counts in each."""
    assert num_tokens([PAIR, LONE]) == 9
    assert num_tokens([]) == 0
    assert num_tokens([dataclasses.replace(PAIR, completions=((7, 8, 2), (7,)))]) == 6


def test_what_a_forward_pass_computes_by_hand() -> None:
    """Of the pair 2 + 3 + 1, or with the prompt of two once more; of 7 8 2 and 7 9 behind it the 7 once."""
    assert (num_computed(PAIR), num_computed(PAIR, shared=False)) == (6, 8)
    assert (num_computed(LONE), num_computed(LONE, shared=False)) == (3, 3)
    alike = dataclasses.replace(PAIR, completions=((7, 8, 2), (7, 9)))
    assert (num_computed(alike), num_computed(alike, shared=False)) == (6, 9)
    prompt = dataclasses.replace(PAIR, completions=())
    assert (num_computed(prompt), num_computed(prompt, shared=False)) == (2, 2)


def test_equal_prompts_are_joined() -> None:
    """Five groups of one completion, prompts 1 2 1 1 and a pair of 1: two completions at most come together, in order,
    and a group with more of its own stays as it is. A mask on one makes masks for both."""

    def group(i: int, prompt: int, *completions: int, masked: bool = False) -> Group:
        masks = tuple((False, True) for _ in completions) if masked else None
        return Group(i, "", (prompt,), tuple((c, 2) for c in completions), "", masks=masks)

    groups = [group(0, 1, 10), group(1, 2, 11), group(2, 1, 12, masked=True), group(3, 1, 13), group(4, 1, 14, 15)]
    whole, members = joined(groups)
    assert members == [[0, 2], [1], [3], [4]]
    assert whole[0].completions == ((10, 2), (12, 2)) and whole[0].masks == ((True, True), (False, True))
    assert whole[1:] == [groups[1], groups[3], groups[4]]
    assert joined([]) == ([], [])
