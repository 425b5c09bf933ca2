"""The memory of whole runs: which roles take what, what fits, and which DeepSpeed file is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dsalign.config import rules
from dsalign.config.parse import parse
from dsalign.config.schema import RunConfig
from dsalign.memory import estimate
from dsalign.memory.estimate import GIB, Estimate, Machine, Role
from dsalign.memory.known import KNOWN
from dsalign.memory.shapes import Shape, of_config

LLAMA = of_config(KNOWN["llama3_1-8b-instruct"][1])
NODE = Machine(8, 1, 80 * GIB)


def config(algo: str, *words: str) -> RunConfig:
    return parse(["--algo", algo, "--max_length", "2048", *words], world_size=8).config


def of(algo: str, *words: str, deepspeed: str = "zero2", **shapes: Shape) -> Estimate:
    """The estimate of Llama 8B on eight GPUs, one group a micro-batch."""
    run = config(algo, *words)
    models = {role: LLAMA for role in run.algorithm.traits.roles if role != "reward" or run.algo == "rm"}
    return estimate.estimate(run, {**models, **shapes}, NODE, deepspeed, micro_batch=1)


def role(found: Estimate, name: str) -> Role:
    return next(one for one in found.roles if one.name == name)


def test_full_dpo_by_hand() -> None:
    """8.03e9 parameters at stage 2 on 8 ranks: weights 2 bytes each, gradients 4 / 8, optimizer 12 / 8. The reference's
    log-probabilities are computed once, so it takes nothing while training; with --ref_cache off it has its weights."""
    found = of("dpo", "--tuner", "full")
    policy = role(found, "policy")
    assert policy.held.weights == 2 * LLAMA.total
    assert policy.held.gradients == LLAMA.total / 2
    assert policy.held.optimizer == 1.5 * LLAMA.total
    assert role(found, "reference").how == "cached on disk"
    frozen = role(of("dpo", "--tuner", "full", "--ref_cache", "off"), "reference")
    assert (frozen.how, frozen.held.weights) == ("frozen", 2 * LLAMA.total)


def test_lora_shares_the_base_and_trains_little() -> None:
    """Rank 8 on all linear layers: 20,971,520 trained parameters of 18 bytes at most beside the 2 bytes of the base."""
    found = of("dpo")
    policy = role(found, "policy")
    assert policy.trained == 20_971_520
    assert policy.held.weights == 2 * (LLAMA.total + 20_971_520)
    assert policy.held.optimizer == 12 * 20_971_520 / 8
    assert role(found, "reference").how == "policy, adapter off"


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let bitsandbytes be installed, which an estimate does not use."""
    monkeypatch.setattr(rules.importlib.util, "find_spec", lambda name: name)


@pytest.mark.usefixtures("packs")
def test_a_base_in_four_bits_by_hand() -> None:
    """Linear layers of Llama 8B: 32 x (2 x 4096^2 + 2 x 4096 x 1024 + 3 x 4096 x 14336) = 6,979,321,856 weights of 4
    bits, an 8-bit scale for 64 and a 32-bit one for 16,384 of them: 0.515869140625 bytes. Embedding, head, norms and
    the adapter have 2 bytes. A pass unpacks one layer, at most 4096 x 14336; a rollout all."""
    found, plain = of("dpo", "--load_in_4bit", "true"), of("dpo")
    policy, other = role(found, "policy"), role(plain, "policy")
    rest = LLAMA.total - 6_979_321_856 + 20_971_520
    assert policy.held.weights == 6_979_321_856 * 0.515869140625 + 2 * rest
    assert policy.work - other.work == policy.forward - other.forward == 2 * 4096 * 14336
    assert (policy.held.optimizer, policy.trained) == (other.held.optimizer, other.trained)
    assert of("grpo", "--load_in_4bit", "true").gathered == 2 * 6_979_321_856
    few = of("grpo", "--load_in_4bit", "true", "--lora_target_modules", "q_proj")
    assert few.gathered == 2 * 6_979_321_856, "layers without an adapter are unpacked too"


def test_ppo_has_the_critic_and_what_scores() -> None:
    """A critic of its own weights and a value head of 4096 + 1; reward functions take nothing, a reward model its
    weights. Keys and values of 64 rows of 2,048 tokens, 131,072 bytes each, are 16 GiB."""
    found = of("ppo", "--max_new_tokens", "512", "--num_ppo_epochs", "4")
    assert role(found, "value").parameters == LLAMA.total + 4097
    assert role(found, "reward").how == "functions, no model"
    assert role(of("ppo", reward=LLAMA), "reward").held.weights == 2 * (LLAMA.total + 4097)
    whole = of("ppo", "--max_new_tokens", "512", "--batch_size", "64")
    assert whole.cache == 16 * GIB
    assert found.cache == 2 / 64 * 16 * GIB, "one prompt a GPU and step, twice"


