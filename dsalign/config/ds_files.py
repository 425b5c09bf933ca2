"""The DeepSpeed configurations that come with dsalign, by name, and those of the user, by path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dsalign.config import ds_keys

_PACKAGE = Path(__file__).resolve().parent.parent
FOLDER = next(p / "ds_configs" for p in (_PACKAGE, _PACKAGE.parent) if (p / "ds_configs").is_dir())  # wheel, checkout


def names() -> tuple[str, ...]:
    """The names of those that come with dsalign: zero0 to zero3, and variants with off-loading."""
    return tuple(sorted(p.stem for p in FOLDER.glob("*.json")))


def find(name: str) -> Path:
    """The file of a configuration. name: one of `names()`, or a path.

    Raises ValueError where it is neither.
    """
    if name in names():
        return FOLDER / f"{name}.json"
    if Path(name).expanduser().is_file():
        return Path(name).expanduser()
    raise ValueError(f"deepspeed: expected one of {', '.join(names())} or a JSON file, got {name!r}")


def settings(name: str) -> dict[str, Any]:
    """A configuration as a dictionary, as it stands in its file. name: one of `names()`, or a path.

    Raises ValueError where there is no such file, or it holds no JSON object or a key twice.
    """
    path = find(name)
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except OSError as error:
        raise ValueError(f"deepspeed: {path}: expected a file that can be read, got {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"deepspeed: {path}:{error.lineno}: expected JSON, got {error.msg}") from None
    except UnicodeDecodeError:
        raise ValueError(f"deepspeed: {path}: expected JSON, got no UTF-8 text") from None
    except RecursionError:
        raise ValueError(f"deepspeed: {path}: expected a DeepSpeed file, got JSON nested too deeply") from None
    except _TwiceError as error:
        raise ValueError(f"deepspeed: {path}: expected each key once, got {error} twice; keep one of them") from None
    if not isinstance(settings, dict):
        raise ValueError(f"deepspeed: {path} must hold a JSON object, got {type(settings).__name__}")
    return settings


class _TwiceError(Exception):
    """The signal that a JSON object has a key twice, of which json would keep the last."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        raise _TwiceError(next(key for key in keys if keys.count(key) > 1))
    return dict(pairs)


def problems(name: str) -> list[str]:
    """A line for each fault of a configuration, "FILE: KEY: what was expected"; empty where DeepSpeed can be given it.

    Raises nothing: a file that cannot be read is one of the faults.
    """
    try:
        return [f"{find(name)}: {line}" for line in ds_keys.wrong(settings(name))]
    except ValueError as error:
        return [str(error).removeprefix("deepspeed: ")]


def read(name: str) -> dict[str, Any]:
    """The configuration with this name or path as DeepSpeed is given it: without "auto", which stands for the flag's
    value or DeepSpeed's own, and without the section hybrid_engine, which is ours.

    Raises ValueError with every fault that `problems` finds.
    """
    if found := problems(name):
        raise ValueError("deepspeed: " + "\n".join(found))
    return {key: value for key, value in ds_keys.without_auto(settings(name)).items() if key != "hybrid_engine"}


def unused(name: str) -> list[str]:
    """The keys of a configuration that every run sets itself, where the file asks for another value, and those of the
    hybrid engine beside `enabled`, which are DeepSpeed's."""
    whole = settings(name)
    section = whole.get("hybrid_engine", {})
    return [key for key, value in whole.items() if key in ds_keys.UNUSED and value != ds_keys.UNUSED[key]] + [
        f"hybrid_engine.{key}" for key in section if key not in ("enabled", "inference_tp_size")
    ]


def hybrid(name: str) -> bool:
    """Whether a configuration asks for the hybrid engine: rollouts through DeepSpeed's interface, by our own sampling.

    Raises ValueError as `settings` does.
    """
    section = settings(name).get("hybrid_engine", {})
    return isinstance(section, dict) and section.get("enabled", False) is True
