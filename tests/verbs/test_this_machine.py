"""What `dsalign doctor` finds on a machine, with parts of it broken."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Any

import pytest

from dsalign.verbs import this_machine
from dsalign.verbs.lines import ERROR, OK, SKIPPED, WARNING


def test_a_library_that_cannot_be_imported_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine, "PROBE", 'print(\'DOCTOR{"torch": "2"}\')\nimport no_such_library')
    found, line = this_machine._probe()
    assert found == {"torch": "2"} and line is not None and line.state == ERROR
    assert line.found == (
        "transformers or peft cannot be imported: ModuleNotFoundError: No module named 'no_such_library'"
    )
    monkeypatch.setattr(this_machine, "PROBE", "import time\ntime.sleep(20)")
    monkeypatch.setattr(this_machine, "IMPORT_S", 0.5)
    found, line = this_machine._probe()
    assert found == {} and line is not None and line.found == "torch cannot be imported: not done after 0.5 s"
    monkeypatch.setattr(this_machine, "PROBE", 'print(\'DOCTOR{"torch": "2", "ops": {}}\')')
    assert this_machine._probe() == ({"torch": "2", "ops": {}}, None)


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine, "versions", lambda: {"python": "3.11.1", "torch": "2.5.1", "dsalign": "0"})
    monkeypatch.setattr(
        this_machine.importlib.metadata, "requires", lambda name: ["torch>=2.6", 'gguf; extra == "dev"']
    )
    first, missing, old = this_machine._versions()
    assert first.state == OK and "torch 2.5.1" in first.found
    assert missing.state == ERROR and missing.found.startswith("not installed: deepspeed, transformers, peft")
    assert (old.state, old.found) == (ERROR, "torch is 2.5.1, expected >=2.6")


@pytest.mark.parametrize(
    ("probe", "nodes", "state", "said"),
    [
        ({"torch": "2+cpu", "gpus": [], "cuda": ""}, 0, OK, "none; runs are computed on the CPU"),
        ({"torch": "2+cpu", "gpus": [], "cuda": ""}, 2, WARNING, "2 there, torch 2+cpu is for CPUs"),
        ({"torch": "2", "gpus": [], "cuda": "13.0"}, 2, WARNING, "of which torch (for CUDA 13.0) can use none"),
        ({}, 1, SKIPPED, "torch does not say more"),
        ({"gpus": [["H", 80 * 2**30, "9.0"]], "cuda": "13.0"}, 1, OK, "1: H 80 GiB (capability 9.0); driver unknown"),
    ],
)
def test_gpus(
    probe: dict[str, Any], nodes: int, state: str, said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(this_machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(this_machine, "DEVICES", tmp_path)
    for i in range(nodes):
        (tmp_path / f"nvidia{i}").touch()
    (line,) = this_machine._gpus(probe)
    assert line.state == state and said in line.found


def test_a_stale_lock_and_where_extensions_are_built(tmp_path: Path) -> None:
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    where, left = this_machine._extensions({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert (where.state, where.found) == (OK, f"TORCH_EXTENSIONS_DIR {tmp_path}")
    assert left.state == ERROR and str(lock) in left.found and left.advice == f"remove it: rm {lock}"


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine.shutil, "which", lambda name: None)
    (line,) = this_machine._compiler({"ops": {"cpu_adam": True, "async_io": False}}, {})
    assert line.state == WARNING and "not async_io" in line.found and "a C++ compiler and ninja" in line.advice


def test_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert this_machine._port({"MASTER_PORT": port}).state == WARNING
    assert this_machine._port({"MASTER_PORT": port}).found == f"{port} is free"
    assert this_machine._port({"MASTER_PORT": "x"}).found == "MASTER_PORT: expected a port, 1 to 65535, got 'x'"


def test_a_host_name_that_is_the_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine.socket, "gethostname", lambda: "vm")
    monkeypatch.setattr(this_machine, "_default_interface", lambda: "eth7")
    address = "127.0.1.1"
    monkeypatch.setattr(this_machine.socket, "getaddrinfo", lambda *_: [(0, 0, 0, "", (address, 0))])
    (line,) = this_machine._network({})
    assert line.state == WARNING and "export GLOO_SOCKET_IFNAME=eth7 NCCL_SOCKET_IFNAME=eth7" in line.advice
    (line,) = this_machine._network({"GLOO_SOCKET_IFNAME": "eth99"})
    assert line.state == ERROR and "GLOO_SOCKET_IFNAME=eth99: there is no such interface" in line.found
    address = "10.0.0.4"
    (line,) = this_machine._network({})
    assert (line.state, line.found) == (OK, "vm is 10.0.0.4; the default route is by eth7")


def test_the_hub_is_tried_once_and_no_secret_is_printed(tmp_path: Path) -> None:
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    env = {"HF_HOME": str(tmp_path)}
    assert this_machine._hub({**env, "HF_HUB_OFFLINE": "1"}).state == OK
    line = this_machine._hub({**env, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert line.state == WARNING and "1 model(s)" in line.found and "cannot be reached" in line.found
    assert this_machine._hub({**env, "HF_ENDPOINT": "nonsense"}).state == WARNING


def test_disk_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(this_machine.disk, "free", lambda path: 2**20)
    assert {line.state for line in this_machine._disk({})} == {WARNING}
    memory, shm = this_machine._memory()
    assert "cores to use" in memory.found and shm.advice == "start the container with --shm-size 8g"
    assert sys.platform == "linux"
