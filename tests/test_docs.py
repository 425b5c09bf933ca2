"""The pages of docs/ and README say what the program does: names of metrics and options, links, commands and YAML."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import CPU, Drawn, output, prepared_on
from recorded import ONLINE, PLAYS, PROMPTS, Recorded, prepared_from, tensor
from support import ALGORITHMS, random_groups

from dsalign import algos, verbs
from dsalign.config import flags, foreign, options
from dsalign.config.parse import ALIASES, parse
from dsalign.config.schema import RUN_OPTIONS, own_options
from dsalign.contract.algorithm import loss_of
from dsalign.contract.groups import Batch, Output, Prepared, Scores
from dsalign.contract.rollout_options import RolloutOptions
from dsalign.data.batches.packing import cut
from dsalign.data.rows.fields import Fields
from dsalign.data.rows.formats import FORMATS, KINDS, convert
from dsalign.guard.trends import GUARDS
from dsalign.loop.clock import PHASES
from dsalign.loop.metrics import Spread
from dsalign.models.load import VALUE_ROLES

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "algorithms"
DOCS = sorted((ROOT / "docs").rglob("*.md"))
TEXTS = [ROOT / "README.md", *DOCS]
EVERY_RUN = {"loss", "grad_norm", "lr", "epoch", "num_tokens", "tokens_per_s", "memory/peak", "bad_steps", "aux_loss"}
CRITIC = {"value/lr", "value/grad_norm"}
# Settings beside those of the contract's tests with which an algorithm logs what it does not log by default.
MORE: dict[str, list[dict[str, Any]]] = {
    "dpo": [{"loss_type": ("ipo",)}],
    "kto": [{"loss_type": "apo_zero_unpaired"}],
    "cpo": [{"loss_type": "ipo"}],
    "online_dpo": [{"loss_type": "ipo"}],
    "grpo": [{"dynamic_sampling": 1, "num_generations": 2, "num_iterations": 2}],
    "rloo": [{"num_iterations": 2, "num_generations": 2}],
    "reinforce": [{"num_iterations": 2}],
}
# Flags of other programs that a page's commands use.
OTHERS = {
    "num_accelerators": "deepspeed", "hostfile": "deepspeed", "include": "deepspeed", "no_ssh": "deepspeed",
    "no_deps": "pip", "no_build_isolation": "pip",
    "nnodes": "torchrun", "nproc_per_node": "torchrun", "node_rank": "torchrun", "rdzv_endpoint": "torchrun",
    "rdzv_backend": "torchrun", "master_addr": "torchrun", "master_port": "torchrun",
    "kill_on_bad_exit": "srun", "signal": "scancel", "strict": "mkdocs",
    "sets": "benchmarks/", "ways": "benchmarks/", "repeats": "benchmarks/", "steps": "benchmarks/",
    "settings": "benchmarks/", "iterations": "benchmarks/",
    "algos": "benchmarks/", "rows": "kernels/bench_*.py", "hidden": "kernels/bench_*.py",
    "vocabulary": "kernels/bench_*.py", "part": "kernels/bench_*.py",
}  # fmt: skip
LAUNCHED = r"(?:deepspeed|torchrun|srun|mpirun|python)\b.*? ?launch/train\.py"
OURS = re.compile(rf"^(?:\w+=\S+ )*(?:\.venv/bin/)?(dsalign|{LAUNCHED})(?: |$)")


class TwoSources(Recorded):
    """A sampler whose answers are scored by a model and by a function."""

    def scores(self, groups: Any) -> Scores:
        total = [tensor([p.score for p in self.of(group)]) for group in groups]
        return Scores(total, {"reward_model": total, "exact": total})


def loss_metrics(algorithm: Any, prepared: Prepared) -> dict[str, float]:
    """The metrics of all losses of one micro-batch; their values mean nothing."""
    found: dict[str, Any] = {}
    micro = cut(prepared, range(len(prepared.groups)), CPU)
    for role in algorithm.traits.trained:
        if not algorithm.traits.online and role not in VALUE_ROLES:
            numbers = output(Drawn(), prepared.groups).numbers.detach()
        else:
            size = sum(Output.of(role, torch.empty(0)).size(group) for group in prepared.groups)
            numbers = torch.tensor(np.random.default_rng(0).standard_normal(size)).float()
        found |= loss_of(algorithm, role, Output.of(role, numbers, numbers**2), micro).metrics
    return found


@cache
def logged(name: str) -> frozenset[str]:
    """Every metric that a run of the algorithm can log through its own file, with any options."""
    names: set[str] = set()
    for own in [{**ALGORITHMS, **ONLINE}[name], *MORE.get(name, [])]:
        algorithm = algos.load(name)(**own)
        if algorithm.traits.online:
            for prepared in sampled(algorithm):
                names |= {*prepared.metrics, *loss_metrics(algorithm, prepared)}
        else:
            groups = random_groups(algorithm.traits.data, 6, seed=6)
            ((prepared, _),) = prepared_on(algorithm, groups, Drawn())
            names |= {*prepared.metrics, *loss_metrics(algorithm, prepared)}
        names |= algorithm.derived(dict.fromkeys(names, 1.0)).keys()
        if algorithm.traits.passes > 1:
            names |= {f"{one}_var" for one in Spread.OF if one in names}
    names.discard("objective/scores/reward_model")
    return frozenset({"objective/scores/NAME" if one == "objective/scores/exact" else one for one in names})


def sampled(algorithm: Any) -> Iterator[Prepared]:
    """What is prepared from recorded answers, with two rewards, and with importance weights where it takes them."""
    ((plain, _),) = prepared_from(algorithm)
    yield plain
    rollout = RolloutOptions(max_new_tokens=5, rollout_is_cap=2.0)
    try:
        algorithm.check(rollout)
    except ValueError:
        rollout = replace(rollout, rollout_is_cap=None)
    ctx = TwoSources(PLAYS, rollout=rollout)
    yield algorithm.prepare(ctx, Batch(PROMPTS, range(len(PROMPTS))))


def first_cells(text: str, heading: str) -> set[str]:
    """The names in backticks in the first column of the table under a heading."""
    section = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row)}


@pytest.mark.parametrize("name", algos.names())
def test_a_page_has_every_metric(name: str) -> None:
    """The table has what the algorithm can log, of what every run logs at most some, and nothing else."""
    listed = first_cells((PAGES / f"{name}.md").read_text(encoding="utf-8"), "Logged metrics")
    critic = CRITIC if len(algos.load(name)().traits.trained) > 1 else set()
    assert logged(name) <= listed, f"{name}.md lacks {sorted(logged(name) - listed)}"
    assert listed <= logged(name) | EVERY_RUN | critic, f"{name}.md: {sorted(listed - logged(name) - EVERY_RUN)}"
    assert critic <= listed


def test_what_is_logged_is_found() -> None:
    """So that the test above compares with something: names that only some options bring."""
    assert "logps/mean_chosen" in logged("dpo") and "kl" in logged("kto") and "rewards/margins" in logged("kto")
    assert {"rollout/is_capped", "rollout/groups_kept", "val/ratio_var", "objective/scores/NAME"} <= logged("grpo")
    assert {"loss/value_avg", "val/ratio_var", "objective/rlhf_reward"} <= logged("ppo")
    assert logged("sft") == {"nll_loss", "entropy"} and "rollout/is_weight" not in logged("online_dpo")


def test_metrics_of_every_run() -> None:
    text = (PAGES / "README.md").read_text(encoding="utf-8")
    assert first_cells(text, "Metrics of every run") == EVERY_RUN
    assert first_cells(text, "Metrics of every run that samples") == {f"time/{phase}" for phase in PHASES}


@pytest.mark.parametrize("name", algos.names())
def test_a_page_has_every_option_of_its_own(name: str) -> None:
    """And between 60 and 110 lines."""
    text = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    own = options.of_dataclass(algos.load(name))
    missing = [one for one in own if f"--{one}`" not in text and f"--{one} " not in text]
    assert not missing, f"{name}.md: {missing}"
    assert 60 <= len(text.splitlines()) <= 110
    assert f"({name}.md)" in (PAGES / "README.md").read_text(encoding="utf-8")


@cache
def known_flags() -> frozenset[str]:
    """Names of options that some command of dsalign takes."""
    own = {option for name in algos.names() for option in own_options(algos.load(name))}
    usages = " ".join(getattr(verbs.load(verb), "USAGE", "") for verb in verbs.summaries() if verb != "train")
    of_verbs = {one.replace("-", "_") for one in re.findall(r"--([a-z][a-z0-9_-]*)", usages)}
    return frozenset({*RUN_OPTIONS, *own, *foreign.NAMES, *flags.REQUESTS, *of_verbs})


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_exists(path: Path) -> None:
    """An option of dsalign, of another trainer where dsalign knows it, or of a program in OTHERS."""
    text = path.read_text(encoding="utf-8")
    found = {one.replace("-", "_") for one in re.findall(r"(?<![\w-])--(?:[a-z]\w*\.)?([a-z][a-z0-9_-]*)", text)}
    strangers = found - known_flags() - OTHERS.keys()
    if path.name == "migrating.md":
        strangers -= foreign.SENTENCES.keys()
    assert not strangers, f"{path.relative_to(ROOT)}: {sorted(strangers)}"


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower().replace("`", "")).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_resolves(path: Path) -> None:
    """Relative ones, to a file and, behind #, to one of its headings."""
    text = re.sub(r"`[^`]*`", "", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.relative_to(ROOT)}: {target} is not there"
        assert there.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(there), f"{path.relative_to(ROOT)}: {target} has no such heading"


