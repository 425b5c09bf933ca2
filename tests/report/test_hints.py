"""The last lines of a run: where things are, and commands that exist."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from dsalign import verbs
from dsalign.report.hints import last_lines
from dsalign.report.history import read
from dsalign.report.page import write_report


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run in a folder with a blank in its name, with two ranks, two checkpoints and final/."""
    run = tmp_path / "my run"
    for name in ("final", "checkpoint-5", "checkpoint-10"):
        (run / name).mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 5, "eval/loss": 0.5}\n{"step": 10, "eval/loss": 0.625}\n')
    (run / "events.jsonl").write_text(json.dumps({"kind": "begin", "time": 0, "ranks": 2}) + "\n")
    return run


def test_a_run_that_is_done(folder: Path) -> None:
    """Each command has all that it needs; a reward model does not talk, and whole weights are not merged."""
    (folder / "config.yaml").write_text("algo: dpo\ndataset: [my rows.jsonl, b.jsonl]\n")
    (folder / "final" / "adapter_config.json").touch()
    commands = {
        f"dsalign chat '{folder}'": "talk to it",
        f"dsalign eval '{folder}' --dataset 'my rows.jsonl' b.jsonl --vs base": "evaluate it",
        f"dsalign merge '{folder}'": "merge its adapter into the weights",
        f"dsalign export '{folder}' '{folder}-plain'": "a plain folder of it",
    }
    width = max(map(len, commands))
    assert last_lines(read(folder), "done") == [
        f"best: held-out loss 0.5 at step 5: {folder / 'checkpoint-5'}",
        f"model: {folder / 'final'}",
        f"checkpoint: {folder / 'checkpoint-10'}",
        f"report: {folder / 'report.html'}",
        *(f"  {command:<{width}}  # {what}" for command, what in commands.items()),
    ]
    (folder / "final" / "adapter_config.json").unlink()
    (folder / "final" / "value_head.safetensors").touch()
    left = " ".join(last_lines(read(folder), "done"))
    assert "dsalign eval" in left and "dsalign chat" not in left and "dsalign merge" not in left
    assert "--vs" not in left
    (folder / "checkpoint-5").rmdir()
    assert last_lines(read(folder), "done")[0] == "best: held-out loss 0.5 at step 5: no checkpoint of it"


def test_what_was_trained_is_evaluated_as_it_was_trained(folder: Path) -> None:
    """Without the columns the line would be refused, without the length most rows are other ones; what a run left as it
    is by default is not repeated."""
    (folder / "config.yaml").write_text(
        "algo: grpo\ndataset: [a.jsonl]\nval_dataset: [b.jsonl]\ncolumns: {question: prompt}\nsystem: Don't lie.\n"
        "max_length: 256\ntruncation_strategy: delete\nstreaming: true\nmax_new_tokens: 16\nreward_model: my rm\n"
        "reward_funcs: ['my f.py:short', 'demo:friendly']\nreward_weights: [1.0, 0.5, 0.5]\n"
    )
    chat, measured, _ = last_lines(read(folder), "done")[-3:]
    assert shlex.split(chat)[:5] == ["dsalign", "chat", str(folder), "--system", "Don't lie."]
    assert shlex.split(measured, comments=True) == [
        "dsalign", "eval", str(folder), "--dataset", "b.jsonl", "--columns", "question=prompt",
        "--system", "Don't lie.", "--streaming", "true", "--max_length", "256",
        "--max_new_tokens", "16", "--reward", "my rm", "--reward_funcs",
        "my f.py:short", "demo:friendly", "--reward_weights", "1.0", "0.5", "0.5", "--vs", "base",
    ]  # fmt: skip


def test_a_run_that_stopped(folder: Path) -> None:
    """On as many ranks."""
    line = last_lines(read(folder), "interrupted")[-1]
    assert line == f"  NPROC_PER_NODE=2 dsalign resume '{folder}'  # go on from the newest checkpoint"


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert last_lines(read(tmp_path), "failed") == [
        f"report: {tmp_path / 'report.html'}",
        f"  dsalign resume {tmp_path}  # begin again, as no checkpoint was written",
    ]


@pytest.mark.parametrize(
    ("logged", "loaded", "said"),
    [
        (
            [2.0, 3.5],
            {"policy": 1.25, "reward": 0.5},
            "at most 3.50 GiB a rank; as loaded: policy 1.25, reward 0.50 GiB",
        ),
        ([2.0], {}, "at most 2.00 GiB a rank"),
        ([], {"policy": 1.0}, "as loaded: policy 1.00 GiB"),
    ],
)
def test_memory_is_said(logged: list[float], loaded: dict[str, float], said: str, tmp_path: Path) -> None:
    """The last peak that was logged, and each role's; the report has a row of each."""
    lines = [json.dumps({"step": i, "memory/peak": size}) for i, size in enumerate(logged)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    (tmp_path / "events.jsonl").write_text(json.dumps({"kind": "begin", "time": 0, "memory": loaded}) + "\n")
    assert f"memory: {said}" in last_lines(read(tmp_path), "done")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    for name, size in loaded.items():
        assert f"memory, {name} as loaded<td>{size:.2f} GiB" in page
    assert ("memory, most of a rank" in page) == bool(logged)


def test_the_verbs_that_are_offered_exist(folder: Path) -> None:
    (folder / "final" / "adapter_config.json").touch()
    offered = {
        line.split()[1] for how in ("done", "failed") for line in last_lines(read(folder), how) if "  # " in line
    }
    assert offered == {"chat", "eval", "merge", "export", "dsalign"}  # the last behind NPROC_PER_NODE
    assert offered - {"dsalign"} < set(verbs.summaries()) and "resume" in verbs.summaries()
