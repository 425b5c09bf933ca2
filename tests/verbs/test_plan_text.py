"""The words of `dsalign plan`."""

from __future__ import annotations

import pytest
from rich.table import Table

from dsalign.config.parse import parse
from dsalign.memory.estimate import GIB, Estimate, Machine
from dsalign.verbs.plan_text import Answer, fitting, gib, many


def test_sizes_in_words() -> None:
    assert [gib(x) for x in (0, 1e6, 0.05 * GIB, 1.25 * GIB)] == ["", "<0.1", "0.1", "1.2"]
    assert [many(x) for x in (999, 20_971_520, 8_030_261_248, 1.5e12)] == ["999", "21M", "8.03B", "1.5T"]


@pytest.mark.parametrize(
    ("fits", "peak", "cpu", "hints", "line"),
    [
        (True, 60.0, 0, [], "fits: zero2 on 8 x 80 GiB, micro-batch 4 (estimated: 60.0 of 74.0 usable GiB a GPU, in "
         "the rollout)"),
        (False, 90.0, 0, ["--tuner lora"], "does not fit: zero2 on 8 x 80 GiB needs 90.0 of 74.0 usable GiB a GPU, in "
         "the rollout (estimated); nearest that fits: --tuner lora"),
        (False, 60.0, 25, [], "does not fit: zero2 on 8 x 80 GiB needs 200 GiB of a machine's memory (estimated); "
         "nothing that was tried fits"),
    ],
)  # fmt: skip
def test_first_line(fits: bool, peak: float, cpu: float, hints: list[str], line: str) -> None:
    config = parse(["--algo", "sft"], world_size=8).config
    one = Estimate("zero2", 4, 8192, (), 0, 0, peak * GIB, "rollout", cpu * GIB)
    answer = Answer(config, Machine(8, 1, 80 * GIB, 100 * GIB), {}, {"zero2": one}, one, fits, hints)
    assert answer.first_line() == line


def test_a_table_that_is_too_wide_is_turned() -> None:
    table = Table("model", "weights", "gradients")
    table.add_row("policy", "1.0", "2.0")
    table.add_row("value", "3.0", "4.0")
    turned = fitting(table, 20)
    assert fitting(table, 80) is table
    assert [[column.header, *column.cells] for column in turned.columns] == [
        ["model", "weights", "gradients"], ["policy", "1.0", "2.0"], ["value", "3.0", "4.0"]
    ]  # fmt: skip
