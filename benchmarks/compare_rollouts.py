"""Sampling by dsalign and by transformers side by side: the same weights, prompts and ends, on the CPU in float32.

    python benchmarks/compare_rollouts.py --sets ragged tails samples --repeats 3

Ways (`rollout_ways.py`): dsalign's `local` and `plain`, transformers' `generate` and `generate_batch`, which is
continuous batching. Sets: see `rollout_sets.py`.

Checked before anything is measured: on a few requests of each set all ways choose the same greedy tokens, but where a
plain forward has two logits within TIE of each other; and the log-probabilities that dsalign's ways return for sampled
tokens are those of a plain forward within LOGP.

Every (set, way, repeat) is a process of its own, the ways in turns that change with every repeat. Measured after a
short warm-up, loading left out: CPU-seconds, wall-seconds, and the growth of the resident set to its peak. Each way
samples with noise of its own, so that their answers have other lengths: what to compare is tokens a CPU-second.
row_forwards are the rows of logits that were computed (one a token is the least, a row that has ended and is computed
on counts too), positions those that went through the layers; both are missing where a way goes round the model's own
head or embedding.

The limit is what bare matrix products of these sizes take on this machine (`bare_products.py`), measured in the same
turns: prompts once through the layers, sampled tokens through the layers and the head. `of limit` is its share of a
way's CPU-seconds, for the tokens that the way made.

Printed: a line of JSON a measurement, then a table a set. Written: the lines to results.jsonl in --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import bare_products
import peer
import rollout_sets
import rollout_ways
import step_clock
import torch
from results_file import ResultsFile
from rollout_sets import Workload

from dsalign.contract.rollouts import RolloutOptions

TIE = 1e-3  # nats: between two logits as close as this, rounding decides which token is greedy
LOGP = 1e-4  # nats: log-probabilities of a sampler and of a plain forward
CHECKED, CHECKED_TOKENS = 4, 16  # requests of a set that are compared, tokens of each
PEERS = ("generate", "generate_batch")
PRODUCTS = "products"  # stands beside the ways for what measures the limit


@torch.no_grad()
def plain_logits(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """[len(ids) + 1, V] logits by a forward without a cache: what the prompt and each of the ids predict."""
    found: torch.Tensor = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 :].float()
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


def check(name: str, folder: Path, ways: Sequence[str], work: Workload) -> dict[str, Any]:
    """Check the ways on the first requests of a set; returns what was found. Raises ValueError where they differ."""
    few = work.first(CHECKED, CHECKED_TOKENS)
    answers, gaps = {}, {}
    for way in ways:
        model = rollout_ways.load(folder, way)
        answers[way] = rollout_ways.WAYS[way](model, few, RolloutOptions(top_k=1))
        if way in rollout_ways.OURS:
            gaps[way] = logp_gap(model, few, way)
            if not gaps[way] <= LOGP:
                raise ValueError(f"{name}: log-probabilities of {way} are {gaps[way]:.2g} nats off, more than {LOGP}")
    ties = check_greedy(rollout_ways.load(folder, ""), few, answers)
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


def resident_bytes() -> int:
    """The resident set of this process; its peak is counted anew from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return step_clock.peak_bytes()


def measure(folder: Path, way: str, work: Workload) -> dict[str, Any]:
    """The costs of one run of a way, in this process."""
    model = rollout_ways.load(folder, way)
    if way == PRODUCTS:
        rows = min(rollout_ways.ROWS, work.num_answers)
        return dict(bare_products.row_costs(model, at_once=work.prompt_tokens, decoded=rows))
    sample, options = rollout_ways.WAYS[way], RolloutOptions()
    torch.manual_seed(0)
    sample(model, work.first(2, 4), options)
    rows, before = Rows(model), resident_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    answers = sample(model, work, options)
    cpu_s, wall_s = time.process_time() - cpu, time.perf_counter() - wall
    tokens = sum(len(one) for each in answers for one in each)
    return {
        "tokens": tokens,
        "answers": work.num_answers,
        "cpu_s": cpu_s,
        "wall_s": wall_s,
        "tokens_per_cpu_s": tokens / cpu_s,
        "peak_gib": (step_clock.peak_bytes() - before) / 2**30,
        "row_forwards": rows.logits or None,
        "positions": rows.positions or None,
    }


def with_limit(one: Mapping[str, Any], products: Mapping[str, float], prompt_tokens: int) -> dict[str, Any]:
    """A measurement of a way with limit_s, what the products for its tokens take, and of_limit, their share."""
    limit_s = bare_products.sampling_seconds(
        dict(products), prompt_tokens=prompt_tokens, tokens=one["tokens"], answers=one["answers"]
    )
    return {**one, "limit_s": limit_s, "of_limit": limit_s / one["cpu_s"]}


