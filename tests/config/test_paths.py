"""A configuration is read the same from any folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsalign.config.parse import parse


def test_paths_are_absolute_and_names_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies beside the working folder is found from another one; a hub's names and what comes along stay."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here / "model", here / "rows", there):
        folder.mkdir(parents=True)
    (here / "model" / "config.json").write_text("{}")
    for name in ("a.jsonl", "rows/b.jsonl", "r.py", "t.jinja", "ds.json"):
        (here / name).write_text("{}" if name == "ds.json" else "def f(completions): ...")
    words = ["--algo", "ppo", "--model", "model", "--ref_model", "org/name", "--dataset", "a.jsonl#3", "rows/*.jsonl"]
    words += ["demo:prompts", "org/set", "--reward_funcs", "r.py:f", "demo:friendly", "--template", "t.jinja"]
    words += ["--deepspeed", "ds.json", "--output_dir", "out"]
    monkeypatch.chdir(here)
    parse(words, world_size=1).config.to_yaml(here / "config.yaml", "# a line\n")
    monkeypatch.chdir(there)
    found = parse(["--config", "../here/config.yaml"], world_size=1).config
    assert (here / "config.yaml").read_text().startswith("# a line\nalgo: ppo\n")
    assert (found.models.model, found.models.ref_model) == (str(here / "model"), "org/name")
    assert found.data.dataset == (f"{here}/a.jsonl#3", f"{here}/rows/*.jsonl", "demo:prompts", "org/set")
    assert found.models.reward_funcs == (f"{here}/r.py:f", "demo:friendly")
    assert (found.data.template, found.optim.deepspeed) == (f"{here}/t.jinja", f"{here}/ds.json")
    assert (found.output.output_dir, found.output.resume) == (f"{here}/out", None)


def test_names_of_what_comes_along_stay() -> None:
    config = parse(["--algo", "sft", "--template", "chatml", "--deepspeed", "zero3"], world_size=1).config
    assert (config.data.template, config.optim.deepspeed) == ("chatml", "zero3")
