"""The command `dsalign eval MODEL`: numbers of a model, or of two side by side, on pairs, answers or prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from dsalign.config import parse as config
from dsalign.config import reach_hub
from dsalign.config.flags import nearest
from dsalign.config.schema import RunConfig
from dsalign.endings import DONE
from dsalign.verbs import arguments, places

SUMMARY = "measure one model or two on pairs, answers or prompts: dsalign eval MODEL --dataset FILE"
USAGE = """usage: dsalign eval MODEL --dataset FILE ... [--vs OTHER] [--reward RM | --reward_funcs F] [--json]
       dsalign eval MODEL --lm_eval TASK,TASK

  MODEL            final/, checkpoint-N/, a run's folder (its final/), an adapter, a hub name or a short name
  --vs OTHER       a second model; base, on pairs the default, is what MODEL was trained from
  --reward RM      on prompts: the reward model that judges, or --reward_funcs and --reward_weights as in a run
  --data KIND      how rows are read: pairs, demonstrations or prompts [pairs where the first row is one, demonstrations
                   where MODEL's run learnt from such, else prompts]
  --json           one JSON object on standard output in place of text
  --lm_eval TASKS  run lm-eval on MODEL instead, where it is installed

Of a reward model, on pairs: accuracy, margins and scores. Of a language model, on pairs: accuracy and margins of its
log-probabilities less those of OTHER, perplexity and tokens; on demonstrations the last two. On prompts an answer is
sampled from each model: reward, win rate, tokens, KL to OTHER. Intervals are Wilson's, of 95 %.

Options of a run that are read: """
OPTIONS = (
    "dataset", "dataset_weights", "on_bad_row", "dataset_num_proc", "streaming", "columns", "template", "system",
    "assistant_turns", "max_length", "truncation_strategy", "dtype", "attn_impl", "trust_remote_code", "batch_size",
    "seed", "reward_model", "reward_funcs", "reward_weights", "max_new_tokens", "temperature", "top_p", "top_k",
    "rollout", "local_rollout_forward_batch_size",
)  # fmt: skip
KINDS = {"pairs": "dpo", "demonstrations": "sft", "prompts": "grpo"}  # kind of rows -> an algorithm that reads such
BATCH = 8  # groups in a forward where --batch_size is not given


@dataclass(frozen=True)
class Request:
    """A `dsalign eval` command, parsed. config: its options, of an algorithm that reads prompts; kind: how rows are
    read, None = by the first row. judged: whether a reward was given. lm_eval: tasks, None = none."""

    model: str
    vs: str | None
    config: RunConfig
    kind: str | None
    judged: bool
    batch_size: int
    as_json: bool
    lm_eval: str | None


def read(argv: Sequence[str]) -> Request | None:
    """The request that `dsalign eval ARGV` makes; None for a request of help.

    Raises ConfigError for options of a run that cannot be read, ValueError for those that this command does not read.
    """
    values = {"vs": None, "reward": None, "data": None, "lm_eval": None}
    found = arguments.of("eval", argv, places=(), values=values, switches=("json",))
    if found is None:
        return None
    given, (named, *rest) = found[0], [*found[1], ""]
    if not named or named.startswith("-") or named != argv[0]:
        first = repr(argv[0]) if argv else "none"
        raise ValueError(
            f"eval: expected MODEL as the first word, got {first}; write dsalign eval MODEL --dataset FILE"
        )
    rest = rest[:-1]
    kind = given.data and arguments.choice("data", given.data, tuple(KINDS))
    model = places.model_of(named)
    judge = ["--reward_model", places.model_of(given.reward)] if given.reward else []
    parsed = config.parse(["--algo", KINDS["prompts"], "--model", model, *rest, *judge], world_size=1)
    own = {name for name, origin in parsed.origins.items() if origin.startswith("flag ") or re.search(r":\d+$", origin)}
    if unread := sorted(own - {*OPTIONS, "algo", "model"}):
        advice = nearest(unread[0], OPTIONS) or f"; leave it out, as eval reads {', '.join(OPTIONS)}"
        raise ValueError(f"eval: expected options that a measurement depends on, got --{unread[0]}{advice}")
    if not given.lm_eval and "dataset" not in own:
        raise ValueError("eval: expected --dataset FILE, got none; try --dataset demo:pairs or demo:prompts")
    batch = parsed.config.optim.batch_size if "batch_size" in own else BATCH
    judged = bool(own & {"reward_model", "reward_funcs"})
    return Request(named, given.vs, parsed.config, kind, judged, batch, given.json, given.lm_eval)


def run(request: Request | None) -> int:
    """Carry out a request; None prints the usage. Returns the exit code, that of lm-eval where it ran.

    Raises ValueError where a model or the rows cannot be used, or lm-eval is not installed.
    """
    if request is None:
        print(USAGE + ", ".join(f"--{name}" for name in OPTIONS))
        return DONE
    more = [] if request.lm_eval else reach_hub.needed_by(request.config, places.data_sets())
    places.ask_the_hub({"MODEL": request.model, "vs": request.vs}, more)
    # Not at the top of the file: transformers takes longer to import than a typo may.
    if request.lm_eval:
        harness = places.work("harness")
        return int(harness.run(request.config.models.model, request.lm_eval, request.config, request.batch_size))
    report = places.work("evaluated").evaluate(request)
    print(json.dumps(report.found, ensure_ascii=False) if request.as_json else report.text())
    return DONE
