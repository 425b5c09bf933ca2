"""From a configuration to tokens: the tokenizer, its chat template, and the rows of some data sets as groups."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dsalign.config import RunConfig
from dsalign.data.rows import Skipped, iter_rows
from dsalign.data.templates import Template, load_template
from dsalign.data.tokenize import Tokenized, tokenize_rows
from dsalign.models import load
from dsalign.models.names import Source

logger = logging.getLogger(__name__)


def text(config: RunConfig, source: Source, options: load.LoadOptions) -> tuple[PreTrainedTokenizerBase, Template]:
    """The tokenizer of a source, and the template that a run writes conversations in.

    Raises ValueError where one of them cannot be used.
    """
    tokenizer = load.load_tokenizer(source, options)
    template, warning = load_template(tokenizer, config.template, load.end_token_ids(source, tokenizer))
    if warning:
        logger.warning(warning)
    if template.chat_template is not None:
        tokenizer.chat_template = template.chat_template  # final/ is to be prompted as it was trained
    return tokenizer, template


def tokenized(
    config: RunConfig, template: Template, sources: Sequence[str], weights: Sequence[float] = ()
) -> tuple[Tokenized, Skipped]:
    """The groups of some data sets, and the bad rows that were left out, where the run leaves them out.

    Raises ValueError for the first row that cannot be used, where it does not; and where no row is left.
    """
    skipped = Skipped()
    rows = iter_rows(
        sources,
        config.algorithm.data,
        columns=config.columns,
        system=config.system,
        seed=config.seed,
        weights=weights,
        skipped=skipped if config.on_bad_row == "skip" else None,
    )
    found = tokenize_rows(
        rows,
        template,
        max_length=config.max_length,
        truncation=config.truncation_strategy,
        assistant_turns=config.assistant_turns,
    )
    return found, skipped


def losses(found: Tokenized, skipped: Skipped) -> list[str]:
    """A line for what was dropped or cut, and one for bad rows; none where all is as it was stored."""
    lines = []
    parts = [f"{count} dropped ({rule})" for rule, count in found.dropped.items()]
    if found.truncated:
        parts.append(f"{found.truncated} truncated")
    if parts:
        lines.append(f"of {found.num_rows} rows {', '.join(parts)}")
    if skipped:
        lines.append(f"{skipped.count} bad rows left out, the first: {skipped.first}")
    return lines
