"""One configuration file, no number twice; a step by hand at every kind of stage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import run_cases
import torch
from run_cases import Run
from support import RankPool, ds_file, quick_if, section

from dsalign.config import ds_files
from dsalign.config.schema import OptimOptions
from dsalign.engines import engine as engines


def complete(
    settings: dict[str, Any], dtype: torch.dtype = torch.float32, max_grad_norm: float = 0.0, *, train: bool
) -> dict[str, Any]:
    """What a file with these settings becomes for 3 rows a rank on 2 ranks."""
    options = section(OptimOptions, deepspeed=ds_file(settings), batch_size=3, max_grad_norm=max_grad_norm)
    with mock.patch.object(engines.dist, "world_size", lambda: 2):
        return engines.complete(options, dtype, train=train)


def test_numbers_of_a_trained_engine() -> None:
    """3 rows a rank on 2 ranks, accumulation 1, whatever the file left to us; what is the file's stays."""
    zero = {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    file = {"zero_optimization": zero, "comms_logger": {"enabled": False}, "train_batch_size": "auto"}
    found = complete(file, max_grad_norm=0.5, train=True)
    assert found["train_batch_size"] == 6
    assert found["train_micro_batch_size_per_gpu"] == 3
    assert found["gradient_accumulation_steps"] == 1
    assert found["gradient_clipping"] == 0.5
    assert found["comms_logger"] == {"enabled": False}
    assert found["zero_optimization"] == {**zero, "offload_optimizer": {"device": "cpu", "pin_memory": False}}
    assert not {"bf16", "fp16", "optimizer", "scheduler", "data_types"} & set(found)


def test_clipping_is_ours_where_torch_steps_and_never_zero_elsewhere() -> None:
    """At stage 0 in float32 `step` clips; elsewhere 0 would be DeepSpeed's way not to compute the norm."""
    for stage, dtype, norm, want in (
        (0, torch.float32, 0.5, 0.0),
        (0, torch.bfloat16, 0.5, 0.5),
        (3, torch.float32, 0.5, 0.5),
        (3, torch.float32, 0.0, engines.NO_CLIPPING),
    ):
        file = {"zero_optimization": {"stage": stage}}
        assert complete(file, dtype, norm, train=True)["gradient_clipping"] == want


def test_half_precision_sections() -> None:
    """Gradients add up in float32 in both."""
    bf16 = complete({}, torch.bfloat16, train=True)
    assert bf16["bf16"] == {"enabled": True}
    assert bf16["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "fp16" not in bf16
    fp16 = complete({}, torch.float16, train=True)
    assert fp16["fp16"]["enabled"] is True
    assert fp16["data_types"] == {"grad_accum_dtype": "fp32"}
    assert "bf16" not in fp16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stage_0_in_half_precision_is_stage_1(dtype: torch.dtype) -> None:
    """For what is trained, and there only; a file without the section is stage 0."""
    for file in ({"zero_optimization": {"stage": 0}}, {}):
        assert complete(file, dtype, train=True)["zero_optimization"] == {"stage": 1}
        assert complete(file, dtype, train=False)["zero_optimization"] == {"stage": 0}
        assert complete(file, train=True)["zero_optimization"] == {"stage": 0}


def test_another_stage_than_the_files_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(
        engines.deepspeed, "initialize", lambda model, optimizer, config: (model, optimizer, None, None)
    )
    monkeypatch.setattr(engines.dist, "world_size", lambda: 2)
    options = section(OptimOptions, deepspeed=ds_file({}))
    for dtype, said in ((torch.float32, 0), (torch.bfloat16, 1)):
        engines.trained(torch.nn.Linear(1, 1), options, dtype)
        assert len(caplog.records) == said
    assert "stage 1 instead of 0, which cannot add gradients up in float32 for torch.bfloat16" in caplog.text


@pytest.mark.parametrize(("stage", "want"), [(0, {"stage": 0}), (1, {"stage": 0}), (2, {"stage": 0})])
def test_a_frozen_engine_has_nothing_to_partition_below_stage_3(stage: int, want: dict[str, int]) -> None:
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True}
    zero |= {"offload_optimizer": {"device": "cpu"}} if stage else {}  # which has no place at stage 0
    assert complete({"zero_optimization": zero}, train=False)["zero_optimization"] == want


def test_a_frozen_engine_at_stage_3_is_sharded_and_keeps_its_parameters_off_the_device() -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu", "pin_memory": True}}
    found = complete({"zero_optimization": zero}, train=False)["zero_optimization"]
    assert found == {"stage": 3, "offload_param": {"device": "cpu", "pin_memory": False}}


@pytest.mark.parametrize(("optimizer", "name", "decay"), [("adamw", "AdamW", 0.1), ("sgd", "SGD", 0.1)])
def test_biases_and_norms_do_not_decay(optimizer: str, name: str, decay: float, two_ranks: RankPool) -> None:
    """A matrix decays, a vector does not; `set_learning_rate` reaches both groups."""
    assert two_ranks.run(run_cases.optimizer_groups, optimizer) == (name, [(decay, [2]), (0.0, [1])])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5, 100.0])
