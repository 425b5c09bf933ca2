"""The configuration: defaults < YAML < flags, and what is said of each mistake."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
from commands import BASE, made, problems, trackers, with_checkpoint, yaml_file
from hypothesis import given, settings
from hypothesis import strategies as st

from dsalign import algos, assets
from dsalign.config import flags, options
from dsalign.config.parse import Parsed, parse
from dsalign.config.schema import RUN_OPTIONS

DOCUMENTED = (
    "--model_type llama3-8b-instruct --sft_type lora --dataset shareai-llama3-dpo-zh-en-emoji --num_train_epochs 2 "
    "--lora_target_modules ALL --gradient_checkpointing true --batch_size 1 --learning_rate 5e-5 "
    "--gradient_accumulation_steps 16 --warmup_ratio 0.03 --save_total_limit 2"
)


def test_defaults() -> None:
    """Section by section what a run is without a further word."""
    config = made("--algo", "dpo")
    models, data, optim, output = config.models, config.data, config.optim, config.output
    assert (models.tuner, models.dtype, models.attn_impl) == ("lora", "auto", "auto")
    assert (models.lora_rank, models.lora_alpha, models.lora_target_modules) == (8, 32, ("ALL",))
    assert (data.max_length, data.truncation_strategy, data.split_dataset_ratio) == (2048, "delete", 0.0)
    assert (optim.deepspeed, optim.num_train_epochs) == ("zero2", 1)
    assert (optim.batch_size, optim.gradient_accumulation_steps) == (1, 16)
    assert (optim.weight_decay, optim.adam_beta1, optim.adam_beta2, optim.adam_epsilon) == (0.01, 0.9, 0.95, 1e-8)
    assert (optim.max_grad_norm, optim.lr_scheduler_type, optim.warmup_ratio) == (1.0, "cosine", 0.05)
    assert (output.save_steps, output.logging_steps, output.save_total_limit, config.seed) == (500, 5, 2, 42)
    assert (output.output_dir, output.resume, output.report_to) == ("output/dpo", None, ())
    assert config.algorithm == algos.load("dpo")()


@pytest.mark.parametrize(
    ("algo", "full", "lora", "dropout"),
    [
        ("sft", 1e-5, 1e-4, 0.05),
        ("rm", 1e-5, 1e-4, 0.05),
        ("dpo", 1e-6, 5e-5, 0.0),
        ("kto", 1e-6, 5e-5, 0.0),
        ("cpo", 1e-6, 5e-5, 0.05),
        ("orpo", 1e-6, 5e-5, 0.05),
        ("simpo", 1e-6, 5e-5, 0.05),
    ],
)
def test_an_algorithm_has_its_own_learning_rate_and_dropout(
    algo: str, full: float, lora: float, dropout: float
) -> None:
    assert made("--algo", algo).optim.learning_rate == lora
    assert made("--algo", algo, "--tuner", "full").optim.learning_rate == full
    assert made("--algo", algo).models.lora_dropout == dropout


@pytest.mark.parametrize(
    ("algo", "rows"),
    [
        ("sft", "demo:demonstrations"),
        ("kto", "demo:labels"),
        *((algo, "demo:pairs") for algo in ("rm", "dpo", "cpo", "orpo", "simpo")),
    ],
)
def test_the_algorithm_is_all_that_must_be_given(algo: str, rows: str, tmp_path: Path) -> None:
    """The embedded model and the demo rows of the algorithm's kind; --model and --dataset take over."""
    parsed = parse(["--algo", algo], world_size=1)
    assert (parsed.config.models.model, parsed.config.data.dataset) == ("smollm2-135m-instruct", (rows,))
    assert (parsed.origins["model"], parsed.origins["dataset"]) == ("default", f"{algo} default")
    assert parse(["--config", yaml_file(tmp_path, parsed.config.dump())], world_size=1).config == parsed.config
    own = parse(["--algo", algo, *BASE], world_size=1)
    assert (own.config.models.model, own.config.data.dataset) == ("m", ("rows",))
    assert (own.origins["model"], own.origins["dataset"]) == ("flag --model", "flag --dataset")


