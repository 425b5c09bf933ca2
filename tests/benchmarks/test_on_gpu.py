"""The command for a GPU: its parts, their time limits, rows and table; small runs of it on the CPU."""

from __future__ import annotations

import csv
import importlib
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
HEAD = ["part", "case", "way", "value", "unit", "of_limit", "peak_mib"]


@pytest.fixture(scope="module")
def scripts() -> Iterator[Any]:
    """The scripts as modules; they find each other as they do when one is run."""
    before = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    names = ("on_gpu", "gpu_results", "memory_bound", "device_costs", "random_models", "compare_rows")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path[:] = before


def options(out: Path, **changes: Any) -> Namespace:
    return Namespace(**{"out": out, "total_s": 60.0, "limit_s": None, "device": "cpu", "small": False, **changes})


def of_script(scripts: Any, folder: Path, name: str, code: str, limit_s: float = 60.0) -> Any:
    """A part that runs some code, which finds the file for its rows in argv[-1]."""
    path = folder / f"{name}.py"
    path.write_text(f"import sys, time, os, subprocess\n{code}\n")
    return scripts.on_gpu.Part(name, "kernel", limit_s, str(path), "", "")


ROWS = "open(sys.argv[-1], 'w').write('op,dtype,rows,error,p50_ms,ceiling,peak_mb\\none,float32,4,0.0,1.5,0.5,2\\n')"


def test_a_part_that_fails_hangs_or_leaves_nothing_is_said_and_the_others_stand(scripts, tmp_path, capsys):
    """Of five parts the first and the last are done. The third wrote its row before it hung: the row stands."""
    codes = {
        "good": ROWS, "bad": "sys.exit('no device')", "hangs": f"{ROWS}\ntime.sleep(600)", "empty": "pass", "last": ROWS
    }  # fmt: skip
    part = [of_script(scripts, tmp_path, name, code, 3 if name == "hangs" else 60) for name, code in codes.items()]
    out = tmp_path / "out"
    assert scripts.on_gpu.run(options(out), part) == 1
    states = {x["part"]: x["state"] for x in map(json.loads, (out / "results.jsonl").open()) if "state" in x}
    assert states == {
        "good": "done", "bad": "failed, exit status 1", "hangs": "out of time, 3 s", "empty": "failed, no results",
        "last": "done",
    }  # fmt: skip
    assert "no device" in (out / "bad" / "log.txt").read_text()
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows] == ["good", "hangs", "last"]
    assert list(rows[0]) == [*HEAD, "date", "device", "commit"]
    assert [rows[0][name] for name in HEAD[1:]] == ["float32 rows 4", "one", "1.5", "ms", "0.5", "2.0"]
    said = capsys.readouterr().out
    assert said.split("\n\n", 1)[1] in (out / "table.txt").read_text() + "\n"
    assert scripts.on_gpu.run(options(tmp_path / "again"), part[:1]) == 0


