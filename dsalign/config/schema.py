"""The options of a run: their types, bounds, defaults and help texts."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Hashable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from dsalign import assets
from dsalign.config import ds_files, options, paths
from dsalign.config.options import Option
from dsalign.config.secrets import redacted
from dsalign.contract.algorithm import Algorithm
from dsalign.contract.rollout_options import RolloutOptions

REWARD_FUNCS = f"reward functions, path/to/file.py:function; {assets.REWARD} where there is no reward model either"
GLOBAL_BATCH = 16  # groups in an optimizer step where gradient_accumulation_steps is not given


def _resume(text: Any) -> Any:
    """The value of --resume as it is read: the flag alone ("true") means "latest", "false" means None."""
    if text == "":
        raise PydanticCustomError("resume", "latest, auto or the folder of a checkpoint")
    return {"true": "latest", "false": None}.get(text.lower(), text) if isinstance(text, str) else text


def seconds(text: str | None) -> float | None:
    """The seconds that a time such as 55m, 3h or 3300 stands for; None for None.

    Raises PydanticCustomError where it is no time.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|)", str(text).strip())
    if found is None or float(found[1]) == 0:
        raise PydanticCustomError("time", "a time such as 55m, 3h or 3300s, more than 0")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]


def _time(text: Any) -> Any:
    """The value of an option that is a time, as text; YAML may have read a number."""
    seconds(text)
    return None if text is None else str(text)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelOptions(_Frozen):
    """The options of the models: which, how they are loaded, and which of their weights are trained."""

    model: str = Field(
        "smollm2-135m-instruct", min_length=1, description="the model to train: a folder, a hub name or a short name"
    )
    tuner: Literal["lora", "full"] = Field("lora", description="train LoRA adapters or every weight")
    ref_model: str | None = Field(
        None, min_length=1, description="the frozen reference; by default the model as it starts"
    )
    ref_model_type: str | None = Field(None, description="stands for ref_model where that is not given")
    ref_cache: Literal["auto", "on", "off"] = Field(
        "auto", description="compute the reference's log-probabilities once and keep them on disk; auto: where it pays"
    )
    reward_model: str | None = Field(
        None, min_length=1, description="the frozen reward model: final/, checkpoint-N/ or an adapter"
    )
    reward_model_type: str | None = Field(None, description="stands for reward_model where that is not given")
    reward_funcs: tuple[str, ...] = Field((), description=REWARD_FUNCS)
    reward_weights: tuple[float, ...] = Field((), description="of the reward model, then of each function; 1 each")
    trust_remote_code: bool = Field(False, description="run code that comes with the model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="of the weights in compute")
    attn_impl: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = Field(
        "auto", description="the attention kernel"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in backward: less memory, slower")
    head_memory: int | None = Field(
        None, ge=1, description="MiB for the logits of a part of a micro-batch, >= 1; by default 512, 48 on a CPU"
    )
    load_in_4bit: bool = Field(
        False, description="keep the frozen weights under LoRA in 4 bits (NF4), by bitsandbytes: dsalign[4bit]"
    )
    lora_rank: int = Field(8, ge=1, description="width of the adapters, >= 1")
    lora_alpha: int = Field(32, ge=1, description="adapters are scaled by lora_alpha / lora_rank, >= 1")
    lora_dropout: float = Field(ge=0, lt=1, description="share of adapter inputs dropped, in [0, 1); by algorithm")
    lora_target_modules: tuple[str, ...] = Field(
        ("ALL",), min_length=1, description="ALL linear layers but the head, DEFAULT (q, k, v), or names"
    )


class DataOptions(_Frozen):
    """The options of the data: which rows, and how rows become token ids."""

    dataset: tuple[str, ...] = Field(
        min_length=1,
        description=f"files, folders, hub names or {assets.DEMO}KIND; #n takes n rows; by algorithm demo rows",
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
        None, min_length=1, description="a chat template, by name or .jinja file; by default the tokenizer's"
    )
    system: str | None = Field(None, description="the system prompt of rows that have none")
    special_tokens_in_text: bool | None = Field(
        None, description="whether text that spells a special token is that token [only with --template plain]"
    )
    assistant_turns: Literal["last", "all"] = Field(
        "last", description="which answers of a demonstration are learnt from"
    )
    max_length: int = Field(2048, ge=2, description="tokens of a prompt and a completion, >= 2")
    truncation_strategy: Literal["delete", "left", "right", "raise"] = Field(
        "delete", description="what to do with a longer row"
    )


class OptimOptions(_Frozen):
    """The options of optimisation: the number of optimizer steps, the groups in each, and the update rule."""

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
    learning_rate: float = Field(gt=0, description="at the peak, > 0; by algorithm and tuner")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="the update rule")
    weight_decay: float = Field(0.01, ge=0, description="decoupled, a step and unit of learning rate, >= 0")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's mean, in [0, 1)")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="decay of the gradient's square, in [0, 1)")
    adam_epsilon: float = Field(1e-8, gt=0, description="added to the root of the square, > 0")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the gradient's norm here, >= 0; 0 is off")
    max_bad_steps: int = Field(
        3, ge=0, description="steps in a row that may be skipped as not finite, >= 0; one more ends the run"
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        "cosine", description="the learning rate after warm-up"
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of all steps that warms up, in [0, 1)")


class OutputOptions(_Frozen):
    """The options of output: where a run writes, and how often it logs, evaluates and saves."""

    eval_steps: int | None = Field(None, ge=1, description="optimizer steps between evaluations, >= 1")
    save_steps: int = Field(500, ge=1, description="optimizer steps between checkpoints, >= 1")
    logging_steps: int = Field(5, ge=1, description="optimizer steps between log lines, >= 1")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept, >= 1")
    output_dir: str = Field(min_length=1, description="where all is written; output/<algo>")
    resume: Annotated[str | None, BeforeValidator(_resume)] = Field(
        None, description="latest, auto (latest, or a new run where there is none), or a checkpoint's folder"
    )
    max_wall: Annotated[str | None, BeforeValidator(_time)] = Field(
        None, description="save and stop so long after the start: 55m, 3h, 3300s, > 0; leave time for a step and a save"
    )
    trust_checkpoint: bool = Field(
        False, description="resume from a checkpoint of another run, whose pickles may run code"
    )
    peer_timeout: float = Field(
        1800, ge=0, description="seconds without progress after which a rank is given up, >= 0; 0 = wait for ever"
    )
    guard: Literal["warn", "stop", "off"] = Field(
        "warn", description="what to do where the metrics take a course that is known to end badly"
    )
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field((), description="trackers beside the log")


class RunConfig(_Frozen):
    """All options of a run with their final values, made by `parse`. Code that needs options is given a whole section.

    Users see no sections: a flag or a YAML key is the name of an option alone.
    """

    algorithm: Any  # an Algorithm, of algos.load(algo)

    algo: str = Field(title="what", description="the algorithm")
    models: ModelOptions = Field(title="models")  # a title is the heading above the section's options in --help
    data: DataOptions = Field(title="data")
    optim: OptimOptions = Field(title="optimisation")
    output: OutputOptions = Field(title="run")
    rollout: RolloutOptions = RolloutOptions()  # read by online algorithms; other algorithms have no such options
    seed: int = Field(42, ge=0, lt=2**32, description="of everything random, in [0, 2^32)")

    def global_batch(self, world_size: int) -> int:
        """The number of groups in an optimizer step, over all ranks."""
        return self.optim.batch_size * self.optim.gradient_accumulation_steps * world_size

    def options(self) -> dict[str, Any]:
        """Name -> value of every option in the order of the YAML file: those of every run, then the algorithm's.

        With --tuner full the lora_* options are left out, as giving one there is an error.
        """
        parts = (self, *(getattr(self, name) for name in SECTIONS))
        flat = {name: value for part in parts for name, value in vars(part).items()}
        own = {name: flat[name] for name in RUN_OPTIONS}
        if self.models.tuner == "full":
            own = {name: value for name, value in own.items() if not name.startswith("lora_")}
        owners = [self.algorithm, self.rollout] if self.algorithm.traits.online else [self.algorithm]
        return own | {field.name: getattr(of, field.name) for of in owners for field in dataclasses.fields(of)}

    def dump(self) -> str:
        """The options as YAML text, from which `--config` reads the same configuration."""
        return _dumped(self.options())

    def to_yaml(self, path: str | Path, heading: str = "") -> None:
        """Write the options as YAML to the file `path`: paths are absolute, so that it is read the same in any working
        directory, and values that look like secrets are left out. heading: lines of comments above."""
        Path(path).write_text(redacted(heading + _dumped(paths.anchored(self.options()))), encoding="utf-8")


def _dumped(options: Mapping[str, Any]) -> str:
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=sys.maxsize)


def _options_of(section: Any) -> dict[str, Option]:
    """Name -> option of a section's class; empty where `section` is no such class."""
    is_section = isinstance(section, type) and issubclass(section, _Frozen)
    return options.of_model(section, bare=frozenset({"resume"})) if is_section else {}


def _run_options() -> dict[str, Option]:
    """Name -> option of a run without its algorithm's, in the order of --help: RunConfig's own, then each section's,
    and those of SHOWN_BEHIND moved behind the option that they name."""
    found = options.of_model(RunConfig)
    for own in SECTIONS.values():
        found |= own
    names = list(found)
    for name, before in SHOWN_BEHIND.items():
        names.remove(name)
        names.insert(names.index(before) + 1, name)
    return {name: found[name] for name in names}


SECTIONS = {name: own for name, field in RunConfig.model_fields.items() if (own := _options_of(field.annotation))}
SHOWN_BEHIND = {"head_memory": "gradient_accumulation_steps", "seed": "save_total_limit"}
RUN_OPTIONS = _run_options()


ROLLOUT_OPTIONS = options.of_dataclass(RolloutOptions)


def own_options(algorithm: type[Algorithm]) -> dict[str, Option]:
    """Name -> option that a run has because of its algorithm: the algorithm's fields, and of an online algorithm the
    options of sampling."""
    return _own_options(cast(Hashable, algorithm))


@cache  # a command with many mistakes asks for those of every algorithm again and again
def _own_options(algorithm: Any) -> dict[str, Option]:
    return options.of_dataclass(algorithm) | (ROLLOUT_OPTIONS if algorithm().traits.online else {})


HEADINGS = {  # first option of a section -> the heading above it in --help
    next(iter(SECTIONS.get(name, [name]))): field.title for name, field in RunConfig.model_fields.items() if field.title
}
# Options whose default depends on other options: parse's `_resolve` fills them in where they are not given.
RESOLVED = ("dataset", "reward_funcs", "lora_dropout", "gradient_accumulation_steps", "learning_rate", "output_dir")


def one_line(value: Any) -> str:
    """The YAML of an option's value, on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    quote = '"' if isinstance(value, str) and not value.isprintable() else None
    text: str = yaml.safe_dump(
        [plain], default_flow_style=True, allow_unicode=True, width=sys.maxsize, default_style=quote
    )
    return text.strip()[1:-1]
