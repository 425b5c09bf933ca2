"""The commands of dsalign, each a verb in a file of that name, found as algorithms are.

A verb is a file of this folder with SUMMARY, its line in `dsalign --help`. `train` is what a command without a verb is.
Any other verb has either

- `read(words) -> request` and `run(request) -> exit code`: a program of its own, which with ALONE = True is a group of
  one rank; or
- `words(words, world_size) -> words`: it stands for a training command, whose words it returns. world_size: the number
  of ranks that will run.

words: what follows the verb, flags and all. Such a file imports neither torch nor what imports it before `run`.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from dsalign.config.flags import TRAIN_VERBS, nearest
from dsalign.config.parse import ConfigError

FOLDER = Path(__file__).parent


def summaries() -> dict[str, str]:
    """Verb -> its line of help, sorted; no file is imported for it."""
    found = ((path.stem, _summary(path)) for path in sorted(FOLDER.glob("[a-z]*.py")))
    return {name: text for name, text in found if text}


def _summary(path: Path) -> str:
    """The text of SUMMARY, which is one line, in a file of this folder; empty where it has none."""
    line = path.read_text(encoding="utf-8").partition("\nSUMMARY = ")[2].partition("\n")[0]
    return str(ast.literal_eval(line)) if line else ""  # the line alone: parsing whole files takes time


def of(words: Sequence[str]) -> str:
    """The verb that the first of a command's words names, empty for a training: train, another trainer's word for it,
    or none. Raises ConfigError where it names none."""
    first = "".join(words[:1])
    if not first or first in TRAIN_VERBS:
        return ""
    known = summaries()
    if first not in known:
        raise ConfigError([_unknown(first, [*known, *TRAIN_VERBS])])
    return first


def _unknown(word: str, known: Collection[str]) -> str:
    names = sorted(set(known))
    advice = nearest(word, names) or "; write options as --name value, files as --config FILE"
    return f"command: expected one of {', '.join(names)}, got {word!r}{advice}"


def load(verb: str) -> Any:
    """The module of a verb that `of` returned."""
    return importlib.import_module(f"{__name__}.{verb}")
