"""`dsalign plan`: what it reads, what it prints and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dsalign import cli
from dsalign.config.parse import ConfigError
from dsalign.memory.estimate import GIB
from dsalign.verbs import plan

LLAMA_8B = ["--model", "llama3_1-8b-instruct"]


def run(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = cli.main(["plan", *words])
    return code, capsys.readouterr().out


def found(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    code, out = run([*words, "--json"], capsys)
    return code, json.loads(out)


def test_the_first_line_answers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run([*LLAMA_8B, "--algo", "ppo", "--gpus", "64", "--gpu_memory", "80"], capsys)
    assert code == 0
    assert out.startswith("fits: zero2 on 64 x 80 GiB, micro-batch ")
    assert "estimated" in out.splitlines()[0] and "not checked on a GPU" in out
    for word in (
        "policy",
        "value",
        "policy, adapter off",
        "functions, no model",
        "keys, values",
        "zero3_offload",
        "8.03B",
    ):
        assert word in out
    assert max(map(len, out.splitlines()[2:-3])) <= 118 and "…" not in out


def test_what_does_not_fit_names_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    """All weights of Llama 8B on two GPUs of 24 GiB: off-loaded, the activations of a pair alone are 25 GiB; with
    checkpointing they fit. The words it gives are options that fit when they are given."""
    words = [*LLAMA_8B, "--algo", "dpo", "--tuner", "full", "--gpus", "2", "--gpu_memory", "24"]
    code, answer = found(words, capsys)
    assert code == 2 and not answer["fits"]
    assert answer["answer"].startswith("does not fit: ")
    first = answer["hints"][0]
    assert "--gradient_checkpointing true" in first
    code, again = found([*words, *first.split()], capsys)
    assert code == 0 and again["fits"]


def test_json_has_bytes_of_every_role(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = found(
        [*LLAMA_8B, "--algo", "sft", "--tuner", "full", "--deepspeed", "zero3", "--gpus", "16"], capsys
    )
    assert code == 0 and answer["estimated"] and answer["deepspeed"] == "zero3"
    assert answer["models"] == {"policy": {"parameters": 8_030_261_248, "active": 8_030_261_248}}
    assert answer["usable"] == pytest.approx(74 * GIB)
    policy = answer["tried"]["zero3"]["roles"][0]
    assert policy["held"]["weights"] == 2 * 8_030_261_248 / 16
    assert policy["held"]["optimizer"] == 12 * 8_030_261_248 / 16


def test_a_model_that_cannot_be_had(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = found(
        [
            "--params",
            "405B",
            "--layers",
            "126",
            "--hidden",
            "16384",
            "--heads",
            "128",
            "--algo",
            "dpo",
            "--gpus",
            "256",
            "--gradient_checkpointing",
            "true",
        ],
        capsys,
    )
    assert code == 0
    assert answer["models"]["policy"]["parameters"] == pytest.approx(405e9, rel=1e-3)


def test_a_folder_with_config_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a family without a formula: it is counted, and a line says so."""
    config = {
        "model_type": "olmoe", "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "num_experts": 4,
        "num_experts_per_tok": 2,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    code, out = run(["--model", str(tmp_path), "--algo", "sft"], capsys)
    assert code == 0 and "policy: sizes from a count of the modules of olmoe" in out and " active)" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "none"], "--gpus: expected a whole number >= 1, got 'none'"),
        (["--gpus", "12", "--nodes", "5"], "--nodes: expected a number that divides --gpus 12, got 5"),
        (["--gpu_memory", "much"], "--gpu_memory: expected a number > 0, as 80 or 70B, got 'much'"),
        (["--params", "70B"], "--params: expected --layers and --hidden beside it"),
        (["--layers", "8", "--hidden", "512"], "--layers: expected --params beside it"),
        (["--gpus"], "argument --gpus: expected one argument"),
    ],
)
def test_wrong_numbers_are_said(words: list[str], said: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        plan.read(["--algo", "sft", *words])
    assert said in str(error.value)


def test_options_of_a_run_are_checked() -> None:
    with pytest.raises(ConfigError, match="lora_rnak"):
        plan.read(["--algo", "sft", "--lora_rnak", "8"])


def test_the_rows_of_the_demo_set_no_lengths() -> None:
    """A run without --dataset has completions of 64 tokens; a plan is for the user's own rows."""
    request = plan.read(["--algo", "ppo"])
    assert request is not None and request.config.rollout.max_new_tokens == 512
    request = plan.read(["--algo", "ppo", "--max_new_tokens", "64"])
    assert request is not None and request.config.rollout.max_new_tokens == 64


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = run(["--help"], capsys)
    assert code == 0 and out.startswith("usage: dsalign plan --algo NAME")


def test_neither_torch_nor_transformers_is_imported() -> None:
    """Which is why it answers in less than a second."""
    code = (
        "import sys; from dsalign import cli; code = cli.main(sys.argv[1:]); "
        "print(code, sorted({'torch', 'transformers', 'deepspeed', 'numpy'} & set(sys.modules)))"
    )
    words = ["plan", *LLAMA_8B, "--algo", "grpo", "--json"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
