"""The options of sampling: what is refused, with its name and what was expected."""

from __future__ import annotations

import math
from typing import Any

import pytest

from dsalign.contract.rollout_options import RolloutOptions

AT_LEAST_0 = ("top_k", "num_sample_generations", "missing_eos_penalty")
AT_LEAST_1 = ("max_new_tokens", "local_rollout_forward_batch_size")
ABOVE_0 = ("temperature", "rollout_logp_limit")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        *(({name: -1}, f"{name}: expected a number >= 0, got -1") for name in AT_LEAST_0),
        *(({name: 0}, f"{name}: expected a number >= 1, got 0") for name in AT_LEAST_1),
        *(({name: x}, f"{name}: expected a number > 0, got {x}") for name in ABOVE_0 for x in (0.0, math.nan)),
        *(({"top_p": x}, f"top_p: expected a number > 0 and <= 1, got {x}") for x in (0.0, 1.5)),
        ({"rollout_gather": "some"}, "rollout_gather: expected one of auto, whole, layers, got 'some'"),
    ],
    ids=str,
)
def test_options_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        RolloutOptions(**options)
    assert str(caught.value) == text


def test_options_at_the_edges_are_taken() -> None:
    edges = {**dict.fromkeys(AT_LEAST_0, 0), **dict.fromkeys(AT_LEAST_1, 1), "top_p": 1.0}
    options = RolloutOptions(**edges)
    assert {name: getattr(options, name) for name in edges} == edges


def test_options_of_vllm_are_for_vllm_and_no_part_of_what_a_run_is() -> None:
    """A resumed run may have its servers elsewhere, so they do not stand in the text that is compared."""
    with pytest.raises(ValueError, match=r"^vllm_server, vllm_folder: for --rollout vllm, got auto; leave them out"):
        RolloutOptions(vllm_server="http://a:8000")
    with pytest.raises(ValueError, match=r"^vllm_folder: without --vllm_server"):
        RolloutOptions(rollout="vllm", vllm_folder="weights")
    with pytest.raises(ValueError, match=r"^vllm_memory"):
        RolloutOptions(vllm_memory=0.0)
    there = RolloutOptions(rollout="vllm", vllm_server="http://a:8000", vllm_timeout=5.0)
    assert repr(there) == repr(RolloutOptions(rollout="vllm")) != repr(RolloutOptions())
