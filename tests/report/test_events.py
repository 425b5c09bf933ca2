"""events.jsonl: lines that stay, warnings that are kept, words for an ending."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from dsalign.endings import Diverged, Stopped
from dsalign.report.events import Events, WarningKeeper, ending


def test_events_are_appended_without_secrets(tmp_path: Path) -> None:
    """Text inside tables and lists too; a resumed run goes on with the file, a new one begins it."""
    for resumed, text in ((False, "gone"), (False, "a"), (True, "hf_abcdefghijklmnopqrstuv")):
        events = Events(tmp_path, resumed=resumed)
        events.write("begin", data={"rows": [text, 3]})
        events.close()
    found = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [line["data"]["rows"] for line in found] == [["a", 3], ["[redacted]", 3]]
    assert all(line["kind"] == "begin" and line["time"] > 1.7e9 for line in found)


def test_warnings_from_before_the_folder_is_open_are_kept() -> None:
    keeper, told = WarningKeeper(), list[str]()
    log = logging.Logger("dsalign.test")
    log.addHandler(keeper)
    log.warning("%d rows dropped", 3)
    log.info("not a warning")
    keeper.follow(told.append)
    log.warning("3 rows dropped")
    log.error("late")
    assert told == ["3 rows dropped", "late"]
    keeper.restart()
    keeper.follow(told.append)
    assert told == ["3 rows dropped", "late"]


class NonFiniteError(ValueError):
    """A class of the name that the trainer's has."""


@pytest.mark.parametrize(
    ("error", "how", "text"),
    [
        (None, "done", ""),
        (KeyboardInterrupt(), "interrupted", ""),
        (Stopped("saved"), "stopped", "saved"),
        (Diverged("nan"), "diverged", "nan"),
        (NonFiniteError("nan"), "diverged", "nan"),
        (ValueError("bad row"), "failed", "bad row"),
        (KeyError("x"), "failed", "KeyError: 'x'"),
    ],
)
def test_endings(error: BaseException | None, how: str, text: str) -> None:
    assert ending(error) == {"how": how, "text": text}
