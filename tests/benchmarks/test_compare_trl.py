"""The comparisons with TRL: rows, checks, tables and how they measure, without running a trainer."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
LN2 = math.log(2)
WORDS = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}" for i in range(100)]
VOCABULARY = {word: i for i, word in enumerate([*WORDS, *(f"\u0120{word}" for word in WORDS)])}


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The scripts as modules; they find each other as they do when one is run."""
    sys.path.insert(0, str(FOLDER))
    names = ("compare_trl", "compare_rows", "compare_preprocess", "peer", "step_clock", "trl_side")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(FOLDER))


@pytest.fixture
def bench(scripts: Any) -> ModuleType:
    return scripts.compare_trl


def test_words_are_one_token_with_and_without_a_blank(scripts):
    """`the` is no token alone, `go` is short, `Word` has a capital: none of them is taken."""
    more = {"\u0120the": 900, "\u0120go": 901, "go": 902, "\u0120Word": 903, "Word": 904}
    assert scripts.compare_rows.one_token_words(VOCABULARY | more) == WORDS
    with pytest.raises(
        ValueError, match=r"expected 100 words or more .* got 0 of 1 entries; give --model a byte-level"
    ):
        scripts.compare_rows.one_token_words({"a": 1})


def test_drawn_pairs_are_the_texts_of_others(scripts):
    """Words in their order, a text behind another until there are enough; answers from either side."""
    pairs = [{"prompt": "a b c", "chosen": "d e", "rejected": "f"}]
    (first, second) = scripts.compare_rows.drawn_pairs(pairs, 2, prompt_words=7, answer_words=4)
    assert first["prompt"] == second["prompt"] == "a b c a b c a"
    for answer in (first["chosen"], first["rejected"], second["chosen"], second["rejected"]):
        assert len(answer.split()) == 4 and set(answer.split()) <= {"d", "e", "f"}
    assert [first, second] == scripts.compare_rows.drawn_pairs(pairs, 2, prompt_words=7, answer_words=4)


