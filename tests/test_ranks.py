"""Ranks from the variables of every launcher, and what is refused."""

from __future__ import annotations

import pytest

from dsalign import ranks
from dsalign.ranks import Process

SRUN = {
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "41", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "2",
    "SLURM_STEP_NUM_TASKS": "7", "SLURM_NTASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[07-09],login",
}  # fmt: skip
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}
LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


def names(env: dict[str, str]) -> tuple[str, ...]:
    found = ranks.variables(env)
    keys = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    return tuple(found.get(key, "") for key in keys)


def test_slurm() -> None:
    """Seven tasks, two on each of gpu07, gpu08 and gpu09; this is the sixth, the second of gpu09."""
    assert names(SRUN) == ("5", "1", "7", "2", "gpu07")
    assert ranks.process(ranks.variables(SRUN)) == Process(rank=5, local_rank=1, world_size=7, local_size=2)
    other = {**SRUN, "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"}
    assert names(other) == ("6", "0", "7", "1", "gpu07")


def test_every_task_works_out_one_port_and_two_jobs_two() -> None:
    port = ranks.variables(SRUN)["MASTER_PORT"]
    other = {**SRUN, "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"}
    assert 1024 < int(port) < 65536 and ranks.variables(other)["MASTER_PORT"] == port
    assert ranks.variables({**SRUN, "SLURM_JOB_ID": "42"})["MASTER_PORT"] != port
    assert ranks.variables({**SRUN, "MASTER_PORT": "7"})["MASTER_PORT"] == "7"


def test_openmpi_and_pmi() -> None:
    assert names(MPIRUN) == ("1", "1", "2", "2", "127.0.0.1")
    assert names(HYDRA) == ("3", "3", "4", "4", "127.0.0.1")
    several = {**MPIRUN, "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    assert names({**several, "MASTER_ADDR": "a"}) == ("1", "0", "2", "1", "a")
    with pytest.raises(
        ValueError, match=r"^MASTER_ADDR: expected the machine of rank 0, as 2 tasks of OpenMPI \(OMPI_"
    ):
        ranks.variables(several)
    assert names({**several, "SLURM_JOB_NODELIST": "a3,a4"}) == ("1", "0", "2", "1", "a3")


def test_a_task_that_is_shown_one_gpu_calls_it_0() -> None:
    assert names({**SRUN, "CUDA_VISIBLE_DEVICES": "3"})[:2] == ("5", "0")
    assert names({**SRUN, "CUDA_VISIBLE_DEVICES": "0,1"})[:2] == ("5", "1")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[03-07,12],b", "gpu03"), ("n[1,5]", "n1"), ("r1n[08]-ib,x", "r1n08-ib"), ("", "")],
)
def test_the_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert ranks.first_of(nodes) == first


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"},  # a batch script is no task
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {**SRUN, "RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "14", "TORCHELASTIC_RUN_ID": "x"},  # torchrun by srun
        {**SRUN, "RANK": "4", "LOCAL_RANK": "0", "WORLD_SIZE": "7", "TORCHELASTIC_RUN_ID": "x"},
        {**MPIRUN, **LAUNCHED},
        {**LAUNCHED, "PMI_RANK": "0"},
    ],
)
def test_nothing_is_set_for_who_is_alone_or_launched(env: dict[str, str]) -> None:
    assert ranks.variables(env) == {}


@pytest.mark.parametrize(
    ("env", "said"),
    [
        (
            {**SRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
            "expected the ranks of one run, got RANK=0 LOCAL_R",
        ),
        (
            {**SRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "7"},
            "expected the ranks of one run, got RANK=0 LOCAL_R",
        ),
        (
            {**SRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"},
            "expected the ranks of one run",
        ),
        ({**SRUN, **MPIRUN}, "expected one number of tasks, got 2 tasks of OpenMPI (OMPI_COMM_WORLD_RANK=1 OMPI_COMM_"),
        (
            {**MPIRUN, "OMPI_COMM_WORLD_RANK": "2"},
            "expected a local rank <= the rank < the number of tasks, got OMPI_CO",
        ),
        (
            {"OMPI_COMM_WORLD_RANK": "1"},
            "expected OMPI_COMM_WORLD_SIZE beside OMPI_COMM_WORLD_RANK of OpenMPI, got noth",
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2"},
            "expected MPI_LOCALRANKID beside PMI_RANK of PMI, got nothing; set LOCAL_",
        ),
        ({**LAUNCHED, "RANK": "2"}, "expected LOCAL_RANK <= RANK < WORLD_SIZE, got RANK=2 LOCAL_RANK=1 WORLD_SIZE=2; "),
    ],
)
def test_a_contradiction_is_refused(env: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        ranks.variables(env)
        ranks.process(env)
    assert str(caught.value).startswith(f"environment: {said}")


def test_mpirun_that_starts_its_daemons_by_srun_is_mpirun() -> None:
    """Two daemons, each with two tasks."""
    env = {**SRUN, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", **MPIRUN}
    env |= {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}
    assert names(env) == ("3", "1", "4", "2", "gpu07")
