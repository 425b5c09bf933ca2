"""The layers on which a new LoRA adapter is put, from the words of --lora_target_modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "wq", "wk", "wv")
ALL = ("all", "all-linear", "all_linear")  # as written here, by PEFT and by other trainers, in any case
ROUTERS = ("gate", "router")  # names of the layer that chooses experts, beside a module called experts


@dataclass(frozen=True)
class Targets:
    """What an adapter is put on. modules: names of layers, or PEFT's word for every linear layer. parameters: names of
    parameters that hold the matrices of all experts in one tensor, [experts, ., .]."""

    modules: str | list[str]
    parameters: list[str]


def find(model: PreTrainedModel, words: Sequence[str]) -> Targets:
    """The layers that `words` name: ALL (every linear layer and expert but routers and the head), DEFAULT (query, key
    and value), and names, whole or the end of one as in PEFT.

    Raises ValueError naming the words that name no layer, or one that LoRA cannot take, with the layers there are.
    """
    linear, other, experts = linear_layers(model), _embeddings(model), _experts(model)
    if len(words) == 1 and words[0].lower() in ALL and not experts and not _routers(model):
        return Targets("all-linear", [])
    modules, parameters, missing = list[str](), list[str](), list[str]()
    names = [*linear, *other, *experts]
    for word in words:
        if word.lower() in ALL:
            head = model.get_output_embeddings()
            modules += [name for name in linear if model.get_submodule(name) is not head]
            parameters += experts
            continue
        wanted = QUERY_KEY_VALUE if word == "DEFAULT" else (word,)
        found = [(one, name) for one in wanted for name in names if name == one or name.endswith(f".{one}")]
        parameters += [name for _, name in found if name in experts]
        modules += dict.fromkeys(one for one, name in found if name not in experts)
        missing += [] if found else wanted
    if missing:
        last = sorted({name.rpartition(".")[2] for name in names})
        raise ValueError(
            f"lora_target_modules: {type(model).__name__} has no layer called {', '.join(missing)} that LoRA can take; "
            f"write ALL, or some of {', '.join(last)}"
        )
    return Targets(list(dict.fromkeys(modules)), list(dict.fromkeys(parameters)))


def linear_layers(model: nn.Module) -> list[str]:
    """The names of all linear layers but routers."""
    routers = _routers(model)
    return [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and n not in routers]


def _embeddings(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Embedding)]


def _experts(model: nn.Module) -> list[str]:
    """The names of the parameters [experts, ., .] with the matrices of all experts of a layer."""
    return [name for name, p in model.named_parameters() if p.dim() == 3 and ".experts." in name]


def _routers(model: nn.Module) -> set[str]:
    """The names of the layers that choose experts."""
    beside = {name.rpartition(".")[0] for name, _ in model.named_modules() if name.rpartition(".")[2] == "experts"}
    return {f"{parent}.{name}" for parent in beside for name in ROUTERS}
