"""What every algorithm must hold to, for each file of dsalign/algos; and that a new one is one file."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
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
from support import ALGORITHMS, RankPool, from_rows, random_groups

from dsalign import algos
from dsalign.config import options
from dsalign.config.parse import ConfigError
from dsalign.contract.groups import Group, Loss, Output, Prepared
from dsalign.data.batches.packing import cut, rows
from dsalign.data.rows.formats import KINDS
from dsalign.models import load
from dsalign.models.load import VALUE_ROLES
from dsalign.models.names import resolve
from dsalign.models.tokenizer import LoadOptions

each_algorithm = pytest.mark.parametrize("name", algos.names())
each_from_rows = pytest.mark.parametrize("name", from_rows())
ROLES = {"policy", "reference", "reward", "value", "actor", "critic"}
NUM_GROUPS = 6


def trained_role(algorithm: Any) -> str:
    (role,) = (role for role, how in algorithm.roles.items() if how == "train")
    return role


def test_there_are_tests_for_all_of_them() -> None:
    assert set(ALGORITHMS) == set(from_rows())


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
    found = [c for c in vars(module).values() if dataclasses.is_dataclass(c) and hasattr(c, "roles")]
    assert found == [cls]
    assert (cls.__name__.lower(), module.__name__) == (name, f"dsalign.algos.{name}")
    assert cls.__mro__ == (cls, object)


@each_algorithm
def test_its_docstring_names_the_paper(name: str) -> None:
    """An arXiv id: four digits, a point, five digits."""
    assert re.search(r"\barXiv:\d{4}\.\d{5}\b", algos.load(name).__doc__ or "")


@each_algorithm
def test_every_field_says_its_range_or_choices(name: str) -> None:
    """The comment on the field's line, which --help prints: numbers have a range, words a list to choose from."""
    cls = algos.load(name)
    hints = options.of_algorithm(cls)
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
    algorithm = algos.load(name)()
    assert algorithm.data in KINDS
    assert set(algorithm.roles) <= ROLES and set(algorithm.roles.values()) <= {"train", "frozen"}
    assert "train" in algorithm.roles.values()
    assert {need for need in algorithm.needs if not need.endswith("_var")} <= {"entropy"}
    assert set(algorithm.learning_rates) == {"full", "lora"}
    assert all(0 < rate < 1e-2 for rate in algorithm.learning_rates.values())
    assert algorithm.temperature > 0
    assert all(algorithm.roles[role] == "train" and rate > 0 for role, rate in algorithm.role_learning_rates.items())
    assert (algorithm.dropout == 0) == ("frozen" in algorithm.roles.values()) and 0 <= algorithm.dropout < 1
    assert min(algorithm.epochs, algorithm.mini_batches, algorithm.min_groups) >= 1


@each_algorithm
def test_it_has_one_loss_for_each_trained_role(name: str) -> None:
    algorithm = algos.load(name)()
    losses = {method for method, _ in inspect.getmembers(algorithm, callable) if method.endswith("_loss")}
    assert losses == {f"{role}_loss" for role, how in algorithm.roles.items() if how == "train"}


@each_algorithm
def test_it_says_lines_and_does_not_stop(name: str) -> None:
    algorithm = algos.load(name)()
    lines = algorithm.notes(random_groups(algorithm.data, 3))
    assert isinstance(lines, list) and all(line.startswith(f"{name}: ") and "\n" not in line for line in lines)
    assert algorithm.stop({"loss": 1.0}) is False


def whole(name: str) -> tuple[Any, Prepared, torch.Tensor]:
    """(algorithm, six prepared groups, a number for each token or each value), for the default dtype."""
    algorithm = algos.load(name)(**ALGORITHMS.get(name, {}))
    groups = random_groups(algorithm.data, NUM_GROUPS, seed=6)
    ((prepared, _),) = prepared_on(algorithm, groups, Drawn())
    role = trained_role(algorithm)
    if role not in VALUE_ROLES:
        return algorithm, prepared, output(Drawn(), groups).numbers.detach()
    drawn = np.random.default_rng(0).standard_normal(sum(sizes(role, groups)))
    return algorithm, prepared, torch.tensor(drawn).to(torch.get_default_dtype())


def sizes(role: str, groups: Sequence[Group]) -> list[int]:
    """Numbers of each group that a model of the role gives."""
    return [Output.of(role, torch.empty(0)).size(group) for group in groups]


