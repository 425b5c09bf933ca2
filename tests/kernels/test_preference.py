"""`preference` against float64 and against the algorithms' own files: losses, sums, metrics and the gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dsalign_kernels import Preference, Recipe, preference, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLS = ("torch", "triton")
SHAPES = {"one": (1, 1), "short": (3, 1, 2, 7, 1, 1), "long": (1500, 3, 1024, 1025), "many": (2,) * 40, "empty": ()}
EPS = torch.finfo(torch.float32).eps


def inputs(lengths: tuple[int, ...], spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Token log-probabilities of policy and reference, in nats, and the lengths."""
    draw = torch.Generator().manual_seed(sum(lengths))
    policy = -torch.rand(sum(lengths), generator=draw) * 4
    gap = spread * torch.randn(sum(lengths), generator=draw) / max(1, max(lengths, default=1)) ** 0.5
    return policy.to(DEVICE), (policy - gap).to(DEVICE), torch.tensor(lengths, dtype=torch.int64, device=DEVICE)


def both(
    lengths: tuple[int, ...], recipe: Recipe, impl: str, *, spread: float = 1.0, wide: bool = False, **more: Any
) -> tuple[Preference, Tensor]:
    """What it gives, and the gradient of twice its loss; wide: by the twin in float64."""
    policy, base, counts = inputs(lengths, spread)
    dtype = torch.float64 if wide else torch.float32
    leaf = policy.to(dtype).requires_grad_()
    kept = None if more.pop("no_reference", False) else base.to(dtype)
    if wide:
        found = reference.preference(leaf, counts, recipe, reference=kept, **more)
    else:
        found = preference(leaf, counts, recipe, reference=kept, impl=impl, **more)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(2.0 * found.loss, leaf)
    return found, gradient


def near(found: Tensor, exact: Tensor, size: float) -> None:
    """Within float32 of a sum of numbers as large as `size`."""
    assert found.dtype == torch.float32 and found.shape == exact.shape
    if found.numel():
        worst = float((found.double() - exact).abs().max())
        assert worst <= 8 * EPS * max(1.0, size), f"off by {worst:.3g}, size {size:.3g}"


def check(lengths: tuple[int, ...], recipe: Recipe, impl: str, **more: Any) -> None:
    """Loss, sums, metrics and gradient against the twin in float64."""
    found, gradient = both(lengths, recipe, impl, **more)
    exact, slopes = both(lengths, recipe, impl, wide=True, **more)
    assert set(found.metrics) == set(exact.metrics) and not found.sums.requires_grad
    total = float(exact.sums.abs().sum()) + float(exact.loss.detach().abs())
    near(found.sums, exact.sums, float(exact.sums.abs().max()) if lengths else 0.0)
    near(found.loss.detach(), exact.loss.detach(), total)
    for name, value in exact.metrics.items():
        assert not found.metrics[name].requires_grad
        near(found.metrics[name], value, total)
    # A slope is a function of a sum, so it is known to the rounding of the sum.
    largest = float(slopes.abs().max()) if lengths else 0.0
    rounding = 8 * EPS * (1 + recipe.beta * max(float(exact.sums.abs().max()) if lengths else 0.0, 1.0))
    torch.testing.assert_close(gradient.double(), slopes, rtol=rounding, atol=rounding * largest + 1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES)
def test_shapes(lengths: tuple[int, ...], impl: str, poisoned: None) -> None:
    """DPO with the NLL of chosen completions, over completions shorter and longer than a block, one pair and none."""
    check(lengths, Recipe({"sigmoid": 1.0}, beta=0.1), impl, scale=0.25, nll_scale=0.125)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [name for name in reference.PAIR_LOSSES if name != "none"])
def test_losses(name: str, impl: str) -> None:
    """Every loss, from differences near 0 and far from it."""
    eps = 0.1 if name in ("sigmoid", "exo_pair", "robust", "sigmoid_norm") else 0.0
    recipe = Recipe({name: 1.0}, beta=0.5, label_smoothing=eps, gamma=0.3, tau=0.4, mean_rewards=name == "odds_ratio")
    for spread in (1e-3, 1.0, 10.0):
        check(SHAPES["short"], recipe, impl, spread=spread)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_divergences(divergence: str, impl: str) -> None:
    """What stands in the place of Delta, and beyond the exponent that is held."""
    for spread in (1.0, 100.0):
        recipe = Recipe({"sigmoid": 1.0}, beta=0.1, divergence=divergence, alpha=0.5)
        if spread == 1.0 or divergence == "js":
            check(SHAPES["short"], recipe, impl, spread=spread)
        else:  # e^80: relative to the largest number
            found, exact = (both(SHAPES["short"], recipe, impl, spread=spread, wide=wide) for wide in (False, True))
            torch.testing.assert_close(found[0].loss.double(), exact[0].loss, rtol=1e-4, atol=0)
            torch.testing.assert_close(found[1].double(), exact[1], rtol=1e-3, atol=1e-3 * float(exact[1].abs().max()))


