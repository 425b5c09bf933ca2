"""torch's launcher with the exit code of the rank that failed."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

FAILS = """
import os, signal, sys, time
if os.environ["RANK"] == "1":
    print("dsalign: error: rank 1: no such file", file=sys.stderr, flush=True)
    os.kill(os.getpid(), 9) if sys.argv[1] == "-9" else sys.exit(int(sys.argv[1]))
time.sleep(60)
"""

SAVES = """
import os, signal, sys, time
def stop(number, frame):
    os.write(2, f"rank {os.environ['RANK']} {signal.Signals(number).name}\\n".encode())  # one write: one pipe
    time.sleep(1)
    signal.signal(number, signal.SIG_IGN)
    sys.exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, stop)
open(sys.argv[1] + os.environ["RANK"], "w").close()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_reaches_every_rank_once_and_their_exit_code_is_the_launchers(number: int, tmp_path: Path) -> None:
    """SIGUSR1 too, of which torch's launcher dies and leaves its ranks behind."""
    (tmp_path / "saves.py").write_text(SAVES)
    command = [sys.executable, "-m", "dsalign.engines.elastic", "--nproc_per_node", "2", "--master_port", "0"]
    started = subprocess.Popen(
        [*command, str(tmp_path / "saves.py"), f"{tmp_path}/up"], stderr=subprocess.PIPE, text=True
    )
    while not all((tmp_path / f"up{rank}").exists() for rank in (0, 1)):
        assert started.poll() is None
        time.sleep(0.05)
    started.send_signal(number)
    _, said = started.communicate(timeout=30)
    lines = [line for line in said.splitlines() if "WARNING" not in line and "OMP_NUM_THREADS" not in line]
    name = signal.Signals(number).name
    assert started.returncode == 75 and sorted(filter(lambda x: "***" not in x, lines)) == [
        f"rank 0 {name}",
        f"rank 1 {name}",
    ]


@pytest.mark.parametrize(
    ("code", "last", "told"),
    [
        ("2", "dsalign: error: rank 1: no such file", 2),
        pytest.param("75", "dsalign: error: rank 1: no such file", 75, marks=pytest.mark.slow),
        pytest.param("77", "dsalign: error: rank 1: no such file", 77, marks=pytest.mark.slow),
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
