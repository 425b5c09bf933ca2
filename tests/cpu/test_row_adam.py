"""What is stepped by rows ends where AdamW of all rows ends, bit for bit, in less memory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_cases import Run, saved_and_resumed, stepped_by_rows
from support import Live, RankPool
from torch import Tensor, nn

from dsalign.cpu.give_memory_back import _resident
from dsalign.cpu.row_adam import SHARE, RowSteps, gradient_values

ROWS, WIDTH = 40, 6
# eight rows in the first five steps, eleven from the sixth on
LOOKED_UP = [[3, 5, 3], [5, 39], [0], [7, 3, 3, 3], [1, 2, 3, 4], [9, 10, 11], [20, 21], [3]]


def by_rows(weight: Tensor, **settings: Any) -> Any:
    """AdamW that steps sparse gradients by their rows."""
    made = torch.optim.AdamW([weight], fused=True, **settings)
    made.register_step_pre_hook(RowSteps())
    return made


def pair(**settings: Any) -> tuple[Any, Any, Any, Any]:
    """(a matrix, the same one, AdamW of the first by rows, AdamW of the second)."""
    weight = nn.Parameter(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)))
    twin = nn.Parameter(weight.detach().clone())
    return weight, twin, by_rows(weight, **settings), torch.optim.AdamW([twin], fused=True, **settings)


def backward(weight: Tensor, ids: list[int], seed: int) -> None:
    """Rows are looked up and weighed at random."""
    states = nn.functional.embedding(torch.tensor(ids), weight, sparse=True)
    (states * torch.randn(states.shape, generator=torch.Generator().manual_seed(seed))).sum().backward()


def step(optimizer: Any) -> None:
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_numbers_and_the_state_are_those_of_adamw(weight_decay: float) -> None:
    """Tokens that come again, stay away, and stand twice in a step; learning rates that change; from step 6 on more
    than a quarter of the rows has been seen, and all of them are stepped alike."""
    weight, twin, rows, theirs = pair(weight_decay=weight_decay, betas=(0.9, 0.95))
    sparse = []
    for i, ids in enumerate(LOOKED_UP):
        for optimizer in (rows, theirs):
            optimizer.param_groups[0]["lr"] = 0.1 / (1 + i)
        backward(weight, ids, i)
        twin.grad = weight.grad.to_dense()
        rows.step()
        sparse.append(weight.grad is None)
        theirs.step()
        rows.zero_grad()
        assert torch.equal(weight, twin), i
    assert sparse == [True] * 5 + [False] * 3, f"{SHARE} of {ROWS} rows are 10"
    ours, wanted = rows.state[weight], theirs.state[twin]
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in wanted)


def test_a_step_by_an_independent_adamw() -> None:
    """Two steps in float64 by the paper: row 3 in both, row 5 in the first, the others decay alone."""
    weight, _, rows, _ = pair(weight_decay=0.1, lr=0.01, betas=(0.9, 0.95), eps=1e-8)
    p = weight.detach().double().numpy().copy()
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, ids in enumerate(([3, 5, 3], [3]), 1):
        backward(weight, ids, t)
        g = weight.grad.to_dense().double().numpy()
        step(rows)
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        p = p - 0.01 * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8) + 0.1 * p)
    np.testing.assert_allclose(weight.detach().numpy(), p, rtol=1e-6, atol=1e-7)


def test_what_another_process_goes_on_with() -> None:
    """A state that was saved and read, by rows and by AdamW of all rows: both end where the first one ends."""
    weight, _, rows, _ = pair(lr=0.1)
    for i, ids in enumerate(LOOKED_UP[:3]):
        backward(weight, ids, i)
        step(rows)
    copies = [nn.Parameter(weight.detach().clone()) for _ in "ab"]
    again, plain = by_rows(copies[0], lr=0.1), torch.optim.AdamW([copies[1]], fused=True, lr=0.1)
    for other in (again, plain):
        other.load_state_dict(copy.deepcopy(rows.state_dict()))
    for i, ids in enumerate(LOOKED_UP[3:5], 3):
        backward(weight, ids, i)
        copies[1].grad = weight.grad.to_dense()
        step(rows)
        backward(copies[0], ids, i)
        step(again)
        plain.step()
    assert torch.equal(copies[0], weight) and torch.equal(copies[1], weight)


def test_no_tensor_of_all_rows_is_made() -> None:
    """2^16 rows of 256 are 64 MiB: neither a backward nor a step makes one, and two moments of them hold pages of the
    few that were looked up."""
    weight = nn.Parameter(torch.zeros(2**16, 256))
    rows = by_rows(weight, lr=0.1)
    backward(weight, [1, 2], 0)
    rows.zero_grad()
    before = _resident()
    with Live(weight) as live:
        backward(weight, list(range(0, 2**16, 2**10)), 0)
        step(rows)
    assert live.peak - 2 * 2**26 < 2**20, "two moments, and nothing else of that size"
    assert _resident() - before < 2**23


def test_numbers_of_a_gradient() -> None:
    """Of row 3, looked up twice with gradients 1, the sum; a dense gradient is itself; scaling them is scaling it."""
    weight = nn.Parameter(torch.ones(5, 2))
    nn.functional.embedding(torch.tensor([3, 1, 3]), weight, sparse=True).sum().backward()
    found = gradient_values(weight)
    assert found.tolist() == [[1.0, 1.0], [2.0, 2.0]]
    found.mul_(0.5)
    assert weight.grad is not None and weight.grad.to_dense()[:, 0].tolist() == [0.0, 0.5, 0.0, 1.0, 0.0]
    weight.grad = torch.ones(5, 2)
    assert gradient_values(weight) is weight.grad


@pytest.mark.parametrize("algo", ["rm", "dpo"])
def test_an_engine_on_one_rank_steps_by_rows(algo: str, tiny: Path, one_rank: RankPool, two_ranks: RankPool) -> None:
    """Three clipped steps, with and without: the same weights, but for the order in which squares make the norm. Two
    ranks do without."""
    by_rows, found = one_rank.run(stepped_by_rows, Run(algo, tiny), True)
    never, want = one_rank.run(stepped_by_rows, Run(algo, tiny), False)
    assert (by_rows, never) == (3, 0)
    assert found.keys() == want.keys() and all(np.abs(found[n] - want[n]).max() < 1e-6 for n in want)
    assert two_ranks.run(stepped_by_rows, Run(algo, tiny), True)[0] == 0


def test_a_run_on_one_rank_resumes(tiny: Path, one_rank: RankPool, tmp_path: Path) -> None:
    (losses, want, _), (losses_resumed, found, _) = one_rank.run(saved_and_resumed, Run("rm", tiny), tmp_path)
    assert losses_resumed == losses and all((found[n] == want[n]).all() for n in want)
