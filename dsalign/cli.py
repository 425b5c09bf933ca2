"""The command: argv and the environment become a configuration and a process, which `run` trains.

The only reader of argv, RANK, LOCAL_RANK and WORLD_SIZE. Exit codes are those of endings.py.
"""

from __future__ import annotations

import errno
import hashlib
import importlib
import logging
import os
import shlex
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from dsalign import __version__, endings
from dsalign.config import lazy

with lazy.put_off("torch"):  # algorithm files name torch at their top, but only their methods use it
    from dsalign import launcher, ranks, verbs
    from dsalign.config import flags, help, parse
    from dsalign.report import screen

PACKAGE = Path(__file__).parent
SET = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # for the libraries
LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"
# What the system says of a path that a user gave, where no other message was faster.
UNUSABLE = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ELOOP, errno.EISDIR, errno.ENOTDIR)
LONGEST = 200  # characters of a path that a message repeats
WAIT_S = 2.0  # a launcher ends the other ranks sooner where rank 0 failed


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. argv: the words behind the program's name, by default sys.argv's.

    The environment is as before when it returns, so that a second run in one Python process starts as the first did.
    """
    before = {name: os.environ.get(name) for name in (*SET, LOG_LEVEL)}
    try:
        return _main(sys.argv[1:] if argv is None else argv, typed=argv is None)
    except parse.ConfigError as error:
        _say_once(f"error: {len(error.problems)} problem(s)", *error.problems)
        return endings.INPUT
    except ValueError as error:
        if type(error).__name__ != "ElsewhereError":  # another rank says it; its class is behind the import of torch
            _say(f"error: {_rank()}{error}", *_place(error))
        return int(getattr(error, "code", endings.INPUT))
    except endings.Ending as ending:
        if str(ending):  # else it is said: by guard/watchdog.py, or by another rank
            _say_once(*str(ending).splitlines())
        return ending.code
    except BrokenPipeError:  # `--print_config | head` has seen enough; without this Python complains once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return endings.DONE
    except KeyboardInterrupt:
        return endings.INTERRUPTED
    except Exception as error:
        if isinstance(error, OSError) and error.errno in UNUSABLE and error.filename:
            shown = f"{_rank()}{str(error.filename)[:LONGEST]}"
            _say(f"error: {shown}: expected a path that can be used, got: {error.strerror}; check it", *_place(error))
            return endings.INPUT
        traceback.print_exc()  # a fault of this program or of a library: Python's own exit code, 1, would say less
        return endings.FAULT
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _main(given: Sequence[str], typed: bool) -> int:
    """typed: whether `given` are the words behind this process's own program."""
    env = dict(os.environ)
    with lazy.put_off("torch"):
        command = flags.split(given, parse.ALIASES)
        verb = verbs.of(command.words)
        if verb and not hasattr(module := verbs.load(verb), "words"):
            request = module.read(command.without(())[1:])
    if verb and not hasattr(module, "words"):
        os.environ.update(launcher.alone(env) if hasattr(module, "ALONE") else {})
        return int(module.run(request))
    with lazy.put_off("torch"):
        if command.asks("version"):
            print(f"dsalign {__version__}")
            return 0
        if command.asks("help"):
            print(module.USAGE if verb else help.help_text(command, verbs.summaries()))
            return 0
        env |= ranks.variables(env)
        if "RANK" not in env:
            port, line = launcher.port_of_our_own(env)
            env["MASTER_PORT"] = str(port)
        argv = module.words(command.without(())[1:], launcher.ranks(env, 0)) if verb else given
        parsed, launch = _configure(argv, env)
    if parsed.print_config:
        if env.get("RANK", "0") == "0":
            print(parsed.describe())
        return 0
    if "RANK" not in env:
        if line:
            _say(line)
        os.environ["MASTER_PORT"] = env["MASTER_PORT"]
        env |= {} if launch else launcher.alone(env)
    os.environ.update({name: env[name] for name in SET if name in env})
    lazy.required("torch")
    preflight = importlib.import_module("dsalign.verbs.preflight")
    preflight.check_resume(parsed.config, launch.ranks if launch else ranks.process(env).world_size)
    preflight.look(parsed.config)
    if env.get("RANK", "0") == "0":
        for stand_in in preflight.stand_ins(parsed):
            _say(stand_in)
    started = shlex.join([sys.argv[0], *given])
    if typed:
        started = preflight.typed(started, env)
    if launch:
        preflight.load_rewards(parsed.config)
        _ask_the_hub(parsed.config)
        sys.stderr.flush()
        count = [f"NPROC_PER_NODE={env['NPROC_PER_NODE']}"] if env.get("NPROC_PER_NODE") else []
        os.environ[preflight.STARTED_AS] = " ".join([*count, started])
        os.execve(launch.command[0], launch.command, launcher.environment(os.environ, sys.argv[0]))
    _train(parsed, ranks.process(env), started)
    return endings.DONE


