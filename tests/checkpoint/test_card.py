"""The model card of an exported folder: what the hub reads, what people read, and lines that work."""

from __future__ import annotations

import hashlib
import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from support import tiny_tokenizer
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification

from dsalign.checkpoint.card import write_card
from dsalign.config.parse import parse
from dsalign.models.heads import BIAS, WEIGHT

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def final(tiny: Path, folder: Path, kind: str) -> Path:
    """An exported folder: adapter or weights of a language model, or a classifier."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    if kind == "classifier":
        model = LlamaForSequenceClassification.from_pretrained(tiny, num_labels=1)
        save_file({WEIGHT: model.score.weight.detach(), BIAS: torch.zeros(1)}, folder / "value_head.safetensors")
    model.save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2]}))
    return folder


def card(folder: Path, base: str, *flags: str) -> tuple[dict[str, object], str]:
    """(front matter, body) of the card of a run with these flags."""
    config = parse([*flags], world_size=1).config
    write_card(folder, config, base, {"loss": 0.5, "rewards/margins": 1234567.0}, at=folder, step=7, num_rows=48)
    _, front, body = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_what_the_hub_reads(tiny: Path, tmp_path: Path) -> None:
    """Names on the hub are said; a folder or a file is none, and a wrong name would be refused there."""
    folder = final(tiny, tmp_path, "adapter")
    front, _ = card(folder, "org/base", "--algo", "dpo", "--model", "org/base", "--dataset", "org/pairs#100")
    assert front == {
        "base_model": "org/base", "base_model_relation": "adapter", "library_name": "peft",
        "pipeline_tag": "text-generation", "tags": ["dsalign", "dpo", "lora"], "datasets": ["org/pairs"],
    }  # fmt: skip
    front, _ = card(folder, str(tiny), "--algo", "dpo", "--model", str(tiny))
    assert "base_model" not in front and "datasets" not in front


def test_what_people_read(tiny: Path, tmp_path: Path) -> None:
    """Data with its hash, options that are not the default, metrics, versions; secrets are left out."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    flags = ["--algo", "sft", "--model", str(tiny), "--dataset", str(rows), "--learning_rate", "1e-3"]
    secret = "hf_" + "a" * 30
    _, body = card(final(tiny, tmp_path, "adapter"), str(tiny), *flags, "--system", f"use {secret} | it")
    digest = hashlib.sha256(rows.read_bytes()).hexdigest()[:16]
    for wanted in (
        f"- `{rows}`, sha256 {digest}", "48 rows to train on", "| learning_rate | `0.001` |", "| loss | `0.5` |",
        "| rewards/margins | `1.23457e+06` |", f"| torch | `{torch.__version__}` |", "7 optimizer steps",
        "https://arxiv.org/abs/2203.02155", "None is named here", "[redacted] \\|",
    ):  # fmt: skip
        assert wanted in body, wanted
    assert secret not in body
    assert "| seed |" not in body  # as by default
    assert str(tiny.resolve()) in body and "base_model_name_or_path" in body


def run_lines(folder: Path, body: str) -> str:
    """What the card's lines print where they are run."""
    code = body.partition("```python\n")[2].partition("```")[0]
    said = io.StringIO()
    with redirect_stdout(said):
        exec(compile(code, "README.md", "exec"), {})
    return said.getvalue()


@pytest.mark.parametrize("kind", ["adapter", "weights", "classifier"])
def test_the_lines_work(kind: str, tiny: Path, tmp_path: Path) -> None:
    """They generate from the template's prompt; or give the score at the end token, whatever stands behind it."""
    folder = final(tiny, tmp_path, kind)
    algo = "rm" if kind == "classifier" else "sft"
    tuner = "lora" if kind == "adapter" else "full"
    front, body = card(folder, str(tiny), "--algo", algo, "--tuner", tuner, "--model", str(tiny))
    assert front["library_name"] == ("peft" if kind == "adapter" else "transformers")
    printed = run_lines(folder, body)
    if kind != "classifier":
        assert printed.startswith("<|im_start|>Is water wet?<|im_end|>\n<|im_start|>")
        return
    assert front["pipeline_tag"] == "text-classification" and "reward-model" in front["tags"]
    ids = tiny_tokenizer()("<|im_start|>Is water wet?<|im_end|>\n<|im_start|>It is.<|im_end|>", return_tensors="pt")
    model = LlamaForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        want = float(model.score(model.model(ids["input_ids"]).last_hidden_state[0, -1]))
    assert float(printed.partition("[")[2].partition("]")[0]) == pytest.approx(want, abs=2e-4)


def test_a_score_without_a_class(tiny: Path, tmp_path: Path) -> None:
    """The card says that dsalign alone reads it."""
    folder = final(tiny, tmp_path, "classifier")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaForCausalLM"]}))
    _, body = card(folder, str(tiny), "--algo", "rm", "--tuner", "full", "--model", str(tiny))
    assert "no class that gives this model's score" in body and "```python" not in body


def test_a_moved_base_is_explained(tiny: Path, tmp_path: Path) -> None:
    """Absolute for PEFT; where dsalign finds it too."""
    folder = final(tiny, tmp_path, "adapter")
    (folder / "base_model.json").write_text(json.dumps({"base": str(tiny), "relative": "../../model"}))
    _, body = card(folder, str(tiny), "--algo", "sft", "--model", str(tiny))
    assert "dsalign also finds it at `../../model` from this folder" in body
    (folder / "base_model.json").write_text(json.dumps({"base": str(tiny), "name": "smollm2-135m-instruct"}))
    _, body = card(folder, str(tiny), "--algo", "sft", "--model", str(tiny))
    assert "by its name, `smollm2-135m-instruct`" in body
