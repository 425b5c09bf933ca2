"""Two nodes give the weights that two ranks of one machine give, whichever way they are started."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
from cluster import NEEDED, Cluster, lacking, up
from node_runs import SCRIPT, WAYS, Run
from support import tiny_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(lacking(NEEDED)), reason=f"make test-nodes {lacking(NEEDED)}"),
]
SECONDS = 600.0
LONG = 40  # steps of a run that something happens to
GONE_S = 15.0  # within which every rank has left after a fault
COMMON = ("--num_train_epochs", "20",
          "--deepspeed", "zero3", "--learning_rate", "1e-3", "--batch_size", "2", "--gradient_accumulation_steps", "1",
          "--logging_steps", "1", "--max_length", "64")  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with up() as nodes:
        yield nodes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows for every algorithm here, and a reward."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_folder(folder / "model")
    rows = [{"prompt": f"word {i} and {i * i}?", "chosen": "yes " * (i % 4 + 1), "rejected": "no " * (i % 3 + 1)}
            for i in range(16)]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    (folder / "reward.py").write_text(
        "def vowels(completions):\n    return [sum(c.count(v) for v in 'aeiou') / 4 for c in completions]\n"
    )
    return folder


def words(algo: str, inputs: Path, output: Path, steps: int = 4) -> list[str]:
    """The command line of a run of a few optimizer steps."""
    own = {
        "dpo": ["--dataset", str(inputs / "pairs.jsonl"), "--max_steps", str(steps)],
        "ppo": ["--dataset", str(inputs / "prompts.jsonl"), "--max_steps", str(steps), "--max_new_tokens", "8",
                "--reward_funcs", f"{inputs / 'reward.py'}:vowels"],
    }[algo]  # fmt: skip
    return ["--algo", algo, "--model", str(inputs / "model"), *own, *COMMON, "--output_dir", str(output)]


def weights(output: Path) -> dict[str, str]:
    """Name -> sha256 of every tensor file of final/."""
    files = sorted((output / "final").rglob("*.safetensors"))
    assert files, f"{output} has no final/"
    return {str(f.relative_to(output)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def train_here(algo: str, inputs: Path, output: Path, steps: int) -> dict[str, str]:
    """The weights after a run of two ranks on this machine."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
           "--master-port", "29631", SCRIPT]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*run, *words(algo, inputs, output, steps)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:3000]
    return weights(output)


@pytest.fixture(scope="module")
def one_machine(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, str]]:
    """Algorithm -> the weights after a short run on one machine; "long" -> those after LONG steps of dpo."""
    folder = tmp_path_factory.mktemp("one")

    @cache
    def of(name: str) -> dict[str, str]:
        long = name == "long"
        return train_here("dpo" if long else name, inputs, folder / name, LONG if long else 4)

    return of


@pytest.mark.parametrize(
    ("way", "algo"), [*((way, "dpo") for way in WAYS), ("pdsh", "ppo"), ("torchrun", "ppo"), ("srun", "ppo")]
)
def test_nodes_train_the_same_weights(
    way: str, algo: str, cluster: Cluster, inputs: Path, one_machine: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    if reason := lacking(WAYS[way].programs):
        pytest.skip(reason)
    run = Run(cluster, way, words(algo, inputs, tmp_path / "run"), tmp_path / "logs")
    run.wait(SECONDS)
    assert set(run.codes) == {0}, run.text[-4000:]
    assert "on 2 rank(s)" in run.text
    assert weights(tmp_path / "run") == one_machine(algo)


def killed(run: Run, cluster: Cluster) -> None:
    (rank,) = run.ranks(1)
    os.kill(rank, signal.SIGKILL)


def told(run: Run, cluster: Cluster) -> None:
    """SIGTERM to a rank, as a machine that is taken away sends it."""
    (rank,) = run.ranks(1)
    os.kill(rank, signal.SIGTERM)


def cut(run: Run, cluster: Cluster) -> None:
    cluster.link(1, "down")


@pytest.mark.parametrize(
    ("way", "fault"),
    [
        *((way, killed) for way in WAYS),
        *((way, told) for way in WAYS),
        *((way, cut) for way in WAYS),
    ],
    ids=lambda one: one if isinstance(one, str) else one.__name__,
)
def test_a_fault_of_a_node_ends_all_and_the_run_goes_on(
    way: str,
    fault: Callable[[Run, Cluster], None],
    cluster: Cluster,
    inputs: Path,
    one_machine: Callable[[str], dict[str, str]],
    tmp_path: Path,
) -> None:
    """Every rank leaves, the message names what happened, and the same command goes on to the same weights."""
    if reason := lacking(WAYS[way].programs):
        pytest.skip(reason)
    command = [*words("dpo", inputs, tmp_path / "run", LONG), "--save_steps", "5", "--resume", "auto"]
    run = Run(cluster, way, command, tmp_path / "logs")
    try:
        run.wait_for(f"step 7/{LONG}", SECONDS)
        fault(run, cluster)
        seconds = run.wait_for_ranks(GONE_S + 30)
        cluster.link(1, "up")  # srun waits for a node until Slurm has given it up, minutes after the ranks have left
        run.wait(60)
    finally:
        cluster.link(1, "up")
        run.kill()
    text = run.text
    assert f"step {LONG}/" not in text, "the run was over before the fault"
    assert 0 not in run.codes, (run.codes, text[-4000:])
    if fault is told:
        assert "SIGTERM on rank 1" in text and "resume with" in text
    else:
        assert re.search(r"rank 1 (with PID \d+ )?on (node )?node1", text), text[
            -4000:
        ]  # mpirun ends all, and says why
        assert seconds < GONE_S, f"ranks were there for {seconds:.0f} s: {text[-3000:]}"
    again = Run(cluster, way, command, tmp_path / "again")
    again.wait(SECONDS)
    assert set(again.codes) == {0}, again.text[-4000:]
    assert "resuming at step" in again.text
    assert weights(tmp_path / "run") == one_machine("long")


def test_a_full_disk_of_one_node_is_told_by_all(
    cluster: Cluster, inputs: Path, one_machine: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    """The rank that cannot write says so; what was saved before is what a resumed run begins with."""
    command = [*words("dpo", inputs, tmp_path / "run", LONG), "--save_steps", "5", "--resume", "auto"]
    fault = {"DSALIGN_TEST": "1", "DSALIGN_FAULT": "before_shard:1:full:3"}
    run = Run(cluster, "torchrun", command, tmp_path / "logs", **fault)
    run.wait(SECONDS)
    assert 0 not in run.codes
    assert "No space left on device" in run.text and "checkpoint-10 could not be written" in run.text
    assert (tmp_path / "run" / "checkpoint-5").is_dir() and not (tmp_path / "run" / "checkpoint-10").exists()
    again = Run(cluster, "torchrun", command, tmp_path / "again")
    again.wait(SECONDS)
    assert "resuming at step 5" in again.text
    assert weights(tmp_path / "run") == one_machine("long")
