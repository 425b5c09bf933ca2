"""What is loaded is what the file has: every way in which the two can differ is an error or one of the known gaps."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from experts import SIZES
from safetensors.torch import load_file, save_file
from support import VOCABULARY, section, tiny_config, tiny_folder, tiny_tokenizer
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2VLConfig,
    T5Config,
)

from dsalign.config.schema import ModelOptions
from dsalign.models import load
from dsalign.models.heads import ValueModel
from dsalign.models.names import resolve
from dsalign.models.weight_files import read_tensors
from dsalign.models.weights import DEQUANTISED, load_checked, refuse_broken

State = dict[str, Tensor]
CPU = torch.device("cpu")


def opened(folder: Path, *, value: bool = False) -> Any:
    """The model of a folder, checked."""
    return load_checked(str(folder), AutoConfig.from_pretrained(folder), value=value)


def rewrite(folder: Path, change: Callable[[State], State], name: str = "model.safetensors") -> Path:
    """Put change(weights) in place of a folder's weights."""
    save_file(change(load_file(folder / name)), folder / name, metadata={"format": "pt"})
    return folder


def renamed(how: Callable[[str], str]) -> Callable[[State], State]:
    """The weights under other keys."""
    return lambda state: {how(key): tensor for key, tensor in state.items()}


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer: twelve keys."""
    return tiny_folder(tmp_path_factory.mktemp("one"), num_hidden_layers=1)


FAULTS: dict[str, tuple[Callable[[Tensor], Tensor | None], str]] = {
    "missing": (lambda t: None, "1 weights of LlamaForCausalLM are missing"),
    "longer": (lambda t: torch.cat([t, t[:1]]), "expected"),
    "empty": (lambda t: t[:0], "Empty tensors were saved under ZeRO-3"),
    "nan": (lambda t: t.clone().fill_(float("nan")), "1 weights hold NaN or infinity"),
    "inf": (lambda t: torch.where(t == t.max(), float("inf"), t), "1 weights hold NaN or infinity"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_any_one_tensor_is_named(fault: str, one_layer: Path, tmp_path: Path) -> None:
    """Each of the twelve tensors alone: the message has the folder, the key and what is wrong."""
    change, words = FAULTS[fault]
    whole = load_file(one_layer / "model.safetensors")
    config = AutoConfig.from_pretrained(one_layer)
    config.save_pretrained(tmp_path)
    assert len(whole) == 12
    for key in whole:
        state = {name: change(t) if name == key else t for name, t in whole.items()}
        kept = {name: t.contiguous() for name, t in state.items() if t is not None}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=words) as caught:
            opened(tmp_path)
        assert key in str(caught.value)
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "extra", "model.layers.0.self_attn.q_proj.bias"])
def test_a_tensor_that_no_model_takes_is_named(key: str, one_layer: Path, tmp_path: Path) -> None:
    """A layer more than config.json has, an unknown key, a bias of a model without biases."""
    AutoConfig.from_pretrained(one_layer).save_pretrained(tmp_path)
    state = {**load_file(one_layer / "model.safetensors"), key: torch.ones(4)}
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"1 keys belong to no weight \({key}\)"):
        opened(tmp_path)


WRAPPED = {
    "module.": lambda key: "module." + key,
    "_orig_mod.": lambda key: "_orig_mod." + key,
    "module._orig_mod.": lambda key: "module._orig_mod." + key,
    "pretrained_model.": lambda key: "pretrained_model." + key,
    "anything.at.all.": lambda key: "anything.at.all." + key,
    "_checkpoint_wrapped_module.": lambda key: key.replace("self_attn", "_checkpoint_wrapped_module.self_attn"),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("prefix", WRAPPED)
def test_a_wrappers_prefix_is_taken_away(
    prefix: str, tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All keys fit without it: the same weights as without the wrapper, and one line says so."""
    folder = tiny_folder(tmp_path, num_hidden_layers=1, tie_word_embeddings=tied)
    want = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    rewrite(folder, renamed(WRAPPED[prefix]))
    with caplog.at_level(logging.WARNING, logger="dsalign"):
        found = opened(folder).state_dict()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[key], want[key]) for key in want)
    said = [record.message for record in caplog.records if record.name.startswith("dsalign")]
    assert said == [f"{folder}: its keys are read without {prefix}, which a wrapper left there"]


def test_a_prefix_does_not_hide_that_a_weight_is_missing(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, num_hidden_layers=1)
    rewrite(folder, lambda state: {f"module.{k}": t for k, t in state.items() if "up_proj" not in k})
    with pytest.raises(ValueError, match=r"12 weights of LlamaForCausalLM are missing .* begin with module\.: a wrapp"):
        opened(folder)


