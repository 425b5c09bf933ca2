"""Which processes a command becomes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dsalign import launcher
from dsalign.config.parse import Parsed, parse
from dsalign.launcher import Launch
from dsalign.ranks import Process

BASE = ("rlhf", "--rlhf_type", "dpo", "--model", "m", "--dataset", "two words", "rows")
TORCH = (sys.executable, "-m", "dsalign.engines.elastic", "--nproc_per_node")
ADDRESS = ("--master_addr", "127.0.0.1", "--master_port", "1234")


def parsed(*argv: str, world_size: int = 1) -> Parsed:
    return parse([*BASE, *argv], world_size=world_size)


def planned(env: dict[str, str], devices: int, *argv: str) -> Launch | None:
    env = {"MASTER_PORT": "1234", **env}
    return launcher.planned_launch(env, devices, parsed(*argv, world_size=launcher.ranks(env, devices)), sys.argv[0])


@pytest.fixture(autouse=True)
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The program was started as `python "a script.py"`."""
    program = str(tmp_path / "a script.py")
    monkeypatch.setattr(sys, "argv", [program])
    return program


@pytest.mark.parametrize("devices", [0, 1])
def test_one_process_for_one_gpu_or_none(devices: int) -> None:
    assert planned({}, devices) is None


def test_a_launchers_rank_is_left_alone() -> None:
    env = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "NPROC_PER_NODE": "4"}
    assert planned(env, 8) is None
    assert launcher.ranks(env, 8) == 2


@pytest.mark.parametrize("devices", [0, 2])
def test_nproc_per_node_starts_that_many(devices: int, script: str) -> None:
    launch = planned({"NPROC_PER_NODE": "2"}, devices, "--beta=0.2", "--system", "be kind")
    assert launch == Launch(
        command=(*TORCH, "2", *ADDRESS, script, *BASE, "--beta=0.2", "--system", "be kind"),
        arguments=(*BASE, "--beta=0.2", "--system", "be kind"),
        ranks=2,
        note="",
    )


def test_more_gpus_than_processes_is_one_rank_a_gpu_at_zero3(script: str) -> None:
    """16 steps of one process are 4 of four: a step still sees 16 x 2 rows."""
    launch = planned({}, 4, "--batch-size", "2", "--gradient-accumulation-steps", "16", "--beta", "0.2")
    assert launch is not None
    assert launch.arguments == (
        *BASE, "--batch-size", "2", "--beta", "0.2", "--gradient_accumulation_steps=4", "--deepspeed=zero3",
    )  # fmt: skip
    assert launch.command == (*TORCH, "4", *ADDRESS, script, *launch.arguments)
    assert launch.note == (
        "4 GPUs for 1 process(es): one rank a GPU, deepspeed zero3 instead of a model split, "
        "gradient_accumulation_steps 16 -> 4, a step still sees 32 rows"
    )
    again = parse(launch.arguments, world_size=launch.ranks).config
    optim, data = again.optim, again.data
    assert (optim.gradient_accumulation_steps, optim.deepspeed, optim.batch_size) == (4, "zero3", 2)
    assert data.dataset == ("two words", "rows")


def test_two_processes_on_four_gpus_each() -> None:
    launch = planned({"NPROC_PER_NODE": "2"}, 8, "--gradient_accumulation_steps=8")
    assert launch is not None
    assert (launch.ranks, launch.arguments[-2:]) == (8, ("--gradient_accumulation_steps=2", "--deepspeed=zero3"))


def test_a_deepspeed_file_that_was_asked_for_stays() -> None:
    launch = planned({}, 2, "--deepspeed", "zero1", "--gradient_accumulation_steps", "2")
    assert launch is not None
    assert launch.arguments == (*BASE, "--deepspeed", "zero1", "--gradient_accumulation_steps=1")
    assert "one rank a GPU, deepspeed zero1, gradient_accumulation_steps 2 -> 1, " in launch.note


def test_accumulation_by_default_follows_the_ranks() -> None:
    launch = planned({}, 8)
    assert launch is not None
    assert launch.arguments == (*BASE, "--deepspeed=zero3")
    assert launch.note.endswith("gradient_accumulation_steps by default")
    assert parse(launch.arguments, world_size=8).config.optim.gradient_accumulation_steps == 2


