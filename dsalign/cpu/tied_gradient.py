"""One gradient tensor for a weight that both embeds tokens and predicts them, as in models with tied embeddings.

The head's gradient of such a weight [V, D] is dense, the embedding's is not 0 in the rows that were looked up. Autograd
would make both dense and add them; here those rows are added to the head's gradient in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Tied(torch.autograd.Function):
    """Two views of a weight [V, D], one for the embedding and one for the head, whose gradients this adds up.

    Left to autograd, a sparse gradient and a dense one are added out of place, and the sum is copied once more.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        return weight.detach(), weight.detach()

    @staticmethod
    def backward(ctx: Any, of_embedding: Tensor | None, of_head: Tensor | None) -> Tensor | None:
        if of_embedding is None or of_head is None:
            return of_head if of_embedding is None else of_embedding.to_dense()
        return of_head.add_(of_embedding)  # in place: the head made this tensor for here, and nothing else holds it


def add_in_place(module: nn.Module, embedding: nn.Embedding, head: nn.Module) -> None:
    """Let a backward of `module` hold one gradient tensor of the weight [V, D] that its `embedding` and `head` share.

    embedding, head: parts of `module`, which computes with them in its forward. A forward without gradient stays as it
    is, and so does one under ZeRO-3, which holds a weight in memory only while its own module runs.
    """
    vars(module)["_tied"] = embedding, head  # not by a closure: a copy of the module has copies of its own
    module.register_forward_pre_hook(_hand_out)
    module.register_forward_hook(_take_back, always_call=True)


def _hand_out(module: nn.Module, args: Any) -> None:
    """Before the forward: give embedding and head a view of the weight each. The registered parameter stays."""
    embedding, head = vars(module)["_tied"]
    weight: Tensor = embedding.weight
    if torch.is_grad_enabled() and weight.requires_grad and not hasattr(weight, "ds_id"):
        of_embedding, of_head = _Tied.apply(weight)  # type: ignore[no-untyped-call]
        vars(embedding).update(weight=of_embedding, sparse=True)
        vars(head).update(weight=of_head)


def _take_back(module: nn.Module, args: Any, output: Any) -> None:
    """After the forward, also one that ended with an error: take the views away again."""
    embedding, head = vars(module)["_tied"]
    for part in (embedding, head):
        vars(part).pop("weight", None)
    embedding.sparse = False
