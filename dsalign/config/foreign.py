"""What other trainers write, in one table: names that mean one of ours, values that mean one of ours, and names that
mean nothing here, each with what to do instead."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from dsalign.config.flags import Raw

NAMES: Mapping[str, str] = {  # a name in the documented scripts and other trainers -> the option that means the same
    "rlhf_type": "algo", "stage": "algo",
    "model_type": "model",  # stands for the model where that is not given: see parse.py
    "model_id_or_path": "model", "model_name_or_path": "model", "model_path": "model", "pretrain": "model",
    "sft_type": "tuner", "train_type": "tuner", "tuner_type": "tuner", "finetuning_type": "tuner",
    "ref_model_id_or_path": "ref_model", "ref_model_name_or_path": "ref_model", "ref_pretrain": "ref_model",
    "reward_model_id_or_path": "reward_model", "reward_model_path": "reward_model", "reward_pretrain": "reward_model",
    "reward_model_name_or_path": "reward_model",
    "torch_dtype": "dtype", "attn_implementation": "attn_impl",
    "lora_r": "lora_rank", "lora_target": "lora_target_modules", "target_modules": "lora_target_modules",
    "dataset_name": "dataset", "data_path": "dataset", "train_file": "dataset", "custom_train_dataset_path": "dataset",
    "eval_dataset": "val_dataset", "custom_val_dataset_path": "val_dataset",
    "dataset_test_ratio": "split_dataset_ratio",
    "preprocessing_num_workers": "dataset_num_proc",
    "template_type": "template", "chat_template": "template", "system_prompt": "system", "default_system": "system",
    "cutoff_len": "max_length", "max_seq_length": "max_length", "max_seq_len": "max_length",
    "model_max_length": "max_length",
    "per_device_train_batch_size": "batch_size", "micro_train_batch_size": "batch_size",
    "lr": "learning_rate", "actor_learning_rate": "learning_rate",
    "epochs": "num_train_epochs", "num_epochs": "num_train_epochs",
    "grad_accum_steps": "gradient_accumulation_steps", "gradient_clipping": "max_grad_norm",
    "max_norm": "max_grad_norm",
    "lr_scheduler": "lr_scheduler_type", "deepspeed_config": "deepspeed", "deepspeed_config_file": "deepspeed",
    "resume_from_checkpoint": "resume",
    "response_length": "max_new_tokens", "generate_max_len": "max_new_tokens",
    "max_completion_length": "max_new_tokens",
    "pref_beta": "beta", "kto_chosen_weight": "desirable_weight", "kto_rejected_weight": "undesirable_weight",
    "ppo_epochs": "num_ppo_epochs", "eps_clip": "cliprange", "value_clip": "cliprange_value", "lambd": "lam",
}  # fmt: skip
VALUES: Mapping[str, Mapping[str, tuple[str, ...]]] = {  # option -> their value, in small letters -> ours
    "dtype": {
        "bf16": ("bfloat16",), "fp16": ("float16",), "fp32": ("float32",), "half": ("float16",), "auto": ("auto",),
        **{f"torch.{name}": (name,) for name in ("bfloat16", "float16", "float32")},
    },
    "deepspeed": {
        **{f"default-{name}": (name,) for name in ("zero0", "zero1", "zero2", "zero3")},
        "default-zero2-offload": ("zero2_offload",), "default-zero3-offload": ("zero3_offload",),
    },
    "lora_target_modules": {"all": ("ALL",), "all-linear": ("ALL",), "default": ("DEFAULT",)},
    "report_to": {"none": (), "tensorboardx": ("tensorboard",)},
    "attn_impl": {"flash_attn": ("flash_attention_2",), "fa2": ("flash_attention_2",)},
    "optimizer": {name: ("adamw",) for name in ("adamw_torch", "adamw_torch_fused", "adamw_hf")},
}  # fmt: skip
_EVERY = "leave it out and give {} N, optimizer steps"
_QUANT = "write --load_in_4bit true for 4 bits (NF4, double quantised), the only quantised base there is"
_NF4 = "leave it out: --load_in_4bit true is NF4, double quantised, and computes in --dtype"
_OUT, _HUB = "leave it out: every run does as it says", "leave it out; copy final/ to the hub by hand"
_LAUNCH = "leave it out; the launcher and --deepspeed decide that"
SENTENCES: Mapping[str, str] = {  # a name without a counterpart -> what to do
    "evaluation_strategy": _EVERY.format("--eval_steps"), "eval_strategy": _EVERY.format("--eval_steps"),
    "save_strategy": _EVERY.format("--save_steps"), "logging_strategy": _EVERY.format("--logging_steps"),
    "bf16": "write --dtype bfloat16", "pure_bf16": "write --dtype bfloat16", "fp16": "write --dtype float16",
    "tf32": "leave it out; --dtype is the precision",
    "load_in_8bit": _QUANT, "quantization_bit": _QUANT, "quant_bits": _QUANT, "quant_method": _QUANT,
    "bnb_4bit_comp_dtype": _NF4, "bnb_4bit_compute_dtype": _NF4, "bnb_4bit_quant_type": _NF4,
    "use_bnb_nested_quant": _NF4, "bnb_4bit_use_double_quant": _NF4, "double_quantization": _NF4,
    "use_flash_attn": "write --attn_impl flash_attention_2", "flash_attn": "write --attn_impl flash_attention_2",
    "use_flash_attention_2": "write --attn_impl flash_attention_2",
    "use_lora": "write --tuner lora or --tuner full", "use_peft": "write --tuner lora or --tuner full",
    "adapter_name_or_path": "give the adapter's folder as --model, which names its base",
    "adapters": "give the adapter's folder as --model, which names its base",
    "lora_modules_to_save": "leave it out; train all weights with --tuner full",
    "modules_to_save": "leave it out; train all weights with --tuner full",
    "zero_stage": "write --deepspeed zero0, zero1, zero2 or zero3",
    "fsdp": "write --deepspeed zero3", "fsdp_config": "write --deepspeed zero3",
    "warmup_steps": "write --warmup_ratio, those steps / all steps", "num_warmup_steps": "write --warmup_ratio",
    "min_lr_rate": "leave it out: the schedules end at 0",
    "optim": "write --optimizer adamw or sgd", "lr_scheduler_kwargs": "leave it out; see --lr_scheduler_type",
    "run_name": "leave it out: a run is called as its --output_dir",
    "logging_dir": "leave it out: it is in --output_dir",
    "max_epochs": "write --num_train_epochs, or --num_ppo_epochs for passes over a rollout",
    "use_wandb": "write --report_to wandb", "use_tensorboard": "write --report_to tensorboard",
    "wandb_project": "set WANDB_PROJECT in the environment",
    "overwrite_output_dir": "leave it out: an earlier run in --output_dir is moved aside",
    "do_train": _OUT, "logging_first_step": _OUT, "lazy_tokenize": _OUT, "remove_unused_columns": _OUT,
    "save_safetensors": _OUT, "disable_tqdm": _OUT, "use_gradient_checkpointing": "write --gradient_checkpointing true",
    "gradient_checkpointing_kwargs": "leave it out; --gradient_checkpointing true is all there is",
    "do_eval": "leave it out; --eval_steps with --val_dataset or --split_dataset_ratio evaluates",
    "per_device_eval_batch_size": "leave it out: evaluation has the micro-batches of training",
    "eval_batch_size": "leave it out: evaluation has the micro-batches of training",
    "metric_for_best_model": "leave it out: the checkpoint with the lowest eval/loss is kept",
    "greater_is_better": "leave it out: the checkpoint with the lowest eval/loss is kept",
    "load_best_model_at_end": "leave it out: the checkpoint with the lowest eval/loss is kept, beside final/",
    "dataset_dir": "give files as --dataset FOLDER/FILE", "max_samples": "write --dataset FILE#N for N rows",
    "train_dataset_sample": "write --dataset FILE#N for N rows",
    "val_dataset_sample": "write --val_dataset FILE#N for N rows",
    "val_size": "write --split_dataset_ratio, a share in [0, 1)", "dataset_seed": "write --seed",
    "data_seed": "write --seed", "overwrite_cache": "leave it out: prepared rows are made anew where anything changed",
    "packing": "leave it out; --max_tokens N fills a micro-batch with N tokens",
    "group_by_length": "leave it out; --max_tokens N fills a micro-batch with N tokens",
    "padding_free": "leave it out; --max_tokens N fills a micro-batch with N tokens",
    "max_prompt_length": "leave it out; --max_length holds for prompt and completion together",
    "truncation_side": "write --truncation_strategy left or right",
    "dataloader_num_workers": "leave it out; --dataset_num_proc N has N processes tokenise",
    "dataloader_pin_memory": _OUT, "dataloader_drop_last": "leave it out: the last rows of an epoch are used",
    "use_vllm": "write --rollout vllm", "num_sample": "write --num_generations",
    "init_kl_coef": "write --kl_coef, which stays as it is", "adap_kl_ctrl": "leave it out: --kl_coef stays as it is",
    "kl_target": "leave it out: --kl_coef stays as it is", "pref_loss": "write --loss_type, or --algo orpo or simpo",
    "pref_ftx": "write --rpo_alpha, of the mean over the chosen completions' tokens",
    "label_smoothing_factor": "write --label_smoothing where the algorithm has it; it means flipped preferences",
    "neftune_noise_alpha": "leave it out: there is no such noise here",
    "gamma_beta_ratio": "write --simpo_gamma, in units of reward: the ratio times beta",
    "device_map": _LAUNCH, "max_memory": _LAUNCH, "ddp_backend": _LAUNCH, "ddp_timeout": _LAUNCH,
    "ddp_find_unused_parameters": _LAUNCH, "num_gpus": _LAUNCH, "nproc_per_node": "set NPROC_PER_NODE",
    "master_port": "set MASTER_PORT", "local_world_size": _LAUNCH,
    "push_to_hub": _HUB, "hub_model_id": _HUB, "hub_token": "set HF_TOKEN in the environment", "hub_strategy": _HUB,
    "save_only_model": "leave it out: final/ has the model alone", "preset": "leave it out: there are no presets yet",
}  # fmt: skip


def advice(name: str) -> str:
    """What to do about an option of another trainer that has no counterpart here, empty where `name` is none.

    A name that is only nearly one of them counts too, as what is true of the one is true of its misspelling.
    """
    if name in SENTENCES:
        return SENTENCES[name]
    near = difflib.get_close_matches(name, SENTENCES, n=1, cutoff=0.9)
    return SENTENCES[near[0]] if near else ""


def translated(option: str, raw: Raw) -> Raw:
    """What was written for an option, with another trainer's word for a value replaced by ours."""
    table = VALUES.get(option)
    if table is None or isinstance(raw, dict) or raw is None:
        return raw
    if isinstance(raw, str):
        ours = table.get(raw.strip().lower())
        return raw if ours is None else (ours[0] if len(ours) == 1 else list(ours))
    words = [part.strip() for word in raw if word is not None for part in word.split(",")]
    if not any(word.lower() in table for word in words):
        return raw
    new = [one for word in words for one in table.get(word.lower(), (word,))]
    return tuple(new) if isinstance(raw, tuple) and new else [*new]
