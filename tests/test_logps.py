"""From hidden states to log-probabilities, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from dsalign.logps import LogitTransform, token_logps


def head() -> nn.Linear:
    """One state, logits (s, 0, 0)."""
    linear = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0], [0.0], [0.0]]))
    return linear


def test_token_logps_by_hand() -> None:
    """State log 2: probabilities 1/2, 1/4, 1/4; entropy 1.5 log 2. State 0: all 1/3, entropy log 3."""
    hidden = torch.tensor([[math.log(2)], [0.0]])
    logps, entropy = token_logps(hidden, head(), torch.tensor([0, 2]), LogitTransform(), entropy=True)
    torch.testing.assert_close(logps, torch.tensor([-math.log(2), -math.log(3)]))
    assert entropy is not None
    torch.testing.assert_close(entropy, torch.tensor([1.5 * math.log(2), math.log(3)]))
    assert not entropy.requires_grad


def test_nothing_that_is_not_asked_for() -> None:
    """No entropy; no row of no states; float32 whatever the states are."""
    head16 = head().bfloat16()
    targets = torch.empty(0, dtype=torch.int64)
    logps, entropy = token_logps(torch.empty(0, 1).bfloat16(), head16, targets, LogitTransform(), entropy=False)
    assert (logps.shape, logps.dtype, entropy) == ((0,), torch.float32, None)


def test_gradient_by_hand() -> None:
    """d log p_0 / d s = 1 - p_0 = 1/2 at log 2."""
    hidden = torch.tensor([[math.log(2)]], requires_grad=True)
    logps, _ = token_logps(hidden, head(), torch.tensor([0]), LogitTransform(), entropy=False)
    logps.sum().backward()
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.5]]))


def test_transform_by_hand() -> None:
    """Scale first, then the cap: 2 tanh(3 * 4 / 2); a logit of 0 stays."""
    z = torch.tensor([4.0, 0.0])
    torch.testing.assert_close(LogitTransform(3.0, 2.0)(z), torch.tensor([2 * math.tanh(6), 0.0]))
    torch.testing.assert_close(LogitTransform(scale=0.5)(z), torch.tensor([2.0, 0.0]))
    assert LogitTransform()(z) is z


@pytest.mark.parametrize(
    ("config", "want"),
    [
        (LlamaConfig(), LogitTransform()),
        (Gemma2Config(final_logit_softcapping=30.0), LogitTransform(softcap=30.0)),
        (Gemma2Config(final_logit_softcapping=None), LogitTransform()),
        (CohereConfig(logit_scale=0.0625), LogitTransform(scale=0.0625)),
        (GraniteConfig(logits_scaling=8.0), LogitTransform(scale=0.125)),
    ],
)
def test_transform_is_read_from_the_configuration(config: object, want: LogitTransform) -> None:
    assert LogitTransform.of(config) == want
