"""The TRL side of `compare_trl.py`, which runs it with the Python of TRL's environment.

One epoch on all weights in float32, on a GPU under autocast to bfloat16 where that is asked for, rows in the file's
order, no warm-up, no dropout, no gradient checkpointing. Rows are those that dsalign reads; they become a user's and an
assistant's turn, so that TRL applies the chat template. Like a run of dsalign it ends with a checkpoint that could be
resumed and the model in a folder.

Tokens: a template that writes a newline after the end token makes TRL train on it (and CPO and ORPO on a second end
token behind it), while a completion of dsalign ends with its end token. So that both sides see the same ids, they are
cut after that token inside TRL's own preparation. What the cut costs is written down, and not counted against TRL.

Writes a JSON line per optimizer step, then one with cut_cpu_s and cut_wall_s.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import time
from pathlib import Path
from typing import Any

import torch
from compare_rows import turns, up_to_end
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

COMMON = {
    "gradient_checkpointing": False, "disable_dropout": True, "warmup_steps": 0,
    "optim": "adamw_torch_fused", "train_sampling_strategy": "sequential", "save_strategy": "epoch",
    "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
TRAINERS: dict[str, tuple[str, str, dict[str, Any]]] = {  # algorithm -> module, classes, only TRL's fields
    "dpo": ("trl", "DPO", {"loss_type": ["sigmoid"]}),
    "kto": ("trl", "KTO", {}),
    "rm": ("trl", "Reward", {}),
    "cpo": ("trl.experimental.cpo", "CPO", {}),
    "simpo": ("trl.experimental.cpo", "CPO", {"loss_type": "simpo"}),
    "orpo": ("trl.experimental.orpo", "ORPO", {}),
}


class StepLog(TrainerCallback):
    """Appends each step's metrics to the file as a JSON line."""

    def __init__(self, out: Path) -> None:
        self.out = out
        out.write_text("")

    def write(self, record: dict[str, Any]) -> None:
        with self.out.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            numbers = {name: float(x) for name, x in logs.items() if isinstance(x, (int, float))}
            self.write({"step": state.global_step, **numbers})


def cut(row: dict[str, Any], eos: int) -> dict[str, list[int]]:
    """The columns of a prepared row that change: every answer up to its end token, whatever the trainer calls it."""
    if "chosen_labels" in row:  # CPO, ORPO: whole sequences, of which the labels say where the answer begins
        found = {}
        for side in ("chosen", "rejected"):
            begin = sum(label == -100 for label in row[f"{side}_labels"])
            kept = up_to_end(row[f"{side}_input_ids"], eos, begin)
            found |= {f"{side}_{k}": row[f"{side}_{k}"][:kept] for k in ("input_ids", "attention_mask", "labels")}
        return found
    columns = [name for name in row if name.endswith("_ids") and name != "prompt_ids"]
    if "prompt_ids" in row:  # DPO, KTO: answers alone
        return {name: row[name][: up_to_end(row[name], eos)] for name in columns}
    pair = [row[name] for name in columns]  # a reward model: whole conversations, which part where the answers begin
    shared = sum(1 for _ in itertools.takewhile(lambda two: two[0] == two[1], zip(*pair, strict=False)))
    return {name: ids[: up_to_end(ids, eos, shared)] for name, ids in zip(columns, pair, strict=True)}


class Cutting:
    """Laid over a trainer of TRL: what it prepares is cut, and the clock of that stands in cpu_s and wall_s."""

    cpu_s = wall_s = 0.0

    def _cut(self, prepared: Any, eos: int) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()
        if isinstance(prepared, Dataset):
            prepared = prepared.map(cut, fn_kwargs={"eos": eos})
        else:
            prepared |= cut(prepared, eos)
        Cutting.cpu_s += time.process_time() - cpu
        Cutting.wall_s += time.perf_counter() - wall
        return prepared

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *rest: Any) -> Any:
        prepared = super()._prepare_dataset(dataset, processing_class, *rest)  # type: ignore[misc]
        return self._cut(prepared, processing_class.eos_token_id)

    def tokenize_row(self, feature: Any, model: Any = None) -> Any:
        row = super().tokenize_row(feature, model)  # type: ignore[misc]
        return self._cut(row, self.processing_class.eos_token_id)  # type: ignore[attr-defined]


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


def build(args: argparse.Namespace, log: StepLog) -> Any:
    """The trainer, its rows tokenised and cut."""
    module, name, own = TRAINERS[args.algo]
    classes = importlib.import_module(module)
    trainer = type("Trainer", (Cutting, getattr(classes, f"{name}Trainer")), {})
    config = getattr(classes, f"{name}Config")(
        **COMMON, **own, **json.loads(args.settings), output_dir=str(args.folder / "checkpoints")
    )
    auto = AutoModelForSequenceClassification if args.algo == "rm" else AutoModelForCausalLM
    lines = args.dataset.read_text(encoding="utf-8").splitlines()
    return trainer(
        model=auto.from_pretrained(args.model, dtype=torch.float32),
        args=config,
        train_dataset=Dataset.from_list([turns(json.loads(line)) for line in lines]),
        processing_class=AutoTokenizer.from_pretrained(args.model),
        callbacks=[log],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="TRL on the CPU or a GPU.")
    parser.add_argument("--model", required=True, help="a model folder; for rm one with a score layer")
    parser.add_argument("--folder", type=Path, required=True, help="where to write: steps.jsonl, checkpoints/, final/")
    parser.add_argument("--algo", choices=sorted(TRAINERS))
    parser.add_argument("--dataset", type=Path, help="JSONL of pairs; for kto of labelled rows")
    parser.add_argument("--settings", default="{}", help="JSON: further fields of TRL's configuration")
    parser.add_argument("--make_classifier", action="store_true", help="write a reward model into --folder and stop")
    args = parser.parse_args()
    if args.make_classifier:
        make_classifier(args.model, args.folder)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    log = StepLog(args.folder / "steps.jsonl")
    trainer = build(args, log)
    trainer.train()
    trainer.save_model(str(args.folder / "final"))
    log.write({"cut_cpu_s": Cutting.cpu_s, "cut_wall_s": Cutting.wall_s})


if __name__ == "__main__":
    main()
