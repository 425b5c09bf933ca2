"""Tokenizers and models as a run needs them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import VOCABULARY, section, tiny_config, tiny_folder, tiny_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    dynamic_module_utils,
)

from dsalign.config.schema import ModelOptions
from dsalign.data.batches.packing import Inputs
from dsalign.models import load
from dsalign.models.heads import BIAS, WEIGHT, CausalModel, ValueModel
from dsalign.models.names import Source, resolve
from dsalign.models.tokenizer import end_token_ids, load_tokenizer, stop_at

CPU = torch.device("cpu")


def options(**changes: Any) -> ModelOptions:
    """All weights; with tuner lora, adapters of rank 2 on query, key and value."""
    lora = {"lora_rank": 2, "lora_alpha": 4, "lora_target_modules": ("DEFAULT",)}
    return section(ModelOptions, **{"tuner": "full", **lora, **changes})


def load_causal(source: Source, **changes: Any) -> PreTrainedModel:
    """A causal model on the CPU."""
    return load.load_causal(source, options(**changes), device=CPU)


def load_trained(role: str, source: Source, **changes: Any) -> CausalModel | ValueModel:
    """The model of a trained role on the CPU."""
    return load.load_trained(role, source, options(**changes), device=CPU, dropout=False, seed=42)


def load_frozen(role: str, source: Source, **changes: Any) -> CausalModel | ValueModel:
    """The model of a frozen role on the CPU."""
    return load.load_frozen(role, source, options(**changes), device=CPU)


def test_dtype() -> None:
    """auto on a CPU is float32, a name is itself; so are the weights."""
    assert load.resolve_dtype("auto", CPU) is torch.float32
    assert load.resolve_dtype("bfloat16", CPU) is torch.bfloat16


@pytest.mark.parametrize(("bf16", "want"), [(True, torch.bfloat16), (False, torch.float16)])
def test_dtype_on_a_gpu(bf16: bool, want: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    assert load.resolve_dtype("auto", torch.device("cuda", 0)) is want


@pytest.mark.parametrize(("dtype", "want"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_weights_have_the_dtype_whatever_the_folder_has(dtype: str, want: torch.dtype, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_folder(tmp_path)).bfloat16().save_pretrained(tmp_path)
    model = load_causal(resolve(str(tmp_path)), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {want}


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A tiny GPT-2, whose configuration drops out everywhere."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2, n_positions=32, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def test_dropout_of_the_model_is_off_unless_asked_for(gpt2: Path) -> None:
    """GPT-2 has 0.1 in three places."""
    keys = ("resid_pdrop", "embd_pdrop", "attn_pdrop")
    ids = torch.arange(8)[None]
    for dropout in (False, True):
        model = load.load_causal(resolve(str(gpt2)), options(), device=CPU, dropout=dropout).train()
        assert [getattr(model.config, key) for key in keys] == [0.1 if dropout else 0.0] * 3
        with torch.random.fork_rng():
            assert torch.equal(model(ids).logits, model(ids).logits) is not dropout


def test_attention_and_checkpointing_reach_the_model(tiny: Path) -> None:
    model = load_causal(resolve(str(tiny)), attn_impl="eager", gradient_checkpointing=True)
    assert model.config._attn_implementation == "eager"
    assert model.is_gradient_checkpointing
    assert not load_causal(resolve(str(tiny))).is_gradient_checkpointing


def test_end_tokens(tiny: Path, tmp_path: Path) -> None:
    """The tokenizer's first, then those of generation_config.json, one or several; without the file the tokenizer's."""
    tokenizer = tiny_tokenizer()
    assert end_token_ids(Source(str(tiny)), tokenizer) == (2,)
    for eos, want in (([5, 2, 6], (2, 5, 6)), (7, (2, 7)), (None, (2,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert end_token_ids(Source(str(tmp_path)), tokenizer) == want
    tokenizer.eos_token = None
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5]}))
    assert end_token_ids(Source(str(tmp_path)), tokenizer) == (5,)
    (tmp_path / "generation_config.json").unlink()
    assert end_token_ids(Source(str(tmp_path)), tokenizer) == ()


def adapter_folder(tiny: Path, folder: Path) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(0.1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "expected JSON, got an error"),
        ('{"eos_token_id": "</s>"}', "eos_token_id: expected ids of tokens, got '</s>'"),
    ],
)
def test_end_tokens_that_cannot_be_read_are_not_left_out(content: str, said: str, tmp_path: Path) -> None:
    """A model without the file has none; one whose file is broken would learn to end turns otherwise."""
    folder = tiny_folder(tmp_path)
    (folder / "generation_config.json").write_text(content)
    source = resolve(str(folder))
    with pytest.raises(ValueError, match=rf"generation_config.json: {said}"):
        end_token_ids(source, load_tokenizer(source, options()))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_cannot_be_read_is_named(name: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path)
    (folder / name).write_text("{")
    with pytest.raises(
        ValueError, match=rf"^model: {folder}: its tokenizer cannot be opened: .*; copy tokenizer\.json"
    ):
        load_tokenizer(resolve(str(folder)), options())


def test_the_tokenizer_of_an_adapter_is_preferred(tiny: Path, tmp_path: Path) -> None:
    """It may have a chat template of its own; an adapter folder without a tokenizer has the base's."""
    source = resolve(str(adapter_folder(tiny, tmp_path)))
    assert load_tokenizer(source, options()).chat_template is None
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(source, options()).chat_template == "{{ messages }}"


