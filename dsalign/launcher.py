"""Which processes a command becomes: this one alone, or one for each GPU under torch's launcher (elastic.py)."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsalign.config.parse import Parsed
from dsalign.ranks import number, process

CLI = Path(__file__).with_name("cli.py")
DEVICES = Path("/dev")
LAST_PORT = 65535


@dataclass(frozen=True)
class Launch:
    """The processes that should be started in place of this one."""

    command: tuple[str, ...]  # for os.execv
    arguments: tuple[str, ...]  # those of dsalign in it
    ranks: int
    note: str  # a line for the log, empty where all is as it was asked for


def alone(env: Mapping[str, str]) -> dict[str, str]:
    """The variables that a launcher would set, for a run of this process alone. MASTER_PORT is kept where it is set."""
    return {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": env.get("MASTER_PORT") or str(free_port()),
    }


def free_port() -> int:
    """A TCP port of this machine on which nobody listens now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def port_of_our_own(env: Mapping[str, str]) -> tuple[int, str]:
    """(the port on which the ranks that this process starts meet, a line where it is not MASTER_PORT): the next free
    one where MASTER_PORT is taken, as by another run on this machine.

    Raises ValueError where MASTER_PORT is no port.
    """
    if not env.get("MASTER_PORT"):
        return free_port(), ""
    wanted = number(env, "MASTER_PORT", least=1)
    if wanted > LAST_PORT:
        raise ValueError(f"MASTER_PORT: expected a port, 1 to {LAST_PORT}, got {wanted}; set another or none")
    free = (
        next((port for port in range(wanted, min(wanted + 100, LAST_PORT + 1)) if _is_free(port)), None) or free_port()
    )
    return free, "" if free == wanted else f"MASTER_PORT {wanted} is taken, as by another run: {free} is used"


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that just ended holds no port
        try:
            listener.bind(("", port))
        except OSError:
            return False
    return True


def visible_devices(env: Mapping[str, str]) -> int:
    """The number of GPUs that this process may use, told without importing torch: 0 where there is no driver, whatever
    CUDA_VISIBLE_DEVICES lists."""
    listed = env.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return _gpus()
    entries = [entry.strip() for entry in listed.split(",")]
    ends = [index for index, entry in enumerate(entries) if entry in ("", "-1")]  # CUDA reads no further
    entries = entries[: ends[0]] if ends else entries
    there = _gpus() if entries else 0
    if there == 0:
        return 0
    beyond = [index for index, entry in enumerate(entries) if entry.isdigit() and int(entry) >= there]
    return beyond[0] if beyond else len(entries)


def _gpus() -> int:
    """The number of GPUs of this machine: as NVIDIA's driver lists them, or as their devices stand in /dev."""
    if program := shutil.which("nvidia-smi"):
        try:
            found = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return 0
        return sum(line.startswith("GPU ") for line in found.stdout.splitlines()) if found.returncode == 0 else 0
    return len([one for one in DEVICES.glob("nvidia*") if one.name.removeprefix("nvidia").isdigit()]) or len(
        list(DEVICES.glob("dri/renderD*") if (DEVICES / "kfd").exists() else ())  # of AMD
    )


def ranks(env: Mapping[str, str], devices: int) -> int:
    """The number of processes that the run will have. devices: visible GPUs.

    Raises ValueError where the environment asks for more processes than GPUs, or for several nodes without a launcher.
    """
    if "RANK" in env:
        return process(env).world_size
    asked = number(env, "NPROC_PER_NODE", least=1, default="1")
    if number(env, "NNODES", least=1, default="1") > 1:
        raise ValueError(
            f"NNODES: expected 1 without a launcher, got {env['NNODES']}; several nodes start with "
            f"`deepspeed --hostfile FILE launch/train.py ...` or torchrun on each"
        )
    if asked > devices > 0:
        raise ValueError(
            f"NPROC_PER_NODE: expected at most the {devices} visible GPUs, got {asked}; lower it or show more GPUs "
            f"in CUDA_VISIBLE_DEVICES"
        )
    return max(asked, devices)


def planned_launch(env: Mapping[str, str], devices: int, parsed: Parsed, program: str) -> Launch | None:
    """The processes to start in place of this one; None where this one is all, or was started by a launcher.

    env: must have MASTER_PORT where processes are to be started. devices: visible GPUs. program: argv[0].
    Scripts with fewer processes than GPUs split one model over the GPUs. Here each GPU becomes a rank at ZeRO-3
    instead, with less accumulation, so that an optimizer step sees as many rows as the script asks for.
    Raises ValueError as `ranks` does, and where the accumulation does not divide.
    """
    count = ranks(env, devices)
    if "RANK" in env or count == 1:
        return None
    asked = number(env, "NPROC_PER_NODE", least=1, default="1")
    overrides: dict[str, str] = {}
    note = ""
    if count > asked:
        overrides, note = _spread(parsed, asked, count)
    arguments = [*parsed.command.without(overrides), *(f"--{name}={value}" for name, value in overrides.items())]
    launcher = [sys.executable, "-m", "dsalign.engines.elastic", "--nproc_per_node", str(count)]
    address = ["--master_addr", "127.0.0.1", "--master_port", env["MASTER_PORT"]]
    return Launch((*launcher, *address, *_program(program), *arguments), tuple(arguments), count, note)


def _spread(parsed: Parsed, asked: int, count: int) -> tuple[dict[str, str], str]:
    """(the options that `count` ranks need to do the work of `asked` processes, the line that says so)."""
    config = parsed.config
    overrides: dict[str, str] = {}
    steps = "gradient_accumulation_steps by default"
    if parsed.origins["gradient_accumulation_steps"] != "default":
        given = config.optim.gradient_accumulation_steps
        accumulation, rest = divmod(given * asked, count)
        if rest:
            raise ValueError(
                f"gradient_accumulation_steps: expected {given} x {asked} processes to divide over {count} GPUs, "
                f"got a rest of {rest}; change it, or set NPROC_PER_NODE={count} for a step of "
                f"{config.optim.batch_size * given * count} rows"
            )
        overrides["gradient_accumulation_steps"] = str(accumulation)
        rows = config.optim.batch_size * given * asked
        steps = f"gradient_accumulation_steps {given} -> {accumulation}, a step still sees {rows} rows"
    stage = f"deepspeed {config.optim.deepspeed}"
    if parsed.origins["deepspeed"] == "default":
        overrides["deepspeed"] = "zero3"
        stage = "deepspeed zero3 instead of a model split"
    return overrides, f"{count} GPUs for {asked} process(es): one rank a GPU, {stage}, {steps}"


def environment(env: Mapping[str, str], program: str) -> dict[str, str]:
    """The environment of torch's launcher, with the checkout on its path where this runs from one: it may not be
    installed."""
    if len(_program(program)) > 1:
        return dict(env)
    paths = [str(CLI.parent.parent), *filter(None, [env.get("PYTHONPATH")])]
    return {**env, "PYTHONPATH": os.pathsep.join(paths)}


def _program(program: str) -> tuple[str, ...]:
    """The words with which torch's launcher starts this program again: the same script, or the module of the console
    command."""
    script = Path(program)
    own = script.suffix == ".py" and script.resolve() != CLI
    return (str(script.resolve()),) if own else ("-m", "dsalign.cli")
