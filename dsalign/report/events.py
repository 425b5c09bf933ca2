"""events.jsonl: what happened to a run beside its numbers, a line each: how it began, its warnings, how it ended. Lines
are only ever appended, so a run that is killed has all but its end."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dsalign.config.secrets import redacted
from dsalign.endings import Diverged, PeerLost, Stopped

EVENTS = "events.jsonl"
BEGIN, WARNING, END = "begin", "warning", "end"
DONE, STOPPED, DIVERGED, INTERRUPTED, FAILED = "done", "stopped", "diverged", "interrupted", "failed"


class Events:
    """The file events.jsonl of a run, open for appending. resumed: lines of the run so far stay."""

    def __init__(self, output_dir: Path, *, resumed: bool) -> None:
        self._file = (output_dir / EVENTS).open("a" if resumed else "w", encoding="utf-8", errors="backslashreplace")

    def write(self, kind: str, **facts: Any) -> None:
        """Append one event with the time, seconds since 1970; text that looks like a secret is left out."""
        line = {"kind": kind, "time": round(time.time(), 3), **_clean(facts)}
        with suppress(OSError):  # of a full disk metrics.jsonl speaks, whose lines matter more
            self._file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; nothing is written afterwards."""
        self._file.close()


def _clean(value: Any) -> Any:
    """The value with `redacted` applied to every text in it."""
    if isinstance(value, Mapping):
        return {str(name): _clean(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(inner) for inner in value]
    return redacted(value) if isinstance(value, str) else value


class WarningKeeper(logging.Handler):
    """A handler that keeps the warnings of a run for its report, each text once; those from before the output folder is
    open are kept until `follow` is called."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._kept: list[str] = []
        self._tell: Callable[[str], None] | None = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the text of a warning, and pass it on where somebody follows."""
        text = record.getMessage()
        if text not in self._kept:
            self._kept.append(text)
            if self._tell is not None:
                self._tell(text)

    def restart(self) -> None:
        """Forget the warnings of an earlier run in this process."""
        self._kept, self._tell = [], None

    def follow(self, tell: Callable[[str], None]) -> None:
        """Pass on every warning so far and to come."""
        self._tell = tell
        for text in self._kept:
            tell(text)


KEEPER = WarningKeeper()  # one a process, as the logger is that it listens to


def ending(error: BaseException | None) -> Mapping[str, str]:
    """{"how": one of the words above, "text": the reason} of a run that `error` ended; None = it came to its end."""
    if error is None:
        return {"how": DONE, "text": ""}
    if isinstance(error, KeyboardInterrupt):
        return {"how": INTERRUPTED, "text": ""}
    if isinstance(error, Stopped):
        return {"how": STOPPED, "text": str(error)}
    if isinstance(error, Diverged) or type(error).__name__ == "NonFiniteError":  # its class is behind torch
        return {"how": DIVERGED, "text": str(error)}
    plain = isinstance(error, (ValueError, PeerLost))  # their texts are for users
    return {"how": FAILED, "text": str(error) if plain else f"{type(error).__name__}: {error}"}
