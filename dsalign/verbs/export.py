"""The command `dsalign export SOURCE DIR`: a run's model as a plain folder, without what only a resume needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsalign.endings import DONE
from dsalign.verbs import arguments, places
from dsalign.verbs.merge import DTYPES

SUMMARY = "write a run's model as a plain folder that other libraries open: dsalign export SOURCE DIR"
USAGE = """usage: dsalign export SOURCE DIR [--merge] [--dtype DTYPE] [--gguf FILE]

  SOURCE         final/, checkpoint-N/, a run's folder (its final/), an adapter, a hub name or a short name
  DIR            the new folder
  --merge        of an adapter: its base with the adapter added in, checked as by dsalign merge
  --dtype DTYPE  of the weights: auto, float32, bfloat16 or float16 [auto: as they are stored]
  --gguf FILE    write a GGUF file too, in float32, which is read back and compared
  --trust_remote_code   run code that comes with the model"""


@dataclass(frozen=True)
class Request:
    """A `dsalign export` command, parsed."""

    source: str
    folder: Path
    dtype: str
    merge: bool
    gguf: Path | None
    trust: bool


def read(argv: Sequence[str]) -> Request | None:
    """The request that `dsalign export ARGV` makes; None for a request of help. Raises ValueError for a wrong one."""
    given = arguments.alone(
        "export",
        argv,
        places=("source", "dir"),
        values={"dtype": "auto", "gguf": None},
        switches=("merge", "trust_remote_code"),
    )
    if given is None:
        return None
    arguments.required("export", given, "dir")
    return Request(
        given.source,
        Path(given.dir).expanduser(),
        arguments.choice("dtype", given.dtype, DTYPES),
        given.merge,
        Path(given.gguf).expanduser() if given.gguf else None,
        given.trust_remote_code,
    )


def run(request: Request | None) -> int:
    """Carry out a request; None prints the usage. Returns the exit code.

    Raises ValueError where the source cannot be opened, or the folder cannot be written.
    """
    if request is None:
        print(USAGE)
        return DONE
    places.ask_the_hub({"SOURCE": request.source})
    work = places.work("exported")  # not at the top of the file: transformers takes longer to import than a typo may
    for line in work.exported(
        request.source, request.folder, request.dtype, merge=request.merge, gguf=request.gguf, trust=request.trust
    ):
        print(line, flush=True)
    return DONE
