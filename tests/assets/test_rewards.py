"""The reward that comes with dsalign, worked out by hand."""

from __future__ import annotations

import pytest

from dsalign import assets
from dsalign.assets.rewards import FUNCTIONS, friendly


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("Rain is likely.", 0.0),
        ("Sure, rain is likely.", 0.5),  # one phrase of two
        ("Thank you. THANKS! Sure, rain is likely.", 1.0),
        ("I hope you are glad. Please come, you are welcome.", 1.0),  # four phrases count as two
        ("Measure it, shopeless pleased one.", 0.0),  # whole words only
        ("Look it up, stupid.", -1.0),
        ("Sure. Look it up.", -0.5),
        (" \n", -1.0),
        ("word " * 40, 0.0),
        ("word " * 60, -0.5),  # 20 beyond 40
        ("stupid " * 200, -2.0),
    ],
)
def test_the_reward_that_comes_along(text: str, reward: float) -> None:
    """warmth - rudeness - excess of each completion, whatever the prompt and the other columns."""
    assert friendly(["Please?"], [text], label=["x"]) == [reward]
    assert FUNCTIONS[assets.REWARD] is friendly
