"""Chat templates: messages to the token ids of a prompt and of its completions."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dsalign.contract.groups import Message
from dsalign.data.rows.records import Answer, shorten
from dsalign.data.tokens.render import Conversation, Renderer, Tools
from dsalign.data.tokens.spelled import Spelled, texts_of
from dsalign.data.tokens.text_ids import TextIds, lacks, length_shared
from dsalign.data.tokens.whole_answers import FIX, Missing, answer_end, check_prompt, compact

ANSWER = "an answer"  # what a template is asked to write, to see what it writes around it
KEPT = "earlier turns to stay as they are when the conversation goes on"
OPENED = "every answer to begin as the template opens it"
OPEN_TAG = re.compile(r"<[^<>/\s]+>\s*$")


class Encoded(NamedTuple):
    """A prompt and its completions as token ids, with the prompt's text."""

    prompt_text: str  # the rendered prompt, up to where the answer starts
    prompt: list[int]  # shared by all completions
    completions: list[list[int]]  # each ends with its one end token
    masks: list[list[bool]] | None = None  # which completion tokens an assistant wrote; None = all
    spelled: bool = False  # whether a text of the row spells a special token
    unopened: bool = False  # whether an answer does not begin with all that the template opens answers with

    def holds(self, token: int) -> bool:
        """Whether a token is among the ids."""
        return token in self.prompt or any(token in ids for ids in self.completions)


