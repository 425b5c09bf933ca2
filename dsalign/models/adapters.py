"""LoRA through PEFT: a new adapter, or training continued on an earlier one; and the start weights as reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from dsalign.config.schema import ModelOptions
from dsalign.models import adapter_files
from dsalign.models.names import Source

TRAINED, START = "default", "start"  # names of the trained adapter, and of a frozen copy of it as training started
QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "wq", "wk", "wv")


def merge(model: PreTrainedModel, adapter: Path | None) -> PreTrainedModel:
    """The model with the adapter in the folder `adapter` merged into its weights; None = the model as it is.

    Raises ValueError as `adapter_files.stored` and `adapter_files.fill` do.
    """
    if adapter is None:
        return model
    merged: PreTrainedModel = _opened(model, adapter, trainable=False).merge_and_unload()
    return merged


def _opened(model: PreTrainedModel, adapter: Path, *, trainable: bool) -> PeftModel:
    """A PEFT model with the adapter of a folder, called TRAINED; where it is trainable, with its frozen copy START."""
    stored = adapter_files.stored(adapter)
    adapter_files.resize(model, stored, adapter)
    stored.config.inference_mode = not trainable
    peft_model = get_peft_model(model, copy.deepcopy(stored.config), adapter_name=TRAINED)
    adapter_files.fill(peft_model, TRAINED, stored, adapter)
    if trainable:
        frozen = copy.deepcopy(stored.config)
        frozen.inference_mode = True
        peft_model.add_adapter(START, frozen)
        adapter_files.fill(peft_model, START, stored, adapter)
        peft_model.set_adapter(TRAINED)
    return cast(PeftModel, peft_model)


def add(model: PreTrainedModel, source: Source, options: ModelOptions, seed: int) -> PeftModel:
    """A PEFT model whose adapter TRAINED is trained: a new one, or the source's adapter beside START, its frozen copy.

    A source's adapter keeps its rank, alpha and layers and takes the dropout of `options`. seed: of a new adapter.
    Raises ValueError where a name in lora_target_modules is no layer's, or the source's adapter does not fit the model.
    """
    dropout = options.lora_dropout
    if source.adapter is not None:
        peft_model = _opened(model, source.adapter, trainable=True)
        peft_model.peft_config[TRAINED].lora_dropout = dropout
        for layer in peft_model.modules():
            if isinstance(layer, LoraLayer) and TRAINED in layer.lora_dropout:
                layer.lora_dropout[TRAINED] = nn.Dropout(dropout) if dropout else nn.Identity()
        return peft_model
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=dropout,
        target_modules=_targets(model, options.lora_target_modules),
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
def with_start_weights(model: nn.Module) -> Iterator[None]:
    """A context in which the model computes with the weights that training started from: the trained adapter is off,
    and where training continues an earlier adapter, that adapter's frozen copy is on.

    PEFT's own switches would change requires_grad too, which detaches the hooks of a ZeRO engine.
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
