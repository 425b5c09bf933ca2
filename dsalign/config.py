"""The configuration of a run: defaults < YAML < flags, with every problem at once and before torch is imported."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dsalign import algos, assets, ds_files, flags, options, rules
from dsalign.flags import Given
from dsalign.options import REQUIRED, Option

ALIASES = {  # what the documented scripts and other trainers write -> the name here
    "rlhf_type": "algo",
    "model_type": "model",
    "model_id_or_path": "model",
    "sft_type": "tuner",
    "ref_model_id_or_path": "ref_model",
    "reward_model_id_or_path": "reward_model",
    "per_device_train_batch_size": "batch_size",
    "resume_from_checkpoint": "resume",
}
SECTIONS = {"algo": "what", "model": "models", "dataset": "data", "deepspeed": "optimisation", "eval_steps": "run"}
REWARD_FUNCS = f"reward functions, path/to/file.py:function; {assets.REWARD} where there is no reward model either"
GLOBAL_BATCH = 16  # groups in an optimizer step where gradient_accumulation_steps is not given


def _resume(text: Any) -> Any:
    """`--resume` alone is the latest checkpoint."""
    return {"true": "latest", "false": None}.get(text.lower(), text) if isinstance(text, str) else text


class ConfigError(ValueError):
    """A configuration that cannot be run.

    problems: a line each: where, what was expected, what came, what to do.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class RunConfig(BaseModel):
    """All options of a run, resolved. `parse` makes one; those of its algorithm are in `algorithm`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    algorithm: Any  # the dataclass of algos.load(algo)

    algo: str = Field(description="the algorithm")
    model: str = Field(
        "smollm2-135m-instruct", min_length=1, description="the model to train: a folder, a hub name or a short name"
    )
    tuner: Literal["lora", "full"] = Field("lora", description="train LoRA adapters or every weight")
    ref_model: str | None = Field(None, description="the frozen reference; by default the model as it starts")
    ref_model_type: str | None = Field(None, description="stands for ref_model where that is not given")
    ref_cache: Literal["auto", "on", "off"] = Field(
        "auto", description="compute the reference's log-probabilities once and keep them on disk; auto: where it pays"
    )
    reward_model: str | None = Field(None, description="the frozen reward model: final/, checkpoint-N/ or an adapter")
    reward_model_type: str | None = Field(None, description="stands for reward_model where that is not given")
    reward_funcs: tuple[str, ...] = Field((), description=REWARD_FUNCS)
    reward_weights: tuple[float, ...] = Field((), description="of the reward model, then of each function; 1 each")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the weights in compute")
    attn_impl: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = Field(
        "auto", description="the attention kernel"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward: less memory, slower")
    lora_rank: int = Field(8, ge=1, description="width of the adapters, >= 1")
    lora_alpha: int = Field(32, ge=1, description="adapters are scaled by lora_alpha / lora_rank, >= 1")
    lora_dropout: float = Field(ge=0, lt=1, description="share of adapter inputs dropped, in [0, 1); by algorithm")
    lora_target_modules: tuple[str, ...] = Field(
        ("ALL",), min_length=1, description="ALL linear layers but the head, DEFAULT (q, k, v), or names"
    )

    dataset: tuple[str, ...] = Field(
        min_length=1,
        description=f"files, folders, hub names or {assets.PREFIX}KIND; #n takes n rows; by algorithm demo rows",
    )
    dataset_weights: tuple[Annotated[float, Field(gt=0)], ...] = Field(
        (), description="how many times an epoch takes the rows of each data set, > 0; 1 each"
    )
    on_bad_row: Literal["error", "skip"] = Field("error", description="stop at a bad row, or leave it out and count it")
    dataset_num_proc: int | None = Field(None, ge=1, description="processes that tokenise 10,000 rows or more [1 to 8]")
    streaming: bool = Field(False, description="read hub data sets without keeping them on disk, only their tokens")
    val_dataset: tuple[str, ...] = Field((), description="rows to evaluate on, named like dataset")
    split_dataset_ratio: float = Field(0.0, ge=0, lt=1, description="share of dataset to evaluate on, in [0, 1)")
    columns: dict[str, str] = Field({}, description="columns to rename, theirs=ours")
    template: str | None = Field(
        None, description="a chat template, by name or .jinja file; by default the tokenizer's"
    )
    system: str | None = Field(None, description="the system prompt of rows that have none")
    assistant_turns: Literal["last", "all"] = Field(
        "last", description="which answers of a demonstration are learnt from"
    )
    max_length: int = Field(2048, ge=2, description="tokens of a prompt and a completion, >= 2")
    truncation_strategy: Literal["delete", "left", "right", "raise"] = Field(
        "delete", description="what to do with a longer row"
    )

    deepspeed: str = Field("zero2", description=f"{', '.join(ds_files.names())}, or a JSON file")
    num_train_epochs: int = Field(1, ge=1, description="passes over the data, >= 1; max_steps for a part of one")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps at most, >= 1")
    batch_size: int = Field(1, ge=1, description="groups in a micro-batch of one rank, >= 1")
    max_tokens: int | None = Field(
        None, ge=1, description="cut a step into micro-batches of so many tokens in place of batch_size groups, >= 1"
    )
    gradient_accumulation_steps: int = Field(
        ge=1, description=f"micro-batches a step, >= 1; ceil({GLOBAL_BATCH} / (batch_size x ranks))"
    )
    head_memory: int | None = Field(
        None, ge=1, description="MiB for the logits of a part of a micro-batch, >= 1; by default 512, 48 on a CPU"
    )
    learning_rate: float = Field(gt=0, description="at the peak, > 0; by algorithm and tuner")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="the update rule")
    weight_decay: float = Field(0.01, ge=0, description="decoupled, a step and unit of learning rate, >= 0")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's mean, in [0, 1)")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="decay of the gradient's square, in [0, 1)")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to the root of the square, > 0")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the gradient's norm here, >= 0; 0 is off")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="the learning rate after warm-up"
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of all steps that warms up, in [0, 1)")

    eval_steps: int | None = Field(None, ge=1, description="optimizer steps between evaluations, >= 1")
    save_steps: int = Field(500, ge=1, description="optimizer steps between checkpoints, >= 1")
    logging_steps: int = Field(5, ge=1, description="optimizer steps between log lines, >= 1")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept, >= 1")
    seed: int = Field(42, ge=0, lt=2**32, description="of everything random, in [0, 2^32)")
    output_dir: str = Field(min_length=1, description="where all is written; output/<algo>")
    resume: Annotated[str | None, BeforeValidator(_resume)] = Field(
        None, description="latest, or a checkpoint's folder; alone it is latest"
    )
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field((), description="trackers beside the log")
    preset: str = Field("dsalign", description="whose conventions to follow")

    def options(self) -> dict[str, Any]:
        """Name -> value of every option, the algorithm's behind the run's, as they are written to YAML.

        Less those of LoRA where nothing reads them, as giving them there is an error.
        """
        own = {name: getattr(self, name) for name in RUN_OPTIONS}
        if self.tuner == "full":
            own = {name: value for name, value in own.items() if not name.startswith("lora_")}
        fields = (field.name for field in dataclasses.fields(self.algorithm) if field.init)
        return own | {name: getattr(self.algorithm, name) for name in fields}

    def dump(self) -> str:
        """The options as YAML; `--config` reads the same configuration from it."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in self.options().items()}
        return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=sys.maxsize)

    def to_yaml(self, path: str | Path) -> None:
        """Writes `dump` to `path`."""
        Path(path).write_text(self.dump(), encoding="utf-8")


