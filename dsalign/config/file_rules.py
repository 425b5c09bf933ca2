"""The rules on names of files, folders and packages: what an option names is there, or can be made."""

from __future__ import annotations

import errno
import glob
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dsalign import assets
from dsalign.config import ds_files
from dsalign.config.cache import cache_folder
from dsalign.config.draft import Draft
from dsalign.config.flags import nearest

DATA_SUFFIXES = (  # of names that are files, also where such a file is not read: no data set on a hub is called so
    ".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".txt", ".xlsx", ".xls", ".zip", ".tar",
    ".bz2", ".xz", ".7z", ".pkl", ".npy", ".feather", ".yaml", ".yml", ".xml", ".html", ".md", ".py",
)  # fmt: skip
PATHS = (  # options that may name a file or a folder
    "model", "ref_model", "reward_model", "dataset", "val_dataset", "template", "deepspeed", "output_dir", "resume",
    "vllm_folder",
)  # fmt: skip
MODEL_FILES = ("config.json", "adapter_config.json")
FILE_WITH_COUNT = "rows.jsonl#500"
PROGRESS_FILE = "trainer.json"  # of a checkpoint's folder; without it the checkpoint is not whole
TEMPLATES = ("chatml", "gemma", "llama3", "mistral", "plain", "qwen", "zephyr")  # data/tokens/chat_templates.py
VARIABLE = re.compile(r"\$\{?(\w+)\}?")  # of a shell, which reads no YAML
LONGEST = 200  # characters of a value that a message repeats


def names_can_be_paths(draft: Draft) -> Iterator[str]:
    """What may name a file must be a name that the system takes: none that is too long, or of an unknown user."""
    for name in PATHS:
        value = draft.values.get(name)
        for one in value if isinstance(value, tuple) else [value] if value else []:
            try:
                os.path.lexists(Path(one).expanduser()) or os.stat(Path(one).expanduser())
            except FileNotFoundError:
                continue
            except (OSError, RuntimeError) as error:  # RuntimeError: ~name of nobody
                if getattr(error, "errno", None) not in (errno.ENOTDIR, errno.EACCES):
                    why = getattr(error, "strerror", None) or str(error)
                    yield f"{draft.at(name)}: expected a name or a path, got {_cut(one)} ({why}); correct it"


def _cut(text: str) -> str:
    """A text of a user for a message, which may be of any length."""
    return repr(text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}...")


def data_files_exist(draft: Draft) -> Iterator[str]:
    """A data set that looks like a file, a folder or demo rows must be one; any other name may be on the hub."""
    for name in ("dataset", "val_dataset"):
        for source in draft[name]:
            path = without_count(source)
            if path != source and not int(source[len(path) + 1 :]) and not is_there(source):
                yield f"{draft.at(name)}: expected #n with n rows, 1 or more, got {source!r}; leave out #0 for all rows"
            elif path == source and "#" in source and is_there(source.rpartition("#")[0]) and not is_there(source):
                yield f"{draft.at(name)}: expected #n with a whole number, got {source!r}; write {FILE_WITH_COUNT}"
            elif "://" in source:
                fix = f"write {_hub_name(source)}, or download the file and name it"
                yield f"{draft.at(name)}: expected a file or a name on the hub, got {source!r}; {fix}"
            elif source.startswith("-"):
                yield f"{draft.at(name)}: expected a data set, got {source!r}; write options as --name value"
            elif (path.lower().endswith(DATA_SUFFIXES) or path[:1] in ("/", ".", "~")) and not is_there(path):
                yield f"{draft.at(name)}: expected a file or folder that exists, got {path!r}; check the path"
            elif path.startswith(assets.DEMO) and path not in assets.names() and not is_there(path):
                advice = nearest(path, assets.names()) or "; choose one"
                yield f"{draft.at(name)}: expected one of {', '.join(assets.names())}, got {path!r}{advice}"


def model_folders_exist(draft: Draft) -> Iterator[str]:
    """A model that looks like a folder must be one that holds a model; any other name may be registered or on the
    hub."""
    for name in ("model", "ref_model", "reward_model"):
        path = draft[name]
        if not path:
            continue
        folder = Path(path).expanduser()
        if "://" in path:
            yield f"{draft.at(name)}: expected a folder or a name on the hub, got {path!r}; write {_hub_name(path)}"
        elif not folder.exists() and (path[:1] in ("/", ".", "~") or path.count("/") > 1):
            yield f"{draft.at(name)}: expected a folder that exists, got {path!r}{_nearest_folder(folder)}"
        elif folder.exists() and not any((folder / file).is_file() for file in MODEL_FILES):
            yield (
                f"{draft.at(name)}: expected a model's folder, with {' or '.join(MODEL_FILES)}, got {path!r}, which "
                "has neither; name the folder that from_pretrained opens"
            )


