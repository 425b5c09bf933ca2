"""What the ranks run about steps that are skipped: a NaN in a loss, in a gradient and in what was prepared."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cases
import run_cases
import torch
from run_cases import Run

from dsalign import faults
from dsalign.contract.groups import Prepared
from dsalign.endings import Diverged
from dsalign.engines import dist
from dsalign.engines.finite import flat_parts, non_finite
from dsalign.loop.trainer import Trainer


@contextmanager
def fault(wanted: str) -> Iterator[None]:
    """The faults that `wanted` names, in this process, counted from here."""
    faults._seen.clear()
    os.environ |= {"DSALIGN_TEST": "1", "DSALIGN_FAULT": wanted}
    try:
        yield
    finally:
        del os.environ["DSALIGN_TEST"], os.environ["DSALIGN_FAULT"]


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Name -> tensor: this rank's trained weights and what its optimizers keep, copied."""
    engines = {name: trainer.roles.engines[name] for name in trainer.stepped}
    return {f"{role} {n}": t.detach().clone() for role, engine in engines.items() for n, t in flat_parts(engine)}


def skipped(run: Run, wanted: str) -> tuple[bool, bool, list[list[str]], dict[str, Any]]:
    """(whether weights and optimizer state of every rank are as they were before the second step, in which `wanted`
    happens; whether the step behind it is that of a run which never had the second one; the names of the metrics of
    each step; the progress)."""
    trainer, other = run_cases.build(run), run_cases.build(run)
    before: list[dict[str, torch.Tensor]] = []
    names: list[list[str]] = []

    def after_step(metrics: dict[str, float]) -> None:
        names.append(sorted(metrics))
        before.append(state(trainer))

    with fault(wanted):
        run_cases.fit(trainer, after_step, 3)
    plain = other.optimizer_step

    def leave_out(prepared: Prepared, positions: Any) -> dict[str, float]:
        return {} if other.progress.step == 1 else plain(prepared, positions)

    other.optimizer_step = leave_out  # type: ignore[method-assign]
    run_cases.fit(other, lambda metrics: None, 3)
    third = state(other)
    untouched = before[0].keys() == before[1].keys() and all(torch.equal(before[0][n], before[1][n]) for n in before[0])
    same = all(torch.equal(third[n], before[2][n]) for n in third)
    moved = any(not torch.equal(before[1][n], before[2][n]) for n in before[1])
    every = dist.everyones((untouched, same and moved))
    return all(u for u, _ in every), all(s for _, s in every), names, trainer.progress.as_dict()


def two_engines(folder: Path, stage: str, wanted: str, out: Path) -> tuple[bool, dict[str, Any]]:
    """(whether policy and critic of every rank are as they were before the step in which `wanted` happens, progress)
    of an actor-critic at its first step."""
    trainer = cases.build("actor_critic", folder, stage=stage, batch_size=2, global_batch=6, rows=6, max_steps=1)
    trainer._bad._output_dir = out
    before = state(trainer)
    with fault(wanted):
        trainer.fit(lambda metrics: None)
    after = state(trainer)
    same = all(torch.equal(before[n], after[n]) for n in before)
    return all(dist.everyones(same)), trainer.progress.as_dict()


def bad_row(folder: Path, out: Path, most: int, epochs: int = 1) -> tuple[list[str], list[dict[str, float]], list[str]]:
    """(the message of each rank, the metrics of each step, the files under out/bad) of a reward model trained on 8 rows
    in steps of 2, where the third row has a margin of NaN; the whole data set may come several times."""
    groups = [
        dataclasses.replace(g, margin=float("nan") if g.index == 2 else 0.0) for g in cases.random_groups("pairs", 8)
    ]
    trainer = cases.build("rm", folder, stage="2", groups=groups * epochs, global_batch=2)
    trainer._bad._output_dir, trainer._bad._most = out, most
    seen: list[dict[str, float]] = []
    message = ""
    try:
        trainer.fit(seen.append)
    except Diverged as error:
        message = str(error)
    files = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    return dist.everyones(message), seen, files


def bad_batch(folder: Path, out: Path) -> tuple[list[dict[str, float]], dict[str, Any], dict[str, Any], bool]:
    """(metrics, progress, the algorithm's state, whether the second batch left weights as they were) of an actor-critic
    whose second prepared batch has a NaN on rank 1, and whose `prepare` counts in its state."""
    trainer = cases.build("actor_critic", folder, stage="2", batch_size=2, global_batch=3, rows=9)
    trainer._bad._output_dir = out
    plain = type(trainer.algorithm).prepare
    kept: dict[int, dict[str, torch.Tensor]] = {}

    def prepare(self: Any, ctx: Any, batch: Any) -> Prepared:
        found = plain(self, ctx, batch)
        ctx.state["batches"] = [*ctx.state.get("batches", []), ctx.step]
        if ctx.step == 1 and dist.rank() == 1:
            found.fields["old"][0][0] = float("nan")
        return found

    seen: list[dict[str, float]] = []

    def after_step(metrics: dict[str, float]) -> None:
        seen.append(metrics)
        kept[trainer.progress.step] = state(trainer)

    type(trainer.algorithm).prepare = prepare  # type: ignore[method-assign]
    try:
        trainer.fit(after_step)
    finally:
        type(trainer.algorithm).prepare = plain  # type: ignore[method-assign]
    same = all(torch.equal(kept[6][n], kept[12][n]) for n in kept[6])
    return seen, trainer.progress.as_dict(), dict(trainer.ctx.state), all(dist.everyones(same))


def broken_weights(run: Run, rank: int, number: float, where: str) -> list[str]:
    """What `non_finite` says on each rank, before and after a trained engine has this number on a rank, `where`: in a
    weight, or in the optimizer's state of one."""
    trainer = run_cases.train(run, 1)
    engines = {role: trainer.roles.engines[role] for role in trainer.stepped}
    clean = non_finite(engines)
    parts = [(n, t) for n, t in flat_parts(next(iter(engines.values()))) if n.startswith(where)]
    if dist.rank() == rank:
        with torch.no_grad():
            parts[0][1].view(-1)[-1] = number
    return [clean, *dist.everyones(non_finite(engines))]


def diverged(run: Run, out: Path) -> list[str]:
    """The message of each rank, and the names in `out`, where a rank's weights are spoiled after a step and saved."""
    trainer = run_cases.train(run, 1)
    store = run_cases.store_of(trainer, run, out)
    store.save(trainer.progress)
    trainer.progress.step = 2
    engine = trainer.roles.engines[run_cases.role_of(trainer)]
    if dist.rank() == dist.world_size() - 1:
        with torch.no_grad():
            weight = next(p for p in engine.module.parameters() if p.requires_grad)
            getattr(weight, "ds_tensor", weight).view(-1)[0] = float("inf")
    messages = []
    for write in (lambda: store.save(trainer.progress), lambda: store.export(out / "final")):
        try:
            write()
            messages.append("nothing stopped it")
        except Diverged as error:
            messages.append(str(error))
    names = sorted(path.name for path in out.iterdir())
    return [*dist.everyones(" / ".join(messages)), *names]
