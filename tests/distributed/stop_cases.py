"""Whole runs inside ranks that live on, which a signal to one rank stops in the middle."""

from __future__ import annotations

import os
import signal
import time
from typing import Any
from unittest import mock

import whole_runs

from dsalign.endings import Ending
from dsalign.engines import dist
from dsalign.guard import signals
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

    def prepare(self: Trainer, index: int) -> Any:
        def signalled(*args: Any) -> Any:
            self.ctx.state["left by a rollout"] = True
            if self.progress.step == steps and dist.rank() == 1:
                hear(number)
            return generate(self.ctx, *args)

        with mock.patch.object(self.ctx, "generate", signalled):
            prepared = inner(self, index)
        self.ctx.state.clear()
        return prepared

    return _ended(words, mock.patch.object(Trainer, "_prepare", prepare))


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
