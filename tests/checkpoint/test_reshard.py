"""A checkpoint goes on under another number of ranks, ZeRO stage or dtype: the same weights and moments, bit for bit,
and the steps that the run would have taken, within rounding."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import reshard_cases
import torch
from reshard_cases import Found
from run_cases import Run
from support import RankPool, quick_if

LOSS, WEIGHT = 1e-5, 2e-5  # relative, absolute: gradients are added up in another order over two steps of rate 0.01


@pytest.fixture(scope="module")
def pools(one_rank: RankPool, two_ranks: RankPool) -> Iterator[dict[int, RankPool]]:
    """A pool of one, two and four ranks; a pool starts when it is first used."""
    four = RankPool(4)
    yield {1: one_rank, 2: two_ranks, 4: four}
    four.close()


def same_state(before: Found, after: Found) -> None:
    for old, new in zip(before.state[:3], after.state[:3], strict=True):
        assert old.keys() == new.keys() and len(old) > 4
        assert all(np.array_equal(old[name], new[name]) for name in old)
    assert any(moment.any() for moment in after.state.second.values())
    assert after.state.steps == before.state.steps == 2


QUICK = ((2, 2, 2, 3, "full"), (2, 3, 1, 0, "lora"), (1, 0, 2, 2, "full"))
CASES = [
    (a, x, b, y, tuner)
    for a, x, b, y in [
        (2, 2, 2, 3), (2, 3, 2, 2), (2, 3, 1, 0), (1, 0, 2, 2), (2, 2, 1, 2), (1, 2, 2, 2), (2, 2, 4, 2), (4, 3, 2, 3),
        (2, 3, 4, 3), (2, 1, 2, 3), (2, 0, 2, 3), (2, 3, 2, 0), (4, 2, 1, 3), (1, 3, 4, 1),
    ]
    for tuner in ("full", "lora")
]  # fmt: skip


@pytest.mark.parametrize(
    ("ranks", "stage", "new_ranks", "new_stage", "tuner"), [quick_if(one in QUICK, *one) for one in CASES]
)
def test_another_layout_goes_on(
    ranks: int,
    stage: int,
    new_ranks: int,
    new_stage: int,
    tuner: str,
    tiny: Path,
    pools: dict[int, RankPool],
    tmp_path: Path,
) -> None:
    """Weights and both moments as saved to the last bit; then two steps as in the run that was never stopped."""
    straight = pools[ranks].run(reshard_cases.saved, Run("sft", tiny, stage, tuner), tmp_path)
    found = pools[new_ranks].run(reshard_cases.resumed, Run("sft", tiny, new_stage, tuner), tmp_path)
    same_state(straight, found)
    assert found.losses == pytest.approx(straight.losses, rel=LOSS) and len(found.losses) == 2
    for name, weight in straight.weights.items():
        np.testing.assert_allclose(found.weights[name], weight, rtol=0, atol=WEIGHT, err_msg=name)
    moved = max(np.abs(straight.weights[n] - straight.state.master[n]).max() for n in straight.weights)
    assert moved > 100 * WEIGHT, "the steps are larger than the tolerance"


@pytest.mark.parametrize(
    ("dtype", "stage", "new_dtype", "new_stage"),
    [
        quick_if(first, *case)
        for first, case in [
            (False, (torch.bfloat16, 0, torch.float32, 3)),
            (False, (torch.float32, 0, torch.bfloat16, 0)),
            (False, (torch.bfloat16, 2, torch.float32, 0)),
            (False, (torch.float32, 3, torch.bfloat16, 2)),
        ]
    ],
)
def test_another_dtype_keeps_the_float32_weights(
    dtype: torch.dtype,
    stage: int,
    new_dtype: torch.dtype,
    new_stage: int,
    tiny: Path,
    two_ranks: RankPool,
    tmp_path: Path,
) -> None:
    """What is computed in changes, what is stepped does not."""
    straight = two_ranks.run(reshard_cases.saved, Run("sft", tiny, stage, dtype=dtype), tmp_path)
    found = two_ranks.run(reshard_cases.resumed, Run("sft", tiny, new_stage, dtype=new_dtype), tmp_path)
    same_state(straight, found)
    assert found.losses == pytest.approx(straight.losses, rel=0.02)