def _train(parsed: parse.Parsed, process: ranks.Process, started: str) -> None:
    """Train as this process. started: the command, as it was typed."""
    preflight = importlib.import_module("dsalign.verbs.preflight")
    alone = process.world_size == 1
    ready = preflight.ready(parsed.config) if alone else nullcontext()
    with preflight.listening(started, alone=alone), ready, screen.opened(process.rank):
        _ask_the_hub(parsed.config)
        screen.stage("importing torch, DeepSpeed and transformers")
        # Not at the top of the file: it imports torch, deepspeed and transformers, which take longer than a typo may.
        os.environ.setdefault(LOG_LEVEL, "ERROR")  # else the stacks of broken connections hide what broke them
        logging.disable(logging.WARNING)  # the libraries' remarks while they are imported; run sets levels after it
        run = importlib.import_module("dsalign.verbs.train")
        logging.disable(logging.NOTSET)
        run.train(parsed.config, process, started, parsed.origins)


def _ask_the_hub(config: Any) -> None:
    """Say, or raise, what one question to the hub found, where names on it are needed."""
    line = importlib.import_module("dsalign.verbs.preflight").ask_the_hub(config)
    if line and os.environ.get("RANK", "0") == "0":
        _say(line)


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
    with suppress(OSError):  # nobody reads it any more; the exit code is still right
        print("\n".join([f"dsalign: {first}", *(f"  {line}" for line in more)]), file=sys.stderr, flush=True)


def _say_once(first: str, *more: str) -> None:
    """Say what every rank finds alike once a machine: rank 0 at once, another rank only where no rank there has said it
    within WAIT_S, as where this machine alone lacks a file."""
    rank = os.environ.get("RANK", "0")
    text = "\n".join((str(os.getppid()), first, *more))
    mark = Path(tempfile.gettempdir(), f"dsalign-said-{hashlib.sha256(text.encode()).hexdigest()[:16]}")
    if rank == "0":
        if os.environ.get("WORLD_SIZE", "1") != "1":
            mark.touch()
        _say(first, *more)
        return
    until = time.monotonic() + WAIT_S
    while not mark.exists() and time.monotonic() < until:
        time.sleep(0.05)
    if not mark.exists():
        mark.touch()
        _say(f"rank {rank} on {socket.gethostname()}: {first}", *more)


def _rank() -> str:
    """Which rank speaks, where there are several."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return f"rank {os.environ.get('RANK', '?')}: " if several else ""


def _place(error: ValueError | OSError) -> list[str]:
    """Where an error comes from, if from a library: then it may be a fault rather than a wrong option."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    inside = Path(frame.filename).is_relative_to(PACKAGE)
    return [] if inside else [f"raised at {frame.filename}:{frame.lineno} in {frame.name}"]


if __name__ == "__main__":
    sys.exit(main())
