"""The TRL side of `compare_ppo.py`, which runs it with the Python of an environment with TRL 1.10; TRL 1.16 has no PPO.

All weights are trained in float32, on a GPU under autocast to bfloat16 where that is asked for, without dropout,
warm-up or gradient checkpointing. One batch comes again in every iteration: the data set holds it once an iteration and
once more, and is not shuffled. The batch more is not used: in the last batch of a data set accelerate lets the
optimizer step at every micro-batch. A prompt with several answers stands in the batch several times, as this trainer
samples one answer a row.

Pad is a token that no prompt holds: the trainer takes every pad token for padding, and SmolLM2's own pad token ends
each turn of a prompt. The policy's generation config is told so too: from there comes the padding of a row that ended.

Writes a JSON line an iteration: what the trainer logs, and of its rollout the number of rows, and tokens of prompts and
of answers up to their end token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from compare_rows import up_to_end
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer
from trl_side import StepLog

COMMON = {
    "gradient_checkpointing": False, "warmup_steps": 0, "optim": "adamw_torch_fused",
    "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
PAD = 0  # SmolLM2's <|endoftext|>


class IterationLog(StepLog):
    """Writes what the trainer logs in an iteration, with what `counted` saw of its rollout."""

    def __init__(self, out: Path) -> None:
        super().__init__(out)
        self.rollout: dict[str, int] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss/policy_avg" in logs:
            numbers = {name: float(x) for name, x in logs.items() if isinstance(x, (int, float))}
            self.write({"step": state.global_step, **numbers, **self.rollout})

    def counted(self, sample: Callable[..., Any], stop: int) -> Callable[..., Any]:
        """The trainer's function that samples, its tokens counted. stop: the end token of an answer."""

        def batch_generation(model: Any, queries: torch.Tensor, *rest: Any) -> Any:
            found, logits = sample(model, queries, *rest)
            answers = found[:, queries.shape[1] :]
            self.rollout = {
                "rows": len(queries),
                "prompt_tokens": int((queries != PAD).sum()),
                "tokens": sum(up_to_end(ids, stop) for ids in answers.tolist()),
            }
            return found, logits

        return batch_generation


def in_order(dataset: Any, **options: Any) -> Any:
    """The trainer's loader, but that it does not shuffle."""
    return DataLoader(dataset, **{**options, "shuffle": False})


def main() -> None:
    parser = argparse.ArgumentParser(description="PPO of TRL on the CPU or a GPU.")
    parser.add_argument("--model", required=True, help="the policy's folder, and the reference's")
    parser.add_argument("--reward_model", required=True, help="a folder with a score layer; the critic starts from it")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON: token ids of each row of a batch")
    parser.add_argument("--settings", required=True, help="JSON: further fields of PPOConfig")
    parser.add_argument("--folder", type=Path, required=True, help="where to write: steps.jsonl")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(PAD)
    batch = [{"input_ids": ids} for ids in json.loads(args.prompts.read_text())]
    settings = json.loads(args.settings)
    rows = Dataset.from_list(batch * (settings["total_episodes"] // len(batch) + 1))
    scored = [
        AutoModelForSequenceClassification.from_pretrained(args.reward_model, num_labels=1, dtype=torch.float32)
        for _ in range(2)
    ]
    causal = [AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32) for _ in range(2)]
    causal[0].generation_config.pad_token_id = PAD
    log = IterationLog(args.folder / "steps.jsonl")
    ppo_trainer.DataLoader = in_order
    ppo_trainer.batch_generation = log.counted(ppo_trainer.batch_generation, settings["stop_token_id"])
    trainer = PPOTrainer(
        args=PPOConfig(**COMMON, **settings, output_dir=str(args.folder / "checkpoints")),
        processing_class=tokenizer,
        model=causal[0],
        ref_model=causal[1],
        reward_model=scored[0],
        value_model=scored[1],
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=[log],
    )
    trainer.train()


if __name__ == "__main__":
    main()
