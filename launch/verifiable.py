"""Reinforcement learning whose reward can be checked: SmolLM2-135M-Instruct learns to answer in one short sentence, by
PPO or GRPO with LoRA on two CPU ranks. Prompts are made at run time, and a program checks each answer.

The topics of the test are never trained on. Exits 0 where the share of their answers that keep every rule clearly
rises, 1 where it does not; result.json in the output folder has the curve and the answers before and after.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from demo import EMBEDDED, ROOT, arguments, curve, launch, read_metric, sampled
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, logging

from dsalign.models.names import resolve

ASKED = ("Describe", "Explain the purpose of", "Say something true about", "Tell a child about")
TOPICS = (
    "rain", "bread", "the moon", "a library", "soap", "a bicycle", "honey", "the wind", "a clock", "salt", "a bridge",
    "winter", "a mirror", "tea", "the ocean", "a candle", "music", "a garden", "glass", "a letter", "sleep", "a boat",
    "paper", "a shadow", "fire", "a market", "snow", "a pencil", "the sun", "a key", "friendship", "a map", "wool",
    "a lighthouse", "dust", "a compass", "thunder", "a blanket", "milk", "an echo", "a ladder", "sand", "a drum",
    "yeast", "a lantern", "the tide", "a button", "ice",
)  # fmt: skip
HELD_OUT = 12  # topics
MOST_WORDS = 14
MOST_TOKENS = 28  # of an answer
LEAST_RISE = 0.3  # of the share of answers that keep every rule
BOTH: Mapping[str, Any] = {
    "tuner": "lora",
    "template": "chatml",
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_generations": 4,
    "max_new_tokens": MOST_TOKENS,
    "num_train_epochs": 2,
    "logging_steps": 1,
    "learning_rate": 3e-4,
    "weight_decay": 0,
}
OWN: Mapping[str, Mapping[str, Any]] = {
    "grpo": {},
    # lam 1: the reward comes with the last token, and a critic of few rollouts says little about the tokens before.
    "ppo": {"num_ppo_epochs": 1, "num_mini_batches": 1, "critic_learning_rate": 5e-4, "kl_coef": 0.02, "lam": 1.0},
}


def rules(text: str) -> tuple[bool, bool, bool]:
    """Which rules an answer keeps: it ends with a full stop; it has no other end of a sentence and no line break; its
    number of words is 3 to MOST_WORDS."""
    text = text.strip()
    inside = re.search(r"[.!?:](?=\s)|\n", text[:-1])
    return text.endswith("."), bool(text) and inside is None, 3 <= len(text.split()) <= MOST_WORDS


def one_short_sentence(completions: Sequence[str], **_: Any) -> list[float]:
    """The share of the rules that each completion keeps: a reward of `--reward_funcs`."""
    return [sum(rules(text)) / 3 for text in completions]


def prompts(seed: int) -> tuple[list[str], list[str]]:
    """(to train on, held out)."""
    topics = list(TOPICS)
    random.Random(seed).shuffle(topics)
    made = [f"{asked} {topic} in one short sentence." for topic in topics for asked in ASKED]
    cut = HELD_OUT * len(ASKED)
    return made[cut:], made[:cut]


def kept(texts: Sequence[str]) -> float:
    """The share of answers that keep every rule."""
    return sum(all(rules(text)) for text in texts) / len(texts)


def run(algo: str, seed: int, folder: Path) -> dict[str, Any]:
    """Train, and answer the held-out questions before and after."""
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    train, test = prompts(seed)
    lines = "".join(json.dumps({"prompt": text}) + "\n" for text in train)
    (folder / "train.jsonl").write_text(lines, encoding="utf-8")
    reward = f"{Path(__file__).resolve().relative_to(ROOT)}:one_short_sentence"
    given = {"model": EMBEDDED, "dataset": folder / "train.jsonl", "seed": seed, "reward_funcs": reward}
    launch(2, arguments(algo, folder, {**given, **BOTH, **OWN[algo]}))
    final = folder / algo / "final"
    tokenizer = AutoTokenizer.from_pretrained(final)
    answers = []
    for model in (
        AutoModelForCausalLM.from_pretrained(resolve(EMBEDDED).weights),
        AutoPeftModelForCausalLM.from_pretrained(final),
    ):
        torch.manual_seed(seed)
        answers.append(sampled(model.eval(), tokenizer, test, MOST_TOKENS))
    before, after = answers
    return {
        "algo": algo, "seed": seed, "kept_before": kept(before), "kept_after": kept(after),
        "seconds": round(time.monotonic() - started), "scores": read_metric(folder / algo, "objective/scores"),
        "answers": [
            {"question": q, "before": old, "after": new} for q, old, new in zip(test, before, after, strict=True)
        ],
    }  # fmt: skip


def main() -> int:
    """One run; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", choices=sorted(OWN), default="grpo")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, default=Path("output") / "verifiable", help="folder that is written")
    options = parser.parse_args()
    os.chdir(ROOT)
    logging.disable_progress_bar()
    folder = options.out / f"{options.algo}-{options.seed}"
    found = run(options.algo, options.seed, folder)
    (folder / "result.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for one in found["answers"][:8]:
        print(f"\n{one['question']}\n  before  {one['before']}\n  after   {one['after']}")
    print(f"\nmean reward of each rollout\n{curve(found['scores'])}")
    risen = found["kept_after"] - found["kept_before"] >= LEAST_RISE
    print(
        f"\n{'PASSED' if risen else 'FAILED'}: of {len(found['answers'])} answers about topics that were not trained "
        f"on, {found['kept_before']:.2f} kept every rule before and {found['kept_after']:.2f} after; "
        f"{found['seconds']} s; {folder / 'result.json'}"
    )
    return 0 if risen else 1


if __name__ == "__main__":
    sys.exit(main())
