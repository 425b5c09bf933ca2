"""What `dsalign check` looks at, one function a thing."""

from __future__ import annotations

import math
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from dsalign.checkpoint import folder_lock, resuming
from dsalign.config import ds_files, model_folders
from dsalign.config.schema import RunConfig
from dsalign.data.tokens.templates import Template
from dsalign.engines import build
from dsalign.guard import disk, resources
from dsalign.memory.estimate import Estimate
from dsalign.models import load
from dsalign.models.compare import compare_models
from dsalign.models.heads import head_file
from dsalign.models.names import resolve
from dsalign.models.tokenizer import template_of
from dsalign.report.run_log import quiet
from dsalign.report.story import duration, number
from dsalign.rewards.retemplate import retemplate_of
from dsalign.rewards.sources import functions_of
from dsalign.verbs import beside, data_report, opened, plan, rehearsal
from dsalign.verbs.lines import ERROR, OK, SKIPPED, WARNING, Line, looked

STAGES = {"error": ERROR, "warning": WARNING}
SHOWN = 4  # end tokens that are named


def checked(config: RunConfig, planned: plan.Request, *, step: bool) -> list[Line]:
    """The lines on everything that a run needs. planned: the run as `dsalign plan` takes it. step: whether one step of
    a tiny model is taken. What needs something that is missing is skipped."""
    quiet(0)
    found = looked("configuration", lambda: _configuration(config, planned.machine.gpus))
    found += looked("DeepSpeed file", lambda: _deepspeed(config))
    for role in build.roles_with_model(config):
        found += looked(f"{role} model", partial(_model, role, config))
    held: dict[str, Any] = {}
    if any(line.state == ERROR and line.name.endswith("model") for line in found):
        found.append(Line("template, data, step", SKIPPED, "they need the models above"))
    else:
        found += looked("template", lambda: _template(config, held))
        found += looked("data", lambda: _data(config, held)) if "template" in held else []
        found += looked("models together", lambda: _together(config, held)) if "groups" in held else []
        found += looked("rewards", lambda: _rewards(config, held)) if "groups" in held else []
    found += looked("memory", lambda: _memory(planned, held))
    if "estimate" in held:
        found += looked("off-loading", lambda: beside.offload(config, held["estimate"], planned.machine))
    if "estimate" in held and "sources" in held:
        found += looked("vLLM", lambda: _sampler(config, planned, held))
    found += looked("output folder", lambda: _output(config))
    found += looked("disk", lambda: _disk(config, held)) if "groups" in held and "estimate" in held else []
    if not step:
        return [*found, Line("one step", SKIPPED, "left out by --no_step")]
    if any(line.state == ERROR for line in found) or "groups" not in held:
        return [*found, Line("one step", SKIPPED, "it needs all of the above without an error")]
    return [*found, *looked("one step", lambda: _step(config, held))]


def _configuration(config: RunConfig, ranks: int) -> str:
    resuming.check_options(config, ranks)
    optim = config.optim
    rows = config.global_batch(ranks)
    return (
        f"{config.algo}, {config.models.tuner} of {config.models.model}, {rows} rows a step on {ranks} rank(s), "
        f"learning rate {number(optim.learning_rate)}"
    )


def _deepspeed(config: RunConfig) -> Line:
    name = config.optim.deepspeed
    if wrong := ds_files.problems(name):
        return Line("DeepSpeed file", ERROR, "; ".join(wrong), f"mend it, or take one of {', '.join(ds_files.names())}")
    if unused := ds_files.unused(name):
        return Line(
            "DeepSpeed file", WARNING, f"{name}: {', '.join(unused)} is not used: every run sets it", "remove it"
        )
    return Line("DeepSpeed file", OK, str(name))


def _model(role: str, config: RunConfig) -> str:
    source = build.source_of(role, config)
    own = role == config.algorithm.traits.main and source.adapter is None
    for folder in (*([source.adapter] if source.adapter else []), Path(source.weights)):
        if wrong := list(model_folders.problems(folder, tokenizer=own)):
            raise ValueError("; ".join(wrong))
    judges = role == "reward" and config.algorithm.traits.roles[role] == "frozen"
    where = Path(source.weights)
    if judges and where.is_dir() and not head_file(where) and not opened.is_reward(source):
        load.refuse_headless(role, source)
    shape = plan.shape_of(source.weights)
    adapter = f", with the adapter {source.adapter}" if source.adapter else ""
    return f"{source.weights}{adapter}: {shape.depth} layers, {shape.width} wide, {shape.vocabulary:,} token ids"


def _template(config: RunConfig, held: dict[str, Any]) -> Line:
    template = template_of(config, resolve(config.models.model))
    held["template"] = template
    ends = [repr(template.tokenizer.convert_ids_to_tokens(i)) for i in sorted(template.end_ids)]
    more = ", ..." if len(ends) > SHOWN else ""
    found = f"{template.name}; a turn ends with {', '.join(ends[:SHOWN])}{more}"
    return Line("template", OK, found)


def _data(config: RunConfig, held: dict[str, Any]) -> list[Line]:
    reports = data_report.examine(config)
    held["groups"] = reports[0].tokenized.groups
    return [line for report in reports for line in _of_rows(report)]


