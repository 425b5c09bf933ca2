"""The TRL side of the comparison. Run it with the Python of an environment that holds TRL (tried: 1.16.0):

    python benchmarks/trl_side.py --algo dpo --model FOLDER --dataset pairs.jsonl --out trl.jsonl

One epoch on all weights in float32 on the CPU, rows in the file's order, no warm-up, constant learning rate, no dropout
and no gradient checkpointing: what `compare_trl.py` asks of dsalign as well. The file has `prompt, chosen, rejected`
as strings (KTO: `prompt, completion, label`); they become one user turn and one assistant turn, so that TRL applies the
chat template, or for CPO, ORPO and SimPO, whose trainers take text, the text that the template makes of them.

Tokens: a template that writes a newline after the end token makes TRL read that newline too, while a dsalign completion
ends with its end token. So that both sides see the same ids, sequences are cut after their last end token here, before
training. Weight decay: TRL (the Hugging Face trainer) leaves norm weights out of it, which moves them by
learning_rate x 0.01 of themselves a step less: nothing that shows in a short run.

Writes a JSON line per optimizer step, then one with the seconds that building the trainer took (tokenising the rows is
most of it), train_cpu_s (all threads, trainer.train() alone), and peak_rss_bytes (of the whole process).
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import re
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

COMMON = {
    "use_cpu": True, "bf16": False, "disable_dropout": True, "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False, "lr_scheduler_type": "constant", "warmup_steps": 0, "num_train_epochs": 1,
    "optim": "adamw_torch", "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8, "weight_decay": 0.01,
    "max_grad_norm": 1.0, "train_sampling_strategy": "sequential", "seed": 42, "logging_steps": 1,
    "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
TRAINERS = {  # algorithm -> (module, name of its classes, what its configuration gets beside the common part)
    "dpo": ("trl", "DPO", {"beta": 0.1, "loss_type": ["sigmoid"]}),
    "kto": ("trl", "KTO", {"beta": 0.1}),
    "rm": ("trl", "Reward", {}),
    "cpo": ("trl.experimental.cpo", "CPO", {"beta": 0.1, "cpo_alpha": 0.0}),
    "simpo": ("trl.experimental.cpo", "CPO", {"beta": 2.0, "simpo_gamma": 1.0, "loss_type": "simpo", "cpo_alpha": 0.0}),
    "orpo": ("trl.experimental.orpo", "ORPO", {"beta": 0.1}),
}
DEMO_ROWS = Path(__file__).resolve().parent.parent / "dsalign" / "assets" / "pairs.jsonl"
TEXT = ("cpo", "simpo", "orpo")  # their trainers take text


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
            numbers = {name: float(x) for name, x in logs.items() if isinstance(x, (int, float))}
            self.write({"step": state.global_step, **numbers})


def turns(row: dict[str, Any], algo: str) -> dict[str, Any]:
    """A row as messages: user for the prompt, assistant for each answer."""
    question = [{"role": "user", "content": row["prompt"]}]
    answers = {
        name: [{"role": "assistant", "content": row[name]}]
        for name in ("chosen", "rejected", "completion")
        if name in row
    }
    if algo == "rm":
        return {name: question + answer for name, answer in answers.items()}
    return {"prompt": question, **answers, **({"label": row["label"]} if "label" in row else {})}


def text(row: dict[str, Any], tokenizer: Any) -> dict[str, str]:
    """A row as the text that the template makes of it, answers up to their end token."""
    messages = turns(row, "dpo")
    prompt = tokenizer.apply_chat_template(messages["prompt"], add_generation_prompt=True, tokenize=False)
    found = {"prompt": prompt}
    for name in ("chosen", "rejected"):
        whole = tokenizer.apply_chat_template(messages["prompt"] + messages[name], tokenize=False)
        end = whole.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
        found[name] = whole[len(prompt) : end]
    return found


def up_to_end(ids: list[int], eos: int) -> list[int]:
    """The ids up to and including the last end token."""
    last = max((i for i, x in enumerate(ids) if x == eos), default=len(ids) - 1)
    return ids[: last + 1]


def make_classifier(model: str, folder: Path) -> None:
    """A folder that both sides open as a reward model: the same weights and the same new score layer. Pad and end are
    two tokens, as a classifier of transformers takes the score of the last token that is no pad."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype="float32")
    classifier.config.pad_token_id = 0
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_long(model: str, rows: int, out: Path) -> None:
    """Pairs whose prompts are 256 tokens and whose answers are 64, of words from the demo rows in random order."""
    tokenizer, draw = AutoTokenizer.from_pretrained(model), random.Random(0)
    known = sorted(set(re.findall(r"[a-z]+", DEMO_ROWS.read_text())))

    def words(count: int) -> str:
        found = ""
        while len(tokenizer(found)["input_ids"]) < count:
            found += f" {draw.choice(known)}"
        return found.strip()

    lines = [{"prompt": words(256), "chosen": words(64), "rejected": words(64)} for _ in range(rows)]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))


