"""A packed row with shared prompts gives what each prompt and completion alone gives, for values and gradients."""

from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any

import pytest
import torch
from plain import plain_logps
from support import SIZES, VOCABULARY, random_groups, tiny_config
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from dsalign.contract.groups import Group
from dsalign.data.batches.packing import Inputs, Span, packed, padded
from dsalign.models import attention, load
from dsalign.models.attention import SharedPrefix
from dsalign.models.heads import CausalModel, ValueModel
from dsalign.models.last_layer import skip_unread_mlp

CPU = torch.device("cpu")
WINDOW = 6  # tokens; the rows below are up to 19 long
LAYERS = ["sliding_attention", "full_attention"]
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": tiny_config(),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "mistral window": MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma": GemmaConfig(**SIZES, head_dim=8),
    "gemma2 window": Gemma2Config(
        **SIZES, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, sliding_window=WINDOW
    ),
    "gemma3 window": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=WINDOW, layer_types=LAYERS),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
}


def build(config: PreTrainedConfig, shares: bool = True) -> CausalModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        attention_of = {"attn_implementation": load._attention_of(config)}  # as a run loads it
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **attention_of).eval()
    shares = shares and attention.share(model)
    if shares:
        skip_unread_mlp(model.get_decoder())
    return CausalModel(model, shares)


def groups() -> list[Group]:
    """Prompts of 2 to 9 tokens with 2, 1 and 3 completions of 1 to 10, with 2 that begin with the same three, and one
    prompt without any; between them, three that begin with the same ten tokens, and two of these are equal."""
    draw = random.Random(0)
    turn = tuple(range(10, 20))
    found = random_groups("prompts", 8)
    for i, prompt in {1: (*turn, 5, 6, 7), 3: turn, 5: (*turn, 5, 6, 7)}.items():
        found[i] = dataclasses.replace(found[i], prompt=prompt)

    def completion(*first: int) -> tuple[int, ...]:
        return (*first, *(draw.randrange(4, VOCABULARY) for _ in range(draw.randint(0, 9 - len(first)))), 2)

    begin = [(), (8, 9), (), (), (5, 6, 7), (), (), ()]
    many = zip(found, (2, 2, 1, 1, 2, 1, 3, 0), begin, strict=True)
    return [dataclasses.replace(g, completions=tuple(completion(*b) for _ in range(n))) for g, n, b in many]


