"""`dsalign bench`: what it finds and how it reports what fails; benchmarks are small programs here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsalign import cli
from dsalign.verbs import bench

PROGRAM = """
import sys
path = sys.argv[sys.argv.index("--csv") + 1]
open(path, "w").write("op,p50_ms,peak_mb\\nlogps,1.5,\\n")
print("logps 1.5 ms")
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "bench_good.py").write_text(PROGRAM)
    (folder / "bench_bad.py").write_text("raise SystemExit('no GPU')")
    (folder / "bench_slow.py").write_text("import time; time.sleep(30)")
    found = bench.files(tmp_path)
    monkeypatch.setattr(bench, "files", lambda: found)
    return tmp_path


def test_rows_are_those_of_the_benchmark(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "good", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "results": [
            {"name": "good", "state": "done", "said": "logps 1.5 ms", "rows": [{"op": "logps", "p50_ms": "1.5"}]}
        ]
    }


def test_one_that_fails_or_is_late_stops_no_other(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "bad", "slow", "good", "--seconds", "1"]) == 3
    assert capsys.readouterr().out.splitlines() == [
        "-- bad: failed", "exit code 1: no GPU", "-- slow: late", "not done after 1 s; give more with --seconds",
        "-- good: done", "logps 1.5 ms",
    ]  # fmt: skip


def test_a_step_is_the_median_of_warm_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of steps 4 to 8, with 40, 50, 60, 70 and 80 tokens a second: 60."""
    program = tmp_path / "cli.py"
    program.write_text(
        "import json, pathlib, sys\nout = pathlib.Path(sys.argv[sys.argv.index('--output_dir') + 1])\n"
        "assert sys.argv[1:5] == ['--model', 'm', '--algo', 'dpo']\nout.mkdir()\n"
        "lines = [json.dumps({'step': s, 'tokens_per_s': 10.0 * s}) for s in range(1, 9)]\n"
        "(out / 'metrics.jsonl').write_text('\\n'.join(lines) + '\\n')\n"
    )
    monkeypatch.setattr(bench, "CLI", program)
    assert cli.main(["bench", "step", "--", "--model", "m", "--algo", "dpo"]) == 0
    assert "60 tokens/s, the median of steps 4 to 8; 40 to 80" in capsys.readouterr().out


def test_what_is_missing_and_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert set(bench.files()) >= {"linear_logps", "sampling", "preference"} and bench.files(tmp_path) == {}
    monkeypatch.setattr(bench, "files", dict)
    program = tmp_path / "cli.py"
    program.write_text("import sys\nsys.exit('dsalign: error: no model')")
    monkeypatch.setattr(bench, "CLI", program)
    assert cli.main(["bench"]) == 3
    out = capsys.readouterr().out
    assert (
        out.startswith("kernels: missing: no kernels/bench_*.py in ") and "exit code 1: dsalign: error: no model" in out
    )
    for words, said in (
        (["sampling"], "bench: expected one of step, got 'sampling'"),
        (["--lst"], "expected one of --list, --seconds, --json, got '--lst'"),
        (["--seconds", "0"], "--seconds: expected a whole number >= 1, got '0'"),
    ):
        assert cli.main(["bench", *words]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["bench", "--list"]) == 0 and cli.main(["bench", "--help"]) == 0
