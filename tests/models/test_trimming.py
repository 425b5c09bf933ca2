"""Freed memory goes back at the end of a forward and three times in its backward, and nothing else changes."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dsalign.models.trimming import trim_in_backward


class Layers(nn.Module):
    """Eight linear layers, each of which writes its number down when its backward begins."""

    def __init__(self, said: list[object]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layers = nn.ModuleList([nn.Identity()]), nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
        self.said = said

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if x.requires_grad:
                x.register_hook(lambda _, i=i: self.said.append(i))
        return x


@pytest.mark.parametrize("able", [True, False], ids=["glibc", "another allocator"])
def test_after_a_forward_and_three_times_in_its_backward(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before layers 4, 2 and 1 of 0 to 7; once in a forward, none in one without gradient; the gradients stay."""
    said: list[object] = []
    plain, watched, x = Layers([]), Layers(said), torch.ones(2, 4)
    library = SimpleNamespace(malloc_trim=lambda pad: said.append("trim")) if able else SimpleNamespace()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    trim_in_backward(watched)
    with torch.no_grad():
        watched(x)
    assert said == []
    watched(x).sum().backward()
    plain(x).sum().backward()
    want = ["trim", 7, 6, 5, "trim", 4, 3, "trim", 2, "trim", 1, 0]
    assert said == (want if able else [7, 6, 5, 4, 3, 2, 1, 0])
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
