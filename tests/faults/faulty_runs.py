"""What forked ranks run: whole commands, and the digest of all that a run has learnt."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from run_cases import Line, optim
from safetensors.torch import load_file
from support import section, tiny_tokenizer

from dsalign import cli, faults
from dsalign.checkpoint import checkpoints, run_folders, staged, verify
from dsalign.checkpoint.checkpoints import Checkpoints
from dsalign.checkpoint.export import whole_state
from dsalign.checkpoint.progress import Progress
from dsalign.config.schema import OutputOptions, RunConfig
from dsalign.endings import Ending
from dsalign.engines import dist, engine
from dsalign.report.run_log import quiet

STEPS, EVERY = 6, 2  # of a run, and between its checkpoints
REWARD = "def letters(completions, **columns):\n    return [sum(map(ord, text)) % 7 / 3 for text in completions]\n"
DATA = {"sft": "demonstrations", "dpo": "pairs", "ppo": "prompts", "grpo": "prompts"}
MORE = {
    "ppo": "--max_new_tokens 4 --num_ppo_epochs 1 --num_mini_batches 1",
    "grpo": "--max_new_tokens 4 --num_generations 2",
}


def command(words: Sequence[str]) -> int:
    """`dsalign WORDS`; its exit code."""
    return cli.main(list(words))


def words(algo: str, stage: int, tuner: str, model: Path, folder: Path) -> list[str]:
    """The command of a run of STEPS steps without its output folder. folder: where its reward function may be."""
    rows = 4 * STEPS
    found = ["--algo", algo, "--model", str(model), "--dataset", f"demo:{DATA[algo]}#{rows}", "--tuner", tuner]
    found += ["--deepspeed", f"zero{stage}", "--batch_size", "2", "--gradient_accumulation_steps", "1"]
    found += ["--learning_rate", "1e-3", "--logging_steps", "1", "--save_steps", str(EVERY), "--save_total_limit", "1"]
    found += ["--max_steps", str(STEPS), *MORE.get(algo, "").split()]
    if tuner == "lora":
        found += ["--lora_target_modules", "ALL", "--lora_rank", "4"]
    if DATA[algo] == "prompts":
        (folder / "reward.py").write_text(REWARD)
        found += ["--reward_funcs", f"{folder / 'reward.py'}:letters"]
    return found


def learnt(output_dir: Path, step: int = STEPS) -> str:
    """The sha256 of every weight in final/ and of both moments of every optimizer in the checkpoint of a step. Master
    weights are left out: those of final/ are the same, and DeepSpeed's padding of them is memory that nobody set."""
    total = hashlib.sha256()
    for path in sorted((output_dir / "final").rglob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    shards = sorted((output_dir / f"checkpoint-{step}" / "engines").rglob("*_states.pt"))
    assert shards
    for path in shards:
        for moment in moments(torch.load(path, weights_only=False)):
            total.update(moment.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def moments(value: Any) -> list[torch.Tensor]:
    """Every tensor under a key exp_avg or exp_avg_sq, in order."""
    found: list[torch.Tensor] = []
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    for key, one in pairs:
        if key in ("exp_avg", "exp_avg_sq") and isinstance(one, torch.Tensor):
            found.append(one.reshape(-1))
        else:
            found += moments(one)
    return found


def leftovers(output_dir: Path) -> list[str]:
    """The names in an output folder that no finished run leaves."""
    known = (
        "checkpoint-",
        "final",
        "config.yaml",
        "command.txt",
        "metrics.jsonl",
        "samples.jsonl",
        "report.html",
        "learnt.txt",
        "events.jsonl",
        "crash",  # the stacks of ranks that another one's end has ended
    )
    return sorted(p.name for p in output_dir.iterdir() if not p.name.startswith((*known, "run.json", "aside-")))


class Pair(Checkpoints):
    """The checkpoints of two engines that are no language models: their weights are written as they are."""

    def _models(self, parts: staged.Parts) -> None:
        for role, one in self.engines.items():
            state = whole_state(one, trained_only=True)
            if dist.rank() == 0:
                faults.at("in_export")
                parts.tensors(state, f"{role}.safetensors")


def actor_and_critic(output_dir: Path, stage: int, resume: str | None = None, keep: int = 1, steps: int = STEPS) -> int:
    """Train two engines of three weights each for `steps` AdamW steps with a checkpoint after every second, and export
    them to final/; the digest of all that they learnt goes to learnt.txt. Each step's numbers follow from its number.
    Returns 2 where a rank ends with a reason that is known, and rank 0 or the one with the reason prints it."""
    try:
        return _actor_and_critic(output_dir, stage, resume, keep, steps)
    except dist.ElsewhereError:
        return 2
    except (ValueError, Ending) as error:
        print(f"said: {error}", flush=True)
        return 2


def _actor_and_critic(output_dir: Path, stage: int, resume: str | None, keep: int, steps: int) -> int:
    dist.init(int(os.environ["LOCAL_RANK"]), peer_timeout=60)
    quiet(dist.rank())
    engines = {role: engine.trained(Line(), optim(stage), torch.float32) for role in ("policy", "value")}
    options = section(OutputOptions, output_dir=str(output_dir), save_total_limit=keep, resume=resume)
    store = Pair(options, engines, tiny_tokenizer(), dict.fromkeys(engines, ""), {"seed": 1}, adapters_only=False)
    progress = Progress()
    if resume:
        with mock.patch.object(run_folders, "record"):  # this run has no config.yaml
            progress = checkpoints.begin(cast(RunConfig, SimpleNamespace(output=options)), store, "")
    while progress.step < steps:
        draw = torch.Generator().manual_seed(100 * progress.step + dist.rank())
        for one in engines.values():
            one.set_gradient_accumulation_boundary(True)
            one.backward(one(torch.randn(2, 2, generator=draw)).pow(2).sum(), scale_wrt_gas=False)
            engine.take_step(one, 0.0)
        progress.step += 1
        if progress.step % EVERY == 0:
            store.save(progress)
    store.export(output_dir / "final", progress.step)
    if dist.rank() == 0 and steps == STEPS:
        (output_dir / "learnt.txt").write_text(learnt(output_dir))
    return 0


def on_a_disk_of_its_own(folder: Path) -> int:
    """As `actor_and_critic`, where rank 1 does not see what rank 0 writes."""
    return actor_and_critic(folder / os.environ["RANK"] / "out", 2)


def chosen(output_dir: Path, resume: str, trusted: bool = False) -> tuple[str, list[str]]:
    """(name of the checkpoint that would be resumed from or the reason for none, the warnings), on rank 0."""
    lines: list[str] = []
    with mock.patch.object(verify.logger, "warning", lambda text, *a: lines.append(text % a)):
        try:
            found = run_folders.find(resume, output_dir)
            one = verify.choose(found, output_dir, latest=resume == "latest", trusted=trusted)
            return one.folder.name, lines
        except ValueError as error:
            return str(error), lines
