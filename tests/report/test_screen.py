"""Which screen a process gets, and that plain lines outlive their reader."""

from __future__ import annotations

import sys

import pytest

from dsalign import phases
from dsalign.report import screen
from dsalign.report.live import Live
from dsalign.report.screen import Now, Plain


class Terminal:
    """A terminal that keeps what is written; gone once it is hung up."""

    encoding = "utf-8"

    def __init__(self) -> None:
        self.text, self.gone = "", False

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.gone:
            raise OSError(5, "Input/output error")
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_stages_are_said_once_a_command_opened_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    """By rank 0 alone; a function that is called without a command says none."""
    screen.stage("unheard")
    for rank in (0, 1):
        with screen.opened(rank):
            screen.stage(f"loading on {rank}")
            screen.progress(1, 2)
            phases.mark("self-check")
            phases.mark("prepare")
    assert capsys.readouterr().out == ("loading on 0 ...\nchecking that packed rows are computed as rows alone ...\n")
    assert isinstance(screen.current(), Plain)


@pytest.mark.parametrize(("term", "live"), [("xterm", True), ("dumb", False), ("", False)])
def test_a_dumb_terminal_gets_lines(term: str, live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr(sys, "stdout", Terminal())
    with screen.opened(0) as shown:
        assert isinstance(shown, Live) is live
    with screen.opened(1) as shown:
        assert isinstance(shown, Plain)


def test_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR leaves bold and dim, and takes every colour."""
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, colours in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", name)
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        with screen.opened(0) as shown:
            shown.now(Now(1, 9, {"rewards/margins": 1.0}), "")
            shown.now(Now(2, 9, {"rewards/margins": 2.0}), "")
        assert ("\x1b[32m\u2191" in terminal.text) is colours and "\u2191" in terminal.text


def test_the_terminal_of_mpirun_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with screen.opened(0) as shown:
        shown.now(Now(1, 9, {"loss": 1.0}), "step 1/9")
    assert terminal.text == "step 1/9\n"


def test_a_terminal_that_hangs_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is raised, then or later."""
    monkeypatch.setenv("TERM", "xterm")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    with screen.opened(0) as shown:
        shown.stage("loading")
        terminal.gone = True
        shown.say("a line")
        shown.now(Now(1, 9, {"loss": 1.0}), "step 1/9")
        shown.samples(1, [{"completion": "a"}], ["sample"])
        shown.stage("more")
