"""DPO side by side: dsalign and TRL on the same weights, rows, order and hyper-parameters, on the CPU in float32.

    python benchmarks/compare_dpo.py --model FOLDER --dataset pairs.jsonl --peer_python TRL_ENV/bin/python

Both sides run as processes of their own, one after the other, with the same number of threads. dsalign shuffles rows by
seed, so the peer gets a copy of the file in that order. The first loss of both must be ln 2, as policy and reference
are equal then; the table shows loss and reward margin of every step, CPU-seconds (all threads, user and system), wall
time and peak resident memory of the whole process, and dsalign's share of the peer's. With `--less_startup` both sides
also run the first batch alone, and the table says what the other steps cost: imports and loading cancel.

`trl_dpo.py` says how tokens are kept identical. Work files stay in `--work` where it is given.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FIRST_LOSS_TOLERANCE = 1e-4  # ln 2 in float32 is exact to 1e-7; a different row or mask shows from the second step on


@dataclass(frozen=True, kw_only=True)
class Side:
    """What one run said and cost."""

    steps: list[dict[str, Any]]  # one record an optimizer step: loss, rewards/margins, ...
    cpu_s: float
    wall_s: float
    peak_bytes: int


def measured(command: list[str], log: Path, threads: int) -> tuple[float, float, int]:
    """Runs the command; its CPU-seconds and wall-seconds and the largest resident set of it or a child, in bytes.

    Linux starts a child's peak at its parent's, so nothing large may be loaded in this process.
    Raises ValueError with the end of its output where it fails.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise ValueError(f"{shlex.join(command)} ended with {process.returncode}; the end of {log}:\n{tail}")
    return usage.ru_utime + usage.ru_stime, wall_s, usage.ru_maxrss * 1024


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The records of optimizer steps in a metrics file. Raises ValueError where there are none."""
    records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    steps = [record for record in records if "step" in record and "loss" in record]
    if not steps:
        raise ValueError(f"{path} has no line with step and loss")
    return steps


def run_dsalign(args: argparse.Namespace, rows: Path, work: Path) -> Side:
    """dsalign through launch/train.py, as a user runs it."""
    out = work / "dsalign"
    flags = {
        "algo": "dpo", "tuner": "full", "dtype": "float32", "deepspeed": args.deepspeed, "model": args.model,
        "dataset": rows, "beta": args.beta, "rpo_alpha": 0, "batch_size": args.batch_size,
        "gradient_accumulation_steps": 1, "num_train_epochs": 1, "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant", "warmup_ratio": 0, "adam_beta1": 0.9, "adam_beta2": 0.95,
        "adam_epsilon": 1e-8, "weight_decay": 0.01, "max_grad_norm": 1.0, "logging_steps": 1, "seed": args.seed,
        "output_dir": out,
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "launch" / "train.py")]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))] + shlex.split(args.extra)
    cpu_s, wall_s, peak_bytes = measured(command, work / "dsalign.log", args.threads)
    return Side(steps=read_steps(out / "metrics.jsonl"), cpu_s=cpu_s, wall_s=wall_s, peak_bytes=peak_bytes)


def run_peer(args: argparse.Namespace, rows: Path, work: Path) -> Side:
    """TRL in the peer's environment."""
    out = work / "trl.jsonl"
    command = [args.peer_python, str(ROOT / "benchmarks" / "trl_dpo.py"), "--model", args.model, "--dataset", str(rows)]
    command += ["--out", str(out), "--beta", str(args.beta), "--batch_size", str(args.batch_size)]
    command += ["--learning_rate", str(args.learning_rate)]
    cpu_s, wall_s, peak_bytes = measured(command, work / "trl.log", args.threads)
    return Side(steps=read_steps(out), cpu_s=cpu_s, wall_s=wall_s, peak_bytes=peak_bytes)


def in_order(lines: list[str], seed: int) -> list[str]:
    """The rows in the order of dsalign's first epoch."""
    sys.path.insert(0, str(ROOT))
    loader = importlib.import_module("dsalign.data.loader")
    return [lines[index] for index in loader.epoch_order(len(lines), seed, 0)]


