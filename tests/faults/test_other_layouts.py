"""Runs that sample and are killed go on with another number of ranks or at another ZeRO stage: the same prompts, the
same samples, and the weights that the run would have had, within rounding."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from faulty_runs import STEPS, command, words
from forks import Forks
from safetensors.numpy import load_file

Run = tuple[list[str], Path]  # a command without its output folder, the folder
METRIC, WEIGHT = (
    1e-4,
    1e-4,
)  # relative, absolute: six AdamW steps of 1e-3, whose gradients are added up in another order


def weights(folder: Path) -> dict[str, np.ndarray]:
    """(file, tensor) -> every weight of final/."""
    return {
        f"{path.relative_to(folder)} {name}": tensor
        for path in sorted((folder / "final").rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def scores(folder: Path) -> list[tuple[int, float, float]]:
    """(step, mean score of the samples, loss) of every step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(x["step"], x["objective/scores"], x["loss"]) for x in lines]


def given(algo: str, stage: int, tuner: str, ranks: int, model: Path, folder: Path) -> list[str]:
    """The command of four groups a step on this many ranks."""
    found = words(algo, stage, tuner, model, folder)
    found[found.index("--batch_size") + 1] = str(4 // ranks)
    return [*found, "--output_dir", str(folder / "out")]


CASES = [
    (algo, before, after, tuner)
    for algo, tuner in (("ppo", "lora"), ("ppo", "full"), ("grpo", "lora"), ("grpo", "full"))
    for before, after in (((2, 2), (1, 0)), ((1, 2), (2, 3)), ((2, 3), (2, 2)), ((2, 3), (4, 3)))
]


@pytest.mark.slow  # tests/checkpoint/test_reshard.py has layouts without the command, some of them quick
@pytest.mark.parametrize(("algo", "before", "after", "tuner"), CASES)
def test_a_run_that_samples_goes_on_in_another_layout(
    algo: str, before: tuple[int, int], after: tuple[int, int], tuner: str, forks: Forks, tiny: Path, tmp_path: Path
) -> None:
    """before, after: (ranks, ZeRO stage). Killed in step 5, while the checkpoint of step 4 may still be written."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):
        folder.mkdir()
    (ranks, stage), (new_ranks, new_stage) = before, after
    ended = forks.run(command, given(algo, stage, tuner, ranks, tiny, straight), world=ranks)
    assert {one.code for one in ended} == {0}, ended[0].text
    ended = forks.run(command, given(algo, stage, tuner, ranks, tiny, stopped), world=ranks, fault="phase log:0:kill:5")
    assert ended[0].code == -9
    ended = forks.run(command, [*given(algo, new_stage, tuner, new_ranks, tiny, stopped), "--resume"], world=new_ranks)
    assert {one.code for one in ended} == {0}, ended[0].text
    assert re.search(r"resuming at step [24]\b", ended[0].text)
    want, found = scores(straight / "out"), scores(stopped / "out")
    assert [x[0] for x in found] == [x[0] for x in want] == list(range(1, STEPS + 1))
    assert len({score for _, score, _ in want}) > 3, "the samples differ in what they are worth"
    np.testing.assert_allclose(found, want, rtol=METRIC, atol=METRIC)
    of_straight, of_stopped = weights(straight / "out"), weights(stopped / "out")
    assert of_straight.keys() == of_stopped.keys()
    for name, weight in of_straight.items():
        np.testing.assert_allclose(of_stopped[name], weight, rtol=0, atol=WEIGHT, err_msg=name)
