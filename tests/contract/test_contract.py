"""What every algorithm must hold to, for each file of dsalign/algos; and that a new one is one file."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import contract_cases
import numpy as np
import pytest
import torch
from fakes import CPU, Drawn, metrics_of, output, precision, prepared_on
from hypothesis import given, settings
from hypothesis import strategies as st
from recorded import ONLINE, played_of, prepared_from, prompts
from support import ALGORITHMS, RankPool, from_rows, random_groups, section

from dsalign import algos
from dsalign.config import options
from dsalign.config.parse import ConfigError
from dsalign.config.schema import ModelOptions
from dsalign.contract.algorithm import Algorithm, loss_of
from dsalign.contract.groups import Group, Loss, Output, Prepared
from dsalign.data.batches.packing import cut, padded
from dsalign.data.rows.formats import KINDS
from dsalign.models import load
from dsalign.models.load import VALUE_ROLES
from dsalign.models.names import resolve

each_algorithm = pytest.mark.parametrize("name", algos.names())
each_role = pytest.mark.parametrize(
    ("name", "role"), [(name, role) for name in algos.names() for role in algos.load(name)().traits.trained]
)
ROLES = {"policy", "reference", "reward", "value"}
NUM_GROUPS = 6


def built(name: str) -> Any:
    return algos.load(name)(**{**ALGORITHMS, **ONLINE}.get(name, {}))


def test_there_are_tests_for_all_of_them() -> None:
    assert set(ALGORITHMS) == set(from_rows())
    assert set(ONLINE) == set(algos.names()) - set(from_rows())


@each_algorithm
def test_the_default_configuration_builds_and_is_frozen(name: str) -> None:
    """Equal to another of its kind, made by keywords alone, and unchangeable."""
    cls = algos.load(name)
    algorithm = cls()
    assert algorithm == cls() and all(f.kw_only for f in dataclasses.fields(cls))
    for field in (*(f.name for f in dataclasses.fields(cls)), "anything"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(algorithm, field, 1)


@each_algorithm
def test_a_file_is_one_algorithm_named_like_it(name: str) -> None:
    cls = algos.load(name)
    module = importlib.import_module(cls.__module__)
    found = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and dataclasses.is_dataclass(c) and c.__module__ == module.__name__
    ]
    assert found == [cls]
    assert (cls.__name__.lower(), module.__name__) == (name.replace("_", ""), f"dsalign.algos.{name}")
    assert cls.__bases__ == (Algorithm,)


@each_algorithm
def test_its_docstring_names_the_paper(name: str) -> None:
    """An arXiv id: four digits, a point, five digits."""
    assert re.search(r"\barXiv:\d{4}\.\d{5}\b", algos.load(name).__doc__ or "")


@each_algorithm
def test_every_field_says_its_range_or_choices(name: str) -> None:
    """The comment on the field's line, which --help prints: numbers have a range, words a list to choose from."""
    cls = algos.load(name)
    hints = options.of_dataclass(cls)
    for field in dataclasses.fields(cls):
        says = hints[field.name].help
        numbers = r">=? ?\d|\bin [\[(]\d|\bany numbers?\b"
        choices = {"str": r"\bor\b|\bone or several of\b", "bool": r"\btrue or false\b"}
        wanted = next((choices[kind] for kind in choices if kind in str(field.type)), numbers)
        assert re.search(wanted, says), f"{name}.{field.name}: {says}"


@each_algorithm
def test_what_it_declares_is_legal(name: str) -> None:
    """Known roles, one of them trained; a known kind of rows; a rate for each tuner; no dropout beside a frozen model,
    as its log-probabilities would differ by noise."""
    traits = algos.load(name)().traits
    assert traits.data in KINDS
    assert set(traits.roles) <= ROLES and set(traits.roles.values()) <= {"train", "frozen"}
    assert traits.roles[traits.main] == "train" and traits.trained[0] == traits.main
    assert sorted(traits.trained) == sorted(role for role, how in traits.roles.items() if how == "train")
    assert traits.needs <= {"entropy"}
    assert set(traits.learning_rates) == {"full", "lora"}
    assert all(0 < rate < 1e-2 for rate in traits.learning_rates.values())
    assert all(traits.roles[role] == "train" and rate > 0 for role, rate in traits.role_learning_rates.items())
    assert (traits.dropout == 0) == ("frozen" in traits.roles.values()) and 0 <= traits.dropout < 1
    assert min(traits.epochs, traits.mini_batches, traits.min_groups) >= 1
    assert traits.passes == traits.epochs * traits.mini_batches
    assert set(traits.aliases) <= {field.name for field in dataclasses.fields(algos.load(name))}