def test_the_demo_prompts_bring_options(tmp_path: Path) -> None:
    """Short answers, one pass, a line a step where the demo rows are read because none were named; a flag or named rows
    take over."""
    parsed = parse(["--algo", "ppo"], world_size=1)
    assert (parsed.config.rollout.max_new_tokens, parsed.origins["max_new_tokens"]) == (64, "demo:prompts")
    assert (parsed.config.algorithm.num_ppo_epochs, parsed.config.output.logging_steps) == (1, 1)
    assert parsed.origins["logging_steps"] == "demo:prompts"
    assert parse(["--algo", "ppo", "--max_new_tokens", "9"], world_size=1).config.rollout.max_new_tokens == 9
    assert parse(["--algo", "ppo", "--dataset", "demo:prompts"], world_size=1).config.rollout.max_new_tokens == 512
    again = parse(["--config", yaml_file(tmp_path, parsed.config.dump())], world_size=1)
    assert again.config == parsed.config
    assert set(assets.OPTIONS) <= set(assets.names())


def test_ppo_without_a_reward_has_one(tmp_path: Path) -> None:
    """demo:friendly where neither a reward model nor a function is given, also by null; the YAML says so."""
    parsed = parse(["--algo", "ppo"], world_size=1)
    assert (parsed.config.models.reward_funcs, parsed.origins["reward_funcs"]) == (("demo:friendly",), "ppo default")
    assert (parsed.config.data.dataset, parsed.origins["dataset"]) == (("demo:prompts",), "ppo default")
    assert parse(["--config", yaml_file(tmp_path, parsed.config.dump())], world_size=1).config == parsed.config
    null = yaml_file(tmp_path, "algo: ppo\nreward_funcs: null\n", "null.yaml")
    assert parse(["--config", null], world_size=1).config.models.reward_funcs == ("demo:friendly",)
    (tmp_path / "x.py").write_text("f = sum\n")
    own = f"{tmp_path}/x.py:f"
    assert made("--algo", "ppo", "--reward_funcs", own).models.reward_funcs == (own,)
    for flag in ("--reward_model", "--reward_model_id_or_path", "--reward_model_type"):
        assert made("--algo", "ppo", flag, "r").models.reward_funcs == ()
    assert made("--algo", "dpo").models.reward_funcs == ()


@pytest.mark.parametrize(("batch", "ranks", "steps"), [(1, 1, 16), (3, 1, 6), (2, 4, 2), (4, 8, 1)])
def test_accumulation_makes_a_global_batch_of_at_least_16(batch: int, ranks: int, steps: int) -> None:
    """ceil(16 / (batch x ranks)): 16/1, 16/3, 16/8, 16/32."""
    assert made("--algo", "sft", f"--batch_size={batch}", world_size=ranks).optim.gradient_accumulation_steps == steps


