"""The surroundings of a run: versions, machine and GPUs, as its report shows them."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("dsalign", "torch", "deepspeed", "transformers", "peft", "tokenizers", "datasets", "triton", "vllm")


def environment() -> dict[str, str]:
    """Name -> value of what a stranger would ask for: versions of packages that are installed, system, processor,
    memory, and GPUs where torch is imported and sees some. No host or user is named."""
    found = {"Python": platform.python_version(), "system": f"{platform.system()} {platform.release()}"}
    found["processor"] = f"{_processor()}, {len(_cores())} cores to use"
    if memory := _memory():
        found["memory"] = f"{memory / 2**30:.0f} GiB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            of = torch.cuda.get_device_properties(i)
            found[f"GPU {i}"] = f"{of.name}, {of.total_memory / 2**30:.0f} GiB"
        found["CUDA"] = str(torch.version.cuda or torch.version.hip)
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if torch is not None:
        found["torch"] = str(torch.__version__)  # with its build, +cpu or +cu130
    return found


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _memory() -> int:
    """Bytes of physical memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def memory_gib() -> dict[str, float]:
    """Name -> GiB that this process holds: of the machine's memory, and on a GPU the most that tensors took so far."""
    found = {}
    if gpu := _gpu():
        found["GPU memory"] = gpu.max_memory_allocated() / 2**30
    if size := _status("VmRSS"):
        found["memory"] = size / 2**30
    return found


def memory_now() -> int:
    """The bytes that this process holds: tensors on its GPU, or where there is none, of the machine's memory; 0 where
    the system does not say."""
    gpu = _gpu()
    return int(gpu.memory_allocated()) if gpu else _status("VmRSS")


def memory_peak() -> int:
    """The most bytes that `memory_now` could have said so far."""
    gpu = _gpu()
    return int(gpu.max_memory_allocated()) if gpu else _status("VmHWM")


def _gpu() -> Any:
    """torch.cuda where torch is imported and computes on a GPU, else None."""
    torch = sys.modules.get("torch")
    there = torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized()
    return torch.cuda if torch is not None and there else None


def _status(name: str) -> int:
    """A size of this process that Linux tells in bytes; 0 where it does not."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
