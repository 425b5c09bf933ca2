"""The options of a run while they are checked, and what a rule between them is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


class Unread(Exception):
    """The signal that a rule reads an unreadable option: that is reported already, so the rule is skipped."""


@dataclass(frozen=True)
class Draft:
    """The options of a run before the rules are checked and a RunConfig is made of them."""

    values: Mapping[str, Any]  # option -> typed value, given or default; an unreadable option is not there
    where: Mapping[str, str]  # option that was given -> its place, as messages name it
    algorithm: Any  # an Algorithm, None where it could not be built
    frozen: Mapping[str, frozenset[str]]  # name of an algorithm -> its frozen roles
    world_size: int

    def __getitem__(self, name: str) -> Any:
        """The value of an option. Raises Unread where it could not be read."""
        if name not in self.values:
            raise Unread(name)
        return self.values[name]

    def at(self, name: str) -> str:
        """The place where an option was given, else its name: the beginning of a message."""
        return self.where.get(name, name)

    def built(self) -> Any:
        """The algorithm of the run. Raises Unread where it could not be built."""
        if self.algorithm is None:
            raise Unread("algorithm")
        return self.algorithm


Rule = Callable[[Draft], Iterator[str]]
