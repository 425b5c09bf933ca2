"""DPO and the losses of its family: functions of the log-ratios of a pair, alone or weighted together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from dsalign.contract.algorithm import Algorithm, Context, Traits, check_choice, check_range, with_reference
from dsalign.contract.groups import Batch, Fused, Loss, MicroBatch, Output, Prepared
from dsalign.contract.maths import chosen_nll, logsigmoid, pair, pair_metrics, pair_units
from dsalign.contract.preference_losses import (
    BY_LENGTH,
    DIVERGENCES,
    LOSS_ALIASES,
    LOSSES,
    REVERSE_KL_ONLY,
    SMOOTHED,
    SORTED,
    Ratios,
    partners,
)

if TYPE_CHECKING:
    from torch import Tensor

    from dsalign.contract.groups import Group


@dataclass(frozen=True, kw_only=True)
class DPO(Algorithm):
    """Direct preference optimisation, arXiv:2305.18290, and the losses of its family.

    Delta = logp_policy - logp_reference of a completion, h = Delta_c - Delta_r of a pair, z = beta h.
    """

    beta: float = 0.1  # reward a nat, > 0
    loss_type: tuple[str, ...] = ("sigmoid",)  # one or several of sigmoid, hinge, ipo, exo_pair, nca_pair, robust, ...
    loss_weights: tuple[float, ...] = ()  # any numbers, one a loss type; none = 1 each
    label_smoothing: float = 0.0  # probability that a label is flipped, in [0, 0.5)
    rpo_alpha: float = 1.0  # weight of the chosen completions' NLL (arXiv:2404.19733), >= 0
    ld_alpha: float = 1.0  # weight of tokens beyond the shorter length (LD-DPO, arXiv:2409.06411), in [0, 1]
    f_divergence_type: str = "reverse_kl"  # reverse_kl, forward_kl, js or alpha (arXiv:2309.16240)
    f_alpha_divergence_coef: float = 1.0  # a of the alpha divergence, any number; at 1 it is reverse_kl
    discopop_tau: float = 0.05  # temperature of discopop's mixture, > 0

    traits: ClassVar[Traits] = Traits(data="pairs", roles={"policy": "train", "reference": "frozen"})

    def __post_init__(self) -> None:
        check_range("beta", self.beta, 0, open_low=True)
        check_range("rpo_alpha", self.rpo_alpha, 0)
        check_range("ld_alpha", self.ld_alpha, 0, 1)
        check_range("discopop_tau", self.discopop_tau, 0, open_low=True)
        check_choice("f_divergence_type", self.f_divergence_type, DIVERGENCES)
        object.__setattr__(self, "loss_type", tuple(LOSS_ALIASES.get(name, name) for name in self.loss_type))
        if not self.loss_type:
            raise ValueError(f"loss_type: expected one or several of {', '.join(LOSSES)}, got none")
        for name in self.loss_type:
            check_choice("loss_type", name, tuple(LOSSES))
        if len(set(self.loss_type)) < len(self.loss_type):
            raise ValueError(f"loss_type: each loss once, got {' '.join(self.loss_type)}; use loss_weights")
        if self.loss_weights and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights: expected one for each of the {len(self.loss_type)} loss types, "
                f"got {len(self.loss_weights)}"
            )
        if self.loss_weights and not any(self.loss_weights) and not self.rpo_alpha:
            raise ValueError("loss_weights: expected one that is not 0, got none: nothing would be learnt; raise one")
        self._check_smoothing()
        if "sft" in self.loss_type and self.rpo_alpha > 0:
            raise ValueError("loss_type sft and rpo_alpha > 0 both add NLL(chosen); keep one, with --rpo_alpha 0")
        if self.f_divergence_type != "reverse_kl" and (refused := REVERSE_KL_ONLY.intersection(self.loss_type)):
            raise ValueError(
                f"f_divergence_type: {self.f_divergence_type} is not defined for loss_type "
                f"{', '.join(sorted(refused))}; leave it out, or take another loss_type"
            )
        if self.ld_alpha < 1 and (refused := BY_LENGTH.intersection(self.loss_type)):
            raise ValueError(
                f"ld_alpha: expected 1 with loss_type {', '.join(sorted(refused))}, which divides by length already, "
                f"got {self.ld_alpha}; set it to 1 or choose another loss_type"
            )

    def _check_smoothing(self) -> None:
        eps = self.label_smoothing
        if not 0 <= eps < 0.5:
            raise ValueError(f"label_smoothing: expected a number >= 0 and < 0.5, got {eps}")
        if eps > 0 and (unused := [t for t in self.loss_type if t not in SMOOTHED]):
            raise ValueError(f"label_smoothing: loss_type {', '.join(unused)} has no label smoothing; set it to 0")
        if eps == 0 and "exo_pair" in self.loss_type:
            raise ValueError("label_smoothing: loss_type exo_pair needs a number > 0 (its label has log eps), got 0.0")

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each loss type, by its name."""
        return dict(zip(self.loss_type, self.loss_weights or [1.0] * len(self.loss_type), strict=True))

    def units(self, batch: MicroBatch) -> Mapping[str, int]:
        return pair_units(batch)

    def prepare(self, ctx: Context, batch: Batch) -> Prepared:
        """Compute the field "reference", log-probabilities of completion tokens; for aot losses also each pair's
        partners, fields of one number a pair, from a sort over the whole global batch."""
        prepared = with_reference(ctx, batch)
        if not SORTED.intersection(self.loss_type):
            return prepared
        policy = ctx.logps("policy", batch.local)
        sides = [self._completion_sums(g, x) for g, x in zip(batch.local, policy, strict=True)]
        sides_ref = [
            self._completion_sums(g, x) for g, x in zip(batch.local, prepared.fields["reference"], strict=True)
        ]
        local = torch.tensor([[*p, *r] for p, r in zip(sides, sides_ref, strict=True)], dtype=torch.float64).view(-1, 4)
        order = torch.tensor([float(g.index) for g in batch.local], dtype=torch.float64)
        chosen, rejected, ref_chosen, ref_rejected = (ctx.gather(column) for column in local.unbind(1))
        every = ctx.gather(order)
        found = {
            "aot": partners(ref_chosen - ref_rejected, chosen - rejected, every),
            "rejected": partners(rejected - ref_rejected, chosen - ref_chosen, every),
            "chosen": partners(chosen - ref_chosen, rejected - ref_rejected, every),
        }
        where = {int(index): k for k, index in enumerate(every)}
        mine = [where[g.index] for g in batch.local]
        fields = {name: [x[k : k + 1].float() for k in mine] for name, x in found.items()}
        return dataclasses.replace(prepared, fields={**prepared.fields, **fields})

    def _completion_sums(self, group: Group, logps: Tensor) -> tuple[float, float]:
        """Sums over the chosen and the rejected completion of log-probabilities weighted by ld_alpha, in float64."""
        lengths = [len(c) for c in group.completions]
        chosen, rejected = logps.double().split(lengths)  # type: ignore[no-untyped-call]
        shared = min(lengths)
        first, second = (float(x[:shared].sum() + self.ld_alpha * x[shared:].sum()) for x in (chosen, rejected))
        return first, second

    def _token_weights(self, batch: MicroBatch) -> Tensor:
        """[N] weights: 1 for tokens up to the length of the pair's shorter completion, ld_alpha beyond it."""
        shorter = batch.lengths.view(-1, 2).amin(1).repeat_interleave(2)
        return torch.where(batch.position < shorter[batch.segment], 1.0, self.ld_alpha)

    def _divergence(self, delta: Tensor) -> Tensor:
        """Delta [S], or its transform by f_divergence_type; exponents are held at 80, where e^x still fits float32."""
        if self.f_divergence_type == "forward_kl":
            return -torch.exp(torch.clamp(-delta, max=80))
        if self.f_divergence_type == "js":
            return logsigmoid(delta)
        a = self.f_alpha_divergence_coef
        if self.f_divergence_type == "alpha" and a != 1:
            return torch.exp(torch.clamp((a - 1) * delta, max=80)) / (a - 1)
        return delta

    def policy_loss(self, out: Output, batch: MicroBatch) -> Loss:
        """The sum over pairs of their losses, weighted by `weights`, + rpo_alpha NLL(chosen)."""
        assert out.logps is not None
        weights = self._token_weights(batch)
        policy = batch.sum(weights * out.logps)
        delta = policy - batch.sum(weights * batch.fields["reference"])
        transformed = self._divergence(delta)
        ratios = Ratios(
            *pair(transformed),
            *pair(delta / batch.lengths),
            policy=pair(policy)[0] - pair(policy)[1],
            partners={name: batch.fields[name] for name in ("aot", "chosen", "rejected") if name in batch.fields},
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            tau=self.discopop_tau,
        )
        loss = torch.stack([weight * LOSSES[name](ratios).sum() for name, weight in self.weights.items()]).sum()
        nll = self.weights.get("sft", self.rpo_alpha) * chosen_nll(batch, out.logps)
        rewards = pair(self.beta * delta)
        return Loss(
            {"pairs": loss, "chosen_tokens": nll}, pair_metrics(batch, out, *rewards, means="ipo" in self.loss_type)
        )

    def fused(self, role: str, batch: MicroBatch) -> Fused | None:
        """The kernel of pair losses, which takes up to three of them; None for more, and for aot, as the kernel has no
        partners."""
        weights = self.weights
        nll = weights.pop("sft", self.rpo_alpha)
        if SORTED.intersection(weights) or len(weights) > 3:
            return None
        recipe = {
            "losses": weights or {"none": 1.0},
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "tau": self.discopop_tau,
            "divergence": self.f_divergence_type,
            "alpha": self.f_alpha_divergence_coef,
            "tail": self.ld_alpha,
        }
        return Fused("pairs", recipe, reference=True, nll=nll, means="ipo" in weights)
