"""Lines of `check` and `doctor`: states, exit codes, no secrets."""

from __future__ import annotations

import json

import pytest

from dsalign.verbs.lines import ERROR, OK, WARNING, Line, answer, looked, text


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
