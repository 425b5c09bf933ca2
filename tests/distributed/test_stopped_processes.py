"""Real processes that are told to stop: one alone whose console is gone, and ranks whose launcher was killed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support import tiny_folder

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
LIMIT_S = 300


def begun(command: list[str], out: Path, **options: object) -> subprocess.Popen[str]:
    """A run of many steps that has logged its first."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "TORCH_EXTENSIONS_DIR": str(out.parent)}
    environment.pop("RANK", None)
    words = f"--algo sft --model {out.parent / 'tiny'} --dataset demo:demonstrations --tuner full --batch_size 4 "
    words += f"--num_train_epochs 500 --logging_steps 1 --template chatml --output_dir {out}"
    process = subprocess.Popen([*command, *words.split()], text=True, env=environment, **options)  # type: ignore
    until = time.monotonic() + LIMIT_S
    while not (out / "metrics.jsonl").exists() or not (out / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < until, "the run did not begin"
        time.sleep(0.2)
    return process  # type: ignore[no-any-return]


@pytest.mark.slow
def test_a_process_whose_console_is_gone_saves_and_its_last_line_resumes(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "tiny")
    reader, writer = os.pipe()
    os.close(reader)
    run = begun([sys.executable, TRAIN], tmp_path / "out", stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=LIMIT_S)
    assert run.returncode == 75
    (saved,) = (tmp_path / "out").glob("checkpoint-*")
    *_, first, last = said.splitlines()
    assert first.startswith("dsalign: stopped by SIGTERM on rank 0 at step ") and f"saved in {saved}" in first
    step = int(saved.name.rpartition("-")[2])
    again = subprocess.run(
        [*shlex.split(last), "--max_wall", "1s"], capture_output=True, text=True, check=False, timeout=LIMIT_S
    )
    assert again.returncode == 75 and "stopped by --max_wall" in again.stderr, again.stderr
    assert f"step {step}" in again.stdout or "before the first step" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["deepspeed", "launch.py"])
def test_ranks_whose_launcher_was_killed_save_and_leave(killed: str, tmp_path: Path) -> None:
    """Either of the two processes above them; they trained on for ever."""
    tiny_folder(tmp_path / "tiny")
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2", "--master_port", "29811"]
    with (tmp_path / "log").open("w") as log:
        run = begun([*command, TRAIN], tmp_path / "out", stdout=log, stderr=log)
    below = psutil.Process(run.pid).children(recursive=True)
    ranks = [one for one in below if "RANK" in one.environ()]
    middle = next(one for one in below if "deepspeed.launcher.launch" in one.cmdline())
    os.kill(run.pid if killed == "deepspeed" else middle.pid, signal.SIGKILL)
    gone, alive = psutil.wait_procs(ranks, timeout=60)
    for one in (*alive, middle):
        if one.is_running():
            one.kill()
    run.wait(30)
    assert len(gone) == 2 and not alive
    assert len(list((tmp_path / "out").glob("checkpoint-*"))) == 1
    assert "stopped by the end of its launcher, process " in (tmp_path / "log").read_text()
