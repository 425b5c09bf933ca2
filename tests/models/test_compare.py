"""Models, tokenizer and rows fit each other, or one line says before the first step which of them does not."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import VOCABULARY, random_groups, tiny_folder, tiny_tokenizer
from transformers import (
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedConfig,
    Qwen2VLConfig,
)

from dsalign.config import parse
from dsalign.config.schema import RunConfig
from dsalign.contract.groups import Group
from dsalign.data.batches.packing import Inputs
from dsalign.models.compare import compare_models, learnt_positions
from dsalign.models.heads import ValueModel
from dsalign.models.names import Source
from dsalign.models.tokenizer import ended_template, template_of

SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "eos_token_id": 2, "bos_token_id": 2, "pad_token_id": 0}


def run(algo: str, model: Path, *flags: str) -> RunConfig:
    """The configuration of a run on rows that are given by hand."""
    argv = ["--algo", algo, "--model", str(model), "--dataset", "demo:pairs", "--batch_size", "2", *flags]
    return parse.parse(argv, world_size=1).config


def folder(path: Path, model_config: PreTrainedConfig) -> Path:
    """A configuration and a tokenizer; what is compared before weights are read needs no weights."""
    model_config.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def row(prompt: int, completion: int) -> Group:
    """A row of so many tokens."""
    whole = random_groups("demonstrations", 1)[0]
    return replace(whole, prompt=(5,) * prompt, completions=((6,) * completion,) if completion else ())


TABLES = {
    "gpt2": GPT2Config(n_positions=64, n_embd=8, n_layer=1, n_head=2, **SMALL),
    "opt": OPTConfig(
        max_position_embeddings=64, hidden_size=8, ffn_dim=8, num_hidden_layers=1, num_attention_heads=2, **SMALL
    ),
    "gpt_neo": GPTNeoConfig(
        max_position_embeddings=64, hidden_size=8, num_layers=1, attention_types=[[["global"], 1]], num_heads=2, **SMALL
    ),
    "gptj": GPTJConfig(n_positions=64, n_embd=16, n_layer=1, n_head=2, rotary_dim=4, **SMALL),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_row_longer_than_a_table_of_positions_is_refused(name: str, tmp_path: Path) -> None:
    """64 positions: 64 tokens fit, 65 are named; so are a prompt of 40 with up to 25 new tokens."""
    model = folder(tmp_path, TABLES[name])
    sft, ppo = run("sft", model), run("ppo", model, "--max_new_tokens", "25", "--reward_funcs", "demo:friendly")
    source = Source(str(model))
    assert learnt_positions(source, sft.models) == 64
    compare_models(sft, {"policy": source}, tiny_tokenizer(), [row(60, 4)])
    with pytest.raises(ValueError) as caught:
        compare_models(sft, {"policy": source}, tiny_tokenizer(), [row(60, 4), row(60, 5)])
    assert str(caught.value) == (
        f"policy model {model} has 64 positions, rows.jsonl:1 has 65 tokens; lower --max_length to 64, or take a model "
        "with more"
    )
    compare_models(ppo, {"policy": source}, tiny_tokenizer(), [row(39, 0)])
    with pytest.raises(
        ValueError, match=r"has 64 positions, rows\.jsonl:1 has a prompt of 40 and up to 25 new tokens; l"
    ):
        compare_models(ppo, {"policy": source}, tiny_tokenizer(), [row(40, 0)])


def test_computed_positions_have_no_limit(tiny: Path) -> None:
    """Rotary positions are functions of the position; a critic with a table has its own limit."""
    sft = run("sft", tiny)
    assert learnt_positions(Source(str(tiny)), sft.models) is None
    compare_models(sft, {"policy": Source(str(tiny))}, tiny_tokenizer(), [row(4000, 4)])


def test_the_smallest_table_of_all_roles_counts(tiny: Path, tmp_path: Path) -> None:
    sources = {"policy": Source(str(tiny)), "reference": Source(str(folder(tmp_path, TABLES["gpt2"])))}
    with pytest.raises(ValueError, match=rf"^reference model {tmp_path} has 64 positions"):
        compare_models(run("dpo", tiny), sources, tiny_tokenizer(), [row(60, 5)])
    compare_models(run("dpo", tiny), sources, tiny_tokenizer(), [row(60, 5)], own_ids=["reference"])


def with_vocabulary(path: Path, change: dict[str, int], **changes: Any) -> Path:
    """A tiny model whose tokenizer's vocabulary has other ids."""
    tiny_folder(path, num_hidden_layers=1, **changes)
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= change
    file.write_text(json.dumps(content))
    return path


def test_a_reference_whose_ids_mean_something_else_is_refused(tiny: Path, tmp_path: Path) -> None:
    """Two tokens with each other's id: the sizes agree, the meanings do not."""
    ids = tiny_tokenizer().get_vocab()
    other = with_vocabulary(tmp_path, {"a": ids["b"], "b": ids["a"]})
    sources = {"policy": Source(str(tiny)), "reference": Source(str(other))}
    words = rf"'a' is id {ids['a']} to the policy and id {ids['b']} to it \(2 tokens differ\); give a --ref"
    with pytest.raises(ValueError, match=words):
        compare_models(run("dpo", tiny), sources, tiny_tokenizer(), [])


