"""What was written on the command line and in YAML files, as text with its place. What it means is decided in
parse.py."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

TRAIN_VERBS = ("train", "rlhf", "sft")
MAX_DEPTH = 20  # of mappings and lists within each other in YAML: two are used
SWITCHES = ("print_config", "help", "version")
REQUESTS = ("config", "local_rank", *SWITCHES)  # flags that are no option of a run
Raw = tuple[str, ...] | list[str | None] | dict[str, str | None] | str | None


@dataclass(frozen=True)
class Given:
    """One option as somebody wrote it, and where."""

    name: str  # canonical, with underscores
    spelled: str  # "--batch-size" or "batch_size"
    raw: Raw  # a tuple of words after a flag; what YAML holds otherwise, with every scalar as its text
    file: str = ""  # "run.yaml:3", empty for a flag
    tokens: tuple[str, ...] = ()  # of a flag, as they stood in argv

    @property
    def where(self) -> str:
        """How an error names it: "run.yaml:3: batch_size" or "--batch-size"."""
        return f"{self.file}: {self.spelled}" if self.file else self.spelled

    @property
    def origin(self) -> str:
        """How --print_config names it: "run.yaml:3" or "flag --batch-size"."""
        return self.file or f"flag {self.spelled}"


@dataclass(frozen=True)
class Command:
    """argv, cut at its flags."""

    words: tuple[str, ...]  # before the first flag
    flags: tuple[Given, ...]

    def asks(self, name: str) -> bool:
        """Whether a switch such as print_config is there and not set to false."""
        return any(flag.name == name and flag.raw != ("false",) for flag in self.flags)

    def values(self, name: str) -> tuple[str, ...]:
        """The words behind every flag of this name, in order: --config may come several times."""
        return tuple(word for flag in self.flags if flag.name == name for word in _words(flag))

    def mistakes(self) -> list[str]:
        """A line for each switch that has a value which is neither true nor false."""
        wrong = (
            flag for flag in self.flags if flag.name in SWITCHES and _words(flag) not in ((), ("true",), ("false",))
        )
        return [
            f"{flag.spelled}: expected true, false or no value, got {' '.join(_words(flag))!r}; "
            "write a file as --config FILE"
            for flag in wrong
        ]

    def without(self, names: Collection[str]) -> list[str]:
        """argv without the flags of these names."""
        kept = (flag.tokens for flag in self.flags if flag.name not in names)
        return [*self.words, *(token for tokens in kept for token in tokens)]


def _words(flag: Given) -> tuple[str, ...]:
    return flag.raw if isinstance(flag.raw, tuple) else ()


def _name(spelled: str, aliases: Mapping[str, str]) -> str:
    name = spelled.lstrip("-").replace("-", "_")
    return aliases.get(name, name)


def split(argv: Sequence[str], aliases: Mapping[str, str]) -> Command:
    """argv as words and flags. A flag is `--name=value`, `--name value ...` or `--name`; dashes in a name are
    underscores. aliases: other trainers' names -> ours.

    argparse does not serve: it stops at the first mistake, and takes the value in `--gamma -1e-3` for a flag.
    """
    words: list[str] = []
    groups: list[list[str]] = []
    for token in argv:
        if token == "-h" or (token.startswith("--") and len(token) > 2):
            groups.append([token])
        else:
            (groups[-1] if groups else words).append(token)
    flags: list[Given] = []
    for first, *rest in groups:
        spelled, equals, value = first.partition("=")
        values = (value, *rest) if equals else tuple(rest)
        name = "help" if spelled == "-h" else _name(spelled, aliases)
        tokens = (first, *rest)
        if name == "local_rank":  # the deepspeed launcher puts it first, so the verb may come behind it
            words += values[1:]
            values, tokens = values[:1], tokens[: 1 if equals else 2]
        flags.append(Given(name, spelled, values, tokens=tokens))
    return Command(tuple(words), tuple(flags))


def read_yaml(file: str, aliases: Mapping[str, str], sections: Collection[str] = ()) -> tuple[list[Given], list[str]]:
    """(the options in a YAML file, the file's problems, a line each).

    Raises nothing: a file that cannot be read is one of the problems.
    """
    try:
        return parse_yaml(Path(file).expanduser().read_text(encoding="utf-8-sig"), file, aliases, sections)
    except OSError as error:
        return [], [f"--config: expected a YAML file that can be read, got {file!r} ({error.strerror}); check the path"]
    except UnicodeDecodeError as error:
        return [], [f"{file}: expected UTF-8 text, got a byte that is none at {error.start}; save it as UTF-8"]


def parse_yaml(
    text: str, file: str, aliases: Mapping[str, str], sections: Collection[str] = ()
) -> tuple[list[Given], list[str]]:
    """(the options in YAML text, its problems, a line each). file: how the problems name it. aliases: as for `split`.
    sections: keys whose mapping holds options, each of which is then called section.option.

    Scalars stay text, and null is None: so `1e-4`, which is a string in YAML 1.1, means what it means behind a flag.
    """
    try:
        if (deep := _too_deep(text)) is not None:
            return [], [
                f"{file}:{deep}: expected mappings and lists at most {MAX_DEPTH} deep, got deeper; flatten them"
            ]
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error)
        return [], [f"{file}{line}: expected YAML, got a syntax error ({reason}); correct this line or the one above"]
    if root is None:
        return [], []
    if not isinstance(root, yaml.MappingNode):
        return [], [f"{file}:1: expected lines of `name: value`, got something else; see --print_config for the form"]
    given, problems = [], []
    for key, value, prefix in _entries(root, sections):
        place = f"{file}:{key.start_mark.line + 1}"
        raw, problem = _raw(value)
        if not isinstance(key, yaml.ScalarNode):
            problems.append(
                f"{place}: expected the name of an option, got a {getattr(key, 'id', 'value')}; write `name: value`"
            )
        elif problem:
            problems.append(f"{place}: {prefix}{key.value}: {problem}")
        else:
            spelled = prefix + key.value
            given.append(Given(_name(spelled, aliases), spelled, raw, place))
    return given, problems


def _too_deep(text: str) -> int | None:
    """The line on which YAML text nests deeper than MAX_DEPTH, which would overflow the stack; None where it does not.

    Raises YAMLError for text that is none.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            return event.start_mark.line + 1 if event.start_mark else 1
    return None


def _entries(root: yaml.MappingNode, sections: Collection[str]) -> Iterator[tuple[yaml.Node, yaml.Node, str]]:
    """(key, value, the section's name and a dot or nothing) of each entry, those of a section one by one."""
    for key, value in root.value:
        if isinstance(value, yaml.MappingNode) and isinstance(key, yaml.ScalarNode) and key.value in sections:
            yield from ((inner, of, f"{key.value}.") for inner, of in value.value)
        else:
            yield key, value, ""


def _raw(node: yaml.Node) -> tuple[Raw, str | None]:
    """(the text in a YAML node, None), or (None, what is wrong with the node)."""
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node), None
    parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
    if not all(isinstance(part, yaml.ScalarNode) for part in parts):
        return None, "expected a value, a list of values or `theirs: ours`, got deeper nesting; flatten it"
    if isinstance(node, yaml.SequenceNode):
        return [_scalar(part) for part in parts], None
    keys = [key.value for key, _ in node.value]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        return None, f"expected each key once, got {', '.join(twice)} again; keep one of them"
    return {key.value: _scalar(value) for key, value in node.value}, None


