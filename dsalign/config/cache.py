"""Where converted models, prepared rows and reference log-probabilities are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where converted models are kept: $DSALIGN_CACHE, else ~/.cache/dsalign."""
    return Path(os.environ.get("DSALIGN_CACHE", "~/.cache/dsalign")).expanduser()
