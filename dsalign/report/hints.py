"""The last lines of a run: its best step, where everything is, and commands to paste that go on from there."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from dsalign.config.schema import RUN_OPTIONS
from dsalign.report import events
from dsalign.report.history import History
from dsalign.report.page import REPORT
from dsalign.report.story import short

READ = ("columns", "system", "on_bad_row", "streaming", "assistant_turns", "max_length", "truncation_strategy")
JUDGES = ("reward_funcs", "reward_weights")


def last_lines(run: History, how: str) -> list[str]:
    """The lines for a run that ended as `how` says, a word of events.ending."""
    folder = shlex.quote(str(run.folder))
    lines = []
    if run.best is not None:
        kept = run.folder / f"checkpoint-{run.best[0]}" if run.best[0] in run.checkpoints else "no checkpoint of it"
        lines.append(f"best: held-out loss {short(run.best[1])} at step {run.best[0]}: {kept}")
    if run.has_final and how == events.DONE:
        lines.append(f"model: {run.folder / 'final'}")
    if run.checkpoints:
        lines.append(f"checkpoint: {run.folder / f'checkpoint-{run.checkpoints[-1]}'}")
    if run.memory:
        lines.append(f"memory: {_memory(run.memory)}")
    lines.append(f"report: {run.folder / REPORT}")
    commands = _commands(run, folder, how)
    width = max(map(len, commands), default=0)
    return lines + [f"  {command:<{width}}  # {what}" for command, what in commands.items()]


def _memory(of: Mapping[str, float]) -> str:
    """The most that a rank held, and by role what its model took as it was loaded; what is not known is left out."""
    peak = [f"at most {of['peak']:.2f} GiB a rank"] if "peak" in of else []
    small = {role: f"{size:.2f}" if size >= 0.005 else "<0.01" for role, size in of.items() if role != "peak"}
    loaded = ", ".join(f"{role} {size}" for role, size in small.items())
    return "; ".join([*peak, *([f"as loaded: {loaded} GiB"] if loaded else [])])


def _commands(run: History, folder: str, how: str) -> Mapping[str, str]:
    """Command -> what it is for."""
    found = {}
    if how != events.DONE:
        ranks = run.begin.get("ranks", 1)
        several = f"NPROC_PER_NODE={ranks} " if isinstance(ranks, int) and ranks > 1 else ""
        what = "go on from the newest checkpoint" if run.checkpoints else "begin again, as no checkpoint was written"
        found[f"{several}dsalign resume {folder}"] = what
    if run.has_final and how == events.DONE:
        found |= {f"dsalign {verb} {words}": what for verb, (words, what) in _next(run, folder).items()}
    return found


def _next(run: History, folder: str) -> Mapping[str, tuple[str, str]]:
    """Verb -> (what follows it, what it is for), of those that take what the run trained: a reward model does not talk,
    and only an adapter is merged."""
    final = run.folder / "final"
    is_reward = (final / "value_head.safetensors").exists()
    system = run.settings.get("system")
    found = {
        "chat": (f"{folder} --system {shlex.quote(str(system))}" if system else folder, "talk to it"),
        "eval": (f"{folder} {shlex.join(_measured(run.settings, is_reward=is_reward))}", "evaluate it"),
        "merge": (folder, "merge its adapter into the weights"),
        "export": (f"{folder} {shlex.quote(f'{run.folder}-plain')}", "a plain folder of it"),
    }
    left_out = [] if (final / "adapter_config.json").exists() else ["merge"]
    left_out += ["chat"] if is_reward else []
    return {verb: how for verb, how in found.items() if verb not in left_out}


def _measured(settings: Mapping[str, Any], *, is_reward: bool) -> list[str]:
    """The options of `dsalign eval` by which a model reads rows, answers and is judged as in its run."""
    found = ["--dataset", *(settings.get("val_dataset") or settings.get("dataset") or ["demo:pairs"])]
    for name in READ:
        value = settings.get(name)
        if value not in (None, {}, RUN_OPTIONS[name].default):
            words = [f"{theirs}={ours}" for theirs, ours in value.items()] if isinstance(value, Mapping) else [value]
            found += [f"--{name}", *(str(word).lower() if isinstance(word, bool) else word for word in words)]
    if "max_new_tokens" in settings:
        found += ["--max_new_tokens", settings["max_new_tokens"]]
        found += ["--reward", settings["reward_model"]] if settings.get("reward_model") else []
        for name in JUDGES:
            found += [f"--{name}", *settings[name]] if settings.get(name) else []
    return list(map(str, found if is_reward else [*found, "--vs", "base"]))
