"""Rollouts by vLLM servers: completions, versions and weights over HTTP, with a time limit on every call."""

from __future__ import annotations

import http.client
import importlib
import json
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsalign.contract.rollout_options import RolloutOptions
from dsalign.engines.self_check import limit_in
from dsalign.rollout.api import Completion, Request
from dsalign.rollout.pick import signed
from dsalign.rollout.view import weights_of, write_untied

TRIES, WAIT_S, IN_FLIGHT = 3, 1.0, 128  # of a completion; seconds between two tries; requests at a time to a server
START = (
    "start it with VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --load-format dummy "
    "--hf-overrides '{\"tie_word_embeddings\": false}'"
)


def logprobs_mode(options: RolloutOptions) -> tuple[str, ...]:
    """The modes of vLLM's --logprobs-mode whose log-probabilities are those of `Completion`: of logits divided by the
    temperature, before filters. Its raw ones are before both, its processed ones after both.

    Raises ValueError where neither is.
    """
    filtered, plain = options.top_p < 1 or options.top_k > 0, options.temperature == 1
    if filtered and not plain:
        raise ValueError(
            "rollout: vllm has no log-probabilities of a temperature without top_p and top_k; use --temperature 1, "
            "neither of the two, or --rollout local"
        )
    return (
        ("raw_logprobs",) if filtered else ("processed_logprobs", "raw_logprobs") if plain else ("processed_logprobs",)
    )


def one_completion(
    ids: Sequence[int], logps: Sequence[float], finish: str, most: int, end_ids: frozenset[int]
) -> Completion:
    """A completion as vLLM gave it. finish: its reason of the end. most: its tokens at most.

    Raises ValueError where it is not whole: without tokens or logprobs, or ended for another reason than ours.
    """
    ended = bool(ids) and ids[-1] in end_ids
    if not ids or len(logps) != len(ids) or None in logps or not (ended or len(ids) == most):
        raise ValueError(
            f"rollout: vllm answered {len(ids)} of {most} tokens with {len(logps)} logprobs, finish_reason {finish}: "
            "expected an end token or all tokens; is its --max-model-len too short?"
        )
    return Completion(tuple(ids), torch.tensor(logps), ended)


