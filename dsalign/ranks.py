"""Which rank this process is, from the variables of what started it: deepspeed or torchrun, Slurm, OpenMPI, PMI."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Process:
    """This process's place among those of the run."""

    rank: int
    local_rank: int
    world_size: int
    local_size: int = 1  # ranks on this machine


class Family(NamedTuple):
    """The names of one launcher's variables; of several names the first that is set counts."""

    launcher: str
    rank: tuple[str, ...]
    size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_size: tuple[str, ...]
    job: tuple[str, ...]  # what tells two jobs of one machine apart


# A later one may have started an earlier one: mpirun starts its daemons by srun.
FAMILIES = (
    Family(
        "OpenMPI",
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
        ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    ),
    Family(
        "PMI",
        ("PMI_RANK",),
        ("PMI_SIZE",),
        ("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID", "MV2_COMM_WORLD_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE", "PALS_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
        ("PMI_JOBID", "PALS_APID"),
    ),
    Family(
        "Slurm",
        ("SLURM_PROCID",),
        ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        ("SLURM_LOCALID",),
        (),
        ("SLURM_JOB_ID",),
    ),
)
ALONE = {"WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # without RANK: what a process that is alone may have
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
FIRST_PORT, PORTS = 29600, 20000  # of a job whose launcher chooses none: every rank works out the same


@dataclass(frozen=True)
class Task:
    """This process as one of several tasks that a launcher started."""

    family: Family
    process: Process


def process(env: Mapping[str, str]) -> Process:
    """This process's place, from RANK, LOCAL_RANK and WORLD_SIZE, which `variables` sets where the launcher did not.

    Raises ValueError where one is missing, or they contradict each other.
    """
    rank, local_rank, world_size = (number(env, name, least=0) for name in LAUNCHED)
    if not local_rank <= rank < world_size:
        raise ValueError(
            f"environment: expected LOCAL_RANK <= RANK < WORLD_SIZE, got {_shown(env, LAUNCHED)}; start with deepspeed "
            "or torchrun, or unset all three"
        )
    local_size = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if name in env), "")
    return Process(rank, local_rank, world_size, number(env, local_size, least=1) if local_size else 1)