@pytest.mark.parametrize(
    ("algo", "flags", "own"),
    [
        ("sft", "", {}),
        ("rm", "", {"center_rewards_coefficient": 0.0}),
        ("dpo", "--beta 0.1 --rpo_alpha 0.1", {"beta": 0.1, "rpo_alpha": 0.1}),
        (
            "kto",
            "--beta 0.1 --desirable_weight 1.0 --undesirable_weight 1.0",
            {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
        ),
        ("cpo", "--beta 0.1", {"beta": 0.1, "cpo_alpha": 1.0}),
        ("orpo", "--beta 0.1", {"beta": 0.1}),
        ("simpo", "--beta 2.0 --simpo_gamma 1.0", {"beta": 2.0, "simpo_gamma": 1.0}),
    ],
)
def test_the_documented_commands(algo: str, flags: str, own: Mapping[str, float]) -> None:
    verb = ["sft"] if algo == "sft" else ["rlhf", "--rlhf_type", algo]
    config = parse([*verb, *f"{DOCUMENTED} {flags}".split()], world_size=1).config
    assert (config.algo, config.models.model, config.models.tuner) == (algo, "llama3-8b-instruct", "lora")
    assert config.data.dataset == ("shareai-llama3-dpo-zh-en-emoji",)
    assert (config.optim.num_train_epochs, config.optim.batch_size, config.optim.gradient_accumulation_steps) == (
        2,
        1,
        16,
    )
    assert (config.optim.learning_rate, config.optim.warmup_ratio, config.output.save_total_limit) == (5e-5, 0.03, 2)
    assert (config.models.lora_target_modules, config.models.gradient_checkpointing) == (("ALL",), True)
    assert {name: getattr(config.algorithm, name) for name in own} == own


def test_flags_win_over_later_files_over_earlier_files_over_defaults(tmp_path: Path) -> None:
    one = yaml_file(tmp_path, "algo: dpo\nmodel: m\ndataset: rows\nbeta: 0.2\nseed: 1\nmax_length: 10\n", "one.yaml")
    two = yaml_file(tmp_path, "# a comment\nbeta: 0.3\nseed: 2\n", "two.yaml")
    parsed = parse(["--config", one, two, "--beta=0.4"], world_size=1)
    config = parsed.config
    assert (config.algorithm.beta, config.seed, config.data.max_length, config.output.save_steps) == (0.4, 2, 10, 500)
    shown = ("beta", "seed", "max_length", "save_steps", "rpo_alpha", "learning_rate", "output_dir")
    assert [parsed.origins[name] for name in shown] == [
        "flag --beta",
        f"{two}:3",
        f"{one}:6",
        "default",
        "dpo default",
        "dpo default",
        "default",
    ]


def test_describe_shows_every_value_with_its_origin_and_is_yaml(tmp_path: Path) -> None:
    parsed = parse(["--algo", "simpo", *BASE, "--system", "two\nlines"], world_size=1)
    lines = [[part.strip() for part in line.split("  # ")] for line in parsed.describe().splitlines()]
    assert ["simpo_gamma: 1.0", "simpo default"] in lines
    assert ["model: m", "flag --model"] in lines
    assert ["gradient_accumulation_steps: 16", "default"] in lines
    assert len(lines) == len(RUN_OPTIONS) + 4
    assert parse(["--config", yaml_file(tmp_path, parsed.describe())], world_size=3).config == parsed.config


def test_yaml_written_is_read_again_as_the_same_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackers(tmp_path, monkeypatch)
    (tmp_path / "rows.jsonl").touch()
    first = parse(
        [
            *(
                "rlhf",
                "--rlhf_type",
                "dpo",
                "--model",
                "m",
                "--loss_type",
                "sigmoid",
                "hinge",
                "--loss_weights",
                "1,0.5",
            ),
            *("--columns", "q=prompt", "good=chosen", "--adam_epsilon", "1e-7", "--report_to", "wandb", "--resume"),
            *("--dataset", "a,b", f"{tmp_path}/rows.jsonl#5", "--ref_model_type=two words"),
            *("--output_dir", with_checkpoint(tmp_path)),
        ],
        world_size=2,
    ).config
    first.to_yaml(tmp_path / "resolved.yaml")
    again = parse(["--config", str(tmp_path / "resolved.yaml")], world_size=64).config
    assert again == first
    assert again.data.dataset == ("a", "b", f"{tmp_path}/rows.jsonl#5")
    assert again.data.columns == {"q": "prompt", "good": "chosen"}
    assert (again.models.ref_model, again.output.resume, again.optim.gradient_accumulation_steps) == (
        "two words",
        "latest",
        8,
    )


def test_yaml_of_a_full_run_has_no_lora_options(tmp_path: Path) -> None:
    """They would be refused when it is read."""
    first = made("--algo", "sft", "--tuner", "full")
    assert "lora" not in first.dump()
    assert parse(["--config", yaml_file(tmp_path, first.dump())], world_size=1).config == first


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    model=TEXT.filter(lambda text: text[0] not in "/.~"),
    system=TEXT,
    rate=st.floats(1e-12, 1e3),
    seed=st.integers(0, 9**9),
)
def test_yaml_keeps_any_text_and_number(model: str, system: str, rate: float, seed: int) -> None:
    config = made("--algo", "sft")
    changes = {
        "seed": seed,
        "models": config.models.model_copy(update={"model": model}),
        "data": config.data.model_copy(update={"system": system, "dataset": (f"x,{system}",)}),
        "optim": config.optim.model_copy(update={"learning_rate": rate}),
    }
    config = config.model_copy(update=changes)
    given, problems = flags.parse_yaml(config.dump(), "run.yaml", {})
    assert problems == []
    read = {one.name: config_option(one.name).read(one.raw) for one in given if one.name in config_names()}
    assert (read["model"], read["system"], read["dataset"]) == (model, system, (f"x,{system}",))
    assert (read["learning_rate"], read["seed"]) == (rate, seed)


