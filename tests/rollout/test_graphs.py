"""Graphs of a decoding step, with recorded functions in place of CUDA graphs: the same tokens, one recording a bucket,
and no replay at addresses that have moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import quick_if, tiny_config
from test_local import MAKERS, made, requests, same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from dsalign.contract.rollout_options import RolloutOptions
from dsalign.rollout import graphs, local, plain, slots
from dsalign.rollout.graphs import Graphs, bucket, capture_cuda, obstacle
from dsalign.rollout.machine import Machine, warn_once
from dsalign.rollout.view import view_of
from dsalign_kernels import rows as kernel_rows

OPTIONS, ENDS = RolloutOptions(temperature=1.3), frozenset({2, 5})


class Frozen:
    """A step as a CUDA graph holds it: its replay computes in the memory that the tensors had when it was recorded."""

    def __init__(self, step: Any, weights: list[Tensor]) -> None:
        self.step, self.run = step, step.func.__self__
        self.weights = [(weight, weight.data) for weight in weights]
        self.cache = dict(self.run.slots.keys), dict(self.run.slots.values)

    def replay(self) -> None:
        now, held = [weight.data for weight, _ in self.weights], self.run.slots
        cache, (held.keys, held.values) = (held.keys, held.values), self.cache
        for weight, then in self.weights:
            weight.data = then
        self.step()
        for (weight, _), data in zip(self.weights, now, strict=True):
            weight.data = data
        held.keys, held.values = cache


class Recorder:
    """Records steps of a view; notes the bucket of each, and whether it had an earlier graph to share memory with."""

    def __init__(self, view: nn.Module) -> None:
        self.weights = [*view.parameters(), *view.buffers()]
        self.buckets: list[tuple[int, int]] = []
        self.beside: list[bool] = []

    def __call__(self, step: Any, beside: Any) -> Frozen:
        self.buckets.append(step.args)
        self.beside.append(beside is not None)
        return Frozen(step, self.weights)


def decoded(view: Any, rows: int = 64, *, most: Any = (5, 12, 19, 26, 33), **machine: Any) -> tuple[Any, Recorder]:
    """What `local` samples with recorded steps, and the recorder."""
    recorder = Recorder(view)
    how = Machine(1024, machine.pop("read_every", 8), recorder, **machine)
    return local.decode(local.prepare(view), requests(most=most), OPTIONS, ENDS, rows, how), recorder


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        quick_if((name, rows) in (("llama", 9), ("gemma2, windows and softcaps", 64)), name, rows)
        for name in MAKERS
        for rows in (64, 9, 2)
    ],
)
def test_graphs_change_no_token(name: str, rows: int) -> None:
    """15 completions in buckets of 8 and 15 rows, in 9 rows that are refilled, and in 2; flags are read every 8 steps,
    so rows go on after their end. Log-probabilities are within 1e-5 nats."""
    model = made(name)
    found, recorder = decoded(view_of(model), rows)
    same(found, plain.decode(model, requests(), OPTIONS, ENDS))
    assert recorder.buckets and {n for n, _ in recorder.buckets} <= {8, min(rows, 15)}


def test_a_bucket_is_recorded_once_and_its_shapes_are_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """All slots at once, 64 tokens long, so one bucket of tokens: 15 rows, then 8. Every pass has the rows of a bucket,
    of which those that do not run stay at the first token of their slots; the second graph shares the memory of the
    first."""
    compute, idle = local._Run._compute, []

    def noted(run: Any, n: int, live: int) -> None:
        compute(run, n, live)
        rest = slice(run.schedule.running, None)
        idle.append(len(run.every[:n]) - run.schedule.running)
        assert (run.start[rest] + run.count[rest] == 1).all() and run.ended[rest].all()

    monkeypatch.setattr(local._Run, "_compute", noted)
    view = view_of(made("llama"))
    sizes = []
    view.get_decoder().register_forward_pre_hook(
        lambda module, args, more: sizes.append(len(more["input_ids"])) if "shared_prefix" not in more else None,
        with_kwargs=True,
    )
    _, recorder = decoded(view, free=lambda: 2**30)
    assert recorder.buckets == [(15, 64), (8, 64)] and recorder.beside == [False, True]
    assert set(sizes) == {1, 8, 15} and sizes.count(1) == 1  # one token, which shows what a row takes
    assert max(idle) > 0


def test_slots_that_grow_drop_their_graphs() -> None:
    """From 64 to 128 tokens, each with graphs of its own; the tokens are plain's. A graph that was kept would write the
    token after the 64th outside the slots that it knows, which `Frozen` refuses."""
    model, most = made("llama"), [70] * 5
    found, recorder = decoded(view_of(model), 9, most=most)
    same(found, plain.decode(model, requests(most=most), OPTIONS, ENDS))
    assert {tokens for _, tokens in recorder.buckets} == {64, 128}


def moving(patch: pytest.MonkeyPatch, view: nn.Module) -> None:
    """Move every weight to another address once a graph has been recorded, and overwrite where it was."""
    retire, moved = local._Run._retire, []

    def then_move(run: Any) -> None:
        retire(run)
        if not moved and any(run.graphs._recorded.values()):
            for weight in view.parameters():
                old, weight.data = weight.data, weight.data.clone()
                moved.append(old.fill_(1.0))

    patch.setattr(local._Run, "_retire", then_move)


def test_weights_that_move_drop_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens although the weights move between two replays, as the bucket is recorded again. Without a look at
    the addresses the graph, now stale, samples others."""
    want = plain.decode(made("llama"), requests(), OPTIONS, ENDS)
    with monkeypatch.context() as patch:
        view = view_of(made("llama"))
        moving(patch, view)
        found, recorder = decoded(view, 8, free=lambda: 2**30)
        same(found, want)
        assert recorder.buckets == [(8, 64), (8, 64)]
    with monkeypatch.context() as patch:
        view = view_of(made("llama"))
        moving(patch, view)
        patch.setattr(graphs, "addresses", lambda tensors: [])
        found, recorder = decoded(view, 8, free=lambda: 2**30)
        assert recorder.buckets == [(8, 64)]
        assert [c.ids for a in found for c in a] != [c.ids for a in want for c in a]


