"""An iteration of PPO by dsalign and by TRL 1.10 side by side, on the CPU in float32 or on one GPU.

    python benchmarks/compare_ppo.py --settings A B --repeats 3
    python benchmarks/compare_ppo.py --settings C --device cuda --dtype bfloat16

SmolLM2 is the policy and the reference; reward model and critic are SmolLM2 with one random score layer, the same on
both sides. All weights of policy and critic are trained, with one pass over a rollout in one optimizer step, cut into
four micro-batches. Setting A: 16 prompts of 55 tokens, one answer each of 32 tokens; an end token stops it earlier,
which is rare. Setting B: 8 prompts of 256 tokens, 4 answers each of at most 64 tokens, where a full stop ends an answer
too (TRL knows one end token, and has the full stop alone). Setting C, for a GPU: 64 prompts of 256 tokens, 4 answers
each of at most 128 tokens, ends as in B. `small` is a trial. The same prompts come in every iteration.

Each side runs as a process of its own, one after the other, in turns that change with every repeat. TRL is found in
--peer_folder, or installed there beside this environment's packages. `trl_ppo_side.py` says what it needed.

Checked in every repeat: as many iterations, prompts and prompt tokens as the setting has; as many tokens of answers on
one side as on the other within MORE_TOKENS, as each samples its own; finite losses. Not the same is what an iteration
does with them: TRL does not clip gradients, and has one optimizer for policy and critic; dsalign computes a prompt once
for all of its answers, TRL once for each. Both take the log-probabilities before the step from the sampler.

Measured from the second iteration on (`step_clock.py`): CPU-seconds and wall-seconds an iteration, the same a thousand
answer tokens, and the peak of resident memory and of what torch allocates on a GPU up to the last step. The limit is
what bare matrix products of the iteration's sizes take (`bare_products.py`), `of_limit` its share of a side's
CPU-seconds, on a GPU of its wall-seconds.

Printed: a line of JSON a run, then a table a setting. Written: the lines to results.jsonl in --out.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bare_products
import compare_rows
import peer
import rollout_sets
import rollout_ways
import torch
from compare_trl import flags
from peer import SIDES
from results_file import ResultsFile
from transformers import AutoTokenizer

# The most that one side's answer tokens may be of the other's, all iterations.
MORE_TOKENS = {"A": 1.1, "B": 1.5, "C": 1.5, "small": 4}
OPTIM: dict[str, Any] = {  # options that both sides call the same
    "learning_rate": 1e-6, "lr_scheduler_type": "constant", "adam_beta1": 0.9, "adam_beta2": 0.95,
    "adam_epsilon": 1e-8, "weight_decay": 0.01, "logging_steps": 1, "seed": 42, "temperature": 1.0,
    "num_ppo_epochs": 1, "num_mini_batches": 1, "num_sample_generations": 0,
    "kl_coef": 0.05, "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "gamma": 1.0, "lam": 0.95,
}  # fmt: skip
COLUMNS = {  # name -> its digits
    "cpu_s": 2, "wall_s": 2, "cpu_s_per_1000_tokens": 2, "peak_gib": 2, "device_peak_gib": 2, "of_limit": 3,
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """The sizes of an iteration: prompts, their tokens, answers a prompt, tokens of an answer at most.

    micro_batch: prompts in a micro-batch, with all their answers. full_stop: whether a full stop ends an answer.
    """

    prompts: int
    prompt_tokens: int
    samples: int
    longest: int
    micro_batch: int
    full_stop: bool

    @property
    def accumulation(self) -> int:
        """Micro-batches in an iteration."""
        return self.prompts // self.micro_batch

    @property
    def answers(self) -> int:
        """Answers in an iteration."""
        return self.prompts * self.samples


SETTINGS = {
    "A": Setting(16, 55, 1, 32, 4, False), "B": Setting(8, 256, 4, 64, 2, True),
    "C": Setting(64, 256, 4, 128, 16, True), "small": Setting(4, 40, 2, 4, 1, True),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run logged: the loss of each iteration, and of all together prompt tokens and answer tokens; its clock."""

    losses: Sequence[float]
    prompt_tokens: int
    tokens: int
    clock: Mapping[str, Any]


