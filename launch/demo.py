"""PPO from nothing on two CPU ranks: a model is brought up with SFT, a reward model with RM, and PPO shifts the style
of its answers from half gruff to friendly. The model is a tiny one with random weights, or with --real
SmolLM2-135M-Instruct with LoRA.

Exits 0 where the mean reward of the last rollouts clearly exceeds that of the first, 1 where it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    logging,
)

from dsalign.launcher import free_port

ROOT = Path(__file__).resolve().parent.parent
WORLD = ROOT / "dsalign" / "assets" / "demo" / "world.jsonl"
OUTPUT = Path("output")  # of the checkout
SPECIALS = ("<pad>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHOWN = 8  # questions that are answered before and after
EMBEDDED = "smollm2-135m-instruct"
LAST = 3  # rollouts whose mean is compared with the first one's


@dataclass(frozen=True)
class Recipe:
    """The options of each stage; `both` is those of all stages."""

    folder: Path
    ranks: int  # of SFT and RM; PPO has two
    both: Mapping[str, Any]
    sft: Mapping[str, Any]
    rm: Mapping[str, Any]
    ppo: Mapping[str, Any]

    def options(self, algo: str) -> dict[str, Any]:
        """Those of one stage, those of all stages among them."""
        own: Mapping[str, Any] = getattr(self, algo)
        return {"gradient_accumulation_steps": 1, **self.both, **own}


TINY = Recipe(
    folder=OUTPUT / "demo",
    ranks=1,
    both={"tuner": "full", "weight_decay": 0},
    sft={"batch_size": 32, "learning_rate": 3e-3, "num_train_epochs": 60},
    rm={"batch_size": 16, "learning_rate": 3e-4, "num_train_epochs": 4},
    ppo={
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "logging_steps": 4,  # epochs x mini-batches: a line a rollout
        "batch_size": 16,
        "num_generations": 2,
        "num_train_epochs": 12,
        "learning_rate": 2e-4,
        "critic_learning_rate": 5e-4,
        "kl_coef": 0.3,
        "max_new_tokens": 24,
        "num_sample_generations": 4,
    },
)
REAL = Recipe(
    folder=OUTPUT / "demo-real",
    ranks=2,
    both={"tuner": "lora", "weight_decay": 0},
    # ChatML without the system prompt that the model's own template puts first: half as many tokens.
    sft={"batch_size": 16, "learning_rate": 1e-3, "num_train_epochs": 3, "template": "chatml"},
    rm={"batch_size": 4, "learning_rate": 3e-4, "num_train_epochs": 2},
    ppo={
        "num_ppo_epochs": 1,
        "num_mini_batches": 2,
        "logging_steps": 2,
        "batch_size": 8,
        "num_generations": 2,
        "num_train_epochs": 4,
        "learning_rate": 3e-4,
        "critic_learning_rate": 5e-4,
        "kl_coef": 0.1,
        "max_new_tokens": 24,
        "num_sample_generations": 4,
    },
)


def world() -> list[dict[str, str]]:
    """Rows of prompt, friendly and gruff: a question and its two answers."""
    return [json.loads(line) for line in WORLD.read_text(encoding="utf-8").splitlines()]


def write_rows(rows: Sequence[Mapping[str, str]], folder: Path) -> None:
    """sft.jsonl with both styles in equal parts, pairs.jsonl that prefer the friendly one, prompts.jsonl."""
    both = [{"prompt": row["prompt"], "completion": row[style]} for row in rows for style in ("friendly", "gruff")]
    pairs = [{"prompt": row["prompt"], "chosen": row["friendly"], "rejected": row["gruff"]} for row in rows]
    files = {"sft": both, "pairs": pairs, "prompts": [{"prompt": row["prompt"]} for row in rows]}
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """Byte-level BPE trained on `texts`, with ChatML turns; <|im_end|> ends them."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([*texts, "system\nuser\nassistant\n"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<|im_end|>", chat_template=CHATML
    )


def make_base(rows: Sequence[Mapping[str, str]], folder: Path, seed: int) -> None:
    """A folder with a Llama of 3 layers, 128 wide, with random weights, and the tokenizer of the rows."""
    tokenizer = make_tokenizer([text for row in rows for text in row.values()])
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=256,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
            tie_word_embeddings=True,
        )
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def arguments(algo: str, folder: Path, options: Mapping[str, Any]) -> list[str]:
    """The words behind launch/train.py."""
    given = {"algo": algo, "output_dir": folder / algo, **options}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def launch(ranks: int, words: Sequence[str]) -> None:
    """Trains without a GPU. Raises SystemExit where it fails."""
    shown = f"deepspeed --num_accelerators {ranks} launch/train.py {' '.join(words)}"
    print(f"\n$ {shown}", flush=True)
    port = free_port()  # the launcher's own may be another run's
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(ranks)]
    # One thread a rank: a second one gains little on so small a model, and waits in a loop where the cores are shared.
    environment = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [*runner, "--master_port", str(port), "--log_level", "error", "launch/train.py", *words]
    started = time.monotonic()
    code = subprocess.run(command, env={**os.environ, **environment}, check=False).returncode
    if code:
        sys.exit(f"demo: `{shown}` ended with code {code}")
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


