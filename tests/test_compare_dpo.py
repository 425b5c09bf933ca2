"""The DPO comparison: its checks, its table and how it measures, without running a trainer."""

from __future__ import annotations

import json
import math
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
LN2 = math.log(2)


@pytest.fixture(scope="module")
def bench() -> dict[str, Any]:
    return runpy.run_path(str(FOLDER / "compare_dpo.py"))


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The peer's script, whose trainer is not installed here."""
    monkeypatch.setitem(sys.modules, "trl", SimpleNamespace(DPOConfig=None, DPOTrainer=None))
    return runpy.run_path(str(FOLDER / "trl_dpo.py"))


def side(bench, *losses: float) -> Any:
    steps = [{"step": i, "loss": loss, "rewards/margins": 0.5 * i} for i, loss in enumerate(losses, start=1)]
    return bench["Side"](steps=steps, cpu_s=1.0, wall_s=1.0, peak_bytes=1)


def test_both_sides_must_start_at_ln_2(bench):
    bench["check"](side(bench, LN2, 0.6), side(bench, LN2, 0.6))
    with pytest.raises(ValueError, match=r"the first loss of the peer is 0\.7, expected ln 2 = 0\.693147"):
        bench["check"](side(bench, LN2), side(bench, 0.7))


def test_both_sides_must_take_the_same_steps(bench):
    with pytest.raises(ValueError, match="dsalign logged 1 steps, the peer 2: a row was dropped"):
        bench["check"](side(bench, LN2), side(bench, LN2, LN2))


def test_table_ends_with_the_largest_differences(bench):
    """Losses differ by 0.01 in the second step; margins are equal."""
    lines = bench["table"](side(bench, LN2, 0.60), side(bench, LN2, 0.61)).splitlines()
    assert len(lines) == 1 + 2 + 2
    assert lines[-2:] == [
        "largest difference in loss: 1.00e-02",
        "largest difference in rewards/margins: 0.00e+00",
    ]


def test_costs_give_the_ratio_to_the_peer(bench):
    assert bench["costs"]("run", (2.0,), (8.0,), ("CPU-seconds",)).splitlines()[1].split() == [
        "CPU-seconds", "2.00", "8.00", "0.250"
    ]  # fmt: skip


def test_metrics_are_the_lines_with_a_step_and_a_loss(bench, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n\n{"train_cpu_s": 3}\n')
    assert bench["read_steps"](path) == [{"step": 1, "loss": 0.5}]
    path.write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(ValueError, match="has no line with step and loss"):
        bench["read_steps"](path)


def test_a_failing_run_shows_the_end_of_its_output(bench, tmp_path):
    with pytest.raises(ValueError, match=r"ended with 3; the end of .*log:\nout of luck"):
        bench["measured"]([sys.executable, "-c", "print('out of luck'); exit(3)"], tmp_path / "log", 1)


def test_memory_of_a_run_is_in_bytes(bench, tmp_path):
    """64 MiB of text need more than 64 MiB: 65,536 would be KiB. No upper bound, as the parent's own peak counts."""
    _, _, peak = bench["measured"]([sys.executable, "-c", "'x' * 2**26"], tmp_path / "log", 1)
    assert peak > 2**26


def test_completions_are_cut_after_their_first_end_token(peer):
    assert peer["first_turn_only"]([5, 2, 198, 2], 2) == [5, 2]
    assert peer["first_turn_only"]([5, 6], 2) == [5, 6]


def test_ids_that_are_not_the_templates_are_named(peer):
    """A template that gives [1] for the prompt and [1, 5, 2, 9] with a completion; cut, the completion is [5, 2]."""
    tokenizer = SimpleNamespace(
        eos_token_id=2,
        apply_chat_template=lambda turns, **_: {"input_ids": [1] if len(turns) == 1 else [1, 5, 2, 9]},
    )
    turn = [{"role": "user", "content": "x"}]
    row = {"prompt": turn, "chosen": turn, "rejected": turn, "prompt_ids": [1], "chosen_ids": [5, 2]}
    peer["check_ids"]([row | {"rejected_ids": [5, 2]}], tokenizer, cut=True)
    with pytest.raises(ValueError, match=r"row 0, rejected: TRL's ids differ .* expected \[1, 5, 2\], got \[1, 7\]"):
        peer["check_ids"]([row | {"rejected_ids": [7]}], tokenizer, cut=True)
