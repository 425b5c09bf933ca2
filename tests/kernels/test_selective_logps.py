"""`selective_logps` against float64: never further off than plain torch at the same dtype, on odd shapes too."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsalign_kernels import Impl, reference, rows, selective_logps

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, VOCABULARIES = (0, 1, 3, 47), (5, 31, 1000, 4097)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = torch.finfo(torch.float32).eps


def inputs(n: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, v] with a spread like a model's, targets [n], weights of the gradient [n]."""
    draw = torch.Generator().manual_seed(1000 * n + v)
    logits = (5 * torch.randn(n, v, generator=draw)).to(dtype)
    return logits, torch.randint(v, (n,), generator=draw), torch.randn(n, generator=draw)


def plain(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(logits, 1).gather(1, targets[:, None])[:, 0]


def gradient(of: Tensor, leaf: Tensor, weights: Tensor) -> Tensor:
    return torch.autograd.grad(of, leaf, weights.to(of.dtype))[0]


def within(found: Tensor, twin: Tensor, exact: Tensor, rounding: float) -> None:
    """The error against float64 is at most that of plain torch and `rounding`."""
    worst, of_twin = ((x.double() - exact).abs().max() for x in (found, twin))
    assert worst <= of_twin + rounding, f"off by {worst:.3g}, plain torch by {of_twin:.3g}, rounding is {rounding:.3g}"


SHAPES = [(n, v) for n in ROWS for v in VOCABULARIES] + [(4097, 1000), (3, 128256), (1, 151936)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "v"), SHAPES)
def test_error_budget(n: int, v: int, dtype: torch.dtype) -> None:
    """Log-probabilities and their gradient, within what plain torch in float32 is off and one rounding.

    Rounding: a log-probability is z - lse, known to eps max|z|; a gradient is weight e^(z - lse), so known to that
    times the weight, and then rounded to the dtype of the logits.
    """
    logits, targets, weights = inputs(n, v, dtype)
    leaf, twin, exact = (x.requires_grad_() for x in (logits.clone(), logits.clone(), logits.double()))
    logps, _, _, _ = selective_logps(leaf, targets)
    logps_twin, logps_exact = plain(twin.float(), targets), plain(exact, targets)
    assert logps.shape == (n,) and logps.dtype == torch.float32
    grads = [gradient(x, y, weights) for x, y in ((logps, leaf), (logps_twin, twin), (logps_exact, exact))]
    assert grads[0].dtype == dtype and grads[0].shape == (n, v)
    if n == 0:
        return
    rounding = EPS * float(logits.abs().max())
    within(logps, logps_twin, logps_exact, rounding)
    largest = float(weights.abs().max())
    within(*grads, (rounding + torch.finfo(dtype).eps) * largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "v"), SHAPES)
