"""The room on a disk, and bytes with a unit."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsalign.guard import disk

MIB = 2**20


def test_free_asks_the_nearest_folder_that_is_there(tmp_path: Path) -> None:
    assert disk.free(tmp_path / "a" / "b") == pytest.approx(disk.free(tmp_path), abs=64 * MIB)
    assert [disk.amount(n) for n in (512, 1536, 3 * 2**30, 5 * 2**40)] == ["512 B", "1.5 KiB", "3 GiB", "5 TiB"]
