"""What the ranks run for checkpoints, engines and evaluation: short trainings of a tiny model, and bare engines."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from support import ds_file, random_groups, section, tiny_tokenizer

from dsalign import algos, cpu
from dsalign.checkpoint import export as portable
from dsalign.checkpoint.checkpoints import Checkpoints
from dsalign.checkpoint.progress import Progress
from dsalign.config.schema import ModelOptions, OptimOptions, OutputOptions
from dsalign.contract.groups import Group
from dsalign.cpu.row_adam import RowSteps
from dsalign.data.batches.loader import Loader
from dsalign.engines import dist
from dsalign.engines import engine as engines
from dsalign.engines import self_check as selfcheck
from dsalign.engines.roles import Roles
from dsalign.loop.context import RunContext
from dsalign.loop.evaluate import evaluate
from dsalign.loop.metrics import Sums
from dsalign.loop.trainer import Trainer
from dsalign.models import attention, heads, load
from dsalign.models.names import resolve

CPU = torch.device("cpu")
BY_GROUP, WHOLE_LOGITS = attention._by_group, heads.CausalModel.whole_logits
SETTINGS = {"rm": {"center_rewards_coefficient": 0.1}}  # else the bias of the value head has no gradient
STEPS = 4  # of 4 rows; 8 rows, so an epoch ends in the middle


@dataclass(frozen=True)
class Run:
    """A short training: what the cases differ in."""

    algo: str
    folder: Path
    stage: int = 0
    tuner: str = "full"
    dtype: torch.dtype = torch.float32
    dropout: float = 0.0  # of LoRA


class Stop(Exception):
    """Ends a training in the middle."""


def optim(stage: int, **changes: Any) -> OptimOptions:
    """AdamW without clipping, everything sharded that the stage shards."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0} if stage == 3 else {"stage": stage}
    settings = {
        "deepspeed": ds_file({"zero_optimization": zero}),
        "batch_size": 2,
        "max_grad_norm": 0.0,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_ratio": 0.25,
    }
    return section(OptimOptions, **{**settings, **changes})


def build(run: Run) -> Trainer:
    """A trainer with a cosine schedule over `STEPS` steps."""
    algorithm = algos.load(run.algo)(**SETTINGS.get(run.algo, {}))
    dtype = str(run.dtype).removeprefix("torch.")
    options = section(ModelOptions, tuner=run.tuner, dtype=dtype, lora_rank=4, lora_alpha=8, lora_dropout=run.dropout)
    source, found = resolve(str(run.folder)), dict[str, Any]()
    for role, how in algorithm.traits.roles.items():
        if how == "train":
            module = load.load_trained(role, source, options, device=CPU, dropout=False, seed=42)
            found[role] = engines.trained(module, optim(run.stage), run.dtype)
        elif run.tuner == "full":
            module = load.load_frozen(role, source, options, device=CPU)
            found[role] = engines.frozen(module, optim(run.stage), run.dtype)
    models = Roles(found, CPU, 2)
    loader = Loader(
        random_groups(algorithm.traits.data, 8), global_batch=4, seed=1, rank=dist.rank(), world_size=dist.world_size()
    )
    progress = Progress(state={"seen": 3})
    ctx = RunContext(models, seed=1, max_length=64, state=progress.state, total_batches=STEPS)
    return Trainer(algorithm, models, ctx, loader, optim(run.stage), progress)


def train(run: Run, steps: int = 2) -> Trainer:
    """The trainer after so many steps."""
    trainer = build(run)
    fit(trainer, lambda metrics: None, steps)
    return trainer


def fit(trainer: Trainer, after_step: Callable[[dict[str, float]], None], steps: int) -> None:
    """Train until `steps` steps are done, with the schedule of all `STEPS`."""

    def watched(metrics: dict[str, float]) -> None:
        after_step(metrics)
        if trainer.progress.step == steps:
            raise Stop

    try:
        trainer.fit(watched)
    except Stop:
        return


def role_of(trainer: Trainer) -> str:
    return trainer.algorithm.traits.main


