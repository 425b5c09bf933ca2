"""What ranks write for each other outside collectives."""

from __future__ import annotations

from support import RankPool

from dsalign.engines import dist
from dsalign.engines.board import Board


def written() -> list[object]:
    """Each rank writes its number, reads the other's, and claims a key that only one can have."""
    board = Board("a test")
    board.write(f"rank {dist.rank()}", str(dist.rank() + 7))
    if dist.rank() == 0:
        board.write("first", "")
    dist.barrier()
    found = board.read(["rank 1", "rank 0"])
    first = board.claim("first", f"rank {dist.rank()}")
    again = board.claim("first", "too late")
    return [found, dist.everyones(first), again == first, Board("another").claim("first", "its own")]


def test_ranks_read_each_other_and_one_is_first(two_ranks: RankPool) -> None:
    found, first, again, other = two_ranks.run(written)
    assert found == ["8", "7"] and again and other == "its own"
    assert first in (["rank 0"] * 2, ["rank 1"] * 2)
