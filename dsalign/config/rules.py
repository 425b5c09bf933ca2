"""The rules between options: one small function a rule, all listed in RULES, which yields a line for each breach."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

from dsalign import assets
from dsalign.assets import rewards
from dsalign.config import ds_files, file_rules
from dsalign.config.draft import Draft, Rule, Unread
from dsalign.config.flags import nearest

FROZEN = {  # option -> the frozen role that it fills
    "ref_model": "reference",
    "ref_model_type": "reference",
    "reward_model": "reward",
    "reward_model_type": "reward",
    "reward_funcs": "reward",
    "reward_weights": "reward",
}


def model_has_a_role(draft: Draft) -> Iterator[str]:
    """ref_model and reward_model need an algorithm with that frozen role."""
    roles = draft.built().traits.roles
    for name, role in FROZEN.items():
        if name in draft.where and draft[name] and roles.get(role) != "frozen":
            having = [algo for algo, frozen in sorted(draft.frozen.items()) if role in frozen]
            expected = f"one of {', '.join(having)}" if having else "another one (none here has it yet)"
            yield (
                f"{draft.at(name)}: expected an algorithm with a frozen {role} model, {expected}, "
                f"got {draft['algo']}; remove it or change --algo"
            )


def rewards_have_a_source(draft: Draft) -> Iterator[str]:
    """An algorithm with a frozen role "reward" needs a reward model or reward functions."""
    if draft.built().traits.roles.get("reward") == "frozen" and not draft["reward_model"] and not draft["reward_funcs"]:
        yield (
            f"reward_model: expected a reward for {draft['algo']}, got neither reward_model nor reward_funcs; give "
            "--reward_model FOLDER (of --algo rm) or --reward_funcs FILE.py:FUNCTION"
        )


def reward_functions_are_known(draft: Draft) -> Iterator[str]:
    """A reward function whose name begins with the prefix of the demo rewards must be a demo reward."""
    for name in draft["reward_funcs"]:
        if name.startswith(assets.DEMO) and name not in rewards.FUNCTIONS:
            known = sorted(rewards.FUNCTIONS)
            advice = nearest(name, known) or "; choose one, or give path/to/file.py:function"
            yield f"{draft.at('reward_funcs')}: expected one of {', '.join(known)}, got {name!r}{advice}"


PARTS = ("body", "orelse", "finalbody")  # of a statement that holds others


def reward_files_have_the_functions(draft: Draft) -> Iterator[str]:
    """A reward function of the user's is a function of a python file that can be read. The file is not run here."""
    judged = draft.built().traits.roles.get("reward") == "frozen"
    for name in draft["reward_funcs"] if judged else ():
        if not name.startswith(assets.DEMO) and (problem := _of_reward_file(name)):
            yield f"{draft.at('reward_funcs')}: {problem}"


