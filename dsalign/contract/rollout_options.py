"""The options of sampling, which every online algorithm has."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from dsalign.contract.algorithm import check_choice, check_range


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """The options of sampling, the same for every online algorithm."""

    GATHERED: ClassVar[float] = 0.75  # of the free memory, for weights that ZeRO-3 gathers whole; the rest is for keys

    max_new_tokens: int = 512  # tokens of a sampled completion at most, >= 1
    temperature: float = 1.0  # logits are divided by it, when sampling and in training, > 0
    top_p: float = 1.0  # share of probability that is sampled from, in (0, 1]; 1 = all
    top_k: int = 0  # most probable tokens that are sampled from, >= 0; 0 = all, 1 = greedy
    missing_eos_penalty: float | None = None  # subtracted from the score of a completion without end token, >= 0
    local_rollout_forward_batch_size: int = 64  # completions in a forward without gradient, of one rank, >= 1
    num_sample_generations: int = 10  # times in a run that sample completions are shown and saved, >= 0
    rollout_logp_limit: float = 0.5  # nats: stop when sampler and trainer differ by more on average, > 0
    rollout: str = "auto"  # the engine that samples: auto, local, plain, hybrid or vllm
    old_logps: str = "auto"  # whose log-probabilities the ratio starts from: auto, sampler or trainer
    rollout_gather: str = field(default="auto", repr=False)  # at ZeRO-3, weights to sample: auto, whole or layers
    rollout_is_cap: float | None = None  # cap of a token's weight e^(trainer's - sampler's logp), >= 1
    # Where vllm runs is no part of what it samples, so a resumed run may change it: `repr` is compared then.
    vllm_server: str = field(default="", repr=False)  # http://host:port of vLLM servers, with commas; "" = in process
    vllm_folder: str = field(default="", repr=False)  # trainer and servers see it: for weights; "" = they go by NCCL
    vllm_memory: float = field(default=0.3, repr=False)  # share of the GPU's memory for vLLM in process, in (0, 1]
    vllm_timeout: float = field(default=600.0, repr=False)  # seconds until a silent server is an error, > 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "local_rollout_forward_batch_size"):
            check_range(name, getattr(self, name), 1)
        for name in ("top_k", "num_sample_generations"):
            check_range(name, getattr(self, name), 0)
        for name in ("temperature", "rollout_logp_limit"):
            check_range(name, getattr(self, name), 0, open_low=True)
        check_range("top_p", self.top_p, 0, 1, open_low=True)
        check_choice("rollout", self.rollout, ("auto", "local", "plain", "hybrid", "vllm"))
        check_choice("rollout_gather", self.rollout_gather, ("auto", "whole", "layers"))
        check_choice("old_logps", self.old_logps, ("auto", "sampler", "trainer"))
        check_range("vllm_memory", self.vllm_memory, 0, 1, open_low=True)
        check_range("vllm_timeout", self.vllm_timeout, 0, open_low=True)
        if self.rollout != "vllm" and (self.vllm_server or self.vllm_folder):
            raise ValueError(f"vllm_server, vllm_folder: for --rollout vllm, got {self.rollout}; leave them out")
        if self.vllm_folder and not self.vllm_server:
            raise ValueError("vllm_folder: without --vllm_server weights are taken from memory; leave it out")
        if self.missing_eos_penalty is not None:
            check_range("missing_eos_penalty", self.missing_eos_penalty, 0)
        if self.rollout_is_cap is not None and not self.rollout_is_cap >= 1:
            raise ValueError(f"rollout_is_cap: expected none or a number >= 1, got {self.rollout_is_cap}")
        if self.rollout_is_cap is not None and self.old_logps == "sampler":
            raise ValueError(
                "rollout_is_cap: its weights compare the trainer's log-probabilities with the sampler's, and old_logps "
                "sampler takes the sampler's for both; use --old_logps auto or trainer"
            )
