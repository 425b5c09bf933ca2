"""The kernel of preference losses against the algorithms' own losses in float64: losses, sums, metrics, gradient."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from dsalign import algos
from dsalign.contract.groups import Fused, Group, MicroBatch, Output
from dsalign.contract.maths import logp_metrics
from dsalign.contract.preference_losses import LOSSES, SMOOTHED, SORTED
from dsalign.data.batches.packing import micro_batch
from dsalign_kernels import Preference, Recipe, preference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HOW = ("algorithm", "kernel")  # what is held against the algorithm in float64: itself in float32, and the kernel
SHAPES = {"one": (1, 1), "short": (3, 1, 2, 7, 1, 1), "long": (1500, 3, 1024, 1025), "many": (2,) * 40, "empty": ()}
EPS = torch.finfo(torch.float32).eps
UNIT = {"pairs": 1.0, "chosen_tokens": 1.0, "examples": 1.0}


def inputs(lengths: tuple[int, ...], spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Token log-probabilities of policy and reference, in nats."""
    draw = torch.Generator().manual_seed(sum(lengths))
    policy = -torch.rand(sum(lengths), generator=draw) * 4
    gap = spread * torch.randn(sum(lengths), generator=draw) / max(1, max(lengths, default=1)) ** 0.5
    return policy.to(DEVICE), (policy - gap).to(DEVICE)


def batch_of(lengths: tuple[int, ...], base: Tensor | None, labels: tuple[int, ...], z0: float) -> MicroBatch:
    """Pairs, or single completions where there are labels; base: the reference's log-probabilities."""
    size = 1 if labels else 2
    groups = [
        Group(
            i, "", (1,), tuple((1,) * n for n in lengths[at : at + size]), "", label=bool(labels[i]) if labels else None
        )
        for i, at in enumerate(range(0, len(lengths), size))
    ]
    batch = micro_batch(groups, DEVICE, shared={"z0": z0})
    return batch if base is None else MicroBatch(**{**vars(batch), "fields": {"reference": base}})


def by_algorithm(algorithm: Any, batch: MicroBatch, leaf: Tensor, scales: Mapping[str, float]) -> Preference:
    """What the algorithm's own loss says, as the kernel's result; in the dtype of the log-probabilities."""
    loss = algorithm.policy_loss(Output(logps=leaf), batch)
    metrics = (
        loss.metrics if algorithm.traits.data == "labels" else loss.metrics | logp_metrics(batch, leaf, means=True)
    )
    found = {name: x[0].detach() for name, x in metrics.items() if name not in ("nll_loss", "entropy")}  # type: ignore[union-attr]
    if algorithm.traits.data == "labels":
        found["desirable"] = torch.tensor(sum(bool(g.label) for g in batch.groups), dtype=leaf.dtype, device=DEVICE)
    total = torch.stack([scales[unit] * term for unit, term in loss.terms.items()]).sum()
    return Preference(total, batch.sum(leaf.detach()), found)


def by_kernel(algorithm: Any, batch: MicroBatch, leaf: Tensor, scales: Mapping[str, float]) -> Preference:
    """The kernel, with the recipe that the algorithm names."""
    fused: Fused = algorithm.fused("policy", batch)
    labels = [bool(g.label) for g in batch.groups] if algorithm.traits.data == "labels" else None
    return preference(
        leaf,
        batch.lengths,
        Recipe(**fused.arguments, reference=fused.reference),
        reference=batch.fields.get("reference"),
        desirable=None if labels is None else torch.tensor(labels, dtype=torch.bool, device=DEVICE),
        scale=scales["pairs" if labels is None else "examples"],
        nll_scale=fused.nll * scales["chosen_tokens"],
    )