def variables(env: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, for one of several tasks that another launcher started; empty where RANK is set
    already, or this process is alone.

    Raises ValueError where the variables contradict each other, or RANK alone is missing, so that several tasks would
    train as several runs, and where no variable says on which machine rank 0 is.
    """
    if "RANK" in env:
        _agree(env)
        return {}
    task = task_of(env)
    if task is None or task.process.world_size == 1:
        if several := [name for name, alone in ALONE.items() if env.get(name) not in (None, "", alone)]:
            raise ValueError(
                f"environment: expected RANK beside {_shown(env, several)}, got nothing, so that each of several tasks "
                "would be a run of its own; start with torchrun, or unset it"
            )
        return {}
    mine, family = task.process, task.family
    alone_on_it = len([one for one in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if one.strip()]) == 1
    return {
        "RANK": str(mine.rank),
        "LOCAL_RANK": "0" if alone_on_it else str(mine.local_rank),  # a task that is shown one GPU calls it 0
        "WORLD_SIZE": str(mine.world_size),
        "LOCAL_WORLD_SIZE": str(mine.local_size),
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(env, task),
        "MASTER_PORT": env.get("MASTER_PORT") or str(_port(env, family)),
    }


def task_of(env: Mapping[str, str]) -> Task | None:
    """This process as a task of Slurm, OpenMPI or PMI; None where none of them started it as one of its tasks.

    Raises ValueError where some of a launcher's variables are missing or contradict each other, and where one launcher
    started more tasks than the launcher that it started in turn.
    """
    tasks = [found for family in FAMILIES if (found := _task(env, family)) is not None]
    for inner, outer in itertools.pairwise(tasks):
        if inner.process.world_size < outer.process.world_size:
            raise ValueError(
                f"environment: expected one number of tasks, got {_says(env, inner)} and {_says(env, outer)}, which "
                "would be several runs; start with one of them, or unset the other's variables"
            )
    return tasks[0] if tasks else None


def _task(env: Mapping[str, str], family: Family) -> Task | None:
    """This process as a task of one launcher. A batch script has Slurm's variables too, and is no task of a step."""
    size = _first(env, family.size)
    rank = _first(env, family.rank)
    if rank is None or (family.launcher == "Slurm" and "SLURM_STEP_ID" not in env):
        return None
    if size is None:
        raise ValueError(
            f"environment: expected {family.size[0]} beside {rank} of {family.launcher}, got nothing; start with "
            "torchrun, or unset it"
        )
    mine, tasks = number(env, rank, least=0), number(env, size, least=1)
    local = _first(env, family.local_rank)
    if local is None and tasks > 1:
        raise ValueError(
            f"environment: expected {family.local_rank[0]} beside {rank} of {family.launcher}, got nothing; set "
            "LOCAL_RANK, RANK and WORLD_SIZE in each task"
        )
    local_rank = number(env, local, least=0) if local else 0
    if not local_rank <= mine < tasks:
        names = [rank, size, *filter(None, [local])]
        raise ValueError(
            f"environment: expected a local rank <= the rank < the number of tasks, got {_shown(env, names)} of "
            f"{family.launcher}; start with {family.launcher} anew, or unset its variables"
        )
    return Task(family, Process(mine, local_rank, tasks, _local_size(env, family, tasks)))


def _local_size(env: Mapping[str, str], family: Family, tasks: int) -> int:
    """The number of tasks on this machine, 1 where no variable tells. Slurm writes 2(x3),1: two on each of three
    machines, one on the fourth."""
    if name := _first(env, family.local_size):
        return number(env, name, least=1)
    if family.launcher != "Slurm":
        return 1
    each: list[int] = []
    listed = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE", "")
    for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", listed):
        each += [int(count)] * int(times or 1)
    node = env.get("SLURM_NODEID", "0")
    place = int(node) if node.isdigit() else 0
    return max(1, min(each[place], tasks)) if place < len(each) else 1


def _agree(env: Mapping[str, str]) -> None:
    """Raise ValueError where RANK and WORLD_SIZE cannot be those of one of a launcher's tasks.

    torchrun numbers ranks in its own way and starts several in a task, so only the number of tasks is held to it.
    """
    try:
        task = task_of(env)
    except ValueError:  # RANK alone decides, whatever else is there
        return
    if task is None:
        return
    mine, tasks = process(env), task.process.world_size
    own_numbers = any(name in env for name in ("TORCHELASTIC_RUN_ID", "CROSS_RANK"))  # torchrun, deepspeed
    other = mine.world_size == tasks and not own_numbers and mine.rank != task.process.rank
    if mine.world_size < tasks or other:
        raise ValueError(
            f"environment: expected the ranks of one run, got {_shown(env, LAUNCHED)} and {_says(env, task)}; unset "
            "RANK, LOCAL_RANK and WORLD_SIZE, as the launcher's variables are read, or give torchrun every machine"
        )


def _first_host(env: Mapping[str, str], task: Task) -> str:
    """The machine of rank 0: the first of Slurm's list, or this one where all tasks are here."""
    if task.process.local_size == task.process.world_size:
        return "127.0.0.1"
    listed = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST")
    if listed:
        return first_of(listed)
    raise ValueError(
        f"MASTER_ADDR: expected the machine of rank 0, as {_says(env, task)} on several machines, got nothing; pass it "
        "on, as with mpirun -x MASTER_ADDR=HOST"
    )


def first_of(nodes: str) -> str:
    """The first host of a list as Slurm writes it: gpu[03-07,12],login is gpu03."""
    head = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in head.groups()) if head else nodes


def _port(env: Mapping[str, str], family: Family) -> int:
    """A port that every task of a job works out alike, and two jobs on one machine differently, most of the time."""
    job = "/".join([env[name] for name in (*family.job, "SLURM_JOB_ID", "SLURM_STEP_ID") if name in env])
    return FIRST_PORT + int.from_bytes(hashlib.sha256(job.encode()).digest()[:4], "big") % PORTS


def _first(env: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if env.get(name)), None)


def _shown(env: Mapping[str, str], names: tuple[str, ...] | list[str]) -> str:
    return " ".join(f"{name}={env.get(name, '')}" for name in names)


def _says(env: Mapping[str, str], task: Task) -> str:
    names = [name for name in (_first(env, task.family.rank), _first(env, task.family.size)) if name]
    return f"{task.process.world_size} tasks of {task.family.launcher} ({_shown(env, names)})"


def number(env: Mapping[str, str], name: str, *, least: int, default: str = "") -> int:
    """The whole number in a variable. Raises ValueError where it is none or below `least`."""
    text = env.get(name) or default
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise ValueError(
            f"{name}: expected a whole number >= {least} in the environment, got {text or 'nothing'}; "
            f"a launcher sets it (deepspeed, torchrun)"
        )
    return int(text)
