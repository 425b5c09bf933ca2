"""What every kernel benchmark shares: error against float64, time in percentiles, peak memory, CSV rows."""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import gc
import importlib.metadata
import platform
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

PERCENTILES = (20, 50, 80)
QUEUE_CYCLES = 20_000_000  # about ten milliseconds of a GPU
POLL_S = 0.0005  # of the resident set, where the device has no counter of its own


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the CPU with the number of threads that torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def provenance(device: torch.device) -> dict[str, str]:
    """What a row needs to be believed later: date, device and versions."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": _version("triton")}
    return {"date": datetime.date.today().isoformat(), "device": device_name(device), **versions}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def peers(found: Mapping[str, str]) -> str:
    """Name and version of the packages measured beside; found: name -> package."""
    return ", ".join(f"{name} {_version(package)}" for name, package in found.items()) or "none installed"


def error(found: Tensor, exact: Tensor) -> float:
    """The largest absolute difference, in float64; exact: float64."""
    return float((found.double() - exact).abs().max()) if found.numel() else 0.0


def times_ms(
    runs: Mapping[str, Callable[[], object]], device: torch.device, *, repeats: int, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Name -> p20, p50 and p80 of the time of each run, milliseconds. repeats: timed rounds, >= 2.

    A round times every run once, so that whatever else the machine does falls on all of them alike. On a GPU the clock
    is a pair of events, the L2 cache is filled with something else before each run, and ten milliseconds of
    waiting let the card rest and the host queue the launches. On a CPU the clock is that of the process, all threads
    together, which other programs change less than the time on the wall.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=device) if device.type == "cuda" else None
    order, draw = list(runs), random.Random(0)
    for index in range(warmup + repeats):
        draw.shuffle(order)  # a card that has just run a large product is slower for a while: not always for the same
        for name, run in ((name, runs[name]) for name in order):
            spent = _cpu_ms(run) if flush is None else _events_ms(run, flush)
            if index >= warmup:
                taken[name].append(spent)
    cuts = {name: statistics.quantiles(times, n=100, method="inclusive") for name, times in taken.items()}
    return {name: {f"p{p}_ms": cut[p - 1] for p in PERCENTILES} for name, cut in cuts.items()}


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most memory that `run` holds beyond what is there before it: allocated on a GPU, resident on a CPU.

    On a CPU it is a sample of the process's resident set, which misses what lives shorter than half a millisecond.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed memory, which would be used unseen
        if trim is not None:
            trim(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    peak = before = _resident_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(POLL_S):
            peak = max(peak, _resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak - before


def parser(about: str | None, *, repeats: int) -> argparse.ArgumentParser:
    """The flags that every benchmark has; about: its docstring; repeats: the default."""
    found = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--repeats", type=int, default=repeats, help="timed runs of each")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--csv", type=Path, help="append the rows to this file")
    return found


def add_impl(parser: argparse.ArgumentParser) -> None:
    """The flag of benchmarks whose operation has a form in torch too."""
    about = "of the measured operation; triton on a CPU: in its interpreter, with TRITON_INTERPRET=1"
    parser.add_argument("--impl", choices=("auto", "triton", "torch"), default="auto", help=about)


def report(
    rows: Sequence[Mapping[str, object]], columns: Sequence[str], device: torch.device, file: Path | None
) -> None:
    """Prints device, versions and the table; appends the rows to a CSV file where one is named."""
    print(", ".join(f"{name} {value}" for name, value in provenance(device).items()))
    print(table(rows, columns))
    if file:
        write_csv(file, rows)


def run_over_logits(
    about: str | None,
    measure: Callable[[argparse.Namespace, torch.device], Sequence[Mapping[str, object]]],
    columns: Sequence[str],
    *,
    rows: int,
    rows_are: str,
) -> None:
    """All that a benchmark over logits [rows, V] does: reads the flags, measures, and reports.

    about: its docstring. rows: the default of --rows. rows_are: what they stand for.
    """
    found = parser(about, repeats=20)
    add_impl(found)
    found.add_argument("--rows", type=int, default=rows, help=rows_are)
    found.add_argument("--vocabulary", type=int, default=49152, help="V")
    found.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the logits")
    args = found.parse_args()
    device = torch.device(args.device)
    report(measure(args, device), columns, device, args.csv)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Appends rows to `path`, with a header where the file is new. Raises ValueError where its columns are others."""
    columns = list(rows[0])
    new = not path.exists()
    if not new:
        with path.open(newline="", encoding="utf-8") as file:
            have = next(csv.reader(file), [])
        if have != columns:
            raise ValueError(
                f"{path}: expected the columns {', '.join(columns)}, got {', '.join(have)}; name a new file"
            )
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerows(rows)


def table(rows: Sequence[Mapping[str, object]], columns: Sequence[str]) -> str:
    """The rows as Markdown."""
    lines = [columns, ["---"] * len(columns), *([_cell(row[column]) for column in columns] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cpu_ms(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return (time.process_time() - start) * 1e3


def _events_ms(run: Callable[[], object], flush: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush.zero_()
    torch.cuda._sleep(QUEUE_CYCLES)  # the host gets ahead: what is timed is the device, not Python
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def _resident_bytes() -> int:
    """The resident set of this process; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 if status.exists() else 0
