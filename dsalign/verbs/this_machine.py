"""What `dsalign doctor` looks at on this machine. Libraries are imported in a process of their own, so that one which
cannot be imported, or takes for ever, is a line like any other."""

from __future__ import annotations

import contextlib
import importlib.metadata
import ipaddress
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsalign import __version__
from dsalign.config.cache import cache_folder
from dsalign.guard import disk, stale_locks
from dsalign.verbs import runs
from dsalign.verbs.lines import ERROR, OK, SKIPPED, WARNING, Line, looked

PACKAGES = ("torch", "deepspeed", "transformers", "peft", "triton", "tokenizers", "safetensors", "datasets", "dsalign")
NEEDED = ("torch", "deepspeed", "transformers", "peft", "tokenizers", "safetensors", "datasets")
IMPORT_S = 180  # seconds for the imports, which read gigabytes from a cold disk
HUB_S = 3.0  # seconds for the one try to reach the hub
LITTLE_DISK, LITTLE_MEMORY, LITTLE_SHM = 10 * 2**30, 4 * 2**30, 64 * 2**20  # bytes, below which a line is a warning
DEVICES = Path("/dev")
PORT = 29500  # that deepspeed and torchrun take where none is given
PROBE = """
import json, sys
found = {}
def say(): print("DOCTOR" + json.dumps(found), flush=True)
import torch
found["torch"] = torch.__version__
found["cuda"] = torch.version.cuda or torch.version.hip or ""
found["gpus"] = []
if torch.cuda.is_available():
    for i in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(i)
        found["gpus"].append([of.name, of.total_memory, f"{of.major}.{of.minor}"])
say()
import transformers, peft
say()
import deepspeed
from deepspeed.ops.op_builder.all_ops import ALL_OPS
found["ops"] = {}
for name, builder in ALL_OPS.items():
    try: found["ops"][name] = bool(builder.is_compatible(verbose=False))
    except Exception as error: found["ops"][name] = False
say()
"""


def versions() -> dict[str, str]:
    """Python and each package that is installed -> its version, by metadata alone."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def examined(env: Mapping[str, str] | None = None) -> list[Line]:
    """The lines on this machine. env: the environment, by default this process's."""
    env = os.environ if env is None else env
    probe, broken = _probe()
    found = looked("versions", _versions)
    found += [broken] if broken else [Line("imports", OK, "torch, transformers, peft and deepspeed can be imported")]
    found += looked("GPUs", lambda: _gpus(probe))
    found += looked("compiler", lambda: _compiler(probe, env))
    found += looked("extensions", lambda: _extensions(env))
    found += looked("disk", lambda: _disk(env))
    found += looked("memory", _memory)
    found += looked("hub", lambda: _hub(env))
    found += looked("port", lambda: _port(env))
    found += looked("host name", lambda: _network(env))
    return found + looked("runs", _runs)


