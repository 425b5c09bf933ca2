"""Weights that are whole one decoder layer at a time, for ZeRO-3 models that do not fit whole into a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dsalign import phases
from dsalign.engines import dist
from dsalign.engines.engine import whole


class Turns:
    """The forward passes of a rollout in which all ranks gather each layer together. Ranks need not have equally much
    to do: one that has nothing left, or that gave a pass up half way, takes part in the gathers of the others.

    engine: at ZeRO stage 3. layers: those of its model's decoder, in the order in which a pass runs them.
    """

    def __init__(self, engine: Any, layers: Sequence[nn.Module]) -> None:
        self._engine, self._each = engine, [list(layer.parameters()) for layer in layers]
        self._device = next(engine.module.parameters()).device
        self._next = len(layers)  # the layer that the pass under way gathers next

    def begin(self) -> None:
        """Begin a pass, when those of the other ranks begin theirs or have nothing left. Collective."""
        self._finish()
        dist.largest(1, self._device)
        self._next = 0

    @contextmanager
    def whole(self, number: int) -> Iterator[None]:
        """A context in which the weights of a layer are whole. Collective.

        Raises RuntimeError where it is not the next layer of the pass: the ranks would gather different ones.
        """
        if number != self._next:
            raise RuntimeError(f"rollout: expected layer {self._next} of the pass, got layer {number}")
        self._next += 1
        with whole(self._engine, self._each[number]):
            yield

    def end(self) -> None:
        """Take part in what other ranks still compute, until none does. Collective."""
        self._finish()
        while dist.largest(0, self._device):
            phases.mark()
            self._next = 0
            self._finish()

    def _finish(self) -> None:
        while self._next < len(self._each):
            with self.whole(self._next):
                pass


class Gathered(nn.Module):
    """A layer of a view, made anew in each forward pass from the model's layer, while its weights are whole.

    layer: the model's own, which stays as it is. number: which of the decoder's. copied: makes its copy for the view.
    """

    def __init__(self, layer: nn.Module, number: int, turns: Turns, copied: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self._of = (layer,)  # in a tuple, as a module of this one would be taken for a part of the view
        self._number, self._turns, self._copied = number, turns, copied

    def forward(self, *args: Any, **more: Any) -> Any:
        """The layer's forward pass. Collective."""
        with self._turns.whole(self._number), torch.no_grad():
            return self._copied(self._of[0]).eval()(*args, **more)

    def __getattr__(self, name: str) -> Any:
        """What a decoder asks its layers for, as their kind of attention; never a module or a weight of the model's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(self._of[0], name)
            if isinstance(found, (nn.Module, torch.Tensor)):
                raise
            return found
