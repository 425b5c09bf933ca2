"""`dsalign data`: what it prints and how it exits, on a tiny tokenizer and rows made here."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import tiny_folder

from dsalign import cli
from dsalign.config.parse import parse
from dsalign.verbs import data, data_report

PAIRS = [
    {"prompt": "What is one and one?", "chosen": "two", "rejected": "three"},
    {"prompt": "Say yes.", "chosen": "yes", "rejected": "yes"},
]


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """The options of a run over two pairs, of which one is identical."""
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return ["--algo", "dpo", "--model", str(tiny_folder(tmp_path / "model")), "--dataset", str(rows)]


def run(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main(["data", *argv])
    return code, capsys.readouterr().out


def test_check_counts_and_names_rows(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(["check", *words], capsys)
    assert code == 0, "a warning is no error"
    assert out.startswith(f"{words[-1]}: 2 rows, 2 kept, 0 truncated\nprompt tokens: p50 ")
    assert f"warning: 1 identical pairs ({words[-1]}:2): chosen and rejected are the same" in out


def test_check_as_json_is_one_object(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """One token a character: the longest answer is three and its end."""
    code, out = run(["check", *words, "--json"], capsys)
    found = json.loads(out)
    assert code == 0 and sorted(found) == ["dropped", "findings", "kept", "lengths", "notes", "rows", "truncated"]
    assert (found["rows"], found["kept"], found["dropped"]) == (2, 2, {})
    assert found["lengths"]["completion"]["largest"] == len("three") + 1
    assert [f["rule"] for f in found["findings"]] == ["identical pairs"]


def test_bad_rows_are_an_error_unless_they_may_be_left_out(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line that is no JSON and one without an answer: exit code 2, both counted, the first shown."""
    path = Path(words[-1])
    path.write_text(path.read_text() + '{"prompt": \n{"prompt": "a", "chosen": "b"}\n')
    code, out = run(["check", *words], capsys)
    assert code == 2 and "4 rows, 2 kept" in out
    assert f"error: 2 bad rows: the first: {path}:3: expected JSON" in out
    code, out = run(["check", *words, "--on_bad_row", "skip"], capsys)
    assert code == 0 and "warning: 2 bad rows" in out


def test_what_would_be_dropped_or_cut(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(["check", *words, "--max_length", "40"], capsys)
    assert "2 rows, 1 kept, 1 dropped (longer than max_length), 0 truncated" in out
    code, out = run(["check", *words, "--max_length", "40", "--truncation_strategy", "left"], capsys)
    assert "2 rows, 2 kept, 1 truncated" in out and code == 0


def test_kto_says_the_balance_of_labels(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completion": c, "label": c == "yes"} for c in ("yes", "no", "never")]
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, out = run(["check", "--algo", "kto", *words[2:-1], str(tmp_path / "labels.jsonl")], capsys)
    assert "kto: 1 desirable and 2 undesirable rows" in out and "--desirable_weight between 2 and 2.67" in out


def shown(words: list[str], **more: Any) -> str:
    out = io.StringIO()
    settings = {"count": 3, "as_json": False, "ids": False, **more}
    data_report.show(parse(words, world_size=1).config, out=out, **settings)
    return out.getvalue()


def test_show_marks_what_is_learnt_from(words: list[str]) -> None:
    """Without colours in brackets, the end token too; both answers beside each other; ids where asked for."""
    text = shown(words, count=1)
    assert "pairs.jsonl:1:" in text.replace("\n", "") and "What is one and one?" in text
    assert "[two<|im_end|>]" in text and "[three<|im_end|>]" in text
    assert "chosen" in text and "rejected" in text and "Say yes." not in text
    (first,) = json.loads(shown(words, count=1, as_json=True))
    ids = " ".join(map(str, first["completions"][0]["ids"]))
    assert ids in shown(words, count=1, ids=True)


def test_show_leaves_other_turns_unmarked(words: list[str], tmp_path: Path) -> None:
    """Of a demonstration learnt turn by turn the question in the middle is not in brackets."""
    turns = [{"role": r, "content": c} for r, c in zip(("user", "assistant") * 2, "qapc", strict=True)]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    command = ["--algo", "sft", *words[2:-1], str(tmp_path / "talk.jsonl"), "--assistant_turns", "all"]
    text = shown(command).replace("\n", "")
    assert "[a<|im_end|>]" in text and "[c<|im_end|>]" in text and "[p" not in text
    (group,) = json.loads(shown(command, as_json=True))
    (completion,) = group["completions"]
    assert sum(completion["mask"]) == 4 < len(completion["mask"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["chek"], "data: expected one of check, show, got 'chek'; did you mean check?"),
        (["merge"], "data: expected one of check, show, got 'merge'; see dsalign data --help"),
        (["show", "--n", "0"], "--n: expected a whole number >= 1, got '0'; write --n 3"),
    ],
)
def test_wrong_words(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", *argv]) == 2
    assert message in capsys.readouterr().err


def test_wrong_options_are_those_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "check", "--algo", "dpo", "--bta", "1"]) == 2
    assert "--bta: expected a known option, got 'bta'; did you mean beta?" in capsys.readouterr().err


def test_help_needs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["data", "--help"]) == cli.main(["data", "check", "-h"]) == 0
    assert capsys.readouterr().out == (data.USAGE + "\n") * 2


def python(argv: list[str], module: str) -> tuple[bool, str]:
    """(whether `dsalign data ARGV` in a new process imports the module, what it says on standard error)."""
    code = f"import sys; from dsalign import cli; cli.main(['data', *{argv!r}]); print({module!r} in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[-1] == "True", done.stderr


def test_a_wrong_word_is_said_before_torch_is_imported() -> None:
    imported, said = python(["check", "--algo", "nope"], "torch._C")
    assert not imported and "got 'nope'" in said


def test_a_check_needs_no_deepspeed(words: list[str]) -> None:
    imported, _ = python(["check", *words], "deepspeed")
    assert not imported


def test_rows_to_evaluate_on_are_checked_too(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A report of their own behind the other; an error of theirs is an error."""
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps(PAIRS[0]) + "\n")
    more = ["--val_dataset", str(held), "--eval_steps", "5"]
    code, out = run(["check", *words, *more], capsys)
    assert code == 0 and f"{words[-1]}: 2 rows, 2 kept" in out and f"{held}: 1 rows, 1 kept" in out
    assert json.loads(run(["check", *words, *more, "--json"], capsys)[1])["val_dataset"]["rows"] == 1
    held.write_text(held.read_text() + '{"prompt": 3}\n')
    code, out = run(["check", *words, *more], capsys)
    assert code == 2 and f"error: 1 bad rows: the first: {held}:2: expected the columns of a format" in out