RUN_OPTIONS: dict[str, Option] = options.of_model(RunConfig, bare=frozenset({"resume"}))
# By `_resolve`, if not given.
RESOLVED = ("dataset", "reward_funcs", "lora_dropout", "gradient_accumulation_steps", "learning_rate", "output_dir")


@dataclass(frozen=True)
class Parsed:
    """A configuration, and where each of its values comes from."""

    config: RunConfig
    origins: Mapping[str, str]  # option -> "default", "dpo default", "run.yaml:3" or "flag --beta"
    command: flags.Command

    @property
    def print_config(self) -> bool:
        """Whether the user only wants to see it."""
        return self.command.asks("print_config")

    def describe(self) -> str:
        """The configuration as YAML, each value with its origin as a comment."""
        lines = [(f"{name}: {_one_line(value)}", self.origins[name]) for name, value in self.config.options().items()]
        width = min(48, max(len(line) for line, _ in lines))
        return "\n".join(f"{line:<{width}}  # {origin}" for line, origin in lines)


def _one_line(value: Any) -> str:
    """YAML of a value on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    quote = '"' if isinstance(value, str) and not value.isprintable() else None
    text: str = yaml.safe_dump(
        [plain], default_flow_style=True, allow_unicode=True, width=sys.maxsize, default_style=quote
    )
    return text.strip()[1:-1]


def parse(argv: Sequence[str], *, world_size: int) -> Parsed:
    """The configuration that `argv` (without the program's name) and its --config files describe.

    world_size: ranks that will run, for the default of gradient_accumulation_steps.
    Raises ConfigError with every problem found. Imports no algorithm's torch.
    """
    command = flags.split(argv, ALIASES)
    given, problems = _merge(command)
    name, guessed = _algorithm_name(command, given)
    problems += guessed
    own = options.of_algorithm(algos.load(name)) if name else {}
    known = RUN_OPTIONS | own
    if name and "dataset" not in given:
        given = _of_demo_rows(name, known) | given
    problems += [_unknown(one, name, known) for one in given.values() if one.name not in known and _is_wrong(one, name)]
    values, unreadable = _read(given, known)
    algorithm = None
    if name and all(field in values for field in own):
        try:
            algorithm = algos.load(name)(**{field: values[field] for field in own})
        except ValueError as error:
            unreadable.append(_placed(str(error), name, given))
    origins = {one: given[one].origin if one in given else f"{name} default" for one in own}
    origins |= {one: given[one].origin if one in given else "default" for one in RUN_OPTIONS}
    if name:
        values["algo"] = name
        _resolve(values, origins, name, world_size)
    where = {one.name: one.where for one in given.values() if one.name in known}
    draft = rules.Draft(values, where, algorithm, _frozen_roles(), world_size)
    problems += unreadable + rules.broken(draft)
    if problems:
        raise ConfigError(problems)
    config = RunConfig(algorithm=algorithm, **{one: values[one] for one in RUN_OPTIONS})
    return Parsed(config, origins, command)


def _merge(command: flags.Command) -> tuple[dict[str, Given], list[str]]:
    """What was given for each option, flags over later files over earlier ones; and the problems of the layers."""
    problems = command.mistakes()
    if len(command.words) > 1 or not set(command.words) <= set(flags.VERBS):
        wrong = " ".join(command.words)
        advice = flags.nearest(wrong, flags.VERBS) or "; write options as --name value, files as --config FILE"
        problems.append(f"command: expected one of {', '.join(flags.VERBS)}, got {wrong!r}{advice}")
    if command.asks("config") and not command.values("config"):
        problems.append("--config: expected a YAML file, got none; write --config FILE.yaml")
    layers = []
    for file in command.values("config"):
        layer, wrong_lines = flags.read_yaml(file, ALIASES)
        problems += wrong_lines
        layers.append(layer)
    layers.append([one for one in command.flags if one.name not in flags.REQUESTS])
    given: dict[str, Given] = {}
    for layer in layers:
        problems += flags.twice(layer)
        for one in layer:
            if one.raw is None and one.name in RESOLVED:
                given.pop(one.name, None)  # null asks for the default
            else:
                given[one.name] = one
    return given, problems


def _of_demo_rows(algo: str, known: Mapping[str, Option]) -> dict[str, Given]:
    """The options that the algorithm's demo rows bring along."""
    rows = assets.of_kind(algos.load(algo).data)
    brought = assets.OPTIONS.get(rows, {})
    return {name: Given(name, name, (value,), file=rows) for name, value in brought.items() if name in known}


def _algorithm_name(command: flags.Command, given: dict[str, Given]) -> tuple[str, list[str]]:
    """The algorithm's name, empty where it is unknown, and what is wrong with it.

    An algorithm may give away a value of its options: cpo with loss_type simpo is simpo.
    """
    verb = "".join(command.words[:1])
    asked = given.get("algo") or (Given("algo", "algo", ("sft",), "verb sft") if verb == "sft" else None)
    choices = f"expected one of {', '.join(algos.names())}"
    if asked is None:
        return "", [f"algo: {choices}, got none; give --algo NAME"]
    words = asked.raw if isinstance(asked.raw, (tuple, list)) else (asked.raw,)
    name = str(words[0]) if len(words) == 1 else " ".join(map(str, words))
    if name not in algos.names():
        return "", [f"{asked.where}: {choices}, got {name!r}{flags.nearest(name, algos.names()) or '; choose one'}"]
    if verb == "sft" and name != "sft":
        return name, [f"{asked.where}: expected sft after the verb sft, got {name!r}; use the verb rlhf or train"]
    given["algo"] = asked
    for field, others in getattr(algos.load(name), "aliases", {}).items():
        raw = given[field].raw if field in given else None
        value = raw[0] if isinstance(raw, (tuple, list)) and len(raw) == 1 else raw
        if isinstance(value, str) and value in others:
            given["algo"] = dataclasses.replace(given.pop(field), name="algo")
            return others[value], []
    return name, []


def _is_wrong(one: Given, algo: str) -> bool:
    """Without an algorithm, an option of any of them may be right."""
    return bool(algo) or not _algorithms_with(one.name)


def _algorithms_with(name: str) -> list[str]:
    return [algo for algo, own in _all_own().items() if name in own]


def _all_own() -> dict[str, dict[str, Option]]:
    """Algorithm -> its options."""
    return {name: options.of_algorithm(algos.load(name)) for name in algos.names()}


def _unknown(one: Given, algo: str, known: Mapping[str, Option]) -> str:
    """The line for an option that there is not."""
    if having := _algorithms_with(one.name):
        return (
            f"{one.where}: expected an option of {algo}, got one of {', '.join(having)}; {algo} has none of it, "
            f"remove it or change --algo"
        )
    possible = [] if algo else [name for own in _all_own().values() for name in own]
    names = [*known, *possible, *ALIASES, *(() if one.file else flags.REQUESTS)]
    guess = flags.nearest(one.name, names) or "; see --help for all"
    return f"{one.where}: expected a known option, got {one.name!r}{guess}"


def _read(given: Mapping[str, Given], known: Mapping[str, Option]) -> tuple[dict[str, Any], list[str]]:
    """The typed value of each option that can be read or has a default, and a line for each other."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, option in known.items():
        if name == "algo":
            continue
        if name not in given:
            if option.default is not REQUIRED:  # `_resolve` has the others
                values[name] = option.default
            continue
        try:
            values[name] = option.read(given[name].raw)
        except ValueError as error:
            problems.append(f"{given[name].where}: {error}")
    return values, problems


def _placed(message: str, algo: str, given: Mapping[str, Given]) -> str:
    """An algorithm's message about a value, behind the place of that value."""
    name, colon, rest = message.partition(": ")
    return f"{given[name].where}: {rest}" if colon and name in given else f"{algo}: {message}"


def _frozen_roles() -> dict[str, frozenset[str]]:
    """Algorithm -> its frozen roles by default."""
    made = {name: algos.load(name)() for name in algos.names()}
    return {name: frozenset(r for r, how in algo.roles.items() if how == "frozen") for name, algo in made.items()}


def _resolve(values: dict[str, Any], origins: dict[str, str], algo: str, world_size: int) -> None:
    """Fills in, in place, what depends on other options; leaves out what depends on an unreadable one."""

    def fill(name: str, value: Any, origin: str) -> None:
        if origins[name] == "default":
            values[name], origins[name] = value, origin

    cls = algos.load(algo)
    fill("dataset", (assets.of_kind(cls.data),), f"{algo} default")
    fill("lora_dropout", cls.dropout, f"{algo} default")
    fill("output_dir", f"output/{algo}", "default")
    if "tuner" in values:
        fill("learning_rate", cls.learning_rates[values["tuner"]], f"{algo} default")
    if "batch_size" in values:
        accumulation = math.ceil(GLOBAL_BATCH / (values["batch_size"] * world_size))
        fill("gradient_accumulation_steps", accumulation, "default")
    for name in ("ref_model", "reward_model"):
        if values.get(f"{name}_type"):
            fill(name, values[f"{name}_type"], origins[f"{name}_type"])
    if "reward" in _frozen_roles()[algo] and not values.get("reward_model"):
        fill("reward_funcs", (assets.REWARD,), f"{algo} default")


def help_text(command: flags.Command) -> str:
    """All options with their defaults; those of an algorithm where `command` names one."""
    given, _ = _merge(command)
    name, _ = _algorithm_name(command, given)
    spellings = {one: [alias for alias, target in ALIASES.items() if target == one] for one in RUN_OPTIONS}

    def lines(shown: Mapping[str, Option]) -> Iterator[str]:
        for option in shown.values():
            if option.name in SECTIONS:
                yield f"\n{SECTIONS[option.name]}"
            flag = ", ".join(f"--{spelling}" for spelling in (option.name, *spellings.get(option.name, ())))
            fixed = option.default not in (REQUIRED, None, (), {})
            default = f" [{_one_line(option.default)}]" if fixed else ""
            choices = f": {', '.join(option.choices())}" if option.choices() else ""
            gap = "" if len(flag) <= 31 else f"\n{'':33}"
            yield f"  {flag:<31}{gap}{option.help}{choices}{default}"

    usage = "usage: dsalign [train|rlhf|sft] --algo NAME [--model MODEL] [--dataset DATA ...] [--config FILE.yaml ...]"
    requests = "  --print_config  show each value and where it comes from\n  --version       show the version"
    own = options.of_algorithm(algos.load(name)) if name else {}
    tail = f"\n{name}\n" + "\n".join(lines(own)) if own else "\nThe options of an algorithm: dsalign --algo NAME --help"
    return "\n".join([usage, requests, f"algorithms: {', '.join(algos.names())}", *lines(RUN_OPTIONS), tail])
