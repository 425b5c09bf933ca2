"""LoRA through PEFT: a new adapter, or training continued on an earlier one; and the start weights as reference."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from dsalign.config.schema import ModelOptions
from dsalign.models import adapter_files, lora_targets
from dsalign.models.names import Source
from dsalign.models.weights import say_untied

logger = logging.getLogger(__name__)
TRAINED, START = "default", "start"  # names of the trained adapter, and of a frozen copy of it as training started


def merge(model: PreTrainedModel, adapter: Path | None) -> PreTrainedModel:
    """The model with the adapter in the folder `adapter` merged into its weights; None = the model as it is.

    Raises ValueError as `opened` and `merged` do.
    """
    return model if adapter is None else merged(opened(model, adapter, trainable=False), adapter)


def merged(peft_model: PeftModel, adapter: Path) -> PreTrainedModel:
    """The model under a PEFT model with its adapter in its weights: it computes what the two did. Where that gives a
    tied head other numbers than the embedding, it gets a weight of its own, and a line says so. adapter: for messages.

    Raises ValueError where PEFT cannot merge it.
    """
    _untie(cast(PreTrainedModel, peft_model.get_base_model()))
    try:
        whole: PreTrainedModel = peft_model.merge_and_unload()
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{adapter}: expected an adapter that PEFT merges into its base, as a frozen model and --tuner full need "
            f"it, got: {error}; train it on with --tuner lora, without another model from it, or train one without that"
        ) from error
    say_untied(str(adapter), whole)
    return whole


def _untie(model: PreTrainedModel) -> None:
    """Give a model a head of its own where it is the embedding and the adapter changes one of the two: merged into the
    weight of both, the change would reach the other as well."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    if ends[1] is not None and ends[0].weight is ends[1].weight and any(isinstance(x, BaseTunerLayer) for x in ends):
        head = ends[1].get_base_layer() if isinstance(ends[1], BaseTunerLayer) else ends[1]
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)


def opened(model: PreTrainedModel, adapter: Path, *, trainable: bool) -> PeftModel:
    """A PEFT model with the adapter of a folder, called TRAINED; where it is trainable, with its frozen copy START.

    Raises ValueError as `adapter_files.stored` and `adapter_files.fill` do, and for one to train that has biases or a
    tied head of its own.
    """
    stored = adapter_files.stored(adapter)
    adapter_files.resize(model, stored, adapter)
    stored.config.inference_mode = not trainable
    peft_model = get_peft_model(model, copy.deepcopy(stored.config), adapter_name=TRAINED)
    adapter_files.fill(peft_model, TRAINED, stored, adapter)
    if trainable:
        _refuse_without_copy(peft_model, stored.config, adapter)
        frozen = copy.deepcopy(stored.config)
        frozen.inference_mode = True
        peft_model.add_adapter(START, frozen)
        adapter_files.fill(peft_model, START, stored, adapter)
        peft_model.set_adapter(TRAINED)
    return cast(PeftModel, peft_model)


def _refuse_without_copy(peft_model: PeftModel, config: Any, adapter: Path) -> None:
    """Raise ValueError for an adapter of which PEFT cannot hold a second one, START, as training began with it."""
    odd, why = "", ""
    if getattr(config, "bias", "none") != "none":
        odd, why = f"bias {config.bias!r}", "its biases are the base's own"
    elif getattr(config, "ensure_weight_tying", False) and getattr(peft_model.config, "tie_word_embeddings", False):
        odd, why = "ensure_weight_tying", "PEFT ties the head of one adapter alone"
    if odd:
        raise ValueError(
            f"{adapter}/adapter_config.json: expected an adapter that is trained on without {odd}: {why}, with no "
            "place for a copy as it was; use --tuner full, or merge it into its base (dsalign merge) and give that"
        )


def add(model: PreTrainedModel, source: Source, options: ModelOptions, seed: int) -> PeftModel:
    """A PEFT model whose adapter TRAINED is trained: a new one, or the source's adapter beside START, its frozen copy.

    A source's adapter keeps its rank, alpha and layers and takes the dropout of `options`. seed: of a new adapter.
    Raises ValueError where a name in lora_target_modules is no layer's, or the source's adapter does not fit the model.
    """
    dropout = options.lora_dropout
    if source.adapter is not None:
        peft_model = opened(model, source.adapter, trainable=True)
        _set_dropout(peft_model, dropout)
        return peft_model
    targets = lora_targets.find(model, options.lora_target_modules)
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        target_modules=targets.modules,
        target_parameters=targets.parameters or None,
        task_type=TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the same adapter on every rank, whatever was drawn before
        added = get_peft_model(model, config, adapter_name=TRAINED)
    _set_dropout(added, dropout)
    return added


def _set_dropout(peft_model: PeftModel, dropout: float) -> None:
    """Set the dropout of the adapter TRAINED. Weights of experts are adapted as sums of matrices, which has no input to
    drop out: there it is 0, and so in adapter_config.json, as PEFT opens no adapter of such weights with another."""
    layers = [m for m in peft_model.modules() if isinstance(m, LoraLayer) and TRAINED in m.lora_dropout]
    whole = [layer for layer in layers if isinstance(layer, ParamWrapper)]
    for layer in layers:
        if not isinstance(layer, ParamWrapper):
            layer.lora_dropout[TRAINED] = nn.Dropout(dropout) if dropout else nn.Identity()
    peft_model.peft_config[TRAINED].lora_dropout = 0.0 if whole else dropout
    if whole and dropout:
        logger.warning(
            "lora_dropout %g: not on the weights of experts, which LoRA adapts without an input to drop out; "
            "--lora_dropout 0 turns it off elsewhere too",
            dropout,
        )


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
