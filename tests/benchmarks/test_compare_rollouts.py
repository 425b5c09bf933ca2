"""The comparison of samplers: workloads, ends, the checks, the limit and the table; a small run with transformers."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import tiny_config
from transformers import LlamaForCausalLM

from dsalign.contract.rollout_options import RolloutOptions

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The scripts as modules; they find each other as they do when one is run."""
    sys.path.insert(0, str(FOLDER))
    names = ("compare_rollouts", "rollout_sets", "rollout_ways", "bare_products")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def model() -> Any:
    """A random model, the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(tiny_config()).eval()


def small(scripts: Any, name: str) -> Any:
    return scripts.rollout_sets.workload(scripts.rollout_sets.SMALL[name], "random:small")


def test_tails_are_log_uniform(scripts):
    """Two lengths from 1 to 16 lie at the quantiles 1/4 and 3/4: 16^(1/4) = 2 and 16^(3/4) = 8. Of 64 from 16 to 512
    half are under sqrt(16 512) = 90.5, and they come in no order."""
    assert sorted(scripts.rollout_sets.tail_lengths(2, 1, 16)) == [2, 8]
    lengths = scripts.rollout_sets.tail_lengths(64, 16, 512)
    assert lengths == scripts.rollout_sets.tail_lengths(64, 16, 512) != sorted(lengths)
    assert 16 <= min(lengths) < 17 and 490 < max(lengths) <= 512 and sum(n < 90.5 for n in lengths) == 32


def test_workloads_have_their_sizes(scripts):
    """ragged: 6 prompts of 9; tails: lengths in place of end tokens; samples: 2 prompts of 12, 3 answers with keys of
    their own. The first two requests of it, cut to 5 tokens, have one answer each."""
    ragged, tails, samples = (small(scripts, name) for name in ("ragged", "tails", "samples"))
    assert (ragged.prompt_tokens, ragged.num_answers) == (54, 6) and ragged.end_ids
    assert not tails.end_ids and len({request.max_new_tokens for request in tails.requests}) > 1
    assert (samples.prompt_tokens, samples.num_answers) == (24, 6)
    assert len({key for request in samples.requests for key in request.keys}) == 6
    few = samples.first(2, 5)
    assert [(len(r.keys), r.max_new_tokens) for r in few.requests] == [(1, 5), (1, 5)]


def test_wide_prompts_are_not_long_where_answers_are(scripts):
    """Prompts 3 4^((i + 1/2) / 6), answers 2 8^((i + 1/2) / 6), each in an order of its own."""
    work = small(scripts, "wide")
    both = [(len(request.prompt), request.max_new_tokens) for request in work.requests]
    prompts, answers = zip(*both, strict=True)
    assert sorted(prompts) == [3, 4, 5, 7, 8, 11] and sorted(answers) == [2, 3, 5, 7, 10, 13]
    assert sorted(both) != sorted(zip(sorted(prompts), sorted(answers), strict=True)) and not work.end_ids


def test_an_answer_stops_at_its_end_or_its_length(scripts):
    """7 is an end token; a request with 2 tokens takes no third."""
    answer = scripts.rollout_ways.answer
    assert answer([5, 7, 0, 0], SimpleNamespace(max_new_tokens=4), frozenset({7})) == (5, 7)
    assert answer([5, 6, 8, 7], SimpleNamespace(max_new_tokens=2), frozenset({7})) == (5, 6)
    assert answer([5, 6, 8, 7], SimpleNamespace(max_new_tokens=4), frozenset()) == (5, 6, 8, 7)


def test_each_row_ends_at_its_own_length(scripts):
    """3 columns of prompt and 2 new ones: the rows of 1 and 2 tokens are done, that of 3 is not."""
    stop = scripts.rollout_ways.OwnLength(torch.tensor([1, 2, 3]), 3)
    assert stop(torch.zeros(3, 5), None).tolist() == [True, True, False]


def test_limit_by_hand(scripts):
    """10 prompt tokens at 1, 7 - 2 sampled ones through the layers at 2, 7 rows of logits at 3: 10 + 10 + 21 = 41. A
    way that took 82 reaches half. PPO adds 9 (10 + 7) 1 = 153 and 4 7 0.5 = 14: 208. On a GPU (2 100 + 25 2) / 50 = 5
    of 50 s."""
    costs = {"prompt": 1.0, "token": 2.0, "head": 3.0, "head_at_once": 0.5}
    sizes = {"prompt_tokens": 10, "tokens": 7, "answers": 2}
    assert scripts.bare_products.sampling_seconds(costs, **sizes) == 41
    assert scripts.bare_products.ppo_seconds(costs, **sizes) == 208
    found = scripts.compare_rollouts.with_limit({"tokens": 7, "answers": 2, "cpu_s": 82.0}, costs, 10)
    assert (found["limit_s"], found["of_limit"]) == (41, 0.5)
    memory = {"bandwidth": 50.0, "weight_bytes": 100.0, "token_bytes": 2.0}
    found = scripts.compare_rollouts.with_limit({"steps": 2, "seen": 25, "wall_s": 50.0}, memory, 10)
    assert (found["limit_s"], found["of_limit"]) == (5, 0.1)


def test_products_are_of_all_linear_layers_and_the_head(scripts, model):
    """Two layers of seven matrices each; the head is 32 wide."""
    layers, head = scripts.bare_products.matrices(model)
    assert len(layers) == 14 and head.shape == (model.config.vocab_size, 32)
    assert scripts.bare_products.row_costs(model, at_once=8, decoded=4).keys() == {
        "prompt", "token", "head", "head_at_once"
    }  # fmt: skip
    assert scripts.bare_products.seconds_a_row(layers, 4) > 0


def test_greedy_answers_may_part_at_equal_logits_alone(scripts, model):
    """The same answers pass. Another token is refused with the distance of its logit, one token less as well; where the
    two logits are the same it is a tie."""
    work = small(scripts, "ragged").first(1, 3)
    (ids,) = [request.prompt for request in work.requests]
    prompt = [token % model.config.vocab_size for token in ids]
    work = scripts.rollout_sets.Workload([SimpleNamespace(prompt=prompt)], frozenset())
    best = int(scripts.compare_rollouts.plain_logits(model, prompt, [])[-1].argmax())
    check = scripts.compare_rollouts.check_greedy
    assert check(model, work, {"a": [[(best, 4)]], "b": [[(best, 4)]]}) == 0
    with pytest.raises(ValueError, match=rf"request 0, token 0: a chose {best} and b {best - 1}, .* nats apart"):
        check(model, work, {"a": [[(best, 4)]], "b": [[(best - 1, 4)]]})
    with pytest.raises(ValueError, match="a made 2 tokens and b 1, the same but for those"):
        check(model, work, {"a": [[(best, 4)]], "b": [[(best,)]]})
    with torch.no_grad():
        tied = LlamaForCausalLM(tiny_config()).eval()
        tied.lm_head.weight.zero_()
    assert check(tied, work, {"a": [[(4, 4)]], "b": [[(5, 4)]]}) == 1


def test_table_has_the_ratios_to_transformers(scripts):
    """20 tokens a CPU-second are 2.00 times 10, and no way that did not run has a column."""
    one = {"tokens": 40, "cpu_s": 4.0, "wall_s": 4.0, "tokens_per_cpu_s": 10.0, "peak_gib": 0.5, "of_limit": 0.25}
    runs = {
        "generate": [{**one, "row_forwards": 64}],
        "local": [{**one, "tokens_per_cpu_s": 20.0, "row_forwards": None}],
    }
    head, generate, local = scripts.compare_rollouts.table("ragged", runs).splitlines()
    assert head.split()[0] == "ragged" and "x generate" in head and "x generate_batch" not in head
    assert generate.split()[-2:] == ["64", "1.00"] and local.split()[-2:] == ["-", "2.00"]


def test_a_missing_answer_is_said(scripts, model, monkeypatch):
    """A manager that stops at once: none of the three answers came."""
    ended = SimpleNamespace(add_request=lambda *_, **__: None, is_running=lambda: False)

    class Manager:
        def __enter__(self) -> Any:
            return ended

        def __exit__(self, *_: Any) -> None: ...

    monkeypatch.setattr(model, "continuous_batching_context_manager", lambda *_, **__: Manager(), raising=False)
    work = small(scripts, "ragged").first(3, 2)
    with pytest.raises(ValueError, match="generate_batch: 3 of 3 answers are missing; see the log"):
        scripts.rollout_ways.generate_batch(model, work, RolloutOptions())


@pytest.mark.parametrize("name", ["ragged", "tails", "samples"])
def test_a_small_run(scripts, name, tmp_path, monkeypatch, capsys):
    """A check, a line for `generate` and for the products, and a table; answers have their lengths, and rows of logits
    are those of 6 rows up to the longest answer."""
    words = ["compare_rollouts", "--small", "--sets", name, "--ways", "generate", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    threads = torch.get_num_threads()
    try:
        scripts.compare_rollouts.main()
    finally:
        torch.set_num_threads(threads)
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    (checked,) = [line for line in lines if "checked" in line]
    (run,) = [line for line in lines if line.get("way") == "generate" and "cpu_s" in line]
    assert checked["set"] == run["set"] == name and checked["ties"] == 0
    shape = scripts.rollout_sets.SMALL[name]
    assert run["row_forwards"] % 6 == 0 and run["tokens"] <= run["row_forwards"] <= 6 * shape.longest
    if shape.shortest:
        assert run["tokens"] == sum(scripts.rollout_sets.tail_lengths(6, shape.shortest, shape.longest))
    assert f"\n{name} " in capsys.readouterr().out


def test_a_way_that_fails_is_a_line(scripts, tmp_path, monkeypatch):
    """generate fails in the check and in its run, plain is measured; without --keep_going the first one ends all."""

    def fails(*_: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(scripts.rollout_ways, "WAYS", {**scripts.rollout_ways.WAYS, "generate": fails})
    words = ["compare_rollouts", "--small", "--ways", "generate", "plain", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(RuntimeError, match="out of memory"):
        scripts.compare_rollouts.main()
    monkeypatch.setattr(sys, "argv", [*words, "--keep_going"])
    with pytest.raises(SystemExit, match="1"):
        scripts.compare_rollouts.main()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    failed = {line["way"]: line["failed"] for line in lines if "failed" in line}
    assert failed == dict.fromkeys(("check", "generate"), "RuntimeError: out of memory")
    (plain,) = [line for line in lines if line.get("way") == "plain"]
    assert plain["tokens"] > 0 and plain["tokens_per_wall_s"] == pytest.approx(plain["tokens"] / plain["wall_s"], 1e-4)
