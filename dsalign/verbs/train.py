"""Builds everything in order and trains: data -> models -> engines -> trainer -> final/."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dsalign.checkpoint.checkpoints import Store, find, move_aside
from dsalign.checkpoint.progress import Progress
from dsalign.config import ds_files
from dsalign.config.schema import RunConfig
from dsalign.contract.groups import Group
from dsalign.data import dataset as prepare
from dsalign.data.batches.loader import Loader, epoch_order
from dsalign.data.tokens.group_store import Part
from dsalign.data.tokens.templates import Template, load_template
from dsalign.engines import dist
from dsalign.engines import engine as engines
from dsalign.engines.reference_cache import Asked, ReferenceCache, weights_key
from dsalign.engines.roles import Models
from dsalign.engines.self_check import self_check
from dsalign.launcher import Process
from dsalign.loop.context import RunContext
from dsalign.loop.plan import Plan
from dsalign.loop.session import Session
from dsalign.loop.trainer import Trainer
from dsalign.models import load
from dsalign.models.adapters import LoraOptions
from dsalign.models.names import Source, resolve
from dsalign.models.tokenizer import LoadOptions, end_token_ids, load_tokenizer, text
from dsalign.report.run_log import quiet
from dsalign.rewards.retemplate import Reading
from dsalign.rewards.sources import Rewards

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Data:
    """The tokenised sets of a run, the same on every rank."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    train: Sequence[Group]
    held_out: Sequence[Group]


def train(config: RunConfig, process: Process, command: str) -> dict[str, float]:
    """Run one training as `config` says; returns the last metrics. Every rank calls it.

    Raises ValueError for input that cannot be used, with what to do.
    """
    quiet(process.rank)
    device = dist.init(process.local_rank, process.local_size)
    try:
        return _train(config, device, command)
    finally:
        dist.shutdown()


def _train(config: RunConfig, device: torch.device, command: str) -> dict[str, float]:
    torch.manual_seed(config.seed + dist.rank())  # dropout differs between ranks, as their rows do
    sources = _sources(config)
    options = _load_options(config, device)
    main_source = sources[next(iter(config.algorithm.roles))]
    data = dist.together(lambda: _data(config, main_source, options))
    reading = None
    if "reward" in sources and not _trains(config, "reward"):
        reading, same_vocabulary = dist.together(lambda: _reading(config, data, sources["reward"], options))
        if not same_vocabulary and "value" in sources:  # a critic reads the policy's ids
            logger.warning("value model: it starts from the policy's model with a new head")
            sources["value"] = sources["policy"]
    output_dir = Path(config.output_dir)
    engine_options = _engine_options(config, options)
    loader = _loader(config, data.train, shuffle=True)
    held_out = _loader(config, data.held_out, shuffle=False) if data.held_out else None
    plan, total_batches = _plan(config, loader, engine_options)
    cache = _reference_cache(config, loader, held_out, total_batches, sources, engine_options.dtype)
    unused = {"reference"} if cache is not None and cache.complete(device) else set()
    built = {role: source for role, source in sources.items() if role not in unused}
    models = _models(config, built, options, engine_options, device)
    self_check(models, data.train)
    if cache is not None:
        _fill(cache, models)
    progress = Progress()
    ctx = _context(config, models, data, reading, cache, total_batches, progress.state)
    trained = {role: models.engines[role] for role in sources if _trains(config, role)}
    store = Store(
        output_dir,
        trained,
        data.tokenizer,
        {role: sources[role].weights for role in trained},
        _fingerprint(config, len(data.train), total_batches),
        keep=config.save_total_limit,
        adapters_only=config.tuner == "lora",
    )
    if config.resume:
        progress = store.load(find(config.resume, output_dir))
        ctx.state = progress.state
    else:
        dist.together(lambda: _begin(config, output_dir, command) if dist.rank() == 0 else None)
    trainer = Trainer(config.algorithm, models, ctx, loader, plan, progress)
    return Session(config, trainer, store, held_out).run()


def _begin(config: RunConfig, output_dir: Path, command: str) -> None:
    """The output folder of a new run; an earlier run found there is moved aside, never written over."""
    models = [config.model, config.ref_model, config.reward_model]
    moved = move_aside(output_dir, [*models, *config.dataset, *config.val_dataset])
    if moved:
        logger.warning("%s holds an earlier run: moved to %s", output_dir, moved)
    output_dir.mkdir(parents=True, exist_ok=True)
    config.to_yaml(output_dir / "config.yaml")
    (output_dir / "command.txt").write_text(command + "\n")


