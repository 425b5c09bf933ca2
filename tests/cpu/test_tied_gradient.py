"""A tied weight's gradient is what autograd makes of it, in one tensor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import Live, random_groups, tiny_config
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from dsalign.cpu.tied_gradient import add_in_place
from dsalign.data.batches.packing import padded
from dsalign.models import heads
from dsalign.models.logps import Head, HeadLoss, LogitTransform

CPU = torch.device("cpu")


def tied_model(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).to(dtype)


class Around(nn.Module):
    """An embedding and a head, within whose forward something is run."""

    def __init__(self, embedding: nn.Embedding, head: nn.Module, *, in_place: bool = True) -> None:
        super().__init__()
        self.embedding, self.head = embedding, head
        if in_place:
            add_in_place(self, embedding, head)

    def forward(self, run: Callable[[], Any]) -> Any:
        return run()


def gradient(model: Any, micro_batches: int, *, by_parts: bool, in_place: bool) -> Tensor:
    """Of the tied weight, summed over micro-batches."""
    model.zero_grad()
    wrapped = heads.CausalModel(model, head_bytes=2**10 if by_parts else None)
    if in_place:
        add_in_place(wrapped, model.model.embed_tokens, model.lm_head)
    for seed in range(micro_batches):
        groups = random_groups("pairs", 3, seed=seed)
        inputs = padded(groups, CPU)
        sizes = [len(inputs.targets) - 5, 5]
        loss = HeadLoss(sizes, lambda part, logps, _: logps.square().sum())
        wrapped(inputs, loss=loss).backward()
    found: Tensor = model.lm_head.weight.grad
    return found.clone()


@pytest.mark.parametrize("by_parts", [False, True])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
def test_the_gradient_is_that_of_two_uses(dtype: torch.dtype, tolerance: float, by_parts: bool) -> None:
    """Beside autograd's own sum of both; one micro-batch, and two that add up."""
    model = tied_model(dtype)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found = [gradient(model, n, by_parts=by_parts, in_place=True) for n in (1, 2)]
    for n, one in zip((1, 2), found, strict=True):
        want = gradient(model, n, by_parts=by_parts, in_place=False)
        assert float((one - want).norm() / want.norm()) < tolerance
        assert not one.is_sparse and float(want.norm()) > 0
    assert float((found[1] - found[0]).norm() / found[0].norm()) > 0.1


def backward_peak(*, in_place: bool) -> float:
    """The most that a backward holds, in tensors of the weight's size."""
    embedding, head = nn.Embedding(20_000, 16), nn.Linear(16, 20_000, bias=False)
    head.weight = embedding.weight
    ids = torch.tensor([3, 1, 3])

    def run() -> Tensor:
        return Head(LogitTransform(), 2**20).token_logps(embedding(ids), head, ids, entropy=False)[0]

    with Live(embedding.weight, ids) as live:
        logps = Around(embedding, head, in_place=in_place)(run)
        live.peak = live.now
        logps.sum().backward()
    return live.peak / (4 * 16 * 20_000)


def test_one_tensor_of_the_weights_size() -> None:
    """And a work space of up to 0.8 of it; autograd alone needs two."""
    assert 1 <= backward_peak(in_place=True) < 1.9
    assert backward_peak(in_place=False) - backward_peak(in_place=True) > 0.9


def test_by_hand() -> None:
    """W = (1, 2), s = W[1]; of log p_0: 2 (1 - p_0) and -2 p_1 by the head, (1 - p_0) - 2 p_1 more for W[1] by s."""
    embedding, head = nn.Embedding(2, 1), nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        embedding.weight.copy_(torch.tensor([[1.0], [2.0]]))
    head.weight = embedding.weight

    def run() -> Tensor:
        assert embedding.sparse and not isinstance(head.weight, nn.Parameter)
        assert dict(head.named_parameters()) == {"weight": embedding._parameters["weight"]}
        return head(embedding(torch.tensor([1])))

    torch.log_softmax(Around(embedding, head)(run), -1)[0, 0].backward()
    p = torch.softmax(torch.tensor([2.0, 4.0]), 0)
    want = torch.tensor([[2 * (1 - p[0])], [-2 * p[1] + (1 - p[0]) - 2 * p[1]]])
    torch.testing.assert_close(embedding.weight.grad, want)
    assert not embedding.sparse and head.weight is embedding.weight and isinstance(head.weight, nn.Parameter)


def test_one_use_alone() -> None:
    """Of the embedding: dense all the same; of the head; and of neither."""
    embedding, head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
    head.weight = embedding.weight
    around = Around(embedding, head)
    around(lambda: embedding(torch.tensor([1, 1]))).sum().backward()
    torch.testing.assert_close(embedding.weight.grad, torch.tensor([[0.0, 0], [2, 2], [0, 0], [0, 0]]))
    embedding.weight.grad = None
    around(lambda: head(torch.tensor([[1.0, 3.0]]))).sum().backward()
    torch.testing.assert_close(embedding.weight.grad, torch.tensor([[1.0, 3.0]] * 4))
    embedding.weight.grad = None
    around(lambda: None)
    assert embedding.weight.grad is None


@pytest.mark.parametrize("why", ["frozen", "no gradient", "ZeRO-3"])
def test_left_alone(why: str) -> None:
    embedding, head = nn.Embedding(4, 2), nn.Linear(2, 4, bias=False)
    head.weight = embedding.weight
    if why == "frozen":
        head.requires_grad_(False)
    if why == "ZeRO-3":
        embedding.weight.ds_id = 0  # type: ignore[attr-defined]

    def run() -> None:
        assert isinstance(embedding.weight, nn.Parameter) and isinstance(head.weight, nn.Parameter)
        assert not embedding.sparse

    with torch.set_grad_enabled(why != "no gradient"):
        Around(embedding, head)(run)


def test_an_error_inside_leaves_nothing_behind() -> None:
    embedding, head = nn.Embedding(4, 2, sparse=False), nn.Linear(2, 4, bias=False)
    head.weight = embedding.weight
    with pytest.raises(IndexError):
        Around(embedding, head)(lambda: embedding(torch.tensor([9])))
    assert head.weight is embedding.weight and isinstance(head.weight, nn.Parameter) and not embedding.sparse


def test_a_copy_uses_its_own_weight() -> None:
    model = tied_model(torch.float32)
    wrapped = heads.CausalModel(model)
    add_in_place(wrapped, model.model.embed_tokens, model.lm_head)
    twin = copy.deepcopy(wrapped)
    twin(padded(random_groups("pairs", 3), CPU))[0].sum().backward()
    assert model.lm_head.weight.grad is None
    assert twin.model.lm_head.weight.grad is twin.model.model.embed_tokens.weight.grad is not None
