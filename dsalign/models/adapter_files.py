"""What an adapter's folder holds: its configuration, its weights, and a score layer where it has its own."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig, PeftModel, PeftType, TaskType, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor
from transformers import PreTrainedModel

from dsalign.models.weight_files import read_tensors
from dsalign.models.weights import HEAD_KEYS, refuse_broken, shown

logger = logging.getLogger(__name__)
ROOT = "base_model.model."  # how PEFT's keys begin
EMBEDDINGS = re.compile(
    r"\.(?:embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.(?:modules_to_save\.)?(?:weight$|lora_embedding_A)"
)
OWN_FORWARD = ("POLY", "XLORA", "ADALORA")  # these choose or count beside the layers
# Options of LoRA that repeat layers of the base, or apply the adapter to some tokens.
OWN_LAYERS = ("layer_replication", "alora_invocation_tokens", "arrow_config")
FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Stored:
    """An adapter as its folder has it. config: PEFT's, of a language model. state: key -> tensor, keys as PEFT writes
    them. head: the tensors of its own score layer, score.weight and score.bias, {} where it has none."""

    config: Any
    state: dict[str, Tensor]
    head: dict[str, Tensor]


def stored(folder: Path) -> Stored:
    """The adapter in a folder, its keys without wrappers' prefixes and adapter names, its score layer set apart.

    Raises ValueError where a file is missing or cut, or a tensor is empty or not finite.
    """
    file = _file(folder)
    if file is None:
        raise ValueError(f"{folder}: expected the adapter's weights in {' or '.join(FILES)}, found neither")
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (TypeError, KeyError, ValueError) as error:
        raise ValueError(f"{folder}/adapter_config.json cannot be read: {error}; copy the folder again") from error
    _refuse_other_kinds(config, folder)
    tensors = read_tensors(file)
    refuse_broken(str(file), tensors)
    state = {_plain(key): tensor for key, tensor in tensors.items()}
    if any(not key.startswith(ROOT) for key in tensors) and all(key.startswith(ROOT) for key in state):
        logger.warning("%s: its keys are read without what stands before %s", file, ROOT)
    # Of an embedding that was resized PEFT writes the trained copy twice, under its own name and under this one.
    twice = {key for key in state if ".modules_to_save." in key and key.replace(".modules_to_save.", ".") in state}
    state = {key: tensor for key, tensor in state.items() if key not in twice}
    head = {key.removeprefix(ROOT): tensor for key, tensor in state.items() if HEAD_KEYS.search(key.removeprefix(ROOT))}
    if config.task_type == TaskType.SEQ_CLS:
        config.task_type = TaskType.CAUSAL_LM  # the score layer is ours; the rest goes on a causal language model
        kept = [name for name in config.modules_to_save or [] if name not in ("score", "classifier")]
        config.modules_to_save = kept or None
    return Stored(config, {key: tensor for key, tensor in state.items() if key.removeprefix(ROOT) not in head}, head)


def _refuse_other_kinds(config: Any, folder: Path) -> None:
    """Raise ValueError for an adapter of which a model's layers do not hold all: a forward of PEFT's own, which is not
    run here, would do the rest."""
    kind = config.peft_type and PeftType(config.peft_type).value
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if tuner is None or not issubclass(tuner, BaseTuner) or config.is_prompt_learning or kind in OWN_FORWARD:
        raise ValueError(
            f"{folder}: expected an adapter of layers, such as LORA, got {kind}; merge it into its base and give that"
        )
    if odd := [name for name in OWN_LAYERS if getattr(config, name, None)]:
        raise ValueError(
            f"{folder}/adapter_config.json: expected an adapter that each layer applies alike to every token, got one "
            f"with {odd[0]}; train one without it"
        )


def head_of(folder: Path | None) -> dict[str, Tensor]:
    """The tensors of the score layer in an adapter's folder, {} where it has none."""
    return {} if folder is None else stored(folder).head


