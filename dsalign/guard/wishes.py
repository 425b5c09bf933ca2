"""What asks a run to stop, to save or to end a save, on this rank, and what all ranks agreed on. Imports no torch."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dsalign.guard import signals
from dsalign.guard.parents import Launchers

logger = logging.getLogger(__name__)
STOP, SAVE = "STOP", "SAVE"  # files in the output folder
LOOK_S = 1.0  # between two looks at files and launchers


class Wishes:
    """The wishes of one rank. `stop`, `save` and `settle` are what was agreed: they are the same on every rank.

    max_wall: seconds after the start of the process at which the run stops, None = never. launchers: those whose end is
    a wish to stop. folder: in which the files STOP and SAVE are looked for, None = nowhere; one rank of a run looks.
    busy: whether a save that this rank has begun is not on the disk yet; `settle` is agreed when no rank is.
    """

    def __init__(self, max_wall: float | None = None, launchers: Launchers | None = None) -> None:
        self._max_wall, self._launchers = max_wall, launchers or Launchers()
        self._heard = signals.heard()
        self._looked = float("-inf")
        self._reason, self._save = "", False
        self.folder: Path | None = None
        self.busy: Callable[[], bool] = lambda: False
        self.stop = self.save = self.settle = False

    def numbers(self) -> tuple[float, float, float]:
        """(1 where this rank wants to stop, 1 where it wants to save, 1 where it is busy), to be added up over the
        ranks."""
        reason = self.reason()
        return float(bool(reason)), float(self._save), float(self.busy())

    def agreed(self, sums: Sequence[float]) -> None:
        """Take over the sums of every rank's `numbers`."""
        self.stop, self.save, self.settle = self.stop or sums[0] > 0, self.save or sums[1] > 0, sums[2] == 0

    def reason(self) -> str:
        """Why this rank wants to stop; empty where it does not."""
        if not self._reason:
            self._reason = self._heard.name or self._late() or self._seen()
        return self._reason

    def saved(self) -> None:
        """Tell that the wish to save is fulfilled: the file SAVE is removed. Called before the save, so that one that
        is made meanwhile is another wish."""
        self.save = False
        if self._save and self.folder is not None:
            self._remove(SAVE)

    def stopped(self) -> None:
        """Tell that the wish to stop is fulfilled: the file STOP is removed, and signals are ignored from here."""
        signals.ignore()
        if self.folder is not None:
            self._remove(STOP)

    def _late(self) -> str:
        late = self._max_wall is not None and time.monotonic() - signals.STARTED >= self._max_wall
        return "--max_wall" if late else ""

    def _seen(self) -> str:
        """Look at files and launchers, at most once in LOOK_S."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return ""
        self._looked = now
        if self.folder is not None:
            self._save = os.path.exists(self.folder / SAVE)
            if os.path.exists(self.folder / STOP):
                return f"the file {self.folder / STOP}"
        return self._launchers.lost()

    def _remove(self, name: str) -> None:
        """Remove a file that was a wish. Where that is not possible it is no longer looked for."""
        self._save = False
        assert self.folder is not None
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("%s cannot be removed (%s); STOP and SAVE are no longer looked for", name, error.strerror)
            self.folder = None
