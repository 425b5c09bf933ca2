"""The ways to sample that `compare_rollouts.py` compares: dsalign's engines, and those of transformers.

Each takes a causal language model of transformers, a workload and the options of sampling, and returns the token ids of
every answer, by request and key. transformers' ways compute no log-probabilities, which dsalign's engines return: what
an online algorithm would need from them comes on top of what is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from rollout_sets import Workload
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from dsalign.contract.rollouts import RolloutOptions
from dsalign.models import attention
from dsalign.rollout import local, plain
from dsalign.rollout.api import Completion
from dsalign.rollout.view import view_of

Answers = list[list[tuple[int, ...]]]
ROWS = 64  # answers that are decoded at a time
OURS = ("local", "plain")
BATCH_TOKENS = 256  # positions of a forward of continuous batching: some prompts at a time, or one token of every row
PAGE = 32  # positions in a page of the paged cache, so that a short answer does not hold much more than it needs


def load(folder: Path, way: str) -> Any:
    """The model for a way, in float32; dsalign's engines take it with dsalign's attention, `local` a view of it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    model.generation_config = GenerationConfig(pad_token_id=0)  # no end token but those of a workload
    if way in OURS:
        attention.share(model)
    return local.prepare(view_of(model)) if way == "local" else model


def completions(way: str, model: Any, work: Workload, options: RolloutOptions) -> list[list[Completion]]:
    """What one of dsalign's engines samples, with log-probabilities."""
    decode = {"local": local.decode, "plain": plain.decode}[way]
    return decode(model, work.requests, options, work.end_ids, rows=ROWS)


def ours(way: str) -> Callable[[Any, Workload, RolloutOptions], Answers]:
    """The way of one of dsalign's engines, which is loaded once it is run."""

    def sample(model: Any, work: Workload, options: RolloutOptions) -> Answers:
        return [[one.ids for one in each] for each in completions(way, model, work, options)]

    return sample


class OwnLength(StoppingCriteria):
    """Ends each row at a length of its own. lengths: [B] int64, new tokens; start: columns before the first one."""

    def __init__(self, lengths: Tensor, start: int) -> None:
        self.lengths, self.start = lengths, start

    def __call__(self, input_ids: Tensor, scores: Any, **more: Any) -> Tensor:
        return self.lengths <= input_ids.shape[1] - self.start


def how(options: RolloutOptions, longest: int, end_ids: frozenset[int], **more: Any) -> GenerationConfig:
    """The options of sampling as transformers has them. longest: tokens of an answer at most."""
    greedy = options.top_k == 1
    sampling = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    settings = {"do_sample": not greedy, "max_new_tokens": longest, "pad_token_id": 0, **more}
    return GenerationConfig(**settings, **({} if greedy else sampling), eos_token_id=sorted(end_ids) or None)


@torch.no_grad()
def generate(model: Any, work: Workload, options: RolloutOptions) -> Answers:
    """transformers' `generate`: one batch of all answers, prompts padded on the left."""
    rows = [request for request in work.requests for _ in request.keys]
    width, longest = max(len(r.prompt) for r in rows), max(r.max_new_tokens for r in rows)
    ids = torch.tensor([[0] * (width - len(r.prompt)) + list(r.prompt) for r in rows])
    mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in rows])
    lengths = torch.tensor([r.max_new_tokens for r in rows])
    stop = [OwnLength(lengths, width)] if int(lengths.min()) < longest else []
    config = how(options, longest, work.end_ids)
    out = model.generate(
        input_ids=ids, attention_mask=mask, generation_config=config, stopping_criteria=StoppingCriteriaList(stop)
    )
    each = iter(zip(out[:, width:].tolist(), rows, strict=True))
    return [[answer(*next(each), work.end_ids) for _ in request.keys] for request in work.requests]


def answer(ids: list[int], request: Any, end_ids: frozenset[int]) -> tuple[int, ...]:
    """The ids of an answer up to its end token or its own length; what stands behind is padding."""
    ids = ids[: request.max_new_tokens]
    end = next((i for i, token in enumerate(ids) if token in end_ids), len(ids))
    return tuple(ids[: end + 1])


def generate_batch(model: Any, work: Workload, options: RolloutOptions) -> Answers:
    """transformers' continuous batching, through the manager that `generate_batch` makes, as that one takes no length a
    request. A prompt with several answers is computed once; its pages are copied.

    Raises ValueError where a request got no answer: the manager's thread writes its errors to the log alone.
    """
    longest, samples = max(r.max_new_tokens for r in work.requests), len(work.requests[0].keys)
    config = how(options, longest, work.end_ids, num_return_sequences=samples)
    config.eos_token_id = sorted(work.end_ids) or [-1]  # with None it would be the model's own
    most = max(len(r.prompt) for r in work.requests) + longest
    paged = ContinuousBatchingConfig(
        page_size=PAGE, num_blocks=ROWS * (most // PAGE + 2), max_batch_tokens=BATCH_TOKENS,
        max_requests_per_batch=ROWS, use_cuda_graph=False,
    )  # fmt: skip
    hints = WorkloadHints(most - longest, longest, work.num_answers)
    found: dict[str, tuple[int, ...]] = {}
    manager_of = model.continuous_batching_context_manager
    with manager_of(config, continuous_batching_config=paged, workload_hints=hints, warmup=False) as manager:
        for i, request in enumerate(work.requests):
            manager.add_request(list(request.prompt), request_id=str(i), max_new_tokens=request.max_new_tokens)
        while len(found) < work.num_answers and manager.is_running():
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = tuple(result.generated_tokens)
    names = [[str(i), *(f"{i}__child#{n}" for n in range(samples - 1))] for i in range(len(work.requests))]
    if missing := [name for each in names for name in each if not found.get(name)]:
        raise ValueError(f"generate_batch: {len(missing)} of {work.num_answers} answers are missing; see the log")
    return [[found[name] for name in each] for each in names]


WAYS: Mapping[str, Callable[[Any, Workload, RolloutOptions], Answers]] = {
    **{name: ours(name) for name in OURS},
    "generate": generate,
    "generate_batch": generate_batch,
}
