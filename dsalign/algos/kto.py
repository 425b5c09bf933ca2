"""KTO: alignment from single completions labelled desirable or undesirable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dsalign.contract.algorithm import Algorithm, Context, Traits, check_choice, check_range, with_reference
from dsalign.contract.groups import Batch, Fused, Loss, Metric, MicroBatch, Output, Prepared
from dsalign.contract.maths import entropy_metric, mean

if TYPE_CHECKING:
    from dsalign.contract.groups import Group


def mismatch_shift(prompts: Sequence[str]) -> tuple[int, int]:
    """The rotation that gives each prompt another prompt's completion: (shift, matches).

    It is the smallest shift >= 1 for which the fewest prompts i equal prompt i + shift (mod n); matches is that number,
    mostly 0. prompts: n >= 2 texts.
    """
    n = len(prompts)
    matches = {s: sum(prompts[i] == prompts[(i + s) % n] for i in range(n)) for s in range(1, n)}
    shift = min(matches, key=lambda s: (matches[s], s))
    return shift, matches[shift]


def mismatched(groups: Sequence[Group], max_length: int) -> tuple[list[Group], int]:
    """The mismatched pairs from which KTO estimates z0: (pairs, matches).

    pairs: each group of the global batch with the completion of another group, cut so that prompt and completion have
    at most max_length tokens. matches: how many of these completions answer an equal prompt.
    """
    shift, matches = mismatch_shift([g.prompt_text for g in groups])
    others = [*groups[shift:], *groups[:shift]]
    rooms = [max(1, max_length - len(g.prompt)) for g in groups]
    pairs = [
        dataclasses.replace(group, completions=(other.completions[0][:room],))
        for group, other, room in zip(groups, others, rooms, strict=True)
    ]
    return pairs, matches


@dataclass(frozen=True, kw_only=True)
class KTO(Algorithm):
    """Kahneman-Tversky optimisation, arXiv:2402.01306, eq. 8; or APO-zero on single completions, arXiv:2408.06266."""

    beta: float = 0.1  # reward a nat, > 0
    desirable_weight: float = 1.0  # lambda_D, >= 0
    undesirable_weight: float = 1.0  # lambda_U, >= 0
    loss_type: str = "kto"  # kto or apo_zero_unpaired

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0, open_low=True)
        check_range("desirable_weight", self.desirable_weight, 0)
        check_range("undesirable_weight", self.undesirable_weight, 0)
        check_choice("loss_type", self.loss_type, ("kto", "apo_zero_unpaired"))

    @property
    def traits(self) -> Traits:
        """The traits by loss type: kto needs a global batch of two groups, as z0 takes another group's completion."""
        roles = {"policy": "train", "reference": "frozen"}
        return Traits(data="labels", roles=roles, min_groups=2 if self.loss_type == "kto" else 1)

    def notes(self, groups: Sequence[Group]) -> list[str]:
        """Lines on the balance of labels; the paper wants lambda_D n_D / (lambda_U n_U) in [1, 4/3] (section 4.2)."""
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

    def prepare(self, ctx: Context, batch: Batch) -> Prepared:
        """Compute the field "reference", log-probabilities of completion tokens, and for kto the shared number
        z0 = max(0, mean of Delta over the mismatched pairs of the global batch), nats."""
        if self.loss_type != "kto":
            return with_reference(ctx, batch)
        n, own = len(batch.groups), batch.local
        pairs, matches = mismatched(batch.groups, ctx.max_length)
        if matches:
            ctx.warn("kto: some mismatched completions answer an equal prompt, which biases z0 upwards")
        mine = [pairs[i] for i in batch.mine]
        both = ctx.logps("reference", [*own, *mine])  # in one call: group and mismatched pair share a prompt
        policy, reference = ctx.logps("policy", mine), both[len(own) :]
        gap = sum(float((p.double() - r.double()).sum()) for p, r in zip(policy, reference, strict=True))
        z0 = max(0.0, ctx.total([gap])[0] / n)
        metrics = {"kl": (z0 * len(own), len(own))}
        return Prepared(own, {"reference": both[: len(own)]}, shared={"z0": z0}, metrics=metrics)

    def units(self, batch: MicroBatch) -> Mapping[str, int]:
        return {"examples": len(batch.groups)}

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
        """The kernel of the losses of labelled completions; apo_zero_unpaired is kto with z0 = 0."""
        recipe = {
            "losses": {"kto": 1.0},
            "beta": self.beta,
            "desirable_weight": self.desirable_weight,
            "undesirable_weight": self.undesirable_weight,
            "z0": batch.shared.get("z0", 0.0),
        }
        return Fused("labels", recipe, reference=True)

    def derived(self, means: Mapping[str, float]) -> dict[str, float]:
        """The metric rewards/margins, of a step that has desirable and undesirable rows."""
        if not {"rewards/chosen", "rewards/rejected"} <= means.keys():
            return {}
        return {"rewards/margins": means["rewards/chosen"] - means["rewards/rejected"]}
