"""Every algorithm over real engines on two ranks: weights, gradients and losses against one plain process."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cases
import numpy as np
import pytest
import torch
from support import ALGORITHMS, VOCABULARY, RankPool, from_rows, quick_if, random_groups, stages_and_tuners, tiny_folder

from dsalign import algos
from dsalign.contract.algorithm import loss_of
from dsalign.contract.groups import Batch, Output
from dsalign.data.batches.loader import Loader
from dsalign.data.batches.packing import micro_batch, padded
from dsalign.models import load
from dsalign.models.names import resolve

STAGES = ("0", "1", "2", "3")
OFFLOADED = ("2_offload", "3_offload")


class PlainContext:
    """`prepare`'s context with two modules and no engine."""

    def __init__(self, policy: torch.nn.Module, reference: torch.nn.Module | None) -> None:
        self.models = {"policy": policy, "reference": reference}
        self.step, self.max_length, self.state = 0, 64, {}

    def logps(self, role: str, groups: Any) -> list[torch.Tensor]:
        return [forward(self.models[role], [g], "policy").logps.detach() for g in groups]

    def total(self, numbers: Any) -> Any:
        return numbers

    def gather(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers

    def warn(self, text: str) -> None:
        raise AssertionError(text)


def forward(module: Any, groups: Any, role: str) -> Output:
    """A plain forward over these groups, one row a completion."""
    inputs = padded(groups, torch.device("cpu"), ends=role == "reward")
    return Output.of(role, module(inputs)) if role == "reward" else Output.of(role, *module(inputs, True))


class Plain:
    """The same training without DeepSpeed, ranks or micro-batches: the whole global batch in one forward, plain SGD.
    dtype: of the weights; log-probabilities and values are float32 in either case."""

    def __init__(
        self, name: str, folder: Path, tuner: str, global_batch: int, num_rows: int, dtype: Any = torch.float32
    ) -> None:
        self.algorithm = algos.load(name)(**ALGORITHMS.get(name, {}))
        self.role = self.algorithm.traits.main
        source, options = resolve(str(folder)), cases.model_options(tuner)
        self.module = load.load_trained(
            self.role, source, options, device=torch.device("cpu"), dropout=False, seed=42
        ).to(dtype)
        reference = copy.deepcopy(self.module) if "reference" in self.algorithm.traits.roles else None
        self.ctx = PlainContext(self.module, reference)
        self.loader = Loader(
            random_groups(self.algorithm.traits.data, num_rows), global_batch=global_batch, seed=1, rank=0, world_size=1
        )

    def loss(self, step: int) -> torch.Tensor:
        """The loss of a global batch, all at once."""
        batch = self.loader.batch(step)
        prepared = self.algorithm.prepare(self.ctx, Batch(batch.groups, range(len(batch.groups))))
        micro = micro_batch(prepared.groups, torch.device("cpu"), prepared.fields, prepared.shared)
        out = forward(self.module, prepared.groups, self.role)
        loss = loss_of(self.algorithm, self.role, out, micro)
        units = self.algorithm.units(micro)
        return sum(term / units[unit] for unit, term in loss.terms.items())

    def gradient(self, step: int) -> tuple[float, dict[str, torch.Tensor]]:
        """(loss, {name: gradient}) at a global batch."""
        self.module.zero_grad()
        loss = self.loss(step)
        loss.backward()
        return float(loss), {n: p.grad.clone() for n, p in self.module.named_parameters() if p.requires_grad}

    def train(self, learning_rate: float) -> list[float]:
        """Plain SGD over the data set; the losses."""
        losses = []
        for step in range(self.loader.steps_per_epoch):
            loss, gradients = self.gradient(step)
            losses.append(loss)
            with torch.no_grad():
                for name, p in self.module.named_parameters():
                    if name in gradients:
                        p -= learning_rate * gradients[name]
        return losses


@pytest.fixture(scope="module")
def plain(tiny: Path) -> Mapping[tuple[str, str], tuple[list[float], dict[str, np.ndarray]]]:
    """(algorithm, tuner) -> losses and weights of three plain SGD steps over 21 rows in batches of 8."""
    found = {}
    for name in from_rows():
        for tuner in ("full", "lora"):
            run = Plain(name, tiny, tuner, 8, 21)
            losses = run.train(0.05)
            weights = {n: p.detach().numpy() for n, p in run.module.named_parameters() if p.requires_grad}
            found[name, tuner] = losses, weights
    return found


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def steps_of_engines() -> list[Any]:
    """DPO on every engine that keeps its optimizer; the others at ZeRO-0, KTO at 3 too, and slowly elsewhere, where the
    engine is what differs."""
    quick = {("dpo", stage) for stage in STAGES} | {("kto", "3")}
    return [
        quick_if(stage == "0" or (name, stage) in quick, name, stage, tuner)
        for name in from_rows()
        for stage in [*STAGES, *OFFLOADED]
        for tuner in ("full", "lora")
    ]


@pytest.mark.parametrize(("name", "stage", "tuner"), steps_of_engines())
def test_three_sgd_steps_equal_one_plain_process(
    name: str, stage: str, tuner: str, tiny: Path, two_ranks: RankPool, plain: Any
) -> None:
    """21 rows in batches of 8, 8 and 5 on two ranks with micro-batches of 3: the same weights to 1e-5."""
    weights, losses = two_ranks.run(cases.three_steps, name, tiny, stage, tuner)
    want_losses, want = plain[name, tuner]
    assert losses == pytest.approx(want_losses, rel=1e-6, abs=1e-5)
    frozen = {n for n in weights if name == "rm" and n.endswith("v_head.summary.bias")}  # a score has no bias
    assert weights.keys() - frozen == want.keys()
    assert all(np.abs(weights[n] - want[n]).max() < 1e-5 for n in want)
    assert not any(weights[n].any() for n in frozen)
    assert len(losses) == 3


@pytest.mark.parametrize("stage", [*STAGES, *(quick_if(False, stage) for stage in OFFLOADED)])
def test_tied_weights_step_alike(stage: str, tied: Path, one_rank: RankPool, two_ranks: RankPool) -> None:
    """Of a model whose embedding is its head; in a last step of one row, too, where rank 1 looks up no token."""
    run = Plain("dpo", tied, "full", 8, 21)
    want_losses = run.train(0.05)
    weights, losses = two_ranks.run(cases.three_steps, "dpo", tied, stage, "full")
    want = {n: p.detach().numpy() for n, p in run.module.named_parameters()}
    assert losses == pytest.approx(want_losses, rel=1e-6, abs=1e-5)
    assert weights.keys() == want.keys() and not any("lm_head" in n for n in want)
    assert all(np.abs(weights[n] - want[n]).max() < 1e-5 for n in want)
    alone, _ = one_rank.run(cases.short_second_step, "sft", tied, "0")
    found, _ = two_ranks.run(cases.short_second_step, "sft", tied, stage)
    assert all(np.abs(found[n] - alone[n]).max() < 1e-5 for n in alone)


ROW_OF_LOGITS = 4 * VOCABULARY  # bytes
CUTS = {  # ranks, groups or tokens a micro-batch, bytes for logits; the global batch is 8 groups of uneven lengths
    "1 rank 1x8": (1, 8, None, None),
    "1 rank 2x4": (1, 4, None, None),
    "1 rank 4x2": (1, 2, None, None),
    "1 rank 8x1": (1, 1, None, None),
    "1 rank uneven 3+3+2": (1, 3, None, None),
    "1 rank 40 tokens": (1, 1, 40, None),
    "2 ranks 1x4": (2, 1, None, None),
    "2 ranks uneven 3+1": (2, 3, None, None),
    "2 ranks 40 tokens": (2, 1, 40, None),
    "1 rank 1x8, loss a group": (1, 8, None, ROW_OF_LOGITS * 5),
    "2 ranks 1x4, loss a group": (2, 4, None, ROW_OF_LOGITS * 4),
    "1 rank 1x8, logits again": (1, 8, None, ROW_OF_LOGITS),
}


def stages_of_cuts() -> list[Any]:
    """Every kind of loss at ZeRO-0, SFT at ZeRO-3 too; the others slowly: CPO and SimPO sum over pairs as DPO does."""
    alike = {"cpo", "simpo"}
    return [
        quick_if((stage == "0" and name not in alike) or name == "sft", name, stage)
        for name in from_rows()
        for stage in ("0", "3")
    ]


@pytest.mark.parametrize(("name", "stage"), stages_of_cuts())
def test_gradient_does_not_depend_on_the_cut(
    name: str, stage: str, tiny: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    """One global batch, nine ways to cut it into packed rows and three to cut its logits: |difference| / |gradient| <=
    1e-6 among them, and 2e-6 against the gradient of padded rows with one completion each, in float64."""
    loss, exact = Plain(name, tiny, "full", 8, 24, torch.float64).gradient(0)
    exact_gradient = {n: g.double().numpy() for n, g in exact.items()}
    first: dict[str, Any] = {}
    for cut, (world, micro, tokens, head_bytes) in CUTS.items():
        pool = one_rank if world == 1 else two_ranks
        found_loss, found = pool.run(cases.gradient, name, tiny, stage, "full", micro, 8, False, tokens, head_bytes)
        first = first or found
        assert distance(found, first) <= 1e-6, cut
        assert distance(found, exact_gradient) <= 2e-6, cut
        assert found_loss == pytest.approx(loss, rel=1e-5), cut


def distance(found: Mapping[str, Any], want: Mapping[str, Any]) -> float:
    """|found - want| / |want| over all parameters."""
    size, gap = (
        sum(float((x**2).sum()) for x in each)
        for each in (
            [want[n].astype(np.float64) for n in want],
            [found[n].astype(np.float64) - want[n].astype(np.float64) for n in want],
        )
    )
    return float(np.sqrt(gap / size))


@pytest.mark.parametrize("stage", ["0", "3", "3_offload", "2_offload"])
def test_a_rank_that_starts_with_nothing_keeps_the_gradient_of_its_step(
    stage: str, tiny: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    """The silent trap: three groups in batches of 2 and 1; in the second step rank 1 has an empty micro-batch only. If
    that backward missed a parameter, ZeRO-3 and offload would step it with the gradient of the first step."""
    for name in ("sft", "rm"):
        want, _ = one_rank.run(cases.short_second_step, name, tiny, "0")
        found, steps = two_ranks.run(cases.short_second_step, name, tiny, stage)
        assert steps == 2
        assert all(np.abs(found[n] - want[n]).max() < 1e-5 for n in want)


@pytest.mark.parametrize("stage", ["3", "2_offload", "3_offload"])
def test_a_trained_parameter_without_gradient_is_refused(stage: str, tiny: Path, two_ranks: RankPool) -> None:
    """A parameter that the loss never touches is named instead of being stepped with stale gradients."""
    message = two_ranks.run(cases.untouched_parameter, tiny, stage)
    assert "1 trained parameters get no gradient from the loss (spare" in message
    assert "--deepspeed zero1" in message


@pytest.mark.parametrize("name", [quick_if(name == "sft", name) for name in from_rows()])
def test_gradient_checkpointing_changes_nothing(name: str, tiny: Path, two_ranks: RankPool) -> None:
    """The gradient with recomputed activations at ZeRO-3, and of DPO with LoRA too."""
    more = {"dpo": [("3", "lora", 2)]}
    for stage, tuner, micro in [("3", "full", 2), *more.get(name, [])]:
        plain_loss, want = two_ranks.run(cases.gradient, name, tiny, stage, tuner, micro, 8)
        loss, found = two_ranks.run(cases.gradient, name, tiny, stage, tuner, micro, 8, True)
        assert loss == pytest.approx(plain_loss, abs=1e-7)
        assert all(np.allclose(found[n], want[n], atol=1e-7) for n in want)


@pytest.mark.parametrize(("stage", "tuner"), stages_and_tuners(("0", "full")))
@pytest.mark.parametrize("name", from_rows())
def test_loss_falls_on_a_learnable_task(name: str, stage: str, tuner: str, tiny: Path, two_ranks: RankPool) -> None:
    """Good completions are the letter a, bad ones z: 30 AdamW steps on 2 ranks take a good part of the loss away."""
    first, last = two_ranks.run(cases.learn, name, tiny, stage, tuner)
    assert last < 0.8 * first, f"{first:.3f} -> {last:.3f}"


def test_two_trained_roles_several_passes_and_mini_batches(tiny: Path, one_rank: RankPool, two_ranks: RankPool) -> None:
    """7 and 4 groups, 2 passes of 3 mini-batches each: 12 optimizer steps that hold the same groups on one rank and on
    two, at ZeRO 0 and 3, so that policy and critic end with the same weights."""
    want, want_losses, names, progress = one_rank.run(cases.actor_critic, tiny, "0", 2)
    assert len(want_losses) == progress["step"] == 12 and progress["batches"] == 2
    assert names == ["grad_norm", "loss", "lr", "num_tokens", "value", "value/grad_norm", "value/lr"]
    for stage in ("0", "3"):
        weights, losses, *_ = two_ranks.run(cases.actor_critic, tiny, stage, 1)
        assert losses == pytest.approx(want_losses, rel=1e-6, abs=1e-5)
        for role in ("policy", "value"):
            assert all(np.abs(weights[role][n] - w).max() < 1e-5 for n, w in want[role].items()), (stage, role)


@pytest.mark.parametrize("max_steps", [1, 3, 4, 6, 11])
def test_max_steps_are_the_first_steps_of_the_run(max_steps: int, tiny: Path, one_rank: RankPool) -> None:
    """Within a pass, at its end, within the second batch: the run takes exactly so many, with the losses it would have
    had without."""
    _, want, _, _ = one_rank.run(cases.actor_critic, tiny, "0", 2)
    _, losses, _, progress = one_rank.run(cases.actor_critic, tiny, "0", 2, max_steps)
    assert len(losses) == progress["step"] == max_steps
    assert losses == want[:max_steps]


def test_more_steps_than_there_are(tiny: Path, one_rank: RankPool) -> None:
    """Twelve steps in two batches of six; 13 may be taken at most."""
    _, losses, _, progress = one_rank.run(cases.actor_critic, tiny, "0", 2, 13)
    assert len(losses) == progress["step"] == 12
