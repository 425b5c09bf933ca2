"""What a run needs outside its configuration, tried before torch is imported: reward files, and the output folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsalign.checkpoint import folder_lock
from dsalign.config.schema import RunConfig
from dsalign.rewards.functions import load_function


def load_rewards(config: RunConfig) -> None:
    """Import the file of every reward function. Raises ValueError as `load_function` does."""
    if config.algorithm.traits.roles.get("reward") == "frozen":
        for name in config.models.reward_funcs:
            load_function(name)


@contextmanager
def ready(config: RunConfig) -> Iterator[None]:
    """A context in which this process alone writes to the run's output folder, and its reward files can be imported.

    Raises ValueError where another process writes there, or a file cannot be used.
    """
    load_rewards(config)
    with folder_lock.held(Path(config.output.output_dir)):
        yield
