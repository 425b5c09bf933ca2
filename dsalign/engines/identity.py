"""What a run is made of: configuration, code, data, models and tokenizer, each as a short text that differs where they
do. It must be the same on every rank before the first step, and but for what may change when the run is resumed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from transformers.utils import cached_file

from dsalign import __version__
from dsalign.config import ds_files
from dsalign.config.schema import RunConfig, one_line
from dsalign.contract.groups import Group
from dsalign.data.tokens.templates import Template
from dsalign.models.names import Source

LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "tokenizers")
GROUPS = 200_000  # groups of a data set up to which all are read; of more so many, evenly over all
WHOLE = 1 << 26  # bytes of a file up to which all are read; of more BLOCKS of BLOCK bytes, evenly over all
BLOCK, BLOCKS = 1 << 20, 64
WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.jinja")


def of_run(config: RunConfig) -> dict[str, str]:
    """Key -> text, of the configuration, the files that it names, and the versions. Nothing large is read."""
    found = {name: one_line(value) for name, value in config.options().items()}
    found |= {f"version of {name}": version for name, version in versions().items()}
    found["code of dsalign"] = _of_code()
    found["content of deepspeed"] = _digest([ds_files.find(config.optim.deepspeed).read_bytes()])
    return found | of_rewards(config)


def versions() -> dict[str, str]:
    """Python and each library of which a version may change numbers -> its version."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}


def of_rewards(config: RunConfig) -> dict[str, str]:
    """Key -> text, of each reward function: its name, which stays where its file moves, and a digest of the file."""
    found = {}
    for name in config.models.reward_funcs:
        path, _, function = name.rpartition(":")
        file = Path(path).expanduser()
        key = f"content of {file.name}:{function}"
        found[key] = _digest([file.read_bytes()]) if file.is_file() else __version__
    return found


def _of_code() -> str:
    """A digest of dsalign's own files: two checkouts have one version."""
    package = Path(__file__).resolve().parent.parent
    return _digest(path.read_bytes() for path in sorted(package.rglob("*.py")))


def of_inputs(
    groups: Mapping[str, Sequence[Group] | None], sources: Mapping[str, Source], template: Template
) -> dict[str, str]:
    """Key -> text, of what the ranks have read. groups: name of a data set -> its groups. sources: role -> its weights:
    of a folder its files count, of a hub's name the commit that is in the hub's cache. Names of folders and data files
    do not count, so they may move."""
    found = {f"rows of {name}": _of_groups(some) for name, some in groups.items() if some is not None}
    vocabulary = sorted(template.tokenizer.get_vocab().items())
    found["tokenizer"] = _digest([repr(vocabulary).encode(), repr(sorted(template.end_ids)).encode()])
    found["template"] = _digest([str(template.chat_template or template.tokenizer.chat_template).encode()])
    for role, source in sources.items():
        parts = [Path(source.weights), source.adapter]
        texts = [_of_folder(folder) for folder in parts if folder is not None and folder.is_dir()]
        if not Path(source.weights).is_dir():
            texts.insert(0, f"{source.weights} {_commit(source.weights)}")
        found[f"files of the {role} model"] = " ".join(texts)
    return found


def _commit(name: str) -> str:
    """The commit of a hub's model that is in the hub's cache; empty where it is not there."""
    try:
        return Path(str(cached_file(name, "config.json"))).parent.name
    except OSError:
        return ""


def _of_groups(groups: Sequence[Group]) -> str:
    """The number of groups, and a digest of all that training reads of them; the place of a row is no part of it."""
    chosen = range(0, len(groups), max(1, -(-len(groups) // GROUPS)))
    return f"{len(groups)} rows {_digest(part for i in chosen for part in _of_group(groups[i]))}"


def _of_group(group: Group) -> Iterator[bytes]:
    for ids in (group.prompt, *group.completions):
        yield array("i", ids).tobytes()
    yield repr((group.label, group.margin, group.masks, group.columns, group.turns, group.tools)).encode()


def _of_folder(folder: Path) -> str:
    files = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)})
    return _digest(part for path in files for part in (path.name.encode(), *_of_file(path)))


def _of_file(path: Path) -> Iterator[bytes]:
    """The size of a file and its bytes: all, or where there are more than WHOLE those of BLOCKS blocks, the first and
    the last among them."""
    size = path.stat().st_size
    yield str(size).encode()
    count = BLOCKS if size > WHOLE else max(1, -(-size // BLOCK))
    with path.open("rb") as file:
        for number in range(count):
            file.seek(number * (size - BLOCK) // (count - 1) if size > WHOLE else number * BLOCK)
            yield file.read(BLOCK)


def _digest(parts: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()[:12]
