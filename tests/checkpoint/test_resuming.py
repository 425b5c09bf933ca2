"""A resume that cannot be is refused by its options alone, before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsalign.checkpoint import fingerprint, resuming
from dsalign.config.parse import ConfigError, parse
from dsalign.config.schema import RunConfig


def config(*words: str) -> RunConfig:
    steps = () if "--max_steps" in words else ("--max_steps", "6")
    return parse(["--algo", "grpo", "--num_iterations", "4", *steps, *words], world_size=2).config


def checkpoint(folder: Path, step: int, **progress: int) -> Path:
    """The checkpoint of a run of two ranks, as far as it is read here."""
    found = folder / f"checkpoint-{step}"
    found.mkdir(parents=True)
    kept = {"options": fingerprint.options(config()), "global_batch": config().global_batch(2)}
    (found / "trainer.json").write_text(json.dumps({"progress": {"step": step, **progress}, "fingerprint": kept}))
    return found


def test_an_option_that_may_not_change_is_a_problem_of_the_configuration(tmp_path: Path) -> None:
    """With latest and auto of the newest checkpoint, and of a folder that is named."""
    checkpoint(tmp_path, 4)
    for resume in ("latest", "auto", str(tmp_path / "checkpoint-4")):
        given = ("--output_dir", str(tmp_path), "--resume", resume)
        resuming.check_options(config(*given, "--lr", "0.1"), 2)
        with pytest.raises(
            ConfigError, match="checkpoint-4 comes from a run with other settings: --seed was 42, is 7;"
        ):
            resuming.check_options(config(*given, "--seed", "7"), 2)


def test_a_new_run_is_not_compared(tmp_path: Path) -> None:
    """Nor one whose checkpoint cannot be read, of which loading says why."""
    for given in ((), ("--resume", "auto")):
        resuming.check_options(config("--output_dir", str(tmp_path), "--seed", "7", *given), 2)
    (checkpoint(tmp_path, 4) / "trainer.json").write_text("{")
    resuming.check_options(config("--output_dir", str(tmp_path), "--resume", "--seed", "7"), 2)


def test_templates_write_the_day_of_the_run_that_goes_on(tmp_path: Path) -> None:
    """A new run, and one of a checkpoint that knows none, take today's."""
    found = checkpoint(tmp_path, 4)
    given = config("--output_dir", str(tmp_path), "--resume")
    assert (resuming.day(config("--output_dir", str(tmp_path))), resuming.day(given)) == ("", "")
    kept = json.loads((found / "trainer.json").read_text())
    kept["fingerprint"]["day"] = "2026-11-29T19:00:00"
    (found / "trainer.json").write_text(json.dumps(kept))
    assert resuming.day(given) == "2026-11-29T19:00:00"
