"""eval/loss is the plain loss over the whole set, however it is cut, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from plain import plain_logps
from run_cases import Run, evaluated
from support import RankPool, random_groups
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

CASES = [("sft", 0, "full"), ("sft", 3, "lora"), ("dpo", 0, "full"), ("dpo", 3, "full"), ("dpo", 2, "lora")]


def sft_loss(groups: Any, policy: list[torch.Tensor], reference: list[torch.Tensor]) -> dict[str, float]:
    """Minus the mean log-probability of all completion tokens."""
    loss = -float(torch.cat(policy).mean())
    return {"eval/loss": loss, "eval/nll_loss": loss}


def dpo_loss(groups: Any, policy: list[torch.Tensor], reference: list[torch.Tensor]) -> dict[str, float]:
    """mean over pairs of -log sigmoid(0.1 h), plus the mean over all chosen tokens of -logp."""
    margins, chosen_tokens = [], []
    for group, p, r in zip(groups, policy, reference, strict=True):
        chosen, rejected = (p - r).split([len(c) for c in group.completions])
        margins.append(0.1 * (chosen.sum() - rejected.sum()))
        chosen_tokens.append(p[: len(group.completions[0])])
    nll = -float(torch.cat(chosen_tokens).mean())
    z = torch.stack(margins)
    return {
        "eval/loss": -float(logsigmoid(z).mean()) + nll,
        "eval/nll_loss": nll,
        "eval/rewards/margins": float(z.mean()),
        "eval/rewards/accuracies": float((z > 0).float().mean()),
    }


@pytest.mark.parametrize(("algo", "stage", "tuner"), CASES)
def test_seven_rows_in_global_batches_of_four_on_two_ranks(
    algo: str, stage: int, tuner: str, tiny: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    """Batches of 4 and 3: the mean of batch means would be another number. The weights are those after two steps."""
    groups = random_groups("pairs" if algo == "dpo" else "demonstrations", 7, seed=8)
    found = two_ranks.run(evaluated, Run(algo, tiny, stage, tuner), tmp_path, groups)
    base = AutoModelForCausalLM.from_pretrained(tiny)
    reference = plain_logps(base, groups)
    model = PeftModel.from_pretrained(base, tmp_path) if tuner == "lora" else base.from_pretrained(tmp_path)
    want = (sft_loss if algo == "sft" else dpo_loss)(groups, plain_logps(model, groups), reference)
    assert {name: found["metrics"][name] for name in want} == pytest.approx(want, abs=1e-5)
    assert all(name.startswith("eval/") for name in found["metrics"])
    assert found["modes"] == [True, True]  # training on stays on, off stays off
    assert found["state"]
    assert found["weights"]
    assert not found["gradients"]
