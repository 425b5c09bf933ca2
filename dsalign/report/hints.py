"""The last lines of a run: its best step, where everything is, and commands to paste that go on from there."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from dsalign.report import events
from dsalign.report.history import History
from dsalign.report.page import REPORT
from dsalign.report.story import short

VERBS = Path(__file__).parent.parent / "verbs"


def last_lines(run: History, how: str) -> list[str]:
    """The lines for a run that ended as `how` says, a word of events.ending. Only commands that exist are named."""
    folder = shlex.quote(str(run.folder))
    lines = []
    if run.best is not None:
        lines.append(f"best: held-out loss {short(run.best[1])} at step {run.best[0]}")
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
    loaded = ", ".join(f"{role} {size:.2f}" for role, size in of.items() if role != "peak")
    return "; ".join([*peak, *([f"as loaded: {loaded} GiB"] if loaded else [])])


def _commands(run: History, folder: str, how: str) -> Mapping[str, str]:
    """Command -> what it is for."""
    found = {}
    if how != events.DONE and run.checkpoints:
        ranks = run.begin.get("ranks", 1)
        several = f"NPROC_PER_NODE={ranks} " if isinstance(ranks, int) and ranks > 1 else ""
        config = shlex.quote(str(run.folder / "config.yaml"))
        resume = f"dsalign resume {folder}" if exists("resume") else f"dsalign --config {config} --resume"
        found[several + resume] = "go on from the newest checkpoint"
    if run.has_final and how == events.DONE:
        found |= {f"dsalign {verb} {words}": what for verb, (words, what) in _next(run, folder).items() if exists(verb)}
    return found


def _next(run: History, folder: str) -> Mapping[str, tuple[str, str]]:
    """Verb -> (what follows it, what it is for), of those that take what the run trained: a reward model does not talk,
    and only an adapter is merged."""
    rows = run.settings.get("val_dataset") or run.settings.get("dataset") or ["demo:pairs"]
    found = {
        "chat": (folder, "talk to it"),
        "eval": (f"{folder} --dataset {shlex.join(map(str, rows))}", "evaluate it"),
        "merge": (folder, "merge its adapter into the weights"),
        "export": (f"{folder} {shlex.quote(f'{run.folder}-plain')}", "a plain folder of it"),
    }
    final = run.folder / "final"
    left_out = [] if (final / "adapter_config.json").exists() else ["merge"]
    left_out += ["chat"] if (final / "value_head.safetensors").exists() else []
    return {verb: how for verb, how in found.items() if verb not in left_out}


def exists(verb: str) -> bool:
    """Whether dsalign has this command."""
    return (VERBS / f"{verb}.py").exists()
