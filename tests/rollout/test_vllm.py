"""vLLM itself, on a CPU: `make test-vllm` makes its environment and runs this file, which is skipped elsewhere."""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_cases
from support import RankPool, tiny_folder

from dsalign.rollout.vllm_server import Nccl

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs vLLM in an environment of its own: make test-vllm"
)
SHAPE = {"head_dim": 32}  # the smallest that vLLM's attention for CPUs has; 4 heads over 2 of keys and values


@pytest.fixture
def one() -> Iterator[RankPool]:
    """A rank of its own for each test, as vLLM keeps state in a process."""
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("stage", "tuner", "tied"), [("0", "full", False), ("0", "full", True), ("3", "lora", True)], ids=str
)
def test_three_syncs_in_process(stage: str, tuner: str, tied: bool, tmp_path: Path, one: RankPool) -> None:
    """The sampler is the trainer after each step, and a completion the same alone and in a batch."""
    folder = tiny_folder(tmp_path / "tiny", tie_word_embeddings=tied, **SHAPE)
    gaps, exact, alone = one.run(vllm_cases.three_syncs, folder, stage, tuner, {})
    print(f"in process, stage {stage}, {tuner}, tied {tied}: gaps {gaps}")
    assert max(gaps) <= 1e-5 and exact and alone


def test_weights_are_a_source_for_vllms_own_transfer() -> None:
    """NCCL itself needs GPUs; up to it vLLM takes what is announced and what is sent for the same tensors."""
    nccl = importlib.import_module("vllm.distributed.weight_transfer.nccl_engine")
    source = object.__new__(Nccl)
    source.weights = {"a": torch.zeros(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    engine = nccl.NCCLTrainerWeightTransferEngine
    assert dict(engine._checked_iter(source, source.metadata())) == source.weights
    with pytest.raises(ValueError, match="metadata"):
        list(engine._checked_iter(source, source.metadata()[::-1]))
    assert nccl.NCCLTrainerInitInfo("10.0.0.1", 5, 3, rank=0).world_size == 3


def test_three_syncs_in_process_on_two_ranks(tmp_path: Path, two_ranks: RankPool) -> None:
    """Each rank has an engine of its own beside DeepSpeed's process group."""
    folder = tiny_folder(tmp_path / "tiny", **SHAPE)
    gaps, exact, alone = two_ranks.run(vllm_cases.three_syncs, folder, "0", "full", {}, timeout=500)
    print(f"in process, two ranks: gaps {gaps}")
    assert max(gaps) <= 1e-5 and exact and alone


WHY = {
    "no_adapter": "it sampled without the trained adapter",
    "old_head": "a tied head",
    "old_weights": "not all the trainer's",
    "old_prompts": "cached keys and values",
    "other_temperature": "it sampled at temperature 1 and not 0.7",
    "skipped_sync": "sampled from weights",
}


@pytest.mark.parametrize("tuner", ["lora", "full"])
def test_a_mistake_stops_the_first_rollout(tuner: str, tmp_path: Path, one: RankPool) -> None:
    """Six of six, each with its reason, and between two of them all is well."""
    folder = tiny_folder(tmp_path / "tiny", tie_word_embeddings=True, **SHAPE)
    names = ["no_adapter"] if tuner == "lora" else [name for name in WHY if name != "no_adapter"]
    said = one.run(vllm_cases.faulty, folder, tuner, names, {"temperature": 0.7})
    for name in names:
        print(f"{name}: {said.get(name)}")
    assert {name for name in names if WHY[name] in said.get(name, "")} == set(names)


@contextmanager
def vllm_serve(folder: Path, *more: str) -> Iterator[str]:
    """The address of vLLM's server in processes of its own. The command `vllm serve` of the package for CPUs looks for
    a package of another name, so the module behind it is run."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--load-format", "dummy", "--dtype", "float32", "--enforce-eager", *more]
    with (folder / "server.log").open("w") as log:
        made = subprocess.Popen(
            command, env=os.environ | {"VLLM_SERVER_DEV_MODE": "1"}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        address, end = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while not answers(f"{address}/health"):
            if made.poll() is not None or time.monotonic() > end:
                pytest.fail((folder / "server.log").read_text()[-3000:])
            time.sleep(1)
        yield address
    finally:
        os.killpg(made.pid, signal.SIGKILL)  # its engine and workers outlive a server that is stopped in peace
        made.wait()


def answers(address: str) -> bool:
    """Whether a GET is answered with 200 within 5 s."""
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


UNTIED = ("--hf-overrides", '{"tie_word_embeddings": false}')


def test_a_server(tmp_path: Path, one: RankPool) -> None:
    """Three syncs through a folder of a tied model with LoRA, at a temperature; then a trainer of another vocabulary
    and one of another width are refused before they send anything, and the server lives."""
    folder = tiny_folder(tmp_path / "tiny", tie_word_embeddings=True, **SHAPE)
    with vllm_serve(folder, *UNTIED, "--logprobs-mode", "processed_logprobs") as address:
        where: dict[str, Any] = {"temperature": 0.7}
        where |= {"vllm_server": address, "vllm_folder": str(tmp_path / "weights"), "vllm_timeout": 60.0}
        gaps, exact, alone = one.run(vllm_cases.three_syncs, folder, "3", "lora", where)
        print(f"server: gaps {gaps}")
        assert max(gaps) <= 1e-5 and exact and alone
        for change, why in (
            ({"vocab_size": 84}, "its vocabulary is not of 84"),
            ({"hidden_size": 48}, "hidden size is 32"),
        ):
            other = tiny_folder(tmp_path / why[:12], tie_word_embeddings=True, **SHAPE, **change)
            with pytest.raises(RuntimeError, match=why):
                one.run(vllm_cases.three_syncs, other, "0", "full", where)
        assert answers(f"{address}/health")


def test_a_server_with_a_tied_head_is_refused(tmp_path: Path, one: RankPool) -> None:
    folder = tiny_folder(tmp_path / "tiny", tie_word_embeddings=True, **SHAPE)
    with vllm_serve(folder) as address:
        where = {"vllm_server": address, "vllm_folder": str(tmp_path / "weights"), "vllm_timeout": 60.0}
        with pytest.raises(RuntimeError, match="its head is tied"):
            one.run(vllm_cases.three_syncs, folder, "0", "full", where)
