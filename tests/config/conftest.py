"""The algorithm that only tests know, in the place of all others."""

from __future__ import annotations

import pytest
from duel_algorithm import Duel

from dsalign import algos


@pytest.fixture
def duel(monkeypatch: pytest.MonkeyPatch) -> type[Duel]:
    """The one algorithm there is."""
    monkeypatch.setattr(algos, "names", lambda: ("duel",))
    monkeypatch.setattr(algos, "load", lambda name: Duel)
    return Duel
