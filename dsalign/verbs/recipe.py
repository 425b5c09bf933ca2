"""The command `dsalign recipe FILE.yaml`: several trainings one after another, each a command of its own, where a later
one starts from the models of earlier ones."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dsalign import ranks
from dsalign.config import flags, parse, paths
from dsalign.endings import DONE, RESUMABLE

SUMMARY = "SFT, a reward model and PPO, or any such stages, from one YAML: dsalign recipe FILE.yaml"
USAGE = """usage: dsalign recipe FILE.yaml [--dry_run] [--name value ...] [--STAGE.name value ...]

  FILE.yaml           output_dir, a list `stages`, and options that every stage has unless it sets them itself:

                        output_dir: output/recipe
                        model: MODEL
                        stages:
                          - {name: sft, algo: sft, dataset: demonstrations.jsonl}
                          - {name: rm, algo: rm, model: "@sft", dataset: pairs.jsonl}
                          - {name: ppo, algo: ppo, model: "@sft", reward_model: "@rm", dataset: prompts.jsonl}

                      "@sft" is the final/ of the stage sft, "@sft/checkpoint-10" another folder of its run
  --dry_run           print the commands and start none
  --name value        an option of every stage that does not set it itself
  --STAGE.name value  an option of one stage

Each stage has the folder output_dir/NAME and starts with --resume auto: given again, the command skips stages that are
done and goes on with the one that was stopped. It ends with the exit code of the stage that did not end well."""
OWN = ("name", "stages")  # keys of the file that are no options
NAME = re.compile(r"[a-z][a-z0-9_]*")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
PACKAGES = ("dsalign", "dsalign_kernels")
CLI = (sys.executable, "-m", "dsalign.cli")


@dataclass(frozen=True)
class Stage:
    """One training. folder: its --output_dir. words: its command without the program's name. given: the names of the
    options that the recipe sets."""

    name: str
    folder: Path
    words: tuple[str, ...]
    given: frozenset[str]

    @property
    def command(self) -> str:
        """The command as one would type it."""
        return shlex.join(["dsalign", *self.words])

    @property
    def is_done(self) -> bool:
        """Whether its model is written, which is the last thing that a run does."""
        return (self.folder / "final").is_dir()


@dataclass(frozen=True)
class Request:
    """A `dsalign recipe` command, parsed. dry: whether commands are only printed. typed: the words of the command."""

    stages: tuple[Stage, ...]
    dry: bool
    typed: tuple[str, ...]


def read(argv: Sequence[str]) -> Request | None:
    """The request that `dsalign recipe ARGV` makes; None for a request of help.

    Raises ValueError where the file is no recipe or a launcher started this process as one of several, ConfigError with
    the problems of all stages where their options cannot be read.
    """
    command = flags.split(argv, parse.ALIASES)
    if command.asks("help"):
        return None
    if len(command.words) != 1:
        raise ValueError(f"recipe: expected one YAML file, got {len(command.words)}; write dsalign recipe FILE.yaml")
    if ranks.variables(os.environ) or any(name in os.environ for name in ranks.LAUNCHED):
        raise ValueError(
            "recipe: expected to be started once, not as a task of a launcher: its stages start their own ranks; or "
            "run the commands of --dry_run with the launcher"
        )
    asked = [flag for flag in command.flags if flag.name != "dry_run"]
    stages = tuple(_stages(_load(command.words[0]), asked, command.words[0]))
    _check(stages)
    return Request(stages, command.asks("dry_run"), tuple(argv))


def _load(file: str) -> Mapping[str, Any]:
    """The mapping in a YAML file, scalars as their text. Raises ValueError where it is none."""
    try:
        found = yaml.load(Path(file).expanduser().read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except OSError as error:
        raise ValueError(
            f"recipe: expected a YAML file that can be read, got {file!r} ({error.strerror}); check the path"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"recipe: {file}: expected YAML, got a syntax error ({' '.join(str(error).split())}); put quotes around "
            'a stage\'s model: "@sft"'
        ) from None
    if not isinstance(found, Mapping) or not isinstance(found.get("stages"), list) or not found["stages"]:
        raise ValueError(f"recipe: {file}: expected a list called stages; see dsalign recipe --help")
    return found


def _stages(recipe: Mapping[str, Any], asked: Sequence[flags.Given], file: str) -> Iterator[Stage]:
    """The stages of a recipe with the options of the command over the file's. Raises ValueError for a stage without a
    name of its own, and for an option of a stage that is not there."""
    shared = {_known(key): value for key, value in recipe.items() if key not in OWN}
    shared |= {flag.name: list(_words(flag)) for flag in asked if "." not in flag.name}
    output = _one(shared.pop("output_dir", "output/recipe"))
    names: list[str] = []
    of_stage = {flag.name: list(_words(flag)) for flag in asked if "." in flag.name}
    for i, stage in enumerate(recipe["stages"]):
        name = stage.get("name") if isinstance(stage, Mapping) else None
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in names:
            raise ValueError(
                f"recipe: {file}: stages[{i}]: expected a name of its own in small letters, got {name!r}; write "
                "- name: sft"
            )
        own = {_known(key): value for key, value in stage.items() if key not in OWN}
        own |= {key.partition(".")[2]: of_stage.pop(key) for key in list(of_stage) if key.partition(".")[0] == name}
        folder = Path(output, name)
        wanted = {**shared, **own, "output_dir": str(folder), "resume": "auto"}
        options = {key: value for key, value in wanted.items() if value not in ("null", "~", "")}
        words = [word for key, value in options.items() for word in _flag(key, value, names, output, f"{file}: {name}")]
        names.append(name)
        yield Stage(name, folder, tuple(words), frozenset(options))
    if of_stage:
        raise ValueError(f"--{next(iter(of_stage))}: expected a stage of {', '.join(names)} in front of the point")


def _known(key: str) -> str:
    return parse.ALIASES.get(key, key)


def _words(flag: flags.Given) -> tuple[str, ...]:
    return flag.raw if isinstance(flag.raw, tuple) else ()


def _one(value: Any) -> str:
    return str(value[0]) if isinstance(value, list) and len(value) == 1 else str(value)


def _flag(key: str, value: Any, earlier: Sequence[str], output: str, where: str) -> list[str]:
    """The words of an option: `--key value ...`, with the folder of a stage in place of "@stage". Raises ValueError
    where that is no earlier one."""
    if isinstance(value, Mapping):
        values = [f"{theirs}={ours}" for theirs, ours in value.items()]
    else:
        values = [str(one) for one in (value if isinstance(value, list) else [value])]
    found = []
    for one in values:
        stage, slash, rest = one.removeprefix("@").partition("/")
        if one.startswith("@") and stage not in earlier:
            raise ValueError(
                f"recipe: {where}: {key}: expected @ and an earlier stage ({', '.join(earlier) or 'there is none'}), "
                f"got {one!r}"
            )
        found.append(str(Path(output, stage, rest if slash else "final")) if one.startswith("@") else one)
    return [f"--{key}", *found]


def _check(stages: Sequence[Stage]) -> None:
    """Raise ConfigError with the problems of all stages. A folder that an earlier stage is to write is not asked for,
    and that an earlier stage will be done."""
    problems = []
    coming = {str(stage.folder) for stage in stages}
    for stage in stages:
        words = [
            "recipe-stage/model" if any(word.startswith(f"{folder}/") for folder in coming) else word
            for word in stage.words
        ]
        try:
            parse.parse(words, world_size=1)
            if stage.is_done:
                problems += _changed(stage)
        except parse.ConfigError as error:
            problems += [f"stage {stage.name}: {line}" for line in error.problems]
    if problems:
        raise parse.ConfigError(problems)


def _changed(stage: Stage) -> list[str]:
    """A line for each option of the recipe with which a stage that is done did not run."""
    file = stage.folder / "config.yaml"
    if not file.is_file():
        return []
    ran = parse.parse(["--config", str(file)], world_size=1).config.options()
    asked = paths.anchored(parse.parse(stage.words, world_size=1).config.options())
    return [
        f"stage {stage.name}: it is done with {name} {ran[name]!r}, got {asked[name]!r}; name another output_dir, or "
        f"move {stage.folder} away to train it again"
        for name in sorted(stage.given.intersection(ran) - {"resume", "output_dir"})
        if paths.anchored(ran)[name] != asked[name]
    ]


def run(request: Request | None) -> int:
    """Carry out a request; None prints the usage. Returns 0, or the exit code of the stage that did not end well."""
    if request is None:
        print(USAGE)
        return DONE
    for i, stage in enumerate(request.stages, 1):
        what = f"recipe: stage {i} of {len(request.stages)}, {stage.name}"
        if stage.is_done:
            print(f"{what}: done, its model is in {stage.folder / 'final'}", flush=True)
            continue
        print(stage.command if request.dry else f"{what}: {stage.command}", flush=True)
        if request.dry:
            continue
        code = _run(stage)
        if code != DONE:
            again = shlex.join(["dsalign", "recipe", *request.typed])
            how = "stopped and saved" if code == RESUMABLE else "failed"
            print(f"{what}: {how}, exit code {code}; go on with\n{again}", file=sys.stderr, flush=True)
            return code
    return DONE


def _run(stage: Stage) -> int:
    """Run a stage's command and return its exit code, 128 + the signal where one killed it."""
    started = subprocess.Popen([*CLI, *stage.words], env=_environment())
    with _passed_on(started):
        code = started.wait()
    return code if code >= 0 else 128 - code


def _environment() -> dict[str, str]:
    """This process's environment, with the folders from which it took dsalign on the path: a checkout may not be
    installed."""
    ours = [path for path in sys.path if path and any(Path(path, name).is_dir() for name in PACKAGES)]
    found = dict.fromkeys([*map(os.path.abspath, ours), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": os.pathsep.join(found)}


@contextmanager
def _passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """While this is open, a signal that stops a run goes to the process, which takes the time that a save needs."""

    def pass_on(number: int, frame: object) -> None:
        if process.poll() is None:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in SIGNALS if _is_heard(number)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_heard(number: signal.Signals) -> bool:
    """Whether the process was not started to ignore a signal, as nohup does with SIGHUP."""
    return signal.getsignal(number) != signal.SIG_IGN