@each_algorithm
def test_it_has_one_loss_for_each_trained_role(name: str) -> None:
    cls = algos.load(name)
    losses = {method for method in vars(cls) if method.endswith("_loss")}
    assert losses == {f"{role}_loss" for role in cls().traits.trained}


@each_algorithm
def test_it_says_lines(name: str) -> None:
    algorithm = algos.load(name)()
    lines = algorithm.notes(random_groups(algorithm.traits.data, 3))
    assert isinstance(lines, list) and all(line.startswith(f"{name}: ") and "\n" not in line for line in lines)


def prepared(algorithm: Any, n: int = NUM_GROUPS) -> Prepared:
    """n groups of one rank, with completions of rows or recorded ones."""
    if algorithm.traits.online:
        ((found, _),) = prepared_from(algorithm, played_of(n), given=prompts(n))
    else:
        ((found, _),) = prepared_on(algorithm, random_groups(algorithm.traits.data, n, seed=6), Drawn())
    return found


def whole(name: str, role: str) -> tuple[Any, Prepared, torch.Tensor]:
    """(algorithm, six prepared groups, a number for each token or each value), for the default dtype."""
    algorithm = built(name)
    found = prepared(algorithm)
    if not algorithm.traits.online and role not in VALUE_ROLES:
        return algorithm, found, output(Drawn(), found.groups).numbers.detach()
    drawn = np.random.default_rng(0).standard_normal(sum(sizes(role, found.groups))) / 2
    numbers = torch.tensor(drawn).to(torch.get_default_dtype())
    if role not in VALUE_ROLES:
        numbers += torch.cat([*found.fields["reference" if name == "online_dpo" else "old"]])
    return algorithm, found, numbers


def sizes(role: str, groups: Sequence[Group]) -> list[int]:
    """Numbers of each group that a model of the role gives."""
    return [Output.of(role, torch.empty(0)).size(group) for group in groups]


def loss_at(algorithm: Any, role: str, prepared: Prepared, numbers: torch.Tensor, positions: list[int]) -> Loss:
    """The loss of the groups at these positions as one micro-batch, given the numbers of all groups."""
    parts = numbers.split(sizes(role, prepared.groups))
    mine = torch.cat([*(parts[i] for i in positions), numbers[:0]])
    return loss_of(algorithm, role, Output.of(role, mine, mine**2), cut(prepared, positions, CPU))


