"""The kernels of whole losses give what the algorithms' own methods give: loss, gradient and every metric."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from support import ALGORITHMS, random_groups

from dsalign import algos
from dsalign.contract.groups import MicroBatch, Output
from dsalign.contract.importance import WEIGHTS
from dsalign.data.batches.packing import micro_batch
from dsalign.loop.loss import gae, scaled_loss

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SINGLE = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "apo_zero", "apo_down",
    "sigmoid_norm", "discopop",
)  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"dpo {name}": (
            "dpo",
            {"loss_type": (name,), "label_smoothing": 0.1 if name in ("sigmoid", "exo_pair", "robust") else 0.0},
        )
        for name in SINGLE
    },
    "dpo three and nll": (
        "dpo",
        {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0), "rpo_alpha": 0.0},
    ),
    "dpo sft alone": ("dpo", {"loss_type": ("sft",), "rpo_alpha": 0.0}),
    "dpo tail": ("dpo", {"ld_alpha": 0.5}),
    "dpo forward_kl": ("dpo", {"f_divergence_type": "forward_kl"}),
    "dpo js": ("dpo", {"f_divergence_type": "js"}),
    "dpo alpha": ("dpo", {"f_divergence_type": "alpha", "f_alpha_divergence_coef": 0.3}),
    "dpo alpha 1": ("dpo", {"f_divergence_type": "alpha"}),
    "cpo": ("cpo", {"label_smoothing": 0.1}),
    "cpo hinge": ("cpo", {"loss_type": "hinge", "cpo_alpha": 0.5}),
    "cpo ipo": ("cpo", {"loss_type": "ipo"}),
    "simpo": ("simpo", {"simpo_gamma": 0.5, "label_smoothing": 0.05}),
    "orpo": ("orpo", {}),
    "kto": ("kto", {"desirable_weight": 1.3, "undesirable_weight": 0.8}),
    "kto apo": ("kto", {"loss_type": "apo_zero_unpaired"}),
    "online_dpo": ("online_dpo", {"beta": 0.3}),
    "online_dpo ipo": ("online_dpo", {"loss_type": "ipo"}),
    "reinforce": ("reinforce", {"cliprange": 0.1}),
    "ppo": ("ppo", {"cliprange": 0.1, "cliprange_value": 0.1, "vf_coef": 0.3}),
}
UNITS = {"pairs": 0.25, "chosen_tokens": 0.01, "examples": 0.5, "tokens": 0.02}


def given(kind: str) -> tuple[MicroBatch, Output]:
    """Four groups with lengths that differ, numbers for every field, and a model's output."""
    draw = torch.Generator().manual_seed(3)
    groups = random_groups("pairs" if kind == "prompts" else kind, 4)
    sizes = [sum(g.lengths) for g in groups]

    def field(scale: float, shift: float = 0.0) -> list[torch.Tensor]:
        return [scale * torch.randn(n, generator=draw) + shift for n in sizes]

    old = field(0.5, -3.0)
    fields = {
        "reference": old, "old": old, "advantages": field(1.0), "returns": field(1.0), "values": field(1.0)
    }  # fmt: skip
    batch = micro_batch(groups, DEVICE, fields, {"z0": 0.2})
    logps = torch.cat(old) + 0.2 * torch.randn(sum(sizes), generator=draw)
    values = torch.randn(sum(sizes) + len(batch.lengths), generator=draw)
    entropy = torch.rand(sum(sizes), generator=draw)
    return batch, Output(logps=logps.to(DEVICE), entropy=entropy.to(DEVICE), values=values.to(DEVICE))