def test_a_step_by_hand(stage: int, max_grad_norm: float, two_ranks: RankPool) -> None:
    """w . x + b with x = (3, 0) and (0, 4): gradient (1.5, 2, 1), norm sqrt(7.25); weights (1, -1, 0) less the
    gradient, scaled to norm 0.5 where it is clipped."""
    norm, found = two_ranks.run(run_cases.one_sgd_step, stage, max_grad_norm)
    want = math.sqrt(1.5**2 + 2**2 + 1)
    scale = 0.5 / want if max_grad_norm == 0.5 else 1.0
    assert norm == pytest.approx(want, rel=1e-6)
    assert found == pytest.approx([1 - 1.5 * scale, -1 - 2 * scale, -scale], abs=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("dtype", "max_grad_norm"), [(torch.float32, 0.0), (torch.float32, 0.5), (torch.bfloat16, 0.0)]
)
def test_a_nan_is_not_stepped(stage: int, dtype: torch.dtype, max_grad_norm: float, two_ranks: RankPool) -> None:
    """NaN on one rank: the norm tells (NaN, infinity or -1), the weights are what they were."""
    norm, found = two_ranks.run(run_cases.one_sgd_step, stage, max_grad_norm, dtype, True)
    assert not (math.isfinite(norm) and norm >= 0)
    assert found == [1.0, -1.0, 0.0]


@pytest.mark.parametrize(
    ("algo", "tuner", "stage"),
    [
        quick_if((algo == "dpo") == (stage in (0, 3)), algo, tuner, stage)
        for algo, tuner in (("sft", "lora"), ("dpo", "full"))
        for stage in (0, 1, 2, 3)
    ],
)
def test_a_step_in_bfloat16(algo: str, tuner: str, stage: int, tiny: Path, two_ranks: RankPool) -> None:
    """The loss is near that of float32, the norm too, weights move, and the positions' frequencies, which are buffers,
    stay float32: rounded they would be wrong by whole turns after some hundred tokens."""
    loss, norm, good, buffers = two_ranks.run(run_cases.one_step, Run(algo, tiny, stage, tuner, torch.bfloat16))
    exact, exact_norm, _, _ = two_ranks.run(run_cases.one_step, Run(algo, tiny, 0, tuner))
    assert loss == pytest.approx(exact, rel=0.01)
    assert norm == pytest.approx(exact_norm, rel=0.1)
    assert good
    assert buffers == ["torch.float32"]


def test_the_hybrid_engine_is_not_deepspeeds() -> None:
    """The section chooses our rollout engine; DeepSpeed is not told of it."""
    file = ds_file({"hybrid_engine": {"enabled": True, "max_out_tokens": 512}, "zero_optimization": {"stage": 2}})
    assert ds_files.hybrid(file) and "hybrid_engine" not in complete(ds_files.settings(file), train=True)
    assert ds_files.hybrid("zero3_hybrid") and not ds_files.hybrid("zero3")
