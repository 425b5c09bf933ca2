"""The workloads of `compare_rollouts.py`: requests, what ends an answer, and how long answers may become.

`ragged`: 64 prompts of 55 tokens, one answer each, of 1 to 43 tokens; a token with a full stop or a line break in it
ends an answer, as the end token does. `tails`: 64 prompts of 55 tokens whose answers have a length of their own,
log-uniform in 16 to 512, and no end token: a few answers run long after the others. `samples`: 8 prompts of 256 tokens
with 8 answers each, of 1 to 64 tokens, which end as those of `ragged` do. `wide`: 256 prompts of 16 to 512 tokens with
one answer each of 16 to 512 tokens, both log-uniform and scripted.

A prompt is random words in the model's chat template (`compare_rows.py`); for a model with random weights
(`random_models.py`), which has no tokenizer, and in `wide`, random ids.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import compare_rows
import random_models
from transformers import AutoTokenizer

from dsalign.rollout.api import Request


@dataclass(frozen=True)
class Shape:
    """The sizes of a set: how many prompts, tokens of a prompt, answers a prompt, and the tokens of an answer.

    shortest: 0 where answers end with an end token and have `longest` tokens at most; else answers have no end token
    and a scripted length, log-uniform from `shortest` to `longest`. shortest_prompt: 0 where all prompts have
    prompt_tokens; else their lengths are log-uniform from it to prompt_tokens.
    """

    prompts: int
    prompt_tokens: int
    samples: int
    longest: int
    shortest: int = 0
    shortest_prompt: int = 0


SETS = {
    "ragged": Shape(64, 55, 1, 43), "tails": Shape(64, 55, 1, 512, 16), "samples": Shape(8, 256, 8, 64),
    "wide": Shape(256, 512, 1, 512, 16, 16),
}  # fmt: skip
SMALL = {
    "ragged": Shape(6, 9, 1, 7), "tails": Shape(6, 9, 1, 16, 2), "samples": Shape(2, 12, 3, 8),
    "wide": Shape(6, 12, 1, 16, 2, 3),
}  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """What all ways are asked for: requests, and the tokens that end an answer, none where lengths are scripted."""

    requests: Sequence[Request]
    end_ids: frozenset[int]

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts, each counted once whatever the number of its answers."""
        return sum(len(request.prompt) for request in self.requests)

    @property
    def num_answers(self) -> int:
        """The number of answers of all requests."""
        return sum(len(request.keys) for request in self.requests)

    def first(self, num: int, longest: int) -> Workload:
        """The first num requests, one answer each, of at most `longest` tokens."""
        few = [replace(r, keys=r.keys[:1], max_new_tokens=min(r.max_new_tokens, longest)) for r in self.requests[:num]]
        return replace(self, requests=few)


def tail_lengths(num: int, shortest: int, longest: int, order: str = "tails") -> list[int]:
    """num lengths at the quantiles (i + 1/2) / num of the log-uniform distribution from shortest to longest, in an
    order that is mixed and always the same for the same word `order`."""
    lengths = [round(shortest * (longest / shortest) ** ((i + 0.5) / num)) for i in range(num)]
    random.Random(order).shuffle(lengths)
    return lengths


def workload(shape: Shape, model: str) -> Workload:
    """The requests of a set. model: a folder with SmolLM2's tokenizer, or random:NAME."""
    draw = random.Random("requests")
    widths = [shape.prompt_tokens] * shape.prompts
    if shape.shortest_prompt:
        widths = tail_lengths(shape.prompts, shape.shortest_prompt, shape.prompt_tokens, "prompts")
    if model.startswith(random_models.PREFIX):
        tokenizer, size = None, random_models.config_of(model).vocab_size
        ends = frozenset(range(2, size, 8))
    else:
        tokenizer = AutoTokenizer.from_pretrained(model)
        size, ends = len(tokenizer), sentence_ends(tokenizer)
    if tokenizer is None or shape.shortest_prompt:  # a template alone has more tokens than the shortest prompts
        ids = [[draw.randrange(3, size) for _ in range(width)] for width in widths]
    else:
        ids = prompts(tokenizer, Path(model), shape.prompts, shape.prompt_tokens)
    lengths = [shape.longest] * shape.prompts
    if shape.shortest:
        lengths, ends = tail_lengths(shape.prompts, shape.shortest, shape.longest), frozenset()
    keys = [[draw.getrandbits(64) for _ in range(shape.samples)] for _ in range(shape.prompts)]
    return Workload([Request(*one) for one in zip(ids, keys, lengths, strict=True)], ends)


def prompts(tokenizer: Any, model: Path, num: int, tokens: int) -> list[list[int]]:
    """num prompts of so many tokens each, words in the chat template. Raises ValueError where a prompt has others."""
    found = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        for text in prompt_texts(model, num, tokens)
    ]
    wrong = {len(ids) for ids in found} - {tokens}
    if wrong:
        raise ValueError(f"{model}: expected prompts of {tokens} tokens, got {sorted(wrong)}; give --model SmolLM2")
    return found


def prompt_texts(model: Path, num: int, tokens: int) -> list[str]:
    """num texts that have so many tokens each once they stand in SmolLM2's template."""
    words = compare_rows.one_token_words(
        json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    )
    count = tokens - compare_rows.TEMPLATE_TOKENS
    return [pair["prompt"] for pair in compare_rows.made_pairs(words, num, prompt_words=count, answer_words=1)]


def sentence_ends(tokenizer: Any) -> frozenset[int]:
    """The end token, and every token with a full stop or a line break in it."""
    line_break = "\u010a"  # how byte-level vocabularies write it
    found = {i for token, i in tokenizer.get_vocab().items() if "." in token or line_break in token}
    return frozenset(found | {tokenizer.eos_token_id})