@pytest.mark.parametrize("name", CASES)
def test_as_the_file_says(name: str) -> None:
    """To float32's rounding; a kernel is asked for in every one of these cases, and a field "reference" is there for
    the algorithms that have none too."""
    algorithm_name, options = CASES[name]
    algorithm = algos.load(algorithm_name)(**options)
    batch, out = given(algorithm.traits.data)
    for role in algorithm.traits.trained:
        assert algorithm.fused(role, batch) is not None
        found = {}
        for impl in ("torch", "triton"):
            leaf = (out.values if role == "value" else out.logps).clone().requires_grad_()  # type: ignore[union-attr]
            one = Output(values=leaf) if role == "value" else Output(logps=leaf, entropy=out.entropy)
            loss, metrics = scaled_loss(algorithm, role, one, batch, UNITS, impl=impl)
            (gradient,) = torch.autograd.grad(2.0 * loss, leaf)
            numbers = {n: (float(total), float(count)) for n, (total, count) in metrics.items()}
            found[impl] = (float(loss.detach()), gradient, numbers)
        (loss_a, gradient_a, metrics_a), (loss_b, gradient_b, metrics_b) = found["torch"], found["triton"]
        assert loss_b == pytest.approx(loss_a, rel=2e-6, abs=2e-6)
        torch.testing.assert_close(gradient_b, gradient_a, rtol=1e-5, atol=1e-5 * float(gradient_a.abs().max()))
        assert set(metrics_a) == set(metrics_b)
        for key, value in metrics_a.items():
            assert metrics_b[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_importance_weights_reach_a_kernel_too(impl: Any) -> None:
    """The gradient of each token is multiplied by its weight; loss and metrics are those without, bit for bit."""
    batch, out = given("prompts")
    weights = torch.linspace(0.0, 2.0, len(batch.segment), device=DEVICE)
    found = []
    for one in (batch, replace(batch, fields={**batch.fields, WEIGHTS: weights})):
        leaf = out.logps.clone().requires_grad_()  # type: ignore[union-attr]
        loss, metrics = scaled_loss(algos.load("ppo")(), "policy", Output(logps=leaf), one, UNITS, impl=impl)
        numbers = {n: (float(total), float(count)) for n, (total, count) in metrics.items()}
        found.append((torch.autograd.grad(loss, leaf)[0], float(loss.detach()), numbers))
    assert float(found[0][0].abs().min()) == 0 < float(found[0][0].abs().max()), "some tokens are clipped"
    torch.testing.assert_close(found[1][0], weights * found[0][0], rtol=1e-6, atol=0)
    assert found[1][1:] == found[0][1:]


@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_groups(name: str) -> None:
    """An empty micro-batch has a loss of 0 and an empty gradient."""
    algorithm = algos.load(name)()
    names = ("reference", "old", "advantages", "returns", "values")
    batch = micro_batch([], DEVICE, {field: [] for field in names})
    for role in algorithm.traits.trained:
        leaf = torch.zeros(0, device=DEVICE, requires_grad=True)
        out = Output.of(role, leaf)
        loss, _ = scaled_loss(algorithm, role, out, batch, {}, impl="triton")
        assert float(loss.detach()) == 0.0


@pytest.mark.parametrize("name", ["cpo", "simpo", "orpo"])
def test_a_field_that_the_recipe_does_not_name(name: str) -> None:
    """A field "reference" beside the loss of an algorithm without one: not a bit of loss or gradient changes."""
    batch, out = given("pairs")
    assert out.logps is not None
    without = replace(batch, fields={key: x for key, x in batch.fields.items() if key != "reference"})
    found = []
    for one in (batch, without):
        leaf = out.logps.clone().requires_grad_()
        loss, _ = scaled_loss(algos.load(name)(), "policy", Output(logps=leaf), one, UNITS, impl="triton")
        found.append((float(loss.detach()), torch.autograd.grad(loss, leaf)[0].tolist()))
    assert found[0] == found[1]


@pytest.mark.parametrize(("name", "kind"), [("dpo", "pairs"), ("kto", "labels")])
def test_a_reference_that_is_not_there(name: str, kind: str) -> None:
    """An algorithm with a reference, whose field is missing: refused, not trained as if the reference were 0."""
    batch, out = given(kind)
    without = replace(batch, fields={})
    with pytest.raises(ValueError, match=r"reference: the recipe of \w+ subtracts the reference's .*got none; pass"):
        scaled_loss(algos.load(name)(), "policy", out, without, UNITS, impl="triton")


def test_what_no_kernel_does() -> None:
    """Losses that sort over the batch, and more than three, go the algorithm's own way."""
    batch, _ = given("pairs")
    dpo = algos.load("dpo")
    assert dpo(loss_type=("aot",)).fused("policy", batch) is None
    assert dpo(loss_type=("sigmoid", "hinge", "ipo", "robust")).fused("policy", batch) is None


def test_advantages_go_back_to_their_groups() -> None:
    """Two groups, of two completions and of one; gamma = lam = 1: A is the return less the value. And no group."""
    rewards, values = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0])], [torch.zeros(3), torch.tensor([1.0])]
    found = gae(rewards, values, [[2, 1], [1]], 1.0, 1.0, DEVICE)
    assert [x.tolist() for x in found] == [[3.0, 2.0, 3.0], [4.0]]
    assert gae([], [], [], 1.0, 1.0, DEVICE) == []
