"""Two nodes on one Linux machine: a network namespace each with an address, a host name and an sshd of its own, joined
by a bridge in a third. What they share is the disk, as nodes share a network file system. Needs root."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

NEEDED = ("ip", "unshare", "ssh", "ssh-keygen", "/usr/sbin/sshd")
SLURM = ("munged", "slurmctld", "slurmd", "srun")
SWITCH, NETWORK = "dsalign-switch", "10.77.0"
SSHD = """Port 22
ListenAddress {address}
HostKey {folder}/host_key_{i}
PidFile {folder}/sshd_{i}.pid
AuthorizedKeysFile {folder}/authorized_keys
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
StrictModes no
MaxStartups 200
"""
SSH = """Host *
  IdentityFile {folder}/id
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
  ConnectTimeout 5
  ServerAliveInterval 5
  ServerAliveCountMax 2
"""
SLURM_CONF = """ClusterName=dsalign
SlurmctldHost=node0
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
ReturnToService=2
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldParameters=enable_configless
NodeName=node0 NodeAddr=node0 CPUs=1 State=UNKNOWN
NodeName=node1 NodeAddr=node1 CPUs=1 State=UNKNOWN
PartitionName=all Nodes=node0,node1 Default=YES MaxTime=INFINITE State=UP
"""
CGROUPS = """if [ -f /sys/fs/cgroup/cgroup.controllers ]; then exit 0; fi
if grep -q cgroup2 /proc/filesystems && [ {version} = v2 ]; then mount -t cgroup2 none /sys/fs/cgroup; exit; fi
mount -t tmpfs none /sys/fs/cgroup
for one in freezer cpuset memory devices cpuacct; do
  mkdir /sys/fs/cgroup/$one && mount -t cgroup -o $one cgroup /sys/fs/cgroup/$one
done
"""


def lacking(programs: Sequence[str]) -> str:
    """Why these nodes cannot be made here; empty where they can."""
    if os.name != "posix" or os.geteuid() != 0:
        return "needs root, for network namespaces"
    gone = [name for name in programs if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    return f"needs {', '.join(gone)}" if gone else ""


def _call(*words: str) -> None:
    """Run a command that must succeed, with its output in the error where it does not."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stdout}{done.stderr}")


