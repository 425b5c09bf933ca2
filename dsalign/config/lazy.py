"""Modules that are imported when they are first used: a mistyped flag must not wait the seconds that torch takes."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Later(types.ModuleType):
    """Stands for a module that nobody has used yet; the first name that is asked of it imports the module.

    importlib.util.LazyLoader does not serve: `import torch` itself reads `__spec__` of what it finds in sys.modules,
    and LazyLoader's module loads on that. Here `__spec__` and its like are in the stand-in's own namespace.
    """

    def __getattr__(self, name: str) -> Any:
        """That name of the real module, which is imported the first time."""
        if name == "__path__":  # asked by `import torch.nn`: going on would run torch.nn twice
            raise ImportError(
                f"{self.__name__} is not loaded while options are read: write `import {self.__name__}` alone at the "
                f"top of an algorithm's file and use {self.__name__}.<name> inside functions"
            )
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        required(self.__name__)
        return getattr(importlib.import_module(self.__name__), name)


def required(name: str) -> None:
    """Raise ValueError where a top-level module is not installed, with the command that installs it."""
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        raise ValueError(f"{name}: expected it beside dsalign, found nothing; run: pip install {name}")


@contextmanager
def put_off(name: str) -> Iterator[None]:
    """Within this block `import name` gives a stand-in, which imports the top-level module when it is first used.

    Whoever got the stand-in may keep it. Nothing happens where the module is imported already. Of one that is not
    installed the first use raises ValueError, so that what needs it not, such as `dsalign doctor`, works.
    """
    if name in sys.modules:
        yield
        return
    spec = importlib.util.find_spec(name)
    module = _Later(name)
    attributes = {} if spec is None else vars(importlib.util.module_from_spec(spec))
    module.__dict__.update({key: value for key, value in attributes.items() if key != "__path__"})
    sys.modules[name] = module
    try:
        yield
    finally:
        if sys.modules.get(name) is module:
            del sys.modules[name]  # later imports are the usual ones
