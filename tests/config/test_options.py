"""Options: fields of sections and of algorithms, read from text, with their bounds and what refuses them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import made, problems, yaml_file

from dsalign import algos
from dsalign.config import flags, options
from dsalign.config.parse import ALIASES
from dsalign.config.schema import RUN_OPTIONS


def test_fields_of_an_algorithm_become_typed_options(duel: type[Any]) -> None:
    algorithm = made("--algo", "duel", "--kinds", "sword,bow", "--shares", "0.5", "1e-1", "--rounds", "none").algorithm
    assert algorithm == duel(kinds=("sword", "bow"), shares=(0.5, 0.1), rounds=None)
    assert made("--algo", "duel").algorithm.rounds == 3
    assert made("--algo", "duel").optim.learning_rate == 2.0


@pytest.mark.usefixtures("duel")
def test_what_an_algorithm_refuses_is_told_with_its_place(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "algo: duel\nshares: [1, 2]\n")
    assert problems("--config", file) == [f"{file}:2: shares: expected 1 numbers, got 2; one a kind"]
    assert problems("--algo", "duel", "--kinds", "gun") == ["duel: guns are not allowed in a duel"]
    assert problems("--algo", "duel", "--weight", "0") == [
        "--weight: expected greater than 0, got '0'; weight is: of the duel, > 0"
    ]


def test_no_option_of_an_algorithm_hides_one_of_the_run() -> None:
    taken = {*RUN_OPTIONS, *ALIASES, *flags.REQUESTS, "algorithm"}
    for name in algos.names():
        own = options.of_dataclass(algos.load(name))
        assert not taken & set(own), name
        assert not [option.name for option in own.values() if option.help.startswith("see ")], name
