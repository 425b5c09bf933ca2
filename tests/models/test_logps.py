"""From hidden states to log-probabilities, by hand."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from support import Live
from torch import nn
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from dsalign.models import logps as module
from dsalign.models.logps import Head, HeadLoss, LogitTransform, whole_groups

PLAIN = Head(LogitTransform())


def head() -> nn.Linear:
    """One state, logits (s, 0, 0)."""
    linear = nn.Linear(1, 3, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[1.0], [0.0], [0.0]]))
    return linear


def test_token_logps_by_hand() -> None:
    """State log 2: probabilities 1/2, 1/4, 1/4; entropy 1.5 log 2. State 0: all 1/3, entropy log 3."""
    hidden = torch.tensor([[math.log(2)], [0.0]])
    logps, entropy = PLAIN.token_logps(hidden, head(), torch.tensor([0, 2]), entropy=True)
    torch.testing.assert_close(logps, torch.tensor([-math.log(2), -math.log(3)]))
    assert entropy is not None
    torch.testing.assert_close(entropy, torch.tensor([1.5 * math.log(2), math.log(3)]))
    assert not entropy.requires_grad


def test_nothing_that_is_not_asked_for() -> None:
    """No entropy; no row of no states; float32 whatever the states are."""
    head16 = head().bfloat16()
    targets = torch.empty(0, dtype=torch.int64)
    logps, entropy = PLAIN.token_logps(torch.empty(0, 1).bfloat16(), head16, targets, entropy=False)
    assert (logps.shape, logps.dtype, entropy) == ((0,), torch.float32, None)


def test_gradient_by_hand() -> None:
    """d log p_0 / d s = 1 - p_0 = 1/2 at log 2."""
    hidden = torch.tensor([[math.log(2)]], requires_grad=True)
    logps, _ = PLAIN.token_logps(hidden, head(), torch.tensor([0]), entropy=False)
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


SIZES = (3, 0, 4, 2, 7)  # targets of each group


def case() -> tuple[torch.Tensor, nn.Linear, torch.Tensor, torch.Tensor]:
    """States [16, 8], a head of 50, targets, and what each target's log-probability is worth."""
    draw = torch.Generator().manual_seed(0)
    linear = nn.Linear(8, 50, bias=True)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(50, 8, generator=draw))
        linear.bias.copy_(torch.randn(50, generator=draw))
    sizes = sum(SIZES)
    states = torch.randn(sizes, 8, generator=draw)
    return states, linear, torch.randint(50, (sizes,), generator=draw), torch.rand(sizes, generator=draw)


