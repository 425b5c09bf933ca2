"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases and trackio, each imported only where it is asked
for."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = "dsalign"
COLUMNS = ("prompt", "completion", "score")  # of a table of samples


@dataclass(frozen=True)
class Tracker:
    """What a tracker can be told; each call may raise anything, as a tracker is somebody else's code.

    numbers(step, metric -> value). settings(option -> value), once. samples(step, rows of samples.jsonl). finish().
    """

    numbers: Callable[[int, Mapping[str, float]], None]
    settings: Callable[[Mapping[str, Any]], None]
    samples: Callable[[int, Sequence[Mapping[str, Any]]], None]
    finish: Callable[[], None]


def _module(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"report_to: {extra} is not installed; run pip install dsalign[{extra}]") from error


def _rows(samples: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    return [[one.get(name) for name in COLUMNS] for one in samples]


def _tensorboard(output_dir: Path) -> Tracker:
    writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(output_dir / "tensorboard"))

    def numbers(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def settings(options: Mapping[str, Any]) -> None:
        writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in options.items()), 0)

    def samples(step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        for i, one in enumerate(rows):  # indented, Markdown leaves a text as it is
            text = json.dumps({name: one.get(name) for name in COLUMNS}, ensure_ascii=False, indent=2)
            writer.add_text(f"sample {i}", "\n".join(f"    {line}" for line in text.splitlines()), step)

    return Tracker(numbers, settings, samples, writer.close)


def _wandb(output_dir: Path) -> Tracker:
    wandb = _module("wandb", "wandb")
    run = wandb.init(project=PROJECT, dir=str(output_dir), name=output_dir.name)
    return Tracker(
        lambda step, values: run.log(dict(values), step=step),
        lambda options: run.config.update(dict(options), allow_val_change=True),
        lambda step, rows: run.log({"samples": wandb.Table(columns=list(COLUMNS), data=_rows(rows))}, step=step),
        run.finish,
    )


def _trackio(output_dir: Path) -> Tracker:
    trackio = _module("trackio", "trackio")
    begun: list[Any] = []  # settings are given when a run begins and at no other time

    def begin(options: Mapping[str, Any]) -> None:
        if not begun:
            begun.append(trackio.init(project=PROJECT, name=output_dir.name, config=dict(options)))

    def numbers(step: int, values: Mapping[str, float]) -> None:
        begin({})
        trackio.log(dict(values), step=step)

    def samples(step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        begin({})
        frame = _module("pandas", "trackio").DataFrame(_rows(rows), columns=list(COLUMNS))
        trackio.log({"samples": trackio.Table(dataframe=frame)}, step=step)

    return Tracker(numbers, begin, samples, lambda: trackio.finish() if begun else None)


TRACKERS: dict[str, Callable[[Path], Tracker]] = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
