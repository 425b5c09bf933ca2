"""torch's launcher with the exit code of the rank that failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FAILS = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    print("dsalign: error: rank 1: no such file", file=sys.stderr, flush=True)
    os.kill(os.getpid(), 9) if sys.argv[1] == "-9" else sys.exit(int(sys.argv[1]))
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("code", "last", "told"),
    [
        ("2", "dsalign: error: rank 1: no such file", 2),
        pytest.param("-9", "dsalign: error: rank 1 was ended by SIGKILL (exit code 137)", 137, marks=pytest.mark.slow),
        pytest.param(
            "7", "dsalign: error: rank 1 failed first, with exit code 7; see above", 7, marks=pytest.mark.slow
        ),
    ],
)
def test_the_exit_code_is_the_ranks_and_its_message_the_last(code: str, last: str, told: int, tmp_path: Path) -> None:
    (tmp_path / "fails.py").write_text(FAILS)
    command = [sys.executable, "-m", "dsalign.engines.elastic", "--nproc_per_node", "2", "--master_port", "0"]
    done = subprocess.run([*command, str(tmp_path / "fails.py"), code], capture_output=True, text=True, check=False)
    lines = [line for line in done.stderr.splitlines() if "WARNING" not in line and "OMP_NUM_THREADS" not in line]
    assert (done.returncode, lines[-1]) == (told, last)
    assert len(done.stderr.splitlines()) < 8
