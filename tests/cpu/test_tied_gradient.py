"""A tied weight's gradient is what autograd makes of it, in one tensor."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support import Live, random_groups, tiny_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from dsalign.cpu.tied_gradient import OneGradient
from dsalign.data.batches.packing import rows
from dsalign.models import heads
from dsalign.models.logps import Head, HeadLoss, LogitTransform

CPU = torch.device("cpu")


def tied_model(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).to(dtype)


def as_ever(embedding: nn.Module, head: nn.Module) -> Any:
    return nullcontext


def gradient(model: Any, micro_batches: int, *, by_parts: bool) -> Tensor:
    """Of the tied weight, summed over micro-batches."""
    model.zero_grad()
    wrapped = heads.CausalModel(model, head_bytes=2**10 if by_parts else None)
    for seed in range(micro_batches):
        groups = random_groups("pairs", 3, seed=seed)
        inputs = rows(groups, CPU)
        sizes = [len(inputs.targets) - 5, 5]
        loss = HeadLoss(sizes, lambda part, logps, _: logps.square().sum())
        wrapped(inputs, loss=loss).backward()
    found: Tensor = model.lm_head.weight.grad
    return found.clone()


@pytest.mark.parametrize("by_parts", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_the_gradient_is_that_of_two_uses(
    dtype: torch.dtype, tolerance: float, by_parts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside autograd's own sum of both; one micro-batch, and two that add up."""
    model = tied_model(dtype)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found = [gradient(model, n, by_parts=by_parts) for n in (1, 2)]
    monkeypatch.setattr(heads, "OneGradient", as_ever)
    for n, one in zip((1, 2), found, strict=True):
        want = gradient(model, n, by_parts=by_parts)
        assert float((one - want).norm() / want.norm()) < tolerance
        assert not one.is_sparse and float(want.norm()) > 0
    assert float((found[1] - found[0]).norm() / found[0].norm()) > 0.1


def backward_peak(tied: bool) -> float:
    """The most that a backward holds, in tensors of the weight's size."""
    embedding, head = nn.Embedding(20_000, 16), nn.Linear(16, 20_000, bias=False)
    head.weight = embedding.weight
    ids = torch.tensor([3, 1, 3])
    with Live(embedding.weight, ids) as live:
        with (OneGradient if tied else as_ever)(embedding, head)():
            states = embedding(ids)
            logps, _ = Head(LogitTransform(), 2**20).token_logps(states, head, ids, entropy=False)
        live.peak = live.now
        logps.sum().backward()
    return live.peak / (4 * 16 * 20_000)


def test_one_tensor_of_the_weights_size() -> None:
    """And a work space of up to 0.8 of it; autograd alone needs two."""
    assert 1 <= backward_peak(tied=True) < 1.9
    assert backward_peak(tied=False) - backward_peak(tied=True) > 0.9


def test_by_hand() -> None:
    """W = (1, 2), s = W[1]; of log p_0: 2 (1 - p_0) and -2 p_1 by the head, (1 - p_0) - 2 p_1 more for W[1] by s."""
    embedding, head = nn.Embedding(2, 1), nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        embedding.weight.copy_(torch.tensor([[1.0], [2.0]]))
    head.weight = embedding.weight
    with OneGradient(embedding, head)():
        assert embedding.sparse and not isinstance(head.weight, nn.Parameter)
        assert dict(head.named_parameters()) == {"weight": embedding._parameters["weight"]}
        logits = head(embedding(torch.tensor([1])))
    torch.log_softmax(logits, -1)[0, 0].backward()
    p = torch.softmax(torch.tensor([2.0, 4.0]), 0)
    want = torch.tensor([[2 * (1 - p[0])], [-2 * p[1] + (1 - p[0]) - 2 * p[1]]])
    torch.testing.assert_close(embedding.weight.grad, want)
    assert not embedding.sparse and head.weight is embedding.weight and isinstance(head.weight, nn.Parameter)


def test_one_use_alone() -> None:
    """Of the embedding: dense all the same; of the head; and of neither."""
    embedding, head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
    head.weight = embedding.weight
    with OneGradient(embedding, head)():
        embedding(torch.tensor([1, 1])).sum().backward()
    torch.testing.assert_close(embedding.weight.grad, torch.tensor([[0.0, 0], [2, 2], [0, 0], [0, 0]]))
    embedding.weight.grad = None
    with OneGradient(embedding, head)():
        head(torch.tensor([[1.0, 3.0]])).sum().backward()
    torch.testing.assert_close(embedding.weight.grad, torch.tensor([[1.0, 3.0]] * 4))
    embedding.weight.grad = None
    with OneGradient(embedding, head)():
        pass
    assert embedding.weight.grad is None


@pytest.mark.parametrize("why", ["untied", "frozen", "no gradient", "ZeRO-3"])
def test_left_alone(why: str) -> None:
    embedding, head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
    if why != "untied":
        head.weight = embedding.weight
    if why == "frozen":
        head.requires_grad_(False)
    if why == "ZeRO-3":
        embedding.weight.ds_id = 0  # type: ignore[attr-defined]
    with torch.set_grad_enabled(why != "no gradient"), OneGradient(embedding, head)():
        assert isinstance(embedding.weight, nn.Parameter) and isinstance(head.weight, nn.Parameter)
        assert not embedding.sparse


def test_an_error_inside_leaves_nothing_behind() -> None:
    embedding, head = nn.Embedding(4, 2, sparse=False), nn.Linear(2, 4, bias=False)
    head.weight = embedding.weight
    with pytest.raises(IndexError), OneGradient(embedding, head)():
        embedding(torch.tensor([9]))
    assert head.weight is embedding.weight and isinstance(head.weight, nn.Parameter) and not embedding.sparse
