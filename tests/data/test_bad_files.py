"""More than a hundred bad data files: `data check` and the start of a run name the file, the place and the first true
cause, and end with 2."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_files import EVERY, LOST, Bad
from support import tiny_folder

from dsalign import cli
from dsalign.config.parse import parse
from dsalign.data import dataset
from dsalign.data.rows.iterate import Skipped, iter_rows
from dsalign.data.tokens.templates import Template
from dsalign.models.names import resolve
from dsalign.models.tokenizer import template_of


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("bad") / "model", num_hidden_layers=1)


@pytest.fixture(scope="module")
def template(model: Path) -> Template:
    return template_of(config_of(model, "sft", "rows"), resolve(str(model)))


def config_of(model: Path, algo: str, name: str, *words: str):
    given = ["--algo", algo, "--model", str(model), "--dataset", name, "--max_length", "200", *words]
    return parse(given, world_size=1).config


@pytest.fixture
def check(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """check(bad file, ...) -> the exit code of `dsalign data check` and what it says."""
    monkeypatch.chdir(tmp_path)

    def check(bad: Bad, *words: str) -> tuple[int, str]:
        Path(bad.name).write_bytes(bad.content)
        given = ["--algo", bad.algo, "--model", str(model), "--dataset", bad.name, "--max_length", "200"]
        code = cli.main(["data", "check", *given, *words])
        said = capsys.readouterr()
        return code, said.out + said.err

    return check


def test_there_are_more_than_a_hundred() -> None:
    assert len(EVERY) > 100 and {bad.name.partition(".")[2] for bad in EVERY.values()} >= {
        "json", "jsonl", "csv", "tsv", "parquet", "jsonl.gz",
    }  # fmt: skip


@pytest.mark.parametrize("case", EVERY)
def test_a_bad_file(case: str, check: Callable, model: Path, template: Template) -> None:
    """Both say each word, in one line without the advice for another fault."""
    bad = EVERY[case]
    code, said = check(bad)
    assert code == 2 and "Traceback" not in said
    assert all(word in said for word in bad.words), said
    assert "max_length = " not in said and "raised at" not in said, said
    with pytest.raises(ValueError) as caught:
        dataset.tokenized(config_of(model, bad.algo, bad.name), template, [bad.name])
    assert all(word in str(caught.value) for word in bad.words), caught.value


@pytest.mark.parametrize("case", LOST)
def test_what_can_be_read_and_is_of_no_use(case: str, check: Callable) -> None:
    _, said = check(LOST[case])
    assert all(word in said for word in LOST[case].words), said


def test_bad_rows_are_named_beside_rows_that_are_too_long(check: Callable) -> None:
    """Where no row is left, both causes are said."""
    bad = Bad("sft", "a.jsonl", LOST["too long"].content + b'{"prompt": 3, "completion": "c"}\n', ())
    code, said = check(bad)
    assert code == 2 and "1 longer than max_length; 1 more are bad, the first: a.jsonl:2: column 'prompt'" in said


def damaged(content: bytes, draw: random.Random) -> bytes:
    """A file's bytes with a few of them changed, lost, or said again."""
    found = bytearray(content)
    for _ in range(draw.choice([1, 2, 5])):
        at, how = draw.randrange(len(found) + 1), draw.random()
        if how < 0.5:
            found[at : at + 1] = bytes([draw.choice([draw.randrange(256), *b'{}[]",:\n\r\0\\'])])
        elif how < 0.7:
            del found[at : at + draw.randrange(20)]
        else:
            found[at:at] = found[draw.randrange(len(found) + 1) :][: draw.randrange(40)]
    return bytes(found)


def test_damaged_files_are_no_tracebacks(tmp_path: Path) -> None:
    """A file is read, or refused by a ValueError, with bad rows left out and without."""
    draw = random.Random(19)
    for bad in draw.choices(list(EVERY.values()), k=600):
        file = tmp_path / bad.name
        file.write_bytes(damaged(bad.content, draw))
        for skipped in (None, Skipped()):
            try:
                list(iter_rows([str(file)], "demonstrations", skipped=skipped))
            except ValueError as error:
                assert str(error)
        file.unlink()
