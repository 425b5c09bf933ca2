"""Sampling against `generate` and plain forward passes of a tiny Llama, and its draws against their probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import VOCABULARY, tiny_config
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from dsalign.contract.rollouts import RolloutOptions
from dsalign.rollout.sampler import noise, pick, sample_completions

PROMPTS = [(5, 6, 7, 8, 9, 10, 11), (4,), (0, 2, 30), (60, 61), (12, 12, 12, 12)]  # 0 and the end are ids like others


@pytest.fixture(scope="module")
def model() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(tiny_config()).eval()


def draws(count: int, length: int, *, step: int = 0) -> Tensor:
    return torch.stack([noise(42, step, i, 0, length) for i in range(count)])


def drawn(model: Any, sampling: RolloutOptions, *ends: int, step: int = 0) -> list[tuple[tuple[int, ...], Tensor]]:
    """A completion of every prompt, in one batch."""
    return sample_completions(
        model, PROMPTS, draws(len(PROMPTS), sampling.max_new_tokens, step=step), sampling, frozenset(ends)
    )


def greedy_ends(model: Any, prompts: Sequence[Sequence[int]], ends: list[int] | None, length: int) -> list[Any]:
    """What `generate` does with each prompt alone."""
    found = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=ends,
            pad_token_id=0,
        )
        found.append(tuple(out[0, len(prompt) :].tolist()))
    return found


def test_greedy_is_generate(model: Any) -> None:
    """Token for token, whatever the padding on the left; with as many end ids as make some completions short."""
    whole = greedy_ends(model, PROMPTS, None, 12)
    ends = sorted({whole[0][4], whole[1][0], whole[2][7]})
    for stops in ([], ends):
        found = [ids for ids, _ in drawn(model, RolloutOptions(max_new_tokens=12, top_k=1), *stops)]
        assert found == greedy_ends(model, PROMPTS, stops or None, 12)
    lengths = [len(ids) for ids in found]
    assert lengths[1] == 1 and len(set(lengths)) >= 3


def test_greedy_is_generate_where_positions_are_learned() -> None:
    """GPT-2 adds an embedding of each position, so padding must not be counted; Llama sees distances only."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3, n_positions=64
        )
        gpt2 = GPT2LMHeadModel(config).eval()
    found = [ids for ids, _ in drawn(gpt2, RolloutOptions(max_new_tokens=12, top_k=1))]
    assert found == greedy_ends(gpt2, PROMPTS, None, 12)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.6, 1.0, 0), (1.7, 0.8, 20), (1.0, 1.0, 1)]
)
def test_log_probabilities_are_those_of_a_plain_forward(
    model: Any, temperature: float, top_p: float, top_k: int
) -> None:
    """log softmax of logits / temperature over all of the vocabulary, of each prompt and completion without padding."""
    found = drawn(model, RolloutOptions(max_new_tokens=9, temperature=temperature, top_p=top_p, top_k=top_k), 2)
    for prompt, (ids, logps) in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
        want = torch.log_softmax(logits / temperature, -1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        assert logps.dtype == torch.float32 and logps.shape == (len(ids),)
        torch.testing.assert_close(logps, want, rtol=0, atol=1e-5)


def test_a_sample_does_not_depend_on_its_batch(model: Any) -> None:
    """Alone, in a batch of five, and in the batch turned round: the same ids."""
    sampling, numbers = RolloutOptions(max_new_tokens=15, temperature=1.5), draws(5, 15)
    whole = sample_completions(model, PROMPTS, numbers, sampling, frozenset({2, 5}))
    turned = sample_completions(model, PROMPTS[::-1], numbers.flip(0), sampling, frozenset({2, 5}))[::-1]
    assert [ids for ids, _ in turned] == [ids for ids, _ in whole]
    for i, (ids, logps) in enumerate(whole):
        ((alone, its_logps),) = sample_completions(
            model, PROMPTS[i : i + 1], numbers[i : i + 1], sampling, frozenset({2, 5})
        )
        assert alone == ids
        torch.testing.assert_close(its_logps, logps, rtol=0, atol=1e-5)
    assert len({ids for ids, _ in whole}) == 5


def test_a_completion_stops_at_the_first_of_several_ends(model: Any) -> None:
    """The ends are its last token or nowhere; what was sampled before an end is what is sampled without ends."""
    free = drawn(model, RolloutOptions(max_new_tokens=30, temperature=1.5))
    ends = {2, 9, 33, 50, 61}
    found = drawn(model, RolloutOptions(max_new_tokens=30, temperature=1.5), *ends)
    for (ids, logps), (whole, _) in zip(found, free, strict=True):
        at = next((i + 1 for i, token in enumerate(whole) if token in ends), 30)
        assert ids == whole[:at] and len(logps) == at
    assert len({ids[-1] for ids, _ in found if ids[-1] in ends}) >= 2


@pytest.mark.parametrize("length", [1, 7])
def test_without_an_end_it_is_as_long_as_allowed(model: Any, length: int) -> None:
    assert [len(ids) for ids, _ in drawn(model, RolloutOptions(max_new_tokens=length), VOCABULARY + 5)] == [length] * 5
    assert [len(logps) for _, logps in drawn(model, RolloutOptions(max_new_tokens=length))] == [length] * 5


def test_it_stops_when_all_have_ended(model: Any) -> None:
    """No forward after the last completion's end: every token ends, so there is one."""
    calls = []

    def counted(**inputs: Any) -> Any:
        calls.append(inputs["input_ids"].shape)
        return model(**inputs)

    found = drawn(counted, RolloutOptions(max_new_tokens=20), *range(VOCABULARY))
    assert [len(ids) for ids, _ in found] == [1] * 5
    assert calls == [(5, 7)]


def test_no_graph_is_kept(model: Any) -> None:
    assert not any(logps.requires_grad for _, logps in drawn(model, RolloutOptions(max_new_tokens=3)))


def test_the_model_of_a_folder(tiny: Path) -> None:
    """What `from_pretrained` opens samples too."""
    opened = LlamaForCausalLM.from_pretrained(tiny).eval()
    assert [ids for ids, _ in drawn(opened, RolloutOptions(max_new_tokens=5, top_k=1))] == greedy_ends(
        opened, PROMPTS, None, 5
    )


LOGITS = torch.log(torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2]))