class Server:
    """One `vllm serve`, of 0.25 or later. url: http://host:port. timeout: seconds until its silence is an error."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url, self.timeout, self.model = url.rstrip("/"), timeout, ""
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # it is near: past any proxy
        self.nccl: Nccl | None = None

    def call(self, path: str, body: Mapping[str, Any] | None = None, tries: int = 1) -> Any:
        """The JSON that the server answers to a POST of `body`, or without one to a GET. tries: more than 1 for calls
        that may be repeated, after silence or an error of the server's own.

        Raises ValueError that names server and path where no such answer comes.
        """
        data = None if body is None else json.dumps(body).encode()
        said = ""
        for attempt in range(tries):
            time.sleep(WAIT_S if attempt else 0)
            try:
                request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
                with self._open(request, timeout=self.timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                said = f"answered {error.code}: {error.read(400).decode(errors='replace')}"
                if error.code < 500:
                    break
            except (OSError, http.client.HTTPException, ValueError) as error:
                said = f"gave no answer in {self.timeout:g} s ({error or type(error).__name__}); {START}"
        raise ValueError(f"vllm_server: {self.url}/{path} {said}")

    def check(self, config: Any, tied: bool, options: RolloutOptions) -> torch.dtype:
        """Compare the server with the trainer's model and options before anything is sent: weights of another shape
        kill a server. config: the text configuration of the model. tied: whether its head is its embedding. Returns the
        dtype in which the server computes.

        Raises ValueError naming what differs and how to start the server.
        """
        served = self.call("v1/models")["data"][0]
        self.model = served["id"]
        try:
            info = self.call("server_info?config_format=json")["vllm_config"]["model_config"]
        except ValueError as error:
            raise ValueError(f"{error}; {START}") from None
        wrong = []
        sizes = [(config.vocab_size - 1, False), (config.vocab_size, True)]
        if [self._refuses(token) for token, _ in sizes] != [refused for _, refused in sizes]:
            wrong.append(f"its vocabulary is not of {config.vocab_size} tokens, as the trainer's")
        file = Path(served.get("root") or "", "config.json")
        read = json.loads(file.read_text()) if file.is_file() else {}  # seen from here, or left to the reload's error
        theirs = read.get("text_config", read).get("hidden_size", config.hidden_size)
        if theirs != config.hidden_size:
            wrong.append(f"its hidden size is {theirs}, the trainer's {config.hidden_size}")
        if tied and (info.get("hf_overrides") or {}).get("tie_word_embeddings") is not False:
            wrong.append("its head is tied, and vLLM keeps a tied head's old weights when new ones come")
        if (mode := info["logprobs_mode"]) not in logprobs_mode(options):
            wanted = logprobs_mode(options)[0]
            wrong.append(f"its logprobs are {mode}; sampling with these options needs --logprobs-mode {wanted}")
        if wrong:
            raise ValueError(f"vllm_server: {self.url} serves {self.model}: {'; '.join(wrong)}; {START}")
        dtype: torch.dtype = getattr(torch, info["dtype"].removeprefix("torch."))
        return dtype

    def _refuses(self, token: int) -> bool:
        """Whether a token id is outside of the server's vocabulary: a bias for such a one is refused."""
        bias = {"model": self.model, "prompt": [0], "max_tokens": 1, "logit_bias": {str(token): 0.0}}
        try:
            self.call("v1/completions", {**bias, "return_token_ids": True}, TRIES)
        except ValueError as error:
            if " answered 400" not in str(error):
                raise
            return True
        return False

    def version(self) -> str:
        """The name of the weights that the server has, as `settle` set it."""
        return str(self.call("weight_info", tries=TRIES)["weight_version"])

    def reload(self, folder: Path) -> None:
        """Let the server read its weights from a folder of safetensors."""
        overrides = {"load_config": {"load_format": "safetensors"}}  # it may have been started with dummy weights
        for method, kwargs in (
            ("update_config", {"overrides": overrides}),
            ("reload_weights", {"weights_path": str(folder)}),
        ):
            self.call("collective_rpc", {"method": method, "kwargs": kwargs})

    def settle(self, version: str, prompt: Sequence[int], logps: Tensor, limit: float) -> None:
        """Name the weights that have come, once the server computes with them. logps: [V] nats, the trainer's for the
        token after `prompt`; the server's of one that it samples may differ by `limit`.

        Every server is asked, as the probe after a rollout sees one completion of each rank and so not every server.
        """
        if not self.call("reset_prefix_cache", {})["success"]:
            raise ValueError(
                f"vllm_server: {self.url} kept its prefix cache, whose blocks come from older weights; start it again"
            )
        found = one_completion(*self.complete(prompt, 0, 1, RolloutOptions(), frozenset()), 1, frozenset())
        theirs, ours = float(found.logps), float(logps[found.ids[0]])
        if not abs(theirs - ours) <= limit:
            raise ValueError(
                f"vllm_server: {self.url} took the weights, it said, but computes {theirs:.4g} nats where the trainer "
                f"has {ours:.4g}: not all were applied (a tied head, an adapter, a sync without effect); "
                f"{START}"
            )
        self.call("update_weight_version", {"new_version": version})

    def complete(
        self, prompt: Sequence[int], key: int, most: int, options: RolloutOptions, end_ids: frozenset[int]
    ) -> tuple[list[int], list[float], str]:
        """(the ids, log-probabilities and reason of the end) of one completion of `most` tokens at most."""
        asked = {
            "model": self.model, "prompt": list(prompt), "max_tokens": most, "seed": signed(key),
            "temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k,
            "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "ignore_eos": True, "stop_token_ids": sorted(end_ids), "logprobs": 0,
            "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        answer = self.call("v1/completions", asked, TRIES)
        try:
            choice = answer["choices"][0]
            return list(choice["token_ids"]), list(choice["logprobs"]["token_logprobs"]), choice["finish_reason"]
        except (KeyError, IndexError, TypeError):
            raise ValueError(
                f"vllm_server: {self.url} left out a completion, its tokens or their logprobs; {START}"
            ) from None


@dataclass(frozen=True)
class Sent:
    """What is said of a tensor before it is sent: its name, dtype and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Nccl:
    """vLLM's own weight transfer from this process's GPU to the workers of one server, set up once.

    Has what vLLM asks of a source of weights: `metadata` and iteration over (name, tensor), both of `weights`.
    Raises ValueError where the two do not meet within the time limit.
    """

    def __init__(self, server: Server, weights: Mapping[str, Tensor]) -> None:
        self.server, self.weights = server, weights
        base = "vllm.distributed.weight_transfer."
        nccl, clients, factory = (importlib.import_module(base + n) for n in ("nccl_engine", "clients", "factory"))
        at = urlsplit(server.url)
        with socket.create_connection((at.hostname or "", at.port or 80), timeout=server.timeout) as way:
            here = way.getsockname()[0]  # the address under which the server sees this machine
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        workers = server.call("get_world_size")["world_size"]
        info = nccl.NCCLTrainerInitInfo(here, port, 1 + workers, rank=0)
        client = clients.HTTPVLLMWeightSyncClient(server.url, server.timeout)
        make = factory.WeightTransferTrainerFactory.trainer_init
        self._engine = self._limited(lambda: make(info, client=client, source=self))

    def metadata(self) -> list[Sent]:
        """What `iter(self)` yields, without the tensors."""
        return [Sent(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.weights.items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return iter(self.weights.items())

    def send(self, weights: Mapping[str, Tensor]) -> None:
        """Send the weights; the server has them when this returns."""
        self.weights = weights
        self._limited(self._engine.send_weights)

    def _limited(self, work: Callable[[], Any]) -> Any:
        device = torch.cuda.current_device()

        def on_device() -> Any:
            torch.cuda.set_device(device)  # each thread has its own
            return work()

        return limited(on_device, self.server)


def limited(work: Callable[[], Any], server: Server) -> Any:
    """The result of `work`, in a thread of its own, as a peer that died leaves NCCL waiting for ever.

    Raises ValueError where it fails, or takes longer than the server's time limit.
    """
    found: dict[str, Any] = {}

    def run() -> None:
        try:
            found["result"] = work()
        except Exception as error:
            found["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(server.timeout)
    if "result" not in found:
        why = found.get("error") or f"not done in {server.timeout:g} s"
        raise ValueError(
            f"vllm_server: weights do not reach {server.url} over NCCL: {why}; start it with "
            '--weight-transfer-config \'{"backend": "nccl"}\', or give --vllm_folder'
        )
    return found["result"]


class Servers:
    """Rollouts by the servers of --vllm_server, over which requests are spread. Rank 0 alone sends weights.

    dtype: in which the servers compute, the coarsest of them.
    """

    def __init__(self, options: RolloutOptions, config: Any, tied: bool, device: torch.device, first: bool) -> None:
        addresses = [url.strip() for url in options.vllm_server.split(",") if url.strip()]
        self.all = [Server(url, options.vllm_timeout) for url in addresses]
        if first and not options.vllm_folder and device.type != "cuda":
            raise ValueError(
                "vllm_folder: weights go over NCCL from a GPU alone; give a folder that the servers see too"
            )
        dtypes = [server.check(config, tied, options) for server in self.all]
        self.dtype = max(dtypes, key=limit_in)
        self.folder = Path(options.vllm_folder).expanduser().resolve() if options.vllm_folder else None
        self.first, self._pending = first, Path()

    def holds(self, version: str) -> bool:
        """Whether every server has the weights of that name; read by rank 0, whose word counts."""
        return self.first and all(server.version() == version for server in self.all)

    def take(self, view: PreTrainedModel, version: str) -> None:
        """Write or send the weights of a view, from rank 0; others have nothing to do here and wait."""
        if not self.first:
            return
        self._prompt = [i % view.config.get_text_config().vocab_size for i in range(8)]
        with torch.no_grad():
            ids = torch.tensor([self._prompt], device=view.get_input_embeddings().weight.device)
            self._logps = torch.log_softmax(view(ids, use_cache=False).logits[0, -1].float(), -1).cpu()
        weights = weights_of(view)
        if self.folder is not None:
            self._pending = self.folder / version.replace(":", "-")
            write_untied(weights, view, self._pending)
            return
        for server in self.all:
            server.nccl = server.nccl or Nccl(server, weights)
            server.nccl.send(weights)

    def deliver(self, version: str, limit: float) -> None:
        """Bring what `take` wrote into the servers, and check each of them, from rank 0."""
        if not self.first:
            return

        def one(server: Server) -> None:
            if self.folder is not None:
                server.reload(self._pending)
            server.settle(version, self._prompt, self._logps, limit)

        with ThreadPoolExecutor(len(self.all)) as pool:
            list(pool.map(one, self.all))
        if self.folder is not None:
            shutil.rmtree(self._pending)

    def generate(
        self, requests: Sequence[Request], options: RolloutOptions, end_ids: frozenset[int], version: str
    ) -> list[list[Completion]]:
        """The completions of this rank's requests, each by one server, in the order of their keys."""

        def one(job: tuple[int, Request, int]) -> Completion:
            i, request, key = job
            server, most = self.all[i % len(self.all)], request.max_new_tokens
            found = server.complete(request.prompt, key, most, options, end_ids)
            return one_completion(*found, most, end_ids)

        jobs = [(i, request, key) for i, request in enumerate(requests) for key in request.keys]
        with ThreadPoolExecutor(IN_FLIGHT * len(self.all)) as pool:
            answers = iter(list(pool.map(one, jobs)))
        for server in self.all[: len(requests)]:
            if (found := server.version()) != version:
                raise ValueError(
                    f"vllm_server: {server.url} sampled from weights {found}, the trainer's are {version}: it was "
                    "started anew, or another run sends it weights too; give each run its own"
                )
        return [[next(answers) for _ in request.keys] for request in requests]
