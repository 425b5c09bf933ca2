"""A model opened to compute with and not to train, as the verbs on models need it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dsalign.config.schema import ModelOptions
from dsalign.contract.groups import Group
from dsalign.data.tokens.templates import Template
from dsalign.engines.alone import Alone
from dsalign.engines.roles import Roles
from dsalign.models import load
from dsalign.models.adapter_files import head_of
from dsalign.models.heads import head_file
from dsalign.models.names import Source, resolve
from dsalign.models.tokenizer import decoder, ended_template, load_tokenizer
from dsalign.models.weights import stored_head
from dsalign.rewards.retemplate import Retemplate, reads_ids
from dsalign.verbs import places

logger = logging.getLogger(__name__)


def options(dtype: str = "auto", *, trust: bool = False) -> ModelOptions:
    """The options by which a model is opened to compute with. trust: whether code that comes with it may run."""
    return ModelOptions(dtype=dtype, tuner="full", lora_dropout=0.0, trust_remote_code=trust)


def is_reward(source: Source) -> bool:
    """Whether a source is a reward model: it has a value head, or a layer called score."""
    if head_file(source.value_head) or head_of(source.adapter):
        return True
    return any(key.startswith("score.") for key in stored_head(source.weights))


def device() -> torch.device:
    """The device to compute on: the first GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Model:
    """A model in evaluation mode. name: as the user gave it. role: policy or reward. template: its own."""

    name: str
    source: Source
    role: str
    engine: Alone
    template: Template

    @property
    def vocabulary(self) -> dict[str, int]:
        """Token -> id of its tokenizer."""
        found: dict[str, int] = self.template.tokenizer.get_vocab()
        return found


def open_model(name: str, how: ModelOptions, *, role: str | None = None, template: str | None = None) -> Model:
    """The model that `name` means. role: what it must be, None = what it is. template: a chat template by name, None =
    the tokenizer's own.

    Raises ValueError where it cannot be opened, or a reward model is wanted and it has no value head.
    """
    source = resolve(places.model_of(name))
    role = role or ("reward" if is_reward(source) else "policy")
    module = load.load_frozen(role, source, how, device=device()).to(device()).eval()
    found, warning = ended_template(source, load_tokenizer(source, how), template)
    if found.chat_template is not None:
        found.tokenizer.chat_template = found.chat_template  # by which a judge's is compared
    if warning:
        logger.warning("%s: %s", name, warning)
    return Model(name, source, role, Alone(module), found)


def base_of(model: Model) -> str | None:
    """What a model was trained from: the base of an adapter, or the model in the configuration of its run; None where
    it cannot be told."""
    return model.source.weights if model.source.adapter else places.of_run(model.source.weights, "model")


def second_of(model: Model, named: str) -> str:
    """The model that --vs names beside another one: "base" is what that was trained from.

    Raises ValueError where it cannot be told.
    """
    found = base_of(model) if named == places.BASE else named
    if found is None:
        raise ValueError(f"vs: expected a model, as {model.name} does not say what it was trained from; name it")
    return found


def roles_of(models: Mapping[str, Model], *, batch_size: int = 8, temperature: float = 1.0) -> Roles:
    """The models by role, to compute with. batch_size, temperature: as in `Roles`."""
    engines: dict[str, Any] = {role: model.engine for role, model in models.items()}
    return Roles(engines, device(), batch_size, temperature)


def as_read(judge: Model, model: Model, groups: Sequence[Group]) -> Sequence[Group]:
    """Groups with a model's completions as a reward model reads them: the same ids, or where its vocabulary or template
    is another one, the same text in its own template.

    Raises ValueError where that template refuses a conversation.
    """
    if reads_ids(judge.template.tokenizer, model.template):
        return groups
    template = replace(judge.template, whole=False)  # it judges what its template shows it
    policy = model.template
    return Retemplate(template, decoder(policy.tokenizer), policy.end_ids, policy.opened)(groups)