def added(losses: list[Loss]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Sums over micro-batches of the terms and of the metrics, all with the same names."""
    assert all(x.terms.keys() == losses[0].terms.keys() for x in losses)
    assert all(x.metrics.keys() == losses[0].metrics.keys() for x in losses)
    terms = {unit: sum(float(x.terms[unit]) for x in losses) for unit in losses[0].terms}
    metrics = [metrics_of(x.metrics) for x in losses]
    return terms, {name: (sum(m[name][0] for m in metrics), sum(m[name][1] for m in metrics)) for name in metrics[0]}


def assert_equal(found: Any, want: Any) -> None:
    for mine, theirs in zip(found, want, strict=True):
        assert mine.keys() == theirs.keys()
        assert all(mine[name] == pytest.approx(theirs[name], rel=1e-12, abs=1e-12) for name in theirs)


@each_role
def test_its_terms_are_scalars_with_keys_of_its_units(name: str, role: str) -> None:
    algorithm, found, numbers = whole(name, role)
    loss = loss_at(algorithm, role, found, numbers.requires_grad_(), list(range(NUM_GROUPS)))
    units = algorithm.units(cut(found, range(NUM_GROUPS), CPU))
    assert loss.terms and loss.terms.keys() <= units.keys()
    assert all(term.ndim == 0 and term.dtype == torch.float32 for term in loss.terms.values())
    assert all(term.requires_grad for term in loss.terms.values())
    assert all(isinstance(n, int) and n > 0 for n in units.values())


@each_role
@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(NUM_GROUPS)), cuts=st.lists(st.integers(0, NUM_GROUPS), max_size=4))
def test_the_loss_adds_over_any_cut_into_micro_batches(name: str, role: str, order: list[int], cuts: list[int]) -> None:
    """Given what was prepared: any groups in any micro-batch, empty ones too; terms, metrics and units alike."""
    with precision(torch.float64):
        algorithm, found, numbers = whole(name, role)
        edges = [0, *sorted(cuts), NUM_GROUPS]
        parts = [order[first:last] for first, last in itertools.pairwise(edges)]
        losses = [loss_at(algorithm, role, found, numbers, part) for part in parts]
        assert_equal(added(losses), added([loss_at(algorithm, role, found, numbers, list(range(NUM_GROUPS)))]))
    units = [algorithm.units(cut(found, part, CPU)) for part in parts]
    whole_units = algorithm.units(cut(found, range(NUM_GROUPS), CPU))
    assert {unit: sum(u[unit] for u in units) for unit in units[0]} == whole_units


@each_role
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(NUM_GROUPS)))
def test_the_gradient_of_a_group_does_not_depend_on_its_row(name: str, role: str, order: list[int]) -> None:
    """The groups of a micro-batch in another order: the same loss, and the same gradient of each number."""
    with precision(torch.float64):
        algorithm, found, numbers = whole(name, role)
        gradients = []
        for positions in (list(range(NUM_GROUPS)), order):
            leaf = numbers.clone().requires_grad_()
            terms = loss_at(algorithm, role, found, leaf, positions).terms
            sum(terms.values(), torch.zeros(())).backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


@each_role
def test_padding_does_not_reach_the_loss(name: str, role: str, tiny: Path) -> None:
    """A real forward of four groups, alone and in a batch that a long group makes twice as wide."""
    algorithm = built(name)
    options = section(ModelOptions, tuner="full")
    module = load.load_trained(role, resolve(str(tiny)), options, device=CPU, dropout=False, seed=42).eval()
    ready = prepared(algorithm, 4)
    groups = list(ready.groups)
    long = dataclasses.replace(groups[0], prompt=groups[0].prompt * 30)
    found, widths = [], []
    for batch in (groups, [*groups, long]):
        inputs = padded(batch, CPU, ends=role == "reward")
        widths.append(inputs.ids.shape[1])
        with torch.no_grad():
            flat = module(inputs) if role in VALUE_ROLES else module(inputs, False)[0]
        count = sum(sizes(role, groups))
        found.append(added([loss_at(algorithm, role, ready, flat[:count], list(range(4)))]))
    assert widths[1] >= 2 * widths[0]
    for mine, theirs in zip(*found, strict=True):
        assert all(mine[unit] == pytest.approx(theirs[unit], rel=1e-5, abs=1e-5) for unit in theirs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one file, an algorithm that dsalign has never heard of."""
    (tmp_path / "algorithms").mkdir()
    (tmp_path / "algorithms" / "ipo.py").write_text(contract_cases.IPO)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path


def test_an_algorithm_in_one_file_is_found_and_its_fields_are_options(folder: Path) -> None:
    before = algos.names()
    with contract_cases.one_more(folder / "algorithms"):
        assert algos.names() == tuple(sorted((*before, "ipo")))
        parsed = contract_cases.parsed(folder, "--tau", "0.2", "--per_token", "false")
        assert parsed.config.algorithm == algos.load("ipo")(tau=0.2, per_token=False)
        assert parsed.origins["tau"] == "flag --tau"
        default = contract_cases.parsed(folder)
        assert (default.config.algorithm.tau, default.origins["tau"]) == (0.1, "ipo default")
        assert options.of_dataclass(algos.load("ipo"))["tau"].help == "weight of the KL penalty, 1 / nat, > 0"
        with pytest.raises(ConfigError, match=r"^--tau: expected a number > 0 and <= 1, got -1\.0$"):
            contract_cases.parsed(folder, "--tau", "-1")
    assert algos.names() == before
    with pytest.raises(ConfigError, match=f"^--algo: expected one of {', '.join(before)}, got 'ipo'"):
        contract_cases.parsed(folder)


def test_an_algorithm_in_one_file_trains(folder: Path, one_rank: RankPool) -> None:
    """Twelve steps on pairs whose chosen answer is aaa: the policy starts as its reference, so the first loss is
    (0 - 1 / (2 * 0.5))^2 = 1, and goes down."""
    lines = one_rank.run(contract_cases.train, folder / "algorithms", folder)
    losses = [line["loss"] for line in lines]
    assert len(losses) == 12
    assert losses[0] == pytest.approx(1.0, abs=1e-5)
    assert losses[-1] < 0.5
    assert "rewards/accuracies" in lines[-1]
    assert lines[-1]["rewards/accuracies"] == 1.0


@pytest.mark.parametrize("count", [0, 2])
def test_a_file_must_hold_one_algorithm(count: int, folder: Path) -> None:
    body = contract_cases.IPO.partition("@dataclass")
    classes = [(body[1] + body[2]).replace("class IPO", f"class IPO{i}") for i in range(count)]
    (folder / "algorithms" / "ipo.py").write_text(body[0] + "\n\n".join(classes))
    with contract_cases.one_more(folder / "algorithms"), pytest.raises(TypeError) as caught:
        algos.load("ipo")
    assert str(caught.value) == f"dsalign.algos.ipo must define exactly one dataclass of an Algorithm, it has {count}"
