"""The command `dsalign plan`: the memory of a run on given GPUs, what fits, and which DeepSpeed file to use.

Nothing is loaded: the sizes come from config.json. What it says is estimated, by the formulas of docs/plan.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dsalign import assets
from dsalign.config import parse as config
from dsalign.config.schema import RunConfig
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.memory import counted, estimate, known, shapes
from dsalign.memory.estimate import GIB, Estimate, Machine
from dsalign.memory.shapes import Shape
from dsalign.verbs import arguments, plan_text

SUMMARY = "the memory of a run before it starts: what fits, which DeepSpeed file, which micro-batch"
USAGE = """usage: dsalign plan --algo NAME [--model MODEL] [options of a run] [--gpus N] [--gpu_memory GIB] ...

Says what fits before anything is loaded: memory by role, the largest micro-batch, which --deepspeed to use.

  --gpus N           GPUs of the run, all machines together [8]
  --gpu_memory GIB   memory of one GPU [80]
  --nodes N          machines [gpus / 8, rounded up]
  --cpu_memory GIB   memory of one machine, for off-loading [not asked]
  --prompt_tokens N  tokens of the longest row's prompt, out of --max_length [0, the most memory]
  --json             one JSON object on standard output in place of text

A model that this machine does not have: --params 70B --layers 80 --hidden 8192, and if known --heads, --kv_heads,
--intermediate, --vocab, --experts, --experts_per_token.

All options of a run are read, from flags and --config files: dsalign --algo NAME --help lists them."""
NUMBERS = ("layers", "hidden", "heads", "kv_heads", "intermediate", "vocab", "experts", "experts_per_token")
UNITS = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
LONGEST = 4096  # GPUs that are tried for a run that does not fit


@dataclass(frozen=True)
class Request:
    """A `dsalign plan` command, parsed. given: the DeepSpeed file that the command names, None = the best is looked
    for. described: the shape of a model that was described by numbers, None = --model names it."""

    config: RunConfig
    machine: Machine
    given: str | None
    described: Shape | None
    prompt: int
    as_json: bool


def read(argv: Sequence[str]) -> Request | None:
    """The request that `dsalign plan ARGV` makes; None for a request of help.

    Raises ConfigError for options of a run that cannot be read, ValueError for a wrong number.
    """
    own = _parser()
    asked, rest = own.parse_known_args(list(argv))
    if "--help" in rest or "-h" in rest:
        return None
    gpus = _whole("gpus", asked.gpus)
    nodes = -(-gpus // 8) if asked.nodes is None else _whole("nodes", asked.nodes)
    if gpus % nodes:
        raise ValueError(f"--nodes: expected a number that divides --gpus {gpus}, got {nodes}")
    cpu = None if asked.cpu_memory is None else _number("cpu_memory", asked.cpu_memory) * GIB
    parsed = config.parse(rest, world_size=gpus)
    return Request(
        _of_own_rows(parsed),
        Machine(gpus, nodes, _number("gpu_memory", asked.gpu_memory) * GIB, cpu),
        None if parsed.origins["deepspeed"] == "default" else parsed.config.optim.deepspeed,
        _described(asked),
        _whole("prompt_tokens", asked.prompt_tokens, least=0),
        asked.json,
    )


def without_machine(argv: Sequence[str]) -> list[str]:
    """The words of a command that are a run's own, without those that only `read` knows."""
    return _parser().parse_known_args(list(argv))[1]


def _parser() -> argparse.ArgumentParser:
    """The parser of what is no option of a run."""
    own = arguments.parser("plan")
    own.add_argument("--json", action="store_true")
    defaults = {
        "gpus": "8",
        "gpu_memory": "80",
        "nodes": None,
        "cpu_memory": None,
        "prompt_tokens": "0",
        "params": None,
    }
    for name, default in {**defaults, **dict.fromkeys(NUMBERS)}.items():
        own.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), dest=name, default=default)
    return own


def _of_own_rows(parsed: config.Parsed) -> RunConfig:
    """The configuration without what the rows of the demo set, such as short completions: a plan is for other rows."""
    names = [name for name, origin in parsed.origins.items() if origin.startswith(assets.DEMO)]
    defaults: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(RolloutOptions) if f.name in names}
    rollout = dataclasses.replace(parsed.config.rollout, **defaults)
    return parsed.config.model_copy(update={"rollout": rollout})


def _whole(name: str, text: str, *, least: int = 1) -> int:
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"--{name}: expected a whole number >= {least}, got {text!r}")
    return int(text)


def _number(name: str, text: str) -> float:
    """A number > 0, with K, M, B or T behind it for thousands, millions, billions or trillions."""
    body, unit = (text[:-1], text[-1:].upper()) if text[-1:].upper() in UNITS and text[-1:] else (text, "")
    try:
        value = float(body) * UNITS[unit]
    except ValueError:
        value = math.nan
    if not (0 < value < math.inf):
        raise ValueError(f"--{name}: expected a number > 0, as 80 or 70B, got {text!r}")
    return value


