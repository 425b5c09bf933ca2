"""The same losses without gradient, over a whole data set: sums over the set divided by the counts of the set."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch

from dsalign.data.batches.loader import Loader
from dsalign.data.batches.packing import cut
from dsalign.engines import dist
from dsalign.engines.roles import Models
from dsalign.loop.context import RunContext
from dsalign.loop.metrics import Sums


def evaluate(algorithm: Any, models: Models, ctx: RunContext, loader: Loader) -> dict[str, float]:
    """{"eval/loss": ..., "eval/<metric>": ...} over the loader's groups. Collective; `ctx.state` is left as it was."""
    trained = [role for role, how in algorithm.roles.items() if how == "train"]
    sums = Sums()
    terms: Counter[str] = Counter()
    units: Counter[str] = Counter()
    state, ctx.state = ctx.state, copy.deepcopy(ctx.state)
    training = {role: models.engines[role].module.training for role in trained}
    for role in trained:
        models.engines[role].module.eval()
    with torch.no_grad():
        for index in range(loader.steps_per_epoch):
            batch = loader.batch(index)
            prepared = algorithm.prepare(ctx.at(index), batch)
            sums.add(prepared.metrics)
            units.update(algorithm.units(prepared.groups))
            for role in trained:
                for part in models.micro_batches(role, prepared.groups, range(len(prepared.groups))):
                    micro = cut(prepared, part, models.device)
                    out = models.forward(role, micro.groups, entropy="entropy" in algorithm.needs)
                    loss = getattr(algorithm, f"{role}_loss")(out, micro)
                    sums.add(loss.metrics)
                    for unit, term in loss.terms.items():
                        terms[unit] += float(term)  # type: ignore[assignment]
    for role in trained:
        models.engines[role].module.train(training[role])
    ctx.state = state
    names = sorted(units)
    flat = dist.total([float(x) for n in names for x in (terms[n], units[n])], models.device)
    loss_value = sum(flat[2 * i] / flat[2 * i + 1] for i in range(len(names)) if flat[2 * i + 1])
    means = {"loss": loss_value, **sums.reduced(models.device)}
    return {f"eval/{name}": value for name, value in means.items()}
