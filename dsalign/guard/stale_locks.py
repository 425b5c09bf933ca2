"""Locks that a killed build of a torch extension left behind: the next run that needs it waits for them for ever.

PyTorch 2.13 builds an extension while a file `lock` is in its folder, which the builder holds open. Imports no torch.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path


def warning(env: Mapping[str, str]) -> str:
    """A line that names the locks which no process of this machine holds, and how to remove them; empty where there is
    none. env: the environment, which says where extensions are built."""
    locks = stale(root(env))
    if not locks:
        return ""
    return (
        f"warning: {locks[0]} is left of a build that was killed (no process here holds it), and a run that needs this "
        f"extension waits for it for ever; remove it: rm {' '.join(shlex.quote(str(lock)) for lock in locks)}"
    )


def stale(root: Path) -> list[Path]:
    """The files called `lock` in the folders of extensions under `root` that no process of this machine holds open."""
    locks = sorted({*root.glob("*/lock"), *root.glob("*/*/lock")})
    held = set(_open_files()) if locks else set()
    return [lock for lock in locks if os.path.realpath(lock) not in held]


def root(env: Mapping[str, str]) -> Path:
    """The folder in which extensions are built, by the environment."""
    cache = env.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(env.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions").expanduser()


def _open_files() -> Iterator[str]:
    """The path of every file that a process of this machine holds open, of those that this user may see."""
    for folder in Path("/proc").glob("[0-9]*/fd"):
        try:
            numbers = list(folder.iterdir())
        except OSError:  # another user's, or gone
            continue
        for number in numbers:
            try:
                yield os.readlink(number)
            except OSError:
                continue
