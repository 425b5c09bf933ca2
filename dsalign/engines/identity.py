"""What must be the same on every rank before the first step: configuration, code, data, models and tokenizer, each as a
short text that differs where they do."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from dsalign.config import ds_files
from dsalign.config.schema import RunConfig, one_line
from dsalign.contract.groups import Group
from dsalign.data.tokens.templates import Template
from dsalign.models.names import Source

LIBRARIES = ("torch", "deepspeed", "transformers", "peft", "tokenizers")
GROUPS = 4096  # groups of a data set that are compared, evenly over all
BLOCK = 1 << 16  # bytes at the beginning, in the middle and at the end of a file of weights that are compared
WEIGHTS = ("*.safetensors", "*.bin", "*.json", "*.jinja")


def of_run(config: RunConfig) -> dict[str, str]:
    """Key -> text, of the configuration, the files that it names, and the versions. Nothing large is read."""
    found = {name: one_line(value) for name, value in config.options().items()}
    found |= {f"version of {name}": importlib.metadata.version(name) for name in LIBRARIES}
    found |= {"version of python": platform.python_version(), "code of dsalign": _of_code()}
    found["content of deepspeed"] = _digest([ds_files.find(config.optim.deepspeed).read_bytes()])
    for name in config.models.reward_funcs:
        path = Path(name.rpartition(":")[0]).expanduser()
        if path.is_file():
            found[f"content of {name}"] = _digest([path.read_bytes()])
    return found


def _of_code() -> str:
    """A digest of dsalign's own files: two checkouts have one version."""
    package = Path(__file__).resolve().parent.parent
    return _digest(path.read_bytes() for path in sorted(package.rglob("*.py")))


def of_inputs(
    groups: Mapping[str, Sequence[Group] | None], sources: Mapping[str, Source], template: Template
) -> dict[str, str]:
    """Key -> text, of what the ranks have read. groups: name of a data set -> its groups. sources: role -> its weights,
    of which a folder's files are compared and a hub's are not, as the hub's cache checks them."""
    found = {f"rows of {name}": _of_groups(some) for name, some in groups.items() if some is not None}
    vocabulary = sorted(template.tokenizer.get_vocab().items())
    found["tokenizer"] = _digest([repr(vocabulary).encode(), repr(template.end_ids).encode()])
    found["template"] = _digest([str(template.chat_template or template.tokenizer.chat_template).encode()])
    for role, source in sources.items():
        for folder in filter(None, [Path(source.weights), source.adapter]):
            if folder.is_dir():
                found[f"files of the {role} model"] = found.get(f"files of the {role} model", "") + _of_folder(folder)
    return found


def _of_groups(groups: Sequence[Group]) -> str:
    """The number of groups, and a digest of the ids of GROUPS of them."""
    chosen = range(0, len(groups), max(1, len(groups) // GROUPS))
    ids = ((groups[i].prompt, *groups[i].completions, groups[i].label, groups[i].margin) for i in chosen)
    return f"{len(groups)} rows {_digest(repr(one).encode() for one in ids)}"


def _of_folder(folder: Path) -> str:
    files = sorted({path for pattern in WEIGHTS for path in folder.glob(pattern)})
    return _digest(part for path in files for part in (path.name.encode(), _of_file(path)))


def _of_file(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        blocks = [str(size).encode()]
        for place in sorted({0, max(0, size // 2 - BLOCK), max(0, size - BLOCK)}):
            file.seek(place)
            blocks.append(file.read(BLOCK))
    return b"".join(blocks)


def _digest(parts: Iterable[bytes]) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(len(part).to_bytes(8, "big") + part)
    return total.hexdigest()[:12]