def test_entropy(n: int, v: int, dtype: torch.dtype) -> None:
    """Within what plain torch is off and four roundings of the largest logit, however large the vocabulary is."""
    logits, targets, _ = inputs(n, v, dtype)
    _, _, entropy, _ = selective_logps(logits.clone().requires_grad_(), targets, entropy=True)
    assert entropy is not None and entropy.shape == (n,) and entropy.dtype == torch.float32
    assert not entropy.requires_grad
    if n == 0:
        return
    twin, exact = (-(x.exp() * x).sum(1) for x in (torch.log_softmax(y, 1) for y in (logits.float(), logits.double())))
    within(entropy, twin, exact, 4 * EPS * float(logits.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_stay_as_they_were(dtype: torch.dtype) -> None:
    """Neither pass writes to its input, so that whatever made the logits can have its own backward."""
    logits, targets, weights = inputs(3, 31, dtype)
    leaf = logits.clone().requires_grad_()
    logps, _, _, _ = selective_logps(leaf, targets, entropy=True)
    gradient(logps, leaf, weights)
    assert torch.equal(leaf.detach(), logits)


def test_backward_through_what_made_the_logits() -> None:
    """exp keeps its result for its own backward: here the logits themselves."""
    start, targets, weights = inputs(3, 31, torch.float32)
    one, other = (0.1 * start).requires_grad_(), (0.1 * start).requires_grad_()
    ours = gradient(selective_logps(torch.exp(one), targets)[0], one, weights)
    torch.testing.assert_close(ours, gradient(plain(torch.exp(other), targets), other, weights), rtol=1e-5, atol=1e-6)


def test_by_hand() -> None:
    """Logits (0, ln 3): probabilities 1/4 and 3/4; log 1/4 = -1.386294; the gradient of log p_0 is (3/4, -3/4).

    Entropy: ln 4 - 3/4 ln 3 = 0.562335.
    """
    logits = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
    logps, _, entropy, _ = selective_logps(logits, torch.tensor([0]), entropy=True)
    logps.sum().backward()
    assert entropy is not None and logits.grad is not None
    torch.testing.assert_close(logps.detach(), torch.tensor([-1.386294]))
    torch.testing.assert_close(entropy, torch.tensor([0.562335]))
    torch.testing.assert_close(logits.grad, torch.tensor([[0.75, -0.75]]))


def test_no_entropy_unless_asked() -> None:
    """The second value is None."""
    logits, targets, _ = inputs(3, 31, torch.float32)
    assert selective_logps(logits, targets)[2:] == (None, None)


def test_strided_rows() -> None:
    """Every second row of a wider tensor, as a slice of hidden positions gives it."""
    logits, targets, weights = inputs(47, 31, torch.float32)
    leaf, copy = logits.clone().requires_grad_(), logits[::2, 3:29].clone().requires_grad_()
    view, targets, weights = leaf[::2, 3:29], targets[::2] % 26, weights[::2]
    assert not view.is_contiguous()
    strided, dense = selective_logps(view, targets)[0], selective_logps(copy, targets)[0]
    assert torch.equal(strided, dense)
    assert torch.equal(gradient(strided, leaf, weights)[::2, 3:29], gradient(dense, copy, weights))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row a chunk gives what one chunk gives, to the rounding of a sum taken in another order."""
    logits, targets, weights = inputs(47, 1000, torch.float32)
    whole, parts = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    at_once, _, entropy_at_once, _ = selective_logps(whole, targets, entropy=True)
    grad_at_once = gradient(at_once, whole, weights)
    monkeypatch.setattr(rows, "CHUNK_BYTES", 4)
    by_row, _, entropy_by_row, _ = selective_logps(parts, targets, entropy=True)
    torch.testing.assert_close(by_row, at_once, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(entropy_by_row, entropy_at_once, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient(by_row, parts, weights), grad_at_once, rtol=1e-6, atol=1e-7)


def test_large_logits() -> None:
    """Logits of 1e4: e^z overflows, the log-probability of the largest is 0 and of the other -1e4."""
    logits = torch.tensor([[1e4, 0.0], [1e4, 0.0]], requires_grad=True)
    logps, _, entropy, _ = selective_logps(logits, torch.tensor([0, 1]), entropy=True)
    logps.sum().backward()
    assert logps.tolist() == [0.0, -1e4]
    assert entropy is not None and entropy.tolist() == [0.0, 0.0]
    assert logits.grad is not None and logits.grad.tolist() == [[0.0, 0.0], [-1.0, 1.0]]


@pytest.mark.parametrize("logits, targets", [((2, 3, 4), (2,)), ((2, 3), (3,)), ((2, 3), (2, 1))])
def test_shapes_must_fit(logits: tuple[int, ...], targets: tuple[int, ...]) -> None:
    """The message shows both shapes."""
    with pytest.raises(ValueError, match=r"logits \[N, V\] and targets \[N\], got \(2, 3") as caught:
        selective_logps(torch.zeros(logits), torch.zeros(targets, dtype=torch.long))
    assert str(targets) in str(caught.value)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype: torch.dtype, impl: str) -> None:
    """The gradient lies where the logits were, and is the one that a fresh tensor gets."""
    logits, targets, weights = (x.to(DEVICE) for x in inputs(3, 31, dtype))
    leaf = logits.clone().requires_grad_()
    work = leaf * 1
    grad = gradient(selective_logps(work, targets, in_place=True, impl=impl).logps, work, weights)  # type: ignore[arg-type]
    want = gradient(selective_logps(leaf, targets, impl="torch").logps, leaf, weights)
    assert grad.data_ptr() == work.data_ptr()
    torch.testing.assert_close(grad, want, atol=1e-6, rtol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [5, 4097, 128256])
def test_both_implementations(v: int, dtype: torch.dtype, impl: str) -> None:
    """Values, entropy, arg-max and gradient of ignored and kept rows, against float64."""
    logits, targets, weights = (x.to(DEVICE) for x in inputs(3, v, dtype))
    targets[1] = -100
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found = selective_logps(leaf, targets, entropy=True, top=True, impl=impl)  # type: ignore[arg-type]
    want = reference.selective_logps(exact, targets, entropy=True, top=True)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), atol=1e-5, rtol=1e-5)  # type: ignore[union-attr]
    grads = gradient(found.logps, leaf, weights), gradient(want.logps, exact, weights)
    torch.testing.assert_close(grads[0].double(), grads[1], atol=1e-5, rtol=2 * torch.finfo(dtype).eps)
    assert not grads[0][1].any() and float(found.logps.detach()[1]) == 0.0


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("how", [{}, {"softcap": 2.0, "scale": 1.5, "temperature": 0.7}], ids=["plain", "softcap"])
def test_gradcheck(how: dict[str, float], impl: Impl) -> None:
    """Float64 stays float64 whatever is asked for, and the gradient is that of finite differences."""
    logits, targets, _ = (x.to(DEVICE) for x in inputs(3, 7, torch.float64))
    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: selective_logps(x, targets, impl=impl, **how).logps, leaf)  # type: ignore[arg-type]
