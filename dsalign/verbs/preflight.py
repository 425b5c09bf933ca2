"""What a run needs outside its configuration, before torch is imported: the hub, reward files, the output folder, an
ear for signals, and the command that starts it again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dsalign import assets, endings
from dsalign.checkpoint import folder_lock, resuming
from dsalign.config import model_folders, reach_hub
from dsalign.config.file_rules import without_count
from dsalign.config.parse import ConfigError, Parsed
from dsalign.config.schema import RunConfig
from dsalign.data.rows import iterate, readers
from dsalign.data.rows.registry import REGISTERED
from dsalign.guard import parents, signals
from dsalign.rewards.functions import load_function

LARGE_BYTES = 16 << 20  # of a file that is read as a whole
STARTED_AS = parents.STARTED_AS  # the variable by which our own launcher hands on the command that it stands for


def typed(command: str, env: Mapping[str, str]) -> str:
    """The command that the user typed, launcher and all, as `parents.typed` finds it. command: where it finds none."""
    return parents.typed(env.get(STARTED_AS), command)


@contextmanager
def listening(command: str, *, alone: bool) -> Iterator[None]:
    """A context in which signals are heard, as `signals.listening`. Until training begins a stop loses nothing: a
    process alone stops at once, with KeyboardInterrupt where that is what happened, and ranks where they agree.

    command: the one that starts the run again.
    """

    def stopped(name: str) -> BaseException:
        return KeyboardInterrupt() if name == "SIGINT" else unbegun(name, command)

    with signals.listening(stopped if alone else None):
        yield


def unbegun(reason: str, command: str) -> endings.Stopped:
    """The ending of a run that was asked to stop before it had begun to train."""
    return endings.Stopped(
        f"stopped by {reason} before the first step; nothing is lost, it starts again with\n{command}"
    )


def ask_the_hub(config: RunConfig) -> str | None:
    """Ask once whether the hub is there, where names on it are needed; returns a line to say, or None.

    Raises ConfigError, a line for each name that cannot be had, where it is not.
    """
    return reach_hub.ready(config, {name: known.hub_name for name, known in REGISTERED.items()})


def load_rewards(config: RunConfig) -> None:
    """Import the file of every reward function. Raises ValueError as `load_function` does."""
    if config.algorithm.traits.roles.get("reward") == "frozen":
        for name in config.models.reward_funcs:
            load_function(name)


def look(config: RunConfig) -> None:
    """Look at what lies on this machine before anything is loaded: the files of the models, and the first row of every
    data set. Raises ConfigError with a line for each thing that is wrong."""
    problems = [*_of_models(config), *_of_first_rows(config)]
    if problems:
        raise ConfigError(problems)


def _of_models(config: RunConfig) -> Iterator[str]:
    for name in ("model", "ref_model", "reward_model"):
        given = getattr(config.models, name)
        for problem in model_folders.problems(Path(given).expanduser(), tokenizer=name == "model") if given else ():
            yield f"{name}: {problem}"


def _of_first_rows(config: RunConfig) -> Iterator[str]:
    """A wrong file, column or algorithm, told by the first row. A file that must be read as a whole is left for later
    where it is large."""
    options = config.data
    for name in ("dataset", "val_dataset"):
        for source in map(without_count, getattr(options, name)):
            try:
                if readers.reads_at_once(source, LARGE_BYTES):
                    rows = iterate.iter_rows(
                        [source],
                        config.algorithm.traits.data,
                        columns=options.columns,
                        system=options.system,
                        skipped=iterate.Skipped() if options.on_bad_row == "skip" else None,
                    )
                    next(rows, None)
            except ValueError as error:
                yield f"{name}: {error}"


def stand_ins(parsed: Parsed) -> list[str]:
    """A line for each of data and reward that is a demo of ours, though the user named something of their own."""
    config, lines = parsed.config, []
    own_rows = not any(source.startswith(assets.DEMO) for source in config.data.dataset)
    for name, given in (("dataset", parsed.origins["model"] != "default"), ("reward_funcs", own_rows)):
        if given and parsed.origins[name].endswith("default"):
            value = ", ".join(config.options()[name])
            if value.startswith(assets.DEMO):
                lines.append(f"no --{name} was given: it is {value}, which comes with dsalign to try it out")
    return lines


def check_resume(config: RunConfig, ranks: int) -> None:
    """Compare the options of a run with those of the checkpoint that --resume names. ranks: their number.

    Raises ConfigError as `resuming.check_options` does.
    """
    resuming.check_options(config, ranks)


@contextmanager
def ready(config: RunConfig) -> Iterator[None]:
    """A context in which this process alone writes to the run's output folder, and its reward files can be imported.

    Raises ValueError where another process writes there, or a file cannot be used.
    """
    load_rewards(config)
    with folder_lock.held(Path(config.output.output_dir)):
        yield