def test_a_prefix_before_experts_that_are_stored_one_by_one(tmp_path: Path) -> None:
    """Mixtral's file has a matrix an expert, its model one for all."""
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    want = MixtralForCausalLM.from_pretrained(tmp_path).state_dict()
    rewrite(tmp_path, renamed(lambda key: "module." + key))
    assert all(torch.equal(tensor, want[key]) for key, tensor in opened(tmp_path).state_dict().items())


def test_what_may_be_left_over(tmp_path: Path) -> None:
    """Computed tables for any model, a value head beside a language model; a score layer for a value model alone."""
    folder = tiny_folder(tmp_path, num_hidden_layers=1)
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "v_head.summary.weight": torch.ones(1, 32),
        "v_head.summary.bias": torch.ones(1),
    }
    rewrite(folder, lambda state: {**state, **more})
    opened(folder)
    rewrite(folder, lambda state: {**state, "score.weight": torch.ones(1, 32)})
    opened(folder, value=True)
    with pytest.raises(ValueError, match=r"\(score\.weight\)\. This is a classifier, which has no language-model head"):
        opened(folder)


def test_a_value_head_inside_the_weights_is_used(tmp_path: Path) -> None:
    """As PPO trainers save one; a policy from the same folder leaves it out."""
    folder = tiny_folder(tmp_path, num_hidden_layers=1)
    head = {"v_head.summary.weight": torch.arange(32.0)[None], "v_head.summary.bias": torch.tensor([7.0])}
    rewrite(folder, lambda state: {f"module.{key}": tensor for key, tensor in {**state, **head}.items()})
    found = load.load_frozen("reward", resolve(str(folder)), section(ModelOptions), device=CPU)
    assert isinstance(found, ValueModel)
    assert torch.equal(found.v_head.summary.weight, head["v_head.summary.weight"])
    assert found.v_head.summary.bias.tolist() == [7.0]


def test_a_head_may_be_missing_where_it_is_not_run(tmp_path: Path) -> None:
    """A reward model of a file without lm_head; a policy of it would speak at random."""
    folder = tiny_folder(tmp_path, num_hidden_layers=1)
    rewrite(folder, lambda state: {key: t for key, t in state.items() if key != "lm_head.weight"})
    opened(folder, value=True)
    with pytest.raises(ValueError, match=r"1 weights of LlamaForCausalLM are missing \(lm_head\.weight\)\. A file of"):
        opened(folder)


