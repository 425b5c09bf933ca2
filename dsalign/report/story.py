"""Numbers and durations as people read them, and the paragraph that says what happened in a run."""

from __future__ import annotations

import math
from collections.abc import Iterator

from dsalign.report import events
from dsalign.report.history import History
from dsalign.report.metric_names import EVAL

TOLD = (  # metric -> what it is called in the paragraph
    ("objective/scores", "the mean reward"),
    ("objective/kl", "the KL to the reference"),
    ("loss", "the loss"),
    (f"{EVAL}loss", "the loss on held-out rows"),
    ("rewards/accuracies", "reward accuracy"),
    ("rewards/margins", "the reward margin"),
)
NOTHING = 1e-5  # below it numbers differ by rounding alone
ENDS = {
    events.DONE: "It came to its end",
    events.STOPPED: "It was asked to stop",
    events.DIVERGED: "It diverged",
    events.INTERRUPTED: "It was interrupted (Ctrl-C)",
    events.FAILED: "It failed",
}


def number(x: float) -> str:
    """A number for people: four decimals at most, with an exponent where it is tiny or huge."""
    return f"{x:.2e}" if x and not 1e-3 <= abs(x) < 1e5 else f"{x:.4f}".rstrip("0").rstrip(".")


def short(x: float) -> str:
    """A number in four significant digits, such as 0.6931, 12.35 or 1.5e-07; a whole one in all, such as 14,060."""
    if math.isfinite(x) and float(x).is_integer() and abs(x) < 1e15:
        return f"{int(x):,}"
    return f"{x:.4g}" if math.isfinite(x) else str(x)


def duration(seconds: float) -> str:
    """Seconds for people: 1h02m, 3m05s or 12s."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def story(run: History) -> list[str]:
    """The sentences of the paragraph at the top of a report: what was trained on what, how far, how the main numbers
    went, how it ended and how to go on."""
    return [" ".join(_what(run)), *_changes(run), *_end(run)]


def _what(run: History) -> Iterator[str]:
    begin, settings = run.begin, run.settings
    tuner = {"lora": "LoRA adapters", "full": "all weights"}.get(str(settings.get("tuner")), "")
    model = settings.get("model", "a model")
    yield f"{str(settings.get('algo', 'A run')).upper()} of {model}" + (f" ({tuner})" if tuner else "")
    data = settings.get("dataset")
    names = " ".join(map(str, data)) if isinstance(data, list) else str(data or "")
    rows = f"{begin['rows']:,} rows of " if isinstance(begin.get("rows"), int) else ""
    if names:
        yield f"on {rows}{names}" + (f", {begin['held_out']:,} more held out" if begin.get("held_out") else "")
    total = begin.get("total")
    took = f" in {duration(run.seconds)}" if run.seconds else ""
    ranks = ""
    if isinstance(begin.get("ranks"), int):
        ranks = f" on {begin['ranks']} process{'' if begin['ranks'] == 1 else 'es'} ({begin.get('device')})"
    yield f"took {run.step:,}" + (f" of {total:,}" if total else "") + f" optimizer steps{took}{ranks}."


def _changes(run: History) -> Iterator[str]:
    """A sentence for each main number: fell, rose or stayed, from its first to its last finite value."""
    for name, called in TOLD:
        points = [point for point in run.series.get(name, []) if math.isfinite(point[1])]
        if not points:
            continue
        (_, first), (at, last) = points[0], points[-1]
        if len(points) == 1:
            yield f"{_upper(called)} was {short(last)} at step {at:.0f}, its one measurement."
            continue
        if max(abs(first), abs(last)) < NOTHING:
            moved = "stayed near 0"
        elif last == first:
            moved = f"stayed at {short(last)}"
        else:
            moved = f"{'fell' if last < first else 'rose'} from {short(first)} to {short(last)}"
        text = f"{_upper(called)} {moved}"
        if name == f"{EVAL}loss" and run.best and run.best[0] != at:
            text += f"; it was lowest at step {run.best[0]}, with {short(run.best[1])}"
        yield text + "."


def _end(run: History) -> Iterator[str]:
    end = run.end
    if not end:
        if run.begin:
            yield "No end is noted: it is still running, or it was killed."
    else:
        how = ENDS.get(str(end.get("how")), "It ended")
        at = "" if end.get("how") == events.DONE else f" at step {run.step:,}"
        text = str(end.get("text") or "").strip()
        if end.get("how") == events.STOPPED and "\n" in text:  # "...; resume with", and the command in the next line
            text = text.partition("\n")[0].rpartition(";")[0]
        yield f"{how}{at}" + (f": {text.rstrip('.')}." if text else ".")
    if run.has_final:
        yield f"The trained model is in {run.folder / 'final'}."
    elif run.checkpoints:
        yield f"The newest checkpoint is {run.folder / f'checkpoint-{run.checkpoints[-1]}'}."
    elif end and end.get("how") != events.DONE:
        yield "No checkpoint was written."


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
