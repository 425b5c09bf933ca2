"""The comparison with TRL: its checks, its table and how it measures, without running a trainer."""

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
    return runpy.run_path(str(FOLDER / "compare_trl.py"))


@pytest.fixture
def peer() -> dict[str, Any]:
    """The peer's script, which imports TRL only when it builds a trainer."""
    return runpy.run_path(str(FOLDER / "trl_side.py"))


def side(bench, *losses: float) -> Any:
    steps = [{"step": i, "loss": loss, "rewards/margins": 0.5 * i} for i, loss in enumerate(losses, start=1)]
    return bench["Side"](steps=steps, cpu_s=1.0, wall_s=1.0, peak_bytes=1)


def test_both_sides_must_begin_alike(bench):
    """To 1e-4 of the loss; ORPO's losses mean different things, its odds ratios must agree."""
    bench["check"]("dpo", side(bench, LN2, 0.6), side(bench, LN2 + 5e-5, 0.7))
    with pytest.raises(ValueError, match=r"dpo: the first loss of dsalign is 0\.69\d*, that of the peer 0\.7: not the"):
        bench["check"]("dpo", side(bench, LN2), side(bench, 0.7))
    ours, theirs = side(bench, 4.0), side(bench, 5.0)
    for one in (ours, theirs):
        one.steps[0]["log_odds_chosen"] = 0.25
    bench["check"]("orpo", ours, theirs)


def test_both_sides_must_take_the_same_steps(bench):
    with pytest.raises(ValueError, match="dsalign logged 1 steps, the peer 2: a row was dropped"):
        bench["check"]("dpo", side(bench, LN2), side(bench, LN2, LN2))


def test_table_shows_each_step(bench):
    lines = bench["table"]("dpo", side(bench, LN2, 0.60), side(bench, LN2, 0.61)).splitlines()
    assert len(lines) == 1 + 2
    assert lines[2].split() == ["2", "0.600000", "0.610000", "-1.00e-02"]


def test_pairs_become_labels_in_turn(bench):
    """Chosen of the first, rejected of the second; other algorithms take pairs."""
    lines = [json.dumps({"prompt": p, "chosen": "c", "rejected": "r"}) for p in "ab"]
    assert bench["rows_of"](lines, "dpo") == lines
    assert [json.loads(line) for line in bench["rows_of"](lines, "kto")] == [
        {"prompt": "a", "completion": "c", "label": True},
        {"prompt": "b", "completion": "r", "label": False},
    ]


def test_costs_are_added_to_a_file(bench, tmp_path):
    args = SimpleNamespace(csv=tmp_path / "a.csv", batch_size=4, threads=1, extra="", dataset="rows.jsonl")
    for _ in range(2):
        bench["record"](args, "dpo", (side(bench, LN2), side(bench, LN2)), [0.5, 1.5])
    header, *lines = args.csv.read_text().splitlines()
    assert header.split(",") == list(bench["CSV"]) and len(lines) == 4
    assert lines[1].split(",")[1:9] == ["dpo", "rows.jsonl", "trl", "1", "1.00", "1.00", "1", "1.500"]


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


def test_sequences_are_cut_after_their_last_end_token(peer):
    assert peer["up_to_end"]([1, 5, 2, 198], 2) == [1, 5, 2]
    assert peer["up_to_end"]([5, 2, 6, 2, 198], 2) == [5, 2, 6, 2]
    assert peer["up_to_end"]([5, 6], 2) == [5, 6]


def test_rows_are_what_trl_reads(peer):
    """Messages for most; for a reward model whole conversations; text for the trainers that take text, as the template
    writes it, up to the end token."""
    row = {"prompt": "p", "chosen": "c", "rejected": "r"}
    user, chosen = {"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}
    assert peer["turns"](row, "dpo") == {
        "prompt": [user], "chosen": [chosen], "rejected": [{"role": "assistant", "content": "r"}],
    }  # fmt: skip
    assert peer["turns"](row, "rm")["chosen"] == [user, chosen]
    labelled = {"prompt": "p", "completion": "c", "label": True}
    assert peer["turns"](labelled, "kto") == {"prompt": [user], "completion": [chosen], "label": True}
    tokenizer = SimpleNamespace(
        eos_token=";",
        apply_chat_template=lambda turns, add_generation_prompt=False, **_: (
            "".join(f"{t['role'][0]}:{t['content']};\n" for t in turns) + ("a:" if add_generation_prompt else "")
        ),
    )
    assert peer["text"](row, tokenizer) == {"prompt": "u:p;\na:", "chosen": "c;", "rejected": "r;"}


def test_every_algorithm_has_both_sides(bench, peer):
    assert set(bench["OURS"]) == set(peer["TRAINERS"])
