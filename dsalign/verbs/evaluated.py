"""What `dsalign eval` measures of one model or two, as numbers by name and as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsalign import algos
from dsalign.config import parse
from dsalign.config.schema import RunConfig
from dsalign.contract.algorithm import Algorithm
from dsalign.contract.groups import Group
from dsalign.contract.maths import token_kl
from dsalign.data.dataset import data_of
from dsalign.data.rows.iterate import iter_rows
from dsalign.data.rows.records import printable
from dsalign.models.compare import compare_models
from dsalign.models.tokenizer import decoder
from dsalign.report.run_log import quiet
from dsalign.rewards.sources import Rewards, functions_of
from dsalign.rollout.generate import Keys, Sampler
from dsalign.verbs import opened, places
from dsalign.verbs.eval import KINDS, Request
from dsalign.verbs.opened import Model

Z = 1.959964  # standard deviations of a 95 % interval
WILSON, MEAN = "Wilson, 95 %", "1.96 standard errors, 95 %"  # kinds of intervals, as JSON names them
ROLES = ("policy", "reference")  # under which the first and the second model compute


@dataclass(frozen=True)
class Report:
    """What was measured. found: numbers by name, for JSON; "models" has a dictionary each, "versus" what compares the
    first with the second, or the first with itself."""

    found: dict[str, Any]

    def text(self) -> str:
        """The numbers as a table with a column a model, and lines for what compares them."""
        found = self.found
        names = [one["model"] for one in found["models"]]
        lines = [f"{found['rows']} {found['data']} of {' '.join(found['dataset'])}"]
        keys = [key for key in found["models"][0] if key != "model"]
        cells = [["", *names], *([key, *(_cell(one.get(key)) for one in found["models"])] for key in keys)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells
        ]
        lines += [f"{key}: {_cell(value)}" for key, value in found["versus"].items()]
        lines.append("in brackets: intervals of 95 %, of a share Wilson's, of a mean 1.96 standard errors on each side")
        return printable("\n".join([*lines, *found["notes"]]))


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        share = value["interval"] == WILSON
        low, high = (100 * value[end] if share else value[end] for end in ("low", "high"))
        if share:
            return f"{100 * value['value']:.1f} % of {value['of']} ({low:.1f} to {high:.1f})"
        return f"{value['value']:.4g} ({low:.4g} to {high:.4g})"
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def wilson(successes: float, count: int) -> dict[str, Any]:
    """The share successes / count with Wilson's interval of 95 %: {"value", "low", "high", "of", "interval"}."""
    share, z2 = successes / count, Z * Z / count
    centre = (share + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    low, high = max(0.0, centre - half), min(1.0, centre + half)
    return {"value": share, "low": low, "high": high, "of": count, "interval": WILSON}


def ratio(sums: Tensor, counts: Tensor) -> dict[str, Any]:
    """The ratio sum(sums) / sum(counts) of answers drawn one by one, with its interval of 95 % as of a mean (a ratio
    estimator's first order): {"value", "low", "high", "of": answers, "interval"}. With counts of 1 it is the mean.

    sums, counts: [answers]. Of a single answer the interval is not known: NaN.
    """
    sums, counts = sums.double(), counts.double()
    value = float(sums.sum() / counts.sum())
    left = sums - value * counts  # of which the mean is 0
    error = math.sqrt(float(left.var()) / len(sums)) / float(counts.mean()) if len(sums) > 1 else math.nan
    low, high = value - Z * error, value + Z * error
    return {"value": value, "low": low, "high": high, "of": len(sums), "interval": MEAN}


def evaluate(request: Request) -> Report:
    """Measure what a request asks for.

    Raises ValueError where a model or the rows cannot be used, or an option does not fit the kind of rows.
    """
    quiet(0)
    models = request.config.models.model_copy(update={"tuner": "full"})
    opening = partial(opened.open_model, how=models, template=request.config.data.template)
    first = opening(request.model)
    kind = request.kind or _kind_of(request, first)
    config = request.config.model_copy(update={"algorithm": _defaults(KINDS[kind]), "models": models})
    if first.role == "reward" and kind != "pairs":
        raise ValueError(
            f"data: expected pairs for the reward model {request.model}, got {kind}; give pairs, or --data pairs"
        )
    if request.judged and kind != "prompts":
        raise ValueError(f"reward: expected prompts to answer, got {kind}; add --data prompts, or give RM as MODEL")
    other = request.vs and places.model_of(opened.second_of(first, request.vs))
    if other is None and kind == "pairs" and first.role == "policy":
        other = opened.base_of(first)
    names = [request.model, *([other] if other else [])]
    both = [
        first,
        *(opened.open_model(name, models, role=first.role, template=config.data.template) for name in names[1:]),
    ]
    notes = [] if request.kind else [f"rows were read as {kind}; write --data KIND for another: {', '.join(KINDS)}"]
    measure = _judges if first.role == "reward" else _sampled if kind == "prompts" else _written
    found, versus, more = measure(request, config, both)
    rows = found[0].pop("rows")
    named = [{"model": name, **one} for name, one in zip(names, found, strict=True)]
    shown = {"data": kind, "dataset": list(config.data.dataset), "rows": rows, "models": named, "versus": versus}
    return Report({**shown, "notes": notes + more})


def _defaults(algo: str) -> Algorithm:
    made: Algorithm = parse.parse(["--algo", algo], world_size=1).config.algorithm
    return made


def _kind_of(request: Request, model: Model) -> str:
    """The kind of the rows of a data set: pairs where the first one can be read as a pair, demonstrations where it can
    be read as one and the model's run read such, else prompts; demo rows say theirs."""
    data = request.config.data
    first = data.dataset[0].partition("#")[0]
    if first.startswith("demo:"):
        return first.removeprefix("demo:") if first.removeprefix("demo:") in KINDS else "prompts"
    algo = places.of_run(str(model.source.adapter or model.source.weights), "algo")
    its = _defaults(algo).traits.data if algo in algos.names() else ""
    for kind in ["pairs", *(["demonstrations"] if its == "demonstrations" and not request.judged else [])]:
        with suppress(ValueError, StopIteration):
            next(iter_rows(data.dataset, kind, columns=data.columns, streaming=data.streaming))
            return kind
    return "prompts"


def _groups(config: RunConfig, model: Model) -> Sequence[Group]:
    """The rows as a model reads them. Raises ValueError for rows that it cannot read."""
    groups = data_of(config, model.template).train
    compare_models(config, {config.algorithm.traits.main: model.source}, model.template.tokenizer, groups)
    return groups


_Found = tuple[list[dict[str, Any]], dict[str, Any], list[str]]  # of each model, of both, notes


def _judges(request: Request, config: RunConfig, models: Sequence[Model]) -> _Found:
    """Accuracy, margins and scores of reward models on pairs."""
    found = []
    for model in models:
        groups = _groups(config, model)
        scores = torch.stack(
            opened.roles_of({"reward": model}, batch_size=request.batch_size).each_group("reward", groups)
        )
        found.append({"rows": len(groups), **_ordered("", scores[:, 0] - scores[:, 1]),
                      "score, chosen": _mean(scores[:, 0]), "score, rejected": _mean(scores[:, 1])})  # fmt: skip
    return found, {}, []


def _ordered(name: str, margins: Tensor) -> dict[str, Any]:
    """How often and by how much chosen completions are above rejected ones. margins: [pairs]."""
    five, half, most = torch.quantile(margins.double(), torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return {
        f"{name}accuracy": wilson(int((margins > 0).sum()), len(margins)),
        f"{name}margin, mean": _mean(margins),
        f"{name}margin, 5 %": five,
        f"{name}margin, median": half,
        f"{name}margin, 95 %": most,
    }


def _written(request: Request, config: RunConfig, models: Sequence[Model]) -> _Found:
    """Perplexity and tokens of the answers in the rows, and of pairs the implicit rewards of the first model against
    the second: differences of log-probabilities, nats."""
    roles = opened.roles_of(dict(zip(ROLES, models, strict=False)), batch_size=request.batch_size)
    found, sums = list[dict[str, Any]](), list[Tensor]()
    groups, comparable = _groups(config, models[0]), models[-1].vocabulary == models[0].vocabulary
    for role, model in zip(ROLES, models, strict=False):
        groups = groups if comparable or model is models[0] else _groups(config, model)
        each = zip(roles.each_group(role, groups), groups, strict=True)
        logps = torch.stack([torch.stack([x.sum() for x in torch.split(of, list(g.lengths))]) for of, g in each])
        tokens = torch.tensor([g.lengths for g in groups])
        names = (", chosen", ", rejected") if logps.shape[1] == 2 else ("",)
        one: dict[str, Any] = {"rows": len(groups)}
        for i, name in enumerate(names):
            one[f"perplexity{name}"] = math.exp(-float(logps[:, i].double().sum()) / int(tokens[:, i].sum()))
            one[f"tokens{name}"] = _mean(tokens[:, i].float())
        if len(names) == 2:
            one["log-probability, chosen - rejected"] = _mean(logps[:, 0] - logps[:, 1])
        found.append(one)
        sums.append(logps)
    if len(models) < 2 or sums[0].shape[1] < 2:
        return found, {}, [] if len(models) == 2 or sums[0].shape[1] < 2 else ["implicit rewards need --vs OTHER"]
    if not comparable:
        return found, {}, ["no implicit rewards: the vocabularies are not the same"]
    change = sums[0] - sums[1]
    return found, _ordered("implicit reward, ", change[:, 0] - change[:, 1]), []


def _sampled(request: Request, config: RunConfig, models: Sequence[Model]) -> _Found:
    """Answers that each model samples to the prompts: tokens, reward, KL per token to the other, and the win rate."""
    judge, playing = None, dict(zip(ROLES, models, strict=False))
    if config.models.reward_model:
        judge = opened.open_model(config.models.reward_model, config.models, role="reward")
        playing["reward"] = judge
    options, functions = config.rollout, None
    roles = opened.roles_of(playing, batch_size=request.batch_size, temperature=options.temperature)
    found, totals, notes = list[dict[str, Any]](), list[Tensor](), list[str]()
    for i, (role, model) in enumerate(zip(ROLES, models, strict=False)):
        groups = _groups(config, model)
        sampler = Sampler(roles, role, options, model.template.end_ids)
        groups, _, _ = sampler.sample(groups, 1, Keys(config.seed, 0, 0), options)
        ended = sum(g.completions[0][-1] in model.template.end_ids for g in groups)
        one: dict[str, Any] = {"rows": len(groups), "tokens": sum(len(g.completions[0]) for g in groups) / len(groups)}
        one["ended"] = wilson(ended, len(groups))
        if request.judged:
            functions = functions or functions_of(config, groups)
            reading = partial(opened.as_read, judge, model) if judge else None
            rewards = Rewards(
                roles, functions, config.models.reward_weights, decoder(model.template.tokenizer), reading
            )
            totals.append(torch.cat(list(rewards(groups, request.batch_size).total)))
            one["reward"] = _mean(totals[-1])
        if len(models) == 2:
            one |= _kl(roles, role, ROLES[1 - i], groups, models)
        found.append(one)
    if len(models) == 2 and models[0].vocabulary != models[1].vocabulary:
        notes.append("no KL: the vocabularies are not the same")
    if not request.judged:
        return found, {}, [*notes, "no win rate: give --reward RM or --reward_funcs FILE.py:FUNCTION"]
    if len(totals) < 2:
        return found, {}, notes
    wins, ties = int((totals[0] > totals[1]).sum()), int((totals[0] == totals[1]).sum())
    won = wilson(wins + ties / 2, len(totals[0]))
    return found, {"win rate of the first, ties half": won, "wins": wins, "ties": ties}, notes


def _kl(roles: Any, role: str, other: str, groups: Sequence[Group], models: Sequence[Model]) -> dict[str, Any]:
    """The k3 estimate of the KL divergence to `other` from what `role` sampled, nats, a token and an answer, each with
    an interval over the answers, whose tokens are not independent; nothing where the models have no vocabulary in
    common."""
    names = "KL per token to the other", "KL per answer to the other"
    if models[0].vocabulary != models[1].vocabulary:
        return dict.fromkeys(names)
    each = zip(roles.each_group(role, groups), roles.each_group(other, groups), strict=True)
    sums = torch.stack([token_kl(mine, theirs, "k3").double().sum() for mine, theirs in each])
    tokens = torch.tensor([len(group.completions[0]) for group in groups])
    return {names[0]: ratio(sums, tokens), names[1]: ratio(sums, torch.ones(len(groups)))}


def _mean(numbers: Tensor) -> float:
    return float(numbers.double().mean())
