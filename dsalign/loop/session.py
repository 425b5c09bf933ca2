"""What happens around the loop: opening lines, log lines, evaluations, checkpoints, samples, and final/ at the end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dsalign.checkpoint.checkpoints import Store
from dsalign.config.schema import RunConfig
from dsalign.contract.groups import Prepared
from dsalign.data.batches.loader import Loader
from dsalign.data.checks import Survey
from dsalign.engines import dist
from dsalign.loop.evaluate import evaluate
from dsalign.loop.metrics import Window
from dsalign.loop.trainer import Trainer
from dsalign.report.page import write_report
from dsalign.report.run_log import Report, number

CHECKED = 1000  # groups that are looked at when a run starts
COUNTERS = ("num_tokens", "episode")


class Session:
    """One training from its first line to final/. Every method is collective."""

    def __init__(self, config: RunConfig, trainer: Trainer, store: Store, held_out: Loader | None) -> None:
        self.config, self.trainer, self.store, self.held_out = config, trainer, store, held_out
        self.progress, self.total = trainer.progress, trainer.total_steps
        self.output_dir = Path(config.output_dir)
        self.report = Report(
            self.output_dir,
            config.report_to,
            rank=dist.rank(),
            total_steps=self.total,
            resumed=config.resume is not None,
        )
        self._window = Window()
        self._last: dict[str, float] = {}
        self._saved_step = self.progress.step

    def run(self) -> dict[str, float]:
        """Train to the end and write final/ and report.html; returns the last metrics."""
        self._open()
        if self.held_out is not None and self.progress.step == 0:
            self._evaluate()
        self.report.start(self.progress.step, self.progress.num_tokens)
        self.trainer.fit(self._after_step, self._show_samples)
        if self.progress.step > self._saved_step:
            self._save()
        self.store.export(self.output_dir / "final")
        best = self.progress.best_loss
        tail = "" if best is None else f", best eval/loss {number(best)} at step {self.progress.best_step}"
        if dist.rank() == 0:
            write_report(self.output_dir, f"{self.config.algo} of {self.config.model}")
        final = self.output_dir / "final"
        self.report.say(f"done: {self.progress.step} steps{tail}; model in {final}, curves in report.html")
        return self._last

    def _after_step(self, metrics: Mapping[str, float]) -> None:
        config, step = self.config, self.progress.step
        self._window.add(metrics)
        if step % config.logging_steps == 0 or step == self.total:
            now = {name: x for name, x in metrics.items() if name in COUNTERS or name.endswith("lr")}
            means = {**self._window.take(), **now}  # where the run is: not averaged
            self._last |= means
            self.report.log(step, {**means, "epoch": self.progress.batches / self.trainer.loader.steps_per_epoch})
        if not self.trainer.at_boundary:
            return
        if self.held_out is not None and (step == self.total or self._due(config.eval_steps)):
            self._evaluate()
        if self._due(config.save_steps) and step < self.total and step != self._saved_step:
            self._save()

    def _due(self, every: int | None) -> bool:
        """Whether a multiple of `every` steps was passed within the optimizer steps of this prepared batch."""
        step, passes = self.progress.step, self.trainer.algorithm.epochs * self.trainer.algorithm.mini_batches
        return every is not None and step // every > max(0, step - passes) // every

    def _evaluate(self) -> None:
        assert self.held_out is not None
        found = evaluate(self.config.algorithm, self.trainer.models, self.trainer.ctx, self.held_out)
        self.report.log(self.progress.step, found)
        self._last |= found
        progress = self.progress
        if progress.best_loss is None or found["eval/loss"] < progress.best_loss:
            progress.best_loss, progress.best_step = found["eval/loss"], progress.step
            if 0 < progress.step < self.total:
                self._save()

    def _save(self) -> None:
        self.store.save(self.progress)
        self._saved_step = self.progress.step

    def _show_samples(self, prepared: Prepared) -> None:
        self.report.samples(self.progress.step, prepared.samples)

    def _open(self) -> None:
        config, trainer, report = self.config, self.trainer, self.report
        engine = trainer.models.engines[trainer.trained[0]]
        parameters = [getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters() if p.requires_grad]
        report.say(
            f"{config.algo} {config.tuner} of {config.model}: {sum(parameters) / 1e6:.2f} M trained parameters, "
            f"{config.deepspeed} on {dist.world_size()} rank(s), {trainer.models.device.type}, "
            f"{str(next(engine.module.parameters()).dtype).removeprefix('torch.')}"
        )
        report.say(
            f"{len(trainer.loader.groups)} rows of {' '.join(config.dataset)}, {self.total} steps, "
            f"{trainer.loader.global_batch} rows a batch"
            + (f", {len(self.held_out.groups)} held out" if self.held_out else "")
            + (f"; resuming at step {self.progress.step}" if self.progress.step else "")
        )
        if config.algorithm.roles.get("reward") == "frozen":
            report.say(f"reward: {' + '.join([*filter(None, [config.reward_model]), *config.reward_funcs])}")
        groups = trainer.loader.groups
        first = [groups[i] for i in range(min(len(groups), CHECKED))]
        for finding in Survey(first, trainer.ctx.end_ids, None).findings():
            report.say(f"{finding.line()} (dsalign data check says more)")
        for line in config.algorithm.notes(groups):
            report.say(line)
        if trainer.loader.dropped:
            report.say(f"warning: the last {trainer.loader.dropped} row(s) of each epoch are too few and left out")
