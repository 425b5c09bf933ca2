"""How a frozen reward model with a vocabulary or template of its own reads completions: as text, in that template."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from dsalign.config.schema import RunConfig
from dsalign.contract.groups import Group
from dsalign.data.tokens.templates import Template
from dsalign.models.names import Source
from dsalign.models.tokenizer import decoder, ended_template, load_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retemplate:
    """A function from groups in the policy's token ids to groups in the reward model's token ids, by way of text.

    template: of the reward model, with its tokenizer. decode: from token ids of the policy to text without special
    tokens. end_ids: the policy's end tokens. opened: what the policy's template opens every answer with, such as
    "<think>": it stands in front of a completion as the judge reads it, where the prompt ends with it.
    """

    template: Template
    decode: Callable[[Sequence[int]], str]
    end_ids: frozenset[int]
    opened: str = ""

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        """Each group's conversation, written by the reward model's template and tokenizer. A completion that was cut
        off gets no end token there either, unless it is empty as text. Raises ValueError where the template refuses a
        conversation."""
        items = [(group.turns, self._said(group)) for group in groups]
        encoded = self.template.encode_many(items, [group.tools for group in groups]) if items else []
        return [
            self._read(group, found.prompt, found.completions) for group, found in zip(groups, encoded, strict=True)
        ]

    def _said(self, group: Group) -> list[str]:
        front = self.opened if self.opened and self.decode(group.prompt).endswith(self.opened) else ""
        return [front + self.decode(ids) for ids in group.completions]

    def _read(self, group: Group, prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> Group:
        pairs = zip(group.completions, completions, strict=True)
        read = [ids if sampled[-1] in self.end_ids or len(ids) == 1 else ids[:-1] for sampled, ids in pairs]
        return replace(group, prompt=tuple(prompt), completions=tuple(map(tuple, read)))


def reads_ids(tokenizer: PreTrainedTokenizerBase, policy: Template) -> bool:
    """Whether a reward model with this tokenizer reads the policy's token ids as they are: it has the policy's
    vocabulary, and the policy's template or none."""
    same = tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    return same and tokenizer.chat_template in (None, policy.tokenizer.chat_template)


def retemplate_of(config: RunConfig, sources: Mapping[str, Source], policy: Template) -> Retemplate | None:
    """The `Retemplate` that rewrites groups for a run's frozen reward model, whose vocabulary or template is not the
    policy's. None where groups need no rewriting: the reward model has the policy's vocabulary, and the policy's
    template or none; or the run has no frozen reward model.

    policy: the policy's template. Raises ValueError where the reward model's tokenizer or template cannot be used.
    """
    if "reward" not in sources or "reward" in config.algorithm.traits.trained:
        return None
    source = sources["reward"]
    tokenizer = load_tokenizer(source, config.models)
    same = tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    if reads_ids(tokenizer, policy):
        return None
    template, warning = ended_template(source, tokenizer, None)
    logger.warning(
        "reward model %s: its %s is not the policy's, so it reads completions as text, in its own template",
        config.models.reward_model,
        "template" if same else "vocabulary",
    )
    if warning:
        logger.warning("reward model: %s", warning)
    template = replace(
        template, whole=False, day=policy.day
    )  # it judges what its template shows it: no reason to end a run
    return Retemplate(template, decoder(policy.tokenizer), policy.end_ids, policy.opened)
