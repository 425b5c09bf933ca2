"""What must hold between options: one small function a rule, all listed in RULES."""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsalign import assets
from dsalign.assets import rewards
from dsalign.config import ds_files
from dsalign.config.flags import nearest

PRESETS = ("dsalign", "trl", "openrlhf", "llamafactory", "deepspeed-chat", "swift-v2.6")
DATA_SUFFIXES = (".json", ".jsonl", ".csv", ".parquet", ".gz", ".zst")
FROZEN = {  # option -> the frozen role that it fills
    "ref_model": "reference",
    "ref_model_type": "reference",
    "reward_model": "reward",
    "reward_model_type": "reward",
    "reward_funcs": "reward",
    "reward_weights": "reward",
}


class Unread(Exception):
    """A rule asked for an option whose own text was wrong: that is reported already, so the rule is left out."""


@dataclass(frozen=True)
class Draft:
    """The options before they become a RunConfig."""

    values: Mapping[str, Any]  # typed, defaults filled in; less those that could not be read
    where: Mapping[str, str]  # of the given ones, as a message names them
    algorithm: Any  # None where it could not be built
    frozen: Mapping[str, frozenset[str]]  # algorithm -> its frozen roles
    world_size: int

    def __getitem__(self, name: str) -> Any:
        """The value of an option. Raises Unread where there is none."""
        if name not in self.values:
            raise Unread(name)
        return self.values[name]

    def at(self, name: str) -> str:
        """The place of an option, to begin a message with."""
        return self.where.get(name, name)

    def built(self) -> Any:
        """The algorithm. Raises Unread where there is none."""
        if self.algorithm is None:
            raise Unread("algorithm")
        return self.algorithm


Rule = Callable[[Draft], Iterator[str]]


def model_has_a_role(draft: Draft) -> Iterator[str]:
    """ref_model and reward_model need an algorithm with that frozen role."""
    roles = draft.built().roles
    for name, role in FROZEN.items():
        if name in draft.where and draft[name] and roles.get(role) != "frozen":
            having = [algo for algo, frozen in sorted(draft.frozen.items()) if role in frozen]
            expected = f"one of {', '.join(having)}" if having else "another one (none here has it yet)"
            yield (
                f"{draft.at(name)}: expected an algorithm with a frozen {role} model, {expected}, "
                f"got {draft['algo']}; remove it or change --algo"
            )


def rewards_have_a_source(draft: Draft) -> Iterator[str]:
    """An algorithm with a frozen reward model needs one, or functions in its place."""
    if draft.built().roles.get("reward") == "frozen" and not draft["reward_model"] and not draft["reward_funcs"]:
        yield (
            f"reward_model: expected a reward for {draft['algo']}, got neither reward_model nor reward_funcs; give "
            "--reward_model FOLDER (of --algo rm) or --reward_funcs FILE.py:FUNCTION"
        )


def reward_functions_are_known(draft: Draft) -> Iterator[str]:
    """A reward function with the prefix of what comes along must be one of them."""
    for name in draft["reward_funcs"]:
        if name.startswith(assets.PREFIX) and name not in rewards.FUNCTIONS:
            known = sorted(rewards.FUNCTIONS)
            advice = nearest(name, known) or "; choose one, or give path/to/file.py:function"
            yield f"{draft.at('reward_funcs')}: expected one of {', '.join(known)}, got {name!r}{advice}"


def evaluation_has_rows(draft: Draft) -> Iterator[str]:
    """eval_steps needs rows to evaluate on."""
    if draft["eval_steps"] and not draft["val_dataset"] and not draft["split_dataset_ratio"]:
        yield (
            f"{draft.at('eval_steps')}: expected rows to evaluate on, got neither val_dataset nor split_dataset_ratio; "
            f"give one of them"
        )


def one_source_of_validation(draft: Draft) -> Iterator[str]:
    """val_dataset and split_dataset_ratio say the same thing twice."""
    if draft["val_dataset"] and draft["split_dataset_ratio"]:
        yield (
            f"{draft.at('split_dataset_ratio')}: expected 0 beside val_dataset ({draft.at('val_dataset')}), "
            f"got {draft['split_dataset_ratio']}; keep one of them"
        )


def lora_options_need_lora(draft: Draft) -> Iterator[str]:
    """lora_* do nothing where every weight is trained."""
    for name in sorted(draft.where):
        if name.startswith("lora_") and draft["tuner"] == "full":
            yield f"{draft.at(name)}: expected tuner lora, got full ({draft.at('tuner')}); remove it or train with lora"


def dropout_is_allowed(draft: Draft) -> Iterator[str]:
    """An algorithm that compares log-probabilities with a frozen model runs without dropout."""
    if "lora_dropout" in draft.where and draft["lora_dropout"] > 0 and draft.built().dropout == 0:
        yield (
            f"{draft.at('lora_dropout')}: expected 0, as {draft['algo']} runs with all dropout off, "
            f"got {draft['lora_dropout']}; remove it"
        )