def config_option(name: str) -> options.Option:
    return RUN_OPTIONS[name]


def config_names() -> set[str]:
    return set(RUN_OPTIONS)


def test_text_becomes_the_type_of_its_option(tmp_path: Path) -> None:
    """1e-4 is a string in YAML 1.1; both homes read the same text in the same way."""
    file = yaml_file(
        tmp_path,
        "learning_rate: 1e-4\ngradient_checkpointing: yes\nlora_target_modules: [q, v]\nval_dataset: a, b\n"
        "columns:\n  question: prompt\nmax_steps: ~\nbatch-size: '2'\nresume: true\n"
        f"output_dir: {with_checkpoint(tmp_path)}\n",
    )
    config = made("--algo", "sft", "--config", file)
    assert (config.optim.learning_rate, config.models.gradient_checkpointing, config.optim.batch_size) == (
        1e-4,
        True,
        2,
    )
    assert (config.models.lora_target_modules, config.data.val_dataset) == (("q", "v"), ("a", "b"))
    assert (config.data.columns, config.optim.max_steps, config.output.resume) == (
        {"question": "prompt"},
        None,
        "latest",
    )


def test_flags_in_all_their_forms() -> None:
    config = made(
        "--algo=sft", "--gradient-checkpointing", "--trust_remote_code", "false", "--batch-size=2", "--resume=false",
        "--local_rank=0", "--lora_target_modules", "q,k", "v", "--system=--quiet=1 please", "--max_steps", "none",
    )  # fmt: skip
    assert (config.models.gradient_checkpointing, config.models.trust_remote_code, config.optim.batch_size) == (
        True,
        False,
        2,
    )
    assert (config.models.lora_target_modules, config.data.system) == (("q", "k", "v"), "--quiet=1 please")
    assert (config.optim.max_steps, config.output.resume) == (None, None)


def test_null_asks_for_the_default_of_what_is_resolved_later(tmp_path: Path) -> None:
    one = yaml_file(tmp_path, "learning_rate: 1\noutput_dir: here\n", "one.yaml")
    two = yaml_file(tmp_path, "learning_rate:\ngradient_accumulation_steps: null\ndataset: ~\n", "two.yaml")
    config = parse(["--algo", "sft", "--config", one, two], world_size=1).config
    assert config.data.dataset == ("demo:demonstrations",)
    assert (config.optim.learning_rate, config.optim.gradient_accumulation_steps, config.output.output_dir) == (
        1e-4,
        16,
        "here",
    )


def test_a_model_type_stands_for_a_model_that_is_not_given() -> None:
    parsed = parse(["--algo", "dpo", *BASE, "--ref_model_type", "short"], world_size=1)
    assert (parsed.config.models.ref_model, parsed.origins["ref_model"]) == ("short", "flag --ref_model_type")
    both = made("--algo", "dpo", "--ref_model_type", "short", "--ref_model_id_or_path", "long")
    assert (both.models.ref_model, both.models.ref_model_type) == ("long", "short")


