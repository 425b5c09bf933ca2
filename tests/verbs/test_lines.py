"""Lines of `check` and `doctor`: states, exit codes, no secrets."""

from __future__ import annotations

import io
import json

import pytest
from rich.table import Table

from dsalign.verbs.lines import ERROR, OK, WARNING, Line, answer, columns, looked, natural, text


def test_a_look_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> str:
        raise ValueError("no such thing")

    assert looked("a", lambda: "fine") == [Line("a", OK, "fine")]
    assert looked("a", fails) == [Line("a", ERROR, "no such thing")]
    assert looked("a", lambda: [Line("b", WARNING, "x")]) == [Line("b", WARNING, "x")]
    assert answer([Line("a", WARNING, "x", "do y")], as_json=False) == 0
    assert "-> do y" in capsys.readouterr().out
    assert answer([Line("a", ERROR, "x")], as_json=True) == 2
    found = json.loads(capsys.readouterr().out)
    assert found == {"ok": False, "lines": [{"name": "a", "state": "error", "found": "x", "advice": ""}]}


def test_secrets_are_left_out_and_counts_are_last() -> None:
    shown = text([Line("a", OK, "token hf_" + "x1" * 12), Line("b", OK, "y"), Line("c", ERROR, "z")])
    assert "hf_" not in shown and "[redacted]" in shown and shown.splitlines()[-1] == "1 error, 2 ok"


class Terminal(io.StringIO):
    """A standard output that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_tables_are_as_wide_as_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a pipe as wide as ever; on a terminal of 60 columns no line is longer, and no word is lost."""
    monkeypatch.setenv("COLUMNS", "60")
    found = [Line("memory", OK, "word " * 30), Line("b", WARNING, "x" * 70, "do y")]
    assert columns(118) == 118 and max(map(len, text(found).splitlines())) > 100
    monkeypatch.setattr("sys.stdout", Terminal())
    shown = text(found)
    assert columns(118) == 60 and columns(40) == 40 and max(map(len, shown.splitlines())) <= 60
    assert shown.count("word") == 30 and shown.count("x") == 70 and "-> do y" in shown


def test_the_natural_width_of_a_table_wraps_nothing() -> None:
    table = Table(box=None, padding=0)
    table.add_column("a" * 150)
    assert natural(table) == 150
