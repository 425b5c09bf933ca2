"""The layers of a decoder, and its last one, which computes no token that nobody looks at."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from dsalign.models.attention import SharedPrefix


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """Of a transformers decoder, first to last; none where it keeps them in another way."""
    lists = [module for module in decoder.children() if isinstance(module, nn.ModuleList)]
    return max((list(one) for one in lists), key=len, default=[])


def read_alone(decoder: nn.Module) -> None:
    """Let the last layer's MLP compute, of a packed row, what `SharedPrefix.read` names, and give 0 elsewhere: it works
    token by token, and no layer behind it mixes them. Nothing happens where it does not run behind the attention."""
    layers = layers_of(decoder)
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    if mlp is None:
        return
    vars(mlp).update(_whole=mlp.forward, forward=MethodType(_forward, mlp))
    for part in layers[-1].children():
        if part is not mlp:
            vars(part)["_behind"] = mlp  # not by a closure: a copy of the layer has a copy of its own
            part.register_forward_pre_hook(_note, with_kwargs=True)
    layers[-1].register_forward_pre_hook(_forget)
    layers[-1].register_forward_hook(_forget)


def _note(part: nn.Module, args: Any, more: dict[str, Any]) -> None:
    """The attention is told, also where a backward runs the layer's forward again, without the layer's own hooks."""
    if "shared_prefix" in more:
        prefix: SharedPrefix | None = more["shared_prefix"]
        vars(vars(part)["_behind"])["_read"] = None if prefix is None else prefix.read


def _forget(layer: Any, *_: Any) -> None:
    vars(layer.mlp).pop("_read", None)


def _forward(self: nn.Module, x: Tensor) -> Any:
    """The forward of the MLP."""
    whole, read = vars(self)["_whole"], vars(self).pop("_read", None)
    if read is None or len(read) in (0, x.shape[1]):
        return whole(x)
    found = whole(x[:, read])
    states, *others = found if isinstance(found, tuple) else (found,)
    filled = states.new_zeros(x.shape).index_copy(1, read, states)  # under autocast not in the dtype of x
    return (filled, *others) if others else filled