def _probe() -> tuple[dict[str, Any], Line | None]:
    """(what the libraries say of themselves, as far as they came; a line on the one that failed, None where none
    did)."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=IMPORT_S, check=False
        )
        out, why = done.stdout, done.stderr.strip().splitlines()[-1:] if done.returncode else []
    except subprocess.TimeoutExpired as error:
        out = (error.stdout or b"").decode() if isinstance(error.stdout, bytes) else ""
        why = [f"not done after {IMPORT_S} s"]
    said = [line.removeprefix("DOCTOR") for line in out.splitlines() if line.startswith("DOCTOR")]
    found = json.loads(said[-1]) if said else {}
    if not why and "ops" in found:
        return found, None
    stage = ("torch", "transformers or peft", "deepspeed")[min(len(said), 2)]
    advice = f"install it again: pip install --force-reinstall {stage.replace(' or ', ' ')}"
    return found, Line("imports", ERROR, f"{stage} cannot be imported: {(why or ['no reason given'])[0][:300]}", advice)


def _versions() -> list[Line]:
    found = versions()
    commit = _commit()
    ours = f"dsalign {__version__}{f' at {commit}' if commit else ''}"
    rest = ", ".join(f"{name} {version}" for name, version in found.items() if name != "dsalign")
    missing = [name for name in NEEDED if name not in found]
    lines = [Line("versions", OK, f"{ours}, {rest}")]
    if missing:
        lines.append(
            Line("versions", ERROR, f"not installed: {', '.join(missing)}", f"pip install {' '.join(missing)}")
        )
    return lines + [Line("versions", ERROR, one, "install a version in this range") for one in _outside(found)]


def _outside(found: Mapping[str, str]) -> list[str]:
    """What is installed in another version than dsalign asks for, where dsalign is installed itself."""
    try:
        from packaging.requirements import Requirement  # noqa: PLC0415  not there, nothing is compared

        asked = [Requirement(one) for one in importlib.metadata.requires("dsalign") or [] if "extra ==" not in one]
    except (ImportError, importlib.metadata.PackageNotFoundError):
        return []
    return [
        f"{one.name} is {found[one.name]}, expected {one.specifier}"
        for one in asked
        if one.name in found and not one.specifier.contains(found[one.name], prereleases=True)
    ]


def _commit() -> str:
    """The commit of a checkout, with a + where files differ from it; empty elsewhere."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return ""
    git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--match", ""]
    try:
        return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _gpus(probe: Mapping[str, Any]) -> list[Line]:
    seen = probe.get("gpus", [])
    smi = shutil.which("nvidia-smi")
    driver = ""
    if smi:
        words = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
            driver = done.stdout.split("\n", 1)[0].strip()
    if seen:
        names = ", ".join(f"{name} {size / 2**30:.0f} GiB (capability {level})" for name, size, level in seen)
        return [Line("GPUs", OK, f"{len(seen)}: {names}; driver {driver or 'unknown'}, torch for {probe.get('cuda')}")]
    nodes = list(DEVICES.glob("nvidia[0-9]*"))
    if not nodes and not driver:
        return [Line("GPUs", OK, "none; runs are computed on the CPU")]
    if not probe:
        return [Line("GPUs", SKIPPED, f"driver {driver or 'unknown'}; torch does not say more")]
    if not probe.get("cuda"):
        return [
            Line("GPUs", WARNING, f"{len(nodes)} there, torch {probe['torch']} is for CPUs", "install torch for CUDA")
        ]
    return [
        Line(
            "GPUs", WARNING, f"{len(nodes)} there, of which torch (for CUDA {probe['cuda']}) can use none",
            f"look at CUDA_VISIBLE_DEVICES and whether driver {driver or '(none answers)'} is new enough",
        )
    ]  # fmt: skip


def _compiler(probe: Mapping[str, Any], env: Mapping[str, str]) -> list[Line]:
    compiler = shutil.which(env.get("CXX") or "c++") or shutil.which("g++") or shutil.which("clang++")
    ninja = shutil.which("ninja")
    ops = probe.get("ops", {})
    able = [name for name, good in ops.items() if good and "not_implemented" not in name]
    unable = [name for name, good in ops.items() if not good]
    said = f"{compiler or 'none'}, ninja {ninja or 'missing'}"
    said += f"; DeepSpeed could build {', '.join(able) or 'nothing'}" if ops else ""
    said += f", not {', '.join(unable)}" if unable else ""
    if compiler and ninja:
        return [Line("compiler", OK, said)]
    lacking = " and ".join([*(() if compiler else ("a C++ compiler",)), *(() if ninja else ("ninja",))])
    return [Line("compiler", WARNING, said, f"off-loading builds an optimizer and needs {lacking}: install it")]


def _extensions(env: Mapping[str, str]) -> list[Line]:
    root = stale_locks.root(env)
    name = "TORCH_EXTENSIONS_DIR" if env.get("TORCH_EXTENSIONS_DIR") else "TORCH_EXTENSIONS_DIR not set, by default"
    lines = [Line("extensions", OK, f"{name} {root}")]
    there = next(one for one in (root.absolute(), *root.absolute().parents) if one.exists())
    if not os.access(there, os.W_OK):
        lines = [
            Line("extensions", WARNING, f"{root} cannot be written", "set TORCH_EXTENSIONS_DIR to a folder of yours")
        ]
    if said := stale_locks.warning(env):
        found, _, advice = said.removeprefix("warning: ").rpartition("; ")
        lines.append(Line("extensions", ERROR, found, advice))
    return lines


def _disk(env: Mapping[str, str]) -> list[Line]:
    found = []
    for what, path in (("this folder", Path()), ("cache", cache_folder()), ("hub cache", _hub_cache(env))):
        free = disk.free(path)
        few = free < LITTLE_DISK
        advice = "a checkpoint of a large model takes more: make room, or name another folder" if few else ""
        found.append(
            Line("disk", WARNING if few else OK, f"{what} {path.absolute()}: {disk.amount(free)} free", advice)
        )
    return found