def test_a_trained_role(tiny: Path, tmp_path: Path) -> None:
    """All weights, or the adapter alone; the folder's own adapter is merged, or trained on."""
    plain, on = resolve(str(tiny)), resolve(str(adapter_folder(tiny, tmp_path)))
    full = load_trained("policy", plain)
    assert isinstance(full, CausalModel)
    assert all(p.requires_grad for p in full.parameters())
    lora = load_trained("policy", plain, tuner="lora")
    assert {n.split(".")[-3] for n, p in lora.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    merged = load_trained("policy", on)
    ids = torch.arange(8)[None]
    trained_on = load_trained("policy", on, tuner="lora")
    assert isinstance(merged, CausalModel)
    assert isinstance(trained_on, CausalModel)
    torch.testing.assert_close(merged.whole_logits(ids), trained_on.whole_logits(ids), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merged.whole_logits(ids), full.whole_logits(ids))
    assert all(p.requires_grad for p in merged.parameters())


def test_a_trained_reward_model(tiny: Path) -> None:
    """A new value head is trained beside the backbone or the adapter; every rank has the same one."""
    torch.manual_seed(0)
    full = load_trained("reward", resolve(str(tiny)))
    lora = load_trained("reward", resolve(str(tiny)), tuner="lora")
    assert isinstance(full, ValueModel)
    assert isinstance(lora, ValueModel)
    assert torch.equal(full.v_head.summary.weight, lora.v_head.summary.weight)
    for model in (full, lora):
        head = model.v_head.summary
        assert head.weight.requires_grad and not head.bias.requires_grad  # a classifier's score has no bias


def test_a_frozen_role_is_frozen(tiny: Path, tmp_path: Path) -> None:
    """The reference, with its adapter merged, and a reward model with its value head."""
    frozen = load_frozen("reference", resolve(str(adapter_folder(tiny, tmp_path / "a"))))
    assert not any(p.requires_grad for p in frozen.parameters())
    folder = tiny_folder(tmp_path / "rm")
    save_file({WEIGHT: torch.arange(32.0)[None], BIAS: torch.tensor([7.0])}, folder / "value_head.safetensors")
    reward = load_frozen("reward", resolve(str(folder)))
    assert isinstance(reward, ValueModel)
    assert reward.v_head.summary.bias.tolist() == [7.0]
    assert not any(p.requires_grad for p in reward.parameters())


def test_a_frozen_reward_model_without_a_head_is_refused(tiny: Path) -> None:
    """A random head would give random rewards."""
    with pytest.raises(
        ValueError, match=rf"^reward model: {tiny} has no value_head.safetensors; train one with --algo rm$"
    ):
        load_frozen("reward", resolve(str(tiny)))


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    """A folder with a configuration and no weights."""
    folder = tiny_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"^model: {folder} could not be opened: .* It has config.json, .*copy the"):
        load_causal(resolve(str(folder)))


@pytest.mark.parametrize("changed", [{"num_attention_heads": "4"}, {"model_type": "lama"}, {"hidden_size": -1}])
def test_a_configuration_that_cannot_be_used_is_named(changed: dict[str, Any], tmp_path: Path) -> None:
    """A value of another type, of another model type, and one that no model can have."""
    folder = tiny_folder(tmp_path)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | changed))
    with pytest.raises(ValueError, match=rf"^model: {folder}: its config.json cannot be used: .*correct it, or copy"):
        load_causal(resolve(str(folder)))


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path(r"{ran}").touch()


class OddConfig(LlamaConfig):
    model_type = "{kind}"


class OddModel(LlamaForCausalLM):
    config_class = OddConfig
