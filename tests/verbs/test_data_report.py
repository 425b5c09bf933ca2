"""What goes wrong with data and tokenizers, from the command line: found, named by file and line, and never silent."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import CHARACTERS, tiny_folder
from transformers import AutoTokenizer

from dsalign import cli
from dsalign.config.parse import parse
from dsalign.data.rows import text_files
from dsalign.verbs import data_report
from tests.verbs.test_lines import Terminal

GOOD = {"prompt": "Say it.", "chosen": "yes", "rejected": "no way"}
LABEL = {"prompt": "Say it.", "completion": "yes", "label": True}
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
ASKED_TWICE = [TALK[0], TALK[0], TALK[1]]
OTHER_ROLE = [TALK[0], {"role": "critic", "content": "b"}]
NO_CALL = [TALK[0], {"role": "assistant", "content": "", "tool_calls": [{"arguments": {}}]}]


def line(row: Any = None, **changes: Any) -> bytes:
    return json.dumps({**(GOOD if row is None else row), **changes}).encode() + b"\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("faults") / "model")


Check = Callable[..., tuple[int, str]]


@pytest.fixture
def check(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Check:
    """check(algo, content, ...) -> the exit code of `dsalign data check` and what it says."""
    monkeypatch.chdir(tmp_path)

    def check(algo: str, content: bytes, *words: str, name: str = "rows.jsonl", of: Path = model) -> tuple[int, str]:
        Path(name).write_bytes(content)
        code = cli.main(["data", "check", "--algo", algo, "--model", str(of), "--dataset", name, *words])
        said = capsys.readouterr()
        return code, said.out + said.err

    return check


BAD = {  # what the second of three lines is -> the rule; its algorithm
    "truncated": (b'{"prompt": "a", "chosen": "b\n', "expected JSON", "dpo"),
    "bad UTF-8": (b'{"prompt": "\xff", "chosen": "b", "rejected": "c"}\n', "expected UTF-8, got byte 0xff", "dpo"),
    "lone surrogate": (b'{"prompt": "\\ud83d", "chosen": "b", "rejected": "c"}\n', "half of a surrogate pair", "dpo"),
    "NUL": (line(chosen="a\0b"), "column 'chosen': expected text", "dpo"),
    "duplicate key": (b'{"prompt": "a", "prompt": "b"}\n', "expected each key once, got 'prompt' twice", "dpo"),
    "NaN": (b'{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}\n', "got NaN", "dpo"),
    "no object": (b"[1]\n", "expected a row as a JSON object", "dpo"),
    "missing key": (line({"prompt": "a", "chosen": "b"}), "expected the columns of a format for pairs", "dpo"),
    "null": (line(rejected=None), "(null: rejected)", "dpo"),
    "text label": (line({**LABEL, "label": "false"}), "'label': expected true or false, got 'false'", "kto"),
    "another prompt": (line(chosen=[TALK[0], TALK[1]]), "let it begin with the prompt", "dpo"),
    "roles out of order": (line({"messages": ASKED_TWICE}), "expected 'assistant', got 'user'; order turns", "sft"),
    "unknown role": (line({"messages": OTHER_ROLE}), "got 'critic'; rename the role", "sft"),
    "tools": (line({"messages": TALK, "tools": "hammer"}), "expected a list of functions as JSON text", "sft"),
    "call": (line({"messages": NO_CALL}), "expected a function with a name", "sft"),
    "system only": (line({"messages": [{"role": "system", "content": "s"}]}), "a conversation that ends with", "sft"),
}
FIRST = {"dpo": line(), "kto": line(LABEL), "sft": line({"messages": TALK})}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_row_is_named_and_an_error(fault: str, check: Check) -> None:
    """Exit code 2, the line and the rule; with on_bad_row skip it is counted, and the others are used."""
    bad, rule, algo = BAD[fault]
    code, said = check(algo, FIRST[algo] + bad + FIRST[algo])
    assert code == 2 and "3 rows, 2 kept" in said and "error: 1 bad rows: the first: rows.jsonl:2: " in said
    assert rule in said and len(next(x for x in said.splitlines() if "bad rows" in x)) < 900
    code, said = check(algo, FIRST[algo] + bad + FIRST[algo], "--on_bad_row", "skip")
    assert code == 0 and "warning: 1 bad rows: the first: rows.jsonl:2: " in said


def test_a_row_of_many_megabytes_is_cut_in_the_message(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "MAX_ROW_BYTES", 1000)
    code, said = check("dpo", line() + line(chosen="x" * 2000) + line())
    assert code == 2 and "rows.jsonl:2: expected a line of at most 1000 bytes" in said and "x" * 300 not in said


GOOD_FILES = {
    "blank lines": line() + b"\n  \n" + line(),
    "BOM and CRLF": b"\xef\xbb\xbf" + line().replace(b"\n", b"\r\n") * 2,
    "no last line end": line() + line().rstrip(),
    "an array": b"[" + line() + b"," + line() + b"]",
    "emoji, right to left, zero width": line(prompt="\U0001f469\u200d\U0001f4bb \u05d0\u05d1\u200f\u200b") * 2,
    "extra keys": line(id=1, source="s") * 2,
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_what_looks_odd_and_is_right_is_read(name: str, check: Check) -> None:
    code, said = check("dpo", GOOD_FILES[name])
    assert code == 0 and "2 rows, 2 kept" in said and "bad rows" not in said


def test_an_empty_file_is_refused(check: Check) -> None:
    code, said = check("dpo", b"")
    assert code == 2 and "rows.jsonl: expected at least one row, got an empty file" in said


def test_identical_pairs_and_duplicates_are_said(check: Check) -> None:
    code, said = check("dpo", line() + line(chosen="no way") + line())
    assert code == 0
    assert "warning: 1 identical pairs (rows.jsonl:2)" in said and "warning: 1 duplicates (rows.jsonl:3)" in said


LONG = line(prompt="long " * 20)


def test_more_than_half_of_the_rows_lost_is_an_error(check: Check) -> None:
    """Two of three dropped: an error here, and at the start of a run; half of them is a matter of taste."""
    code, said = check("dpo", LONG + line() + LONG, "--max_length", "60")
    assert code == 2 and "3 rows, 1 kept, 2 dropped (longer than max_length), 0 truncated" in said
    assert "error: 2 rows not used: more than half of 3: raise --max_length" in said
    code, said = check("dpo", LONG + line() + LONG, "--max_length", "60", "--on_bad_row", "skip")
    assert code == 0 and "warning: 2 rows not used" in said
    code, said = check("dpo", LONG + line(), "--max_length", "60")
    assert code == 0 and "not used" not in said


@pytest.mark.parametrize(
    ("how", "said_of_it"), [("delete", "1 dropped (longer than max_length), 0 truncated"), ("left", "1 truncated")]
)
def test_a_prompt_longer_than_max_length(how: str, said_of_it: str, check: Check) -> None:
    _, said = check("dpo", line() * 2 + LONG, "--max_length", "60", "--truncation_strategy", how)
    assert said_of_it in said.splitlines()[0]


def test_answers_cut_to_the_same_tokens_and_without_an_end(check: Check) -> None:
    """Both begin with ninety a: cut there, they are one answer, and neither ends."""
    alike = line(chosen="a" * 90 + "b", rejected="a" * 90 + "c")
    code, said = check("dpo", line() * 2 + alike, "--max_length", "80", "--truncation_strategy", "right")
    assert code == 0 and "3 kept, 1 truncated" in said
    assert "warning: 1 rows without end token (rows.jsonl:3)" in said
    assert "warning: 1 identical pairs (rows.jsonl:3)" in said


def variant(model: Path, folder: Path, **changes: Any) -> Path:
    """The tiny model with another tokenizer: special tokens changed, or tokens added."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    added = changes.pop("added", [])
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(folder)
    return folder


