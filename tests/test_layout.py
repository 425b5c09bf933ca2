"""The rules of the repository that no tool knows: caps, who may import whom, what must be documented, README's tree."""

from __future__ import annotations

import ast
import fnmatch
import io
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from dsalign import algos

ROOT = Path(__file__).resolve().parent.parent
CODE = ("dsalign", "kernels", "launch")
MAX_FILE, MAX_FUNCTION, MAX_README = 400, 60, 250  # lines
GENERATED = ("__pycache__", "*.egg-info", "build", "dist", "output", ".*")
SOURCES = sorted(path.relative_to(ROOT) for folder in CODE for path in (ROOT / folder).rglob("*.py"))
PACKAGE = [path for path in SOURCES if path.parts[0] == "dsalign"]
# Read before torch is there.
OPTIONS = {"assets", "cli", "config", "ds_files", "flags", "launcher", "lazy", "options", "rules"}
# First part of a module's name under dsalign -> the parts it may import; itself is always one of them. What is not
# listed here fails, so a new module says where it stands.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "flags": set(),
    "lazy": set(),
    "assets": set(),
    "ds_files": set(),
    "options": {"flags"},
    "rules": {"assets", "ds_files", "flags"},
    "config": {"algos", "assets", "ds_files", "flags", "options", "rules"},
    "launcher": {"config"},
    "cli": {"__version__", *OPTIONS},
    "algos": set(),
    "data": {"algos", "assets"},
    "logps": set(),
    "fused": {"algos"},
    "models": {"data", "logps"},
    "dist": set(),
    "row_adam": set(),
    "engines": {"row_adam"},
    "schedule": set(),
    "curves": set(),
    "report": set(),
    "metrics": {"algos", "dist"},
    "rollout": {"algos"},
    "context": {"algos", "data", "dist", "engines", "fused", "logps", "models", "rollout"},
    "prepare": {"config", "data", "models"},
    "verbs": {"config", "data", "flags", "models", "prepare", "report"},
    "selfcheck": {"context", "data", "dist", "models"},
    "refcache": {"context", "data", "dist", "models"},
    "rewards": {"assets", "data"},
    "evaluate": {"context", "data", "dist", "metrics"},
    "trainer": {"algos", "context", "data", "dist", "engines", "fused", "metrics", "schedule"},
    "checkpoint": {"dist", "engines", "models", "trainer"},
    "session": {"algos", "checkpoint", "config", "curves", "data", "dist", "evaluate", "metrics", "report", "trainer"},
}
TOP = {"run"}  # builds everything, so it may import everything but cli
COLLECTIVE = {"dist", "engines", "checkpoint"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def part(path: Path) -> str:
    """dsalign/data/rows.py -> data, dsalign/cli.py -> cli."""
    return path.parts[1].removesuffix(".py")


def imports(path: Path, *, types_too: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, for `from a import b` a.b; of those under TYPE_CHECKING where asked."""
    hidden = {
        id(inner)
        for node in ast.walk(tree(path))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree(path)):
        if not types_too and id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import; write it from dsalign"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def documents() -> list[Path]:
    """Every text file of the repository."""
    suffixes = {".py", ".md", ".toml", ".json", ".txt", ".yaml", ".in"}
    return [path for path in files() if path.suffix in suffixes or path.name in ("Makefile", "run")]


def files(folder: Path = ROOT) -> Iterator[Path]:
    """Files under `folder`, less what is generated; .ci is ours."""
    for path in sorted(folder.iterdir()):
        if path.name != ".ci" and any(fnmatch.fnmatch(path.name, pattern) for pattern in GENERATED):
            continue
        if path.is_dir():
            yield from files(path)
        else:
            yield path


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_caps(path: Path) -> None:
    """A file is one idea and at most 400 lines, a function at most 60."""
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_FILE, f"{path}: {lines} lines, at most {MAX_FILE}"
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION, (
                f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION}"
            )


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_import_direction(path: Path) -> None:
    """Data flows one way: config -> data -> models -> engines -> trainer -> checkpoint; algorithms stand alone."""
    mine = part(path)
    assert mine in TOP or mine in MAY_IMPORT, f"{path}: say in MAY_IMPORT what {mine} may import"
    for line, name in imports(path, types_too=False):
        first, _, rest = name.partition(".")
        if first != "dsalign":
            continue
        other = rest.partition(".")[0]
        allowed = other != "cli" if mine in TOP else other == mine or other in MAY_IMPORT[mine]
        assert allowed, f"{path}:{line}: {mine} may not import dsalign.{other}"


@pytest.mark.parametrize("path", [p for p in PACKAGE if part(p) == "algos"], ids=str)
def test_algorithms_see_types_of_rows_only(path: Path) -> None:
    """Under TYPE_CHECKING an algorithm may name dsalign.data.tokenize, and nothing else of dsalign."""
    for line, name in imports(path, types_too=True):
        if name.startswith("dsalign.") and not name.startswith("dsalign.algos"):
            assert name.startswith("dsalign.data.tokenize."), f"{path}:{line}: an algorithm may not import {name}"


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_seams(path: Path) -> None:
    """Kernels come in through logps.py; collectives live in dist.py, engines.py and checkpoint/."""
    for line, name in imports(path, types_too=True):
        if name.split(".")[0] == "dsalign_kernels":
            assert part(path) in ("logps", "fused"), f"{path}:{line}: logps.py and fused.py import dsalign_kernels"
        if name.startswith("torch.distributed"):
            assert part(path) in COLLECTIVE, f"{path}:{line}: torch.distributed is for {', '.join(sorted(COLLECTIVE))}"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            assert part(path) in COLLECTIVE, f"{path}:{node.lineno}: torch.distributed; put it into dist.py"


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_only_the_command_reads_argv_and_ranks(path: Path) -> None:
    """sys.argv, RANK and LOCAL_RANK are for cli.py, and for launcher.py, which it hands them to."""
    if part(path) in ("cli", "launcher"):
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "sys.argv", f"{path}:{node.lineno}: sys.argv is for cli.py"
        if isinstance(node, ast.Constant):
            assert node.value not in ("RANK", "LOCAL_RANK"), f"{path}:{node.lineno}: {node.value} is for cli.py"


@pytest.mark.parametrize("path", [p for p in PACKAGE if part(p) != "algos"], ids=str)
def test_no_algorithm_is_named(path: Path) -> None:
    """No `if algo == ...`: what an algorithm needs is in its dataclass. In trainer.py not even a string names one."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Compare):
            text = ast.unparse(node.left)
            named = text.split(".")[-1] in ("algo", "algorithm") or text.endswith(("['algo']", '["algo"]'))
            words = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant)]
            assert not (named and set(words) & set(algos.names())), f"{path}:{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Constant) and part(path) in ("trainer", "evaluate"):
            assert node.value not in algos.names(), f"{path}:{node.lineno}: the loop names {node.value}"