def run(
    how: str,
    name: str,
    options: Mapping[str, Any],
    lengths: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    spread: float = 1.0,
    scales: Mapping[str, float] = UNIT,
    labels: tuple[int, ...] = (),
    z0: float = 0.0,
) -> tuple[Preference, Tensor]:
    """What it gives, and the gradient of twice its loss. Without a reference the log-ratios take the place of the
    log-probabilities, so that their differences are as near 0 and as far from it as with one."""
    algorithm = algos.load(name)(**options)
    policy, base = inputs(lengths, spread)
    kept = base.to(dtype) if "reference" in algorithm.traits.roles else None
    leaf = (policy if kept is not None else policy - base).to(dtype).requires_grad_()
    batch = batch_of(lengths, kept, labels, z0)
    found = (by_kernel if how == "kernel" else by_algorithm)(algorithm, batch, leaf, scales)
    (gradient,) = torch.autograd.grad(2.0 * found.loss, leaf)
    return found, gradient


def near(found: Tensor, exact: Tensor, size: float) -> None:
    """Within float32 of a sum of numbers as large as `size`."""
    assert found.dtype == torch.float32 and found.shape == exact.shape
    if found.numel():
        worst = float((found.double() - exact).abs().max())
        assert worst <= 8 * EPS * max(1.0, size), f"off by {worst:.3g}, size {size:.3g}"


def check(how: str, name: str, options: Mapping[str, Any], lengths: tuple[int, ...], **more: Any) -> None:
    """Loss, sums, metrics and gradient against the algorithm's own loss in float64."""
    found, gradient = run(how, name, options, lengths, **more)
    exact, slopes = run("algorithm", name, options, lengths, dtype=torch.float64, **more)
    assert set(found.metrics) == set(exact.metrics) and not found.sums.requires_grad
    total = float(exact.sums.abs().sum()) + float(exact.loss.detach().abs())
    near(found.sums, exact.sums, float(exact.sums.abs().max()) if lengths else 0.0)
    near(found.loss.detach(), exact.loss.detach(), total)
    for metric, value in exact.metrics.items():
        assert not found.metrics[metric].requires_grad
        near(found.metrics[metric], value, total)
    # A slope is a function of a sum, so it is known to the rounding of the sum.
    largest = float(slopes.abs().max()) if lengths else 0.0
    beta = algos.load(name)(**options).beta
    rounding = 8 * EPS * (1 + beta * max(float(exact.sums.abs().max()) if lengths else 0.0, 1.0))
    torch.testing.assert_close(gradient.double(), slopes, rtol=rounding, atol=rounding * largest + 1e-9)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES)
def test_shapes(lengths: tuple[int, ...], how: str, poisoned: None) -> None:
    """DPO with the NLL of chosen completions, over completions shorter and longer than a block, one pair and none."""
    check(how, "dpo", {"rpo_alpha": 0.5}, lengths, scales={"pairs": 0.25, "chosen_tokens": 0.25})


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"dpo {name}": (
            "dpo",
            {
                "loss_type": (name,),
                "label_smoothing": 0.1 if name in SMOOTHED else 0.0,
                "discopop_tau": 0.4,
                "rpo_alpha": 0.0,
            },
        )
        for name in LOSSES
        if name not in SORTED
    },
    **{f"cpo {name}": ("cpo", {"loss_type": name, "cpo_alpha": 0.0}) for name in ("sigmoid", "hinge", "ipo")},
    "simpo": ("simpo", {"simpo_gamma": 0.3, "label_smoothing": 0.1, "cpo_alpha": 0.0}),
    "orpo": ("orpo", {}),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", CASES)
def test_losses(case: str, how: str) -> None:
    """Every loss, from differences near 0 and far from it."""
    name, options = CASES[case]
    for spread in (1e-3, 1.0, 10.0):
        scales = {"pairs": 1.0, "chosen_tokens": 0.0 if name == "orpo" else 1.0}
        check(how, name, {"beta": 0.5, **options}, SHAPES["short"], spread=spread, scales=scales)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", [*sorted(set(CASES) - {"dpo sft"}), "dpo forward_kl", "dpo js", "dpo alpha", "kto"])
