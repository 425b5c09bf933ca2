"""The rows that come with dsalign: kinds, names, lengths and licence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import read_rows

from dsalign import algos, assets
from dsalign.config.schema import RUN_OPTIONS
from dsalign.data.rows.formats import KINDS
from dsalign.data.rows.records import Row, RowError
from dsalign.models.names import EMBEDDED


def rows(kind: str) -> list[Row]:
    return read_rows([f"demo:{kind}"], kind)


def words(text: str) -> int:
    return len(text.split())


def ratio(one: list[str], other: list[str], size: Callable[[str], int]) -> float:
    """Mean size of the texts of `one` over that of `other`."""
    return sum(map(size, one)) / len(one) / (sum(map(size, other)) / len(other))


def test_every_kind_of_row_has_a_file() -> None:
    assert assets.names() == ("demo:demonstrations", "demo:labels", "demo:pairs", "demo:prompts")
    assert {name.removeprefix("demo:") for name in assets.names()} == set(KINDS)
    assert {algos.load(name)().traits.data for name in algos.names()} <= set(KINDS)
    assert assets.find("demo:labels") == Path(assets.__file__).parent / "labels.jsonl"


def test_a_name_that_is_not_there() -> None:
    known = "demo:demonstrations, demo:labels, demo:pairs, demo:prompts"
    for wrong in ("demo:../pairs", "demo:pair", "pairs"):
        with pytest.raises(ValueError) as caught:
            assets.find(wrong)
        assert str(caught.value) == f"data set {wrong!r}: expected one of {known}, got no such name; choose one"
    with pytest.raises(ValueError, match=f"data set 'demo:pair': expected one of {known}"):
        read_rows(["demo:pair"], "pairs")


def test_the_default_model_is_the_embedded_one() -> None:
    assert RUN_OPTIONS["model"].default == EMBEDDED


def test_rows_are_read_in_any_folder_and_named_by_their_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = rows("pairs")
    assert (found[0].where, found[-1].where) == ("demo:pairs:1", "demo:pairs:48")
    assert len(read_rows(["demo:pairs#5", "demo:pairs"], "pairs")) == 53
    with pytest.raises(RowError, match=r"^demo:labels:1: expected the columns of a format for pairs"):
        read_rows(["demo:labels"], "pairs")


def test_a_file_of_the_user_comes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo:pairs").mkdir()
    (tmp_path / "demo:pairs" / "mine.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    assert [row.where for row in rows("pairs")] == ["demo:pairs/mine.jsonl:1"]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_48_short_and_different(kind: str) -> None:
    """3 to 40 words a text, nothing blank around them, no column left over, no prompt twice."""
    found = rows(kind)
    assert len(found) == len({str(row.prompt) for row in found}) == 48
    for row in found:
        texts = [*(turn["content"] for turn in row.prompt), *row.completions]
        assert all(text == text.strip() and 3 <= words(text) <= 40 for text in texts), row
        assert not row.columns, row


def test_a_pair_differs_in_more_than_its_length() -> None:
    """The longer answer is not the better one: as long in words and characters, and longer about as often."""
    chosen, rejected = (list(answers) for answers in zip(*(row.completions for row in rows("pairs")), strict=True))
    assert 0.8 <= ratio(chosen, rejected, words) <= 1.25
    assert 0.8 <= ratio(chosen, rejected, len) <= 1.25
    assert not set(chosen) & set(rejected)
    longer = [len(one) > len(other) for one, other in zip(chosen, rejected, strict=True) if len(one) != len(other)]
    assert 0.3 <= sum(longer) / len(longer) <= 0.7


def test_labels_are_balanced() -> None:
    """26 / 22 = 1.18 lies in [1, 4/3], so weights of 1 need no warning."""
    good = [row.completions[0] for row in rows("labels") if row.label]
    bad = [row.completions[0] for row in rows("labels") if not row.label]
    assert (len(good), len(bad)) == (26, 22)
    assert 0.8 <= ratio(good, bad, words) <= 1.25


def test_demonstrations_have_several_turns_and_system_prompts() -> None:
    found = [[turn["role"] for turn in row.prompt] for row in rows("demonstrations")]
    assert sum(roles == ["user", "assistant", "user"] for roles in found) == 5
    assert sum(roles == ["system", "user"] for roles in found) == 2
    assert sum(roles == ["user"] for roles in found) == 41


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_plain_lines_of_json(kind: str) -> None:
    """The same columns in every line, characters as they are, one line end at the end."""
    text = assets.find(f"demo:{kind}").read_text(encoding="utf-8")
    lines = text.removesuffix("\n").split("\n")
    assert [json.dumps(json.loads(line), ensure_ascii=False) for line in lines] == lines
    assert len({tuple(json.loads(line)) for line in lines}) == 1


def test_the_licence_is_told() -> None:
    text = (Path(assets.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert "written for dsalign" in text and "Apache-2.0" in text and "CC0-1.0" in text
