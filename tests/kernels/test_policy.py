"""`gae`, `clipped_policy` and `clipped_value` against float64, on ragged completions, and by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dsalign_kernels import clipped_policy, clipped_value, gae, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLS = ("torch", "triton")
SHAPES = {"one": (1,), "ragged": (3, 1, 7, 2), "blocks": (1024, 1025, 2500), "none": ()}
EPS = torch.finfo(torch.float32).eps


def drawn(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def near(found: Tensor, exact: Tensor, rounding: float) -> None:
    """Relative to the largest number."""
    assert found.dtype == torch.float32 and found.shape == exact.shape
    if found.numel():
        size = max(1.0, float(exact.abs().max()))
        worst = float((found.double() - exact).abs().max()) / size
        assert worst <= rounding, f"off by {worst:.3g}, allowed {rounding:.3g}"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES)
def test_gae(lengths: tuple[int, ...], lam: float, impl: str, poisoned: None) -> None:
    """Advantages, and the numbers that whitening needs, over completions longer than a block too."""
    rewards, values = drawn(sum(lengths), 1), drawn(sum(lengths), 2)
    counts = torch.tensor(lengths, dtype=torch.int64, device=DEVICE)
    found = gae(rewards, values, counts, gamma=0.99, lam=lam, impl=impl)  # type: ignore[arg-type]
    exact = reference.gae(rewards.double(), values.double(), counts, gamma=0.99, lam=lam)
    for one, other in zip(found, exact, strict=True):
        near(one, other, 32 * EPS)
    if lengths:
        whole = exact.advantages
        n, mu = counts.double(), whole.mean()
        total = (exact.squares + n * (exact.means - mu) ** 2).sum()
        torch.testing.assert_close(total, ((whole - mu) ** 2).sum())


@pytest.mark.parametrize("impl", IMPLS)
def test_gae_by_hand(impl: str) -> None:
    """gamma 1/2, lam 1/2; rewards 0 0 1, values 2 4 8: delta 0 0 -7, A = -7/16 -7/4 -7. The second completion has one
    token: 3 - 1 = 2."""
    rewards, values = torch.tensor([0.0, 0.0, 1.0, 3.0]), torch.tensor([2.0, 4.0, 8.0, 1.0])
    counts = torch.tensor([3, 1], device=DEVICE)
    found = gae(rewards.to(DEVICE), values.to(DEVICE), counts, gamma=0.5, lam=0.5, impl=impl)  # type: ignore[arg-type]
    assert found.advantages.tolist() == [-0.4375, -1.75, -7.0, 2.0]
    assert found.means.tolist() == pytest.approx([-3.0625, 2.0]) and float(found.squares[1]) == 0.0


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_gae_at_the_ends_of_lam(lam: float, impl: str) -> None:
    """lam 1 is the return less the value, lam 0 the one-step error; and a completion of one token has r - V."""
    rewards, values = torch.tensor([1.0, -2.0, 4.0, 1.0]), torch.tensor([0.5, 1.5, -1.0, 0.5])
    want = [3 - 0.5, 2 - 1.5, 4 + 1] if lam else [1 + 1.5 - 0.5, -2 - 1 - 1.5, 4 + 1]
    counts = torch.tensor([3, 1], device=DEVICE)
    found = gae(rewards.to(DEVICE), values.to(DEVICE), counts, gamma=1.0, lam=lam, impl=impl)  # type: ignore[arg-type]
    assert found.advantages.tolist() == [*want, 0.5]


def graded(function: Any, twin: Any, x: Tensor, *others: Tensor, **more: Any) -> None:
    """Loss, metrics and gradient in x against the twin in float64."""
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    found = function(leaf, *others, **more)
    more.pop("impl")
    exact = twin(wide, *(y.double() if y.dtype == torch.float32 else y for y in others), **more)
    gradients = [torch.autograd.grad(3.0 * one.loss, y)[0] for one, y in ((found, leaf), (exact, wide))]
    near(found.loss.detach(), exact.loss.detach(), 16 * EPS * max(1, len(x)) ** 0.5)
    assert set(found.metrics) == set(exact.metrics)
    for name, value in exact.metrics.items():
        near(found.metrics[name], value, 16 * EPS * max(1, len(x)) ** 0.5)
    near(*gradients, 16 * EPS)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", [0, 1, 3, 1024, 2500])
def test_clipped_policy(size: int, impl: str, poisoned: None) -> None:
    """Ratios inside and outside of the range, advantages of both signs and 0."""
    old, change, advantages = drawn(size, 3) - 3, 0.3 * drawn(size, 4), drawn(size, 5)
    advantages[::3] = 0
    graded(clipped_policy, reference.clipped_policy, old + change, old, advantages, cliprange=0.2, scale=0.5, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES)
def test_clipped_value(lengths: tuple[int, ...], impl: str, poisoned: None) -> None:
    """The value after a completion has no gradient; nothing is left unwritten."""
    size = sum(lengths)
    segment = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)).to(DEVICE)
    old, returns, values = drawn(size, 6), drawn(size, 7), drawn(size + len(lengths), 8)
    graded(clipped_value, reference.clipped_value, values, old, returns, segment, cliprange=0.4, scale=0.25, impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_clipped_by_hand(impl: str) -> None:
    """rho = e^0 = 1, A = 2: loss -2, slope -2. rho = 2 > 1.2, A = 1: held at -1.2, no slope. V 3, old 1, R 0, eps 1:
    max(9, 4) / 2 = 4.5, slope 3; the value after the last token: 0."""
    logps = torch.tensor([-1.0, 0.0], device=DEVICE, requires_grad=True)
    old, advantages = torch.tensor([-1.0, -0.6931472], device=DEVICE), torch.tensor([2.0, 1.0], device=DEVICE)
    found = clipped_policy(logps, old, advantages, cliprange=0.2, impl=impl)  # type: ignore[arg-type]
    assert float(found.loss.detach()) == pytest.approx(-3.2) and float(found.metrics["clipfrac"]) == 1
    assert torch.autograd.grad(found.loss, logps)[0].tolist() == [-2.0, 0.0]
    values = torch.tensor([3.0, 9.0], device=DEVICE, requires_grad=True)
    before, goal, segment = (torch.tensor([x], device=DEVICE) for x in (1.0, 0.0, 0))
    value = clipped_value(values, before, goal, segment, cliprange=1.0, impl=impl)  # type: ignore[arg-type]
    assert float(value.loss.detach()) == 4.5 and torch.autograd.grad(value.loss, values)[0].tolist() == [3.0, 0.0]


def test_refusals() -> None:
    """Shapes that do not fit."""
    with pytest.raises(ValueError, match=r"rewards and values: expected \[N\] float32, got \(2,\).*\(3,\)"):
        gae(torch.zeros(2), torch.zeros(3), torch.tensor([2]), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="logps, old and advantages: expected"):
        clipped_policy(torch.zeros(2), torch.zeros(2), torch.zeros(2, 1), cliprange=0.2)
    with pytest.raises(ValueError, match=r"values \[N \+ S\] torch.float32 and segment \(2,\), got"):
        clipped_value(torch.zeros(3), torch.zeros(2), torch.zeros(2), torch.zeros(3, dtype=torch.long), cliprange=0.2)
