"""Whole runs inside ranks that live on, which a signal to one rank stops in the middle."""

from __future__ import annotations

import os
import signal
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import whole_runs

from dsalign.endings import Ending
from dsalign.engines import dist
from dsalign.guard import signals, wishes
from dsalign.guard.wishes import Wishes
from dsalign.loop import session
from dsalign.loop.context import RunContext
from dsalign.loop.trainer import Trainer


def stopped(words: list[str], step: int, number: int = signal.SIGTERM) -> Any:
    """(name, exit code, message) of what each rank raises when rank 1 is sent a signal in an optimizer step."""
    inner = Trainer.optimizer_step

    def optimizer_step(self: Trainer, *args: Any) -> Any:
        if self.progress.step + 1 == step and dist.rank() == 1:
            hear(number)
        return inner(self, *args)

    return _ended(words, mock.patch.object(Trainer, "optimizer_step", optimizer_step))


def stopped_in_rollout(words: list[str], steps: int, number: int) -> Any:
    """The same of a signal in the rollout that begins after so many optimizer steps."""
    inner, generate = Trainer._prepare, RunContext.generate

    def prepare(self: Trainer, index: int, after_prepare: Any) -> Any:
        def signalled(*args: Any) -> Any:
            self.ctx.state["left by a rollout"] = True
            if self.progress.step == steps and dist.rank() == 1:
                hear(number)
            return generate(self.ctx, *args)

        with mock.patch.object(self.ctx, "generate", signalled):
            prepared = inner(self, index, after_prepare)
        self.ctx.state.clear()
        return prepared

    return _ended(words, mock.patch.object(Trainer, "_prepare", prepare))


def stopped_in_evaluation(words: list[str], step: int) -> Any:
    """The same of a signal in the evaluation after so many optimizer steps."""
    inner = session.evaluate

    def evaluate(algorithm: Any, roles: Any, ctx: Any, loader: Any) -> Any:
        if ctx.wishes.steps == step and dist.rank() == 1:
            hear(signal.SIGTERM)
        return inner(algorithm, roles, ctx, loader)

    def after_step(self: session.Session, metrics: Any) -> None:
        self.wishes.steps = self.progress.step  # type: ignore[attr-defined]
        logged(self, metrics)

    logged = session.Session._after_step
    patches = ExitStack()
    patches.enter_context(mock.patch.object(session, "evaluate", evaluate))
    patches.enter_context(mock.patch.object(Wishes, "steps", 0, create=True))
    patches.enter_context(mock.patch.object(session.Session, "_after_step", after_step))
    return _ended(words, patches)


def asked_by_files(words: list[str], folder: Path) -> Any:
    """The same of a run in whose folder the file SAVE is made in its second step and STOP in its fourth; then the names
    in the folder."""
    inner = Trainer.optimizer_step

    def optimizer_step(self: Trainer, *args: Any) -> Any:
        name = {1: "SAVE", 3: "STOP"}.get(self.progress.step)
        if name and dist.rank() == 0:
            (folder / name).touch()
        return inner(self, *args)

    with mock.patch.object(wishes, "LOOK_S", 0.0):
        said = _ended(words, mock.patch.object(Trainer, "optimizer_step", optimizer_step))
    return said, sorted(path.name for path in folder.iterdir())


def _ended(words: list[str], patch: Any) -> list[Any]:
    try:
        with signals.listening(), patch:
            whole_runs.train(words)
        said: Any = None
    except (Ending, dist.ElsewhereError) as error:
        said = (type(error).__name__, error.code, str(error))
    finally:
        for one in (*signals.URGENT, *signals.POLITE):  # a rank that has stopped is deaf, and this process lives on
            signal.signal(one, signal.SIG_DFL)
    return dist.everyones(said)


def hear(number: int) -> None:
    """Send this process a signal and wait until it is noted."""
    os.kill(os.getpid(), number)
    while not signals.heard().first:
        time.sleep(0.01)
