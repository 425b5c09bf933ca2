"""Trains from a checkout, installed or not: `deepspeed launch/train.py --algo dpo ...`."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # before an installed copy, so that what runs is what lies here

from dsalign.cli import main  # noqa: E402  # needs the line above

if __name__ == "__main__":
    sys.exit(main())