def _described(asked: Any) -> Shape | None:
    """The shape that --params, --layers and their like describe, None where none is given."""
    given = {name: getattr(asked, name) for name in ("params", *NUMBERS) if getattr(asked, name) is not None}
    if not given:
        return None
    lacking = [name for name in ("layers", "hidden") if name not in given]
    lacking += [] if "params" in given or "intermediate" in given else ["params"]
    if lacking:
        raise ValueError(
            f"--{next(iter(given))}: expected {' and '.join(f'--{name}' for name in lacking)} beside it, got none; "
            "write --params 70B --layers 80 --hidden 8192"
        )
    numbers = {name: _whole(name, given[name]) for name in NUMBERS if name in given}
    if "vocab" in numbers:
        numbers["vocabulary"] = numbers.pop("vocab")
    return shapes.of_numbers(params=_number("params", given["params"]) if "params" in given else None, **numbers)


def shapes_of(config: RunConfig, described: Shape | None) -> dict[str, Shape]:
    """Role -> the shape of its model; no role "reward" where functions alone give scores.

    Raises ValueError where the config.json of a model cannot be had or read.
    """
    models, traits = config.models, config.algorithm.traits
    names = {"reference": models.ref_model, "reward": models.reward_model, "value": models.reward_model}
    found: dict[str, Shape] = {}
    for role in traits.roles:
        if role == "reward" and not models.reward_model and role not in traits.trained:
            continue
        name = names.get(role)
        found[role] = described if described is not None and name is None else shape_of(name or models.model)
    return found


def shape_of(name: str) -> Shape:
    """The shape of the model that `name` stands for: by the formula of its family, or by counting its modules."""
    settings, _ = known.config_of(name)
    try:
        return shapes.of_config(settings)
    except shapes.UnknownFamilyError:
        return counted.by_modules(settings)


def run(request: Request | None) -> int:
    """Carry out a request; None prints the usage. Returns the exit code: 0, or 2 where nothing fits as it was asked."""
    if request is None:
        print(USAGE)
        return 0
    found = answer(request)
    print(json.dumps(found.as_json()) if request.as_json else found.text())
    return 0 if found.fits else 2


def answer(request: Request) -> plan_text.Answer:
    """What `dsalign plan` says to a request. Raises ValueError as `shapes_of` does."""
    found = shapes_of(request.config, request.described)
    names = dict.fromkeys([*([request.given] if request.given else []), *_files(request.config)])
    tried = _tried(request, found, request.config, request.machine, list(names))
    chosen = tried[request.given] if request.given else estimate.best(tried, request.machine)
    fits = chosen is not None and chosen.fits(request.machine)
    hints = [] if fits else _nearest(request, found)
    shown = chosen or min(tried.values(), key=lambda one: one.peak)
    return plan_text.Answer(request.config, request.machine, found, tried, shown, fits, hints)


def _tried(
    request: Request, found: dict[str, Shape], config: RunConfig, machine: Machine, names: Sequence[str]
) -> dict[str, Estimate]:
    return {name: estimate.largest_micro_batch(config, found, machine, name, prompt=request.prompt) for name in names}


def _files(config: RunConfig) -> list[str]:
    """The DeepSpeed files that are tried: with weights in 4 bits none of stage 3, which would cut them up."""
    return [name for name in estimate.CONFIGS if not (config.models.load_in_4bit and name.startswith("zero3"))]


def _nearest(request: Request, found: dict[str, Shape]) -> list[str]:
    """Changes that would fit, the smallest first: a line for each, as options to add."""
    config, machine = request.config, request.machine
    changes: list[tuple[str, RunConfig, Machine]] = [("", config, machine)]
    if not config.models.gradient_checkpointing:
        less = estimate.changed(config, gradient_checkpointing=True)
        changes.append(("--gradient_checkpointing true", less, machine))
        config = less
    if config.models.tuner == "full":
        lora = estimate.changed(config, tuner="lora")
        changes.append(("--gradient_checkpointing true --tuner lora", lora, machine))
    gpus = machine.gpus
    while gpus < LONGEST:
        gpus *= 2
        more = Machine(gpus, max(machine.nodes, -(-gpus // 8)), machine.gpu_bytes, machine.cpu_bytes)
        changes.append((f"--gradient_checkpointing true on --gpus {gpus}", config, more))
    lines, seen = [], set[str]()
    for words, other, there in changes:
        one = estimate.best(_tried(request, found, other, there, _files(other)), there)
        kind = words.partition(" on ")[1] or words
        if one is None or kind in seen:
            continue
        seen.add(kind)
        lines.append(f"{words} --deepspeed {one.deepspeed} --batch_size {one.micro_batch}".strip())
    return lines
