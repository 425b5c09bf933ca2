"""An exported folder, opened by plain transformers and PEFT, says what the engine said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, PeftModel
from plain import plain_logps, plain_scores
from run_cases import Run, export_into_a_file, exported
from safetensors.torch import load_file
from support import RankPool, random_groups, section, tiny_folder
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GenerationConfig,
    LlamaForSequenceClassification,
)

from dsalign.config.schema import ModelOptions
from dsalign.data.batches.packing import Inputs
from dsalign.models import load
from dsalign.models.names import resolve

GROUPS = {"sft": random_groups("demonstrations", 3, seed=5), "rm": random_groups("pairs", 3, seed=5)}


def open_folder(folder: Path, tuner: str) -> Any:
    """What a user does who has never heard of dsalign."""
    if tuner == "full":
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()


@pytest.fixture(scope="module")
def bases(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny Llama with a head of its own, and with one matrix for both ends."""
    return {"untied": tiny, "tied": tiny_folder(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)}


CASES = [(stage, "untied") for stage in (0, 2, 3)] + [(stage, "tied") for stage in (0, 3)]


@pytest.mark.parametrize("algo", ["sft", "rm"])
@pytest.mark.parametrize("tuner", ["full", "lora"])
@pytest.mark.parametrize(("stage", "ends"), CASES)
def test_export_says_what_the_engine_said(
    algo: str, tuner: str, stage: int, ends: str, bases: dict[str, Path], two_ranks: RankPool, tmp_path: Path
) -> None:
    """After two AdamW steps on two ranks: log-probabilities, or scores by hand from value_head.safetensors, to 1e-5."""
    groups = GROUPS[algo]
    said = two_ranks.run(exported, Run(algo, bases[ends], stage, tuner), tmp_path, groups)
    model = open_folder(tmp_path, tuner)
    if algo == "rm":
        head = load_file(tmp_path / "value_head.safetensors")
        assert {n: tuple(t.shape) for n, t in head.items()} == {
            "v_head.summary.weight": (1, 32),
            "v_head.summary.bias": (1,),
        }
        assert head["v_head.summary.bias"] == 0  # a classifier of transformers has none
        want = plain_scores(model, head["v_head.summary.weight"], head["v_head.summary.bias"], groups)
    else:
        assert not (tmp_path / "value_head.safetensors").exists()
        want = plain_logps(model, groups)
        start = plain_logps(AutoModelForCausalLM.from_pretrained(bases[ends]), groups)
        assert max((a - b).abs().max() for a, b in zip(want, start, strict=True)) > 0.01  # it has learnt something
    for a, b in zip(said, want, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_an_exported_reward_model_is_read_again(tuner: str, tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """`load_frozen` of the folder as a reward model: backbone, adapter and value head, ZeRO-3 to plain."""
    said = two_ranks.run(exported, Run("rm", tiny, 3, tuner), tmp_path, GROUPS["rm"])
    model = load.load_frozen("reward", resolve(str(tmp_path)), section(ModelOptions), device=torch.device("cpu")).eval()
    for group, scores in zip(GROUPS["rm"], said, strict=True):
        found = scores_of(model, [[*group.prompt, *completion] for completion in group.completions])
        torch.testing.assert_close(found, torch.from_numpy(scores), atol=1e-5, rtol=0)


def classified(folder: Path, tuner: str) -> Any:
    """The reward model as transformers' or PEFT's users open it, in float32, with the pad token of its tokenizer."""
    how: dict[str, Any] = {"dtype": torch.float32}
    if tuner == "lora":
        how |= {"num_labels": 1, "pad_token_id": AutoTokenizer.from_pretrained(folder).pad_token_id}
    return AutoModelForSequenceClassification.from_pretrained(folder, **how).eval()


def logits(model: Any, rows: Sequence[Sequence[int]], pad: int, side: str) -> torch.Tensor:
    """Scores of rows of token ids in one batch, padded on the left or on the right."""
    longest = max(map(len, rows))
    fill = [[pad] * (longest - len(row)) for row in rows]
    real = [[0] * len(some) for some in fill], [[1] * len(row) for row in rows]
    ids, mask = (
        [a + b for a, b in zip(first, second, strict=True)]
        for first, second in (((fill, rows), real) if side == "left" else ((rows, fill), real[::-1]))
    )
    with torch.no_grad():
        return model(torch.tensor(ids), attention_mask=torch.tensor(mask)).logits[:, 0]


@pytest.mark.parametrize(("stage", "tuner", "pad"), [(0, "full", 0), (3, "full", 2), (2, "lora", 0), (3, "lora", 2)])
def test_a_reward_model_opens_as_a_classifier_of_transformers(
    stage: int, tuner: str, pad: int, tiny: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    """Its one logit is the engine's score, to 1e-5, of rows alone and padded on either side. A tokenizer that pads with
    the end token (2) would have that token passed over: the exported one pads with another."""
    said = two_ranks.run(exported, Run("rm", tiny, stage, tuner), tmp_path, GROUPS["rm"], pad)
    rows = [[*group.prompt, *completion] for group in GROUPS["rm"] for completion in group.completions]
    want = torch.cat([torch.from_numpy(scores) for scores in said])
    model, own = classified(tmp_path, tuner), AutoTokenizer.from_pretrained(tmp_path).pad_token_id
    assert own != 2
    for side in ("left", "right"):
        torch.testing.assert_close(logits(model, rows, own, side), want, atol=1e-5, rtol=0)
    alone = torch.cat([logits(model, [row], own, "right") for row in rows])
    torch.testing.assert_close(alone, want, atol=1e-5, rtol=0)
    if tuner == "full":
        assert type(model) is LlamaForSequenceClassification
        config = json.loads((tmp_path / "config.json").read_text())
        assert (config["architectures"], config["id2label"]) == (["LlamaForSequenceClassification"], {"0": "LABEL_0"})
        _, found = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert not found["missing_keys"] and not found["unexpected_keys"]
    else:
        opened = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1, pad_token_id=own).eval()
        torch.testing.assert_close(logits(opened, rows, own, "left"), want, atol=1e-5, rtol=0)
    (tmp_path / "value_head.safetensors").unlink()  # dsalign reads the score where its own file is missing
    ours = load.load_frozen("reward", resolve(str(tmp_path)), section(ModelOptions), device=torch.device("cpu"))
    torch.testing.assert_close(scores_of(ours, rows), want, atol=1e-5, rtol=0)


def scores_of(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """dsalign's own scores of rows of token ids."""
    nothing = torch.empty(0, dtype=torch.int64)
    with torch.no_grad():
        return torch.cat(
            [model(Inputs(torch.tensor([row]), nothing, nothing, torch.tensor([len(row) - 1]))) for row in rows]
        )


@pytest.mark.parametrize(("stage", "tuner"), [(0, "full"), (3, "full"), (2, "lora")])
def test_export_in_bfloat16(stage: int, tuner: str, tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """Weights stay bfloat16, value head and score are float32; the scores agree as well as bfloat16 does."""
    said = two_ranks.run(exported, Run("rm", tiny, stage, tuner, torch.bfloat16), tmp_path, GROUPS["rm"])
    name = "model.safetensors" if tuner == "full" else "adapter_model.safetensors"
    dtypes = {key.endswith("score.weight"): tensor.dtype for key, tensor in load_file(tmp_path / name).items()}
    assert dtypes == {False: torch.bfloat16, True: torch.float32}
    head = load_file(tmp_path / "value_head.safetensors")
    assert {t.dtype for t in head.values()} == {torch.float32}
    scores = plain_scores(
        open_folder(tmp_path, tuner), head["v_head.summary.weight"], head["v_head.summary.bias"], GROUPS["rm"]
    )
    for a, b in zip(said, scores, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, atol=0.05, rtol=0)


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_everything_to_prompt_with_is_there(tuner: str, tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """Tokenizer, chat template, generation config; an adapter names its base; no model card, no base weights."""
    two_ranks.run(exported, Run("sft", tiny, 0, tuner), tmp_path, GROUPS["sft"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi!"}], tokenize=False) == "Hi!"
    assert tokenizer("abc")["input_ids"] == AutoTokenizer.from_pretrained(tiny)("abc")["input_ids"]
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 2
    names = {p.name for p in tmp_path.iterdir()}
    if tuner == "full":
        assert "model.safetensors" in names
        assert not names & {"adapter_config.json", "README.md"}
    else:
        adapter = json.loads((tmp_path / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(tiny.resolve())
        beside = json.loads((tmp_path / "base_model.json").read_text())
        assert (tmp_path / beside["relative"]).resolve() == tiny.resolve()
        assert {n.split(".")[-2] for n in load_file(tmp_path / "adapter_model.safetensors")} == {"lora_A", "lora_B"}
        assert not names & {"model.safetensors", "config.json", "README.md", "default"}


def test_buffers_that_belong_to_the_weights_are_exported(two_ranks: RankPool, tmp_path: Path) -> None:
    """DeepSeek's routers choose experts by a bias that is a buffer; without it the export would choose others."""
    config = DeepseekV3Config(
        vocab_size=82,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DeepseekV3ForCausalLM(config)
    bias = torch.tensor([3.0, -3.0, 1.0, 0.0])
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(bias)
    model.save_pretrained(tmp_path / "base")
    said = two_ranks.run(exported, Run("sft", tmp_path / "base", 0), tmp_path / "out", GROUPS["sft"])
    again = open_folder(tmp_path / "out", "full")
    found = [b for n, b in again.named_buffers() if n.endswith("e_score_correction_bias")]
    assert len(found) == 2
    assert all(torch.equal(b, bias) for b in found)
    for a, b in zip(said, plain_logps(again, GROUPS["sft"]), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), b, atol=1e-5, rtol=0)


def test_a_folder_that_cannot_be_written_stops_every_rank(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """A file is in the way: rank 0 has the error, rank 1 hears of it instead of waiting."""
    (tmp_path / "out").touch()
    mine, theirs = two_ranks.run(export_into_a_file, Run("sft", tiny), tmp_path / "out")
    assert "File exists" in mine
    assert theirs.startswith("rank 0 stopped: ")