def test_accumulation_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(ValueError) as caught:
        planned({}, 3, "--gradient_accumulation_steps", "16")
    assert str(caught.value) == (
        "gradient_accumulation_steps: expected 16 x 1 processes to divide over 3 GPUs, got a rest of 1; change it, or "
        "set NPROC_PER_NODE=3 for a step of 48 rows"
    )


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NPROC_PER_NODE": "4"}, "NPROC_PER_NODE: expected at most the 2 visible GPUs, got 4; lower it or show more"),
        ({"NPROC_PER_NODE": "0"}, "NPROC_PER_NODE: expected a whole number >= 1 in the environment, got 0; a launcher"),
        ({"NPROC_PER_NODE": "two"}, "NPROC_PER_NODE: expected a whole number >= 1 in the environment, got two"),
        ({"NNODES": "2"}, "NNODES: expected 1 without a launcher, got 2; several nodes start with"),
        ({"RANK": "0"}, "LOCAL_RANK: expected a whole number >= 0 in the environment, got nothing; a launcher sets it"),
        ({"RANK": "-1"}, "RANK: expected a whole number >= 0 in the environment, got -1"),
        (
            {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "2"},
            "environment: expected LOCAL_RANK <= RANK < WORLD_SIZE, got RANK=2 LOCAL_RANK=0 WORLD_SIZE=2; start with",
        ),
    ],
)
def test_an_environment_that_contradicts_itself(env: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        launcher.ranks(env, 2)
    assert str(caught.value).startswith(message)


def test_the_console_command_is_started_again_as_a_module(monkeypatch: pytest.MonkeyPatch) -> None:
    for program in ("/usr/bin/dsalign", str(launcher.CLI)):
        monkeypatch.setattr(sys, "argv", [program])
        launch = planned({"NPROC_PER_NODE": "2"}, 0)
        assert launch is not None
        assert launch.command[9:12] == ("-m", "dsalign.cli", "rlhf")


def test_a_process_alone_has_the_variables_of_a_launcher() -> None:
    env = launcher.alone({"MASTER_PORT": "77"})
    assert env.pop("MASTER_PORT") == "77"
    assert env == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    assert launcher.process({**env, "MASTER_PORT": "77"}) == Process(rank=0, local_rank=0, world_size=1)


def test_ranks_of_this_machine_as_either_launcher_says_them() -> None:
    """torchrun writes LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE; they share the cores of a CPU."""
    env = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
    assert launcher.process({**env, "LOCAL_WORLD_SIZE": "4"}).local_size == 4
    assert launcher.process({**env, "LOCAL_SIZE": "2"}).local_size == 2
    assert 1024 <= int(launcher.alone({})["MASTER_PORT"]) < 65536


@pytest.mark.parametrize(
    ("listed", "there", "count"),
    [
        ("", 8, 0), ("-1", 8, 0), ("3", 8, 1), ("0,1", 8, 2), ("0, 1,-1,2", 8, 2), ("GPU-af,MIG-b", 8, 2), ("0,", 8, 1),
        ("0,1", 0, 0), ("GPU-af", 0, 0), ("0,1,2", 2, 2), ("3", 2, 0),
    ],
)  # fmt: skip
def test_visible_devices_of_the_environment(
    listed: str, there: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list means nothing on a machine without a GPU, and ends where the GPUs do."""
    monkeypatch.setattr(launcher, "_gpus", lambda: there)
    assert launcher.visible_devices({"CUDA_VISIBLE_DEVICES": listed}) == count


def test_gpus_without_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher.shutil, "which", lambda program: None)
    monkeypatch.setattr(launcher, "DEVICES", tmp_path)
    assert launcher.visible_devices({}) == 0
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert launcher.visible_devices({}) == 2


def test_a_port_is_a_port() -> None:
    for wrong, said in (("70000", "expected a port, 1 to 65535, got 70000"), ("x", "expected a whole number >= 1")):
        with pytest.raises(ValueError, match=rf"^MASTER_PORT: {said}"):
            launcher.port_of_our_own({"MASTER_PORT": wrong})
    port, line = launcher.port_of_our_own({})
    assert 1024 <= port < 65536 and line == ""


def test_a_checkout_is_on_the_path_of_the_launcher() -> None:
    root = str(launcher.CLI.parent.parent)
    assert launcher.environment({"PYTHONPATH": "a"}, "x/train.py") == {"PYTHONPATH": f"{root}:a"}
    assert launcher.environment({"A": "b"}, "/usr/bin/dsalign") == {"A": "b"}


def test_visible_devices_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """MIG slices are listed below their GPU and are no GPUs of their own."""
    output = "GPU 0: NVIDIA X (UUID: GPU-a)\n  MIG 1g.5gb Device 0: (UUID: MIG-b)\nGPU 1: NVIDIA X (UUID: GPU-c)\n"
    answers = [subprocess.CompletedProcess([], 0, output), subprocess.CompletedProcess([], 9, "GPU 0: no driver")]
    monkeypatch.setattr(launcher.shutil, "which", lambda program: f"/bin/{program}")
    monkeypatch.setattr(launcher.subprocess, "run", lambda *args, **options: answers.pop(0))
    assert [launcher.visible_devices({}), launcher.visible_devices({})] == [2, 0]
    monkeypatch.setattr(launcher.shutil, "which", lambda program: None)
    assert launcher.visible_devices({}) == 0
