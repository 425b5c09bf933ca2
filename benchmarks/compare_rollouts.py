"""Sampling by dsalign and by transformers side by side: the same weights, prompts and ends, on a CPU or a GPU.

    python benchmarks/compare_rollouts.py --sets ragged tails samples --repeats 3
    python benchmarks/compare_rollouts.py --sets wide --model random:llama-3.1-8b --device cuda --dtype bfloat16

Ways (`rollout_ways.py`): dsalign's `local` and `plain`, transformers' `generate` and `generate_batch`, which is
continuous batching. Sets: see `rollout_sets.py`.

Checked before anything is measured: on a few requests of each set all ways choose the same greedy tokens, but where a
plain forward has two logits within TIE of each other; and the log-probabilities that dsalign's ways return for sampled
tokens are those of a plain forward within LOGP. The check is in float32 whatever is measured, and of a random model on
CHECKED_LAYERS layers.

Every (set, way, repeat) is a process of its own, but for a model with random weights (`random_models.py`), and the ways
come in turns that change with every repeat. Measured after a warm-up, loading left out: CPU-seconds, wall-seconds, and
the growth of memory to its peak, of the resident set or of what torch allocates on a GPU. Each way samples with noise
of its own, so that their answers have other lengths: what to compare is tokens a CPU-second, on a GPU tokens a second.
row_forwards are the rows of logits that were computed (one a token is the least, a row that has ended and is computed
on counts too), positions those that went through the layers; both are missing where a way goes round the model's own
head or embedding.

The limit on a CPU is what bare matrix products of these sizes take (`bare_products.py`), measured in the same turns:
prompts once through the layers, sampled tokens through the layers and the head. On a GPU it is what must be read from
memory (`memory_bound.py`). `of limit` is its share of a way's seconds, for the tokens that the way made.

Printed: a line of JSON a measurement, then a table a set. Written: the lines to results.jsonl in --out.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bare_products
import device_costs
import memory_bound
import peer
import random_models
import rollout_sets
import rollout_ways
import torch
from results_file import ResultsFile
from rollout_sets import Workload

from dsalign.contract.rollout_options import RolloutOptions

TIE = 1e-3  # nats: between two logits as close as this, rounding decides which token is greedy
LOGP = 1e-4  # nats: log-probabilities of a sampler and of a plain forward
CHECKED, CHECKED_TOKENS = 4, 16  # requests of a set that are compared, tokens of each
CHECKED_LAYERS = 2
WARM_TOKENS = 4  # of each answer in the warm-up
PEERS = ("generate", "generate_batch")
LIMIT = "limit"  # stands beside the ways for what measures the limit


@torch.no_grad()
def plain_logits(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """[len(ids) + 1, V] logits by a forward without a cache: what the prompt and each of the ids predict."""
    given = torch.tensor([[*prompt, *ids]], device=rollout_ways.device_of(model))
    found: torch.Tensor = model(given).logits[0, len(prompt) - 1 :].float().cpu()
    return found


def check_greedy(model: Any, work: Workload, answers: Mapping[str, rollout_ways.Answers]) -> int:
    """Compare the greedy answers of all ways with those of the first; returns how many parted at two equal logits.

    Raises ValueError where a way chose another token and the logits of the two are further apart than TIE.
    """
    (first, wanted), *others = answers.items()
    ties = 0
    for way, found in others:
        for i, (request, (a,), (b,)) in enumerate(zip(work.requests, wanted, found, strict=True)):
            if a == b:
                continue
            at = next((t for t, two in enumerate(zip(a, b, strict=False)) if two[0] != two[1]), None)
            if at is None:
                raise ValueError(
                    f"request {i}: {first} made {len(a)} tokens and {way} {len(b)}, the same but for those"
                )
            logits = plain_logits(model, request.prompt, a[:at])[-1]
            gap = abs(float(logits[a[at]] - logits[b[at]]))
            if gap > TIE:
                raise ValueError(
                    f"request {i}, token {at}: {first} chose {a[at]} and {way} {b[at]}, {gap:.2g} nats apart"
                )
            ties += 1
    return ties


def logp_gap(model: Any, work: Workload, way: str) -> float:
    """The largest difference between the log-probabilities that a way returns and those of a plain forward, nats."""
    gaps = [0.0]
    for request, (one,) in zip(
        work.requests, rollout_ways.completions(way, model, work, RolloutOptions()), strict=True
    ):
        logps = torch.log_softmax(plain_logits(model, request.prompt, one.ids)[:-1], -1)
        wanted = logps.gather(1, torch.tensor(one.ids)[:, None])[:, 0]
        gaps.append(float((wanted - one.logps).abs().max()))
    return max(gaps)


def check(name: str, model_name: str, ways: Sequence[str], work: Workload, device: torch.device) -> dict[str, Any]:
    """Check the ways on the first requests of a set; returns what was found. Raises ValueError where they differ."""
    few = work.first(CHECKED, CHECKED_TOKENS)
    how = (device, torch.float32, CHECKED_LAYERS)
    answers, gaps = {}, {}
    for way in ways:
        model = rollout_ways.load(model_name, way, *how)
        answers[way] = rollout_ways.WAYS[way](model, few, RolloutOptions(top_k=1))
        if way in rollout_ways.OURS:
            gaps[way] = logp_gap(model, few, way)
            if not gaps[way] <= LOGP:
                raise ValueError(f"{name}: log-probabilities of {way} are {gaps[way]:.2g} nats off, more than {LOGP}")
    ties = check_greedy(rollout_ways.load(model_name, "", *how), few, answers)
    tokens = sum(len(one) for each in answers[ways[0]] for one in each)
    return {"set": name, "checked": list(ways), "tokens": tokens, "ties": ties, "logp_gap": gaps}


class Rows:
    """Counts what goes through a model: positions of its embedding, rows of its head."""

    def __init__(self, model: Any) -> None:
        self.positions = self.logits = 0
        model.get_input_embeddings().register_forward_hook(self._embedded)
        model.get_output_embeddings().register_forward_hook(self._headed)

    def _embedded(self, module: Any, given: Any, out: torch.Tensor) -> None:
        self.positions += out[..., 0].numel()

    def _headed(self, module: Any, given: Any, out: torch.Tensor) -> None:
        self.logits += out[..., 0].numel()


def measure(model: Any, way: str, work: Workload) -> dict[str, Any]:
    """The costs of one run of a way in this process, or with way LIMIT what its limit is computed from."""
    device = rollout_ways.device_of(model)
    if way == LIMIT and device.type == "cuda":
        return memory_bound.costs(model)
    if way == LIMIT:
        rows = min(rollout_ways.rows_of(model), work.num_answers)
        return dict(bare_products.row_costs(model, at_once=work.prompt_tokens, decoded=rows))
    sample, options = rollout_ways.WAYS[way], RolloutOptions()
    torch.manual_seed(0)
    # On a GPU with all rows: kernels are compiled and chosen by the sizes that they meet.
    sample(model, work.first(len(work.requests) if device.type == "cuda" else 2, WARM_TOKENS), options)
    rows = Rows(model)
    answers, costs = device_costs.measured(lambda: sample(model, work, options), device)
    lengths = [len(one) for each in answers for one in each]
    prompts = [len(request.prompt) for request in work.requests for _ in request.keys]
    tokens = sum(lengths)
    return {
        "tokens": tokens,
        "answers": work.num_answers,
        **costs,
        "tokens_per_cpu_s": tokens / costs["cpu_s"],
        "tokens_per_wall_s": tokens / costs["wall_s"],
        "row_forwards": rows.logits or None,
        "positions": rows.positions or None,
        **memory_bound.reads(prompts, lengths),
    }


def with_limit(one: Mapping[str, Any], limit: Mapping[str, float], prompt_tokens: int) -> dict[str, Any]:
    """A measurement of a way with limit_s, the least seconds for its tokens, and of_limit, their share of its own.

    limit: what `measure` gives for LIMIT: by it the seconds are of memory and the wall, or of products and the process.
    """
    if "bandwidth" in limit:
        limit_s = memory_bound.seconds(limit, steps=one["steps"], seen=one["seen"])
        return {**one, "limit_s": limit_s, "of_limit": limit_s / one["wall_s"]}
    limit_s = bare_products.sampling_seconds(
        dict(limit), prompt_tokens=prompt_tokens, tokens=one["tokens"], answers=one["answers"]
    )
    return {**one, "limit_s": limit_s, "of_limit": limit_s / one["cpu_s"]}


def table(name: str, runs: Mapping[str, Sequence[Mapping[str, Any]]], rate: str = "tokens_per_cpu_s") -> str:
    """A line a way: medians with their spread; the rate, tokens a CPU-second or a second, as multiples of those of
    transformers' ways."""
    columns = {"tokens": 0, "cpu_s": 2, "wall_s": 2, rate: 1, "peak_gib": 3, "of_limit": 3}
    ratios = [way for way in PEERS if way in runs]
    heads = [*columns, "row_forwards", *(f"x {way}" for way in ratios)]
    lines = [f"{name:15s}" + "".join(f"{head:>24s}" for head in heads)]
    speed = {way: statistics.median(one[rate] for one in each) for way, each in runs.items()}
    for way, each in runs.items():
        cells = [peer.spread([one[column] for one in each], digits) for column, digits in columns.items()]
        cells += [str(each[0]["row_forwards"] or "-"), *(f"{speed[way] / speed[other]:.2f}" for other in ratios)]
        lines.append(f"{way:15s}" + "".join(f"{cell:>24s}" for cell in cells))
    return "\n".join(lines)


