"""The folder that a user's word for a model means. Imports no torch."""

from __future__ import annotations

import logging
from pathlib import Path

import yaml

from dsalign.checkpoint import run_folders

logger = logging.getLogger(__name__)


def model_of(name: str) -> str:
    """The model that a name means: of a run's folder its final/, or where it has none its newest checkpoint, which a
    line says; any other name as it is.

    Raises ValueError for the folder of a run with neither.
    """
    folder = Path(name).expanduser()
    if not (folder / run_folders.CONFIG).is_file() or (folder / "config.json").exists():
        return name
    if (folder / "final").is_dir():
        return str(folder / "final")
    kept = run_folders.newest_first(folder)
    if not kept:
        raise ValueError(
            f"model: expected final/ or checkpoint-N/ in the run {folder}, got neither; go on with it: dsalign resume "
            f"{folder}"
        )
    logger.warning("%s has no final/: its newest checkpoint, %s, is taken", folder, kept[0].name)
    return str(kept[0])


def trained_from(folder: str) -> str | None:
    """The model that the run of a folder (final/ or checkpoint-N/) was started from, by its config.yaml; None where
    there is none."""
    file = Path(folder).absolute().parent / run_folders.CONFIG
    if not file.is_file():
        return None
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    model = found.get("model") if isinstance(found, dict) else None
    return model if isinstance(model, str) else None
