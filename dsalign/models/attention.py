"""Attention over packed rows, in which what several sequences begin with stands once: a tree of spans of tokens.

A token sees the tokens before it in its own span and in those that this one goes on from, and nothing of another
branch, as if each sequence stood in a row of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from dsalign.data.batches.packing import Span

# (query, key, value, scaling, sliding window, softcap) -> output: the attention of a key-value cache of our own.
CachedRows: TypeAlias = Callable[[Tensor, Tensor, Tensor, "float | None", "int | None", "float | None"], Tensor]
PREFIX = "dsalign_"  # dsalign_sdpa: ours for a packed row, transformers' sdpa for any other
BASES = {"sdpa": sdpa_mask, "eager": eager_mask}
ATTENDS = frozenset({"full_attention", "sliding_attention"})  # kinds of layer that mix tokens as `allowed` says only
OTHER_MATHEMATICS = ("s_aux", "position_bias", "sinks")  # arguments of layers that compute more than softmax(q k) v
WORTH_SPLITTING = 32768  # scores that nothing reads: a group with as many is worth a call a branch


@dataclass(frozen=True)
class Part:
    """Queries of a packed row whose attention is one call. queries: of one span, with its branches or without. before:
    the spans that theirs goes on from, which they see too. mask: [queries, before + queries] bool, true where a query
    sees a key; None = causal."""

    queries: slice
    before: tuple[slice, ...]
    mask: Tensor | None

    def keys(self, x: Tensor) -> Tensor:
        """The keys or values that the queries see, [1, H, before + queries, D], of those of the row, [1, H, T, D]."""
        own = x[:, :, self.queries]
        return torch.cat([*(x[:, :, one] for one in self.before), own], dim=2) if self.before else own


class SharedPrefix:
    """The attention mask of one packed row, built once for all layers of a forward pass.

    spans: those of the row that go on from nothing, in order. read: [n] int64, the positions whose last hidden state
    feeds the head, None = all. unsupported: names of the features that a layer asked for and that are not computed
    here, "" = none. position: [T] int64, position ids. until: [T] int64, the position in the row up to which the tokens
    behind one see it: the end of its span's last branch.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device, *, read: Tensor | None = None) -> None:
        self.spans, self.read, self.unsupported = spans, read, ""
        until = [end for span, start in _starts(spans, 0) for end in _ends(span, start)]
        self.until = torch.tensor(until, device=device)
        self.position = torch.tensor([p for span in spans for p in span.positions()], device=device)
        self._parts: dict[int | None, list[Part]] = {}
        self._blocks: dict[int | None, BlockMask] = {}

    def allowed(self, window: int | None) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
        """The function mask_mod(batch, head, i, j) of FlexAttention: whether token i sees token j.

        window: how many tokens a sliding window holds, token i included, counted along i's own sequence; None = no
        window.
        """

        def mask_mod(batch: Any, head: Any, i: Tensor, j: Tensor) -> Tensor:
            seen = (i >= j) & (i < self.until[j])
            return seen if window is None else seen & (self.position[i] - self.position[j] < window)

        return mask_mod

    def parts(self, window: int | None) -> list[Part]:
        """The row as calls of a dense attention, in the order of its tokens: a span is one with all its branches, or it
        is one and each of its branches, where the scores that nothing reads would be too many."""
        if window not in self._parts:
            found = list[Part]()
            for span, start in _starts(self.spans, 0):
                self._add(found, span, start, (), window)
            self._parts[window] = found
        return self._parts[window]

    def _add(self, found: list[Part], span: Span, start: int, before: tuple[slice, ...], window: int | None) -> None:
        splits = _unread(span) >= WORTH_SPLITTING
        queries = slice(start, start + (span.length if splits else span.size))
        plain = not before and (splits or _is_path(span)) and (window is None or queries.stop - start <= window)
        found.append(Part(queries, before, None if plain else self._mask(queries, before, window)))
        for one, at in _starts(span.branches, queries.stop) if splits else ():
            if one.size:
                self._add(found, one, at, (*before, queries), window)

    def _mask(self, queries: slice, before: tuple[slice, ...], window: int | None) -> Tensor:
        """The mask of a `Part`."""
        ranges = [torch.arange(x.start, x.stop, device=self.until.device) for x in (*before, queries)]
        return self.allowed(window)(None, None, ranges[-1][:, None], torch.cat(ranges)[None, :])

    def blocks(self, window: int | None) -> BlockMask:
        """The mask of the whole row, in the form in which FlexAttention skips blocks that no token sees."""
        if window not in self._blocks:
            size = len(self.until)
            self._blocks[window] = create_block_mask(
                self.allowed(window), None, None, size, size, device=self.until.device.type
            )
        return self._blocks[window]


def _starts(spans: Sequence[Span], start: int) -> Iterator[tuple[Span, int]]:
    """Each of some spans that stand one behind the other, and where it starts."""
    return zip(spans, accumulate((span.size for span in spans), initial=start), strict=False)


def _ends(span: Span, start: int) -> Iterator[int]:
    """Of each token of a span that starts there, the end of what sees it."""
    yield from [start + span.size] * span.length
    for one, at in _starts(span.branches, start + span.length):
        yield from _ends(one, at)


