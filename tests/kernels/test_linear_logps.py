"""`linear_logps` and `linear_loss` against float64: every scheme, both implementations, odd shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dsalign_kernels import Impl, Logps, linear_logps, linear_loss, reference, selective_logps
from dsalign_kernels.head import chunk_rows
from dsalign_kernels.linear_logps import scheme

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLS = ("torch", "triton")
PLAIN: dict[str, Any] = {}
CAPPED = {"scale": 1.3, "softcap": 3.0, "temperature": 0.7}
IGNORED = -100


def inputs(n: int, d: int, v: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [n, d], weight [v, d], bias [v], targets [n] with the first of many ignored, loss gradients [n]."""
    draw = torch.Generator().manual_seed(1000 * n + v)
    hidden, weight = torch.randn(n, d, generator=draw), torch.randn(v, d, generator=draw) * 3 / d**0.5
    targets = torch.randint(v, (n,), generator=draw)
    targets[: n // 4] = IGNORED
    g = torch.randn(n, generator=draw)
    bias = torch.randn(v, generator=draw)
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), bias.to(DEVICE, dtype), targets.to(DEVICE), g.to(DEVICE)


def run(
    function: Any,
    case: tuple[Tensor, ...],
    dtype: torch.dtype,
    *,
    trained: bool = True,
    biased: bool = True,
    **more: Any,
) -> tuple[Logps, list[Tensor]]:
    """What it returns, and the gradients of sum g logp in hidden and, where trained, in weight and bias."""
    hidden, weight, bias, targets, g = case
    h = hidden.to(dtype).requires_grad_()
    w, b = weight.to(dtype).requires_grad_(trained), bias.to(dtype).requires_grad_(trained)
    out = function(h, w, targets, bias=b if biased else None, entropy=True, top=True, **more)
    wanted = [h, *([w] if trained else []), *([b] if trained and biased else [])]
    return out, list(torch.autograd.grad(out.logps, wanted, g.to(out.logps.dtype)))


def near(found: Tensor, twin: Tensor, exact: Tensor, rounding: float) -> None:
    """The error against float64, relative to the largest number, is at most plain torch's and one rounding."""
    size = exact.abs().max().clamp_min(1e-30)
    worst, of_twin = (float((x.double() - exact).abs().max() / size) for x in (found, twin))
    assert worst <= of_twin + rounding, f"off by {worst:.3g}, plain torch by {of_twin:.3g}, allowed {rounding:.3g} more"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("how", [PLAIN, CAPPED], ids=["plain", "softcap"])
