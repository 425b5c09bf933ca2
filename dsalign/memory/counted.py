"""The shape of a model whose family has no formula in `shapes`: its modules are made without memory and counted. It
takes the import of torch and transformers, some seconds."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

from dsalign.memory.shapes import ROUTERS, Layer, Linear, Shape, text_part


def by_modules(config: Mapping[str, Any]) -> Shape:
    """The shape of the causal language model that transformers makes of a config.json, on the device meta.

    Raises ValueError where transformers knows no such model.
    """
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    plain = {key: value for key, value in text_part(config).items() if key != "model_type"}
    kind = text_part(config).get("model_type", "")
    try:
        settings = transformers.AutoConfig.for_model(kind, **plain)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(settings)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"config.json: expected a model_type that transformers {transformers.__version__} has a causal language "
            f"model for, got {kind!r} ({str(error).splitlines()[0][:120]}); give --params, --layers and --hidden"
        ) from None
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    decoder = model.get_decoder()
    lists = [m for m in decoder.children() if isinstance(m, torch.nn.ModuleList)]
    if not lists or head is None:
        raise ValueError(f"config.json: expected a decoder with layers and a head, got {kind!r}; give --params instead")
    layers = max(lists, key=len)
    kinds = Counter(_layer(layer, settings, torch) for layer in layers)
    inside = sum(p.numel() for layer in layers for p in layer.parameters())
    tied = head.weight is embedding.weight or bool(settings.get_text_config().tie_word_embeddings)
    whole = sum(p.numel() for p in model.parameters())
    outside = whole - inside - embedding.weight.numel() - (0 if tied else head.weight.numel())
    return Shape(
        tuple(kinds.items()),
        embedding.num_embeddings,
        embedding.embedding_dim,
        tied,
        outside,
        source=f"a count of the modules of {kind}",
    )


def _layer(layer: Any, settings: Any, torch: Any) -> Layer:
    """One layer from its modules; sizes of attention from the configuration."""
    c = settings.get_text_config()
    named = dict(layer.named_modules())
    linears = [
        Linear(name.rpartition(".")[2], m.in_features, m.out_features, m.bias is not None,
               targeted=name.rpartition(".")[2] not in ROUTERS)
        for name, m in named.items() if isinstance(m, torch.nn.Linear)
    ]  # fmt: skip
    for name, p in layer.named_parameters():
        if p.dim() == 3 and "experts." in name:
            linears.append(Linear(name.rpartition(".")[2], p.shape[2], p.shape[1], copies=p.shape[0]))
    used = sum(one.size for one in linears)
    whole = sum(p.numel() for p in layer.parameters())
    width, heads = c.hidden_size, c.num_attention_heads
    each = getattr(c, "head_dim", None) or width // heads
    narrow = (getattr(c, "num_key_value_heads", None) or heads) * each
    experts = [one for one in linears if one.copies > 1]
    inner = max([one.inputs for one in experts] or [c.intermediate_size])
    if experts:
        inner = min(one.inputs for one in experts)
    return Layer(
        tuple(linears), whole - used, 2 * width, heads * each, narrow, narrow, heads * each, inner,
        experts=getattr(c, "num_experts_per_tok", None) or 0 if experts else 0,
    )  # fmt: skip
