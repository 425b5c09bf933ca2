"""The words behind a verb that has options of its own and not those of a run."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import NoReturn

from dsalign.config.flags import nearest


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog}: expected options as dsalign {self.prog} --help lists them, but {message}")


def parser(verb: str) -> argparse.ArgumentParser:
    """A parser of a verb's own options, none yet. What it cannot read is a ValueError that names the verb."""
    return _Parser(prog=verb, add_help=False, allow_abbrev=False)


def of(
    verb: str, argv: Sequence[str], *, places: Sequence[str], values: Mapping[str, str | None], switches: Sequence[str]
) -> tuple[argparse.Namespace, list[str]] | None:
    """(the values by name, the words that are none of these options) of a command; None where it asks for help.

    places: what the words without a flag are, in order. values: option -> its default. switches: options without a
    value. A name may be written with - for _. Raises ValueError where a value is missing.
    """
    if "--help" in argv or "-h" in argv:
        return None
    own = parser(verb)
    for name in places:
        own.add_argument(name, nargs="?")
    for name, default in values.items():
        own.add_argument(*_spellings(name), dest=name, default=default)
    for name in switches:
        own.add_argument(*_spellings(name), dest=name, action="store_true")
    return own.parse_known_args(list(argv))


def alone(
    verb: str, argv: Sequence[str], *, places: Sequence[str], values: Mapping[str, str | None], switches: Sequence[str]
) -> argparse.Namespace | None:
    """The values of a command that takes nothing but these, as `of` gives them.

    Raises ValueError for any other word, and where the first place is empty.
    """
    found = of(verb, argv, places=places, values=values, switches=switches)
    if found is None:
        return None
    given, rest = found
    if rest:
        known = [f"--{name}" for name in (*values, *switches)]
        advice = nearest(rest[0], known) or f"; it takes {' '.join(places).upper()} {' '.join(known)}"
        raise ValueError(f"{verb}: expected an option of this command, got {rest[0]!r}{advice}")
    required(verb, given, places[0])
    return given


def required(verb: str, given: argparse.Namespace, place: str) -> None:
    """Raise ValueError where a place among the words is empty."""
    if getattr(given, place) is None:
        raise ValueError(f"{verb}: expected {place.upper()}, got none; see dsalign {verb} --help")


def whole(name: str, text: str, *, least: int = 1) -> int:
    """The whole number that an option has. Raises ValueError for another text, or a number below `least`."""
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"--{name}: expected a whole number >= {least}, got {text!r}")
    return int(text)


def number(name: str, text: str, *, above: float = 0.0) -> float:
    """The finite number > `above` that an option has. Raises ValueError for another text."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not above < value < float("inf"):
        raise ValueError(f"--{name}: expected a number > {above:g}, got {text!r}")
    return value


def choice(name: str, text: str, known: Sequence[str]) -> str:
    """The value of an option that is one of a few words. Raises ValueError for another."""
    if text not in known:
        raise ValueError(f"--{name}: expected one of {', '.join(known)}, got {text!r}{nearest(text, known)}")
    return text


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))
