"""The command as users meet it: exit codes, what is printed where, and that a mistake does not cost torch's import."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dsalign import __version__, cli, endings, launcher
from dsalign.checkpoint import fingerprint, folder_lock
from dsalign.config import parse, reach_hub
from dsalign.config.schema import RunConfig
from dsalign.ranks import Process

TRAIN = Path(__file__).parents[1] / "launch" / "train.py"
BASE = ("--algo", "sft", "--model", "m", "--dataset", "rows")
LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NPROC_PER_NODE", "NNODES")
SEEN: dict[str, str] = {}
# runs the script of argv as `python SCRIPT ...` would, then reports on stderr
WATCH = """
import json, runpy, sys, time
start = time.perf_counter()
sys.argv = sys.argv[1:]
code = None
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as stop:
    code = stop.code
took = time.perf_counter() - start
print(json.dumps({"code": code, "s": took, "torch": "torch._C" in sys.modules}), file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No launcher and no GPU, a hub that answers, a folder of its own; what a run sets is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reach_hub, "unreachable", lambda: None)
    monkeypatch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name not in LAUNCHED})
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    monkeypatch.setattr(sys, "argv", ["launch/train.py"])


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[RunConfig, Process, str]]:
    """What `run.train` was called with, in place of training; the environment then is in SEEN."""
    return replace_train(monkeypatch, lambda: SEEN.update(os.environ))


def replace_train(monkeypatch: pytest.MonkeyPatch, then: Callable[[], Any]) -> list[tuple[RunConfig, Process, str]]:
    calls: list[tuple[RunConfig, Process, str]] = []

    def train(config: RunConfig, process: Process, command: str, origins: Mapping[str, str]) -> None:
        calls.append((config, process, command))
        then()

    fake = types.ModuleType("dsalign.verbs.train")
    fake.train = train  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dsalign.verbs.train", fake)
    return calls


