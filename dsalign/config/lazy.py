"""A module that is imported when it is first used: a mistyped flag must not cost the seconds that torch takes."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Later(types.ModuleType):
    """Stands for a module that nobody has used yet, and passes every name on to it.

    importlib.util.LazyLoader does not serve: `import torch` itself reads `__spec__` of what it finds in sys.modules,
    and its module loads on that. Here `__spec__` and its like are in the namespace, so they load nothing.
    """

    def __getattr__(self, name: str) -> Any:
        """The real module's `name`; imports it the first time."""
        if name == "__path__":  # asked by `import torch.nn`: going on would run torch.nn twice
            raise ImportError(
                f"{self.__name__} is not loaded while options are read: write `import {self.__name__}` alone at the "
                f"top of an algorithm's file and use {self.__name__}.<name> inside functions"
            )
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def put_off(name: str) -> Iterator[None]:
    """While this is open, `import name` gives a stand-in that imports the top-level module once it is used.

    Whoever got the stand-in may keep it. Nothing happens where the module is imported already.
    Raises ModuleNotFoundError where it is not installed.
    """
    if name in sys.modules:
        yield
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ModuleNotFoundError(
            f"{name}: expected it beside dsalign, found nothing; run: pip install {name}", name=name
        )
    module = _Later(name)
    attributes = vars(importlib.util.module_from_spec(spec))
    module.__dict__.update({key: value for key, value in attributes.items() if key != "__path__"})
    sys.modules[name] = module
    try:
        yield
    finally:
        if sys.modules.get(name) is module:
            del sys.modules[name]  # later imports are the usual ones


@contextmanager
def without(name: str) -> Iterator[None]:
    """While this is open, importing a top-level module fails as if it were not installed. Nothing happens where it is
    imported already."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]  # what the import system takes for absent
    try:
        yield
    finally:
        del sys.modules[name]
