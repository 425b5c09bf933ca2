"""The ways to sample that `compare_rollouts.py` compares: dsalign's engines, and those of transformers.

Each takes a causal language model of transformers, a workload and the options of sampling, and returns the token ids of
every answer, by request and key. transformers' ways compute no log-probabilities, which dsalign's engines return: what
an online algorithm would need from them comes on top of what is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import random_models
import torch
from rollout_sets import Workload
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.utils import WorkloadHints

from dsalign.contract.rollout_options import RolloutOptions
from dsalign.models import attention
from dsalign.rollout import local, plain
from dsalign.rollout.api import Completion
from dsalign.rollout.view import view_of

Answers = list[list[tuple[int, ...]]]
ROWS = {"cpu": 64, "cuda": 256}  # answers that are decoded at a time
OURS = ("local", "plain")
BATCH_TOKENS = {"cpu": 256, "cuda": 2048}  # positions of a forward of continuous batching: some prompts, or one a row
# Positions in a page of the paged cache: few, so that a short answer does not hold much more than it needs. On a GPU
# the attention that reads pages where they lie takes multiples of 256 alone.
PAGE = {"cpu": 32, "cuda": 256}


def load(model: str, way: str, device: torch.device, dtype: torch.dtype, layers: int | None = None) -> Any:
    """The model for a way; dsalign's engines take it with dsalign's attention, `local` a view of it.

    model: a folder, or random:NAME (`random_models.py`). layers: how many of a random model's, None = all.
    """
    if model.startswith(random_models.PREFIX):
        found = random_models.made(model, device, dtype, layers)
    else:
        found = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="sdpa").to(device)
    found.eval()
    found.generation_config = GenerationConfig(pad_token_id=0)  # no end token but those of a workload
    if way in OURS:
        attention.share(found)
    return local.prepare(view_of(found)) if way == "local" else found


def rows_of(model: Any) -> int:
    """How many answers are decoded at a time on the device of a model."""
    return ROWS[device_of(model).type]


def device_of(model: Any) -> torch.device:
    """The device of a model's weights."""
    found: torch.device = model.get_input_embeddings().weight.device
    return found


def completions(way: str, model: Any, work: Workload, options: RolloutOptions) -> list[list[Completion]]:
    """What one of dsalign's engines samples, with log-probabilities."""
    decode = {"local": local.decode, "plain": plain.decode}[way]
    return decode(model, work.requests, options, work.end_ids, rows=rows_of(model))


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
    device = device_of(model)
    ids = torch.tensor([[0] * (width - len(r.prompt)) + list(r.prompt) for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in rows], device=device)
    lengths = torch.tensor([r.max_new_tokens for r in rows], device=device)
    stop = [OwnLength(lengths, width)] if any(r.max_new_tokens < longest for r in rows) else []
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


def paged_cache(model: Any, work: Workload) -> ContinuousBatchingConfig:
    """The settings of continuous batching: pages for as many of the longest requests as run at a time.

    On a GPU it decides itself about graphs and asynchronous batches, and takes flash attention where that is installed
    and has the model's dtype.
    """
    device, rows = device_of(model), rows_of(model)
    page = PAGE[device.type]
    needed = sorted(-(-(len(r.prompt) + r.max_new_tokens) // page) + 1 for r in work.requests for _ in r.keys)
    return ContinuousBatchingConfig(
        page_size=page, num_blocks=sum(needed[-rows:]) + rows, max_batch_tokens=BATCH_TOKENS[device.type],
        max_requests_per_batch=rows, use_cuda_graph=None if device.type == "cuda" else False,
        auto_switch_to_flash=model.dtype in (torch.bfloat16, torch.float16),
    )  # fmt: skip


def generate_batch(model: Any, work: Workload, options: RolloutOptions) -> Answers:
    """transformers' continuous batching, through the manager that `generate_batch` makes, as that one takes no length a
    request. A prompt with several answers is computed once; its pages are copied.

    Raises ValueError where a request got no answer: the manager's thread writes its errors to the log alone.
    """
    longest, samples = max(r.max_new_tokens for r in work.requests), len(work.requests[0].keys)
    config = how(options, longest, work.end_ids, num_return_sequences=samples)
    config.eos_token_id = sorted(work.end_ids) or [-1]  # with None it would be the model's own
    paged = paged_cache(model, work)
    hints = WorkloadHints(max(len(r.prompt) for r in work.requests), longest, work.num_answers)
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
