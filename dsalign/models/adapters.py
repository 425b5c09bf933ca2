"""LoRA through PEFT: a new adapter, or an earlier run's adapter trained on; and the start weights as reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from dsalign.models.names import Source

TRAINED, START = "default", "start"  # adapter names: what is trained, and a frozen copy of what it started from
QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "wq", "wk", "wv")


@dataclass(frozen=True)
class LoraOptions:
    """rank > 0; alpha: the update is scaled by alpha / rank; dropout in [0, 1); targets: ALL (every linear layer but
    the head), DEFAULT (query, key, value) or names of layers."""

    rank: int
    alpha: int
    dropout: float
    targets: Sequence[str]


def merge(model: PreTrainedModel, adapter: Path | None) -> PreTrainedModel:
    """The model with an adapter folder merged into its weights."""
    if adapter is None:
        return model
    merged: PreTrainedModel = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return merged


def add(model: PreTrainedModel, source: Source, lora: LoraOptions, seed: int) -> PeftModel:
    """A PEFT model whose adapter `default` is trained: new, or the source's adapter with a frozen copy of its start.

    A source's adapter keeps its rank, alpha and layers; its dropout is what `lora` says.
    Raises ValueError where no layer has one of the target names.
    """
    if source.adapter is not None:
        peft_model = PeftModel.from_pretrained(model, source.adapter, adapter_name=TRAINED, is_trainable=True)
        peft_model.load_adapter(source.adapter, adapter_name=START, is_trainable=False)
        peft_model.set_adapter(TRAINED)
        peft_model.peft_config[TRAINED].lora_dropout = lora.dropout
        for layer in peft_model.modules():
            if isinstance(layer, LoraLayer) and TRAINED in layer.lora_dropout:
                layer.lora_dropout[TRAINED] = nn.Dropout(lora.dropout) if lora.dropout else nn.Identity()
        return peft_model
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(model, lora.targets),
        task_type=TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same adapter on every rank, whatever was drawn before
        return get_peft_model(model, config, adapter_name=TRAINED)


def _targets(model: PreTrainedModel, targets: Sequence[str]) -> str | list[str]:
    if list(targets) == ["ALL"]:
        return "all-linear"
    names = {
        name.rsplit(".", 1)[-1] for name, module in model.named_modules() if getattr(module, "weight", None) is not None
    }
    wanted = QUERY_KEY_VALUE if list(targets) == ["DEFAULT"] else targets
    found = [name for name in wanted if name in names]
    missing = [] if list(targets) == ["DEFAULT"] and found else [name for name in wanted if name not in names]
    if missing:
        raise ValueError(
            f"lora_target_modules: {type(model).__name__} has no layer called {', '.join(missing)}; it has "
            f"{', '.join(sorted(names))}"
        )
    return found


@contextmanager
def as_started(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes with the weights that training started from: the trained adapter off, a frozen copy of
    an adapter it started from on.

    PEFT's own switches also flip requires_grad, which would detach the hooks of a ZeRO engine.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | ModulesToSaveWrapper)]
    before = [(layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        if any(START in getattr(layer, parts) for parts in layer.adapter_layer_names):
            layer._active_adapter = [START]
        else:
            layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, (active, disabled) in zip(layers, before, strict=True):
            layer._active_adapter, layer._disable_adapters = active, disabled
