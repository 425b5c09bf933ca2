"""The command `dsalign replay`: a step that a run skipped, computed again on one process, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsalign.config import parse as config
from dsalign.config.schema import RunConfig
from dsalign.endings import DIVERGED, DONE
from dsalign.verbs import arguments, places

SUMMARY = "compute a skipped step again and name where its first number that is not finite comes from"
USAGE = """usage: dsalign replay RUN/bad/step-N [--model FOLDER]

  Computes a step that a run skipped, as a loss or a gradient was not finite, once more: row by row, in float32, on one
  process, with the weights of the run's newest checkpoint. Of each row it prints the first number that is not finite:
  the module whose output it is, the completion, the position in it and the token.

  --model FOLDER  other weights: a checkpoint-N/, final/ or any model of this architecture

Exit code 0 where all rows are finite, 76 where one is not."""


@dataclass(frozen=True)
class Request:
    """A `dsalign replay` command, parsed. folder: RUN/bad/step-N. config: the run's. model: other weights, or None."""

    folder: Path
    config: RunConfig
    model: str | None


def read(argv: Sequence[str]) -> Request | None:
    """The request that `dsalign replay ARGV` makes; None for a request of help.

    Raises ValueError where the folder is not one of a run, ConfigError where the run's config.yaml cannot be read.
    """
    own = arguments.parser("replay")
    own.add_argument("--model")
    asked, rest = own.parse_known_args(list(argv))
    if "--help" in rest or "-h" in rest:
        return None
    if len(rest) != 1:
        given = " ".join(rest) or "none"
        raise ValueError(f"replay: expected one folder, RUN/bad/step-N, and --model at most, got {given}")
    folder = rest[0]
    path = Path(folder).expanduser()
    settings = path.absolute().parent.parent / "config.yaml"
    if not path.is_dir() or not settings.is_file():
        missing = settings if path.is_dir() else path
        raise ValueError(f"replay: expected RUN/bad/step-N of a run, got {folder}, but no {missing}; check the path")
    return Request(path, config.parse(["--config", str(settings)], world_size=1).config, asked.model)


def run(request: Request | None) -> int:
    """Carry out a request; None prints the usage. Returns the exit code: 0, or 76 where a number is not finite.

    Raises ValueError where the step or a model cannot be read.
    """
    if request is None:
        print(USAGE)
        return DONE
    again: Any = places.work("replayed")  # not at the top: transformers takes longer to import than a typo may
    lines, finite = again.replayed(request.folder, request.config, request.model)
    print("\n".join(lines))
    return DONE if finite else DIVERGED