def reference_can_be_cached(draft: Draft) -> Iterator[str]:
    """Only a frozen reference that reads the rows' own completions says the same every time."""
    algorithm = draft.built()
    if draft["ref_cache"] == "on" and (algorithm.roles.get("reference") != "frozen" or algorithm.data == "prompts"):
        yield (
            f"{draft.at('ref_cache')}: expected auto or off, as {draft['algo']} has no frozen reference of rows, "
            "got on; remove it"
        )


def all_turns_are_of_demonstrations(draft: Draft) -> Iterator[str]:
    """Pairs and labels judge the last answer."""
    if draft["assistant_turns"] == "all" and draft.built().data != "demonstrations":
        yield (
            f"{draft.at('assistant_turns')}: expected last, as {draft['algo']} learns from the last answer of a row, "
            "got all; remove it"
        )


def weights_are_one_a_data_set(draft: Draft) -> Iterator[str]:
    """dataset_weights goes with dataset, name by name."""
    weights, sets = draft["dataset_weights"], draft["dataset"]
    if weights and len(weights) != len(sets):
        yield (
            f"{draft.at('dataset_weights')}: expected one for each of {len(sets)} data sets, got {len(weights)}; "
            "write as many as --dataset has names"
        )


def data_files_exist(draft: Draft) -> Iterator[str]:
    """A data set that looks like a file, a folder or demo rows must be one; any other name may be on the hub."""
    for name in ("dataset", "val_dataset"):
        for source in draft[name]:
            path = _without_count(source)
            if (path.lower().endswith(DATA_SUFFIXES) or path[:1] in ("/", ".", "~")) and not _exists(path):
                yield f"{draft.at(name)}: expected a file or folder that exists, got {path!r}; check the path"
            elif path.startswith(assets.PREFIX) and path not in assets.names() and not _exists(path):
                advice = nearest(path, assets.names()) or "; choose one"
                yield f"{draft.at(name)}: expected one of {', '.join(assets.names())}, got {path!r}{advice}"


def model_folders_exist(draft: Draft) -> Iterator[str]:
    """A model that looks like a folder must be one; any other name may be registered or on the hub."""
    for name in ("model", "ref_model", "reward_model"):
        path = draft[name]
        if path and path[:1] in ("/", ".", "~") and not _exists(path):
            yield f"{draft.at(name)}: expected a folder that exists, got {path!r}; check the path"


def checkpoint_exists(draft: Draft) -> Iterator[str]:
    """resume names a checkpoint's folder, or the latest one."""
    path = draft["resume"]
    if path and path != "latest" and not Path(path).expanduser().is_dir():
        yield (
            f"{draft.at('resume')}: expected `latest` or the folder of a checkpoint, got {path!r}; "
            f"checkpoints are output_dir/checkpoint-N"
        )


def deepspeed_is_known(draft: Draft) -> Iterator[str]:
    """deepspeed is one of the files that come along, or a file of the user's."""
    name, known = draft["deepspeed"], ds_files.names()
    if name not in known and not Path(name).is_file():
        yield (
            f"{draft.at('deepspeed')}: expected {', '.join(known)} or a JSON file that exists, got {name!r}"
            f"{nearest(name, known) or '; check the path'}"
        )


def preset_is_available(draft: Draft) -> Iterator[str]:
    """Presets of other systems are planned by name."""
    name = draft["preset"]
    if name != "dsalign":
        got = f"{name!r}, which is not available yet" if name in PRESETS else repr(name)
        yield f"{draft.at('preset')}: expected dsalign, got {got}; remove it"


def global_batch_is_large_enough(draft: Draft) -> Iterator[str]:
    """An algorithm may need several groups in one optimizer step."""
    least = draft.built().min_groups
    batch, accumulation = draft["batch_size"], draft["gradient_accumulation_steps"]
    if batch * accumulation * draft.world_size < least:
        yield (
            f"{draft.at('gradient_accumulation_steps')}: expected a global batch of at least {least} for "
            f"{draft['algo']}, got batch_size {batch} x {accumulation} x {draft.world_size} ranks; raise one of them"
        )


RULES: tuple[Rule, ...] = (
    model_has_a_role,
    rewards_have_a_source,
    reward_functions_are_known,
    evaluation_has_rows,
    one_source_of_validation,
    lora_options_need_lora,
    dropout_is_allowed,
    reference_can_be_cached,
    all_turns_are_of_demonstrations,
    weights_are_one_a_data_set,
    data_files_exist,
    model_folders_exist,
    checkpoint_exists,
    deepspeed_is_known,
    preset_is_available,
    global_batch_is_large_enough,
)


def broken(draft: Draft) -> list[str]:
    """A line for everything that breaks a rule."""
    problems: list[str] = []
    for rule in RULES:
        try:
            problems += rule(draft)
        except Unread:
            continue
    return problems


def _exists(path: str) -> bool:
    """Whether there is such a file or folder, or one that a pattern with * ? [ matches."""
    whole = Path(path).expanduser()
    return whole.exists() or any(True for _ in glob.iglob(str(whole), recursive=True))


def _without_count(source: str) -> str:
    """`rows.jsonl#500` names 500 rows of rows.jsonl."""
    path, mark, count = source.rpartition("#")
    return path if mark and count.isdigit() else source
