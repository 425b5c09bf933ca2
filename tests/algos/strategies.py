"""Random log-probabilities of ragged completions, in the shapes that `oracle` takes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
LOWEST, HIGHEST = -6.0, -0.01  # nats a token


def random_completions(rng: np.random.Generator, n: int, max_tokens: int) -> list[Array]:
    """n completions of 1 to max_tokens tokens, each token's log-probability uniform in (-6, -0.01)."""
    return [rng.uniform(LOWEST, HIGHEST, rng.integers(1, max_tokens + 1)) for _ in range(n)]


def random_pairs(rng: np.random.Generator, n: int, max_tokens: int) -> list[tuple[Array, Array]]:
    """n pairs (chosen, rejected), each side with its own length of 1 to max_tokens tokens."""
    sides = random_completions(rng, 2 * n, max_tokens)
    return list(zip(sides[::2], sides[1::2], strict=True))


def near(rng: np.random.Generator, tokens: Any, spread: float) -> Any:
    """The same nesting and lengths with each value moved by at most spread nats, kept in (-6, -0.01): a reference."""
    if isinstance(tokens, np.ndarray):
        return np.clip(tokens + rng.uniform(-spread, spread, tokens.shape), LOWEST, HIGHEST)
    return type(tokens)(near(rng, child, spread) for child in tokens)
