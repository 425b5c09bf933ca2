"""Freed memory goes back at the end of a forward, three times in its backward and where a forward would need more."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dsalign.cpu import give_memory_back as trimming
from dsalign.cpu.give_memory_back import trim_in_backward


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
    trim_in_backward(watched, list(watched.layers))
    with torch.no_grad():
        watched(x)
    assert said == []
    watched(x).sum().backward()
    plain(x).sum().backward()
    want = ["trim", 7, 6, 5, "trim", 4, 3, "trim", 2, "trim", 1, 0]
    assert said == (want if able else [7, 6, 5, 4, 3, 2, 1, 0])
    for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_a_forward_may_not_need_more_than_the_backward_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident are 3, 7 and 5 in the backward, so that a forward gives memory back beyond 7 alone: behind layers 2 and
    7 of the second one. In the first one nothing is known yet."""
    said: list[object] = []
    model, x = Layers([]), torch.ones(2, 4)
    resident = iter([3, 7, 5, 7, 2, 8, 7, 1, 1, 1, 9])
    monkeypatch.setattr(trimming, "_resident", lambda: next(resident))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(malloc_trim=lambda pad: said.append("trim")))
    trim_in_backward(model, list(model.layers))
    for i, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, i=i: said.append(i))
    model(x).sum().backward()
    assert said == [0, 1, 2, 3, 4, 5, 6, 7, *["trim"] * 4]
    said.clear()
    with torch.no_grad():
        model(x)
    assert said == list(range(8))
    said.clear()
    model(x)
    assert said == [0, 1, "trim", 2, 3, 4, 5, 6, "trim", 7, "trim"]


def test_what_is_resident_grows_with_what_is_written() -> None:
    before = trimming._resident()
    held = torch.ones(2**24)
    assert 2**26 <= trimming._resident() - before < 2**27 and held.sum() > 0