def read_metric(folder: Path, name: str) -> list[float]:
    """The values of a metric in the order of the steps."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line[name] for line in lines if name in line]


def curve(rewards: Sequence[float], width: int = 50) -> str:
    """A line a rollout: its mean reward and a bar between the lowest and the highest."""
    low, span = min(rewards), max(rewards) - min(rewards) or 1.0
    bars = ("#" * (1 + round((reward - low) / span * (width - 1))) for reward in rewards)
    return "\n".join(f"  {i:3} {reward:8.3f} {bar}" for i, (reward, bar) in enumerate(zip(rewards, bars, strict=True)))


def verdict(rewards: Sequence[float], least: float) -> tuple[int, str]:
    """(exit code, a line): 0 where the mean of the last rollouts is at least `least` above the first one's."""
    last = rewards[-LAST:]
    end = sum(last) / len(last)
    rise = end - rewards[0]
    risen = len(rewards) > LAST and rise >= least
    text = (
        f"mean reward {rewards[0]:.3f} at the first rollout (the baseline: nothing trained yet), {end:.3f} over the "
        f"last {len(last)}: {rise:+.3f}, at least {least:+.3f} was expected"
    )
    return (0, f"PASSED: {text}") if risen else (1, f"FAILED: {text}")


@torch.no_grad()
def sampled(model: Any, tokenizer: Any, questions: Sequence[str], max_new_tokens: int) -> list[str]:
    """One sampled answer to each question, all in one batch, by transformers alone; one that does not end is cut."""
    tokenizer.padding_side = "left"
    turns = [[{"role": "user", "content": question}] for question in questions]
    inputs = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
    )
    out = model.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=max_new_tokens)
    found: list[str] = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return found


def answers(folder: Path, questions: Sequence[str], seed: int, max_new_tokens: int) -> list[str]:
    """One sampled answer to each question, one after the other."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    return [text for question in questions for text in sampled(model, tokenizer, [question], max_new_tokens)]


def run(recipe: Recipe, base: Path | str, seed: int) -> int:
    """Base model -> SFT -> RM -> PPO, before and after; returns the exit code."""
    folder, rows = recipe.folder, world()
    random.Random(seed).shuffle(rows)
    write_rows(rows, folder)
    start, reward = folder / "sft" / "final", folder / "rm" / "final"
    given = {
        "sft": {"model": base, "dataset": folder / "sft.jsonl"},
        "rm": {"model": start, "dataset": folder / "pairs.jsonl"},
        "ppo": {"model": start, "reward_model": reward, "dataset": folder / "prompts.jsonl"},
    }
    for ranks, algo in ((recipe.ranks, "sft"), (recipe.ranks, "rm"), (2, "ppo")):
        launch(ranks, arguments(algo, folder, {**given[algo], "seed": seed, **recipe.options(algo)}))
    questions, longest = [row["prompt"] for row in rows[:SHOWN]], recipe.ppo["max_new_tokens"]
    before, after = (answers(folder / algo / "final", questions, seed, longest) for algo in ("sft", "ppo"))
    for question, old, new in zip(questions, before, after, strict=True):
        print(f"\n{question}\n  before  {old}\n  after   {new}")
    rewards = read_metric(folder / "ppo", "objective/scores")
    print(f"\nmean reward of each rollout\n{curve(rewards)}")
    # Half of the answers are friendly at first, so half of the margin is all there is to win: half of that is clear.
    code, text = verdict(rewards, read_metric(folder / "rm", "rewards/margins")[-1] / 4)
    print(f"\n{text}")
    return code


def main() -> int:
    """The demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M-Instruct with LoRA in place of a tiny model")
    options = parser.parse_args()
    os.chdir(ROOT)
    logging.disable_progress_bar()
    started = time.monotonic()
    recipe, base = (REAL, EMBEDDED) if options.real else (TINY, TINY.folder / "base")
    recipe.folder.mkdir(parents=True, exist_ok=True)
    if not options.real:
        make_base(world(), TINY.folder / "base", options.seed)
    code = run(recipe, base, options.seed)
    print(f"{time.monotonic() - started:.0f} s in all; files in {recipe.folder}")
    return code


if __name__ == "__main__":
    sys.exit(main())
