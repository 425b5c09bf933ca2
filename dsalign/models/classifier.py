"""The classifier that a reward model is to other libraries: one label, whose logit is the score."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

logger = logging.getLogger(__name__)
SCORE = "score.weight"  # how transformers' classifiers of decoders call their last layer, which has no bias


@dataclass(frozen=True)
class Classifier:
    """How transformers opens a reward model: the name of the class, and the weights of the language model that this
    class does not have, those of its head."""

    name: str
    left_out: frozenset[str]


def classifier_of(model: PreTrainedModel, width: int) -> Classifier | None:
    """The class of transformers for sequence classification that takes a language model's weights under the same
    names, and one more: SCORE. None, and a line says so, where there is none. width: inputs of the score's layer."""
    config = copy.deepcopy(model.config)
    config.num_labels = 1
    cls = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if cls is not None:
        with torch.device("meta"):
            ours, theirs = _shapes(type(model)(config)), _shapes(cls(config))
        head = model.get_output_embeddings()
        names = {name for name, part in model.named_modules() if part is head}
        left_out = frozenset(key for key in ours if key.rpartition(".")[0] in names)
        if theirs == {key: shape for key, shape in ours.items() if key not in left_out} | {SCORE: (1, width)}:
            return Classifier(cls.__name__, left_out)
    logger.warning(
        "transformers has no class for sequence classification that takes the weights of %s and a score: the score is "
        "in value_head.safetensors alone, which dsalign reads",
        type(model).__name__,
    )
    return None


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def describe(config: Any, classifier: Classifier, pad: int | None) -> Any:
    """A copy of a model's configuration as the classifier's: its class, one label, and the id of its pad token."""
    described = copy.deepcopy(config)
    described.architectures, described.num_labels = [classifier.name], 1
    for part in (described, described.get_text_config()):
        part.pad_token_id = pad
    return described


def padded_apart(
    tokenizer: PreTrainedTokenizerBase, end_ids: Collection[int], vocab_size: int
) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy whose pad token ends no turn: a classifier scores the last token that is no pad token.

    A row never ends in a special token that is no end of a turn, so any such will do. Where there is none, a line says
    so, and the copy has no pad token. vocab_size: ids below it have an embedding.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in end_ids:
        return tokenizer
    special = [i for i in tokenizer.all_special_ids if i not in end_ids and i < vocab_size]
    added = [
        i for i, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and i not in end_ids and i < vocab_size
    ]  # fmt: skip
    named = [i for i in added if "pad" in str(tokenizer.convert_ids_to_tokens(i)).lower()]
    free = next(iter([*named, *special, *added]), None)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = None if free is None else tokenizer.convert_ids_to_tokens(free)
    if free is None:
        logger.warning("the tokenizer has no pad token that ends no turn: transformers scores one row at a time")
    return tokenizer
