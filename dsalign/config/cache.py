"""The folder for what is made once: converted models, prepared rows and reference log-probabilities."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$DSALIGN_CACHE, or ~/.cache/dsalign where it is not set. The folder may not be there yet."""
    return Path(os.environ.get("DSALIGN_CACHE", "~/.cache/dsalign")).expanduser()
