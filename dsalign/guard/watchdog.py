"""The watch over the other ranks: each tells the others every second that it lives and where it is, and ends with 77
where another is lost, hangs or fails alone. The first cause is said once, and every rank leaves its Python stacks.

Two threads: one talks to the store, which may block for ever where rank 0 is stopped; the other one judges and ends.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from dsalign import phases
from dsalign.endings import FAULT, PEER_LOST, Ending, PeerLost
from dsalign.engines import board, dist
from dsalign.guard import vitals
from dsalign.guard.peers import Beat, Loss, Peers, limit_of

TICK_S, HURRY_S = 1.0, 0.2  # between two looks; while an error waits for its cause
CAUSE_S = 12.0  # an error inside a collective waits so long for its cause
SAME_S = 1.0  # a rank that hears of an error may have the same one
REPLY_S = 3.5  # a rank that fails waits so long for another one to say so
LAST_S = 2.0  # others write their stacks, and the rank that failed ends before those that hear of it
JOIN_S = 6.0  # a little longer than a call of the store that is answered may last
LEAVE_S = 8.0  # a main thread that unwinds and does not end

logger = logging.getLogger(__name__)


@contextmanager
def watched(folder: Path, peer_timeout: float) -> Iterator[None]:
    """A context in which this rank and the others watch each other. Collective, at its beginning and at its normal end.

    folder: the run's, where crash/rank-N.txt is written on a loss. peer_timeout: seconds without progress after which a
    rank is given up whatever its phase, 0 = nobody watches. Raises PeerLost, without a message as it is said already,
    in place of an error that another rank's end caused; where the main thread cannot raise, the process ends with 77.
    """
    if dist.world_size() == 1 or not (peer_timeout := dist.from_rank_0(peer_timeout)):
        yield
        return
    watch = Watchdog(folder, peer_timeout)
    try:
        yield
        phases.mark("end")
        dist.barrier()
    except BaseException as error:
        ending = watch.failed(error)
        if ending is error:
            raise
        raise ending from error
    else:
        watch.close()


class Watchdog:
    """The watch of one rank, which begins when it is made. Collective."""

    def __init__(self, folder: Path, peer_timeout: float) -> None:
        phases.begin()
        self.crash, self.peer_timeout, self.rank = folder / "crash", peer_timeout, dist.rank()
        self._pulse = board.Pulse()
        card = vitals.card_of(self.rank, self._pulse.address, self._pulse.port)
        cards = dist.everyones(card)
        self.peers = Peers(card, cards, peer_timeout, vitals.state_of, vitals.Questions())
        self._board = board.Board(f"peers/{dist.from_rank_0(uuid.uuid4().hex)}")
        self._main = threading.current_thread()
        self._idleness = vitals.Idleness(threading.get_native_id())
        self._beat = Beat(0, phases.now.phase, 0, 0, 0.0, peer_timeout, waits=False, ended=False)
        self._keys = [*(f"beat/{rank}" for rank in self.peers.others), "cause", "reply"]
        self._heard: tuple[int, list[str]] = (0, [])  # how often the store has answered, and what
        self._deaf = 0.0  # seconds awake since it last did
        self._cause: Loss | None = None
        self._lock = threading.Lock()
        self._over, self._wake, self._turn, self._answered, self._main_ends = (threading.Event() for _ in range(5))
        self._hurry = self._ended = self._said = False
        self._board.write(f"beat/{self.rank}", json.dumps(self._beat))
        if self.rank == 0:
            for key in ("cause", "reply"):
                self._board.write(key, "")
        dist.barrier()
        _mark_for_launcher()
        works = (self._talk, self._watch)
        self._threads = [threading.Thread(target=one, name=f"dsalign {one.__name__}", daemon=True) for one in works]
        for thread in self._threads:
            thread.start()

    # The thread that talks to the store.

    def _talk(self) -> None:
        while not self._over.is_set():
            self._turn.wait()
            self._turn.clear()
            try:
                self._board.write(f"beat/{self.rank}", json.dumps(self._beat))
                self._heard = self._heard[0] + 1, self._board.read(self._keys)
            except RuntimeError:  # its process is gone; `_watch` finds out whose that was
                return
            self._answered.set()

    # The thread that judges.

    def _watch(self) -> None:
        last, heard = time.monotonic(), 0
        while not self._over.is_set():
            self._wake.wait(HURRY_S if self._hurry else TICK_S)
            now = time.monotonic()
            passed, last = min(now - last, 2 * TICK_S), now  # a machine that slept accuses nobody
            self._look_at_myself(passed)
            if not self._is_gone(0):  # where it is, the store would only say so at length
                self._answered.clear()
                self._turn.set()
                self._answered.wait(HURRY_S)
            count, texts = self._heard
            fresh, heard = count != heard, count
            self._deaf = 0.0 if fresh else self._deaf + passed
            every = dict(zip(self.peers.others, map(_beat_of, texts), strict=False)) if fresh else None
            self.peers.hear(every, passed)
            if self._over.is_set() or self._cause is not None:
                continue  # the main thread ends, and reads what is heard
            if texts and texts[-2]:
                self._end_by(Loss(**json.loads(texts[-2])))
                continue
            loss = self.peers.lost() or (self.peers.hung(self._beat) if fresh else None) or self._without_store()
            if loss is not None:
                self._end_by(self._claimed(loss))

    def _look_at_myself(self, passed: float) -> None:
        now, old = phases.now, self._beat
        if now.marks != old.marks:
            self._idleness.restart()
        age = old.age + passed if now.marks == old.marks else 0.0
        self._idleness.look()
        frames = sys._current_frames()
        waits, doing = vitals.waits(frames.get(self._main.ident or 0)), self._idleness.doing(age, frames.values())
        limit = limit_of(
            now.phase, phases.past, doing=doing, waits=waits, peer_timeout=self.peer_timeout, work=now.work
        )
        self._beat = Beat(old.beats + 1, now.phase, now.step, now.marks, age, limit, waits, self._ended)

    @property
    def _reply(self) -> str:
        """Who says the cause: "rank N", "the same error" where others have it too, "" where nobody answered yet."""
        return self._heard[1][-1] if self._heard[1] else ""

    def _without_store(self) -> Loss | None:
        """The loss of the launcher, where the store is its own and does not answer."""
        if self._deaf < 2 * REPLY_S or not board.outlives_ranks():
            return None
        text = "the launcher of the first machine, with the store by which the ranks meet, was lost: it does not answer"
        return Loss("lost", -1, text)

    def _claimed(self, loss: Loss) -> Loss:
        """The first cause: `loss`, unless another rank was quicker."""
        found = _bounded(lambda: self._board.claim("cause", loss.dump()), 1.0)
        return Loss(**json.loads(found)) if found else loss

    def _end_by(self, loss: Loss) -> None:
        """End this process by another rank's loss; a main thread that ends by itself is left to it."""
        self._cause = loss
        if loss.kind == "failed":
            if loss.rank == self.rank:
                return
            self._main_ends.wait(SAME_S)
        if self._main_ends.is_set():
            return
        self._part_from(loss)
        _exit(PEER_LOST)

    def _part_from(self, loss: Loss, text: str = "") -> None:
        """All that is left to do when another rank ends this one. text: of the error by which it noticed, if any."""
        self._leave_stacks(text)
        if loss.rank == self.rank:
            return
        self._say(loss)
        self._end_other(loss)
        self._wait_for(lambda: loss.kind == "failed" and self._is_gone(loss.rank), LAST_S)
        self._end_other(loss, kill=True)

    def _is_gone(self, rank: int) -> bool:
        return vitals.state_of(self.peers.cards[rank], self.peers.mine) == "gone"

    def _say(self, loss: Loss) -> None:
        """Say the cause, unless another rank does."""
        with self._lock:
            if self._said:
                return
            self._said = True
        first = _bounded(lambda: self._board.claim("reply", f"rank {self.rank}"), 1.0)
        if first is None:  # no store any more: one of those that are surely there
            cards, host = self.peers.cards, self.peers.cards[max(loss.rank, 0)].host
            elsewhere = [card.rank for card in cards if card.host != host]
            first = f"rank {min(elsewhere or [card.rank for card in cards if card.rank != loss.rank])}"
        if first == f"rank {self.rank}":
            say(f"{loss.text}; the stacks of all ranks are in {self.crash}")

    def _end_other(self, loss: Loss, *, kill: bool = False) -> None:
        """Let a stopped rank of this machine go on, so that it leaves its stacks and ends. kill: it did not."""
        if loss.kind == "failed" or loss.rank < 0:
            return
        card = self.peers.cards[loss.rank]
        if vitals.state_of(card, self.peers.mine) in ("runs", "stopped"):
            with suppress(OSError):
                os.kill(card.pid, signal.SIGKILL if kill else signal.SIGCONT)

    def _leave_stacks(self, text: str = "") -> None:
        with suppress(OSError):
            self.crash.mkdir(parents=True, exist_ok=True)
            with (self.crash / f"rank-{self.rank}.txt").open("w", encoding="utf-8") as file:
                cause = self._cause.text if self._cause else text
                file.write(
                    f"rank {self.rank} on {socket.gethostname()}, {time.strftime('%Y-%m-%d %H:%M:%S')}: {cause}\n\n"
                )
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                file.write(text)

    # The main thread.

    def close(self) -> None:
        """Stop watching, at the normal end: every rank has come there.

        The threads are waited for: an interpreter that ends while one is inside the store's C++ aborts the process.
        """
        for event in (self._over, self._turn, self._wake, self._answered):
            event.set()
        until = time.monotonic() + JOIN_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))

    def failed(self, error: BaseException) -> BaseException:
        """The exception by which this rank ends, where `error` ended its work: the error itself where it is the first
        cause or every rank has it, PeerLost where another rank caused it."""
        self._main_ends.set()
        self._hurry = True
        self._wake.set()
        self._wake.clear()
        if isinstance(error, Ending) or dist.is_agreed(error):
            self._leave_together()
            return error
        if _came_from_collective(error) and self._wait_for(lambda: self._cause is not None, CAUSE_S):
            assert self._cause is not None
            return self._end_by_peer(self._cause, error)
        loss = self._own(error)
        first = self._claimed(loss)
        self._cause = first
        if first.rank != self.rank:
            if first.error != loss.error:
                return self._end_by_peer(first, error)
            _bounded(lambda: self._board.claim("reply", "the same error"), 1.0)
            return self._quiet(error, loss)
        fault = not isinstance(error, (ValueError, KeyboardInterrupt))
        text = "".join(traceback.format_exception(error)) if fault else ""
        sys.stderr.write(text)
        sys.stderr.flush()
        self._leave_stacks(text)
        self._wait_for(lambda: self._reply != "", REPLY_S)
        said = self._reply.startswith("rank ")
        if not said and fault:
            say(loss.text)
        if said or fault:
            return self._quiet(error, loss)
        self._leave_together()
        return error

    def _own(self, error: BaseException) -> Loss:
        at = self._beat._replace(phase=phases.of_error(error), step=phases.now.step)
        words = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, ValueError):
            words = str(error)
        return Loss("failed", self.rank, f"{self.peers.place(self.rank, at)} failed: {words}", words)

    def _quiet(self, error: BaseException, loss: Loss) -> BaseException:
        """The exception with the exit code of `error`, which another rank says or has said."""
        self._leave_together()
        _last_resort(FAULT)
        if isinstance(error, KeyboardInterrupt):
            return error
        return dist.ElsewhereError(loss.text) if isinstance(error, ValueError) else Ending()

    def _end_by_peer(self, loss: Loss, error: BaseException) -> BaseException:
        self._cause = loss
        self._part_from(loss, "".join(traceback.format_exception(error)))
        self._leave_together()
        _last_resort(PEER_LOST)
        return PeerLost()

    def _leave_together(self) -> None:
        """Stop watching: others see that this rank ends for a reason that they know. Rank 0 has the store: it goes
        last, so that they can read and say so."""
        self._ended, before = True, self._heard[0]
        if self.rank == 0 and not board.outlives_ranks():
            self._wait_for(lambda: self.peers.all_left, REPLY_S)
        else:
            self._wait_for(lambda: self._heard[0] > before + 1, 1.0)
        self.close()

    def _wait_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not (found := condition()) and time.monotonic() < until:
            time.sleep(HURRY_S / 4)
        return found


