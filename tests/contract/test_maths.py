"""Ratios and KL estimates: by hand, to the last digits and at log ratios that nothing should survive."""

from __future__ import annotations

import math

import pytest
import torch

from dsalign.contract.maths import KL_ESTIMATORS, ratio, token_kl

FAR = [-100.0, -89.0, -25.0, 25.0, 89.0, 100.0]  # nats; e^89 is infinite in float32


def test_kl_of_a_token() -> None:
    """k1 is -1 + 0.5; k2 half its square; k3 e^0.5 - 1 - 0.5. Equal log-probabilities have 0, and k3 is never below."""
    logps, reference = torch.tensor([-1.0, -1.0, -3.0]), torch.tensor([-0.5, -1.0, -9.0])
    assert token_kl(logps, reference, "k1").tolist() == [-0.5, 0.0, 6.0]
    assert token_kl(logps, reference, "k2").tolist() == [0.125, 0.0, 18.0]
    want = [math.exp(0.5) - 1.5, 0.0, math.exp(-6) + 5]
    assert token_kl(logps, reference, "k3").tolist() == pytest.approx(want, rel=1e-6)


def test_k3_of_close_log_probabilities_keeps_its_digits() -> None:
    """A gap of d has d^2 / 2 (1 - d / 3 + ...): at 2^-12 that is 2^-25, below float32's spacing at 1, and not 0."""
    found = float(token_kl(torch.tensor([-1.0]), torch.tensor([-1.0 - 2**-12]), "k3"))
    assert found == pytest.approx(2**-25, rel=2e-3)


def test_slopes_of_kl_estimates() -> None:
    """At a gap of ln 2: 1, ln 2 and 1 - e^-ln 2."""
    slopes = {}
    for kind in KL_ESTIMATORS:
        logps = torch.tensor([math.log(2)], requires_grad=True)
        token_kl(logps, torch.zeros(1), kind).sum().backward()
        assert logps.grad is not None
        slopes[kind] = float(logps.grad)
    assert slopes == pytest.approx({"k1": 1.0, "k2": math.log(2), "k3": 0.5}, rel=1e-6)


def test_far_ratios_are_finite_and_have_no_slope() -> None:
    """Held at e^-20 and e^20."""
    change = torch.tensor(FAR, requires_grad=True)
    found = ratio(change)
    found.sum().backward()
    assert change.grad is not None and change.grad.tolist() == [0.0] * 6
    assert found.tolist() == pytest.approx([math.exp(-20)] * 3 + [math.exp(20)] * 3, rel=1e-6)


def test_k3_far_from_the_reference_never_leads_away_from_it() -> None:
    """Below -20 nats it is held at e^20 - 1 - 20 and has no slope: of the exponential alone held, the slope would be 1
    and lower a log-probability that is too low already. Above, g - 1 and its slope of 1 are exact."""
    gap = torch.tensor(FAR, requires_grad=True)
    found = token_kl(gap, torch.zeros(6), "k3")
    found.sum().backward()
    assert gap.grad is not None and gap.grad.tolist() == pytest.approx([0.0] * 3 + [1.0] * 3, abs=1e-9)
    assert found.tolist() == pytest.approx([math.exp(20) - 21] * 3 + [24.0, 88.0, 99.0], rel=1e-6)
