"""The keys of DeepSpeed files: every fault with its path, and that the table is DeepSpeed's own."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import pytest
from deepspeed.runtime.config_utils import DeepSpeedConfigModel

from dsalign.config import ds_keys

MODELS = {  # section -> the model of DeepSpeed that reads it
    "zero_optimization": "runtime.zero.config.DeepSpeedZeroConfig",
    "zero_optimization.offload_param": "runtime.zero.offload_config.DeepSpeedZeroOffloadParamConfig",
    "zero_optimization.offload_optimizer": "runtime.zero.offload_config.DeepSpeedZeroOffloadOptimizerConfig",
    "zero_optimization.zenflow": "runtime.zenflow.zenflow_config.ZenFlowConfig",
    "zero_optimization.leaf_module": "runtime.zero.leaf_module_config.DeepSpeedZeroLeafModuleConfig",
    "comms_logger": "comm.config.CommsLoggerConfig",
    "tensorboard": "monitor.config.TensorBoardConfig",
    "csv_monitor": "monitor.config.CSVConfig",
    "comet": "monitor.config.CometConfig",
    "wandb": "monitor.config.WandbConfig",
    "compile": "compile.config.CompileConfig",
    "hybrid_engine": "runtime.config.HybridEngineConfig",
}


def section(path: str) -> Mapping[str, Any]:
    kind: Any = ds_keys.KEYS
    for key in path.split("."):
        kind = kind[key]
        kind = next(one for one in kind if isinstance(one, Mapping)) if isinstance(kind, tuple) else kind
    return kind  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", MODELS)
def test_the_table_is_deepspeeds(path: str) -> None:
    """A section has exactly the keys of DeepSpeed's model of it."""
    module, _, name = MODELS[path].rpartition(".")
    model: type[DeepSpeedConfigModel] = getattr(importlib.import_module(f"deepspeed.{module}"), name)
    assert set(section(path)) == {field.alias or key for key, field in model.model_fields.items()}