def _memory() -> list[Line]:
    text = Path("/proc/meminfo").read_text(encoding="ascii")
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in text.splitlines() if line.endswith("kB")}
    left, whole = sizes["MemAvailable"], sizes["MemTotal"]
    said = f"{disk.amount(left)} of {disk.amount(whole)} free, {len(os.sched_getaffinity(0))} cores to use"
    few = left < LITTLE_MEMORY
    found = [
        Line("memory", WARNING if few else OK, said, "end other programs, or plan with dsalign plan" if few else "")
    ]
    if Path("/dev/shm").is_dir() and (shm := disk.free(Path("/dev/shm"))) < LITTLE_SHM:
        said = f"/dev/shm has {disk.amount(shm)} free, through which NCCL sends"
        found.append(Line("memory", WARNING, said, "start the container with --shm-size 8g"))
    return found


def _hub_cache(env: Mapping[str, str]) -> Path:
    home = env.get("HF_HOME") or str(Path(env.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(env.get("HF_HUB_CACHE") or str(Path(home) / "hub")).expanduser()


def _hub(env: Mapping[str, str]) -> Line:
    cache = _hub_cache(env)
    have = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    said = f"{have} model(s) in {cache}"
    if env.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Line("hub", OK, f"{said}; HF_HUB_OFFLINE is set, so nothing else is read")
    url = env.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_S).close()
    except urllib.error.HTTPError:
        pass  # it answered
    except (OSError, ValueError) as error:
        why = getattr(error, "reason", error)
        advice = "models and data from folders work; else look at HTTPS_PROXY, or set HF_ENDPOINT or HF_HUB_OFFLINE=1"
        return Line("hub", WARNING, f"{said}; {url} cannot be reached ({why})", advice)
    return Line("hub", OK, f"{said}; {url} answers")


def _port(env: Mapping[str, str]) -> Line:
    given = env.get("MASTER_PORT", "")
    if given and not (given.isdecimal() and 0 < int(given) < 65536):
        return Line("port", ERROR, f"MASTER_PORT: expected a port, 1 to 65535, got {given!r}", "unset it")
    port = int(given or PORT)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
        except OSError as error:
            return Line("port", WARNING, f"{port}: {error.strerror}", "give the launcher another --master_port")
    return Line("port", OK, f"{port} is free{'' if given else ', the one that launchers take'}")


def _network(env: Mapping[str, str]) -> list[Line]:
    name = socket.gethostname()
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(name, None)})
    except OSError:
        advice = "add it to /etc/hosts with this machine's address"
        return [Line("host name", WARNING, f"{name} resolves to no address", advice)]
    chosen = {key: env[key] for key in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if env.get(key)}
    known = {one for _, one in socket.if_nameindex()}
    wrong = [f"{key}={value}" for key, value in chosen.items() if key.startswith("GLOO") and value not in known]
    route = _default_interface()
    there = ", ".join(f"{key}={value}" for key, value in chosen.items())
    said = f"{name} is {', '.join(addresses)}; "
    said += there if there else f"the default route is by {route or 'no interface'}"
    if wrong:
        return [
            Line(
                "host name", ERROR, f"{wrong[0]}: there is no such interface", f"take one of {', '.join(sorted(known))}"
            )
        ]
    loops = all(ipaddress.ip_address(one.split("%")[0]).is_loopback for one in addresses)
    if loops and "GLOO_SOCKET_IFNAME" not in chosen:
        set_it = f"export GLOO_SOCKET_IFNAME={route} NCCL_SOCKET_IFNAME={route}" if route else "set GLOO_SOCKET_IFNAME"
        said += "; gloo would take the loopback interface, which no other machine reaches"
        return [Line("host name", WARNING, said, f"on several machines: {set_it}, or correct /etc/hosts")]
    return [Line("host name", OK, said)]


def _default_interface() -> str:
    """The interface of the default route; empty where there is none."""
    try:
        rows = [line.split() for line in Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]]
    except OSError:
        return ""
    return next((row[0] for row in rows if len(row) > 7 and row[1] == "00000000" and row[7] == "00000000"), "")


def _runs() -> list[Line]:
    root = Path("output")
    found = [runs.read(folder) for folder in runs.below(root)] if root.is_dir() else []
    busy = [f"{one.folder} by {one.owner.text()}" for one in found if one.owner is not None]
    return [Line("runs", OK, f"{len(found)} in output/; " + ("; ".join(busy) or "none goes on"))]
