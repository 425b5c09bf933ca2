"""The report of `dsalign data check` and the table of `dsalign data show`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from dsalign.config.schema import RunConfig
from dsalign.contract.groups import Group
from dsalign.data import checks, dataset
from dsalign.data.checks import Finding, Lengths, Survey
from dsalign.data.rows.iterate import Skipped
from dsalign.data.rows.records import printable
from dsalign.data.tokens.encoder import Tokenized
from dsalign.data.tokens.templates import Template
from dsalign.models.compare import compare_models
from dsalign.models.names import resolve
from dsalign.models.tokenizer import template_of
from dsalign.report.run_log import quiet

LENGTHEN = "raise --max_length, or use --truncation_strategy left or right"
WIDTH = 40  # characters of the longest bar of a histogram


@dataclass(frozen=True)
class DataReport:
    """The findings of `dsalign data check` on the training data sets of a run."""

    sources: Sequence[str]
    tokenized: Tokenized
    skipped: Skipped
    findings: Sequence[Finding]
    lengths: dict[str, Lengths]
    notes: Sequence[str]  # of the algorithm
    max_length: int

    def has_errors(self) -> bool:
        """Whether something must be mended before training."""
        return any(f.severity == "error" for f in self.findings)

    def as_json(self) -> dict[str, Any]:
        """{"rows", "kept", "dropped": {rule: n}, "truncated", "findings", "lengths", "notes"}; see `checks` for the
        fields of a finding and of lengths."""
        return {
            "rows": self.tokenized.num_rows + self.skipped.count,
            "kept": len(self.tokenized.groups),
            "dropped": dict(self.tokenized.dropped),
            "truncated": self.tokenized.truncated,
            **checks.as_json(self.findings, self.lengths),
            "notes": list(self.notes),
        }

    def text(self) -> str:
        """The report as lines of text: counts, lengths with a histogram, notes and findings."""
        dropped = [f"{n} dropped ({rule})" for rule, n in self.tokenized.dropped.items()]
        counts = ", ".join([f"{len(self.tokenized.groups)} kept", *dropped, f"{self.tokenized.truncated} truncated"])
        lines = [f"{' '.join(self.sources)}: {self.tokenized.num_rows + self.skipped.count} rows, {counts}"]
        for name, of in self.lengths.items():
            limit = f", max_length {self.max_length}" if name == "whole" else ""
            lines.append(f"{name} tokens: p50 {of.p50}, p95 {of.p95}, largest {of.largest}{limit}")
        lines += _histogram(self.lengths["whole"])
        lines += self.notes
        found = [f.line() for f in self.findings] or ["nothing found"]
        return printable("\n".join([*lines, *found]))


def _histogram(of: Lengths) -> Iterator[str]:
    width, most = max(1, -(-(of.largest + 1) // len(of.counts))), max(of.counts)
    for i, count in enumerate(of.counts):
        if i * width <= of.largest:
            yield f"  {i * width:>6} {'#' * -(-count * WIDTH // most)} {count}"


def examine(config: RunConfig) -> list[DataReport]:
    """Read, tokenise and check the training data sets of a run, and those to evaluate on where it has some: a report
    for each of the two. Bad rows are counted and become an error of the report, or with on_bad_row skip a warning.

    Raises ValueError where no row is left, or where a bad row makes the rest of its file unreadable.
    """
    template, options = _template(config), config.data
    first, trained = _examined(config, template, options.dataset, options.dataset_weights, None)
    if not options.val_dataset:
        return [first]
    return [first, _examined(config, template, options.val_dataset, (), trained)[0]]


def _examined(
    config: RunConfig, template: Template, sources: Sequence[str], weights: Sequence[float], trained: Survey | None
) -> tuple[DataReport, Survey]:
    """The report of some data sets, and what was counted. trained: the survey of the groups that are trained on, where
    these are evaluated on."""
    lenient = config.model_copy(update={"data": config.data.model_copy(update={"on_bad_row": "skip"})})
    tokenized, skipped = dataset.tokenized(lenient, template, sources, weights)
    groups = tokenized.groups
    survey = Survey(groups, template.end_ids, template.tokenizer.bos_token_id, trained)
    findings = survey.findings()
    if skipped:
        severity = "warning" if config.data.on_bad_row == "skip" else "error"
        findings.insert(0, Finding(severity, "bad rows", skipped.count, (), f"the first: {skipped.first}"))
    total, lost = dataset.counted(tokenized, skipped)
    if lost * 2 > total:
        severity = "warning" if config.data.on_bad_row == "skip" else "error"
        cause = f"the first: {skipped.first}" if skipped.count * 2 > lost else LENGTHEN
        advice = f"more than half of {total}: {cause}"
        findings.insert(0, Finding(severity, "rows not used", lost, (), advice))
    try:
        main = config.algorithm.traits.main
        compare_models(config, {main: resolve(config.models.model)}, template.tokenizer, groups)
    except ValueError as error:
        findings.insert(0, Finding("error", "rows that the model cannot read", 1, (), str(error)))
    notes = [*config.algorithm.notes(groups), *dataset.what_was_noticed(template, tokenized)]
    return DataReport(sources, tokenized, skipped, findings, survey.lengths(), notes, config.data.max_length), survey


def _template(config: RunConfig) -> Template:
    quiet(0)
    return template_of(config, resolve(config.models.model))


class _Console(Console):
    """One that leaves it to the command what a reader that has seen enough means, such as head."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def show(config: RunConfig, *, count: int, as_json: bool, ids: bool, out: IO[str] = sys.stdout) -> None:
    """Print the first `count` groups of the first data set to `out`: the prompt dim, and completions in colour where
    their tokens are trained on, in brackets where the output has no colours. as_json: one JSON list instead. ids: with
    token ids."""
    template = _template(config)
    tokenizer = template.tokenizer
    tokenized, _ = dataset.tokenized(config, template, config.data.dataset[:1])
    chosen = tokenized.groups[:count]
    if as_json:
        print(json.dumps([_plain(g, tokenizer) for g in chosen], ensure_ascii=False), file=out)
        return
    console = _Console(file=out, highlight=False, markup=False)
    for group in chosen:
        sizes = " / ".join(map(str, group.lengths))
        console.print(
            Text(f"-- {printable(group.where)}: {len(group.prompt)} + {sizes} tokens", style="bold"), overflow="fold"
        )
        console.print(Text(printable(tokenizer.decode(group.prompt)), style="dim"))
        table = Table.grid(padding=(0, 3), expand=True)
        names = ("chosen", "rejected") if len(group.completions) == 2 else ("completion",)[: len(group.completions)]
        for _ in names:
            table.add_column(ratio=1, overflow="fold")
        table.add_row(*names)
        columns = zip(group.completions, group.counted, ("green", "red"), strict=False)
        seen = console.is_terminal and not console.no_color
        table.add_row(*(_coloured(*column, tokenizer, seen) for column in columns))
        if ids:
            table.add_row(*(" ".join(map(str, c)) for c in group.completions))
        console.print(table)