def check(ours: Side, peer: Side) -> None:
    """Both sides took the same number of steps and started at ln 2. Raises ValueError that says which did not."""
    if len(ours.steps) != len(peer.steps):
        raise ValueError(f"dsalign logged {len(ours.steps)} steps, the peer {len(peer.steps)}: a row was dropped")
    for name, side in (("dsalign", ours), ("the peer", peer)):
        if abs(side.steps[0]["loss"] - math.log(2)) > FIRST_LOSS_TOLERANCE:
            raise ValueError(f"the first loss of {name} is {side.steps[0]['loss']}, expected ln 2 = {math.log(2):.6f}")


def table(ours: Side, peer: Side) -> str:
    """A line per step, then the largest differences."""
    keys = ("loss", "rewards/margins")
    lines = ["step  loss dsalign   loss TRL     difference  margin dsalign  margin TRL   difference"]
    for a, b in zip(ours.steps, peer.steps, strict=True):
        cells = [f"{a[key]:12.6f} {b[key]:12.6f} {a[key] - b[key]:12.2e}" for key in keys]
        lines.append(f"{a['step']:4d} {cells[0]} {cells[1]}")
    for key in keys:
        largest = max(abs(a[key] - b[key]) for a, b in zip(ours.steps, peer.steps, strict=True))
        lines.append(f"largest difference in {key}: {largest:.2e}")
    return "\n".join(lines)


def costs(title: str, ours: tuple[float, ...], peer: tuple[float, ...], names: tuple[str, ...]) -> str:
    """A line per cost with the ratio dsalign / TRL."""
    lines = [f"{title:24s} {'dsalign':>10s} {'TRL':>10s} {'ratio':>7s}"]
    for name, a, b in zip(names, ours, peer, strict=True):
        lines.append(f"{name:24s} {a:10.2f} {b:10.2f} {a / b:7.3f}")
    return "\n".join(lines)


def both(args: argparse.Namespace, lines: list[str], work: Path) -> tuple[Side, Side]:
    """One run of each side over the rows, the peer's in dsalign's order."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (work / "rows_in_order.jsonl").write_text("\n".join(in_order(lines, args.seed)) + "\n")
    ours = run_dsalign(args, work / "rows.jsonl", work)
    return ours, run_peer(args, work / "rows_in_order.jsonl", work)


def compare(args: argparse.Namespace, work: Path) -> None:
    """Runs, checks and prints."""
    lines = [line for line in args.dataset.read_text(encoding="utf-8").splitlines() if line.strip()]
    ours, peer = both(args, lines, work / "all")
    check(ours, peer)
    print(table(ours, peer))
    names = ("CPU-seconds", "wall seconds", "peak memory, GiB")
    whole = [(side.cpu_s, side.wall_s, side.peak_bytes / 2**30) for side in (ours, peer)]
    print(costs("whole run", whole[0], whole[1], names))
    if args.less_startup:
        first = in_order(lines, args.seed)[: args.batch_size]
        short = both(args, first, work / "first")
        steps = [(a.cpu_s - b.cpu_s, a.wall_s - b.wall_s) for a, b in zip((ours, peer), short, strict=True)]
        print(costs(f"steps 2 to {len(ours.steps)}", steps[0], steps[1], names[:2]))


def main() -> None:
    parser = argparse.ArgumentParser(description="DPO on the CPU: dsalign and TRL side by side.")
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--dataset", type=Path, required=True, help="JSONL with prompt, chosen, rejected as strings")
    parser.add_argument("--peer_python", required=True, help="the Python of an environment with TRL")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--batch_size", type=int, default=4, help="pairs an optimizer step")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--deepspeed", default="zero0", help="dsalign's DeepSpeed configuration")
    parser.add_argument("--extra", default="", help="further flags for dsalign, as one string")
    parser.add_argument("--less_startup", action="store_true", help="also measure the first batch alone")
    parser.add_argument("--work", type=Path, help="folder for logs and outputs; default: a temporary one")
    args = parser.parse_args()
    if args.work:
        compare(args, args.work)
        return
    with tempfile.TemporaryDirectory() as work:
        compare(args, Path(work))


if __name__ == "__main__":
    main()
