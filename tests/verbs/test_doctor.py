"""`dsalign doctor`: what it reads, how it exits, and that it works where torch does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsalign import cli
from dsalign.verbs import doctor, hosts, this_machine
from dsalign.verbs.lines import ERROR, OK, Line

WITHOUT_TORCH = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "torch" else find(name, *more)
class No:
    def find_spec(self, name, *more):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name=name)
sys.meta_path.insert(0, No())
from dsalign import cli
from dsalign.verbs import this_machine
this_machine.PROBE = "raise ImportError('libtorch.so: not found')"
this_machine.HUB_S = 0.1
code = cli.main(["doctor", "--json"])
print(code, cli.main(["--algo", "dpo"]))
"""


def test_the_exit_code_is_of_the_worst_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(this_machine, "examined", lambda: [Line("a", OK, "fine")])
    assert cli.main(["doctor"]) == 0 and capsys.readouterr().out.splitlines()[-1] == "1 ok"
    monkeypatch.setattr(hosts, "examined", lambda path: [Line("hostfile", ERROR, str(path))])
    assert cli.main(["doctor", "--json", "--hostfile", "nodes"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert [line["state"] for line in found["lines"]] == ["ok", "error"] and found["lines"][1]["found"] == "nodes"


def test_mistakes_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--hostfil", "x"]) == 2
    assert "expected --hostfile or --json, got '--hostfil'" in capsys.readouterr().err
    assert cli.main(["doctor", "--help"]) == 0 and doctor.USAGE in capsys.readouterr().out


def test_it_works_without_torch(tmp_path: Path) -> None:
    """Neither installed nor importable: a line says so, and a training says it in one line with exit code 2."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, timeout=60, check=True, cwd=tmp_path
    )
    answer, codes = done.stdout.splitlines()
    lines = {line["name"]: line for line in json.loads(answer)["lines"]}
    assert lines["imports"]["found"] == "torch cannot be imported: ImportError: libtorch.so: not found"
    assert codes == "2 2"
    assert done.stderr.splitlines() == [
        "dsalign: error: torch: expected it beside dsalign, found nothing; run: pip install torch"
    ]