@dataclass(frozen=True)
class Template:
    """How a tokenizer writes conversations as text, and that text as token ids.

    name: for messages. chat_template: Jinja, None = the tokenizer's own. end_ids: the ids that end a turn, never empty.
    vocab_size: of the model, None = the tokenizer's; ValueError is raised for text with an id beyond it.
    special_in_text: whether a text of a row that spells a special token is that token; else it is text.
    whole: a template that leaves out some of an answer, a question or a system prompt is refused. day: what a template
    that writes today's date takes for now, as ISO 8601; "" = the time at which it writes.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None
    end_ids: frozenset[int]
    vocab_size: int | None = None
    special_in_text: bool = False
    whole: bool = True
    day: str = ""

    def render(self, prompt: Conversation, tools: Tools = ()) -> str:
        """The prompt as text, up to where the answer starts. tools: functions that the answer may call. Raises
        ValueError where the template refuses the conversation."""
        return self._render_all([(prompt, tools)], add_generation_prompt=True)[0]

    def encode(self, prompt: Conversation, completions: Sequence[Answer]) -> tuple[list[int], list[list[int]]]:
        """(prompt ids, ids of each completion): `encode_many` for one prompt."""
        (encoded,) = self.encode_many([(prompt, completions)])
        return encoded.prompt, encoded.completions

    def encode_many(
        self, items: Sequence[tuple[Conversation, Sequence[Answer]]], tools: Sequence[Tools] = ()
    ) -> list[Encoded]:
        """Each prompt with its completions as ids, tokenised in one call. tools: for each prompt the functions that may
        be called, () = none anywhere.

        prompt + completion are the ids of the rendered conversation up to the completion's first end token; one is
        appended where the template writes none. The prompt is what the template writes with add_generation_prompt;
        where a tokenizer merges its last characters with the answer's first, it is the longest beginning that all
        completions share. An empty completion is its end token alone.
        Raises ValueError where the template refuses a conversation, or leaves no prompt token.
        """
        given = list(zip(items, tools or [()] * len(items), strict=True))
        spelled = [self._spelled.within(texts_of((*prompt, *answers), own)) for (prompt, answers), own in given]
        masked = self._mask_spelled(given, spelled)
        openings = self._render_all([(prompt, own) for (prompt, _), own in given], True)
        rendered = iter(self._render_all([([*p, assistant(a)], own) for (p, answers), own in given for a in answers]))
        wholes = [[next(rendered) for _ in answers] for (_, answers), _ in given]
        ids = iter(self._ids(list(zip(openings, wholes, strict=True)), masked))
        found = []
        for ((prompt, answers), _), text, texts, spells in zip(given, openings, wholes, spelled, strict=True):
            try:
                tails = self._tails(prompt, answers, text, texts) if self.whole else []
            except Missing as error:
                raise self._left_out(error) from error
            opening, fulls = next(ids)
            whole = [
                full if answer else [*opening, self._first_end(full[length_shared(opening, full) :])]
                for answer, full in zip(answers, fulls, strict=True)
            ]
            encoded = self._split(text, opening, whole)
            for answer, full, tail in zip(answers, whole, tails, strict=False):
                if answer:
                    self._check_learnt(answer, full[len(encoded.prompt) :], tail)
            shown = self._spelled.shown(text) if spells and not self.special_in_text else text
            unopened = any(lacks(full, text) for full in texts)
            found.append(encoded._replace(prompt_text=shown, spelled=spells, unopened=unopened))
        return found

    def _mask_spelled(self, given: list[Any], spelled: Sequence[bool]) -> list[int]:
        """Put masked texts in the place of those that spell a special token, unless that is what they stand for. given:
        conversations with their tools. spelled: which of them have such a text. Returns the positions of the masked."""
        masked = [] if self.special_in_text else [i for i, found in enumerate(spelled) if found]
        for i in masked:
            given[i] = self._spelled.masked(given[i])
        return masked

    def _ids(
        self, items: Sequence[tuple[str, Sequence[str]]], masked: Collection[int]
    ) -> list[tuple[list[int], list[list[int]]]]:
        """(ids of the opening, ids of each text) for every (opening, texts). masked: the items whose texts are read by
        `Spelled.ids`."""
        if not masked:
            return self.text_ids.branching(items)
        others = iter(self.text_ids.branching([item for i, item in enumerate(items) if i not in masked]))
        found = []
        for i, (opening, texts) in enumerate(items):
            if i in masked:
                first, *rest = self.text_ids.checked(self._spelled.ids([opening, *texts]))
                found.append((first, rest))
            else:
                found.append(next(others))
        return found

    def _tails(self, prompt: Conversation, answers: Sequence[Answer], opening: str, wholes: Sequence[str]) -> list[str]:
        """What the template writes behind each answer. Raises Missing where it leaves out some of what the row says,
        ValueError where an answer does not follow all that the prompt says."""
        check_prompt(prompt, opening)
        shared = min((length_shared(opening, x) for x in wholes if not x.startswith(opening)), default=len(opening))
        if shared < len(opening):  # what stands behind is no part of the prompt that is trained on
            try:
                check_prompt(prompt, opening[:shared])
            except Missing:
                raise self._another_prompt(self._spelled.shown(opening[:shared])) from None
        return [x[answer_end(assistant(a), x, opening, self._opens) :] for a, x in zip(answers, wholes, strict=True)]

    def _left_out(self, error: Missing) -> ValueError:
        lost = self._spelled.shown(error.text).strip()
        return ValueError(
            f"template {self.name!r}: expected {error.what} whole in what is written, but it leaves out "
            f"{shorten(lost)}, from character {error.start + 1} on; {FIX}"
        )

    def _check_learnt(self, answer: Answer, ids: Sequence[int], tail: str) -> None:
        """Raises ValueError where an end token within an answer ends what is learnt of it.

        ids: from the answer's first on, with all that follows. tail: the text that the template writes behind it.
        """
        end = next((i for i, x in enumerate(ids) if x in self.end_ids), len(ids))
        if end + 1 >= len(ids):
            return
        if tail not in self._behind:
            self._behind[tail] = self.text_ids.count_behind(self._spelled.shown(tail), self.end_ids)
        if len(ids) - 1 - end <= self._behind[tail]:
            return
        said = self._spelled.shown(assistant(answer)["content"])
        learnt = compact(self.tokenizer.decode(list(ids[: end + 1])))
        if compact(said) and compact(said) in learnt:
            return
        token = self.tokenizer.decode([ids[end]])
        at = f" at character {said.index(token) + 1}" if token in said else ""
        raise ValueError(
            f"template {self.name!r}: expected the answer whole in the tokens that are learnt, but it holds the end "
            f"token {token!r}{at} and what follows is lost; remove it, use --special_tokens_in_text false, or leave "
            "such rows out with --on_bad_row skip"
        )

    def encode_turns(
        self,
        conversations: Sequence[Conversation],
        tools: Sequence[Tools] = (),
        unlearnt: Sequence[Collection[int]] = (),
    ) -> list[Encoded]:
        """Whole conversations, in which every answer is learnt from, as ids, tokenised in one call. tools: as in
        `encode_many`. unlearnt: for each the turns that nothing is learnt from, () = none anywhere.

        Of a conversation, which ends with a turn of the assistant, the prompt is what stands before the assistant's
        first turn and the one completion is all the rest. Its mask is true for the tokens of the assistant's turns,
        their end tokens included.
        Raises ValueError where the template refuses a conversation, leaves no prompt token, or writes earlier turns
        otherwise once the conversation goes on, as then no prefix of the whole is what the model sees in use.
        """
        given = list(zip(conversations, tools or [()] * len(conversations), strict=True))
        spelled = [self._spelled.within(texts_of(messages, own)) for messages, own in given]
        masked = self._mask_spelled(given, spelled)
        turns = [_assistants(messages) for messages in conversations]
        pairs = list(zip(given, turns, strict=True))
        texts = self._render_all(given)
        openings = iter(self._render_all([(m[:i], own) for (m, own), at in pairs for i in at], True))
        closings = iter(self._render_all([(m[: i + 1], own) for (m, own), at in pairs for i in at]))
        parts = [[(next(openings), next(closings)) for _ in at] for at in turns]
        ids = self._ids([(text, sum(cut, ())) for text, cut in zip(texts, parts, strict=True)], masked)
        skipped = unlearnt or [()] * len(conversations)
        found = []
        for (messages, at), (whole, ends), cut, text, skip, spells in zip(
            ((m, at) for (m, _), at in pairs), ids, parts, texts, skipped, spelled, strict=True
        ):
            spans = []
            for turn, (opening, closing), first, last in zip(at, cut, ends[::2], ends[1::2], strict=True):
                self._check_prefix(closing, text, KEPT)
                self._check_prefix(opening, text, OPENED)
                span = (length_shared(first, whole), length_shared(last, whole))
                if turn not in skip:
                    self._check_turn(messages[: turn + 1], opening, closing, whole[slice(*span)])
                spans.append(span)
            encoded = self._masked(cut[0][0], whole, spans, [turn not in skip for turn in at])
            shown = self._spelled.shown(encoded.prompt_text) if spells and not self.special_in_text else cut[0][0]
            found.append(encoded._replace(prompt_text=shown, spelled=spells))
        return found

    def _check_turn(self, messages: Conversation, opening: str, closing: str, ids: Sequence[int]) -> None:
        """Raises ValueError where the last of these messages, an answer, is not whole in what is learnt, or the prompt
        before it lacks a question. ids: of the answer, with what follows."""
        try:
            check_prompt(messages[:-1], opening)
            tail = closing[answer_end(messages[-1], closing, opening, self._opens) :]
        except Missing as error:
            raise self._left_out(error) from error
        self._check_learnt(messages[-1], ids, tail)

    def _check_prefix(self, part: str, whole: str, expected: str) -> None:
        if not whole.startswith(part):
            same = length_shared(part, whole)
            raise ValueError(
                f"template {self.name!r}: expected {expected}, got {whole[same : same + 40]!r} in place of "
                f"{part[same : same + 40]!r}; use --assistant_turns last, or name another template"
            )

    def _masked(
        self, prompt_text: str, whole: list[int], turns: Sequence[tuple[int, int]], learnt: Sequence[bool]
    ) -> Encoded:
        """prompt_text: the rendered prompt. whole: ids of the conversation. turns: where in it each of the assistant's
        turns starts and stops, with what the template writes behind it. learnt: which of them are learnt from."""
        cut = turns[0][0]
        if cut == 0:
            raise ValueError(self._no_prompt(prompt_text))
        ends = [next((i + 1 for i in range(*turn) if whole[i] in self.end_ids), turn[1]) for turn in turns]
        mask = [False] * len(whole)
        for (start, _), end, kept in zip(turns, ends, learnt, strict=True):
            mask[start:end] = [kept] * (end - start)
        last = self._ended(whole[turns[-1][0] :])
        completion, own = [*whole[cut : turns[-1][0]], *last], mask[cut : turns[-1][0]]
        return Encoded(prompt_text, whole[:cut], [completion], [[*own, *[learnt[-1]] * len(last)]])

    def _no_prompt(self, prompt_text: str) -> str:
        return (
            f"template {self.name!r}: expected at least one prompt token before the answer, got none in "
            f"{prompt_text[:200]!r}; give the row a prompt, or use a tokenizer with a BOS token"
        )

    def _split(self, prompt_text: str, opening: list[int], whole: Sequence[list[int]]) -> Encoded:
        cut = min((length_shared(opening, ids) for ids in whole), default=len(opening))
        if cut == 0:
            raise ValueError(self._no_prompt(prompt_text))
        if not self.end_ids.isdisjoint(opening[cut:]):
            raise self._another_prompt(self.tokenizer.decode(opening[:cut]))
        return Encoded(prompt_text, opening[:cut], [self._ended(ids[cut:]) for ids in whole])

    @property
    def unknown(self) -> int | None:
        """The token that stands for characters without one; None where the tokenizer has none, or it ends turns too."""
        token: int | None = self.tokenizer.unk_token_id
        return None if token in self.end_ids or token == self.tokenizer.bos_token_id else token

    @property
    def dated(self) -> bool:
        """Whether the template writes today's date."""
        return "strftime_now" in str(self.chat_template or self.tokenizer.chat_template)

    def _another_prompt(self, same: str) -> ValueError:
        return ValueError(
            f"template {self.name!r}: expected the same prompt with and without an answer, got another one after "
            f"{same[-100:]!r}; name a template that keeps earlier turns as they are"
        )

    @cached_property
    def _render_all(self) -> Renderer:
        return Renderer(self.name, self.tokenizer, self.chat_template, self.day)

    @cached_property
    def _spelled(self) -> Spelled:
        return Spelled(self.tokenizer, self.end_ids)

    @cached_property
    def _behind(self) -> dict[str, int]:
        """What a template writes behind an answer -> tokens of it behind the end token."""
        return {}

    @cached_property
    def _opens(self) -> str:
        """What the template writes behind a question to open the answer; "" where that cannot be told."""
        question: list[tuple[Conversation, Tools]] = [([{"role": "user", "content": "."}], ())]
        try:
            (without,), (opening,) = self._render_all(question), self._render_all(question, True)
        except ValueError:
            return ""
        return opening.removeprefix(without) if opening.startswith(without) else ""

    @cached_property
    def opened(self) -> str:
        """The tag that the template opens for every answer and leaves to the answer to close, such as "<think>\\n" of
        reasoning models; "" where there is none."""
        asked: Conversation = [{"role": "user", "content": "."}]
        try:
            (text,) = self._render_all([([*asked, {"role": "assistant", "content": ANSWER}], ())])
            (opening,) = self._render_all([(asked, ())], True)
        except ValueError:
            return ""
        tag = OPEN_TAG.search(self._opens)
        return tag[0] if tag and text[: text.rfind(ANSWER)] != opening else ""

    def prepare(self) -> None:
        """Compute what is computed once for a tokenizer, before threads can race for it."""
        self.text_ids, self._spelled, self._opens, self._behind  # noqa: B018

    @cached_property
    def text_ids(self) -> TextIds:
        """The tokenizer as it reads what this template writes; made once."""
        try:
            probe = self.render([{"role": "user", "content": "."}])
        except ValueError:
            probe = ""
        return TextIds(self.tokenizer, probe, self.vocab_size)

    def _first_end(self, ids: Sequence[int]) -> int:
        """The first end token of ids, else the one to append."""
        return next((x for x in ids if x in self.end_ids), self._appended_end)

    @cached_property
    def _appended_end(self) -> int:
        eos: int | None = self.tokenizer.eos_token_id
        return min(self.end_ids) if eos is None else eos

    def _ended(self, ids: list[int]) -> list[int]:
        end = min((ids.index(x) for x in self.end_ids if x in ids), default=len(ids))
        return [*ids[:end], self._first_end(ids[end:])]


def assistant(answer: Answer) -> Message:
    """The answer as a message: text becomes the assistant's turn, a message is returned as it is."""
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer


def _assistants(messages: Conversation) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]
