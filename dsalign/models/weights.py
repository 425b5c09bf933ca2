"""The one place through which every loaded weight passes: what a file has and what its model needs must be the same.

A weight that is in no file is drawn at random by transformers, and one that no model takes is left out by it; both are
an error here, as are shapes that differ, empty tensors, NaN and infinity. GAPS lists the differences that are right.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dsalign.data.tokens.text_ids import length_shared
from dsalign.models.weight_files import WRAPPERS, read_tensors, reading, refuse_doubles, tensors_in, weight_files

logger = logging.getLogger(__name__)
SHOWN = 4  # keys of a fault that its message shows
PLAIN = ("F64", "F32", "BF16", "F16")  # dtypes of weights that are not quantised, as safetensors writes them
# How a model was quantised -> the class of transformers that reads it into plain weights.
DEQUANTISED = {
    "mxfp4": "Mxfp4Config",  # gpt-oss
    "fp8": "FineGrainedFP8Config",  # DeepSeek V3 and R1
    "compressed-tensors": "CompressedTensorsConfig",
}
HEAD_KEYS = re.compile(r"^(?:score\.(?:weight|bias)|v_head\.summary\.(?:weight|bias))$")


@dataclass(frozen=True)
class Gap:
    """A difference between file and model that is right. keys: which keys, a pattern. reason: why it is right. value:
    whether for models with a value head, for log-probabilities (False), or for both (None)."""

    keys: str
    reason: str
    value: bool | None = None

    def covers(self, key: str, value: bool) -> bool:
        """Whether a key of a model (with a value head: `value`) may be left over or missing for this reason."""
        return self.value in (None, value) and re.search(self.keys, key) is not None


UNEXPECTED = (
    Gap(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$", "tables of rotary positions, which are computed"),
    Gap(r"(^|\.)position_ids$", "the numbers 0, 1, 2, ..., which are computed"),
    Gap(r"(^|\.)attn(tion)?\.(masked_bias|bias_mask)$", "a causal mask, which is computed"),
    Gap(HEAD_KEYS.pattern, "the score, which becomes the value head", value=True),
    Gap(r"^v_head\.", "a value head beside a language model, as PPO trainers save one", value=False),
)
HEADS = re.compile(r"^(?:\w*_)?(?:score|classifier|classification|reward|regression|value|head)(?:_\w+)?\.")
HEADLESS = "a value model does not run its language-model head"


def load_checked(where: str, config: Any, *, value: bool, **how: Any) -> PreTrainedModel:
    """The causal language model of a folder or a hub name, every weight of it read from there.

    value: whether the model gets a value head: then its language-model head may be missing. how: further arguments of
    `from_pretrained`. Keys under the prefix of a wrapper are read without it where then all keys fit; a line says so.
    Raises ValueError naming the file's keys and the likely cause where they do not fit, or a weight is not finite.
    """
    refuse_other_kinds(where, config, trusted=bool(how.get("trust_remote_code")))
    _refuse_quantised(where, config)
    model, faults = _loaded(where, config, value, how)
    words, pattern = _left_by_wrappers(model, faults) if faults else [], WRAPPERS.pattern
    if words:
        if all(key.startswith(words[0]) for key in faults.unexpected):
            pattern = f"^{re.escape(words[0])}"
        again, left = _loaded(where, config, value, {**how, "key_mapping": {pattern: ""}})
        if not left:
            model, faults = again, left
            logger.warning("%s: its keys are read without %s, which a wrapper left there", where, ", ".join(words))
    if faults:
        raise ValueError(faults.text(where, model, words, value))
    refuse_doubles(where, pattern, f"{model.base_model_prefix}.")
    refuse_broken(where, {**dict(model.named_parameters()), **_saved_buffers(model)})
    say_untied(where, model)
    return model


def say_untied(where: str, model: Any) -> None:
    """Correct the configuration of a model that was read with a head of its own where it says that there is none: what
    is written of it would otherwise be read without that head."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = [c for c in {id(c): c for c in (model.config, model.config.get_text_config())}.values() if _ties(c)]
    if tied and head is not None and getattr(head, "weight", None) is not embedding.weight:
        for config in tied:
            config.tie_word_embeddings = False
        logger.warning(
            "%s: config.json says that the head is the embedding, but the files hold a head that differs: it is used, "
            "and what is written says so",
            where,
        )


def _ties(config: Any) -> bool:
    return bool(getattr(config, "tie_word_embeddings", False))


