"""The process group, and the few collectives that are not DeepSpeed's own: every rank must call them, in one order."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as td
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from dsalign.endings import INPUT

T = TypeVar("T")
UNWATCHED_S, NEVER_S = 60.0, 7 * 24 * 3600.0
WAITING = ("wait", "barrier", "synchronize")  # functions of DeepSpeed that wait for a collective begun before
LIBRARIES = tuple(str(Path(str(module.__file__)).parent) for module in (td, deepspeed.comm))
DEEPSPEED = str(Path(str(deepspeed.__file__)).parent)


def threads(cores: int, local_size: int) -> int:
    """CPU threads of each of the `local_size` ranks that share `cores`, >= 1: with more threads than cores a step was
    measured to take five times as long."""
    return max(1, cores // local_size)


def init(local_rank: int, local_size: int = 1, *, peer_timeout: float) -> torch.device:
    """Join the process group that the environment describes; returns this rank's device. Collective.

    local_rank, local_size: this rank among the ranks of this machine, and their number; on a CPU they share its cores,
    unless OMP_NUM_THREADS says otherwise. peer_timeout: seconds without progress after which a rank is given up, 0 =
    never; a collective without all ranks is an error of its own a little later, where nobody watches.
    """
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        # the shared-memory op speeds up inference only, takes minutes to compile, and a killed build leaves a lock
        # that hangs every later run
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads(len(os.sched_getaffinity(0)), local_size))
    else:
        accelerator.set_device(local_rank)
    if not td.is_initialized():
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        seconds = peer_timeout + UNWATCHED_S if peer_timeout else NEVER_S
        backend = "gloo" if on_cpu else accelerator.communication_backend_name()
        try:
            deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(seconds=seconds), verbose=False)
        except td.DistNetworkError as error:
            raise ValueError(_unreachable(str(error))) from error
    return torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(local_rank))


def _unreachable(reason: str) -> str:
    """What to do where the ranks cannot meet."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if "EADDRINUSE" in reason or "address already in use" in reason.lower():
        return (
            f"MASTER_PORT: expected a free port, got {port}, which another process on {socket.gethostname()} has, as "
            "another run; give the launcher another one (deepspeed --master_port N, torchrun --master-port N) or set "
            "MASTER_PORT"
        )
    return (
        f"MASTER_ADDR: expected rank 0 to answer at {address}:{port}, got {reason.splitlines()[0][:200]}; check the "
        "address, the port and the network between the machines"
    )


def shutdown() -> None:
    """Leave the process group, so that another run of this Python process can join one of its own."""
    if td.is_initialized():
        deepspeed.comm.destroy_process_group()  # torch's, and what DeepSpeed keeps of it
    deepspeed.comm.comm.cdb = None  # it would be taken for the backend of the next group


def rank() -> int:
    """This rank, counted from 0; 0 of a process that joined no group, as that of a verb on models."""
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    """The number of ranks; 1 of a process that joined no group."""
    return td.get_world_size() if td.is_initialized() else 1


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        td.barrier()


def total(numbers: Sequence[float], device: torch.device) -> list[float]:
    """The sum of each number over the ranks, in float64."""
    if world_size() == 1 or not numbers:
        return list(numbers)
    tensor = torch.tensor(numbers, dtype=torch.float64, device=device)
    td.all_reduce(tensor)
    return [float(x) for x in tensor.tolist()]


def largest(number: int, device: torch.device) -> int:
    """The largest of the integers that the ranks give."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number, device=device)
    td.all_reduce(tensor, op=td.ReduceOp.MAX)
    return int(tensor)


def gather(numbers: Tensor, device: torch.device) -> Tensor:
    """The 1-D float64 tensors of all ranks, of any lengths, concatenated in rank order; on the CPU.

    device: this rank's, on which the tensors are exchanged.
    """
    if world_size() == 1:
        return numbers.cpu()
    width = largest(len(numbers), device)
    mine = torch.full((width + 1,), 0.0, dtype=torch.float64, device=device)
    mine[0] = len(numbers)
    mine[1 : 1 + len(numbers)] = numbers.to(device)
    found = [torch.empty_like(mine) for _ in range(world_size())]
    td.all_gather(found, mine)
    return torch.cat([x[1 : 1 + int(x[0])] for x in found]).cpu()


def from_rank_0(thing: T) -> T:
    """The `thing` of rank 0, returned on every rank; other ranks' is ignored. For small Python objects."""
    if world_size() == 1:
        return thing
    box: list[Any] = [thing]
    td.broadcast_object_list(box, src=0)
    received: T = box[0]
    return received


