"""Savers of memory and time that only a CPU needs: `apply` for a module in training, `optimizer` for its engine, and
`sampling` for a view of it that samples.

To the rest of the code these are a module and an AdamW like any other: log-probabilities, losses, optimizer state and
checkpoints stay those of plain PyTorch, and gradients stay so but for rounding in float32. The savers, in the order in
which they are put in place, with the reason for the place and with what each measured (SmolLM2-135M in float32, all
weights trained, one thread, peaks of 2.2 to 3 GiB; the runs are in docs/log.md):

1. `recompute`: what is cheap to compute is computed again in a backward instead of being kept for it. 0.12 GiB for
   1.5 % of a step. Before anything else takes over the forward of a part of the decoder, as it leaves such a part
   alone: so it comes first here, and `apply` comes before a caller's own changes. Behind LoRA adapters, whose linear
   layers it is to find, and before ZeRO-3 takes the weights away with which it tries a formula out. Not under gradient
   checkpointing, which computes whole layers again.
2. `tied_gradient`, where embedding and head share a weight: their two gradients in one tensor. 0.12 GiB and 3 % of a
   step. It changes nothing but two attributes for the time of a forward, at any place in this list.
3. `row_adam`, where they do not: AdamW of the embedding by the rows that were looked up. 0.30 GiB and 3 % of a step.
   In place of 2, never with it; it begins in `optimizer`, as other optimizers do not take the sparse gradient.
4. `give_memory_back`: freed memory goes back to the system before a backward needs more. 0.21 to 0.26 GiB for at most
   5 % of a step. Last, since it is hooks alone, which run whatever the others have changed.

And `sampling`, for the view of a module that samples: `column_weights`, a copy of the linear layers' weights for the
time of a rollout, in the order in which products of 4 to 64 rows take 0.74 to 0.87 of the time. A rollout holds nothing
that a training step holds, so its copy, 0.5 GiB here, is not part of a run's peak.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from dsalign.cpu.column_weights import by_columns
from dsalign.cpu.give_memory_back import trim_in_backward
from dsalign.cpu.recompute import recompute_cheap
from dsalign.cpu.row_adam import gradient_values, only_looks_up, step_by_rows
from dsalign.cpu.tied_gradient import add_in_place

__all__ = ["apply", "gradient_values", "optimizer", "sampling"]


def apply(
    module: nn.Module,
    decoder: nn.Module,
    layers: Sequence[nn.Module],
    embedding: nn.Module,
    head: nn.Module | None,
    *,
    checkpointing: bool,
) -> None:
    """Let a module that is about to be trained on a CPU take less memory.

    module: what is called in a forward pass, around `decoder`, whose `layers` are given first to last. embedding: of
    the token ids. head: what turns hidden states into logits, None where `module` computes none. checkpointing:
    whether the layers are computed again in a backward anyway.
    """
    if not checkpointing:
        recompute_cheap(decoder)
    if isinstance(embedding, nn.Embedding):
        if head is not None and getattr(head, "weight", None) is embedding.weight:
            add_in_place(module, embedding, head)
        else:
            only_looks_up(module, embedding)
    trim_in_backward(decoder, layers)


def optimizer(module: nn.Module, groups: Iterable[dict[str, Any]], **settings: Any) -> torch.optim.AdamW:
    """torch.optim.AdamW over parameter groups of a module that `apply` was given, for an engine that steps it as it is
    and in one process: no gradient is averaged over ranks, cut into shards or copied to another dtype on the way.

    settings: those of torch.optim.AdamW. From here on some gradients may be sparse: read them by `gradient_values`.
    """
    made = torch.optim.AdamW(groups, **settings, fused=True)
    step_by_rows(module, made)
    return made


def sampling(view: nn.Module) -> None:
    """Let the generation view of a module on a CPU sample faster, with the same values but for rounding in float32."""
    by_columns(view)
