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
    "max_len": "max_length", "sequence_len": "max_length", "seq_length": "max_length", "lora_dropout_p": "lora_dropout",
    "lr_warmup_ratio": "warmup_ratio", "warmup_proportion": "warmup_ratio", "clip_grad_norm": "max_grad_norm",
    "save_path": "output_dir", "output_path": "output_dir", "out_dir": "output_dir", "chat_template_path": "template",
    "n_samples_per_prompt": "num_generations", "vllm_gpu_memory_utilization": "vllm_memory",
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
    "truncation_strategy": {"truncation_left": ("left",), "truncation_right": ("right",)},
}  # fmt: skip
NO_VALUES: Mapping[tuple[str, str], str] = {  # (option, their value that means none of ours) -> what to do
    ("tuner", "qlora"): "write --tuner lora --load_in_4bit true",
    **dict.fromkeys((("tuner", "dora"), ("tuner", "adalora"), ("tuner", "longlora")), "write --tuner lora or full"),
}
_EVERY = "leave it out and give {} N, optimizer steps"
_QUANT = "write --load_in_4bit true for 4 bits (NF4, double quantised), the only quantised base there is"
_NF4 = "leave it out: --load_in_4bit true is NF4, double quantised, and computes in --dtype"
_OUT, _HUB = "leave it out: every run does as it says", "leave it out; copy final/ to the hub by hand"
_COLUMNS = "write --columns theirs=ours, as question=prompt"
_SAMPLING = "leave it out: completions are sampled by --temperature, --top_p and --top_k"
_PLAIN_LORA = "leave it out: adapters are plain LoRA, by --lora_rank, --lora_alpha and --lora_dropout"
_FOLDER = "leave it out: it is that of the model's folder"
_FILLED = "leave it out; --max_tokens N fills a micro-batch with N tokens"
_BEST = "leave it out: the checkpoint with the lowest eval/loss is kept"
_CRITIC = "leave it out: the critic starts from --reward_model, or from --model"
_EVALUATED = "leave it out: evaluation has the micro-batches of training"
_PROCESSES = "leave it out; --dataset_num_proc N has N processes tokenise"
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
    "per_device_eval_batch_size": _EVALUATED,
    "eval_batch_size": _EVALUATED,
    "metric_for_best_model": _BEST,
    "greater_is_better": _BEST,
    "load_best_model_at_end": "leave it out: the checkpoint with the lowest eval/loss is kept, beside final/",
    "dataset_dir": "give files as --dataset FOLDER/FILE", "max_samples": "write --dataset FILE#N for N rows",
    "train_dataset_sample": "write --dataset FILE#N for N rows",
    "val_dataset_sample": "write --val_dataset FILE#N for N rows",
    "val_size": "write --split_dataset_ratio, a share in [0, 1)", "dataset_seed": "write --seed",
    "data_seed": "write --seed", "overwrite_cache": "leave it out: prepared rows are made anew where anything changed",
    "packing": _FILLED,
    "group_by_length": _FILLED,
    "padding_free": _FILLED,
    "max_prompt_length": "leave it out; --max_length holds for prompt and completion together",
    "truncation_side": "write --truncation_strategy left or right",
    "dataloader_num_workers": _PROCESSES,
    "dataloader_pin_memory": _OUT, "dataloader_drop_last": "leave it out: the last rows of an epoch are used",
    "use_vllm": "write --rollout vllm", "num_sample": "write --num_generations",
    "init_kl_coef": "write --kl_coef, which stays as it is", "adap_kl_ctrl": "leave it out: --kl_coef stays as it is",
    "kl_target": "leave it out: --kl_coef stays as it is", "pref_loss": "write --loss_type, or --algo orpo or simpo",
    "pref_ftx": "write --rpo_alpha, of the mean over the chosen completions' tokens",
    "label_smoothing_factor": "write --label_smoothing where the algorithm has it; it means flipped preferences",
    "neftune_noise_alpha": "leave it out: there is no such noise here",
    "gamma_beta_ratio": "write --simpo_gamma, in units of reward: the ratio times beta",
    **dict.fromkeys((
        "dataset_text_field", "text_column", "input_key", "output_key", "prompt_key", "chosen_key", "rejected_key",
        "label_key", "prompt_column", "chosen_column", "rejected_column", "response_column", "columns_mapping",
    ), _COLUMNS),
    **dict.fromkeys((
        "min_p", "repetition_penalty", "do_sample", "num_beams", "stop_words", "top_k_sampling", "min_new_tokens",
    ), _SAMPLING),
    **dict.fromkeys((
        "use_rslora", "use_dora", "lora_bias", "loraplus_lr_ratio", "init_lora_weights", "pissa_init",
        "lora_plus_scale", "additional_target",
    ), _PLAIN_LORA),
    **dict.fromkeys((
        "tokenizer", "tokenizer_name", "tokenizer_name_or_path", "tokenizer_path", "use_fast_tokenizer", "eos_token",
        "pad_token", "rope_scaling", "config_name",
    ), _FOLDER),
    **dict.fromkeys(("padding_side", "pad_to_multiple_of", "ignore_data_skip", "torch_compile", "log_level"), _OUT),
    **dict.fromkeys(("use_liger_kernel", "enable_liger_kernel", "liger_kernel", "use_unsloth", "flash_attention"),
                    "leave it out: the losses have kernels of their own; --attn_impl chooses the attention"),
    **dict.fromkeys(("project_name", "experiment_name", "run_id", "wandb_run_name", "wandb_name"),
                    "leave it out: a run is called as its --output_dir"),
    "adam_offload": "write --deepspeed zero2_offload or zero3_offload", "mixed_precision": "write --dtype bfloat16",
    "precision": "write --dtype bfloat16", "adam_betas": "write adam_beta1 and adam_beta2, which are options each",
    "train_batch_size": "write --batch_size and --gradient_accumulation_steps; with the ranks they make the batch",
    "rollout_batch_size": "write --num_mini_batches: a rollout batch is so many global batches",
    "micro_rollout_batch_size": "write --local_rollout_forward_batch_size",
    "critic_pretrain": _CRITIC,
    "critic_model": _CRITIC,
    "reward_function": "write --reward_funcs FILE.py:FUNCTION", "reward_fn": "write --reward_funcs FILE.py:FUNCTION",
    "packing_samples": _FILLED,
    "apply_chat_template": "leave it out: rows are always written by --template",
    "input_template": "write --template FILE.jinja", "ckpt_path": "leave it out: checkpoints are in --output_dir",
    "load_checkpoint": "write --resume", "max_train_samples": "write --dataset FILE#N for N rows",
    "max_eval_samples": "write --val_dataset FILE#N for N rows",
    "model_revision": "download that revision and give its folder as --model",
    "revision": "download that revision and give its folder as --model",
    "dataset_split": "leave it out: the split train is read; give another one's files as --dataset",
    "cache_dir": "set HF_HOME, or DSALIGN_CACHE for what is made here, in the environment",
    "num_workers": _PROCESSES,
    "freeze_trainable_layers": "write --tuner lora", "tuner_backend": "leave it out: adapters are PEFT's",
    "check_dataset_strategy": "leave it out: --on_bad_row says what becomes of bad rows",
    "hostfile": _LAUNCH, "num_nodes": _LAUNCH, "gpus": _LAUNCH, "accelerator": _LAUNCH,
    "vllm_tensor_parallel_size": _LAUNCH,
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
    """What was written for an option, with another trainer's word for a value replaced by ours. Raises ValueError for a
    word that means none of ours."""
    words = [raw] if isinstance(raw, str) else [one for one in raw or () if isinstance(one, str)]
    for word in words:
        if todo := NO_VALUES.get((option, word.strip().lower())):
            raise ValueError(f"expected a value of dsalign, got {word!r} of other trainers; {todo}")
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