def _hub_name(address: str) -> str:
    """owner/name of the page on the hub with this address, as it is to be written."""
    parts = [part for part in address.partition("://")[2].split("/")[1:] if part not in ("", "datasets", "models")]
    return "/".join(parts[:2]) if len(parts) > 1 else "its owner/name"


def _nearest_folder(folder: Path) -> str:
    """The words '; did you mean X?' for a folder with nearly this name, else advice to check the path."""
    there = [one.name for one in folder.parent.iterdir() if one.is_dir()] if folder.parent.is_dir() else []
    return nearest(folder.name, there) or "; check the path"


def template_is_known(draft: Draft) -> Iterator[str]:
    """template is a built-in one or a file that exists."""
    name = draft["template"]
    path = Path(name or "").expanduser()
    if name and name not in TEMPLATES and not (path.is_file() and path.suffix == ".jinja"):
        fix = nearest(name, TEMPLATES) or "; check the path, or leave it out for the template of the tokenizer"
        if path.is_file():
            fix = f"; if it is a template, call it {path.with_suffix('.jinja').name}"
        yield f"{draft.at('template')}: expected {', '.join(TEMPLATES)} or a .jinja file that exists, got {name!r}{fix}"


def trackers_are_installed(draft: Draft) -> Iterator[str]:
    """report_to names trackers whose package is there."""
    for name in draft["report_to"]:
        if importlib.util.find_spec(name) is None:
            yield (
                f"{draft.at('report_to')}: expected a tracker that is installed, got {name!r}; run "
                f"pip install 'dsalign[{name}]', or leave it out: metrics.jsonl is always written"
            )


def output_dir_can_be_written(draft: Draft) -> Iterator[str]:
    """output_dir is a folder that can be written, or can be made."""
    folder = Path(draft["output_dir"]).expanduser().absolute()
    if (named := VARIABLE.search(draft["output_dir"])) and named[1] in os.environ:
        where = draft.at("output_dir")
        yield f"{where}: expected a path, got the variable {named[0]}, which nothing fills in; write it out"
    there = next(one for one in (folder, *folder.parents) if os.path.lexists(one))
    if not there.is_dir():
        what = "a file" if there.exists() else "a link to nothing"
        yield f"{draft.at('output_dir')}: expected a folder, got {there}, which is {what}; name another --output_dir"
    elif not os.access(there, os.W_OK | os.X_OK):
        yield f"{draft.at('output_dir')}: expected a folder that can be written, got {there}, which cannot"


def cache_can_be_written(draft: Draft) -> Iterator[str]:
    """The folder that DSALIGN_CACHE names can be made or written: it is given, so nothing else will do."""
    if os.environ.get("DSALIGN_CACHE"):
        folder = cache_folder().absolute()
        there = next(one for one in (folder, *folder.parents) if os.path.lexists(one))
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            yield f"DSALIGN_CACHE: expected a folder that can be written, got {folder}; name another, or unset it"


def checkpoint_exists(draft: Draft) -> Iterator[str]:
    """resume names a checkpoint's folder, or the latest one of output_dir, which with auto need not be there."""
    path = draft["resume"]
    if path == "auto":
        return
    if path == "latest":
        folder = Path(draft["output_dir"])
        if not any((one / PROGRESS_FILE).is_file() for one in folder.glob("checkpoint-*")):
            yield (
                f"{draft.at('resume')}: expected a checkpoint-N in {folder}, got none; leave --resume out to start a "
                "new run, or name the run's --output_dir"
            )
    elif path and not (Path(path).expanduser() / PROGRESS_FILE).is_file():
        why = "which is no whole checkpoint" if Path(path).expanduser().is_dir() else "which is no folder"
        yield (
            f"{draft.at('resume')}: expected latest, auto or the folder of a checkpoint, got {path!r}, {why}; "
            f"checkpoints are output_dir/checkpoint-N"
        )


def deepspeed_is_known(draft: Draft) -> Iterator[str]:
    """deepspeed is one of the files that come along, or a file of the user's whose keys DeepSpeed knows."""
    name, known = draft["deepspeed"], ds_files.names()
    if name not in known and not Path(name).expanduser().is_file():
        yield (
            f"{draft.at('deepspeed')}: expected {', '.join(known)} or a JSON file that exists, got {name!r}"
            f"{nearest(Path(name).stem, known) or '; check the path'}"
        )
    elif name not in known:
        yield from (f"{draft.at('deepspeed')}: {line}" for line in ds_files.problems(name))


def is_there(path: str) -> bool:
    """Whether there is such a file or folder, or one that a pattern with * ? [ matches."""
    whole = Path(path).expanduser()
    return whole.exists() or any(True for _ in glob.iglob(str(whole), recursive=True))


def without_count(source: str) -> str:
    """The name of a data set without its count of rows: rows.jsonl#500 is 500 rows of rows.jsonl."""
    path, mark, count = source.rpartition("#")
    return path if mark and count.isdigit() else source
