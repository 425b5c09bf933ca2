"""dsalign and TRL side by side: the same weights, rows, order and hyper-parameters, on the CPU in float32.

    python benchmarks/compare_trl.py --model FOLDER --dataset pairs.jsonl --algos dpo kto rm cpo simpo orpo

Both sides run as processes of their own, one after the other, with the same number of threads. dsalign shuffles rows by
seed, so the peer gets a copy of the file in that order. The first losses must agree, and the table shows those of every
step, CPU-seconds (all threads, user and system), wall time and peak resident memory of the whole process, and dsalign's
share of the peer's. Both sides also run the first batch alone: what the other steps cost is the difference, in which
imports and loading cancel. TRL is found in `--peer_python`, or installed into an environment of its own beside this
one's packages. `--dataset long` makes pairs with prompts of 256 and answers of 64 tokens.

Where the two mean different things the first losses are not compared: ORPO's NLL counts the prompt too at TRL, so there
the odds ratio is. KTO's losses part after the first step, as TRL pairs inside a micro-batch. `trl_side.py` says how
tokens are kept identical. Work files stay in `--work` where it is given, and the costs as a line of `--csv` each.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FIRST_TOLERANCE = 1e-4  # of the first losses, relative where they are large
PEER = "trl==1.16.0"


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
    environment["TRL_EXPERIMENTAL_SILENCE"] = "1"
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


OURS: dict[str, dict[str, Any]] = {  # what makes an algorithm mean what TRL means by it
    "dpo": {"rpo_alpha": 0, "beta": 0.1},
    "kto": {"beta": 0.1},
    "rm": {},
    "cpo": {"cpo_alpha": 0, "beta": 0.1},
    "simpo": {"cpo_alpha": 0, "beta": 2.0, "simpo_gamma": 1.0},
    "orpo": {"beta": 0.1},
}
FIRST = {"orpo": "log_odds_chosen"}  # what must agree in the first step, where it is not the loss
CSV = ("date", "algo", "rows", "side", "steps", "cpu_s", "wall_s", "peak_bytes", "cpu_s_a_step", "versions", "flags")


def run_dsalign(args: argparse.Namespace, algo: str, rows: Path, work: Path) -> Side:
    """dsalign through launch/train.py, as a user runs it."""
    out = work / "dsalign"
    flags = {
        "algo": algo, "tuner": "full", "dtype": "float32", "deepspeed": args.deepspeed, "model": args.model,
        "dataset": rows, "batch_size": args.batch_size, "gradient_accumulation_steps": 1, "num_train_epochs": 1,
        "learning_rate": args.learning_rate, "lr_scheduler_type": "constant", "warmup_ratio": 0, "adam_beta1": 0.9,
        "adam_beta2": 0.95, "adam_epsilon": 1e-8, "weight_decay": 0.01, "max_grad_norm": 1.0, "logging_steps": 1,
        "seed": args.seed, "output_dir": out, **OURS[algo],
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "launch" / "train.py")]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))] + shlex.split(args.extra)
    cpu_s, wall_s, peak_bytes = measured(command, work / "dsalign.log", args.threads)
    return Side(steps=read_steps(out / "metrics.jsonl"), cpu_s=cpu_s, wall_s=wall_s, peak_bytes=peak_bytes)


def run_peer(args: argparse.Namespace, algo: str, rows: Path, work: Path) -> Side:
    """TRL in the peer's environment."""
    out = work / "trl.jsonl"
    command = [*peer(args), "--algo", algo, "--model", args.model, "--dataset", str(rows), "--out", str(out)]
    command += ["--batch_size", str(args.batch_size), "--learning_rate", str(args.learning_rate)]
    command += shlex.split(args.peer_extra)
    cpu_s, wall_s, peak_bytes = measured(command, work / "trl.log", args.threads)
    return Side(steps=read_steps(out), cpu_s=cpu_s, wall_s=wall_s, peak_bytes=peak_bytes)


def peer(args: argparse.Namespace) -> list[str]:
    """The command of the TRL side; where no Python is given, TRL is installed beside this environment's packages."""
    if not args.peer_python:
        folder = ROOT / "output" / "trl"
        args.peer_python = str(folder / "bin" / "python")
        if not Path(args.peer_python).exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            own = Path(sysconfig.get_path("purelib"))
            site = folder / own.relative_to(Path(sys.prefix))
            (site / "base.pth").write_text(f"{own}\n")
            subprocess.run([args.peer_python, "-m", "pip", "install", "-q", "--no-deps", PEER], check=True)
    return [args.peer_python, str(ROOT / "benchmarks" / "trl_side.py")]


def rows_of(lines: list[str], algo: str) -> list[str]:
    """Pairs as they are; for KTO the chosen and the rejected answer in turn, with its label."""
    if algo != "kto":
        return lines
    found = []
    for i, pair in enumerate(map(json.loads, lines)):
        completion = pair["rejected" if i % 2 else "chosen"]
        found.append(json.dumps({"prompt": pair["prompt"], "completion": completion, "label": i % 2 == 0}))
    return found


def in_order(lines: list[str], seed: int) -> list[str]:
    """The rows in the order of dsalign's first epoch."""
    sys.path.insert(0, str(ROOT))
    loader = importlib.import_module("dsalign.data.loader")
    return [lines[index] for index in loader.epoch_order(len(lines), seed, 0)]


def check(algo: str, ours: Side, peer: Side) -> None:
    """Both sides took the same number of steps and began alike. Raises ValueError that says what did not."""
    if len(ours.steps) != len(peer.steps):
        raise ValueError(f"dsalign logged {len(ours.steps)} steps, the peer {len(peer.steps)}: a row was dropped")
    name = FIRST.get(algo, "loss")
    a, b = ours.steps[0][name], peer.steps[0][name]
    if not abs(a - b) <= FIRST_TOLERANCE * max(1.0, abs(b)):
        raise ValueError(
            f"{algo}: the first {name} of dsalign is {a}, that of the peer {b}: not the same rows or tokens"
        )


