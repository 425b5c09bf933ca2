"""The export of a trained engine to a folder that `from_pretrained` opens: weights in safetensors or a PEFT adapter,
tokenizer, and value head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dsalign import faults
from dsalign.engines import dist
from dsalign.engines.engine import whole
from dsalign.models.adapters import TRAINED
from dsalign.models.heads import VALUE_HEAD_FILE, unwrap

GATHER_BYTES = 1 << 30  # parameters gathered at a time under ZeRO-3


def whole_state(engine: Any, *, trained_only: bool) -> dict[str, Tensor]:
    """Name -> tensor on the CPU, not sharded, for each parameter of the engine, on rank 0; {} on others. Collective.

    trained_only: take only parameters that require a gradient, as for an adapter; if not, all parameters, and the
    buffers that the model saves with its weights.
    Raises RuntimeError on every rank where a gathered tensor is empty, which would write a broken file.
    """
    state: dict[str, Tensor] = {}
    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad or not trained_only]
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
    if isinstance(model, PeftModel):
        model.peft_config[TRAINED].base_model_name_or_path = str(Path(base).resolve()) if Path(base).is_dir() else base
        model.save_pretrained(str(folder), state_dict=weights, selected_adapters=[TRAINED], save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's unfilled model card
        if inner.generation_config is not None:
            inner.generation_config.save_pretrained(folder)
    else:
        inner.save_pretrained(folder, state_dict=weights)
    faults.at("in_export")
    head = {n: t.float() for n, t in state.items() if n.startswith("v_head.")}
    if head:
        save_file(head, folder / VALUE_HEAD_FILE)
    tokenizer.save_pretrained(folder)