def weights(trainer: Trainer) -> dict[str, Any]:
    """Name -> whole trained weight, a float32 numpy array of its own, on rank 0."""
    state = portable.whole_state(trainer.roles.engines[role_of(trainer)], trained_only=True)
    return {name: tensor.float().numpy().copy() for name, tensor in state.items()}


def tokenizer() -> Any:
    """The tiny tokenizer with a chat template."""
    found = tiny_tokenizer()
    found.chat_template = "{{ messages[0]['content'] }}"
    return found


def exported(run: Run, out: Path, groups: Sequence[Group], pad: int = 0) -> list[Any]:
    """Two steps, an export to `out` with the tokenizer's pad token `pad`, and what the engine itself says about
    `groups`, one array a group."""
    trainer, own = train(run), tokenizer()
    own.pad_token = own.convert_ids_to_tokens(pad)
    portable.export(trainer.roles.engines[role_of(trainer)], out, own, str(run.folder))
    return [x.numpy() for x in trainer.roles.each_group(role_of(trainer), groups)]


def export_into_a_file(run: Run, file: Path) -> list[str]:
    """The message of each rank when the folder to write is a file."""
    trainer = build(run)
    try:
        portable.export(trainer.roles.engines[role_of(trainer)], file, tokenizer(), str(run.folder))
        message = ""
    except Exception as error:
        message = str(error)
    return _of_all_ranks(message)


def _of_all_ranks(thing: Any) -> list[Any]:
    found: list[Any] = [None] * dist.world_size()
    torch.distributed.all_gather_object(found, thing)
    return found


def store_of(trainer: Trainer, run: Run, output_dir: Path) -> Checkpoints:
    """The store of a trainer's engine."""
    role = role_of(trainer)
    return Checkpoints(
        section(OutputOptions, output_dir=str(output_dir)),
        {role: trainer.roles.engines[role]},
        tokenizer(),
        {role: str(run.folder)},
        {"seed": 1},
        adapters_only=run.tuner == "lora",
    )


def empty_store(output_dir: Path, keep: int = 2) -> Checkpoints:
    """A store of a run that trains nothing."""
    options = section(OutputOptions, output_dir=str(output_dir), save_total_limit=keep)
    return Checkpoints(options, {}, tiny_tokenizer(), {}, {}, adapters_only=False)


def saved_and_resumed(run: Run, output_dir: Path) -> list[tuple[list[float], dict[str, Any], dict[str, Any]]]:
    """(losses of steps 3 and 4, weights, progress) of a run of four steps that saved after two, and of one resumed. The
    save has its name only after the third step, when the weights are others."""
    torch.manual_seed(11 + dist.rank())
    results = []
    for resume in (False, True):
        trainer = build(run)
        store = store_of(trainer, run, output_dir)
        if resume:
            torch.manual_seed(99)
            random.seed(99)
            trainer.progress = store.load(output_dir / "checkpoint-2")
            trainer.ctx.state = trainer.progress.state
        losses: list[float] = []

        def after_step(
            metrics: dict[str, float], trainer: Any = trainer, losses: Any = losses, store: Any = store
        ) -> None:
            if trainer.progress.step > 2:
                losses.append(metrics["loss"])
                assert store.unsettled != (output_dir / "checkpoint-2").exists()
                store.settle()
            elif trainer.progress.step == 2:
                store.start(trainer.progress)

        trainer.fit(after_step)
        results.append((losses, weights(trainer), trainer.progress.as_dict()))
    return results


