"""What --model and its like name: a folder, a short name that is registered here, or a name on the hub."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from dsalign.config.cache import cache_folder
from dsalign.config.model_folders import refuse_no_model
from dsalign.config.reach_hub import EMBEDDED, HUB_NAMES
from dsalign.models.gguf import EMBEDDED_NAME, import_embedded

logger = logging.getLogger(__name__)
# Beside adapter_config.json: where an adapter's base is if it is not where PEFT looks, and whether it was in 4 bits.
BASE_FILE = "base_model.json"


@dataclass(frozen=True)
class Source:
    """Where the weights of a model come from.

    weights: a folder or a hub name that transformers opens. adapter: a PEFT folder whose adapter goes on top of them,
    or None. value_head: the folder in which a value head may be, None for a hub name. four_bit: whether the adapter was
    trained on those weights in 4 bits (--load_in_4bit), so that it belongs to what those stand for.
    """

    weights: str
    adapter: Path | None = None
    value_head: Path | None = None
    four_bit: bool = False


def resolve(name: str) -> Source:
    """The source of weights that `name` stands for. The embedded model is converted on its first use.

    The folder of an adapter names its base: a hub name, an absolute path, or a path relative to the working directory,
    as in PEFT. Where no folder is there, it is looked for from the adapter's folder, as `located_base` left it.
    Raises ValueError for something that looks like a folder and is none, for a folder without a model, and for an
    adapter whose base is missing or an adapter itself.
    """
    folder = Path(name).expanduser()
    if not folder.exists():
        if name.lower() == EMBEDDED:
            return Source(str(import_embedded(cache_folder() / "models")))
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise ValueError(f"model: there is no folder {name}; expected a folder, a hub name or a short name")
        return Source(HUB_NAMES.get(name.lower(), name))
    if (folder / "adapter_config.json").exists():
        base = _base_of(folder)
        if not base:
            raise ValueError(
                f"model: {name}/adapter_config.json names no base model; write one into its base_model_name_or_path"
            )
        if (Path(base).expanduser() / "adapter_config.json").exists():
            raise ValueError(
                f"model: the base of the adapter {name} is an adapter itself, {base}; merge that one first"
            )
        try:
            return Source(resolve(base).weights, folder, folder, four_bit="quantised" in _beside(folder))
        except ValueError as error:
            raise ValueError(
                f"model: the base of the adapter {name} cannot be used: {error}; write where it is into "
                f"{folder / 'adapter_config.json'}, base_model_name_or_path"
            ) from error
    refuse_no_model(folder)
    return Source(str(folder), value_head=folder)


def located_base(base: str, adapter: Path, *, four_bit: bool = False) -> tuple[str, dict[str, str]]:
    """(what adapter_config.json is to name for the base of an adapter in the folder `adapter`, the content of
    BASE_FILE).

    PEFT opens a relative path from the working directory alone, so a folder is named by its absolute path. Its place
    relative to the adapter's folder, which stays true where both move, is in BASE_FILE; for the embedded model, which
    lies in a user's cache, its short name. A hub name needs neither. four_bit: as in `Source`; BASE_FILE says it too.
    """
    said = {"quantised": "nf4"} if four_bit else {}
    if not Path(base).is_dir():
        return base, said
    whole = Path(base).resolve()
    if whole == (cache_folder() / "models" / EMBEDDED_NAME).resolve():
        return str(whole), {"base": str(whole), "name": EMBEDDED, **said}
    return str(whole), {"base": str(whole), "relative": os.path.relpath(whole, adapter.resolve()), **said}


def _beside(folder: Path) -> dict[str, str]:
    """What BASE_FILE says in an adapter's folder, {} where there is none."""
    found: dict[str, str] = json.loads((folder / BASE_FILE).read_text()) if (folder / BASE_FILE).exists() else {}
    return found


def _base_of(folder: Path) -> str | None:
    """The base of the adapter in a folder: as adapter_config.json names it, or where that is not there, the folder that
    BASE_FILE or the same words name from the adapter's own folder, which a line says."""
    given: str | None = json.loads((folder / "adapter_config.json").read_text()).get("base_model_name_or_path")
    if not given or Path(given).expanduser().exists():
        return given
    known = _beside(folder)
    if known.get("base") != given:
        known = {}  # adapter_config.json was changed since
    for beside in filter(None, (known.get("relative"), given)):
        if (folder / beside / "config.json").exists():
            found = str(Path(os.path.normpath(folder / beside)))
            logger.warning("%s: its base %s is not there; taken from %s, beside it", folder, given, found)
            return found
    return known.get("name", given)