def read_run(side: str, setting: Setting, folder: Path) -> Run:
    """The run whose files lie in `folder`. Prompt tokens are counted once an answer. dsalign logs the tokens of prompts
    and answers in one sum, a prompt once: its prompts are taken to be as long as the setting has them, and another
    length makes that of the answers wrong.

    Raises ValueError where there is no iteration.
    """
    path = folder / ("metrics.jsonl" if side == "dsalign" else "steps.jsonl")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [record for record in records if "loss/policy_avg" in record]
    if not steps:
        raise ValueError(f"{path}: expected lines with loss/policy_avg, got {len(records)} others")
    losses = [step["loss/policy_avg"] + OPTIM["vf_coef"] * step["loss/value_avg"] for step in steps]
    if side == "dsalign":
        tokens = steps[-1]["num_tokens"] - len(steps) * setting.prompts * setting.prompt_tokens
        prompts = len(steps) * setting.answers * setting.prompt_tokens
    else:
        tokens, prompts = (sum(step[name] for step in steps) for name in ("tokens", "prompt_tokens"))
    return Run(
        losses=losses, prompt_tokens=prompts, tokens=tokens, clock=json.loads((folder / "clock.json").read_text())
    )


def check(setting: Setting, iterations: int, runs: Mapping[str, Run], most: float) -> None:
    """Raises ValueError where a side ran other iterations, prompts or lengths than it was told, or has no finite loss.

    most: the largest ratio of both sides' answer tokens.
    """
    for side, run in runs.items():
        if len(run.losses) != iterations:
            raise ValueError(f"{side}: expected {iterations} iterations, got {len(run.losses)}")
        prompt_tokens = iterations * setting.answers * setting.prompt_tokens
        if run.prompt_tokens != prompt_tokens:
            raise ValueError(f"{side}: expected {prompt_tokens} prompt tokens, got {run.prompt_tokens}")
        if not 0 < run.tokens <= iterations * setting.answers * setting.longest:
            raise ValueError(
                f"{side}: expected answers of 1 to {setting.longest} tokens, got {run.tokens} tokens in "
                f"{iterations * setting.answers} answers"
            )
        if not all(math.isfinite(loss) for loss in run.losses):
            raise ValueError(f"{side}: expected finite losses, got {run.losses}")
    counts = [run.tokens for run in runs.values()]
    if max(counts) > most * min(counts):
        raise ValueError(f"answer tokens differ by more than {most} times: {dict(zip(runs, counts, strict=True))}")


