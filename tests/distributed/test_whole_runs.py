"""Whole runs on two ranks, by the documented flags: what they leave, and that one run goes on from another."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import whole_runs
from safetensors.torch import load_file
from support import RankPool, quick_if

from dsalign.loop.clock import PHASES

DOCUMENTED = (
    "--sft_type lora --num_train_epochs 2 --lora_target_modules ALL --gradient_checkpointing true --batch_size 1 "
    "--learning_rate 5e-5 --gradient_accumulation_steps 16 --warmup_ratio 0.03 --save_total_limit 2"
)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow  # make demo does the same
def test_sft_then_rm_then_ppo_by_folders(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """The chain by the documented commands, two steps or more each; each starts from the last one's final/."""
    base = ["--model_type", str(tiny), *DOCUMENTED.split(), "--logging_steps", "1"]
    sft, rm, ppo = (tmp_path / name for name in ("sft", "rm", "ppo"))
    two_ranks.run(
        whole_runs.train, ["--rlhf_type", "sft", "--dataset", "demo:demonstrations#32", *base, "--output_dir", str(sft)]
    )
    base[1] = str(sft / "final")
    two_ranks.run(whole_runs.train, ["--rlhf_type", "rm", "--dataset", "demo:pairs#32", *base, "--output_dir", str(rm)])
    reward = ["--reward_model_id_or_path", str(rm / "final"), "--reward_model_type", str(tiny)]
    words = ["--rlhf_type", "ppo", "--dataset", "demo:prompts#32", *base, *reward, "--output_dir", str(ppo)]
    two_ranks.run(whole_runs.train, [*words, "--max_new_tokens", "8"])
    for folder in (sft, rm, ppo):
        assert {p.name for p in folder.iterdir()} >= {
            "final",
            "config.yaml",
            "command.txt",
            "metrics.jsonl",
            "report.html",
        }
        assert (folder / "final" / "adapter_model.safetensors").exists()
        ends = json.loads((folder / "final" / "generation_config.json").read_text())["eos_token_id"]
        assert ends == [2], "every id that ended a turn in training"
        base_name = json.loads((folder / "final" / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert Path(base_name) == tiny.resolve(), "an adapter sits on the base, also where it went on from another"
    assert set(load_file(rm / "final" / "value_head.safetensors")) == {"v_head.summary.weight", "v_head.summary.bias"}
    assert (ppo / "final" / "value" / "value_head.safetensors").exists()
    first, *_, last = metrics(ppo)
    assert last["step"] == 2 * 4, "two rollouts, four passes"
    assert first["objective/kl"] == pytest.approx(0, abs=1e-5) and first["val/ratio"] == pytest.approx(1, abs=1e-5)
    samples = [json.loads(line) for line in (ppo / "samples.jsonl").read_text().splitlines()]
    assert {s["step"] for s in samples} == {0, 4} and all(math.isfinite(s["score"]) for s in samples)


@pytest.mark.parametrize(
    ("algo", "data", "more"),
    [
        ("ppo", "demo:prompts#24", "--max_new_tokens 6 --num_ppo_epochs 2 --num_mini_batches 1"),
        quick_if(
            False,
            "grpo",
            "demo:prompts#24",
            "--max_new_tokens 6 --num_generations 3 --num_iterations 2 --dynamic_sampling 2 --dtype bfloat16 "
            "--rollout_is_cap 1.01",
        ),
        quick_if(False, "rloo", "demo:prompts#32", "--max_new_tokens 6 --num_generations 2"),
        quick_if(False, "reinforce", "demo:prompts#32", "--max_new_tokens 6 --num_generations 2"),
        quick_if(False, "online_dpo", "demo:prompts#32", "--max_new_tokens 6"),
        ("dpo", "demo:pairs#40", "--rpo_alpha 0.5 --label_smoothing 0.1"),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    algo: str, data: str, more: str, tiny: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    """From the first checkpoint on: the same rollouts, losses and weights, bit for bit; sampled answers are compared as
    text, and the ids of thousands in test_same_tokens.py. GRPO has importance weights other than 1, as in bfloat16 the
    sampler is not the trainer."""
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def vowels(prompts, completions, **columns):\n    return [sum(c in 'aeiou' for c in t) for t in completions]\n"
    )
    words = ["--algo", algo, "--model", str(tiny), "--dataset", data, "--tuner", "full", "--batch_size", "4"]
    words += ["--gradient_accumulation_steps", "1", "--learning_rate", "1e-3", "--logging_steps", "1", *more.split()]
    words += ["--reward_funcs", f"{reward}:vowels"] if "prompts" in data else []
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    two_ranks.run(
        whole_runs.train, [*words, "--save_steps", "2", "--save_total_limit", "9", "--output_dir", str(whole)]
    )
    checkpoint = min(whole.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    two_ranks.run(
        whole_runs.train,
        [*words, "--resume", str(checkpoint), "--output_dir", str(resumed), "--trust_checkpoint", "true"],
    )
    step = int(checkpoint.name.rpartition("-")[2])
    timed = ("tokens_per_s", "memory/peak", *(f"time/{phase}" for phase in PHASES))
    want = [{k: v for k, v in line.items() if k not in timed} for line in metrics(whole) if line["step"] > step]
    found = [{k: v for k, v in line.items() if k not in timed} for line in metrics(resumed)]
    assert found == want and len(want) >= 2
    if "prompts" in data:
        shown, again = (
            [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
            for folder in (whole, resumed)
        )
        assert again == [line for line in shown if line["step"] >= step] and len({s["step"] for s in again}) >= 2
    if algo == "grpo":
        assert all(0 < line["rollout/is_capped"] < 1 and 0.9 < line["rollout/is_weight"] <= 1.01 for line in found)
    for name in ["", "value"] if algo == "ppo" else [""]:
        one, two = (load_file(folder / "final" / name / "model.safetensors") for folder in (whole, resumed))
        assert all(torch.equal(one[n], two[n]) for n in one)


def test_evaluation_keeps_the_best_checkpoint(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """Held-out rows are scored before the first step, every third and at the end; the best checkpoint stays."""
    words = "--algo sft --dataset demo:demonstrations --split_dataset_ratio 0.25 --eval_steps 3 --tuner full "
    words += "--batch_size 3 "
    words += (
        "--gradient_accumulation_steps 1 --learning_rate 3e-3 --num_train_epochs 2 --save_steps 1 --save_total_limit 1"
    )
    out = tmp_path / "out"
    last = two_ranks.run(whole_runs.train, ["--model", str(tiny), *words.split(), "--output_dir", str(out)])
    evaluations = {line["step"]: line["eval/loss"] for line in metrics(out) if "eval/loss" in line}
    assert set(evaluations) == {0, 3, 6, 9, 12}
    assert last["eval/loss"] == evaluations[12] < evaluations[0]
    best = min(evaluations, key=lambda step: evaluations[step])
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-12", f"checkpoint-{best}"}


@pytest.mark.slow
def test_max_steps_ends_a_run_within_the_passes_over_a_rollout(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """Six steps in four passes a rollout are a whole rollout and half of one. The rate falls from 1 to 0 over six
    steps: 1 - 3/6 at the fourth, 1 - 5/6 at the last, which is logged, evaluated and saved. A resumed run has nothing
    left to do. One of more steps goes on with the rest of that rollout, here at another ZeRO stage: both engines' state
    is dealt anew, and what has changed is written down."""
    words = f"--algo ppo --model {tiny} --dataset demo:prompts#24 --tuner full --batch_size 4 --max_new_tokens 6 "
    words += "--gradient_accumulation_steps 1 --num_ppo_epochs 4 --max_steps 6 --split_dataset_ratio 0.25 "
    words += "--lr_scheduler_type linear --warmup_ratio 0 --learning_rate 1e-3 --logging_steps 4 --save_steps 4 "
    out = tmp_path / "out"
    two_ranks.run(whole_runs.train, [*words.split(), "--output_dir", str(out)])
    lines = metrics(out)
    assert [(line["step"], line["episode"], line["lr"]) for line in lines if "lr" in line] == [
        (4, 8, pytest.approx(1e-3 * (1 - 3 / 6))),
        (6, 16, pytest.approx(1e-3 * (1 - 5 / 6))),
    ]
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 6]
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}
    progress = json.loads((out / "checkpoint-6" / "trainer.json").read_text())["progress"]
    assert (progress["step"], progress["batches"]) == (6, 2)
    last = load_file(out / "final" / "model.safetensors")
    two_ranks.run(whole_runs.train, [*words.split(), "--resume", "--output_dir", str(out)])
    again = load_file(out / "final" / "model.safetensors")
    assert metrics(out) == lines and all(torch.equal(last[name], again[name]) for name in last)
    more = words.replace("--max_steps 6", "--max_steps 8 --deepspeed zero3")
    two_ranks.run(whole_runs.train, [*more.split(), "--resume", "--output_dir", str(out)])
    assert [(line["step"], line["lr"]) for line in metrics(out) if "lr" in line][2:] == [
        (8, pytest.approx(1e-3 * (1 - 7 / 8)))
    ]
    assert (out / "config.yaml").read_text().splitlines()[:3] == [
        "# from step 7 on:", "# --deepspeed was zero2, is zero3", "# --max_steps was 6, is 8"
    ]  # fmt: skip
    assert "max_steps: 6\n" in (out / "config.1.yaml").read_text()


def test_a_resume_with_other_inputs_is_refused(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """As many rows of other text, one bit of the model's weights, another template: each was trained on in silence.
    The run itself goes on, also when its rows have moved."""
    rows, model, jinja, out = (tmp_path / name for name in ("rows.jsonl", "model", "t.jinja", "out"))
    lines = [json.dumps({"prompt": f"count to {i}", "completion": "one"}) for i in range(8)]
    rows.write_text("\n".join(lines))
    shutil.copytree(tiny, model)
    turns = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    jinja.write_text(turns + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
    base = f"--algo sft --tuner full --batch_size 2 --gradient_accumulation_steps 1 --save_steps 1 --output_dir {out} "
    words = [*base.split(), "--model", str(model), "--template", str(jinja), "--dataset", str(rows)]
    two_ranks.run(whole_runs.train, [*words, "--max_steps", "1", "--save_total_limit", "9"])
    two_ranks.run(whole_runs.train, [*words, "--resume", "auto"])  # one epoch, two steps: more than one
    assert {p.name for p in out.glob("checkpoint-*")} >= {"checkpoint-1", "checkpoint-2"}
    words.append("--resume")
    rows.write_text("\n".join([*lines[:7], lines[7].replace("one", "two")]))
    said = two_ranks.run(whole_runs.refusal, words)
    assert "other settings: rows of dataset: was 8 rows " in said and ", is 8 rows " in said
    rows.write_text("\n".join(lines))
    jinja.write_text(jinja.read_text() + "{# the same rows, but not the same where completions are scored #}")
    assert "other settings: template: was " in two_ranks.run(whole_runs.refusal, words)
    jinja.write_text(jinja.read_text().partition("{#")[0])
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[len(weights) // 3] ^= 1
    (model / "model.safetensors").write_bytes(bytes(weights))
    assert "other settings: files of the policy model: was " in two_ranks.run(whole_runs.refusal, words)


def test_errors_of_a_run_are_said_in_one_sentence(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """Bad rows, a data set of nothing, a DeepSpeed file that sets what has a flag."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\n')
    base = ["--algo", "dpo", "--model", str(tiny), "--output_dir", str(tmp_path / "out")]
    said = two_ranks.run(whole_runs.refusal, [*base, "--dataset", str(rows)])
    assert f"{rows}:2" in said and "rejected" in said
    settings = tmp_path / "ds.json"
    settings.write_text('{"gradient_clipping": 0.5, "zero_optimization": {"stage": 1}}')
    said = two_ranks.run(whole_runs.refusal, [*base, "--dataset", "demo:pairs", "--deepspeed", str(settings)])
    assert said.endswith(
        "gradient_clipping: expected it from --max_grad_norm, got it in the file too; remove it from the file"
    )
    said = two_ranks.run(whole_runs.refusal, [*base, "--dataset", "demo:pairs", "--resume"])
    assert "expected a checkpoint-N in" in said