def _beat_of(text: str) -> Beat:
    return Beat(*json.loads(text))


def say(text: str) -> None:
    """Say the last line of a run: to the launcher where that is ours, which says it when all ranks are gone, and for
    torchrun's table of failures; else on standard error."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": text, "timestamp": int(time.time())}), encoding="utf-8")
    if not path or "DSALIGN_LAUNCHER" not in os.environ:
        print(f"dsalign: error: {text}", file=sys.stderr, flush=True)


def _mark_for_launcher() -> None:
    """Tell our launcher, by a file beside that of errors, that this rank ends by itself where another one is lost."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with suppress(OSError):
            Path(f"{path}.watched").touch()


def _came_from_collective(error: BaseException) -> bool:
    """Whether a collective raised the error, as where the connection to another rank broke."""
    frames = traceback.extract_tb(error.__traceback__)[-vitals.DEPTH :]
    return any(dist.is_collective(f.filename, f.name, innermost=f is frames[-1]) for f in frames)


def _bounded(call: Callable[[], Any], seconds: float) -> Any:
    """What a call of the store returns; None where it fails, or does not return in time."""
    found: list[Any] = []

    def run() -> None:
        with suppress(RuntimeError):
            found.append(call())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def _last_resort(code: int) -> None:
    """End the process if it has not ended in LEAVE_S: leaving a process group without all its ranks may block."""

    def run() -> None:
        time.sleep(LEAVE_S)
        _exit(code)

    threading.Thread(target=run, daemon=True).start()


def _exit(code: int) -> NoReturn:
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
