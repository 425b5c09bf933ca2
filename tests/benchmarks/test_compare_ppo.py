"""The comparison of PPO with TRL: logs, checks, costs and the table, without running a trainer."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """The script as a module; it finds the others as it does when it is run."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("compare_ppo")
    sys.path.remove(str(FOLDER))


def setting(bench: Any) -> Any:
    """2 prompts of 5 tokens, 3 answers each of at most 4 tokens."""
    return bench.Setting(2, 5, 3, 4, 1, full_stop=False)


def run(bench: Any, **changes: Any) -> Any:
    """Two iterations with 12 answers of 2 tokens; two optimizers step in each, the second 3 s behind the first."""
    times = [10.0, 13.0, 20.0, 23.0]
    clock = {"steps": [{"cpu_s": t, "wall_s": 2 * t, "peak_bytes": 2**30} for t in times]}
    return bench.Run(**{"losses": [0.1, 0.2], "prompt_tokens": 60, "tokens": 24, "clock": clock, **changes})


def test_settings_are_cut_into_four(bench):
    """16 answers in A, 32 in B, 64 prompts of 4 in C and 4 of 2 in the trial, always four micro-batches."""
    assert {name: (one.answers, one.accumulation) for name, one in bench.SETTINGS.items()} == {
        "A": (16, 4), "B": (32, 4), "C": (256, 4), "small": (8, 4)
    }  # fmt: skip


def test_both_logs_are_read_alike(bench, tmp_path):
    """12 answers: 60 prompt tokens and 24 of answers in each; of the 22 tokens of an iteration that dsalign counts, 10
    are of the two prompts. Loss: 0.2 + 0.1 0.5 = 0.25."""
    ours, theirs = tmp_path / "dsalign", tmp_path / "trl"
    step = {"loss/policy_avg": 0.2, "loss/value_avg": 0.5}
    logs = {
        ours / "metrics.jsonl": [{"about": "run"}, {**step, "num_tokens": 22}, {**step, "num_tokens": 44}],
        theirs / "steps.jsonl": [{**step, "prompt_tokens": 30, "tokens": 12}] * 2,
    }
    for path, records in logs.items():
        path.parent.mkdir()
        path.write_text("\n".join(json.dumps(record) for record in records))
        (path.parent / "clock.json").write_text("{}")
    for side, folder in (("dsalign", ours), ("trl", theirs)):
        found = bench.read_run(side, setting(bench), folder)
        assert (found.prompt_tokens, found.tokens) == (60, 24) and found.losses == pytest.approx([0.25, 0.25])
    (theirs / "steps.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(ValueError, match="expected lines with loss/policy_avg, got 1 others"):
        bench.read_run("trl", setting(bench), theirs)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"losses": [0.1]}, "trl: expected 2 iterations, got 1"),
        ({"prompt_tokens": 61}, "trl: expected 60 prompt tokens, got 61"),
        ({"tokens": 49}, "trl: expected answers of 1 to 4 tokens, got 49 tokens in 12 answers"),
        ({"losses": [0.1, float("nan")]}, "trl: expected finite losses, got"),
        ({"tokens": 30}, "answer tokens differ by more than 1.2 times: {'dsalign': 24, 'trl': 30}"),
    ],
)
def test_runs_that_are_not_alike(bench, changes, said):
    """Twelve answers have 12 to 48 tokens; 30 are more than 1.2 24 = 28.8, and 28 are not."""
    good = {"dsalign": run(bench), "trl": run(bench, tokens=28)}
    bench.check(setting(bench), 2, good, 1.2)
    with pytest.raises(ValueError) as error:
        bench.check(setting(bench), 2, {**good, "trl": run(bench, **changes)}, 1.2)
    assert said in str(error.value)


def test_costs_are_from_the_last_step_of_an_iteration_to_that_of_the_next(bench):
    """From 13 to 23: 10 CPU-seconds and 20 wall-seconds; 12 tokens an iteration, so 10000 / 12 a thousand tokens."""
    found = bench.costs_of(run(bench))
    assert (found["cpu_s"], found["wall_s"], found["tokens"], found["peak_gib"]) == (10, 20, 12, 1)
    assert found["cpu_s_per_1000_tokens"] == pytest.approx(10000 / 12)
    odd = run(bench, clock={"steps": run(bench).clock["steps"][:3]})
    with pytest.raises(ValueError, match="as many optimizer steps in each of 2 iterations, got 3 in all"):
        bench.costs_of(odd)


def test_limit_and_table(bench):
    """10 prompt tokens and 12 sampled: 10 + (12 - 6) 1 + 12 1 = 28, nine forwards of 22 = 198, heads 48: 274 of 548."""
    ones = dict.fromkeys(("prompt", "token", "head", "head_at_once"), 1.0)
    costs = bench.with_limit({**bench.costs_of(run(bench)), "cpu_s": 548.0}, ones, setting(bench))
    assert (costs["limit_s"], costs["of_limit"]) == (274, 0.5)
    lines = bench.table("A", {"dsalign": [costs], "trl": [{**costs, "cpu_s": 1096.0}]}).splitlines()
    assert lines[0].split() == ["A", "dsalign", "trl", "ratio"]
    assert lines[2].split() == ["cpu_s", "548.00", "1096.00", "0.500"]
    assert len(lines[0].split()) == 4 and "device_peak_gib" in lines[6]
    alone = bench.table("A", {"dsalign": [costs]}).splitlines()
    assert alone[0].split() == ["A", "dsalign"] and alone[2].split() == ["cpu_s", "548.00"]
    on_gpu = bench.with_limit({**bench.costs_of(run(bench)), "wall_s": 137.0}, ones, setting(bench), "wall_s")
    assert on_gpu["of_limit"] == 2