def watched(folder: Path, *argv: str, **env: str) -> tuple[dict[str, Any], str, str]:
    """Runs launch/train.py uninstalled in another folder: the report, stdout and the rest of stderr."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", WATCH, str(TRAIN), *argv],
        capture_output=True, text=True, cwd=folder, env={**os.environ, **env}, check=True,
    )  # fmt: skip
    *said, report = done.stderr.splitlines()
    return json.loads(report), done.stdout, "\n".join(said)


def test_a_typo_exits_2_before_torch_is_imported(tmp_path: Path) -> None:
    report, out, said = watched(tmp_path, *BASE, "--learning_rat", "1", "--ref_model", "x")
    assert (report["code"], report["torch"], out) == (2, False, "")
    assert report["s"] < 1.0
    assert said.splitlines() == [
        "dsalign: error: 2 problem(s)",
        "  --learning_rat: expected a known option, got 'learning_rat'; did you mean learning_rate?",
        "  --ref_model: expected an algorithm with a frozen reference model, one of dpo, grpo, kto, online_dpo, ppo, "
        "reinforce, rloo, got sft; remove it or change --algo",
    ]


def test_print_config_and_help_do_without_torch(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("algo: dpo\nmodel: m\n\nbeta: 0.3\n")
    report, out, said = watched(tmp_path, "--config", "run.yaml", "--dataset", "rows", "--print_config")
    assert (report["code"], report["torch"], said) == (0, False, "")
    shown = dict(line.split("  # ") for line in out.splitlines())
    assert {key.strip(): origin for key, origin in shown.items()}["beta: 0.3"] == "run.yaml:4"
    report, out, said = watched(tmp_path, "rlhf", "--rlhf_type", "dpo", "--help")
    assert (report["code"], report["torch"], said) == (0, False, "")
    assert "--rpo_alpha" in out and "usage: dsalign" in out


def run_of_two(folder: Path) -> Path:
    """The folder of a run of two ranks, eight rows a step, with checkpoint-4."""
    config = parse.parse([*BASE, "--batch_size", "2", "--output_dir", str(folder), "--seed", "3"], world_size=2).config
    checkpoint = folder / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    config.to_yaml(folder / "config.yaml")
    kept = {"options": fingerprint.options(config), "global_batch": config.global_batch(2)}
    (checkpoint / "trainer.json").write_text(json.dumps({"progress": {"step": 4}, "fingerprint": kept}))
    return folder


def test_a_resume_that_cannot_be_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    out = run_of_two(tmp_path / "out")
    for words in (("resume", str(out), "--seed", "4"), (*BASE, "--resume", "auto", "--output_dir", str(out))):
        report, _, said = watched(tmp_path, *words, "--batch_size", "2")
        assert (report["code"], report["torch"]) == (2, False)
        assert "--seed was 3, is 4" in said or "--seed was 3, is 42" in said
        assert f"start a new run from its model with --model {out}/checkpoint-4 and another --output_dir" in said


def test_resume_is_a_training_on_any_ranks(trained: list[tuple[RunConfig, Process, str]], tmp_path: Path) -> None:
    """Behind the words of a launcher, and alone: 16 rows a step are 2 x 4 on two ranks and 2 x 8 on one."""
    out = run_of_two(tmp_path / "out")
    assert cli.main(["resume", str(out), "--lr", "0.5"]) == 0
    os.environ.update(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="10.0.0.1", MASTER_PORT="77")
    assert cli.main(["--local_rank=1", "resume", str(out)]) == 0
    (one, _, command), (two, process, _) = trained
    assert (one.optim.learning_rate, one.optim.gradient_accumulation_steps, one.seed) == (0.5, 8, 3)
    assert (two.optim.gradient_accumulation_steps, two.output.resume, process.world_size) == (4, "auto", 2)
    assert shlex.split(command)[1:] == ["resume", str(out), "--lr", "0.5"]


def test_commands_are_listed_and_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    assert "\n  resume          go on with a run" in capsys.readouterr().out
    assert cli.main(["resume", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: dsalign resume RUN")
    assert cli.main(["resum", "out"]) == 2
    assert capsys.readouterr().err.endswith("got 'resum'; did you mean resume?\n")


def test_one_rank_a_machine_speaks_of_the_configuration(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli.tempfile, "gettempdir", lambda: str(tmp_path))
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="2")
    assert cli.main(["--algo", "sftt"]) == 2
    assert capsys.readouterr().err.startswith("dsalign: error: 1 problem(s)\n  --algo: ")
    os.environ.update(RANK="1", LOCAL_RANK="1")
    assert cli.main(["--algo", "sftt"]) == 2  # rank 0 has said it
    assert cli.main([*BASE, "--print_config"]) == 0
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(cli, "WAIT_S", 0.0)
    assert cli.main(["--algo", "sftt", "--seed", "x"]) == 2  # and this only rank 1 has found
    assert capsys.readouterr().err.startswith(f"dsalign: rank 1 on {socket.gethostname()}: error: 2 problem(s)\n  ")
    os.environ.update(RANK="0", LOCAL_RANK="0")
    assert cli.main([*BASE, "--print_config"]) == 0
    assert "gradient_accumulation_steps: 8  " in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"dsalign {__version__}\n"


def test_a_run_alone(trained: list[tuple[RunConfig, Process, str]]) -> None:
    assert cli.main(["sft", "--model", "m", "--dataset", "rows", "--system", "be kind"]) == 0
    ((config, process, command),) = trained
    assert (config.algo, config.data.system, process) == ("sft", "be kind", Process(rank=0, local_rank=0, world_size=1))
    assert shlex.split(command)[1:] == ["sft", "--model", "m", "--dataset", "rows", "--system", "be kind"]
    assert {name: SEEN[name] for name in LAUNCHED[:4]} == {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip
    assert int(SEEN["MASTER_PORT"]) > 0
    assert not set(LAUNCHED) & set(os.environ)  # a second run in this process starts as the first


def test_a_rank_of_a_launcher(trained: list[tuple[RunConfig, Process, str]]) -> None:
    os.environ.update(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4", MASTER_ADDR="10.0.0.1", MASTER_PORT="77")
    assert cli.main(["--local_rank=1", *BASE]) == 0
    ((config, process, command),) = trained
    assert (process, config.optim.gradient_accumulation_steps) == (Process(rank=3, local_rank=1, world_size=4), 4)
    assert command.startswith("launch/train.py --local_rank=1 --algo sft")
    assert (SEEN["MASTER_ADDR"], SEEN["MASTER_PORT"]) == ("10.0.0.1", "77")


def test_a_task_of_slurm_is_a_rank(trained: list[tuple[RunConfig, Process, str]]) -> None:
    """Two tasks of srun train together: 16 rows a step are 8 of each."""
    os.environ.update(
        SLURM_STEP_ID="0", SLURM_PROCID="1", SLURM_LOCALID="0", SLURM_STEP_NUM_TASKS="2", SLURM_NODEID="1"
    )
    os.environ.update(SLURM_STEP_TASKS_PER_NODE="1(x2)", SLURM_STEP_NODELIST="gpu[3-4]", SLURM_JOB_ID="7")
    assert cli.main(BASE) == 0
    ((config, process, _),) = trained
    assert (process, config.optim.gradient_accumulation_steps) == (Process(1, 0, 2, 1), 8)
    assert (SEEN["RANK"], SEEN["MASTER_ADDR"]) == ("1", "gpu3")
    assert not set(LAUNCHED) & set(os.environ)


def test_a_second_run_in_one_folder_is_refused(
    trained: list[tuple[RunConfig, Process, str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """As two tasks of an unknown launcher would be; the folder is left as it was."""
    with folder_lock.held(tmp_path / "out"):
        assert cli.main([*BASE, "--output_dir", "out"]) == 2
        assert f"another run, pid {os.getpid()} on {socket.gethostname()} since" in capsys.readouterr().err
    assert cli.main([*BASE, "--output_dir", "out"]) == 0
    assert len(trained) == 1 and not (tmp_path / "out").exists()


def test_a_taken_port_is_replaced_where_we_choose_it(
    trained: list[tuple[RunConfig, Process, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        os.environ["MASTER_PORT"] = str(port)
        assert cli.main(BASE) == 0
    assert (
        capsys.readouterr().err
        == f"dsalign: MASTER_PORT {port} is taken, as by another run: {SEEN['MASTER_PORT']} is used\n"
    )
    assert SEEN["MASTER_PORT"] != str(port) == os.environ["MASTER_PORT"]


def test_a_reward_file_that_cannot_be_imported_is_told_before_torch(tmp_path: Path) -> None:
    (tmp_path / "r.py").write_text("import gone\ndef f(completions): ...\n")
    words = ("--algo", "ppo", "--model", "m", "--dataset", "rows", "--reward_funcs", "r.py:f")
    report, _, said = watched(tmp_path, *words)
    assert (report["code"], report["torch"]) == (2, False)
    assert said.startswith("dsalign: error: reward_funcs: r.py: importing it, it raised ModuleNotFoundError: No module")


def test_several_processes_are_started_in_place_of_this_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Gone(BaseException):
        """execv does not return."""

    started: list[tuple[str, ...]] = []

    def execve(program: str, argv: tuple[str, ...], env: dict[str, str]) -> None:
        started.append((program, *argv))
        raise Gone

    monkeypatch.setattr(os, "execve", execve)
    monkeypatch.setattr(launcher, "_gpus", lambda: 2)
    os.environ.update(CUDA_VISIBLE_DEVICES="0,1", MASTER_PORT="7777")
    with pytest.raises(Gone):
        cli.main([*BASE, "--gradient_accumulation_steps", "4"])
    ((program, *argv),) = started
    assert (program, argv[:3]) == (sys.executable, [sys.executable, "-m", "dsalign.engines.elastic"])
    assert argv[3:9] == ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", "7777"]
    assert argv[-2:] == ["--gradient_accumulation_steps=2", "--deepspeed=zero3"]
    assert capsys.readouterr().err.startswith("dsalign: 2 GPUs for 1 process(es): one rank a GPU")


def test_print_config_shows_what_the_ranks_will_see(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_gpus", lambda: 2)
    os.environ["CUDA_VISIBLE_DEVICES"] = "0,1"
    assert cli.main([*BASE, "--gradient_accumulation_steps", "4", "--print_config"]) == 0
    out = capsys.readouterr().out
    assert "deepspeed: zero3  " in out and "gradient_accumulation_steps: 2  " in out


def test_an_environment_that_cannot_work_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    os.environ["NNODES"] = "2"
    assert cli.main(BASE) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dsalign: error: NNODES: expected 1 without a launcher, got 2; ")


def test_a_value_error_of_a_run_is_one_block(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ValueError("rows.jsonl:3: chosen: expected text, got nothing")

    replace_train(monkeypatch, fail)
    os.environ.update(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2")
    assert cli.main(BASE) == 2
    error, place = capsys.readouterr().err.splitlines()
    assert error == "dsalign: error: rank 1: rows.jsonl:3: chosen: expected text, got nothing"
    assert place.startswith("  raised at ") and place.endswith(" in fail")


def test_an_error_of_dsalign_itself_needs_no_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_train(monkeypatch, lambda: launcher.process({}))
    assert cli.main(BASE) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dsalign: error: RANK: expected a whole number >= 0 in the environment, got nothing")


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, MemoryError, OSError])
def test_other_errors_keep_their_traceback_and_exit_3(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Faults of the program or of a library, as endings.py has them; Python alone would exit with 1."""

    def fail() -> None:
        raise kind("a fault")

    replace_train(monkeypatch, fail)
    assert cli.main(BASE) == 3
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):") and "a fault" in said.splitlines()[-1]


