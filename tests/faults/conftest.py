"""Fixtures of the faults: ranks that can be killed, what an undisturbed run learns, rows of docs/reliability.md."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from faulty_runs import STEPS, actor_and_critic, command, learnt, words
from forks import Forks

ROWS = "DSALIGN_FAULT_ROWS"  # a file to which every case adds a line, for tests/faults/report.py


@pytest.fixture(scope="session")
def straight(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """ZeRO stage -> what `actor_and_critic` learns there where nothing happens."""

    @cache
    def of(stage: int) -> str:
        out = tmp_path_factory.mktemp("straight") / "out"
        ended = forks.run(actor_and_critic, out, stage)
        assert [one.code for one in ended] == [0, 0], ended[0].text
        return (out / "learnt.txt").read_text()

    return of


@pytest.fixture(scope="session")
def whole(forks: Forks, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int, str], str]:
    """(algorithm, ZeRO stage, tuner) -> what the command learns where nothing happens."""

    @cache
    def of(algo: str, stage: int, tuner: str) -> str:
        folder = tmp_path_factory.mktemp("whole")
        ended = forks.run(command, [*words(algo, stage, tuner, tiny, folder), "--output_dir", str(folder / "out")])
        assert [one.code for one in ended] == [0, 0], ended[0].text
        assert (folder / "out" / f"checkpoint-{STEPS}").is_dir()
        return learnt(folder / "out")

    return of


@pytest.fixture(scope="session")
def record() -> Callable[[str, str, str, float], None]:
    """A function that keeps a row of docs/reliability.md, where one is asked for: (kind, fault, what happens, seconds
    until every rank had ended or the fault was told)."""

    def keep(kind: str, fault: str, happens: str, seconds: float) -> None:
        if path := os.environ.get(ROWS):
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": kind, "fault": fault, "happens": happens, "seconds": seconds}) + "\n")

    return keep
