"""The two calls behind which the savers stand: which of them a module gets, and in which order."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from support import random_groups, tiny_config
from torch import nn
from transformers import LlamaForCausalLM

from dsalign import cpu
from dsalign.data.batches.packing import padded
from dsalign.models.heads import CausalModel, ValueModel
from dsalign.models.last_layer import layers_of

CPU = torch.device("cpu")


def applied(kind: str, *, tied: bool, checkpointing: bool = False, dtype: Any = torch.float32) -> tuple[Any, Any]:
    """(a policy or a value model to which the savers were applied, its language model)."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=tied)).to(dtype)
    module = CausalModel(model) if kind == "policy" else ValueModel(model, 0)
    head = model.lm_head if kind == "policy" else None
    decoder = model.get_decoder()
    cpu.apply(module, decoder, layers_of(decoder), model.get_input_embeddings(), head, checkpointing=checkpointing)
    return module, model


def optimizer(module: nn.Module) -> torch.optim.AdamW:
    return cpu.optimizer(module, [{"params": [p for p in module.parameters() if p.requires_grad]}], lr=0.1)


@pytest.mark.parametrize(
    ("kind", "tied", "sparse"), [("policy", True, False), ("policy", False, True), ("value", True, True)]
)
def test_an_embedding_that_only_looks_up_is_stepped_by_rows(kind: str, tied: bool, sparse: bool) -> None:
    """That of a value model, whose head is idle, and of a policy whose head has a weight of its own; where both have
    one weight its gradient is dense."""
    module, model = applied(kind, tied=tied)
    made = optimizer(module)
    out = module(
        padded(random_groups("labels", 1), CPU)
    )  # under a quarter of the rows: with more all are stepped alike
    (out if kind == "value" else out[0]).square().sum().backward()
    weight = model.get_input_embeddings().weight
    assert weight.grad.is_sparse == sparse
    before = weight.detach().clone()
    values = cpu.gradient_values(weight)
    assert values.shape == ((len(weight.grad.indices()[0]), 32) if sparse else weight.shape)
    made.step()
    assert (weight.grad is None) == sparse and not torch.equal(weight, before)


def test_which_weights_are_not_stepped_by_rows() -> None:
    """One that is frozen, one that is not in float32; and one whose module was given to no `apply`."""
    frozen, model = applied("value", tied=True)
    model.requires_grad_(False)
    half, of_half = applied("value", tied=True, dtype=torch.bfloat16)
    plain = LlamaForCausalLM(tiny_config())
    for module, inner in ((frozen, model), (half, of_half), (plain, plain)):
        optimizer(module)
        assert not inner.get_input_embeddings().sparse


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_order(checkpointing: bool) -> None:
    """As the module's list has it; nothing is recomputed beside gradient checkpointing."""
    calls = mock.Mock()
    names = ("recompute_cheap", "add_in_place", "only_looks_up", "trim_in_backward")
    with mock.patch.multiple(cpu, **{name: getattr(calls, name) for name in names}):
        applied("policy", tied=True, checkpointing=checkpointing)
        applied("value", tied=True, checkpointing=checkpointing)
    want = [
        "recompute_cheap",
        "add_in_place",
        "trim_in_backward",
        "recompute_cheap",
        "only_looks_up",
        "trim_in_backward",
    ]
    found = [name for name, *_ in calls.mock_calls]
    assert found == [name for name in want if not (checkpointing and name == "recompute_cheap")]


def test_every_gradient_stays() -> None:
    """All savers together, against a module without them: log-probabilities to the last bit, gradients to rounding."""
    changed, model = applied("policy", tied=True)
    torch.manual_seed(0)
    plain = LlamaForCausalLM(tiny_config(tie_word_embeddings=True))
    logps = []
    for module in (changed, CausalModel(plain)):
        logps.append(module.train()(padded(random_groups("pairs", 3), CPU))[0])
        logps[-1].square().sum().backward()
    assert torch.equal(logps[0], logps[1])
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert float((one.grad - other.grad).norm() / other.grad.norm()) < 1e-6, name  # type: ignore[operator, union-attr]
