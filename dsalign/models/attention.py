"""Attention over packed rows in which what completions begin with is computed once: a token sees that, and its own."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask, sdpa_mask

from dsalign.data.batches.packing import Span

logger = logging.getLogger(__name__)
PREFIX = "dsalign_"  # before the name of the attention that a row without spans goes to
BASES = {"sdpa": sdpa_mask, "eager": eager_mask}
ATTENDS = frozenset({"full_attention", "sliding_attention"})  # kinds of layer for which `allowed` is the whole truth
OTHER_MATHEMATICS = ("s_aux", "position_bias", "sinks")  # what a layer may ask for beside softmax(q k) v


class SharedPrefix:
    """Which token of one packed row sees which: the mask of all layers of a forward pass, built once.

    spans: the groups of the row in order. read: the positions whose last hidden state is looked at, None = all. before:
    that of a row with the same prompts, computed with `keep`; this row then has completions alone, which see the
    prompts of that one. unsupported: what a layer asked for that is not computed here, or "".
    """

    def __init__(
        self,
        spans: Sequence[Span],
        device: torch.device,
        *,
        read: Tensor | None = None,
        keep: bool = False,
        before: SharedPrefix | None = None,
    ) -> None:
        self.spans, self.read, self.unsupported, self._before = spans, read, "", before
        self._kept: dict[nn.Module, tuple[Tensor, Tensor]] | None = {} if keep else None
        self.lengths = [span.stem + sum(span.branches) for span in spans]
        branches = [[0] * s.stem + [i for i, n in enumerate(s.branches, 1) for _ in range(n)] for s in spans]
        groups = [[i] * n for i, n in enumerate(self.lengths)]
        flat = [x for part in branches for x in part], [x for part in groups for x in part]
        self.branch, self.group = (torch.tensor(x, device=device) for x in flat)
        self.position = torch.tensor([p for span in spans for p in span.positions()], device=device)
        self._dense: dict[int | None, list[Tensor | None]] = {}
        self._blocks: dict[int | None, BlockMask] = {}

    def last(self, spans: Sequence[Span]) -> list[int]:
        """Where in this row the prompts of those spans end, which are of a row behind it."""
        starts = accumulate(self.lengths[:-1], initial=0)
        return [start + span.stem - 1 for start, span in zip(starts, spans, strict=True)]

    def allowed(self, window: int | None) -> Callable[[Any, Any, Tensor, Tensor], Tensor]:
        """mask_mod(batch, head, i, j) of FlexAttention: whether token i sees token j. window: tokens back, itself
        among them; None = all."""

        def mask_mod(batch: Any, head: Any, i: Tensor, j: Tensor) -> Tensor:
            path = (self.branch[j] == 0) | (self.branch[j] == self.branch[i])
            seen = (self.group[i] == self.group[j]) & path & (i >= j)
            return seen if window is None else seen & (self.position[i] - self.position[j] < window)

        return mask_mod

    def dense(self, window: int | None) -> list[Tensor | None]:
        """A [t, t] bool mask a group of t tokens, or of the completions' tokens alone [c, t] where the prompts stand in
        the row before; None where it is the causal one."""
        if window not in self._dense:
            mask_mod, start = self.allowed(window), 0
            found: list[Tensor | None] = []
            for span, length in zip(self.spans, self.lengths, strict=True):
                i = torch.arange(start, start + length, device=self.branch.device)
                causal = len(span.branches) < 2 and (window is None or length <= window) and self._before is None
                asking = i if self._before is None else i[span.stem :]
                found.append(None if causal else mask_mod(None, None, asking[:, None], i[None, :]))
                start += length
            self._dense[window] = found
        return self._dense[window]

    def by_group(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """What each group of the row attends with in a layer, all [1, heads, tokens, D]."""
        if self._kept is not None:
            self._kept[layer] = key.detach(), value.detach()
        if self._before is None:
            yield from zip(*(_split(x, self.lengths) for x in (query, key, value)), strict=True)
            return
        counts = [sum(span.branches) for span in self.spans]
        parts = zip(*(_split(x, counts) for x in (query, key, value)), strict=True)
        for (q, k, v), (prompt_k, prompt_v) in zip(parts, self._before.prompts(layer, self.spans), strict=True):
            yield q, torch.cat([prompt_k, k], 2), torch.cat([prompt_v, v], 2)

    def prompts(self, layer: nn.Module, spans: Sequence[Span]) -> Iterator[tuple[Tensor, Tensor]]:
        """The keys and values kept in a layer, of the prompts of those spans, which are of a row behind this one."""
        assert self._kept is not None, "this row was computed without `keep`"
        whole = (_split(x, self.lengths) for x in self._kept[layer])
        for span, k, v in zip(spans, *whole, strict=True):
            yield k[:, :, : span.stem], v[:, :, : span.stem]

    def forget(self) -> None:
        """Give back the kept keys and values."""
        self._kept = None

    def blocks(self, window: int | None) -> BlockMask:
        """The whole row's mask for FlexAttention."""
        if window not in self._blocks:
            size = len(self.branch)
            self._blocks[window] = create_block_mask(
                self.allowed(window), None, None, size, size, device=self.branch.device.type
            )
        return self._blocks[window]


def _split(x: Tensor, lengths: Sequence[int]) -> Sequence[Tensor]:
    """[1, heads, T, D] by its tokens."""
    found: Sequence[Tensor] = x.split(list(lengths), dim=2)  # type: ignore[no-untyped-call]
    return found


def can_share(model: PreTrainedModel) -> bool:
    """Whether the attention of all layers of a model can be replaced by the one here: softmax over what `allowed`
    says, in every layer. The start-up check then compares numbers."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ATTENDS)
    chunked = getattr(config, "attention_chunk_size", None) is not None
    base = config._attn_implementation in BASES
    return base and kinds <= ATTENDS and not chunked and model._can_set_attn_implementation()


def share(model: PreTrainedModel) -> bool:
    """Let a model take packed rows with shared prompts; without spans it computes as before. False where it cannot."""
    if not can_share(model):
        return False
    model.set_attn_implementation(f"{PREFIX}{model.config.get_text_config()._attn_implementation}")
    return True


def _attention(base: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The attention function that transformers calls in every layer; query [B, H, T, D], the output [B, T, H, D]."""

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
        **more: Any,
    ) -> tuple[Tensor, Tensor | None]:
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
        if query.device.type == "cpu":
            out = _by_group(module, query, key, value, *how)
        else:
            out = _by_blocks(query, key, value, *how)
        return out.transpose(1, 2).contiguous(), None

    return attend


def _eager_of(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of the file that the layer is defined in."""
    function: Callable[..., Any] = sys.modules[type(module).__module__].eager_attention_forward
    return function


def _by_group(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: SharedPrefix,
    dropout: float,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """[1, H, T, D], group by group: no token meets one of another group, not even masked."""
    found = []
    for (q, k, v), mask in zip(prefix.by_group(layer, query, key, value), prefix.dense(window), strict=True):
        if softcap is not None:
            found.append(_capped(q, k, v, mask, dropout, scaling, softcap))
            continue
        found.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        )
    return torch.cat(found, dim=2)


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, scaling: float | None, softcap: float
) -> Tensor:
    """Attention whose scores are held within -+softcap: c tanh(s / c), arXiv:2408.00118, section 2."""
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
    """[1, H, T, D] by FlexAttention, which skips blocks of the row that no token sees."""
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
