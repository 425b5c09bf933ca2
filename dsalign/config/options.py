"""Options: fields of sections and algorithms that can be set from text, each with its type, default and help."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from dsalign.config.flags import Raw, nearest

EXPECTED = {
    "bool_parsing": "true or false",
    "dict_type": "pairs theirs=ours (in YAML `theirs: ours`)",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "string_too_short": "some text",
    "string_type": "one piece of text",
    "too_short": "at least one value",
    "tuple_type": "a list of values",
}
REQUIRED: Any = dataclasses.MISSING


@dataclass(frozen=True)
class Option:
    """A field that can be set from text."""

    name: str
    type: Any  # with its bounds
    default: Any  # REQUIRED where there is none
    help: str  # one line with unit and range
    bare: bool = False  # whether the flag may stand without a value

    def read(self, raw: Raw) -> Any:
        """The typed value of what was written.

        Raises ValueError, whose text begins with "expected", where it is none of the option's type or out of its
        bounds.
        """
        text = self._shape(raw)
        _check_characters(text)
        try:
            return TypeAdapter(self.type, config=ConfigDict(allow_inf_nan=False)).validate_python(text)
        except ValidationError as error:
            first = error.errors()[0]
            expected = EXPECTED.get(first["type"]) or re.sub("^Input should be ", "", first["msg"])
            shown = "null" if first["input"] is None else repr(first["input"])
            guess = nearest(str(first["input"]), self.choices())
            advice = guess or f"; {self.name} is: {self.help}"
            raise ValueError(f"expected {expected}, got {shown}{advice}") from None

    def _shape(self, raw: Raw) -> Any:
        """What was written as text, a list of text or a mapping, whichever the type takes."""
        kinds = {get_origin(part) or part for part in _parts(self.type)}
        if raw == ():
            if bool in kinds or self.bare:
                return "true"
            raise ValueError(f"expected a value, got none; {self.name} is: {self.help}")
        if dict in kinds and isinstance(raw, tuple):
            written = [word for part in raw for word in part.split(",")]
            pairs = [word.partition("=") for word in written]
            if wrong := [w for w, (a, _, b) in zip(written, pairs, strict=True) if not (a and b) or "=" in b]:
                raise ValueError(f"expected theirs=ours, got {wrong[0]!r}; {self.name} is: {self.help}")
            names = [name for name, _, _ in pairs]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"expected each column once, got {twice[0]!r} again; keep one of them")
            return {name: value for name, _, value in pairs}
        if tuple in kinds and isinstance(raw, (tuple, str)):
            words = (raw,) if isinstance(raw, str) else raw
            return [part.strip() for word in words for part in word.split(",") if part.strip()]
        if isinstance(raw, tuple):
            if len(raw) > 1:
                raise ValueError(f"expected one value, got {' '.join(raw)!r}; put quotes around a value with blanks")
            return None if type(None) in kinds and raw[0].lower() in ("none", "null") else raw[0]
        return raw

    def choices(self) -> tuple[str, ...]:
        """The words that the type allows; empty where it allows more than some words."""
        parts = [inner for part in _parts(self.type) for inner in (part, *get_args(part))]
        return tuple(word for part in parts if get_origin(part) is Literal for word in get_args(part))


def _check_characters(value: Any) -> None:
    """Raises ValueError for text with a NUL or half of a surrogate pair, which no file and no tokenizer takes."""
    texts = [value] if isinstance(value, str) else [*value, *value.values()] if isinstance(value, dict) else value or ()
    for text in (one for one in texts if isinstance(one, str)):
        if "\0" in text or any("\ud800" <= one <= "\udfff" for one in text):
            raise ValueError(f"expected text in UTF-8 without NUL, got {text!r}; write it again")


def _parts(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, also under Annotated; a type that is no union by itself."""
    if hasattr(annotation, "__metadata__"):
        return _parts(annotation.__origin__)
    if get_origin(annotation) in (None, tuple, dict, Literal):
        return (annotation,)
    return tuple(inner for part in get_args(annotation) for inner in _parts(part))


def of_model(model: type[BaseModel], bare: frozenset[str] = frozenset()) -> dict[str, Option]:
    """The options of a section: the fields of a pydantic model that have a description, which is their help. bare:
    fields whose flag may stand without a value."""
    fields = ((name, field) for name, field in model.model_fields.items() if field.description)
    return {
        name: Option(
            name,
            field.rebuild_annotation(),
            REQUIRED if field.is_required() else field.get_default(),
            field.description or "",
            name in bare,
        )
        for name, field in fields
    }


def of_dataclass(owner: type[Any]) -> dict[str, Option]:
    """The options of a dataclass, such as an algorithm: its fields; their help is the comment on their line."""
    hints = get_type_hints(owner, include_extras=True)
    comments = _comments(owner)
    return {
        field.name: Option(
            field.name,
            hints[field.name],
            field.default if field.default_factory is dataclasses.MISSING else field.default_factory(),
            comments.get(field.name, f"see {owner.__module__}"),
        )
        for field in dataclasses.fields(owner)
        if field.init
    }


def _comments(cls: type[Any]) -> Mapping[str, str]:
    """Field -> the comment on its line; empty where the source text is not there."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return {}
    return dict(re.findall(r"^    (\w+): [^#\n]*# (.+)$", source, re.MULTILINE))