def build(args: argparse.Namespace, log: StepLog, work: str) -> Any:
    """The trainer, its rows tokenised and cut."""
    module, name, own = TRAINERS[args.algo]
    classes = importlib.import_module(module)
    settings = {**COMMON, **own, "output_dir": work, "max_length": args.max_length}
    settings |= {"per_device_train_batch_size": args.batch_size, "learning_rate": args.learning_rate}
    if args.precompute:
        settings["precompute_ref_log_probs"] = True
    if args.num_proc:
        settings["dataset_num_proc"] = args.num_proc
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    lines = args.dataset.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    as_text = args.algo in TEXT
    dataset = Dataset.from_list([text(row, tokenizer) if as_text else turns(row, args.algo) for row in rows])
    if args.algo == "rm":
        model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=1, dtype="float32")
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32")
    trainer = getattr(classes, f"{name}Trainer")(
        model=model,
        args=getattr(classes, f"{name}Config")(**settings),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[log],
    )
    if not as_text and not args.prepare_only:
        eos = tokenizer.eos_token_id
        columns = [c for c in trainer.train_dataset.column_names if c.endswith("_ids") and c != "prompt_ids"]
        trainer.train_dataset = trainer.train_dataset.map(lambda row: {c: up_to_end(row[c], eos) for c in columns})
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description="TRL on the CPU, measured.")
    parser.add_argument("--algo", choices=sorted(TRAINERS), default="dpo")
    parser.add_argument("--model", required=True, help="a model folder; for rm one with a score layer")
    parser.add_argument("--dataset", type=Path, help="JSONL with prompt, chosen, rejected")
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, a step each")
    parser.add_argument("--batch_size", type=int, default=4, help="rows an optimizer step")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--max_length", type=int, default=2048, help="tokens")
    parser.add_argument("--precompute", action="store_true", help="the reference's log-probabilities before training")
    parser.add_argument("--num_proc", type=int, default=0, help="processes that tokenise; 0 = TRL's default")
    parser.add_argument("--prepare_only", action="store_true", help="tokenise and stop")
    parser.add_argument("--make_classifier", action="store_true", help="write a reward model to --out and stop")
    parser.add_argument("--make_long", type=int, default=0, help="write so many long pairs to --out and stop")
    args = parser.parse_args()
    if args.make_classifier:
        return make_classifier(args.model, args.out)
    if args.make_long:
        return make_long(args.model, args.make_long, args.out)
    with tempfile.TemporaryDirectory() as work:
        log = StepLog(args.out)
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.process_time()
        wall = time.perf_counter()
        trainer = build(args, log, work)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        children = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        record = {
            "build_cpu_s": time.process_time() - start + children,
            "build_wall_s": time.perf_counter() - wall,
        }
        if not args.prepare_only:
            start = time.process_time()
            trainer.train()
            record["train_cpu_s"] = time.process_time() - start
        log.write({**record, "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024})


if __name__ == "__main__":
    main()
