"""The rules of the repository that no tool knows: caps, who may import whom, what must be documented, README's tree."""

from __future__ import annotations

import ast
import fnmatch
import io
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from dsalign import algos

ROOT = Path(__file__).resolve().parent.parent
CODE = ("dsalign", "kernels", "launch")
MAX_FILE, MAX_FUNCTION, MAX_README = 400, 60, 200  # lines
GENERATED = ("__pycache__", "*.egg-info", "build", "dist", "output", ".*")
SOURCES = sorted(path.relative_to(ROOT) for folder in CODE for path in (ROOT / folder).rglob("*.py"))
PACKAGE = [path for path in SOURCES if path.parts[0] == "dsalign"]
# The rooms from the ground up: a room may import those of its line, all above it, and nothing below or beside it.
MAY_IMPORT: dict[str, set[str]] = {
    "contract": set(),
    "assets": set(),
    "cpu": set(),
    "endings": set(),
    "faults": set(),
    "phases": {"faults"},
    "algos": {"contract"},
    "config": {"algos", "assets", "contract"},
    "report": {"assets", "config", "endings", "phases"},
    "memory": {"config"},
    "data": {"assets", "config", "contract", "report"},
    "models": {"config", "contract", "cpu", "data"},
    "engines": {"__version__", "config", "contract", "cpu", "data", "endings", "faults", "models", "phases",
                "report"},
    "rollout": {"config", "contract", "cpu", "data", "endings", "engines", "faults", "models", "phases"},
    "rewards": {"assets", "config", "contract", "cpu", "data", "endings", "engines", "faults", "models", "phases"},
    "checkpoint": {"config", "contract", "cpu", "data", "endings", "engines", "faults", "models", "phases"},
    "guard": {"config", "contract", "cpu", "data", "endings", "engines", "faults", "models", "phases"},
    "loop": {"checkpoint", "config", "contract", "cpu", "data", "endings", "engines", "faults", "guard", "models",
             "phases", "report", "rewards", "rollout"},
    "ranks": set(),
    "launcher": {"config", "endings", "ranks"},
    "verbs": {"__version__", "algos", "assets", "checkpoint", "config", "contract", "data", "endings", "engines",
              "faults", "guard", "loop", "memory", "models", "phases", "ranks", "report", "rewards", "rollout"},
    "cli": {"__version__", "config", "endings", "launcher", "ranks", "report", "verbs"},
    "__init__": set(),
}  # fmt: skip
ORDER = list(MAY_IMPORT)
FRAGMENTS = {"Also", "As", "Does", "It", "Of", "That", "They", "Those", "Whoever"}
KERNEL_SEAMS = {
    "dsalign/loop/loss.py",
    "dsalign/models/logps.py",
    "dsalign/rollout/pick.py",
    "dsalign/rollout/slots.py",
}
# Where a source file's test is not tests/ROOM/test_NAME.py; a pattern stands for files that have one reason.
FILES_WITHOUT_TEST = {
    "dsalign/config/draft.py": "a record; tests/config/test_rules.py fills and reads it",
    "__init__.py": "a docstring or a version; what assets/ and cpu/ hold there is in test_assets.py and test_cpu.py",
    "dsalign/algos/*.py": "tests/contract and tests/algos go over every name that algos.names() finds",
    "dsalign/contract/algorithm.py": "tests/contract/test_contract.py asks every algorithm for what it promises",
    "dsalign/contract/groups.py": "records without a computation; whoever fills them has the tests",
    "dsalign/contract/preference_losses.py": "tests/algos/test_losses.py, against tests/algos/oracle.py",
    "dsalign/checkpoint/durable.py": "tests/faults kills ranks in the middle of its files and fills their disk",
    "dsalign/checkpoint/manifest.py": "tests/faults/test_corruption.py damages what it lists, and it",
    "dsalign/checkpoint/plain_folder.py": "tests/verbs/test_merge.py writes, refuses and fails with it",
    "dsalign/checkpoint/shards.py": "tests/faults/test_corruption.py plants pickles, test_checkpoints.py resumes",
    "dsalign/checkpoint/staged.py": "tests/faults/test_kills.py kills ranks at every point of it",
    "dsalign/checkpoint/verify.py": "tests/faults/test_corruption.py has what it refuses and what it says",
    "dsalign/checkpoint/progress.py": "counters; tests/checkpoint/test_checkpoints.py saves and resumes them",
    "dsalign/engines/alone.py": "tests/verbs/test_merge.py exports it, test_eval.py computes and samples with it",
    "dsalign/engines/build.py": "needs ranks: tests/distributed/test_whole_runs.py and run_cases.py",
    "dsalign/engines/finite.py": "needs ranks: tests/loop/test_bad_steps.py spoils numbers of every kind",
    "dsalign/engines/memory.py": "tests/guard/test_resources.py and tests/rollout/test_out_of_memory.py",
    "dsalign/guard/first_flaw.py": "tests/verbs/test_replay.py finds flaws forward and backward",
    "dsalign/guard/numbers.py": "tests/verbs/test_replay.py writes and reads; tests/loop/test_bad_steps.py",
    "dsalign/loop/context.py": "needs engines: tests/loop/test_trainer.py and tests/distributed",
    "dsalign/loop/plan.py": "glue of a run: tests/distributed/test_whole_runs.py",
    "dsalign/loop/session.py": "glue of a run: tests/distributed/test_whole_runs.py",
    "dsalign/models/tokenizer.py": "tests/models/test_load.py loads tokenizers with the models of the same folders",
    "dsalign/rollout/api.py": "records and a protocol; tests/rollout/test_local.py fills and reads them",
    "dsalign/rollout/generate.py": "needs engines: tests/rollout/test_probe.py, and tests/distributed",
    "dsalign/rollout/in_process.py": "needs engines: tests/rollout/test_view.py and test_probe.py",
    "dsalign/rollout/pick.py": "a call of a kernel, tests/kernels/test_sampling.py; tests/rollout/test_local.py",
    "dsalign/rollout/plain.py": "tests/rollout/test_local.py holds both engines to the same",
    "dsalign/rollout/slots.py": "tests/rollout/test_local.py, by numbers, growth and moves",
    "dsalign/verbs/chatting.py": "tests/verbs/test_chat.py, through pipe and terminal",
    "dsalign/verbs/evaluated.py": "tests/verbs/test_eval.py, through the command",
    "dsalign/verbs/harness.py": "tests/verbs/test_eval.py, up to the process that it starts",
    "dsalign/verbs/export.py": "tests/verbs/test_exporting.py, as tests/checkpoint/test_export.py has the name",
    "dsalign/verbs/exported.py": "tests/verbs/test_exporting.py, through the command",
    "dsalign/verbs/merged.py": "tests/verbs/test_merge.py, through the command",
    "dsalign/verbs/opened.py": "tests/verbs/test_chat.py and test_eval.py compute with what it opens",
    "dsalign/verbs/places.py": "tests/verbs/test_merge.py, test_exporting.py, test_chat.py: what names mean",
    "dsalign/verbs/beside.py": "tests/verbs/test_check.py, through the command",
    "dsalign/verbs/checked.py": "tests/verbs/test_check.py, through the command",
    "dsalign/verbs/replayed.py": "tests/verbs/test_replay.py, through the command",
    "dsalign/verbs/train.py": "a table of contents; tests/distributed/test_whole_runs.py and tests/test_demo.py run it",
}
COLLECTIVE = {"engines", "checkpoint"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def room(path: Path) -> str:
    """dsalign/data/rows/fields.py -> data, dsalign/cli.py -> cli."""
    return path.parts[1].removesuffix(".py")


def imports(module: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, for `from a import b` a.b; those for types alone too."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; write it from dsalign"
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


def trespasses(path: Path, module: ast.Module) -> list[str]:
    """What a file of the package imports that its room may not see, a line each; `module`: its text, parsed."""
    mine = room(path)
    if mine not in MAY_IMPORT:
        return [f"{path}: say in MAY_IMPORT what {mine} may import"]
    found = []
    for line, name in imports(module):
        first, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if first == "dsalign" and other != mine and other not in MAY_IMPORT[mine]:
            found.append(f"{path}:{line}: {mine} may not import dsalign.{other}")
        if first == "dsalign" and re.search(r"\._[a-z]", name):
            found.append(f"{path}:{line}: {name} is its module's own; give it a name without _ or a place here")
        if first == "dsalign_kernels" and path.as_posix() not in KERNEL_SEAMS:
            found.append(f"{path}:{line}: {' and '.join(sorted(KERNEL_SEAMS))} import dsalign_kernels")
        if name.startswith("torch.distributed") and mine not in COLLECTIVE:
            found.append(f"{path}:{line}: torch.distributed is for {', '.join(sorted(COLLECTIVE))}")
    for node in ast.walk(module):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed" and mine not in COLLECTIVE:
            found.append(f"{path}:{node.lineno}: torch.distributed; put it into engines/dist.py")
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_import_direction(path: Path) -> None:
    """Data flows one way: config -> data -> models -> engines -> loop -> verbs; algorithms see the contract alone.
    Kernels come in through two files, collectives live in engines/ and checkpoint/."""
    assert not trespasses(path, tree(path))


def test_rooms_stand_in_order() -> None:
    """No room may see one that stands below it, so no two rooms may see each other."""
    for i, (name, others) in enumerate(MAY_IMPORT.items()):
        below = others.intersection(ORDER[i + 1 :])
        assert not below, f"{name} stands above {', '.join(sorted(below))}"


@pytest.mark.parametrize(
    ("where", "text", "said"),
    [
        ("dsalign/data/new.py", "from dsalign.models import load", "data may not import dsalign.models"),
        ("dsalign/engines/new.py", "from dsalign.loop.trainer import Trainer", "engines may not import dsalign.loop"),
        ("dsalign/rewards/new.py", "import dsalign.rollout.sampler", "rewards may not import dsalign.rollout"),
        ("dsalign/algos/new.py", "def f():\n    from dsalign.data import dataset", "algos may not import dsalign.data"),
        (
            "dsalign/algos/new.py",
            "if TYPE_CHECKING:\n    from dsalign.loop import context",
            "may not import dsalign.loop",
        ),
        ("dsalign/verbs/new.py", "from dsalign import cli", "verbs may not import dsalign.cli"),
        ("dsalign/loop/new.py", "from dsalign.loop.trainer import _dealt", "_dealt is its module's own"),
        ("dsalign/attic/new.py", "", "say in MAY_IMPORT what attic may import"),
        ("dsalign/models/new.py", "import dsalign_kernels", "import dsalign_kernels"),
        ("dsalign/loop/new.py", "import torch.distributed as td", "torch.distributed is for checkpoint, engines"),
        ("dsalign/loop/new.py", "import torch\ntorch.distributed.barrier()", "put it into engines/dist.py"),
    ],
)
def test_a_trespass_is_seen(where: str, text: str, said: str) -> None:
    """Up, sideways, inside a function, for types alone, into a room that nobody listed, past a seam."""
    found = trespasses(Path(where), ast.parse(text))
    assert len(found) == 1 and said in found[0]


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_only_the_command_reads_argv_and_ranks(path: Path) -> None:
    """sys.argv, RANK and LOCAL_RANK are for cli.py, and for launcher.py and ranks.py, which it hands them to;
    elastic.py is a program of its own, and faults.py is for tests alone."""
    if room(path) in ("cli", "launcher", "ranks", "faults") or path.name == "elastic.py":
        return
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "sys.argv", f"{path}:{node.lineno}: sys.argv is for cli.py"
        if isinstance(node, ast.Constant):
            assert node.value not in ("RANK", "LOCAL_RANK"), f"{path}:{node.lineno}: {node.value} is for cli.py"


@pytest.mark.parametrize("path", [p for p in PACKAGE if room(p) != "algos"], ids=str)
def test_no_algorithm_is_named(path: Path) -> None:
    """No `if algo == ...`: what an algorithm needs is in its dataclass. In loop/ not even a string names one."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Compare):
            text = ast.unparse(node.left)
            named = text.split(".")[-1] in ("algo", "algorithm") or text.endswith(("['algo']", '["algo"]'))
            words = [c.value for c in ast.walk(node) if isinstance(c, ast.Constant)]
            assert not (named and set(words) & set(algos.names())), f"{path}:{node.lineno}: {ast.unparse(node)}"
        if isinstance(node, ast.Constant) and room(path) == "loop":
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
    assert "dsalign.verbs.train" in loaded and not loaded & {"datasets", "pyarrow"}


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_docstrings(path: Path) -> None:
    """Every module with something in it, public function and public class says what it is."""
    assert ast.get_docstring(tree(path)) or not tree(path).body, f"{path}: no docstring"
    for node in tree(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_a_docstring_has_a_subject(path: Path) -> None:
    """What is public begins with a noun or verb, in four words or more: no "Of each group", which asks "what?"."""
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            words = (ast.get_docstring(node) or "").split("\n\n")[0].split()
            where = f"{path}:{node.lineno}: {node.name}: {' '.join(words)}"
            assert not words or len(words) >= 4, f"{where}; expected a sentence"
            assert not words or words[0] not in FRAGMENTS, f"{where}; put its subject first"


def mirror(path: Path) -> Path:
    """dsalign/data/rows/fields.py -> tests/data/rows/test_fields.py."""
    return Path("tests", *path.parts[1:-1], f"test_{path.name}")


@pytest.mark.parametrize("path", PACKAGE, ids=str)
def test_a_source_file_has_a_test_file(path: Path) -> None:
    """Tests mirror the rooms, so that the test of a file is found without a search."""
    assert (ROOT / mirror(path)).exists() or any(path.match(pattern) for pattern in FILES_WITHOUT_TEST), (
        f"{path}: expected {mirror(path)}, or a reason in FILES_WITHOUT_TEST"
    )


@pytest.mark.parametrize("pattern", FILES_WITHOUT_TEST)
def test_a_reason_for_no_test_file_is_needed(pattern: str) -> None:
    """A reason goes with its file, and once the file has a test."""
    without = [path for path in PACKAGE if path.match(pattern) and not (ROOT / mirror(path)).exists()]
    assert without, f"FILES_WITHOUT_TEST: {pattern} matches no file without a test; remove it"


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
    """Under 200 lines, or nobody reads it."""
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


def test_no_two_tests_have_one_name() -> None:
    """pytest imports a test by the name of its file alone."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert not [name for name, count in names.items() if count > 1]
