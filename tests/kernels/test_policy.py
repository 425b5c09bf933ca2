"""`gae` against its twin, and the kernels of PPO's clipped losses against the algorithm's own, in float64; by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dsalign.algos.ppo import PPO
from dsalign.contract.groups import MicroBatch, Output
from dsalign_kernels import clipped_policy, clipped_value, gae, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLS = ("torch", "triton")
HOW = ("algorithm", "kernel")  # PPO's own losses in float32, and the kernels
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


KERNELS = {"policy": clipped_policy, "value": clipped_value}
METRICS = {
    "policy": {
        "loss": "loss/policy_avg",
        "approxkl": "policy/approxkl_avg",
        "clipfrac": "policy/clipfrac_avg",
        "ratio": "val/ratio",
    },
    "value": {"loss": "loss/value_avg", "clipfrac": "val/clipfrac_avg"},
}


def run(how: str, role: str, eps: float, x: Tensor, segment: Tensor, fields: dict[str, Tensor]) -> tuple[Any, ...]:
    """Half of PPO's loss of a role, its metrics by the kernel's names, and the gradient of three times it; x: [N]
    log-probabilities or [N + S] values; fields: as in a micro-batch."""
    leaf = x.detach().clone().requires_grad_()
    if how == "kernel":
        others = {"policy": ("old", "advantages"), "value": ("values", "returns")}[role]
        more = (segment,) if role == "value" else ()
        found = KERNELS[role](leaf, *(fields[name] for name in others), *more, cliprange=eps, scale=0.5)
        loss, metrics = found.loss, dict(found.metrics)
    else:
        ppo = PPO(vf_coef=1.0, cliprange=eps, cliprange_value=eps)
        batch = MicroBatch((), segment, segment, segment, fields, {})  # the losses of tokens read no lengths
        said = getattr(ppo, f"{role}_loss")(Output.of(role, leaf), batch)
        loss = 0.5 * said.terms["tokens"]
        metrics = {name: said.metrics[whole][0] for name, whole in METRICS[role].items()}
    return loss.detach(), metrics, torch.autograd.grad(3.0 * loss, leaf)[0]


def graded(how: str, role: str, eps: float, x: Tensor, segment: Tensor, fields: dict[str, Tensor]) -> None:
    """Loss, metrics and gradient in x against the algorithm's own loss in float64."""
    loss, metrics, gradient = run(how, role, eps, x, segment, fields)
    wide = {name: y.double() for name, y in fields.items()}
    exact, sums, slopes = run("algorithm", role, eps, x.double(), segment, wide)
    near(loss, exact, 16 * EPS * max(1, len(x)) ** 0.5)
    assert set(metrics) == set(sums)
    for name, value in sums.items():
        near(metrics[name], value, 16 * EPS * max(1, len(x)) ** 0.5)
    near(gradient, slopes, 16 * EPS)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("size", [0, 1, 3, 1024, 2500])
