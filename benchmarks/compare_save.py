"""A checkpoint with checksums beside DeepSpeed's own save of the same engine, in one run: the seconds for which
training waits, medians of repeats.

python benchmarks/compare_save.py [--parameters 40e6] [--stage 2] [--ranks 2] [--repeats 7]

The three ways take turns: DeepSpeed's save_checkpoint as it is, which leaves the files to the operating system; that
with every file flushed to the disk afterwards, as a checkpoint that outlives a power cut must be; and dsalign's, which
also hashes and flushes every file while training goes on, then checks all ranks' parts and renames. "named" is when its
checkpoint counts, with nothing else to do meanwhile. dsalign's checkpoints hold the model as a folder too; here
both hold DeepSpeed's state alone, and --export adds that folder to dsalign's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsalign.checkpoint import shards, staged
from dsalign.checkpoint.durable import sync
from dsalign.checkpoint.manifest import Manifest
from dsalign.config.schema import OptimOptions
from dsalign.engines import dist, engine
from dsalign.report.run_log import quiet

BAR = 1.3  # times DeepSpeed's own
WIDTH = 1024


def main() -> int:
    """Start the ranks, or be one; print the medians. Returns 1 where dsalign takes more than BAR times DeepSpeed's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parameters", type=float, default=40e6, help="trained numbers, in float32")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", default=None, help="on the disk to measure; a temporary one")
    parser.add_argument("--export", action="store_true", help="the model as safetensors too")
    options = parser.parse_args()
    if "RANK" in os.environ:
        return measure(options)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        place = {"WORLD_SIZE": str(options.ranks), "MASTER_PORT": "29617", "MASTER_ADDR": "127.0.0.1"}
        argv = [sys.executable, *sys.argv, "--folder", folder]
        ranks = [
            subprocess.Popen(argv, env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(options.ranks)
        ]
        return max(abs(one.wait()) for one in ranks)


def measure(options: argparse.Namespace) -> int:
    """Save in turn in each way; rank 0 prints one line of JSON."""
    dist.init(int(os.environ["LOCAL_RANK"]), options.ranks, peer_timeout=600)
    quiet(dist.rank())
    one = trained(int(options.parameters), options.stage, Path(options.folder))
    ways = {"deepspeed": plain, "deepspeed, flushed": flushed, "dsalign": ours}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    named: list[float] = []
    size = 0
    for repeat in range(options.repeats + 1):
        for name, save in ways.items():
            out = Path(options.folder) / "out"
            if dist.rank() == 0:
                shutil.rmtree(out, ignore_errors=True)
                os.sync()
            dist.barrier()
            start = time.perf_counter()
            rest = save(one, out, options.export)
            dist.barrier()
            waited = time.perf_counter() - start
            if rest is not None:
                while dist.total([float(not rest.ready())], torch.device("cpu"))[0]:  # as at each step of a run
                    time.sleep(0.01)
                before = time.perf_counter()
                rest.finish()
                dist.barrier()
                waited += time.perf_counter() - before
            if repeat:  # the first of each is not counted
                seconds[name].append(waited)
                if rest is not None:
                    named.append(time.perf_counter() - start)
            size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    median = {name: statistics.median(some) for name, some in seconds.items()}
    ratio = median["dsalign"] / median["deepspeed"]
    if dist.rank() == 0:
        row = {"stage": options.stage, "ranks": options.ranks, "MB": size // 10**6, "export": options.export}
        spread = {name: [round(min(some), 3), round(max(some), 3)] for name, some in seconds.items()}
        found = {"median_s": {name: round(one, 3) for name, one in median.items()}, "range_s": spread}
        found |= {"named_s": round(statistics.median(named), 3), "ratio": round(ratio, 2)}
        print(json.dumps({**row, **found}), flush=True)
    dist.shutdown()
    return int(ratio > BAR)


def trained(parameters: int, stage: int, folder: Path) -> Any:
    """An engine of so many trained numbers after one AdamW step, so that it has moments."""
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(max(1, parameters // WIDTH**2))]
    file = folder / f"ds-{dist.rank()}.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    options = OptimOptions(deepspeed=str(file), gradient_accumulation_steps=1, learning_rate=1e-3)
    found = engine.trained(nn.Sequential(*layers), options, torch.float32)
    found.set_gradient_accumulation_boundary(True)
    found.backward(found(torch.randn(2, WIDTH)).pow(2).sum(), scale_wrt_gas=False)
    engine.take_step(found, 0.0)
    return found


def plain(one: Any, out: Path, export: bool) -> None:
    """DeepSpeed's own save."""
    one.save_checkpoint(str(out / "engines"), tag="policy", save_latest=False)


def flushed(one: Any, out: Path, export: bool) -> None:
    """DeepSpeed's own save, then every file flushed by rank 0."""
    plain(one, out, export)
    if dist.rank() == 0:
        for path in out.rglob("*"):
            sync(path)


def ours(one: Any, out: Path, export: bool) -> staged.Staged:
    """dsalign's save of the same, as far as training waits for it before it goes on."""

    def fill(parts: staged.Parts) -> None:
        if export:
            with engine.whole(one, list(one.module.parameters())):
                if dist.rank() == 0:
                    parts.tensors({n: p.detach() for n, p in one.module.named_parameters()}, "model.safetensors")
        shards.save(one, "policy", parts, adapters_only=False)

    return staged.Staged(out, fill, lambda files: Manifest(files, run="bench", serial=1, step=1))


if __name__ == "__main__":
    sys.exit(main())