def test_a_reference_with_too_few_embeddings_is_refused(
    tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The policy has a token more: its id would be out of range, or, with padded embeddings, was never trained."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    for rows, name in ((VOCABULARY, "small"), (VOCABULARY + 8, "padded")):
        other = tiny_folder(tmp_path / name, num_hidden_layers=1, vocab_size=rows)
        sources = {"policy": Source(str(tiny)), "reference": Source(str(other))}
        if name == "small":
            with pytest.raises(
                ValueError, match=rf"embeddings for {rows} token ids, the policy's tokenizer has {rows + 1}"
            ):
                compare_models(run("dpo", tiny), sources, tokenizer, [])
            continue
        with caplog.at_level(logging.WARNING, logger="dsalign"):
            compare_models(run("dpo", tiny), sources, tokenizer, [])
        assert "lacks 1 tokens of the policy's (<new>)" in caplog.text


def test_a_reward_model_with_too_few_embeddings_is_refused(tiny: Path, tmp_path: Path) -> None:
    """The policy was resized for a token more, the reward model was not; one that reads text needs no such embedding.
    A token that the policy has no embedding for either is no fault of the reward model's."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    resized = tiny_folder(tmp_path / "resized", num_hidden_layers=1, vocab_size=VOCABULARY + 1)
    sources = {"policy": Source(str(resized)), "reward": Source(str(tiny)), "value": Source(str(tiny))}
    config = run("ppo", resized, "--reward_funcs", "demo:friendly")
    with pytest.raises(
        ValueError, match=rf"^reward model {tiny}: .* there are {VOCABULARY + 1}, and has .* {VOCABULARY};"
    ):
        compare_models(config, sources, tokenizer, [])
    with pytest.raises(ValueError, match=rf"^value model {tiny}: it reads the policy's token ids"):
        compare_models(config, sources, tokenizer, [], own_ids=["reward"])
    sources["policy"] = Source(str(tiny_folder(tmp_path / "other", num_hidden_layers=1)))
    compare_models(config, sources, tokenizer, [])


@pytest.mark.parametrize(
    ("algo", "rows", "said"),
    [("sft", [row(4, 3), row(10, 20)], "1 row(s) may have more, the first rows.jsonl:1 with 30: "),
     ("sft", [row(10, 10)], None),
     ("grpo", [row(5, 0), row(4, 0)], "1 row(s) may have more, the first rows.jsonl:1 with 21: ")],
)  # fmt: skip
def test_rows_beyond_what_rotary_positions_were_made_for(
    algo: str, rows: list[Group], said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are computed for any length, so one line says it: 20 positions against rows of 30 tokens, or a prompt of 5
    and 16 new ones."""
    model = tiny_folder(tmp_path, num_hidden_layers=1, max_position_embeddings=20)
    more = ["--max_new_tokens", "16"] if algo == "grpo" else []
    with caplog.at_level(logging.WARNING, logger="dsalign"):
        compare_models(run(algo, model, *more), {"policy": Source(str(model))}, tiny_tokenizer(), rows)
    assert len(caplog.messages) == (said is not None)
    if said is not None:
        assert f"policy model {model}: it was made for 20 positions" in caplog.text and said in caplog.text
        assert caplog.text.strip().endswith("lower --max_length or --max_new_tokens") is (algo == "grpo")


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_token_that_a_template_ends_turns_with_is_an_end_token(tmp_path: Path) -> None:
    """EOS is <pad> (0) here and <|im_end|> (2) the template's alone; one that ends with text adds none."""
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = "<pad>", CHATML
    template, said = ended_template(Source(str(tmp_path)), tokenizer, None)
    assert template.end_ids == {0, 2}
    assert (
        said
        == "the template ends turns with <|im_end|>, which generation_config.json does not name: it is an end token too"
    )
    encoded = template.encode_many([([{"role": "user", "content": "x"}], ["y"])])[0]
    assert encoded.completions[0][-1] == 2
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "!")
    assert ended_template(Source(str(tmp_path)), tokenizer, None)[0].end_ids == {0}
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "<pad>")
    assert ended_template(Source(str(tmp_path)), tokenizer, None)[1] is None


def test_an_end_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    model = tiny_folder(tmp_path, num_hidden_layers=1)
    (model / "generation_config.json").write_text('{"eos_token_id": [2, 5000]}')
    with pytest.raises(
        ValueError, match=rf"^model: {model} has embeddings for {VOCABULARY} token ids, but 5000 is to end"
    ):
        template_of(run("sft", model), Source(str(model)))


def test_a_vision_model_is_named_as_one_before_anything_else(tmp_path: Path) -> None:
    """Its end token lies beyond a text tokenizer's, which would be a true fault and the wrong cause."""
    Qwen2VLConfig(architectures=["Qwen2VLForConditionalGeneration"]).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 151645}')
    with pytest.raises(ValueError, match=rf"^model: {tmp_path} is Qwen2VLForConditionalGeneration, a vision-language "):
        template_of(run("sft", tmp_path), Source(str(tmp_path)))


def test_a_value_head_is_as_wide_as_what_the_decoder_gives() -> None:
    """opt-350m: layers 64 wide, and a last state that is projected to 32."""
    torch.manual_seed(0)
    opt = OPTConfig(
        hidden_size=64, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, do_layer_norm_before=False, **SMALL,
    )  # fmt: skip
    model = ValueModel(OPTForCausalLM(opt), seed=0)
    assert model.v_head.summary.weight.shape == (1, 32)
    ids, nothing = torch.tensor([[5, 6, 7]]), torch.empty(0, dtype=torch.int64)
    assert model(Inputs(ids, nothing, nothing, states=torch.tensor([2]))).shape == (1,)
