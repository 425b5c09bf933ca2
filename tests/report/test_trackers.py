"""TensorBoard, Weights & Biases and trackio, for which packages stand that note what they are told."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dsalign.report.trackers import TRACKERS


def fake_trackers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Three packages, and pandas, that note what they are asked to do."""
    calls: list[tuple[Any, ...]] = []

    class Noting:
        """Something of which every method notes its call under `name`."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, method: str) -> Any:
            return lambda *args, **options: calls.append((self._name, method, *args, options))

    def noting(package: str) -> SimpleNamespace:
        run = Noting(package)
        run.config = SimpleNamespace(update=run.update)  # type: ignore[attr-defined]

        def init(**options: Any) -> Noting:
            calls.append(
                (package, "init", {k: Path(v).name if k in ("dir", "name") else v for k, v in options.items()})
            )
            return run

        table = lambda **of: ("table", *of.values())  # noqa: E731
        return SimpleNamespace(init=init, log=run.log, finish=run.finish, Table=table)

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda folder: Noting("tensorboard"))
    )
    frame = lambda data, columns: (columns, data)  # noqa: E731
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=frame))
    for package in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, package, noting(package))
    return calls


def tell(name: str, folder: Path) -> None:
    """Tell a tracker of a run from its beginning to its end."""
    tracker = TRACKERS[name](folder)
    tracker.settings({"beta": 0.1})
    tracker.numbers(3, {"loss": 0.5})
    tracker.samples(3, [{"prompt": "p", "completion": "c", "score": 1.0}])
    tracker.finish()


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text is indented, so that Markdown leaves it as it is."""
    calls = fake_trackers(monkeypatch)
    tell("tensorboard", tmp_path / "run7")
    sample = '    {\n      "prompt": "p",\n      "completion": "c",\n      "score": 1.0\n    }'
    assert calls == [
        ("tensorboard", "add_text", "settings", "    beta: 0.1", 0, {}),
        ("tensorboard", "add_scalar", "loss", 0.5, 3, {}),
        ("tensorboard", "flush", {}),
        ("tensorboard", "add_text", "sample 0", sample, 3, {}),
        ("tensorboard", "close", {}),
    ]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is called after its folder."""
    calls = fake_trackers(monkeypatch)
    tell("wandb", tmp_path / "run7")
    table = ("table", ["prompt", "completion", "score"], [["p", "c", 1.0]])
    assert calls == [
        ("wandb", "init", {"project": "dsalign", "dir": "run7", "name": "run7"}),
        ("wandb", "update", {"beta": 0.1}, {"allow_val_change": True}),
        ("wandb", "log", {"loss": 0.5}, {"step": 3}),
        ("wandb", "log", {"samples": table}, {"step": 3}),
        ("wandb", "finish", {}),
    ]


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes settings when it begins, and a table as a frame."""
    calls = fake_trackers(monkeypatch)
    tell("trackio", tmp_path / "run7")
    table = ("table", (["prompt", "completion", "score"], [["p", "c", 1.0]]))
    assert calls == [
        ("trackio", "init", {"project": "dsalign", "name": "run7", "config": {"beta": 0.1}}),
        ("trackio", "log", {"loss": 0.5}, {"step": 3}),
        ("trackio", "log", {"samples": table}, {"step": 3}),
        ("trackio", "finish", {}),
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_is_named_with_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if name == "tensorboard" else name, None)
    with pytest.raises(ValueError, match=rf"^report_to: {name} is not installed; run pip install dsalign\[{name}\]$"):
        TRACKERS[name](tmp_path)
