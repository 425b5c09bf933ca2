"""What a completion is worth: a reward model, python functions, or a weighted sum of both."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsalign import phases
from dsalign.config.schema import RunConfig
from dsalign.contract.groups import Group, Scores
from dsalign.data.tokens.templates import Template
from dsalign.engines import dist
from dsalign.models.tokenizer import decoder
from dsalign.rewards.functions import RewardFunction, call, check_columns, load_function, named_rows

if TYPE_CHECKING:
    from dsalign.engines.roles import Roles


class Rewards:
    """The weighted sum of the reward model, where the run has one, and of reward functions, in this order."""

    def __init__(
        self,
        roles: Roles,
        functions: Sequence[tuple[str, RewardFunction]],
        weights: Sequence[float],
        decode: Callable[[Sequence[int]], str],
        reading: Callable[[Sequence[Group]], Sequence[Group]] | None = None,
    ) -> None:
        """functions: (name, function), as `functions_of` has them. reading: the groups as the reward model reads them;
        None = the sampled ids.

        Raises ValueError where there is no source, or the weights are not one a source.
        """
        self._roles, self._decode, self._reading = roles, decode, reading
        self._has_model = "reward" in roles.engines
        self._functions = list(functions)
        count = self._has_model + len(self._functions)
        if count == 0:
            raise ValueError("reward: expected a reward, got none; give --reward_model or --reward_funcs")
        self._weights = list(weights) or [1.0] * count
        if len(self._weights) != count:
            raise ValueError(f"reward_weights: expected one for each of {count} rewards, got {len(self._weights)}")

    def __call__(self, groups: Sequence[Group], batch_size: int) -> Scores:
        """What the groups' completions are worth; batch_size: groups in a forward of the reward model. Collective.

        Raises ValueError on every rank where a source fails on any: it raises, or does not give one finite number a
        completion. The message names the source and the rows.
        """
        sources: dict[str, list[Tensor]] = {}
        if self._has_model:
            reading = self._reading
            read = dist.together(lambda: reading(groups)) if reading else groups
            sources["reward_model"] = self._roles.each_group("reward", read, batch_size)
        return dist.together(lambda: self._scores(groups, sources))  # a source that fails on one rank ends all

    def _scores(self, groups: Sequence[Group], sources: dict[str, list[Tensor]]) -> Scores:
        """The scores of this rank's groups. sources: of the reward model, where there is one."""
        for name, each in sources.items():
            _refuse(name, "a finite score", groups, each)
        for name, function in self._functions:
            short = name.rpartition(":")[2]
            sources[name if short in sources else short] = self._call(name, function, groups)
        parts = zip(*sources.values(), strict=True)
        total = [sum((w * x for w, x in zip(self._weights, p, strict=True)), torch.zeros(())) for p in parts]
        _refuse("reward_weights", "a sum of rewards that is finite", groups, total)
        return Scores(total, sources)

    def _call(self, name: str, function: Any, groups: Sequence[Group]) -> list[Tensor]:
        each = [(g, c) for g in groups for c in g.completions]
        if not each:  # a rank without rows
            return [torch.zeros(0) for _ in groups]
        columns = {key: [g.columns.get(key) for g, _ in each] for key in sorted({k for g in groups for k in g.columns})}
        texts = [self._decode(c) for _, c in each]
        prompts, rows = [g.prompt_text for g, _ in each], [g.where for g, _ in each]
        with phases.within("reward function"):
            rewards = call(name, function, prompts, texts, columns, rows)
        sizes = [len(g.completions) for g in groups]
        return list(torch.split(torch.tensor(rewards, dtype=torch.float32), sizes))


def _refuse(name: str, wanted: str, groups: Sequence[Group], scores: Sequence[Tensor]) -> None:
    """Raise ValueError where a score of a completion is not finite, with the number and the rows."""
    if not scores or bool(torch.isfinite(torch.cat(list(scores))).all()):
        return
    bad = [(g.where, float(x)) for g, each in zip(groups, scores, strict=True) for x in each if not math.isfinite(x)]
    raise ValueError(f"{name}: expected {wanted}, got {bad[0][1]} for {named_rows(row for row, _ in bad)}")


def functions_of(config: RunConfig, groups: Sequence[Group]) -> list[tuple[str, RewardFunction]]:
    """(name, function) of each reward function of a run, loaded for all of it; none where its algorithm asks for no
    reward.

    Raises ValueError where one cannot be loaded, or asks for a column that no group has.
    """
    judged = config.algorithm.traits.roles.get("reward") == "frozen"
    found = [(name, load_function(name)) for name in (config.models.reward_funcs if judged else ())]
    for name, function in found:
        check_columns(name, function, (group.columns for group in groups))
    return found


def rewards_of(
    config: RunConfig,
    roles: Roles,
    policy: Template,
    retemplate: Callable[[Sequence[Group]], Sequence[Group]] | None,
    functions: Sequence[tuple[str, RewardFunction]],
) -> Rewards | None:
    """The rewards of a run, None where its algorithm asks for none. policy: the template of the policy, whose tokenizer
    gives reward functions their text. functions: of `functions_of`."""
    if config.algorithm.traits.roles.get("reward") != "frozen":
        return None
    return Rewards(roles, functions, config.models.reward_weights, decoder(policy.tokenizer), retemplate)
