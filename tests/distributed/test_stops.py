"""Runs on two ranks that a signal to one of them stops: saved within PPO's passes, and resumed bit for bit."""

from __future__ import annotations

import json
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
import stop_cases
import torch
import whole_runs
from safetensors.torch import load_file
from support import RankPool, ds_file, quick_if

from dsalign.loop.clock import PHASES

TIMED = ("tokens_per_s", "memory/peak", *(f"time/{phase}" for phase in PHASES))


def words(tiny: Path, stage: str, tuner: str, *more: str) -> list[str]:
    """PPO of two batches with 2 passes of 2 mini-batches each: 8 optimizer steps, of which every third is logged."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0} if stage == "3" else {"stage": int(stage)}
    text = f"--algo ppo --model {tiny} --dataset demo:prompts#16 --tuner {tuner} --batch_size 2 --max_new_tokens 6 "
    text += "--gradient_accumulation_steps 1 --num_ppo_epochs 2 --num_mini_batches 2 --learning_rate 1e-3 "
    text += f"--logging_steps 3 --save_steps 99 --reward_funcs {Path(__file__).with_name('vowels.py')}:vowels "
    text += f"--deepspeed {ds_file({'zero_optimization': zero})}"
    return [*text.split(), *more]


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    """The lines of a log, without what depends on the clock."""
    read = (json.loads(line) for line in (folder / name).read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMED} for line in read]


def same(one: Path, other: Path) -> None:
    """Both runs have the same models, metrics and samples, bit for bit."""
    for role in ("final", "final/value"):
        (file,) = (one / role).glob("*model.safetensors")
        ours, theirs = (load_file(folder / role / file.name) for folder in (one, other))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert lines(one, name) == lines(other, name)


@pytest.mark.parametrize(
    ("stage", "tuner", "steps"),
    [
        ("0", "full", (3,)),
        quick_if(False, "0", "full", (1, 2, 4, 5, 6, 7)),
        quick_if(False, "0", "lora", range(1, 8)),
        quick_if(False, "3", "full", range(1, 8)),
        quick_if(False, "3", "lora", range(1, 8)),
    ],
)
def test_stopped_within_the_passes_and_resumed_equals_straight(
    stage: str, tuner: str, steps: Any, tiny: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    """Rank 1 alone is told to stop in one of 7 steps; both ranks stop after it with exit code 75, rank 0 says how to go
    on, and the resumed run ends with the weights, metrics and samples of the one that was let run."""
    base = words(tiny, stage, tuner)
    straight = tmp_path / "straight"
    two_ranks.run(whole_runs.train, [*base, "--output_dir", str(straight)])
    for step in steps:
        out = tmp_path / f"stopped-{step}"
        mine = [*base, "--output_dir", str(out)]
        said = two_ranks.run(stop_cases.stopped, mine, step)
        assert [one[:2] for one in said] == [("Stopped", 75), ("ElsewhereError", 75)]
        first, last = said[0][2].splitlines()
        folder = out / f"checkpoint-{step}"
        assert first == f"stopped by SIGTERM on rank 1 at step {step} of 8, saved in {folder}; resume with"
        assert shlex.split(last) == ["dsalign", *mine, "--resume"]
        progress = json.loads((folder / "trainer.json").read_text())["progress"]
        assert (progress["step"], progress["taken"], progress["batches"]) == (step, step % 4, (step + 3) // 4)
        assert not (out / "final").exists()
        two_ranks.run(whole_runs.train, shlex.split(last)[1:])
        same(straight, out)


@pytest.mark.parametrize("number", [signal.SIGUSR1, quick_if(False, signal.SIGHUP), quick_if(False, signal.SIGINT)])
def test_stopped_in_a_rollout_goes_back_to_before_it(
    number: int, tiny: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    """In the second rollout, after four steps: the checkpoint is that of step 4, between two batches, with the state
    of the algorithm from before the rollout."""
    base = words(tiny, "0", "full")
    straight, out = tmp_path / "straight", tmp_path / "stopped"
    two_ranks.run(whole_runs.train, [*base, "--output_dir", str(straight)])
    mine = [*base, "--output_dir", str(out)]
    said = two_ranks.run(stop_cases.stopped_in_rollout, mine, 4, number)
    assert [one[:2] for one in said] == [("Stopped", 75), ("ElsewhereError", 75)]
    assert f"stopped by {signal.Signals(number).name} on rank 1 at step 4 of 8" in said[0][2]
    assert not (out / "checkpoint-4" / "prepared-0.safetensors").exists()
    two_ranks.run(whole_runs.train, [*mine, "--resume"])
    same(straight, out)


def test_stopped_in_the_first_rollout_saves_nothing(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    mine = [*words(tiny, "0", "full"), "--output_dir", str(tmp_path / "out")]
    said = two_ranks.run(stop_cases.stopped_in_rollout, mine, 0, signal.SIGTERM)
    first, last = said[0][2].splitlines()
    assert first == "stopped by SIGTERM on rank 1 before the first step; nothing is lost, it starts again with"
    assert shlex.split(last) == ["dsalign", *mine] and not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.slow
def test_stopped_in_an_evaluation_owes_it(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """In the evaluation after step 2, within the passes: the resumed run does it before step 3, and has the same best
    loss in its last checkpoint."""
    base = [*words(tiny, "0", "full"), "--split_dataset_ratio", "0.25", "--eval_steps", "2", "--max_steps", "4"]
    straight, out = tmp_path / "straight", tmp_path / "stopped"
    two_ranks.run(whole_runs.train, [*base, "--output_dir", str(straight)])
    mine = [*base, "--output_dir", str(out)]
    said = two_ranks.run(stop_cases.stopped_in_evaluation, mine, 2)
    assert "stopped by SIGTERM on rank 1 at step 2 of 4" in said[0][2]
    assert [line["step"] for line in lines(out, "metrics.jsonl") if "eval/loss" in line] == [0]
    two_ranks.run(whole_runs.train, [*mine, "--resume"])
    same(straight, out)
    last = [
        json.loads((folder / "checkpoint-4" / "trainer.json").read_text())["progress"] for folder in (straight, out)
    ]
    assert last[0] == last[1] and last[0]["best_step"] in (0, 2, 4) and not last[0]["owes_evaluation"]


def test_files_in_the_folder_save_and_stop(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """SAVE in the second step and STOP in the fourth: a checkpoint of each, and both files are gone."""
    out = tmp_path / "out"
    said, names = two_ranks.run(stop_cases.asked_by_files, [*words(tiny, "0", "full"), "--output_dir", str(out)], out)
    assert said[0][:2] == ("Stopped", 75) and f"stopped by the file {out / 'STOP'} on rank 0 at step 4" in said[0][2]
    assert {"checkpoint-2", "checkpoint-4"} <= set(names) and not {"STOP", "SAVE", "final"} & set(names)
