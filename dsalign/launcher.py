"""Which processes a command becomes: this one alone, or one for each GPU under torch's launcher."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsalign.config.parse import Parsed

CLI = Path(__file__).with_name("cli.py")


@dataclass(frozen=True)
class Process:
    """This process's place among those of the run."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int = 1  # ranks on this machine


@dataclass(frozen=True)
class Launch:
    """The processes that should be started in place of this one."""

    command: tuple[str, ...]  # for os.execv
    arguments: tuple[str, ...]  # those of dsalign in it
    ranks: int
    note: str  # a line for the log, empty where all is as it was asked for


def process(env: Mapping[str, str]) -> Process:
    """This process's place, from the variables that every launcher sets (RANK, LOCAL_RANK, WORLD_SIZE).

    Raises ValueError where one is missing, or they contradict each other.
    """
    numbers = {name: _number(env, name, least=0) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    rank, local_rank, world_size = numbers["RANK"], numbers["LOCAL_RANK"], numbers["WORLD_SIZE"]
    if not local_rank <= rank < world_size:
        shown = " ".join(f"{name}={number}" for name, number in numbers.items())
        raise ValueError(
            f"environment: expected LOCAL_RANK <= RANK < WORLD_SIZE, got {shown}; start with deepspeed or torchrun, "
            f"or unset all three"
        )
    local_size = next((env[name] for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in env), "1")
    return Process(rank, local_rank, world_size, int(local_size))


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


def visible_devices(env: Mapping[str, str]) -> int:
    """The number of GPUs that this process may use, told without importing torch: 0 where there is no NVIDIA driver."""
    if (listed := env.get("CUDA_VISIBLE_DEVICES")) is not None:
        entries = [entry.strip() for entry in listed.split(",")]
        ends = [index for index, entry in enumerate(entries) if entry in ("", "-1")]  # CUDA reads no further
        return ends[0] if ends else len(entries)
    program = shutil.which("nvidia-smi")
    if program is None:
        return 0
    found = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60, check=False)
    return sum(line.startswith("GPU ") for line in found.stdout.splitlines()) if found.returncode == 0 else 0


def ranks(env: Mapping[str, str], devices: int) -> int:
    """The number of processes that the run will have. devices: visible GPUs.

    Raises ValueError where the environment asks for more processes than GPUs, or for several nodes without a launcher.
    """
    if "RANK" in env:
        return process(env).world_size
    asked = _number(env, "NPROC_PER_NODE", least=1, default="1")
    if _number(env, "NNODES", least=1, default="1") > 1:
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
    asked = _number(env, "NPROC_PER_NODE", least=1, default="1")
    overrides: dict[str, str] = {}
    note = ""
    if count > asked:
        overrides, note = _spread(parsed, asked, count)
    arguments = [*parsed.command.without(overrides), *(f"--{name}={value}" for name, value in overrides.items())]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
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


def _program(program: str) -> tuple[str, ...]:
    """The words with which torch's launcher starts this program again: the same script, or the module of the console
    command."""
    script = Path(program)
    own = script.suffix == ".py" and script.resolve() != CLI
    return (str(script.resolve()),) if own else ("-m", "dsalign.cli")


def _number(env: Mapping[str, str], name: str, *, least: int, default: str = "") -> int:
    text = env.get(name) or default
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ValueError(
            f"{name}: expected a whole number >= {least} in the environment, got {text or 'nothing'}; "
            f"a launcher sets it (deepspeed, torchrun)"
        )
    return int(text)
