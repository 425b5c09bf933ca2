"""The generation view: it shares weights, has nothing else of the model's, and merges adapters into its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import rollout_cases
import torch
from peft import LoraConfig, TaskType, get_peft_model
from support import RankPool, quick_if, tiny_config
from transformers import LlamaForCausalLM

from dsalign.rollout.view import view_of

IDS = torch.tensor([[5, 6, 7, 8]])


def model() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return LlamaForCausalLM(tiny_config())


def with_adapter(**more: Any) -> Any:
    """A model with an adapter whose every part is random."""
    config = LoraConfig(r=4, lora_alpha=8, task_type=TaskType.CAUSAL_LM, **more)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        found = get_peft_model(model(), config)
        for name, parameter in found.named_parameters():
            if "lora_B" in name or "bias" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return found


def test_a_view_shares_its_weights_and_nothing_else() -> None:
    """Parameters are the same objects and tied ones stay one; hooks, mode and configuration are its own."""
    whole = model().train()
    whole.tie_weights()
    whole.model.layers[0].register_forward_hook(lambda *_: pytest.fail("a hook of the model ran"))
    whole.model.layers[1].mlp.forward = lambda x: pytest.fail("a forward that was put over one module ran")
    view = view_of(whole)
    assert [id(p) for p in view.parameters()] == [id(p) for p in whole.parameters()]
    view.config.use_cache = False
    view.set_attn_implementation("eager")
    assert whole.config.use_cache and whole.config._attn_implementation == "sdpa"
    assert whole.training and all(m.training for m in whole.modules()) and not any(m.training for m in view.modules())
    view(IDS)


def test_a_view_follows_weights_that_change_in_place() -> None:
    whole = model().eval()
    view = view_of(whole)
    with torch.no_grad():
        whole.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        assert torch.equal(view(IDS).logits, whole(IDS).logits)


@pytest.mark.parametrize(
    "more",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "lora_bias": True},
    ],
    ids=str,
)
def test_an_adapter_is_merged_into_weights_of_the_view(more: dict[str, Any]) -> None:
    """Logits with the adapter on, to rounding, and other than without it; the model's weights stay bit for bit."""
    tuned = with_adapter(**more).eval()
    before = {name: p.detach().clone() for name, p in tuned.named_parameters()}
    with torch.no_grad():
        want = tuned(IDS).logits
        view = view_of(tuned)
        torch.testing.assert_close(view(IDS).logits, want, rtol=0, atol=2e-5)
        assert "lora" not in str(view)
        with tuned.disable_adapter():
            assert float((tuned(IDS).logits - want).abs().max()) > 1e-2 or "modules_to_save" in more
        assert torch.equal(tuned(IDS).logits, want)
    assert all(torch.equal(before[name], p) for name, p in tuned.named_parameters())


@pytest.mark.parametrize(
    ("stage", "tuner"), [("0", "lora"), ("2", "full"), quick_if(False, "3", "full"), ("3", "lora")]
)
def test_a_rollout_leaves_no_trace(stage: str, tuner: str, tiny: Path, two_ranks: RankPool) -> None:
    assert two_ranks.run(rollout_cases.unchanged, tiny, stage, tuner)
