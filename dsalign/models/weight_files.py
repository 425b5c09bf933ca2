"""The files in which weights are stored, and the tensors in them, each read under its key without wrappers' names."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
LONGEST = 120  # characters of a library's error that a message repeats
NAMES = ("model.safetensors", "pytorch_model.bin")  # in the order in which transformers looks for them


def weight_files(where: str) -> list[Path]:
    """The files with the weights of a folder or of a hub name that was downloaded, those of which transformers reads;
    [] where none is found. Raises ValueError for an index that cannot be read."""
    folder = Path(where)
    if not folder.is_dir():
        found = cached_file(where, "config.json", _raise_exceptions_for_missing_entries=False)
        folder = Path(found).parent if found else folder
    for name in NAMES:
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if not index.exists():
            continue
        with reading(index):
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [folder / file for file in sorted(set(named))]
        return [file for file in files if file.exists()]
    return []


@contextmanager
def reading(file: Path | str) -> Iterator[None]:
    """A context in which an error of reading the weights in `file` becomes a ValueError that names it."""
    try:
        yield
    except (SafetensorError, EOFError, pickle.UnpicklingError, RuntimeError, KeyError, json.JSONDecodeError) as error:
        if "GLOBAL" in str(error) and isinstance(error, pickle.UnpicklingError):
            raise ValueError(f"{file} holds more than tensors and is not opened; save its tensors alone") from error
        first = next(iter(str(error).strip().splitlines()), "")[:LONGEST]
        said = first if isinstance(error, RuntimeError | SafetensorError) else f"{type(error).__name__} {first}".strip()
        raise ValueError(
            f"{file}: its weights cannot be read: {said}; the file is cut or damaged, or config.json is another "
            "model's: copy the whole folder again"
        ) from error


@contextmanager
def tensors_in(file: Path, *, mapped: bool) -> Iterator[tuple[list[str], Callable[[str], Tensor]]]:
    """(keys, reader of the tensor with a key) of a safetensors file, or of a pickle of tensors alone.

    mapped: whether the tensors of a pickle may stay in the file until they are used. Raises ValueError where the file
    cannot be read, or holds something else beside tensors.
    """
    with reading(file):
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stored:
                yield list(stored.keys()), stored.get_tensor
            return
        mapped = mapped and zipfile.is_zipfile(file)  # an old pickle cannot be
        state = torch.load(file, weights_only=True, map_location="cpu", mmap=mapped)
    other = [str(key) for key, value in state.items() if not isinstance(value, Tensor)]
    if other:
        inside = next((key for key in other if isinstance(state[key], dict)), "")
        fix = f"its weights may be what it has under {inside!r}: save" if inside else "save"
        raise ValueError(f"{file}: expected tensors alone, got {', '.join(other[:4])} too; {fix} the weights alone")
    yield list(state), state.__getitem__


def read_tensors(file: Path, wanted: re.Pattern[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle of tensors alone, by key without wrappers' names.

    wanted: which keys, after the names of wrappers are taken away. Raises ValueError where the file cannot be read, or
    has two tensors for one key.
    """
    found: dict[str, tuple[str, Tensor]] = {}
    with tensors_in(file, mapped=wanted is not None) as (keys, tensor):
        for key in keys:
            name = WRAPPERS.sub("", key)
            if wanted is None or wanted.search(name):
                one = tensor(key)
                if name in found:
                    _refuse_two(f"{file}: {found[name][0]}", f"{file}: {key}", found[name][1], one)
                found[name] = key, one
    return {name: one for name, (_, one) in found.items()}


def refuse_doubles(where: str, prefix: str, base: str) -> None:
    """Raise ValueError where a weight is stored twice with other numbers: under one key in two files, or under two keys
    that are one without what wrappers left there. transformers would take either of the two.

    prefix: a pattern of what the keys are read without. base: with which all keys may begin, such as "model.".
    """
    seen: dict[str, tuple[Path, str]] = {}
    for file in weight_files(where):
        with tensors_in(file, mapped=True) as (keys, tensor):
            for key in keys:
                name = re.sub(prefix, "", WRAPPERS.sub("", key)).removeprefix(base)
                if name in seen:
                    other, its = seen[name]
                    with tensors_in(other, mapped=True) as (_, of_other):
                        _refuse_two(f"{other}: {its}", f"{file}: {key}", of_other(its), tensor(key))
                seen[name] = file, key


def _refuse_two(first: str, second: str, one: Tensor, other: Tensor) -> None:
    if one.shape != other.shape or not torch.equal(one, other):
        raise ValueError(
            f"{first} and {second}: expected one tensor for a weight, got two that differ; remove the one that is not "
            "meant, or save the model again"
        )
