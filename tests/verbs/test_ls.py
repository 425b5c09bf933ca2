"""`dsalign ls`: what it reads, what it prints and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsalign import cli
from dsalign.verbs import ls, runs
from tests.verbs.test_lines import Terminal
from tests.verbs.test_runs import checkpoint, write

TEXT = "algo: dpo\nmodel: models/base\nmax_steps: 40\n"


def test_the_table_and_the_lines_below_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "pairs", TEXT, 4, **{"eval/loss": 0.125})
    checkpoint(run, 4)
    assert cli.main(["ls", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "stopped" in line)
    for text in ("dpo", "base", "4/40", "loss 0.25", "0.125 at 4", " B "):
        assert text in row
    assert out.splitlines()[-1] == f"{run}: go on: dsalign resume {run}"
    (run / "checkpoint-4" / "model.safetensors").unlink()
    assert cli.main(["ls", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert f"{run}: checkpoint-4 is damaged: model.safetensors is missing" in out and "none (1 damaged)" in out
    assert out.splitlines()[-1] == f"{run}: start again: dsalign --algo dpo --seed 1"


def test_a_narrow_terminal_lacks_the_least_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes first: size, model, checkpoints, age. In a pipe nothing does, however long a path is."""
    folder = tmp_path / ("long" * 40)
    run = write(folder, TEXT, 4, **{"eval/loss": 0.125})
    found = [runs.read(run)]
    heading, _, row = ls.text(found, tmp_path, 0.0).strip().splitlines()[:3]
    assert heading.split() == list(ls.COLUMNS) and row.split()[0] == str(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.stdout", Terminal())
    folder.rename("pairs")
    heading, line, row = ls.text([runs.read(Path("pairs"))], tmp_path, 0.0).strip().splitlines()[:3]
    assert (
        heading.split() == ["run", "algorithm", "state", "step", "last", "best"] and max(len(heading), len(line)) <= 60
    )
    assert row.split() == ["pairs", "dpo", "crashed", "4/40", "loss", "0.25", "0.125", "at", "4"]


def test_json_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write(tmp_path / "run", TEXT, 4)
    kept = checkpoint(run, 4)
    (kept / "model.safetensors").write_bytes(b"012345678X")
    assert cli.main(["ls", str(run), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["state"] == "stopped" and found["last"] == {"loss": 0.25} and found["total_steps"] == 40
    assert found["checkpoints"] == [{"name": "checkpoint-4", "step": 4, "fault": ""}] and found["process"] is None
    assert found["bytes"] == sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    assert cli.main(["ls", str(run), "--json", "--verify"]) == 2
    (found,) = json.loads(capsys.readouterr().out)
    assert found["checkpoints"][0]["fault"] == "model.safetensors does not match its checksum"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "ls: expected a folder in which runs are, got nowhere, which is none"),
        (["--verfy"], "expected --verify or --json, got '--verfy'"),
        (["a", "b"], "ls: expected one folder, got 2"),
    ],
)
def test_mistakes(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls", *words]) == 2
    assert said in capsys.readouterr().err


def test_an_empty_folder_and_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(f"no run in {tmp_path} or below it")
    assert cli.main(["ls", "--help"]) == 0 and ls.USAGE in capsys.readouterr().out


def test_torch_is_not_imported(tmp_path: Path) -> None:
    """A list of runs may take no second."""
    write(tmp_path / "run", TEXT, 4)
    code = f"import sys\nfrom dsalign import cli\ncli.main(['ls', {str(tmp_path)!r}])\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "False"
