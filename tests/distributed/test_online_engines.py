"""Online algorithms over real engines on two ranks: rollouts, gradients of recorded rollouts, a reward that rises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import online_cases
import pytest
import torch
from peft import PeftModel
from support import RankPool, quick_if, stages_and_tuners, tiny_tokenizer
from transformers import AutoModelForCausalLM

from dsalign import algos

ONLINE = tuple(name for name in algos.names() if algos.load(name)().traits.online)


@pytest.mark.parametrize("name", [quick_if(name in ("ppo", "online_dpo"), name) for name in ONLINE])
@pytest.mark.parametrize(("stage", "tuner"), stages_and_tuners(("0", "full")))
def test_the_reward_rises(name: str, stage: str, tuner: str, tiny: Path, two_ranks: RankPool) -> None:
    """A third of the tokens is rewarded; after 12 rollouts of 16 prompts they are well above a third. At the start
    the policy is the reference: the KL is 0 and the first ratio 1, and the sampler agrees with the trainer."""
    scores, first, samples = two_ranks.run(online_cases.learn, name, tiny, stage, tuner)
    assert np.mean(scores[-3:]) > np.mean(scores[:3]) + 0.15, scores
    assert first["rollout/logp_gap"] < 1e-5
    if "val/ratio" in first:
        assert abs(first["objective/kl"]) < 1e-5
        assert first["val/ratio"] == pytest.approx(1, abs=1e-5)
        assert first["policy/approxkl_avg"] < 1e-9 and first["policy/clipfrac_avg"] == 0
    else:  # online DPO, whose pairs have no ratio
        assert abs(first["rewards/margins"]) < 1e-5
    assert samples == 2 * 4, "two times in the run, four samples of rank 0"


def cut_cases() -> list[Any]:
    """All with full weights at ZeRO-0; else slowly."""
    cases = [("full", "0"), ("lora", "3"), ("lora", "0"), ("full", "3")]
    quick = {(name, "full", "0") for name in ONLINE}
    return [quick_if((name, *case) in quick, name, *case) for name in ONLINE for case in cases]


@pytest.mark.parametrize(("name", "tuner", "stage"), cut_cases())
def test_gradient_of_recorded_rollouts_does_not_depend_on_the_cut(
    name: str, stage: str, tuner: str, tiny: Path, one_rank: RankPool, two_ranks: RankPool
) -> None:
    """Policy and critic, 8 prompts with two or three completions, six ways to cut them into packed rows: |difference| /
    |gradient| <= 1e-6 among them, and 2e-6 against the gradient of padded rows with one completion each, in float64."""
    exact, metrics = one_rank.run(online_cases.gradient, name, tiny, "0", tuner, 8, True)
    first: dict[str, Any] = {}
    for pool, micro in ((one_rank, 4), (one_rank, 3), (one_rank, 1), (two_ranks, 4), (two_ranks, 3), (two_ranks, 1)):
        found, numbers = pool.run(online_cases.gradient, name, tiny, stage, tuner, micro)
        first = first or found
        for role in algos.load(name)().traits.trained:
            names = [key for key in exact if key.startswith(role)]
            for want, bound in ((first, 1e-6), (exact, 2e-6)):
                gap, size = (
                    np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in each))
                    for each in ([found[n].astype(np.float64) - want[n] for n in names], [want[n] for n in names])
                )
                assert gap <= bound * size, (pool.world, micro, role, bound)
        assert numbers["loss"] == pytest.approx(metrics["loss"], abs=1e-6)
        assert numbers["objective/scores"] == pytest.approx(metrics["objective/scores"], abs=1e-9)
        if name in online_cases.CAPPED:
            assert 0.2 < metrics["rollout/is_capped"] < 0.6, "weights at the cap and below it"
            assert numbers["rollout/is_weight"] == pytest.approx(metrics["rollout/is_weight"], abs=1e-6)


@pytest.mark.parametrize(("stage", "tuner"), stages_and_tuners(("0", "full"), ("2", "full"), ("3", "lora")))
def test_greedy_rollouts_are_those_of_the_exported_model(
    stage: str, tuner: str, tiny: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    """Token for token `generate` of what plain transformers or PEFT opens, at every stage; and training goes on."""
    greedy, sampled, loss = two_ranks.run(
        online_cases.generate_and_export, tiny, tmp_path, stage, tuner, tiny_tokenizer()
    )
    if tuner == "lora":
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), tmp_path)
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for group in online_cases.prompts(16):
        ids = torch.tensor([group.prompt])
        want = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, eos_token_id=2
        )
        assert greedy[group.index] == (tuple(want[0, len(group.prompt) :].tolist()),)
    assert len({c for answers in sampled.values() for c in answers}) > 16, "samples of a prompt differ"
    assert np.isfinite(loss)


def test_what_is_counted_over_updates_and_rollouts(tiny: Path, two_ranks: RankPool) -> None:
    """8 prompts with two completions are 16 episodes a rollout. The variance of the ratio over the two updates a and b
    of a rollout is (a - b)^2 / 2, and stands with the last of them."""
    seen = two_ranks.run(online_cases.logged, tiny)
    assert [m["episode"] for m in seen] == [16, 16, 32, 32, 48, 48]
    for first, last in zip(seen[::2], seen[1::2], strict=True):
        assert "val/ratio_var" not in first
        assert last["val/ratio_var"] == pytest.approx((first["val/ratio"] - last["val/ratio"]) ** 2 / 2, rel=1e-9)
        assert last["val/ratio_var"] > 0
