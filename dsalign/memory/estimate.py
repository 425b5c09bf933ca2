"""The memory of a run, by role and in all, from its configuration and the shapes of its models; and what fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dsalign.config import ds_files
from dsalign.config.schema import RunConfig
from dsalign.memory import activations, states
from dsalign.memory.activations import Tuning
from dsalign.memory.shapes import Shape
from dsalign.memory.states import Exchanged, Held, Sizes, Zero

GIB = 2**30
RESERVE = 2 * GIB  # the CUDA context, NCCL and the libraries' work spaces: assumed, not measured
SPARE = 0.05  # share of a GPU that an allocator in pieces cannot give: assumed, not measured
HEADS = ("reward", "value")  # roles with a value head, which has no logits
# In this order a run is the faster, the less its ranks exchange and the less waits for the machine's memory.
CONFIGS = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
MOST = 64  # groups in a micro-batch that are tried
PREFILL = 16384  # prompt tokens of one forward of a rollout on a GPU

NOTHING, SILENT = Held(), Exchanged(0.0, 0.0)


@dataclass(frozen=True)
class Machine:
    """The GPUs of a run. gpus: all of them; nodes: machines; gpu_bytes: memory of one. cpu_bytes: memory of a machine,
    None = not asked."""

    gpus: int
    nodes: int
    gpu_bytes: float
    cpu_bytes: float | None = None

    @property
    def usable(self) -> float:
        """The bytes of a GPU that a run may fill."""
        return self.gpu_bytes * (1 - SPARE) - RESERVE


@dataclass(frozen=True)
class Role:
    """One role of a run, bytes of one GPU. how: trained, frozen, or why it takes nothing. held: its engine's. kept:
    activations of a micro-batch, head: of its head, work: what a backward works in. active: parameters a token uses."""

    name: str
    how: str
    parameters: int = 0
    active: int = 0
    trained: int = 0
    held: Held = NOTHING
    kept: float = 0.0
    head: float = 0.0
    work: float = 0.0
    forward: float = 0.0
    exchanged: Exchanged = SILENT

    @property
    def passing(self) -> float:
        """The bytes in use beside the engine's own in a training pass, or in a forward of a frozen one."""
        return self.kept + self.head + self.work if self.trained else self.forward


@dataclass(frozen=True)
class Estimate:
    """A run under one DeepSpeed file. rollout: cache of keys and values, and weights that the rollout alone has.
    tokens: of a packed micro-batch of `micro_batch` groups. peak: bytes of a GPU; when: the phase that it is in."""

    deepspeed: str
    micro_batch: int
    tokens: int
    roles: tuple[Role, ...]
    cache: float
    gathered: float
    peak: float
    when: str
    cpu: float

    def fits(self, machine: Machine) -> bool:
        """Whether the GPU, and the machine's memory where it is known, hold it."""
        here = machine.gpus / machine.nodes * self.cpu
        return self.peak <= machine.usable and (machine.cpu_bytes is None or here <= machine.cpu_bytes)

    @property
    def exchanged(self) -> Exchanged:
        """What one GPU sends in an optimizer step, of all roles."""
        each = [role.exchanged for role in self.roles]
        return Exchanged(sum(one.gradients for one in each), sum(one.weights for one in each))


def group_tokens(config: RunConfig, prompt: int) -> tuple[int, int, int]:
    """(tokens of the longest group as a packed row, tokens that it predicts, completions), for rows of max_length
    tokens whose prompt has `prompt` of them; of a sampled group the completions have max_new_tokens."""
    traits, longest = config.algorithm.traits, config.data.max_length
    if not traits.online:
        count = 2 if traits.data == "pairs" else 1
        answer = max(1, longest - prompt)
        return prompt + count * answer, count * answer, count
    count = int(getattr(config.algorithm, "num_generations", 1))
    answer = min(config.rollout.max_new_tokens, max(1, longest - 1))
    return longest - answer + count * answer, count * answer, count


def estimate(
    config: RunConfig,
    shapes: Mapping[str, Shape],
    machine: Machine,
    deepspeed: str,
    *,
    micro_batch: int,
    prompt: int = 0,
) -> Estimate:
    """The memory of a run under a DeepSpeed file (a name or a path). shapes: of each role's model. micro_batch: groups
    in one of training. prompt: tokens of the longest row's prompt, see `group_tokens`."""
    zero = Zero.of(ds_files.settings(deepspeed))
    tokens, predicted, _ = (micro_batch * n for n in group_tokens(config, prompt))
    if config.optim.max_tokens is not None:
        share = max(1.0, config.optim.max_tokens / tokens) if tokens < config.optim.max_tokens else 1.0
        tokens, predicted = int(tokens * share), int(predicted * share)
    run = _Run(config, machine, zero, micro_batch, tokens, predicted)
    roles = tuple(run.role(name, shapes.get(name)) for name in config.algorithm.traits.roles)
    return run.whole(deepspeed, roles, shapes)


