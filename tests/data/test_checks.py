"""What is found in a data set, by hand, and that nothing is too odd to be reported on."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsalign.contract.groups import Group
from dsalign.data.checks import BINS, TRAINED, Finding, Lengths, Survey, as_json

END, BOS = 2, 1
ENDS = frozenset({END})


def pair(chosen, rejected, prompt=(5, 6), where="f:1"):
    return Group(0, where, prompt, (chosen, rejected), "x")


GOOD = pair((7, 8, END), (9, 8, END))


def check(groups, ends, bos):
    return Survey(groups, ends, bos).findings()


def lengths(groups):
    return Survey(groups, ENDS, None).lengths()


def found(*groups, bos=None):
    return {f.rule: f for f in check(groups, ENDS, bos)}


def test_nothing_is_found_in_good_rows():
    assert check([GOOD, pair((7, END), (8, END), where="f:2")], ENDS, BOS) == []


@pytest.mark.parametrize(
    ("rule", "severity", "group"),
    [
        ("prompts with two BOS", "error", pair((7, END), (8, END), prompt=(BOS, BOS, 5))),
        ("rows without end token", "warning", pair((7, 8), (9, END))),
        ("identical pairs", "warning", pair((7, END), (7, END))),
        ("empty answers", "warning", pair((7, END), (END,))),
    ],
)
def test_each_rule_finds_its_row_and_no_other(rule, severity, group):
    """Beside a good row; the message names where and what to do."""
    (finding,) = [f for f in check([GOOD, group], ENDS, BOS) if f.rule != "pairs with a length bias"]
    assert (finding.severity, finding.rule, finding.count, finding.examples) == (severity, rule, 1, ("f:1",))
    assert finding.line().startswith(f"{severity}: 1 {rule} (f:1): ")


def test_a_bos_once_is_right_and_without_a_bos_nothing_is_double():
    once, twice = pair((7, END), (8, END), prompt=(BOS, 5)), pair((7, END), (8, END), prompt=(BOS, BOS))
    assert "prompts with two BOS" not in found(once, bos=BOS)
    assert "prompts with two BOS" not in found(twice, bos=None)


def test_duplicates_are_counted_from_the_second_on():
    """Three of one row are two duplicates; the same answers to another prompt, or with another label, are none."""
    rows = [GOOD] * 3 + [pair((7, 8, END), (9, 8, END), prompt=(4,))]
    assert found(*rows)["duplicates"].count == 2
    labelled = [Group(i, f"f:{i}", (5,), ((7, END),), "x", label=i == 0) for i in range(2)]
    assert "duplicates" not in found(*labelled)


def test_opposites_are_contradictions():
    """A pair and the same turned round; one answer with either label. Other prompts, and equal answers, are none."""
    turned = pair((9, 8, END), (7, 8, END), where="f:9")
    first = pair((7, 8, END), (9, 8, END))
    assert found(first, turned, first)["contradictions"].count == 2
    assert found(first, turned)["contradictions"].examples == ("f:9",)
    assert "contradictions" not in found(first, pair((9, 8, END), (7, 8, END), prompt=(4,)), pair((7, END), (7, END)))
    labelled = [Group(i, f"f:{i}", (5,), ((7, END),), "x", label=i == 0) for i in range(2)]
    assert found(*labelled)["contradictions"].examples == ("f:1",)


def test_rows_to_evaluate_on_that_are_trained_on():
    """One of two is; the training data has no such finding."""
    other = pair((7, 8, END), (9, 8, END), where="f:7", prompt=(4,))
    trained = Survey([GOOD], ENDS, BOS)
    rules = {f.rule: f for f in Survey([other, GOOD], ENDS, BOS, trained).findings()}
    assert rules[TRAINED].count == 1
    assert not [f for f in trained.findings() if f.rule == TRAINED]


def test_length_bias_by_hand():
    """Chosen longer in two of three pairs is 67%, above 65%; in half of them it is no bias."""
    longer, shorter = pair((7, 8, 9, END), (7, END)), pair((7, END), (8, 9, END), where="f:2")
    other = pair((6, 8, 9, END), (8, END), where="f:3")
    finding = found(longer, shorter, other)["pairs with a length bias"]
    assert "longer in 67% of pairs (3 against 2 tokens on average)" in finding.advice
    assert "pairs with a length bias" not in found(longer, shorter)
    assert "shorter in 100%" in found(shorter)["pairs with a length bias"].advice


def test_errors_come_first_and_few_rows_are_named():
    rows = [pair((7, END), (7, END), where=f"f:{i}", prompt=(4, i)) for i in range(5)]
    rows.append(pair((7, END), (8, END), prompt=(BOS, BOS)))
    first, second = (f for f in check(rows, ENDS, BOS))
    assert (first.rule, second.rule) == ("prompts with two BOS", "identical pairs")
    assert second.line().startswith("warning: 5 identical pairs (f:0, f:1, f:2, ...): ")


def test_lengths_by_hand():
    """0 to 99 in ten bins of ten; the median of 100 numbers by rank is number 50, p95 number 94."""
    of = Lengths.of(range(100))
    assert of == Lengths(50, 94, 99, (10,) * BINS)
    assert Lengths.of([7]) == Lengths(7, 7, 7, (0, 0, 0, 0, 0, 0, 0, 1, 0, 0))
    measured = lengths([GOOD, Group(1, "f:2", (5,), (), "x")])
    assert (measured["prompt"].largest, measured["completion"].largest, measured["whole"].largest) == (2, 3, 5)
    assert "completion" not in lengths([Group(1, "f:2", (5,), (), "x")])


def test_a_finding_as_json():
    text = json.dumps(as_json([Finding("note", "r", 1, ("f:1",), "a")], {"whole": Lengths(1, 2, 3, (1,))}))
    assert json.loads(text) == {
        "findings": [{"severity": "note", "rule": "r", "count": 1, "examples": ["f:1"], "advice": "a"}],
        "lengths": {"whole": {"p50": 1, "p95": 2, "largest": 3, "counts": [1]}},
    }


def test_groups_are_not_kept():
    """20,000 of 100 tokens, 8 bytes each and more, are 20 MB; what is kept of them is less than 4."""
    groups = (pair(tuple(range(i, i + 50)), (END,), prompt=tuple(range(i, i + 49))) for i in range(20_000))
    tracemalloc.start()
    survey = Survey(groups, ENDS, None)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert survey.lengths()["whole"].largest == 99 and peak < 4 * 2**20


IDS = st.lists(st.integers(0, 9), min_size=1, max_size=6).map(tuple)
GROUPS = st.builds(
    Group,
    st.just(0),
    st.sampled_from(["f:1", "f:2"]),
    IDS,
    st.lists(IDS, max_size=3).map(tuple),
    st.just("x"),
    label=st.sampled_from([None, True, False]),
)


@given(st.lists(GROUPS, min_size=1, max_size=12))
def test_any_groups_can_be_checked(groups):
    """No rule counts more rows than there are, and histograms hold every row."""
    for finding in check(groups, ENDS, BOS):
        assert 0 < finding.count <= len(groups) and finding.line()
    measured = lengths(groups)
    assert sum(measured["prompt"].counts) == sum(measured["whole"].counts) == len(groups)
