"""The engines `local` and `plain`: the same tokens in any batch, forward passes counted, and nothing concatenated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support import VOCABULARY, tiny_config
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from dsalign.contract.rollout_options import RolloutOptions
from dsalign.models import attention
from dsalign.rollout import local, plain
from dsalign.rollout.api import Completion, Request
from dsalign.rollout.pick import token_key
from dsalign.rollout.slots import Slots
from dsalign.rollout.view import view_of

PROMPTS = [(5, 6, 7, 8, 9, 10, 11), (4,), (0, 2, 30), (60, 61), (12, 12, 12, 12)]  # 0 and the end are ids like others
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
MAKERS: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(tiny_config()),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "mistral, a window of 5": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=5)),
    "gemma2, windows and softcaps": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **SIZES, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
            attn_implementation="eager",
        )
    ),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, n_positions=64)
    ),
}  # fmt: skip


def made(name: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = MAKERS[name]().eval()
    assert attention.share(model)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return made("llama")


def requests(*, samples: int = 3, step: int = 0, most: Sequence[int] = (5, 12, 19, 26, 33)) -> list[Request]:
    return [
        Request(prompt, [token_key(42, step, i, k) for k in range(samples)], n)
        for i, (prompt, n) in enumerate(zip(PROMPTS, most, strict=True))
    ]


def same(ours: list[list[Completion]], theirs: list[list[Completion]], gap: float = 1e-5) -> None:
    """The same tokens and ends, and log-probabilities within `gap` nats."""
    for one, other in zip((c for a in ours for c in a), (c for a in theirs for c in a), strict=True):
        assert (one.ids, one.ended) == (other.ids, other.ended)
        torch.testing.assert_close(one.logps, other.logps, rtol=0, atol=gap)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("rows", [64, 4, 1])
def test_local_is_plain(name: str, rows: int) -> None:
    """Tokens are identical and log-probabilities within 1e-5 nats, for full and sliding windows, shared heads, capped
    scores and learned positions, with every row at once, with rows that are taken again, and one after another."""
    model = made(name)
    options, ends = RolloutOptions(temperature=1.3), frozenset({2, 5})
    want = plain.decode(model, requests(), options, ends)
    assert len({len(c.ids) for answer in want for c in answer}) > 4 and any(c.ended for a in want for c in a)
    same(local.decode(local.prepare(view_of(model)), requests(), options, ends, rows), want)


@pytest.mark.parametrize("decode", [local.decode, plain.decode], ids=["local", "plain"])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.7, 0.8, 20), (1.0, 1.0, 1)]
)
def test_log_probabilities_are_those_of_a_plain_forward(
    decode: Any, model: Any, temperature: float, top_p: float, top_k: int
) -> None:
    """log softmax of logits / temperature over all of the vocabulary, of each prompt and completion without padding."""
    options = RolloutOptions(temperature=temperature, top_p=top_p, top_k=top_k)
    for prompt, answer in zip(PROMPTS, decode(view_of(model), requests(), options, frozenset({2})), strict=True):
        for one in answer:
            with torch.no_grad():
                logits = model(torch.tensor([[*prompt, *one.ids]])).logits[0, len(prompt) - 1 : -1]
            want = torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(one.ids)[:, None])[:, 0]
            assert one.logps.dtype == torch.float32 and not one.logps.requires_grad
            torch.testing.assert_close(one.logps, want, rtol=0, atol=1e-5)


def greedy(model: Any, prompt: Sequence[int], ends: list[int] | None, length: int) -> tuple[int, ...]:
    """What transformers' `generate` does with a prompt alone."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False, eos_token_id=ends,
        pad_token_id=0,
    )  # fmt: skip
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("decode", [local.decode, plain.decode], ids=["local", "plain"])
@pytest.mark.parametrize("name", ["llama", "gpt2, learned positions"])
def test_greedy_is_generate(decode: Any, name: str) -> None:
    """Token for token, whatever else is in the batch; with as many end ids as make some completions short."""
    model = made(name)
    whole = [greedy(model, prompt, None, 12) for prompt in PROMPTS]
    ends = sorted({whole[0][4], whole[1][0], whole[2][7]})
    for stops in ([], ends):
        asked = requests(samples=1, most=[12] * 5)
        found = decode(view_of(model), asked, RolloutOptions(top_k=1), frozenset(stops))
        assert [c.ids for (c,) in found] == [greedy(model, prompt, stops or None, 12) for prompt in PROMPTS]


@pytest.mark.parametrize("decode", [local.decode, plain.decode], ids=["local", "plain"])
def test_a_sample_is_a_function_of_its_key(decode: Any, model: Any) -> None:
    """Alone, in a batch of fifteen, in the batch turned round, and as a later sample of the prompt: the same ids; with
    another step or number others."""
    options, ends = RolloutOptions(temperature=1.5), frozenset({2, 5})
    whole = decode(view_of(model), requests(), options, ends)
    same(decode(view_of(model), requests()[::-1], options, ends)[::-1], whole)
    for request, answer in zip(requests(), whole, strict=True):
        for key, one in zip(request.keys, answer, strict=True):
            same(
                decode(view_of(model), [Request(request.prompt, [key], request.max_new_tokens)], options, ends), [[one]]
            )
    other = decode(view_of(model), requests(step=1), options, ends)
    assert all(a.ids != b.ids for x, y in zip(whole[2:], other[2:], strict=True) for a, b in zip(x, y, strict=True))
    assert len({c.ids for answer in whole for c in answer}) == 15


