"""How a reward model with a vocabulary or a template of its own reads what the policy wrote: as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dsalign.contract.groups import Group
from dsalign.data.tokens.templates import Template


@dataclass(frozen=True)
class Reading:
    """Groups of the policy's token ids as groups of the reward model's.

    template: the reward model's. decode: the policy's ids as text without special tokens. end_ids: the policy's.
    """

    template: Template
    decode: Callable[[Sequence[int]], str]
    end_ids: frozenset[int]

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        """Each conversation in the reward model's template and ids; a completion that was cut has no end token there
        either, unless it is empty as text. Raises ValueError where the template refuses a conversation."""
        items = [(group.turns, [self.decode(ids) for ids in group.completions]) for group in groups]
        encoded = self.template.encode_many(items, [group.tools for group in groups]) if items else []
        return [
            self._read(group, found.prompt, found.completions) for group, found in zip(groups, encoded, strict=True)
        ]

    def _read(self, group: Group, prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> Group:
        pairs = zip(group.completions, completions, strict=True)
        read = [ids if sampled[-1] in self.end_ids or len(ids) == 1 else ids[:-1] for sampled, ids in pairs]
        return replace(group, prompt=tuple(prompt), completions=tuple(map(tuple, read)))