def _sources(config: RunConfig) -> dict[str, Source]:
    """Role -> where its weights come from. Rank 0 resolves first: it may convert an embedded model, once."""
    wanted = {
        "reference": config.ref_model,
        "reward": config.reward_model,
        "value": config.reward_model,  # the critic starts as the reward model, where there is one
    }
    roles = [
        role for role in config.algorithm.roles if role != "reward" or config.reward_model or _trains(config, role)
    ]

    def all_roles() -> dict[str, Source]:
        return {role: resolve(wanted.get(role) or config.model) for role in roles}

    dist.together(lambda: all_roles() if dist.rank() == 0 else {})
    return dist.together(all_roles)


def _load_options(config: RunConfig, device: torch.device) -> LoadOptions:
    return LoadOptions(
        device=device,
        dtype=config.dtype,
        attn_impl=config.attn_impl,
        trust_remote_code=config.trust_remote_code,
        gradient_checkpointing=config.gradient_checkpointing,
        dropout=config.algorithm.dropout > 0,
        head_bytes=config.head_memory and config.head_memory * 2**20,
        seed=config.seed,
    )


def _data(config: RunConfig, source: Source, options: LoadOptions) -> Data:
    tokenizer, template = text(config, source, options)

    def groups(sources: Sequence[str], weights: Sequence[float] = ()) -> Sequence[Group]:
        tokenized, skipped = prepare.tokenized(config, template, sources, weights)
        for line in prepare.losses(tokenized, skipped):
            logger.warning("%s: %s", " ".join(sources), line)
        return tokenized.groups

    every = groups(config.dataset, config.dataset_weights)
    if config.val_dataset:
        return Data(tokenizer, template, every, groups(config.val_dataset))
    held = round(len(every) * config.split_dataset_ratio)
    if config.split_dataset_ratio and not 0 < held < len(every):
        raise ValueError(
            f"split_dataset_ratio: {config.split_dataset_ratio} of {len(every)} rows leaves {len(every) - held} for "
            f"training and {held} for evaluation; both need at least one"
        )
    order = epoch_order(len(every), config.seed, -1)
    kept, chosen = sorted(order[held:]), sorted(order[:held])
    return Data(tokenizer, template, Part(every, kept), Part(every, chosen))


def _reading(config: RunConfig, data: Data, reward: Source, options: LoadOptions) -> tuple[Reading | None, bool]:
    """(how the reward model reads completions, whether its vocabulary is the policy's). None = the sampled ids, where
    the template is the policy's too, or it has none."""
    tokenizer = load_tokenizer(reward, options)
    same = tokenizer.get_vocab() == data.tokenizer.get_vocab()
    if same and tokenizer.chat_template in (None, data.tokenizer.chat_template):
        return None, True
    template, warning = load_template(tokenizer, None, end_token_ids(reward, tokenizer))
    logger.warning(
        "reward model %s: its %s is not the policy's, so it reads completions as text, in its own template",
        config.reward_model,
        "template" if same else "vocabulary",
    )
    if warning:
        logger.warning("reward model: %s", warning)
    return Reading(template, _decoder(data.tokenizer), data.template.end_ids), same


def _decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def _engine_options(config: RunConfig, options: LoadOptions) -> engines.EngineOptions:
    ds_config = ds_files.read(config.deepspeed)
    engines.check(ds_config, config.deepspeed)
    return engines.EngineOptions(
        ds_config=ds_config,
        dtype=load.resolve_dtype(config.dtype, options.device),
        batch_size=config.batch_size,
        world_size=dist.world_size(),
        max_grad_norm=config.max_grad_norm,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        epsilon=config.adam_epsilon,
    )


def _models(
    config: RunConfig,
    sources: dict[str, Source],
    options: LoadOptions,
    engine_options: engines.EngineOptions,
    device: torch.device,
) -> Models:
    """One engine a role; with LoRA the reference is the policy's engine with the trained adapter off, unless another
    model was asked for."""
    lora = None
    if config.tuner == "lora":
        lora = LoraOptions(config.lora_rank, config.lora_alpha, config.lora_dropout, config.lora_target_modules)
        if dist.rank() == 0 and (adapter := sources[next(iter(sources))].adapter):
            logger.warning(
                "training goes on with the adapter %s: its rank, alpha and layers stay, lora_rank, lora_alpha and "
                "lora_target_modules are not used",
                adapter,
            )
    found: dict[str, Any] = {}
    for role in sources:
        if _trains(config, role):
            module = dist.together(partial(load.load_trained, role, sources[role], options, lora))
            found[role] = engines.trained(module, engine_options)
        elif role != "reference" or lora is None or config.ref_model:
            module = dist.together(partial(load.load_frozen, role, sources[role], options))
            found[role] = engines.frozen(module, engine_options)
    return Models(found, device, config.batch_size, config.algorithm.temperature, config.max_tokens)


