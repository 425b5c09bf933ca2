"""`dsalign resume RUN` as a user types it: alone, behind the deepspeed launcher, in another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "launch" / "train.py")


def command(folder: Path, *words: str) -> str:
    """Run a command in a folder; its output."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=900, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.slow
def test_one_rank_becomes_two_and_one_again(tiny: Path, tmp_path: Path) -> None:
    """Two steps on one rank, one on two ranks of deepspeed at ZeRO-3, one on one again: 4 rows a step throughout, the
    data set found from another folder."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    rows = [json.dumps({"prompt": f"count to {i}", "completion": "one"}) for i in range(40)]
    (here / "rows.jsonl").write_text("\n".join(rows))
    words = (
        f"--algo sft --model {tiny} --dataset rows.jsonl --batch_size 4 --gradient_accumulation_steps 1 --output_dir o "
    )
    command(here, TRAIN, *words.split(), "--max_steps", "2", "--logging_steps", "1", "--save_steps", "1")
    launcher = ["-m", "deepspeed.launcher.runner", "--num_accelerators", "2", TRAIN]
    said = command(there, *launcher, "resume", "../here/o", "--max_steps", "3", "--deepspeed", "zero3")
    for line in ("ranks were 1, are 2", "--max_steps was 2, is 3", "--deepspeed was zero2, is zero3"):
        assert said.count(f"resume: {line}") == 1
    said = command(there, TRAIN, "resume", "../here/o", "--max_steps", "4")
    assert "resume: ranks were 2, are 1" in said and "--gradient_accumulation_steps was 1, is 2" in said
    lines = [json.loads(line) for line in (here / "o" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert {p.name for p in (here / "o").glob("config*.yaml")} == {"config.yaml", "config.1.yaml", "config.2.yaml"}
    assert len((here / "o" / "command.txt").read_text().splitlines()) == 3
