"""Chat templates: messages to the token ids of a prompt and of its completions."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from dsalign.contract.groups import Message, Tool
from dsalign.data.rows.fields import REASONING
from dsalign.data.rows.records import Answer
from dsalign.data.tokens.chat_templates import BUILT_IN
from dsalign.data.tokens.text_ids import TextIds

NAMES = tuple(BUILT_IN)
PLAIN = {"role", "content", "name"}  # what every template writes, and the name of who answers for a tool
WRITTEN_AS = {"reasoning_content": REASONING}
Conversation = Sequence[Message]
Tools = Sequence[Tool]


class Encoded(NamedTuple):
    """A prompt and its completions as token ids, with the prompt's text."""

    prompt_text: str  # the rendered prompt, up to where the answer starts
    prompt: list[int]  # shared by all completions
    completions: list[list[int]]  # each ends with its one end token
    masks: list[list[bool]] | None = None  # which completion tokens an assistant wrote; None = all


@dataclass(frozen=True)
class Template:
    """How a tokenizer writes conversations as text, and that text as token ids.

    name: for messages. chat_template: Jinja, None = the tokenizer's own. end_ids: the ids that end a turn, never empty.
    vocab_size: of the model, None = the tokenizer's; ValueError is raised for text with an id beyond it.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None
    end_ids: frozenset[int]
    vocab_size: int | None = None

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
        openings = self._render_all([(prompt, own) for (prompt, _), own in given], add_generation_prompt=True)
        rendered = iter(self._render_all([([*p, assistant(a)], own) for (p, answers), own in given for a in answers]))
        wholes = [[next(rendered) for _ in answers] for _, answers in items]
        found = []
        ids = self.text_ids.branching(list(zip(openings, wholes, strict=True)))
        for (_, answers), text, (opening, fulls) in zip(items, openings, ids, strict=True):
            whole = [
                full if answer else [*opening, self._first_end(full[length_shared(opening, full) :])]
                for answer, full in zip(answers, fulls, strict=True)
            ]
            found.append(self._split(text, opening, whole))
        return found

    def encode_turns(self, conversations: Sequence[Conversation], tools: Sequence[Tools] = ()) -> list[Encoded]:
        """Whole conversations, in which every answer is learnt from, as ids, tokenised in one call. tools: as in
        `encode_many`.

        Of a conversation, which ends with a turn of the assistant, the prompt is what stands before the assistant's
        first turn and the one completion is all the rest. Its mask is true for the tokens of the assistant's turns,
        their end tokens included.
        Raises ValueError where the template refuses a conversation, leaves no prompt token, or writes earlier turns
        otherwise once the conversation goes on, as then no prefix of the whole is what the model sees in use.
        """
        turns = [_assistants(messages) for messages in conversations]
        given = list(zip(conversations, tools or [()] * len(conversations), strict=True))
        pairs = list(zip(given, turns, strict=True))
        texts = self._render_all(given)
        openings = iter(self._render_all([(m[:i], own) for (m, own), at in pairs for i in at], True))
        closings = iter(self._render_all([(m[: i + 1], own) for (m, own), at in pairs for i in at]))
        parts = [[(next(openings), next(closings)) for _ in at] for at in turns]
        ids = iter(self.text_ids.of([t for text, cut in zip(texts, parts, strict=True) for t in (text, *sum(cut, ()))]))
        found = []
        for text, cut in zip(texts, parts, strict=True):
            whole, spans = next(ids), []
            for part in cut:
                for rendered in part:
                    self._check_prefix(rendered, text)
                spans.append((length_shared(next(ids), whole), length_shared(next(ids), whole)))
            found.append(self._masked(cut[0][0], whole, spans))
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
        """prompt_text: the rendered prompt. whole: ids of the conversation. turns: where in it each of the assistant's
        turns starts and stops, with what the template writes behind it."""
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
        cut = min((length_shared(opening, ids) for ids in whole), default=len(opening))
        if cut == 0:
            raise ValueError(self._no_prompt(prompt_text))
        if not self.end_ids.isdisjoint(opening[cut:]):
            raise ValueError(
                f"template {self.name!r}: expected the same prompt with and without an answer, got another one after "
                f"{self.tokenizer.decode(opening[:cut])[-100:]!r}; name a template that keeps earlier turns as they are"
            )
        return Encoded(prompt_text, opening[:cut], [self._ended(ids[cut:]) for ids in whole])

    def _render_all(
        self, conversations: Sequence[tuple[Conversation, Tools]], add_generation_prompt: bool = False
    ) -> list[str]:
        """Each conversation as text. Raises ValueError that says which turns the template refuses."""
        if not any(tools or any(turn.keys() - PLAIN for turn in turns) for turns, tools in conversations):
            return self._rendered([turns for turns, _ in conversations], add_generation_prompt)
        return [self._with_tools(*conversation, add_generation_prompt) for conversation in conversations]

    def _with_tools(self, turns: Conversation, tools: Tools, add_generation_prompt: bool) -> str:
        for name in {name for turn in turns for name in turn} - PLAIN | ({"tools"} if tools else set()):
            if not any(word in self._source for word in WRITTEN_AS.get(name, (name,))):
                raise ValueError(
                    f"template {self.name!r}: expected a template that writes {name}, got one that does not name them; "
                    "use a model whose own template does, --template chatml or qwen, or leave them out of the row"
                )
        return self._rendered([turns], add_generation_prompt, list(tools) or None)[0]

    @cached_property
    def _source(self) -> str:
        return str(self.chat_template or self.tokenizer.chat_template)

    def _rendered(
        self,
        conversations: Sequence[Conversation],
        add_generation_prompt: bool = False,
        tools: list[Tool] | None = None,
    ) -> list[str]:
        if not conversations:
            return []
        try:
            return self._applied(conversations, add_generation_prompt, tools)
        except (TemplateError, TypeError) as error:
            if len(conversations) > 1:  # one by one, to find it
                return [self._rendered([turns], add_generation_prompt, tools)[0] for turns in conversations]
            roles = ", ".join(message["role"] for message in conversations[0])
            raise ValueError(
                f"template {self.name!r}: expected a conversation it accepts, got turns of {roles}, and it says: "
                f"{str(error)[:200]}; change the row or name another template"
            ) from error

    def _applied(
        self,
        conversations: Sequence[Conversation],
        add_generation_prompt: bool = False,
        tools: list[Tool] | None = None,
    ) -> list[str]:
        texts: list[str] = self.tokenizer.apply_chat_template(
            [list(turns) for turns in conversations],
            tools=tools,
            chat_template=self.chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        return texts

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


def load_template(
    tokenizer: PreTrainedTokenizerBase, name: str | None, end_ids: Iterable[int]
) -> tuple[Template, str | None]:
    """(the template, a line of warning or None).

    name: one of NAMES, the path of a .jinja file, or None = the tokenizer's own, or ChatML with a warning where it has
    none. end_ids: those of the model's generation_config.eos_token_id; the tokenizer's EOS counts as well, and so does
    a built-in template's end of turn where it is one id of the vocabulary.
    Raises ValueError for an unknown name, a file that is no template, or a tokenizer without any end token.
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
    return _checked(Template(str(name), tokenizer, _jinja(str(name)), frozenset(ends))), None