class Calls:
    """Counts what `Graphs` does: steps computed as they are, recordings, replays."""

    def __init__(self) -> None:
        self.computed, self.recorded, self.replayed = 0, 0, 0

    def step(self) -> None:
        self.computed += 1

    def capture(self, step: Callable[[], None], beside: Any) -> Any:
        self.recorded += 1
        return self

    def replay(self) -> None:
        self.replayed += 1

    def now(self) -> tuple[int, int, int]:
        return self.computed, self.recorded, self.replayed


def place(address: int, *shape: int) -> Any:
    """A tensor as `Graphs` sees it."""
    return SimpleNamespace(data_ptr=lambda: address, shape=torch.Size(shape))


def test_an_address_or_a_shape_that_changes_drops_every_graph() -> None:
    """Computed, recorded and replayed, replayed; then anew, wherever the change is. Numbers may change in place."""
    calls, model = Calls(), nn.Linear(3, 2)
    held = Graphs(calls.capture, model)

    def three_times(*others: Any) -> tuple[int, int, int]:
        before = calls.now()
        for _ in range(3):
            held.run((8, 256), calls.step, others)
        return tuple(b - a for a, b in zip(before, calls.now(), strict=True))  # type: ignore[return-value]

    first, kept = (1, 1, 2), (0, 0, 3)
    assert three_times(place(1000, 4), place(2000, 4)) == first
    assert three_times(place(1000, 4), place(2000, 4)) == kept
    assert three_times(place(1000, 4), place(2064, 4)) == first  # slots that grew
    assert three_times(place(1000, 4), place(2064, 2, 2)) == first
    assert three_times(place(2064, 2, 2), place(1000, 4)) == first  # two that changed places
    assert three_times(place(2064, 2, 2)) == first
    model.weight.data.add_(1.0)
    assert three_times(place(2064, 2, 2)) == kept
    model.weight.data = model.weight.data.clone()
    assert three_times(place(2064, 2, 2)) == first
    old, model.weight = model.weight, nn.Parameter(model.weight.data.clone())
    assert three_times(place(2064, 2, 2)) == first
    old.data.zero_()
    model.register_buffer("scale", torch.ones(2))
    assert three_times(place(2064, 2, 2)) == first
    held.drop()
    assert three_times(place(2064, 2, 2)) == first


def test_each_bucket_has_a_graph_of_its_own() -> None:
    calls = Calls()
    held = Graphs(calls.capture, nn.Linear(3, 2))
    for which in ((8, 256), (16, 256), (8, 512), (8, 256), (16, 256)):
        held.run(which, calls.step, [])
    assert calls.now() == (3, 2, 2)


