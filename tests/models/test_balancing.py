"""The balancing loss is the model's own, over the real tokens of a micro-batch, and it is in the training loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from experts import SHAPES, model_of
from run_cases import Run, build, fit
from support import RankPool, random_groups, tiny_config, tiny_tokenizer
from transformers import LlamaForCausalLM

from dsalign.data.batches.packing import padded
from dsalign.models.balancing import balancing_of
from dsalign.models.heads import CausalModel, ValueModel

GROUPS = random_groups("demonstrations", 3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("wrap", [CausalModel, lambda model: ValueModel(model, seed=0)])
def test_it_is_the_models_own_over_real_tokens(shape: str, wrap: Any) -> None:
    """Three rows of uneven lengths: transformers' own forward with an attention mask gives the same number."""
    model = model_of(shape)
    inputs = padded(GROUPS, torch.device("cpu"))
    assert inputs.real is not None
    lengths = [len(g.prompt) + len(g.completions[0]) for g in GROUPS]
    assert inputs.real.sum(1).tolist() == lengths
    assert len(set(lengths)) > 1
    want = model(input_ids=inputs.ids, attention_mask=inputs.real, output_router_logits=True).aux_loss
    wrapped = wrap(model).train()
    wrapped(inputs)
    torch.testing.assert_close(wrapped.balance, want, atol=1e-5, rtol=1e-5)
    assert wrapped.balancing.coefficient == 0.02
    routers = [p for name, p in model.named_parameters() if name.endswith((".gate.weight", ".router.weight"))]
    wrapped.balance.backward()
    assert len(routers) == 2
    assert all(float(p.grad.abs().max()) > 0 for p in routers)


def test_it_is_computed_in_training_alone() -> None:
    """Sampling, scoring and evaluation keep no router logits; a dense model has none."""
    wrapped, inputs = CausalModel(model_of("mixtral")), padded(GROUPS, torch.device("cpu"))
    wrapped.eval()(inputs)
    assert wrapped.balance is None
    with torch.no_grad():
        wrapped.train()(inputs)
    assert wrapped.balance is None
    assert balancing_of(LlamaForCausalLM(tiny_config())) is None
    quiet = model_of("mixtral")
    quiet.config.output_router_logits = False
    assert balancing_of(quiet) is None


def test_a_loss_that_is_not_known_is_said(caplog: pytest.LogCaptureFixture) -> None:
    dense = LlamaForCausalLM(tiny_config(output_router_logits=True, router_aux_loss_coef=0.1))
    assert balancing_of(dense) is None
    assert "LlamaForCausalLM asks for a balancing loss (output_router_logits) that is not known here" in caplog.text


def metrics_of(folder: Path, tuner: str) -> dict[str, float]:
    """The metrics of one step."""
    found: list[dict[str, float]] = []
    fit(build(Run("sft", folder, 2, tuner)), found.append, 1)
    return found[0]


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_the_term_is_in_the_loss(tuner: str, two_ranks: RankPool, tmp_path: Path) -> None:
    """loss = nll + 0.02 x aux_loss over two ranks with two micro-batches each; aux is near 2 or above."""
    model_of("mixtral").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found = two_ranks.run(metrics_of, tmp_path, tuner)
    assert found["loss"] == pytest.approx(found["nll_loss"] + 0.02 * found["aux_loss"], abs=1e-5)
    assert found["aux_loss"] > 1.5
