"""KTO: alignment from single completions labelled desirable or undesirable."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from dsalign.contract.algorithm import Context, check_choice, check_range, with_reference
from dsalign.contract.groups import Batch, Fused, Loss, Metric, MicroBatch, Output, Prepared
from dsalign.contract.maths import entropy_metric, mean

if TYPE_CHECKING:
    from dsalign.contract.groups import Group


def mismatch_shift(prompts: Sequence[str]) -> tuple[int, int]:
    """(shift, matches): the smallest shift >= 1 for which no prompt i equals prompt i + shift (mod n), else the shift
    with the fewest equal prompts. n >= 2."""
    n = len(prompts)
    matches = {s: sum(prompts[i] == prompts[(i + s) % n] for i in range(n)) for s in range(1, n)}
    shift = min(matches, key=lambda s: (matches[s], s))
    return shift, matches[shift]


def mismatched(groups: Sequence[Group], max_length: int) -> tuple[list[Group], int]:
    """(each prompt of a global batch with the completion of another example, cut to fit; how many of those answer an
    equal prompt)."""
    shift, matches = mismatch_shift([g.prompt_text for g in groups])
    others = [*groups[shift:], *groups[:shift]]
    rooms = [max(1, max_length - len(g.prompt)) for g in groups]
    pairs = [
        dataclasses.replace(group, completions=(other.completions[0][:room],))
        for group, other, room in zip(groups, others, rooms, strict=True)
    ]
    return pairs, matches


@dataclass(frozen=True, kw_only=True)
class KTO:
    """Kahneman-Tversky optimisation, arXiv:2402.01306, eq. 8; or APO-zero on single completions, arXiv:2408.06266."""

    beta: float = 0.1  # reward a nat, > 0
    desirable_weight: float = 1.0  # lambda_D, >= 0
    undesirable_weight: float = 1.0  # lambda_U, >= 0
    loss_type: str = "kto"  # kto or apo_zero_unpaired

    data: ClassVar[str] = "labels"
    roles: ClassVar[Mapping[str, str]] = {"policy": "train", "reference": "frozen"}
    learning_rates: ClassVar[Mapping[str, float]] = {"full": 1e-6, "lora": 5e-5}
    dropout: ClassVar[float] = 0.0
    epochs: ClassVar[int] = 1
    mini_batches: ClassVar[int] = 1
    temperature: ClassVar[float] = 1.0
    role_learning_rates: ClassVar[Mapping[str, float]] = {}
    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0, math.inf, open_low=True)
        check_range("desirable_weight", self.desirable_weight, 0, math.inf)
        check_range("undesirable_weight", self.undesirable_weight, 0, math.inf)
        check_choice("loss_type", self.loss_type, ("kto", "apo_zero_unpaired"))

    @property
    def min_groups(self) -> int:
        """A mismatched pair takes two examples."""
        return 2 if self.loss_type == "kto" else 1

    def notes(self, groups: Sequence[Group]) -> list[str]:
        """The balance of labels; the paper wants lambda_D n_D / (lambda_U n_U) in [1, 4/3] (section 4.2)."""
        desirable = sum(g.label is True for g in groups)
        undesirable = len(groups) - desirable
        lines = [f"kto: {desirable} desirable and {undesirable} undesirable rows"]
        weight = self.undesirable_weight * undesirable
        if desirable and weight and not 1 <= (ratio := self.desirable_weight * desirable / weight) <= 4 / 3:
            low, high = weight / desirable, weight / desirable * 4 / 3
            lines.append(
                f"kto: desirable_weight x desirable / (undesirable_weight x undesirable) = {ratio:.3g} is outside "
                f"[1, 4/3]; --desirable_weight between {low:.3g} and {high:.3g} would balance the classes"
            )
        return lines

    def asks(self, groups: Sequence[Group], max_length: int) -> list[Group]:
        """The mismatched pairs of a global batch."""
        return mismatched(groups, max_length)[0] if self.loss_type == "kto" else []

    def prepare(self, ctx: Context, batch: Batch) -> Prepared:
        """Reference log-probabilities, and z0 = max(0, mean Delta over mismatched pairs of the whole global batch)."""
        if self.loss_type != "kto":
            return with_reference(ctx, batch)
        n, own = len(batch.groups), batch.local
        pairs, matches = mismatched(batch.groups, ctx.max_length)
        if matches:
            ctx.warn(f"kto: {matches} of {n} mismatched completions answer an equal prompt; z0 is biased upwards")
        mine = [pairs[i] for i in batch.mine]
        both = ctx.logps("reference", [*own, *mine])  # one pass: their prompts are the same
        policy, reference = ctx.logps_beside("policy", own, mine), both[len(own) :]
        gap = sum(float((p.double() - r.double()).sum()) for p, r in zip(policy, reference, strict=True))
        z0 = max(0.0, ctx.total([gap])[0] / n)
        metrics = {"kl": (z0 * len(own), len(own))}
        return Prepared(own, {"reference": both[: len(own)]}, shared={"z0": z0}, metrics=metrics)

    def units(self, groups: Sequence[Group]) -> Mapping[str, int]:
        return {"examples": len(groups)}

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """desirable lambda_D (1 - sigmoid(beta (Delta - z0))), undesirable lambda_U (1 - sigmoid(beta (z0 - Delta)));
        apo_zero_unpaired: the same with z0 = 0."""
        assert out.logps is not None
        delta = batch.sum(out.logps - batch.fields["reference"])
        desirable = torch.tensor([bool(g.label) for g in batch.groups], dtype=torch.bool, device=delta.device)
        sign = desirable.float() * 2 - 1
        weight = torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        loss = weight * torch.sigmoid(-sign * self.beta * (delta - batch.shared.get("z0", 0.0)))
        rewards, sums = self.beta * delta.detach(), batch.sum(out.logps.detach())
        metrics: dict[str, Metric] = {
            "rewards/chosen": mean(rewards[desirable]),
            "rewards/rejected": mean(rewards[~desirable]),
            "logps/chosen": mean(sums[desirable]),
            "logps/rejected": mean(sums[~desirable]),
            **entropy_metric(out.entropy),
        }
        return Loss(terms={"examples": loss.sum()}, metrics=metrics)

    def fused(self, role: str, batch: MicroBatch) -> Fused:
        """The kernel of labelled completions."""
        recipe = {
            "losses": {"kto": 1.0},
            "beta": self.beta,
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
            "z0": batch.shared.get("z0", 0.0),
        }
        return Fused("labels", recipe)

    def stop(self, metrics: Mapping[str, float]) -> bool:
        return False
