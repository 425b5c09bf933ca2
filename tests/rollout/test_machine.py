"""Rows by the memory that is free, and that nothing of a rollout is held when it ends."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from test_graphs import Recorder
from test_local import made, requests, same

from dsalign.contract.rollout_options import RolloutOptions
from dsalign.rollout import local, machine
from dsalign.rollout.graphs import capture_cuda
from dsalign.rollout.machine import Machine, free_on_cuda, rows_that_fit
from dsalign.rollout.slots import Slots
from dsalign.rollout.view import view_of

OPTIONS, ENDS = RolloutOptions(temperature=1.3), frozenset({2, 5})
ROW = 2 * 2 * 64 * 2 * 8 * 4  # bytes: layers, keys and values, tokens, heads, width, float32


def test_rows_by_hand(caplog: pytest.LogCaptureFixture) -> None:
    """Three quarters of 4,000 bytes hold 30 rows of 100 bytes, and 1 of 3,000; 20 are all that were asked for. One line
    says that they are fewer than asked."""
    machine.warn_once.cache_clear()
    assert rows_that_fit(20, 100, 4000, 7) == 20 and not caplog.records
    assert rows_that_fit(64, 100, 4000, 7) == 30
    assert rows_that_fit(64, 3000, 4000, 7) == 1
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "rollout: fewer completions run at a time than were asked for"
    ]


def test_one_row_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"4096 tokens .* 2.00 GiB .* 75% of 2.00 GiB .*; lower max_new_tokens or"):
        rows_that_fit(64, 2 * 2**30, 2 * 2**30, 4096)


def test_the_machine_of_a_device() -> None:
    """A CPU looks at every step and asks nobody for memory; a GPU every eighth, records steps and counts bytes."""
    assert Machine.of(torch.device("cpu")) == Machine(1024, 1, None, None, None)
    gpu = Machine.of(torch.device("cuda", 1))
    assert (gpu.read_every, gpu.capture, gpu.free) == (8, capture_cuda, free_on_cuda)
    assert gpu.give_back is torch.cuda.empty_cache


def test_what_pytorch_holds_unused_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 bytes of the device, and 300 of the 500 that PyTorch has reserved."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 200)
    assert free_on_cuda() == 1300


class Held:
    """Notes every tensor of slots that a rollout makes, without holding it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.tensors: list[Any] = []
        self.most_rows, self.lengths = 0, set()
        update = Slots.update

        def noted(slots: Slots, keys: Any, values: Any, layer: int, *more: Any, **named: Any) -> Any:
            new = layer not in slots.keys
            found = update(slots, keys, values, layer, *more, **named)
            if new:
                self.tensors += [weakref.ref(slots.keys[layer]), weakref.ref(slots.values[layer])]
                self.most_rows = max(self.most_rows, slots.rows)
                self.lengths.add(slots.length)
            return found

        patch.setattr(Slots, "update", noted)

    def alive(self) -> int:
        return sum(one() is not None for one in self.tensors)


@pytest.mark.parametrize(("rows", "fit"), [(64, 5), (64, 4), (2, 2)])
def test_rows_are_what_memory_holds(rows: int, fit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of at most 40 tokens takes 64 of them. All slots are as long from the start, the tokens are the same in any
    number of rows, and no key or value lives on when the rollout is over, though graphs held them, and no one looks for
    cycles."""
    model = made("llama")
    want = local.decode(view_of(model), requests(samples=1), OPTIONS, ENDS)
    held = Held(monkeypatch)
    asked = []

    def free() -> int:
        asked.append(held.alive())
        return int((fit + 0.5) * ROW / machine.SHARE)

    gc.disable()
    try:
        view = view_of(model)
        how = Machine(1024, 8, Recorder(view), free)
        found = local.decode(view, requests(samples=1), OPTIONS, ENDS, rows, how)
        assert held.alive() == 0 and len(held.tensors) == 2 * 2 * 2
    finally:
        gc.enable()
    same(found, want)
    assert held.most_rows == fit and held.lengths == {64} and len(asked) == 1


def test_slots_do_not_grow_behind_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 1 token and 63 more fill 64; the row ends two steps before the next look, and goes on in its slot."""
    lengths, reserve = [], Slots.reserve

    def noted(slots: Slots, length: int) -> None:
        reserve(slots, length)
        lengths.append(slots.length)

    monkeypatch.setattr(Slots, "reserve", noted)
    asked = requests(samples=1, most=[63] * 5)[1:2]
    ((found,),) = local.decode(view_of(made("llama")), asked, OPTIONS, frozenset(), 8, Machine(1024, 8))
    assert len(found.ids) == 63 and len(lengths) == 1 + 64 and set(lengths) == {64}


def test_a_rollout_that_does_not_fit_says_so() -> None:
    model = made("llama")
    with pytest.raises(ValueError, match=r"one completion, whose 37 tokens with its prompt .*lower max_new_tokens"):
        local.decode(view_of(model), requests(), OPTIONS, ENDS, 64, Machine(free=lambda: ROW))


@pytest.mark.parametrize(("large", "times"), [(5 * ROW, 1), (5 * ROW + 1, 0)])
@pytest.mark.parametrize("fails", [False, True])
def test_large_slots_go_back_to_the_device(
    large: int, times: int, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a rollout, when its five rows are gone, also where it fails half way."""
    monkeypatch.setattr(local, "LARGE", large)
    held, left = Held(monkeypatch), []
    how = Machine(give_back=lambda: left.append(held.alive()), free=lambda: 2**30)
    if fails:
        monkeypatch.setattr(local._Run, "_step", lambda run: 1 / 0)
    try:
        local.decode(view_of(made("llama")), requests(samples=1), OPTIONS, ENDS, 9, how)
        assert not fails
    except ZeroDivisionError:
        assert fails
    assert left == [0] * times
