"""Disk and memory: what a checkpoint takes, and what is said where there is too little of either."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
import run_cases
import torch
from run_cases import Run
from support import RankPool, quick_if

from dsalign.config import parse
from dsalign.config.schema import RunConfig
from dsalign.engines import dist
from dsalign.engines.dist import ElsewhereError
from dsalign.guard import resources
from dsalign.guard.resources import Needs

MIB = 2**20


def config_of(*words: str, tuner: str = "full") -> RunConfig:
    return parse.parse(["--algo", "sft", "--tuner", tuner, *words], world_size=1).config


def taken(run: Run, out: Path) -> tuple[int, int]:
    """(bytes that a checkpoint is said to need, bytes of tensors that it takes) after a step."""
    trainer = run_cases.train(run, 1)
    store = run_cases.store_of(trainer, run, out)
    folder = store.save(trainer.progress)
    dist.barrier()
    kinds = (".safetensors", ".pt")
    files = [f for f in folder.rglob("*") if f.suffix in kinds and not f.name.startswith("random")]
    config = config_of(tuner=run.tuner)
    return resources.needs_of(store.engines, config).checkpoint, sum(f.stat().st_size for f in files)


@pytest.mark.parametrize(
    ("stage", "tuner", "dtype"),
    [
        quick_if((s, t, d) in {(2, "full", "float32"), (3, "full", "float32")}, s, t, d)
        for s in (0, 1, 2, 3)
        for t in ("full", "lora")
        for d in ("float32", "bfloat16")
    ],
)
def test_a_checkpoint_takes_what_it_is_said_to_need(
    stage: int, tuner: str, dtype: str, tiny: Path, two_ranks: RankPool, tmp_path: Path
) -> None:
    """But for the containers of the files, 100 KiB in all of this tiny model, and for padding."""
    need, found = two_ranks.run(taken, Run("sft", tiny, stage, tuner, getattr(torch, dtype)), tmp_path)
    assert need <= found <= 1.02 * need + 150_000


def test_the_room_of_a_run_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """10 + 20 MiB a checkpoint. 100 steps, a save every 10: three at a time with --save_total_limit 2, and final/ of
    10: 100 MiB. A run that saves once needs 40; a resumed one that has two checkpoints already, one more and final/."""
    needs = Needs(10 * MIB, 20 * MIB)
    out = tmp_path / "run"

    def refusal(have: int, *words: str, every: str = "10") -> str:
        monkeypatch.setattr(resources, "free", lambda path: have * MIB)
        config = config_of("--output_dir", str(out), "--max_steps", "100", "--save_steps", every, *words)
        try:
            resources.refuse_full_disk(needs, config, 200)
        except ValueError as error:
            return str(error)
        return ""

    assert refusal(100) == ""
    said = refusal(99)
    assert said.startswith(
        f"output_dir: expected 100 MiB free at {out}, got 99 MiB: 3 checkpoint(s) of 30 MiB at a time"
    )
    assert "weights 10 MiB, optimizer and engine 20 MiB; one more than --save_total_limit 2" in said
    assert refusal(39, every="100") and refusal(40, every="100") == ""
    assert refusal(129, "--split_dataset_ratio", "0.1") and refusal(130, "--split_dataset_ratio", "0.1") == ""
    for step in (10, 20):
        (out / f"checkpoint-{step}").mkdir(parents=True)
        (out / f"checkpoint-{step}" / "trainer.json").touch()
    assert refusal(39, "--resume", "latest") and refusal(40, "--resume", "latest") == ""


def chained(text: str) -> Exception:
    """An error of a library whose context is that of a full disk."""
    error = RuntimeError(text)
    error.__context__ = OSError(errno.ENOSPC, "No space left on device")
    return error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left", "x/y.pt"), r"to x/y.pt: No space left \(ENOSPC, errno 28\)"),
        (OSError(errno.EROFS, "Read-only file system"), r"Read-only file system \(EROFS, errno 30\)"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 9472 vs 9366"), "as on a full disk"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "No space left on device"),
        (chained("cannot pickle"), "ENOSPC"),
    ],
)  # fmt: skip
def test_a_disk_that_refuses_is_told_by_name(error: Exception, text: str, tmp_path: Path) -> None:
    """What was written, where, what was refused, how much it needs and how much there is."""
    with pytest.raises(ValueError, match=text) as caught, resources.writing("checkpoint-3", tmp_path, 5 * MIB):
        raise error
    said = str(caught.value)
    assert said.startswith("checkpoint-3 could not be written to ") and f"it needs 5 MiB, and {tmp_path} has " in said


@pytest.mark.parametrize("error", [RuntimeError("shape"), ElsewhereError("rank 1 stopped: No space left on device")])
def test_other_errors_pass(error: Exception, tmp_path: Path) -> None:
    for context in (resources.writing("it", tmp_path, 1), resources.told(config_of())):
        with pytest.raises(type(error)) as caught, context:
            raise error
        assert caught.value is error


def test_a_cache_on_a_full_disk_names_the_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSALIGN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="a file: No space left on device") as caught, resources.told(config_of()):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert f"{tmp_path / 'cache'} has " in str(caught.value)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ("--batch_size", "4"),
            "lower --batch_size (now 4; raise --gradient_accumulation_steps as much) or --max_length",
        ),
        (("--max_tokens", "4096"), "lower --max_tokens (now 4096) or --max_length (now 2048), or give"),
        ((), "or give --gradient_checkpointing true or --tuner lora or --deepspeed zero3_offload"),
    ],
)
def test_too_little_memory_names_the_options_to_change(words: tuple[str, ...], text: str) -> None:
    """An injected failure of an allocator, with the note that the trainer gives it."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    error.add_note("in training step 3, a micro-batch of 4 row(s), 800 tokens")
    with pytest.raises(ValueError) as caught, resources.told(config_of(*words)):
        raise error
    start = "out of memory in training step 3, a micro-batch of 4 row(s), 800 tokens: CUDA out of memory. Tried"
    assert str(caught.value).startswith(start) and text in str(caught.value)


def out_of_memory_in_training(folder: Path) -> str:
    """The message where the second micro-batch of a run cannot have its memory."""
    trainer: Any = run_cases.build(Run("sft", folder))
    plain, calls = trainer.roles.loss, []

    def loss(*given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            torch.empty(2**60)  # the CPU's own allocator refuses
        return plain(*given, **named)

    trainer.roles.loss = loss
    try:
        with resources.told(config_of()):
            trainer.fit(lambda metrics: None)
    except ValueError as error:
        return str(error)
    return ""


def test_the_step_that_had_too_little_memory_is_named(tiny: Path, one_rank: RankPool) -> None:
    assert one_rank.run(out_of_memory_in_training, tiny).startswith(
        "out of memory in training step 1, a micro-batch of 2 row(s), "
    )
