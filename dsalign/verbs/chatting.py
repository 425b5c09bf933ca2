"""A conversation with one or two models: answers as they are sampled, and what a reward model thinks of them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import IO, Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text
from transformers import TextStreamer

from dsalign.contract.groups import Group, Message
from dsalign.data.rows.records import printable
from dsalign.models.heads import unwrap
from dsalign.models.tokenizer import decoder
from dsalign.report.run_log import quiet
from dsalign.verbs import opened
from dsalign.verbs.chat import Request
from dsalign.verbs.opened import Model

PROMPT, NEW = "> ", "/new"


@dataclass
class Speaker:
    """A model in a conversation. turns: what was said so far, as this model said it. room: tokens that its positions
    hold, None = unknown."""

    model: Model
    system: str | None
    turns: list[Message] = field(default_factory=list)

    def forget(self) -> None:
        """Begin a new conversation, which has the system prompt alone."""
        self.turns = [{"role": "system", "content": self.system}] if self.system else []

    @property
    def room(self) -> int | None:
        """Tokens of a prompt and its answer that the model has positions for, None = it does not say."""
        config = unwrap(self.model.engine.module.model).config.get_text_config()
        found: int | None = getattr(config, "max_position_embeddings", None)
        return found


@dataclass(frozen=True)
class Answer:
    """An answer as token ids. text: without control characters. score: of the reward model, None = there is none."""

    ids: tuple[int, ...]
    text: str
    ended: bool
    score: float | None = None


class _Visible(TextStreamer):  # type: ignore[misc]
    """The words of an answer as they come, with control characters as escapes; `say` gets each piece."""

    def __init__(self, tokenizer: Any, say: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.say = say

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on a piece of the answer that no later token changes."""
        self.say(printable(text))


class _Stop:
    """Whether the user asked to stop the answer that is being sampled: transformers asks it after each token."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor, **more: Any) -> torch.Tensor:
        return torch.full((len(ids),), self.asked, dtype=torch.bool, device=ids.device)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context in which Ctrl-C stops the answer in place of the program."""
        self.asked = False

        def note(number: int, frame: Any) -> None:
            self.asked = True

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


