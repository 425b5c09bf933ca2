"""Locks of builds that were killed, told from those that a process holds."""

from __future__ import annotations

from pathlib import Path

from dsalign.guard import stale_locks


def test_a_lock_that_nobody_holds_is_named_with_the_way_out(tmp_path: Path) -> None:
    """Two folders of extensions, of which one is being built by this process."""
    for name in ("py311_cpu/cpu adam", "py311_cpu/shm"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "lock").touch()
    left = tmp_path / "py311_cpu" / "cpu adam" / "lock"
    with (tmp_path / "py311_cpu" / "shm" / "lock").open():
        assert stale_locks.stale(tmp_path) == [left]
        said = stale_locks.warning({"TORCH_EXTENSIONS_DIR": str(tmp_path)})
    assert said.startswith(f"warning: {left} is left of a build that was killed") and said.endswith(f"rm '{left}'")
    assert len(stale_locks.stale(tmp_path)) == 2


def test_no_lock_no_word(tmp_path: Path) -> None:
    """Also where the folder is not there; $XDG_CACHE_HOME is where torch looks without TORCH_EXTENSIONS_DIR."""
    assert stale_locks.warning({"TORCH_EXTENSIONS_DIR": str(tmp_path / "none")}) == ""
    (tmp_path / "torch_extensions" / "shm").mkdir(parents=True)
    assert stale_locks.warning({"XDG_CACHE_HOME": str(tmp_path)}) == ""
    (tmp_path / "torch_extensions" / "shm" / "lock").touch()
    assert "shm/lock" in stale_locks.warning({"XDG_CACHE_HOME": str(tmp_path)})