def everyones(thing: T) -> list[T]:
    """The `thing` of each rank, in rank order, on every rank. For small Python objects."""
    if world_size() == 1:
        return [thing]
    found: list[Any] = [None] * world_size()
    td.all_gather_object(found, thing)
    return found


class ElsewhereError(ValueError):
    """The error of a rank that stops because another rank did; its message has that rank's cause, `code` is the exit
    code that goes with it."""

    code = INPUT


_pending: list[Callable[[], Exception | None]] = []  # asked by `agree` for an error where there is none


@contextmanager
def stoppable(pending: Callable[[], Exception | None]) -> Iterator[None]:
    """A context in which every `agree` is a place to stop. pending: this rank's reason to stop, None = none."""
    _pending.append(pending)
    try:
        yield
    finally:
        _pending.remove(pending)


def agree(error: Exception | None) -> None:
    """Raise on every rank where any rank has an error: the error itself on the first such rank, ElsewhereError on the
    others, so that the cause is logged once. Without this the other ranks would wait in the next collective until it
    times out."""
    for pending in _pending:
        error = error or pending()
    if td.is_initialized() and world_size() > 1:
        codes = everyones(None if error is None else (str(error), getattr(error, "code", INPUT)))
        first = next((other for other, one in enumerate(codes) if one is not None), None)
        if first is not None and first != rank():
            text, code = codes[first] or ("", INPUT)
            elsewhere = ElsewhereError(f"rank {first} stopped: {text}")
            elsewhere.code = code
            raise elsewhere
    if error is not None:
        vars(error)["agreed"] = True
        raise error


def is_agreed(error: BaseException | None) -> bool:
    """Whether every rank ends by this error, as `agree` raised it or the one that it was made from."""
    while error is not None:
        if isinstance(error, ElsewhereError) or "agreed" in vars(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_collective(filename: str, function: str, *, innermost: bool) -> bool:
    """Whether a frame of a thread's stack tells that the thread waits for other ranks. innermost: the frame is the last
    one; only there is this file such a place, as `together` calls what may take long and waits for nobody."""
    if filename.startswith(LIBRARIES):
        return True
    return innermost and (filename == __file__ or (filename.startswith(DEEPSPEED) and function in WAITING))


def same_everywhere(mine: Mapping[str, str]) -> None:
    """Raise ValueError on every rank where ranks differ in a key of `mine`, naming each such key with both values.
    Collective. Training would go on with a different number on each rank, or wait for a rank that is done."""
    if not td.is_initialized() or world_size() == 1:
        return
    every: list[tuple[str, dict[str, str]]] = [("", {})] * world_size()
    td.all_gather_object(every, (socket.gethostname(), dict(mine)))
    (here, first), lines = every[0], []
    for key in sorted({key for _, one in every for key in one}):
        other = next((i for i, (_, one) in enumerate(every) if one.get(key) != first.get(key)), None)
        if other is not None:
            host, theirs = every[other]
            lines.append(
                f"{key} is {first.get(key, 'not there')} on rank 0 ({here}) and {theirs.get(key, 'not there')} on rank "
                f"{other} ({host})"
            )
    if lines:
        more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
        text = "ranks: expected the same on every rank, got a difference: " + "; ".join(lines[:10] + more)
        error = (ValueError if rank() == 0 else ElsewhereError)(
            f"{text}. Start all ranks with one command, and with the same files and versions on every machine"
        )
        vars(error)["agreed"] = True
        raise error


def together(build: Callable[[], T]) -> T:
    """Call `build` on every rank and return its result. Collective, but `build` must hold no collective itself.

    Where it raises ValueError or OSError on any rank, every rank raises, as `agree` says: no rank waits for another.
    """
    error: Exception | None = None
    try:
        built = build()
    except (ValueError, OSError) as caught:
        error = caught
    agree(error)
    return built
