"""The probe on two ranks: a rollout by the trainer's weights passes, and every mistake stops the first one."""

from __future__ import annotations

from pathlib import Path

import pytest
import rollout_cases
from support import RankPool

FAULTS = [
    ("no_adapter", "lora", "without the trained adapter"),
    ("old_head", "full", "a tied head"),
    ("skipped_sync", "full", "sampled from weights of step 1, and the trainer is at step 2: a synchronisation"),
    ("old_weights", "full", "not all the trainer's"),
    ("old_prompts", "full", "cached keys and values"),
    ("other_temperature", "full", "it sampled at temperature 1 and not 0.7"),
]


@pytest.mark.parametrize(("fault", "tuner", "why"), FAULTS, ids=[fault for fault, *_ in FAULTS])
def test_a_mistake_stops_the_first_rollout(fault: str, tuner: str, why: str, tiny: Path, two_ranks: RankPool) -> None:
    """On every rank alike, with the reason."""
    said = two_ranks.run(rollout_cases.faulty, tiny, "2", tuner, fault)
    assert said.startswith("rollout: ") and why in said


@pytest.mark.parametrize(("stage", "tuner"), [("0", "full"), ("3", "lora")])
def test_the_sampler_is_the_trainer(stage: str, tuner: str, tiny: Path, two_ranks: RankPool) -> None:
    """Log-probabilities within 1e-5 nats in float32, so that they serve as old ones."""
    exact, gap = two_ranks.run(rollout_cases.gap, tiny, stage, tuner)
    assert exact and gap <= 1e-5
