"""checkpoint-N folders: whole or not there, rotated, and a resumed run equals the uninterrupted one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import run_cases
import torch
from run_cases import Run
from support import RankPool, quick_if
from transformers import AutoModelForCausalLM

from dsalign.config.file_rules import PROGRESS_FILE

RESUMED = ((0, "full", "sft"), (3, "lora", "dpo"))  # the rest slowly


@pytest.mark.parametrize(
    ("stage", "tuner", "algo"),
    [
        quick_if((stage, tuner, algo) in RESUMED, stage, tuner, algo)
        for stage in (0, 2, 3)
        for tuner in ("full", "lora")
        for algo in ("sft", "dpo")
    ],
)
def test_resumed_equals_uninterrupted(
    algo: str, tuner: str, stage: int, tiny: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    """2 + 2 AdamW steps on two ranks are bit for bit 4 steps: weights, losses, progress; sft's LoRA drops out."""
    run = Run(algo, tiny, stage, tuner, dropout=0.05 if algo == "sft" else 0.0)
    (losses, want, progress), (losses_resumed, found, progress_resumed) = two_ranks.run(
        run_cases.saved_and_resumed, run, tmp_path
    )
    assert len(losses) == 2
    assert losses_resumed == losses
    assert found.keys() == want.keys()
    assert all((found[n] == want[n]).all() for n in want)
    assert progress_resumed == progress
    assert (progress["step"], progress["batches"], progress["state"]) == (4, 4, {"seen": 3})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "run.json"]


@pytest.mark.parametrize("stage", [quick_if(stage == 3, stage) for stage in (0, 2, 3)])
def test_resumed_equals_uninterrupted_in_bfloat16(stage: int, tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """The float32 weights behind the bfloat16 ones come back too."""
    (losses, want, _), (losses_resumed, found, _) = two_ranks.run(
        run_cases.saved_and_resumed, Run("sft", tiny, stage, dtype=torch.bfloat16), tmp_path
    )
    assert losses_resumed == losses
    assert all((found[n] == want[n]).all() for n in want)


@pytest.mark.parametrize("stage", [0, 3])
def test_saving_changes_nothing(stage: int, tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """A run that saves after two steps ends where a run that never saves ends."""
    run = Run("sft", tiny, stage, "lora", dropout=0.05)
    (_, want, progress), _ = two_ranks.run(run_cases.saved_and_resumed, run, tmp_path)
    found, progress_unsaved = two_ranks.run(run_cases.never_saved, run)
    assert all((found[n] == want[n]).all() for n in want)
    assert progress_unsaved == progress


def test_dropout_is_on_in_the_resumed_runs(tiny: Path, two_ranks: RankPool) -> None:
    """Else the tests above would say nothing about random state."""
    without, _ = two_ranks.run(run_cases.never_saved, Run("sft", tiny, 0, "lora"))
    dropped, _ = two_ranks.run(run_cases.never_saved, Run("sft", tiny, 0, "lora", dropout=0.05))
    assert any((without[n] != dropped[n]).any() for n in without)


def test_a_checkpoint_opens_as_a_model(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """checkpoint-2 has the export of final/ beside the DeepSpeed state."""
    two_ranks.run(run_cases.saved_and_resumed, Run("sft", tiny, 2), tmp_path)
    folder = tmp_path / "checkpoint-2"
    names = {p.name for p in folder.iterdir()}
    assert names >= {"engines", "trainer.json", "random-0.safetensors", "random-1.safetensors", "model.safetensors"}
    assert (folder / "engines" / "policy").is_dir()
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 32
    assert json.loads((folder / PROGRESS_FILE).read_text())["progress"]["step"] == 2


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(2, None, [10, 11]), (1, None, [11]), (1, 9, [11, 9]), (2, 11, [10, 11]), (4, 2, [10, 11, 2, 9])],
)
def test_rotation_keeps_the_newest_and_the_best(
    keep: int, best: int | None, left: list[int], two_ranks: RankPool, tmp_path: Path
) -> None:
    """Checkpoints of steps 2, 9, 10, 11: by number, not by name; no staging folder stays."""
    found = two_ranks.run(run_cases.rotation, tmp_path, keep, best)
    assert found == [*(f"checkpoint-{step}" for step in left), "run.json"]


def test_leftovers_of_a_killed_save_do_not_get_in(two_ranks: RankPool, tmp_path: Path) -> None:
    """A file in .staging-1 from before is gone; the second save of a step replaces the first."""
    names, best_loss = two_ranks.run(run_cases.save_over, tmp_path)
    assert names == ["manifest.json", "random-0.safetensors", "random-1.safetensors", "trainer.json"]
    assert best_loss == 0.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "run.json"]


def test_random_state_of_each_rank_comes_back(two_ranks: RankPool, tmp_path: Path) -> None:
    """torch's numbers and Python's, with the second Gaussian that Python keeps."""
    assert two_ranks.run(run_cases.random_after_load, tmp_path) == [(True, True)] * 2


def test_a_checkpoint_without_an_engines_state_is_refused(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """One of a run that trained nothing, whole as it is, resumed by a run that trains a policy."""
    said = two_ranks.run(run_cases.resumed_without_engines, Run("sft", tiny), tmp_path)
    assert said[0] == f"resume: {tmp_path}/checkpoint-3 has no DeepSpeed state for the policy"
