"""When a rank is taken for lost or hung, by numbers."""

from __future__ import annotations

import pytest

from dsalign.guard.peers import Beat, Loss, Peers, limit_of
from dsalign.guard.vitals import Card, Doing, State
from dsalign.phases import Past

STEADY = {"micro-batch": [0.2, 1.5, 0.3], "optimizer step": [0.1, 0.1], "rollout": [30.0]}
CARDS = [Card(rank, f"node{rank}", 100 + rank, "1", "", "10.0.0.1", 9) for rank in range(4)]


def limit(
    phase: str, *, doing: Doing = "nothing", waits: bool = False, seconds: dict[str, list[float]] = STEADY,
    work: float = 1.0,
) -> float:  # fmt: skip
    """The limit after such seconds of intervals, each of them with 100 units of work in the phase micro-batch."""
    past = {name: Past() for name in seconds}
    for name, each in seconds.items():
        for one in each:
            past[name].add(one, 100.0 if name == "micro-batch" else 1.0)
    return limit_of(phase, past, doing=doing, waits=waits, peer_timeout=600.0, work=work)


def test_limits_come_from_the_run() -> None:
    """10 x 1.5 s is 15 s; 10 x 0.1 s is below the least, 8 s where nothing computes and 180 s where something may."""
    assert limit("micro-batch") == 15.0 and limit("optimizer step") == 8.0
    assert limit("micro-batch", doing="other") == 180.0
    assert limit("micro-batch", waits=True) == 180.0, "who waits for others tells nothing by being idle"
    assert limit("micro-batch", seconds={**STEADY, "micro-batch": [100.0, 1.0]}) == 600.0, "never above --peer_timeout"


def test_who_computes_has_as_long_as_its_work_may_take() -> None:
    """Twenty micro-batches of 100 tokens in 0.5 s, the longest in 2: 100 tokens may take 10 x 2 s, 1,000 may 200 s. One
    less, or a rollout, whose passes over prompts are few and long, shows nothing: 10 x the longest ever, 180 s or more.
    """
    seen = {**STEADY, "micro-batch": [0.5] * 19 + [2.0], "rollout": [40.0] + [0.1] * 60}
    assert limit("micro-batch", doing="computes", seconds=seen, work=100.0) == 20.0
    assert limit("micro-batch", doing="computes", seconds=seen, work=1000.0) == 200.0
    assert limit("micro-batch", doing="computes", seconds=seen, work=10.0) == 10.0, "the least"
    assert limit("micro-batch", doing="computes", seconds={**seen, "micro-batch": [0.5] * 19}, work=100.0) == 180.0
    assert limit("rollout", doing="computes", seconds=seen) == 400.0 and limit("rollout", seconds=seen) == 8.0


@pytest.mark.parametrize("doing", ["nothing", "computes", "other"])
def test_what_waits_for_something_outside_has_minutes(doing: Doing) -> None:
    """10 x the longest save ever and 30 x the longest reward, of which ten were seen, and at least 600 / 6 s."""
    seen = {**STEADY, "save": [2.0] * 2, "prepare": [45.0] + [0.1] * 70, "log": [0.1]}
    seen["reward function"] = [0.1] * 9 + [12.0]
    assert limit("save", doing=doing, seconds=seen) == 100.0 and limit("prepare", doing=doing, seconds=seen) == 450.0
    assert limit("reward function", doing=doing, seconds=seen) == 360.0
    assert limit("reward function", doing=doing, seconds={**seen, "reward function": [0.1] * 9}) == 600.0
    assert limit("log", doing=doing, seconds=seen) == 600.0, "seen once"
    assert limit("save", doing="disk", seconds=seen) == 600.0, "a disk that does not answer is none of its doing"


@pytest.mark.parametrize(
    ("phase", "seconds"),
    [("vLLM", {**STEADY, "vLLM": [0.1] * 20}), ("rollout", STEADY), ("models", STEADY),
     ("micro-batch", {"micro-batch": [0.1, 0.1]}), ("save", {"save": [0.1, 0.1]})],
    ids=["a server with limits of its own", "seen once", "never seen", "no optimizer step yet", "nor here"],
)  # fmt: skip
def test_without_an_own_limit_it_is_peer_timeout(phase: str, seconds: dict[str, list[float]]) -> None:
    assert limit(phase, seconds=seconds) == 600.0


