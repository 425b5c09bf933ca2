"""All options of a run: their types, bounds, defaults and help."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dsalign import assets
from dsalign.config import ds_files, options
from dsalign.config.options import Option

SECTIONS = {"algo": "what", "model": "models", "dataset": "data", "deepspeed": "optimisation", "eval_steps": "run"}
REWARD_FUNCS = f"reward functions, path/to/file.py:function; {assets.REWARD} where there is no reward model either"
GLOBAL_BATCH = 16  # groups in an optimizer step where gradient_accumulation_steps is not given


def _resume(text: Any) -> Any:
    """`--resume` alone is the latest checkpoint."""
    return {"true": "latest", "false": None}.get(text.lower(), text) if isinstance(text, str) else text


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


def one_line(value: Any) -> str:
    """YAML of a value on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    quote = '"' if isinstance(value, str) and not value.isprintable() else None
    text: str = yaml.safe_dump(
        [plain], default_flow_style=True, allow_unicode=True, width=sys.maxsize, default_style=quote
    )
    return text.strip()[1:-1]