def table(algo: str, ours: Side, peer: Side) -> str:
    """A line per step."""
    name = FIRST.get(algo, "loss")
    lines = [f"step  {name} of dsalign, of TRL, difference"]
    pairs = zip(ours.steps, peer.steps, strict=True)
    lines += [f"{a['step']:4d} {a[name]:12.6f} {b[name]:12.6f} {a[name] - b[name]:12.2e}" for a, b in pairs]
    return "\n".join(lines)


def costs(title: str, ours: tuple[float, ...], peer: tuple[float, ...], names: tuple[str, ...]) -> str:
    """A line per cost with the ratio dsalign / TRL."""
    lines = [f"{title:24s} {'dsalign':>10s} {'TRL':>10s} {'ratio':>7s}"]
    for name, a, b in zip(names, ours, peer, strict=True):
        lines.append(f"{name:24s} {a:10.2f} {b:10.2f} {a / b:7.3f}")
    return "\n".join(lines)


def both(args: argparse.Namespace, algo: str, lines: list[str], work: Path) -> tuple[Side, Side]:
    """One run of each side over the rows, the peer's in dsalign's order."""
    work.mkdir(parents=True, exist_ok=True)
    (work / "rows.jsonl").write_text("\n".join(lines) + "\n")
    (work / "rows_in_order.jsonl").write_text("\n".join(in_order(lines, args.seed)) + "\n")
    ours = run_dsalign(args, algo, work / "rows.jsonl", work)
    return ours, run_peer(args, algo, work / "rows_in_order.jsonl", work)


def compare(args: argparse.Namespace, algo: str, lines: list[str], work: Path) -> None:
    """Runs, checks and prints one algorithm."""
    lines = rows_of(lines, algo)
    ours, theirs = both(args, algo, lines, work / "all")
    check(algo, ours, theirs)
    print(f"\n{algo}\n{table(algo, ours, theirs)}")
    whole = [(side.cpu_s, side.wall_s, side.peak_bytes / 2**30) for side in (ours, theirs)]
    print(costs("whole run", whole[0], whole[1], ("CPU-seconds", "wall seconds", "peak memory, GiB")))
    short = both(args, algo, in_order(lines, args.seed)[: args.batch_size], work / "first")
    more = len(ours.steps) - 1
    steps = [
        ((a.cpu_s - b.cpu_s) / more, (a.wall_s - b.wall_s) / more) for a, b in zip((ours, theirs), short, strict=True)
    ]
    print(costs(f"a step, 2 to {more + 1}", steps[0], steps[1], ("CPU-seconds", "wall seconds")), flush=True)
    if args.csv:
        record(args, algo, (ours, theirs), [cpu for cpu, _ in steps])


def record(args: argparse.Namespace, algo: str, sides: tuple[Side, Side], cpu_s_a_step: list[float]) -> None:
    """A line of the CSV file for each side."""
    new = not args.csv.exists()
    versions = (
        " ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "deepspeed")) + f" {PEER}"
    )
    flags = f"batch {args.batch_size}, threads {args.threads} {args.extra}".strip()
    with args.csv.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(CSV)
        for name, side, a_step in zip(("dsalign", "trl"), sides, cpu_s_a_step, strict=True):
            costs_ = (f"{side.cpu_s:.2f}", f"{side.wall_s:.2f}", side.peak_bytes, f"{a_step:.3f}")
            when = datetime.date.today().isoformat()
            writer.writerow((when, algo, args.dataset, name, len(side.steps), *costs_, versions, flags))


def run(args: argparse.Namespace, work: Path) -> None:
    """Every algorithm that was asked for."""
    work.mkdir(parents=True, exist_ok=True)
    plain, path = args.model, Path(args.dataset)
    if args.dataset == "long":
        path = work / "long.jsonl"
        command = [*peer(args), "--make_long", str(args.rows or 16), "--model", plain, "--out", str(path)]
        measured(command, work / "long.log", args.threads)
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][: args.rows or None]
    for algo in args.algos:
        if algo == "rm":
            args.model = str(work / "classifier")
            command = [*peer(args), "--make_classifier", "--model", plain, "--out", args.model]
            measured(command, work / "classifier.log", args.threads)
        compare(args, algo, lines, work / algo)
        args.model = plain


def main() -> None:
    parser = argparse.ArgumentParser(description="dsalign and TRL side by side on the CPU.")
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--dataset", required=True, help="JSONL with prompt, chosen, rejected as strings, or `long`")
    parser.add_argument("--algos", nargs="+", choices=sorted(OURS), default=["dpo"])
    parser.add_argument("--rows", type=int, default=0, help="rows to use; 0 = all, or 16 long ones")
    parser.add_argument("--peer_python", help="the Python of an environment with TRL; else one is made")
    parser.add_argument("--batch_size", type=int, default=4, help="rows an optimizer step")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--deepspeed", default="zero0", help="dsalign's DeepSpeed configuration")
    parser.add_argument("--extra", default="", help="further flags for dsalign, as one string")
    parser.add_argument("--peer_extra", default="", help="further flags for trl_side.py, as one string")
    parser.add_argument("--work", type=Path, help="folder for logs and outputs; default: a temporary one")
    parser.add_argument("--csv", type=Path, help="file to add the costs to")
    args = parser.parse_args()
    if args.work:
        run(args, args.work)
        return
    with tempfile.TemporaryDirectory() as work:
        run(args, Path(work))


if __name__ == "__main__":
    main()