def num_embeddings(folder: Path) -> int | None:
    """How many token ids an adapter's own embedding has, None where it has none."""
    file = _file(folder)
    found = {} if file is None else read_tensors(file, EMBEDDINGS)
    sizes = {tensor.shape[1 if "lora_embedding_A" in key else 0] for key, tensor in found.items()}
    return max(sizes, default=None)


def _file(folder: Path) -> Path | None:
    """The file with an adapter's weights, None where there is none."""
    return next((folder / name for name in FILES if (folder / name).exists()), None)


def _plain(key: str) -> str:
    """A key without what a wrapper or a whole state dict adds: module., and the adapter's name behind lora_A."""
    inside = key[max(key.find(ROOT), 0) :]
    return re.sub(r"(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.default(?=\.|$)", r"\1", inside)


def resize(model: PreTrainedModel, adapter: Stored, folder: Path) -> None:
    """Give the model as many embeddings as the adapter was trained with; its own rows stay, and a line says so.

    Raises ValueError where the adapter does not hold every new row, which would be random numbers.
    """
    ends = {"embedding": model.get_input_embeddings(), "head": model.get_output_embeddings()}
    names = {what: name for what, module in ends.items() for name, one in model.named_modules() if one is module}
    whole = {what: adapter.state.get(f"{ROOT}{name}.weight") for what, name in names.items()}
    sizes = {tensor.shape[0] for tensor in whole.values() if tensor is not None}
    for what, name in names.items():
        factor = adapter.state.get(f"{ROOT}{name}.lora_embedding_A"), adapter.state.get(f"{ROOT}{name}.lora_B.weight")
        sizes |= {factor[0].shape[1]} if factor[0] is not None else set()
        sizes |= {factor[1].shape[0]} if factor[1] is not None and what == "head" else set()
    have = ends["embedding"].num_embeddings
    if not sizes or sizes == {have}:
        return
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    if len(sizes) > 1 or whole["embedding"] is None or not (tied or whole.get("head") is not None):
        raise ValueError(
            f"{folder}: the adapter was trained with {' and '.join(map(str, sorted(sizes)))} embeddings, its base has "
            f"{have}, and the adapter does not hold all of embedding and head; resize the base to the adapter's tokens "
            "(model.resize_token_embeddings, save_pretrained) and name that one in adapter_config.json"
        )
    (size,) = sizes
    model.resize_token_embeddings(size, mean_resizing=False)
    logger.warning("%s: its base is resized from %d to the adapter's %d embeddings", folder, have, size)


def fill(peft_model: PeftModel, name: str, adapter: Stored, folder: Path) -> None:
    """Copy the adapter's weights into the adapter called `name` of a PEFT model.

    Raises ValueError naming the keys that are missing or fit nothing, and the tensors of another shape.
    """
    try:
        found = set_peft_model_state_dict(peft_model, adapter.state, adapter_name=name)
    except (KeyError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        kind = "has no" if isinstance(error, KeyError) else "does not fit its base:"
        raise ValueError(
            f"{folder}: the adapter {kind} {' '.join(lines[1:3] or lines)}; name the base that it was trained on"
        ) from error
    state = peft_model.state_dict()
    read = {state[key].data_ptr() for key in state.keys() - set(found.missing_keys) if state[key].numel()}
    # A tensor that layers share, as VeRA's are, is stored once and has a key in each of them.
    missing = [k for k in found.missing_keys if name in k.split(".") and state[k].data_ptr() not in read]
    parts = [f"{len(missing)} of its weights are missing ({shown(missing)})"] if missing else []
    if found.unexpected_keys:
        parts.append(f"{len(found.unexpected_keys)} keys belong to no weight ({shown(found.unexpected_keys)})")
    if parts:
        raise ValueError(
            f"{folder}: the adapter does not fit its base: {'; '.join(parts)}. adapter_config.json is another "
            "adapter's, its base is another model, or a wrapper's prefix stands inside the keys: name the base that it "
            "was trained on"
        )
