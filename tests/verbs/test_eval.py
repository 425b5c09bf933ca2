"""`dsalign eval`: each number against plain transformers or worked out by hand, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import base_adapter_and_rm
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsalign import cli
from dsalign.config.parse import parse
from dsalign.verbs import evaluated, harness

PAIRS = [("Hi?", "Good.", "Bad"), ("Why?", "So.", "No idea."), ("Who?", "I.", "You and he")]


@pytest.fixture(scope="module")
def here(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, adapter and rm, which share a chat template; pairs.jsonl and prompts.jsonl."""
    folder = tmp_path_factory.mktemp("eval")
    base_adapter_and_rm(tiny, folder)
    pairs = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in PAIRS]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p, _, _ in PAIRS))
    (folder / "length.py").write_text("def of(completions):\n    return [float(len(c)) for c in completions]\n")
    return folder


def measured(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    assert cli.main(["eval", *map(str, words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def texts(folder: Path) -> list[list[tuple[list[int], list[int]]]]:
    """(prompt, answer) in tokens of each pair's two answers; <|im_end|> ends an answer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    openings = [ids(f"<|im_start|>user\n{p}<|im_end|>\n<|im_start|>assistant\n") for p, _, _ in PAIRS]
    return [[(o, [*ids(a), 2]) for a in row[1:]] for o, row in zip(openings, PAIRS, strict=True)]


@torch.no_grad()
def logp(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def test_a_policy_on_pairs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The adapter against its base, which need not be named: log-probabilities by transformers and PEFT."""
    found = measured(capsys, here / "adapter", "--dataset", here / "pairs.jsonl")
    models = (
        AutoPeftModelForCausalLM.from_pretrained(here / "adapter"),
        AutoModelForCausalLM.from_pretrained(here / "base"),
    )
    rows = texts(here / "base")
    want = torch.tensor([[[float(logp(model, *one).sum()) for one in row] for row in rows] for model in models])
    change = want[0] - want[1]
    margins = change[:, 0] - change[:, 1]
    versus = found["versus"]
    assert versus["implicit reward, margin, mean"] == pytest.approx(float(margins.mean()), abs=1e-3)
    assert versus["implicit reward, accuracy"]["value"] == pytest.approx(float((margins > 0).float().mean()))
    assert (found["data"], found["rows"]) == ("pairs", 3) and abs(float(margins.mean())) > 0.05
    tokens = sum(len(row[0][1]) for row in rows)
    for one, sums in zip(found["models"], want, strict=True):
        assert one["perplexity, chosen"] == pytest.approx(math.exp(-float(sums[:, 0].sum()) / tokens), rel=1e-4)
        assert one["tokens, rejected"] == pytest.approx((4 + 9 + 11) / 3)


def test_a_reward_model_on_pairs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its score is 0.25 times the sum of the last hidden state, and 0.5."""
    found = measured(capsys, here / "rm", "--dataset", here / "pairs.jsonl")
    model = AutoModelForCausalLM.from_pretrained(here / "rm").model
    with torch.no_grad():
        scores = torch.tensor(
            [[0.25 * float(model(torch.tensor([p + a])).last_hidden_state[0, -1].sum()) + 0.5 for p, a in row]
             for row in texts(here / "rm")]
        )  # fmt: skip
    (one,) = found["models"]
    assert one["score, chosen"] == pytest.approx(float(scores[:, 0].mean()), abs=1e-4)
    assert one["margin, mean"] == pytest.approx(float((scores[:, 0] - scores[:, 1]).mean()), abs=1e-4)
    assert one["accuracy"]["value"] == pytest.approx(float((scores[:, 0] > scores[:, 1]).float().mean()))


def test_two_models_on_prompts(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model against itself draws the same samples: KL 0 and a win rate of a half, all ties. Against another the KL is
    above 0, and the longer text wins where a function counts characters."""
    words = ["--dataset", here / "prompts.jsonl", "--max_new_tokens", 8, "--reward_funcs", f"{here / 'length.py'}:of"]
    same = measured(capsys, here / "base", "--vs", here / "base", *words)
    assert (same["versus"]["wins"], same["versus"]["ties"]) == (0, 3)
    assert same["versus"]["win rate of the first, ties half"]["value"] == 0.5
    for name in ("KL per token to the other", "KL per answer to the other"):
        assert [one[name][end] for one in same["models"] for end in ("value", "low", "high")] == pytest.approx([0] * 6)
    found = measured(capsys, here / "adapter", "--vs", here / "base", *words)
    first, second = found["models"]
    for one in (first, second):
        token, answer = (one[f"KL per {what} to the other"] for what in ("token", "answer"))
        assert token["low"] < token["value"] < token["high"] and token["value"] > 0.01 and token["of"] == 3
        assert answer["value"] == pytest.approx(token["value"] * one["tokens"])
    assert 1 <= first["tokens"] <= 8 and first["reward"] <= 8
    judged = measured(capsys, here / "base", *words[:4], "--reward", here / "rm")
    assert "reward" in judged["models"][0] and not judged["versus"]


def test_wilson_by_hand() -> None:
    """8 of 10: centre (0.8 + 0.19207) / 1.38415, half 1.96 sqrt(0.016 + 0.0096036) / 1.38415. 0 of 5 begins at 0."""
    found = evaluated.wilson(8, 10)
    assert (found["low"], found["high"]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert evaluated.wilson(0, 5)["low"] == 0 and evaluated.wilson(0, 5)["high"] == pytest.approx(0.4345, abs=1e-4)


def test_the_interval_of_a_ratio_by_hand() -> None:
    """2, 4 and 9 nats over 2, 2 and 4 tokens: 15 / 8. What is left, -1.75, 0.25 and 1.5, has the variance 2.6875, and
    the error is sqrt(2.6875 / 3) / (8 / 3) = 0.35493. Over one token each it is the mean, 5, with sqrt(13 / 3)."""
    nats = torch.tensor([2.0, 4.0, 9.0])
    found = evaluated.ratio(nats, torch.tensor([2, 2, 4]))
    assert (found["value"], found["high"] - found["value"]) == pytest.approx((1.875, 1.959964 * 0.35493), rel=1e-4)
    mean = evaluated.ratio(nats, torch.ones(3))
    assert (mean["value"], mean["value"] - mean["low"]) == pytest.approx((5.0, 1.959964 * math.sqrt(13 / 3)), rel=1e-6)
    assert evaluated._cell(mean) == "5 (0.92 to 9.08)" and math.isnan(evaluated.ratio(nats[:1], nats[:1])["low"])


def test_the_table_says_what_is_missing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(here / "base"), "--dataset", str(here / "pairs.jsonl")]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"3 pairs of {here / 'pairs.jsonl'}\n") and "implicit rewards need --vs OTHER" in said
    assert "perplexity, chosen" in said and "rows were read as pairs" in said


def test_rows_are_read_as_the_run_read_them(here: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A question and an answer: of a run of SFT a demonstration, else, or where a reward judges, a prompt."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Hi?", "completion": "Good."}\n')
    shutil.copytree(here / "base", tmp_path / "run" / "final")
    words = ["--dataset", rows, "--max_new_tokens", "2"]
    for algo, more, kind in [
        ("sft", (), "demonstrations"),
        ("sft", ("--reward_funcs", f"{here / 'length.py'}:of"), "prompts"),
        ("ppo", (), "prompts"),
    ]:
        (tmp_path / "run" / "config.yaml").write_text(f"algo: {algo}\n")
        assert measured(capsys, tmp_path / "run", *words, *more)["data"] == kind
    assert measured(capsys, here / "base", *words)["data"] == "prompts"


def test_lm_eval_is_a_process_of_its_own(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["eval", str(here / "adapter"), "--lm_eval", "arc_easy"]) == 2
    assert "which is not installed; run pip install lm-eval" in capsys.readouterr().err
    started: list[list[str]] = []

    class Done:
        returncode = 3

    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(harness.subprocess, "run", lambda words, check: started.append(words) or Done())
    assert cli.main(["eval", str(here / "adapter"), "--lm_eval", "arc_easy,piqa", "--batch_size", "4"]) == 3
    given = f"pretrained={here / 'base'},peft={here / 'adapter'},tokenizer={here / 'adapter'},dtype=auto"
    assert started[0][:6] == [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args"]
    assert started[0][6].startswith(given) and started[0][7:11] == ["--tasks", "arc_easy,piqa", "--batch_size", "4"]


def test_lm_eval_is_given_no_adapter_of_four_bits(here: Path, tmp_path: Path) -> None:
    """It would open the base as it is on disk."""
    folder = shutil.copytree(here / "adapter", tmp_path / "adapter")
    (folder / "base_model.json").write_text(json.dumps({"quantised": "nf4"}))
    config = parse(["--algo", "sft", "--model", str(folder), "--dataset", "demo:demonstrations"], world_size=1).config
    with pytest.raises(ValueError, match=r"^lm_eval: .* base in 4 bits, .*; run dsalign merge .* and give that$"):
        harness.command(str(folder), "arc_easy", config, 8)


def test_refusals(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("--dataset", here / "pairs.jsonl")
    for words, message in (
        ((here / "base",), "expected --dataset FILE, got none"),
        ((*rows,), "eval: expected MODEL as the first word, got '--dataset'"),
        ((here / "base", *rows, "--learning_rate", "1e-3"), "got --learning_rate; leave it out"),
        ((here / "base", *rows, "--data", "pair"), "got 'pair'; did you mean pairs?"),
        ((here / "base", *rows, "--reward", here / "rm"), "reward: expected prompts to answer, got pairs"),
        ((here / "base", *rows, "--vs", "./nowhere"), "model: there is no folder ./nowhere"),
        ((here / "rm", "--dataset", here / "prompts.jsonl"), "data: expected pairs for the reward model"),
    ):
        assert cli.main(["eval", *map(str, words)]) == 2
        assert message in capsys.readouterr().err
