"""The command `dsalign merge ADAPTER`: a LoRA adapter added into its base's weights, checked and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsalign.endings import DONE
from dsalign.verbs import arguments, places

SUMMARY = "add a LoRA adapter into its base's weights: dsalign merge ADAPTER"
DTYPES = ("auto", "float32", "bfloat16", "float16")
USAGE = """usage: dsalign merge ADAPTER [--output_dir DIR] [--dtype DTYPE]

  ADAPTER           final/ or checkpoint-N/ of a LoRA run, any PEFT folder, or a run's folder, which means its final/
  --output_dir DIR  the new folder [ADAPTER-merged]
  --dtype DTYPE     of the weights written: auto, float32, bfloat16 or float16 [auto: that of the base]
  --trust_remote_code   run code that comes with the base

An adapter of --load_in_4bit goes into what 4 bits hold of the base, on which it was trained.
Weights are added in float32. Adapter and merged model compute the same real text; the largest difference of their
logits (of a reward model, its scores) is said, and above 0.001 of the largest one nothing is written."""


@dataclass(frozen=True)
class Request:
    """A `dsalign merge` command, parsed. output_dir: None = beside the adapter."""

    adapter: str
    output_dir: Path | None
    dtype: str
    trust: bool


def read(argv: Sequence[str]) -> Request | None:
    """The request that `dsalign merge ARGV` makes; None for a request of help. Raises ValueError for a wrong option."""
    given = arguments.alone(
        "merge",
        argv,
        places=("adapter",),
        values={"output_dir": None, "dtype": "auto"},
        switches=("trust_remote_code",),
    )
    if given is None:
        return None
    folder = Path(given.output_dir).expanduser() if given.output_dir else None
    return Request(given.adapter, folder, arguments.choice("dtype", given.dtype, DTYPES), given.trust_remote_code)


def run(request: Request | None) -> int:
    """Carry out a request; None prints the usage. Returns the exit code.

    Raises ValueError where there is no adapter to merge, or the merged model computes something else.
    """
    if request is None:
        print(USAGE)
        return DONE
    places.ask_the_hub({"ADAPTER": request.adapter})
    work = places.work("merged")  # not at the top of the file: transformers takes longer to import than a typo may
    print(work.merge(request.adapter, request.output_dir, request.dtype, trust=request.trust).text())
    return DONE
