"""`checkpoint-N/` folders: written beside, renamed when whole, rotated, and read again by --resume."""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from dsalign.checkpoint.export import export
from dsalign.checkpoint.progress import Progress
from dsalign.engines import dist

PROGRESS_FILE = "trainer.json"


class Store:
    """The checkpoints of one run. engines: the trained roles'; each is exported beside its DeepSpeed state. bases: what
    the adapter of each role sits on."""

    def __init__(
        self,
        output_dir: Path,
        engines: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        bases: Mapping[str, str],
        fingerprint: Mapping[str, Any],
        *,
        keep: int,
        adapters_only: bool,
    ) -> None:
        self.output_dir, self.engines, self.tokenizer, self.bases = output_dir, engines, tokenizer, bases
        self.fingerprint, self.keep, self.adapters_only = dict(fingerprint), keep, adapters_only

    def export(self, folder: Path) -> None:
        """The trained models as folders: the first role at `folder`, further roles below it. Collective."""
        for i, (role, engine) in enumerate(self.engines.items()):
            export(engine, folder if i == 0 else folder / role, self.tokenizer, self.bases[role])

    def save(self, progress: Progress) -> Path:
        """Write checkpoint-<step>; it appears under its name only when every rank has written its part. Collective."""
        final = self.output_dir / f"checkpoint-{progress.step}"
        staging = self.output_dir / f".staging-{progress.step}"
        if dist.rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        dist.barrier()
        self.export(staging)
        for role, engine in self.engines.items():
            engine.save_checkpoint(
                str(staging / "engines"), tag=role, save_latest=False, exclude_frozen_parameters=self.adapters_only
            )
        save_file(_random_state(), staging / f"random-{dist.rank()}.safetensors")
        dist.barrier()
        if dist.rank() == 0:
            content = {"progress": progress.as_dict(), "fingerprint": self.fingerprint}
            (staging / PROGRESS_FILE).write_text(json.dumps(content, indent=2))
            shutil.rmtree(final, ignore_errors=True)
            staging.rename(final)
            self._rotate(progress)
        dist.barrier()
        return final

    def _rotate(self, progress: Progress) -> None:
        """Keep the newest `keep` checkpoints, and the best one besides."""
        found = checkpoints(self.output_dir)
        for step in sorted(found)[: -self.keep or None]:
            if step != progress.best_step:
                shutil.rmtree(found[step])

    def load(self, folder: Path) -> Progress:
        """Restore engines and random state from a checkpoint folder; returns where it stood. Collective.

        Raises ValueError where the checkpoint belongs to a run with other settings, naming each key and both values, or
        has no state of an engine.
        """
        content = json.loads((folder / PROGRESS_FILE).read_text())
        theirs = content["fingerprint"]
        other = {k: (theirs.get(k), v) for k, v in self.fingerprint.items() if theirs.get(k) != v}
        if other:
            lines = "; ".join(f"{k} was {a}, is {b}" for k, (a, b) in other.items())
            raise ValueError(f"resume: {folder} comes from a run with other settings: {lines}")
        for role, engine in self.engines.items():
            if not (folder / "engines" / role).is_dir():
                raise ValueError(f"resume: {folder} has no DeepSpeed state for the {role}")
            engine.load_checkpoint(str(folder / "engines"), tag=role, load_module_strict=not self.adapters_only)
        _restore_random_state(load_file(folder / f"random-{dist.rank()}.safetensors"))
        return Progress(**content["progress"])


def checkpoints(output_dir: Path) -> dict[int, Path]:
    """Step -> folder of the checkpoints of a run."""
    found = (re.fullmatch(r"checkpoint-(\d+)", p.name) for p in output_dir.glob("checkpoint-*"))
    return {int(m[1]): output_dir / m[0] for m in found if m and (output_dir / m[0] / PROGRESS_FILE).exists()}


def find(resume: str, output_dir: Path) -> Path:
    """The folder that --resume means: a checkpoint folder, or `latest` in the output folder.

    Raises ValueError where there is none.
    """
    if resume != "latest":
        if not (Path(resume) / PROGRESS_FILE).exists():
            raise ValueError(f"resume: {resume} is no checkpoint folder (it has no {PROGRESS_FILE})")
        return Path(resume)
    found = checkpoints(output_dir)
    if not found:
        raise ValueError(f"resume: no checkpoint-N in {output_dir}; leave --resume out to start a new run")
    return found[max(found)]


def move_aside(output_dir: Path, inputs: Sequence[str | None]) -> Path | None:
    """Rename the folder of an earlier run to NAME.1, NAME.2, ...; returns its new path, or None where there was no run.

    Raises ValueError where one of `inputs` (paths or names) lies inside it, as it would be gone from its place.
    """
    if not (output_dir / "metrics.jsonl").exists():
        return None
    for name in inputs:
        if name and Path(name).resolve().is_relative_to(output_dir.resolve()):
            raise ValueError(
                f"output_dir: {output_dir} holds an earlier run that this one reads from ({name}); give another "
                "--output_dir"
            )
    number = next(n for n in itertools.count(1) if not output_dir.with_name(f"{output_dir.name}.{n}").exists())
    return output_dir.rename(output_dir.with_name(f"{output_dir.name}.{number}"))


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    text = json.dumps(random.getstate())
    state["python"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return state


def _restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
    version, internal, gauss = json.loads(bytes(state["python"].tolist()).decode())
    random.setstate((version, tuple(internal), gauss))