ZERO = "zero_optimization"
NEAR = "; did you mean "
WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"zero_optimizaton": {"stage": 2}},
        f"zero_optimizaton: expected a DeepSpeed key, got 'zero_optimizaton'{NEAR}{ZERO}?",
    ),
    (
        {"zero_optimisation": {"stage": 2}},
        f"zero_optimisation: expected a DeepSpeed key, got 'zero_optimisation'{NEAR}{ZERO}?",
    ),
    ({ZERO: {"stage": "auto"}}, f"{ZERO}.stage: expected 0, 1, 2, 3, got 'auto'"),
    (
        {ZERO: {"stage": 2, "offload_optimizer": {"device": "auto"}}},
        f"{ZERO}.offload_optimizer.device: expected 'none'",
    ),
    ({"zero": "auto"}, "zero: expected a DeepSpeed key, got 'zero'; remove it"),
    (
        {ZERO: {"overlap_com": True}},
        f"{ZERO}.overlap_com: expected a DeepSpeed key of {ZERO}, got 'overlap_com'{NEAR}overlap_comm?",
    ),
    ({ZERO: {"stage": 5}}, f"{ZERO}.stage: expected 0, 1, 2, 3, got 5; correct it"),
    ({ZERO: {"stage": "two"}}, f"{ZERO}.stage: expected 0, 1, 2, 3, got 'two'; correct it"),
    ({ZERO: {"stage": True}}, f"{ZERO}.stage: expected 0, 1, 2, 3, got True; correct it"),
    ({ZERO: None}, f"{ZERO}: expected a section {{...}} with stage, "),
    ({ZERO: 2}, f"{ZERO}: expected a section {{...}} with stage, "),
    ({ZERO: [2]}, f"{ZERO}: expected a section {{...}} with stage, "),
    ({ZERO: {"overlap_comm": "true"}}, f"{ZERO}.overlap_comm: expected true or false, null, got 'true'; correct it"),
    ({ZERO: {"reduce_bucket_size": -1}}, f"{ZERO}.reduce_bucket_size: expected a whole number >= 0, got -1; "),
    ({ZERO: {"reduce_bucket_size": 1.5}}, f"{ZERO}.reduce_bucket_size: expected a whole number >= 0, got 1.5; "),
    (
        {ZERO: {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
        f"{ZERO}.offload_optimizer.device: expected 'none', 'cpu', 'nvme', got 'gpu'; correct it",
    ),
    (
        {ZERO: {"stage": 3, "offload_param": {"devcie": "cpu"}}},
        f"{ZERO}.offload_param.devcie: expected a DeepSpeed key of {ZERO}.offload_param, got 'devcie'{NEAR}device?",
    ),
    (
        {ZERO: {"stage": 2, "offload_param": {"device": "cpu"}}},
        f"{ZERO}.offload_param: expected stage 3 or above beside it, got stage 2; raise the stage or remove it",
    ),
    (
        {ZERO: {"offload_optimizer": {"device": "cpu"}}},
        f"{ZERO}.offload_optimizer: expected stage 1 or above beside it, got stage 0; raise the stage or remove it",
    ),
    (
        {ZERO: {"stage": 3, "offload_param": {"device": "nvme"}}},
        f"{ZERO}.offload_param.nvme_path: expected a folder of the disk beside device nvme, got none; name it",
    ),
    ({"aio": {"thread_count": 1}}, "aio.thread_count: expected a DeepSpeed key of aio, got 'thread_count'; remove it"),
    ({"hybrid_engine": {"enabled": "yes"}}, "hybrid_engine.enabled: expected true or false, got 'yes'; correct it"),
    ({"hybrid_engine": {"inference_tp_size": 2}}, "hybrid_engine.inference_tp_size: expected 1, got 2; correct it"),
    ({"elasticity": {"enabled": True}}, "elasticity: expected none of it, as no run here does that, got {'enabled': "),
    ({"communication_data_type": "fp8"}, "communication_data_type: expected 'fp16', 'bf16', 'fp32', null, got 'fp8'; "),
]
FLAGS: list[tuple[str, Any, str]] = [
    ("train_batch_size", 8, "--batch_size, --gradient_accumulation_steps and the number of ranks"),
    ("train_micro_batch_size_per_gpu", 1, "--batch_size"),
    ("gradient_accumulation_steps", 4, "--gradient_accumulation_steps"),
    ("gradient_clipping", 1.0, "--max_grad_norm"),
    ("optimizer", {"type": "AdamW", "params": {"lr": "auto"}}, "--optimizer, --learning_rate, --weight_decay and --ad"),
    ("scheduler", {"type": "WarmupLR"}, "--lr_scheduler_type and --warmup_ratio"),
    ("bf16", {"enabled": True}, "--dtype"),
    ("fp16", {"enabled": False}, "--dtype"),
    ("torch_autocast", {"enabled": True}, "--dtype"),
    ("amp", {"enabled": True}, "--dtype"),
    ("data_types", {"grad_accum_dtype": "bf16"}, "--dtype (gradients"),
    ("gradient_allreduce_op", "sum", "nothing: a gradient is the sum"),
    ("managed_gradient_accumulation", True, "--gradient_accumulation_steps"),
]


@pytest.mark.parametrize(("settings", "said"), WRONG)
def test_a_fault_is_one_line_with_its_path(settings: dict[str, Any], said: str) -> None:
    (line,) = ds_keys.wrong(settings)
    assert line.startswith(said)


@pytest.mark.parametrize(("key", "value", "flag"), FLAGS)
def test_what_has_a_flag_is_refused_in_the_file(key: str, value: Any, flag: str) -> None:
    (line,) = ds_keys.wrong({key: value, ZERO: {"stage": 2}})
    assert line.startswith(f"{key}: expected it from {flag}") and line.endswith("remove it from the file")


def test_all_faults_are_told_at_once() -> None:
    assert {key for key, _, _ in FLAGS} == set(ds_keys.FLAGS)
    found = list(ds_keys.wrong({"bf16": {"enabled": True}, ZERO: {"stage": 9, "stag": 1}, "gradient_clipping": 0.5}))
    assert [line.split(":")[0] for line in found] == ["bf16", f"{ZERO}.stage", f"{ZERO}.stag", "gradient_clipping"]


@pytest.mark.parametrize("key", ds_keys.FLAGS)
def test_auto_is_left_to_the_flags(key: str) -> None:
    for left in ("auto", {"params": {"lr": "auto", "eps": "auto"}}):
        settings = {key: left, "comms_logger": {}}
        assert list(ds_keys.wrong(settings)) == []
        assert ds_keys.without_auto(settings) == {"comms_logger": {}}


def test_auto_inside_a_section_is_deepspeeds_own() -> None:
    """As in the files that transformers documents: bucket sizes are left open."""
    zero = {"stage": 3, "reduce_bucket_size": "auto", "stage3_max_live_parameters": 1e9, "offload_param": None}
    settings = {ZERO: zero, "steps_per_print": 2000, "fp16": {"enabled": "auto", "loss_scale": "auto"}}
    assert list(ds_keys.wrong(settings)) == []
    assert ds_keys.without_auto(settings) == {
        ZERO: {"stage": 3, "stage3_max_live_parameters": 1e9, "offload_param": None},
        "steps_per_print": 2000,
    }
