"""What other trainers write: names, values, sentences; and that a guess means the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from commands import BASE, made, problems, trackers, yaml_file

from dsalign import algos
from dsalign.config import flags, foreign
from dsalign.config.parse import parse
from dsalign.config.schema import RUN_OPTIONS, own_options

OWN = {name for algo in algos.names() for name in own_options(algos.load(algo))}


def test_the_table_speaks_of_options_that_exist() -> None:
    """No foreign name is one of ours, every target and every flag in a sentence is."""
    ours = set(RUN_OPTIONS) | OWN
    assert not (set(foreign.NAMES) | set(foreign.SENTENCES)) & ours
    assert not set(foreign.NAMES) & set(foreign.SENTENCES)
    assert set(foreign.NAMES.values()) | set(foreign.VALUES) <= ours
    said = {flag for sentence in foreign.SENTENCES.values() for flag in re.findall(r"--([a-z0-9_]+)", sentence)}
    assert said <= ours


@pytest.mark.parametrize(
    ("words", "section", "name", "value"),
    [
        ("--lr 1e-4", "optim", "learning_rate", 1e-4),
        ("--epochs 3", "optim", "num_train_epochs", 3),
        ("--torch_dtype bfloat16", "models", "dtype", "bfloat16"),
        ("--torch_dtype torch.float16", "models", "dtype", "float16"),
        ("--dtype bf16", "models", "dtype", "bfloat16"),
        ("--dtype AUTO", "models", "dtype", "auto"),
        ("--deepspeed default-zero2", "optim", "deepspeed", "zero2"),
        ("--deepspeed default-zero3-offload", "optim", "deepspeed", "zero3_offload"),
        ("--report_to none", "output", "report_to", ()),
        ("--report_to=tensorboardx,wandb", "output", "report_to", ("tensorboard", "wandb")),
        ("--lora_target_modules all-linear", "models", "lora_target_modules", ("ALL",)),
        ("--lora_target all", "models", "lora_target_modules", ("ALL",)),
        ("--lora_target_modules self_attn.q_proj,k", "models", "lora_target_modules", ("self_attn.q_proj", "k")),
        ("--model_type qwen --model_id_or_path folder", "models", "model", "folder"),
        ("--model_id_or_path folder --model_type qwen", "models", "model", "folder"),
        ("--model_type qwen", "models", "model", "qwen"),
        ("--optim.learning_rate 1e-4", "optim", "learning_rate", 1e-4),
        ("--optimisation.lr 1e-4", "optim", "learning_rate", 1e-4),
    ],
)
def test_what_means_the_same_is_read(
    words: str, section: str, name: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackers(tmp_path, monkeypatch)
    config = parse(["--algo", "sft", "--dataset", "rows", *words.split()], world_size=1).config
    assert getattr(getattr(config, section), name) == value


def test_words_of_values_are_read_in_yaml_too(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "report_to: none\nlora_target_modules: [all-linear]\ntorch_dtype: bf16\n")
    config = made("--algo", "sft", "--config", file)
    assert (config.output.report_to, config.models.lora_target_modules) == ((), ("ALL",))
    assert config.models.dtype == "bfloat16"
    null = yaml_file(tmp_path, "report_to: [none]\n", "null.yaml")
    assert made("--algo", "sft", "--config", null).output.report_to == ()


def test_a_model_type_in_a_file_gives_way_to_a_model_on_the_command_line(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "model_type: qwen\n")
    assert made("--algo", "sft", "--config", file).models.model == "m"
    other = yaml_file(tmp_path, "model: folder\n", "other.yaml")
    assert (
        parse(["--algo", "sft", "--config", other, "--model_type", "q"], world_size=1).config.models.model == "folder"
    )


@pytest.mark.parametrize("name", foreign.SENTENCES)
def test_what_has_no_counterpart_says_what_to_do(name: str) -> None:
    (line,) = problems("--algo", "sft", f"--{name}", "true")
    assert line == f"--{name}: expected an option of dsalign, got {name!r} of other trainers; {foreign.SENTENCES[name]}"


@pytest.mark.parametrize(
    ("written", "guess"),
    [
        ("learning_rat", "learning_rate"), ("batchsize", "batch_size"), ("Learning_Rate", "learning_rate"),
        ("max_lenght", "max_length"), ("save_step", "save_steps"), ("warm_up_ratio", "warmup_ratio"),
        ("outputdir", "output_dir"), ("adam_beta3", ""), ("top_n", ""), ("truncation_startegy", "truncation_strategy"),
        ("elaboration_strategy", ""), ("torch_type", ""), ("min_length", ""), ("load_steps", ""), ("reward", ""),
    ],
)  # fmt: skip
def test_a_guess_means_the_same(written: str, guess: str) -> None:
    assert flags.nearest(written, list(RUN_OPTIONS)) == (f"; did you mean {guess}?" if guess else "")


def test_sections_nest_and_are_dotted(tmp_path: Path) -> None:
    file = yaml_file(
        tmp_path,
        "algo: ppo\noptim:\n  lr: 1e-4\n  batch_size: 2\nrollout:\n  temperature: 0.5\nppo:\n  gamma: 0.9\n"
        "data.columns: {q: prompt}\noutput: {save_steps: 7}\n",
    )
    parsed = parse(["--config", file, *BASE, "--reward_funcs", "demo:friendly", "--rollout.top_k=3"], world_size=1)
    config = parsed.config
    assert (config.optim.learning_rate, config.optim.batch_size, config.output.save_steps) == (1e-4, 2, 7)
    assert (config.rollout.temperature, config.rollout.top_k, config.algorithm.gamma) == (0.5, 3, 0.9)
    assert config.data.columns == {"q": "prompt"}
    assert parsed.origins["learning_rate"] == f"{file}:3"
    plain = yaml_file(tmp_path, "algo: ppo\nrollout: plain\n", "plain.yaml")
    assert made("--config", plain, "--reward_funcs", "demo:friendly").rollout.rollout == "plain"


def test_an_option_in_another_section_is_named(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "algo: dpo\ndata:\n  learning_rate: 1\n  lr_: 1\noptim.beta: 2\n")
    assert problems("--config", file) == [
        f"{file}:3: data.learning_rate: expected an option of data, got one of optim; write learning_rate alone",
        f"{file}:5: optim.beta: expected an option of optim, got one of cpo; write beta alone",
        f"{file}:4: data.lr_: expected a known option, got 'lr_'; did you mean lr?",
    ]


def test_an_option_twice_is_seen_through_sections(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "algo: dpo\nlr: 1\noptim: {learning_rate: 2}\n")
    (line,) = problems("--config", file)
    assert line.startswith(
        f"{file}:3: optim.learning_rate: expected learning_rate once, got lr and optim.learning_rate"
    )