def test_folders_of_scripts_are_no_packages() -> None:
    """An __init__.py in kernels/ would shadow the package of that name."""
    for folder in ("kernels", "launch", "ds_configs", "benchmarks"):
        assert not (ROOT / folder / "__init__.py").exists(), f"{folder}/__init__.py: remove it"


def test_every_module_imports() -> None:
    """In a process of their own, as DeepSpeed is not imported into the tests' process. What reads Parquet and hub data
    sets, 90 MiB, is not for every run."""
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in PACKAGE]
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint(*sys.modules)"
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    run = [sys.executable, "-c", code, *names, "dsalign_kernels", "dsalign_kernels.reference"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = set(done.stdout.split())
    assert "dsalign.run" in loaded and not loaded & {"datasets", "pyarrow"}


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_docstrings(path: Path) -> None:
    """Every module with something in it, public function and public class says what it is."""
    assert ast.get_docstring(tree(path)) or not tree(path).body, f"{path}: no docstring"
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"


@pytest.mark.parametrize("name", algos.names())
def test_algorithm_is_documented(name: str) -> None:
    """An arXiv id on the class; a comment on every hyper-parameter, with a unit or a range where it is a number."""
    path = Path("dsalign/algos") / f"{name}.py"
    cls = next(n for n in tree(path).body if isinstance(n, ast.ClassDef) and n.name == algos.load(name).__name__)
    assert re.search(r"arXiv:\d{4}\.\d{5}", ast.get_docstring(cls) or ""), f"{path}: {cls.name} names no arXiv id"
    lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
    for field in cls.body:
        if not isinstance(field, ast.AnnAssign) or "ClassVar" in ast.unparse(field.annotation):
            continue
        where = f"{path}:{field.lineno}: {ast.unparse(field.target)}"
        _, mark, comment = lines[(field.end_lineno or field.lineno) - 1].partition("#")
        assert mark, f"{where}: no comment"
        if re.search("float|int", ast.unparse(field.annotation)):
            assert re.search(r"[<>]|\bin [\[(]|\d|\bnats?\b|\btokens?\b", comment), f"{where}: neither unit nor range"


def test_comments_are_ascii() -> None:
    """In code; text that is data may be in any script."""
    for path in files():
        if path.suffix != ".py":
            continue
        for token in tokenize.generate_tokens(io.StringIO(path.read_text(encoding="utf-8")).readline):
            if token.type == tokenize.COMMENT:
                assert token.string.isascii(), f"{path.relative_to(ROOT)}:{token.start[0]}: {token.string}"


def test_no_path_of_one_machine() -> None:
    """Nothing outside tests/ names a folder that only one machine has."""
    pattern = re.compile(r"(?<![\w.~-])/(?:work|root|tmp|home|opt)/")
    for path in documents():
        if path.is_relative_to(ROOT / "tests"):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not pattern.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_readme_is_short() -> None:
    """Under 250 lines, or nobody reads it."""
    lines = len((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
    assert lines < MAX_README, f"README.md: {lines} lines, under {MAX_README}"


def test_readme_tree_is_the_folder() -> None:
    """A folder with entries under it lists all of them; one without is described as a whole."""
    listed = readme_tree()
    for path in listed:
        assert (ROOT / path).exists(), f"README.md: its tree has {path}, which is not there"
    opened = {Path("."), *(path.parent for path in listed)}
    present = {path.relative_to(ROOT) for path in files()}
    for folder in opened:
        here = {folder / path.relative_to(folder).parts[0] for path in present if path.is_relative_to(folder)}
        here -= {folder / "__init__.py", Path(".gitignore")}
        missing = sorted(str(path) for path in here - set(listed))
        assert not missing, f"README.md: its tree lacks {', '.join(missing)}"


def readme_tree() -> list[Path]:
    """The paths in the block under `## The tree`: two blanks a level, a name (a folder's ends in /), its purpose."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.partition("## The tree\n")[2].partition("```text\n")[2].partition("```")[0]
    assert block, "README.md: expected a block ```text under ## The tree"
    folders: list[str] = []
    found = []
    for line in block.splitlines():
        indent, (name, _, purpose) = (len(line) - len(line.lstrip())) // 2, line.strip().partition(" ")
        assert purpose.strip(), f"README.md: {name} has no purpose in the tree"
        folders = [*folders[:indent], name]
        found.append(Path(*folders))
    return found
