"""When a rank takes another one for lost or hung, from what it last heard of each. It has no thread and no clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple

from dsalign.guard.vitals import Card, Doing, State
from dsalign.phases import Past

SILENT_S = 5.0  # without a heartbeat, or stopped: then the process is looked for
GONE_S = 8.0  # without a heartbeat, and nothing answers on its machine
TIMES = 10.0  # the longest interval that a phase had
IDLE_S, SPIN_S, BUSY_S = 8.0, 10.0, 180.0  # the least limits: see `limit_of`
SHARE = 6.0  # the least limit of a phase that waits for something outside is this part of peer_timeout
SEEN = 20  # intervals after which a phase has shown how long it takes for so much work
FULL_STEP = "optimizer step"  # once a rank has taken one, phases that only compute have shown how long they last
JUDGES = (0, 1)  # ranks that watch all others, who watch these two: the work grows with the number of ranks alone
EVEN = frozenset({"micro-batch", FULL_STEP, "reference"})  # they only compute, and their time goes by their work
COMPUTES = EVEN | {"train", "rollout", "score", "wait"}  # wait for nothing outside
# Phases that come again and wait for disks, services or a user's code -> (intervals seen before, times the longest).
OUTSIDE = {**dict.fromkeys(("prepare", "evaluate", "save", "log"), (2, TIMES)), "reward function": (10, 30.0)}


class Beat(NamedTuple):
    """What a rank says of itself every second."""

    beats: int
    phase: str
    step: int
    marks: int
    age: float  # seconds since its main thread last made progress
    limit: float  # seconds without progress after which it hangs
    waits: bool  # its main thread waits in a collective for other ranks
    ended: bool  # it ends for a reason that it knows


@dataclass(frozen=True)
class Loss:
    """The first cause of a run's end that is not agreed on: a rank that is lost, hangs, or failed by an error."""

    kind: Literal["lost", "hung", "failed"]
    rank: int  # -1 where it is none of them
    text: str  # a sentence that names rank, host, phase and step
    error: str = ""  # of a failed rank, without the place

    def dump(self) -> str:
        """The loss as a line of JSON."""
        return json.dumps(asdict(self))


def limit_of(
    phase: str, past: Mapping[str, Past], *, doing: Doing, waits: bool, peer_timeout: float, work: float = 1.0
) -> float:
    """The seconds without progress after which a rank hangs; peer_timeout where the phase has not shown another one.

    past: phase -> its intervals. doing: what the rank is seen to do. waits: it waits for other ranks. work: what there
    is to do in the interval that runs. A phase that only computes gets its limit from its own intervals: from the last
    ones where the rank does nothing, or computes itself and the time goes by the work; else from the longest ever, and
    far more, as something may compile. A phase that waits for something outside gets it from the longest ever too, but
    not while the kernel waits for a disk.
    """
    seen = past.get(phase)
    if seen is None or FULL_STEP not in past:
        return peer_timeout
    if phase in OUTSIDE and doing != "disk":
        least, times = OUTSIDE[phase]
        return (
            min(max(times * seen.longest, peer_timeout / SHARE), peer_timeout) if seen.count >= least else peer_timeout
        )
    if phase not in COMPUTES or seen.count < 2:
        return peer_timeout
    if waits:
        found = max(TIMES * max(seen.recent), BUSY_S)
    elif doing == "nothing":
        found = max(TIMES * max(seen.recent), IDLE_S)
    elif doing == "computes" and phase in EVEN and seen.count >= SEEN:
        found = max(TIMES * max(seen.rates) * work, SPIN_S)
    else:
        found = max(TIMES * seen.longest, BUSY_S)
    return min(found, peer_timeout)


