"""The reward function that comes with dsalign, so that online algorithms run without one of yours: text in, numbers
out."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

WORDS = 40  # a longer answer loses
WARM = (
    "absolutely",
    "dear",
    "delightful",
    "enjoy",
    "excellent",
    "friends?",
    "glad",
    "good question",
    "great",
    "happy",
    "hello",
    "help",
    "hey",
    "hi",
    "hope",
    "lovely",
    "of course",
    "please",
    "sure",
    "thanks?",
    "welcome",
    "with pleasure",
    "wonderful",
)
RUDE = ("annoying", "idiot", "leave me alone", "look it up", "shut up", "silly", "stupid", "who cares")


def friendly(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """How friendly and concise each completion is: warmth - rudeness - excess, in [-2, 1].

    warmth: half the number of different WARM words, at most 1. rudeness: 1 where there is a RUDE one. excess: (words -
    WORDS) / WORDS, in [0, 1]. A completion without a word is worth -1. prompts and columns are not read.
    """
    return [_friendly(text) for text in completions]


def _friendly(text: str) -> float:
    words = len(text.split())
    if words == 0:
        return -1.0
    warmth = min(1.0, sum(_has(phrase, text) for phrase in WARM) / 2)
    rudeness = float(any(_has(phrase, text) for phrase in RUDE))
    return warmth - rudeness - min(1.0, max(0, words - WORDS) / WORDS)


def _has(phrase: str, text: str) -> bool:
    return re.search(rf"\b{phrase}\b", text, re.IGNORECASE) is not None


FUNCTIONS: Mapping[str, Callable[..., list[float]]] = {"demo:friendly": friendly}
