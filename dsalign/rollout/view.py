"""The generation view: a copy of a model's modules that shares its weights, for sampling in the middle of training.

The copy has no hooks, a configuration of its own and its own evaluation mode, so nothing that generation sets reaches
the model that is trained. A LoRA adapter is merged into weights that only the view has, so there is nothing to undo.
Weights in 4 bits are unpacked, for the time of the view: a decoding step reads all weights, and would unpack packed
ones at every token.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from dsalign.engines.engine import whole
from dsalign.models.four_bit import FourBitLinear
from dsalign.models.heads import Backbone, unwrap
from dsalign.models.last_layer import layers_of
from dsalign.rollout.layers import Gathered, Turns


@contextmanager
def generation_view(engine: Any, *, by_layer: bool = False) -> Iterator[PreTrainedModel]:
    """A context with the view of a DeepSpeed engine's language model. Entering and leaving are collective.

    At ZeRO stage 3 weights are gathered once, on entering, and inside, forward passes need no collective, so ranks may
    run different numbers of them. by_layer: those of decoder layers are gathered each time that one computes, which
    takes the memory of one layer; ranks may still run different numbers of passes, and leave when all are done.
    """
    module = engine.module
    model = module.model if isinstance(module, Backbone) else module
    layers = layers_of(unwrap(model).get_decoder()) if by_layer else []
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    with whole(engine, [p for p in module.parameters() if id(p) not in inside]):
        turns = Turns(engine, layers)
        view = view_of(model, layers, turns)
        if layers:
            view.get_decoder().register_forward_pre_hook(lambda *_: turns.begin())
        try:
            yield view
        finally:
            if layers:
                turns.end()


@torch.no_grad()
def view_of(
    model: PreTrainedModel | PeftModel, layers: Sequence[nn.Module] = (), turns: Turns | None = None
) -> PreTrainedModel:
    """The view of a model whose weights are whole, in evaluation mode. It lives no longer than they stay as they are:
    an optimizer step changes shared weights under it, and not those with an adapter merged.

    layers: those whose weights are not whole, and are in their `turns`.
    """
    inner = unwrap(model)
    config = copy.deepcopy(inner.config)
    configs = {id(inner.config): config, id(inner.config.get_text_config()): config.get_text_config()}
    seen: dict[int, Any] = {}
    if turns is not None:
        seen = {
            id(layer): Gathered(layer, i, turns, lambda module: _copy(module, {}, configs))
            for i, layer in enumerate(layers)
        }
    view: PreTrainedModel = _copy(inner, seen, configs)
    return view.eval()


def _copy(module: nn.Module, seen: dict[int, Any], configs: dict[int, Any]) -> Any:
    """The copy of a module and all below it; a module that stands in two places has one copy. seen: id of a module ->
    its copy. configs: id of a configuration -> its copy."""
    if id(module) in seen:
        return seen[id(module)]
    if isinstance(module, ModulesToSaveWrapper):
        names = [] if module.disable_adapters else module.active_adapters
        chosen = module.modules_to_save[names[0]] if names else module.original_module
        seen[id(module)] = _copy(chosen, seen, configs)
        return seen[id(module)]
    found: Any = object.__new__(type(module))
    seen[id(module)] = found
    for name, value in vars(module).items():
        if name == "forward" or isinstance(value, nn.Module):  # what was put over this one module only
            continue
        if isinstance(value, OrderedDict) and name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
            value = OrderedDict()
        elif name in ("_parameters", "_buffers"):
            value = dict(value)  # of its own, as an adapter is merged into it; and ZeRO-3's kind of dict gathers
        vars(found)[name] = configs.get(id(value), value)
    found._modules = {
        name: None if child is None else _copy(child, seen, configs) for name, child in module._modules.items()
    }
    if isinstance(module, FourBitLinear):
        seen[id(module)] = found = found.plain()
    if isinstance(module, BaseTunerLayer):
        seen[id(module)] = found = _merged(found)
    return found


def _merged(layer: Any) -> Any:
    """The base layer of a PEFT layer's copy, with the active adapter merged into weights of its own."""
    if layer.disable_adapters or not layer.active_adapters:
        return layer.get_base_layer()
    base = layer.get_base_layer()
    for name, parameter in base._parameters.items():
        if parameter is not None:
            base._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
    if any(getattr(layer, "lora_bias", {}).values()) and getattr(base, "bias", None) is None:
        base._parameters["bias"] = nn.Parameter(base.weight.new_zeros(base.out_features), requires_grad=False)
    layer.merged_adapters = []
    layer.merge()
    return base


def weights_of(view: PreTrainedModel) -> dict[str, Tensor]:
    """The weights of a view, on its device, under the names that the architecture's checkpoints have. A head that is
    tied to the embedding is there under both names, as an engine with a second copy may hold it twice."""
    found: dict[str, Tensor] = revert_weight_conversion(view, view.state_dict())
    return {name: tensor.detach() for name, tensor in found.items()}


def untied(view: PreTrainedModel) -> Any:
    """A copy of a view's configuration for a model whose head is a weight of its own, with the same numbers."""
    config = copy.deepcopy(view.config)
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    config.architectures = [type(view).__name__]
    config.dtype = view.dtype
    return config


def write_untied(weights: Mapping[str, Tensor], view: PreTrainedModel, folder: Path) -> None:
    """Write the weights and `untied` to a folder, which is made, as safetensors.

    Raises ValueError where the files do not hold every tensor and byte: a shared tensor is easily written once only.
    """
    kept, own = set[int](), dict[str, Tensor]()
    for name, tensor in weights.items():
        own[name] = tensor.clone() if tensor.data_ptr() in kept else tensor
        kept.add(tensor.data_ptr())
    folder.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict(own, folder)
    untied(view).save_pretrained(folder)
    wanted = {name: tensor.shape.numel() * tensor.element_size() for name, tensor in weights_of(view).items()}
    found = dict[str, int]()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name).nbytes for name in opened.keys()}  # noqa: SIM118
    if found != wanted:
        raise ValueError(
            f"rollout: {folder} holds {len(found)} tensors of {sum(found.values())} bytes; expected the model's "
            f"{len(wanted)} of {sum(wanted.values())}: {', '.join(sorted(wanted.keys() ^ found.keys())[:5])}"
        )
