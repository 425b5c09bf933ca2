"""Runs of dsalign on the nodes of cluster.py, by each way in which people start them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster import Cluster

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
SCRIPT = str(ROOT / "launch" / "train.py")
PORT = "29617"
FORWARDED = ("OMP_NUM_THREADS", "TORCH_EXTENSIONS_DIR", "PYTHONPATH", "DSALIGN_TEST", "DSALIGN_FAULT")
Words = Sequence[str]


@dataclass(frozen=True)
class Way:
    """A way to start a run. commands: (cluster, words of the run) -> (node, command) for each process that its user
    starts. programs: what must be installed for it."""

    commands: Callable[[Cluster, Words], list[tuple[int, list[str]]]]
    programs: tuple[str, ...] = ()


def _deepspeed(*words: str) -> list[str]:
    return [sys.executable, str(BIN / "deepspeed"), *words]


def _pdsh(cluster: Cluster, words: Words) -> list[tuple[int, list[str]]]:
    first = ["--hostfile", str(cluster.hostfile), "--master_addr", cluster.addresses[0], "--master_port", PORT]
    return [(0, _deepspeed(*first, SCRIPT, *words))]


def _no_ssh(cluster: Cluster, words: Words) -> list[tuple[int, list[str]]]:
    where = ["--hostfile", str(cluster.hostfile), "--no_ssh", "--master_addr", cluster.addresses[0],
             "--master_port", PORT]  # fmt: skip
    return [(i, _deepspeed(*where, "--node_rank", str(i), SCRIPT, *words)) for i in range(cluster.count)]


def _torchrun(cluster: Cluster, words: Words) -> list[tuple[int, list[str]]]:
    run = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(cluster.count), "--nproc-per-node", "1",
           "--master-addr", cluster.addresses[0], "--master-port", PORT]  # fmt: skip
    return [(i, [*run, "--node-rank", str(i), SCRIPT, *words]) for i in range(cluster.count)]


def _srun(cluster: Cluster, words: Words) -> list[tuple[int, list[str]]]:
    tasks = ["srun", f"-N{cluster.count}", f"-n{cluster.count}", "--kill-on-bad-exit=1", "--export=ALL"]
    return [(0, [*tasks, sys.executable, SCRIPT, *words])]


def _mpirun(cluster: Cluster, words: Words) -> list[tuple[int, list[str]]]:
    hosts = ",".join(f"node{i}" for i in range(cluster.count))
    mpi = ["mpirun", "--allow-run-as-root", "-n", str(cluster.count), "--host", hosts, "--mca", "btl_tcp_if_include",
           "veth0", "--mca", "oob_tcp_if_include", "veth0", "-x", f"MASTER_ADDR={cluster.addresses[0]}",
           "-x", f"MASTER_PORT={PORT}"]  # fmt: skip
    passed = [word for name in FORWARDED if name in os.environ for word in ("-x", name)]
    return [(0, [*mpi, *passed, sys.executable, SCRIPT, *words])]


WAYS = {
    "pdsh": Way(_pdsh, ("pdsh",)),
    "no_ssh": Way(_no_ssh),
    "torchrun": Way(_torchrun),
    "srun": Way(_srun, ("munged", "slurmctld", "slurmd", "srun")),
    "mpirun": Way(_mpirun, ("mpirun",)),
}


class Run:
    """A run that was started in one of WAYS. codes: the exit codes of what its user started, after `wait`. text: all
    that was printed."""

    def __init__(self, cluster: Cluster, way: str, words: Words, folder: Path, **env: str) -> None:
        self.cluster, self.folder, self.codes = cluster, folder, list[int]()
        folder.mkdir(parents=True, exist_ok=True)
        around = self._environment(env)
        if way == "srun":
            around["SLURM_CONF"] = str(cluster.slurm())
        self._logs = []
        self.started: list[subprocess.Popen[bytes]] = []
        for i, (node, command) in enumerate(WAYS[way].commands(cluster, words)):
            self._logs.append(folder / f"{way}-{i}.log")
            self.started.append(cluster.popen(node, command, around, self._logs[-1]))

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        """This process's variables and `more`, with what DeepSpeed's pdsh does not forward in a file that it reads."""
        own = {"OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(ROOT / ".torch_extensions"), **more}
        file = self.folder / "deepspeed_env"
        file.write_text("\n".join(f"{name}={value}" for name, value in own.items()))
        path = f"{BIN}:{os.environ['PATH']}:/usr/sbin"
        return {**os.environ, **own, "DS_ENV_FILE": str(file), "PATH": path, "PDSH_RCMD_TYPE": "ssh"}

    @property
    def text(self) -> str:
        """All that was printed until now."""
        return "".join(log.read_text(errors="replace") for log in self._logs)

    def wait_for(self, text: str, seconds: float) -> None:
        """Wait until `text` was printed. Raises AssertionError with all that was, where it is not in time or the run
        ends before."""
        until = time.monotonic() + seconds
        while text not in self.text:
            alive = any(one.poll() is None for one in self.started)
            assert alive and time.monotonic() < until, f"no {text!r} in:\n{self.text[-4000:]}"
            time.sleep(0.1)

    def wait(self, seconds: float) -> float:
        """Wait until everything that was started has ended, ranks too; returns the seconds it took."""
        began = time.monotonic()
        for one in self.started:
            self.codes.append(one.wait(max(0.1, began + seconds - time.monotonic())))
        self.wait_for_ranks(began + seconds - time.monotonic())
        return time.monotonic() - began

    def wait_for_ranks(self, seconds: float) -> float:
        """Wait until no rank is left on any node; returns the seconds it took."""
        began = time.monotonic()
        while any(self.ranks(node) for node in range(self.cluster.count)):
            assert time.monotonic() < began + seconds, f"ranks are left: {self.text[-4000:]}"
            time.sleep(0.1)
        return time.monotonic() - began

    def kill(self) -> None:
        """End what is left of the run."""
        for node in range(self.cluster.count):
            for pid in self.cluster.pids(node, SCRIPT):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def ranks(self, node: int) -> list[int]:
        """The processes of ranks on a node: those that run the script and are no launcher."""
        launchers = (
            "bin/deepspeed ",
            "deepspeed.launcher.launch",
            "torch.distributed.run",
            "srun ",
            "mpirun ",
            "pdsh ",
        )
        mine = set(self.cluster.pids(node, SCRIPT))
        return sorted(mine - {pid for name in launchers for pid in self.cluster.pids(node, SCRIPT, name)})
