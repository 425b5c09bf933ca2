"""The contract of an algorithm, and the algorithms found by their file names.

An algorithm is one frozen dataclass in `dsalign/algos/NAME.py`: fields are hyper-parameters, methods are mathematics.
`prepare` does all that has no gradient, `<role>_loss` all that has one. Losses are sums; the trainer divides by units.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from typing import Any


def names() -> tuple[str, ...]:
    """The algorithms: one a file of this folder."""
    return tuple(sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_")))


def load(name: str) -> type[Any]:
    """The dataclass of the algorithm `name`.

    Raises ValueError where there is no such file.
    """
    if name not in names():
        raise ValueError(f"algo: no algorithm is called {name!r}; choose one of {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    mine = [c for c in vars(module).values() if getattr(c, "__module__", None) == module.__name__]
    found = [c for c in mine if dataclasses.is_dataclass(c) and hasattr(c, "roles")]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one dataclass with roles, it has {len(found)}")
    algorithm: type[Any] = found[0]  # type: ignore[assignment]
    return algorithm
