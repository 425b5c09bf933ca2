"""What a resumed run must share with the run that it continues, and what may change. Imports no torch."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsalign.config.schema import SECTIONS, RunConfig, one_line
from dsalign.config.secrets import redacted

# The one list of what a resumed run may change: why -> options. Whatever stands in neither list is refused.
MAY_CHANGE: Mapping[str, tuple[str, ...]] = {
    "the learning rate": ("learning_rate", "lr_scheduler_type", "warmup_ratio"),
    "the length of the run, which may grow": ("num_train_epochs", "max_steps"),
    "how a step is cut, while it has as many rows": ("batch_size", "gradient_accumulation_steps", "max_tokens"),
    "logs, saves and evaluations": (*SECTIONS["output"], "val_dataset", "num_sample_generations"),
    "when it gives up": ("max_bad_steps", "rollout_logp_limit"),
    "where and how it is computed": (
        "deepspeed", "dtype", "attn_impl", "gradient_checkpointing", "head_memory", "ref_cache", "trust_remote_code",
        "dataset_num_proc", "streaming", "on_bad_row", "local_rollout_forward_batch_size", "rollout_gather",
        "vllm_server", "vllm_folder", "vllm_memory", "vllm_timeout",
    ),
}  # fmt: skip
# Options that name a folder or a file, which may have moved: what it holds must be the same -> keys of `inputs`.
CONTENT: Mapping[str, tuple[str, ...]] = {
    "model": ("files of the policy model", "files of the reward model", "files of the value model",
              "files of the reference model", "tokenizer", "template"),
    "ref_model": ("files of the reference model",),
    "ref_model_type": ("files of the reference model",),
    "reward_model": ("files of the reward model", "files of the value model"),
    "reward_model_type": ("files of the reward model", "files of the value model"),
    "reward_funcs": (),
    "dataset": ("rows of dataset",),
    "template": ("template",),
}  # fmt: skip
UNSAID = ("output_dir", "resume")  # change without a line: the command has said it
HELD_OUT = "rows of val_dataset"
GROWS = ("num_train_epochs", "max_steps")


def options(config: RunConfig) -> dict[str, str]:
    """Name -> value of every option of a run as one line of YAML, secrets left out."""
    return {name: redacted(one_line(value)) for name, value in config.options().items()}


def settings(
    config: RunConfig,
    *,
    ranks: int,
    inputs: Mapping[str, str],
    batches: int,
    layout: Mapping[str, Any],
    versions: Mapping[str, str],
    day: str = "",
) -> dict[str, Any]:
    """What a checkpoint keeps of the run that wrote it, JSON-able.

    ranks: their number. inputs: what data, models and reward functions hold, see `engines.identity`. batches: global
    batches of the whole run. layout: how weights and moments lie over the ranks, see `engines.engine.layout`.
    versions: of Python and libraries. day: that templates write as today's, which the run goes on with.
    """
    return {
        "options": options(config),
        "global_batch": config.global_batch(ranks),
        "ranks": ranks,
        "inputs": dict(inputs),
        "batches": batches,
        "layout": dict(layout),
        "versions": dict(versions),
        "day": day,
    }


def compare(theirs: Mapping[str, Any], mine: Mapping[str, Any], folder: Path) -> list[str]:
    """A line for each thing that a run changes which goes on from a checkpoint. theirs: the settings that the
    checkpoint in `folder` keeps. mine: this run's; parts that either has not are not compared.

    Raises ValueError where something differs that may not, naming each with both values and the way on.
    """
    allowed = {name for names in MAY_CHANGE.values() for name in names} - set(GROWS)
    said, refused = list[str](), list[str]()
    before, now = theirs.get("options", {}), mine.get("options", {})
    other = [name for name in now if name in before and before[name] != now[name]]
    if "algo" in other:
        other = ["algo"]  # the rest follows from it
    for name in other:
        line = f"--{name} was {before[name]}, is {now[name]}"
        fine = name in allowed or (name in GROWS and _grew(before[name], now[name]))
        if name not in CONTENT and name not in UNSAID:
            (said if fine else refused).append(line)
    refused += _of_content(theirs, mine, [name for name in other if name in CONTENT])
    if evaluates_others(theirs, mine):
        said.append("the rows to evaluate on are others than they were: the best checkpoint is sought among new ones")
    if _differ(theirs, mine, "global_batch"):
        refused.append(
            f"rows a step (--batch_size x --gradient_accumulation_steps x ranks) were {theirs['global_batch']}, are "
            f"{mine['global_batch']}"
        )
    elif not refused and "batches" in theirs and "batches" in mine and mine["batches"] < theirs["batches"]:
        refused.append(f"--num_train_epochs and --max_steps gave {theirs['batches']} batches, give {mine['batches']}")
    if _differ(theirs, mine, "ranks"):
        said.append(f"ranks were {theirs['ranks']}, are {mine['ranks']}")
    old, new = theirs.get("versions", {}), mine.get("versions", {})
    said += [f"{name} was {old[name]}, is {new[name]}" for name in new if old.get(name, new[name]) != new[name]]
    if refused:
        raise ValueError(
            f"resume: {folder} comes from a run with other settings: {'; '.join(refused)}; resume with what it was, or "
            f"start a new run from its model with --model {shlex.quote(str(folder))} and another --output_dir"
        )
    return said


def evaluates_others(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Whether a resumed run evaluates on other rows than before, whose losses do not compare."""
    if "inputs" not in theirs or "inputs" not in mine:
        return False
    before, now = (one["inputs"].get(HELD_OUT) for one in (theirs, mine))
    return bool(before != now)


def _differ(theirs: Mapping[str, Any], mine: Mapping[str, Any], name: str) -> bool:
    return name in theirs and name in mine and theirs[name] != mine[name]


def _grew(before: str, now: str) -> bool:
    """Whether a number of epochs or steps is no smaller than it was. Where one of them is null, the number of batches
    decides, when it is known."""
    return "null" in (before, now) or int(now) >= int(before)


def _of_content(theirs: Mapping[str, Any], mine: Mapping[str, Any], renamed: list[str]) -> list[str]:
    """A line for each input of which the content differs, with the options that name it. renamed: those of CONTENT that
    were given another value."""
    if "inputs" not in theirs or "inputs" not in mine:
        return []
    before, now = theirs["inputs"], mine["inputs"]
    lines = []
    for key in sorted((before.keys() | now.keys()) - {HELD_OUT}):
        if before.get(key) != now.get(key):
            changed = [name for name in renamed if key in CONTENT[name]]
            changed = changed or [name for name in renamed if name == "reward_funcs" and key.startswith("content of")]
            values = [(theirs["options"][name], mine["options"][name]) for name in changed]
            names = "".join(f", --{name} was {a}, is {b}" for name, (a, b) in zip(changed, values, strict=True))
            lines.append(f"{key}: was {before.get(key, 'none')}, is {now.get(key, 'none')}{names}")
    return lines
