"""Token ids of a text put together from the ids of its words, each of which the tokenizer reads once: half of the time
of preparing a data set (docs/log.md, 2026-11-29).

A byte-level BPE tokenizer first splits text into pieces by a pattern and then merges within each piece. A word here is
a run of blanks and what follows up to the next blank behind something that is not white space. No pattern in PATTERNS
has a piece, or looks ahead, across such a border, so the ids of a text are those of its words, one behind the other.
"""

from __future__ import annotations

import json
import re
from collections import ChainMap
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from transformers import PreTrainedTokenizerBase

Ids = list[int]
MOST, LONGEST = 1 << 17, 64  # words that are remembered, characters of one: about 40 MiB
CUT, RUN = re.compile(r"(?<=\S)(?= )"), re.compile(r"\s ")
PATTERNS = frozenset(
    {
        # Qwen 2 and 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        # Qwen 3.5
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        # Llama 3
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    }
)


class Words:
    """The token ids of texts, word by word; ids of words that came before are remembered. encode: the tokenizer's own
    reading of texts; `reads_words` must be true for that tokenizer."""

    def __init__(self, encode: Callable[[Sequence[str]], list[Ids]]) -> None:
        self._encode, self._known = encode, dict[str, Ids]()

    def __call__(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text. Safe to call from several threads."""
        if len(self._known) > MOST:
            self._known = {}
        known = self._known
        words = [words_of(text) for text in texts]
        fresh = list(set(chain.from_iterable(words)) - known.keys())
        found = dict(zip(fresh, self._encode(fresh), strict=True))
        known.update((word, ids) for word, ids in found.items() if len(word) <= LONGEST)
        every: Mapping[str, Ids] = known if max(map(len, fresh), default=0) <= LONGEST else ChainMap(known, found)
        ids_of = every.__getitem__
        return [list(chain.from_iterable(map(ids_of, text))) for text in words]


def words_of(text: str) -> list[str]:
    """The words of a text; joined they are the text."""
    if "\0" in text or RUN.search(text):
        return CUT.split(text)
    return text.replace(" ", "\0 ").split("\0")  # the same in a third of the time


def reads_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer's pieces never cross a word's border: a byte-level BPE whose pattern is in PATTERNS and whose
    added tokens are found wherever they stand."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or type(backend.model).__name__ != "BPE" or backend.model.dropout:
        return False
    normalizer, pieces = _state(backend.normalizer), _state(backend.pre_tokenizer)
    parts = pieces.get("pretokenizers", [pieces])
    added = tokenizer.added_tokens_decoder.values()
    return (
        normalizer.get("type", "NFC") == "NFC"
        and bool(parts)
        and parts[-1].get("type") == "ByteLevel"
        and all(_keeps_words(part) for part in parts)
        and (parts[-1]["use_regex"] or any(part["type"] == "Split" for part in parts))
        and not any(" " in t.content or t.lstrip or t.rstrip or t.single_word for t in added)
    )


def _state(part: Any) -> dict[str, Any]:
    found: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return found


def _keeps_words(part: Mapping[str, Any]) -> bool:
    """Whether one step of a pre-tokenizer does the same to a word alone and within its text."""
    kind = part["type"]
    if kind == "Split":
        pattern = part["pattern"].get("Regex")
        return pattern in PATTERNS and part["behavior"] == "Isolated" and not part["invert"]
    return kind == "Digits" or (kind == "ByteLevel" and not part["add_prefix_space"])
