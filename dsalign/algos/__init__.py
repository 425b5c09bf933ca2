"""The algorithms, found by their file names: one frozen dataclass in `dsalign/algos/NAME.py` each.

Fields are hyper-parameters, methods are mathematics; `dsalign.contract.algorithm` is the contract.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any

from dsalign.contract.algorithm import Algorithm


def names() -> tuple[str, ...]:
    """The names of all algorithms, sorted: the files of this folder."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def load(name: str) -> type[Any]:
    """The dataclass of the algorithm `name`; its file is imported.

    Raises ValueError where there is no such file, TypeError where the file does not define exactly one such class.
    """
    if name not in names():
        raise ValueError(f"algo: no algorithm is called {name!r}; choose one of {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    mine = [c for c in vars(module).values() if getattr(c, "__module__", None) == module.__name__]
    found = [c for c in mine if isinstance(c, type) and dataclasses.is_dataclass(c) and Algorithm in c.__mro__]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one dataclass of an Algorithm, it has {len(found)}")
    return found[0]
