"""The models of roles from a folder or a hub name: causal language models and value models, trained or frozen."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from dsalign import cpu
from dsalign.config.schema import ModelOptions
from dsalign.models import adapters, attention, four_bit
from dsalign.models.adapter_files import head_of
from dsalign.models.heads import CausalModel, ValueModel, unwrap
from dsalign.models.last_layer import layers_of, skip_unread_mlp
from dsalign.models.names import Source
from dsalign.models.tokenizer import config_of, named
from dsalign.models.weights import load_checked, stored_head

logger = logging.getLogger(__name__)
VALUE_ROLES = frozenset({"reward", "value"})  # roles with a value head; the models of others give log-probabilities


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`. `auto` is float32 on a CPU, where bfloat16 is several times slower, and on a GPU
    bfloat16, or float16 where it has none."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load_causal(
    source: Source, options: ModelOptions, *, device: torch.device, dropout: bool = False, value: bool = False
) -> PreTrainedModel:
    """The causal language model of a source, on the CPU and without the source's adapter.

    device: on which it will run, which decides what dtype `auto` is. dropout: whether the model's own dropout stays;
    if not, it is set to 0. value: whether it gets a value head, so that its own head need not be in the file.
    Raises ValueError where the model cannot be opened, or its weights are not all there and finite.
    """
    if source.four_bit:
        four_bit.library(f"{source.adapter}, which was trained on 4-bit weights")
    config = config_of(source, options)
    if not dropout:
        _without_dropout(config)
    if options.trust_remote_code and hasattr(config, "auto_map"):
        logger.warning("running the Python code that comes with %s (--trust_remote_code)", source.weights)
    with named(source):
        model = load_checked(
            source.weights,
            config,
            value=value,
            dtype=resolve_dtype(options.dtype, device),
            attn_implementation=_attention_of(config) if options.attn_impl == "auto" else options.attn_impl,
            trust_remote_code=options.trust_remote_code,
        )
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _attention_of(config: Any) -> str | None:
    """The attention implementation for `auto`: eager for a model that caps its attention scores, as the SDPA that
    transformers 5.17 gives it does not cap them; else None, which is transformers' choice."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if capped else None


def load_trained(
    role: str, source: Source, options: ModelOptions, *, device: torch.device, dropout: bool, seed: int
) -> CausalModel | ValueModel:
    """The model of a trained role, wrapped with its head; by options.tuner its LoRA adapter is trained, or all weights.
    By options.load_in_4bit the weights under the adapter are in 4 bits, on `device`.

    dropout: whether the model's own dropout stays. seed: of a new adapter and a new value head.
    Raises ValueError where the model cannot be opened, or has no layer of the names in lora_target_modules.
    """
    model = load_causal(source, options, device=device, dropout=dropout, value=role in VALUE_ROLES)
    shares = attention.share(model)
    if options.load_in_4bit:
        four_bit.pack(model, device)
    elif source.four_bit:
        four_bit.round_weights(model, device)
    if options.tuner == "lora":
        model = adapters.add(model, source, options, seed)
    else:
        model = adapters.merge(model, source.adapter)
        model.requires_grad_(True)
    wrapped, _ = _wrap(role, model, source, options, shares, seed, trained=True)
    if device.type == "cpu":
        inner = unwrap(model)
        decoder, embedding = inner.get_decoder(), inner.get_input_embeddings()
        head = inner.get_output_embeddings() if isinstance(wrapped, CausalModel) else None
        checkpointing = options.gradient_checkpointing
        cpu.apply(wrapped, decoder, layers_of(decoder), embedding, head, checkpointing=checkpointing)
    if shares:
        skip_unread_mlp(unwrap(model).get_decoder())
    return wrapped


def load_frozen(role: str, source: Source, options: ModelOptions, *, device: torch.device) -> CausalModel | ValueModel:
    """The model of a frozen role, wrapped with its head; an adapter of the source is merged into its weights.

    Raises ValueError where the model cannot be opened, or the role needs a value head and the source has none.
    """
    model = load_causal(source, options, device=device, value=role in VALUE_ROLES)
    shares = attention.share(model)
    if source.four_bit:
        four_bit.round_weights(model, device)
    model = adapters.merge(model, source.adapter)
    wrapped, whole = _wrap(role, model, source, options, shares, seed=0)
    if not whole:
        refuse_headless(role, source)
    if shares:
        skip_unread_mlp(unwrap(model).get_decoder())
    return wrapped.requires_grad_(False)


def load_as_stored(
    role: str, source: Source, options: ModelOptions, *, device: torch.device
) -> CausalModel | ValueModel:
    """The model of a role, wrapped with its head, to be written again: its own dropout stays in its configuration, and
    the source's adapter, where there is one, lies on top of its weights and is not merged.

    Raises ValueError where the model cannot be opened, or the role needs a value head and the source has none.
    """
    model: Any = load_causal(source, options, device=device, dropout=True, value=role in VALUE_ROLES)
    if source.four_bit:
        four_bit.round_weights(model, device)
    if source.adapter is not None:
        model = adapters.opened(model, source.adapter, trainable=False)
    wrapped, whole = _wrap(role, model, source, options, shares=False, seed=0, trained=True)
    if not whole:
        refuse_headless(role, source)
    return wrapped


def refuse_headless(role: str, source: Source) -> NoReturn:
    """Raise ValueError for a source of a role that needs a value head and has none."""
    where = source.value_head or source.weights
    raise ValueError(f"{role} model: {where} has no value_head.safetensors; train one with --algo rm")


def _wrap(
    role: str, model: Any, source: Source, options: ModelOptions, shares: bool, seed: int, trained: bool = False
) -> tuple[CausalModel | ValueModel, bool]:
    """The model with the head that its role needs: (wrapped model, whether all weights were read from the source; if
    not, its value head is new). shares: whether the model takes packed rows."""
    if role not in VALUE_ROLES:
        return CausalModel(model, shares, options.head_memory and options.head_memory * 2**20), True
    # A new critic begins at 0, for its random values, far larger than rewards, would drown them (arXiv:2503.01491).
    wrapped = ValueModel(model, None if role == "value" else seed, shares, reward=trained and role == "reward")
    return wrapped, _load_head(wrapped, source, options)


def _load_head(wrapped: ValueModel, source: Source, options: ModelOptions) -> bool:
    """Read the value head of a source, the nearest to its adapter first: value_head.safetensors in its folder, the
    adapter's own score layer, the base's value_head.safetensors, the base's score layer. Returns whether there is one.

    Raises ValueError where it does not fit, or a classifier has no score layer.
    """
    if wrapped.load_head(source.value_head):
        return True
    if head := head_of(source.adapter):
        wrapped.set_head(head, str(source.adapter))
        return True
    if source.adapter is not None and wrapped.load_head(Path(source.weights)):
        return True
    if head := stored_head(source.weights):
        wrapped.set_head(head, source.weights)
        return True
    config = config_of(source, options)
    if any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        raise ValueError(f"{source.weights} is a classifier without a layer called score; give its score.weight")
    return False


def _without_dropout(config: Any) -> None:
    """Set every dropout probability of a model's configuration (and of its text part) to 0."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(part, name, 0.0)