class World:
    """Rank 0's view of ranks whose processes do what `states` and `answers` say."""

    def __init__(self, world: int = 2, rank: int = 0) -> None:
        self.states: dict[int, State] = {}
        self.pulses: dict[int, State] = {}
        self.peers = Peers(
            CARDS[rank],
            CARDS[:world],
            600.0,
            lambda card, mine: self.states.get(card.rank, "unknown"),
            lambda card: self.pulses.get(card.rank, "runs"),
        )
        self.beats = 0

    def seconds(self, count: int, *silent: int) -> Loss | None:
        """What is found after so many seconds in which the `silent` ranks say nothing."""
        for _ in range(count):
            self.beats += 1
            said = {rank: beat(rank, beats=self.beats) for rank in self.peers.others if rank not in silent}
            self.peers.hear(said, 1.0)
        return self.peers.lost()


def beat(
    rank: int, *, beats: int = 1, marks: int = 7, age: float = 0.0, limit: float = 8.0, waits: bool = False
) -> Beat:
    return Beat(beats, "micro-batch", 3, marks, age, limit, waits, ended=False)


def test_a_silent_rank_on_another_machine() -> None:
    """Its pulse is asked after 5 s: a machine that refuses lost the process, one that is silent is lost after 8 s."""
    world = World()
    assert world.seconds(9) is None and world.seconds(4, 1) is None
    world.pulses[1] = "gone"
    assert world.peers.lost() is None, "4 s"
    loss = world.seconds(1, 1)
    assert loss == Loss(
        "lost", 1, "rank 1 on node1 in micro-batch, step 3, was lost: its process has ended, last heartbeat 5 s ago"
    )
    world.pulses[1] = "unknown"
    assert world.peers.lost() is None
    loss = world.seconds(3, 1)
    assert loss is not None and "its machine or process does not answer, last heartbeat 8 s ago" in loss.text


def test_a_silent_rank_that_lives_is_left_alone_until_peer_timeout() -> None:
    world = World()
    world.seconds(1)
    assert world.seconds(598, 1) is None
    loss = world.seconds(2, 1)
    assert loss is not None and "its process lives and runs no Python" in loss.text


def test_a_process_on_this_machine_is_seen_at_once() -> None:
    """Gone: at the second look. Stopped: after 5 s, as a debugger stops a process for a moment."""
    world = World()
    world.seconds(1)
    world.states[1] = "gone"
    assert world.seconds(1, 1) is None and world.seconds(1, 1) is not None
    world.states[1] = "stopped"
    assert world.seconds(4, 1) is None
    world.states[1] = "runs"
    world.seconds(1)
    world.states[1] = "stopped"
    assert world.seconds(4, 1) is None
    loss = world.seconds(1, 1)
    assert loss is not None and "its process is stopped" in loss.text


def test_who_ends_for_a_reason_that_it_knows_is_not_missed() -> None:
    world = World()
    world.peers.hear({1: beat(1)._replace(ended=True)}, 1.0)
    world.states[1] = "gone"
    assert world.seconds(20, 1) is None and world.peers.all_left


def test_a_hang_is_found_where_no_rank_makes_progress() -> None:
    """Ranks 0 and 2 wait; rank 1 does not and has stood for 9 s where its limit is 8 s. Rank 2 at 7 s: not yet."""
    world = World(3)
    mine = beat(0, age=20.0, limit=180.0, waits=True)
    others = {1: beat(1, age=9.0), 2: beat(2, age=7.0, limit=180.0, waits=True)}
    world.peers.hear(others, 1.0)
    assert world.peers.hung(mine) is None
    world.peers.hear({**others, 2: others[2]._replace(beats=2, age=8.5)}, 1.0)
    assert world.peers.hung(mine) == Loss(
        "hung", 1, "rank 1 on node1 in micro-batch, step 3, hangs: no progress for 9 s, its limit is 8 s"
    )


def test_where_all_wait_the_one_furthest_behind_is_named() -> None:
    """As where ranks call collectives in different orders: the limit is that of waiting, 180 s."""
    world = World()
    mine = beat(0, age=181.0, limit=180.0, waits=True)
    world.peers.hear({1: beat(1, marks=6, age=179.0, limit=180.0, waits=True)}, 1.0)
    assert world.peers.hung(mine) is None
    world.peers.hear({1: beat(1, beats=2, marks=6, age=180.0, limit=180.0, waits=True)}, 1.0)
    loss = world.peers.hung(mine)
    assert loss is not None and loss.rank == 1 and "every rank waits; this one is furthest behind" in loss.text


def test_ranks_beyond_the_first_two_watch_those() -> None:
    assert World(4, 0).peers.others == [1, 2, 3] and World(4, 1).peers.others == [0, 2, 3]
    assert World(4, 3).peers.others == [0, 1]
    world = World(4, 3)
    world.seconds(1)
    assert world.peers.hung(beat(3, age=900.0)) is None, "who does not hear of all cannot say that none goes on"