@pytest.mark.parametrize("decode", [local.decode, plain.decode], ids=["local", "plain"])
def test_a_completion_ends_at_the_first_end_token_or_at_its_own_length(decode: Any, model: Any) -> None:
    """What was sampled before an end is what is sampled without ends; a sampled pad is a token like others."""
    free = decode(view_of(model), requests(), RolloutOptions(temperature=1.5), frozenset())
    assert [[len(c.ids) for c in answer] for answer in free] == [[n] * 3 for n in (5, 12, 19, 26, 33)]
    assert not any(c.ended for answer in free for c in answer)
    ends = frozenset({2, 9, 33, 50, 61})
    found = decode(view_of(model), requests(), RolloutOptions(temperature=1.5), ends)
    for one, whole in zip((c for a in found for c in a), (c for a in free for c in a), strict=True):
        at = next((i + 1 for i, token in enumerate(whole.ids) if token in ends), len(whole.ids))
        assert one.ids == whole.ids[:at] and len(one.logps) == at and one.ended == (one.ids[-1] in ends)
    assert any(0 in c.ids for answer in free for c in answer)


class Counted:
    """Counts the tokens that pass through a decoder, prompts (packed in one row) and decoded rows apart."""

    def __init__(self, model: Any) -> None:
        self.prompt_tokens, self.decoded, self.passes = 0, 0, 0
        model.get_decoder().register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, more: Any) -> None:
        size = more["input_ids"].numel()
        self.passes += 1
        if "shared_prefix" in more:
            self.prompt_tokens += size
        else:
            self.decoded += size


@pytest.mark.parametrize("rows", [64, 6])
def test_no_row_is_computed_in_vain(model: Any, rows: int) -> None:
    """Prompts once whatever the number of samples; decoding, one row a sampled token but the first of each completion,
    which the prompt's pass gave."""
    view = view_of(model)
    count = Counted(view)
    found = local.decode(view, requests(), RolloutOptions(temperature=1.5), frozenset({2, 5, 9}), rows)
    tokens = sum(len(c.ids) for answer in found for c in answer)
    assert count.prompt_tokens == sum(map(len, PROMPTS))
    assert count.decoded == tokens - 15


TURN = tuple(range(20, 32))  # with which prompts may begin
BEGIN_ALIKE = [(*TURN, 5), (*TURN, 5, 6, 7), (9, 8), (*TURN, 40), (*TURN, 40)]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("rows", [64, 4])
def test_a_common_beginning_is_computed_once(name: str, rows: int) -> None:
    """With the tokens and log-probabilities of `plain`: 12 tokens for four prompts that all start at once."""
    model = made(name)
    options, ends = RolloutOptions(temperature=1.3), frozenset({2, 5})
    asked = [Request(prompt, [token_key(7, 0, i, k) for k in range(2)], 20) for i, prompt in enumerate(BEGIN_ALIKE)]
    view = local.prepare(view_of(model))
    count = Counted(view)
    same(local.decode(view, asked, options, ends, rows), plain.decode(model, asked, options, ends))
    if rows == 64:
        assert count.prompt_tokens == sum(map(len, BEGIN_ALIKE)) - 3 * len(TURN)


def test_nothing_is_concatenated(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache grows a few times in all, not with each token: between two growths its storage stays where it is."""
    grown, places = [], set()
    reserve, update = Slots.reserve, Slots.update

    def counted(self: Slots, length: int) -> None:
        before = self.length
        reserve(self, length)
        grown.append(self.length != before)

    def noted(self: Slots, keys: Any, values: Any, layer: int, *more: Any, **named: Any) -> Any:
        found = update(self, keys, values, layer, *more, **named)
        places.add((layer, self.keys[layer].data_ptr()))
        return found

    monkeypatch.setattr(Slots, "reserve", counted)
    monkeypatch.setattr(Slots, "update", noted)
    most = [150, 150, 150, 150, 150]
    local.decode(view_of(model), requests(most=most), RolloutOptions(), frozenset())
    assert sum(grown) == 3  # 64, 128, 192
    layers = model.config.num_hidden_layers
    assert len(places) <= 3 * layers


def test_more_samples_than_rows(model: Any) -> None:
    """A prompt whose samples do not fit at once starts in parts, with the same tokens."""
    options = RolloutOptions(temperature=1.5)
    want = local.decode(view_of(model), requests(samples=7), options, frozenset({2}))
    same(local.decode(view_of(model), requests(samples=7), options, frozenset({2}), 3), want)


@pytest.mark.parametrize("decode", [local.decode, plain.decode], ids=["local", "plain"])
def test_no_requests(decode: Any, model: Any) -> None:
    assert decode(view_of(model), [], RolloutOptions(), frozenset({2})) == []
