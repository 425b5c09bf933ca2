"""The machines of a hostfile, for `dsalign doctor --hostfile`: its lines read strictly, each machine reached by ssh,
and the versions there compared with those here. Imports no torch."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dsalign.verbs.lines import ERROR, OK, WARNING, Line
from dsalign.verbs.this_machine import PACKAGES, versions

HOST = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)\s+slots=([1-9][0-9]*)")
SSH_S = 5  # seconds until a machine has answered
AT_ONCE = 64  # machines that are asked at the same time
CLOCK_S = 10.0  # seconds by which two clocks may differ, beside the time that the answer took
# What a machine is asked: versions by their metadata, as importing them takes too long.
PROBE = f"""
import importlib.metadata as m, json, platform, time
found = {{"python": platform.python_version()}}
for name in {PACKAGES!r}:
    try: found[name] = m.version(name)
    except m.PackageNotFoundError: pass
print(json.dumps({{"versions": found, "time": time.time()}}))
"""


def read(path: Path) -> dict[str, int]:
    """Machine -> number of its GPUs, of a hostfile: a line `NAME slots=N` each, and comments that begin with #.

    Raises ValueError where it cannot be read, naming every line that is wrong or names a machine again.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--hostfile: {path}: expected a text file, got {error}; check the path") from None
    found: dict[str, int] = {}
    at: dict[str, int] = {}
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.strip()
        if not words or words.startswith("#"):
            continue
        match = HOST.fullmatch(words)
        if match is None:
            problems.append(f"{path}:{number}: expected NAME slots=N, as node0 slots=8, got {words[:80]!r}")
        elif match[1] in found:
            problems.append(
                f"{path}:{number}: expected each machine once, got {match[1]!r} again, as in line {at[match[1]]}"
            )
        else:
            found[match[1]], at[match[1]] = int(match[2]), number
    if problems:
        raise ValueError("; ".join(problems))
    if not found:
        raise ValueError(f"{path}: expected a line NAME slots=N for each machine, got none")
    return found


def examined(path: Path, ssh: Sequence[str] = ("ssh",)) -> list[Line]:
    """The lines on a hostfile and its machines, all reached at once. ssh: the program and its first words."""
    try:
        machines = read(path)
    except ValueError as error:
        return [Line("hostfile", ERROR, one, "correct the line") for one in str(error).split("; ") if one]
    slots = sum(machines.values())
    found = [Line("hostfile", OK, f"{path}: {len(machines)} machine(s), {slots} GPUs")]
    if len(machines) == 1:
        said = "with one machine deepspeed starts its ranks here, without ssh, whatever its name"
        found.append(Line("hostfile", WARNING, said, "give deepspeed --force_multi if it is another machine"))
    mine = versions()
    with ThreadPoolExecutor(min(AT_ONCE, len(machines))) as threads:
        return [*found, *threads.map(lambda host: _asked(host, mine, ssh), machines)]


def _asked(host: str, mine: Mapping[str, str], ssh: Sequence[str]) -> Line:
    """The line on one machine."""
    remote = shlex.join([sys.executable, "-c", PROBE])
    words = [*ssh, "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_S}", "--", host, remote]
    name, start = f"host {host}", time.time()
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=SSH_S, check=False, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return Line(name, ERROR, f"no answer in {SSH_S} s", f"try ssh {host} true; it must not ask for anything")
    except OSError as error:
        return Line(name, ERROR, f"{words[0]} cannot be started: {error.strerror}", "install an ssh client")
    end = time.time()
    try:
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        theirs, clock = dict(answer["versions"]), float(answer["time"])
    except (IndexError, ValueError, KeyError, TypeError):
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1][:200]
        advice = (
            f"let ssh {host} true work without a question: a key in its authorized_keys, its key in known_hosts"
            if done.returncode == 255
            else f"{sys.executable} must be there, with the same packages"
        )
        return Line(name, ERROR, f"exit code {done.returncode}: {said}", advice)
    other = [
        f"{package} {theirs.get(package, 'missing')}, here {mine.get(package, 'missing')}"
        for package in sorted({*mine, *theirs})
        if mine.get(package) != theirs.get(package)
    ]
    if other:
        return Line(name, ERROR, "; ".join(other), "install the same versions on all machines")
    off = max(start - clock, clock - end)
    if off > CLOCK_S:
        return Line(name, WARNING, f"its clock differs by {off:.0f} s", "let both follow a time server")
    return Line(name, OK, f"answered in {end - start:.1f} s, same versions")
