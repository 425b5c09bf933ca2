"""The processes above this one, up to the launcher that was started: whether they still live, and the command that
started them. On Linux; elsewhere nothing is known of them. Imports no torch."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from dsalign.config.secrets import redacted

PROC = Path("/proc")
STARTED_BY = {"deepspeed", "ds", "torchrun", "mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun"}  # by a user
MODULES = {"torch.distributed.run", "deepspeed.launcher.runner"}
INNER = {"deepspeed.launcher.launch", "dsalign.engines.elastic", "orted", "prted", "hydra_pmi_proxy"}  # by a launcher
DEEP = 12  # ancestors that are looked at
STARTED_AS = "DSALIGN_STARTED_AS"  # the command that became our own launcher, see cli.py


@dataclass(frozen=True)
class Launchers:
    """The launchers above this process when it started.

    links: (pid, its parent's pid) from this process up to the topmost launcher, () where there is none. command: the
    words of the topmost launcher that a user starts, () where there is none.
    """

    links: tuple[tuple[int, int], ...] = ()
    command: tuple[str, ...] = ()

    @classmethod
    def of(cls, pid: int) -> Launchers:
        """The launchers above the process `pid`, as they are now."""
        links: list[tuple[int, int]] = []
        found: tuple[tuple[int, int], ...] = ()
        command: tuple[str, ...] = ()
        while len(links) < DEEP and (parent := parent_of(pid)) >= 1:
            links.append((pid, parent))
            words = words_of(parent)
            if _is(words, STARTED_BY | MODULES | INNER):
                found = tuple(links)
                command = words if _is(words, STARTED_BY | MODULES) else command
            pid = parent
        return cls(found, command)

    def lost(self) -> str:
        """Words for a launcher that has ended, as its children have another parent then; empty where all live."""
        for pid, parent in self.links:
            if parent_of(pid) != parent:
                return f"the end of its launcher, process {parent},"
        return ""


def parent_of(pid: int) -> int:
    """The pid of a process's parent; 0 where that cannot be told."""
    if pid == os.getpid():
        return os.getppid()
    try:
        return int((PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def words_of(pid: int) -> tuple[str, ...]:
    """The words with which a process was started; () where that cannot be told."""
    try:
        text = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ()
    return tuple(text.removesuffix("\0").split("\0")) if text else ()


def _is(words: Sequence[str], names: set[str]) -> bool:
    """Whether a command starts one of these programs: directly, as a script of an interpreter, or as its module."""
    first = [word for word in words[:4] if not (word.startswith("-") and word != "-m")]
    programs = {Path(word).name for word in first[:2]}
    modules = {after for word, after in pairwise(first) if word == "-m"}
    return bool((programs | modules) & names)


def typed(env_command: str | None, command: str) -> str:
    """The command that starts this run again: of the launcher that a user started, as our own launcher says it
    (env_command), or of this process. command: where none of them is known. Values that look like secrets are left out.
    """
    words = Launchers.of(os.getpid()).command or (() if env_command else words_of(os.getpid()))
    return redacted(shlex.join(words) if words else env_command or command)
