"""What a rank holds: the bytes of every tensor in the process, less those that were there before the engine."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from support import ds_file, random_groups, section
from torch import Tensor

from dsalign.config.schema import ModelOptions, OptimOptions
from dsalign.engines import engine as engines
from dsalign.engines.roles import Roles
from dsalign.models import load
from dsalign.models.names import resolve

CUDA = torch.device("cuda")  # nothing goes there: it leaves out what saves memory on CPUs alone
BUCKET = 5000  # elements


def zero_of(stage: int, offload: bool) -> dict[str, Any]:
    """A section zero_optimization as in ds_configs, with small buckets and nothing that stays whole at stage 3."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    zero |= {"reduce_bucket_size": BUCKET} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        zero |= {"offload_param": {"device": "cpu"}} if stage == 3 else {}
    return zero


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the memory behind some tensors, each once."""
    return {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors if not t.is_meta}


def alive() -> Iterator[Tensor]:
    """Every tensor of the process, and gradients, which nothing in Python may hold."""
    gc.collect()
    for found in list(gc.get_objects()):
        if issubclass(type(found), Tensor):
            yield found
            if found.is_leaf and found.grad is not None:
                yield found.grad


def held(folder: str, stage: int, tuner: str, dtype: str, offload: bool) -> dict[str, int]:
    """Bytes of an engine of a tiny model on this rank between two micro-batches of its second step: in all, and of the
    optimizer's state with its own copy of the weights; and the elements of its parameters."""
    before = storages(alive())
    optim = section(OptimOptions, deepspeed=ds_file({"zero_optimization": zero_of(stage, offload)}), batch_size=1)
    options = section(ModelOptions, tuner=tuner, lora_rank=4, lora_alpha=8, dtype=dtype)
    module = load.load_trained("policy", resolve(folder), options, device=CUDA, dropout=False, seed=1)
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    engine = engines.trained(module, optim, getattr(torch, dtype))
    roles = Roles({"policy": engine}, torch.device("cpu"), 1)
    for boundary in (False, True, False):
        engine.set_gradient_accumulation_boundary(boundary)
        loss = roles.loss("policy", random_groups("demonstrations", 1, longest=4), lambda part, out: -out.logps.sum())
        engine.backward(loss, scale_wrt_gas=False)
        del loss
        if boundary:
            engines.take_step(engine, 1.0)
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    state = storages(t for s in inner.state.values() for t in s.values() if isinstance(t, Tensor))
    now = {key: size for key, size in storages(alive()).items() if key not in before}
    whole = sum(n for n, _ in sizes)
    found = {"total": sum(now.values()), "state": sum(state.values()), "all": whole}
    found |= {"trained": sum(n for n, trains in sizes if trains), "largest": max(n for n, _ in sizes)}
    found["largest_trained"] = max(n for n, trains in sizes if trains)
    engine.destroy()
    return found