class Cluster:
    """Nodes called node0, node1, ...: see `up`."""

    def __init__(self, count: int) -> None:
        self.count, self.folder = count, Path(tempfile.mkdtemp(prefix="dsalign-nodes-"))
        self.folder.chmod(0o711)
        self.names = [f"dsalign{i}" for i in range(count)]
        self.addresses = [f"{NETWORK}.{i + 1}" for i in range(count)]
        self.hostfile = self.folder / "hostfile"
        self._slurm: Path | None = None

    def popen(self, node: int, words: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command on a node, with its output in `log`."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self._on(node, words), env=dict(env), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def pids(self, node: int, *words: str) -> list[int]:
        """Processes on a node whose command line has each of `words`, by number."""
        found = subprocess.run(["ip", "netns", "pids", self.names[node]], capture_output=True, text=True).stdout
        lines = {int(pid): Path(f"/proc/{pid}/cmdline") for pid in found.split()}
        texts = {}
        for pid, path in lines.items():
            with suppress(OSError):
                texts[pid] = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return sorted(pid for pid, text in texts.items() if all(word in text for word in words))

    def link(self, node: int, state: str) -> None:
        """Cut a node's cable (`down`) or plug it in again (`up`)."""
        _call("ip", "-n", self.names[node], "link", "set", "veth0", state)

    def _on(self, node: int, words: Sequence[str]) -> list[str]:
        script = 'hostname "$0"; exec "$@"'
        return ["ip", "netns", "exec", self.names[node], "unshare", "--uts", "--", "sh", "-c", script, f"node{node}",
                *words]  # fmt: skip

    def start(self) -> None:
        """Make the switch and the nodes, with an sshd on each."""
        _call("ip", "netns", "add", SWITCH)
        _call("ip", "-n", SWITCH, "link", "add", "br0", "type", "bridge")
        _call("ip", "-n", SWITCH, "link", "set", "br0", "up")
        _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "id"))
        shutil.copy(self.folder / "id.pub", self.folder / "authorized_keys")
        Path("/run/sshd").mkdir(exist_ok=True)
        for i in range(self.count):
            _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / f"host_key_{i}"))
        keys = [(self.folder / f"host_key_{i}.pub").read_text().split()[:2] for i in range(self.count)]
        lines = [f"node{i},{self.addresses[i]} {' '.join(key)}\n" for i, key in enumerate(keys)]
        (self.folder / "known_hosts").write_text("".join(lines))
        self.hostfile.write_text("".join(f"node{i} slots=1\n" for i in range(self.count)))
        for i in range(self.count):
            self._start_node(i)

    def _start_node(self, i: int) -> None:
        name, address = self.names[i], self.addresses[i]
        _call("ip", "netns", "add", name)
        _call("ip", "link", "add", "veth0", "netns", name, "type", "veth", "peer", "name", f"port{i}", "netns", SWITCH)
        _call("ip", "-n", SWITCH, "link", "set", f"port{i}", "master", "br0", "up")
        _call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "veth0")
        _call("ip", "-n", name, "link", "set", "veth0", "up")
        _call("ip", "-n", name, "link", "set", "lo", "up")
        etc = Path("/etc/netns") / name  # `ip netns exec` binds these files over those of /etc
        (etc / "ssh").mkdir(parents=True, exist_ok=True)
        hosts = "".join(f"{a} node{j}\n" for j, a in enumerate(self.addresses))
        (etc / "hosts").write_text("127.0.0.1 localhost\n" + hosts)
        (etc / "resolv.conf").write_text("")  # no server: a reverse look-up would wait for one
        (etc / "nsswitch.conf").write_text("hosts: files\npasswd: files\ngroup: files\nshadow: files\n")
        (etc / "hostname").write_text(f"node{i}\n")
        (etc / "ssh" / "ssh_config").write_text(SSH.format(folder=self.folder))
        settings = self.folder / f"sshd_{i}.conf"
        settings.write_text(SSHD.format(address=address, folder=self.folder, i=i))
        _call(*self._on(i, ["/usr/sbin/sshd", "-f", str(settings), "-E", str(self.folder / f"sshd_{i}.log")]))

    def slurm(self) -> Path:
        """The configuration, for SLURM_CONF, of a controller on node0 and a daemon on each node, started when it is
        first asked for."""
        if self._slurm is None:
            self._slurm = self._start_slurm()
        return self._slurm

    def _start_slurm(self) -> Path:
        folder = self.folder / "slurm"
        for name in ("", "munge", "state", *(f"spool-node{i}" for i in range(self.count))):
            (folder / name).mkdir(exist_ok=True)
        (folder / "munge").chmod(0o711)
        folder.chmod(0o711)
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        settings = folder / "slurm.conf"
        settings.write_text(SLURM_CONF.format(folder=folder))
        version = "v2" if Path("/sys/fs/cgroup/cgroup.controllers").exists() else "v1"
        (folder / "cgroup.conf").write_text(
            f"CgroupPlugin=cgroup/{version}\nIgnoreSystemd=yes\nConstrainCores=no\nConstrainRAMSpace=no\n"
        )
        mounts = folder / "mounts.sh"  # `ip netns exec` has a /sys of its own, without the control groups
        mounts.write_text(CGROUPS.format(version=version))
        files = ("socket=munge/sock", "key-file=munge/key", "pid-file=munge.pid", "log-file=munge.log",
                 "seed-file=munge.seed")  # fmt: skip
        _call("munged", "--force", *(f"--{a}={folder / b}" for a, _, b in (one.partition("=") for one in files)))
        _call(*self._on(0, ["slurmctld", "-f", str(settings)]))
        for i in range(self.count):
            daemon = f"sh {mounts} && exec slurmd -N node{i} -f {settings}"
            _call(*self._on(i, ["sh", "-c", daemon]))
        env = {**os.environ, "SLURM_CONF": str(settings)}
        for _ in range(60):
            seen = subprocess.run(
                self._on(0, ["sinfo", "-h", "-N", "-o", "%t"]), env=env, capture_output=True, text=True
            )
            if seen.stdout.split() == ["idle"] * self.count:
                return settings
            time.sleep(0.5)
        raise RuntimeError(f"Slurm has no idle nodes: {seen.stdout}{seen.stderr}")

    def stop(self) -> None:
        """End every process on the nodes and take them down; nothing else is touched."""
        for path in (self.folder / "slurm").glob("*.pid"):
            with suppress(OSError, ValueError):
                os.kill(int(path.read_text()), 15)
        for i, name in enumerate(self.names):
            for pid in self.pids(i):
                with suppress(OSError):
                    os.kill(pid, 9)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)
        subprocess.run(["ip", "netns", "del", SWITCH], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def up(count: int = 2) -> Iterator[Cluster]:
    """A context in which `count` nodes are there."""
    cluster = Cluster(count)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