def test_what_a_part_left_running_ends_with_it(scripts, tmp_path):
    """A part that is done, and a child of it that would go on for ten minutes: there is none behind it."""
    left = tmp_path / "left"
    child = (
        f"import os, time; open({str(left)!r}, 'w').write(str(os.getpid())); print('up', flush=True); time.sleep(600)"
    )
    start = f"subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE).stdout.readline()"
    part = of_script(scripts, tmp_path, "parent", f"{start}\n{ROWS}")
    assert scripts.on_gpu.run(options(tmp_path / "out"), [part]) == 0
    state = Path("/proc", left.read_text(), "stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] in "ZX"  # not yet taken off the list


def test_no_part_starts_without_time(scripts, tmp_path):
    """Less than LEAST_S of the whole: nothing ran, which is a failure."""
    part = of_script(scripts, tmp_path, "good", ROWS)
    assert scripts.on_gpu.run(options(tmp_path / "out", total_s=1.0), [part]) == 1
    assert '"not started, no time left"' in (tmp_path / "out" / "results.jsonl").read_text()
    assert not (tmp_path / "out" / "good").exists()
    with pytest.raises(ValueError, match="expected a new or empty folder, got one with files"):
        scripts.on_gpu.run(options(tmp_path / "out"), [part])


def test_every_part_is_a_script_that_takes_its_words(scripts, tmp_path):
    """Tests and rollouts come first, and no part may take a third of the time. Words for a GPU say so."""
    parts = {part.name: part for part in scripts.on_gpu.PARTS}
    assert list(parts)[:3] == ["tests", "rollouts-0.5b", "rollouts-8b"] and {"ppo", "dpo", "decode"} <= set(parts)
    args = options(tmp_path, device="cuda")
    for part in parts.values():
        assert 0 < part.limit_s <= 120
        words = scripts.on_gpu.command(part, args, tmp_path / part.name)
        assert part.kind == "tests" or words[words.index("--device") + 1] == "cuda"
        assert "small" not in " ".join(words[3:])
    narrow = scripts.on_gpu.command(parts["linear-576"], args, tmp_path)
    assert narrow[narrow.index("--hidden") + 1] == "576" and narrow[-1] == str(tmp_path / "rows.csv")
    eight = scripts.on_gpu.command(parts["rollouts-8b"], args, tmp_path)
    assert "random:llama-3.1-8b" in eight and "bfloat16" in eight
    assert scripts.on_gpu.environment(parts["linear-576"], options(tmp_path, small=True))["TRITON_INTERPRET"] == "1"
    assert "DS_ACCELERATOR" not in set(scripts.on_gpu.environment(parts["dpo"], args)) - set(scripts.on_gpu.os.environ)


def test_rows_of_every_kind_of_file(scripts, tmp_path):
    """1 GiB is 1024 MiB. Where torch allocated on a GPU that is the peak, else the resident set. A log that was cut off
    counts what it has; a last line of JSON that was cut off takes nothing from those before it."""
    rollouts = [
        {"model": "random:x", "dtype": "bfloat16"},
        {"set": "wide", "checked": ["local"], "logp_gap": {"local": 1e-6}},
        {"set": "wide", "way": "limit", "bandwidth": 4e12, "weight_bytes": 1.0, "token_bytes": 1.0},
        {"set": "wide", "way": "local", "tokens_per_wall_s": 5.0, "of_limit": 0.5, "peak_gib": 1.0},
        {"set": "wide", "way": "plain", "tokens_per_wall_s": 2.0, "of_limit": 0.2, "peak_gib": 1.0},
        {"set": "wide", "way": "generate", "failed": "RuntimeError: out of memory\nmore"},
    ]
    ppo = [{}, {"setting": "C", "side": "trl", "wall_s": 2.0, "of_limit": 0.25, "peak_gib": 9, "device_peak_gib": 2.0}]
    lines = "\n".join(map(json.dumps, rollouts))
    log = (
        "tests/kernels/test_a.py::test_x[a b] PASSED [  1%]\ntests/a.py::y FAILED [ 2%]\ntests/a.py::z PASSED [ 3%]\nt"
    )
    files = {"rollouts": ("results.jsonl", lines + '\n{"set": "wi'), "tests": ("log.txt", log)}
    files["ppo"] = ("results.jsonl", "\n".join(map(json.dumps, ppo)))
    files["training"] = (
        "costs.csv", "algo,set,repeat,side,step_wall_s,peak_gib,device_peak_gib\ndpo,long,0,dsalign,0.5,3.0,0.0\n"
    )  # fmt: skip
    for kind, (name, text) in files.items():
        (tmp_path / kind).mkdir()
        (tmp_path / kind / name).write_text(text)
    found = {
        kind: [list(x.values())[1:] for x in scripts.gpu_results.rows_of("p", kind, tmp_path / kind)] for kind in files
    }
    case = "random:x bfloat16 wide"
    assert found["rollouts"] == [
        [case, "check", 1e-6, "nats, gap of log-probabilities", "", ""],
        [case, "copy of memory", 4000.0, "GB/s", "", ""],
        [case, "local", 5.0, "tokens/s", 0.5, 1024.0],
        [case, "plain", 2.0, "tokens/s", 0.2, 1024.0],
        [case, "local / plain", 2.5, "times", "", ""],
        [case, "generate", "failed", "RuntimeError: out of memory", "", ""],
    ]
    assert found["tests"] == [["kernels", "passed", 2, "tests", "", ""], ["kernels", "failed", 1, "tests", "", ""]]
    assert found["ppo"] == [["ppo C", "trl", 2.0, "s/iteration", 0.25, 2048.0]]
    assert found["training"] == [["dpo long", "dsalign", 0.5, "s/step", "", 3072.0]]
    assert scripts.gpu_results.rows_of("p", "ppo", tmp_path / "nowhere") == []


def test_memory_bound_by_hand(scripts):
    """Completions of 3 and 1 tokens after prompts of 10 and 20: two steps; they see 10 + 1 and 10 + 2 tokens. At 100
    bytes of weights, 2 of a token and 50 bytes a second: (2 100 + 23 2) / 50 = 4.92 s."""
    reads = scripts.memory_bound.reads([10, 20], [3, 1])
    assert reads == {"steps": 2, "seen": 23}
    costs = {"bandwidth": 50.0, "weight_bytes": 100.0, "token_bytes": 2.0}
    assert scripts.memory_bound.seconds(costs, **reads) == pytest.approx(4.92)


def test_bytes_of_a_step(scripts):
    """Two layers, two key-value heads of 8 numbers, two bytes each: 2 2 2 8 2 = 128 a token. The embedding is looked
    up: all weights but its 97 x 32; once it is the head it is read."""
    model = scripts.random_models.made("random:small", torch.device("cpu"), torch.bfloat16)
    total = sum(p.numel() for p in model.parameters())
    costs = scripts.memory_bound.costs(model)
    assert (costs["token_bytes"], costs["weight_bytes"]) == (128, 2 * (total - 97 * 32)) and costs["bandwidth"] > 0
    model.lm_head.weight = model.get_input_embeddings().weight
    assert scripts.memory_bound.costs(model)["weight_bytes"] == 2 * (total - 97 * 32)


def test_shapes_are_those_of_the_models(scripts):
    """494 million parameters with one embedding for both ends, and 8.03 billion with two, counted without memory."""
    counts = {}
    for name in ("qwen2.5-0.5b", "llama-3.1-8b"):
        model = scripts.random_models.made(f"random:{name}", torch.device("meta"), torch.bfloat16)
        counts[name] = sum(p.numel() for p in model.parameters())
    assert counts == {"qwen2.5-0.5b": 494_032_768, "llama-3.1-8b": 8_030_261_248}
    assert scripts.random_models.config_of("random:llama-3.1-8b", 2).num_hidden_layers == 2
    with pytest.raises(ValueError, match=r"random:none: expected one of random:qwen2\.5-0\.5b, random:llama"):
        scripts.random_models.config_of("random:none")


def test_small_smollm_has_words_and_a_template_like_smollm2(scripts, tmp_path):
    """A word is one token with a blank before it and alone, and the template has TEMPLATE_TOKENS around a prompt."""
    scripts.random_models.write_small_smollm(tmp_path)
    (pair, *_) = scripts.compare_rows.long_pairs(tmp_path / "tokenizer.json", 1)
    transformers = importlib.import_module("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    turn = [{"role": "user", "content": pair["prompt"]}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert len(ids) == scripts.compare_rows.PROMPT_TOKENS and tokenizer.unk_token_id not in ids
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 2)


def whole_command(out: Path, *words: str) -> tuple[int, str]:
    """The command as a user gives it: its exit status and its output."""
    command = [sys.executable, str(FOLDER / "on_gpu.py"), "--device", "cpu", "--small", "--out", str(out), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1850, check=False)
    return done.returncode, done.stdout + done.stderr


def check_table(said: str, parts: list[str]) -> None:
    """A head that says where and what, the columns, and every part done."""
    for name in (
        "date: ",
        "device: ",
        "versions: Python",
        "torch ",
        "triton ",
        "deepspeed ",
        "transformers ",
        "commit: ",
    ):
        assert name in said
    assert "command: python" in said and "--small" in said
    lines = [line.split() for line in said.splitlines()]
    states = lines[lines.index(["part", "state", "seconds", "rows"]) + 1 :]
    assert HEAD in lines and [line[0] for line in states] == parts
    assert all(line[1] == "done" and int(line[-1]) > 0 for line in states)


@pytest.mark.slow
def test_a_kernel_through_the_whole_command(tmp_path):
    """Sampling by the interpreter, a line a way; a GPU is asked for where there is none."""
    code, said = whole_command(tmp_path / "out", "--parts", "sampling")
    assert code == 0, said
    check_table(said, ["sampling"])
    with (tmp_path / "out" / "results.csv").open() as file:
        ways = [row["way"] for row in csv.DictReader(file)]
    assert {"sample_tokens", "sample_tokens, top_p 0.9", "copy of the logits"} <= set(ways)


@pytest.mark.slow
@pytest.mark.timeout(1900)
def test_all_parts_through_the_whole_command(scripts, tmp_path):
    """Every part in its small form."""
    code, said = whole_command(tmp_path / "out")
    assert code == 0, said
    check_table(said, [part.name for part in scripts.on_gpu.PARTS if part.here])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "cpu"], "expected --small with it"),
        (["--device", "cuda"], "expected a GPU that torch sees, got none"),
    ],
)
def test_what_cannot_run_is_refused(scripts, words, said, monkeypatch, capsys):
    """Sizes of a GPU on a CPU, and a GPU that is not there."""
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", *words])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        scripts.on_gpu.main()
    assert said in capsys.readouterr().err
