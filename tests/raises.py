"""Every `raise` of an error that a user reads, with its text: `python tests/raises.py` prints the table, and which of
them no test's text names."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ERRORS = ("ValueError", "RowError", "ConfigError")
GAP = "{}"
ENOUGH = 12  # letters in a row that a test and a message share


@dataclass(frozen=True)
class Raise:
    """One raise. path: from dsalign/. text: its message, with GAP for what it inserts."""

    path: str
    line: int
    text: str

    @property
    def parts(self) -> list[str]:
        """The constant parts of its text."""
        return [part for part in self.text.split(GAP) if part.strip()]


@cache
def raises() -> tuple[Raise, ...]:
    """All of the package, in the order of its files."""
    return tuple(found for path in sorted((ROOT / "dsalign").rglob("*.py")) for found in _of_file(path))


def _of_file(path: Path) -> Iterator[Raise]:
    module = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id: node.value
        for node in module.body if isinstance(node, ast.Assign)
        for target in node.targets if isinstance(target, ast.Name)
    }  # fmt: skip
    for node in ast.walk(module):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func).rpartition(".")[2]
            if name in ERRORS:
                text = _text(node.exc.args[0], constants) if node.exc.args else ""
                yield Raise(str(path.relative_to(ROOT / "dsalign")), node.lineno, text)


def _text(node: ast.expr, constants: Mapping[str, ast.expr]) -> str:
    """The text that an expression makes, with the module's constants in their places, and GAP for what varies."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.FormattedValue):
        return _text(node.value, constants)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value, constants) for value in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left, constants) + _text(node.right, constants)
    if isinstance(node, ast.IfExp):
        return _text(node.body, constants) + _text(node.orelse, constants)
    if isinstance(node, ast.Name) and node.id in constants:
        return _text(constants[node.id], {})
    return GAP


@cache
def _tested() -> str:
    """All strings of the tests, as the texts that their patterns match."""
    found = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) < 2000:
                found.append(re.sub(r"\\(.)", r"\1", node.value))
    return "\n".join(found)


def is_tested(one: Raise) -> bool:
    """Whether a test's text shares ENOUGH letters in a row with a message, or a whole shorter part of it."""
    tested = _tested()
    for part in one.parts:
        text = part.strip()
        size = min(len(text), ENOUGH)
        if size >= 8 and any(text[i : i + size] in tested for i in range(len(text) - size + 1)):
            return True
    return not one.parts


if __name__ == "__main__":
    for one in raises():
        print(f"{'      ' if is_tested(one) else 'NO TEST'} {one.path}:{one.line}: {one.text}")
    untested = [one for one in raises() if not is_tested(one)]
    print(f"{len(raises())} raises, {len(untested)} of which no test names the text")
