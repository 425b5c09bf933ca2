"""Weights of linear layers in column order, for sampling: products of few rows read them faster than in row order."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def by_columns(module: nn.Module) -> None:
    """Give each float32 linear layer of a module that only samples a copy of its weight, of the same shape and values,
    with its columns contiguous. The module must own its layers: their weights are replaced, not changed."""
    for layer in module.modules():
        if type(layer) is nn.Linear and layer.weight.dtype == torch.float32:
            layer.weight = nn.Parameter(layer.weight.t().contiguous().t(), requires_grad=False)