class Chat:
    """A conversation with the models of a request. out: where answers go."""

    def __init__(self, request: Request, out: IO[str]) -> None:
        self.request, self.out = request, out
        how = opened.options(request.dtype, trust=request.trust)
        first = opened.open_model(request.model, how, role="policy", template=request.template)
        models = [first]
        if request.vs is not None:
            models.append(opened.open_model(opened.second_of(first, request.vs), how, role="policy"))
        self.speakers = [Speaker(model, request.system) for model in models]
        self.reward = opened.open_model(request.reward, how, role="reward") if request.reward else None
        self.stop = _Stop()
        torch.manual_seed(request.seed)
        self.forget()

    def forget(self) -> None:
        """Begin a new conversation with every model."""
        for speaker in self.speakers:
            speaker.forget()

    def answer(self, speaker: Speaker, question: str, say: Callable[[str], None]) -> Answer:
        """The answer of one model to a question behind what was said so far; `say` gets its words as they come.

        An answer that the user stops is kept as far as it came. Raises ValueError where the template refuses the
        conversation, or no position is left for an answer.
        """
        model, request = speaker.model, self.request
        turns = [*speaker.turns, {"role": "user", "content": question}]
        prompt = model.template.encode(turns, [])[0]
        most = (
            request.max_new_tokens if speaker.room is None else min(request.max_new_tokens, speaker.room - len(prompt))
        )
        if most < 1:
            raise ValueError(
                f"chat: expected room for an answer, got a conversation of {len(prompt)} tokens of {speaker.room}; "
                f"write {NEW} to begin another"
            )
        inner: Any = unwrap(model.engine.module.model)
        ids = torch.tensor([prompt], device=opened.device())
        sampling = {"do_sample": False} if request.temperature == 0 else {
            "do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": 0,
        }  # fmt: skip
        with torch.no_grad(), self.stop.listening():
            found = inner.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, stopping_criteria=[self.stop],
                streamer=_Visible(model.template.tokenizer, say), eos_token_id=sorted(model.template.end_ids),
                pad_token_id=model.template.tokenizer.pad_token_id or 0, **sampling,
            )  # fmt: skip
        given = tuple(found[0, len(prompt) :].tolist())
        text = decoder(model.template.tokenizer)(given)
        speaker.turns = [*turns, {"role": "assistant", "content": text}]
        group = Group(0, "the question", tuple(prompt), (given,), "", turns=tuple(turns))
        return Answer(given, printable(text), given[-1] in model.template.end_ids, self._score(model, group))

    def _score(self, model: Model, group: Group) -> float | None:
        """The reward model's score of an answer, None where there is none."""
        if self.reward is None:
            return None
        roles = opened.roles_of({"reward": self.reward})
        return float(roles.each_group("reward", opened.as_read(self.reward, model, [group]))[0])

    def plainly(self, question: str) -> None:
        """Answer a question in plain text: each model's words behind its name, where there are two."""
        for speaker in self.speakers:
            if len(self.speakers) > 1:
                self._say(f"{printable(speaker.model.name)}: ")
            found = self.answer(speaker, question, self._say)
            self._say(f"{_remark(found, stopped=self.stop.asked)}\n")

    def side_by_side(self, question: str, console: Console) -> None:
        """Answer a question in two columns that grow as the models answer, one after the other."""
        texts, remarks = [Text() for _ in self.speakers], ["" for _ in self.speakers]

        def table() -> Table:
            found = Table.grid(padding=(0, 3), expand=True)
            for speaker in self.speakers:
                found.add_column(printable(speaker.model.name), ratio=1, overflow="fold")
            found.add_row(*(Text(printable(speaker.model.name), style="bold") for speaker in self.speakers))
            found.add_row(*texts)
            found.add_row(*(Text(remark.strip(), style="dim") for remark in remarks))
            return found

        with Live(table(), console=console, refresh_per_second=8) as live:
            for i, speaker in enumerate(self.speakers):
                found = self.answer(speaker, question, partial(_grow, texts[i]))
                remarks[i] = _remark(found, stopped=self.stop.asked)
                live.update(table())
                if self.stop.asked:
                    break

    def _say(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def _grow(column: Text, piece: str) -> None:
    column.append(piece)


def _remark(answer: Answer, *, stopped: bool) -> str:
    """What stands behind an answer: its score, and why it has no end."""
    parts = [] if answer.score is None else [f"score {answer.score:.3g}"]
    if not answer.ended:
        parts.append("stopped" if stopped else f"cut at {len(answer.ids)} tokens")
    return f"  [{', '.join(parts)}]" if parts else ""


def chat(request: Request) -> None:
    """Hold the conversation of a request over standard input and output, until the input ends.

    Raises ValueError where a model cannot be opened; on a terminal an error of one question is said, and the next may
    be asked.
    """
    quiet(0)
    held = Chat(request, sys.stdout)
    if sys.stdin.isatty():
        _on_a_terminal(held)
        return
    for line in sys.stdin:
        if question := line.strip():
            held.forget()  # each line is a question of its own: its answer does not depend on those before
            held.plainly(question)


def _on_a_terminal(held: Chat) -> None:
    console = Console(highlight=False, markup=False)
    console.print(f"Ctrl-C stops an answer, Ctrl-D leaves, {NEW} starts a new conversation.", style="dim")
    while True:
        try:
            question = input(PROMPT).strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if question == NEW:
            held.forget()
        elif question:
            try:
                if len(held.speakers) > 1 and console.is_terminal:
                    held.side_by_side(question, console)
                else:
                    held.plainly(question)
            except ValueError as error:
                print(printable(str(error)), file=sys.stderr)