def test_a_policy_from_a_classifier_is_refused(tmp_path: Path) -> None:
    LlamaForSequenceClassification(tiny_config(num_labels=1, num_hidden_layers=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing \(lm_head\.weight\).*This is a classifier, which has no language"):
        load.load_frozen("reference", resolve(str(tmp_path)), section(ModelOptions), device=CPU)


def test_a_classifier_whose_score_layer_is_gone_is_refused(tmp_path: Path) -> None:
    """A new random head in its place would be trained on, or scored with, in silence."""
    LlamaForSequenceClassification(tiny_config(num_labels=1, num_hidden_layers=1)).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda state: {key: t for key, t in state.items() if not key.startswith("score")})
    with pytest.raises(ValueError, match=rf"^{tmp_path} is a classifier without a layer called score; give its score"):
        load.load_trained("value", resolve(str(tmp_path)), section(ModelOptions), device=CPU, dropout=False, seed=0)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_score_that_is_not_finite_is_refused(bad: float, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, num_hidden_layers=1)
    head = {"v_head.summary.weight": torch.full((1, 32), bad), "v_head.summary.bias": torch.zeros(1)}
    save_file(head, folder / "value_head.safetensors")
    with pytest.raises(
        ValueError, match=r"value_head\.safetensors: 1 weights hold NaN or infinity \(v_head\.summary\."
    ):
        load.load_frozen("reward", resolve(str(folder)), section(ModelOptions), device=CPU)


@pytest.mark.parametrize("left", [0, 7, 2000])
def test_a_file_that_was_cut_is_named(left: int, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, num_hidden_layers=1)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(
        ValueError, match=r"model\.safetensors: its weights cannot be read: .*; the file is cut or damaged"
    ):
        opened(folder)


def test_a_head_that_differs_from_the_embedding_it_should_be(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """config.json says tied, the file has both: the file's head is used, and written as such. Equal ones are tied."""
    folder = tiny_folder(tmp_path, num_hidden_layers=1, tie_word_embeddings=True)
    rewrite(folder, lambda state: state | {"lm_head.weight": state["model.embed_tokens.weight"] + 1})
    model = opened(folder)
    assert bool((model.lm_head.weight == model.model.embed_tokens.weight + 1).all())
    assert model.config.tie_word_embeddings is False and "the files hold a head that differs" in caplog.text
    model.save_pretrained(tmp_path / "again")
    assert bool((opened(tmp_path / "again").lm_head.weight == model.lm_head.weight).all())
    caplog.clear()
    rewrite(folder, lambda state: state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()})
    assert opened(folder).config.tie_word_embeddings is True and "differs" not in caplog.text


def test_quantised_weights_are_refused(tmp_path: Path) -> None:
    """By the configuration, and by the dtype of a file whose configuration says nothing."""
    folder = tiny_folder(tmp_path, num_hidden_layers=1)
    rewrite(folder, lambda state: {k: t.to(torch.int8) if "q_proj" in k else t for k, t in state.items()})
    with pytest.raises(
        ValueError, match=r"1 weights are not plain numbers \(model.*q_proj\.weight is I8\): quantised\?"
    ):
        opened(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(
        ValueError, match=rf"^model: {folder} is quantised \(gptq\); give the model that is not, which --load_in_4bit"
    ):
        opened(folder)
    for method, name in DEQUANTISED.items():  # each names the class of transformers that reads it into plain weights
        written = {**config, "quantization_config": {"quant_method": method}}
        (folder / "config.json").write_text(json.dumps(written))
        with pytest.raises(
            ValueError,
            match=rf"(?s)is quantised \({method}\); give .*, or write it in bfloat16 once.*{name}\(dequantize",
        ):
            load_checked(str(folder), LlamaConfig(**written), value=False)
        assert "dequantize" in inspect.signature(getattr(transformers, name)).parameters


def test_mxfp4_is_read_by_what_its_message_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts of a gpt-oss as they are published: 32 numbers of 4 bits beside one scale of 8. The lines of the
    message, run as they stand, leave a folder that opens: 2 (byte 0x44, two numbers each) times 2^(128 - 127) = 4."""
    experts, wide = 2, 32
    sizes = {**SIZES, "hidden_size": wide, "intermediate_size": wide, "num_hidden_layers": 1}
    config = GptOssConfig(**sizes, num_local_experts=experts, head_dim=8)
    state = {key: tensor.clone() for key, tensor in AutoModelForCausalLM.from_config(config).state_dict().items()}
    for name, rows in (("gate_up_proj", 2 * wide), ("down_proj", wide)):
        key = f"model.layers.0.mlp.experts.{name}"
        del state[key]
        state[f"{key}_blocks"] = torch.full((experts, rows, 1, 16), 0x44, dtype=torch.uint8)
        state[f"{key}_scales"] = torch.full((experts, rows, 1), 128, dtype=torch.uint8)
    config.save_pretrained(tmp_path / "gpt-oss")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt-oss")
    file = tmp_path / "gpt-oss" / "config.json"
    described = json.loads(file.read_text()) | {"architectures": ["GptOssForCausalLM"]}
    file.write_text(json.dumps(described | {"quantization_config": {"quant_method": "mxfp4"}}))
    save_file(state, tmp_path / "gpt-oss" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"gpt-oss is quantised \(mxfp4\); give the model that is not, or write it in"
    ) as caught:
        opened(tmp_path / "gpt-oss")
    monkeypatch.chdir(tmp_path)
    exec("\n".join(line.strip() for line in str(caught.value).splitlines()[1:]))
    layer = opened(tmp_path / "bf16").model.layers[0].mlp.experts
    assert layer.down_proj.dtype == torch.bfloat16 and bool(
        (layer.down_proj == 4).all() & (layer.gate_up_proj == 4).all()
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Qwen2VLConfig(architectures=["Qwen2VLForConditionalGeneration"]), "Qwen2VLForConditionalGeneration, a vision"),
        (
            T5Config(architectures=["T5ForConditionalGeneration"]),
            "T5ForConditionalGeneration, an encoder-decoder model",
        ),
        (BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM, an encoder, whose tokens see later ones,"),
    ],
)
def test_another_kind_of_model_is_named(config: Any, words: str, tmp_path: Path) -> None:
    """One line, before any weight is read; no list of a hundred classes."""
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"^model: {tmp_path} is {words}[^\n]* take a text model$"):
        opened(tmp_path)


def test_a_pickle_of_tensors_is_read_without_wrappers(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(2)}, tmp_path / "x.bin")
    assert list(read_tensors(tmp_path / "x.bin")) == ["a"]


def test_the_largest_numbers_of_a_dtype_are_finite() -> None:
    """Their sum is not, so a check by a sum would refuse them."""
    top = {
        str(dtype): torch.full((4,), torch.finfo(dtype).max, dtype=dtype) for dtype in (torch.float16, torch.float32)
    }
    refuse_broken("x", top)