def _of_reward_file(name: str) -> str:
    """What is wrong with path/to/file.py:function as its text shows it; empty where nothing is."""
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py") or not function.isidentifier():
        return f"expected path/to/file.py:function, got {name!r}; name the file, a colon and the function"
    try:
        module = ast.parse(Path(path).expanduser().read_bytes(), path)
    except OSError as error:
        return f"expected a file that exists, got {path!r} ({error.strerror}); check the path"
    except (SyntaxError, ValueError, RecursionError) as error:
        line = f":{error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        return f"{path}{line}: expected Python, got an error: {getattr(error, 'msg', error)}; correct the file"
    functions = [one.name for one in module.body if isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef))]
    found = next((one for one in _statements(module.body) if getattr(one, "name", None) == function), None)
    if isinstance(found, ast.AsyncFunctionDef):
        return f"{path}:{found.lineno}: expected a function, got {function}, which is async; write `def` in place of it"
    if found is None and not _binds(module, function):
        has = ", ".join(functions) or "no function"
        return (
            f"{path}: expected a function {function!r}, got {has}{nearest(function, functions) or '; correct the name'}"
        )
    return ""


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, those within if, try and with too, but not those of its functions and classes."""
    for one in body:
        yield one
        if not isinstance(one, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            within = [one, *getattr(one, "handlers", ())]
            yield from _statements(x for part in within for name in PARTS for x in getattr(part, name, ()))


def _binds(module: ast.Module, name: str) -> bool:
    """Whether a name is assigned or imported anywhere in a module, or may be, by `from x import *`."""
    imports = (one for one in ast.walk(module) if isinstance(one, (ast.Import, ast.ImportFrom)))
    imported = {alias.asname or alias.name for one in imports for alias in one.names}
    assigned = {one.id for one in ast.walk(module) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
    return bool({name, "*"} & (imported | assigned))


def reward_weights_are_one_a_source(draft: Draft) -> Iterator[str]:
    """reward_weights, where given, has one number for the reward model and one for each function."""
    weights = draft["reward_weights"]
    sources = [*filter(None, [draft["reward_model"]]), *draft["reward_funcs"]]
    if weights and sources and len(weights) != len(sources) and draft.built().traits.roles.get("reward") == "frozen":
        yield (
            f"{draft.at('reward_weights')}: expected one for each of {len(sources)} rewards "
            f"({', '.join(sources)}), got {len(weights)}; write as many"
        )


def evaluation_has_rows(draft: Draft) -> Iterator[str]:
    """eval_steps needs rows to evaluate on."""
    if draft["eval_steps"] and not draft["val_dataset"] and not draft["split_dataset_ratio"]:
        yield (
            f"{draft.at('eval_steps')}: expected rows to evaluate on, got neither val_dataset nor split_dataset_ratio; "
            f"give one of them"
        )


def one_source_of_validation(draft: Draft) -> Iterator[str]:
    """val_dataset and split_dataset_ratio both choose the held-out rows, so only one may be given."""
    if draft["val_dataset"] and draft["split_dataset_ratio"]:
        yield (
            f"{draft.at('split_dataset_ratio')}: expected 0 beside val_dataset ({draft.at('val_dataset')}), "
            f"got {draft['split_dataset_ratio']}; keep one of them"
        )


def lora_options_need_lora(draft: Draft) -> Iterator[str]:
    """The options lora_* need --tuner lora: nothing reads them where every weight is trained."""
    for name in sorted(draft.where):
        if name.startswith("lora_") and draft["tuner"] == "full":
            yield f"{draft.at(name)}: expected tuner lora, got full ({draft.at('tuner')}); remove it or train with lora"


def four_bits_are_possible(draft: Draft) -> Iterator[str]:
    """load_in_4bit needs frozen weights, whole on each rank, and the package that packs them."""
    if not draft["load_in_4bit"]:
        return
    at, name = draft.at("load_in_4bit"), draft["deepspeed"]
    if draft["tuner"] == "full":
        yield f"{at}: expected tuner lora, as 4-bit weights stay as they are, got full ({draft.at('tuner')}); remove it"
    if not ds_files.problems(name) and ds_files.settings(name).get("zero_optimization", {}).get("stage") == 3:
        yield (
            f"{at}: expected a DeepSpeed file of a stage below 3, which would cut 4-bit weights up, got {name} "
            f"({draft.at('deepspeed')}); take zero2 or zero2_offload"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        yield (
            f"{at}: expected the package bitsandbytes, which packs weights into 4 bits, got none; run "
            "pip install 'dsalign[4bit]', or leave it out"
        )


def dropout_is_allowed(draft: Draft) -> Iterator[str]:
    """An algorithm that compares log-probabilities with a frozen model runs without dropout."""
    if "lora_dropout" in draft.where and draft["lora_dropout"] > 0 and draft.built().traits.dropout == 0:
        yield (
            f"{draft.at('lora_dropout')}: expected 0, as {draft['algo']} runs with all dropout off, "
            f"got {draft['lora_dropout']}; remove it"
        )


def reference_can_be_cached(draft: Draft) -> Iterator[str]:
    """ref_cache on needs a frozen reference and completions from rows: sampled completions are new in every batch."""
    traits = draft.built().traits
    if draft["ref_cache"] == "on" and (traits.roles.get("reference") != "frozen" or traits.online):
        yield (
            f"{draft.at('ref_cache')}: expected auto or off, as {draft['algo']} has no frozen reference of rows, "
            "got on; remove it"
        )


def all_turns_are_of_demonstrations(draft: Draft) -> Iterator[str]:
    """assistant_turns all needs demonstrations: pairs and labels judge the last answer of a conversation alone."""
    if draft["assistant_turns"] == "all" and draft.built().traits.data != "demonstrations":
        yield (
            f"{draft.at('assistant_turns')}: expected last, as {draft['algo']} learns from the last answer of a row, "
            "got all; remove it"
        )


def weights_are_one_a_data_set(draft: Draft) -> Iterator[str]:
    """dataset_weights, where given, has one number for each name in dataset."""
    weights, sets = draft["dataset_weights"], draft["dataset"]
    if weights and len(weights) != len(sets):
        yield (
            f"{draft.at('dataset_weights')}: expected one for each of {len(sets)} data sets, got {len(weights)}; "
            "write as many as --dataset has names"
        )


def columns_are_renamed_once(draft: Draft) -> Iterator[str]:
    """No two columns get one name."""
    ours = list(draft["columns"].values())
    for name in sorted({one for one in ours if ours.count(one) > 1}):
        theirs = [their for their, one in draft["columns"].items() if one == name]
        yield f"{draft.at('columns')}: expected one column for {name!r}, got {', '.join(theirs)}; keep one of them"


def global_batch_is_large_enough(draft: Draft) -> Iterator[str]:
    """An algorithm may need several groups in one optimizer step."""
    least = draft.built().traits.min_groups
    batch, accumulation = draft["batch_size"], draft["gradient_accumulation_steps"]
    if batch * accumulation * draft.world_size < least:
        yield (
            f"{draft.at('gradient_accumulation_steps')}: expected a global batch of at least {least} for "
            f"{draft['algo']}, got batch_size {batch} x {accumulation} x {draft.world_size} ranks; raise one of them"
        )


RULES: tuple[Rule, ...] = (
    file_rules.names_can_be_paths,
    model_has_a_role,
    rewards_have_a_source,
    reward_functions_are_known,
    reward_files_have_the_functions,
    reward_weights_are_one_a_source,
    evaluation_has_rows,
    one_source_of_validation,
    lora_options_need_lora,
    four_bits_are_possible,
    dropout_is_allowed,
    reference_can_be_cached,
    all_turns_are_of_demonstrations,
    weights_are_one_a_data_set,
    file_rules.data_files_exist,
    columns_are_renamed_once,
    file_rules.model_folders_exist,
    file_rules.template_is_known,
    file_rules.trackers_are_installed,
    file_rules.output_dir_can_be_written,
    file_rules.cache_can_be_written,
    file_rules.checkpoint_exists,
    file_rules.deepspeed_is_known,
    global_batch_is_large_enough,
)


def broken(draft: Draft) -> list[str]:
    """A line for each breach of a rule, in the order of RULES."""
    problems: list[str] = []
    for rule in RULES:
        try:
            problems += rule(draft)
        except Unread:
            continue
        except (OSError, RuntimeError):
            if not any("expected a name or a path" in line for line in problems):
                raise
    return problems
