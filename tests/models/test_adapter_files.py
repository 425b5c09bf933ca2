"""An adapter is used with all that its folder has: its own score layer, its own embeddings; and nothing is left out."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, VBLoRAConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from support import VOCABULARY, section, tiny_config, tiny_folder, tiny_tokenizer
from test_weights import rewrite
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForSequenceClassification

from dsalign.config.schema import ModelOptions
from dsalign.data.batches.packing import Inputs
from dsalign.models import load
from dsalign.models.heads import CausalModel, ValueModel
from dsalign.models.names import Source

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def trained_adapter(model: Any, folder: Path, **config: Any) -> Path:
    """The folder of an adapter of which every number moved."""
    adapter = get_peft_model(model, LoraConfig(r=2, **{"target_modules": ["q_proj"], **config}))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                p.add_(torch.randn(p.shape, generator=draw) * 0.3)
    adapter.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def source(base: Path, adapter: Path) -> Source:
    return Source(str(base), adapter=adapter, value_head=adapter)


def frozen(role: str, base: Path, adapter: Path) -> Any:
    return load.load_frozen(role, source(base, adapter), section(ModelOptions), device=CPU)


def trained(role: str, base: Path, adapter: Path, tuner: str = "lora") -> Any:
    options = section(ModelOptions, tuner=tuner)
    return load.load_trained(role, source(base, adapter), options, device=CPU, dropout=False, seed=1)


def scores(model: ValueModel) -> torch.Tensor:
    nothing = torch.empty(0, dtype=torch.int64)
    with torch.no_grad():
        return model(Inputs(IDS, nothing, nothing, states=torch.tensor([3, 7])))


@pytest.mark.parametrize("role", ["reward", "value"])
def test_an_adapters_own_score_layer_is_the_head(role: str, tmp_path: Path) -> None:
    """An adapter of a classifier (SEQ_CLS) trains a copy of the score layer: transformers and PEFT by hand."""
    LlamaForSequenceClassification(tiny_config(num_labels=1)).save_pretrained(tmp_path / "base")
    opened = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    adapter = trained_adapter(opened, tmp_path / "adapter", task_type="SEQ_CLS")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    whole = PeftModel.from_pretrained(again, adapter)
    with torch.no_grad():
        want = whole(IDS).logits[:, 0]
        with whole.disable_adapter():
            assert (whole(IDS).logits[:, 0] - want).abs().min() > 1e-2
    model = frozen(role, tmp_path / "base", adapter) if role == "reward" else trained(role, tmp_path / "base", adapter)
    torch.testing.assert_close(scores(model), want, atol=1e-5, rtol=1e-5)


@pytest.fixture
def larger(tmp_path: Path) -> tuple[Path, Path, torch.Tensor]:
    """(base, adapter trained on two added tokens with its own embedding and head, its logits by PEFT)."""
    base = tiny_folder(tmp_path / "base")
    opened = AutoModelForCausalLM.from_pretrained(base)
    opened.resize_token_embeddings(VOCABULARY + 2)
    adapter = trained_adapter(opened, tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    again = AutoModelForCausalLM.from_pretrained(base)
    again.resize_token_embeddings(VOCABULARY + 2)
    with torch.no_grad():
        return base, adapter, PeftModel.from_pretrained(again, adapter)(IDS + VOCABULARY - 11).logits


@pytest.mark.parametrize("how", ["frozen", "lora", "full"])
def test_a_base_is_resized_to_the_adapters_embeddings(
    how: str, larger: tuple[Path, Path, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    """Logits of the new tokens (the two last of the ids) equal PEFT's after the same resize."""
    base, adapter, want = larger
    with caplog.at_level(logging.WARNING, logger="dsalign"):
        model = frozen("reference", base, adapter) if how == "frozen" else trained("policy", base, adapter, how)
    assert isinstance(model, CausalModel)
    with torch.no_grad():
        torch.testing.assert_close(model.whole_logits(IDS + VOCABULARY - 11), want, atol=1e-5, rtol=1e-5)
    line = f"{adapter}: its base is resized from {VOCABULARY} to the adapter's {VOCABULARY + 2} embeddings"
    assert [r.message for r in caplog.records if "resized" in r.message] == [line]


