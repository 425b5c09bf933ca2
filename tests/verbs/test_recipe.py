"""`dsalign recipe`: its stages as commands, by --dry_run, and with a program in the place of dsalign."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dsalign import cli
from dsalign.config.parse import ConfigError, parse
from dsalign.verbs import recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
output_dir: out
model: m
tuner: full
stages:
  - {name: sft, algo: sft, dataset: [demo:demonstrations], learning_rate: 1e-4}
  - {name: rm, algo: rm, model: "@sft", tuner: lora, columns: {theirs: margin}}
  - {name: ppo, algo: ppo, model: "@sft/checkpoint-10", reward_model: "@rm", reward_weights: [2], deepspeed: null}
"""
# What stands for dsalign: it writes down its words; a stage named in the file `fails` ends with that code.
PROGRAM = """
import pathlib, sys, time
words = sys.argv[1:]
folder = pathlib.Path(words[words.index("--output_dir") + 1])
with open("calls", "a") as file: file.write(folder.name + "\\n")
fails = dict(line.split() for line in open("fails")) if pathlib.Path("fails").exists() else {}
if folder.name in fails:
    sys.exit(int(fails[folder.name]))
(folder / "final").mkdir(parents=True)
(folder / "final" / "config.json").write_text("{}")
"""


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe, whose stages run PROGRAM."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setattr(recipe, "CLI", (sys.executable, str(tmp_path / "program.py")))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(*argv: str) -> list[list[str]]:
    """The words of each stage."""
    request = recipe.read(["recipe.yaml", *argv])
    assert request is not None
    return [list(stage.words) for stage in request.stages]


def calls(desk: Path) -> list[str]:
    return (desk / "calls").read_text().split() if (desk / "calls").exists() else []


def test_stages_are_commands_of_dsalign(desk: Path) -> None:
    """Options of the file hold where a stage has none; @ is an earlier stage's folder; null takes an option out."""
    sft, rm, ppo = (" ".join(each) for each in words())
    assert sft == (
        "--model m --tuner full --algo sft --dataset demo:demonstrations --learning_rate 1e-4 "
        "--output_dir out/sft --resume auto"
    )
    assert (
        rm == "--model out/sft/final --tuner lora --algo rm --columns theirs=margin --output_dir out/rm --resume auto"
    )
    assert ppo == (
        "--model out/sft/checkpoint-10 --tuner full --algo ppo --reward_model out/rm/final --reward_weights 2 "
        "--output_dir out/ppo --resume auto"
    )


def test_flags_win_over_the_file(desk: Path) -> None:
    """A flag is an option of the file's top, so a stage's own stays; --STAGE.name is the stage's."""
    sft, rm, ppo = words("--model", "other", "--tuner", "lora", "--ppo.kl_coef", "0.1", "--output_dir", "there")
    assert sft[:4] == ["--model", "other", "--tuner", "lora"] and "--kl_coef" not in sft + rm
    assert rm[:2] == ["--model", "there/sft/final"]
    assert ppo[ppo.index("--kl_coef") + 1] == "0.1" and ppo[ppo.index("--output_dir") + 1] == "there/ppo"


