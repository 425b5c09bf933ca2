"""A frozen base in 4 bits for LoRA: linear layers with NF4 weights by bitsandbytes (QLoRA, arXiv:2305.14314)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsalign.models.lora_targets import linear_layers

KIND = "nf4"  # as base_model.json names the 4-bit weights that an adapter was trained on
MARK = "four_bit_base"  # attribute of a language model whose linear weights are, or were, in 4 bits
INSTALL = "pip install 'dsalign[4bit]'"


class FourBitLinear(nn.Linear):
    """A linear layer whose frozen weight is kept in 4 bits: NF4 in blocks of 64, with the blocks' scales in 8 bits
    (double quantisation). The weight is no parameter but a buffer of packed bytes, which neither an optimizer nor a
    checkpoint sees: it is made again from the base. A forward and a backward each unpack it for themselves."""

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = layer.bias
        packed, self.state = library().functional.quantize_4bit(
            layer.weight.detach().to(device).contiguous(), quant_type=KIND, compress_statistics=True
        )
        self.register_buffer("packed", packed, persistent=False)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The weight that the 4 bits stand for, [outputs, inputs], made anew at every call."""
        found: Tensor = library().functional.dequantize_4bit(self.packed, self.state)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x W' + b with the weight W that the 4 bits stand for."""
        found: Tensor = library().matmul_4bit(x, self.packed, quant_state=self.state, bias=self.bias)
        return found

    def plain(self) -> nn.Linear:
        """An ordinary linear layer that computes the same, with a weight of its own; the bias is shared."""
        layer = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight, requires_grad=False)
        layer.bias = self.bias
        return layer.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourBitLinear:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.state.to(self.packed.device)  # the scales, which are no buffers
        return self


def library(wanted: str = "load_in_4bit") -> Any:
    """The package bitsandbytes. wanted: what asks for it. Raises ValueError where it is not installed."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError as error:
        raise ValueError(
            f"{wanted}: 4-bit weights need the package bitsandbytes, which cannot be imported ({error}); run {INSTALL}"
        ) from error


def pack(model: PreTrainedModel, device: torch.device) -> None:
    """Put each linear layer of a language model into 4 bits, but its head and its routers; embeddings, norms and
    experts' weights in one tensor stay as they are. device: where the 4-bit weights are made, and stay.

    Raises ValueError where the model has no such layer, or bitsandbytes is missing.
    """
    for name in _names(model):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, FourBitLinear(model.get_submodule(name), device))
    setattr(model, MARK, True)


@torch.no_grad()
def round_weights(model: PreTrainedModel, device: torch.device) -> None:
    """Give each linear layer that `pack` would put into 4 bits the weight that those stand for, in its own dtype: the
    base that an adapter was trained on. device: where they are computed. Raises ValueError as `pack` does."""
    for name in _names(model):
        layer: Any = model.get_submodule(name)
        layer.weight.copy_(FourBitLinear(layer, device).weight)
    setattr(model, MARK, True)


def _names(model: PreTrainedModel) -> list[str]:
    """The names of the layers of a model that go into 4 bits."""
    head = model.get_output_embeddings()
    found = [n for n in linear_layers(model) if isinstance(m := model.get_submodule(n), nn.Linear) and m is not head]
    if not found:
        raise ValueError(
            f"load_in_4bit: expected linear layers, which 4 bits are for, got {type(model).__name__}, which has none "
            "beside its head; leave it out"
        )
    return found
