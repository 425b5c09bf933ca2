"""The command `dsalign check`: everything that a run needs, looked at before it starts, and one step of a tiny model of
the same family on its longest rows. No GPU is used."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsalign.config import parse as config
from dsalign.config.schema import RunConfig
from dsalign.verbs import arguments, lines, plan

SUMMARY = "all that a run needs, looked at before it starts, and one step of a tiny model; no GPU"
USAGE = """usage: dsalign check --algo NAME [options of a run] [--gpus N] [--gpu_memory GIB] [--no_step] [--json]

Looks at configuration, DeepSpeed file, models' configs, template, end tokens, data, rewards, memory, output folder and
disk, then takes one step on the longest rows with a tiny model of the same family, on the CPU.

  --gpus N, --gpu_memory GIB   the machine for which memory is estimated, as of dsalign plan [8 of 80]
  --no_step                    leave out the step, which takes most of the time
  --json                       one JSON object on standard output in place of text

All options of a run are read, from flags and --config files: dsalign --algo NAME --help lists them. The exit code is 2
where something is an error."""
ALONE = True  # one rank of a group of its own, which cli.py makes ready
HIDING = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}  # a step on the CPU, whatever there is


@dataclass(frozen=True)
class Request:
    """A `dsalign check` command, parsed. planned: the same run as `dsalign plan` takes it; None where its options have
    problems. step: whether a step is taken."""

    config: RunConfig | None
    planned: plan.Request | None
    step: bool
    as_json: bool
    problems: tuple[str, ...] = ()


def read(argv: Sequence[str]) -> Request | None:
    """The request that `dsalign check ARGV` makes; None for a request of help.

    Raises ValueError for a wrong number. Options of a run that cannot be read are problems of the request.
    """
    own = arguments.parser("check")
    own.add_argument("--json", action="store_true")
    own.add_argument("--no_step", "--no-step", action="store_true")
    asked, rest = own.parse_known_args(list(argv))
    try:
        planned = plan.read(rest)
        if planned is None:
            return None
        parsed = config.parse(plan.without_machine(rest), world_size=planned.machine.gpus)
    except config.ConfigError as error:
        return Request(None, None, False, asked.json, tuple(error.problems))
    return Request(parsed.config, planned, not asked.no_step, asked.json)


def run(request: Request | None) -> int:
    """Look at everything and print it; None prints the usage. Returns the exit code: 0, or 2 where something is an
    error."""
    if request is None:
        print(USAGE)
        return 0
    if request.config is None or request.planned is None:
        wrong = [lines.Line("configuration", lines.ERROR, one) for one in request.problems]
        return lines.answer(wrong, as_json=request.as_json)
    before = {name: os.environ.get(name) for name in HIDING}
    os.environ.update(HIDING)
    try:
        # Not at the top of the file: torch takes longer to import than a typo may.
        checked: Any = importlib.import_module("dsalign.verbs.checked")
        found = checked.checked(request.config, request.planned, step=request.step)
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
    return lines.answer(found, as_json=request.as_json)
