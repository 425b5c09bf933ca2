"""Tokenizers and chat templates of a model."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from dsalign.config.schema import RunConfig
from dsalign.data.tokens.templates import Template, load_template
from dsalign.models.names import Source

logger = logging.getLogger(__name__)


def text(config: RunConfig, source: Source, options: LoadOptions) -> tuple[PreTrainedTokenizerBase, Template]:
    """The tokenizer of a source, and the template that a run writes conversations in.

    Raises ValueError where one of them cannot be used.
    """
    tokenizer = load_tokenizer(source, options)
    template, warning = load_template(tokenizer, config.template, end_token_ids(source, tokenizer))
    if warning:
        logger.warning(warning)
    template = replace(template, vocab_size=vocab_size(source, options))
    if template.chat_template is not None:
        tokenizer.chat_template = template.chat_template  # final/ is to be prompted as it was trained
    return tokenizer, template


@dataclass(frozen=True)
class LoadOptions:
    """How weights are read. dtype and attn_impl: "auto" or a name; dropout off sets every dropout of the model to 0.
    head_bytes: memory for logits, None = the device's default."""

    device: torch.device
    dtype: str = "auto"
    attn_impl: str = "auto"
    trust_remote_code: bool = False
    gradient_checkpointing: bool = False
    dropout: bool = False
    head_bytes: int | None = None
    seed: int = 42


def load_tokenizer(source: Source, options: LoadOptions) -> PreTrainedTokenizerBase:
    """The tokenizer beside the weights, or of the adapter's folder where that has one."""
    where = source.weights
    if source.adapter is not None and (source.adapter / "tokenizer_config.json").exists():
        where = str(source.adapter)
    with named(source):
        return AutoTokenizer.from_pretrained(where, trust_remote_code=options.trust_remote_code)


@contextmanager
def named(source: Source) -> Iterator[None]:
    """What cannot be opened is the user's to mend: say which model it was."""
    try:
        yield
    except (OSError, ImportError) as error:
        raise ValueError(f"model: {source.weights} could not be opened: {error}") from error


def end_token_ids(source: Source, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Every id that ends a turn: the tokenizer's EOS and generation_config.eos_token_id."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    try:
        extra = GenerationConfig.from_pretrained(source.weights).eos_token_id
    except OSError:  # many base models have no generation_config.json
        extra = None
    found += extra if isinstance(extra, list) else [] if extra is None else [extra]
    return tuple(dict.fromkeys(found))


def vocab_size(source: Source, options: LoadOptions) -> int | None:
    """How many token ids the model of a source has embeddings for, None where its configuration does not say."""
    with named(source):
        config = AutoConfig.from_pretrained(source.weights, trust_remote_code=options.trust_remote_code)
    found: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return found
