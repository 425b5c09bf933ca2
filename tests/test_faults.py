"""The injector of faults does what DSALIGN_FAULT says, where it says, and nothing outside tests."""

from __future__ import annotations

import errno
import math

import pytest

from dsalign import faults


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "_seen", type(faults._seen)())
    monkeypatch.setenv("DSALIGN_TEST", "1")
    monkeypatch.setenv("RANK", "1")


def test_the_nth_visit_of_the_rank_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSALIGN_FAULT", "save:0:raise,save:1:raise:2,disk:1:full")
    faults.at("save")
    with pytest.raises(RuntimeError, match=r"^a test raises at save$"):
        faults.at("save")
    faults.at("save")
    with pytest.raises(OSError, match="No space left") as error:
        faults.at("disk")
    assert error.value.errno == errno.ENOSPC


def test_a_value_becomes_nan_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSALIGN_FAULT", "loss:1:nan:2")
    assert faults.value("loss", 2.0) == 2.0
    assert math.isnan(faults.value("loss", 2.0))
    assert faults.value("loss", 2.0) == 2.0


def test_an_unknown_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSALIGN_FAULT", "save:1:explode")
    with pytest.raises(ValueError, match="expected one of kill, stop, term, raise, full, sleep, nan, got explode"):
        faults.at("save")


def test_nothing_happens_outside_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSALIGN_FAULT", "save:1:raise")
    monkeypatch.setenv("DSALIGN_TEST", "0")
    faults.at("save")