def _of_rows(report: data_report.DataReport) -> list[Line]:
    groups, of = report.tokenized.groups, report.lengths["whole"]
    lost = [f"{n} dropped ({rule})" for rule, n in report.tokenized.dropped.items()]
    counts = ", ".join([f"{len(groups)} rows of {' '.join(report.sources)}", *lost])
    lines = [Line("data", OK, f"{counts}; tokens: p50 {of.p50}, p95 {of.p95}, largest {of.largest}")]
    for one in report.findings:
        where = f" ({', '.join(one.examples)})" if one.examples else ""
        lines.append(Line("data", STAGES.get(one.severity, OK), f"{one.count} {one.rule}{where}", one.advice))
    return [*lines, *(Line("data", OK, note) for note in report.notes)]


def _together(config: RunConfig, held: dict[str, Any]) -> str:
    sources = {role: build.source_of(role, config) for role in build.roles_with_model(config)}
    template: Template = held["template"]
    held["retemplate"] = retemplate = retemplate_of(config, sources, template)
    if retemplate is not None:
        sources = build.with_critic_of_ids(sources, template, retemplate.template)
    held["sources"] = sources
    own = ["reward"] if retemplate is not None else []
    compare_models(config, sources, template.tokenizer, held["groups"], own_ids=own)
    return "token ids and positions are enough for every row" + (
        "; the reward model reads rows in its own tokenizer" if own else ""
    )


def _rewards(config: RunConfig, held: dict[str, Any]) -> list[Line]:
    held["functions"] = found = functions_of(config, held["groups"])
    return [Line("rewards", OK, f"functions {', '.join(name for name, _ in found)}")] if found else []


def _memory(planned: plan.Request, held: dict[str, Any]) -> Line:
    answer = plan.answer(planned)
    held["estimate"] = answer.chosen
    state = OK if answer.fits else WARNING
    return Line("memory", state, answer.first_line(), "" if answer.fits else "dsalign plan says what else would fit")


def _sampler(config: RunConfig, planned: plan.Request, held: dict[str, Any]) -> list[Line]:
    policy = held["sources"][config.algorithm.traits.main]
    return beside.sampler(config, policy, held["estimate"], planned.machine)


def _output(config: RunConfig) -> Line:
    folder = Path(config.output.output_dir)
    there = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    name = "output folder"
    if owner := folder_lock.owner(folder):
        return Line(name, ERROR, f"{folder} is being written by {owner.text()}", "give another --output_dir, or wait")
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        what = "may not be written" if there.is_dir() else "is a file"
        return Line(name, ERROR, f"{there} {what}", "give another --output_dir")
    if (folder / "metrics.jsonl").exists() and config.output.resume is None:
        moved = f"{folder} holds an earlier run, which will be moved aside to {folder}.N"
        return Line(name, WARNING, moved, "give another --output_dir, or go on with it: dsalign resume")
    return Line(name, OK, str(folder))


def _disk(config: RunConfig, held: dict[str, Any]) -> str:
    estimate: Estimate = held["estimate"]
    needs, steps = needs_of(estimate, config), -(-len(held["groups"]) // config.global_batch(1))
    resources.refuse_full_disk(needs, config, config.optim.num_train_epochs * steps)
    have = disk.free(Path(config.output.output_dir))
    return f"a checkpoint takes about {disk.amount(needs.checkpoint)}; {disk.amount(have)} free"


def needs_of(estimate: Estimate, config: RunConfig) -> resources.Needs:
    """What a run needs on disk, by the estimate of its memory: weights of 2 bytes, or 4 with --dtype float32, and for
    each trained number float32 weights and moments."""
    width = 4 if config.models.dtype == "float32" else 2
    trained = [role for role in estimate.roles if role.trained]
    lora = config.models.tuner == "lora"
    weights = sum((role.trained if lora else role.parameters) * width for role in trained)
    moments = 12 if config.optim.optimizer == "adamw" else 4
    return resources.Needs(weights, weights + moments * sum(role.trained for role in trained))


def _step(config: RunConfig, held: dict[str, Any]) -> Line:
    longest = rehearsal.longest(config, held["groups"])
    start = time.monotonic()
    try:
        metrics = rehearsal.step(
            config, held["sources"], held["template"], longest, held["retemplate"], held["functions"]
        )
    except rehearsal.TooOddError as error:
        return Line("one step", SKIPPED, str(error), "the run itself checks its first step")
    tokens = max(len(group.prompt) + max(map(len, group.completions), default=0) for group in longest)
    shown = ", ".join(f"{name} {number(metrics[name])}" for name in ("loss", "grad_norm") if name in metrics)
    bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    found = (
        f"{len(longest)} rows of up to {tokens} tokens through a tiny model of the family in "
        f"{duration(time.monotonic() - start)}: {shown}"
    )
    if bad or "loss" not in metrics:
        what = f"{', '.join(bad)} is not finite" if bad else "the step was skipped, as its numbers were not finite"
        return Line("one step", ERROR, f"{found}; {what}", "look at these rows: dsalign data show, and at rewards")
    return Line("one step", OK, found)
