"""What the comparisons share: TRL's environment, questions to either Python, measured runs."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # the peer's environment has no dsalign

from dsalign.launcher import free_port  # noqa: E402  needs the line above

SIDES = ("dsalign", "trl")
TRL = "1.16.0"
TRL_OF_PPO = "1.10.0"  # the last one that has it
MISSING = """
import importlib.util, json, sys
print(json.dumps([module for module in sys.argv[1:] if importlib.util.find_spec(module) is None]))
"""
VERSIONS = """
import json, sys
from importlib.metadata import version
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""
WHAT_RUNS = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/kernels"]
from dsalign.data.batches.loader import epoch_order
from dsalign.models.names import resolve
print(json.dumps({"model": resolve(sys.argv[2]).weights, "order": epoch_order(int(sys.argv[3]), int(sys.argv[4]), 0)}))
"""


def peer_python(folder: Path, trl: str = TRL) -> str:
    """The Python of TRL's environment in `folder`, made where it is missing: TRL of the version `trl` beside this
    environment's packages, so that both sides run the same torch and transformers.

    Raises ValueError where it holds another TRL.
    """
    needed = {"trl": f"trl=={trl}", "accelerate": "accelerate"}  # module -> what pip installs where it is missing
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        own = Path(sysconfig.get_path("purelib"))
        (folder / own.relative_to(sys.prefix) / "base.pth").write_text(f"{own}\n")
    if missing := ask(str(python), MISSING, *needed):
        pip = [str(python), "-m", "pip", "install", "-q", "--no-deps"]
        subprocess.run([*pip, *(needed[module] for module in missing)], check=True)
    version = ask(str(python), VERSIONS, "trl")["trl"]
    if version != trl:
        raise ValueError(f"{folder}: expected an environment with trl {trl}, got {version}; remove it, or name another")
    return str(python)


def has_peer(folder: Path, trl: str = TRL) -> bool:
    """Whether `folder` holds TRL's environment already, with that version; nothing is installed."""
    python = folder / "bin" / "python"
    if not python.exists() or ask(str(python), MISSING, "trl", "accelerate"):
        return False
    found: str = ask(str(python), VERSIONS, "trl")["trl"]
    return found == trl


def add_device(parser: argparse.ArgumentParser) -> None:
    """The options of where and how both sides train, and of which sides do."""
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="who runs: TRL must be there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--launcher", choices=("python", "deepspeed"), default="python", help="of dsalign's side")


def trl_device(device: str, dtype: str) -> dict[str, bool]:
    """The same as fields of TRL's configuration; its weights are float32 with either dtype."""
    return {"use_cpu": device == "cpu", "bf16": dtype == "bfloat16"}


def packages_of(sides: Sequence[str]) -> list[str]:
    """The packages whose versions say what ran."""
    return ["torch", "transformers", "datasets", *(["trl", "accelerate"] if "trl" in sides else [])]


def launched(launcher: str, device: str) -> list[str]:
    """What stands before a script of dsalign: Python alone, or DeepSpeed's launcher with one rank, on the GPU that
    `environment` shows it."""
    if launcher == "python":
        return [sys.executable]
    port = str(free_port())  # the launcher's own may be another run's
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--no_local_rank", "--master_port", port]
    return [*runner, "--num_accelerators", "1"] if device == "cpu" else runner


def ask(python: str, code: str, *words: str) -> Any:
    """What the code prints as its last line, as JSON. Raises ValueError with the end of its errors where it fails."""
    done = subprocess.run([python, "-c", code, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"{python} ended with {done.returncode} where it was asked; it says: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(work: Path, threads: int, device: str = "cpu") -> dict[str, str]:
    """For one run: so many threads, no hub, and caches of its own in `work`, so that no run finds another's results.
    device: with cpu no GPU is seen, with cuda one."""
    one = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    seen = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {"CUDA_VISIBLE_DEVICES": one}
    return {
        **os.environ,
        **seen,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "DSALIGN_CACHE": str(work / "dsalign_cache"),
        "HF_DATASETS_CACHE": str(work / "datasets_cache"),
    }


def measured(command: Sequence[str], log: Path, settings: Mapping[str, str]) -> tuple[float, float]:
    """Runs the command; CPU-seconds of it and its children (user and system), and wall-seconds.

    Raises ValueError with the end of its output where it fails.
    """
    start = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(settings))
        _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise ValueError(f"{shlex.join(command)} ended with {process.returncode}; the end of {log}:\n{tail}")
    return usage.ru_utime + usage.ru_stime, wall_s


def in_turn(names: Sequence[str], repeat: int) -> list[str]:
    """The sides of a repeat: every second time the other way round, so that no side is always the later one."""
    return list(names) if repeat % 2 == 0 else list(reversed(names))


def spread(numbers: Sequence[float], digits: int = 2) -> str:
    """The median, and the smallest and largest where there is more than one: `1.20 (1.10-1.30)`."""
    median = f"{statistics.median(numbers):.{digits}f}"
    return median if len(numbers) == 1 else f"{median} ({min(numbers):.{digits}f}-{max(numbers):.{digits}f})"


def commit() -> str:
    """The commit that runs, with a plus where files were changed; empty outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
