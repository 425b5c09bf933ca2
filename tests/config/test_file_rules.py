"""What options name is there, or can be made: each rule broken once, read in full, and kept once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from commands import told, trackers, with_checkpoint

from dsalign.config import ds_files, file_rules
from dsalign.data.tokens.chat_templates import BUILT_IN


def test_a_name_that_no_file_can_have(tmp_path: Path) -> None:
    """Too long for the system, or below the home of a user that there is not; said once, not again by other rules."""
    for name in ("model", "template", "deepspeed", "output_dir", "resume"):
        (line,) = (
            one for one in told("--algo", "dpo", f"--{name}", "x" * 5000, base=("--dataset", "rows")) if "xxx" in one
        )
        assert line.startswith(f"--{name}: expected a name or a path, got 'xxx") and len(line) < 300
        assert line.endswith("...' (File name too long); correct it")
    assert told("--algo", "sft", base=("--model", "~nobody9/m", "--dataset", "rows")) == [
        "--model: expected a name or a path, got '~nobody9/m' (Could not determine home directory.); correct it"
    ]
    (tmp_path / "file").touch()
    assert told("--algo", "sft", "--template", "chatml", "--output_dir", f"{tmp_path}/new") == []


def test_rows_of_a_file_are_counted_from_1(tmp_path: Path) -> None:
    """A file with # in its name is that file."""
    file = tmp_path / "rows.jsonl"
    file.touch()
    assert told("--algo", "sft", base=("--model", "m", "--dataset", f"{file}#0")) == [
        f"--dataset: expected #n with n rows, 1 or more, got '{file}#0'; leave out #0 for all rows"
    ]
    assert told("--algo", "sft", base=("--model", "m", "--dataset", f"{file}#many")) == [
        f"--dataset: expected #n with a whole number, got '{file}#many'; write rows.jsonl#500"
    ]
    (tmp_path / "rows.jsonl#0").touch()
    assert told("--algo", "sft", base=("--model", "m", "--dataset", f"{file}#0", f"{file}#1")) == []


def test_the_cache_that_is_named_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DSALIGN_CACHE", f"{tmp_path}/new")
    assert told("--algo", "sft") == []
    monkeypatch.setenv("DSALIGN_CACHE", f"{tmp_path}/file/in")
    assert told("--algo", "sft") == [
        f"DSALIGN_CACHE: expected a folder that can be written, got {tmp_path}/file/in; name another, or unset it"
    ]


def test_packed_files_and_patterns_must_match_something(tmp_path: Path) -> None:
    base = ("--model", "m")
    missing = str(tmp_path / "rows*.jsonl.gz")
    assert told("--algo", "dpo", "--dataset", missing, base=base) == [
        f"--dataset: expected a file or folder that exists, got {missing!r}; check the path"
    ]
    (tmp_path / "rows1.jsonl.gz").touch()
    assert told("--algo", "dpo", "--dataset", missing, base=base) == []


def test_data_that_looks_local_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    there = ("--model", "m", "--dataset", str(tmp_path), f"{tmp_path}/rows.jsonl", f"{tmp_path}/rows.jsonl#10")
    assert told("--algo", "sft", "--val_dataset", "org/name#5", "name", base=there) == []
    missing = ("--model", "m", "--dataset", "rows.JSONL#10", "org/name", "./x")
    assert told("--algo", "sft", "--val_dataset", "v.parquet", base=missing) == [
        "--dataset: expected a file or folder that exists, got 'rows.JSONL'; check the path",
        "--dataset: expected a file or folder that exists, got './x'; check the path",
        "--val_dataset: expected a file or folder that exists, got 'v.parquet'; check the path",
    ]


def test_demo_rows_are_named_by_their_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = ("--model", "m", "--dataset", "demo:pairs", "demo:pairs#10")
    assert told("--algo", "dpo", "--val_dataset", "demo:pairs", base=there) == []
    known = "demo:demonstrations, demo:labels, demo:pairs, demo:prompts"
    missing = ("--model", "m", "--dataset", "demo:pair#10", "demo:something-else-entirely")
    assert told("--algo", "dpo", base=missing) == [
        f"--dataset: expected one of {known}, got 'demo:pair'; did you mean demo:pairs?",
        f"--dataset: expected one of {known}, got 'demo:something-else-entirely'; choose one",
    ]
    (tmp_path / "demo:mine").touch()
    monkeypatch.chdir(tmp_path)
    assert told("--algo", "dpo", base=("--dataset", "demo:mine")) == []  # a file of that name comes first


def test_a_model_that_looks_local_must_be_there(tmp_path: Path) -> None:
    base = ("--model", "/no/such/model", "--dataset", "rows")
    (tmp_path / "config.json").touch()
    assert told("--algo", "dpo", "--ref_model", str(tmp_path), base=base) == [
        "--model: expected a folder that exists, got '/no/such/model'; check the path"
    ]
    (tmp_path / "inner").mkdir()
    assert told("--algo", "dpo", "--ref_model", "path/to/model")[0].endswith("got 'path/to/model'; check the path")
    assert told("--algo", "dpo", "--ref_model", f"{tmp_path}/iner") == [
        f"--ref_model: expected a folder that exists, got '{tmp_path}/iner'; did you mean inner?"
    ]
    assert told("--algo", "dpo", "--ref_model", f"{tmp_path}/inner") == [
        "--ref_model: expected a model's folder, with config.json or adapter_config.json, got "
        f"'{tmp_path}/inner', which has neither; name the folder that from_pretrained opens"
    ]


