"""Tokenizers and causal language models from a folder or a hub name, with LoRA or full weights."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from dsalign.cpu.give_memory_back import trim_in_backward
from dsalign.cpu.recompute import recompute_cheap
from dsalign.models import adapters, attention
from dsalign.models.heads import CausalModel, ValueModel, unwrap
from dsalign.models.last_layer import layers_of, read_alone
from dsalign.models.names import Source
from dsalign.models.tokenizer import LoadOptions, named

logger = logging.getLogger(__name__)
VALUE_ROLES = frozenset({"reward", "value"})  # the other roles give log-probabilities


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU (bfloat16 there is several times slower), else bfloat16 where the GPU has it."""
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def load_causal(source: Source, options: LoadOptions) -> PreTrainedModel:
    """The causal language model of a source, without its adapter."""
    with named(source):
        config = AutoConfig.from_pretrained(source.weights, trust_remote_code=options.trust_remote_code)
    if not options.dropout:
        _without_dropout(config)
    if options.trust_remote_code and hasattr(config, "auto_map"):
        logger.warning("running the Python code that comes with %s (--trust_remote_code)", source.weights)
    with named(source):
        model = AutoModelForCausalLM.from_pretrained(
            source.weights,
            config=config,
            dtype=resolve_dtype(options.dtype, options.device),
            attn_implementation=_attention_of(config) if options.attn_impl == "auto" else options.attn_impl,
            trust_remote_code=options.trust_remote_code,
        )
    if options.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _attention_of(config: Any) -> str | None:
    """Eager for a model that caps its attention scores, as some releases of transformers (5.17) give it an SDPA that
    does not; None = transformers' choice."""
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return "eager" if capped else None


def load_trained(
    role: str, source: Source, options: LoadOptions, lora: adapters.LoraOptions | None
) -> CausalModel | ValueModel:
    """The model of a trained role: with `lora` a PEFT model whose adapter alone is trained, else all weights."""
    model = load_causal(source, options)
    shares = attention.share(model)
    if lora is None:
        model = adapters.merge(model, source.adapter)
        model.requires_grad_(True)
    else:
        model = adapters.add(model, source, lora, seed=options.seed)
    return _wrap(role, model, source, options, shares, trained=True)


def load_frozen(role: str, source: Source, options: LoadOptions) -> CausalModel | ValueModel:
    """The model of a frozen role; an adapter of the source is merged into its weights."""
    model = load_causal(source, options)
    shares = attention.share(model)
    model = adapters.merge(model, source.adapter).requires_grad_(False)
    return _wrap(role, model, source, options, shares, trained=False)


def _wrap(
    role: str, model: Any, source: Source, options: LoadOptions, shares: bool, *, trained: bool
) -> CausalModel | ValueModel:
    if trained and options.device.type == "cpu":
        decoder = unwrap(model).get_decoder()
        trim_in_backward(decoder, layers_of(decoder))
        if not options.gradient_checkpointing:
            recompute_cheap(decoder)
    if shares:
        read_alone(unwrap(model).get_decoder())
    if role not in VALUE_ROLES:
        return CausalModel(model, shares, options.head_bytes)
    wrapped = ValueModel(model, options.seed, shares)
    head_found = wrapped.load_head(source.value_head) or _load_classifier_head(wrapped, source, options)
    if not trained:
        if not head_found:
            where = source.value_head or source.weights
            raise ValueError(f"{role} model: {where} has no value_head.safetensors; train one with --algo rm")
        wrapped.requires_grad_(False)
    return wrapped


def _load_classifier_head(wrapped: ValueModel, source: Source, options: LoadOptions) -> bool:
    """Use the score layer of a sequence-classification model as the value head; False where the source is none.

    Raises ValueError where it has more than one label, as then no single number is the score.
    """
    config = AutoConfig.from_pretrained(source.weights, trust_remote_code=options.trust_remote_code)
    if not any(name.endswith("ForSequenceClassification") for name in config.architectures or ()):
        return False
    with named(source):
        classifier = AutoModelForSequenceClassification.from_pretrained(source.weights, dtype=torch.float32)
    score = getattr(classifier, "score", None)
    if not isinstance(score, torch.nn.Linear) or score.out_features != 1:
        raise ValueError(f"reward model: {source.weights} must have one label (its `score` layer one output)")
    with torch.no_grad():
        wrapped.v_head.summary.weight.copy_(score.weight)
        wrapped.v_head.summary.bias.zero_()
        if score.bias is not None:
            wrapped.v_head.summary.bias.copy_(score.bias)
    return True


def _without_dropout(config: Any) -> None:
    """Set every dropout probability of a model's configuration (and of its text part) to 0."""
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        for name, value in part.to_dict().items():
            if isinstance(value, float) and ("dropout" in name or name.endswith("pdrop")):
                setattr(part, name, 0.0)