@pytest.mark.parametrize("gone", ["embed_tokens", "lm_head"])
def test_an_adapter_without_all_new_rows_is_refused(gone: str, larger: tuple[Path, Path, torch.Tensor]) -> None:
    """The rows it lacks would be random: the base must be the resized one."""
    base, adapter, _ = larger
    rewrite(adapter, lambda s: {k: t for k, t in s.items() if gone not in k}, "adapter_model.safetensors")
    words = f"trained with {VOCABULARY + 2} embeddings, its base has {VOCABULARY}, and .* resize the base"
    with pytest.raises(ValueError, match=rf"^{adapter}: the adapter was {words}"):
        frozen("reference", base, adapter)


@pytest.mark.parametrize(
    "how",
    [
        lambda key: "module." + key,
        lambda key: "_orig_mod.module." + key,
        lambda key: key.replace(".lora_A.", ".lora_A.default.").replace(".lora_B.", ".lora_B.default."),
        lambda key: key.replace("self_attn", "_fsdp_wrapped_module.self_attn"),
    ],
)
def test_prefixes_in_an_adapter_are_taken_away(how: Any, tiny: Path, tmp_path: Path) -> None:
    adapter = trained_adapter(AutoModelForCausalLM.from_pretrained(tiny), tmp_path)
    with torch.no_grad():
        want = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), adapter)(IDS).logits
        rewrite(adapter, lambda s: {how(k): t for k, t in s.items()}, "adapter_model.safetensors")
        torch.testing.assert_close(frozen("reference", tiny, adapter).whole_logits(IDS), want, atol=1e-5, rtol=1e-5)


FAULTS: dict[str, tuple[Any, str]] = {
    "missing": (lambda k, t: None, "1 of its weights are missing"),
    "renamed": (lambda k, t: (k.replace("q_proj", "w_proj"), t), "1 keys belong to no weight"),
    "nan": (lambda k, t: (k, t * float("nan")), "1 weights hold NaN or infinity"),
    "empty": (lambda k, t: (k, t[:0]), "1 weights are empty"),
    "longer": (lambda k, t: (k, torch.cat([t, t])), "the adapter does not fit its base: size mismatch"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_any_one_tensor_of_an_adapter_is_named(fault: str, tiny: Path, tmp_path: Path) -> None:
    """PEFT would take the adapter with a warning, or a traceback; each of the four tensors alone."""
    adapter = trained_adapter(AutoModelForCausalLM.from_pretrained(tiny), tmp_path)
    change, words = FAULTS[fault]
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    assert len(whole) == 4
    for key in whole:
        state = dict(pair for k, t in whole.items() if (pair := change(k, t) if k == key else (k, t)))
        save_file({k: t.contiguous() for k, t in state.items()}, file)
        with pytest.raises(ValueError, match=words) as caught:
            frozen("reference", tiny, adapter)
        assert str(adapter) in str(caught.value)


def test_an_adapter_folder_without_weights_is_named(tiny: Path, tmp_path: Path) -> None:
    adapter = trained_adapter(AutoModelForCausalLM.from_pretrained(tiny), tmp_path)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=rf"^{adapter}: expected the adapter's weights in adapter_model\.safetensors or"
    ):
        frozen("reference", tiny, adapter)
    (adapter / "adapter_model.safetensors").touch()
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=rf"^{adapter}/adapter_config\.json cannot be read: "):
        frozen("reference", tiny, adapter)


def test_an_adapter_of_another_kind_is_refused(tiny: Path, tmp_path: Path) -> None:
    """It has no layers to switch off, so it is no reference's start and cannot be merged."""
    adapter = trained_adapter(AutoModelForCausalLM.from_pretrained(tiny), tmp_path)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(ValueError, match=rf"^{adapter}: expected an adapter of layers, such as LORA, got PROMPT_TUNIN"):
        frozen("reference", tiny, adapter)