def table(name: str, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """A line a way: medians with their spread; tokens a CPU-second as multiples of those of transformers' ways."""
    columns = {"tokens": 0, "cpu_s": 2, "wall_s": 2, "tokens_per_cpu_s": 1, "peak_gib": 3, "of_limit": 3}
    ratios = [way for way in PEERS if way in runs]
    heads = [*columns, "row_forwards", *(f"x {way}" for way in ratios)]
    lines = [f"{name:15s}" + "".join(f"{head:>24s}" for head in heads)]
    speed = {way: statistics.median(one["tokens_per_cpu_s"] for one in each) for way, each in runs.items()}
    for way, each in runs.items():
        cells = [peer.spread([one[column] for one in each], digits) for column, digits in columns.items()]
        cells += [str(each[0]["row_forwards"] or "-"), *(f"{speed[way] / speed[other]:.2f}" for other in ratios)]
        lines.append(f"{way:15s}" + "".join(f"{cell:>24s}" for cell in cells))
    return "\n".join(lines)


class Comparison:
    """Everything that one call of the script compares."""

    def __init__(self, args: argparse.Namespace, work: Path) -> None:
        self.args, self.work = args, work
        if args.small:
            self.model = str(work / "small")
            rollout_sets.small_model(Path(self.model))
        else:
            self.model = peer.ask(sys.executable, peer.WHAT_RUNS, str(peer.ROOT), args.model, "1", "0")["model"]
        versions = peer.ask(sys.executable, peer.VERSIONS, "torch", "transformers")
        self.results = ResultsFile(args.out, {"versions": versions, "threads": args.threads})

    def run(self, name: str, way: str) -> dict[str, Any]:
        """What one process says: the costs of a way on a set, or with way "check" what the check found. The small form
        needs no process of its own."""
        if self.args.small:
            return run(self.args, name, Path(self.model), way)
        found, log = self.work / "found.json", self.work / f"{name}_{way}.log"
        command = [sys.executable, __file__, "--model", self.model, "--sets", name, "--ways", *self.args.ways]
        command += ["--threads", str(self.args.threads), "--run", way, "--found", str(found)]
        peer.measured(command, log, peer.environment(self.work, self.args.threads))
        costs: dict[str, Any] = json.loads(found.read_text())
        return costs

    def compare(self, name: str) -> None:
        """Check a set, then run all ways on it in turns; prints a line a run and a table."""
        self.results.say(self.run(name, "check"))
        turns = [*self.args.ways, PRODUCTS]
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in turns}
        for repeat in range(self.args.repeats):
            for way in peer.in_turn(turns, repeat):
                one = self.run(name, way)
                runs[way].append(one)
                self.results.say({"set": name, "way": way, "repeat": repeat, **one})
        products = {key: min(one[key] for one in runs[PRODUCTS]) for key in runs[PRODUCTS][0]}
        shape = shapes(self.args)[name]
        prompt_tokens = shape.prompts * shape.prompt_tokens
        full = {way: [with_limit(one, products, prompt_tokens) for one in runs[way]] for way in self.args.ways}
        for way, each in full.items():
            limits = {key: statistics.median(one[key] for one in each) for key in ("limit_s", "of_limit")}
            self.results.say({"set": name, "way": way, "median": True, **limits})
        print(table(name, full), flush=True)


def shapes(args: argparse.Namespace) -> Mapping[str, rollout_sets.Shape]:
    """The sets, in their small form where that was asked for."""
    return rollout_sets.SMALL if args.small else rollout_sets.SETS


def run(args: argparse.Namespace, name: str, folder: Path, way: str) -> dict[str, Any]:
    """The costs of a way on a set, measured in this process; with way "check" what the check of the set found."""
    torch.set_num_threads(args.threads)
    work = rollout_sets.workload(shapes(args)[name], folder, small=args.small)
    return check(name, folder, args.ways, work) if way == "check" else measure(folder, way, work)


def parser() -> argparse.ArgumentParser:
    """The options of the script."""
    found = argparse.ArgumentParser(description="Sampling by dsalign and transformers side by side on the CPU.")
    found.add_argument("--sets", nargs="+", choices=tuple(rollout_sets.SETS), default=["ragged"])
    found.add_argument("--ways", nargs="+", choices=tuple(rollout_ways.WAYS), default=list(rollout_ways.WAYS))
    found.add_argument("--repeats", type=int, default=1, help="runs of each way")
    found.add_argument("--threads", type=int, default=1, help="of each process; more than there are idle cores wait")
    found.add_argument("--model", default="smollm2-135m-instruct", help="a folder or a short name of dsalign's")
    found.add_argument("--small", action="store_true", help="a random model of two layers and few tokens: a trial")
    found.add_argument("--out", type=Path, default=peer.ROOT / "output" / "compare_rollouts", help="for the results")
    found.add_argument("--run", help=argparse.SUPPRESS)  # these two: what the script calls itself with
    found.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    return found


def main() -> None:
    args = parser().parse_args()
    if args.run:
        args.found.write_text(json.dumps(run(args, args.sets[0], Path(args.model), args.run)))
        return
    with tempfile.TemporaryDirectory() as work:
        comparison = Comparison(args, Path(work))
        for name in args.sets:
            comparison.compare(name)


if __name__ == "__main__":
    main()