def costs_of(run: Run) -> dict[str, float]:
    """The costs of an iteration, the first one left out. A side may step several optimizers an iteration, and each as
    often in every iteration. Raises ValueError where the number of steps is no multiple of that of iterations."""
    ends, num = run.clock["steps"], len(run.losses)
    if len(ends) % num:
        raise ValueError(f"expected as many optimizer steps in each of {num} iterations, got {len(ends)} in all")
    first, last = ends[len(ends) // num - 1], ends[-1]
    cpu_s, wall_s = ((last[name] - first[name]) / (num - 1) for name in ("cpu_s", "wall_s"))
    tokens = run.tokens / num
    return {
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "tokens": tokens,
        "cpu_s_per_1000_tokens": 1000 * cpu_s / tokens,
        "peak_gib": last["peak_bytes"] / 2**30,
        "device_peak_gib": last.get("device_peak_bytes", 0) / 2**30,
    }


def with_limit(
    one: Mapping[str, float], products: dict[str, float], setting: Setting, clock: str = "cpu_s"
) -> dict[str, float]:
    """The costs of an iteration with limit_s, what its bare products take, and of_limit, their share of a clock."""
    sizes = {"prompt_tokens": setting.prompts * setting.prompt_tokens, "answers": setting.answers}
    limit_s = bare_products.ppo_seconds(products, tokens=round(one["tokens"]), **sizes)
    return {**one, "limit_s": limit_s, "of_limit": limit_s / one[clock]}


def table(name: str, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A line a measure: median and spread of each side that ran, and the ratio of the medians where both did."""
    heads = [*runs, *(["ratio"] if len(runs) == len(SIDES) else [])]
    lines = [f"{name:24s}" + "".join(f"{head:>24s}" for head in heads)]
    for column, digits in {"tokens": 0, **COLUMNS}.items():
        each = [[one[column] for one in costs] for costs in runs.values()]
        cells = [peer.spread(numbers, digits) for numbers in each]
        if len(each) == len(SIDES) and all(each[1]):
            cells.append(f"{statistics.median(each[0]) / statistics.median(each[1]):.3f}")
        lines.append(f"{column:24s}" + "".join(f"{cell:>24s}" for cell in cells))
    return "\n".join(lines)


class Comparison:
    """Everything that one call of the script compares."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work, with_trl = args, work, "trl" in args.sides
        self.python = peer.peer_python(args.peer_folder, peer.TRL_OF_PPO) if with_trl else sys.executable
        self.environment = peer.environment(work, args.threads, args.device)
        found = peer.ask(sys.executable, peer.WHAT_RUNS, str(peer.ROOT), args.model, "1", "0")
        self.model, self.scored = Path(found["model"]), work / "scored"
        self.tokenizer = AutoTokenizer.from_pretrained(self.model)
        versions = peer.ask(self.python, peer.VERSIONS, *peer.packages_of(args.sides))
        about = {name: getattr(args, name) for name in ("threads", "device", "dtype")}
        self.results = ResultsFile(args.out, {"versions": versions, "optim": OPTIM, **about})
        script = str(peer.ROOT / "benchmarks" / "trl_side.py")
        words = {"model": self.model, "folder": self.scored}
        command = [self.python, script, "--make_classifier", *flags(words)]
        peer.measured(command, work / "classifier.log", self.environment)

    def policy(self, setting: Setting) -> Path:
        """The folder of the policy: the model, with the full stop among its end tokens where the setting has it so."""
        if not setting.full_stop:
            return self.model
        folder = self.work / "policy"
        if not folder.exists():
            folder.mkdir()
            for file in self.model.iterdir():
                (folder / file.name).symlink_to(file.resolve())
            (folder / "generation_config.json").unlink()
            ends = {"eos_token_id": [self.tokenizer.eos_token_id, self.full_stop]}
            kept = json.loads((self.model / "generation_config.json").read_text())
            (folder / "generation_config.json").write_text(json.dumps({**kept, **ends}))
        return folder

    @property
    def full_stop(self) -> int:
        """The id of a full stop."""
        found: int = self.tokenizer.convert_tokens_to_ids(".")
        return found

    def command(self, side: str, setting: Setting, folder: Path) -> list[str]:
        """What runs a side, its files in `folder`."""
        clock = [str(peer.ROOT / "benchmarks" / "step_clock.py"), str(folder / "clock.json")]
        shared = {**OPTIM, "gradient_accumulation_steps": setting.accumulation}
        if side == "trl":
            prompts = rollout_sets.prompts(self.tokenizer, self.model, setting.prompts, setting.prompt_tokens)
            (folder / "prompts.json").write_text(json.dumps([ids for ids in prompts for _ in range(setting.samples)]))
            settings = {
                **shared,
                "per_device_train_batch_size": setting.micro_batch * setting.samples,
                "total_episodes": setting.answers * self.args.iterations,
                "response_length": setting.longest,
                "stop_token_id": self.full_stop if setting.full_stop else self.tokenizer.eos_token_id,
                **peer.trl_device(self.args.device, self.args.dtype),
            }
            words = {"model": self.policy(setting), "reward_model": self.scored, "folder": folder}
            words |= {"prompts": folder / "prompts.json", "settings": json.dumps(settings)}
            return [self.python, *clock, str(peer.ROOT / "benchmarks" / "trl_ppo_side.py"), *flags(words)]
        texts = rollout_sets.prompt_texts(self.model, setting.prompts, setting.prompt_tokens)
        compare_rows.piqa.write_jsonl([{"prompt": text} for text in texts], folder / "rows.jsonl")
        words = {"algo": "ppo", "model": self.policy(setting), "reward_model": self.scored, "output_dir": folder}
        words |= {"dataset": folder / "rows.jsonl", "tuner": "full", "dtype": self.args.dtype, "warmup_ratio": 0}
        words |= {"deepspeed": self.args.deepspeed, "batch_size": setting.micro_batch, **shared}
        words |= {"num_generations": setting.samples, "max_new_tokens": setting.longest}
        words |= {"num_train_epochs": self.args.iterations}
        train = str(peer.ROOT / "launch" / "train.py")
        python = peer.launched(self.args.launcher, self.args.device)
        return [*python, *clock, train, *flags(words), *shlex.split(self.args.extra)]

    def run(self, side: str, setting: Setting) -> Run:
        """One run of one side; what it wrote is removed again, but for its log."""
        folder = self.work / side
        folder.mkdir()
        peer.measured(self.command(side, setting, folder), self.work / f"{side}.log", self.environment)
        found = read_run(side, setting, folder)
        shutil.rmtree(folder)
        return found

    def products(self, setting: Setting) -> dict[str, float]:
        """The costs of bare products, in this process."""
        torch.set_num_threads(self.args.threads)
        device = torch.device(self.args.device)
        model = rollout_ways.load(str(self.model), "", device, getattr(torch, self.args.dtype))
        at_once = setting.micro_batch * (setting.prompt_tokens + setting.samples * setting.longest)
        return bare_products.row_costs(model, at_once=at_once, decoded=setting.answers)

    def compare(self, name: str) -> None:
        """All repeats of a setting; prints a line a run and a table."""
        setting = SETTINGS[name]
        costs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES if side in self.args.sides}
        clock = "wall_s" if self.args.device == "cuda" else "cpu_s"
        for repeat in range(self.args.repeats):
            products, runs = self.products(setting), dict[str, Run]()
            for side in peer.in_turn(list(costs), repeat):  # said at once: it stands where the other side fails
                runs[side] = run = self.run(side, setting)
                check(setting, self.args.iterations, {side: run}, MORE_TOKENS[name])
                costs[side].append(with_limit(costs_of(run), products, setting, clock))
                sizes = {"iterations": len(run.losses), "prompts": setting.prompts, "first_loss": run.losses[0]}
                self.results.say({"setting": name, "side": side, "repeat": repeat, **sizes, **costs[side][-1]})
            check(setting, self.args.iterations, runs, MORE_TOKENS[name])
        print(table(name, costs), flush=True)


def parser() -> argparse.ArgumentParser:
    """The options of the script."""
    found = argparse.ArgumentParser(description="PPO of dsalign and of TRL side by side on the CPU or one GPU.")
    peer.add_device(found)
    found.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=["A"])
    found.add_argument("--iterations", type=int, default=4, help="of a run, at least 2; the first is not counted")
    found.add_argument("--repeats", type=int, default=1, help="runs of each side")
    found.add_argument("--threads", type=int, default=1, help="of each process; more than there are idle cores wait")
    found.add_argument("--model", default="smollm2-135m-instruct", help="SmolLM2: a folder or dsalign's short name")
    found.add_argument("--deepspeed", default="zero0", help="dsalign's DeepSpeed configuration")
    found.add_argument("--extra", default="", help="further flags for dsalign, as one string")
    found.add_argument("--peer_folder", type=Path, default=peer.ROOT / "output" / "trl_ppo", help="TRL's environment")
    found.add_argument("--out", type=Path, default=peer.ROOT / "output" / "compare_ppo", help="for the results")
    return found


def main() -> None:
    args = parser().parse_args()
    if args.iterations < 2:
        parser().error(f"--iterations: expected at least 2, as the first is not counted, got {args.iterations}")
    with tempfile.TemporaryDirectory() as work:
        comparison = Comparison(args, Path(work))
        for name in args.settings:
            comparison.compare(name)


if __name__ == "__main__":
    main()