class Peers:
    """The other ranks as one rank sees them.

    mine: its own card. cards: every rank's, by rank. state_of, answers: see vitals.py.
    """

    def __init__(
        self,
        mine: Card,
        cards: Sequence[Card],
        peer_timeout: float,
        state_of: Callable[[Card, Card], State],
        answers: Callable[[Card], State],
    ) -> None:
        self.mine, self.cards, self.peer_timeout = mine, cards, peer_timeout
        self._state_of, self._answers = state_of, answers
        watched = range(len(cards)) if mine.rank in JUDGES else JUDGES
        self.others = [rank for rank in watched if rank != mine.rank]
        self.beats: dict[int, Beat] = {}
        self.quiet = dict.fromkeys(self.others, 0.0)  # seconds awake since its heartbeat last changed
        self._stopped = dict.fromkeys(self.others, 0.0)
        self._looks = dict.fromkeys(self.others, 0)  # at a process that is gone

    def hear(self, beats: Mapping[int, Beat] | None, passed: float) -> None:
        """Take in what the store has, None where it did not answer. passed: seconds that this rank was awake since."""
        for rank in self.others:
            old, new = self.beats.get(rank), (beats or {}).get(rank)
            self.quiet[rank] += passed
            if new is not None and (old is None or new.beats != old.beats):
                self.quiet[rank] = 0.0
                self.beats[rank] = new
            state = self._state_of(self.cards[rank], self.mine)
            self._stopped[rank] = self._stopped[rank] + passed if state == "stopped" else 0.0
            self._looks[rank] = self._looks[rank] + 1 if state == "gone" else 0

    @property
    def all_left(self) -> bool:
        """Whether every other rank is gone, or ends for a reason that it knows."""
        return all(self._looks[rank] or (rank in self.beats and self.beats[rank].ended) for rank in self.others)

    def lost(self) -> Loss | None:
        """The first rank whose process is gone, stopped or out of reach; None where there is none.

        A process that is gone is looked at twice, so that its last words are read before.
        """
        for rank in self.others:
            if rank in self.beats and self.beats[rank].ended:
                continue
            what = self._what_is_wrong(rank)
            if what:
                return Loss(
                    "lost", rank, f"{self.place(rank)} was lost: {what}, last heartbeat {self.quiet[rank]:.0f} s ago"
                )
        return None

    def _what_is_wrong(self, rank: int) -> str:
        card, quiet = self.cards[rank], self.quiet[rank]
        state = self._state_of(card, self.mine)
        if state == "gone":
            return "its process has ended" if self._looks[rank] > 1 else ""
        if state == "stopped":
            return "its process is stopped" if self._stopped[rank] >= SILENT_S else ""
        if quiet >= self.peer_timeout:
            return "its process lives and runs no Python"
        if state == "runs" or quiet < SILENT_S:
            return ""
        answer = self._answers(card)
        if answer == "gone":
            return "its process has ended"
        return "its machine or process does not answer" if answer == "unknown" and quiet >= GONE_S else ""

    def hung(self, mine: Beat) -> Loss | None:
        """The rank that keeps all ranks from going on, where none has made progress for the limit of those that do not
        wait for others; None where there is none. mine: this rank's own beat."""
        every = {self.mine.rank: mine}
        for rank, beat in self.beats.items():
            silent = self.quiet[rank] >= SILENT_S
            late = beat._replace(age=beat.age + self.quiet[rank], limit=self.peer_timeout, waits=False)
            every[rank] = late if silent else beat
        if len(every) < len(self.cards) or any(beat.ended for beat in every.values()):
            return None
        suspects = {rank: beat for rank, beat in every.items() if not beat.waits} or every
        limit = max(beat.limit for beat in suspects.values())
        if min(beat.age for beat in every.values()) < limit:
            return None
        rank = min(suspects, key=lambda r: (suspects[r].step, suspects[r].marks, r))
        more = "" if len(suspects) < len(every) else " (every rank waits; this one is furthest behind)"
        longer = limit >= self.peer_timeout or suspects[rank].phase in OUTSIDE
        hint = "; a longer --peer_timeout waits longer" if longer else ""
        text = f"{self.place(rank, suspects[rank])} hangs: no progress for {suspects[rank].age:.0f} s"
        return Loss("hung", rank, f"{text}, its limit is {limit:.0f} s{more}{hint}")

    def place(self, rank: int, beat: Beat | None = None) -> str:
        """The words that name a rank, its host, its phase and its step."""
        beat = beat or self.beats.get(rank)
        where = f" in {beat.phase}, step {beat.step}," if beat else ""
        return f"rank {rank} on {self.cards[rank].host}{where}"
