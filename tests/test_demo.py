"""The demonstration less its trainings: its world, its tiny model, and when it passes."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support import read_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsalign.config.parse import parse
from dsalign.data.tokens.load_template import load_template

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "launch" / "demo.py"))


@pytest.fixture(scope="module")
def base(demo: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the demonstration trains."""
    folder = tmp_path_factory.mktemp("base")
    demo["make_base"](demo["world"](), folder, 0)
    return folder


def words(texts: list[str]) -> float:
    return sum(len(text.split()) for text in texts) / len(texts)


def test_the_world_is_balanced(demo: dict[str, Any]) -> None:
    """64 questions; 8 openings a style, as often as each other; answers as long as each other; no text in both."""
    rows = demo["world"]()
    assert len(rows) == len({row["prompt"] for row in rows}) == 64
    assert all(list(row) == ["prompt", "friendly", "gruff"] for row in rows)
    friendly, gruff = [row["friendly"] for row in rows], [row["gruff"] for row in rows]
    assert not set(friendly) & set(gruff)
    assert 0.8 <= words(friendly) / words(gruff) <= 1.25
    openings = Counter(text.partition("!")[0] for text in friendly)
    assert len(openings) == 8 and set(openings.values()) == {8}


def test_rows_are_of_the_kinds_that_the_algorithms_read(demo: dict[str, Any], tmp_path: Path) -> None:
    """Both styles once a question, the friendly one chosen, prompts alone."""
    rows = demo["world"]()
    demo["write_rows"](rows, tmp_path)
    sft = read_rows([str(tmp_path / "sft.jsonl")], "demonstrations")
    pairs = read_rows([str(tmp_path / "pairs.jsonl")], "pairs")
    assert Counter(row.completions[0] for row in sft) == Counter(row[s] for row in rows for s in ("friendly", "gruff"))
    assert [row.completions for row in pairs] == [(row["friendly"], row["gruff"]) for row in rows]
    prompts = read_rows([str(tmp_path / "prompts.jsonl")], "prompts")
    assert [row.prompt[0]["content"] for row in prompts] == [row["prompt"] for row in rows]


def test_the_tokenizer_keeps_every_text_and_fits_the_answers(demo: dict[str, Any], base: Path) -> None:
    """Text -> ids -> the same text; the turn's end is one token; no answer is cut by max_new_tokens."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    template, warning = load_template(tokenizer, None, [tokenizer.eos_token_id])
    assert warning is None and tokenizer.convert_ids_to_tokens(sorted(template.end_ids)) == ["<|im_end|>"]
    for row in demo["world"]():
        _, completions = template.encode([{"role": "user", "content": row["prompt"]}], [row["friendly"], row["gruff"]])
        assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions] == [
            row["friendly"],
            row["gruff"],
        ]
        assert all(len(ids) <= demo["TINY"].ppo["max_new_tokens"] for ids in completions)


def test_the_model_is_tiny_and_the_same_for_a_seed(demo: dict[str, Any], base: Path, tmp_path: Path) -> None:
    demo["make_base"](demo["world"](), tmp_path, 0)
    one, two = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, tmp_path))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert sum(p.numel() for p in one.values()) < 2e6


@pytest.mark.parametrize(("recipe", "tuner"), [("TINY", "full"), ("REAL", "lora")])
@pytest.mark.parametrize("algo", ["sft", "rm", "ppo"])
def test_the_commands_can_be_read(demo: dict[str, Any], recipe: str, tuner: str, algo: str) -> None:
    """The words of a launch are flags of the command."""
    argv = demo["arguments"](algo, Path("out"), {"model": "m", "dataset": "rows", **demo[recipe].options(algo)})
    config = parse(argv, world_size=2).config
    assert (config.algo, config.output.output_dir, config.models.tuner) == (algo, f"out/{algo}", tuner)


@pytest.mark.parametrize("recipe", ["TINY", "REAL"])
def test_a_rollout_is_a_line_of_metrics(demo: dict[str, Any], recipe: str) -> None:
    options = demo[recipe].ppo
    assert options["logging_steps"] == options["num_ppo_epochs"] * options["num_mini_batches"]


@pytest.mark.parametrize(
    ("rewards", "code", "told"),
    [
        ([1, 2, 4, 5, 6], 0, "PASSED: mean reward 1.000 at the first rollout"),  # 5 - 1 >= 4
        ([1, 2, 4, 5, 5.9], 1, "FAILED: mean reward 1.000 at the first rollout"),
        ([1, 9, 9, 1, 1, 1], 1, "FAILED"),  # it is the end that counts
        ([1, 1, 1, 1], 1, "FAILED"),
        ([6, 5, 4, 2, 1], 1, "FAILED"),
        ([0, 9, 9], 1, "FAILED"),  # the first one would be its own last
        ([0, float("nan"), 9, 9], 1, "FAILED"),
    ],
)
def test_only_a_clear_rise_passes(demo: dict[str, Any], rewards: list[float], code: int, told: str) -> None:
    """The mean of the last three less the first one, at least 4."""
    found, text = demo["verdict"](rewards, 4.0)
    assert found == code and text.startswith(told)


def test_the_curve(demo: dict[str, Any]) -> None:
    """From one mark at the lowest to all at the highest; level where all are alike."""
    assert demo["curve"]([1.0, 3.0, 2.0], width=5) == "    0    1.000 #\n    1    3.000 #####\n    2    2.000 ###"
    assert demo["curve"]([1.0, 1.0], width=5) == "    0    1.000 #\n    1    1.000 #"


def test_a_metric_is_read_where_it_stands(demo: dict[str, Any], tmp_path: Path) -> None:
    lines = [{"step": 1, "a": 0.5}, {"step": 2, "b": 1.0}, {"step": 3, "a": 0.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert demo["read_metric"](tmp_path, "a") == [0.5, 0.25]
    assert demo["read_metric"](tmp_path, "c") == []


def test_a_launch_that_fails_ends_the_demonstration(demo: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> Any:
        return type("Done", (), {"returncode": 3})

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(SystemExit, match=r"--num_accelerators 2 launch/train\.py --algo x` ended with code 3$"):
        demo["launch"](2, ["--algo", "x"])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("words", [[], ["--real"]], ids=["tiny", "real"])
def test_the_whole_demo_passes(words: list[str]) -> None:
    """What `make demo` and `make demo-real` run: SFT, RM and PPO through the launcher; the exit code is the verdict."""
    command = [sys.executable, "launch/demo.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "PASSED" in done.stdout