@pytest.mark.parametrize(
    ("number", "least", "most", "want"), [(1, 8, 64, 8), (8, 8, 64, 8), (9, 8, 64, 16), (33, 8, 40, 40), (3, 8, 5, 5)]
)
def test_buckets_by_hand(number: int, least: int, most: int, want: int) -> None:
    assert bucket(number, least, most) == want


class Watch(TorchDispatchMode):
    """Refuses what would make the host wait for the device, or give a shape that depends on numbers."""

    WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "isin", "equal", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        assert not name.startswith(self.WAITS), f"{name} waits for the device"
        flags = [x for part in args if isinstance(part, (list, tuple)) for x in part if isinstance(x, Tensor)]
        assert not (name.startswith("index") and any(x.dtype == torch.bool for x in flags)), "index by flags"
        return func(*args, **(kwargs or {}))


@contextmanager
def on_kernels() -> Iterator[None]:
    """Sampling and decode attention by their kernels, as on a GPU, in the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel_rows, "uses_triton", lambda impl, tensor: True)
        patch.setattr(slots, "uses_triton", lambda impl, tensor: True)
        yield


@pytest.mark.parametrize("name", [quick_if(name.startswith("gemma2"), name) for name in MAKERS])
def test_a_step_on_the_kernels_waits_for_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the kernels of a GPU, in the interpreter: the same tokens as transformers', and no step asks the device for
    a number. Windows, softcaps and shared heads go through `decode_attention`."""
    model = made(name)
    asked = requests(samples=1, most=(4, 2, 1, 1, 1))[:2]
    want = plain.decode(model, asked, OPTIONS, ENDS)
    compute = local._Run._compute

    def watched(run: Any, n: int, live: int) -> None:
        with Watch():
            compute(run, n, live)

    monkeypatch.setattr(local._Run, "_compute", watched)
    with Watch(), pytest.raises(AssertionError, match="waits for the device"):
        torch.ones(1).item()
    view = view_of(model)
    with on_kernels():
        same(local.decode(view, asked, OPTIONS, ENDS, 2, Machine(1024, 2, Recorder(view))), want)


def test_what_a_graph_cannot_hold() -> None:
    """A forward that branches on numbers, a loop over experts, dynamic rotary frequencies: each has its reason."""
    model = LlamaForCausalLM(tiny_config())
    assert obstacle(model) == "" and obstacle(made("gemma2, windows and softcaps")) == ""
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert obstacle(model) == "dynamic rotary frequencies depend on the longest row"
    model.config.rope_parameters = {"full_attention": {"rope_type": "dynamic"}}
    assert obstacle(model) == "dynamic rotary frequencies depend on the longest row"
    mixture = SimpleNamespace(get_text_config=lambda: SimpleNamespace(_experts_implementation="eager"))
    experts = SimpleNamespace(
        config=mixture, modules=list, _can_compile_fullgraph=True, _can_set_experts_implementation=lambda: True
    )
    assert obstacle(experts).startswith("experts_implementation is eager")
    model._can_compile_fullgraph = False
    assert obstacle(model) == "LlamaForCausalLM has a forward that depends on data"


def test_a_model_with_an_obstacle_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its rows are computed as they are, and one line says why."""
    warn_once.cache_clear()
    model = made("llama")
    view = view_of(model)
    monkeypatch.setattr(type(view), "_can_compile_fullgraph", False)
    want = plain.decode(model, requests(samples=1), OPTIONS, ENDS)
    for _ in range(2):
        recorder = Recorder(view)
        same(local.decode(view, requests(samples=1), OPTIONS, ENDS, 2, Machine(1024, 8, recorder)), want)
        assert not recorder.buckets
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.endswith("not recorded as CUDA graphs, as LlamaForCausalLM has a forward that depends on data")


def test_capture_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call of PyTorch, by a stand-in: the step runs inside, other threads may call CUDA, memory is shared with an
    earlier graph. A step that fails says what to do."""
    said: list[Any] = []

    class Graph:
        def pool(self) -> str:
            return "the pool"

    @contextmanager
    def graph(made: Any, pool: Any, capture_error_mode: str) -> Iterator[None]:
        said.append((pool, capture_error_mode))
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    first = capture_cuda(lambda: said.append("computed"), None)
    capture_cuda(lambda: None, first)
    assert said == [(None, "thread_local"), "computed", ("the pool", "thread_local")]

    def waits() -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match=r"waits for the GPU.*not permitted.*; use --rollout plain"):
        capture_cuda(waits, None)
