"""Weights in column order: other memory, the same numbers."""

from __future__ import annotations

import torch
from support import tiny_config
from torch import nn
from transformers import LlamaForCausalLM

from dsalign import cpu
from dsalign.rollout.view import view_of


def test_a_view_samples_from_copies_in_column_order() -> None:
    """Every linear layer and the head; the model that is trained keeps its own, and the embedding is still shared."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tie_word_embeddings=True)).eval()
    before = {name: (p.data_ptr(), p.stride(), p.detach().clone()) for name, p in model.named_parameters()}
    view = view_of(model)
    cpu.sampling(view)
    pairs = [(a, b) for a, b in zip(view.modules(), model.modules(), strict=True) if isinstance(a, nn.Linear)]
    assert len(pairs) == 7 * model.config.num_hidden_layers + 1
    for ours, theirs in pairs:
        assert torch.equal(ours.weight, theirs.weight) and ours.weight.data_ptr() != theirs.weight.data_ptr()
        assert ours.weight.stride() == (1, ours.out_features) and theirs.weight.stride() == (theirs.in_features, 1)
    assert view.get_input_embeddings().weight is model.get_input_embeddings().weight
    for name, p in model.named_parameters():
        address, stride, values = before[name]
        assert p.data_ptr() == address and p.stride() == stride and torch.equal(p, values)
    ids = torch.randint(0, model.config.vocab_size, (3, 7))
    with torch.no_grad():
        torch.testing.assert_close(view(ids).logits, model(ids).logits, atol=1e-5, rtol=1e-5)


def test_other_precisions_keep_their_order() -> None:
    layer = nn.Sequential(nn.Linear(4, 6, dtype=torch.bfloat16))
    address = layer[0].weight.data_ptr()
    cpu.sampling(layer)
    assert layer[0].weight.data_ptr() == address
