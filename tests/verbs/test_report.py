"""`dsalign report`: a page written anew, a comparison, and what cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsalign.cli import main


def a_run(folder: Path, loss: float) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 3, "loss": loss, "eval/loss": loss}) + "\n")
    (folder / "config.yaml").write_text("algo: dpo\nmodel: tiny\n")
    return folder


def test_one_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_run(tmp_path / "run", 0.5)
    assert main(["report", str(folder)]) == 0
    assert (folder / "report.html").exists()
    out = capsys.readouterr().out
    assert out.startswith("run: DPO of tiny took 3 optimizer steps.")
    assert out.endswith(f"written to {folder / 'report.html'}\n")


def test_two_runs_for_a_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """NaN is no JSON: null."""
    folders = [str(a_run(tmp_path / name, loss)) for name, loss in (("a", 0.5), ("b", float("nan")))]
    page = tmp_path / "both.html"
    assert main(["report", *folders, "--output", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(page) and page.exists()
    assert found["runs"]["a"]["best"] == [3, 0.5] and found["runs"]["a"]["ended"] is None
    assert found["runs"]["b"]["last"] == {"loss": None, "eval/loss": None}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "report: expected the folder of a run, got none; write dsalign report output/dpo"),
        (["x", "--jsn"], "report: expected --output FILE or --json, got '--jsn'; did you mean --json?"),
        (["nowhere"], "nowhere: expected the output folder of a run"),
        (["--output"], "argument --output: expected one argument"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_page_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_run(tmp_path / "run", 0.5)
    assert main(["report", str(folder), "--output", str(tmp_path / "no" / "page.html")]) == 2
    assert "report: the page cannot be written: " in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: dsalign report RUN")
