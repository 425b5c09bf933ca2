"""The rule that what a row says reaches the model: every answer is found, whole, in the rendered conversation, every
question and system prompt in the rendered prompt. A template that leaves some of it out is refused."""

from __future__ import annotations

import bisect
import json
from collections.abc import Callable, Iterator, Sequence

from dsalign.contract.groups import Message
from dsalign.data.rows.messages import REASONING
from dsalign.data.tokens.spelled import leaves
from dsalign.data.tokens.text_ids import length_shared

FIX = "name a template that writes it (--template), or leave such rows out with --on_bad_row skip"
LEAST_KEPT = 8  # characters of a lost text that are found by more than chance


class Missing(Exception):
    """A text of a row that a template left out. what: whose text. start: characters before `text` that it writes."""

    def __init__(self, what: str, text: str, start: int) -> None:
        super().__init__(what, text, start)
        self.what, self.text, self.start = what, text, start


def answer_end(answer: Message, whole: str, opening: str, generation: str) -> int:
    """The position in `whole` behind the last text of an answer.

    whole: the rendered conversation up to and with the answer. opening: the rendered prompt. generation: what the
    template writes to open an answer; an answer may begin with some of it, which is then part of the prompt.
    Raises Missing that says what of the answer is not in `whole` behind the prompt.
    """
    content: str = answer["content"]
    if len(answer) == 2 and whole.startswith(opening):  # as nearly all are
        said = content.strip()
        at = whole.find(said, len(opening))
        if at >= 0:
            return at + len(said)
    start = _start(whole, opening, generation)
    return max(_found_end(text, whole, start, opening, "the answer") for text in (*_texts(answer), ""))


def check_prompt(turns: Sequence[Message], opening: str) -> None:
    """Raises Missing for a turn of the system, the user or a tool whose text is not in the rendered prompt. What the
    assistant said before may be shortened: it is not learnt."""
    for turn in turns:
        if turn["role"] != "assistant" and turn["content"].strip() not in opening:
            _found_end(turn["content"], opening, 0, "", f"the turn of the {turn['role']}")


def compact(text: str) -> str:
    """The text without white space."""
    return "".join(text.split())


def _start(whole: str, opening: str, generation: str) -> int:
    """From where an answer may be found in `whole`."""
    if whole.startswith(opening):
        return len(opening) - len(generation)
    return max(min(length_shared(opening, whole), len(opening) - len(generation)), 0)


def _texts(answer: Message) -> Iterator[str]:
    yield answer["content"]
    yield answer.get(REASONING[0], "")
    for call in answer.get("tool_calls", ()):
        yield call["function"]["name"]
        yield from (str(x) for x in leaves(call["function"]["arguments"]) if isinstance(x, str) or type(x) is int)


def _found_end(text: str, whole: str, start: int, opening: str, what: str) -> int:
    """Behind which character of `whole` a text ends. Where white space was changed it is the end of `whole` less what
    follows the text."""
    for form in _forms(text.strip()):
        at = whole.find(form, start)
        if at >= 0:
            return at + len(form)
    behind = whole[start:]
    for form in _forms(compact(text)):
        at = compact(behind).find(form)
        if at >= 0:
            return start + _position(behind, at + len(form))
    there = compact(behind)
    start = _kept(text, lambda n: compact(text[:n]) in there)
    stop = len(text) - _kept(text, lambda n: compact(text[-n:]) in there)
    raise Missing(what, text[start:stop] if start < stop else text, start if start < stop else 0)


def _kept(text: str, written: Callable[[int], bool]) -> int:
    """The largest n for which `written`; it holds for every smaller one. 0 where that may be chance."""
    n = bisect.bisect_left(range(1, len(text) + 1), True, key=lambda n: not written(n))
    return n if n >= LEAST_KEPT else 0


def _forms(text: str) -> Iterator[str]:
    """A text as it is, and as JSON writes it."""
    yield text
    for ascii_only in (False, True):
        written = json.dumps(text, ensure_ascii=ascii_only)[1:-1]
        if written != text:
            yield written


def _position(text: str, count: int) -> int:
    """Behind which character of a text `count` of its characters that are not white space have passed."""
    for i, character in enumerate(text):
        count -= not character.isspace()
        if count == 0:
            return i + 1
    return 0
