"""Text to token ids: what several conversations begin with is tokenised once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from dsalign.data.tokens.words import Ids, Words, reads_words


class TextIds:
    """Token ids of rendered conversations, with one BOS in front where the tokenizer puts one in front of plain text.

    probe: a rendered prompt; conversations are cut only at special tokens that it has. vocab_size: of the model, None =
    the tokenizer's own; ValueError is raised for text with an id beyond it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, probe: str, vocab_size: int | None = None) -> None:
        self.tokenizer, self._probe = tokenizer, probe
        self._vocab_size = vocab_size if vocab_size is not None and len(tokenizer) > vocab_size else None
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        if self._backend is not None:  # here, as threads that tokenise must find it settled
            self._backend.no_truncation()
            self._backend.no_padding()
        self._read = Words(self._by_library) if reads_words(tokenizer) else self._by_library

    def of(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, BOS included."""
        return self._with_bos(self._plain(texts))

    def checked(self, found: list[Ids]) -> list[Ids]:
        """Ids of texts that were read in another way, BOS included."""
        if self._vocab_size is not None:
            self._check(found, self._vocab_size)
        return self._with_bos(found)

    def _with_bos(self, found: list[Ids]) -> list[Ids]:
        bos = self.tokenizer.bos_token_id
        return [ids if ids[:1] == [bos] else [bos, *ids] for ids in found] if self._adds_bos else found

    def count_behind(self, text: str, ids_of_end: frozenset[int]) -> int:
        """How many tokens of a text stand behind its first end token; all where it has none."""
        (ids,) = self._plain([text])
        return len(ids) - 1 - next((i for i, x in enumerate(ids) if x in ids_of_end), -1)

    def branching(self, items: Sequence[tuple[str, Sequence[str]]]) -> list[tuple[Ids, list[Ids]]]:
        """(ids of the opening, ids of each text) for every (opening, texts), exactly the ids that `of` gives.

        A tokenizer first cuts text at special tokens and then reads each part by itself. So what stands before the
        opening's last special token is tokenised once for all texts that begin with it: a pair's prompt once, not three
        times.
        """
        cuts = [self._cut(opening, texts) for opening, texts in items]
        heads = self.of([opening[:cut] for (opening, _), cut in zip(items, cuts, strict=True) if cut])
        tails = [t[cut:] for (opening, texts), cut in zip(items, cuts, strict=True) if cut for t in (opening, *texts)]
        unique = dict.fromkeys(tails)  # most openings end in the same words
        read = dict(zip(unique, self._plain(list(unique)), strict=True))
        whole = [t for (opening, texts), cut in zip(items, cuts, strict=True) if not cut for t in (opening, *texts)]
        head, tail, uncut = iter(heads), iter(tails), iter(self.of(whole))
        found = []
        for (_, texts), cut in zip(items, cuts, strict=True):
            if cut:
                front = next(head)
                opening, *rest = ([*front, *read[next(tail)]] for _ in range(1 + len(texts)))
            else:
                opening, *rest = (next(uncut) for _ in range(1 + len(texts)))
            found.append((opening, rest))
        return found

    def _plain(self, texts: Sequence[str]) -> list[Ids]:
        ids = self._read(texts)
        if self._vocab_size is not None:
            self._check(ids, self._vocab_size)
        return ids

    def _by_library(self, texts: Sequence[str]) -> list[Ids]:
        if not texts:
            return []
        if self._backend is None:
            ids: list[Ids] = self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
            return ids
        # Without the wrapping of each result, which takes as long as some of the tokenising.
        return [found.ids for found in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def _check(self, every: Sequence[Ids], vocab_size: int) -> None:
        largest = max((max(ids, default=0) for ids in every), default=0)
        if largest >= vocab_size:
            raise ValueError(
                f"expected token ids below {vocab_size}, the model's vocabulary, got {largest} "
                f"({self.tokenizer.convert_ids_to_tokens(largest)!r}); use the model's own tokenizer, or resize its "
                "embedding with resize_token_embeddings and save both"
            )

    def _cut(self, opening: str, texts: Sequence[str]) -> int:
        """Where the opening's last special token starts; 0 where the texts must not be cut there."""
        cut, token = max(((opening.rfind(token), token) for token in self._special), default=(-1, ""))
        front = opening[: cut + len(token)]
        return cut if cut > 0 and all(text.startswith(front) for text in texts) else 0

    @cached_property
    def _adds_bos(self) -> bool:
        """Whether the tokenizer puts a BOS in front of plain text."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("", verbose=False)["input_ids"][:1] == [bos]

    @cached_property
    def _special(self) -> list[str]:
        """Special tokens at which text may be cut: the tokenizer finds them whatever stands beside them."""
        if self._backend is None or getattr(self._backend, "encode_special_tokens", False):
            return []
        added = self.tokenizer.added_tokens_decoder.values()
        if any(t.single_word for t in added):  # found or not by what stands beside it
            return []
        plain = [t.content for t in added if t.content and not (t.normalized or t.lstrip)]
        every = [t.content for t in added]
        return [t for t in plain if t in self._probe and not any(_takes(other, t) for other in every)]


def _takes(other: str, token: str) -> bool:
    """Whether `other`, or `token` once more, can take characters of `token` where both stand in a text."""
    longest = min(len(other), len(token) - 1)
    return (token in other and token != other) or any(other.endswith(token[:n]) for n in range(1, longest + 1))


def length_shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Number of tokens, or characters of texts, in the longest beginning that a and b share."""
    if list(b[: len(a)]) == list(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def lacks(whole: str, opening: str) -> bool:
    """Whether a rendered conversation lacks more than white space of what its prompt ends with."""
    return not whole.startswith(opening) and bool(opening[length_shared(opening, whole) :].strip())
