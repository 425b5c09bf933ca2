"""The TRL side of the DPO comparison. Run it with the Python of an environment that holds TRL (tried: 1.16.0):

    python benchmarks/trl_dpo.py --model FOLDER --dataset pairs.jsonl --out trl.jsonl

DPO on all weights in float32 on the CPU, rows in the file's order, one epoch, no warm-up, constant learning rate, no
dropout and no gradient checkpointing: what `compare_dpo.py` asks of dsalign as well. The file has `prompt, chosen,
rejected` as strings; they become one user turn and one assistant turn, so that TRL applies the chat template.

Tokens: a template that writes a newline after the end token makes TRL train on that newline too, while a dsalign
completion ends with its end token. So that both sides see the same ids, completions are cut after their first end
token here, before training; `--keep_tail` leaves TRL as it is. Prompts are compared with the template's own.

Weight decay: TRL (the Hugging Face trainer) leaves norm weights out of it, which moves them by learning_rate x 0.01 of
themselves a step less: nothing that shows in a short run.

Writes a JSON line per optimizer step (step, loss, rewards/margins, rewards/accuracies, ...), then one with
train_cpu_s (all threads, trainer.train() alone), train_wall_s, peak_rss_bytes (of the whole process) and token counts.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
KEYS = ("loss", "grad_norm", "learning_rate", *REWARDS, "logps/chosen", "logps/rejected")


class StepLog(TrainerCallback):
    """Appends each step's metrics to the file as a JSON line and prints it."""

    def __init__(self, out: Path) -> None:
        self.out = out
        out.write_text("")

    def write(self, record: dict[str, Any]) -> None:
        with self.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record), flush=True)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.write({"step": state.global_step, **{key: float(logs[key]) for key in KEYS if key in logs}})


def conversations(path: Path) -> Dataset:
    """The pairs of a JSONL file as TRL's conversational rows, in the file's order."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in rows
        ]
    )


def first_turn_only(ids: list[int], eos: int) -> list[int]:
    """The ids up to and including the first end token."""
    return ids[: ids.index(eos) + 1] if eos in ids else ids


def check_ids(dataset: Dataset, tokenizer: Any, cut: bool) -> None:
    """Every row's ids are the template's. Raises ValueError naming the first row where they are not."""
    for index, row in enumerate(dataset):
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        for side in ("chosen", "rejected"):
            whole = tokenizer.apply_chat_template(row["prompt"] + row[side], return_dict=True)["input_ids"]
            tail = whole[len(prompt) :]
            expected = prompt + (first_turn_only(tail, tokenizer.eos_token_id) if cut else tail)
            if row["prompt_ids"] + row[f"{side}_ids"] != expected:
                raise ValueError(
                    f"row {index}, {side}: TRL's ids differ from the chat template's: expected {expected}, "
                    f"got {row['prompt_ids'] + row[f'{side}_ids']}"
                )


def build(args: argparse.Namespace, log: StepLog, work: str) -> DPOTrainer:
    """The trainer, its rows tokenised and cut."""
    config = DPOConfig(
        output_dir=work, use_cpu=True, bf16=False, model_init_kwargs={"dtype": "float32"},
        beta=args.beta, loss_type=["sigmoid"], disable_dropout=True, max_length=args.max_length,
        per_device_train_batch_size=args.batch_size, gradient_accumulation_steps=1, gradient_checkpointing=False,
        learning_rate=args.learning_rate, lr_scheduler_type="constant", warmup_steps=0, num_train_epochs=1,
        optim="adamw_torch", adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, weight_decay=0.01, max_grad_norm=1.0,
        train_sampling_strategy="sequential", seed=42,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = DPOTrainer(
        model=args.model,
        args=config,
        train_dataset=conversations(args.dataset),
        processing_class=tokenizer,
        callbacks=[log],
    )
    eos = tokenizer.eos_token_id
    if not args.keep_tail:
        trainer.train_dataset = trainer.train_dataset.map(
            lambda row: {side: first_turn_only(row[side], eos) for side in ("chosen_ids", "rejected_ids")}
        )
    check_ids(trainer.train_dataset, tokenizer, cut=not args.keep_tail)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="TRL's DPO on the CPU, measured.")
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--dataset", type=Path, required=True, help="JSONL with prompt, chosen, rejected")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, a step each")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--batch_size", type=int, default=4, help="pairs an optimizer step")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--max_length", type=int, default=2048, help="tokens")
    parser.add_argument("--keep_tail", action="store_true", help="also train on what the template writes after the end")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        log = StepLog(args.out)
        trainer = build(args, log, work)
        rows = trainer.train_dataset
        completion = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in rows)
        prompts = sum(len(row["prompt_ids"]) for row in rows)
        cpu, wall = time.process_time(), time.perf_counter()
        trainer.train()
        log.write(
            {
                "train_cpu_s": time.process_time() - cpu,
                "train_wall_s": time.perf_counter() - wall,
                "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "completion_tokens": completion,
                "sequence_tokens": completion + 2 * prompts,
            }
        )


if __name__ == "__main__":
    main()