def test_clipped_policy(size: int, how: str, poisoned: None) -> None:
    """Ratios inside and outside of the range, advantages of both signs and 0."""
    old, change, advantages = drawn(size, 3) - 3, 0.3 * drawn(size, 4), drawn(size, 5)
    advantages[::3] = 0
    graded(how, "policy", 0.2, old + change, torch.zeros(0), {"old": old, "advantages": advantages})


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("gap", [-100.0, -89.0, -25.0, -20.0, 0.0, 20.0, 25.0, 89.0, 100.0])
def test_tokens_far_from_the_old_policy(gap: float, advantage: float, how: str) -> None:
    """rho = e^(gap, held in +-20): loss max(-A rho, -A clip(rho, 0.8, 1.2)); its slope -A rho where that branch is the
    larger and the gap within 20, else 0. The squared gap is not held. `run` halves the loss, triples the gradient."""
    logp, old = min(gap, 0.0) - 1.0, -max(gap, 0.0) - 1.0  # so that float32 holds both, and their difference
    given = {name: torch.tensor([x], device=DEVICE) for name, x in (("old", old), ("advantages", advantage))}
    x, segment = torch.tensor([logp], device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    loss, metrics, gradient = run(how, "policy", 0.2, x, segment, given)
    rho = math.exp(max(-20.0, min(20.0, gap)))
    free, held = -advantage * rho, -advantage * max(0.8, min(1.2, rho))
    slope = free if free >= held and abs(gap) <= 20 else 0.0
    assert float(loss) == pytest.approx(0.5 * max(free, held), rel=1e-6)
    assert float(gradient) == pytest.approx(1.5 * slope, rel=1e-6)
    wanted = {"loss": max(free, held), "approxkl": gap**2 / 2, "clipfrac": float(held > free), "ratio": rho}
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("how", HOW)
def test_nan_is_not_hidden(how: str) -> None:
    """One NaN among the log-probabilities or the values makes the loss NaN; a minimum or maximum would drop it."""
    fields = {"old": [-1.0, -1.0], "advantages": [1.0, -1.0], "values": [0.0, 0.0], "returns": [1.0, 1.0]}
    given = {name: torch.tensor(x, device=DEVICE) for name, x in fields.items()}
    segment = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    loss, metrics, _ = run(how, "policy", 0.2, torch.tensor([-1.0, math.nan], device=DEVICE), segment, given)
    assert math.isnan(loss) and math.isnan(metrics["loss"]) and math.isnan(metrics["ratio"])
    loss, _, gradient = run(how, "value", 0.2, torch.tensor([0.0, math.nan, 0.0], device=DEVICE), segment, given)
    assert math.isnan(loss) and gradient[1].isnan() and float(gradient[0]) == -1.5


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES)
def test_clipped_value(lengths: tuple[int, ...], how: str, poisoned: None) -> None:
    """The value after a completion has no gradient; nothing is left unwritten."""
    size = sum(lengths)
    segment = torch.repeat_interleave(torch.tensor(lengths, dtype=torch.int64)).to(DEVICE)
    old, returns, values = drawn(size, 6), drawn(size, 7), drawn(size + len(lengths), 8)
    graded(how, "value", 0.4, values, segment, {"values": old, "returns": returns})


@pytest.mark.parametrize("how", HOW)
def test_clipped_by_hand(how: str) -> None:
    """rho = e^0 = 1, A = 2: loss -2, slope -2. rho = 2 > 1.2, A = 1: held at -1.2, no slope. V 3, old 1, R 0, eps 1:
    max(9, 4) / 2 = 4.5, slope 3; the value after the last token: 0. `run` halves the loss and triples the gradient."""
    fields = {"old": [-1.0, -0.6931472], "advantages": [2.0, 1.0], "values": [1.0], "returns": [0.0]}
    given = {name: torch.tensor(x, device=DEVICE) for name, x in fields.items()}
    segment = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    loss, metrics, gradient = run(how, "policy", 0.2, torch.tensor([-1.0, 0.0], device=DEVICE), segment, given)
    assert float(loss) == pytest.approx(-3.2 / 2) and float(metrics["clipfrac"]) == 1
    assert gradient.tolist() == [-2.0 * 1.5, 0.0]
    loss, _, gradient = run(how, "value", 1.0, torch.tensor([3.0, 9.0], device=DEVICE), segment, given)
    assert float(loss) == 4.5 / 2 and gradient.tolist() == [3.0 * 1.5, 0.0]


def test_refusals() -> None:
    """Shapes that do not fit."""
    with pytest.raises(ValueError, match=r"rewards and values: expected \[N\] float32, got \(2,\).*\(3,\)"):
        gae(torch.zeros(2), torch.zeros(3), torch.tensor([2]), gamma=1.0, lam=1.0)
    two, three = (torch.zeros(n, device=DEVICE) for n in (2, 3))
    with pytest.raises(ValueError, match="logps, old and advantages: expected"):
        clipped_policy(two, two, two[:, None], cliprange=0.2)
    with pytest.raises(
        ValueError, match=r"logps, old and advantages: expected \[N\] float32, got \(2,\) torch.float64"
    ):
        clipped_policy(two.double(), two.double(), two.double(), cliprange=0.2)
    with pytest.raises(ValueError, match=r"values \[N \+ S\] torch.float32 and segment \(2,\), got"):
        clipped_value(three, two, two, three.long(), cliprange=0.2)


def test_no_gpu_and_no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clipped losses have no implementation in torch, `gae` has one."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    two = torch.zeros(2)
    with pytest.raises(ValueError, match=r"clipped_policy: expected tensors on a GPU .* on cpu; .*the algorithm's own"):
        clipped_policy(two, two, two, cliprange=0.2)
    with pytest.raises(ValueError, match=r"clipped_value: expected tensors on a GPU .* on cpu; .*the algorithm's own"):
        clipped_value(torch.zeros(3), two, two, two.long(), cliprange=0.2)
    assert gae(two, two, torch.tensor([2]), gamma=1.0, lam=1.0).advantages.tolist() == [0.0, 0.0]
