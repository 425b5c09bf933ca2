"""The one place through which every loaded weight passes: what a file has and what its model needs must be the same.

A weight that is in no file is drawn at random by transformers, and one that no model takes is left out by it; both are
an error here, as are shapes that differ, empty tensors, NaN and infinity. GAPS lists the differences that are right.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import cached_file

from dsalign.data.tokens.text_ids import length_shared

logger = logging.getLogger(__name__)
SHOWN = 4  # keys of a fault that its message shows
PLAIN = ("F64", "F32", "BF16", "F16")  # dtypes of weights that are not quantised, as safetensors writes them
# How a model was quantised -> the class of transformers that reads it into plain weights.
DEQUANTISED = {
    "mxfp4": "Mxfp4Config",  # gpt-oss
    "fp8": "FineGrainedFP8Config",  # DeepSeek V3 and R1
    "compressed-tensors": "CompressedTensorsConfig",
}
WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
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
    if faults and (words := _left_by_wrappers(model, faults)):
        prefix = words[0] if all(key.startswith(words[0]) for key in faults.unexpected) else None
        pattern = WRAPPERS.pattern if prefix is None else f"^{re.escape(prefix)}"
        again, left = _loaded(where, config, value, {**how, "key_mapping": {pattern: ""}})
        if not left:
            model, faults = again, left
            logger.warning("%s: its keys are read without %s, which a wrapper left there", where, ", ".join(words))
    if faults:
        raise ValueError(faults.text(where, model))
    refuse_broken(where, {**dict(model.named_parameters()), **_saved_buffers(model)})
    _say_untied(where, model)
    return model


def _say_untied(where: str, model: Any) -> None:
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

    def text(self, where: str, model: Any) -> str:
        """The message: which keys, what is wrong with them, the likely cause and what to do."""
        parts, name = [], type(model).__name__
        if self.missing:
            parts.append(f"{len(self.missing)} weights of {name} are missing ({shown(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} keys belong to no weight ({shown(self.unexpected)})")
        for key, (found, wanted) in sorted((self.shapes or {}).items())[:SHOWN]:
            parts.append(f"{key} is {list(found)}, expected {list(wanted)}")
        return f"{where}: the weights do not fit the model: {'; '.join(parts)}. {self._cause()}"

    def _cause(self) -> str:
        keys, shapes = [*self.unexpected, *self.missing], self.shapes or {}
        if any(0 in found for found, _ in shapes.values()):
            return "Empty tensors were saved under ZeRO-3 without gathering them: save the model again, gathered"
        if any("lora_" in key or ".base_layer." in key for key in self.unexpected):
            return "The file holds a model with an adapter inside: merge the adapter, or give the adapter's own folder"
        if any(re.search(r"(qweight|qzeros|absmax|weight_scale|scale_inv|quant_state)", k) for k in self.unexpected):
            return "The weights are quantised: give the model that is not"
        if any(key.startswith(("score.", "classifier.")) for key in self.unexpected):
            return "This is a classifier, which has no language-model head: give a causal language model"
        prefix = _common_prefix(self.unexpected)
        if prefix and self.missing:
            return f"All keys that fit nothing begin with {prefix}: a wrapper's prefix; save the model without it"
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
        raise ValueError(
            f"{where}: {len(bad)} weights hold NaN or infinity ({shown(bad)}): the run that made them diverged, or the "
            "file is damaged; take an earlier checkpoint or copy it again"
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
    """Raise ValueError where weights are stored in fewer bits than they are trained in."""
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        given = quantised if isinstance(quantised, dict) else quantised.to_dict()
        method = str(getattr(given.get("quant_method"), "value", given.get("quant_method", "unknown")))
        raise ValueError(
            f"model: {where} is quantised ({method}); give the model that is not{_dequantised(where, method)}"
        )
    for file in weight_files(where):
        if file.suffix != ".safetensors":
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


@contextmanager
def reading(file: Path | str) -> Iterator[None]:
    """A context in which an error of reading the weights in `file` becomes a ValueError that names it."""
    try:
        yield
    except (SafetensorError, EOFError, pickle.UnpicklingError, RuntimeError, KeyError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{file}: its weights cannot be read, the file is cut or damaged: {first}; copy it again"
        ) from error


def weight_files(where: str) -> list[Path]:
    """The files with the weights of a folder or of a hub name that was downloaded; [] where none is found."""
    folder = Path(where)
    if not folder.is_dir():
        found = cached_file(where, "config.json", _raise_exceptions_for_missing_entries=False)
        folder = Path(found).parent if found else folder
    for index in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / index).exists():
            names = json.loads((folder / index).read_text()).get("weight_map", {}).values()
            return sorted(folder / name for name in set(names) if (folder / name).exists())
    return [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).exists()][:1]


def stored_head(where: str) -> dict[str, Tensor]:
    """The tensors of a score layer or a value head inside the weights of a model: {} where it has none.

    Keys are score.weight and score.bias, or v_head.summary.weight and v_head.summary.bias, without a wrapper's prefix.
    """
    found: dict[str, Tensor] = {}
    for file in weight_files(where):
        found |= read_tensors(file, HEAD_KEYS)
    return found


def read_tensors(file: Path, wanted: re.Pattern[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle of tensors alone, by key without wrappers' names.

    wanted: which keys, after the names of wrappers are taken away. Raises ValueError where the file cannot be read.
    """
    with reading(file):
        if file.suffix != ".safetensors":
            state = torch.load(file, weights_only=True, map_location="cpu", mmap=wanted is not None)
            named = {WRAPPERS.sub("", key): tensor for key, tensor in state.items()}
            return {key: tensor for key, tensor in named.items() if wanted is None or wanted.search(key)}
        if wanted is None:
            return {WRAPPERS.sub("", key): tensor for key, tensor in load_file(file).items()}
        with safe_open(file, framework="pt") as stored:
            keys = {key: WRAPPERS.sub("", key) for key in stored.keys()}  # noqa: SIM118
            return {name: stored.get_tensor(key) for key, name in keys.items() if wanted.search(name)}


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