def blocks(text: str) -> str:
    """The lines of a page that are code: behind four blanks, or within a fence without a language or of a shell."""
    kept, fence = [], None
    for line in text.splitlines():
        if line.startswith("```"):
            fence = line[3:].strip() if fence is None else None
        elif fence in ("", "bash", "sh", "console") or (fence is None and line.startswith("    ")):
            kept.append(line.strip())
    return "\n".join(kept).replace("\\\n", " ")


def commands() -> Iterator[tuple[str, list[str]]]:
    """(where, the words behind the program) of each command of dsalign in a code block of README and docs."""
    for path in TEXTS:
        for line in blocks(path.read_text(encoding="utf-8")).splitlines():
            if found := OURS.match(line):
                yield f"{path.relative_to(ROOT)}: {line}", shlex.split(line[found.end() :], comments=True)


def yamls() -> Iterator[tuple[str, str]]:
    """(where, text) of each YAML block of README and docs."""
    for path in TEXTS:
        for text in re.findall(r"^```yaml\n(.*?)^```", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
            yield f"{path.relative_to(ROOT)}: {text.splitlines()[0]}", text


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the files that commands of pages name."""
    shutil.copytree(ROOT / "ds_configs", tmp_path / "ds_configs")
    if (ROOT / "configs").is_dir():
        shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "run.yaml").write_text("algo: dpo\nmodel: m\n")
    (tmp_path / "rewards.py").write_text("def exact(prompts, completions, **columns):\n    return [0.0]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def furnish(desk: Path, words: list[str]) -> None:
    """Make the data files and models' folders that a command names."""
    for word in words:
        if re.search(r"\.(jsonl?|csv|parquet|tsv)$", word.partition("#")[0]) and not word.startswith("ds_configs"):
            (desk / word.partition("#")[0]).parent.mkdir(parents=True, exist_ok=True)
            (desk / word.partition("#")[0]).touch()
        elif re.search(r"/(final|checkpoint-\d+|checkpoint-N)$", word):
            (desk / word).mkdir(parents=True, exist_ok=True)
            (desk / word / "config.json").write_text("{}")


@pytest.mark.parametrize(("where", "words"), [pytest.param(*one, id=one[0]) for one in commands()])
def test_every_command_is_understood(where: str, words: list[str], desk: Path) -> None:
    """By the reader of its verb; a training by the parser, with the configuration that it names."""
    furnish(desk, words)
    command = flags.split(words, ALIASES)
    verb = verbs.of(command.words)
    rest = command.without(())[1:] if verb else words
    if command.asks("help"):
        return
    if verb == "resume":
        parse(["--algo", "dpo", *command.without(("output_dir", "resume"))[2:]], world_size=2)
    elif verb == "replay":
        assert rest == ["RUN/bad/step-N"]
    elif verb:
        assert verbs.load(verb).read(rest) is not None
    else:
        parse(words, world_size=1)


def test_there_are_commands() -> None:
    """Which the test above goes over: at least one for each algorithm."""
    asked = [words for _, words in commands()]
    assert {words[words.index("--algo") + 1] for words in asked if "--algo" in words} == set(algos.names())


@pytest.mark.parametrize(("where", "text"), [pytest.param(*one, id=one[0]) for one in yamls()])
def test_every_yaml_is_understood(where: str, text: str, desk: Path) -> None:
    furnish(desk, re.findall(r"[\w./#-]+", text))
    (desk / "block.yaml").write_text(text)
    if "stages:" in text:
        assert verbs.load("recipe").read(["block.yaml"]) is not None
    else:
        parse(["--config", "block.yaml"], world_size=1)


def test_inline_commands_are_verbs() -> None:
    """`dsalign VERB ...` within a sentence."""
    for path in TEXTS:
        for words in re.findall(r"`dsalign ([^`]+)`", path.read_text(encoding="utf-8")):
            if not words.startswith("VERB"):
                verbs.of(flags.split(words.split(), ALIASES).words)


@pytest.mark.parametrize("name", algos.names())
def test_a_configuration_to_start_from(name: str, desk: Path) -> None:
    """configs/NAME.yaml is a run of that algorithm, with rows and a model that are there, and its own command works."""
    text = (ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8")
    found = parse(["--config", f"configs/{name}.yaml"], world_size=1).config
    assert (found.algo, found.output.output_dir) == (name, f"output/{name}")
    assert found.data.dataset == (f"demo:{found.algorithm.traits.data}",)
    assert f"docs/algorithms/{name}.md" in text
    (command,) = re.findall(r"^#   dsalign (.*)$", text, re.MULTILINE)
    words = shlex.split(command)
    furnish(desk, words)
    assert parse(words, world_size=1).config.models.model == "MODEL"
    page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
    assert f"](../../configs/{name}.yaml)" in page or f"configs/{name}.yaml" in page


def test_configurations_are_of_algorithms() -> None:
    """A file of configs/ is named as the algorithm that it configures, or is the recipe."""
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} - {"recipe"} == set(algos.names())


def test_every_guard_is_described() -> None:
    """With its paper, and the metrics that it reads."""
    text = (PAGES / "README.md").read_text(encoding="utf-8").partition("## Guards\n")[2].partition("\n## ")[0]
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    for guard in GUARDS:
        assert guard.paper in rows[guard.name]
    assert len(rows) == len(GUARDS) + 1


def rows_of(kind: str) -> list[dict[str, Any]]:
    """The rows in the code of the page on data under the heading of a kind."""
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    section = text.partition(f"## {kind.capitalize()}\n")[2].partition("\n## ")[0]
    return [json.loads(line) for line in section.splitlines() if line.startswith("    {")]


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_has_a_row(kind: str) -> None:
    """One for each layout of the kind, in which no column is left unread but those that reward functions get."""
    found = []
    for row in rows_of(kind):
        read = convert(Fields("docs/data.md", row, text_only=False), kind, None)
        assert not read.unread and len(read.completions) == {"pairs": 2, "prompts": 0}.get(kind, 1)
        found.append(next(needs for needs in FORMATS[kind] if row.keys() >= set(needs.split(", "))))
    assert found == list(FORMATS[kind])
    for name in algos.names():
        if algos.load(name)().traits.data == kind:
            page = (PAGES / f"{name}.md").read_text(encoding="utf-8")
            section = page.partition("## Data\n")[2].partition("\n## ")[0]
            examples = [json.loads(line) for line in section.splitlines() if line.startswith("    {")]
            assert examples
            for row in examples:
                convert(Fields(f"{name}.md", row, text_only=False), kind, None)


def test_foreign_flags_mean_what_the_page_says() -> None:
    """In migrating.md a flag of another trainer's column is read as the option of its row, or answered with it."""
    text = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    table = text.partition("| here |")[2].partition("\n\n")[0].splitlines()[2:]
    checked = 0
    for line in table:
        ours, *theirs = (re.findall(r"`--(\w+)", cell) for cell in line.strip("| ").split(" | "))
        for name in (one for cell in theirs for one in cell):
            checked += 1
            known = name in ours or foreign.NAMES.get(name) in ours
            answered = any(f"--{one}" in foreign.advice(name) for one in ours)
            assert known or answered, f"migrating.md: --{name} stands beside {ours}"
    assert checked > 60


def test_pages_stand_in_the_site() -> None:
    """Every page of docs/ is in the navigation of mkdocs.yml."""
    listed = set(re.findall(r"^ *- ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE))
    assert listed == {str(path.relative_to(ROOT / "docs")) for path in DOCS}


def test_what_breaks_is_what_was_found() -> None:
    """docs/reliability.md is written by tests/faults/report.py, with every fault, and no rank lives on for 15 s."""
    spec = importlib.util.spec_from_file_location("report", ROOT / "tests" / "faults" / "report.py")
    assert spec is not None and spec.loader is not None
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert text.startswith(report.HEAD)
    assert re.findall("^## (.*)$", text, re.MULTILINE) == [*report.TABLES, "The others"]
    assert "\n112 cases: resumed, equal\n" in text, "7 points x 4 algorithms x ZeRO-2 and 3 x LoRA and all weights"
    assert {line.split(" | ")[0] for line in text.split("## The others")[1].splitlines()[4:]} == {
        "| corruption", "| disk", "| kill", "| soak",
    }  # fmt: skip
    seconds = [float(cell) for cell in re.findall(r"(?<=\| )\d+\.\d\d\b", text)]
    assert len(seconds) > 200 and max(seconds) < 15
