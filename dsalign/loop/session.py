"""The surroundings of the training loop: opening lines, log lines, evaluations, checkpoints, samples and final/."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

from dsalign import endings, phases
from dsalign.checkpoint.card import write_card
from dsalign.checkpoint.checkpoints import Checkpoints
from dsalign.config.schema import RunConfig
from dsalign.contract.groups import Prepared
from dsalign.data.batches.loader import Loader
from dsalign.data.checks import TRAINED, Survey
from dsalign.engines import dist
from dsalign.guard import resources, signals
from dsalign.guard.trends import GUARDS, Watch
from dsalign.loop.context import Interrupted
from dsalign.loop.evaluate import evaluate
from dsalign.loop.metrics import Spread, Window
from dsalign.loop.trainer import Trainer
from dsalign.report.environment import memory_peak
from dsalign.report.history import METRICS, lines
from dsalign.report.run_log import RunLog
from dsalign.report.story import duration

logger = logging.getLogger(__name__)
GRACE_S = 30  # seconds that deepspeed, torchrun and Slurm give a rank between SIGTERM and SIGKILL
CHECKED = 1000  # the first groups, which are surveyed for flaws when a run starts
COUNTERS = ("num_tokens", "episode", "bad_steps")  # metrics of which a log line has the last value in place of a mean


class Session:
    """One run of a trainer with everything around its steps: logs, evaluates, saves checkpoints, and writes final/.

    store: the run's checkpoints. held_out: batches to evaluate on, None = no evaluation. command: the one that started
    the run. origins: option -> where its value is from, for the report. Every method is collective.
    """

    def __init__(
        self,
        config: RunConfig,
        trainer: Trainer,
        store: Checkpoints,
        held_out: Loader | None,
        command: str,
        origins: Mapping[str, str] | None = None,
    ) -> None:
        self.origins = origins or {}
        self.config, self.trainer, self.store, self.held_out = config, trainer, store, held_out
        self.command, self.wishes = command, trainer.ctx.wishes
        self.progress, self.total = trainer.progress, trainer.total_steps
        self.output_dir = Path(config.output.output_dir)
        self.report = dist.together(
            lambda: RunLog(
                self.output_dir,
                config.output.report_to,
                rank=dist.rank(),
                total_steps=self.total,
                resumed=config.output.resume is not None,
            )
        )
        self._watch = self._watching(config.output.guard) if config.output.guard != "off" else None
        self._bad_trends: list[str] = []
        self._needs = resources.needs_of(store.engines, config)
        log = self.progress.log
        self._window, self._spread = Window(log.setdefault("window", {})), Spread(log.setdefault("spread", {}))
        self._last: dict[str, float] = {}
        self._now: dict[str, float] = {}
        self._saved_step = self._logged_step = self.progress.step
        self._evaluated_step: int | None = None
        self._saves, self._said_slow = 0, False  # of this process
        self.wishes.busy = lambda: not store.ready()

    def _watching(self, guard: str) -> Watch:
        """The guards of the run, which remember what it logged before it was resumed: rank 0 has it on disk, in
        output_dir, or where that is another one, beside the checkpoint."""
        watch, past = Watch(), self.output_dir / METRICS
        if self.progress.step:
            past = past if past.exists() else Path(self.config.output.resume or "").parent / METRICS
            logged = list(lines(past)) if dist.rank() == 0 else []
            needed = {"step", *(name for one in GUARDS for name in one.needs)}
            watch.recall(
                dist.from_rank_0([{k: x for k, x in one.items() if k in needed} for one in logged]),
                self.progress.step,
                spoken=guard == "warn",
            )
        return watch

    def run(self) -> dict[str, float]:
        """Train to the end and write final/; returns the last value of every metric. report.html is written however the
        run ends.

        Raises Stopped on rank 0, and ElsewhereError on the others, where the run was asked to stop; then it is saved.
        """
        try:
            last = self._run()
        except BaseException as error:
            if isinstance(error, endings.Diverged) or dist.is_agreed(error):  # else the other ranks are elsewhere
                self._settle()
            self.report.close(error)
            raise
        self.report.close(None)
        return last

    def _run(self) -> dict[str, float]:
        self._open()
        signals.begun()
        if dist.rank() == 0:
            self.wishes.folder = self.output_dir
        try:
            if self.held_out is not None and (self.progress.step == 0 or self.progress.owes_evaluation):
                self._evaluate()
            self.report.start(self.progress.step, self.progress.num_tokens)
            self.trainer.fit(self._after_step, self._show_samples)
            if self.progress.step < self.total:
                self._end_early()
        except Interrupted:
            self._stop()
        if self.progress.step > self._saved_step:
            self._save()
        phases.mark("export", self.progress.step)
        with resources.writing("final", self.output_dir, self._needs.weights):
            self.store.export(self.output_dir / "final", self.progress.step, self._card)
        phases.mark("report")
        self.report.say(f"done: {self.progress.step} steps")
        return self._last

    def _card(self, folder: Path) -> None:
        """Write the model card of final/ into `folder`, which is to become it."""
        base, rows = next(iter(self.store.bases.values())), len(self.trainer.loader.groups)
        at = self.output_dir / "final"
        write_card(folder, self.config, base, self._last, at=at, step=self.progress.step, num_rows=rows)

    def _after_step(self, metrics: Mapping[str, float]) -> None:
        config, step = self.config, self.progress.step
        if self.wishes.settle:
            self._settle()
        self._window.add({**metrics, **self._spread.of(metrics, last=self.progress.prepared is None)})
        self._now = {name: x for name, x in metrics.items() if name in COUNTERS or name.endswith("lr")}
        if step % config.output.logging_steps == 0 or step == self.total:
            self._log()
        elif step == 1:
            self.report.show(step, metrics)
        if self.held_out is not None and (step == self.total or _due(step, config.output.eval_steps)):
            self._evaluate()
        due = step < self.total and step != self._saved_step and _due(step, config.output.save_steps)
        if due or self.wishes.save:
            self._save()
        if self._bad_trends and config.output.guard == "stop" and step < self.total:
            if step != self._saved_step:
                self._save()
            self._settle()
            raise endings.Stopped(
                f"{self._bad_trends[0]}; saved at step {step}; resume with --guard warn to go on all the same"
            )
        if self.wishes.stop:
            raise Interrupted

    def _log(self) -> None:
        """Log the means over the steps since the last line, and the counters and learning rates of this step."""
        step = self.progress.step
        means = {**self._window.take(), **self._now, **self.trainer.ctx.clock.take(step - self._logged_step)}
        self._logged_step = step
        self._last |= means
        epoch = self.progress.batches / self.trainer.loader.steps_per_epoch
        peak = dist.largest(memory_peak(), self.trainer.roles.device) / 2**30
        self.report.log(self.progress.step, {**means, "epoch": epoch, "memory/peak": peak})
        for text in self._watch.add(means) if self._watch is not None else ():
            self._bad_trends.append(text)
            logger.warning(text)

    def _end_early(self) -> None:
        """Log and evaluate as after a last step, for a run whose last batches had no groups to learn from."""
        self.report.say(f"{self.total - self.progress.step} step(s) had no groups to learn from and were not taken")
        if self._window:
            self._log()
        if self.held_out is not None and self.progress.step != self._evaluated_step:
            self._evaluate()

    def _evaluate(self) -> None:
        assert self.held_out is not None
        progress = self.progress
        progress.owes_evaluation = True
        if self.wishes.stop:
            raise Interrupted
        with phases.within("evaluate"):
            found = evaluate(self.config.algorithm, self.trainer.roles, self.trainer.ctx, self.held_out)
        progress.owes_evaluation = False
        self._evaluated_step = progress.step
        self.report.log(self.progress.step, found)
        self._last |= found
        if not isfinite(found["eval/loss"]):
            self.report.say(f"warning: eval/loss is {found['eval/loss']} at step {progress.step}, and no best one")
        elif progress.best_loss is None or found["eval/loss"] < progress.best_loss:
            progress.best_loss, progress.best_step = found["eval/loss"], progress.step
            if 0 < progress.step < self.total:
                self._save()

    def _save(self) -> None:
        """Save a checkpoint. Training goes on while its files are hashed and flushed, and it has its name at the step
        after which all are on the disk. One that was wished for, and the first, which tells of a disk that is slow or
        not shared, are waited for."""
        start, step = time.monotonic(), self.progress.step
        awaited = self.wishes.save or not self._saves
        self.wishes.saved()
        with self._saving(f"checkpoint-{step}"):
            self.store.start(self.progress)
            self.wishes.settle = False
            if awaited:
                self.store.settle()
        self._saved_step, self._saves = step, self._saves + 1
        took = time.monotonic() - start
        if took > GRACE_S and not self._said_slow:
            self._said_slow = True
            self.report.say(
                f"warning: a checkpoint took {duration(took)} to write; deepspeed, torchrun and Slurm kill "
                f"{GRACE_S} s after SIGTERM, before such a save is done: stop with --max_wall or the file STOP instead"
            )

    def _settle(self) -> None:
        """Give a checkpoint that is under way its name."""
        if self.store.unsettled:
            with self._saving("a checkpoint"):
                self.store.settle()

    @contextmanager
    def _saving(self, what: str) -> Iterator[None]:
        with phases.within("save"), resources.writing(what, self.output_dir, self._needs.checkpoint):
            yield

    def _stop(self) -> None:
        """Save the run, unless that was done, and end it with a message of rank 0 whose last line is a command."""
        step, wishes = self.progress.step, self.wishes
        reasons = enumerate(dist.everyones(wishes.reason()))
        why = next(f"{one} on rank {rank}" for rank, one in reasons if one)
        if step == 0:
            text = f"stopped by {why} before the first step; nothing is lost, it starts again with\n{self.command}"
        else:
            if step != self._saved_step or self.progress.owes_evaluation:
                self.report.say(f"{why}: saving at step {step}")
                self._save()
            self._settle()
            text = (
                f"stopped by {why} at step {step} of {self.total}, saved in {self.output_dir / f'checkpoint-{step}'}; "
                f"resume with\n{endings.resuming(self.command)}"
            )
        wishes.stopped()
        dist.agree(endings.Stopped(text) if dist.rank() == 0 else None)

    def _show_samples(self, prepared: Prepared) -> None:
        self.report.samples(self.progress.step, prepared.samples)

    def _open(self) -> None:
        config, trainer, report = self.config, self.trainer, self.report
        engine = trainer.roles.engines[next(iter(trainer.stepped))]
        parameters = [getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad]
        report.title(
            f"{config.algo} {config.models.tuner} of {config.models.model}: "
            f"{sum(parameters) / 1e6:.2f} M trained parameters, "
            f"{config.optim.deepspeed} on {dist.world_size()} rank(s), {trainer.roles.device.type}, "
            f"{str(next(engine.module.parameters()).dtype).removeprefix('torch.')}"
        )
        report.say(
            f"{len(trainer.loader.groups)} rows of {' '.join(config.data.dataset)}, {self.total} steps, "
            f"{trainer.loader.global_batch} rows a batch"
            + (f", {len(self.held_out.groups)} held out" if self.held_out else "")
            + (f"; resuming at step {self.progress.step}" if self.progress.step else "")
        )
        if config.algorithm.traits.roles.get("reward") == "frozen":
            model, functions = config.models.reward_model, config.models.reward_funcs
            report.say(f"reward: {' + '.join([*filter(None, [model]), *functions])}")
        groups = trainer.loader.groups
        survey = Survey(groups[:CHECKED], trainer.ctx.end_ids, None)
        others = self.held_out.groups[:CHECKED] if self.held_out else ()
        held_out = Survey(others, trainer.ctx.end_ids, None, survey)
        self._begin(survey)
        for finding in [*survey.findings(), *(one for one in held_out.findings() if one.rule == TRAINED)]:
            report.say(f"{finding.line()} (dsalign data check says more)")
        module = engine.module
        if module.balancing is not None:
            report.say(
                f"loss: plus {module.balancing.coefficient:g} x aux_loss, the model's own balancing loss of each "
                "micro-batch, by its tokens: the one term that depends on how a step is cut"
            )
        for line in config.algorithm.notes(groups):
            report.say(line)
        if trainer.loader.dropped:
            report.say(f"warning: the last {trainer.loader.dropped} row(s) of each epoch are too few and left out")

    def _begin(self, survey: Survey) -> None:
        """Note for the report what the run begins with. survey: of the first training groups."""
        loader, held_out = self.trainer.loader, len(self.held_out.groups) if self.held_out else 0
        data: dict[str, Any] = {"data sets": " ".join(self.config.data.dataset), "rows": len(loader.groups)}
        data |= {"rows held out": held_out} if held_out else {}
        data |= {"rows a batch": loader.global_batch}
        data |= {"rows left out at the end of an epoch": loader.dropped} if loader.dropped else {}
        data |= {"lengths measured on": f"the first {CHECKED}"} if len(loader.groups) > CHECKED else {}
        self.report.begin(
            self.config.options(),
            rows=len(loader.groups),
            held_out=held_out,
            ranks=dist.world_size(),
            device=self.trainer.roles.device.type,
            data={**data, "lengths": {name: asdict(of) for name, of in survey.lengths().items()}},
            memory={role: size / 2**30 for role, size in self.trainer.roles.memory.items()},
            origins=self.origins,
        )


def _due(step: int, every: int | None) -> bool:
    """Whether something that is done every so many steps is done after this one."""
    return every is not None and step % every == 0