def _scalar(node: yaml.ScalarNode) -> str | None:
    return None if node.tag == "tag:yaml.org,2002:null" else str(node.value)


def twice(layer: Sequence[Given]) -> list[str]:
    """A line for each option that one layer, a file or the command line, sets more than once."""
    problems = []
    seen: dict[str, Given] = {}
    for one in layer:
        if one.name in seen and one.name not in REQUESTS:
            other = seen[one.name]
            how = f"{other.spelled} and {one.spelled}" if other.spelled != one.spelled else f"{one.spelled} twice"
            at = f" (first at {other.file})" if other.file else ""
            problems.append(f"{one.where}: expected {one.name} once, got {how}{at}; keep one of them")
        seen[one.name] = one
    return problems


def nearest(name: str, names: Collection[str]) -> str:
    """The words '; did you mean X?' for the name of which `name` is a misspelling; empty where there is none.

    Word by word, as a name that shares one word of two means another thing: evaluation_strategy is no
    truncation_strategy.
    """
    close = difflib.get_close_matches(name.lower(), {one.lower(): one for one in names}, n=8, cutoff=0.6)
    found = next((one for near in close for one in names if one.lower() == near and _misspelt(name, one)), None)
    return f"; did you mean {found}?" if found else ""


def _misspelt(name: str, known: str) -> bool:
    """Whether `name` is `known` but for a letter or two in each word, or for how its words are joined."""
    mine, theirs = (re.findall(r"[a-z]+|[0-9]+", text.lower()) for text in (name, known))
    if "".join(mine) == "".join(theirs):
        return True
    return len(mine) == len(theirs) and all(_alike(a, b) for a, b in zip(mine, theirs, strict=True))


def _alike(word: str, known: str) -> bool:
    if word.isdigit() or known.isdigit() or min(len(word), len(known)) == 1:
        return word == known
    if sorted(word) == sorted(known):
        return True
    edits = difflib.SequenceMatcher(None, word, known, autojunk=False).get_opcodes()
    changed = sum(max(a1 - a0, b1 - b0) for how, a0, a1, b0, b1 in edits if how != "equal")
    return changed <= min(2, len(known) // 2)
