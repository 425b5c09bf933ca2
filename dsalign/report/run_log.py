"""The log of a run: a line on the console, metrics.jsonl and samples.jsonl, and trackers where they are asked for."""

from __future__ import annotations

import importlib
import json
import logging
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsalign.report.trackers import TRACKERS

logger = logging.getLogger(__name__)
FIRST = (
    "loss",
    "eval/loss",
    "objective/scores",
    "objective/kl",
    "rewards/accuracies",
    "rewards/margins",
    "kl",
    "nll_loss",
    "log_odds_ratio",
    "grad_norm",
    "lr",
)
NOT_ON_THE_LINE = (  # only in metrics.jsonl
    "num_tokens",
    "time/",
    "epoch",
    "tokens_per_s",
    "logps/",
    "objective/",
    "policy/",
    "loss/",
    "val/",
    "rollout/",
)
METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


class RunLog:
    """Writes on rank 0 and is silent on other ranks. A tracker that fails is dropped with a warning: training goes on.

    output_dir: where metrics.jsonl and samples.jsonl are. trackers: names in TRACKERS. total_steps: of the run, for the
    time that is left. resumed: the files are continued, not begun anew.
    Raises ValueError where a tracker is not installed.
    """

    def __init__(
        self, output_dir: Path, trackers: Sequence[str], *, rank: int, total_steps: int, resumed: bool
    ) -> None:
        self._rank, self._total, self._output_dir = rank, total_steps, output_dir
        self._started = self._last = time.monotonic()
        self._first_step: int | None = None
        self._last_tokens: float | None = None
        self._waiting: dict[str, list[str]] = {}  # name of a file -> its lines that could not be written
        self._warned: set[str] = set()
        self._trackers: dict[str, Callable[[int, Mapping[str, float]], None]] = {}
        if rank == 0:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._resumed = resumed
            if not resumed:
                (output_dir / METRICS).write_bytes(b"")
            self._trackers = {name: TRACKERS[name](output_dir) for name in trackers}

    def say(self, text: str) -> None:
        """Print one line, on rank 0."""
        if self._rank != 0:
            return
        try:
            print(text, flush=True)
        except OSError:  # whoever read the console is gone, or the terminal is; metrics.jsonl has it all
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def start(self, step: int, num_tokens: float) -> None:
        """Training begins behind optimizer step `step`, with num_tokens trained on before: rates and the time left
        count from here.

        A run that was killed wrote steps behind its last checkpoint, which are now taken again: their lines are cut
        off, so that a step stands in each file once.
        """
        if self._rank == 0 and self._resumed:
            _cut(self._output_dir / METRICS, lambda at: at <= step)
            _cut(self._output_dir / SAMPLES, lambda at: at < step)  # of the rollout that comes next
        self._started = self._last = time.monotonic()
        self._first_step, self._last_tokens = step, num_tokens

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of an optimizer step: a line on the console, one in metrics.jsonl, a point in every tracker. With
        num_tokens among them tokens/s and the time left are added."""
        if self._rank != 0:
            return
        now = time.monotonic()
        numbers = dict(metrics)
        tail = ""
        if "num_tokens" in numbers and self._first_step is not None:
            numbers["tokens_per_s"] = (numbers["num_tokens"] - (self._last_tokens or 0)) / max(now - self._last, 1e-9)
            left = (now - self._started) / max(1, step - self._first_step) * (self._total - step)
            rate = numbers["tokens_per_s"]  # 0 in a later pass over rows that are counted already
            tail = (f" | {rate:,.0f} tok/s" if rate else "") + f" | ETA {duration(left)}"
            self._last, self._last_tokens = now, numbers["num_tokens"]
        self._append(METRICS, [json.dumps({"step": step, **numbers})])
        split = {n.removeprefix("time/"): x for n, x in numbers.items() if n.startswith("time/")}
        if split:
            tail = " | " + ", ".join(f"{name} {seconds:.1f}s" for name, seconds in split.items()) + tail
        rest = [n for n in numbers if n not in FIRST and not n.removeprefix("eval/").startswith(NOT_ON_THE_LINE)]
        ordered = [n for n in FIRST if n in numbers] + rest
        text = " | ".join(f"{name} {number(numbers[name])}" for name in ordered)
        self.say(f"step {step}/{self._total} | {text}{tail}")
        for name, track in list(self._trackers.items()):
            try:
                track(step, numbers)
            except Exception as error:  # a tracker is somebody else's code: whatever it raises, training goes on
                logger.warning("report_to %s failed and is left out from here: %s", name, error)
                del self._trackers[name]

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Sampled completions of the rollout at `step`, each with its score: a line each on the console, and whole in
        samples.jsonl."""
        if self._rank != 0 or not samples:
            return
        self._append(SAMPLES, [json.dumps({"step": step, **one}, ensure_ascii=False) for one in samples])
        for one in samples:
            text = json.dumps(one["completion"][:200], ensure_ascii=False)
            self.say(f"sample at step {step} | score {number(one['score'])} | {text}")

    def _append(self, name: str, lines: list[str]) -> None:
        """Append whole lines to a file. Where the disk takes them not, training goes on: they are kept, and written
        with the next ones that it takes; one warning says so."""
        waiting = self._waiting.setdefault(name, [])
        waiting += lines
        path = self._output_dir / name
        try:
            append(path, "".join(f"{line}\n" for line in waiting).encode("utf-8", "surrogatepass"))
            waiting.clear()
        except OSError as error:
            if name not in self._warned:
                room = shutil.disk_usage(self._output_dir).free / 2**20
                logger.warning(
                    "warning: %s: %s (errno %s, %.1f MiB free): its lines are kept in memory until the disk takes "
                    "them; make room before the next checkpoint", path, error.strerror, error.errno, room,
                )  # fmt: skip
            self._warned.add(name)


def append(path: Path, content: bytes) -> None:
    """Append bytes to a file, all of them or, where that raises OSError, none."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before, left = os.fstat(handle).st_size, memoryview(content)
        try:
            while left:
                left = left[os.write(handle, left) :]
        except OSError:
            with suppress(OSError):  # the first error says more
                os.ftruncate(handle, before)
            raise
    finally:
        os.close(handle)


def _cut(path: Path, keep: Callable[[int], bool]) -> None:
    """Drop the lines of steps that `keep` refuses, and a last line that a kill broke off. The file is replaced when the
    new one is whole."""
    if not path.exists():
        return
    kept = []
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:  # a completion may hold other line ends
        for line in file:
            try:
                whole = keep(json.loads(line)["step"])
            except (ValueError, KeyError, TypeError):
                whole = False
            kept += [line] if whole else []
    beside = path.with_name(f".{path.name}.part")
    with beside.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def number(x: float) -> str:
    """A number for people: four decimals at most, with an exponent where it is tiny or huge."""
    return f"{x:.2e}" if x and not 1e-3 <= abs(x) < 1e5 else f"{x:.4f}".rstrip("0").rstrip(".")


def duration(seconds: float) -> str:
    """Seconds for people: 1h02m, 3m05s or 12s."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def quiet(rank: int) -> None:
    """Let DeepSpeed, transformers, datasets and their like log errors alone, and dsalign lines of information on rank 0
    alone."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("dsalign").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    for name in ("DeepSpeed", "deepspeed", "transformers", "datasets", "peft", "torch.distributed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|torch|deepspeed")
    importlib.import_module("transformers").logging.disable_progress_bar()
