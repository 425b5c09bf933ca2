"""Groups on disk: what is written is read, and what is not whole is not taken for it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import random_groups

from dsalign.contract.groups import Group
from dsalign.data.rows.iterate import Skipped
from dsalign.data.tokens.encoder import Tally
from dsalign.data.tokens.group_store import IDS, INDEX, KNOWN, MANIFEST, GroupStore, Part, stored, write_store

TALLY = Tally(num_rows=9, truncated=1)
EVERYTHING = Group(
    0,
    "a.jsonl:1",
    (5, 0, 2**31 - 1),
    ((6, 7, 2), (8,)),
    "p\u00e9",
    label=False,
    margin=0.0,
    columns={"id": [1, {"a": None}]},
    turns=({"role": "user", "content": "x"},),
    masks=((True, False, True), (True,)),
)
NOTHING = Group(1, "a.jsonl:2", (4,), (), "")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Every field, also those that are false or empty; by index from either end, by slice, in a loop."""
    store = write_store([stored([EVERYTHING]), stored([NOTHING])], TALLY, Skipped(), tmp_path / "s")
    assert len(store) == 2
    assert [store[0], store[1]] == list(store) == store[:] == [EVERYTHING, NOTHING]
    assert store[-1] == NOTHING and store[1:] == [NOTHING]
    assert (store.counts.num_rows, store.counts.dropped, store.counts.truncated) == (9, {}, 1)
    assert list(GroupStore(tmp_path / "s")) == [EVERYTHING, NOTHING]
    with pytest.raises(IndexError, match=r"^group 2 of 2$"):
        store[2]


def test_what_json_does_not_have_becomes_text(tmp_path: Path) -> None:
    group = Group(0, "f:1", (4,), (), "", columns={"when": Path("x")})
    assert write_store([stored([group])], TALLY, Skipped(), tmp_path / "s")[0].columns == {"when": "x"}


IDS_ = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5).map(tuple)


@given(st.lists(st.tuples(IDS_, st.lists(IDS_, max_size=3).map(tuple), st.text(max_size=5)), min_size=1, max_size=5))
def test_any_groups_come_back(tmp_path_factory: pytest.TempPathFactory, parts: list[tuple]) -> None:  # type: ignore[type-arg]
    groups = [Group(i, f"f:{i}", prompt, answers, text) for i, (prompt, answers, text) in enumerate(parts)]
    folder = tmp_path_factory.mktemp("stores") / "s"
    assert list(write_store([stored(groups[:2]), stored(groups[2:])], TALLY, Skipped(), folder)) == groups


@pytest.mark.parametrize("name", [IDS, KNOWN, INDEX, MANIFEST])
@pytest.mark.parametrize("fault", ["gone", "cut", "flipped"])
def test_a_broken_store_is_refused(name: str, fault: str, tmp_path: Path) -> None:
    write_store([stored([EVERYTHING]), stored([NOTHING])], TALLY, Skipped(), tmp_path / "s")
    path = tmp_path / "s" / name
    content = bytearray(path.read_bytes())
    if fault == "gone":
        path.unlink()
    elif fault == "cut":
        path.write_bytes(content[:-1])
    else:
        content[0] ^= 1
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"/s: its files (cannot be read|are not those that were written)"):
        GroupStore(tmp_path / "s")


def test_files_of_another_form_are_refused(tmp_path: Path) -> None:
    write_store([stored([NOTHING])], TALLY, Skipped(), tmp_path / "s")
    manifest = json.loads((tmp_path / "s" / MANIFEST).read_text())
    (tmp_path / "s" / MANIFEST).write_text(json.dumps(manifest | {"format": 0}))
    with pytest.raises(ValueError, match="its files are not those that were written"):
        GroupStore(tmp_path / "s")


def test_a_run_that_is_stopped_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    """The second group never comes; the next run begins again."""

    def stopped():
        yield stored([EVERYTHING])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_store(stopped(), TALLY, Skipped(), tmp_path / "s")
    assert not (tmp_path / "s").exists()
    assert len(write_store([stored([EVERYTHING]), stored([NOTHING])], TALLY, Skipped(), tmp_path / "s")) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_groups_are_not_held(tmp_path: Path) -> None:
    """Writing and reading 3,000 groups takes less than a third of the memory of their token ids alone."""
    groups = random_groups("pairs", 3000, longest=300)
    tracemalloc.start()
    store = write_store((stored([group]) for group in groups), TALLY, Skipped(), tmp_path / "s")
    peak = tracemalloc.get_traced_memory()[1]
    assert sum(len(g.prompt) for g in store) == sum(len(g.prompt) for g in groups)
    assert max(peak, tracemalloc.get_traced_memory()[1]) < 3_000_000
    tracemalloc.stop()
    size = sum(8 * (len(g.prompt) + sum(map(len, g.completions))) for g in groups)
    assert size > 9_000_000


def test_a_part_is_looked_up() -> None:
    groups = random_groups("pairs", 5)
    part = Part(groups, [3, 1, 4])
    assert list(part) == [groups[3], groups[1], groups[4]] and len(part) == 3
    assert list(part[1:]) == [groups[1], groups[4]] and part[-1] == groups[4]
