"""A rollout that does not fit into memory: fewer completions at a time, the same ones; with one it ends with a hint."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny_config
from transformers import LlamaForCausalLM

from dsalign.contract.rollout_options import RolloutOptions
from dsalign.models import attention
from dsalign.rollout import in_process
from dsalign.rollout.api import Request
from dsalign.rollout.in_process import InProcess
from dsalign.rollout.pick import token_key
from dsalign.rollout.slots import Slots

ENDS = frozenset({2})
PROMPTS = [(5, 6, 7, 8), (4,), (30, 31)]
REQUESTS = [Request(p, [token_key(1, 0, i, n) for n in range(4)], 9) for i, p in enumerate(PROMPTS)]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A DeepSpeed engine's place, whose view is the model itself."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(tiny_config()).eval()
    assert attention.share(model)

    @contextmanager
    def view(engine: Any, by_layer: bool) -> Iterator[Any]:
        yield copy.deepcopy(model)  # a view has changes of its own

    monkeypatch.setattr(in_process, "generation_view", view)
    return SimpleNamespace(module=model, global_steps=5, zero_optimization_stage=lambda: 0)


def sampled(engine: Any, name: str, rows: int) -> tuple[list[Any], int]:
    """(the completions' ids, how many completions run at a time now)."""
    rollout = InProcess(engine, name, rows)
    answers = rollout.generate(REQUESTS, RolloutOptions(max_new_tokens=9), ENDS)
    return [[one.ids for one in answer] for answer in answers], rollout.rows


def failing(monkeypatch: pytest.MonkeyPatch, most: int, error: BaseException) -> list[int]:
    """Let a rollout of more than `most` rows fail as an allocator does, in its second step; returns what was tried."""
    tried: list[int] = []
    reserve, batch = Slots.reserve, in_process.plain._batch

    def reserved(slots: Slots, length: int) -> None:
        if slots.keys:
            tried.append(slots.rows)
            if slots.rows > most:
                raise error
        reserve(slots, length)

    def batched(model: Any, each: Any, *more: Any) -> Any:
        tried.append(len(each))
        if len(each) > most:
            raise error
        return batch(model, each, *more)

    monkeypatch.setattr(Slots, "reserve", reserved)
    monkeypatch.setattr(in_process.plain, "_batch", batched)
    return tried


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", ["local", "plain"])
def test_rows_are_halved_and_samples_stay(
    name: str, error: Exception, engine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """12 completions, 8 at a time; memory holds 3: 8, 4, 2, and 2 from then on. One line each, the same tokens."""
    want, _ = sampled(engine, name, 8)
    tried = failing(monkeypatch, 3, error)
    with caplog.at_level("WARNING", "dsalign.rollout.in_process"):
        found, rows = sampled(engine, name, 8)
    assert found == want and rows == 2
    assert list(dict.fromkeys(tried)) == [8, 4, 2]
    lines = [record.getMessage() for record in caplog.records]
    assert [("8 completions at a time, from here on 4" in x, "begins there" in x) for x in lines] == [
        (True, True), (False, True),
    ]  # fmt: skip
    assert "--local_rollout_forward_batch_size 2 begins there" in lines[1]


def test_not_even_one_row_is_told_with_the_options_to_change(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = failing(monkeypatch, 0, ERRORS[1])
    with pytest.raises(
        ValueError, match=r"out of memory with one completion at a time: .*DefaultCPUAllocator"
    ) as caught:
        sampled(engine, "local", 4)
    assert list(dict.fromkeys(tried)) == [4, 2, 1] and "lower --max_new_tokens or --max_length" in str(caught.value)


def test_other_errors_are_not_tried_again(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = failing(monkeypatch, 0, RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        sampled(engine, "local", 4)
    assert tried == [4]