def test_nan_is_not_hidden(case: str, how: str) -> None:
    """One NaN among the log-probabilities of a rejected completion makes every loss NaN."""
    divergence = {"f_divergence_type": case.removeprefix("dpo "), "f_alpha_divergence_coef": 0.5}
    name, options = CASES.get(case, ("kto", {}) if case == "kto" else ("dpo", divergence))
    algorithm = algos.load(name)(**{"beta": 0.5, **options})
    policy = torch.tensor([-1.0, -2.0, math.nan, -3.0, -1.0, -2.0], device=DEVICE)
    base = torch.full_like(policy, -1.5) if "reference" in algorithm.traits.roles else None
    lengths, labels = ((2, 1, 2, 1), ()) if algorithm.traits.data == "pairs" else ((2, 1, 2, 1), (1, 0, 0, 1))
    one = by_kernel if how == "kernel" else by_algorithm
    found = one(algorithm, batch_of(lengths, base, labels, 0.0), policy, UNIT)
    assert math.isnan(found.loss) and math.isnan(found.metrics["logps/rejected"])
    assert not math.isnan(found.metrics["logps/chosen"])


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_divergences(divergence: str, how: str) -> None:
    """What stands in the place of Delta, and beyond the exponent that is held."""
    options = {"f_divergence_type": divergence, "f_alpha_divergence_coef": 0.5, "rpo_alpha": 0.0}
    for spread in (1.0, 100.0):
        if spread == 1.0 or divergence == "js":
            check(how, "dpo", options, SHAPES["short"], spread=spread)
        else:  # e^80: relative to the largest number
            found, slopes = run(how, "dpo", options, SHAPES["short"], spread=spread)
            exact, wide = run("algorithm", "dpo", options, SHAPES["short"], spread=spread, dtype=torch.float64)
            torch.testing.assert_close(found.loss.double(), exact.loss, rtol=1e-4, atol=0)
            torch.testing.assert_close(slopes.double(), wide, rtol=1e-3, atol=1e-3 * float(wide.abs().max()))


@pytest.mark.parametrize("how", HOW)
def test_several_losses_a_tail_and_the_nll_alone(how: str) -> None:
    """A weighted sum of three, tokens beyond the shorter completion at half weight, and no loss of pairs at all."""
    three = {"loss_type": ("sigmoid", "bco_pair", "ipo"), "loss_weights": (0.8, 0.2, 1.5), "rpo_alpha": 0.3}
    check(how, "dpo", three, SHAPES["short"])
    check(how, "dpo", {"loss_type": ("hinge",), "ld_alpha": 0.5, "rpo_alpha": 0.0}, SHAPES["short"])
    check(how, "dpo", {"loss_type": ("sft",), "rpo_alpha": 0.0}, SHAPES["short"])


@pytest.mark.parametrize("how", HOW)
def test_kto(how: str, poisoned: None) -> None:
    """Both weights, a z0, and a set with one class alone."""
    options = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7}
    for labels in ((1, 0, 0, 1, 1, 0), (1,) * 6):
        check(how, "kto", options, SHAPES["short"], labels=labels, z0=0.4, scales={**UNIT, "examples": 0.5})


