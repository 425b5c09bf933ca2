"""Results that are printed as they come, a line of JSON each, and kept in a file."""

from __future__ import annotations

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import peer


class ResultsFile:
    """The file results.jsonl of a run of a comparison; its first line says what ran, where and when."""

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "results.jsonl"
        self.path.write_text("")
        machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        command = shlex.join(["python", *sys.argv])
        self.say({"date": now, "command": command, "commit": peer.commit(), "machine": machine, **about})

    def say(self, record: Mapping[str, Any]) -> None:
        """Print a record and write it at once: a session that is cut off keeps what it has."""
        line = json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in record.items()})
        print(line, flush=True)
        with self.path.open("a") as file:
            file.write(line + "\n")