def squares(worth: torch.Tensor, seen: list[slice]) -> HeadLoss:
    """A loss that is no sum over targets: the square of each group's weighted sum."""
    bounds = [sum(SIZES[:i]) for i in range(len(SIZES) + 1)]

    def of(part: slice, logps: torch.Tensor, entropy: torch.Tensor | None) -> torch.Tensor:
        seen.append(part)
        assert entropy is not None and len(entropy) == len(logps) == bounds[part.stop] - bounds[part.start]
        weighted = logps * worth[bounds[part.start] : bounds[part.stop]]
        return torch.stack([x.sum() ** 2 for x in weighted.split(SIZES[part])]).sum()

    return HeadLoss(SIZES, of)


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (100, [slice(0, 5)]),  # kept: all logits at once
        (4, [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)]),  # local: 3 + 0, 4, 2, 7 rows
        (6, [slice(0, 2), slice(2, 4), slice(4, 5)]),
        (1, [slice(0, 5)]),  # recomputed: seven rows of one group are more than six
    ],
)
def test_the_loss_and_its_gradients_are_those_of_plain_torch(
    rows: int, parts: list[slice], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64 by autograd; which groups are taken together follows from the bytes for `rows` rows of logits."""
    keep_ratio = {100: 6, 4: 3, 6: 2, 1: 6}[rows]
    monkeypatch.setattr(sys.modules["dsalign_kernels.linear_logps"], "KEEP_RATIO", keep_ratio)
    states, linear, targets, worth = case()
    seen: list[slice] = []
    mine = states.clone().requires_grad_()
    head = Head(LogitTransform(scale=0.5, softcap=3.0), head_bytes=rows * 50 * 4)
    loss = head.token_loss(mine, linear, targets, squares(worth, seen), entropy=True)
    loss.backward()
    assert seen == parts

    wide, weight, bias = (x.detach().double().requires_grad_() for x in (states, linear.weight, linear.bias))
    logits = 3 * torch.tanh((wide @ weight.t() + bias) * 0.5 / 3)
    logps = torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]
    want = torch.stack([x.sum() ** 2 for x in (logps * worth.double()).split(SIZES)]).sum()
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    for found, exact in ((mine.grad, wide.grad), (linear.weight.grad, weight.grad), (linear.bias.grad, bias.grad)):
        assert found is not None and exact is not None
        assert float((found.double() - exact).norm() / exact.norm()) < 1e-6


def test_whole_groups_by_hand() -> None:
    """Neighbours up to the limit; a larger one alone; those of no target go along; none of none."""
    assert whole_groups([3, 3, 5, 1, 0, 9, 1], 6) == [slice(0, 2), slice(2, 5), slice(5, 6), slice(6, 7)]
    assert whole_groups([], 6) == [] and whole_groups([0], 6) == [slice(0, 1)]


def test_a_loss_over_targets_that_stand_once() -> None:
    """Three and two targets, of which the third is the first again, and the fifth the fourth: sizes of 2 and 1. Weights
    1 2 4 of -1 -3 -1 give -11, and 8 16 of -5 -5 give -120; the slopes of what stands twice add up."""
    worth, bounds = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), [0, 3, 5]

    def of(part: slice, logps: torch.Tensor, entropies: torch.Tensor | None) -> torch.Tensor:
        assert entropies is not None and torch.equal(entropies, -logps)
        return (logps * worth[bounds[part.start] : bounds[part.stop]]).sum()

    loss = HeadLoss([3, 2], of).over_unique_targets(torch.tensor([0, 1, 0, 2, 2]), (2, 1))
    assert loss.sizes == (2, 1)
    logps = torch.tensor([-1.0, -3.0, -5.0], requires_grad=True)
    first, second = logps[:2], logps[2:]
    assert [float(loss.of(slice(i, i + 1), x, -x)) for i, x in enumerate((first, second))] == [-11.0, -120.0]
    loss.of(slice(0, 2), logps, -logps).backward()
    assert logps.grad is not None and logps.grad.tolist() == [5.0, 2.0, 24.0]


def test_no_target_touches_every_weight() -> None:
    """What a rank without rows runs: a loss of 0 with a gradient of 0."""
    states, linear, _, _ = case()
    none = torch.empty(0, dtype=torch.int64)
    loss = PLAIN.token_loss(states[:0], linear, none, HeadLoss((), lambda *_: torch.zeros(())), entropy=False)
    loss.backward()
    assert float(loss.detach()) == 0 and linear.weight.grad is not None and not linear.weight.grad.any()


def test_another_head_keeps_its_logits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """An adapter on the head: its own forward runs."""

    class Adapted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.sum(-1, keepdim=True) * torch.arange(50)

    states, linear, targets, worth = case()
    adapted = Adapted(8, 50)
    adapted.load_state_dict(linear.state_dict())
    module._say.cache_clear()
    with caplog.at_level("INFO", logger="dsalign"):
        loss = PLAIN.token_loss(states, adapted, targets, squares(worth, []), entropy=True)
    want = torch.log_softmax(adapted(states), -1).gather(1, targets[:, None])[:, 0] * worth
    torch.testing.assert_close(loss, torch.stack([x.sum() ** 2 for x in want.split(SIZES)]).sum())
    assert "a Adapted is no plain linear layer: the logits of all completion tokens are in memory" in caplog.text


def peak_mib(targets: int, vocabulary: int, head_mib: int, *, trained: bool) -> float:
    """Of a loss over `targets` targets in groups of 16, forward and backward, less what grows by right: the gradients
    of weight and states."""
    states = torch.randn(targets, 16).requires_grad_()
    linear = nn.Linear(16, vocabulary, bias=False).requires_grad_(trained)
    ids = torch.zeros(targets, dtype=torch.int64)
    head = Head(LogitTransform(), head_mib * 2**20)
    with Live(states, linear.weight, ids) as live:
        loss = HeadLoss([16] * (targets // 16), lambda part, logps, _: logps.square().sum())
        head.token_loss(states, linear, ids, loss, entropy=False).backward()
    returned = 4 * 16 * (targets + vocabulary * trained)
    return (live.peak - returned) / 2**20


@pytest.mark.parametrize("trained", [False, True])
def test_memory_does_not_grow_with_pairs_or_vocabulary(trained: bool) -> None:
    """1024 targets of 8192 ids are 32 MiB of logits, of 32768 128 MiB: with 2 MiB for them there are 2 MiB of
    them at a time, and less than 1 MiB of everything else."""
    small = peak_mib(1024, 8192, 2, trained=trained)
    assert 1.5 < small < 3
    assert peak_mib(2048, 8192, 2, trained=trained) < small + 0.5
    assert peak_mib(1024, 32768, 2, trained=trained) < small + 0.5
