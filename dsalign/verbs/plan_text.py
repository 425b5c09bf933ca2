"""The answer of `dsalign plan`, as text that begins with the answer, and as JSON."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dsalign.config.schema import RunConfig
from dsalign.memory.estimate import GIB, Estimate, Machine, Role
from dsalign.memory.shapes import Shape
from dsalign.verbs.lines import columns, natural

WIDTH = 118  # columns off a terminal
COUNTED = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


def gib(size: float) -> str:
    """Bytes as GiB, "" for none."""
    return "" if size == 0 else f"{size / GIB:.1f}" if size >= 0.05 * GIB else "<0.1"


def many(count: float) -> str:
    """A number of parameters, as 8.03B."""
    return next((f"{count / unit:.3g}{letter}" for unit, letter in COUNTED if count >= unit), str(int(count)))


@dataclass(frozen=True)
class Answer:
    """What `dsalign plan` found. tried: name of a DeepSpeed file -> its estimate; chosen: one of them; fits: whether
    that one fits; hints: options that would make it fit."""

    config: RunConfig
    machine: Machine
    shapes: Mapping[str, Shape]
    tried: Mapping[str, Estimate]
    chosen: Estimate
    fits: bool
    hints: Sequence[str]

    def first_line(self) -> str:
        """The answer in one line."""
        one, machine = self.chosen, self.machine
        where = f"{machine.gpus} x {machine.gpu_bytes / GIB:g} GiB"
        need = f"{one.peak / GIB:.1f} of {machine.usable / GIB:.1f} usable GiB a GPU, in the {one.when}"
        if self.fits:
            return f"fits: {one.deepspeed} on {where}, micro-batch {one.micro_batch} (estimated: {need})"
        if one.peak <= machine.usable:
            need = f"{one.cpu * machine.gpus / machine.nodes / GIB:.0f} GiB of a machine's memory"
        nearest = f"; nearest that fits: {self.hints[0]}" if self.hints else "; nothing that was tried fits"
        return f"does not fit: {one.deepspeed} on {where} needs {need} (estimated){nearest}"

    def text(self) -> str:
        """The whole answer: the first line, memory by role, the DeepSpeed files side by side, what was assumed."""
        out = io.StringIO()
        width = columns(WIDTH)
        console = Console(file=out, width=width, highlight=False, color_system=None)
        one = self.chosen
        console.print(self.first_line(), soft_wrap=True)
        for hint in self.hints[1:]:
            console.print(f"  or: {hint}", soft_wrap=True)
        console.print(f"\nGiB of one GPU with {one.deepspeed}, micro-batch {one.micro_batch} ({one.tokens:,} tokens)")
        console.print(fitting(self._roles(), width))
        console.print("\nthe DeepSpeed files, each with the largest micro-batch that fits")
        console.print(self._files())
        console.print("\n".join(["", *self._notes()]), soft_wrap=True)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def _roles(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for name in (
            "model",
            "",
            "params",
            "trained",
            "weights",
            "grads",
            "optimizer",
            "buffers",
            "activations",
            "head",
            "CPU",
        ):
            table.add_column(name, justify="left" if name in ("model", "") else "right", no_wrap=True)
        for role in self.chosen.roles:
            if not role.parameters:
                table.add_row(role.name, role.how)
                continue
            held, kept = role.held, role.kept + role.work if role.trained else role.forward
            sizes = (held.weights, held.gradients, held.optimizer, held.buffers, kept, role.head, held.cpu)
            table.add_row(
                role.name, role.how, _count(role), many(role.trained) if role.trained else "", *map(gib, sizes)
            )
        if self.chosen.cache:
            kinds = "keys, values" + (", own weights" if self.chosen.gathered else "")
            table.add_row("rollout", kinds, "", "", gib(self.chosen.gathered), "", "", gib(self.chosen.cache))
        return table

    def _files(self) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for name in ("--deepspeed", "fits", "micro-batch", "GiB a GPU", "of it states", "GiB of CPU a machine"):
            whole = name in ("--deepspeed", "fits", "micro-batch")
            left = name in ("--deepspeed", "fits")
            table.add_column(name, justify="left" if left else "right", no_wrap=whole, overflow="fold")
        table.add_column("sent a step and GPU, GiB", justify="right", overflow="fold")
        for name, one in self.tried.items():
            fits = one.fits(self.machine)
            states = sum(role.held.always for role in one.roles)
            cpu = one.cpu * self.machine.gpus / self.machine.nodes
            table.add_row(
                name, "yes" if fits else "no", str(one.micro_batch) if fits else "", gib(one.peak), gib(states),
                gib(cpu), gib(one.exchanged.total),
            )  # fmt: skip
        return table

    def _notes(self) -> list[str]:
        config = self.config
        lengths = f"--max_length {config.data.max_length}"
        lengths += f", --max_new_tokens {config.rollout.max_new_tokens}" if config.algorithm.traits.online else ""
        lines = [f"longest rows: {lengths}; {_tuned(config)}; {_precision(config)}"]
        sources = {role: shape.source for role, shape in self.shapes.items() if shape.source != "config.json"}
        lines += [f"{role}: sizes from {source}" for role, source in sources.items()]
        if any(role.name == "reward" and not role.parameters for role in self.chosen.roles):
            main = many(next(iter(self.shapes.values())).total)
            lines.append(f"reward: no --reward_model; one of {main} parameters would be a frozen model more")
        lines.append(
            "estimated by the formulas of docs/plan.md, not checked on a GPU; 2 GiB and 5 % of each GPU are left free; "
            "activations of a role count while it trains, so the columns do not add up to the peak"
        )
        return lines

    def as_json(self) -> dict[str, Any]:
        """The answer as a JSON object, sizes in bytes: {"fits", "deepspeed", "micro_batch", "answer", "hints", "tried":
        {file: {..., "roles": [...]}}, "models": {role: {"parameters", "active"}}}."""

        def one(found: Estimate) -> dict[str, Any]:
            plain = asdict(found)
            plain["roles"] = [{**asdict(role), "exchanged": _sent(role)} for role in found.roles]
            return {**plain, "fits": found.fits(self.machine), "sent": found.exchanged.total}

        return {
            "estimated": True,
            "fits": self.fits,
            "deepspeed": self.chosen.deepspeed,
            "micro_batch": self.chosen.micro_batch,
            "answer": self.first_line(),
            "hints": list(self.hints),
            "usable": self.machine.usable,
            "models": {role: {"parameters": s.total, "active": s.active} for role, s in self.shapes.items()},
            "tried": {name: one(found) for name, found in self.tried.items()},
        }


def _sent(role: Role) -> dict[str, float]:
    return {"gradients": role.exchanged.gradients, "weights": role.exchanged.weights}


def fitting(table: Table, width: int) -> Table:
    """The table, with rows for its columns where it is wider than `width` characters."""
    if natural(table) <= width:
        return table
    turned = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    first, *others = ([str(column.header), *map(str, column.cells)] for column in table.columns)
    for i, name in enumerate(first):
        turned.add_column(name, justify="right" if i else "left", no_wrap=not i, overflow="fold")
    for row in others:
        turned.add_row(*row)
    return turned


def _count(role: Role) -> str:
    active = "" if role.active == role.parameters else f" ({many(role.active)} active)"
    return f"{many(role.parameters)}{active}"


def _tuned(config: RunConfig) -> str:
    models = config.models
    how = f"LoRA of rank {models.lora_rank}" if models.tuner == "lora" else "all weights trained"
    how += " on weights in 4 bits" if models.load_in_4bit else ""
    return how + (", gradient checkpointing" if models.gradient_checkpointing else ", no gradient checkpointing")


def _precision(config: RunConfig) -> str:
    return "float32" if config.models.dtype == "float32" else "16 bits" if config.models.dtype != "auto" else "bfloat16"