def test_a_base_model_without_a_template_says_what_it_is_given(check: Check, caplog: pytest.LogCaptureFixture) -> None:
    check("dpo", line() * 2)
    assert "the tokenizer has no chat template: conversations are written as ChatML" in caplog.text


def test_no_pad_token_is_needed_and_a_missing_end_is_refused(check: Check, model: Path, tmp_path: Path) -> None:
    code, _ = check("dpo", line() * 2, of=variant(model, tmp_path / "no-pad", pad_token=None))
    assert code == 0
    folder = variant(model, tmp_path / "no-eos", eos_token=None)
    (folder / "generation_config.json").unlink()
    code, said = check("dpo", line() * 2, "--template", "plain", of=folder)
    assert code == 2 and "tokenizer: expected an end token, got none" in said


def test_where_pad_is_eos_the_end_is_still_learnt(check: Check, model: Path, tmp_path: Path) -> None:
    folder = variant(model, tmp_path / "same", pad_token="<|im_end|>")
    code, said = check("dpo", line() * 2, of=folder)
    assert code == 0 and "without end token" not in said
    assert (
        json.loads(check("dpo", line(), "--json", of=folder)[1].splitlines()[-1])["lengths"]["completion"]["largest"]
        == 7
    )


def test_a_bos_written_twice_is_an_error(check: Check, model: Path, tmp_path: Path) -> None:
    folder = variant(model, tmp_path / "bos", bos_token="<|im_start|>")
    (tmp_path / "twice.jinja").write_text(
        "{{ bos_token + bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    )
    code, said = check("dpo", line() * 2, "--template", str(tmp_path / "twice.jinja"), of=folder)
    assert code == 2 and "error: 2 prompts with two BOS (rows.jsonl:1, rows.jsonl:2)" in said


def test_an_added_token_beyond_the_embedding_is_refused_where_a_row_has_it(
    check: Check, model: Path, tmp_path: Path
) -> None:
    """The vocabulary of the model is the tokenizer's before: the new token's id is the first that it lacks."""
    folder, beyond = variant(model, tmp_path / "added", added=["<new>"]), 4 + len(CHARACTERS)
    assert check("dpo", line() * 2, of=folder)[0] == 0
    code, said = check("dpo", line() + line(chosen="a<new>"), "--special_tokens_in_text", "true", of=folder)
    assert (
        code == 2 and f"rows.jsonl:2: expected token ids below {beyond}, the model's vocabulary, got {beyond}" in said
    )
    wide = variant(tiny_folder(tmp_path / "wide", vocab_size=128), tmp_path / "padded", added=["<new>"])
    assert check("dpo", line() + line(chosen="a<new>"), "--special_tokens_in_text", "true", of=wide)[0] == 0, (
        "an embedding padded to 64 has room"
    )


def test_the_true_cause_where_no_row_can_be_used(check: Check) -> None:
    """It names the first row and what is wrong with it, not max_length; a misspelt --columns is named itself."""
    pair = {"prompt": "q", "choosen": "a", "rejected": "b"}
    code, said = check("dpo", line(pair))
    assert code == 2 and "1 bad of 1, the first: rows.jsonl:1: expected the columns" in said
    assert "--columns choosen=chosen" in said and "max_length" not in said
    code, said = check("dpo", line(pair), "--columns", "chossen=chosen")
    assert code == 2 and "columns: expected names that some row of" in said and "got chossen" in said


def test_columns_that_nothing_reads_and_control_characters(check: Check) -> None:
    row = json.loads(line()) | {"score": 1, "\x1b]0;": 2}
    code, said = check("dpo", line(row))
    assert code == 0 and "not read: " in said and "score (1 rows)" in said and "\x1b" not in said


def test_a_reader_that_has_seen_enough_is_no_fault(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`dsalign data show | head -1`: exit code 0 as of all commands, where rich would end the process with 1."""

    class Closed:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        flush = isatty = fileno = lambda self: False
        encoding = "utf-8"

    with monkeypatch.context() as patched, pytest.raises(BrokenPipeError):
        patched.chdir(model)
        config = parse(["--algo", "dpo", "--model", str(model), "--dataset", "demo:pairs"], world_size=1).config
        data_report.show(config, count=1, as_json=False, ids=False, out=Closed())  # type: ignore[arg-type]


def test_without_colours_a_terminal_has_brackets(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NO_COLOR: what is learnt from would else look as what is not."""
    config = parse(["--algo", "dpo", "--model", str(model), "--dataset", "demo:pairs"], world_size=1).config
    monkeypatch.setenv("TERM", "xterm-256color")
    shown = {}
    for no_colour in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_colour)
        data_report.show(config, count=1, as_json=False, ids=False, out=(out := Terminal()))
        shown[no_colour] = out.getvalue()
    assert "[At sea level" in shown["1"] and "[At sea level" not in shown[""]
