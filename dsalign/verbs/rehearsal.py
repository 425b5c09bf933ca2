"""One optimizer step of a run on the CPU, with tiny models of the families of its own: same tokenizer, template, rows,
algorithm and rewards, few layers of little width and random weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from dsalign.checkpoint.progress import Progress
from dsalign.config import ds_files
from dsalign.config.schema import RunConfig
from dsalign.contract.groups import Group
from dsalign.data.batches.packing import num_tokens
from dsalign.data.tokens.templates import Template
from dsalign.engines import build, dist
from dsalign.engines.self_check import self_check
from dsalign.guard.wishes import Wishes
from dsalign.loop.plan import batches_of, context_of, loader_of
from dsalign.loop.trainer import Trainer
from dsalign.memory.states import Zero
from dsalign.models.heads import BIAS, VALUE_HEAD_FILE, WEIGHT
from dsalign.models.load import VALUE_ROLES
from dsalign.models.names import Source
from dsalign.models.tokenizer import config_of, vocab_size
from dsalign.rewards.sources import rewards_of

LAYERS, WIDTH, HEADS, EXPERTS = 2, 64, 4, 4
NEW_TOKENS = 16  # that are sampled at most
SIZES = {  # key of a config.json -> its value in a tiny model, where the key is there
    "num_hidden_layers": LAYERS, "n_layer": LAYERS, "num_layers": LAYERS,
    "hidden_size": WIDTH, "n_embd": WIDTH, "d_model": WIDTH, "word_embed_proj_dim": WIDTH,
    "intermediate_size": 2 * WIDTH, "n_inner": 2 * WIDTH, "ffn_dim": 2 * WIDTH, "moe_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH,
    "num_attention_heads": HEADS, "n_head": HEADS, "head_dim": WIDTH // HEADS,
    "query_pre_attn_scalar": WIDTH // HEADS,
    "num_local_experts": EXPERTS, "num_experts": EXPERTS, "n_routed_experts": EXPERTS,
}  # fmt: skip


class TooOddError(ValueError):
    """The error of a family of which no tiny model can be built from its config alone."""


def longest(config: RunConfig, groups: Sequence[Group]) -> list[Group]:
    """The longest groups, as many as a micro-batch has, or as the algorithm asks for at least in a step; longest
    first."""
    traits = config.algorithm.traits
    count = max(config.optim.batch_size, traits.min_groups, 1) * traits.mini_batches
    every = [groups[i] for i in range(len(groups))]
    return sorted(every, key=lambda group: (-num_tokens([group]), group.index))[:count]


def tiny(settings: Any, ids: int | None) -> Any:
    """A configuration of transformers cut down in place, and returned: few layers of little width, as many token ids as
    `ids`, None = as it has. A number is never raised."""
    for part in {id(one): one for one in (settings, settings.get_text_config())}.values():
        kv = getattr(part, "num_key_value_heads", None)
        whole = getattr(part, "num_attention_heads", None)
        for name, size in SIZES.items():
            now = getattr(part, name, None)
            if isinstance(now, (int, float)) and not isinstance(now, bool) and now > size:
                setattr(part, name, size)
        heads = getattr(part, "num_attention_heads", None)
        if isinstance(heads, int) and WIDTH % heads:
            part.num_attention_heads = HEADS if heads > 2 else heads
        if isinstance(kv, int):
            part.num_key_value_heads = part.num_attention_heads if kv == whole else min(2, kv)
        kinds = getattr(part, "layer_types", None)
        if isinstance(kinds, list):
            part.layer_types = [*dict.fromkeys(kinds), *kinds][:LAYERS]
        for name in ("num_experts_per_tok", "num_experts_per_token"):
            if isinstance(getattr(part, name, None), int):
                setattr(part, name, min(getattr(part, name), 2))
        if ids is not None and hasattr(part, "vocab_size"):
            part.vocab_size = ids
    return settings


def build_tiny(role: str, source: Source, config: RunConfig, folder: Path) -> Source:
    """A source with a tiny model of the family of `source`, which is written to `folder`; with a value head where the
    role has one.

    Raises TooOddError where the family cannot be built so.
    """
    trust = config.models.trust_remote_code
    settings = config_of(source, config.models)
    family = settings.model_type
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            cut = tiny(settings, vocab_size(source, config.models))
            model = AutoModelForCausalLM.from_config(cut, trust_remote_code=trust, dtype=torch.float32)
        model.save_pretrained(folder)
    except Exception as error:  # the code of any architecture, which may ask for any relation of its numbers
        raise TooOddError(
            f"no tiny {family} can be built from its config ({type(error).__name__}: {str(error)[:200]})"
        ) from error
    if role in VALUE_ROLES:
        width = cut.get_text_config().hidden_size
        save_file({WEIGHT: torch.full((1, width), 0.1), BIAS: torch.zeros(1)}, folder / VALUE_HEAD_FILE)
    return Source(str(folder), value_head=folder)


def shortened(config: RunConfig, output_dir: Path) -> RunConfig:
    """The configuration of the step: float32, one micro-batch a step, few sampled tokens by our own engine, nothing
    off-loaded, which would compile an optimizer for the CPU."""
    optim = config.optim
    zero = Zero.of(ds_files.settings(optim.deepspeed))
    own = {"deepspeed": "zero2"} if zero.offload_optimizer or zero.offload_param else {}
    rollout = replace(config.rollout, rollout="auto", max_new_tokens=min(NEW_TOKENS, config.rollout.max_new_tokens))
    return config.model_copy(
        update={
            "models": config.models.model_copy(update={"dtype": "float32", "attn_impl": "auto"}),
            "optim": optim.model_copy(update={"gradient_accumulation_steps": 1, "max_steps": 1, **own}),
            "output": config.output.model_copy(update={"output_dir": str(output_dir), "resume": None}),
            "rollout": rollout,
        }
    )


def step(
    config: RunConfig,
    sources: Mapping[str, Source],
    template: Template,
    groups: Sequence[Group],
    retemplate: Callable[[Sequence[Group]], Sequence[Group]] | None,
    functions: Sequence[Any],
) -> dict[str, float]:
    """The metrics of one optimizer step over `groups` with tiny models in the place of `sources`.

    template: the run's. retemplate, functions: of its rewards. Raises TooOddError as `build_tiny` does, and ValueError
    as a run does at its start.
    """
    found: dict[str, float] = {}
    device = dist.init(0, peer_timeout=0)
    try:
        with tempfile.TemporaryDirectory(prefix="dsalign-check-") as name:
            folder, short = Path(name), shortened(config, Path(name) / "out")
            small: dict[str, Source] = {}
            for role, source in sources.items():
                twin = next((other for other in small if sources[other] == source and role not in VALUE_ROLES), None)
                small[role] = small[twin] if twin else build_tiny(role, source, config, folder / role)
            roles = build.roles_of(short, small, device)
            self_check(roles, groups)
            rewards = rewards_of(short, roles, template, retemplate, functions)
            loader = loader_of(short, groups, shuffle=False)
            context = context_of(short, roles, loader, template, rewards, None, batches_of(short, loader), {}, Wishes())
            trainer = Trainer(short.algorithm, roles, context, loader, short.optim, Progress())
            trainer.fit(found.update)
    finally:
        dist.shutdown()
    return found
