"""PPO against reward models that --algo rm did not make from the same base: scores as transformers computes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import whole_runs
from safetensors.torch import save_file
from support import RankPool, tiny_config, tiny_folder, tiny_tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

NEW = 4  # tokens of a completion at most
QUESTION = "{% for m in messages %}{{ m.role[0] + ': ' + m.content + '; ' }}{% endfor %}"


def samples(two_ranks: RankPool, policy: Path, reward: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    """What one rollout of PPO printed: the completions of NEW ordinary characters, whose text gives their ids."""
    words = ["--algo", "ppo", "--model", str(policy), "--reward_model", str(reward), "--dataset", "demo:prompts#16"]
    words += ["--max_new_tokens", str(NEW), "--num_ppo_epochs", "1", "--output_dir", str(out), *more]
    two_ranks.run(whole_runs.train, words)
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    found = [line for line in lines if len(line["completion"]) == NEW]
    assert len(found) >= 2, "too few to compare"
    return found


@torch.no_grad()
def test_a_sequence_classifier_scores_the_sampled_ids(two_ranks: RankPool, tiny: Path, tmp_path: Path) -> None:
    """Its logit at the last token of prompt and completion, by its own forward; the critic starts from it."""
    reward = tmp_path / "classifier"
    torch.manual_seed(1)
    classifier = LlamaForSequenceClassification(tiny_config(num_labels=1)).eval()
    classifier.save_pretrained(reward)
    tiny_tokenizer().save_pretrained(reward)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for sample in samples(two_ranks, tiny, reward, tmp_path / "out", "--deepspeed", "zero3"):
        ids = tokenizer(sample["prompt"] + sample["completion"], return_tensors="pt")["input_ids"]
        assert sample["score"] == pytest.approx(float(classifier(input_ids=ids).logits), abs=1e-5)
    assert (tmp_path / "out" / "final" / "value" / "value_head.safetensors").exists()


@torch.no_grad()
@pytest.mark.parametrize("what", ["vocabulary", "template"])
def test_a_reward_model_of_another_tokenizer_reads_text(
    what: str, two_ranks: RankPool, tiny: Path, tmp_path: Path
) -> None:
    """The prompt's messages and the completion in its own template and ids; its value at the last of them."""
    reward = tiny_folder(tmp_path / "reward", seed=3)
    if what == "vocabulary":  # the same characters under other ids
        content = json.loads((reward / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["e"], vocabulary[" "] = vocabulary[" "], vocabulary["e"]
        (reward / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = AutoTokenizer.from_pretrained(reward)
    tokenizer.chat_template = QUESTION
    tokenizer.save_pretrained(reward)
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(5))
    head = {"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([0.25])}
    save_file(head, reward / "value_head.safetensors")
    model = LlamaForCausalLM.from_pretrained(reward)
    for sample in samples(two_ranks, tiny, reward, tmp_path / "out"):
        question = (
            sample["prompt"].removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n")
        )
        # The template ends an answer with "; ", then comes the end token, which a cut answer does not have.
        ids = tokenizer(f"u: {question}; a: {sample['completion']}; ", return_tensors="pt")["input_ids"]
        state = model.model(input_ids=ids).last_hidden_state[0, -1]
        assert sample["score"] == pytest.approx(float(weight[0] @ state) + 0.25, abs=1e-5)