def _reference_cache(
    config: RunConfig,
    loader: Loader,
    held_out: Loader | None,
    total_batches: int,
    sources: dict[str, Source],
    dtype: torch.dtype,
) -> ReferenceCache | None:
    """The cache of a run that has one. By default where it saves a pass or the memory of a model, unless the run is
    shorter than one pass over its rows."""
    if config.algorithm.roles.get("reference") != "frozen" or config.algorithm.data == "prompts":
        return None
    own_model = config.tuner == "full" or config.ref_model is not None
    epochs = total_batches / loader.steps_per_epoch
    pays = epochs >= 1 and (own_model or epochs >= 2 or held_out is not None)
    if config.ref_cache == "off" or (config.ref_cache == "auto" and not pays):
        return None
    key = dist.together(lambda: weights_key(sources["reference"], dtype) if dist.rank() == 0 else "")
    batches = [(loader, total_batches)]
    if held_out is not None:
        batches.append((held_out, held_out.steps_per_epoch))
    asks = getattr(config.algorithm, "asks", None)
    if asks is not None and not asks(loader.groups_of(0), config.max_length):
        asks = None
    if asks is None:
        sets = [one.groups for one, _ in batches]
    else:
        sets = [Asked(partial(asks, max_length=config.max_length), *one) for one in batches]
        sets += [one.left_out(0) for one, _ in batches]  # later epochs may have them
    return ReferenceCache(sets, dist.from_rank_0(key))


def _fill(cache: ReferenceCache, models: Models) -> None:
    """Compute what the cache lacks; then nobody asks the reference itself again."""
    computed = cache.fill(models)
    if dist.rank() == 0:
        what = f"computed for {computed} rows" if computed else "read"
        logger.info("reference log-probabilities %s: %s", what, cache.folder)
    models.release("reference")


def _context(
    config: RunConfig,
    models: Models,
    data: Data,
    reading: Reading | None,
    cache: ReferenceCache | None,
    total_batches: int,
    state: dict[str, Any],
) -> RunContext:
    """What `prepare` may ask for, with the rewards of the run where its algorithm has a frozen reward role."""
    decode, rewards = _decoder(data.tokenizer), None
    if config.algorithm.roles.get("reward") == "frozen":
        rewards = dist.together(lambda: Rewards(models, config.reward_funcs, config.reward_weights, decode, reading))
    return RunContext(
        models,
        seed=config.seed,
        max_length=config.max_length,
        state=state,
        end_ids=data.template.end_ids,
        total_batches=total_batches,
        rewards=rewards,
        reference=cache.logps if cache is not None else None,
        decode=decode,
    )


def _trains(config: RunConfig, role: str) -> bool:
    return bool(config.algorithm.roles[role] == "train")


def _global_batch(config: RunConfig) -> int:
    """Groups in an optimizer step, over all ranks."""
    return config.batch_size * config.gradient_accumulation_steps * dist.world_size()


def _loader(config: RunConfig, groups: Sequence[Group], *, shuffle: bool) -> Loader:
    return Loader(
        groups,
        global_batch=_global_batch(config) * config.algorithm.mini_batches,
        seed=config.seed,
        rank=dist.rank(),
        world_size=dist.world_size(),
        shuffle=shuffle,
        min_groups=config.algorithm.min_groups,
    )


def _plan(config: RunConfig, loader: Loader, options: engines.EngineOptions) -> tuple[Plan, int]:
    total = config.num_train_epochs * loader.steps_per_epoch
    if config.max_steps is not None:
        passes = config.algorithm.epochs * config.algorithm.mini_batches
        total = min(total, -(-config.max_steps // passes))
    own = config.algorithm.role_learning_rates
    rates = {role: own.get(role, config.learning_rate) for role in config.algorithm.roles if _trains(config, role)}
    plan = Plan(
        total_batches=total,
        world_size=dist.world_size(),
        seed=config.seed,
        learning_rates=rates,
        schedule=config.lr_scheduler_type,
        warmup_ratio=config.warmup_ratio,
        max_grad_norm=config.max_grad_norm,
        fp16=options.dtype is torch.float16,
    )
    return plan, total


def _fingerprint(config: RunConfig, num_rows: int, total_batches: int) -> dict[str, Any]:
    """What a resumed run must share with the run it goes on with."""
    return {
        "algo": config.algo,
        "algorithm": repr(config.algorithm),
        "tuner": config.tuner,
        "seed": config.seed,
        "rows": num_rows,
        "global_batch": _global_batch(config),
        "ranks": dist.world_size(),
        "deepspeed": config.deepspeed,
        "batches": total_batches,
    }
