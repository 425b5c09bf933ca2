"""The command `dsalign chat MODEL`: questions from a terminal or a pipe, answered by one model or by two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsalign.endings import DONE
from dsalign.verbs import arguments, places
from dsalign.verbs.merge import DTYPES

SUMMARY = "talk to a model, beside another and with a reward model's score: dsalign chat MODEL"
USAGE = """usage: dsalign chat MODEL [--vs BASE] [--reward RM] [--system TEXT] [--temperature T] [--max_new_tokens N]

  MODEL               final/, checkpoint-N/, a run's folder (its final/), an adapter, a hub name or a short name
  --vs BASE           a second model, which gets the same questions; base = what MODEL was trained from
  --reward RM         a reward model, which scores each answer
  --system TEXT       the system prompt
  --temperature T     of sampling, >= 0; 0 takes the most probable token [0.7]
  --top_p P           share of probability that is sampled from, in (0, 1] [1]
  --max_new_tokens N  tokens of an answer at most [512]
  --seed N            of sampling [42]
  --template NAME     a chat template in place of MODEL's own
  --dtype DTYPE       of the weights: auto, float32, bfloat16 or float16 [auto]
  --trust_remote_code   run code that comes with a model

Ctrl-C stops an answer, Ctrl-D leaves, /new starts a new conversation. In a pipe each line is a question of its own."""
VALUES = {
    "vs": None, "reward": None, "system": None, "temperature": "0.7", "top_p": "1", "max_new_tokens": "512",
    "seed": "42", "template": None, "dtype": "auto",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A `dsalign chat` command, parsed. vs, reward, system, template: None where they are not given."""

    model: str
    vs: str | None
    reward: str | None
    system: str | None
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    template: str | None
    dtype: str
    trust: bool


def read(argv: Sequence[str]) -> Request | None:
    """The request that `dsalign chat ARGV` makes; None for a request of help. Raises ValueError for a wrong option."""
    given = arguments.alone("chat", argv, places=("model",), values=VALUES, switches=("trust_remote_code",))
    if given is None:
        return None
    top_p = arguments.number("top_p", given.top_p)
    if top_p > 1:
        raise ValueError(f"--top_p: expected a number in (0, 1], got {given.top_p}; write --top_p 1 for all")
    return Request(
        given.model,
        given.vs,
        given.reward,
        given.system,
        0.0 if given.temperature.strip("0.") == "" else arguments.number("temperature", given.temperature),
        top_p,
        arguments.whole("max_new_tokens", given.max_new_tokens),
        arguments.whole("seed", given.seed, least=0),
        given.template,
        arguments.choice("dtype", given.dtype, DTYPES),
        given.trust_remote_code,
    )


def run(request: Request | None) -> int:
    """Carry out a request; None prints the usage. Returns the exit code. Raises ValueError where a model cannot be
    opened, or --reward is none."""
    if request is None:
        print(USAGE)
        return DONE
    places.ask_the_hub({"MODEL": request.model, "vs": request.vs, "reward": request.reward})
    work = places.work("chatting")  # not at the top of the file: transformers takes longer to import than a typo may
    work.chat(request)
    return DONE