def loss_of(algorithm: Any, prepared: Prepared, numbers: torch.Tensor, positions: list[int]) -> Loss:
    """The loss of the groups at these positions as one micro-batch, given the numbers of all groups."""
    role = trained_role(algorithm)
    parts = numbers.split(sizes(role, prepared.groups))
    mine = torch.cat([*(parts[i] for i in positions), numbers[:0]])
    found: Loss = getattr(algorithm, f"{role}_loss")(Output.of(role, mine, mine**2), cut(prepared, positions, CPU))
    return found


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


@each_from_rows
def test_its_terms_are_scalars_with_the_keys_of_its_units(name: str) -> None:
    algorithm, prepared, numbers = whole(name)
    loss = loss_of(algorithm, prepared, numbers.requires_grad_(), list(range(NUM_GROUPS)))
    assert loss.terms.keys() == algorithm.units(prepared.groups).keys()
    assert all(term.ndim == 0 and term.dtype == torch.float32 for term in loss.terms.values())
    assert all(term.requires_grad for term in loss.terms.values())
    assert all(isinstance(n, int) and n > 0 for n in algorithm.units(prepared.groups).values())


@each_from_rows
@settings(max_examples=15, deadline=None)
@given(order=st.permutations(range(NUM_GROUPS)), cuts=st.lists(st.integers(0, NUM_GROUPS), max_size=4))
def test_the_loss_adds_over_any_cut_into_micro_batches(name: str, order: list[int], cuts: list[int]) -> None:
    """Given what was prepared: any groups in any micro-batch, empty ones too; terms, metrics and units alike."""
    with precision(torch.float64):
        algorithm, prepared, numbers = whole(name)
        edges = [0, *sorted(cuts), NUM_GROUPS]
        parts = [order[first:last] for first, last in itertools.pairwise(edges)]
        found = [loss_of(algorithm, prepared, numbers, part) for part in parts]
        assert_equal(added(found), added([loss_of(algorithm, prepared, numbers, list(range(NUM_GROUPS)))]))
    units = [algorithm.units([prepared.groups[i] for i in part]) for part in parts]
    assert {unit: sum(u[unit] for u in units) for unit in units[0]} == algorithm.units(prepared.groups)


@each_from_rows
@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(NUM_GROUPS)))
def test_the_gradient_of_a_group_does_not_depend_on_its_row(name: str, order: list[int]) -> None:
    """The groups of a micro-batch in another order: the same loss, and the same gradient of each number."""
    with precision(torch.float64):
        algorithm, prepared, numbers = whole(name)
        gradients = []
        for positions in (list(range(NUM_GROUPS)), order):
            leaf = numbers.clone().requires_grad_()
            terms = loss_of(algorithm, prepared, leaf, positions).terms
            sum(terms.values(), torch.zeros(())).backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


@each_from_rows
def test_padding_does_not_reach_the_loss(name: str, tiny: Path) -> None:
    """A real forward of four groups, alone and in a batch that a long group makes twice as wide."""
    algorithm = algos.load(name)(**ALGORITHMS.get(name, {}))
    role = trained_role(algorithm)
    module = load.load_trained(role, resolve(str(tiny)), LoadOptions(device=CPU), None).eval()
    groups = random_groups(algorithm.data, 4)
    long = dataclasses.replace(groups[0], prompt=groups[0].prompt * 15)
    ((prepared, _),) = prepared_on(algorithm, groups, Drawn())
    found, widths = [], []
    for batch in (groups, [*groups, long]):
        inputs = rows(batch, CPU, ends=role == "reward")
        widths.append(inputs.ids.shape[1])
        with torch.no_grad():
            flat = module(inputs) if role in VALUE_ROLES else module(inputs, False)[0]
        count = sum(sizes(role, groups))
        found.append(added([loss_of(algorithm, prepared, flat[:count], list(range(4)))]))
    assert widths[1] >= 2 * widths[0]
    for mine, theirs in zip(*found, strict=True):
        assert all(mine[unit] == pytest.approx(theirs[unit], rel=1e-5, abs=1e-5) for unit in theirs)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one file, an algorithm that dsalign has never heard of."""
    (tmp_path / "algorithms").mkdir()
    (tmp_path / "algorithms" / "ipo.py").write_text(contract_cases.IPO)
    (tmp_path / "model").mkdir()
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
        assert options.of_algorithm(algos.load("ipo"))["tau"].help == "weight of the KL penalty, 1 / nat, > 0"
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
    assert str(caught.value) == f"dsalign.algos.ipo must define exactly one dataclass with roles, it has {count}"
