"""From argv and YAML to the configuration of a run: flags override YAML, YAML overrides defaults. All problems are
reported at once, before torch is imported."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsalign import algos, assets
from dsalign.config import flags, foreign, rules
from dsalign.config.draft import Draft
from dsalign.config.flags import Given
from dsalign.config.options import REQUIRED, Option
from dsalign.config.schema import (
    GLOBAL_BATCH,
    RESOLVED,
    ROLLOUT_OPTIONS,
    RUN_OPTIONS,
    SECTIONS,
    RunConfig,
    one_line,
    own_options,
)
from dsalign.contract.rollout_options import RolloutOptions

ALIASES = foreign.NAMES  # name of an option in the documented scripts and other trainers -> its name here


_SECTION_OPTIONS: Mapping[str, Collection[str]] = {
    **SECTIONS,
    "rollout": ROLLOUT_OPTIONS,
    "optimisation": SECTIONS["optim"],
    "run": SECTIONS["output"],
}
SECTION_NAMES = (*_SECTION_OPTIONS, *algos.names())


class ConfigError(ValueError):
    """The error of a configuration that cannot be run.

    problems: a line for each problem: where it is, what was expected, what came, what to do.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass(frozen=True)
class Parsed:
    """The configuration that a command describes, and the origin of each of its values."""

    config: RunConfig
    origins: Mapping[str, str]  # option -> "default", "dpo default", "run.yaml:3" or "flag --beta"
    command: flags.Command

    @property
    def print_config(self) -> bool:
        """Whether the command asks to print the configuration in place of running it."""
        return self.command.asks("print_config")

    def describe(self) -> str:
        """The configuration as YAML text, each value with its origin as a comment."""
        lines = [(f"{name}: {one_line(value)}", self.origins[name]) for name, value in self.config.options().items()]
        width = min(48, max(len(line) for line, _ in lines))
        return "\n".join(f"{line:<{width}}  # {origin}" for line, origin in lines)


def parse(argv: Sequence[str], *, world_size: int) -> Parsed:
    """The configuration that `argv` (without the program's name) and its --config files describe.

    world_size: number of ranks that will run, on which the default of gradient_accumulation_steps depends.
    Raises ConfigError with every problem found. Does not import torch, although it loads the algorithm.
    """
    command = flags.split(argv, ALIASES)
    given, problems = merged(command)
    name, guessed = algorithm_name(command, given)
    problems += guessed
    own = own_options(algos.load(name)) if name else {}
    known = RUN_OPTIONS | own
    if name and "dataset" not in given:
        given = _of_demo_rows(name, known) | given
    problems += [_unknown(one, name, known) for one in given.values() if one.name not in known and _is_wrong(one, name)]
    values, unreadable = _read(given, known)
    fields = [one for one in own if one not in ROLLOUT_OPTIONS]
    algorithm = _made(algos.load(name), fields, values, name, given, unreadable) if name else None
    sampled = [one for one in own if one in ROLLOUT_OPTIONS]
    rollout = _made(RolloutOptions, sampled, values, "rollout", given, unreadable)
    if algorithm is not None and rollout is not None:
        try:
            algorithm.check(rollout)
        except ValueError as error:
            unreadable.append(_placed(str(error), name, given))
    origins = {one: "default" for one in RUN_OPTIONS | ROLLOUT_OPTIONS} | {one: f"{name} default" for one in fields}
    origins |= {name: one.origin for name, one in given.items()}
    if name:
        values["algo"] = name
        _resolve(values, origins, name, world_size)
    parts = {
        part: _made(RunConfig.model_fields[part].annotation, names, values, part, given, unreadable)
        for part, names in SECTIONS.items()
    }
    where = {one.name: one.where for one in given.values() if one.name in known}
    draft = Draft(values, where, algorithm, _frozen_roles(), world_size)
    problems += unreadable + rules.broken(draft)
    if problems:
        raise ConfigError(problems)
    alone = {one: values[one] for one in RUN_OPTIONS if one in RunConfig.model_fields}
    config = RunConfig(algorithm=algorithm, rollout=rollout, **alone, **parts)
    return Parsed(config, origins, command)