@dataclass(frozen=True)
class _Run:
    config: RunConfig
    machine: Machine
    zero: Zero
    micro_batch: int
    tokens: int
    predicted: int

    @property
    def item(self) -> int:
        return 4 if self.config.models.dtype == "float32" else 2

    @property
    def tuning(self) -> Tuning:
        m = self.config.models
        rank = m.lora_rank if m.tuner == "lora" else 0
        return Tuning(rank, m.lora_target_modules, m.lora_dropout > 0, m.gradient_checkpointing, self.item)

    def role(self, name: str, shape: Shape | None) -> Role:
        """One role; with `shape` None it has no model of its own."""
        models, traits = self.config.models, self.config.algorithm.traits
        if shape is None:
            return Role(name, "functions, no model")
        if name == "reference" and models.tuner == "lora" and not models.ref_model:
            return Role(name, "policy, adapter off")
        if name == "reference" and not traits.online and models.ref_cache != "off" and name not in traits.trained:
            return Role(name, "cached on disk")
        value = name in HEADS
        extra = shape.width + 1 if value else 0
        trains = name in traits.trained
        sizes = self._sizes(shape, extra, trains=trains, value=value)
        held = states.held(self.zero, sizes, self.machine.gpus)
        forwards = self._forwards(name)
        sent = states.exchanged(
            self.zero, sizes, self.machine.gpus, micro_batches=self._micro_batches(), forwards=forwards
        )
        forward = activations.forward_bytes(
            shape, self.item, self._forward_tokens(), adapted=trains and self.tuning.rank > 0
        )
        role = Role(
            name, "trained" if trains else "frozen", shape.total + extra, shape.active + extra, sizes.trained, held,
            forward=forward, exchanged=sent,
        )  # fmt: skip
        if not trains:
            return role
        unpacked = shape.unpacked * self.item if sizes.packed else 0.0
        role = replace(role, forward=forward + unpacked)
        kept = activations.training_bytes(shape, self.tuning, self.tokens)
        work = activations.backward_bytes(shape, self.tuning, self.tokens) + unpacked
        return replace(role, kept=kept, work=work, head=0.0 if value else self._head(shape))

    def _sizes(self, shape: Shape, extra: int, *, trains: bool, value: bool) -> Sizes:
        total, moments = shape.total, 0 if self.config.optim.optimizer == "sgd" else 2
        if not trains:
            return Sizes(0, total + extra, shape.largest, 0, self.item)
        if self.tuning.rank:
            adapter = shape.lora(self.tuning.rank, self.tuning.words)
            widest = max(max(one.inputs, one.outputs) * one.copies for kind, _ in shape.layers for one in kind.linears)
            packed = shape.packed if self.config.models.load_in_4bit else 0
            return Sizes(adapter + extra, total, shape.largest, self.tuning.rank * widest, self.item, moments, packed)
        still = shape.head if value else 0  # the head of a value model is neither run nor trained
        return Sizes(total - still + extra, still, shape.largest, shape.largest, self.item, moments)

    def _head(self, shape: Shape) -> float:
        part = self.predicted // self.micro_batch
        return activations.head_bytes(
            shape, self.predicted, self.item, gradient=True, trained=self.tuning.rank == 0,
            most=self.config.models.head_memory, part=part,
        )  # fmt: skip

    def _micro_batches(self) -> int:
        """Micro-batches of one optimizer step on one GPU: the global batch is what the configuration says."""
        wanted = self.config.optim.batch_size * self.config.optim.gradient_accumulation_steps
        return max(1, -(-wanted // self.micro_batch))

    def _forward_tokens(self) -> int:
        """Tokens of one forward without gradient: with sampling local_rollout_forward_batch_size completions."""
        rollout = self.config.rollout
        if not self.config.algorithm.traits.online:
            return self.tokens
        whole, _, completions = group_tokens(self.config, 0)
        return max(1, rollout.local_rollout_forward_batch_size // completions) * whole

    def _forwards(self, name: str) -> float:
        """Forward passes without gradient of a role in one optimizer step."""
        traits = self.config.algorithm.traits
        groups = self.config.optim.batch_size * self.config.optim.gradient_accumulation_steps
        if not traits.online:
            return float(self._micro_batches()) if traits.roles[name] == "frozen" else 0.0
        _, _, completions = group_tokens(self.config, 0)
        together = max(1, self.config.rollout.local_rollout_forward_batch_size // completions)
        passes = -(-groups * traits.mini_batches // together) + (1 if name == "policy" else 0)
        return float(passes / traits.passes)

    def whole(self, deepspeed: str, roles: tuple[Role, ...], shapes: Mapping[str, Shape]) -> Estimate:
        """The sum over the roles, and the phase that needs most."""
        always = sum(role.held.always for role in roles)
        phases = {f"training of the {role.name}": role.held.buffers + role.passing for role in roles if role.trained}
        phases |= {f"forward of the {role.name}": role.held.buffers + role.forward for role in roles if role.parameters}
        phases |= {f"step of the {role.name}": role.held.step + role.held.buffers for role in roles if role.trained}
        cache = gathered = 0.0
        if self.config.algorithm.traits.online:
            cache, gathered, work = self._rollout(shapes[roles[0].name], self.machine.usable - always)
            phases["rollout"] = cache + gathered + work
        rest = sum(role.held.buffers for role in roles)
        when = max(phases, key=lambda name: phases[name])
        # Buckets and gathered weights of stage 3 stay where they were made, whichever engine runs.
        own = next((role.held.buffers for role in roles if when.endswith(f" {role.name}")), 0.0)
        kept = rest - own if states.Zero.of(ds_files.settings(deepspeed)).stage == 3 else 0.0
        peak = always + phases[when] + kept
        cpu = sum(role.held.cpu for role in roles)
        return Estimate(deepspeed, self.micro_batch, self.tokens, roles, cache, gathered, peak, when, cpu)

    def _rollout(self, shape: Shape, free: float) -> tuple[float, float, float]:
        """(cache of keys and values, weights of the rollout's own, work space): completions that run at a time, the
        weights that stage 3 gathers, whole or a layer at a time, with LoRA a second copy of the layers into which the
        adapter is merged, and of layers in 4 bits an unpacked one. free: bytes beside what is held always."""
        rollout = self.config.rollout
        if rollout.rollout == "vllm" and rollout.vllm_server:
            return 0.0, 0.0, 0.0
        _, _, completions = group_tokens(self.config, 0)
        groups = self.config.optim.batch_size * self.config.optim.gradient_accumulation_steps
        groups *= self.config.algorithm.traits.mini_batches
        rows = min(rollout.local_rollout_forward_batch_size, groups * completions)
        cache = activations.cache_bytes(shape, rows, self.config.data.max_length, self.item)
        packed, merged, largest, layers = self.config.models.load_in_4bit, 0.0, 0.0, 0.0
        for kind, count in shape.layers:
            twice = sum(x.size for x in kind.linears if self.tuning.adapted(x) or (packed and x.plain))
            merged, layers = merged + count * twice, layers + count * kind.size
            largest = max(largest, kind.size + twice)
        if self.zero.stage < 3:
            return cache, merged * self.item, activations.forward_bytes(shape, self.item, PREFILL)
        gathered = (shape.total + merged) * self.item
        how = rollout.rollout_gather
        if how == "layers" or (how == "auto" and gathered > rollout.GATHERED * free):
            gathered = (shape.total - layers + largest) * self.item
        return cache, gathered, activations.forward_bytes(shape, self.item, PREFILL)


def largest_micro_batch(
    config: RunConfig, shapes: Mapping[str, Shape], machine: Machine, deepspeed: str, *, prompt: int = 0
) -> Estimate:
    """The estimate of the largest micro-batch that fits, of at most MOST groups; of one group where not even that
    fits."""
    found = estimate(config, shapes, machine, deepspeed, micro_batch=1, prompt=prompt)
    low, high = 1, MOST
    while found.fits(machine) and low < high:
        middle = (low + high + 1) // 2
        tried = estimate(config, shapes, machine, deepspeed, micro_batch=middle, prompt=prompt)
        if tried.fits(machine):
            found, low = tried, middle
        else:
            high = middle - 1
    return found


def best(tried: Mapping[str, Estimate], machine: Machine) -> Estimate | None:
    """The first of CONFIGS that fits, or None; one with half the micro-batch of a later one that leaves nothing on the
    CPU gives way to it. zero1 is left out where zero2, which is as fast with one micro-batch a step, fits too."""
    fitting = [tried[name] for name in CONFIGS if name in tried and tried[name].fits(machine)]
    fitting = [one for one in fitting if one.deepspeed != "zero1"] or fitting
    if not fitting:
        return None
    first = fitting[0]
    same = [one for one in fitting if (one.cpu > 0) == (first.cpu > 0)]
    return next((one for one in same[1:] if one.micro_batch >= 4 * first.micro_batch), first)


def changed(config: RunConfig, **models: Any) -> RunConfig:
    """The configuration with other options of its models."""
    return config.model_copy(update={"models": config.models.model_copy(update=models)})
