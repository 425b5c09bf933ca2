"""Text of a row that spells a special token stays text: it never ends a turn or opens one.

The spelled tokens of a row's texts are replaced by private characters (`masked`) before the template writes the
conversation, so that what is left in the rendered text was written by the template. A twin of the tokenizer, in which
special tokens have other names, then reads the whole (`Twin.ids`).
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from dsalign.contract.groups import Message, Tool
from dsalign.data.tokens.words import Ids

TEXT, STRUCTURE = 0x100000, 0x108000  # private characters: of a token spelled in a text, of one that the template wrote
PRIVATE = re.compile("[\U00100000-\U0010ffff]")


class Spelled:
    """The special tokens of a tokenizer, as texts may spell them. end_ids: ids that end a turn, special or not."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_ids: Iterable[int]) -> None:
        self._tokenizer, ends = tokenizer, set(end_ids)
        added = {i: t for i, t in tokenizer.added_tokens_decoder.items() if t.content.strip()}
        names = {t.content for i, t in added.items() if t.special or i in ends}
        self.names = sorted(names, key=lambda name: (-len(name), name))  # the longest first, as one may begin another
        self._pattern = re.compile("|".join(map(re.escape, self.names)) or r"(?!)")
        self._first = sorted({name[0] for name in self.names})
        self._text = {name: chr(TEXT + i) for i, name in enumerate(self.names)}
        self._shown = {ord(mark): name for name, mark in self._text.items()}
        self._lock = threading.Lock()

    def within(self, texts: Iterable[str]) -> bool:
        """Whether one of the texts spells a special token."""
        for text in texts:
            for first in self._first:
                if first in text:
                    if self._pattern.search(text):
                        return True
                    break
        return False

    def masked(self, value: Any) -> Any:
        """A value with private characters in place of spelled tokens, at any depth. Raises ValueError for text that has
        such characters of its own."""
        if isinstance(value, str):
            if PRIVATE.search(value):
                raise ValueError(
                    "expected text that spells a special token to have no character beyond U+FFFFF, got some; "
                    "leave the row out"
                )
            return self._pattern.sub(lambda found: self._text[found[0]], value)
        if isinstance(value, Mapping):
            return {self.masked(name): self.masked(item) for name, item in value.items()}
        return [self.masked(item) for item in value] if isinstance(value, list | tuple) else value

    def shown(self, text: str) -> str:
        """A masked text as it was written."""
        return text.translate(self._shown)

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of masked texts, without a BOS of the tokenizer's own. Raises ValueError for a tokenizer that is
        not of the library `tokenizers`."""
        with self._lock:
            encode = self._twin
        named = [self._pattern.sub(lambda found: self._structure[found[0]], text) for text in texts]
        return encode([self.shown(text) for text in named])

    @cached_property
    def _structure(self) -> dict[str, str]:
        return {name: chr(STRUCTURE + i) for i, name in enumerate(self.names)}

    @cached_property
    def _twin(self) -> Callable[[Sequence[str]], list[Ids]]:
        """Encodes texts in which special tokens are written as the characters of `_structure`."""
        backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(
                "expected a tokenizer of the library tokenizers for text that spells a special token, got "
                f"{type(self._tokenizer).__name__}; use --special_tokens_in_text true, or leave such rows out"
            )
        twin: Any = Tokenizer.from_str(json.dumps(_renamed(json.loads(backend.to_str()), self._structure)))
        return lambda texts: [found.ids for found in twin.encode_batch(list(texts), add_special_tokens=False)]


def _renamed(state: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The state of a tokenizer in which some added tokens have other names and the same ids."""
    for token in state["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = state["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(name, name): i for name, i in model["vocab"].items()}
    elif isinstance(model.get("vocab"), list):
        model["vocab"] = [[names.get(name, name), score] for name, score in model["vocab"]]
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    return {**state, "post_processor": None, "truncation": None, "padding": None}


def texts_of(turns: Iterable[Message | str], tools: Sequence[Tool] = ()) -> Iterator[str]:
    """Every text of some messages and tools, their keys too."""
    for turn in turns:
        if isinstance(turn, str):
            yield turn
        elif len(turn) == 2:
            yield turn["content"]
        else:
            yield from _texts(turn)
    for tool in tools:
        yield from _texts(tool)


def _texts(value: object) -> Iterator[str]:
    return (leaf for leaf in leaves(value) if isinstance(leaf, str))


def leaves(value: object) -> Iterator[object]:
    """Everything in a value that is no object or list itself; and the keys of objects, as text."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield str(name)
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value