def test_cpo_with_loss_type_simpo_is_simpo(tmp_path: Path) -> None:
    parsed = parse(["rlhf", "--rlhf_type", "cpo", "--loss_type", "simpo", "--simpo_gamma", "2", *BASE], world_size=1)
    assert (parsed.config.algo, parsed.config.output.output_dir) == ("simpo", "output/simpo")
    assert (parsed.config.algorithm.simpo_gamma, parsed.config.algorithm.beta) == (2.0, 2.0)
    assert parsed.origins["algo"] == "flag --loss_type"
    file = yaml_file(tmp_path, "algo: cpo\nloss_type: simpo\n")
    assert made("--config", file).algo == "simpo"
    assert made("--algo", "cpo", "--loss_type", "hinge").algorithm.loss_type == "hinge"


def test_the_verb_sft_is_the_algorithm_sft() -> None:
    parsed = parse(["--local_rank=1", "sft", *BASE], world_size=1)
    assert (parsed.config.algo, parsed.origins["algo"]) == ("sft", "verb sft")
    assert made("sft", "--algo", "sft").algo == "sft"
    (line,) = problems("sft", "--algo", "dpo")
    assert line == "--algo: expected sft after the verb sft, got 'dpo'; use the verb rlhf or train"


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "algo: sft\n\nmax_lenght: 3\nseed: many\nbeta: 1\n")
    assert problems("--config", file, "--batch-size", "0", "--tuner=fulll", base=()) == [
        f"{file}:3: max_lenght: expected a known option, got 'max_lenght'; did you mean max_length?",
        f"{file}:5: beta: expected an option of sft, got one of cpo, dpo, grpo, kto, online_dpo, orpo, simpo; "
        "sft has none of it, remove it or change --algo",
        "--tuner: expected 'lora' or 'full', got 'fulll'; did you mean full?",
        "--batch-size: expected greater than or equal to 1, got '0'; batch_size is: groups in a micro-batch of one "
        "rank, >= 1",
        f"{file}:4: seed: expected a whole number, got 'many'; seed is: of everything random, in [0, 2^32)",
    ]


def test_the_algorithm_is_missing_or_mistyped() -> None:
    names = ", ".join(algos.names())
    advice = "give --algo NAME; dsalign --help lists commands too"
    assert problems("rlhf", "--beta", "1") == [f"algo: expected one of {names}, got none; {advice}"]
    assert problems("--rlhf_type", "simop", "--bta", "1") == [
        f"--rlhf_type: expected one of {names}, got 'simop'; did you mean simpo?",
        "--bta: expected a known option, got 'bta'; did you mean beta?",
    ]
    (line,) = problems("--algo", "sft", "dpo")
    assert line == f"--algo: expected one of {names}, got 'sft dpo'; choose one"


def test_a_word_that_is_no_verb() -> None:
    (line,) = problems("run.yaml", "--algo", "sft")
    assert line.startswith("command: expected one of train, rlhf, sft, got 'run.yaml'; write options as --name value")
    assert problems("trian", "--algo", "sft") == [
        "command: expected one of train, rlhf, sft, got 'trian'; did you mean train?"
    ]


def test_numbers_of_yaml_are_those_of_flags() -> None:
    assert made("--algo", "orpo", "--beta", "1e-1").algorithm.beta == 0.1
    assert math.isclose(made("--algo", "kto", "--beta=5.0E-2").algorithm.beta, 0.05)


def test_parsed_knows_what_was_asked() -> None:
    parsed: Parsed = parse(["--algo", "sft", *BASE, "--print-config"], world_size=1)
    assert parsed.print_config
    assert not parse(["--algo", "sft", *BASE, "--print_config=false"], world_size=1).print_config
