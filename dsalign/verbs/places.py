"""The folder that a user's word for a model means. Imports no torch."""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from dsalign.checkpoint import run_folders
from dsalign.config import reach_hub
from dsalign.config.model_folders import problems, refuse_no_model
from dsalign.config.parse import ConfigError
from dsalign.data.rows.registry import REGISTERED

logger = logging.getLogger(__name__)
BASE = "base"  # the value of --vs that stands for what the first model was trained from


def model_of(name: str) -> str:
    """The model that a name means: of a run's folder its final/, or where it has none its newest checkpoint, which a
    line says; any other name as it is.

    Raises ValueError for the folder of a run with neither, and for a path where nothing is, or no model.
    """
    folder = Path(name).expanduser()
    if not folder.exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"model: there is no folder {name}; expected a folder, a hub name or a short name")
    if not (folder / run_folders.CONFIG).is_file() or (folder / "config.json").exists():
        if folder.exists():
            refuse_no_model(folder)
        return name
    if (folder / "final").is_dir():
        return str(folder / "final")
    kept = run_folders.newest_first(folder)
    if not kept:
        raise ValueError(
            f"model: expected final/ or checkpoint-N/ in the run {folder}, got neither; go on with it: dsalign resume "
            f"{shlex.quote(str(folder))}"
        )
    logger.warning("%s has no final/: its newest checkpoint, %s, is taken", folder, kept[0].name)
    return str(kept[0])


def of_run(folder: str, option: str) -> str | None:
    """What config.yaml of the run of a folder (final/ or checkpoint-N/) has for an option that is text, such as model;
    None where there is none."""
    file = Path(folder).absolute().parent / run_folders.CONFIG
    if not file.is_file():
        return None
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    value = found.get(option) if isinstance(found, dict) else None
    return value if isinstance(value, str) else None


def data_sets() -> dict[str, str]:
    """Short name of a data set -> its name on the hub."""
    return {name: known.hub_name for name, known in REGISTERED.items()}


def ask_the_hub(models: Mapping[str, str | None], more: Sequence[reach_hub.Needed] = ()) -> None:
    """Ask once whether the hub is there, if a model needs it. models: option -> name, None = not given; the base of
    --vs is known only later. more: what else is needed.

    Raises ConfigError, a line for each name that cannot be had, where it cannot be reached, and for each folder that
    lacks a part of a model.
    """
    names = {option: name and model_of(name) for option, name in models.items() if (option, name) != ("vs", BASE)}
    folders = {option: Path(name).expanduser() for option, name in names.items() if name}
    found = [(option, one) for option, folder in folders.items() for one in problems(folder, tokenizer=False)]
    if found:
        raise ConfigError([f"{option}: {problem}" for option, problem in found])
    if line := reach_hub.ready_for([*reach_hub.of_models(names), *more], data_sets()):
        print(f"dsalign: {line}", file=sys.stderr)


def work(module: str) -> Any:
    """A module of this folder that imports torch, without the libraries' remarks while they are imported."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    logging.disable(logging.WARNING)
    try:
        return importlib.import_module(f"dsalign.verbs.{module}")
    finally:
        logging.disable(logging.NOTSET)