def test_dry_run_prints_and_starts_nothing(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", "recipe.yaml", "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [shlex.split(line)[0] for line in lines] == ["dsalign"] * 3
    assert [shlex.split(line)[1:] for line in lines] == words()
    assert not calls(desk) and not (desk / "out").exists()


def test_it_stops_with_the_code_of_a_stage_and_goes_on_there(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stage that is done is skipped; 75 is a stage that was stopped and saved."""
    (desk / "fails").write_text("rm 75\n")
    assert cli.main(["recipe", "recipe.yaml"]) == 75
    assert calls(desk) == ["sft", "rm"]
    said = capsys.readouterr().err
    assert "stage 2 of 3, rm: stopped and saved, exit code 75" in said and "dsalign recipe recipe.yaml" in said
    (desk / "fails").write_text("ppo 3\n")
    assert cli.main(["recipe", "recipe.yaml"]) == 3
    assert calls(desk) == ["sft", "rm", "rm", "ppo"]
    assert "stage 1 of 3, sft: done" in capsys.readouterr().out
    (desk / "fails").unlink()
    assert cli.main(["recipe", "recipe.yaml"]) == 0
    assert calls(desk)[4:] == ["ppo"]
    assert cli.main(["recipe", "recipe.yaml"]) == 0 and calls(desk)[5:] == []


def test_a_stage_that_was_killed(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """128 and the signal's number, as a shell has it."""
    (desk / "program.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert cli.main(["recipe", "recipe.yaml"]) == 128 + signal.SIGKILL
    assert "stage 1 of 3, sft: failed, exit code 137" in capsys.readouterr().err


def test_a_stage_that_is_done_with_other_options(desk: Path) -> None:
    """It is not passed over in silence; the same options and new later stages are."""
    folder = desk / "out" / "sft"
    (folder / "final").mkdir(parents=True)
    (folder / "final" / "config.json").write_text("{}")
    parse(words()[0], world_size=1).config.to_yaml(folder / "config.yaml")
    assert len(words()) == 3
    with pytest.raises(ConfigError) as caught:
        words("--sft.learning_rate", "2e-4")
    assert caught.value.problems == [
        "stage sft: it is done with learning_rate 0.0001, got 0.0002; name another output_dir, or move out/sft away "
        "to train it again"
    ]


def test_problems_of_all_stages_come_at_once(desk: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        words("--sft.learning_rate", "-1", "--ppo.kl_coeff", "1")
    first, second = caught.value.problems
    assert first.startswith("stage sft: --learning_rate: expected greater than 0, got '-1'")
    assert second.endswith("got 'kl_coeff'; did you mean kl_coef?")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stages: []", "recipe.yaml: expected a list called stages; see dsalign recipe --help"),
        ("- a", "expected a list called stages"),
        ("stages: [{name: a, model: @b}]", "expected YAML, got a syntax error .* put quotes around"),
        ("stages: [{algo: sft}]", r"stages\[0\]: expected a name of its own in small letters, got None"),
        ("stages: [{name: a, algo: sft}, {name: a, algo: sft}]", r"stages\[1\]: expected a name of its own"),
        ("stages: [{name: ../a, algo: sft}]", "expected a name of its own in small letters, got '../a'"),
        ('stages: [{name: a, model: "@b"}]', r"a: model: expected @ and an earlier stage \(there is none\), got '@b'"),
        ('stages: [{name: a}, {name: b, model: "@b"}]', r"expected @ and an earlier stage \(a\), got '@b'"),
    ],
)
def test_files_that_are_no_recipe(text: str, says: str, desk: Path) -> None:
    (desk / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=says):
        words()


def test_commands_that_are_none(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected one YAML file, got 2; write dsalign recipe FILE"):
        recipe.read(["a.yaml", "b.yaml"])
    with pytest.raises(ValueError, match=r"expected a YAML file that can be read, got 'a.yaml' \(No such file"):
        recipe.read(["a.yaml"])
    with pytest.raises(ValueError, match=r"^--dpo.beta: expected a stage of sft, rm, ppo in front of the point"):
        words("--dpo.beta", "1")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="expected to be started once, not as a task of a launcher"):
        words()


def test_a_stage_finds_dsalign_in_any_folder(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a checkout that is on this process's path and on no environment's, as launch/train.py puts it there."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(recipe, "CLI", (sys.executable, "-m", "dsalign.cli"))
    request = recipe.read(["recipe.yaml"])
    assert request is not None
    asked = replace(request.stages[0], words=("--version",))
    assert recipe.run(replace(request, stages=(asked,))) == 0


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe.read(["-h"]) is None and cli.main(["recipe", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: dsalign recipe FILE.yaml")


@pytest.mark.slow
def test_a_signal_reaches_the_stage(desk: Path) -> None:
    """The recipe waits for the stage, which takes the time that a save needs, and ends with its code."""
    waits = "import pathlib, signal, sys, time\n"
    waits += "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), sys.exit(75)))\n"
    waits += "pathlib.Path('ready').touch()\ntime.sleep(60)\n"
    (desk / "program.py").write_text(waits)
    code = (
        f"import sys; from dsalign.verbs import recipe; recipe.CLI = (sys.executable, {str(desk / 'program.py')!r})\n"
    )
    code += "sys.exit(recipe.run(recipe.read(['recipe.yaml'])))"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True) as running:
        until = time.monotonic() + 120
        while not (desk / "ready").exists() and time.monotonic() < until and running.poll() is None:
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        said = running.communicate(timeout=60)[1]
    assert running.returncode == 75, said
    assert re.search(r"sft: stopped and saved, exit code 75; go on with\ndsalign recipe recipe.yaml", said)


def test_the_recipe_that_comes_along(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT, a reward model and PPO: each reads what the one before wrote."""
    monkeypatch.chdir(ROOT)
    assert cli.main(["recipe", "configs/recipe.yaml", "--dry_run", "--output_dir", "new"]) == 0
    sft, rm, ppo = capsys.readouterr().out.splitlines()
    assert "--algo sft" in sft and "--output_dir new/sft" in sft
    assert "--algo rm" in rm and "--model new/sft/final" in rm
    assert "--algo ppo" in ppo and "--model new/sft/final" in ppo and "--reward_model new/rm/final" in ppo
