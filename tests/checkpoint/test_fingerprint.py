"""Settings of a checkpoint that a resumed run does not share are named, each with both values."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsalign.checkpoint.fingerprint import compare


def test_every_setting_that_differs_is_named_with_both_values() -> None:
    """The same ones are not named."""
    theirs = {"seed": 1, "rows": 8, "tuner": "full"}
    with pytest.raises(ValueError, match="comes from a run with other settings") as error:
        compare(theirs, {"seed": 2, "rows": 8, "tuner": "lora", "ranks": 4}, Path("checkpoint-3"))
    assert ": --seed was 1, is 2; --tuner was full, is lora; the number of ranks was None, is 4; re" in str(error.value)
    compare(theirs, dict(theirs), Path("checkpoint-3"))
