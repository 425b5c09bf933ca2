"""`dsalign chat`: what is answered, scored and shown, from a pipe and on a terminal."""

from __future__ import annotations

import io
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from model_folders import base_adapter_and_rm
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from support import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsalign import cli
from dsalign.verbs import chat, chatting

WORDS = ["--temperature", "0", "--max_new_tokens", "6"]


@pytest.fixture(scope="module")
def models(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """base, adapter and rm; all have the same chat template."""
    folder = tmp_path_factory.mktemp("chat")
    base_adapter_and_rm(tiny, folder)
    return {name: folder / name for name in ("base", "adapter", "rm")}


def piped(monkeypatch: pytest.MonkeyPatch, capsys: Any, text: str, *words: Any) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert cli.main(["chat", *map(str, words)]) == 0
    return capsys.readouterr().out


def greedy(model: Any, tokenizer: Any, prompt: str, count: int = 6) -> tuple[list[int], list[int]]:
    """(prompt, answer) by one argmax after another, without cache; token 2 ends it."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    start = len(ids)
    while len(ids) < start + count and (len(ids) == start or ids[-1] != 2):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[:start], ids[start:]


def prompt_of(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def test_each_line_of_a_pipe_is_answered(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The adapter's greedy words, which are not its base's; the same question again gets the same answer; the score is
    0.25 times the sum of the last hidden state and 0.5."""
    said = piped(monkeypatch, capsys, "Hi?\n\nHi?\n", models["adapter"], *WORDS, "--reward", models["rm"])
    tokenizer = AutoTokenizer.from_pretrained(models["adapter"])
    prompt, answer = greedy(AutoPeftModelForCausalLM.from_pretrained(models["adapter"]), tokenizer, prompt_of("Hi?"))
    of_base = greedy(AutoModelForCausalLM.from_pretrained(models["base"]), tokenizer, prompt_of("Hi?"))[1]
    assert answer != of_base
    judge = AutoModelForCausalLM.from_pretrained(models["rm"]).model
    state = judge(torch.tensor([prompt + answer])).last_hidden_state.detach()
    score = 0.25 * float(state[0, -1].sum()) + 0.5
    line = f"{tokenizer.decode(answer, skip_special_tokens=True)}  [score {score:.3g}, cut at 6 tokens]\n"
    assert said == line * 2


def test_two_models_and_a_system_prompt(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--vs base` is what the adapter was trained from."""
    said = piped(monkeypatch, capsys, "Hi?\n", models["adapter"], *WORDS, "--vs", "base", "--system", "Be brief.")
    first, second = said.splitlines()
    assert first.startswith(f"{models['adapter']}: ") and second.startswith(f"{models['base']}: ")
    tokenizer = AutoTokenizer.from_pretrained(models["base"])
    opening = f"<|im_start|>system\nBe brief.<|im_end|>\n{prompt_of('Hi?')}"
    _, answer = greedy(AutoModelForCausalLM.from_pretrained(models["base"]), tokenizer, opening)
    text = tokenizer.decode(answer, skip_special_tokens=True)
    assert second == f"{models['base']}: {text}  [cut at 6 tokens]"
    request = chat.read([str(models["base"]), "--vs", str(models["base"]), "--system", "Be brief.", *WORDS])
    held, shown = chatting.Chat(request, io.StringIO()), io.StringIO()  # type: ignore[arg-type]
    held.side_by_side("Hi?", Console(file=shown, width=200, force_terminal=True))
    assert any(line.count(text) == 2 for line in shown.getvalue().splitlines())


def test_a_terminal_keeps_the_conversation_and_ctrl_c_stops_an_answer(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C in the middle of an answer keeps what was said; /new forgets; Ctrl-D leaves."""
    request = chat.read([str(models["base"]), "--temperature", "0", "--max_new_tokens", "40"])
    assert request is not None
    held = chatting.Chat(request, io.StringIO())
    lengths: list[int] = []
    monkeypatch.setattr(held, "_say", lambda text: signal.raise_signal(signal.SIGINT) if "[" not in text else None)
    questions = iter(["One?", "Two?", "/new", EOFError()])

    def asked(prompt: str) -> str:
        lengths.append(len(held.speakers[0].turns))
        found = next(questions)
        if isinstance(found, EOFError):
            raise found
        return found

    monkeypatch.setattr("builtins.input", asked)
    before = signal.getsignal(signal.SIGINT)
    chatting._on_a_terminal(held)
    assert lengths == [0, 2, 4, 0] and signal.getsignal(signal.SIGINT) is before
    found = held.answer(held.speakers[0], "Three?", lambda text: signal.raise_signal(signal.SIGINT))
    assert len(found.ids) < 40 and chatting._remark(found, stopped=held.stop.asked) == "  [stopped]"


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    said: list[str] = []
    visible = chatting._Visible(tiny_tokenizer(), said.append)
    visible.on_finalized_text("a\x1b[2J\x07\nb\u202e")
    assert said == ["a\\x1b[2J\\x07\nb\\u202e"]


def test_refusals(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        ((models["base"], "--vs", "base"), "does not say what it was trained from; name it"),
        ((models["base"], "--reward", models["base"]), "has no value_head.safetensors; train one with --algo rm"),
        ((models["base"], "--temperature", "-1"), "--temperature: expected a number > 0, got '-1'"),
        ((models["base"], "--top_p", "1.5"), "--top_p: expected a number in (0, 1], got 1.5"),
        ((models["base"], "--max_new_tokens", "0"), "--max_new_tokens: expected a whole number >= 1"),
        ((models["base"], "--verses", "x"), "got '--verses'"),
    ):
        assert cli.main(["chat", *map(str, words)]) == 2
        assert message in capsys.readouterr().err
    request = chat.read([str(models["base"]), "--max_new_tokens", "40"])
    held = chatting.Chat(request, io.StringIO())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"a conversation of \d+ tokens of 512; write /new to begin another"):
        held.answer(held.speakers[0], "a" * 600, lambda text: None)