def never_saved(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """(weights, progress) after the four steps of `saved_and_resumed` without a checkpoint."""
    torch.manual_seed(11 + dist.rank())
    trainer = train(run, STEPS)
    return weights(trainer), trainer.progress.as_dict()


def rotation(output_dir: Path, keep: int, best: int | None) -> list[str]:
    """The names in the output folder after checkpoints at steps 2, 9, 10 and 11; nothing trained."""
    store = empty_store(output_dir, keep)
    for step in (2, 9, 10, 11):
        store.save(Progress(step=step, best_step=best))
    return sorted(p.name for p in output_dir.iterdir())


def save_over(output_dir: Path) -> tuple[list[str], float]:
    """(names in checkpoint-1, its best_loss) after a killed save's leftovers, and after the same step saved twice."""
    store = empty_store(output_dir)
    if dist.rank() == 0:
        (output_dir / ".staging-1").mkdir(parents=True)
        (output_dir / ".staging-1" / "left").touch()
    dist.barrier()
    store.save(Progress(step=1, best_loss=1.0))
    folder = store.save(Progress(step=1, best_loss=0.5))
    return sorted(p.name for p in folder.iterdir()), store.load(folder).best_loss or 0.0


def resumed_without_engines(run: Run, output_dir: Path) -> list[str]:
    """What each rank of a run with a policy says to a checkpoint that has none."""
    store = empty_store(output_dir)
    store.settings = {"seed": 1}
    folder = store.save(Progress(step=3))
    try:
        store_of(build(run), run, output_dir).load(folder)
    except ValueError as error:
        return _of_all_ranks(str(error))
    return []


def random_after_load(output_dir: Path) -> list[tuple[bool, bool]]:
    """Of each rank: whether torch and Python draw again what they drew after the save."""
    store = empty_store(output_dir)
    torch.manual_seed(dist.rank())
    random.seed(dist.rank())
    random.gauss(0, 1)
    folder = store.save(Progress(step=1))
    drawn = torch.rand(3), random.gauss(0, 1)
    store.load(folder)
    return _of_all_ranks((torch.equal(torch.rand(3), drawn[0]), random.gauss(0, 1) == drawn[1]))


def evaluated(run: Run, out: Path, groups: Sequence[Group]) -> dict[str, Any]:
    """Two steps, an export to `out`, then eval/loss over `groups` in global batches of 4, and what it left behind."""
    trainer = train(run)
    engine = trainer.roles.engines[role_of(trainer)]
    portable.export(engine, out, tokenizer(), str(run.folder))
    held_out = Loader(groups, global_batch=4, seed=1, rank=dist.rank(), world_size=dist.world_size(), shuffle=False)
    before = weights(trainer)
    state = trainer.ctx.state
    modes = []
    metrics = {}
    for training in (True, False):
        engine.module.train(training)
        metrics = evaluate(trainer.algorithm, trainer.roles, trainer.ctx, held_out)
        modes.append(all(m.training is training for m in engine.module.modules()))
    after = weights(trainer)
    return {
        "metrics": metrics,
        "modes": modes,
        "state": trainer.ctx.state is state and state == {"seen": 3},
        "weights": all((before[n] == after[n]).all() for n in before),
        "gradients": any(p.grad is not None and bool(p.grad.any()) for p in engine.module.parameters()),
    }


class Line(torch.nn.Module):
    """w . x + b over two inputs: with x = (3, 0) and (0, 4) on two ranks the mean gradient is (1.5, 2) and 1."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[1.0, -1.0]]))
            self.linear.bias.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def one_sgd_step(
    stage: int, max_grad_norm: float, dtype: torch.dtype = torch.float32, poison: bool = False
) -> tuple[float, list[float]]:
    """(norm, [w, w, b]) after a step of rate 1 of `Line`; poison: rank 1's input is NaN."""
    changes = {"optimizer": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "max_grad_norm": max_grad_norm}
    engine = engines.trained(Line(), optim(stage, **changes), dtype)
    x = torch.tensor([[3.0, 0.0]] if dist.rank() == 0 else [[0.0, float("nan") if poison else 4.0]])
    engine.set_gradient_accumulation_boundary(True)
    engine.backward(engine(x.to(dtype)).float().sum(), scale_wrt_gas=False)
    norm = engines.take_step(engine, max_grad_norm)
    state = portable.whole_state(engine, trained_only=True)
    return norm, [float(v) for t in state.values() for v in t.flatten()]


def optimizer_groups(optimizer: str) -> tuple[str, list[tuple[float, list[int]]]]:
    """(class, [(weight decay, dimensions of its parameters)]) of the optimizer of `Line`, and its rate set to 0.5."""
    engine = engines.trained(Line(), optim(0, optimizer=optimizer), torch.float32)
    engines.set_learning_rate(engine, 0.5)
    assert {g["lr"] for g in engine.optimizer.param_groups} == {0.5}
    groups = [(g["weight_decay"], sorted(p.dim() for p in g["params"])) for g in engine.optimizer.param_groups]
    return type(engine.optimizer).__name__, groups


def one_step(run: Run) -> tuple[float, float, bool, list[str]]:
    """(loss, gradient norm, whether every weight is finite and some moved, dtypes of the buffers) of one step."""
    trainer = build(run)
    before = weights(trainer)
    found: list[dict[str, float]] = []
    fit(trainer, found.append, 1)
    after = weights(trainer)
    moved = any((before[n] != after[n]).any() for n in before)
    buffers = trainer.roles.engines[role_of(trainer)].module.buffers()
    finite = all(np.isfinite(x).all() for x in after.values())
    return found[0]["loss"], found[0]["grad_norm"], moved and finite, sorted({str(b.dtype) for b in buffers})


def sums_over_ranks() -> dict[str, float]:
    """Means of sums and counts that differ by rank."""
    sums, rank = Sums(), dist.rank()
    sums.add({"mixed": (torch.tensor(1.0 + rank), 2), "never": (0.0, 0), "here": (5.0, 1) if rank else (0.0, 0)})
    sums.add({"mixed": (3.0, torch.tensor(1))})
    return sums.reduced(CPU)


def large_and_small() -> dict[str, float]:
    """The mean of 2**24 + 1, added up in two float32 tensors on each rank."""
    sums = Sums()
    for number, count in ((2.0**24, 1), (1.0, 0)):
        sums.add({"large": (torch.tensor(number), count)})
    return sums.reduced(CPU)


def leaking(query: Any, key: Any, value: Any, *more: Any) -> Any:
    """Attention over a packed row as if it were one sequence."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def asking(query: Any, key: Any, value: Any, prefix: attention.SharedPrefix, *more: Any) -> Any:
    """The right attention, in a layer that wanted attention sinks too."""
    prefix.unsupported = "s_aux"
    return BY_GROUP(query, key, value, prefix, *more)


def doubled(model: heads.CausalModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits that the model scales where dsalign does not know of it."""
    return 2 * WHOLE_LOGITS(model, ids)


def self_checked(folder: Path, fault: str) -> Any:
    """({role: whether it packs}, the warnings) of the start-up check of a policy and a critic at ZeRO 3, or the message
    it ends with. fault: "leak" lets groups see each other, "sinks" is a layer that asks for more than attention,
    "scale" a model whose logits are not what its head gives."""
    options, source = section(ModelOptions, tuner="full"), resolve(str(folder))
    modules = {
        role: load.load_trained(role, source, options, device=CPU, dropout=False, seed=42)
        for role in ("policy", "value")
    }
    models = Roles({role: engines.trained(m, optim(3), torch.float32) for role, m in modules.items()}, CPU, 2)
    lines: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(selfcheck.logger, "warning", lambda text, *a: lines.append(text % a)))
        if fault == "leak":
            stack.enter_context(mock.patch.object(attention, "_by_group", leaking))
        if fault == "sinks":
            stack.enter_context(mock.patch.object(attention, "_by_group", asking))
        if fault == "scale":
            own = heads.CausalModel.whole_logits
            stack.enter_context(
                mock.patch.object(heads.CausalModel, "whole_logits", lambda self, ids: 2 * own(self, ids))
            )
        try:
            selfcheck.self_check(models, random_groups("pairs", 8))
        except ValueError as error:
            return str(error)
    return {role: m.shares for role, m in modules.items()}, lines


def stepped_by_rows(run: Run, able: bool) -> tuple[int, dict[str, Any]]:
    """(how often an embedding was stepped by its rows, weights) in three steps whose gradients are clipped; able: else
    as if no embedding were looked up alone."""
    with ExitStack() as stack:
        step = mock.patch.object(RowSteps, "_step", autospec=True, side_effect=RowSteps._step)
        stepped = stack.enter_context(step)
        if not able:
            stack.enter_context(mock.patch.object(cpu, "step_by_rows"))
        trainer = build(run)
        trainer.options = trainer.options.model_copy(update={"max_grad_norm": 0.1})
        fit(trainer, lambda metrics: None, 3)
        return stepped.call_count, weights(trainer)