"""


def with_code(folder: Path, kind: str) -> tuple[Path, Path]:
    """(a folder that brings Python code for its model type, the file that this code makes when it runs)."""
    ran = folder.parent / "ran"
    tiny_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": kind,
        "auto_map": {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddModel"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text(CODE.format(ran=ran, kind=kind))
    return folder, ran


def test_code_that_comes_with_a_model_is_not_run(tmp_path: Path) -> None:
    """A type that only the code knows is refused; one that transformers knows is transformers' own."""
    folder, ran = with_code(tmp_path / "odd", "odd")
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_causal(resolve(str(folder)))
    folder, _ = with_code(tmp_path / "known", "llama")
    assert type(load_causal(resolve(str(folder)))) is LlamaForCausalLM
    assert not ran.exists()


def test_code_runs_where_it_is_trusted_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, ran = with_code(tmp_path / "odd", "odd")
    with caplog.at_level(logging.WARNING):
        model = load_causal(resolve(str(folder)), trust_remote_code=True)
    assert ran.exists()
    assert type(model).__name__ == "OddModel"
    assert f"running the Python code that comes with {folder} (--trust_remote_code)" in [
        r.message for r in caplog.records
    ]


def classifier_folder(folder: Path, labels: int = 1, seed: int = 0, **changes: Any) -> Path:
    """A sequence-classification model, as other trainers write reward models; random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForSequenceClassification(tiny_config(num_labels=labels, **changes)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("role", "trained"), [("reward", False), ("reward", True), ("value", True)])
def test_the_score_layer_of_a_classifier_is_the_value_head(role: str, trained: bool, tmp_path: Path) -> None:
    """The value at the last token is the classifier's own score; frozen as a reward, trained as a critic's start."""
    source = resolve(str(classifier_folder(tmp_path)))
    model = load_trained(role, source) if trained else load_frozen(role, source)
    assert isinstance(model, ValueModel)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    with torch.no_grad():
        want = AutoModelForSequenceClassification.from_pretrained(tmp_path)(ids).logits[:, 0]
        nothing = torch.empty(0, dtype=torch.int64)
        found = model(Inputs(ids, nothing, nothing, states=torch.tensor([3, 7])))
    torch.testing.assert_close(found, want)
    assert want.abs().min() > 1e-3
    head = model.v_head.summary
    assert head.weight.requires_grad == trained
    assert head.bias.requires_grad == (trained and role == "value")  # of a reward model nothing would read it


def test_the_bias_of_a_score_layer_is_kept(tmp_path: Path) -> None:
    """Most classifiers have none, and then the value head's is 0."""
    folder = classifier_folder(tmp_path)
    plain = load_frozen("reward", resolve(str(folder)))
    assert plain.v_head.summary.bias.tolist() == [0.0]
    state = {**load_file(folder / "model.safetensors"), "score.bias": torch.tensor([3.0])}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    biased = load_frozen("reward", resolve(str(folder)))
    assert biased.v_head.summary.bias.tolist() == [3.0]
    assert torch.equal(biased.v_head.summary.weight, plain.v_head.summary.weight)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_score_layer_has_the_dtype_of_a_value_head(dtype: str, tmp_path: Path) -> None:
    """Whatever the backbone's: a head of our own is kept in the same one."""
    own = load_trained("reward", resolve(str(tiny_folder(tmp_path / "own"))), dtype=dtype)
    scored = load_frozen("reward", resolve(str(classifier_folder(tmp_path / "scored"))), dtype=dtype)
    assert scored.v_head.summary.weight.dtype == own.v_head.summary.weight.dtype


def test_a_value_head_comes_before_a_score_layer(tmp_path: Path) -> None:
    folder = classifier_folder(tmp_path)
    save_file({WEIGHT: torch.arange(32.0)[None], BIAS: torch.tensor([7.0])}, folder / "value_head.safetensors")
    assert load_frozen("reward", resolve(str(folder))).v_head.summary.bias.tolist() == [7.0]


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    """No single one of its numbers is the score."""
    folder = classifier_folder(tmp_path, labels=2)
    for run in (
        lambda: load_frozen("reward", resolve(str(folder))),
        lambda: load_trained("value", resolve(str(folder))),
    ):
        with pytest.raises(ValueError) as caught:
            run()
        assert str(caught.value) == (
            f"reward model: {folder} must have one label (its `score` layer one output), got 2"
        )


def test_a_policy_is_not_asked_for_a_score_layer(tiny: Path) -> None:
    """Nor is a critic that starts from a causal model: its head is new and the same at every start."""
    heads = [load_trained("value", resolve(str(tiny))).v_head.summary.weight for _ in range(2)]
    assert torch.equal(*heads)
    assert isinstance(load_trained("policy", resolve(str(tiny))), CausalModel)


@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_what_is_exported_stops_at_every_end_of_a_turn(tuner: str, tmp_path: Path) -> None:
    """generation_config.json has the ids that training ends turns with, not those that the model came with."""
    model = LlamaForCausalLM(tiny_config())
    inner = model
    if tuner == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    stop_at(model, {3, 2})
    inner.generation_config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 3]
