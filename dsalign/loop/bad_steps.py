"""What a run does with a step whose numbers are not finite: it skips it on every rank, keeps it, counts it, and ends
where there are too many in a row."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsalign.checkpoint.progress import Progress
from dsalign.contract.groups import Prepared
from dsalign.endings import Diverged
from dsalign.engines import dist
from dsalign.engines.finite import non_finite
from dsalign.guard import numbers
from dsalign.guard.numbers import BadStep

logger = logging.getLogger(__name__)


class BadSteps:
    """The skipped steps of a run.

    engines: by role, those that are stepped. output_dir: where RUN/bad/step-N/ is written, None = nowhere. most: how
    many steps in a row may be skipped. learning_rate: the run's, for the message.
    """

    def __init__(self, engines: Mapping[str, Any], output_dir: Path | None, most: int, learning_rate: float) -> None:
        self._engines, self._output_dir, self._most, self._learning_rate = engines, output_dir, most, learning_rate

    def skip(
        self,
        why: str,
        progress: Progress,
        prepared: Prepared,
        positions: Sequence[int],
        rows: list[str],
        count: int = 1,
    ) -> None:
        """Keep and count a step, or `count` of them, over this rank's groups of `prepared` at `positions`, which no
        engine has taken. Collective.

        why: what is not finite, equal on all ranks. rows: those of this rank from which it comes, where that is known.
        Raises Diverged on every rank where weights or optimizer state are not finite either, as the next step then is
        no better, and where more than `most` in a row are skipped.
        """
        step = progress.step + 1
        if broken := non_finite(self._engines):
            raise Diverged(
                f"step {step}: {why}, as numbers of the model are no longer finite: {broken}; go on by dsalign resume "
                f"with a --learning_rate below {self._learning_rate:g}"
            )
        every = [row for one in dist.everyones(rows) for row in one]
        bad = BadStep(why, step, max(0, progress.batches - 1), tuple(dict.fromkeys(every)))
        kept = "not kept"
        if self._output_dir is not None:
            kept = numbers.keep(self._output_dir, bad, prepared, positions)
        progress.bad_steps += count
        progress.bad_in_a_row += 1
        if progress.bad_in_a_row > self._most:
            raise Diverged(numbers.advice(bad, self._most, kept, self._learning_rate))
        which = f"step {step} is" if count == 1 else f"steps {step} to {step + count - 1} are"
        logger.warning("warning: %s skipped, weights stay as they are: %s (%s)", which, bad.text(), kept)
