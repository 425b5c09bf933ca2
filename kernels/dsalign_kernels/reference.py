"""The twins of the operations in plain torch: same names and signatures, the textbook formula on whole tensors.

They are what every implementation is measured against; nothing in a run calls them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORE_INDEX = -100


class Logps(NamedTuple):
    """What the head says about one target a row; all [N].

    logps: float32, nats, <= 0, differentiable; 0 where the target is ignored. lse: float32, log-sum-exp of the row's
    logits. entropy: float32, nats, or None. top: bool, whether the target is the most likely token, or None.
    """

    logps: Tensor
    lse: Tensor
    entropy: Tensor | None
    top: Tensor | None


def selective_logps(
    logits: Tensor,
    targets: Tensor,
    *,
    entropy: bool = False,
    top: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> Logps:
    """logp = z_y - log sum_v e^(z_v), entropy = sum_v p_v (log sum_w e^(z_w) - z_v); z = softcap tanh(scale x /
    softcap) / temperature, or scale x / temperature without a softcap. Float64 stays float64."""
    x = logits if logits.dtype == torch.float64 else logits.float()
    z = x * scale if softcap is None else softcap * torch.tanh(x * scale / softcap)
    log_p = torch.log_softmax(z / temperature, 1)
    kept = targets != ignore_index
    picked = log_p.gather(1, torch.where(kept, targets, 0)[:, None])[:, 0]
    entropies = -(log_p.exp() * log_p).sum(1).detach() if entropy else None
    tops = (kept & (picked >= log_p.amax(1)) if logits.shape[0] else kept) if top else None
    return Logps(torch.where(kept, picked, 0.0), torch.logsumexp(z / temperature, 1).detach(), entropies, tops)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    entropy: bool = False,
    top: bool = False,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> Logps:
    """`selective_logps` of hidden [N, D] x weight [V, D] + bias [V], with the logits in memory."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return selective_logps(
        logits,
        targets,
        entropy=entropy,
        top=top,
        scale=scale,
        softcap=softcap,
        temperature=temperature,
        ignore_index=ignore_index,
    )
