"""A check at the start of a run: packed rows must give the numbers of padded rows, and these the numbers of the model's
own forward pass. Packed, a group's prompt is computed once for all its completions; padded, a row has one completion.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsalign.contract.groups import Group
from dsalign.data.batches.packing import num_tokens, padded
from dsalign.engines import dist
from dsalign.engines.roles import Roles
from dsalign.models.heads import CausalModel, unwrap

logger = logging.getLogger(__name__)
LIMITS = {torch.float32: 1e-3}  # nats, or units of value; a mask that is wrong is off by more than a tenth
LOOKED_AT = 64  # the first groups, of which the two shortest are checked
HALF = 0.25  # the limit in half precision, where two orders of summation differ by nearly this much


def self_check(roles: Roles, groups: Sequence[Group]) -> None:
    """Compute two short groups with every engine, in packed rows and in padded rows. Where the numbers differ, or where
    a layer reads what packed rows do not have, the engine uses padded rows from then on, and one line says so. Values
    of a new critic, which are all 0, show nothing: what was found for a model of its class holds for it. Collective.

    Raises ValueError where the log-probabilities of an engine differ from those of its model's own forward pass: then
    dsalign does not know what this architecture does between its head and its logits.
    """
    first = [groups[i] for i in range(min(len(groups), LOOKED_AT))]
    sample = [_answered(group) for group in sorted(first, key=lambda g: (num_tokens([g]), g.index))[:2]]
    reasons: dict[str, str] = {}  # name of a model's class -> why it takes no packed rows, "" where it does
    for role, engine in roles.engines.items():
        module = engine.module
        limit = limit_of(module)
        name = type(unwrap(module.model)).__name__
        why = "" if module.shares else f"{name} with this attention takes no packed rows"
        if module.shares:
            together = torch.cat(roles.each_group(role, sample, len(sample)))
            wanted, module.shares = module.unsupported, False
            alone = torch.cat(roles.each_group(role, sample, 1))
            scale = 1.0 if isinstance(module, CausalModel) else max(1.0, float(alone.abs().max()))
            gap = largest_gap(together, alone, roles) / scale
            if wanted or not gap <= limit:
                why = f"layers of {name} ask for {wanted}" if wanted else f"packed rows of {name} differ by {gap:.2g}"
            elif largest_gap(alone, torch.zeros_like(alone), roles) == 0:
                why = reasons.get(name, "")
            module.shares = not why
        reasons.setdefault(name, why)
        if why and dist.rank() == 0:
            logger.warning("%s: one completion a row, which is slower: %s", role, why)
        if isinstance(module, CausalModel):
            gap = largest_gap(_own(engine, sample, roles), torch.cat(roles.each_group(role, sample)), roles)
            if not gap <= limit:
                raise ValueError(
                    f"{name}: the log-probabilities of {sample[0].where} differ by {gap:.2g} nats from the model's own "
                    "forward; dsalign does not know what this architecture does between its head and its logits: "
                    "take a model of another architecture"
                )


def limit_of(module: torch.nn.Module) -> float:
    """The most that two right computations of a model's log-probabilities or values may differ by: nats, or units of
    value, by the dtype of its weights."""
    return limit_in(next(module.parameters()).dtype)


def limit_in(dtype: torch.dtype) -> float:
    """The same limit by the dtype alone."""
    return LIMITS.get(dtype, HALF)


def largest_gap(one: Tensor, other: Tensor, roles: Roles) -> float:
    """The largest |one - other| over all ranks, so that every rank decides alike; NaN where any rank has one. A rank
    may have no numbers. Collective."""
    gap = float((one - other).abs().max()) if len(one) else 0.0
    return float(dist.gather(torch.tensor([gap], dtype=torch.float64), roles.device).max())


def _answered(group: Group) -> Group:
    """A group with completions to compare: a prompt alone gets two, made of its last token, once and twice."""
    if group.completions:
        return group
    last = group.prompt[-1:]
    return replace(group, prompt=(group.prompt[0], *group.prompt[:-1]), completions=(last, last * 2))


def _own(engine: Any, sample: Sequence[Group], roles: Roles) -> Tensor:
    """The log-probabilities, [N], of the completion tokens by the model's own forward pass, on the CPU."""
    inputs = padded(sample, roles.device)
    training = engine.module.training
    engine.module.eval()
    with torch.no_grad():
        logits = engine.module.whole_logits(inputs.ids).flatten(0, 1)[inputs.predict].float()
    engine.module.train(training)
    return torch.log_softmax(logits / roles.temperature, -1).gather(1, inputs.targets[:, None])[:, 0].cpu()
