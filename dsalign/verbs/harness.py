"""lm-eval as a process of its own, on a model of ours."""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys

from dsalign.config.schema import RunConfig
from dsalign.models.names import resolve


def run(model: str, tasks: str, config: RunConfig, batch_size: int) -> int:
    """Run lm-eval's tasks, names with commas, on a model; returns its exit code. Its output is its own.

    Raises ValueError where lm-eval is not installed, or as `command` does.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm_eval: expected the package lm-eval, which is not installed; run pip install lm-eval")
    return subprocess.run(command(model, tasks, config, batch_size), check=False).returncode


def command(model: str, tasks: str, config: RunConfig, batch_size: int) -> list[str]:
    """The words of the process: an adapter goes on top of its base by lm-eval's own `peft`.

    Raises ValueError for an adapter of a base in 4 bits.
    """
    source = resolve(model)
    if source.four_bit:
        raise ValueError(
            f"lm_eval: expected a model that other programs open as it was trained, got the adapter {model} of a base "
            f"in 4 bits, which lm-eval would put on the base as it is on disk; run dsalign merge {shlex.quote(model)} "
            "and give that"
        )
    parts = [f"pretrained={source.weights}", *([f"peft={source.adapter}"] if source.adapter else [])]
    if source.adapter is not None and (source.adapter / "tokenizer_config.json").exists():
        parts.append(f"tokenizer={source.adapter}")
    parts += [f"dtype={config.models.dtype}", f"trust_remote_code={config.models.trust_remote_code}"]
    how = ["--model_args", ",".join(parts), "--tasks", tasks, "--batch_size", str(batch_size)]
    return [sys.executable, "-m", "lm_eval", "--model", "hf", *how, "--seed", str(config.seed)]
