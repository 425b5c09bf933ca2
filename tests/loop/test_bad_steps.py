"""Steps whose numbers are not finite: skipped whole on every rank at every stage, kept, counted, and too many end."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import bad_cases
import pytest
import torch
from run_cases import Run
from support import RankPool, quick_if

FLOAT, BRAIN = torch.float32, torch.bfloat16
QUICK = {(0, FLOAT, "gradient"), (2, FLOAT, "loss"), (3, FLOAT, "loss")}


@pytest.mark.parametrize(
    ("stage", "dtype", "wanted"),
    [
        quick_if((stage, dtype, wanted) in QUICK, stage, dtype, wanted)
        for stage in (0, 1, 2, 3)
        for dtype in (FLOAT, BRAIN)
        for wanted in ("loss", "gradient")
    ],
)
def test_a_bad_step_leaves_no_trace(
    stage: int, dtype: torch.dtype, wanted: str, tiny: Path, two_ranks: RankPool
) -> None:
    """A NaN on rank 1 in the first micro-batch of the second step: weights and moments of both ranks stay to the bit,
    and the third step is that of a run which left the second one out. Of its metrics only the rates are there."""
    visit = 2  # of a rank, which has one micro-batch a step
    untouched, same, names, progress = two_ranks.run(
        bad_cases.skipped, Run("sft", tiny, stage, dtype=dtype), f"{wanted}:1:nan:{visit}"
    )
    assert untouched and same
    assert names[1] == ["bad_steps", "lr", "num_tokens"]
    assert "loss" in names[0] and "bad_steps" not in names[0] and {"loss", "bad_steps"} <= set(names[2])
    assert (progress["step"], progress["bad_steps"], progress["bad_in_a_row"]) == (3, 1, 0)


@pytest.mark.parametrize(
    ("stage", "wanted"), [quick_if((s, w) == ("3", "gradient"), s, w) for s in "023" for w in ("loss", "gradient")]
)
def test_policy_and_critic_are_skipped_together(
    stage: str, wanted: str, tiny: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    """The policy has one micro-batch, so the second visit is the critic's: its NaN leaves the policy as it was too."""
    same, progress = two_ranks.run(bad_cases.two_engines, tiny, stage, f"{wanted}:1:nan:2", tmp_path)
    assert same and progress["bad_steps"] == 1
    assert (tmp_path / "bad" / "step-1" / "rank-1.safetensors").is_file()


def test_one_bad_row_is_skipped_named_and_kept(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """Four steps of 2 rows: the one with row 3 has no loss and counts, the run goes on."""
    messages, seen, files = two_ranks.run(bad_cases.bad_row, tiny, tmp_path, 1)
    assert messages == ["", ""] and len(seen) == 4
    assert sum("loss" not in one for one in seen) == 1 and seen[-1].get("bad_steps") == 1
    assert all(math.isfinite(x) for one in seen for x in one.values())
    assert [Path(f).name for f in files] == [
        "rank-0.json", "rank-0.safetensors", "rank-1.json", "rank-1.safetensors", "step.json",
    ]  # fmt: skip


def test_too_many_in_a_row_end_the_run(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """max_bad_steps 0: the first one ends it, on both ranks with the same words, naming the row and what to do."""
    (first, second), seen, _ = two_ranks.run(bad_cases.bad_row, tiny, tmp_path, 0)
    assert first == second
    for text in ("the loss is nan from rows.jsonl:3;", "--max_bad_steps 0", f"dsalign replay {tmp_path}/bad/step-"):
        assert text in first
    assert len(seen) < 4


def test_a_bad_prepared_batch_is_skipped_whole(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """Three batches of six steps; the second has a NaN on one rank: its six steps are skipped, count as one in a row,
    and the algorithm's state is that of the other two batches."""
    seen, progress, state, same = two_ranks.run(bad_cases.bad_batch, tiny, tmp_path)
    assert same
    assert ["loss" in one for one in seen] == [True] * 6 + [False] * 6 + [True] * 6
    assert (progress["step"], progress["bad_steps"], progress["bad_in_a_row"]) == (18, 6, 0)
    assert state["batches"] == [0, 2]
    assert (tmp_path / "bad" / "step-7" / "step.json").is_file()


@pytest.mark.parametrize(
    ("stage", "tuner"), [quick_if(s == 3, s, t) for s, t in [(0, "full"), (2, "full"), (3, "lora")]]
)
def test_weights_that_are_not_finite_never_leave(
    stage: int, tuner: str, tiny: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    """An infinity on the last rank after a good checkpoint: the next one and the export stop on both ranks with the
    same words, and nothing of them is in the folder."""
    first, second, *names = two_ranks.run(bad_cases.diverged, Run("sft", tiny, stage, tuner), tmp_path)
    assert first == second and "nothing stopped it" not in first
    assert first.count("(rank ") >= 2 and "policy" in first and "checkpoint-1" in first
    assert names == ["checkpoint-1", "run.json"]


@pytest.mark.parametrize(
    ("stage", "where", "number"),
    [
        quick_if((stage, where) in {(0, "exp_avg_sq"), (2, "float32")}, stage, where, number)
        for stage in (0, 1, 2, 3)
        for where, number in [("exp_avg_sq", math.inf), ("model", -math.inf), ("float32", math.nan)]
        if stage or where != "float32"
    ],
)
def test_every_kind_of_number_is_looked_at(
    stage: int, where: str, number: float, tiny: Path, two_ranks: RankPool
) -> None:
    """Weights, moments and ZeRO's float32 weights, on one rank alone; both ranks say the same name."""
    clean, *said = two_ranks.run(bad_cases.broken_weights, Run("sft", tiny, stage), 1, number, where)
    assert clean == "" and len(set(said)) == 1
    assert said[0].startswith(f"policy {where}") and "(rank 1)" in said[0]


@pytest.mark.slow
def test_half_precision_and_adapters_are_looked_at(tiny: Path, two_ranks: RankPool) -> None:
    run: Any = Run("sft", tiny, 1, "lora", BRAIN)
    clean, *said = two_ranks.run(bad_cases.broken_weights, run, 0, math.nan, "float32")
    assert clean == "" and "float32 weights of group" in said[0] and "(rank 0)" in said[1]
