"""Conversations to text: what a chat template writes, within limits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerBase

from dsalign.contract.groups import Message, Tool
from dsalign.data.rows.messages import REASONING
from dsalign.data.rows.records import printable, shorten
from dsalign.data.tokens.limits import TooMuch, bounded_template, rendered, watch

PLAIN = {"role", "content", "name"}  # what every template writes, and the name of who answers for a tool
LINKS = {"tool_call_id"}  # a template need not write it where it keeps the order of calls and answers
WRITTEN_AS = {REASONING[0]: REASONING}
Conversation = Sequence[Message]
Tools = Sequence[Tool]


@dataclass(frozen=True)
class Renderer:
    """Writes conversations as text by a chat template.

    name: for messages. chat_template: Jinja, None = the tokenizer's own. day: as in `Template`.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    chat_template: str | None
    day: str = ""

    def __call__(
        self, conversations: Sequence[tuple[Conversation, Tools]], add_generation_prompt: bool = False
    ) -> list[str]:
        """Each conversation as text. Raises ValueError that says which turns the template refuses."""
        if not any(tools or any(turn.keys() - PLAIN for turn in turns) for turns, tools in conversations):
            return self._rendered([turns for turns, _ in conversations], add_generation_prompt)
        return [self._with_tools(*conversation, add_generation_prompt) for conversation in conversations]

    def check_syntax(self) -> None:
        """Raises ValueError where the template is none."""
        try:
            self._applied([[{"role": "user", "content": "."}]])
        except TemplateSyntaxError as error:
            raise ValueError(
                f"template {self.name!r}: expected a Jinja template, got an error on line {error.lineno}: "
                f"{error.message}; correct it, or name another with --template"
            ) from error
        except TooMuch as error:
            raise self._refused("one question", error) from error
        except Exception:
            pass  # it parses; whether it accepts a conversation is asked of the rows, which can be named

    def _with_tools(self, turns: Conversation, tools: Tools, add_generation_prompt: bool) -> str:
        for name in {name for turn in turns for name in turn} - PLAIN - LINKS | ({"tools"} if tools else set()):
            if not any(word in self._source for word in WRITTEN_AS.get(name, (name,))):
                raise ValueError(
                    f"template {self.name!r}: expected a template that writes {name}, got one that does not name them; "
                    "use a model whose own template does, --template chatml or qwen, or leave them out of the row"
                )
        if "tool_call_id" not in self._source:
            _check_calls(self.name, turns)
        thought = [
            {**turn, **dict.fromkeys(REASONING, turn[REASONING[0]])} if REASONING[0] in turn else turn for turn in turns
        ]
        return self._rendered([thought], add_generation_prompt, list(tools) or None)[0]

    def _rendered(
        self, conversations: Sequence[Conversation], add_generation_prompt: bool, tools: list[Tool] | None = None
    ) -> list[str]:
        if not conversations:
            return []
        try:
            return self._applied(conversations, add_generation_prompt, tools)
        except Exception as error:  # a template is a program: it may raise anything
            if len(conversations) > 1:  # one by one, to find it
                return [self._rendered([turns], add_generation_prompt, tools)[0] for turns in conversations]
            roles = ", ".join(message["role"] for message in conversations[0])
            raise self._refused(f"turns of {roles}", error) from error

    def _refused(self, got: str, error: Exception) -> ValueError:
        kind = "" if isinstance(error, TemplateError | TooMuch) else f"{type(error).__name__}: "
        said = printable(kind + str(error)[:200])
        return ValueError(
            f"template {shorten(self.name)}: expected a conversation it accepts, got {got}, and it says: "
            f"{said}; change the row or name another template"
        )

    def _applied(
        self,
        conversations: Sequence[Conversation],
        add_generation_prompt: bool = False,
        tools: list[Tool] | None = None,
    ) -> list[str]:
        if self._own_code:
            with watch.over():
                texts: list[str] = self.tokenizer.apply_chat_template(
                    [list(turns) for turns in conversations],
                    tools=tools,
                    chat_template=self.chat_template,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                )
            return texts
        source = self.tokenizer.get_chat_template(self.chat_template, tools)
        compiled = self._compiled.get(source)
        if compiled is None:
            compiled = self._compiled[source] = bounded_template(source)
        given: dict[str, Any] = {**self.tokenizer.special_tokens_map, "add_generation_prompt": add_generation_prompt}
        if self.day:
            given["strftime_now"] = datetime.fromisoformat(self.day).strftime
        return rendered(compiled, conversations, tools, given)

    @cached_property
    def _compiled(self) -> dict[str, Any]:
        return {}

    @cached_property
    def _own_code(self) -> bool:
        """Whether the tokenizer applies its template in a way of its own."""
        return type(self.tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template

    @cached_property
    def _source(self) -> str:
        return str(self.chat_template or self.tokenizer.chat_template)


def _check_calls(name: str, turns: Conversation) -> None:
    """Raises ValueError where a tool answers another call than that of its place: a template that writes no ids would
    show it as the answer to that one."""
    asked: list[Any] = []
    for turn in turns:
        if turn["role"] != "tool":
            asked = [call.get("id") for call in turn.get("tool_calls", ())]
            continue
        call, answered = (asked.pop(0) if asked else None), turn.get("tool_call_id")
        if None not in (call, answered) and call != answered:
            raise ValueError(
                f"template {name!r}: expected answers of tools in the order of their calls, as it writes no "
                f"tool_call_id, got that of {answered} in the place of {call}; change the order, or name a template "
                "that writes them"
            )