@pytest.mark.parametrize("impl", IMPLS)
def test_several_losses_no_reference_and_a_tail(impl: str) -> None:
    """A weighted sum of three; without a reference; tokens beyond the shorter completion at half weight."""
    check(SHAPES["short"], Recipe({"sigmoid": 0.8, "bco_pair": 0.2, "ipo": 1.5}, beta=0.1), impl, nll_scale=0.3)
    check(SHAPES["short"], Recipe({"sigmoid": 1.0, "none": 3.0}, beta=0.1), impl, no_reference=True)
    check(SHAPES["short"], Recipe({"hinge": 1.0}, beta=0.1, tail=0.5), impl)
    check(SHAPES["short"], Recipe({"none": 1.0}, beta=0.1), impl, nll_scale=1.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_kto(impl: str, poisoned: None) -> None:
    """Both weights, a z0, and a set with one class alone."""
    recipe = Recipe({"kto": 1.0}, beta=0.3, desirable_weight=1.2, undesirable_weight=0.7, z0=0.4)
    for flags in ((1, 0, 0, 1, 1, 0), (1,) * 6):
        check(SHAPES["short"], recipe, impl, desirable=torch.tensor(flags, dtype=torch.bool, device=DEVICE), scale=0.5)


@pytest.mark.parametrize("impl", IMPLS)
def test_by_hand(impl: str) -> None:
    """Delta 1 and -2, beta 1/2: z = 3/2, loss log(1 + e^-1.5) = 0.201413, slope -sigmoid(-1.5) / 2 = -0.091213 a token
    of the chosen. KTO, desirable, z0 0: 1 - sigmoid(1/2) = 0.377541."""
    policy, base = torch.tensor([-0.5, -1.5, -4.0]), torch.tensor([-1.0, -2.0, -2.0])
    leaf, counts = policy.to(DEVICE).requires_grad_(), torch.tensor([2, 1], device=DEVICE)
    found = preference(leaf, counts, Recipe({"sigmoid": 1.0}, beta=0.5), reference=base.to(DEVICE), impl=impl)  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(found.loss, leaf)
    torch.testing.assert_close(found.loss.detach().cpu(), torch.tensor(0.2014133))
    torch.testing.assert_close(gradient.cpu(), torch.tensor([-0.0912128, -0.0912128, 0.0912128]))
    assert found.sums.tolist() == [-2.0, -4.0] and float(found.metrics["rewards/margins"]) == 1.5
    one, flag = torch.tensor([2], device=DEVICE), torch.tensor([True], device=DEVICE)
    more = {"reference": base[:2].to(DEVICE), "desirable": flag, "impl": impl}
    kto = preference(leaf.detach()[:2], one, Recipe({"kto": 1.0}, beta=0.5), **more)  # type: ignore[arg-type]
    assert float(kto.loss) == pytest.approx(1 / (1 + math.exp(0.5)), abs=1e-6)


def test_twice_is_the_same() -> None:
    """The counter of finished programs is 0 again after a launch, and the order of the sums is fixed."""
    first, second = (both(SHAPES["many"], Recipe({"sigmoid": 1.0}, beta=0.1), "triton") for _ in range(2))
    assert torch.equal(first[0].loss, second[0].loss) and torch.equal(first[1], second[1])


def test_refusals() -> None:
    """Shapes and names, with what was expected."""
    logps, lengths, dpo = torch.zeros(3), torch.tensor([2, 1]), Recipe({"sigmoid": 1.0}, beta=0.1)
    with pytest.raises(ValueError, match=r"logps: expected \[N\] float32, got \(1, 3\)"):
        preference(logps[None], lengths, dpo)
    with pytest.raises(ValueError, match=r"reference: expected \(3,\) torch.float32, got \(2,\)"):
        preference(logps, lengths, dpo, reference=torch.zeros(2))
    with pytest.raises(ValueError, match=r"losses: expected one to three of none, sigmoid.*got bogus"):
        preference(logps, lengths, Recipe({"bogus": 1.0}, beta=0.1))
    with pytest.raises(ValueError, match=r"losses: expected one to three of .*got none$"):
        preference(logps, lengths, Recipe({}, beta=0.1))
    with pytest.raises(ValueError, match="lengths: expected a chosen and a rejected completion a pair, got 1"):
        preference(logps, torch.tensor([3]), dpo)
    with pytest.raises(ValueError, match=r"desirable: expected one a completion \(2,\), got \(3,\)"):
        preference(logps, lengths, Recipe({"kto": 1.0}, beta=0.1), desirable=torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="reference: kto needs"):
        preference(logps, lengths, Recipe({"kto": 1.0}, beta=0.1), desirable=torch.ones(2, dtype=torch.bool))
