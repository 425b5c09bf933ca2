"""What test_probe.py and test_view.py run on every rank: rollouts of real engines, and mistakes put into them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from online_cases import build, prompts
from torch import Tensor

from dsalign.algos.ppo import PPO
from dsalign.contract.groups import Sampled
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.engines import dist
from dsalign.engines.engine import whole
from dsalign.rollout import in_process, local, view
from dsalign.rollout.generate import Keys, Sampler
from dsalign.rollout.slots import Slots

HOW: dict[str, Any] = {"batch_size": 4, "steps": 2, "recorded": False, "rate": 1e-2, "max_new_tokens": 8}


def weights(engine: Any) -> list[Tensor]:
    parameters = list(engine.module.parameters())
    with whole(engine, parameters):
        return [p.detach().clone() for p in parameters]


def rollouts_of(folder: Path, stage: str, tuner: str) -> tuple[Any, Any]:
    """(a trainer that has taken two updates, so that an adapter is no longer zero; this rank's prompts)."""
    trainer = build(folder, PPO(num_ppo_epochs=1), stage=stage, tuner=tuner, **HOW)
    trainer.fit(lambda metrics: None)
    return trainer, [g for g in prompts(16) if g.index % dist.world_size() == dist.rank()]


def rolled(trainer: Any, groups: Any, samples: int, options: RolloutOptions) -> Sampled:
    """A rollout of the policy, probed."""
    rollout = Sampler(trainer.roles, "policy", options, frozenset({2}))
    return rollout.probed(*rollout.sample(groups, samples, Keys(1, 0, 0), options), options)


def unchanged(folder: Path, stage: str, tuner: str) -> bool:
    """Whether weights, hooks, mode and configuration are bit for bit as before, after a rollout by either engine; the
    ranks have different numbers of prompts."""
    trainer, mine = rollouts_of(folder, stage, tuner)
    engine = trainer.roles.engines["policy"]
    config = str(engine.module.model.config)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.module.modules()]
    before, training = weights(engine), engine.module.training
    for name in ("local", "plain"):
        options = RolloutOptions(max_new_tokens=6, rollout=name)
        rolled(trainer, mine if dist.rank() == 0 else mine[:3], 2, options)
    same = all(torch.equal(a, b) for a, b in zip(before, weights(engine), strict=True))
    kept = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in engine.module.modules()] == hooks
    return same and kept and engine.module.training == training and str(engine.module.model.config) == config


@contextmanager
def no_adapter(trainer: Any) -> Iterator[None]:
    with patch.object(view, "_merged", lambda layer: layer.get_base_layer()):
        yield


@contextmanager
def changed_view(change: Callable[[Any], None]) -> Iterator[None]:
    """A context in which every generation view is changed once it is made."""
    made = view.view_of

    def stale(*given: Any) -> Any:
        found = made(*given)
        change(found)
        return found

    with patch.object(view, "view_of", stale):
        yield


def of_its_own(module: Any, name: str, weight: Tensor) -> None:
    """Put another weight into a module of the view, and not into the trainer's."""
    module._parameters[name] = torch.nn.Parameter(weight, requires_grad=False)


def old_head(trainer: Any) -> Any:
    """The embedding is the trainer's, the head tied to it is an earlier copy."""

    def change(found: Any) -> None:
        head = found.get_output_embeddings()
        of_its_own(head, "weight", head.weight.detach().roll(1, 0))

    return changed_view(change)


@contextmanager
def skipped_sync(trainer: Any) -> Iterator[None]:
    """The engine sampled before the last step, and says so."""
    with patch.object(in_process, "version", lambda engine: engine.global_steps - 1):
        yield


def old_weights(trainer: Any) -> Any:
    """A view that outlives an optimizer step, as a captured graph or a second copy would, with a version that lies."""

    def change(found: Any) -> None:
        for module in found.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.dim() > 1:
                    of_its_own(module, name, parameter.detach() * 0.98)

    return changed_view(change)


@contextmanager
def old_prompts(trainer: Any) -> Iterator[None]:
    """Keys and values of the prompt are those of other weights."""
    update = Slots.update

    def stale(self: Slots, keys: Tensor, values: Tensor, layer: int, *more: Any, **named: Any) -> Any:
        if self._places is not None:
            update(self, keys * 0.9, values * 0.9, layer)
            return keys, values
        return update(self, keys, values, layer)

    with patch.object(Slots, "update", stale):
        yield


@contextmanager
def other_temperature(trainer: Any) -> Iterator[None]:
    decode = local.decode

    def hotter(model: Any, requests: Any, options: RolloutOptions, *more: Any) -> Any:
        return decode(model, requests, RolloutOptions(max_new_tokens=options.max_new_tokens), *more)

    trainer.roles.temperature = 0.7
    with patch.object(in_process.local, "decode", hotter):
        yield


FAULTS: dict[str, Callable[[Any], Any]] = {
    f.__name__: f for f in (no_adapter, old_head, skipped_sync, old_weights, old_prompts, other_temperature)
}


def faulty(folder: Path, stage: str, tuner: str, fault: str) -> str:
    """What the first rollout with a mistake in it says."""
    trainer, mine = rollouts_of(folder, stage, tuner)
    with FAULTS[fault](trainer):
        options = RolloutOptions(max_new_tokens=6, temperature=trainer.roles.temperature)
        try:
            rolled(trainer, mine, 1, options)
        except ValueError as error:
            return str(error)
    return ""


def gap(folder: Path, stage: str, tuner: str) -> tuple[bool, float]:
    """Whether a rollout's log-probabilities may serve as the trainer's, and how far they are from them at most."""
    trainer, mine = rollouts_of(folder, stage, tuner)
    options = RolloutOptions(max_new_tokens=6)
    found = rolled(trainer, mine, 2, options)
    theirs = trainer.roles.each_group("policy", found.groups)
    return found.exact, max(float((a - b).abs().max()) for a, b in zip(found.logps, theirs, strict=True))