@pytest.mark.parametrize("how", HOW)
def test_by_hand(how: str) -> None:
    """Delta 1 and -2, beta 1/2: z = 3/2, loss log(1 + e^-1.5) = 0.201413, slope -sigmoid(-1.5) / 2 = -0.091213 a token
    of the chosen. KTO, desirable, z0 0: 1 - sigmoid(1/2) = 0.377541."""
    policy, base = torch.tensor([-0.5, -1.5, -4.0], device=DEVICE), torch.tensor([-1.0, -2.0, -2.0], device=DEVICE)
    one = by_kernel if how == "kernel" else by_algorithm
    dpo, leaf = algos.load("dpo")(beta=0.5, rpo_alpha=0.0), policy.requires_grad_()
    found = one(dpo, batch_of((2, 1), base, (), 0.0), leaf, UNIT)
    (gradient,) = torch.autograd.grad(found.loss, leaf)
    torch.testing.assert_close(found.loss.detach().cpu(), torch.tensor(0.2014133))
    torch.testing.assert_close(gradient.cpu(), torch.tensor([-0.0912128, -0.0912128, 0.0912128]))
    assert found.sums.tolist() == [-2.0, -4.0] and float(found.metrics["rewards/margins"]) == 1.5
    kto = one(algos.load("kto")(beta=0.5), batch_of((2,), base[:2], (1,), 0.0), leaf.detach()[:2], UNIT)
    assert float(kto.loss) == pytest.approx(1 / (1 + math.exp(0.5)), abs=1e-6)


def test_twice_is_the_same() -> None:
    """The counter of finished programs is 0 again after a launch, and the order of the sums is fixed."""
    first, second = (run("kernel", "dpo", {}, SHAPES["many"]) for _ in range(2))
    assert torch.equal(first[0].loss, second[0].loss) and torch.equal(first[1], second[1])


def test_refusals() -> None:
    """Shapes and names, with what was expected."""
    logps, lengths = torch.zeros(3, device=DEVICE), torch.tensor([2, 1], device=DEVICE)
    cpo, flags = Recipe({"sigmoid": 1.0}, beta=0.1), torch.ones(2, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match=r"logps: expected \[N\] float32, got \(1, 3\)"):
        preference(logps[None], lengths, cpo)
    with pytest.raises(ValueError, match=r"logps: expected \[N\] float32, got \(3,\) torch.float64"):
        preference(logps.double(), lengths, cpo)
    with pytest.raises(ValueError, match=r"losses: expected one to three of none, sigmoid.*got bogus"):
        preference(logps, lengths, Recipe({"bogus": 1.0}, beta=0.1))
    with pytest.raises(ValueError, match=r"losses: expected one to three of .*got none$"):
        preference(logps, lengths, Recipe({}, beta=0.1))
    with pytest.raises(ValueError, match="lengths: expected a chosen and a rejected completion a pair, got 1"):
        preference(logps, torch.tensor([3], device=DEVICE), cpo)
    with pytest.raises(ValueError, match=r"desirable: expected one a completion \(2,\), got \(1,\)"):
        preference(logps, lengths, Recipe({"kto": 1.0}, beta=0.1), desirable=flags[:1])


def test_a_reference_where_the_recipe_names_one_and_nowhere_else() -> None:
    """Either mismatch is an error, and so is a reference of another shape."""
    logps, lengths = torch.zeros(3, device=DEVICE), torch.tensor([2, 1], device=DEVICE)
    cpo, dpo = (Recipe({"sigmoid": 1.0}, beta=0.1, reference=has) for has in (False, True))
    with pytest.raises(ValueError, match=r"reference: expected \(3,\) torch.float32, got \(2,\)"):
        preference(logps, lengths, dpo, reference=logps[:2])
    with pytest.raises(ValueError, match=r"reference: the recipe of sigmoid subtracts the reference's .*got none"):
        preference(logps, lengths, dpo)
    with pytest.raises(ValueError, match=r"reference: the recipe of sigmoid subtracts none, got \(3,\); leave it out"):
        preference(logps, lengths, cpo, reference=logps)
    flags = torch.ones(2, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match=r"Recipe.reference: kto subtracts a reference, got False; set it to True"):
        preference(logps, lengths, Recipe({"kto": 1.0}, beta=0.1), reference=logps, desirable=flags)


def test_no_gpu_and_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has no implementation in torch: the algorithm has."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match=r"preference: expected tensors on a GPU .* on cpu; .*the algorithm's own loss"
    ):
        preference(torch.zeros(3), torch.tensor([2, 1]), Recipe({"sigmoid": 1.0}, beta=0.1))
