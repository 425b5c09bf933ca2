"""Two nodes give the weights that two ranks of one machine give, whichever way they are started."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import NEEDED, Cluster, lacking, up
from node_runs import SCRIPT, WAYS, Run
from support import tiny_folder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(lacking(NEEDED)), reason=f"make test-nodes {lacking(NEEDED)}"),
]
SECONDS = 300.0
COMMON = ("--deepspeed", "zero3", "--learning_rate", "1e-3", "--batch_size", "2", "--gradient_accumulation_steps", "1",
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


def words(algo: str, inputs: Path, output: Path) -> list[str]:
    """The command line of a run of four steps, or of two rollouts with two passes each."""
    own = {
        "dpo": ["--dataset", str(inputs / "pairs.jsonl"), "--max_steps", "4"],
        "ppo": ["--dataset", str(inputs / "prompts.jsonl"), "--max_steps", "4", "--max_new_tokens", "8",
                "--reward_funcs", f"{inputs / 'reward.py'}:vowels"],
    }[algo]  # fmt: skip
    return ["--algo", algo, "--model", str(inputs / "model"), *own, *COMMON, "--output_dir", str(output)]


def weights(output: Path) -> dict[str, str]:
    """Name -> sha256 of every tensor file of final/."""
    files = sorted((output / "final").rglob("*.safetensors"))
    assert files, f"{output} has no final/"
    return {str(f.relative_to(output)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


@pytest.fixture(scope="module")
def one_machine(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Algorithm -> the weights after a run of two ranks on this machine."""
    found = {}
    for algo in ("dpo", "ppo"):
        output = tmp_path_factory.mktemp("one") / algo
        run = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            "29631",
            SCRIPT,
        ]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*run, *words(algo, inputs, output)], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:3000]
        found[algo] = weights(output)
    return found


@pytest.mark.parametrize(
    ("way", "algo"), [*((way, "dpo") for way in WAYS), ("pdsh", "ppo"), ("torchrun", "ppo"), ("srun", "ppo")]
)
def test_nodes_train_the_same_weights(
    way: str, algo: str, cluster: Cluster, inputs: Path, one_machine: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    if reason := lacking(WAYS[way].programs):
        pytest.skip(reason)
    run = Run(cluster, way, words(algo, inputs, tmp_path / "run"), tmp_path / "logs")
    run.wait(SECONDS)
    assert set(run.codes) == {0}, run.text[-4000:]
    assert "on 2 rank(s)" in run.text
    assert weights(tmp_path / "run") == one_machine[algo]
