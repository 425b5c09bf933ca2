"""Disk and memory: what a run needs of a disk before its first step, and faults of either told by name."""

from __future__ import annotations

import errno
import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsalign.config.cache import cache_folder
from dsalign.config.schema import RunConfig
from dsalign.engines.dist import ElsewhereError
from dsalign.engines.memory import out_of_memory
from dsalign.guard.disk import amount, free

GIB = 2**30
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)
TOLD = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE, *REFUSED)
SAYS_FULL = ("No space left", "Disk quota exceeded", "os error 28", "os error 122")
CUT_OFF = ("unexpected pos", "PytorchStreamWriter failed", "file write failed")  # torch.save on a full disk


@dataclass(frozen=True)
class Needs:
    """Bytes on disk. weights: of one export of the trained models. state: what a checkpoint has beside them."""

    weights: int
    state: int

    @property
    def checkpoint(self) -> int:
        """Bytes of one checkpoint."""
        return self.weights + self.state


def needs_of(engines: Mapping[str, Any], config: RunConfig) -> Needs:
    """What the engines that are trained need on disk: exported weights, and in a checkpoint DeepSpeed's copy of them,
    float32 weights and moments."""
    weights = state = 0
    adapters, moments = config.models.tuner == "lora", 8 if config.optim.optimizer == "adamw" else 0
    for engine in engines.values():
        stage, half = engine.zero_optimization_stage(), engine.fp16_enabled() or engine.bfloat16_enabled()
        sizes = [
            (getattr(p, "ds_numel", p.numel()), p.element_size(), p.requires_grad) for p in engine.module.parameters()
        ]
        exported = sum(n * width for n, width, trained in sizes if trained or not adapters)
        frozen = sum(n * width for n, width, trained in sizes if not trained and not adapters)
        numbers = sum(n for n, _, trained in sizes if trained)
        weights += exported
        state += numbers * (moments + (4 if stage or half else 0)) + (frozen if stage == 3 else exported)
    return Needs(weights, state)


def refuse_full_disk(needs: Needs, config: RunConfig, batches: int) -> None:
    """Raise ValueError where output_dir has less room than the run needs: as many checkpoints as are there at a time,
    one of them being written, and final/. Those of a run that is resumed are there already.

    batches: global batches that the run prepares, of which each gives some optimizer steps.
    """
    output, folder = config.output, Path(config.output.output_dir)
    existing = len(list(folder.glob("checkpoint-*"))) if output.resume else 0
    steps = min(batches * config.algorithm.traits.passes, config.optim.max_steps or math.inf)
    saves = math.ceil(steps / output.save_steps)
    evaluated = bool(config.data.val_dataset or config.data.split_dataset_ratio)
    at_a_time = min(saves, max(1, output.save_total_limit + 1 + evaluated - existing))
    need, have = at_a_time * needs.checkpoint + needs.weights, free(folder)
    if need > have:
        raise ValueError(
            f"output_dir: expected {amount(need)} free at {folder}, got {amount(have)}: {at_a_time} checkpoint(s) of "
            f"{amount(needs.checkpoint)} at a time (weights {amount(needs.weights)}, optimizer and engine "
            f"{amount(needs.state)}; one more than --save_total_limit {output.save_total_limit}, as the new one is "
            f"written before an old one goes) and final/ of {amount(needs.weights)}. Free space, name another "
            "--output_dir, lower --save_total_limit, raise --save_steps, or train with --tuner lora"
        )


def disk_fault(error: BaseException | None) -> tuple[str, str]:
    """(what a file system refused, the path, empty where it is not known) for an error that comes from one, itself or
    as the cause of another; ("", "") for any other error."""
    seen = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in TOLD:
            return f"{seen.strerror} ({errno.errorcode[seen.errno]}, errno {seen.errno})", str(seen.filename or "")
        text = str(seen)
        if any(words in text for words in SAYS_FULL):
            return "No space left on device", ""
        if any(words in text for words in CUT_OFF):
            return "a file could not be written whole, as on a full disk", ""
        seen = seen.__cause__ or seen.__context__
    return "", ""


@contextmanager
def writing(what: str, path: Path, need: int) -> Iterator[None]:
    """A context that tells a fault of the disk while `what` is written to `path`, by ValueError: what was refused, how
    much was needed and how much there is. need: bytes."""
    try:
        yield
    except ElsewhereError:
        raise
    except Exception as error:
        refused, where = disk_fault(error)
        if not refused:
            raise
        raise ValueError(
            f"{what} could not be written to {where or path}: {refused}; it needs {amount(need)}, and {path} has "
            f"{amount(free(path))} free. What was saved before is as it was: make room and go on with --resume"
        ) from error


@contextmanager
def told(config: RunConfig) -> Iterator[None]:
    """A context of a whole run that turns faults of a disk, and of memory, into a ValueError that says what to do."""
    try:
        yield
    except ElsewhereError:
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            raise ValueError(_memory_text(error, config)) from error
        refused, where = disk_fault(error) if isinstance(error, OSError) else ("", "")
        if not refused:
            raise
        others = [Path(config.output.output_dir), cache_folder(), Path(tempfile.gettempdir())]
        folders = [Path(where)] if where else others
        room = ", ".join(f"{folder} has {amount(free(folder))} free" for folder in dict.fromkeys(folders))
        raise ValueError(f"{where or 'a file'}: {refused}; {room}. Make room or name another folder") from error


def _memory_text(error: BaseException, config: RunConfig) -> str:
    """The message of a run whose memory was not enough: where, how much it asked for, and which options to change."""
    optim, models = config.optim, config.models
    first = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    where = ", ".join(getattr(error, "__notes__", ())) or "while the run was prepared"
    hints = []
    if optim.max_tokens is not None:
        hints.append(f"--max_tokens (now {optim.max_tokens})")
    elif optim.batch_size > 1:
        hints.append(f"--batch_size (now {optim.batch_size}; raise --gradient_accumulation_steps as much)")
    hints.append(f"--max_length (now {config.data.max_length})")
    if config.algorithm.traits.online:
        hints.append(f"--local_rollout_forward_batch_size (now {config.rollout.local_rollout_forward_batch_size})")
    more = [] if models.gradient_checkpointing else ["--gradient_checkpointing true"]
    more += ["--tuner lora"] if models.tuner == "full" else []
    more += [] if "3" in optim.deepspeed and "offload" in optim.deepspeed else ["--deepspeed zero3_offload"]
    give = f", or give {' or '.join(more)}" if more else ""
    return f"out of memory {where}: {first}; lower {' or '.join(hints)}{give}"