def test_long_pairs_have_as_many_tokens_as_they_say(scripts, tmp_path):
    """Words are tokens: 256 - 30 of the template in a prompt, 64 - 1 end token in an answer; the same twice."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": VOCABULARY}}))
    pairs = scripts.compare_rows.long_pairs(path, 2)
    assert [[len(pair[name].split()) for name in ("prompt", "chosen", "rejected")] for pair in pairs] == [
        [226, 63, 63]
    ] * 2
    assert len({text for pair in pairs for text in pair.values()}) == 6
    assert pairs == scripts.compare_rows.long_pairs(path, 2)


def test_pairs_become_labels_in_turn(scripts):
    """Chosen of the first, rejected of the second."""
    pairs = [{"prompt": p, "chosen": "c", "rejected": "r"} for p in "ab"]
    assert scripts.compare_rows.labelled(pairs) == [
        {"prompt": "a", "completion": "c", "label": True},
        {"prompt": "b", "completion": "r", "label": False},
    ]


def test_a_file_is_in_the_peers_order_once_it_is_shuffled(scripts):
    """Row 2 is taken first, then 0, then 1: so the first row lies at 2."""
    rows = scripts.compare_rows.before_shuffle(["x", "y", "z"], [2, 0, 1])
    assert rows == ["y", "z", "x"]
    assert [rows[i] for i in [2, 0, 1]] == ["x", "y", "z"]


def test_rows_become_turns(scripts):
    row = {"prompt": "p", "completion": "c", "label": True}
    assert scripts.compare_rows.turns(row) == {
        "prompt": [{"role": "user", "content": "p"}],
        "completion": [{"role": "assistant", "content": "c"}],
        "label": True,
    }


def test_answers_are_cut_after_their_end_token(scripts):
    """2 ends a turn. DPO and KTO hold answers alone, KTO also those of mismatched pairs; prompts stay."""
    row = {"prompt_ids": [1, 2, 3], "chosen_ids": [5, 2, 9], "rejected_ids": [6], "chosen": "text"}
    assert scripts.trl_side.cut(row, 2) == {"chosen_ids": [5, 2], "rejected_ids": [6]}
    row = {"prompt_ids": [1], "completion_ids": [5, 2, 9], "KL_completion_ids": [7, 7, 2, 9]}
    assert scripts.trl_side.cut(row, 2) == {"completion_ids": [5, 2], "KL_completion_ids": [7, 7, 2]}


def test_conversations_are_cut_after_the_end_token_of_the_answer(scripts):
    """The end token of the prompt [1, 2, 3] stays; the answers 5 6 and 5 7 part at their second id."""
    row = {"chosen_ids": [1, 2, 3, 5, 6, 2, 9], "rejected_ids": [1, 2, 3, 5, 7, 2, 9]}
    assert scripts.trl_side.cut(row, 2) == {"chosen_ids": [1, 2, 3, 5, 6, 2], "rejected_ids": [1, 2, 3, 5, 7, 2]}


def test_rows_of_cpo_are_cut_with_their_labels_and_masks(scripts):
    """What CPO makes of a newline behind the end token: another end token behind that."""
    ids, labels = [1, 2, 3, 5, 2, 9, 2], [-100, -100, -100, 5, 2, 9, 2]
    row = {f"{side}_{name}": list(x) for side in ("chosen", "rejected") for name, x in (
        ("input_ids", ids), ("attention_mask", [1] * 7), ("labels", labels))}  # fmt: skip
    found = scripts.trl_side.cut(row, 2)
    assert found["chosen_input_ids"] == [1, 2, 3, 5, 2] and found["rejected_attention_mask"] == [1] * 5
    assert found["rejected_labels"] == [-100, -100, -100, 5, 2] and len(found) == 6


def steps(*losses: float, chosen: float = -50.0) -> list[dict[str, float]]:
    return [
        {"step": i, "loss": loss, "logps/chosen": chosen, "logps/rejected": -40.0}
        for i, loss in enumerate(losses, start=1)
    ]


def test_both_sides_must_begin_alike(bench):
    """To 1e-4 of the number; the loss of DPO is ln 2 for any row, so log-probabilities tell."""
    assert bench.check("dpo", steps(LN2, 0.6), steps(LN2 + 5e-5, 0.7, chosen=-50.004))[1] == (
        "logps/chosen -50.000000 -50.004000"
    )
    with pytest.raises(ValueError, match=r"dpo: the first loss of dsalign is 0\.69\d*, that of TRL 0\.7: other rows"):
        bench.check("dpo", steps(LN2), steps(0.7))
    with pytest.raises(ValueError, match=r"dpo: the first logps/chosen of dsalign is -50\.0, that of TRL -50\.006"):
        bench.check("dpo", steps(LN2), steps(LN2, chosen=-50.006))
    with pytest.raises(ValueError, match="the first loss of dsalign is nan"):
        bench.check("dpo", steps(math.nan), steps(LN2))
    assert bench.check("dpo", steps(LN2), steps(LN2, chosen=-50.9), "bfloat16")  # 2e-2 of 50.9 are 1.018
    with pytest.raises(ValueError, match="the first logps/chosen"):
        bench.check("dpo", steps(LN2), steps(LN2, chosen=-51.1), "bfloat16")


def test_orpo_is_compared_by_its_odds(bench):
    ours = [{"loss": 4.0, "log_odds_chosen": 0.25, "logps/mean_chosen": -1.0, "logps/mean_rejected": -2.0}]
    theirs = [{"loss": 5.0, "log_odds_chosen": 0.25, "logps/chosen": -1.0, "logps/rejected": -2.0}]
    assert len(bench.check("orpo", ours, theirs)) == 3


def test_both_sides_must_take_the_same_steps(bench):
    with pytest.raises(ValueError, match="dpo: dsalign logged 1 steps, TRL 2: a row was dropped"):
        bench.check("dpo", steps(LN2), steps(LN2, LN2))


def test_the_gap_is_the_largest_of_all_steps(bench):
    assert bench.loss_gap("dpo", steps(LN2, 0.5, 0.4), steps(LN2, 0.7, 0.5)) == pytest.approx(0.2)


CLOCK = {
    "steps": [{"cpu_s": 20.0, "wall_s": 5.0}, {"cpu_s": 23.0, "wall_s": 7.0}, {"cpu_s": 25.0, "wall_s": 8.0}],
    "end": {"cpu_s": 30.0, "wall_s": 9.0, "peak_bytes": 2**31},
}


def test_costs_a_step_leave_out_the_first(bench):
    """25 - 20 CPU-seconds and 8 - 5 wall-seconds in two steps."""
    assert bench.costs_of(CLOCK, 31.0, 12.0, 3) == {
        "step_cpu_s": 2.5, "step_wall_s": 1.5, "first_cpu_s": 20.0, "process_cpu_s": 31.0, "process_wall_s": 12.0,
        "peak_gib": 2.0, "device_peak_gib": 0.0,
    }  # fmt: skip
    with pytest.raises(ValueError, match="expected one call of the optimizer a step, got 3 in 4 steps"):
        bench.costs_of(CLOCK, 31.0, 12.0, 4)


def test_table_has_medians_spreads_and_the_ratio(bench):
    """Medians 2 and 4: 0.5; the repeats by themselves 1/4, 2/4 and 3/5."""
    costs = {
        side: [dict.fromkeys(bench.MEASURES, x) for x in numbers]
        for side, numbers in (("dsalign", (1.0, 2.0, 3.0)), ("trl", (4.0, 4.0, 5.0)))
    }
    header, first, *rest = bench.table("dpo", "piqa", costs).splitlines()
    assert header.split() == ["dpo", "piqa", "dsalign", "TRL", "ratio"] and len(rest) == len(bench.MEASURES) - 1
    assert first.split() == [
        "step_cpu_s", "2.000", "(1.000-3.000)", "4.000", "(4.000-5.000)", "0.500", "(0.250-0.600)"
    ]  # fmt: skip
    single = {side: each[:1] for side, each in costs.items()}
    assert bench.table("dpo", "piqa", single).splitlines()[1].split() == ["step_cpu_s", "1.000", "4.000", "0.250"]
    alone = bench.table("dpo", "piqa", {"dsalign": costs["dsalign"]}).splitlines()
    assert alone[0].split() == ["dpo", "piqa", "dsalign"]
    assert alone[1].split() == ["step_cpu_s", "2.000", "(1.000-3.000)"]


def test_results_are_written(bench, tmp_path):
    comparison = object.__new__(bench.Comparison)
    comparison.args, comparison.about = SimpleNamespace(out=tmp_path / "out"), {"date": "today"}
    costs = dict.fromkeys(bench.MEASURES, 0.5)
    comparison.results = [{"algo": "dpo", "set": "piqa", "repeat": 0, "side": "trl", **costs, "steps": steps(LN2, 0.6)}]
    comparison.write()
    header, line = (tmp_path / "out" / "costs.csv").read_text().splitlines()
    assert header.split(",")[:5] == ["algo", "set", "repeat", "side", "num_steps"]
    assert line.split(",")[:6] == ["dpo", "piqa", "0", "trl", "2", "0.5000"]
    assert json.loads((tmp_path / "out" / "results.json").read_text())["date"] == "today"


def test_metrics_are_the_lines_with_a_step_and_a_loss(bench, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n\n{"cut_cpu_s": 3}\n')
    assert bench.read_steps(path) == [{"step": 1, "loss": 0.5}]
    path.write_text(json.dumps({"step": 1}) + "\n")
    with pytest.raises(ValueError, match="expected lines with step and loss, got 1 others"):
        bench.read_steps(path)


def test_every_algorithm_is_known_to_both_sides(bench, scripts):
    assert set(bench.HYPER) == set(bench.AGREE) == set(scripts.trl_side.TRAINERS)


def test_sides_take_turns(scripts):
    assert [scripts.peer.in_turn("ab", repeat) for repeat in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]


def test_a_failing_run_shows_the_end_of_its_output(scripts, tmp_path):
    with pytest.raises(ValueError, match=r"ended with 3; the end of .*log:\nout of luck"):
        scripts.peer.measured([sys.executable, "-c", "print('out of luck'); exit(3)"], tmp_path / "log", os.environ)


def test_a_question_that_fails_shows_the_end_of_its_errors(scripts):
    assert scripts.peer.ask(sys.executable, "import sys; print('x'); print(len(sys.argv))", "one") == 2
    with pytest.raises(ValueError, match=r"ended with 1 where it was asked; it says: .*no answer"):
        scripts.peer.ask(sys.executable, "raise SystemExit('no answer')")


def test_another_trl_is_refused(scripts, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    answers = {scripts.peer.MISSING: [], scripts.peer.VERSIONS: {"trl": "0.9"}}
    monkeypatch.setattr(scripts.peer, "ask", lambda python, code, *words: answers[code])
    with pytest.raises(ValueError, match=r"expected an environment with trl 1\.16\.0, got 0\.9; remove it"):
        scripts.peer.peer_python(tmp_path)


def test_a_peer_is_used_where_it_is_there(scripts, tmp_path, monkeypatch):
    """No folder, another version, no accelerate, and the one that is wanted; nothing is installed."""
    peer, answers = scripts.peer, {scripts.peer.MISSING: [], scripts.peer.VERSIONS: {"trl": "0.9"}}
    assert not peer.has_peer(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    monkeypatch.setattr(peer, "ask", lambda python, code, *words: answers[code])
    assert not peer.has_peer(tmp_path) and peer.has_peer(tmp_path, "0.9")
    answers[peer.MISSING] = ["accelerate"]
    assert not peer.has_peer(tmp_path, "0.9")


def test_device_of_both_sides(scripts, tmp_path, monkeypatch):
    """On a CPU no GPU is seen, whatever there is; on a GPU the first of those that the caller sees."""
    peer = scripts.peer
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,4")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    cpu, cuda = (peer.environment(tmp_path, 1, device) for device in ("cpu", "cuda"))
    assert (cpu["CUDA_VISIBLE_DEVICES"], cpu["DS_ACCELERATOR"]) == ("", "cpu")
    assert cuda["CUDA_VISIBLE_DEVICES"] == "3" and "DS_ACCELERATOR" not in cuda
    assert peer.trl_device("cuda", "bfloat16") == {"use_cpu": False, "bf16": True}
    assert peer.trl_device("cpu", "float32") == {"use_cpu": True, "bf16": False}
    assert peer.launched("python", "cuda") == [sys.executable]
    assert "--num_accelerators" in peer.launched("deepspeed", "cpu")
    assert "--num_accelerators" not in peer.launched("deepspeed", "cuda")


def test_the_clock_counts_the_steps_of_any_optimizer(scripts, tmp_path, monkeypatch):
    """Two steps; each burns 0.1 s of CPU before it, which a difference of entries therefore holds at least."""
    script, out = tmp_path / "script.py", tmp_path / "clock.json"
    script.write_text(
        "import sys, time, torch\n"
        "weight = torch.ones(1, requires_grad=True)\n"
        "optimizer = torch.optim.AdamW([weight])\n"
        "for _ in range(int(sys.argv[1])):\n"
        "    end = time.process_time() + 0.1\n"
        "    while time.process_time() < end: pass\n"
        "    weight.sum().backward()\n"
        "    optimizer.step()\n"
        "raise SystemExit(7)\n"
    )
    monkeypatch.setattr(sys, "argv", ["step_clock.py", str(out), str(script), "2"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match="7"):
        scripts.step_clock.main()
    clock = json.loads(out.read_text())
    first, second = clock["steps"]
    assert second["cpu_s"] - first["cpu_s"] >= 0.1 and clock["end"]["cpu_s"] >= second["cpu_s"]
    assert clock["end"]["peak_bytes"] > 2**26  # torch alone needs more than 64 MiB: 65,536 would be KiB


def test_digests_tell_where_a_part_ends(scripts):
    """[1] [2] and [1, 2] [] hold the same two ids."""
    digest = scripts.compare_preprocess.digest
    assert digest([[[1], [2]]])["num_ids"] == digest([[[1, 2], []]])["num_ids"] == 2
    assert digest([[[1], [2]]])["sha256"] != digest([[[1, 2], []]])["sha256"]
    assert digest([[(1,), [2]]]) == digest([[[1], (2,)]])


def test_every_way_must_make_the_same_ids(scripts):
    with pytest.raises(ValueError, match="b made 4 ids, a 3: not the same ids"):
        scripts.compare_preprocess.check({"a": {"sha256": "x", "num_ids": 3}, "b": {"sha256": "y", "num_ids": 4}})
    scripts.compare_preprocess.check({"a": {"sha256": "x"}, "b": {"sha256": "x"}})


def test_a_preparation_that_fails_shows_the_end_of_its_output(scripts, tmp_path):
    way = scripts.compare_preprocess.WAYS[0]
    with pytest.raises(ValueError, match=r"^dsalign ended with [12]; the end of .*log:(.|\n)*--way"):
        scripts.compare_preprocess.run(way, "/bin/cat", tmp_path / "rows", "model", tmp_path / "run")


def test_table_of_preparations(scripts):
    """TRL's first way makes 100 rows a second, dsalign 400: four times as many."""
    names = scripts.compare_preprocess.HEADER[3:]
    costs = {
        way: [dict.fromkeys(names, 1.0) | {"rows_per_s": rate}]
        for way, rate in zip(scripts.compare_preprocess.WAYS, (400.0, 300.0, 100.0, 150.0), strict=True)
    }
    header, *lines = scripts.compare_preprocess.table(7, costs).splitlines()
    assert header.startswith("7 rows") and header.split()[2:] == [*names, "times", "TRL"]
    assert [line.split()[-1] for line in lines] == ["4.00", "3.00", "1.00", "1.50"]


def test_memory_of_a_process(scripts):
    """More than 1 MiB, and nothing for a process that is not there."""
    assert scripts.compare_preprocess.memory_bytes(os.getpid()) > 2**20
    assert scripts.compare_preprocess.memory_bytes(2**22 + 1) == 0