def test_an_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    replace_train(monkeypatch, interrupt)
    assert cli.main(BASE) == 130


@pytest.mark.parametrize("kind", [endings.Stopped, endings.Diverged, endings.PeerLost])
def test_an_ending_is_said_and_has_its_exit_code(
    kind: type[endings.Ending], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line is a command that can be pasted."""

    def end() -> None:
        raise kind("stopped by SIGTERM at step 3; resume with\ndsalign --algo sft --resume")

    replace_train(monkeypatch, end)
    assert cli.main(BASE) == kind.code
    assert capsys.readouterr().err == (
        "dsalign: stopped by SIGTERM at step 3; resume with\n  dsalign --algo sft --resume\n"
    )


def test_ranks_that_end_alike_say_it_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """And one that ends because another did is silent, with the other's exit code."""

    class ElsewhereError(ValueError):
        code = 75

    def end(error: Exception) -> None:
        raise error

    monkeypatch.setattr(cli.tempfile, "gettempdir", lambda: str(tmp_path))
    found = []
    for rank, error in (("0", endings.Diverged("nan")), ("1", endings.Diverged("nan")), ("1", ElsewhereError("x"))):
        replace_train(monkeypatch, lambda error=error: end(error))  # type: ignore[misc]
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2")
        found.append((cli.main(BASE), capsys.readouterr().err))
    assert found == [(76, "dsalign: nan\n"), (76, ""), (75, "")]


def test_a_signal_before_the_first_step_ends_a_run_alone_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is lost: SIGTERM is exit code 75, an interrupt 130, as in any program."""
    for number, code in ((signal.SIGTERM, 75), (signal.SIGINT, 130)):
        replace_train(monkeypatch, lambda number=number: os.kill(os.getpid(), number) or time.sleep(9))  # type: ignore
        assert cli.main(BASE) == code
    said, command = capsys.readouterr().err.splitlines()
    assert said == "dsalign: stopped by SIGTERM before the first step; nothing is lost, it starts again with"
    assert shlex.split(command) == ["launch/train.py", *BASE]


def test_print_config_into_a_closed_pipe_is_no_error(tmp_path: Path) -> None:
    """`--print_config | head -1`: the reader leaves after a line; no traceback."""
    command = [sys.executable, str(TRAIN), *BASE, "--print_config"]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("verb", ["ls", "stop", "resume", "merge"])
def test_a_path_that_the_system_refuses_is_no_traceback(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """5000 characters are more than a file's name may have."""
    assert cli.main([verb, "x" * 5000]) == 2
    (line, *_) = capsys.readouterr().err.splitlines()
    assert line.startswith("dsalign: error: xxx") and line.endswith("got: File name too long; check it")
    assert len(line) < 300