@pytest.mark.parametrize(
    ("algo", "words", "want"),
    [
        ("sft", (), (2048, 2048, 1)),
        ("dpo", (), (4096, 4096, 2)),
        ("kto", (), (2048, 2048, 1)),
        ("ppo", ("--max_new_tokens", "512"), (2048, 512, 1)),
        ("grpo", ("--max_new_tokens", "512", "--num_generations", "8"), (1536 + 8 * 512, 8 * 512, 8)),
    ],
)
def test_tokens_of_the_longest_group(algo: str, words: tuple[str, ...], want: tuple[int, int, int]) -> None:
    """(tokens, predicted, completions) of a packed group; a pair without a prompt has twice the length of a row."""
    assert estimate.group_tokens(config(algo, *words), 0) == want


def test_a_prompt_is_shared_by_a_pair() -> None:
    """1,500 of 2,048 tokens are the prompt: 1,500 + 2 x 548."""
    assert estimate.group_tokens(config("dpo"), 1500) == (2596, 1096, 2)


@pytest.mark.parametrize(
    "algo", ["sft", "rm", "dpo", "kto", "cpo", "orpo", "simpo", "ppo", "grpo", "rloo", "reinforce"]
)
def test_every_algorithm_and_stage(algo: str) -> None:
    """A peak no less than the states, and less on twice the GPUs at stage 3."""
    for name in estimate.CONFIGS:
        found = of(algo, "--tuner", "full", deepspeed=name)
        assert found.peak > sum(one.held.always for one in found.roles)
    more = Machine(16, 2, 80 * GIB)
    run = config(algo, "--tuner", "full")
    shapes = {one: LLAMA for one in run.algorithm.traits.roles}
    here, there = (estimate.estimate(run, shapes, m, "zero3", micro_batch=1).peak for m in (NODE, more))
    assert there < here


def test_checkpointing_and_offloading_take_less() -> None:
    plain, less = of("sft", "--tuner", "full"), of("sft", "--tuner", "full", "--gradient_checkpointing", "true")
    assert less.peak < plain.peak
    off = of("sft", "--tuner", "full", deepspeed="zero3_offload")
    assert off.peak < of("sft", "--tuner", "full", deepspeed="zero3").peak
    assert off.cpu == pytest.approx(22 * LLAMA.total / 8)


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    run = config("dpo")
    shapes = {"policy": LLAMA, "reference": LLAMA}
    found = estimate.largest_micro_batch(run, shapes, NODE, "zero2")
    more = estimate.estimate(run, shapes, NODE, "zero2", micro_batch=found.micro_batch + 1)
    assert found.fits(NODE) and not more.fits(NODE) and found.micro_batch > 1


def test_which_file_is_taken() -> None:
    """zero2 where it fits, else zero3; off-loading only where nothing else does; None where nothing fits."""

    def tried(**peaks: tuple[float, int]) -> dict[str, Estimate]:
        return {
            name: Estimate(name, size, 1, (), 0, 0, peak * GIB, "", 1.0 if name.endswith("offload") else 0.0)
            for name, (peak, size) in peaks.items()
        }

    def taken(**peaks: tuple[float, int]) -> Any:
        found = estimate.best(tried(**peaks), NODE)
        return None if found is None else found.deepspeed

    assert taken(zero1=(60, 2), zero2=(50, 2), zero3=(40, 4), zero3_offload=(20, 64)) == "zero2"
    assert taken(zero1=(60, 1), zero2=(50, 1), zero3=(40, 4)) == "zero3", "four times the micro-batch"
    assert taken(zero1=(90, 1), zero2=(90, 1), zero3=(70, 1), zero3_offload=(20, 64)) == "zero3"
    assert taken(zero2=(90, 1), zero3=(90, 1), zero2_offload=(80, 1), zero3_offload=(20, 2)) == "zero3_offload"
    assert taken(zero2=(90, 1), zero3_offload=(90, 2)) is None


def test_the_memory_of_the_machine_counts_where_it_is_given() -> None:
    """2.75 bytes a parameter and rank off-loaded, 8 ranks: 22 x 8.03e9 bytes = 164.5 GiB."""
    found = of("sft", "--tuner", "full", "--gradient_checkpointing", "true", deepspeed="zero3_offload")
    assert found.fits(NODE) and found.fits(Machine(8, 1, 80 * GIB, 165 * GIB))
    assert not found.fits(Machine(8, 1, 80 * GIB, 164 * GIB))


def test_a_file_of_the_user(tmp_path: Path) -> None:
    """Its smaller buckets are seen: two of 1e6 elements in place of two of 5e8, 2 bytes each."""
    own = tmp_path / "own.json"
    own.write_text('{"zero_optimization": {"stage": 2, "overlap_comm": true, "reduce_bucket_size": 1e6}}')
    less = of("sft", "--tuner", "full").peak - of("sft", "--tuner", "full", deepspeed=str(own)).peak
    assert less == 2 * (500_000_000 - 1_000_000) * 2