@pytest.mark.parametrize(
    ("sampling", "want"),
    [
        (RolloutOptions(max_new_tokens=1), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (RolloutOptions(max_new_tokens=1, top_k=5), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (RolloutOptions(max_new_tokens=1, top_k=9), [0.05, 0.4, 0.1, 0.25, 0.2]),
        (RolloutOptions(max_new_tokens=1, top_k=1), [0, 1, 0, 0, 0]),
        (RolloutOptions(max_new_tokens=1, top_k=2), [0, 8 / 13, 0, 5 / 13, 0]),
        (
            RolloutOptions(max_new_tokens=1, top_p=0.8),
            [0, 8 / 17, 0, 5 / 17, 4 / 17],
        ),  # 0.4 + 0.25 < 0.8 <= 0.4 + 0.25 + 0.2
        (RolloutOptions(max_new_tokens=1, top_p=0.6), [0, 8 / 13, 0, 5 / 13, 0]),
        (RolloutOptions(max_new_tokens=1, top_p=0.01), [0, 1, 0, 0, 0]),  # the most probable token is always there
        (RolloutOptions(max_new_tokens=1, top_p=0.9, top_k=2), [0, 8 / 13, 0, 5 / 13, 0]),
        (RolloutOptions(max_new_tokens=1, top_p=0.3, top_k=4), [0, 1, 0, 0, 0]),
        (RolloutOptions(max_new_tokens=1, temperature=0.5), [x / 0.275 for x in (0.0025, 0.16, 0.01, 0.0625, 0.04)]),
        (RolloutOptions(max_new_tokens=1, temperature=0.5, top_k=2), [0, 0.16 / 0.2225, 0, 0.0625 / 0.2225, 0]),
        # squared and normalised 0.58, 0.23, 0.15, 0.04, 0.01: without the temperature top_p would keep three
        (RolloutOptions(max_new_tokens=1, temperature=0.5, top_p=0.7), [0, 0.16 / 0.2225, 0, 0.0625 / 0.2225, 0]),
    ],
    ids=str,
)
def test_frequencies_are_the_filtered_probabilities(sampling: RolloutOptions, want: list[float]) -> None:
    """20,000 draws: within 4 standard deviations, sqrt(p (1 - p) / n), and never a token that was filtered out."""
    chosen, _ = pick(LOGITS.expand(20_000, -1) / sampling.temperature, noise(1, 2, 3, 4, 20_000), sampling)
    found = torch.bincount(chosen, minlength=5) / 20_000
    for share, p in zip(found.tolist(), want, strict=True):
        assert abs(share - p) <= 4 * (p * (1 - p) / 20_000) ** 0.5 + 1e-9


@pytest.mark.parametrize(
    "sampling",
    [
        RolloutOptions(max_new_tokens=1),
        RolloutOptions(max_new_tokens=1, top_k=2, top_p=0.9),
        RolloutOptions(max_new_tokens=1, top_k=1),
    ],
    ids=str,
)
def test_log_probabilities_are_those_before_the_filters(sampling: RolloutOptions) -> None:
    """Of the chosen token among all five, so at least 0.4 or 0.25 with top_k 2, not 8/13 or 5/13."""
    chosen, logps = pick(LOGITS.expand(200, -1), noise(0, 0, 0, 0, 200), sampling)
    torch.testing.assert_close(logps, LOGITS[chosen])


@pytest.mark.parametrize(
    "sampling",
    [
        RolloutOptions(max_new_tokens=1),
        RolloutOptions(max_new_tokens=1, top_k=3),
        RolloutOptions(max_new_tokens=1, top_p=0.5),
    ],
    ids=str,
)
def test_the_ends_of_the_draws_stay_among_what_is_allowed(sampling: RolloutOptions) -> None:
    """0 and the largest number below 1, with tokens of probability 0 first and last in the vocabulary."""
    logits = torch.tensor([[-torch.inf, 1.0, 1.0, 1.0, -torch.inf]]).expand(2, -1)
    extremes = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    chosen, logps = pick(logits, extremes, sampling)
    assert chosen.tolist() == [1, 2 if sampling.top_p < 1 else 3]
    assert logps.tolist() == pytest.approx([-math.log(3)] * 2)


def test_noise_is_a_function_of_its_keys() -> None:
    """The same again, a prefix where it is shorter, and different where any key is."""
    keys = (42, 3, 17, 1)
    first = noise(*keys, 8)
    assert first.dtype == torch.float64 and bool(((first >= 0) & (first < 1)).all())
    state = torch.random.get_rng_state()
    assert torch.equal(noise(*keys, 8), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(noise(*keys, 3), first[:3])
    others = [noise(*(k + (i == j) for j, k in enumerate(keys)), 8) for i in range(4)]
    assert not any(torch.equal(x, first) for x in others)
    assert not torch.equal(noise(42, 3, 1, 17, 8), noise(42, 3, 17, 1, 8))


def test_noise_is_uniform_over_completions() -> None:
    """The first numbers of 2,000 completions: a mean within 4 / sqrt(12 * 2000) of 1/2."""
    firsts = torch.stack([noise(0, step, i, 0, 1)[0] for step in range(20) for i in range(100)])
    assert abs(float(firsts.mean()) - 0.5) < 4 / (12 * 2000) ** 0.5
    assert len(set(firsts.tolist())) == 2000