class Comparison:
    """Everything that one call of the script compares."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        self.model = random_models.PREFIX + "small" if args.small else args.model
        self.random = self.model.startswith(random_models.PREFIX)
        if not self.random:
            self.model = peer.ask(sys.executable, peer.WHAT_RUNS, str(peer.ROOT), args.model, "1", "0")["model"]
        versions = peer.ask(sys.executable, peer.VERSIONS, "torch", "transformers")
        about = {name: getattr(args, name) for name in ("threads", "device", "dtype")}
        self.failed = 0
        self.results = ResultsFile(
            args.out, {"versions": versions, **about, "model": self.model if self.random else args.model}
        )

    def run(self, name: str, way: str) -> dict[str, Any]:
        """What one process says: the costs of a way on a set, or with way "check" what the check found. A random model
        is made at once and needs no process of its own, but that on a CPU memory is counted from what others left."""
        if self.random:
            return run(self.args, name, self.model, way)
        found, log = self.work / "found.json", self.work / f"{name}_{way}.log"
        command = [sys.executable, __file__, "--model", self.model, "--sets", name, "--ways", *self.args.ways]
        command += ["--device", self.args.device, "--dtype", self.args.dtype]
        command += ["--threads", str(self.args.threads), "--run", way, "--found", str(found)]
        peer.measured(command, log, peer.environment(self.work, self.args.threads, self.args.device))
        costs: dict[str, Any] = json.loads(found.read_text())
        return costs

    def tried(self, name: str, way: str) -> dict[str, Any] | None:
        """The same, with --keep_going None where it fails, which is said and counted."""
        try:
            return self.run(name, way)
        except Exception as error:  # of any kind: a compiler's are those of its own
            if not self.args.keep_going:
                raise
            said = f"{type(error).__name__}: {error}"[:1000]
        self.failed += 1
        self.results.say({"set": name, "way": way, "failed": said})
        gc.collect()
        torch.cuda.empty_cache()  # what the way held; without a GPU there is nothing
        return None

    def compare(self, name: str) -> None:
        """Check a set, then run all ways on it in turns; prints a line a run and a table."""
        if checked := self.tried(name, "check"):
            self.results.say(checked)
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in self.args.ways}
        prompt_tokens = rollout_sets.workload(shapes(self.args)[name], self.model).prompt_tokens
        for repeat in range(self.args.repeats):
            limit = self.run(name, LIMIT)
            self.results.say({"set": name, "way": LIMIT, "repeat": repeat, **limit})
            for way in peer.in_turn(self.args.ways, repeat):
                if one := self.tried(name, way):
                    runs[way].append(with_limit(one, limit, prompt_tokens))
                    self.results.say({"set": name, "way": way, "repeat": repeat, **runs[way][-1]})
        runs = {way: each for way, each in runs.items() if each}
        rate = "tokens_per_wall_s" if self.args.device == "cuda" else "tokens_per_cpu_s"
        print(table(name, runs, rate), flush=True)


def shapes(args: argparse.Namespace) -> Mapping[str, rollout_sets.Shape]:
    """The sets, in their small form where that was asked for."""
    return rollout_sets.SMALL if args.small else rollout_sets.SETS


def run(args: argparse.Namespace, name: str, model: str, way: str) -> dict[str, Any]:
    """The costs of a way on a set, measured in this process; with way "check" what the check of the set found."""
    torch.set_num_threads(args.threads)
    device, work = torch.device(args.device), rollout_sets.workload(shapes(args)[name], model)
    if way == "check":
        return check(name, model, args.ways, work, device)
    return measure(rollout_ways.load(model, way, device, getattr(torch, args.dtype)), way, work)


def parser() -> argparse.ArgumentParser:
    """The options of the script."""
    found = argparse.ArgumentParser(description="Sampling by dsalign and transformers side by side.")
    found.add_argument("--sets", nargs="+", choices=tuple(rollout_sets.SETS), default=["ragged"])
    found.add_argument("--ways", nargs="+", choices=tuple(rollout_ways.WAYS), default=list(rollout_ways.WAYS))
    found.add_argument("--repeats", type=int, default=1, help="runs of each way")
    found.add_argument("--threads", type=int, default=1, help="of each process; more than there are idle cores wait")
    found.add_argument(
        "--model", default="smollm2-135m-instruct",
        help="a folder, a short name of dsalign's, or random:NAME for a shape of random_models.py",
    )  # fmt: skip
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    found.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of what is measured")
    found.add_argument("--keep_going", action="store_true", help="go on where a check or a way fails; then exit with 1")
    found.add_argument("--small", action="store_true", help="a random model of two layers and few tokens: a trial")
    found.add_argument("--out", type=Path, default=peer.ROOT / "output" / "compare_rollouts", help="for the results")
    found.add_argument("--run", help=argparse.SUPPRESS)  # these two: what the script calls itself with
    found.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    return found


def main() -> None:
    args = parser().parse_args()
    if args.run:
        args.found.write_text(json.dumps(run(args, args.sets[0], args.model, args.run)))
        return
    with tempfile.TemporaryDirectory() as work:
        comparison = Comparison(args, Path(work))
        for name in args.sets:
            comparison.compare(name)
        if comparison.failed:
            sys.exit(1)


if __name__ == "__main__":
    main()
