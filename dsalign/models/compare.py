"""What must hold between the models of a run, its tokenizer and its rows before the first step: vocabularies that mean
the same ids, and as many positions as the longest row needs."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from dsalign.config.schema import ModelOptions, RunConfig
from dsalign.contract.groups import Group
from dsalign.models.names import Source
from dsalign.models.tokenizer import config_of, load_tokenizer, vocab_size

logger = logging.getLogger(__name__)
BEYOND = 4  # rows by which a table of positions may be longer than the positions it is for: OPT's has two more


def compare_models(
    config: RunConfig,
    sources: Mapping[str, Source],
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[Group],
    *,
    own_ids: Sequence[str] = (),
) -> None:
    """Check the models of a run against each other and against its rows, before any weight is read.

    tokenizer: the policy's. rows: the groups of the run. own_ids: roles that read rows in ids of their own.
    A line says where rows are longer than what a model with computed positions was made for.
    Raises ValueError where the reference's token ids mean something else, a model has no embeddings for some of the
    policy's ids, or a row has more tokens than a model has learnt positions.
    """
    readers = {role: source for role, source in sources.items() if role not in own_ids}
    main = sources[config.algorithm.traits.main]
    for role, source in readers.items():
        if role == "reference" and source.weights != main.weights:
            _same_ids(role, source, config.models, tokenizer)
        elif source.weights != main.weights:
            _enough_embeddings(role, source, main, config.models, tokenizer)
    each_once = {source.weights: role for role, source in reversed(readers.items())}
    sampled = config.rollout.max_new_tokens if config.algorithm.traits.online else 0
    enough = config.data.max_length + sampled
    limits = {role: learnt_positions(readers[role], config.models, enough) for role in each_once.values()}
    known = {role: limit for role, limit in limits.items() if limit is not None}
    if known:
        role = min(known, key=lambda name: known[name])
        _fits(rows, sampled, known[role], f"{role} model {readers[role].weights}")
    else:
        _warn_beyond(
            rows, sampled, {role: stated_positions(readers[role], config.models, enough) for role in limits}, readers
        )


def _same_ids(role: str, source: Source, options: ModelOptions, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where the tokens of a model have other ids than the policy's, or it lacks their embeddings."""
    rows, need = vocab_size(source, options), len(tokenizer)
    advice = f"give a --{'ref_model' if role == 'reference' else role} of the same tokenizer"
    try:
        theirs = load_tokenizer(source, options).get_vocab()
    except ValueError:
        theirs = {}  # a folder without a tokenizer: its embeddings are all there is to compare
    ours = tokenizer.get_vocab()
    other = {token: (i, theirs[token]) for token, i in ours.items() if theirs.get(token, i) != i}
    if theirs and len(other) == 0 and len(ours.keys() & theirs.keys()) < len(ours) // 2:
        other = {token: (i, -1) for token, i in ours.items() if token not in theirs}
    if other:
        token, (mine, its) = min(other.items(), key=lambda item: item[1])
        found = "no id" if its < 0 else f"id {its}"
        raise ValueError(
            f"{role} model {source.weights}: it reads the policy's token ids, but its vocabulary is another: {token!r} "
            f"is id {mine} to the policy and {found} to it ({len(other)} tokens differ); {advice}"
        )
    if rows is not None and rows < need:
        raise ValueError(
            f"{role} model {source.weights}: it has embeddings for {rows} token ids, the policy's tokenizer has "
            f"{need}; {advice}, resized as the policy was"
        )
    added = sorted(ours.keys() - theirs.keys()) if theirs else []
    if added:
        logger.warning(
            "%s model %s: its tokenizer lacks %d tokens of the policy's (%s): what it says of them was never trained",
            role, source.weights, len(added), ", ".join(added[:4]),
        )  # fmt: skip


def _enough_embeddings(
    role: str, source: Source, main: Source, options: ModelOptions, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Raise ValueError where a reward model or a critic lacks embeddings for ids that the policy has."""
    rows, own = vocab_size(source, options), vocab_size(main, options)
    need = len(tokenizer) if own is None else min(own, len(tokenizer))
    if rows is not None and rows < need:
        raise ValueError(
            f"{role} model {source.weights}: it reads the policy's token ids, of which there are {need}, and has "
            f"embeddings for {rows}; give a --reward_model whose embedding was resized as the policy's was"
        )


def learnt_positions(source: Source, options: ModelOptions, enough: float = math.inf) -> int | None:
    """How many positions a model has in a table, None where it computes them for any length, or has `enough` of them.

    The model is built without memory for its weights, so that the answer is the architecture's own.
    Raises ValueError where its configuration cannot be opened.
    """
    config = config_of(source, options)
    limit: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit >= enough:
        return None
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=options.trust_remote_code)
    except ValueError:
        return None  # no causal language model: refused with its reason where weights are read
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    tables.remove(model.get_input_embeddings().num_embeddings)
    tables += [len(b) for name, b in model.named_buffers() if "embed_positions" in name and b.dim() == 2]
    return limit if any(limit <= size <= limit + BEYOND for size in tables) else None


def stated_positions(source: Source, options: ModelOptions, enough: float) -> int | None:
    """How many positions a model's configuration says it was made for, None where it says nothing or has `enough`.

    Raises ValueError where its configuration cannot be opened.
    """
    config = config_of(source, options)
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return None if found is None or found >= enough else found


def _warn_beyond(
    rows: Iterable[Group], sampled: int, stated: Mapping[str, int | None], sources: Mapping[str, Source]
) -> None:
    """Say in one line that rows are longer than the positions that a model was made for, where it computes them for
    any length. sampled: tokens after a prompt."""
    known = {role: limit for role, limit in stated.items() if limit is not None}
    if not known:
        return  # no model says for how many it was made
    role = min(known, key=lambda name: known[name])
    limit, beyond = known[role], dict[str, int]()
    for row in rows:
        if (tokens := _tokens(row, sampled)) > limit:
            beyond[row.where] = tokens
    if beyond:
        where, tokens = next(iter(beyond.items()))
        logger.warning(
            "%s model %s: it was made for %d positions (max_position_embeddings), %d row(s) may have more, the first "
            "%s with %d: expect poor answers there, or lower --max_length%s",
            role, sources[role].weights, limit, len(beyond), where, tokens,
            " or --max_new_tokens" if sampled else "",
        )  # fmt: skip


def _tokens(row: Group, sampled: int) -> int:
    """The tokens of a row, or of its prompt and `sampled` more."""
    return len(row.prompt) + (sampled or max(map(len, row.completions), default=0))


def _fits(rows: Iterable[Group], sampled: int, limit: int, where: str) -> None:
    """Raise ValueError for the first row that, with `sampled` tokens after its prompt, has more tokens than `limit`."""
    for row in rows:
        if (tokens := _tokens(row, sampled)) > limit:
            what = f"a prompt of {len(row.prompt)} and up to {sampled} new tokens" if sampled else f"{tokens} tokens"
            flags = f"--max_length or --max_new_tokens ({sampled})" if sampled else f"--max_length to {limit}"
            raise ValueError(
                f"{where} has {limit} positions, {row.where} has {what}; lower {flags}, or take a model with more"
            )
