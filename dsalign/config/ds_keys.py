"""The keys of a DeepSpeed file, section by section, with the kind of value of each: known here, so that a misspelt key
is found before DeepSpeed, which ignores many of them, is imported."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any

from dsalign.config.flags import nearest

BOOL, INT, NUMBER, TEXT, LIST, ANY = "true or false", "a whole number", "a number", "text", "a list", "anything"
COUNT, SHARE = "a whole number >= 0", "a number in [0, 1]"
NULL = "null"
Kind = Any  # one of the words above, a tuple of allowed values or of kinds, or a section: key -> kind

_OFFLOAD = {"device": ("none", "cpu", "nvme"), "nvme_path": (TEXT, NULL), "buffer_count": COUNT, "pin_memory": BOOL}
_ZENFLOW = {
    "topk_ratio": NUMBER, "select_strategy": TEXT, "select_interval": (TEXT, INT), "update_interval": (TEXT, INT),
    "overlap_step": BOOL, "offload": BOOL, "auto_ratio": NUMBER, "full_warm_up_rounds": INT,
    "pt_reserved_cores_perc": NUMBER, "steps_per_epoch": (INT, NULL),
}  # fmt: skip
ZERO = {
    "stage": (0, 1, 2, 3),
    "contiguous_gradients": BOOL, "reduce_scatter": BOOL, "reduce_bucket_size": COUNT,
    "use_multi_rank_bucket_allreduce": BOOL, "allgather_partitions": BOOL, "allgather_bucket_size": COUNT,
    "overlap_comm": (BOOL, NULL), "compute_grad_norm": BOOL, "load_from_fp32_weights": BOOL, "elastic_checkpoint": BOOL,
    "offload_param": (_OFFLOAD | {"buffer_size": COUNT, "max_in_cpu": COUNT}, NULL),
    "offload_optimizer": (
        _OFFLOAD | {"pipeline_read": BOOL, "pipeline_write": BOOL, "fast_init": BOOL, "ratio": SHARE,
                    "super_offload": BOOL, "cpuadam_cores_perc": SHARE}, NULL),
    "zenflow": (_ZENFLOW, NULL),
    "sub_group_size": COUNT, "cpu_offload_param": (BOOL, NULL), "cpu_offload_use_pin_memory": (BOOL, NULL),
    "cpu_offload": (BOOL, NULL), "stage3_prefetch_bucket_size": COUNT, "stage3_param_persistence_threshold": COUNT,
    "stage3_model_persistence_threshold": COUNT, "stage3_max_live_parameters": COUNT,
    "stage3_max_reuse_distance": COUNT, "stage3_gather_16bit_weights_on_model_save": BOOL,
    "stage3_module_granularity_threshold": INT, "stage3_use_all_reduce_for_fetch_params": BOOL,
    "stage3_allgather_sequential": BOOL, "stage3_gather_fp16_weights_on_model_save": BOOL,
    "ignore_unused_parameters": BOOL, "legacy_stage1": BOOL, "round_robin_gradients": BOOL,
    "parameter_alignment": BOOL, "zero_hpz_partition_size": COUNT, "zero_quantized_weights": BOOL,
    "zero_quantized_nontrainable_weights": BOOL, "zero_quantized_gradients": BOOL, "memory_efficient_linear": BOOL,
    "pipeline_loading_checkpoint": BOOL, "override_module_apply": BOOL, "log_trace_cache_warnings": BOOL,
    "enable_sanity_checks": BOOL, "save_muon_momentum_buffer_in_memory": BOOL,
    "leaf_module": {"classes": LIST, "names": LIST, "name_suffixes": LIST},
}  # fmt: skip
_MONITOR = {"enabled": BOOL, "output_path": TEXT, "job_name": TEXT}
_COMET = {
    "enabled": BOOL, "samples_log_interval": INT, "project": (TEXT, NULL), "workspace": (TEXT, NULL),
    "api_key": (TEXT, NULL), "experiment_name": (TEXT, NULL), "experiment_key": (TEXT, NULL), "online": (BOOL, NULL),
    "mode": (TEXT, NULL),
}  # fmt: skip
_COMPILE = dict.fromkeys((
    "deepcompile", "autoep_non_moe", "free_activation", "offload_activation", "offload_activation_pin_memory",
    "offload_opt_states", "double_buffer", "symmetric_memory", "debug_log", "offload_parameters", "sync_before_reduce",
    "sync_after_reduce", "sync_before_allgather", "sync_after_allgather", "keep_int_input_tensors",
    "keep_all_input_tensors",
), BOOL) | {"free_activation_threshold": INT, "passes": (LIST, NULL)}  # fmt: skip
HYBRID = {
    "enabled": BOOL, "max_out_tokens": COUNT, "inference_tp_size": (1,), "release_inference_cache": BOOL,
    "pin_parameters": BOOL, "tp_gather_partition_size": INT, "enable_cuda_graph": BOOL,
}  # fmt: skip
KEYS: Mapping[str, Kind] = {
    "zero_optimization": ZERO,
    "hybrid_engine": HYBRID,
    "communication_data_type": (("fp16", "bf16", "fp32"), NULL),
    "seq_parallel_communication_data_type": (("fp16", "bf16", "fp32"), NULL),
    "prescale_gradients": BOOL, "gradient_predivide_factor": NUMBER, "disable_allgather": BOOL, "dump_state": BOOL,
    "disable_python_gc": BOOL, "memory_breakdown": BOOL, "use_data_before_expert_parallelism": BOOL,
    "dataloader_drop_last": BOOL, "log_level": TEXT, "steps_per_print": COUNT, "wall_clock_breakdown": BOOL,
    "zero_allow_untested_optimizer": BOOL, "zero_force_ds_cpu_optimizer": BOOL,
    "activation_checkpointing": {
        "partition_activations": BOOL, "number_checkpoints": (COUNT, NULL), "contiguous_memory_optimization": BOOL,
        "synchronize_checkpoint_boundary": BOOL, "profile": BOOL, "cpu_checkpointing": BOOL,
    },
    "comms_logger": {"enabled": BOOL, "prof_all": BOOL, "prof_ops": LIST, "verbose": BOOL, "debug": BOOL},
    "flops_profiler": {
        "enabled": BOOL, "recompute_fwd_factor": NUMBER, "profile_step": COUNT, "module_depth": INT,
        "top_modules": COUNT, "detailed": BOOL, "output_file": (TEXT, NULL),
    },
    "tensorboard": _MONITOR, "csv_monitor": _MONITOR, "comet": _COMET,
    "wandb": {"enabled": BOOL, "group": (TEXT, NULL), "team": (TEXT, NULL), "project": TEXT},
    "aio": {
        "block_size": COUNT, "queue_depth": COUNT, "intra_op_parallelism": COUNT, "single_submit": BOOL,
        "overlap_events": BOOL, "use_gds": BOOL,
    },
    "checkpoint": {
        "tag_validation": ("Warn", "Ignore", "Fail"), "load_universal": BOOL, "use_node_local_storage": BOOL,
        "parallel_write": {"pipeline_stage": BOOL}, "checkpoint_serialization": BOOL, "writer": (ANY, NULL),
    },
    "timers": {"throughput": {"enabled": BOOL, "synchronized": BOOL}},
    "compile": _COMPILE,
}  # fmt: skip
FLAGS: Mapping[str, str] = {  # a number with two homes disagrees with itself sooner or later: it stays with the flag
    "train_batch_size": "--batch_size, --gradient_accumulation_steps and the number of ranks",
    "train_micro_batch_size_per_gpu": "--batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "gradient_clipping": "--max_grad_norm",
    "optimizer": "--optimizer, --learning_rate, --weight_decay and --adam_*",
    "scheduler": "--lr_scheduler_type and --warmup_ratio",
    "bf16": "--dtype",
    "fp16": "--dtype",
    "torch_autocast": "--dtype",
    "amp": "--dtype",
    "data_types": "--dtype (gradients are added up in float32)",
    "gradient_allreduce_op": "nothing: a gradient is the sum over the global batch, divided once",
    "managed_gradient_accumulation": "--gradient_accumulation_steps",
}
NOT_DONE = (  # sections that would change what is computed, and that no run here honours
    "autotuning", "compression_training", "curriculum_learning", "data_efficiency", "datastates_ckpt", "eigenvalue",
    "elasticity", "expert_parallel", "graph_harvesting", "nebula", "pipeline", "progressive_layer_drop",
    "sequence_parallel_size", "sparse_attention", "sparse_gradients", "tensor_parallel", "weight_quantization",
)  # fmt: skip
MONITORS = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}  # section -> the package that it needs
UNUSED: Mapping[str, Any] = {  # what every run sets itself -> the value that asks for nothing else
    "steps_per_print": None, "wall_clock_breakdown": False, "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False, "dataloader_drop_last": False,
}  # fmt: skip


def wrong(settings: Mapping[str, Any]) -> Iterator[str]:
    """A line for each key of a DeepSpeed file that DeepSpeed does not know, that is of the wrong kind, that has a flag,
    or that asks for what no run here does: "zero_optimization.stage: expected ..., got ...; what to do".

    "auto" stands for DeepSpeed's own value, or for the flag's; not for a choice, such as the stage, that nothing makes.
    """
    for key, value in settings.items():
        if key in FLAGS:
            if not _left_open(value):
                yield f"{key}: expected it from {FLAGS[key]}, got it in the file too; remove it from the file"
        elif key in NOT_DONE:
            off = isinstance(value, dict) and value.get("enabled") is False
            if not off and value is not False and not _left_open(value):
                yield f"{key}: expected none of it, as no run here does that, got {_short(value)}; remove it"
        elif key not in KEYS:
            yield f"{key}: expected a DeepSpeed key, got {key!r}{_near(key, (*KEYS, *FLAGS))}"
        else:
            yield from _of_kind(key, KEYS[key], value)
    zero = settings.get("zero_optimization")
    if isinstance(zero, dict):
        yield from _offloading(zero)
    for key, package in MONITORS.items():
        section = settings.get(key)
        if isinstance(section, dict) and section.get("enabled") is True and importlib.util.find_spec(package) is None:
            yield f"{key}: expected {package} to be installed, got none; run pip install {package}, or leave it out"


def _of_kind(path: str, kind: Kind, value: Any) -> Iterator[str]:
    """A line for each breach in `value`, which stands at the dotted `path` and should be of this kind."""
    if (value == "auto" and not _is_choice(kind)) or _is(kind, value):
        return
    section = next((one for one in _options(kind) if isinstance(one, Mapping)), None)
    if section is not None and isinstance(value, dict):
        for key, inner in value.items():
            if key in section:
                yield from _of_kind(f"{path}.{key}", section[key], inner)
            else:
                yield f"{path}.{key}: expected a DeepSpeed key of {path}, got {key!r}{_near(key, section)}"
        return
    words = (
        ", ".join(one if isinstance(one, str) and one in _WORDS else repr(one) for one in _flat(kind))
        if section is None
        else f"a section {{...}} with {', '.join(list(section)[:4])}, ..."
    )
    yield f"{path}: expected {words}, got {_short(value)}; correct it, or leave it out for DeepSpeed's own"


_WORDS = (BOOL, INT, NUMBER, SHARE, TEXT, LIST, ANY, COUNT, NULL)


def _options(kind: Kind) -> tuple[Any, ...]:
    return kind if isinstance(kind, tuple) else (kind,)


def _is_choice(kind: Kind) -> bool:
    """Whether a kind is one of some values, which are written out."""
    return not any(isinstance(one, Mapping) or one in _WORDS for one in _flat(kind))


def _flat(kind: Kind) -> Iterator[Any]:
    for one in _options(kind):
        yield from _flat(one) if isinstance(one, tuple) else (one,)


def _is(kind: Kind, value: Any) -> bool:
    """Whether a value is of a kind that is no section. 5e8 is a whole number, as DeepSpeed reads it."""
    if isinstance(kind, Mapping):
        return False
    if isinstance(kind, tuple):
        return any(_is(one, value) for one in kind)
    if kind not in _WORDS:
        return type(value) is type(kind) and bool(value == kind)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    whole = number and float(value).is_integer()
    return {
        BOOL: isinstance(value, bool), INT: whole, NUMBER: number, TEXT: isinstance(value, str),
        SHARE: number and 0 <= value <= 1, LIST: isinstance(value, list), ANY: True,
        COUNT: whole and value >= 0, NULL: value is None,
    }[kind]  # fmt: skip


def _offloading(zero: Mapping[str, Any]) -> Iterator[str]:
    """Off-loading that DeepSpeed would leave out without a word, or for which it has no place."""
    stage = zero.get("stage", 0)
    stage = stage if isinstance(stage, int) else 0
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        section = zero.get(name)
        if not isinstance(section, dict) or section.get("device", "none") == "none":
            continue
        path = f"zero_optimization.{name}"
        if stage < least:
            yield f"{path}: expected stage {least} or above beside it, got stage {stage}; raise the stage or remove it"
        if section.get("device") == "nvme" and not section.get("nvme_path"):
            yield f"{path}.nvme_path: expected a folder of the disk beside device nvme, got none; name it"
        elif section.get("device") == "nvme" and not _can_be_written(str(section["nvme_path"])):
            yield f"{path}.nvme_path: expected a folder that can be written, got {section['nvme_path']}; name another"


def _can_be_written(folder: str) -> bool:
    """Whether a folder is there and may be written, or can be made."""
    whole = os.path.abspath(folder)
    while not os.path.lexists(whole):
        whole = os.path.dirname(whole)
    return os.path.isdir(whole) and os.access(whole, os.W_OK | os.X_OK)


def _left_open(value: Any) -> bool:
    """Whether a value, or every value of a section, is "auto"; an empty section leaves nothing open."""
    if isinstance(value, dict):
        return bool(value) and all(_left_open(one) for one in value.values())
    return bool(value == "auto")


def without_auto(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings without what is left open, at any depth."""
    return {
        key: without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if not _left_open(value)
    }


def _near(key: str, names: Any) -> str:
    return nearest(key, list(names)) or "; remove it, or see DeepSpeed's documentation of its configuration"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
