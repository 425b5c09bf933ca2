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

from dsalign.config.secrets import redacted
from dsalign.report import screen
from dsalign.report.environment import environment, memory_gib
from dsalign.report.events import BEGIN, DONE, END, KEEPER, WARNING, Events, ending
from dsalign.report.hints import last_lines
from dsalign.report.history import METRICS, SAMPLES, read
from dsalign.report.metric_names import EVAL, label, on_the_line
from dsalign.report.page import write_report
from dsalign.report.screen import Now
from dsalign.report.story import duration, number
from dsalign.report.trackers import TRACKERS, Tracker

logger = logging.getLogger(__name__)
SHORT = 200  # characters of a sample on the console
WARNED = ("warning: ", "error: ")  # how a line begins that belongs among the warnings of the report


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
        self._trackers: dict[str, Tracker] = {}
        self._waiting: dict[str, list[str]] = {}  # name of a file -> its lines that could not be written
        self._warned: set[str] = set()
        if rank == 0:
            output_dir.mkdir(parents=True, exist_ok=True)
            self._resumed = resumed
            if not resumed:
                (output_dir / METRICS).write_bytes(b"")
            self._events = Events(output_dir, resumed=resumed)
            self._step = 0
            self._trackers = {name: made for name in trackers if (made := _made(name, output_dir)) is not None}

    def begin(self, settings: Mapping[str, Any], **facts: Any) -> None:
        """Note that the run begins, with what its report tells of it: rows, held_out, ranks, device, data (a table),
        memory (role -> GiB), origins (option -> where its value is from); and every warning so far and to come.
        settings: option -> value, for the trackers."""
        if self._rank == 0:
            shown = {name: value if isinstance(value, (int, float)) else redacted(str(value)) for name, value in
                     settings.items()}  # fmt: skip
            self._tell(lambda tracker: tracker.settings(shown))
            self._events.write(BEGIN, total=self._total, **facts, environment=environment())
            KEEPER.follow(lambda text: self._events.write(WARNING, step=self._step, text=text))

    def close(self, error: BaseException | None) -> None:
        """Note how the run ended, by an error or, with None, by its last step, write report.html, and say where
        everything is and how to go on. Never raises: the reason why a run ended is not to be lost over its report."""
        if self._rank != 0:
            return
        try:
            ended = ending(error)
            self._events.write(END, step=self._step, **ended)
            KEEPER.restart()
            self._tell(lambda tracker: tracker.finish())
            write_report(self._output_dir)
            screen.current().close()
            if ended["how"] != DONE:
                self.say(f"{ended['how']} at step {self._step} of {self._total}")
            for text in last_lines(read(self._output_dir), ended["how"]):
                self.say(text)
        except (Exception, KeyboardInterrupt) as problem:
            logger.warning(
                "report.html was not written (%s); `dsalign report %s` tries again", problem, self._output_dir
            )

    def title(self, text: str) -> None:
        """Name the run, on rank 0: in the first line of a live screen, else as a line."""
        if self._rank == 0:
            screen.current().title(text)

    def say(self, text: str) -> None:
        """Show one line, on rank 0; a line that begins with a word of WARNED is kept for the report."""
        if self._rank != 0:
            return
        if text.startswith(WARNED):
            self._events.write(WARNING, step=self._step, text=text)
        screen.current().say(text)

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
        self._step = step

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of an optimizer step: a line on the console, one in metrics.jsonl, a point in every tracker. With
        num_tokens among them the time left is added, and tokens/s since the last line that had it: a later pass over
        tokens that are counted already has none, and its time counts in the next line."""
        if self._rank != 0:
            return
        self._step = step
        numbers = self._shown(step, metrics)
        if "tokens_per_s" in numbers:
            self._last, self._last_tokens = time.monotonic(), numbers["num_tokens"]
        self._append(METRICS, [json.dumps({"step": step, **numbers})])
        system = {f"system/{name.lower().replace(' ', '_')}_gib": amount for name, amount in memory_gib().items()}
        self._tell(lambda tracker: tracker.numbers(step, {**numbers, **system}))

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show a step on the console alone, as the first one, of which nobody wants to wait for the next log line."""
        if self._rank == 0:
            self._step = step
            self._shown(step, metrics)

    def _shown(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Show a step; returns its metrics, with the rate where there is one."""
        numbers, left, tail = dict(metrics), None, ""
        if "num_tokens" in numbers and self._first_step is not None:
            now = time.monotonic()
            if gained := numbers["num_tokens"] - (self._last_tokens or 0):
                numbers["tokens_per_s"] = gained / max(now - self._last, 1e-9)
                tail = f" | {numbers['tokens_per_s']:,.0f} tok/s"
            left = (now - self._started) / max(1, step - self._first_step) * (self._total - step)
            tail += f" | ETA {duration(left)}"
        state = Now(step, self._total, numbers, left, memory_gib())
        screen.current().now(state, f"{line(step, self._total, numbers)}{tail}")
        return numbers

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Sampled completions of the rollout at `step`, each with its score: a line each on the console, and whole in
        samples.jsonl and the trackers."""
        if self._rank != 0 or not samples:
            return
        self._append(SAMPLES, [json.dumps({"step": step, **one}, ensure_ascii=False) for one in samples])
        texts = [json.dumps(one["completion"][:SHORT], ensure_ascii=False) for one in samples]
        lines = [
            f"sample at step {step} | reward {number(one['score'])} | {text}"
            for one, text in zip(samples, texts, strict=True)
        ]
        screen.current().samples(step, samples, lines)
        self._tell(lambda tracker: tracker.samples(step, samples))

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        """Tell every tracker; one that fails is left out from here on."""
        for name, tracker in list(self._trackers.items()):
            try:
                what(tracker)
            except Exception as error:  # a tracker is somebody else's code: whatever it raises, training goes on
                logger.warning("report_to %s failed and is left out from here: %s", name, error)
                del self._trackers[name]

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


def line(step: int, total: int, numbers: Mapping[str, float]) -> str:
    """A logged step in one line: the algorithm's main numbers."""
    words = []
    for name in on_the_line(numbers):
        short_name = label(name.removeprefix(EVAL))
        words.append(f"{'held-out ' if name.startswith(EVAL) else ''}{short_name} {number(numbers[name])}")
    return " | ".join([f"step {step}/{total}", *words])


def _made(name: str, output_dir: Path) -> Tracker | None:
    """The tracker called `name`; None, with a warning, where it cannot begin. Raises ValueError where it is not
    installed."""
    try:
        return TRACKERS[name](output_dir)
    except ValueError:
        raise
    except Exception as error:  # no login, no network: training does without
        logger.warning("report_to %s failed and is left out from here: %s", name, error)
        return None


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


def quiet(rank: int) -> None:
    """Let DeepSpeed, transformers, datasets and their like log errors alone, and dsalign lines of information on rank 0
    alone."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("dsalign").setLevel(logging.INFO if rank == 0 else logging.ERROR)
    for name in ("DeepSpeed", "deepspeed", "transformers", "datasets", "peft", "torch.distributed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|torch|deepspeed")
    KEEPER.restart()
    logging.getLogger("dsalign").addHandler(KEEPER)
    importlib.import_module("transformers").logging.disable_progress_bar()