def gradients(wrapped: CausalModel, inputs: Inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(log-probabilities, gradient of a sum with fixed uneven weights)."""
    wrapped.zero_grad()
    logps, _ = wrapped(inputs)
    weights = torch.linspace(-1, 2, len(logps))
    (weights * logps).sum().backward()
    return logps.detach(), {n: p.grad.clone() for n, p in wrapped.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("name", "worth"),
    [
        *((name, attention.WORTH_SPLITTING) for name in CONFIGS),
        *((n, 0) for n in CONFIGS if "window" in n),
        ("llama", 0),
    ],
)
def test_a_packed_row_is_every_sequence_alone(name: str, worth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities and gradients of eight groups in one row, against the untouched model one sequence at a time,
    and against padded rows; the window of 6 cuts what most tokens see. With worth = 0 a branch is a call of its own."""
    monkeypatch.setattr(attention, "WORTH_SPLITTING", worth)
    wrapped = build(CONFIGS[name])
    assert wrapped.shares
    ours, mine = gradients(wrapped, packed(groups(), CPU))
    assert wrapped.unsupported == ""
    untouched = build(CONFIGS[name], shares=False)
    torch.testing.assert_close(ours, torch.cat(plain_logps(untouched.model, groups()[:-1])), atol=5e-6, rtol=1e-5)
    theirs, want = gradients(untouched, padded(groups(), CPU))
    torch.testing.assert_close(ours, theirs, atol=5e-6, rtol=1e-5)
    assert mine.keys() == want.keys()
    size = max(float(g.norm()) for g in want.values())
    for parameter, gradient in want.items():
        assert float((mine[parameter] - gradient).norm()) <= 1e-5 * size, parameter


@pytest.mark.parametrize("name", ["mistral window", "gemma2 window", "gemma3 window"])
def test_the_window_matters_in_the_test_above(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the log-probabilities are other ones."""
    wrapped = build(CONFIGS[name])
    with torch.no_grad():
        right, _ = wrapped(packed(groups(), CPU))
        plain = SharedPrefix.parts
        monkeypatch.setattr(SharedPrefix, "parts", lambda self, window: plain(self, None))
        wrong, _ = wrapped(packed(groups(), CPU))
    assert float((right - wrong).abs().max()) > 0.01


@pytest.mark.parametrize("name", ["llama", "gemma2 window"])
def test_without_spans_the_model_is_what_it_was(name: str) -> None:
    """Rows, and generation with a cache and left padding."""
    ours, theirs = build(CONFIGS[name]), build(CONFIGS[name], shares=False)
    ids = torch.randint(4, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(ours.model.generate(ids, **settings), theirs.model.generate(ids, **settings))
        torch.testing.assert_close(ours(padded(groups(), CPU))[0], theirs(padded(groups(), CPU))[0])


def test_gradient_checkpointing_changes_nothing() -> None:
    """The layers are computed again in backward, with the spans they were computed with."""
    wrapped = build(CONFIGS["llama"])
    logps, want = gradients(wrapped, packed(groups(), CPU))
    wrapped.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wrapped.train()
    again, found = gradients(wrapped, packed(groups(), CPU))
    torch.testing.assert_close(again, logps)
    assert all(torch.allclose(found[n], g, atol=1e-7) for n, g in want.items())


def test_values_are_those_of_padded_rows() -> None:
    """One a position from the last prompt token on; the prompt's own value stands once a completion."""
    wrapped = build(CONFIGS["llama"])
    ours, theirs = ValueModel(wrapped.model, seed=0, shares=True), ValueModel(build(CONFIGS["llama"], False).model, 0)
    with torch.no_grad():
        for ends in (False, True):
            mine, want = ours(packed(groups(), CPU, ends=ends)), theirs(padded(groups(), CPU, ends=ends))
            assert len(mine) == sum(1 if ends else len(c) + 1 for g in groups() for c in g.completions)
            torch.testing.assert_close(mine, want, atol=5e-6, rtol=1e-5)


def test_who_sees_whom_by_hand() -> None:
    """Prompt a b, completions c d and e; then prompt f with completion g. With a window of 2, c (position 2) no longer
    sees a, nor does e, and d sees c only."""
    prefix = SharedPrefix([Span(2, (Span(2), Span(1))), Span(1, (Span(1),))], CPU)
    want = [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    i = torch.arange(7)
    assert prefix.position.tolist() == [0, 1, 2, 3, 2, 0, 1]
    found = prefix.allowed(None)(None, None, i[:, None], i[None, :])
    assert found.int().tolist() == want
    windowed = prefix.allowed(2)(None, None, i[:, None], i[None, :]).int()
    assert windowed[2:5].tolist() == [[0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 1, 0, 0]]
    first, second = prefix.parts(None)
    assert (first.queries, first.before) == (slice(0, 5), ())
    assert first.mask is not None and first.mask.int().tolist() == [row[:5] for row in want[:5]]
    assert second.queries == slice(5, 7) and second.mask is None, "one completion is plain causal attention"


def test_a_call_a_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stem of 2 with branches of 2, none and 1, behind a group of 3 tokens: of the second group's 25 scores, 2 x 3
    are of the stem to branches and 2 x 2 between branches; where these 10 are worth it, none of them is computed."""
    spans = [Span(1, (Span(2),)), Span(2, (Span(2), Span(0), Span(1)))]
    monkeypatch.setattr(attention, "WORTH_SPLITTING", 11)
    assert [p.queries for p in SharedPrefix(spans, CPU).parts(None)] == [slice(0, 3), slice(3, 8)]
    monkeypatch.setattr(attention, "WORTH_SPLITTING", 10)
    one, stem, first, second = SharedPrefix(spans, CPU).parts(None)
    assert (one.mask, stem.mask) == (None, None), "a group of one completion, and a stem, are plain causal attention"
    assert (stem.queries, first.queries, second.queries) == (slice(3, 5), slice(5, 7), slice(7, 8))
    assert first.before == second.before == (slice(3, 5),)
    assert first.mask is not None and first.mask.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert second.mask is not None and second.mask.int().tolist() == [[1, 1, 1]]
    row = torch.arange(8.0)[None, None, :, None]
    assert first.keys(row).flatten().tolist() == [3, 4, 5, 6] and second.keys(row).flatten().tolist() == [3, 4, 7]


def test_a_tree_of_three_levels_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """a, from which b and e go on, and from b c and d: each sees the way back to a."""
    prefix = SharedPrefix([Span(1, (Span(1, (Span(1), Span(1))), Span(1)))], CPU)
    i = torch.arange(5)
    want = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 0, 0, 1]]
    assert prefix.allowed(None)(None, None, i[:, None], i[None, :]).int().tolist() == want
    assert (prefix.position.tolist(), prefix.until.tolist()) == ([0, 1, 2, 2, 1], [5, 4, 3, 4, 5])
    monkeypatch.setattr(attention, "WORTH_SPLITTING", 1)
    row = torch.arange(5.0)[None, None, :, None]
    keys = [part.keys(row).flatten().tolist() for part in prefix.parts(None)]
    assert keys == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 4]]
    assert [p.mask is None for p in prefix.parts(None)] == [True, False, False, False, False]


def test_blocks_of_flex_attention_are_the_dense_mask() -> None:
    """300 tokens, so that some blocks of 128 are full, some partial, some empty: the block mask as a dense one."""
    prefix = SharedPrefix([Span(140, (Span(60), Span(30))), Span(20, (Span(50),))], CPU)
    i = torch.arange(300)
    want = prefix.allowed(None)(None, None, i[:, None], i[None, :])
    found = torch.zeros(384, 384, dtype=torch.bool)
    blocks = prefix.blocks(None)
    for at, value in ((blocks.kv_indices, blocks.kv_num_blocks), (blocks.full_kv_indices, blocks.full_kv_num_blocks)):
        for row in range(3):
            for column in at[0, 0, row, : int(value[0, 0, row])].tolist():
                found[row * 128 : (row + 1) * 128, column * 128 : (column + 1) * 128] = True
    assert not (want & ~found[:300, :300]).any(), "no token that is seen lies in a block that is skipped"
    assert not found[256:, :128].any(), "the second group starts at 230: its last rows skip the first block"


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("worth", [0, attention.WORTH_SPLITTING])
@pytest.mark.parametrize("window", [None, 7])
def test_flex_attention_is_the_attention_by_group(
    window: int | None, worth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's function, not compiled, on a CPU, whether or not a branch is a call of its own."""
    monkeypatch.setattr(attention, "_compiled", lambda: attention.flex_attention)
    monkeypatch.setattr(attention, "WORTH_SPLITTING", worth)
    prefix = SharedPrefix([Span(9, (Span(5, (Span(4), Span(3))), Span(2))), Span(2, (Span(5),))], CPU)
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 30, 16, generator=draw) for heads in (4, 2, 2))
    for softcap in (None, 1.5):
        ours = attention._by_blocks(query, key, value, prefix, 0.0, 0.3, window, softcap)
        theirs = attention._by_group(query, key, value, prefix, 0.0, 0.3, window, softcap)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_what_cannot_share() -> None:
    """A recurrent model, layers of chunked attention, and an attention that the user asked for."""
    assert not build(MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=1)).shares
    other = AutoModelForCausalLM.from_config(tiny_config(), attn_implementation="flex_attention")
    assert not attention.share(other) and other.config._attn_implementation == "flex_attention"
    chunked = build(CONFIGS["llama"], shares=False).model
    chunked.config.attention_chunk_size = 8
    assert not attention.can_share(chunked)
    chunked.config.attention_chunk_size = None
    assert attention.can_share(chunked)
    chunked.config.layer_types = ["linear_attention", "full_attention"]
    assert not attention.can_share(chunked)


def test_what_is_not_computed_is_said() -> None:
    """A layer that hands over attention sinks gets an answer without them, and the prefix says so."""
    prefix = SharedPrefix([Span(2, (Span(2),))], CPU)
    query = torch.randn(1, 4, 4, 8)
    layer: Any = torch.nn.Identity()
    attend = attention._attention("sdpa")
    attend(layer, query, query, query, None, shared_prefix=prefix)
    assert prefix.unsupported == ""
    attend(layer, query, query, query, None, shared_prefix=prefix, s_aux=torch.zeros(4))
    assert prefix.unsupported == "s_aux"
