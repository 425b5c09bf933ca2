"""Options that name a folder or a file, made independent of the working directory: a run's config.yaml is read from
anywhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsalign import assets
from dsalign.config import ds_files
from dsalign.config.file_rules import TEMPLATES, is_there, without_count

FOLDERS = ("model", "ref_model", "ref_model_type", "reward_model", "reward_model_type")


def anchored(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run, name -> value, in which each path that there is is absolute; names of other things, as on a
    hub, stay. A name means a path by the same rule as where it is read."""
    found = dict(options)
    for name in FOLDERS:
        if options.get(name) and Path(options[name]).expanduser().exists():
            found[name] = _absolute(options[name])
    for name in ("dataset", "val_dataset"):
        found[name] = tuple(map(_of_data, options[name]))
    if options["deepspeed"] not in ds_files.names():
        found["deepspeed"] = _absolute(options["deepspeed"])
    if options["template"] and options["template"] not in TEMPLATES:
        found["template"] = _absolute(options["template"])
    found["reward_funcs"] = tuple(
        name if name.startswith(assets.DEMO) else f"{_absolute(name.rpartition(':')[0])}:{name.rpartition(':')[2]}"
        for name in options["reward_funcs"]
    )
    for name in ("output_dir", "vllm_folder"):
        if options.get(name):
            found[name] = _absolute(options[name])
    if options["resume"] and Path(options["resume"]).expanduser().is_dir():
        found["resume"] = _absolute(options["resume"])
    return found


def _of_data(source: str) -> str:
    path = without_count(source)
    return _absolute(path) + source[len(path) :] if is_there(path) else source


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))
