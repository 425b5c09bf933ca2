"""The same tokens whatever samples them: ranks, batches, engine, ZeRO stage, and a run that was stopped and resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
from identity_cases import SAVED, Found, Size, Way, trained, untrained
from support import RankPool, tiny_folder

WAYS = [Way(engine, rows) for engine in ("local", "plain") for rows in (64, 40, 24)]
WHOLE = Size(rollouts=3, samples=20, most=64)


@pytest.fixture(scope="module")
def peaked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose most probable token has 0.4 on average, and whose entropy is 2 nats."""
    return tiny_folder(tmp_path_factory.mktemp("peaked"), initializer_range=0.5)


def same(found: Found, want: Found) -> None:
    """Every way gives, of each rollout, the completions of the first."""
    for (step, way), completions in found.items():
        first = next(one for (at, _), one in want.items() if at == step)
        assert completions == first, f"rollout {step}, {way}: other tokens than the first run's"


def tokens(found: Found, way: Way) -> int:
    """The number of tokens that were sampled in one way after the checkpoint."""
    after = [completions for (step, each), completions in found.items() if each == way and step >= SAVED]
    return sum(len(c) for completions in after for answers in completions.values() for c in answers)


def test_other_engines_ranks_and_stages_sample_the_same_tokens(
    peaked: Path, one_rank: RankPool, two_ranks: RankPool, tmp_path: Path
) -> None:
    """Every level of every factor once. One rank at ZeRO 0, local in 64 rows and plain in 24; two at ZeRO 3, plain in
    64 rows, and resumed local in 7. Of weights without the step before the checkpoint the tokens are others."""
    size, first, last = Size(rollouts=2, samples=4, most=32), Way("local", 64), Way("local", 7)
    want, entropy = one_rank.run(trained, peaked, "0", size, first, [Way("plain", 24)], tmp_path / "1", False)
    assert 1 < entropy < 3, entropy
    straight, _ = two_ranks.run(trained, peaked, "3", size, Way("plain", 64), [], tmp_path / "2", False)
    resumed, _ = two_ranks.run(trained, peaked, "3", size, last, [], tmp_path / "2", True)
    for found in (want, straight, resumed):
        same(found, want)
    assert set(resumed) == {(SAVED, last)}, "a resumed run samples what was left"
    assert one_rank.run(untrained, peaked, size, first) != want[SAVED, first]
    assert tokens(want, first) > 500


@pytest.fixture(scope="module")
def wanted(peaked: Path, one_rank: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """At least 10,000 tokens after the checkpoint: of one rank at ZeRO 0, local, in 64 rows."""
    folder = tmp_path_factory.mktemp("wanted")
    found, _ = one_rank.run(trained, peaked, "0", WHOLE, WAYS[0], [], folder, False)
    assert tokens(found, WAYS[0]) >= 10_000
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "stage", "ways"), [(1, "0", (1, 3)), (1, "3", (4, 2)), (2, "0", (5, 0)), (2, "3", (2, 4))]
)
def test_10000_tokens_are_the_same_however_they_are_sampled(
    world: int, stage: str, ways: tuple[int, int], wanted: Found, peaked: Path, one_rank: RankPool,
    two_ranks: RankPool, tmp_path: Path,
) -> None:  # fmt: skip
    """All of {1, 2 ranks} x {ZeRO 0, 3} x {straight, resumed} x {plain, local} x {three batches}: each training samples
    in a way of its own, `ways` of the straight and the resumed one, and under its weights in the five others."""
    pool = {1: one_rank, 2: two_ranks}[world]
    for own, resumed in zip(ways, (False, True), strict=True):
        others = [way for way in WAYS if way != WAYS[own]]
        found, _ = pool.run(trained, peaked, stage, WHOLE, WAYS[own], others, tmp_path, resumed)
        assert len(found) == 2 * len(WAYS) + (not resumed)
        same(found, wanted)