def _made(
    cls: Any,
    names: Collection[str],
    values: Mapping[str, Any],
    owner: str,
    given: Mapping[str, Given],
    problems: list[str],
) -> Any:
    """An algorithm or a section, made by calling `cls` with the values of the options `names`.

    None where one of these options could not be read, or where `cls` raises ValueError, whose text is then appended to
    `problems`. owner: the name for such a text that names no given option.
    """
    if not all(name in values for name in names):
        return None
    try:
        return cls(**{name: values[name] for name in names})
    except ValueError as error:
        problems.append(_placed(str(error), owner, given))
        return None


def merged(command: flags.Command) -> tuple[dict[str, Given], list[str]]:
    """The value given for each option, and a line for each problem: flags override files, later files earlier ones."""
    problems = command.mistakes()
    if len(command.words) > 1 or not set(command.words) <= set(flags.TRAIN_VERBS):
        wrong = " ".join(command.words)
        advice = flags.nearest(wrong, flags.TRAIN_VERBS) or "; write options as --name value, files as --config FILE"
        problems.append(f"command: expected one of {', '.join(flags.TRAIN_VERBS)}, got {wrong!r}{advice}")
    if command.asks("config") and not command.values("config"):
        problems.append("--config: expected a YAML file, got none; write --config FILE.yaml")
    layers = []
    for file in command.values("config"):
        layer, wrong_lines = flags.read_yaml(file, ALIASES, SECTION_NAMES)
        problems += wrong_lines
        layers.append(layer)
    layers.append([one for one in command.flags if one.name not in flags.REQUESTS])
    named = any(one.name == "model" and not _stands_in(one) for layer in layers for one in layer)
    given: dict[str, Given] = {}
    for dotted in layers:
        layer = [_undotted(one, problems) for one in dotted if not (named and _stands_in(one))]
        problems += flags.twice(layer)
        for one in layer:
            if one.raw is None and one.name in RESOLVED:
                given.pop(one.name, None)  # null asks for the default
            else:
                given[one.name] = one
    return given, problems


def _stands_in(one: Given) -> bool:
    """Whether this is --model_type, which stands for the model where that is not given; beside a model it says nothing
    that the model's folder does not say."""
    return one.name == "model" and one.spelled.lstrip("-").replace("-", "_") == "model_type"


def _undotted(one: Given, problems: list[str]) -> Given:
    """`optim.learning_rate` as learning_rate, with a line in `problems` where the option is in another section.

    Sections are those of the configuration, the heading of one in --help, and an algorithm's name for its own options.
    """
    section, dot, name = one.name.partition(".")
    if not dot or section not in SECTION_NAMES:
        return one
    name = ALIASES.get(name, name)
    own = own_options(algos.load(section)) if section in algos.names() else _SECTION_OPTIONS[section]
    if name not in own and (name in RUN_OPTIONS or _algorithms_with(name)):
        homes = [part for part, options in _SECTION_OPTIONS.items() if name in options] or _algorithms_with(name)
        problems.append(f"{one.where}: expected an option of {section}, got one of {homes[0]}; write {name} alone")
    return dataclasses.replace(one, name=name)


def _of_demo_rows(algo: str, known: Mapping[str, Option]) -> dict[str, Given]:
    """The values that the demo rows of an algorithm set, such as shorter completions for demo:prompts."""
    rows = assets.of_kind(algos.load(algo)().traits.data)
    brought = assets.OPTIONS.get(rows, {})
    return {name: Given(name, name, (value,), file=rows) for name, value in brought.items() if name in known}


def algorithm_name(command: flags.Command, given: dict[str, Given]) -> tuple[str, list[str]]:
    """The algorithm's name, empty where it is unknown, and a line for each problem with it.

    By `Traits.aliases` a value of an option may stand for another algorithm: cpo with loss_type simpo is simpo, and
    `given` is changed accordingly.
    """
    verb = "".join(command.words[:1])
    asked = given.get("algo") or (Given("algo", "algo", ("sft",), "verb sft") if verb == "sft" else None)
    choices = f"expected one of {', '.join(algos.names())}"
    if asked is None:
        return "", [f"algo: {choices}, got none; give --algo NAME; dsalign --help lists commands too"]
    words = asked.raw if isinstance(asked.raw, (tuple, list)) else (asked.raw,)
    name = str(words[0]) if len(words) == 1 else " ".join(map(str, words))
    if name not in algos.names():
        return "", [f"{asked.where}: {choices}, got {name!r}{flags.nearest(name, algos.names()) or '; choose one'}"]
    if verb == "sft" and name != "sft":
        return name, [f"{asked.where}: expected sft after the verb sft, got {name!r}; use the verb rlhf or train"]
    given["algo"] = asked
    for field, others in algos.load(name)().traits.aliases.items():
        raw = given[field].raw if field in given else None
        value = raw[0] if isinstance(raw, (tuple, list)) and len(raw) == 1 else raw
        if isinstance(value, str) and value in others:
            given["algo"] = dataclasses.replace(given.pop(field), name="algo")
            return others[value], []
    return name, []


