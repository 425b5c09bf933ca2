"""The command `dsalign resume RUN`: the training that goes on in the folder of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsalign.checkpoint import run_folders
from dsalign.config import flags, parse
from dsalign.config.file_rules import PROGRESS_FILE
from dsalign.config.secrets import HIDDEN

SUMMARY = "go on with a run from its newest checkpoint: dsalign resume RUN"
USAGE = """usage: dsalign resume RUN [--name value ...]

  RUN   the --output_dir of a run, which begins again where it has no checkpoint, or one of its checkpoint-N

All options are those of RUN/config.yaml but for what is given here. What may change: the learning rate and its
schedule, more epochs or steps, logs, saves and evaluations, and where and how it is computed: ranks, ZeRO stage, the
cut of a step. Anything else is refused."""
OWN = ("output_dir", "resume")


def words(argv: Sequence[str], world_size: int) -> list[str]:
    """The training command that `dsalign resume ARGV` stands for. world_size: the number of ranks.

    Where batch_size and gradient_accumulation_steps are not given they are chosen so that a step has as many rows as in
    the run, on any number of ranks.
    Raises ValueError where RUN is not the folder of a run, or a step cannot be cut so.
    """
    command = flags.split(argv, parse.ALIASES)
    if len(command.words) != 1:
        raise ValueError(f"resume: expected one folder of a run, got {len(command.words)}; write dsalign resume RUN")
    given = {flag.name for flag in command.flags}
    if wrong := sorted(given.intersection(OWN)):
        raise ValueError(
            f"resume: expected no --{wrong[0]}, as a run goes on in its folder; see dsalign train for others"
        )
    run, resume = _run(Path(command.words[0]).expanduser())
    found = run_folders.find(resume, run)
    if not found and (run / "final").is_dir():
        raise ValueError(
            f"resume: {run} is done and has no checkpoint-N to go on from; give {run / 'final'} to another run as "
            "--model"
        )
    read = run_folders.kept(found)
    file = run / run_folders.CONFIG
    layer, problems = flags.read_yaml(str(file), parse.ALIASES)
    if problems:
        raise parse.ConfigError(problems)
    hidden = [one.name for one in layer if HIDDEN in str(one.raw) and one.name not in given]
    if hidden:
        raise ValueError(
            f"resume: {file} has no value of {', '.join(hidden)}, which looked like a secret; give it again"
        )
    ran = next(str(one.raw) for one in layer if one.name == "batch_size")
    cut = (
        []
        if "gradient_accumulation_steps" in given
        else _cut(read[1] if read else {}, int(ran), command.values("batch_size"), world_size)
    )
    user = command.without(())[1:]
    return ["train", "--config", str(file), *user, "--output_dir", str(run), "--resume", resume, *cut]


def _run(folder: Path) -> tuple[Path, str]:
    """(the folder of the run, the value of --resume) for a run's folder or one of its checkpoints. Raises ValueError
    where it is neither."""
    run, resume = folder, "auto"
    if (folder / PROGRESS_FILE).is_file():
        run, resume = folder.parent, str(folder)
    if not (run / run_folders.CONFIG).is_file():
        there = [one.name for one in folder.parent.iterdir() if one.is_dir()] if folder.parent.is_dir() else []
        what = "which is no folder" if not folder.is_dir() else f"which has no {run_folders.CONFIG}"
        advice = flags.nearest(folder.name, there) if not folder.is_dir() else ""
        raise ValueError(
            f"resume: expected the folder of a run, its --output_dir, got {folder}, {what}"
            f"{advice or '; check the path'}"
        )
    return run, resume


def _cut(kept: Mapping[str, Any], ran: int, asked: Sequence[str], ranks: int) -> list[str]:
    """The flags by which a step of `ranks` ranks has as many rows as the run has had. kept: what a checkpoint keeps.
    ran: the run's --batch_size. asked: the user's, which stays; else the micro-batch is the largest that is no larger
    than the run's."""
    rows = kept.get("fingerprint", {}).get("global_batch")
    if rows is None:
        return []
    share, rest = divmod(rows, ranks)
    if rest:
        raise ValueError(
            f"resume: expected a number of ranks that divides the {rows} rows of a step, got {ranks}; start another "
            "number of them"
        )
    if asked:
        fits = asked[0].isdecimal() and int(asked[0]) > 0 and share % int(asked[0]) == 0
        return ["--gradient_accumulation_steps", str(share // int(asked[0]))] if fits else []
    batch = next(size for size in range(min(ran, share), 0, -1) if share % size == 0)
    return ["--batch_size", str(batch), "--gradient_accumulation_steps", str(share // batch)]
