"""The last layer computes what is read of it, and nothing of what is read changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support import random_groups, tiny_config
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from dsalign.data.batches.packing import packed, padded
from dsalign.models import attention
from dsalign.models.heads import CausalModel, ValueModel
from dsalign.models.last_layer import layers_of, skip_unread_mlp

CPU = torch.device("cpu")
GROUPS = random_groups("pairs", 3)


def small() -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config())
    assert attention.share(model)
    return model


def seen(mlp: nn.Module) -> list[int]:
    """The numbers of tokens that the linear layers of an MLP get from now on, filled as it runs."""
    found: list[int] = []
    mlp.gate_proj.register_forward_pre_hook(lambda _, args: found.append(args[0].shape[1]))
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_what_is_read_is_computed(checkpointing: bool) -> None:
    """Of a reward model the last token of each completion, of a policy all but the prompts' beginnings; the first layer
    computes all tokens. With checkpointing a backward computes the same again."""
    model = small()
    skip_unread_mlp(model.get_decoder())
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    first, last = (seen(layer.mlp) for layer in layers_of(model.get_decoder()))
    whole = packed(GROUPS, CPU).ids.numel()
    unread = sum(len(g.prompt) - 1 for g in GROUPS)
    for wrapped, ends, count in [
        (CausalModel(model, True), False, whole - unread),
        (ValueModel(model, 0, True), False, whole - unread),
        (ValueModel(model, 0, True), True, len({(g.index, c) for g in GROUPS for c in g.completions})),
    ]:
        out = wrapped.train()(packed(GROUPS, CPU, ends=ends))
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        times = 2 if checkpointing else 1
        assert (first, last) == ([whole] * times, [count] * times)
        first.clear(), last.clear()
    CausalModel(model)(padded(GROUPS, CPU))
    assert last == [padded(GROUPS, CPU).ids.shape[1]], "a row without shared prompts is computed whole"
    last.clear()
    CausalModel(model, True)(packed([], CPU))
    assert last == [1], "and so is one of which nothing is read: its weights take part in a backward"


class Attention(nn.Module):
    def forward(self, x: Tensor, **more: Any) -> Tensor:
        return x


class Both(nn.Module):
    """An MLP that gives more than states, as the experts of some models do."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 2 * x, x.sum()


class Layer(nn.Module):
    def __init__(self, mlp_first: bool) -> None:
        super().__init__()
        self.mlp, self.attention, self.mlp_first = Both(), Attention(), mlp_first

    def forward(self, x: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        before = self.mlp(x) if self.mlp_first else None
        x = self.attention(x, **more)
        return before or self.mlp(x)


def decoder_of(layer: nn.Module) -> Any:
    decoder: Any = nn.Module()
    decoder.layers = nn.ModuleList([layer])
    skip_unread_mlp(decoder)
    return decoder


def test_other_mlps() -> None:
    """What one gives beside states is passed on; one that runs before the attention computes everything, each time."""
    prefix = attention.SharedPrefix(packed(GROUPS, CPU).spans, CPU, read=torch.tensor([2, 0]))
    x = torch.tensor([[[1.0], [3.0], [5.0]]])
    behind, before = decoder_of(Layer(False)).layers[0], decoder_of(Layer(True)).layers[0]
    for _ in range(2):
        states, other = behind(x, shared_prefix=prefix)
        assert states.tolist() == [[[2.0], [0.0], [10.0]]] and float(other) == 6
        assert before(x, shared_prefix=prefix)[0].tolist() == [[[2.0], [6.0], [10.0]]]
        before.forward(x, shared_prefix=prefix)  # as checkpointing does, without the layer's hooks
    assert behind(x, shared_prefix=None)[0].tolist() == behind(x)[0].tolist() == [[[2.0], [6.0], [10.0]]]


def test_under_autocast() -> None:
    """The norm before the MLP is in float32, what the MLP gives in bfloat16."""
    model = small()
    wrapped = CausalModel(model, True)
    found = []
    for change in (False, True):
        if change:
            skip_unread_mlp(model.get_decoder())
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(wrapped(packed(GROUPS, CPU))[0])
    torch.testing.assert_close(found[0], found[1], atol=0.05, rtol=0)


def test_a_copy_computes_with_weights_of_its_own() -> None:
    """And what is read of it is its own affair."""
    model = small()
    skip_unread_mlp(model.get_decoder())
    policy, copied = CausalModel(model, True), CausalModel(copy.deepcopy(model), True)
    count = seen(layers_of(copied.model.get_decoder())[-1].mlp)
    with torch.no_grad():
        before, _ = policy(packed(GROUPS, CPU))
        for parameter in policy.parameters():
            parameter.zero_()
        after, _ = copied(packed(GROUPS, CPU))
    assert torch.equal(before, after)
    assert count == [packed(GROUPS, CPU).ids.numel() - sum(len(g.prompt) - 1 for g in GROUPS)]


def test_the_layers_of_a_decoder() -> None:
    """GPT-2 calls them h; a decoder without a list has none, and stays as it is."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_head=2, n_layer=3, vocab_size=10))
    assert layers_of(model.get_decoder()) == list(model.transformer.h)
    assert layers_of(nn.Linear(2, 2)) == []
    skip_unread_mlp(nn.Linear(2, 2))
