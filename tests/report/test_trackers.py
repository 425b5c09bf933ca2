"""TensorBoard, Weights & Biases and trackio, for which packages stand that note what they are told."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsalign.report.trackers import TRACKERS


def fake_trackers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Three packages that note what they are asked to do."""
    calls: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            calls.append(("tensorboard", Path(folder).name))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append(("tensorboard", name, value, step))

        def flush(self) -> None:
            calls.append(("tensorboard", "flush"))

    def note(package: str) -> SimpleNamespace:
        log = lambda numbers, step: calls.append((package, numbers, step))  # noqa: E731

        def init(**options: str) -> SimpleNamespace:
            calls.append((package, {k: Path(v).name for k, v in options.items()}))
            return SimpleNamespace(log=log)

        return SimpleNamespace(init=init, log=log)

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    for package in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, package, note(package))
    return calls


def test_trackers_get_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is called after its folder."""
    calls = fake_trackers(monkeypatch)
    for name in ("tensorboard", "wandb", "trackio"):
        TRACKERS[name](tmp_path / "run7")(3, {"loss": 0.5})
    assert calls == [
        ("tensorboard", "tensorboard"),
        ("tensorboard", "loss", 0.5, 3),
        ("tensorboard", "flush"),
        ("wandb", {"dir": "run7", "name": "run7"}),
        ("wandb", {"loss": 0.5}, 3),
        ("trackio", {"project": "dsalign", "name": "run7"}),
        ("trackio", {"loss": 0.5}, 3),
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named_with_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(ValueError, match=rf"^report_to: {name} is not installed; run pip install dsalign\[{name}\]$"):
        TRACKERS[name](tmp_path)
