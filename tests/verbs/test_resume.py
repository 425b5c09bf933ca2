"""`dsalign resume RUN` is the run's own training command, on any ranks and from any folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from dsalign import verbs
from dsalign.config.parse import ConfigError, parse
from dsalign.config.schema import RunConfig
from dsalign.verbs import resume

WORDS = (
    "--algo",
    "sft",
    "--model",
    "org/name",
    "--dataset",
    "rows.jsonl",
    "--batch_size",
    "4",
    "--learning_rate",
    "0.1",
)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a run of two ranks with 2 x 4 x 2 = 16 rows a step, and checkpoints 2 and 10."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("")
    folder = tmp_path / "out"
    folder.mkdir()
    parse([*WORDS, "--output_dir", "out"], world_size=2).config.to_yaml(folder / "config.yaml")
    for step in (2, 10):
        (folder / f"checkpoint-{step}").mkdir()
        content = {"progress": {"step": step}, "fingerprint": {"global_batch": 16}}
        (folder / f"checkpoint-{step}" / "trainer.json").write_text(json.dumps(content))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def config(*argv: str, ranks: int = 2) -> RunConfig:
    return parse(resume.words(argv, ranks), world_size=ranks).config


def test_it_is_the_run_from_another_folder(run: Path) -> None:
    found = config(str(run))
    assert found.data.dataset == (f"{run.parent}/rows.jsonl",)
    assert (found.output.output_dir, found.output.resume, found.optim.learning_rate) == (str(run), "auto", 0.1)
    assert found.global_batch(2) == 16 and found.optim.batch_size == 4
    assert config("../out").output.output_dir == "../out"


@pytest.mark.parametrize(("ranks", "batch", "accumulation"), [(1, 4, 4), (2, 4, 2), (4, 4, 1), (8, 2, 1), (16, 1, 1)])
def test_a_step_has_as_many_rows_on_any_ranks(run: Path, ranks: int, batch: int, accumulation: int) -> None:
    found = config(str(run), ranks=ranks).optim
    assert (found.batch_size, found.gradient_accumulation_steps) == (batch, accumulation)


def test_ranks_that_do_not_divide_a_step_are_refused(run: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^resume: expected a number of ranks that divides the 16 rows of a step, got 3"
    ):
        resume.words([str(run)], 3)


def test_flags_win(run: Path) -> None:
    found = config(
        str(run), "--lr", "0.2", "--batch_size", "2", "--gradient_accumulation_steps", "4", "--max_steps", "9"
    )
    assert (found.optim.learning_rate, found.optim.max_steps, found.global_batch(2)) == (0.2, 9, 16)
    assert config(str(run), "--batch_size", "2").optim.gradient_accumulation_steps == 4


def test_the_words_of_a_launcher_come_first(run: Path) -> None:
    """deepspeed puts --local_rank in front of everything."""
    assert config("--local_rank=1", str(run), "--lr", "0.2").optim.learning_rate == 0.2


def test_a_checkpoint_stands_for_its_run(run: Path) -> None:
    found = config(str(run / "checkpoint-2"))
    assert (found.output.output_dir, found.output.resume) == (str(run), str(run / "checkpoint-2"))


def test_what_is_no_run_is_refused(run: Path) -> None:
    with pytest.raises(ValueError, match=r"^resume: expected one folder of a run, got 0; write dsalign resume RUN$"):
        resume.words([], 1)
    with pytest.raises(ValueError, match=r"its --output_dir, got .*/outt, which is no folder; did you mean out\?$"):
        resume.words([str(run) + "t"], 1)
    with pytest.raises(ValueError, match=r"got \., which has no config.yaml; check the path$"):
        resume.words(["."], 1)
    with pytest.raises(ValueError, match=r"^resume: expected no --output_dir, as a run goes on in its folder"):
        resume.words([str(run), "--output_dir", "x"], 1)


def test_a_run_without_a_checkpoint_begins_again_unless_it_is_done(run: Path) -> None:
    """As --resume auto does, which keeps what the run left in RUN.1: with the run's own options, and new ones."""
    for step in (2, 10):
        shutil.rmtree(run / f"checkpoint-{step}")
    found = config(str(run), "--learning_rate", "0.05", ranks=1)
    assert (found.output.output_dir, found.output.resume, found.optim.learning_rate) == (str(run), "auto", 0.05)
    (run / "final").mkdir()
    with pytest.raises(
        ValueError, match=r"^resume: .*/out is done and has no checkpoint-N to go on from; give .*/final"
    ):
        resume.words([str(run)], 1)


def test_a_value_that_was_left_out_must_be_given_again(run: Path) -> None:
    text = (run / "config.yaml").read_text().replace("system: null", "system: 'key [redacted]'")
    (run / "config.yaml").write_text(text)
    with pytest.raises(
        ValueError, match=r"config.yaml has no value of system, which looked like a secret; give it again$"
    ):
        resume.words([str(run)], 1)
    assert config(str(run), "--system", "mine").data.system == "mine"


def test_verbs_are_found_by_their_files() -> None:
    """Each has a line of help; help files beside them are none."""
    found = verbs.summaries()
    assert {"train", "data", "resume"} <= set(found) and not {"preflight", "data_report"} & set(found)
    assert all(0 < len(line) < 100 for line in found.values())
    assert [verbs.of(words) for words in ([], ["train"], ["rlhf"], ["sft"])] == [""] * 4
    assert verbs.of(["resume", "out"]) == "resume" and verbs.load("resume") is resume


@pytest.mark.parametrize(
    ("word", "said"), [("resum", "; did you mean resume?"), ("run.yaml", "; write options as --n")]
)
def test_an_unknown_verb_is_refused_with_the_nearest(word: str, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        verbs.of([word])
    assert (
        error.value.problems[0].startswith("command: expected one of bench, chat, ") and said in error.value.problems[0]
    )
