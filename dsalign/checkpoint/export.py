"""The export of a trained engine to a folder that `from_pretrained` opens: weights in safetensors or a PEFT adapter,
tokenizer, and value head."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from peft import PeftModel, TaskType
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dsalign import faults
from dsalign.engines import dist
from dsalign.engines.engine import whole
from dsalign.models import four_bit
from dsalign.models.adapter_files import ROOT
from dsalign.models.adapters import TRAINED
from dsalign.models.classifier import SCORE, describe, padded_apart
from dsalign.models.heads import BIAS, VALUE_HEAD_FILE, WEIGHT, num_ids, unwrap
from dsalign.models.names import BASE_FILE, located_base

logger = logging.getLogger(__name__)
HEAD = "v_head."  # how the names of a value head's parameters begin
GATHER_BYTES = 1 << 30  # parameters gathered at a time under ZeRO-3


def whole_state(engine: Any, *, trained_only: bool) -> dict[str, Tensor]:
    """Name -> tensor on the CPU, not sharded, for each parameter of the engine, on rank 0; {} on others. Collective.

    trained_only: take only parameters that require a gradient, as for an adapter, and a value head; if not, all
    parameters, and the buffers that the model saves with its weights.
    Raises RuntimeError on every rank where a gathered tensor is empty, which would write a broken file.
    """
    state: dict[str, Tensor] = {}
    wanted = (lambda n, p: p.requires_grad or n.startswith(HEAD)) if trained_only else (lambda n, p: True)
    named = [(n, p) for n, p in engine.module.named_parameters() if wanted(n, p)]
    partitioned = engine.zero_optimization_stage() == 3  # a gathered tensor is gone after the gather, so it is copied
    batch: list[tuple[str, nn.Parameter]] = []
    size = 0
    for i, (name, parameter) in enumerate(named):
        batch.append((name, parameter))
        size += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
        if size < GATHER_BYTES and i < len(named) - 1:
            continue
        with whole(engine, [p for _, p in batch]):
            if dist.rank() == 0:
                state |= {n: p.detach().to("cpu", copy=partitioned).contiguous() for n, p in batch}
        batch, size = [], 0
    if dist.rank() == 0 and not trained_only:
        kept = engine.module.state_dict().keys()  # some experts' routers keep a bias in a buffer
        state |= {n: b.detach().to("cpu", copy=True) for n, b in engine.module.named_buffers() if n in kept}
    empty = [name for name, tensor in state.items() if tensor.numel() == 0]
    dist.agree(RuntimeError(f"parameters came back empty: {', '.join(empty[:5])}") if empty else None)
    return state


def export(engine: Any, folder: Path, tokenizer: PreTrainedTokenizerBase, base: str) -> None:
    """Write the engine's model and the tokenizer to `folder`, from rank 0. Collective.

    base: the model that an adapter belongs to, for adapter_config.json. Where rank 0 cannot write, every rank raises.
    """
    dist.agree(written(engine, folder, tokenizer, base))


def written(engine: Any, folder: Path, tokenizer: PreTrainedTokenizerBase, base: str) -> Exception | None:
    """Write as `export` does; returns what rank 0 failed with, which the caller must agree on. Collective."""
    module = engine.module
    state = whole_state(engine, trained_only=isinstance(module.model, PeftModel))
    if dist.rank() == 0:
        try:
            _write(module, state, folder, tokenizer, base)
        except Exception as error:  # whatever it is: the other ranks are waiting
            return error
    return None


def _write(module: Any, state: dict[str, Tensor], folder: Path, tokenizer: Any, base: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = module.model
    inner = unwrap(model)
    weights = {n.removeprefix("model."): t for n, t in state.items() if n.startswith("model.")}
    head = {n: t.float() for n, t in state.items() if n.startswith(HEAD)}
    classifier = getattr(module, "classifier", None)
    if classifier is not None:
        weights = {n: t for n, t in weights.items() if n not in classifier.left_out}
        tokenizer = padded_apart(tokenizer, _ends(inner, tokenizer), num_ids(inner))
    if isinstance(model, PeftModel):
        named, elsewhere = located_base(base, folder, four_bit=getattr(inner, four_bit.MARK, False))
        model.peft_config[TRAINED].base_model_name_or_path = named
        model.save_pretrained(str(folder), state_dict=weights, selected_adapters=[TRAINED], save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's unfilled model card
        if elsewhere:
            (folder / BASE_FILE).write_text(json.dumps(elsewhere, indent=2))
        if inner.generation_config is not None:
            inner.generation_config.save_pretrained(folder)
        if classifier is not None:
            _add_score(folder, head[WEIGHT])
    else:
        score = {} if classifier is None else {SCORE: head[WEIGHT].clone()}
        inner.save_pretrained(folder, state_dict=weights | score)
        if classifier is not None:
            describe(inner.config, classifier, tokenizer.pad_token_id).save_pretrained(folder)
    faults.at("in_export")
    if head:
        save_file(head, folder / VALUE_HEAD_FILE)
    if classifier is not None and (bias := float(head[BIAS])):
        logger.warning(
            "%s: the scores of transformers are lower by the value head's bias, %g, which training started with: a "
            "classifier has none",
            folder,
            bias,
        )
    tokenizer.save_pretrained(folder)


def _ends(inner: Any, tokenizer: Any) -> set[int]:
    """The token ids that end a turn: the tokenizer's own, and those at which generation with the model stops."""
    given = getattr(inner.generation_config, "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])}
    return {i for i in found if i is not None}


def _add_score(folder: Path, weight: Tensor) -> None:
    """Make an exported adapter one of a classifier, as PEFT opens it: with the layer that gives the score."""
    file, described = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    save_file(load_file(file) | {f"{ROOT}{SCORE}": weight}, file, metadata={"format": "pt"})
    config = json.loads(described.read_text())
    config["task_type"] = TaskType.SEQ_CLS.value
    config["modules_to_save"] = [*(config.get("modules_to_save") or []), "classifier", "score"]  # PEFT's own names
    described.write_text(json.dumps(config, indent=2, sort_keys=True))
