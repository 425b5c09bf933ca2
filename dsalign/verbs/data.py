"""The commands `dsalign data check` and `dsalign data show`: a data set as a run would see it, without a run."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsalign.config import flags
from dsalign.config import parse as config
from dsalign.config.schema import RunConfig
from dsalign.verbs import arguments, preflight

SUMMARY = "what a data set is to a run: dsalign data check|show"
USAGE = """usage: dsalign data check|show --algo NAME [options of a run] [--json] [--n N] [--ids]

  check   rows kept, dropped and cut, lengths, and what is wrong with them, those of --val_dataset as well; exit code 2
          where something is
  show    rows as the model gets them: which tokens are prompt, which are learnt from
  --json  one JSON object on standard output in place of text
  --n N   rows to show [3]
  --ids   token ids beside the text

All options of a run are read, from flags and --config files: dsalign --algo NAME --help lists them."""
VERBS = ("check", "show")


@dataclass(frozen=True)
class Request:
    """A `dsalign data` command, parsed. verb: check or show. ids: whether token ids are shown. n: rows to show."""

    verb: str
    config: RunConfig
    as_json: bool
    ids: bool
    n: int


def read(argv: Sequence[str]) -> Request | None:
    """The request that `dsalign data ARGV` makes; None for a request of help.

    Raises ConfigError for options of a run that cannot be read, ValueError for an unknown verb or a wrong --n.
    """
    own = arguments.parser("data")
    own.add_argument("--json", action="store_true")
    own.add_argument("--ids", action="store_true")
    own.add_argument("--n", default="3")
    asked, rest = own.parse_known_args(list(argv))
    if "--help" in rest or "-h" in rest:
        return None
    verb, *options = rest or [""]
    if verb not in VERBS:
        advice = flags.nearest(verb, VERBS) or "; see dsalign data --help"
        raise ValueError(f"data: expected one of {', '.join(VERBS)}, got {repr(verb) if verb else 'none'}{advice}")
    if not asked.n.isdecimal() or int(asked.n) < 1:
        raise ValueError(f"--n: expected a whole number >= 1, got {asked.n!r}; write --n 3")
    return Request(verb, config.parse(options, world_size=1).config, asked.json, asked.ids, int(asked.n))


def run(request: Request | None) -> int:
    """Carry out a request; None prints the usage. Returns the exit code: 0, or 2 where `check` finds an error.

    Raises ValueError for a data set with no usable row.
    """
    if request is None:
        print(USAGE)
        return 0
    if line := preflight.ask_the_hub(request.config):
        print(f"dsalign: {line}", file=sys.stderr)
    # Not at the top of the file: transformers takes longer to import than a typo may.
    data_report: Any = importlib.import_module("dsalign.verbs.data_report")
    if request.verb == "show":
        data_report.show(request.config, count=request.n, as_json=request.as_json, ids=request.ids)
        return 0
    trained, *held = data_report.examine(request.config)
    if request.as_json:
        evaluated = {"val_dataset": held[0].as_json()} if held else {}
        print(json.dumps(trained.as_json() | evaluated, ensure_ascii=False))
    else:
        print("\n".join(one.text() for one in (trained, *held)))
    return 2 if any(one.has_errors() for one in (trained, *held)) else 0
