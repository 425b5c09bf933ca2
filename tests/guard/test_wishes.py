"""What one rank wishes, what all agree on, and that a wish is for once."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest

from dsalign.guard import signals, wishes
from dsalign.guard.parents import Launchers
from dsalign.guard.wishes import Wishes


@pytest.fixture(autouse=True)
def deaf(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was heard, and files are looked for each time."""
    monkeypatch.setattr(signals, "_heard", signals.Heard())
    monkeypatch.setattr(wishes, "LOOK_S", 0.0)


def test_nothing_is_wished_at_first(tmp_path: Path) -> None:
    one = Wishes(3600.0, Launchers())
    one.folder = tmp_path
    assert one.numbers() == (0.0, 0.0, 0.0) and one.reason() == ""


def test_a_signal_is_a_wish_to_stop() -> None:
    one = Wishes()
    signals.heard().note(10)
    assert one.numbers() == (1.0, 0.0, 0.0) and one.reason() == "SIGUSR1" and not one.stop


def test_any_rank_is_enough_and_what_was_agreed_stays() -> None:
    one = Wishes()
    one.agreed([0.0, 0.0, 0.0])
    assert (one.stop, one.save) == (False, False)
    one.agreed([1.0, 0.0, 0.0])
    one.agreed([0.0, 3.0, 0.0])
    one.agreed([0.0, 0.0, 0.0])
    assert (one.stop, one.save) == (True, True)


def test_max_wall_counts_from_the_start_of_the_process() -> None:
    with mock.patch.object(wishes.time, "monotonic", return_value=signals.STARTED + 59.9):
        assert Wishes(60.0).reason() == ""
    with mock.patch.object(wishes.time, "monotonic", return_value=signals.STARTED + 60.0):
        assert Wishes(60.0).reason() == "--max_wall"


def test_the_file_save_is_removed_when_it_is_obeyed(tmp_path: Path) -> None:
    one = Wishes()
    one.folder = tmp_path
    (tmp_path / "SAVE").touch()
    assert one.numbers() == (0.0, 1.0, 0.0)
    one.agreed([0.0, 1.0, 0.0])
    one.saved()
    assert not one.save and not (tmp_path / "SAVE").exists() and one.numbers() == (0.0, 0.0, 0.0)


def test_a_save_for_another_reason_leaves_a_file_that_was_not_seen(tmp_path: Path) -> None:
    """Touched since the last look: the next look finds it."""
    one = Wishes()
    one.folder = tmp_path
    one.numbers()
    (tmp_path / "SAVE").touch()
    one.saved()
    assert one.numbers() == (0.0, 1.0, 0.0)


def test_the_file_stop_is_removed_when_it_is_obeyed(tmp_path: Path) -> None:
    one = Wishes()
    one.folder = tmp_path
    (tmp_path / "STOP").touch()
    assert one.numbers() == (1.0, 0.0, 0.0) and one.reason() == f"the file {tmp_path / 'STOP'}"
    with mock.patch.object(signals, "ignore") as ignored:
        one.stopped()
    assert not (tmp_path / "STOP").exists() and ignored.called


def test_a_file_that_cannot_be_removed_is_not_looked_for_again(tmp_path: Path) -> None:
    """A folder has its name: no save after each step."""
    one = Wishes()
    one.folder = tmp_path
    (tmp_path / "SAVE").mkdir()
    one.numbers()
    with mock.patch.object(wishes.logger, "warning") as warned:
        one.saved()
    assert one.numbers() == (0.0, 0.0, 0.0) and "SAVE" in warned.call_args.args


def test_a_launcher_that_is_gone_is_a_wish_to_stop() -> None:
    launchers = mock.Mock(lost=lambda: "the end of its launcher, process 7,")
    assert Wishes(None, launchers).reason() == "the end of its launcher, process 7,"


def test_files_are_looked_for_once_a_second(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(wishes, "LOOK_S", 1.0)
    one = Wishes()
    one.folder = tmp_path
    with mock.patch.object(wishes.time, "monotonic", return_value=100.0):
        one.numbers()
        (tmp_path / "STOP").touch()
        assert one.numbers() == (0.0, 0.0, 0.0)
    with mock.patch.object(wishes.time, "monotonic", return_value=101.0):
        assert one.numbers() == (1.0, 0.0, 0.0)
