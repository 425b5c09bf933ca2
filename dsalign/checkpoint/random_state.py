"""The state of a rank's random number generators, as tensors that a checkpoint keeps."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping

import torch


def random_state() -> dict[str, torch.Tensor]:
    """Name -> state of this rank's generators: torch's on the CPU and the GPU, and Python's, each as uint8."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    text = json.dumps(random.getstate())
    state["python"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return state


def restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Set this rank's generators to what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    version, internal, gauss = json.loads(bytes(state["python"].tolist()).decode())
    random.setstate((version, tuple(internal), gauss))


def seed_random_state(seed: int, step: int, rank: int) -> None:
    """Set this rank's generators for a run that goes on with another number of ranks than it was saved with: they start
    anew from (seed, optimizer step, rank), so that every rank draws something else, and the same in each resume."""
    text = f"dsalign ranks {seed} {step} {rank}"
    torch.manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))
    random.seed(text)
