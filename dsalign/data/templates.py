"""Chat templates: from messages to the token ids of a prompt and of its completions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from dsalign.data.chat_templates import BUILT_IN
from dsalign.data.rows import Message

NAMES = tuple(BUILT_IN)


class Encoded(NamedTuple):
    """A prompt and its completions as text and ids."""

    prompt_text: str  # the rendered prompt, up to where the answer starts
    prompt: list[int]  # shared by all completions
    completions: list[list[int]]  # each ends with its one end token
    masks: list[list[bool]] | None = None  # which completion tokens an assistant wrote; None = all


@dataclass(frozen=True)
class Template:
    """How a tokenizer writes conversations.

    chat_template: Jinja, None = the tokenizer's own. end_ids: the ids that end a turn, never empty.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None
    end_ids: frozenset[int]

    def render(self, prompt: Sequence[Message]) -> str:
        """The prompt as text, up to where the answer starts. Raises ValueError where the template refuses it."""
        return self._render(prompt, add_generation_prompt=True)

    def encode(self, prompt: Sequence[Message], completions: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """(prompt ids, completion ids): `encode_many` of one prompt."""
        (encoded,) = self.encode_many([(prompt, completions)])
        return encoded.prompt, encoded.completions

    def encode_many(self, items: Sequence[tuple[Sequence[Message], Sequence[str]]]) -> list[Encoded]:
        """Each prompt and its completions, tokenised in one call.

        prompt + completion are the ids of the rendered conversation up to the completion's first end token; one is
        appended where there is none. The prompt is the generation prompt, or, where the answer merges with it, the
        longest beginning that all completions of the prompt share. An empty completion is its end token.
        Raises ValueError where the template refuses a conversation, or leaves no prompt token.
        """
        texts: list[str] = []
        for prompt, completions in items:
            texts.append(self.render(prompt))
            texts += [self._render([*prompt, {"role": "assistant", "content": text}]) for text in completions]
        ids = iter(self._tokenize(texts))
        texts_left = iter(texts)
        found = []
        for _, completions in items:
            opening, prompt_text = next(ids), next(texts_left)
            whole = []
            for text in completions:
                full, _ = next(ids), next(texts_left)
                whole.append(full if text else [*opening, self._first_end(full[_shared(opening, full) :])])
            found.append(self._split(prompt_text, opening, whole))
        return found

    def encode_turns(self, conversations: Sequence[Sequence[Message]]) -> list[Encoded]:
        """Whole conversations that end with an assistant's turn: the prompt is what stands before the assistant's first
        turn, the one completion all that follows, and its mask has the tokens of every assistant's turn, end tokens
        included. All are tokenised in one call.

        Raises ValueError where the template refuses a conversation, leaves no prompt token, or writes earlier turns
        otherwise once the conversation goes on: then no prefix of the whole says what the model saw.
        """
        texts: list[str] = []
        for messages in conversations:
            texts.append(self._render(messages))
            for i in _assistants(messages):
                texts += [self._render(messages[:i], add_generation_prompt=True), self._render(messages[: i + 1])]
        ids, left = iter(self._tokenize(texts)), iter(texts)
        found = []
        for messages in conversations:
            whole, whole_text = next(ids), next(left)
            turns = []
            for _ in _assistants(messages):
                opening, opening_text = next(ids), next(left)
                closed, closed_text = next(ids), next(left)
                self._check_prefix(opening_text, whole_text)
                turns.append((opening_text, _shared(opening, whole), _shared(closed, whole)))
                self._check_prefix(closed_text, whole_text)
            found.append(self._masked(turns[0][0], whole, [(start, stop) for _, start, stop in turns]))
        return found

    def _check_prefix(self, part: str, whole: str) -> None:
        if not whole.startswith(part):
            same = next(i for i, x in enumerate(part) if whole[i : i + 1] != x)
            raise ValueError(
                f"template {self.name!r}: expected earlier turns to stay as they are when the conversation goes on, "
                f"got {whole[same : same + 40]!r} in place of {part[same : same + 40]!r}; use --assistant_turns last, "
                "or name a template that keeps them"
            )

    def _masked(self, prompt_text: str, whole: list[int], turns: Sequence[tuple[int, int]]) -> Encoded:
        """turns: where in `whole` each assistant's turn starts and stops, with the template's own text behind it."""
        cut = turns[0][0]
        if cut == 0:
            raise ValueError(self._no_prompt(prompt_text))
        ends = [next((i + 1 for i in range(*turn) if whole[i] in self.end_ids), turn[1]) for turn in turns]
        mask = [False] * len(whole)
        for (start, _), end in zip(turns, ends, strict=True):
            mask[start:end] = [True] * (end - start)
        last = self._ended(whole[turns[-1][0] :])
        completion, own = [*whole[cut : turns[-1][0]], *last], mask[cut : turns[-1][0]]
        return Encoded(prompt_text, whole[:cut], [completion], [[*own, *[True] * len(last)]])

    def _no_prompt(self, prompt_text: str) -> str:
        return (
            f"template {self.name!r}: expected at least one prompt token before the answer, got none in "
            f"{prompt_text[:200]!r}; give the row a prompt, or use a tokenizer with a BOS token"
        )

    def _split(self, prompt_text: str, opening: list[int], whole: Sequence[list[int]]) -> Encoded:
        cut = min((_shared(opening, ids) for ids in whole), default=len(opening))
        if cut == 0:
            raise ValueError(self._no_prompt(prompt_text))
        if not self.end_ids.isdisjoint(opening[cut:]):
            raise ValueError(
                f"template {self.name!r}: expected the same prompt with and without an answer, got another one after "
                f"{self.tokenizer.decode(opening[:cut])[-100:]!r}; name a template that keeps earlier turns as they are"
            )
        return Encoded(prompt_text, opening[:cut], [self._ended(ids[cut:]) for ids in whole])

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=self.chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(
                f"template {self.name!r}: expected a conversation it accepts, got turns of {roles}, and it says: "
                f"{str(error)[:200]}; change the row or name another template"
            ) from error
        return str(text)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """Ids of rendered texts, with one BOS where the tokenizer puts one in front of plain text."""
        ids: list[list[int]]
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            ids = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        else:  # without the wrapping of each result, which takes as long as some of the tokenising
            backend.no_truncation()
            backend.no_padding()
            ids = [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        bos = self.tokenizer.bos_token_id
        return [x if x[:1] == [bos] else [bos, *x] for x in ids] if self._adds_bos else ids

    @cached_property
    def _adds_bos(self) -> bool:
        """Whether the tokenizer puts a BOS in front of plain text."""
        bos = self.tokenizer.bos_token_id
        return bos is not None and self.tokenizer("", verbose=False)["input_ids"][:1] == [bos]

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


def load_template(
    tokenizer: PreTrainedTokenizerBase, name: str | None, end_ids: Iterable[int]
) -> tuple[Template, str | None]:
    """(the template, a warning line or None).

    name: one of NAMES, a path to a .jinja file, or None: the tokenizer's own, and without one chatml with a warning.
    end_ids: the ids of generation_config.eos_token_id; the tokenizer's EOS, and a built-in template's turn end where it
    is one id of the vocabulary, count as well.
    Raises ValueError for an unknown name, an unreadable template, or a tokenizer without any end token.
    """
    ends = set(end_ids)
    eos = tokenizer.eos_token_id
    if eos is not None:
        ends.add(eos)
    warning = None
    if name is None and tokenizer.chat_template:
        return _checked(Template("the tokenizer's own", tokenizer, None, frozenset(ends))), None
    if name is None:
        warning = (
            "the tokenizer has no chat template: conversations are written as ChatML; "
            f"name a template with --template ({', '.join(NAMES)}, or a .jinja file)"
        )
    if (name or "chatml") in BUILT_IN:
        return _checked(_built_in(name or "chatml", tokenizer, ends)), warning
    return _checked(Template(str(name), tokenizer, _read(str(name)), frozenset(ends))), None


def _built_in(name: str, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> Template:
    """The template of this name, which ends turns with its own token where that is one id, else with EOS."""
    text, turn_end = BUILT_IN[name]
    ids = [] if turn_end is None else tokenizer(turn_end, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return Template(name, tokenizer, text.replace("TURN_END", repr(turn_end)), frozenset(ends | {ids[0]}))
    # Without EOS either the template would write no turn end at all.
    known = ends if tokenizer.eos_token_id is not None or "TURN_END" not in text else set()
    return Template(name, tokenizer, text.replace("TURN_END", "eos_token"), frozenset(known))


def _read(name: str) -> str:
    path = Path(name).expanduser()
    if path.suffix != ".jinja" or not path.is_file():
        near = difflib.get_close_matches(name, NAMES, 1)
        hint = f"did you mean {near[0]!r}?" if near else "check the path"
        raise ValueError(
            f"template: expected {', '.join(NAMES)} or the path of a .jinja file that exists, got {name!r}; {hint}"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"template {name!r}: expected UTF-8 text, got {error}; save the file as UTF-8") from error


def _checked(template: Template) -> Template:
    if not template.end_ids:
        raise ValueError(
            "tokenizer: expected an end token, got none: no eos_token, and no eos_token_id that the template writes; "
            "set tokenizer.eos_token, or eos_token_id in the generation config"
        )
    try:
        template.tokenizer.apply_chat_template(
            [{"role": "user", "content": "."}], chat_template=template.chat_template, tokenize=False
        )
    except TemplateSyntaxError as error:
        raise ValueError(
            f"template {template.name!r}: expected a Jinja template, got an error on line {error.lineno}: "
            f"{error.message}; correct it, or name another with --template"
        ) from error
    except (TemplateError, TypeError):
        pass  # it parses; whether it accepts a conversation is asked of the rows, which can be named
    return template


def _assistants(messages: Sequence[Message]) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest beginning that a and b share."""
    if list(b[: len(a)]) == list(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
