"""A skipped step computed again: what of each of its rows is not finite, and where it first comes up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsalign.checkpoint import run_folders
from dsalign.config.schema import RunConfig
from dsalign.contract.algorithm import loss_of
from dsalign.contract.groups import Group, Output, Prepared
from dsalign.data.batches.packing import cut, padded
from dsalign.guard import numbers
from dsalign.guard.first_flaw import Flaw, flaw_in, watching
from dsalign.models import load
from dsalign.models.names import Source, resolve
from dsalign.models.tokenizer import decoder, load_tokenizer
from dsalign.report.run_log import quiet


@dataclass(frozen=True)
class _Model:
    """A trained role's model in float32. source: where its weights are from."""

    role: str
    module: Any
    source: Source


def replayed(folder: Path, config: RunConfig, model: str | None) -> tuple[list[str], bool]:
    """(lines to print, whether every row is finite) of the step that `dsalign.guard.numbers.keep` wrote to `folder`.

    config: the run's. model: the folder of the weights, None = the run's newest checkpoint, or where it has none the
    model from which it starts. Raises ValueError where the step or a model cannot be read.
    """
    quiet(0)
    step, prepared = numbers.read(folder)
    lines = [f"step {step['step']} of {folder.absolute().parent.parent}: {step['why']}"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [_model(role, config, model, folder, device) for role in config.algorithm.traits.trained]
    lines += [f"{one.role}: float32, weights of {one.source.adapter or one.source.weights}" for one in models]
    decode = decoder(load_tokenizer(models[0].source, config.models))
    finite = True
    for i, group in enumerate(prepared.groups):
        found = list(_of_fields(prepared, i, decode))
        for one in models:
            found += _of(one, config, prepared, i, decode)
        finite = finite and not found
        lines += [f"{group.where}: {text}" for text in found or ["finite"]]
    if finite:
        lines.append(
            "every row is finite with these weights; those that the step had may have been other ones: name a "
            "checkpoint-N/ nearer to it with --model, or lower --learning_rate"
        )
    return lines, finite


def _model(role: str, config: RunConfig, given: str | None, folder: Path, device: torch.device) -> _Model:
    """The model of a trained role: of the given folder, else of the run's newest checkpoint, else as it starts."""
    main = role == config.algorithm.traits.main
    kept = run_folders.newest_first(folder.absolute().parent.parent)
    begun = config.models.model if main else config.models.reward_model or config.models.model
    where = given or (str(kept[0]) if kept else begun)
    inside = Path(where) / role
    source = resolve(str(inside) if not main and inside.is_dir() else where)
    options = config.models.model_copy(update={"dtype": "float32", "tuner": "full", "gradient_checkpointing": False})
    try:
        module = load.load_frozen(role, source, options, device=device)
    except ValueError:
        if kept or given:
            raise
        module = load.load_trained(role, source, options, device=device, dropout=False, seed=config.seed)
    module.shares = False  # a completion a row, so that a position is one of its row
    return _Model(role, module.to(device).eval().requires_grad_(True), source)


def _of_fields(prepared: Prepared, i: int, decode: Any) -> Iterator[str]:
    """What is not finite of what was prepared for a group."""
    for name, each in prepared.fields.items():
        if (flaw := flaw_in(name, each[i])) is not None:
            which = f"number {flaw.row + 1} of {len(each[i])}"
            group = prepared.groups[i]
            if len(each[i]) == sum(group.lengths):
                kept = _places(group)
                completion, token = kept[flaw.row]
                which = _said(group, completion, len(group.prompt) + token, decode)
            yield f"prepared {name} is {flaw.value} at {which}"


def _places(group: Group) -> list[tuple[int, int]]:
    """(completion, token) of each token that the losses count."""
    return [(c, t) for c, mask in enumerate(group.counted) for t, counts in enumerate(mask) if counts]


def _of(model: _Model, config: RunConfig, prepared: Prepared, i: int, decode: Any) -> Iterator[str]:
    """What is not finite of a group in the forward pass, the loss or the backward pass of a role; the first alone."""
    group, algorithm = prepared.groups[i], config.algorithm
    device = next(model.module.parameters()).device
    model.module.zero_grad()
    with watching(model.module) as watch:
        inputs = padded([group], device, ends=model.role == "reward")
        if model.role in load.VALUE_ROLES:
            out = Output.of(model.role, model.module(inputs))
        else:
            entropy = "entropy" in algorithm.traits.needs
            out = Output.of(model.role, *model.module(inputs, entropy, config.rollout.temperature))
        if watch.forward is not None:
            yield f"{model.role}: {_text(watch.forward, group, decode)}"
            return
        if (flaw := flaw_in("the output", out.numbers)) is not None:
            yield f"{model.role}: number {flaw.row + 1} of its output is {flaw.value}"
            return
        terms = loss_of(algorithm, model.role, out, cut(prepared, [i], device)).terms
        for name, term in terms.items():
            if (flaw := flaw_in(name, term)) is not None:
                yield f"{model.role}: the loss is {flaw.value} (by {name}), of a forward pass that is finite"
                return
        sum(terms.values()).backward()  # type: ignore[union-attr]
    if watch.backward is not None:
        yield f"{model.role}: gradient of {_text(watch.backward, group, decode)}"
        return
    for name, parameter in model.module.named_parameters():
        if parameter.grad is not None and (flaw := flaw_in(name, parameter.grad)) is not None:
            yield f"{model.role}: gradient of the weight {name} is {flaw.value}"
            return


def _text(flaw: Flaw, group: Group, decode: Any) -> str:
    if flaw.position is None or flaw.row >= len(group.completions):
        return f"the output of {flaw.where} is {flaw.value}"
    return f"the output of {flaw.where} is {flaw.value} at {_said(group, flaw.row, flaw.position, decode)}"


def _said(group: Group, completion: int, position: int, decode: Any) -> str:
    """A position of a row that holds a prompt and a completion, in words."""
    ids = (*group.prompt, *group.completions[completion])
    token = ids[position] if position < len(ids) else None
    inside = position - len(group.prompt)
    in_prompt = f"token {position + 1} of the prompt"
    place = f"token {inside + 1} of completion {completion + 1}" if inside >= 0 else in_prompt
    return f"position {position}, {place}" + ("" if token is None else f" (id {token}, {decode([token])!r})")
