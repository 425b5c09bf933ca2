"""Evaluation: the training losses without gradient, summed over a held-out set and divided by the set's units."""

from __future__ import annotations

from collections import Counter

import torch

from dsalign import phases
from dsalign.contract.algorithm import Algorithm, loss_of
from dsalign.data.batches.loader import Loader
from dsalign.data.batches.packing import cut
from dsalign.engines import dist
from dsalign.engines.roles import Roles
from dsalign.loop.context import RunContext
from dsalign.loop.metrics import Sums


def evaluate(algorithm: Algorithm, roles: Roles, ctx: RunContext, loader: Loader) -> dict[str, float]:
    """The metrics {"eval/loss": ..., "eval/<metric>": ...} of an algorithm over all groups of `loader`, with the models
    in evaluation mode. `ctx.state` is left as it was. Collective. Raises Interrupted where ranks agree to stop."""
    traits = algorithm.traits
    sums = Sums()
    terms: Counter[str] = Counter()
    units: Counter[str] = Counter()
    modules = [roles.engines[name].module for name in roles.stepped(traits.trained)]
    training = [module.training for module in modules]
    for module in modules:
        module.eval()
    with torch.no_grad(), ctx.evaluation():
        for index in range(loader.steps_per_epoch):
            ctx.total([])  # a place to stop, as `prepare` may have none
            prepared = algorithm.prepare(ctx.at(index), loader.batch(index))
            everything = range(len(prepared.groups))
            sums.add(prepared.metrics)
            units.update(algorithm.units(cut(prepared, everything, torch.device("cpu"))))
            for role in traits.trained:
                for part in roles.micro_batches(role, prepared.groups, everything):
                    phases.mark()
                    micro = cut(prepared, part, roles.device)
                    loss = loss_of(
                        algorithm, role, roles.forward(role, micro.groups, entropy="entropy" in traits.needs), micro
                    )
                    sums.add(loss.metrics)
                    for unit, term in loss.terms.items():
                        terms[unit] += float(term)  # type: ignore[assignment]
    for module, was in zip(modules, training, strict=True):
        module.train(was)
    names = sorted(units)
    flat = dist.total([float(x) for n in names for x in (terms[n], units[n])], roles.device)
    loss_value = sum(flat[2 * i] / flat[2 * i + 1] for i in range(len(names)) if flat[2 * i + 1])
    means = {"loss": loss_value, **sums.reduced(roles.device)}
    return {f"eval/{name}": value for name, value in {**means, **algorithm.derived(means)}.items()}
