"""Where dsalign keeps what it makes once."""

from __future__ import annotations

from pathlib import Path

import pytest

from dsalign.config.cache import cache_folder


@pytest.mark.parametrize(("given", "folder"), [("/a/b", Path("/a/b")), ("~/kept", Path.home() / "kept")])
def test_the_environment_names_it(given: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSALIGN_CACHE", given)
    assert cache_folder() == folder


def test_without_a_word_it_is_in_the_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSALIGN_CACHE", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "dsalign"
