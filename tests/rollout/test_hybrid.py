"""DeepSpeed's interface over our sampling: what its own trainers would see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.rollout import RolloutEngine, RolloutRequest, SamplingConfig
from support import RankPool
from transformers import AutoModelForCausalLM

from dsalign.engines.dist import rank
from dsalign.rollout.hybrid import HybridRollout

PROMPTS = ((5, 6, 7, 8), (4,))
SAMPLING = SamplingConfig(max_new_tokens=7, temperature=0.9, n_samples_per_prompt=2)


def sampled(folder: Path, stage: int) -> dict[str, Any]:
    """What a rollout gives over an engine whose module is a model as transformers opens it, before and after a step."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": stage}, "steps_per_print": 10**9}
    settings |= {"zero_allow_untested_optimizer": True}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    rollout = HybridRollout(engine, frozenset({2}), 0, seed=3)
    assert isinstance(rollout, RolloutEngine)
    ids, mask = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.int64)
    for row, prompt in enumerate(PROMPTS):
        ids[row, 4 - len(prompt) :], mask[row, 4 - len(prompt) :] = torch.tensor(prompt), 1
    found = rollout.generate(RolloutRequest(ids, mask), SAMPLING)
    rollout.sync_weights(0)
    with pytest.raises(ValueError, match="expected the weights of step 1, the engine is at step 0"):
        rollout.sync_weights(1)
    engine.train()
    out = engine(input_ids=ids, labels=ids)
    with torch.no_grad():
        checks = []
        for row in range(4):
            n = int(found.lengths[row])
            prompt = PROMPTS[row // 2]
            whole = torch.tensor([[*prompt, *found.input_ids[row, 4 : 4 + n].tolist()]])
            logits = engine.module(whole).logits[0, len(prompt) - 1 : -1] / 0.9
            want = torch.log_softmax(logits, -1).gather(1, whole[0, len(prompt) :, None])[:, 0]
            checks.append(float((want - found.logps[row, :n]).abs().max()))
    engine.backward(out.loss)
    engine.step()
    rollout.sync_weights(1)
    return {
        "ids": found.input_ids, "mask": found.attention_mask, "start": found.response_start_idx.tolist(),
        "lengths": found.lengths.tolist(), "gap": max(checks), "rank": rank(),
    }  # fmt: skip


@pytest.mark.parametrize("stage", [0, 3])
def test_a_deepspeed_trainer_gets_its_batch(stage: int, tiny: Path, two_ranks: RankPool) -> None:
    """Rows of the padded prompt and the response, padded on the right by a mask from lengths; log-probabilities are
    those of the model's own forward."""
    found = two_ranks.run(sampled, tiny, stage)
    assert found["start"] == [4] * 4 and found["gap"] < 1e-5
    for row, length in enumerate(found["lengths"]):
        prompt = PROMPTS[row // 2]
        assert found["ids"][row, 4 - len(prompt) : 4].tolist() == list(prompt)
        assert found["mask"][row].tolist() == [0] * (4 - len(prompt)) + [1] * (len(prompt) + length) + [0] * (
            found["ids"].shape[1] - 4 - length
        )
        assert length == 7 or int(found["ids"][row, 3 + length]) == 2
    assert len({tuple(row.tolist()) for row in found["ids"]}) == 4
