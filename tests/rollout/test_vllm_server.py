"""The client of vLLM's servers against one over transformers; each mistake is stopped with its reason."""

from __future__ import annotations

import importlib.util
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_cases
from fake_vllm import FakeVllm, serving
from support import RankPool, tiny_config, tiny_folder
from transformers import LlamaForCausalLM

from dsalign.contract.rollout_options import RolloutOptions
from dsalign.rollout import view, vllm_server
from dsalign.rollout.api import Completion, Request
from dsalign.rollout.view import view_of
from dsalign.rollout.vllm import Colocated
from dsalign.rollout.vllm_server import Servers

ENDS = frozenset({2})
REQUESTS = [Request((5, 6, 7), (1, 2**64 - 1), 6), Request((9,), (2**63,), 6)]


def model(seed: int, tied: bool = False) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(tie_word_embeddings=tied)).eval()


def servers(address: str, folder: Path, tied: bool = False, **more: Any) -> tuple[Servers, RolloutOptions]:
    options = RolloutOptions(rollout="vllm", vllm_server=address, vllm_folder=str(folder), **more)
    return Servers(options, tiny_config(), tied, torch.device("cpu"), True), options


def rolled(over: Servers, options: RolloutOptions, of: Any, name: str) -> list[list[Completion]]:
    """The completions of REQUESTS, after the weights of a model were sent."""
    over.take(view_of(of), name)
    over.deliver(name, 1e-3)
    return over.generate(REQUESTS, options, ENDS, name)


@pytest.mark.parametrize(("tied", "temperature"), [(False, 1.0), (True, 0.7)])
def test_completions_come_from_the_weights_sent(tied: bool, temperature: float, tmp_path: Path) -> None:
    """From two servers and through three sets of weights: ids and log-probabilities are the model's, a completion does
    not depend on the server or on its neighbours, the folder is empty afterwards."""
    mode = "raw_logprobs" if temperature == 1 else "processed_logprobs"
    with serving(FakeVllm(logprobs_mode=mode)) as one, serving(FakeVllm(logprobs_mode=mode)) as other:
        both, options = servers(f"{one}, {other}/", tmp_path, tied, temperature=temperature)
        alone, _ = servers(other, tmp_path, tied, temperature=temperature)
        assert both.dtype is torch.float32 and not both.holds("run:0")
        for seed in range(3):
            ours = model(seed, tied)
            found = rolled(both, options, ours, f"run:{seed}")
            assert both.holds(f"run:{seed}") and not list(tmp_path.iterdir())
            for request, answer in zip(REQUESTS, found, strict=True):
                for completion in answer:
                    ids = torch.tensor([[*request.prompt, *completion.ids]])
                    logits = ours(ids).logits[0, len(request.prompt) - 1 : -1] / temperature
                    want = torch.log_softmax(logits, -1).gather(1, ids[0, len(request.prompt) :, None])[:, 0]
                    torch.testing.assert_close(completion.logps, want.detach(), rtol=0, atol=1e-5)
                    assert completion.ended == (completion.ids[-1] == 2) and (
                        completion.ended or len(completion.ids) == 6
                    )
            again = alone.generate(REQUESTS[1:], options, ENDS, f"run:{seed}")
            assert again[0][0].ids == found[1][0].ids
        assert len({c.ids for answer in found for c in answer}) == 3


FAULTS = [
    ("no_effect", "took the weights, it said, but computes .* sync without effect"),
    ("old_head", "took the weights, it said, but computes .*a tied head"),
    ("cache", "kept its prefix cache"),
    ("restarted", "sampled from weights default, the trainer's are run:1: it was started anew"),
    ("empty", "left out a completion"),
    ("cut", "answered . of 6 tokens with . logprobs"),
]


@pytest.mark.parametrize(("fault", "why"), FAULTS)
def test_a_mistake_of_a_server_is_an_error(fault: str, why: str, tmp_path: Path) -> None:
    fake = FakeVllm()
    with serving(fake) as address:
        over, options = servers(address, tmp_path)
        rolled(over, options, model(0), "run:0")
        fake.fault = fault
        with pytest.raises(ValueError, match=why):
            rolled(over, options, model(1), "run:1")


