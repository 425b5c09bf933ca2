"""Whole runs on a base in 4 bits, on two ranks. They need bitsandbytes: pip install 'dsalign[4bit]'."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import whole_runs
from safetensors.torch import load_file
from support import RankPool, tiny_folder

from dsalign import cli
from dsalign.models.names import resolve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes: dsalign[4bit]"),
]
BASE = "--load_in_4bit true --lora_rank 4 --batch_size 2 --gradient_accumulation_steps 1 --learning_rate 1e-2"
TIMED = ("tokens_per_s", "memory/peak", "time/rollout", "time/score", "time/reference", "time/train", "time/wait")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with rows of 64, as many as a block has."""
    return tiny_folder(tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=128)


def lines(folder: Path) -> list[dict[str, float]]:
    """What was logged, without what a clock or the machine decides."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMED} for line in found]


def run(pool: RankPool, folder: Path, *words: object) -> list[dict[str, float]]:
    """The logged lines of a run of these words on all ranks, which leaves no packed weight on the disk."""
    pool.run(whole_runs.train, [*BASE.split(), *map(str, words), "--logging_steps", "1", "--output_dir", str(folder)])
    assert resolve(str(folder / "final")).four_bit
    for file in folder.rglob("*.pt"):  # an engine's files hold adapters and moments alone
        assert file.stat().st_size < 2_000_000
    return lines(folder)


def test_sft_then_dpo_resumed_then_merged(wide: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """SFT learns; DPO goes on from its adapter, whose start is the reference on the same 4-bit base, so that its first
    loss is log 2; resumed it is the uninterrupted run, bit for bit; merged it computes what the adapter does."""
    sft, dpo, again = tmp_path / "sft", tmp_path / "dpo", tmp_path / "again"
    learnt = run(two_ranks, sft, "--algo", "sft", "--model", wide, "--dataset", "demo:demonstrations#32",
                 "--num_train_epochs", 2)  # fmt: skip
    assert learnt[-1]["loss"] < 0.8 * learnt[0]["loss"]
    words = ["--algo", "dpo", "--model", sft / "final", "--dataset", "demo:pairs#16", "--rpo_alpha", 0]
    words += ["--split_dataset_ratio", 0.25, "--save_steps", 1, "--save_total_limit", 9]
    whole = run(two_ranks, dpo, *words)
    first = next(line for line in whole if "loss" in line)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4) and first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    step = dpo / "checkpoint-1"
    resumed = run(two_ranks, again, *words, "--resume", step, "--trust_checkpoint", "true")
    assert resumed == [line for line in whole if line["step"] > 1] and len(resumed) >= 2
    one, two = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (dpo, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    said = two_ranks.run(whole_runs.refusal, [
        *BASE.replace("--load_in_4bit true", "--load_in_4bit false").split(), *map(str, words), "--resume", str(step),
        "--trust_checkpoint", "true", "--output_dir", str(tmp_path / "other"),
    ])  # fmt: skip
    assert "--load_in_4bit was true, is false" in said
    assert cli.main(["merge", str(dpo), "--output_dir", str(tmp_path / "merged")]) == 0
    assert not resolve(str(tmp_path / "merged")).four_bit


@pytest.mark.parametrize(
    ("algo", "more"),
    [
        ("ppo", "--num_ppo_epochs 2"),
        ("grpo", "--num_generations 4 --dtype bfloat16 --rollout plain"),
        ("grpo", "--num_generations 4 --rollout local --gradient_checkpointing true --deepspeed zero1"),
    ],
)
def test_what_samples(algo: str, more: str, wide: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """Rollouts come from unpacked weights and pass the probe: in float32 sampler and trainer are equal. A critic is in
    4 bits too."""
    found = run(two_ranks, tmp_path, "--algo", algo, "--model", wide, "--dataset", "demo:prompts#8",
                "--max_new_tokens", 8, "--reward_funcs", "demo:friendly", *more.split())  # fmt: skip
    limit = 0.05 if "bfloat16" in more else 1e-4
    assert all(abs(line["rollout/logp_gap"]) < limit for line in found) and found[0]["objective/kl"] < limit
    if algo == "ppo":
        assert resolve(str(tmp_path / "final" / "value")).four_bit
