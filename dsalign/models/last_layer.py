"""The layers of a decoder; and its last MLP, which skips the positions whose output nothing reads."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn

from dsalign.models.attention import SharedPrefix


def layers_of(decoder: nn.Module) -> list[nn.Module]:
    """The layers of a transformers decoder, first to last: the longest ModuleList among its children, [] where it has
    none."""
    lists = [module for module in decoder.children() if isinstance(module, nn.ModuleList)]
    return max((list(one) for one in lists), key=len, default=[])


def skip_unread_mlp(decoder: nn.Module) -> None:
    """Skip the last MLP where its output is never read: an MLP treats each token alone, and only the positions
    `SharedPrefix.read` of a packed row feed the head. Other positions are 0, and rows that are not packed are whole.

    The MLP's forward is wrapped as it stands, so whatever else changes it comes first. A layer whose attention does not
    run before its MLP computes all positions, as the attention is what tells the MLP which row it is in.
    """
    layers = layers_of(decoder)
    mlp = getattr(layers[-1], "mlp", None) if layers else None
    if mlp is None:
        return
    vars(mlp).update(_whole=mlp.forward, forward=MethodType(_forward, mlp))
    for part in layers[-1].children():
        if part is not mlp:
            vars(part)["_mlp"] = mlp  # not by a closure, so that in a copy of the layer it is the copy's MLP
            part.register_forward_pre_hook(_note, with_kwargs=True)
    layers[-1].register_forward_pre_hook(_forget)
    layers[-1].register_forward_hook(_forget)


def _note(part: nn.Module, args: Any, more: dict[str, Any]) -> None:
    """Before the attention: tell the MLP which positions are read. Under gradient checkpointing a backward runs the
    layer's forward again, without the layer's own hooks but with those of its parts: hence a hook on the part."""
    if "shared_prefix" in more:
        prefix: SharedPrefix | None = more["shared_prefix"]
        vars(vars(part)["_mlp"])["_read"] = None if prefix is None else prefix.read


def _forget(layer: Any, *_: Any) -> None:
    """Before and after the layer: what one row told the MLP is not for another."""
    vars(layer.mlp).pop("_read", None)


def _forward(self: nn.Module, x: Tensor) -> Any:
    """The MLP's forward over the positions that are read, [1, T, D] -> [1, T, D]."""
    whole, read = vars(self)["_whole"], vars(self).pop("_read", None)
    if read is None or len(read) in (0, x.shape[1]):
        return whole(x)
    found = whole(x[:, read])
    states, *others = found if isinstance(found, tuple) else (found,)
    filled = states.new_zeros(x.shape).index_copy(1, read, states)  # under autocast not in the dtype of x
    return (filled, *others) if others else filled
