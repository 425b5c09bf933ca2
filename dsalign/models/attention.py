"""Attention over packed rows, in which a group's prompt stands once and its completions follow one after another.

A token of a completion sees the prompt and what stands before it in its own completion, and nothing of another
completion or another group, as if each completion stood in a row of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
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
    """Queries of a packed row whose attention is one call. queries: of one group, its stem, or one branch. stem: the
    tokens of the row before them that they see too, none unless they are a branch. mask: [queries, stem + queries]
    bool, true where a query sees a key; None = causal."""

    queries: slice
    stem: slice
    mask: Tensor | None

    def keys(self, x: Tensor) -> Tensor:
        """The keys or values that the queries see, [1, H, stem + queries, D], of those of the row, [1, H, T, D]."""
        own = x[:, :, self.queries]
        return torch.cat([x[:, :, self.stem], own], dim=2) if self.stem.stop > self.stem.start else own


class SharedPrefix:
    """The attention mask of one packed row, built once for all layers of a forward pass.

    spans: the groups in the row, in order. read: [n] int64, the positions whose last hidden state feeds the head,
    None = all. unsupported: names of the features that a layer asked for and that are not computed here, "" = none.
    """

    def __init__(self, spans: Sequence[Span], device: torch.device, *, read: Tensor | None = None) -> None:
        self.spans, self.read, self.unsupported = spans, read, ""
        self.lengths = [span.stem + sum(span.branches) for span in spans]
        branches = [[0] * s.stem + [i for i, n in enumerate(s.branches, 1) for _ in range(n)] for s in spans]
        groups = [[i] * n for i, n in enumerate(self.lengths)]
        flat = [x for part in branches for x in part], [x for part in groups for x in part]
        self.branch, self.group = (torch.tensor(x, device=device) for x in flat)
        self.position = torch.tensor([p for span in spans for p in span.positions()], device=device)
        self._parts: dict[int | None, list[Part]] = {}
        self._blocks: dict[int | None, BlockMask] = {}

    def allowed(self, window: int | None) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
        """The function mask_mod(batch, head, i, j) of FlexAttention: whether token i sees token j.

        window: how many tokens a sliding window holds, token i included, counted along i's own completion and prompt;
        None = no window.
        """

        def mask_mod(batch: Any, head: Any, i: Tensor, j: Tensor) -> Tensor:
            path = (self.branch[j] == 0) | (self.branch[j] == self.branch[i])
            seen = (self.group[i] == self.group[j]) & path & (i >= j)
            return seen if window is None else seen & (self.position[i] - self.position[j] < window)

        return mask_mod

    def parts(self, window: int | None) -> list[Part]:
        """The row as calls of a dense attention, in the order of its tokens: a group is one, or its stem is one and
        each of its branches, where the scores between two branches would be too many to compute for nothing."""
        if window not in self._parts:
            found, start = [], 0
            for span, length in zip(self.spans, self.lengths, strict=True):
                none, stem = slice(start, start), slice(start, start + span.stem)
                pieces = [(slice(start, start + length), none, len(span.branches) < 2)]
                unread = (length - span.stem) ** 2 - sum(n**2 for n in span.branches) + span.stem * (length - span.stem)
                if len(span.branches) > 1 and unread >= WORTH_SPLITTING:
                    ends = list(accumulate(span.branches, initial=stem.stop))
                    pieces = [(stem, none, True), *((slice(a, b), stem, False) for a, b in pairwise(ends) if b > a)]
                for queries, before, causal in pieces:
                    plain = causal and (window is None or queries.stop - queries.start <= window)
                    found.append(Part(queries, before, None if plain else self._mask(queries, before, window)))
                start += length
            self._parts[window] = found
        return self._parts[window]

    def _mask(self, queries: slice, stem: slice, window: int | None) -> Tensor:
        """The mask of a `Part`."""
        own = torch.arange(queries.start, queries.stop, device=self.branch.device)
        keys = torch.cat([torch.arange(stem.start, stem.stop, device=own.device), own])
        return self.allowed(window)(None, None, own[:, None], keys[None, :])

    def blocks(self, window: int | None) -> BlockMask:
        """The mask of the whole row, in the form in which FlexAttention skips blocks that no token sees."""
        if window not in self._blocks:
            size = len(self.branch)
            self._blocks[window] = create_block_mask(
                self.allowed(window), None, None, size, size, device=self.branch.device.type
            )
        return self._blocks[window]


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
    """Attention of a packed row on a CPU, one group at a time: scores between two groups are not even computed, nor,
    where they are many, those between two branches of a group.

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
