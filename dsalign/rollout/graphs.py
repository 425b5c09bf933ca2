"""CUDA graphs of a decoding step: on a GPU the launches of a small model's step take longer than the step itself.

A step computes a number of rows over a number of tokens, and both are fixed in a graph. They are rounded up to buckets,
and a bucket is recorded once. A graph reads the addresses that its weights and its cache had when it was recorded. It
lives no longer than the generation view: at ZeRO-3 weights are gathered on entering the view and stay where they are
until it is left, so graphs are as good there. Where an address has changed all the same, every graph is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from dsalign.rollout.layers import Gathered

Step: TypeAlias = Callable[[], None]
Bucket: TypeAlias = tuple[int, int]  # rows, tokens of each that are read
FEWEST_ROWS, FEWEST_TOKENS = 8, 256  # of a bucket; each next one is twice as large


class Recorded(Protocol):
    """A step that was recorded as a graph, of fixed shapes and at fixed addresses."""

    def replay(self) -> None:
        """Compute the step anew, from what the tensors hold now."""
        ...


# (a step, an earlier graph whose memory for intermediate results it may share) -> the graph. The step is not computed.
Capture: TypeAlias = Callable[[Step, "Recorded | None"], Recorded]


def bucket(number: int, least: int, most: int) -> int:
    """The size that `number` is rounded up to: least, its double, ..., and `most` at last. number: at most `most`."""
    size = least
    while size < number:
        size *= 2
    return min(size, most)


def addresses(tensors: Iterable[Tensor]) -> list[tuple[int, torch.Size]]:
    """The address and the shape of each tensor: what a graph takes for granted."""
    return [(tensor.data_ptr(), tensor.shape) for tensor in tensors]


class Graphs:
    """The graphs of one rollout, one a bucket; none is used after a tensor has moved. model: the generation view."""

    def __init__(self, capture: Capture, model: torch.nn.Module) -> None:
        self._capture = capture
        self._weights = [held for module in model.modules() for held in (module._parameters, module._buffers)]
        self._recorded: dict[Bucket, Recorded | None] = {}
        self._addresses: list[tuple[int, torch.Size]] = []

    def run(self, which: Bucket, step: Step, others: Iterable[Tensor]) -> None:
        """Compute a step whose shapes are those of a bucket. Its first time it is computed as it is, which compiles its
        kernels; the second time it is recorded.

        step: computes it without waiting for the device, from tensors and into tensors that outlive it: the weights of
        the model and `others`.
        """
        weights = (tensor for held in self._weights for tensor in held.values() if tensor is not None)
        places = addresses(chain(weights, others))
        if places != self._addresses:
            self.drop()
            self._addresses = places
        if which not in self._recorded:
            self._recorded[which] = None
            step()
            return
        found = self._recorded[which]
        if found is None:
            beside = next((one for one in self._recorded.values() if one is not None), None)
            found = self._recorded[which] = self._capture(step, beside)
        found.replay()

    def drop(self) -> None:
        """Forget every graph, and with it the memory of its intermediate results."""
        self._recorded = {}
        self._addresses = []


def capture_cuda(step: Step, beside: Any) -> torch.cuda.CUDAGraph:
    """Record a step as a CUDA graph. beside: an earlier one or None; both may use the same memory, as no result is read
    after the step that made it.

    Raises RuntimeError where the step does what a graph cannot hold, as waiting for the device.
    """
    graph = torch.cuda.CUDAGraph()
    pool = None if beside is None else beside.pool()
    try:
        # Threads of their own, as NCCL's watchdog, go on calling CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        raise RuntimeError(
            "rollout: expected a decoding step that a CUDA graph can hold, got one that waits for the GPU or allocates "
            f"outside ({error}); use --rollout plain"
        ) from error
    return graph


def obstacle(model: Any) -> str:
    """Why steps of a transformers model cannot be recorded, "" where they can: a forward that looks at numbers on the
    device, which a graph would freeze."""
    config = model.config.get_text_config()
    if any(isinstance(module, Gathered) for module in model.modules()):
        return "its layers are gathered one at a time"
    if not model._can_compile_fullgraph:
        return f"{type(model).__name__} has a forward that depends on data"
    if model._can_set_experts_implementation() and config._experts_implementation == "eager":
        return "experts_implementation is eager, a loop over the experts that have tokens"
    ropes = getattr(config, "rope_parameters", None) or {}
    kinds = {rope.get("rope_type") for rope in (ropes, *ropes.values()) if isinstance(rope, dict)}
    if "dynamic" in kinds:
        return "dynamic rotary frequencies depend on the longest row"
    return ""