def test_a_template_is_built_in_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").touch()
    assert told("--algo", "sft", "--template", f"{tmp_path}/mine.jinja") == []
    assert all(told("--algo", "sft", "--template", name) == [] for name in file_rules.TEMPLATES)
    assert sorted(BUILT_IN) == list(file_rules.TEMPLATES)
    known = ", ".join(file_rules.TEMPLATES)
    assert told("--algo", "sft", "--template", "lama3") == [
        f"--template: expected {known} or a .jinja file that exists, got 'lama3'; did you mean llama3?"
    ]
    (line,) = told("--algo", "sft", "--template", "no.jinja")
    assert line.endswith("got 'no.jinja'; check the path, or leave it out for the template of the tokenizer")


def test_a_tracker_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackers(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "trackio", None)
    assert told("--algo", "sft", "--report_to", "wandb", "tensorboard") == []
    found = file_rules.importlib.util.find_spec
    monkeypatch.setattr(file_rules.importlib.util, "find_spec", lambda name: None if name == "trackio" else found(name))
    assert told("--algo", "sft", "--report_to", "trackio") == [
        "--report_to: expected a tracker that is installed, got 'trackio'; run pip install 'dsalign[trackio]', or "
        "leave it out: metrics.jsonl is always written"
    ]


def test_an_output_folder_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert told("--algo", "sft", "--output_dir", f"{tmp_path}/a/b/c") == []
    for name in ("file", "file/inner"):
        assert told("--algo", "sft", "--output_dir", f"{tmp_path}/{name}") == [
            f"--output_dir: expected a folder, got {tmp_path}/file, which is a file; name another --output_dir"
        ]
    monkeypatch.setattr(file_rules.os, "access", lambda path, mode: False)
    assert told("--algo", "sft", "--output_dir", f"{tmp_path}/a") == [
        f"--output_dir: expected a folder that can be written, got {tmp_path}, which cannot"
    ]


def test_a_checkpoint_to_resume_must_be_there(tmp_path: Path) -> None:
    assert told("--algo", "sft", "--resume", "checkpoint-5") == [
        "--resume: expected latest, auto or the folder of a checkpoint, got 'checkpoint-5', which is no folder; "
        "checkpoints are output_dir/checkpoint-N"
    ]
    (line,) = told("--algo", "sft", "--resume_from_checkpoint", str(tmp_path))
    assert f"got '{tmp_path}', which is no whole checkpoint; " in line
    assert told("--algo", "sft", "--resume", "--output_dir", str(tmp_path)) == [
        f"--resume: expected a checkpoint-N in {tmp_path}, got none; leave --resume out to start a new run, or name "
        "the run's --output_dir"
    ]
    folder = with_checkpoint(tmp_path)
    assert told("--algo", "sft", "--resume", "--output_dir", folder) == []
    assert told("--algo", "sft", "--resume_from_checkpoint", f"{folder}/checkpoint-3") == []


def test_deepspeed_is_a_name_or_a_file(tmp_path: Path) -> None:
    for name in ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme"):
        assert told("--algo", "sft", "--deepspeed", name) == []
    (tmp_path / "mine.json").write_text("{}")
    (tmp_path / "bad.json").write_text('{"zero_optimizaton": {"stage": 2}, "zero_optimization": {"overlap_com": true}}')
    assert told("--algo", "sft", "--deepspeed", f"{tmp_path}/bad.json") == [
        f"--deepspeed: {tmp_path}/bad.json: zero_optimizaton: expected a DeepSpeed key, got 'zero_optimizaton'; did "
        "you mean zero_optimization?",
        f"--deepspeed: {tmp_path}/bad.json: zero_optimization.overlap_com: expected a DeepSpeed key of "
        "zero_optimization, got 'overlap_com'; did you mean overlap_comm?",
    ]
    assert told("--algo", "sft", "--deepspeed", f"{tmp_path}/mine.json") == []
    known = ", ".join(ds_files.names())
    assert told("--algo", "sft", "--deepspeed", "zero-3") == [
        f"--deepspeed: expected {known} or a JSON file that exists, got 'zero-3'; did you mean zero3?"
    ]
    (line,) = told("--algo", "sft", "--deepspeed", "a/b.json")
    assert line.endswith("got 'a/b.json'; check the path")


def test_a_link_to_nothing_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/nowhere/x")
    for given in ("link", "link/run"):
        (line,) = told("--algo", "sft", "--output_dir", str(tmp_path / given))
        assert line.startswith(f"--output_dir: expected a folder, got {tmp_path / 'link'}, which is a link to nothing;")
