"""Fresh memory that shows what was not written."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory is NaN: what is not written shows."""
    empty, empty_like = torch.empty, torch.empty_like
    fill = {torch.bool: True}

    def poison(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(fill.get(x.dtype, float("nan")) if x.dtype.is_floating_point or x.dtype == torch.bool else 77)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))