def _is_path(span: Span) -> bool:
    """Whether a span branches nowhere, so that its attention is a plain causal one."""
    return not span.branches or (len(span.branches) == 1 and _is_path(span.branches[0]))


def _unread(span: Span) -> int:
    """Scores of a span that one call computes and nothing reads: of its own tokens to its branches, and between two
    branches; none where it branches nowhere."""
    inside = sum(map(_unread, span.branches))
    if len(span.branches) < 2:
        return inside
    sizes = [one.size for one in span.branches]
    return inside + span.length * sum(sizes) + sum(sizes) ** 2 - sum(n**2 for n in sizes)


def can_share(model: PreTrainedModel) -> bool:
    """Whether every layer of a model mixes tokens by softmax(q k) v over a causal or a sliding window, and by nothing
    else, so that the attention here can take its place. That it gives the model's own numbers, the check at start-up
    sees."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ATTENDS)
    chunked = getattr(config, "attention_chunk_size", None) is not None
    base = config._attn_implementation in BASES
    return base and kinds <= ATTENDS and not chunked and model._can_set_attn_implementation()


def share(model: PreTrainedModel) -> bool:
    """Let a model compute packed rows; all other rows it computes as before. Returns whether it can (`can_share`)."""
    if model.config.get_text_config()._attn_implementation.startswith(PREFIX):
        return True
    if not can_share(model):
        return False
    model.set_attn_implementation(f"{PREFIX}{model.config.get_text_config()._attn_implementation}")
    return True


def _attention(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that transformers calls in every layer. base: the name of transformers' own attention for
    rows that are not packed. query: [B, H, T, D]; the output is [B, T, H, D], with None in place of weights."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        shared_prefix: SharedPrefix | None = None,
        cached_rows: CachedRows | None = None,
        **more: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if cached_rows is not None:
            return cached_rows(query, key, value, scaling, sliding_window, softcap).transpose(1, 2), None
        if shared_prefix is None:
            windowed = {"sliding_window": sliding_window, "softcap": softcap}
            plain = sdpa_attention_forward if base == "sdpa" else _eager_of(module)
            found: tuple[Tensor, Tensor | None] = plain(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **windowed, **more
            )
            return found
        wanted = [name for name in OTHER_MATHEMATICS if more.get(name) is not None]
        if wanted:  # not raised: under ZeRO-3 a forward that ends half way leaves the engine in disorder
            shared_prefix.unsupported = ", ".join(wanted)
        how = shared_prefix, dropout, scaling, sliding_window, softcap
        compute = _by_group if query.device.type == "cpu" else _by_blocks
        out = compute(query, key, value, *how)
        return out.transpose(1, 2).contiguous(), None

    return attend


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention function of the file that defines the layer: each architecture in transformers has one."""
    function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return function


def _by_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: SharedPrefix,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of a packed row on a CPU, one part at a time: scores between two groups are not even computed, nor,
    where they are many, those between two branches.

    query, key, value: [1, H, T, D], key and value with fewer heads where queries share them. scaling: of the scores,
    None = 1 / sqrt(D). softcap: scores are held within -+softcap. Returns [1, H, T, D].
    """
    found = []
    for part in prefix.parts(window):
        q, k, v, mask = query[:, :, part.queries], part.keys(key), part.keys(value), part.mask
        if softcap is not None:
            found.append(capped(q, k, v, mask, scaling, softcap, dropout))
            continue
        found.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(found, dim=2)


def capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float,
    dropout: float = 0.0,
) -> Tensor:
    """Attention with capped scores, softcap tanh(scores / softcap) (arXiv:2408.00118, section 2), which PyTorch's
    scaled_dot_product_attention does not have.

    q: [B, H, t, D]. k, v: [B, heads, T, D], heads = H or fewer, which queries share. mask: bool that broadcasts to
    [B, H, t, T], true where a query sees a key; None = causal. scaling: of the scores, None = 1 / sqrt(D).
    """
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones_like(scores[0, 0], dtype=torch.bool).tril() if mask is None else mask
    weights = torch.softmax(scores.float().masked_fill(~seen, -torch.inf), -1).to(q.dtype)
    return nn.functional.dropout(weights, dropout) @ v


@cache
def _compiled() -> Callable[..., Any]:
    compiled: Callable[..., Any] = torch.compile(flex_attention, dynamic=True)
    return compiled


def _by_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: SharedPrefix,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of a packed row on a GPU, as `_by_group` has it, by FlexAttention: blocks of 128 x 128 tokens in which
    no token sees another are skipped."""
    if dropout:
        prefix.unsupported = "attention dropout"

    # A tensor: compiled for any length, FlexAttention does not take a Python float from outside the function.
    cap = torch.full((1,), 1.0 if softcap is None else softcap, device=query.device)

    def capped(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return cap[head * 0] * torch.tanh(score / cap[head * 0])

    found: Tensor = _compiled()(
        query,
        key,
        value,
        score_mod=None if softcap is None else capped,
        block_mask=prefix.blocks(window),
        scale=scaling,
        enable_gqa=True,
    )
    return found


for _base, _mask in BASES.items():
    AttentionInterface.register(f"{PREFIX}{_base}", _attention(_base))
    AttentionMaskInterface.register(f"{PREFIX}{_base}", _mask)