@dataclass(frozen=True)
class Faults:
    """The keys of a file and of a model that do not fit; falsy where all fit. shapes: key -> (file's, model's)."""

    missing: Collection[str] = ()
    unexpected: Collection[str] = ()
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def text(self, where: str, model: Any, wrappers: Sequence[str], value: bool) -> str:
        """The message: which keys, what is wrong with them, the likely cause and what to do. wrappers: what they left
        in the keys. value: whether the model has a value head."""
        parts, name = [], type(model).__name__
        if self.missing:
            parts.append(f"{len(self.missing)} weights of {name} are missing ({shown(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} keys belong to no weight ({shown(self.unexpected)})")
        for key, (found, wanted) in sorted((self.shapes or {}).items())[:SHOWN]:
            parts.append(f"{key} is {list(found)}, expected {list(wanted)}")
        return f"{where}: the weights do not fit the model: {'; '.join(parts)}. {self._cause(wrappers, value)}"

    def _cause(self, wrappers: Sequence[str], value: bool) -> str:
        keys, shapes = [*self.unexpected, *self.missing], self.shapes or {}
        if any(0 in found for found, _ in shapes.values()):
            return "Empty tensors were saved under ZeRO-3 without gathering them: save the model again, gathered"
        if any("lora_" in key or ".base_layer." in key for key in self.unexpected):
            return "The file holds a model with an adapter inside: merge the adapter, or give the adapter's own folder"
        if any(re.search(r"(qweight|qzeros|absmax|weight_scale|scale_inv|quant_state)", k) for k in self.unexpected):
            return "The weights are quantised: give the model that is not"
        if self.unexpected and not self.missing and all(HEADS.match(key) for key in self.unexpected) and value:
            return "They may be its score: save it as score.weight, or as value_head.safetensors with v_head.summary"
        if any(key.startswith(("score.", "classifier.")) for key in self.unexpected):
            return "This is a classifier, which has no language-model head: give a causal language model"
        if self.missing and len(wrappers) == 1 and all(key.startswith(wrappers[0]) for key in self.unexpected):
            return f"All keys that fit nothing begin with {wrappers[0]}: a wrapper's prefix; save the model without it"
        if shapes and not keys:
            return "config.json is another model's, or the embedding was resized: its sizes must be those of the file"
        if self.missing and not self.unexpected:
            return "A file of the model is missing or was cut, or config.json is another model's: copy the folder again"
        return "config.json is another model's, or the file was saved by other code: give the folder it belongs to"


def shown(keys: Iterable[str]) -> str:
    """The first keys of many, in order, as text."""
    first = sorted(keys)
    return ", ".join(first[:SHOWN]) + (", ..." if len(first) > SHOWN else "")