def test_a_busy_server_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same completions, as each is a function of its key; an error that stays is one after three tries."""
    monkeypatch.setattr(vllm_server, "WAIT_S", 0.0)
    fake = FakeVllm()
    with serving(fake) as address:
        over, options = servers(address, tmp_path)
        want = [[c.ids for c in answer] for answer in rolled(over, options, model(0), "run:0")]
        fake.fault, fake.calls = "busy", []
        monkeypatch.setattr(vllm_server, "IN_FLIGHT", 1)
        assert [[c.ids for c in answer] for answer in over.generate(REQUESTS, options, ENDS, "run:0")] == want
        assert fake.calls.count("v1/completions") == 9
        monkeypatch.setattr(vllm_server, "TRIES", 2)
        with pytest.raises(ValueError, match=r"v1/completions answered 503: .*try again"):
            over.generate(REQUESTS, options, ENDS, "run:0")


WRONG = [
    ({"vocabulary": 64}, {}, "its vocabulary is not of 79 tokens"),
    ({"vocabulary": 128}, {}, "its vocabulary is not of 79 tokens"),
    ({"config": {"hf_overrides": {}}}, {"tied": True}, "its head is tied"),
    ({}, {"temperature": 0.7}, "its logprobs are raw_logprobs; .* needs --logprobs-mode processed_logprobs"),
    ({}, {"temperature": 0.7, "top_k": 5}, "vllm has no log-probabilities of a temperature without top_p and top_k"),
    ({"root": "wide"}, {}, "its hidden size is 48, the trainer's 32"),
]


@pytest.mark.parametrize(("fake", "asked", "why"), WRONG, ids=[why for *_, why in WRONG])
def test_a_wrong_server_is_refused_before_weights_are_sent(
    fake: dict[str, Any], asked: dict[str, Any], why: str, tmp_path: Path
) -> None:
    served = FakeVllm(**fake.get("config", {}))
    served.vocabulary = fake.get("vocabulary", served.vocabulary)
    if "root" in fake:
        served.root = str(tiny_folder(tmp_path / "wide", hidden_size=48))
    with serving(served) as address, pytest.raises(ValueError, match=f"(?s){why}"):
        servers(address, tmp_path, **asked)
    assert "collective_rpc" not in served.calls


def test_a_server_that_is_away_or_silent_is_an_error(tmp_path: Path) -> None:
    """Nothing waits for ever."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ValueError, match=r"gave no answer in 0.2 s .*VLLM_SERVER_DEV_MODE=1 vllm serve"):
            servers(address, tmp_path, vllm_timeout=0.2)
    with pytest.raises(ValueError, match=r"v1/models gave no answer .*refused"):
        servers(address, tmp_path)
    with serving(FakeVllm()) as there, pytest.raises(ValueError, match="weights go over NCCL from a GPU alone"):
        Servers(RolloutOptions(rollout="vllm", vllm_server=there), tiny_config(), False, torch.device("cpu"), True)


@pytest.mark.parametrize(
    ("work", "why"), [(threading.Event().wait, "not done in 0.05 s"), (dict().popitem, "is empty")]
)
def test_a_transfer_that_fails_or_hangs_is_an_error(work: Any, why: str) -> None:
    server = vllm_server.Server("http://there", 0.05)
    assert vllm_server.limited(lambda: 7, server) == 7
    with pytest.raises(
        ValueError, match=f"weights do not reach http://there over NCCL: .*{why}.*or give --vllm_folder"
    ):
        vllm_server.limited(work, server)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_that_is_not_installed_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"vllm is not installed .*pip install 'dsalign\[vllm\]'"):
        Colocated(RolloutOptions(rollout="vllm"), torch.float32, torch.device("cpu"), False)


def test_a_head_that_is_not_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library that drops what it takes for a copy."""
    save = view.save_torch_state_dict

    def without_head(state: dict[str, Any], folder: Path) -> None:
        save({name: t for name, t in state.items() if name != "lm_head.weight"}, folder)

    monkeypatch.setattr(view, "save_torch_state_dict", without_head)
    ours = view_of(model(0, tied=True))
    with pytest.raises(ValueError, match=r"holds 20 tensors of \d+ bytes; expected the model's 21 .*: lm_head.weight"):
        view.write_untied(view.weights_of(ours), ours, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "tuner", "tied", "dtype"), [("3", "lora", False, "float32"), ("0", "full", True, "bfloat16")]
)
def test_training_samples_with_servers(
    stage: str, tuner: str, tied: bool, dtype: str, tmp_path: Path, two_ranks: RankPool
) -> None:
    """Two ranks and two servers: through three steps the sampler is the trainer, adapter and tied head included. Where
    a server computes in another precision than the trainer its log-probabilities are not taken for exact."""
    folder = tiny_folder(tmp_path / "tiny", tie_word_embeddings=tied)
    with serving(FakeVllm()) as one, serving(FakeVllm(dtype=f"torch.{dtype}")) as other:
        where = {"vllm_server": f"{one},{other}", "vllm_folder": str(tmp_path / "weights")}
        gaps, exact, alone = two_ranks.run(vllm_cases.three_syncs, folder, stage, tuner, where)
    assert max(gaps) <= 1e-5 and exact == (dtype == "float32") and alone


@pytest.mark.parametrize("fault", ["no_adapter", pytest.param("skipped_sync", marks=pytest.mark.slow)])
def test_a_mistake_of_the_trainer_stops_the_first_rollout(fault: str, tmp_path: Path, two_ranks: RankPool) -> None:
    why = {"no_adapter": "it sampled without the trained adapter", "skipped_sync": "it was started anew"}
    folder = tiny_folder(tmp_path / "tiny")
    with serving(FakeVllm()) as one:
        where = {"vllm_server": one, "vllm_folder": str(tmp_path / "weights")}
        said = two_ranks.run(vllm_cases.faulty, folder, "lora", [fault], where)
    assert why[fault] in said[fault]
