"""The command: argv and the environment become a configuration and a process, which `run` trains.

The only reader of argv, RANK, LOCAL_RANK and WORLD_SIZE. Exit codes: 0 done, 2 configuration or data, 130 interrupted.
"""

from __future__ import annotations

import importlib
import logging
import os
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from dsalign import __version__
from dsalign.config import lazy

with lazy.put_off("torch"):  # algorithm files name torch at their top, but only their methods use it
    from dsalign import launcher
    from dsalign.config import flags, help, parse

PACKAGE = Path(__file__).parent


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. argv: the words behind the program's name, by default sys.argv's."""
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except parse.ConfigError as error:
        if os.environ.get("RANK", "0") == "0":  # every rank finds the same; one says it
            _say(f"error: {len(error.problems)} problem(s)", *error.problems)
        return 2
    except ValueError as error:
        if type(error).__name__ != "ElsewhereError":  # another rank says it; its class is behind the import of torch
            _say(f"error: {_rank()}{error}", *_place(error))
        return 2
    except BrokenPipeError:  # `--print_config | head` has seen enough; without this Python complains once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _main(argv: Sequence[str]) -> int:
    if argv[:1] == ["data"]:
        with lazy.put_off("torch"):
            verb = importlib.import_module("dsalign.verbs.data")
            request = verb.read(argv[1:])
        return int(verb.run(request))
    env = dict(os.environ)
    env["MASTER_PORT"] = env.get("MASTER_PORT") or str(launcher.free_port())
    with lazy.put_off("torch"):
        command = flags.split(argv, parse.ALIASES)
        if command.asks("version"):
            print(f"dsalign {__version__}")
            return 0
        if command.asks("help"):
            print(help.help_text(command))
            return 0
        parsed, launch = _configure(argv, env)
    if parsed.print_config:
        if env.get("RANK", "0") == "0":
            print(parsed.describe())
        return 0
    if launch:
        sys.stderr.flush()
        os.execv(launch.command[0], launch.command)
    if "RANK" not in env:
        os.environ.update(launcher.alone(env))
    process = launcher.process(os.environ)
    # Not at the top of the file: it imports torch, deepspeed and transformers, which take longer than a typo may.
    logging.disable(logging.WARNING)  # the libraries' remarks while they are imported; run sets levels after it
    run = importlib.import_module("dsalign.verbs.train")
    logging.disable(logging.NOTSET)
    run.train(parsed.config, process, shlex.join([sys.argv[0], *argv]))
    return 0


def _configure(argv: Sequence[str], env: Mapping[str, str]) -> tuple[parse.Parsed, launcher.Launch | None]:
    """The configuration, and the processes to start with it if not this one."""
    parsed = parse.parse(argv, world_size=launcher.ranks(env, 0))
    if "RANK" in env:
        return parsed, None
    devices = launcher.visible_devices(env)  # only now, as asking the driver may take seconds
    parsed = parse.parse(argv, world_size=launcher.ranks(env, devices))
    launch = launcher.planned_launch(env, devices, parsed, sys.argv[0])
    if launch is None:
        return parsed, None
    if launch.note:
        _say(launch.note)
    return parse.parse(launch.arguments, world_size=launch.ranks), launch


def _say(first: str, *more: str) -> None:
    print("\n".join([f"dsalign: {first}", *(f"  {line}" for line in more)]), file=sys.stderr)


def _rank() -> str:
    """Which rank speaks, where there are several."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return f"rank {os.environ.get('RANK', '?')}: " if several else ""


def _place(error: ValueError) -> list[str]:
    """Where an error comes from, if from a library: then it may be a fault rather than a wrong option."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    inside = Path(frame.filename).is_relative_to(PACKAGE)
    return [] if inside else [f"raised at {frame.filename}:{frame.lineno} in {frame.name}"]


if __name__ == "__main__":
    sys.exit(main())
