"""Ranks of which one is killed, stopped, hung or fails: who ends how, how soon, and what is said; and that what takes
long for a good reason is left alone. All cases of a kind run side by side, as they sleep most of the time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forks import Forks
from guard import watchdog_cases as cases

SOON = 15.0  # seconds from a fault to the end of the last rank
AT = "phase micro-batch:{}:{}:30"
QUICK: dict[str, tuple[Callable[[int, Path], Any], str]] = {
    "killed": (cases.train, AT.format(1, "kill")),
    "rank_0_killed": (cases.train, AT.format(0, "kill")),
    "rank_0_stopped": (cases.train, AT.format(0, "stop")),
    "hung": (cases.train, AT.format(1, "sleep")),
    "score_hangs": (cases.scored, ""),
    "score_slow": (cases.scored, ""),
    "key_error": (cases.train, ""),
    "value_error": (cases.train, ""),
    "agreed": (cases.agreed, ""),
    "early": (cases.early, ""),
}
MORE: dict[str, tuple[Callable[[int, Path], Any], str]] = {
    "stopped": (cases.train, AT.format(1, "stop")),
    "sys_exit": (cases.train, ""),
    "os_exit": (cases.train, ""),
    "same": (cases.same_error, ""),
    "suspended": (cases.suspended, ""),
    **{name: (cases.spins, "") for name in ("spins", "much_work", "in_compiler")},
    **{name: (cases.long_phase, "") for name in ("data", "save", "score", "compile", "no_python")},
}


@dataclass(frozen=True)
class Case:
    """How a case ended. codes: by rank, minus the signal where one ended it. seconds: from the last step of any rank
    to the end of the last rank. said: what all ranks printed. folder: its run folder."""

    codes: list[int]
    seconds: float
    said: str
    folder: Path

    def lines(self) -> list[str]:
        """The lines that dsalign said."""
        return [line for line in self.said.splitlines() if line.startswith("dsalign:")]


def all_of(wanted: dict[str, tuple[Callable[[int, Path], Any], str]], forks: Forks, base: Path) -> dict[str, Case]:
    numbers = {}
    for name, (body, fault) in wanted.items():
        (base / name).mkdir()
        numbers[name] = forks.start(cases.as_command, body, base / name, fault=fault, limit_s=60.0)
    found = {}
    for name, number in numbers.items():
        ended = forks.end(number)
        last = max((float(path.read_text()) for path in (base / name).glob("stamp-*")), default=0.0)
        seconds = max(one.at for one in ended) - last
        found[name] = Case([one.code for one in ended], seconds, "".join(one.text for one in ended), base / name)
    return found


@pytest.fixture(scope="module")
def ended(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return all_of(QUICK, forks, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def more_ended(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return all_of(MORE, forks, tmp_path_factory.mktemp("more"))


def check(found: Case, codes: list[int], pattern: str, stacks: set[int], lines: int = 1) -> None:
    assert found.codes == codes and found.seconds < SOON, found
    said = found.lines()
    assert len(said) == lines, found.said
    if lines:
        assert pattern in said[0], said
    assert {path.name for path in found.folder.glob("crash/*")} == {f"rank-{rank}.txt" for rank in stacks}


def test_a_killed_rank_ends_the_others(ended: dict[str, Case]) -> None:
    check(ended["killed"], [77, -9], ", was lost: its process has ended, last heartbeat ", {0})
    said = ended["killed"].said
    place = r"^dsalign: error: rank 1 on \S+ in (start|train|micro-batch|optimizer step), step \d+, was lost"
    assert re.search(place, said, re.MULTILINE), "where its last heartbeat was, up to a second before"
    assert "Traceback" not in said, "what gloo says about the broken connection is not the cause"
    stack = (ended["killed"].folder / "crash" / "rank-0.txt").read_text()
    assert "in total" in stack, "the stack of the rank that waited"


def test_rank_0_has_the_store_and_is_missed_no_less(ended: dict[str, Case]) -> None:
    check(ended["rank_0_killed"], [-9, 77], "was lost: its process has ended", {1})
    check(ended["rank_0_stopped"], [77, 77], "was lost: its process is stopped", {0, 1})
    assert "rank 0 on " in ended["rank_0_killed"].said and "rank 0 on " in ended["rank_0_stopped"].said


def test_a_rank_that_hangs_is_named_with_its_phase(ended: dict[str, Case]) -> None:
    check(ended["hung"], [77, 77], "in micro-batch, step 29, hangs: no progress for ", {0, 1})
    assert "its limit is 8 s" in ended["hung"].said
    assert "in _act" in (ended["hung"].folder / "crash" / "rank-1.txt").read_text(), "where it sleeps: faults.py"


def test_a_reward_that_hangs_is_told_from_a_slow_one(ended: dict[str, Case]) -> None:
    """The longest of twelve took 0.3 s, and 30 times as long is no hang: 9 s."""
    check(ended["score_hangs"], [77, 77], "rank 1 on ", {0, 1})
    said = ended["score_hangs"].said
    assert re.search(r" in reward function, step 11, hangs: no progress for \d+ s, its limit is (9|1\d) s", said), said
    assert "; a longer --peer_timeout waits longer; the stacks of all ranks" in said
    found = ended["score_slow"]
    assert found.codes == [0, 0] and found.said == "" and not (found.folder / "crash").exists(), found


def test_an_error_on_one_rank_ends_all(ended: dict[str, Case]) -> None:
    check(ended["key_error"], [77, 3], "rank 1 on ", {0, 1})
    said = ended["key_error"].said
    assert " in score, step 10, failed: KeyError: 'x'; the stacks of all ranks are in " in said
    assert said.count("Traceback") == 1 and said.count("KeyError: 'x'") == 2, "a traceback and the one line"
    check(ended["value_error"], [77, 2], "in score, step 10, failed: rewards: expected 4 numbers, got 3;", {0, 1})
    assert "Traceback" not in ended["value_error"].said


def test_an_agreed_error_and_an_early_end_are_no_loss(ended: dict[str, Case]) -> None:
    check(ended["agreed"], [2, 2], "rank 1: no such file: rows.jsonl", set())
    check(ended["early"], [0, 0], "", set(), lines=0)


@pytest.mark.slow
def test_a_rank_that_computes_for_ever(more_ended: dict[str, Case]) -> None:
    """A micro-batch of as much work as thirty before it, of 50 ms each, is given up after ten seconds."""
    check(more_ended["spins"], [77, 77], "in micro-batch, step 29, hangs: no progress for ", {0, 1})
    assert "its limit is 10 s" in more_ended["spins"].said


@pytest.mark.slow  # thirteen more cases of 15 s side by side
def test_more_ways_to_be_lost(more_ended: dict[str, Case]) -> None:
    check(more_ended["stopped"], [77, 77], "was lost: its process is stopped", {0, 1})
    check(more_ended["sys_exit"], [77, 3], "in score, step 10, failed: SystemExit: 0", {0, 1})
    check(more_ended["os_exit"], [77, 0], "was lost: its process has ended", {0})
    found = more_ended["same"]
    assert found.codes == [2, 2] and len(found.lines()) == 1 and "step 5: the loss is nan" in found.said
    assert len(list(found.folder.glob("crash/*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["data", "save", "score", "compile", "no_python", "suspended", "much_work", "in_compiler"]
)
def test_what_takes_long_is_no_hang(name: str, more_ended: dict[str, Case]) -> None:
    """One rank prepares data, saves, waits for a reward, waits for a compiler, or runs a library that keeps Python from
    running, 11 s where a step takes 0.05 s; or all ranks are stopped for 12 s; or one computes for 14 s, as it has so
    much to do, or compiles."""
    found = more_ended[name]
    assert found.codes == [0, 0] and found.said == "" and not (found.folder / "crash").exists(), found


@pytest.mark.slow  # runs of the command
@pytest.mark.parametrize(
    ("fault", "code", "pattern"),
    [
        ("phase micro-batch:1:kill:3", 137, "was lost: its process has ended"),
        ("phase micro-batch:1:stop:3", 77, "was lost: its process is stopped"),
        ("phase save:0:raise:1", 3, "in save, step 2, failed: RuntimeError: a test raises at phase save"),
    ],
)
def test_a_run_of_the_command(fault: str, code: int, pattern: str, tiny: Path, tmp_path: Path) -> None:
    """By dsalign's own launcher: the exit code is that of the first cause, whose line is the last and stands once."""
    words = ["--algo", "sft", "--model", str(tiny), "--dataset", "demo:demonstrations#32", "--template", "chatml"]
    words += ["--batch_size", "1", "--gradient_accumulation_steps", "1", "--save_steps", "2", "--logging_steps", "1"]
    words += ["--output_dir", str(tmp_path / "run")]
    environment = {**os.environ, "NPROC_PER_NODE": "2", "DSALIGN_TEST": "1", "DSALIGN_FAULT": fault}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "launch/train.py", *words], capture_output=True, text=True, env=environment, check=False
    )
    last = done.stderr.splitlines()[-1]
    assert (done.returncode, pattern in last) == (code, True), done.stderr[-3000:]
    assert done.stderr.count(pattern) == 1, done.stderr[-3000:]
    assert last.startswith("dsalign: error: rank ") and (tmp_path / "run" / "crash").is_dir()
    assert time.monotonic() - started < 150