KINDS = {
    "shared projections": VeraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    "a shared bank": VBLoRAConfig(r=2, num_vectors=8, vector_length=16, topk=2, target_modules=["q_proj"]),
    "DoRA": LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "v_proj"]),
    "a scale by the root of the rank": LoraConfig(r=4, use_rslora=True, target_modules=["q_proj"]),
    "ranks of their own": LoraConfig(r=2, rank_pattern={"q_proj": 4}, target_modules=["q_proj", "v_proj"]),
    "single tokens": LoraConfig(r=2, trainable_token_indices=[5, 9], target_modules=["q_proj"]),
    "an embedding": LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]),
    "a head": LoraConfig(r=2, target_modules=["lm_head", "q_proj"]),
    "a copy of the embedding": LoraConfig(r=2, modules_to_save=["embed_tokens"], target_modules=["q_proj"]),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, that merging does what is tested here
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_computes_what_peft_does(kind: str, tied: bool, tmp_path: Path) -> None:
    """Merged, written again, and trained on: the logits are PEFT's. A head that is the embedding is told from it where
    the adapter changes one of the two."""
    base = tiny_folder(tmp_path / "base", tie_word_embeddings=tied, num_hidden_layers=1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), copy.deepcopy(KINDS[kind]))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=draw) * 0.1)
        want = model.eval()(IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    frozen("reference", base, tmp_path / "adapter").model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    for found in (trained("policy", base, tmp_path / "adapter").model, again):
        with torch.no_grad():
            torch.testing.assert_close(found.eval()(IDS).logits, want, rtol=0, atol=1e-4)


ODD = {  # keys of adapter_config.json, and what is said of them
    "layers of the base twice": (
        {"layer_replication": [[0, 2], [1, 2]]},
        "applies alike to every token, got one with lay",
    ),
    "from a token on": (
        {"alora_invocation_tokens": [5]},
        "applies alike to every token, got one with alora_invocation",
    ),
    "skills": ({"peft_type": "POLY"}, "expected an adapter of layers, such as LORA, got POLY"),
    "a prompt in the layers": (
        {"peft_type": "ADAPTION_PROMPT"},
        "expected an adapter of layers, such as LORA, got ADAPT",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_an_adapter_that_layers_do_not_hold_is_refused(case: str, tiny: Path, tmp_path: Path) -> None:
    """PEFT's own forward would do the rest: without it the numbers are others, and nothing would say so."""
    changed, said = ODD[case]
    adapter = trained_adapter(AutoModelForCausalLM.from_pretrained(tiny), tmp_path)
    told = json.loads((adapter / "adapter_config.json").read_text())
    kept = {} if "peft_type" in changed else told
    (adapter / "adapter_config.json").write_text(json.dumps(kept | changed))
    with pytest.raises(ValueError, match=said):
        trained("policy", tiny, adapter)


def test_an_adapter_that_cannot_be_merged_is_trained_on_alone(tiny: Path, tmp_path: Path) -> None:
    """A bias of its own, of layers that have none: PEFT has no place for it in the base."""
    adapter = trained_adapter(AutoModelForCausalLM.from_pretrained(tiny), tmp_path, lora_bias=True)
    trained("policy", tiny, adapter)
    with pytest.raises(ValueError, match=rf"^{adapter}: expected an adapter that PEFT merges into its base"):
        frozen("reference", tiny, adapter)


def test_trained_biases_of_the_base_have_no_copy(tmp_path: Path) -> None:
    """They are merged, and refused where training would go on beside the weights it started from."""
    base = tiny_folder(tmp_path / "base", attention_bias=True, num_hidden_layers=1)
    adapter = trained_adapter(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter", bias="all")
    frozen("reference", base, adapter)
    with pytest.raises(ValueError, match=r"that is trained on without bias 'all'"):
        trained("policy", base, adapter)


def test_the_tied_head_of_an_adapter_has_no_copy(tmp_path: Path) -> None:
    """PEFT ties the embedding and the head of the first adapter of a model: merged it is right, trained on refused."""
    base = tiny_folder(tmp_path / "base", tie_word_embeddings=True, num_hidden_layers=1)
    adapter = trained_adapter(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter",
        modules_to_save=["embed_tokens"], ensure_weight_tying=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="that is trained on without ensure_weight_tying: PEFT ties"):
        trained("policy", base, adapter)
    with torch.no_grad():
        want = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()(IDS).logits
        found = frozen("reference", base, adapter).model(IDS).logits
    torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
