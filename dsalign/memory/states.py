"""What a DeepSpeed engine holds between forward passes, in bytes of one rank, and what its ranks exchange: ZeRO stages
0 to 3 with and without off-loading (arXiv:1910.02054), as DeepSpeed 0.19 does it under the settings of
`engines.engine.complete`. docs/plan.md derives each term."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FLOAT32 = 4
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes a weight: 4 bits, 8 of a scale for 64 of them, 32 for 256 scales
LIVE = 1_000_000_000  # stage3_max_live_parameters: gathered elements at a time
BUCKET = 500_000_000  # reduce_bucket_size, elements
SUB_GROUP = 1_000_000_000  # stage 3 steps so many elements of a rank at a time


@dataclass(frozen=True)
class Zero:
    """The part of a DeepSpeed file that decides about memory. offload_*: whether it leaves the GPU; nvme: for a disk.
    bucket: elements of one buffer in which gradients are averaged; overlap: whether there are two."""

    stage: int
    offload_optimizer: bool = False
    offload_param: bool = False
    nvme: bool = False
    bucket: int = BUCKET
    overlap: bool = False
    live: int = LIVE
    sub_group: int = SUB_GROUP

    @staticmethod
    def of(settings: Mapping[str, Any]) -> Zero:
        """The part of a whole DeepSpeed configuration, DeepSpeed's own defaults where a key is missing."""
        zero = settings.get("zero_optimization", {})

        def device(name: str) -> str:
            return str((zero.get(name) or {}).get("device", "none"))

        stage = int(zero.get("stage", 0))
        return Zero(
            stage, device("offload_optimizer") != "none", device("offload_param") != "none",
            "nvme" in (device("offload_optimizer"), device("offload_param")),
            int(float(zero.get("reduce_bucket_size", BUCKET))), bool(zero.get("overlap_comm", stage == 3)),
            int(float(zero.get("stage3_max_live_parameters", LIVE))), int(float(zero.get("sub_group_size", SUB_GROUP))),
        )  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """The elements of an engine. trained, frozen: parameters; under LoRA the base is frozen. largest: elements of its
    largest parameter, largest_trained: of those that are trained. itemsize: bytes of a weight in compute, 2 or 4.
    moments: numbers that the optimizer keeps for a parameter, 2 for AdamW, 0 for SGD. packed: how many of the frozen
    ones are in 4 bits."""

    trained: int
    frozen: int
    largest: int
    largest_trained: int = 0
    itemsize: int = 2
    moments: int = 2
    packed: int = 0

    @property
    def whole(self) -> float:
        """The bytes of all weights: in the precision of the computation, or in 4 bits."""
        return (self.trained + self.frozen - self.packed) * self.itemsize + self.packed * NF4


@dataclass(frozen=True)
class Held:
    """Bytes of one rank. weights, gradients, optimizer: all the time, optimizer with its float32 weights. buffers: for
    averaging gradients and, at stage 3, gathered weights. step: more while the optimizer steps, when no activation is
    in memory. cpu: in the machine's memory, or on its disk, for this rank."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    buffers: float = 0.0
    step: float = 0.0
    cpu: float = 0.0

    @property
    def always(self) -> float:
        """What is on the GPU from the first step to the last, whatever runs."""
        return self.weights + self.gradients + self.optimizer


def stage_of(zero: Zero, sizes: Sizes) -> int:
    """The stage that a run really has: a frozen engine is at 0 or 3, and in half precision 0 is 1."""
    if not sizes.trained:
        return 3 if zero.stage == 3 else 0
    return 1 if zero.stage == 0 and sizes.itemsize < FLOAT32 else zero.stage


def held(zero: Zero, sizes: Sizes, ranks: int) -> Held:
    """What one of `ranks` ranks holds of an engine."""
    stage, t, item = stage_of(zero, sizes), sizes.trained, sizes.itemsize
    gathered = min(t + sizes.frozen, zero.live) * item
    if not t:
        if stage != 3:
            return Held(weights=sizes.whole)
        own = sizes.whole / ranks
        return Held(buffers=gathered, cpu=own) if zero.offload_param else Held(weights=own, buffers=gathered)
    state = (FLOAT32 + FLOAT32 * sizes.moments) * t
    if stage == 0:  # torch's own optimizer: the weights are its float32 weights
        return Held(weights=sizes.whole, gradients=item * t, optimizer=state - FLOAT32 * t)
    twice = 2 if zero.overlap else 1
    if stage == 1 and item < FLOAT32:  # BF16_Optimizer: sums in float32 beside those of a backward, both whole
        return Held(weights=sizes.whole, gradients=(item + FLOAT32) * t, optimizer=state / ranks)
    if stage == 1:
        return Held(
            weights=sizes.whole, gradients=item * t, optimizer=state / ranks, buffers=twice * zero.bucket * item,
            step=FLOAT32 * t / ranks,
        )  # fmt: skip
    if stage == 2:
        return _stage_2(zero, sizes, ranks, state, twice * zero.bucket * item)
    own, moved = sizes.whole / ranks, 0.0
    gradients, optimizer = FLOAT32 * t / ranks, state / ranks
    step = FLOAT32 * min(t / ranks, zero.sub_group)
    if zero.offload_optimizer:
        moved, optimizer, gradients, step = optimizer + gradients * 2, 0.0, 0.0, 0.0
    if zero.offload_param:
        moved, own = moved + own, 0.0
    buffers = gathered + zero.bucket * item + sizes.largest_trained * item
    return Held(own, gradients, optimizer, buffers, step, moved)


def _stage_2(zero: Zero, sizes: Sizes, ranks: int, state: float, buckets: float) -> Held:
    """Stage 2. In half precision a backward leaves a rank's own gradients in 16 bits until they are added up."""
    t, item = sizes.trained, sizes.itemsize
    if zero.offload_optimizer:
        moved = (state + 2 * FLOAT32 * t + item * t) / ranks + sizes.largest_trained * item
        here = item * t / ranks
        return Held(sizes.whole, here, 0.0, buckets + 2 * sizes.largest_trained * item, 0.0, moved)
    flat = 0.0 if item < FLOAT32 else FLOAT32 * t / ranks
    buffers = buckets + (item + FLOAT32 - item if item == FLOAT32 else item) * t / ranks
    buffers += sizes.largest_trained * item
    return Held(sizes.whole, FLOAT32 * t / ranks, state / ranks, buffers, flat)


@dataclass(frozen=True)
class Exchanged:
    """Bytes that one rank sends in an optimizer step, as a ring sends them; it receives as many. gradients: averaged;
    weights: gathered, at stage 3 for every pass."""

    gradients: float
    weights: float

    @property
    def total(self) -> float:
        """The bytes of both together."""
        return self.gradients + self.weights


def exchanged(zero: Zero, sizes: Sizes, ranks: int, *, micro_batches: int, forwards: float) -> Exchanged:
    """What a rank sends in one optimizer step. micro_batches: of training in the step. forwards: passes of the engine
    without gradient in the step."""
    part, stage, t, item = (ranks - 1) / ranks, stage_of(zero, sizes), sizes.trained, sizes.itemsize
    if stage == 3:  # weights are gathered for every forward and every backward
        passes = forwards + (2 * micro_batches if t else 0)
        return Exchanged(part * t * item * micro_batches, part * sizes.whole * passes)
    if not t:
        return Exchanged(0.0, 0.0)
    if stage == 0:
        return Exchanged(2 * part * t * item, 0.0)
    if stage == 1:
        return Exchanged(2 * part * t * FLOAT32, part * t * item)
    return Exchanged(part * t * item * micro_batches, part * t * item)
