"""Keys and values of running completions in preallocated slots, one a row, each row with a position of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dsalign.models.attention import capped
from dsalign.rollout.prompts import Place
from dsalign_kernels import decode_attention, uses_triton

BUCKET = 64  # tokens: the length of the slots is a multiple of it


class Slots:
    """The key-value cache of up to `rows` sequences: [rows, heads, length, D] a layer, for keys and for values.

    It stands where transformers expects its cache, and its attention replaces the layer's own. Nothing is concatenated:
    a new token is written into its place. length grows by doubling, up to `longest` tokens.
    """

    def __init__(self, rows: int, longest: int) -> None:
        self.rows, self.longest, self.length = rows, longest, 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._places: list[tuple[Tensor, slice, slice]] | None = None  # of a prefill: (slots, in the row, in the slots)
        self._rows = self._positions = torch.empty(0, dtype=torch.int64)
        self._live = 0
        self._masks: dict[int | None, Tensor] = {}

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens a slot, with what the slots hold kept."""
        if length <= self.length:
            return
        wanted = max(length, min(2 * self.length, self.longest))
        self.length = -(-wanted // BUCKET) * BUCKET
        for part in (self.keys, self.values):
            for layer, old in part.items():
                part[layer] = _grown(old, self.length)

    @property
    def nbytes(self) -> int:
        """The memory of all slots, bytes."""
        return sum(held.nbytes for held in self.tensors())

    @property
    def row_bytes(self) -> int:
        """The memory of one row of `longest` tokens, bytes, once a forward has shown the shapes of every layer."""
        sizes = (held.shape[1] * held.shape[3] * held.element_size() for held in self.tensors())
        return sum(sizes) * -(-self.longest // BUCKET) * BUCKET

    def tensors(self) -> list[Tensor]:
        """The keys and values of every layer."""
        return [*self.keys.values(), *self.values.values()]

    def clear(self) -> None:
        """Let the memory go; the slots hold nothing any more."""
        self.keys, self.values, self.length, self._masks = {}, {}, 0, {}

    def prefill(self, places: Sequence[Place], device: torch.device) -> None:
        """Say where the keys and values of the next forward go, whose input is a packed row of prompts."""
        self.reserve(max(place.at + place.stop - place.start for place in places))
        self._places = [
            (torch.tensor(x.slots, device=device), slice(x.start, x.stop), slice(x.at, x.at + x.stop - x.start))
            for x in places
        ]

    def decode(self, rows: Tensor, positions: Tensor, live: int) -> None:
        """Say where the keys and values of the next forward go: of slot i, one token at positions[i].

        rows: [n] int64, 0 to n - 1. positions: [n] int64. live: tokens of a slot that are read, above every position
        whose output is used, and at most what is reserved.
        """
        self._places, self._masks = None, {}
        self._rows, self._positions, self._live = rows, positions, live

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copy the first `length` tokens of slots into other slots; sources, targets: [m] int64."""
        for part in (self.keys, self.values):
            for held in part.values():
                held[targets, :, :length] = held[sources, :, :length]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values, [B, heads, T, D], and return all that its queries may see. Called by
        the attention layers of transformers."""
        if layer not in self.keys:
            heads, width, other = keys.shape[1], keys.shape[-1], values.shape[-1]
            self.keys[layer] = keys.new_zeros(self.rows, heads, self.length, width)
            self.values[layer] = values.new_zeros(self.rows, heads, self.length, other)
        held_keys, held_values = self.keys[layer], self.values[layer]
        if self._places is not None:
            for slots, source, target in self._places:
                held_keys[slots, :, target] = keys[:, :, source]
                held_values[slots, :, target] = values[:, :, source]
            return keys, values
        held_keys[self._rows, :, self._positions] = keys[:, :, 0]
        held_values[self._rows, :, self._positions] = values[:, :, 0]
        n = len(self._positions)
        return held_keys[:n, :, : self._live], held_values[:n, :, : self._live]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """Attention of one token a slot over what the slot holds. query: [n, H, 1, D]; key, value: [n, heads, live, D],
        where H / heads neighbouring queries share a head. Returns [n, H, 1, D]. On a GPU each row's live tokens alone
        are read, on a CPU all `live` ones."""
        if uses_triton("auto", query):
            rows = query[:, :, 0], key, value, self._positions
            return decode_attention(*rows, scaling=scaling, window=window, softcap=softcap)[:, :, None]
        n, heads = key.shape[:2]
        grouped = query.reshape(n, heads, -1, query.shape[-1])  # queries that share a head, as rows of one product
        mask = self._mask(window)
        if softcap is None:
            found = scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scaling)
        else:
            found = capped(grouped, key, value, mask, scaling, softcap)
        return found.reshape(n, query.shape[1], 1, -1)

    def _mask(self, window: int | None) -> Tensor:
        """Which of the live tokens a slot's token sees, [n, 1, 1, live] bool; one tensor a step and kind of layer."""
        if window not in self._masks:
            behind = self._positions[:, None] - torch.arange(self._live, device=self._positions.device)
            seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
            self._masks[window] = seen[:, None, None]
        return self._masks[window]

    # What else transformers asks of a cache.
    is_compileable = False

    def get_seq_length(self, layer: int = 0) -> int:
        """0: positions are given with each forward."""
        return 0

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        """(tokens, offset) of a mask that transformers would make; it makes none, as it is given one."""
        return self.length, 0


def _grown(old: Tensor, length: int) -> Tensor:
    new = old.new_zeros(*old.shape[:2], length, old.shape[3])
    new[:, :, : old.shape[2]] = old
    return new
