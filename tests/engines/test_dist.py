"""Threads a rank, and errors that every rank learns of."""

from __future__ import annotations

import pytest
from support import RankPool

from dsalign import endings
from dsalign.engines import dist


def test_ranks_share_the_cores() -> None:
    """16 cores: 16 threads for one rank, 8 for two, 5 for three, never none."""
    assert [dist.threads(16, n) for n in (1, 2, 3, 64)] == [16, 8, 5, 1]


def one_rank_fails(failing: int) -> list[str]:
    """What each rank raises when `failing` cannot build its part."""

    def build() -> int:
        if dist.rank() == failing:
            raise ValueError("no such file: rows.jsonl")
        return dist.rank()

    try:
        said = f"built {dist.together(build)}"
    except ValueError as error:
        said = f"{type(error).__name__}: {error}"
    return [dist.from_rank_0(said), said]


def one_rank_is_stopped(rank: int, also_fails: bool) -> list[tuple[str, int, str]]:
    """(name, exit code, text) of what each rank raises where ranks agree, while `rank` has a reason to stop."""

    def build() -> None:
        if also_fails and dist.rank() == rank:
            raise ValueError("no such file")

    def pending() -> Exception | None:
        return endings.Stopped("stopped by SIGTERM") if dist.rank() == rank else None

    said = ("", 0, "")
    try:
        with dist.stoppable(pending):
            dist.together(build)
    except Exception as error:
        said = (type(error).__name__, getattr(error, "code", 2), str(error))
    dist.together(lambda: None)  # no place to stop any more
    return dist.everyones(said)


def gathered() -> tuple[list[float], list[float], int]:
    """Collectives over ranks that bring 0 and 1 numbers, 1 and 2 as numbers."""
    rank = dist.rank()
    device = dist.torch.device("cpu")
    numbers = dist.torch.arange(rank, dtype=dist.torch.float64) + 7
    return dist.gather(numbers, device).tolist(), dist.total([rank + 1.0, 0.5], device), dist.largest(rank, device)


def test_an_error_on_one_rank_stops_all_and_is_said_once(two_ranks: RankPool) -> None:
    """Rank 1 fails: rank 0, which did not, hears from where and why."""
    assert two_ranks.run(one_rank_fails, 1)[0] == "ElsewhereError: rank 1 stopped: no such file: rows.jsonl"
    assert two_ranks.run(one_rank_fails, 0)[0] == "ValueError: no such file: rows.jsonl"
    assert two_ranks.run(one_rank_fails, 9)[0] == "built 0"


def test_a_reason_to_stop_on_one_rank_stops_all_with_its_exit_code(two_ranks: RankPool) -> None:
    """The rank that was told says it; an error of its own comes first."""
    elsewhere = ("ElsewhereError", 75, "rank 1 stopped: stopped by SIGTERM")
    assert two_ranks.run(one_rank_is_stopped, 1, False) == [elsewhere, ("Stopped", 75, "stopped by SIGTERM")]
    first, second = two_ranks.run(one_rank_is_stopped, 1, True)
    assert (first[:2], second) == (("ElsewhereError", 2), ("ValueError", 2, "no such file"))
    assert two_ranks.run(one_rank_is_stopped, 9, False) == [("", 0, "")] * 2


def test_collectives(two_ranks: RankPool) -> None:
    """Rank 0 has no number and rank 1 has 7: gathered [7]; 1 + 2 = 3 and 0.5 + 0.5 = 1; the largest rank is 1."""
    assert two_ranks.run(gathered) == ([7.0], [3.0, 1.0], 1)


@pytest.mark.parametrize("failing", [0, 9])
def test_one_rank_needs_no_agreement(one_rank: RankPool, failing: int) -> None:
    """A single process raises its own error or returns."""
    said = one_rank.run(one_rank_fails, failing)[1]
    assert said == ("ValueError: no such file: rows.jsonl" if failing == 0 else "built 0")


def agreed_or_not() -> list[bool]:
    """Whether errors are known to every rank: one that `agree` raised, one made from it, one of this rank alone."""
    found = [dist.is_agreed(ValueError("alone")), dist.is_agreed(None)]
    try:
        try:
            dist.agree(ValueError("rows") if dist.rank() == 0 else None)
        except ValueError as error:
            found.append(dist.is_agreed(error))
            raise KeyError from error
    except KeyError as error:
        found.append(dist.is_agreed(error))
    return found


def test_an_agreed_error_is_known_as_one(two_ranks: RankPool) -> None:
    assert two_ranks.run(agreed_or_not) == [False, False, True, True]


def test_frames_that_wait_for_other_ranks() -> None:
    """torch's collectives anywhere in the stack; this file and DeepSpeed's handles only where they are innermost."""
    torch_file = str(dist.td.distributed_c10d.__file__)
    deepspeed_file = f"{dist.DEEPSPEED}/runtime/zero/partition_parameters.py"
    assert dist.is_collective(torch_file, "all_reduce", innermost=False)
    assert dist.is_collective(deepspeed_file, "wait", innermost=True)
    assert not dist.is_collective(deepspeed_file, "forward", innermost=True)
    assert dist.is_collective(dist.__file__, "total", innermost=True)
    assert not dist.is_collective(dist.__file__, "together", innermost=False), "what it calls may take long"
