"""An algorithm that only tests know, with every kind of field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field

from dsalign.contract.algorithm import Algorithm, Traits


@dataclass(frozen=True, kw_only=True)
class Duel(Algorithm):
    """An algorithm with every kind of field."""

    weight: Annotated[float, Field(gt=0)] = 1.0  # of the duel, > 0
    kinds: tuple[str, ...] = ("sword",)  # one or several
    shares: tuple[float, ...] | None = None  # one a kind
    rounds: int | None = field(default_factory=lambda: 3)

    traits: ClassVar[Traits] = Traits(
        data="pairs",
        roles={"policy": "train", "reference": "frozen"},
        learning_rates={"full": 1.0, "lora": 2.0},
        min_groups=3,
    )

    def __post_init__(self) -> None:
        if self.shares is not None and len(self.shares) != len(self.kinds):
            raise ValueError(f"shares: expected {len(self.kinds)} numbers, got {len(self.shares)}; one a kind")
        if "gun" in self.kinds:
            raise ValueError("guns are not allowed in a duel")