def refuse_broken(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the tensors that are empty, or hold a NaN or an infinity."""
    empty = [name for name, tensor in tensors.items() if tensor.numel() == 0]
    if empty:
        raise ValueError(
            f"{where}: {len(empty)} weights are empty ({shown(empty)}): saved under ZeRO-3 without gathering them? "
            "Save the model again, gathered"
        )
    bad = [name for name, tensor in tensors.items() if not _finite(tensor)]
    if bad:
        small = all(tensors[name].dtype == torch.float16 for name in bad)
        more = ", or they are larger than float16 holds (--dtype bfloat16 or float32)" if small else ""
        raise ValueError(
            f"{where}: {len(bad)} weights hold NaN or infinity ({shown(bad)}): the run that made them diverged, or the "
            f"file is damaged{more}; take an earlier checkpoint or copy it again"
        )


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.is_meta:
        return True
    low, high = torch.aminmax(tensor.detach())  # a NaN passes through both; no copy of the tensor is made
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _saved_buffers(model: PreTrainedModel) -> dict[str, Tensor]:
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def refuse_other_kinds(where: str, config: Any, *, trusted: bool) -> None:
    """Raise ValueError where transformers has no causal language model for a configuration, saying what it is."""
    names = list(getattr(config, "architectures", None) or [])
    name = names[0] if names else type(config).__name__.replace("Config", "")
    kind = "a model"
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        kind = "a vision-language model" if hasattr(config, "vision_config") else "a model of speech"
    elif getattr(config, "is_encoder_decoder", False):
        kind = "an encoder-decoder model"
    elif name.endswith(("ForMaskedLM", "ForPreTraining")) and not getattr(config, "is_decoder", False):
        kind = "an encoder, whose tokens see later ones,"
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or (trusted and hasattr(config, "auto_map"))
    if hasattr(config, "auto_map") and not known:
        return  # transformers says that --trust_remote_code is needed
    if not known or kind.startswith("an encoder"):
        raise ValueError(
            f"model: {where} is {name}, {kind} that cannot be loaded as a causal language model; take a text model"
        )


def _refuse_quantised(where: str, config: Any) -> None:
    """Raise ValueError where weights are stored in fewer bits than they are trained in, or not as tensors alone."""
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        given = quantised if isinstance(quantised, dict) else quantised.to_dict()
        method = str(getattr(given.get("quant_method"), "value", given.get("quant_method", "unknown")))
        raise ValueError(
            f"model: {where} is quantised ({method}); give the model that is not{_dequantised(where, method)}"
        )
    for file in weight_files(where):
        if file.suffix != ".safetensors":
            with tensors_in(file, mapped=True):
                continue
        with reading(file), safe_open(file, framework="pt") as stored:
            odd = {
                key: dtype
                for key in stored.keys()  # noqa: SIM118  safe_open is no mapping
                if key.endswith("weight") and (dtype := stored.get_slice(key).get_dtype()) not in PLAIN
            }
        if odd:
            key, dtype = min(odd.items())
            raise ValueError(
                f"{file}: {len(odd)} weights are not plain numbers ({key} is {dtype}): quantised? Give the model in "
                "float32, bfloat16 or float16"
            )


def _dequantised(where: str, method: str) -> str:
    """How to write a quantised model in bfloat16 where transformers can, else what 4 bits are made from. In the
    original format transformers 5.17 would write what it read: quantised again, or under the names of quantised
    weights."""
    name = DEQUANTISED.get(method)
    if name is None:
        return ", which --load_in_4bit true puts into 4 bits as it is read"
    return (
        ", or write it in bfloat16 once and give the folder bf16:\n"
        f"  from transformers import AutoModelForCausalLM, AutoTokenizer, {name}\n"
        f"  AutoModelForCausalLM.from_pretrained({where!r}, dtype='bfloat16', quantization_config={name}"
        "(dequantize=True)).save_pretrained('bf16', save_original_format=False)\n"
        f"  AutoTokenizer.from_pretrained({where!r}).save_pretrained('bf16')"
    )


def stored_head(where: str) -> dict[str, Tensor]:
    """The tensors of a score layer or a value head inside the weights of a model: {} where it has none.

    Keys are score.weight and score.bias, or v_head.summary.weight and v_head.summary.bias, without a wrapper's prefix.
    """
    found: dict[str, Tensor] = {}
    for file in weight_files(where):
        found |= read_tensors(file, HEAD_KEYS)
    return found


def _loaded(where: str, config: Any, value: bool, how: Mapping[str, Any]) -> tuple[PreTrainedModel, Faults]:
    """The model as transformers loads it, and what of it did not fit."""
    with reading(where):
        model, info = AutoModelForCausalLM.from_pretrained(
            where, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **how
        )
    head = model.get_output_embeddings()
    headless = {f"{name}." for name, module in model.named_modules() if value and module is head}
    missing = {key for key in info["missing_keys"] if not any(key.startswith(name) for name in headless)}
    unexpected = {key for key in info["unexpected_keys"] if not any(gap.covers(key, value) for gap in UNEXPECTED)}
    shapes = {key: (tuple(found), tuple(wanted)) for key, found, wanted in info["mismatched_keys"]}
    return model, Faults(missing, unexpected, shapes)


def _left_by_wrappers(model: PreTrainedModel, faults: Faults) -> list[str]:
    """What a wrapper put into a file's keys: one prefix of all unexpected keys without which some fit the model, else
    the wrappers' names inside keys, [] where there are none."""
    prefix, base = _common_prefix(faults.unexpected), f"{model.base_model_prefix}."
    ends = {end for key in faults.missing for end in (key, key.removeprefix(base))}
    for dot in re.finditer(r"\.", prefix):
        if any(key[dot.end() :] in ends for key in faults.unexpected):
            return [prefix[: dot.end()]]
    return sorted({found for key in faults.unexpected for found in WRAPPERS.findall(key)})


def _common_prefix(keys: Collection[str]) -> str:
    """The longest beginning of all keys that ends in a dot, "" where there is none."""
    if not keys:
        return ""
    first = min(keys)
    return first[: first.rfind(".", 0, length_shared(first, max(keys))) + 1]
