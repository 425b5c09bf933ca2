"""Flat parts of several ranks become whole parameters; nothing in a file is run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.utils.tensor_fragment import fragment_address

from dsalign.checkpoint.by_parameter import MASTER, ByParameter

COUNTERS = {"global_steps": 7, "global_samples": 56, "skipped_steps": 1}
A, B = torch.arange(5.0), torch.arange(10.0, 13.0)  # the parameters


def model(folder: Path, name: str = "mp_rank_00_model_states.pt", **more: Any) -> None:
    torch.save({"module": {"a": A, "b": B, "bias": torch.ones(2)}, **COUNTERS, **more}, folder / name)


def optim(folder: Path, rank: int, content: dict[str, Any]) -> None:
    file = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": content}, folder / file)


def state(flat: torch.Tensor, step: float = 3.0) -> dict[str, Any]:
    """Torch's state of one flat tensor, whose first moment is twice and whose second is four times it."""
    own = {"step": torch.tensor(step), "exp_avg": 2 * flat, "exp_avg_sq": 4 * flat}
    return {"state": {0: own}, "param_groups": [{"params": [0]}]}


def check(found: ByParameter) -> None:
    assert found.names() == {"a", "b"} and found.counters == COUNTERS and found.steps == {"a": 3.0, "b": 3.0}
    for name, whole in (("a", A), ("b", B)):
        assert sorted(found.keys(name)) == ["exp_avg", "exp_avg_sq", MASTER]
        for key, factor in ((MASTER, 1), ("exp_avg", 2), ("exp_avg_sq", 4)):
            assert torch.equal(found.get(name, key), factor * whole)
    assert torch.equal(found.module["bias"], torch.ones(2))


def test_stages_1_and_2(tmp_path: Path) -> None:
    """[a0 a1 a2 a3 | a4 b0 b1 b2]: two ranks have four numbers each, and a lies over both."""
    model(tmp_path)
    flat = torch.cat([A, B])
    places = [{"a": fragment_address(numel=4, start=0)}]
    places += [{"a": fragment_address(numel=1, start=0), "b": fragment_address(numel=3, start=1)}]
    for rank in (0, 1):
        mine = flat[rank * 4 : rank * 4 + 4]
        content = {"base_optimizer_state": state(mine), "single_partition_of_fp32_groups": [mine]}
        optim(tmp_path, rank, content | {"param_slice_mappings": [places[rank]]})
    check(ByParameter(tmp_path, ["a", "b"]))


def test_stage_3_and_the_order_of_more_than_ten_ranks(tmp_path: Path) -> None:
    """Of eleven ranks each has ceil(5 / 11) = 1 number of a and one of b, padded with -1 where there is none left."""
    model(tmp_path, "zero_pp_rank_0_mp_rank_00_model_states.pt", param_shapes=[{"a": A.shape, "b": B.shape}])
    for rank in range(11):
        mine = torch.tensor([float(x[rank]) if rank < len(x) else -1.0 for x in (A, B)])
        optim(tmp_path, rank, {"optimizer_state_dict": state(mine), "fp32_flat_groups": [mine]})
    check(ByParameter(tmp_path, ["a", "b"]))


def test_stage_0(tmp_path: Path) -> None:
    """Torch's own state, numbered by the order that is given; a parameter without state has a weight alone."""
    one = state(B)["state"][0]
    model(tmp_path, optimizer={"state": {0: one, 1: state(A)["state"][0]}, "param_groups": [{"params": [0, 1]}]})
    check(ByParameter(tmp_path, ["b", "a"]))
    model(tmp_path, optimizer={"state": {0: one}, "param_groups": [{"params": [0, 1]}]})
    assert ByParameter(tmp_path, ["b", "a"]).keys("a") == [MASTER]


class Planted:
    """An object that makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_an_object_in_a_file_is_refused_and_not_run(tmp_path: Path) -> None:
    model(tmp_path, extra=Planted(tmp_path / "ran"))
    with pytest.raises(
        ValueError, match=r"^resume: .*mp_rank_00_model_states.pt cannot be read: .*; take another check"
    ):
        ByParameter(tmp_path, ["a"])
    assert not (tmp_path / "ran").exists()


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no model_states.pt; take another checkpoint$"):
        ByParameter(tmp_path, ["a"])
