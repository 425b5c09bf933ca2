"""The words behind a verb: none, and options without their value."""

from __future__ import annotations

import pytest

from dsalign import cli

FOLDER = "expected one folder"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("chat", "chat: expected MODEL, got none"),
        ("eval", "eval: expected MODEL as the first word, got none"),
        ("merge", "merge: expected ADAPTER, got none"),
        ("export", "export: expected SOURCE, got none"),
        ("resume", f"resume: {FOLDER} of a run, got 0"),
        ("stop", f"stop: {FOLDER} of a run, got 0"),
        ("report", "report: expected the folder of a run, got none"),
        ("recipe", "recipe: expected one YAML file, got 0"),
        ("replay", f"replay: {FOLDER}, RUN/bad/step-N, and --model at most, got none"),
        ("data", "data: expected one of check, show, got none"),
        ("plan", "got none; give --algo NAME"),
    ],
)
def test_a_verb_without_words_says_what_it_wants(command: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 of all of them, so that a script whose variable is empty does not go on."""
    assert cli.main([command]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    ["bench --seconds", "chat run --seed", "check --gpus", "data show --n", "doctor --hostfile", "ls --json=2",
     "merge run --dtype", "plan --nodes", "replay --model", "report --output", "stop run --json=2"],
)  # fmt: skip
def test_an_option_without_its_value_is_no_fault(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command.split()) == 2
    said = capsys.readouterr().err
    assert "--help lists them, but argument --" in said and "Traceback" not in said


def test_a_misspelt_option_of_report_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "run", "--outptu", "x"]) == 2
    assert "got '--outptu'; did you mean --output?" in capsys.readouterr().err
