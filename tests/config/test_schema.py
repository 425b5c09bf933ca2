"""RunConfig and its sections: frozen, closed, each option in one of them."""

from __future__ import annotations

import pytest
from commands import made
from pydantic import ValidationError

from dsalign.config import schema
from dsalign.config.schema import HEADINGS, RUN_OPTIONS, SECTIONS, OptimOptions, RunConfig


def test_the_configuration_is_frozen_and_closed() -> None:
    config = made("--algo", "sft")
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.batch_size = 2  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        RunConfig(**{**dict(config), "sead": 1})
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        OptimOptions(**{**dict(config.optim), "bach_size": 1})


def test_an_option_is_in_one_section_and_shown_where_it_is_looked_for() -> None:
    """Two names are no section's; memory of the head is shown with the batch, the seed with what is written."""
    assert list(SECTIONS) == ["models", "data", "optim", "output"]
    assert sum(map(len, SECTIONS.values())) + len({"algo", "seed"}) == len(RUN_OPTIONS)
    assert list(made("--algo", "sft").options()) == list(RUN_OPTIONS)
    shown = list(RUN_OPTIONS)
    assert (shown[0], shown[1], shown[-1]) == ("algo", "model", "report_to")
    assert (
        shown[shown.index("head_memory") - 1] == "gradient_accumulation_steps" and "head_memory" in SECTIONS["models"]
    )
    assert shown[shown.index("seed") - 1 : shown.index("seed") + 2] == ["save_total_limit", "seed", "output_dir"]
    assert list(HEADINGS.items()) == [
        *(("algo", "what"), ("model", "models"), ("dataset", "data"), ("deepspeed", "optimisation")),
        ("eval_steps", "run"),
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("55m", 3300.0),
        ("3h", 10800.0),
        ("1.5h", 5400.0),
        ("3300s", 3300.0),
        ("3300", 3300.0),
        (3300, 3300.0),
        ("2d", 172800.0),
    ],
)
def test_a_time_in_seconds(text: str, wanted: float) -> None:
    assert schema.seconds(text) == wanted


def test_no_time_is_none() -> None:
    assert schema.seconds(None) is None
