"""A step that was skipped, computed again: the module, row and position of the first number that is not finite."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import groups_of, tiny_folder
from transformers import LlamaForCausalLM

from dsalign.config import parse
from dsalign.contract.groups import Group, Prepared
from dsalign.endings import DIVERGED, DONE
from dsalign.guard import numbers
from dsalign.guard.numbers import BadStep
from dsalign.verbs import replay

HOT = 50  # a token whose hidden state alone has something in its first dimension


def kept(run: Path, model: Path, algo: str, groups: list[Group], **fields: list[torch.Tensor]) -> Path:
    """The folder of a skipped step of a run in `run`."""
    words = ["--algo", algo, "--model", str(model), "--output_dir", str(run), "--tuner", "full"]
    run.mkdir()
    parse.parse(words, world_size=1).config.to_yaml(run / "config.yaml")
    bad = BadStep("the loss is nan", 7, 6, ("rows.jsonl:1",))
    assert numbers.keep(run, bad, Prepared(groups, fields), range(len(groups))) == f"kept in {run / 'bad' / 'step-7'}"
    return run / "bad" / "step-7"


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process group: this process is rank 0 of 1."""
    for name, value in {"rank": 0, "world_size": 1}.items():
        monkeypatch.setattr(numbers.dist, name, lambda value=value: value)


def overflowing(folder: Path) -> Path:
    """A model of which gate_proj of the first layer overflows where the token HOT is read, and nowhere else."""
    tiny_folder(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0
        model.model.embed_tokens.weight[HOT] = torch.eye(32)[0] * 100
        first = model.model.layers[0]
        first.self_attn.o_proj.weight[0] = 0
        first.mlp.gate_proj.weight[:, 0] = 3e38
    model.save_pretrained(folder)
    return folder


def test_the_module_row_and_position_are_named(alone: None, tmp_path: Path, capsys: Any) -> None:
    """The third token of the second completion of row 1 overflows. Row 2 has no such token: its loss is finite, and its
    gradient overflows where it comes back through the same weights."""
    pair = ((5, 6, 2), (7, 8, HOT, 2))
    first, second = groups_of(pair, pair[:1] * 2)
    length = len(first.prompt)
    folder = kept(tmp_path / "run", overflowing(tmp_path / "model"), "cpo", [first, second])
    assert replay.run(replay.read([str(folder)])) == DIVERGED
    said = capsys.readouterr().out
    assert f"step 7 of {tmp_path / 'run'}: the loss is nan" in said
    assert (
        "rows.jsonl:1: policy: the output of model.model.layers.0.mlp.gate_proj is inf at "
        f"position {length + 2}, token 3 of completion 2 (id {HOT}, " in said.replace("-inf", "inf")
    )
    assert "rows.jsonl:2: policy: gradient of the output of model.model.layers.0.post_attention_layernorm is " in said


def test_prepared_numbers_losses_and_gradients_are_named(alone: None, tmp_path: Path, tiny: Path, capsys: Any) -> None:
    """DPO: a NaN of the reference at the second token of completion 2 spoils the loss. --model gives other weights."""
    (group,) = groups_of(((5, 6, 2), (7, 8, 2)))
    reference = torch.tensor([-1.0, -1.0, -1.0, -1.0, math.nan, -1.0])
    folder = kept(tmp_path / "run", tiny, "dpo", [group], reference=[reference])
    assert replay.run(replay.read([str(folder), "--model", str(tiny)])) == DIVERGED
    said = capsys.readouterr().out
    assert f"prepared reference is nan at position {len(group.prompt) + 1}, token 2 of completion 2 (id 8, " in said
    assert "policy: the loss is nan (by pairs), of a forward pass that is finite" in said


def test_finite_rows_of_a_value_model_end_with_0(alone: None, tmp_path: Path, tiny: Path, capsys: Any) -> None:
    """A reward model as a run starts it, without a value head in its folder; with a NaN margin it is the loss."""
    (group,) = groups_of(((5, 6, 2), (7, 8, 2)))
    folder = kept(tmp_path / "run", tiny, "rm", [group])
    assert replay.run(replay.read([str(folder)])) == DONE
    said = capsys.readouterr().out
    assert "rows.jsonl:1: finite" in said and "every row is finite with these weights" in said.splitlines()[-1]
    again = kept(tmp_path / "other", tiny, "rm", [replace(group, margin=math.nan)])
    assert replay.run(replay.read([str(again)])) == DIVERGED
    assert "reward: the loss is nan (by pairs)" in capsys.readouterr().out


def test_what_is_no_skipped_step(tmp_path: Path, tiny: Path, alone: None, capsys: Any) -> None:
    assert replay.run(replay.read(["--help"])) == DONE and "usage: dsalign replay" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"expected RUN/bad/step-N of a run, got .*/run, but no .*/run; check"):
        replay.read([str(tmp_path / "run")])
    with pytest.raises(ValueError, match="expected one folder, RUN/bad/step-N, and --model at most, got a b"):
        replay.read(["a", "b"])
    folder = kept(tmp_path / "run", tiny, "sft", groups_of(((5, 2),)))
    (folder / "rank-0.json").unlink()
    with pytest.raises(ValueError, match=r"expected a step that a run skipped.*got FileNotFoundError: .*rank-0.json"):
        replay.run(replay.read([str(folder)]))
