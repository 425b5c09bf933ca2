"""Trackers beside metrics.jsonl: TensorBoard, Weights & Biases and trackio, each imported only where it is asked
for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def _module(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ValueError(f"report_to: {extra} is not installed; run pip install dsalign[{extra}]") from error


def _tensorboard(output_dir: Path) -> Callable[[int, Mapping[str, float]], None]:
    writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(output_dir / "tensorboard"))

    def track(step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return track


def _wandb(output_dir: Path) -> Callable[[int, Mapping[str, float]], None]:
    run = _module("wandb", "wandb").init(dir=str(output_dir), name=output_dir.name)
    return lambda step, numbers: run.log(dict(numbers), step=step)


def _trackio(output_dir: Path) -> Callable[[int, Mapping[str, float]], None]:
    trackio = _module("trackio", "trackio")
    trackio.init(project="dsalign", name=output_dir.name)
    return lambda step, numbers: trackio.log(dict(numbers), step=step)


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
