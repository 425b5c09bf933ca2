"""What is looked at before torch is imported: models' folders, the first row of each data set, and demos in the place
of what the user has."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from dsalign.config.parse import ConfigError, parse
from dsalign.verbs import preflight

DEMO, PAIR = {"prompt": "q", "completion": "c"}, {"prompt": "q", "chosen": "c", "rejected": "r"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(*words: str) -> list[str]:
    """The problems of the first rows, none where they are right."""
    config = parse(["--algo", "sft", "--model", "m", *words], world_size=1).config
    try:
        preflight.look(config)
    except ConfigError as error:
        return error.problems
    return []


def lines(name: str, *rows: object) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def test_the_first_row_of_each_set_is_read() -> None:
    """Both faults at once; rows behind the first, and names on a hub, are for later."""
    good, bad = lines("good.jsonl", DEMO, {"prompt": 3}), lines("bad.jsonl", PAIR)
    assert told("--dataset", good, "org/name", "--val_dataset", good) == []
    first, second = told("--dataset", good, bad, "--val_dataset", f"{bad}#1")
    assert first.startswith("dataset: bad.jsonl:1: expected the columns of a format for demonstrations")
    assert second.startswith("val_dataset: bad.jsonl:1: ") and second.endswith("--algo dpo, rm, cpo, orpo or simpo")
    assert told("--dataset", bad, "--columns", "chosen=completion") == []


def test_models_are_looked_at_too() -> None:
    """A reference needs no tokenizer; both lines come at once, in front of those of the rows."""
    for name in ("m", "r"):
        Path(name).mkdir()
        Path(name, "config.json").write_text("{}")
    lines("a.jsonl", PAIR)
    words = ["--algo", "dpo", "--model", "m", "--ref_model", "r", "--dataset", "a.jsonl"]
    with pytest.raises(ConfigError) as caught:
        preflight.look(parse(words, world_size=1).config)
    assert [line.partition(", got")[0] for line in caught.value.problems] == [
        "model: expected weights beside config.json",
        "model: expected a tokenizer beside config.json",
        "ref_model: expected weights beside config.json",
    ]


def test_bad_rows_may_be_left_out_and_bad_files_may_not() -> None:
    lines("bad.jsonl", {"prompt": 3}, DEMO)
    assert told("--dataset", "bad.jsonl", "--on_bad_row", "skip") == []
    Path("page.json").write_text("<html>")
    (line,) = told("--dataset", "page.json", "--on_bad_row", "skip")
    assert line.startswith("dataset: page.json: expected rows, got an HTML page")
    Path("empty").mkdir()
    (line,) = told("--dataset", "empty")
    assert line.startswith("dataset: data folder 'empty': expected files that end in .jsonl")


def test_a_large_file_that_is_read_as_a_whole_is_left_for_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed ones are counted as eight times as large; JSON lines are read line by line."""
    Path("a.json").write_text(json.dumps([PAIR]))
    Path("a.json.gz").write_bytes(gzip.compress(json.dumps([PAIR]).encode()))
    assert len(told("--dataset", "a.json", "a.json.gz", lines("a.jsonl", PAIR))) == 3
    monkeypatch.setattr(preflight, "LARGE_BYTES", Path("a.json").stat().st_size)
    assert len(told("--dataset", "a.json", "a.json.gz", "a.jsonl")) == 2
    monkeypatch.setattr(preflight, "LARGE_BYTES", 1)
    assert len(told("--dataset", "a.json", "a.json.gz", "a.jsonl")) == 1


def test_demos_in_the_place_of_what_the_user_has_are_said() -> None:
    """Rows of ours with a model of one's own, a reward of ours with rows of one's own; not in a first run."""

    def said(*words: str) -> list[str]:
        return preflight.stand_ins(parse(words, world_size=1))

    assert said("--algo", "dpo") == said("--algo", "ppo") == []
    assert said("--algo", "dpo", "--model", "m") == [
        "no --dataset was given: it is demo:pairs, which comes with dsalign to try it out"
    ]
    assert said("--algo", "ppo", "--dataset", "org/rows") == [
        "no --reward_funcs was given: it is demo:friendly, which comes with dsalign to try it out"
    ]
    assert said("--algo", "ppo", "--dataset", "org/rows", "--reward_model", "r") == []
    assert said("--algo", "ppo", "--dataset", "org/rows", "--reward_funcs", "demo:friendly") == []
    assert said("--algo", "dpo", "--model", "m", "--dataset", "demo:pairs") == []
