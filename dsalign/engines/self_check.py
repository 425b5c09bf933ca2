"""At the start of a run: packed rows must give what single rows give, and those what the model's own forward gives."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dsalign.contract.groups import Group
from dsalign.data.batches.packing import num_tokens, rows
from dsalign.engines import dist
from dsalign.engines.roles import Models
from dsalign.models.heads import CausalModel, unwrap

logger = logging.getLogger(__name__)
LIMITS = {torch.float32: 1e-3}  # nats, or units of value; a mask that is wrong is off by more than a tenth
LOOKED_AT = 64  # groups among which the two shortest are taken
HALF = 0.25  # in half precision two ways to add up differ by this much


def self_check(models: Models, groups: Sequence[Group]) -> None:
    """Every engine computes two short groups in one packed row and as single rows; where they differ, or a layer wants
    what packed rows do not have, it computes single rows from then on, said in one line. Collective.

    Raises ValueError where the log-probabilities of single rows differ from the model's own forward's: then dsalign
    does not know what this architecture does between its head and its logits.
    """
    first = [groups[i] for i in range(min(len(groups), LOOKED_AT))]
    sample = [_answered(group) for group in sorted(first, key=lambda g: (num_tokens([g]), g.index))[:2]]
    for role, engine in models.engines.items():
        module = engine.module
        limit = LIMITS.get(next(module.parameters()).dtype, HALF)
        name = type(unwrap(module.model)).__name__
        why = "" if module.shares else f"{name} with this attention takes no packed rows"
        if module.shares:
            together = torch.cat(models.each_group(role, sample, len(sample)))
            wanted, module.shares = module.unsupported, False
            alone = torch.cat(models.each_group(role, sample, 1))
            scale = 1.0 if isinstance(module, CausalModel) else max(1.0, float(alone.abs().max()))
            gap = _largest(together - alone, models) / scale
            if wanted or not gap <= limit:
                why = f"layers of {name} ask for {wanted}" if wanted else f"packed rows of {name} differ by {gap:.2g}"
            module.shares = not why
        if why and dist.rank() == 0:
            logger.warning("%s: one completion a row, which is slower: %s", role, why)
        if isinstance(module, CausalModel):
            gap = _largest(_own(engine, sample, models) - torch.cat(models.each_group(role, sample)), models)
            if not gap <= limit:
                raise ValueError(
                    f"{name}: the log-probabilities of {sample[0].where} differ by {gap:.2g} nats from the model's own "
                    "forward; dsalign does not know what this architecture does between its head and its logits"
                )


def _largest(difference: Tensor, models: Models) -> float:
    """The same on every rank, so that all go the same way; NaN is larger than any number."""
    gap = float(difference.abs().max())
    return float(dist.gather(torch.tensor([gap], dtype=torch.float64), models.device).max())


def _answered(group: Group) -> Group:
    """Of a prompt alone the last two tokens stand for two answers, so that two branches are compared."""
    if group.completions:
        return group
    last = group.prompt[-1:]
    return replace(group, prompt=(group.prompt[0], *group.prompt[:-1]), completions=(last, last * 2))


def _own(engine: Any, sample: Sequence[Group], models: Models) -> Tensor:
    """[N] log-probabilities by the model's own forward."""
    inputs = rows(sample, models.device)
    training = engine.module.training
    engine.module.eval()
    with torch.no_grad():
        logits = engine.module.whole_logits(inputs.ids).flatten(0, 1)[inputs.predict].float()
    engine.module.train(training)
    return torch.log_softmax(logits / models.temperature, -1).gather(1, inputs.targets[:, None])[:, 0].cpu()