def _is_wrong(one: Given, algo: str) -> bool:
    """Whether an unknown option is a mistake: where the algorithm is unknown too, an option of any algorithm may be
    right."""
    return bool(algo) or not _algorithms_with(one.name)


def _algorithms_with(name: str) -> list[str]:
    return [algo for algo, own in _all_own().items() if name in own]


def _all_own() -> dict[str, dict[str, Option]]:
    """Name of each algorithm -> name -> option that it has."""
    return {name: own_options(algos.load(name)) for name in algos.names()}


def _unknown(one: Given, algo: str, known: Mapping[str, Option]) -> str:
    """The problem line for an option that a run of this algorithm does not have."""
    if having := _algorithms_with(one.name):
        return (
            f"{one.where}: expected an option of {algo}, got one of {', '.join(having)}; {algo} has none of it, "
            f"remove it or change --algo"
        )
    if todo := foreign.advice(one.name):
        return f"{one.where}: expected an option of dsalign, got {one.name!r} of other trainers; {todo}"
    possible = [] if algo else [name for own in _all_own().values() for name in own]
    names = [*known, *possible, *ALIASES, *(() if one.file else flags.REQUESTS)]
    guess = flags.nearest(one.name, names) or "; see --help for all"
    if isinstance(one.raw, dict):
        guess = flags.nearest(one.name, [*names, *SECTION_NAMES]) or "; write its options without it"
    return f"{one.where}: expected a known option, got {one.name!r}{guess}"


def _read(given: Mapping[str, Given], known: Mapping[str, Option]) -> tuple[dict[str, Any], list[str]]:
    """The typed value of each option that is readable or has a default, and a problem line for each unreadable one."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, option in known.items():
        if name == "algo":
            continue
        if name not in given:
            if option.default is not REQUIRED:  # `_resolve` fills in the options without a default
                values[name] = option.default
            continue
        try:
            values[name] = option.read(foreign.translated(name, given[name].raw))
        except ValueError as error:
            problems.append(f"{given[name].where}: {error}")
    return values, problems


def _placed(message: str, owner: str, given: Mapping[str, Given]) -> str:
    """The message of an algorithm or section, "option: text", with the place where the option was given in front."""
    name, colon, rest = message.partition(": ")
    return f"{given[name].where}: {rest}" if colon and name in given else f"{owner}: {message}"


def _frozen_roles() -> dict[str, frozenset[str]]:
    """Name of each algorithm -> the frozen roles that it has with default options."""
    made = {name: algos.load(name)().traits.roles for name in algos.names()}
    return {name: frozenset(r for r, how in roles.items() if how == "frozen") for name, roles in made.items()}


def _resolve(values: dict[str, Any], origins: dict[str, str], algo: str, world_size: int) -> None:
    """Fill in, in place, the defaults that depend on other options, except where such an option is unreadable."""

    def fill(name: str, value: Any, origin: str) -> None:
        if origins[name] == "default":
            values[name], origins[name] = value, origin

    traits = algos.load(algo)().traits
    fill("dataset", (assets.of_kind(traits.data),), f"{algo} default")
    fill("lora_dropout", traits.dropout, f"{algo} default")
    fill("output_dir", f"output/{algo}", "default")
    if "tuner" in values:
        fill("learning_rate", traits.learning_rates[values["tuner"]], f"{algo} default")
    if "batch_size" in values:
        accumulation = math.ceil(GLOBAL_BATCH / (values["batch_size"] * world_size))
        fill("gradient_accumulation_steps", accumulation, "default")
    for name in ("ref_model", "reward_model"):
        if values.get(f"{name}_type"):
            fill(name, values[f"{name}_type"], origins[f"{name}_type"])
    if "reward" in _frozen_roles()[algo] and not values.get("reward_model"):
        fill("reward_funcs", (assets.REWARD,), f"{algo} default")
