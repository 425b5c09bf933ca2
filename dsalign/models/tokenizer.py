"""The tokenizer, chat template and end tokens of a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dsalign.config.schema import ModelOptions, RunConfig
from dsalign.data.tokens.load_template import load_template
from dsalign.data.tokens.templates import ANSWER, Template
from dsalign.models.adapter_files import num_embeddings
from dsalign.models.heads import unwrap
from dsalign.models.names import Source
from dsalign.models.weights import refuse_other_kinds

logger = logging.getLogger(__name__)
GENERATION = "generation_config.json"
MOST = 8  # files of a folder that a message names


def template_of(config: RunConfig, source: Source) -> Template:
    """The template in which a run writes conversations, with its tokenizer. source: of the main role's model.

    Raises ValueError where tokenizer or chat template cannot be used.
    """
    described = config_of(source, config.models)
    refuse_other_kinds(source.weights, described, trusted=config.models.trust_remote_code)  # before what follows of it
    tokenizer = load_tokenizer(source, config.models)
    template, warning = ended_template(source, tokenizer, config.data.template)
    if config.data.special_tokens_in_text is not None:
        template = replace(template, special_in_text=config.data.special_tokens_in_text)
    if warning:
        logger.warning(warning)
    rows = vocab_size(source, config.models)
    if rows is not None and (beyond := [i for i in template.end_ids if i >= rows]):
        token = tokenizer.convert_ids_to_tokens(beyond[0])
        shown = "" if token is None else f" ({token!r})"
        raise ValueError(
            f"model: {source.weights} has embeddings for {rows} token ids, but {beyond[0]}{shown} is to end a turn; "
            "correct eos_token_id in generation_config.json, or eos_token in tokenizer_config.json, or give the "
            "tokenizer that belongs to the model"
        )
    template = replace(template, vocab_size=rows, day=datetime.now().isoformat(timespec="seconds"))
    if template.chat_template is not None:
        tokenizer.chat_template = template.chat_template  # final/ is to be prompted as it was trained
    return template


def ended_template(source: Source, tokenizer: PreTrainedTokenizerBase, name: str | None) -> tuple[Template, str | None]:
    """The template called `name` (None: the tokenizer's own) whose end tokens are those of tokenizer, generation config
    and the template itself, which may end a turn with a token that neither of them names. With a warning, or None.

    Raises ValueError as `load_template` does.
    """
    template, warning = load_template(tokenizer, name, end_token_ids(source, tokenizer))
    turn_end = _turn_end(template)
    if turn_end is None or turn_end in template.end_ids:
        return template, warning
    token = tokenizer.convert_ids_to_tokens(turn_end)
    said = f"the template ends turns with {token}, which generation_config.json does not name: it is an end token too"
    template = replace(template, end_ids=template.end_ids | {turn_end})
    return template, said if warning is None else f"{warning}; {said}"


def _turn_end(template: Template) -> int | None:
    """The added token that a template writes right behind an answer, None where it writes none there."""
    try:
        text = template.render([{"role": "user", "content": "."}, {"role": "assistant", "content": ANSWER}])
    except ValueError:
        return None
    behind = text[text.rfind(ANSWER) + len(ANSWER) :].strip() if ANSWER in text else ""
    ids = template.tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
    return ids[0] if ids and ids[0] in template.tokenizer.added_tokens_decoder else None


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
        try:
            return AutoTokenizer.from_pretrained(where, trust_remote_code=options.trust_remote_code)
        except (OSError, ImportError):
            raise
        except Exception as error:  # the library tokenizers raises Exception itself, for a file that it cannot read
            said = " ".join(str(error).split())
            raise ValueError(
                f"model: {where}: its tokenizer cannot be opened: {said}; copy tokenizer.json and "
                "tokenizer_config.json again"
            ) from error


@contextmanager
def named(source: Source) -> Iterator[None]:
    """A context in which an error of opening a model becomes a ValueError that names the source."""
    try:
        yield
    except (OSError, ImportError) as error:
        folder = Path(source.weights)
        has = sorted(file.name for file in folder.iterdir())[:MOST] if folder.is_dir() else []
        there = f" It has {', '.join(has)}: copy the whole folder again" if has else ""
        raise ValueError(f"model: {source.weights} could not be opened: {error}{there}") from error


def config_of(source: Source, options: ModelOptions) -> Any:
    """The configuration of a source's model, from its config.json. Raises ValueError where it cannot be used."""
    with named(source):
        try:
            return AutoConfig.from_pretrained(source.weights, trust_remote_code=options.trust_remote_code)
        except (OSError, ImportError):
            raise
        except Exception as error:  # each configuration checks its values in its own way
            said = " ".join(str(error).split())
            raise ValueError(
                f"model: {source.weights}: its config.json cannot be used: {said}; correct it, or copy the folder again"
            ) from error


def end_token_ids(source: Source, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """All token ids that end a turn: the tokenizer's EOS token, then those of generation_config.json, of an adapter and
    of its base, each once. Raises ValueError for such a file that cannot be read."""
    found = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for where in (*([str(source.adapter)] if source.adapter else []), source.weights):
        file = Path(where) / GENERATION
        try:
            extra = GenerationConfig.from_pretrained(where).eos_token_id
        except OSError as error:
            if file.is_file():
                raise ValueError(
                    f"{file}: expected JSON, got an error: {error}; correct it, or copy it again"
                ) from error
            continue  # many base models have none
        ids = extra if isinstance(extra, list) else [] if extra is None else [extra]
        if other := [one for one in ids if type(one) is not int]:
            raise ValueError(f"{file}: eos_token_id: expected ids of tokens, got {other[0]!r}; correct it")
        found += ids
    return tuple(dict.fromkeys(found))


def vocab_size(source: Source, options: ModelOptions) -> int | None:
    """The number of token ids for which a source's model has embeddings, its adapter's where that has resized them;
    None where its configuration has no number.

    Raises ValueError where the configuration cannot be opened.
    """
    if source.adapter is not None and (rows := num_embeddings(source.adapter)) is not None:
        return rows
    config = config_of(source, options)
    found: int | None = getattr(config.get_text_config(), "vocab_size", None)
    return found


def stop_at(model: PreTrainedModel | PeftModel, end_ids: Collection[int]) -> None:
    """Let generation with a model, and with what is exported of it, stop at every token that ends a turn in training:
    they become eos_token_id of its generation_config. A model that cannot generate has none, and stays as it is."""
    config = unwrap(model).generation_config
    if config is not None:
        config.eos_token_id = sorted(end_ids)