def _runs(completion: Sequence[int], mask: Sequence[bool]) -> Iterator[tuple[bool, list[int]]]:
    """The runs of neighbouring tokens with the same mask, in order: (mask, token ids)."""
    run: list[int] = []
    for i, (token, counts) in enumerate(zip(completion, mask, strict=True)):
        run.append(token)
        if i + 1 == len(mask) or mask[i + 1] != counts:
            yield counts, run
            run = []


def _coloured(
    completion: Sequence[int], mask: Sequence[bool], colour: str, tokenizer: PreTrainedTokenizerBase, seen: bool
) -> Text:
    text = Text()
    for counts, run in _runs(completion, mask):
        decoded = printable(tokenizer.decode(run))
        text.append(decoded if seen or not counts else f"[{decoded}]", style=colour if counts else "")
    return text


def _plain(group: Group, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """A group as a dictionary for JSON, with keys where, prompt, prompt_ids, completions (a list of {"text", "ids",
    "mask"}), label and margin."""
    completions = zip(group.completions, group.counted, strict=True)
    return {
        "where": group.where,
        "prompt": tokenizer.decode(group.prompt),
        "prompt_ids": list(group.prompt),
        "completions": [
            {"text": tokenizer.decode(ids), "ids": list(ids), "mask": [bool(x) for x in mask]}
            for ids, mask in completions
        ],
        "label": group.label,
        "margin": group.margin,
    }