@pytest.mark.parametrize("chunks", ["one", "many"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("n, d, v", [(1, 8, 7), (33, 72, 257), (9, 40, 4099)])
def test_equals_float64(
    n: int, d: int, v: int, trained: bool, chunks: str, how: dict[str, Any], impl: str, poisoned: None
) -> None:
    """Log-probabilities, log-sum-exp, entropy, arg-max and all gradients; one chunk ("kept"), or five rows a chunk
    ("recomputed", the weight's gradient in slices of the vocabulary)."""
    case = inputs(n, d, v)
    head_bytes = 2**30 if chunks == "one" else 4 * v * 5
    exact, exact_grads = run(reference.linear_logps, case, torch.float64, trained=trained, **how)
    twin, twin_grads = run(reference.linear_logps, case, torch.float32, trained=trained, **how)
    found, grads = run(linear_logps, case, torch.float32, trained=trained, head_bytes=head_bytes, impl=impl, **how)
    for name in ("logps", "lse", "entropy"):
        near(getattr(found, name).detach(), getattr(twin, name).detach(), getattr(exact, name).detach(), 2e-6)
    assert torch.equal(found.top, exact.top)
    for one, two, want in zip(grads, twin_grads, exact_grads, strict=True):
        near(one, two, want, 4e-6)
    assert (found.logps.dtype, grads[0].shape) == (torch.float32, (n, d))


@pytest.mark.parametrize("chunks", ["one", "many"])
@pytest.mark.parametrize("n, d, v", [(4097, 9, 300), (70, 9, 128256)])
def test_many_rows_and_a_large_vocabulary(n: int, d: int, v: int, chunks: str) -> None:
    """More rows than are taken at a time, and a vocabulary of many tiles with a tail."""
    case = inputs(n, d, v)
    head_bytes = 2**30 if chunks == "one" else 2**20
    exact, exact_grads = run(reference.linear_logps, case, torch.float64)
    twin, twin_grads = run(reference.linear_logps, case, torch.float32)
    found, grads = run(linear_logps, case, torch.float32, head_bytes=head_bytes, impl="torch")
    for name in ("logps", "lse", "entropy"):
        near(getattr(found, name).detach(), getattr(twin, name).detach(), getattr(exact, name).detach(), 2e-6)
    for one, two, want in zip(grads, twin_grads, exact_grads, strict=True):
        near(one, two, want, 4e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("how", [PLAIN, CAPPED], ids=["plain", "softcap"])
@pytest.mark.parametrize("head_bytes", [2**30, 8 * 9 * 3], ids=["one", "many"])
def test_gradcheck(head_bytes: int, how: dict[str, Any], impl: Impl) -> None:
    """Float64 stays float64 whatever is asked for, and every gradient is that of finite differences, kept and
    recomputed."""
    hidden, weight, bias, targets, _ = inputs(5, 4, 9, torch.float64)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def logps(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_logps(h, w, targets, bias=b, head_bytes=head_bytes, impl=impl, **how).logps

    assert torch.autograd.gradcheck(logps, leaves)


@pytest.mark.parametrize("impl", IMPLS)
def test_tokens_that_cannot_be(impl: str) -> None:
    """A bias of -inf, on a whole tile too: probability and gradient 0 there, and no NaN."""
    hidden, weight, bias, targets, g = inputs(3, 8, 200)
    bias[:150] = -math.inf
    case = (hidden, weight, bias, targets.clamp_min(0) // 4 + 150, g)
    exact, exact_grads = run(reference.linear_logps, case, torch.float64, trained=False)
    found, grads = run(linear_logps, case, torch.float32, trained=False, head_bytes=3 * 4 * 64, impl=impl)
    torch.testing.assert_close(found.logps.detach().double(), exact.logps.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[0].double(), exact_grads[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("chunks", ["one", "many"])
def test_sixteen_bits(chunks: str, impl: str, dtype: torch.dtype) -> None:
    """Within plain torch's error at the same dtype and a rounding of it, for log-probabilities and gradients."""
    case = inputs(33, 72, 257, dtype)
    exact, exact_grads = run(reference.linear_logps, case, torch.float64)
    twin, twin_grads = run(reference.linear_logps, case, dtype)
    head_bytes = 2**30 if chunks == "one" else 2 * 257 * 5
    found, grads = run(linear_logps, case, dtype, head_bytes=head_bytes, impl=impl)
    near(found.logps.detach(), twin.logps.detach(), exact.logps.detach(), 1e-5)
    for one, two, want in zip(grads, twin_grads, exact_grads, strict=True):
        assert one.dtype == dtype
        near(one, two, want, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("impl", IMPLS)
def test_float16_keeps_small_gradients(impl: str) -> None:
    """Coefficients of 1e-7: a float16 logits' gradient would be 0; the range is kept outside of it."""
    hidden, weight, bias, targets, g = inputs(33, 72, 257, torch.float16)
    case = (hidden, weight, bias, targets, g * 1e-3)
    _, exact = run(reference.linear_logps, case, torch.float64, biased=False)
    _, found = run(linear_logps, case, torch.float16, biased=False, impl=impl)
    for one, want in zip(found, exact, strict=True):
        assert float((one.double() - want).norm() / want.norm()) < 0.02


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("how", [PLAIN, CAPPED], ids=["plain", "softcap"])
def test_loss_by_parts(impl: str, how: dict[str, Any]) -> None:
    """A loss that is no sum of its log-probabilities: -log sigmoid of the difference of two halves, of three parts, one
    of them empty; its value and gradients times 2 equal those through whole logits in float64."""
    hidden, weight, bias, targets, _ = inputs(20, 24, 257)
    parts, starts = [8, 0, 12], [0, 8, 8]

    def loss(i: int, logps: Tensor, entropy: Tensor | None) -> Tensor:
        assert entropy is not None and not entropy.requires_grad and len(logps) == parts[i]
        half = parts[i] // 2
        return -torch.nn.functional.logsigmoid(0.1 * (logps[:half].sum() - logps[half:].sum()))

    def total(dtype: torch.dtype, fused: bool) -> tuple[Tensor, ...]:
        h, w, b = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
        if fused:
            value = linear_loss(h, w, targets, parts, loss, bias=b, entropy=True, impl=impl, **how)  # type: ignore[arg-type]
        else:
            all_ = reference.linear_logps(h, w, targets, bias=b, entropy=True, **how)
            assert all_.entropy is not None
            value = sum(
                (
                    loss(i, all_.logps[s : s + n], all_.entropy[s : s + n])
                    for i, (s, n) in enumerate(zip(starts, parts, strict=True))
                ),
                torch.zeros((), dtype=dtype, device=DEVICE),
            )
        return value.detach(), *torch.autograd.grad(2 * value, [h, w, b])

    for found, twin, exact in zip(
        total(torch.float32, True), total(torch.float32, False), total(torch.float64, False), strict=True
    ):
        near(found, twin, exact, 4e-6)


def test_by_hand() -> None:
    """State 1, weights (0, ln 3): probabilities 1/4, 3/4; d log p_0 / d state = -3/4 ln 3, d weights: 3/4, -3/4."""
    state = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [math.log(3)]], requires_grad=True)
    found = linear_logps(state, weight, torch.tensor([0]), entropy=True, top=True)
    found.logps.sum().backward()
    torch.testing.assert_close(found.logps.detach(), torch.tensor([-math.log(4)]))
    torch.testing.assert_close(found.lse, torch.tensor([math.log(4)]))
    assert state.grad is not None and weight.grad is not None and found.top is not None and not found.top.any()
    torch.testing.assert_close(state.grad, torch.tensor([[-0.75 * math.log(3)]]))
    torch.testing.assert_close(weight.grad, torch.tensor([[0.75], [-0.75]]))


def test_no_rows() -> None:
    """Empty results, and gradients of zero."""
    hidden, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(9, 4, requires_grad=True)
    found = linear_logps(hidden, weight, torch.zeros(0, dtype=torch.long))
    found.logps.sum().backward()
    assert found.logps.shape == (0,) and weight.grad is not None and not weight.grad.any()


def test_without_gradient_nothing_is_kept() -> None:
    """Under no_grad, with weights that require one: no graph."""
    hidden, weight, _, targets, _ = inputs(33, 72, 257)
    with torch.no_grad():
        assert not linear_logps(hidden, weight.requires_grad_(), targets).logps.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
def test_target_outside_the_vocabulary_is_nan(impl: str) -> None:
    """No read beyond the row, and no number that looks like a log-probability."""
    logits, targets = torch.zeros(2, 5, device=DEVICE), torch.tensor([1, 7], device=DEVICE)
    found = selective_logps(logits, targets, impl=impl).logps
    assert math.isnan(float(found[1])) and float(found[0]) == pytest.approx(-math.log(5))


def test_schemes_by_hand() -> None:
    """A row of 100 is 400 bytes, or 200 in 16 bits; the work space holds 2 or 5 rows, and six times as many are kept,
    but for a float32 loss that adds over parts."""
    settings = {"gradient": True, "trained": True, "head_bytes": 1000}

    def name(rows: int, dtype: torch.dtype, largest: int | None = None) -> str:
        return scheme(rows, 100, dtype, **settings, largest_part=largest).name  # type: ignore[arg-type]

    assert [name(n, torch.float32) for n in (12, 13)] == ["kept", "recomputed"]
    assert [name(n, torch.float32, 2) for n in (2, 3)] == ["kept", "local"]
    assert [name(99, torch.float32, n) for n in (12, 13)] == ["local", "recomputed"]
    assert [name(n, torch.bfloat16, 2) for n in (30, 31)] == ["kept", "local"]
    assert [name(n, torch.float16, 2) for n in (30, 31)] == ["kept", "recomputed"]
    assert scheme(16, 100, torch.float32, gradient=True, trained=False, head_bytes=1000).products == 2
    assert scheme(16, 100, torch.float32, gradient=False, trained=False, head_bytes=1000).products == 1
    assert (chunk_rows(100, 4, 4000), chunk_rows(100, 4, 400 * 300), chunk_rows(100, 4, 1)) == (10, 256, 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (((2, 3), (4, 5), (2,)), r"hidden \[N, D\] and weight \[V, D\], got \(2, 3\) and \(4, 5\)"),
        (((2, 3), (4, 3), (3,)), r"targets \[N\] int64, got targets \(3,\)"),
    ],
)
def test_shapes_must_fit(arguments: tuple[tuple[int, ...], ...], message: str) -> None:
    """The message shows them."""
    hidden, weight, targets = arguments
    with pytest.raises(ValueError, match=message):
        linear_logps(torch.zeros(hidden), torch.zeros(weight), torch.zeros(targets, dtype=torch.long))


def test_other_refusals() -> None:
    """A bias of another size, parts that are not all rows, an implementation that does not exist."""
    hidden, weight, targets = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"bias: expected \[4\], got \(5,\)"):
        linear_logps(hidden, weight, targets, bias=torch.zeros(5))
    with pytest.raises(ValueError, match=r"add up to 2, got \[1\]"):
        linear_loss(hidden, weight, targets, [1], lambda i, logps, entropy: logps.sum())
    with pytest.raises(ValueError, match='expected "auto", "triton" or "torch", got \'cuda\''):
        linear_logps(hidden, weight, targets, impl="cuda")  # type: ignore[arg-type]


def test_triton_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for on a CPU without the interpreter."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"expected a GPU and the triton package, got a tensor on cpu"):
        linear_logps(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(2, dtype=torch.long), impl="triton")
