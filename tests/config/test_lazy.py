"""A module that is imported when it is first used."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from dsalign.config import lazy


@pytest.fixture
def heavy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that takes long to import, and two users of it."""
    package = tmp_path / "heavy_fixture"
    package.mkdir()
    (package / "__init__.py").write_text("from heavy_fixture import part\nanswer = 42\n")
    (package / "part.py").write_text("runs = 1\n")
    (tmp_path / "light_user.py").write_text("import heavy_fixture\n\ndef use():\n    return heavy_fixture.answer\n")
    (tmp_path / "eager_user.py").write_text("import heavy_fixture.part\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("heavy_fixture", "heavy_fixture.part", "light_user", "eager_user"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return "heavy_fixture"


def test_importing_loads_nothing_and_using_does(heavy: str) -> None:
    with lazy.put_off(heavy):
        user = importlib.import_module("light_user")
        assert sys.modules[heavy].__spec__ is not None
        assert f"{heavy}.part" not in sys.modules
    assert heavy not in sys.modules
    assert user.use() == 42
    assert sys.modules[heavy].answer == 42
    assert importlib.import_module(f"{heavy}.part") is sys.modules[heavy].part


def test_using_it_while_it_is_put_off_loads_it_once(heavy: str) -> None:
    with lazy.put_off(heavy):
        user = importlib.import_module("light_user")
        assert user.use() == 42
        real = sys.modules[heavy]
        assert real is not user.heavy_fixture
    assert sys.modules[heavy] is real


def test_a_part_of_it_at_the_top_of_a_file_is_refused(heavy: str) -> None:
    with lazy.put_off(heavy), pytest.raises(ImportError) as caught:
        importlib.import_module("eager_user")
    assert str(caught.value) == (
        "heavy_fixture is not loaded while options are read: write `import heavy_fixture` alone at the top of an "
        "algorithm's file and use heavy_fixture.<name> inside functions"
    )


def test_what_is_imported_already_stays(heavy: str) -> None:
    real = importlib.import_module(heavy)
    with lazy.put_off(heavy):
        assert sys.modules[heavy] is real
    assert sys.modules[heavy] is real


def test_what_is_not_installed_is_named_when_it_is_used() -> None:
    """What uses it not, such as `dsalign doctor`, works without it."""
    told = "no_such_module: expected it beside dsalign, found nothing; run: pip install no_such_module"
    with lazy.put_off("no_such_module"):
        module = importlib.import_module("no_such_module")
    assert "no_such_module" not in sys.modules
    for use in (lambda: module.anything, lambda: lazy.required("no_such_module")):
        with pytest.raises(ValueError, match=told):
            use()
    lazy.required("json")