def _built_in(name: str, tokenizer: PreTrainedTokenizerBase, ends: set[int]) -> Template:
    """The built-in template of this name. It ends turns with its own token where that is one id, else with EOS."""
    text, turn_end = BUILT_IN[name]
    ids = [] if turn_end is None else tokenizer(turn_end, add_special_tokens=False)["input_ids"]
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return Template(name, tokenizer, text.replace("TURN_END", repr(turn_end)), frozenset(ends | {ids[0]}))
    # Without EOS either the template would write no turn end at all.
    known = ends if tokenizer.eos_token_id is not None or "TURN_END" not in text else set()
    return Template(name, tokenizer, text.replace("TURN_END", "eos_token"), frozenset(known))


def _jinja(name: str) -> str:
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
        template._applied([[{"role": "user", "content": "."}]])
    except TemplateSyntaxError as error:
        raise ValueError(
            f"template {template.name!r}: expected a Jinja template, got an error on line {error.lineno}: "
            f"{error.message}; correct it, or name another with --template"
        ) from error
    except (TemplateError, TypeError):
        pass  # it parses; whether it accepts a conversation is asked of the rows, which can be named
    return template


def assistant(answer: Answer) -> Message:
    """The answer as a message: text becomes the assistant's turn, a message is returned as it is."""
    return {"role": "assistant", "content": answer} if isinstance(answer, str) else answer


def _assistants(messages: Conversation) -> list[int]:
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def length_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of tokens in the longest beginning that a and b share."""
    if list(b[: len(a)]) == list(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
