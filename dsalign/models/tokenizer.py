"""The tokenizer, chat template and end tokens of a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from dsalign.config.schema import ModelOptions, RunConfig
from dsalign.data.tokens.templates import Template, load_template
from dsalign.models.names import Source

logger = logging.getLogger(__name__)


def template_of(config: RunConfig, source: Source) -> Template:
    """The template in which a run writes conversations, with its tokenizer. source: of the main role's model.

    Raises ValueError where tokenizer or chat template cannot be used.
    """
    tokenizer = load_tokenizer(source, config.models)
    template, warning = load_template(tokenizer, config.data.template, end_token_ids(source, tokenizer))
    if warning:
        logger.warning(warning)
    template = replace(template, vocab_size=vocab_size(source, config.models))
    if template.chat_template is not None:
        tokenizer.chat_template = template.chat_template  # final/ is to be prompted as it was trained
    return template


def decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[int]], str]:
    """A function that turns token ids into text, without special tokens."""
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True))


def load_tokenizer(source: Source, options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer of a source: its adapter's where the adapter's folder has one, else that beside the weights.

    Raises ValueError where it cannot be opened.
    """
    where = source.weights
    if source.adapter is not None and (source.adapter / "tokenizer_config.json").exists():
        where = str(source.adapter)
    with named(source):
        return AutoTokenizer.from_pretrained(where, trust_remote_code=options.trust_remote_code)


@contextmanager
def named(source: Source) -> Iterator[None]:
    """A context in which an error of opening a model becomes a ValueError that names the source."""
    try:
        yield
    except (OSError, ImportError) as error:
        raise ValueError(f"model: {source.weights} could not be opened: {error}") from error


def end_token_ids(source: Source, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All token ids that end a turn: the tokenizer's EOS token, then those of generation_config.json, each once."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        extra = GenerationConfig.from_pretrained(source.weights).eos_token_id
    except OSError:  # many base models have no generation_config.json
        extra = None
    found += extra if isinstance(extra, list) else [] if extra is None else [extra]
    return tuple(dict.fromkeys(found))


def vocab_size(source: Source, options: ModelOptions) -> int | None:
    """The number of token ids for which a source's model has embeddings; None where its configuration has no number.

    Raises ValueError where the configuration cannot be opened.
    """
    with named(source):
        config = AutoConfig.from_pretrained(source.weights, trust_remote_code=options.trust_remote_code)
    found: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return found
