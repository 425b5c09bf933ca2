"""Damage to the newest of two checkpoints: it is never used, the file is named, and the older one is."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_runs import actor_and_critic, chosen, leftovers
from forks import Forks
from support import RankPool

from dsalign.checkpoint import manifest

Record = Callable[[str, str, str, float], None]
OPTIM, MODEL = "zero_pp_rank_{}_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"
FILES = [
    "trainer.json", "random-0.safetensors", "random-1.safetensors", "policy.safetensors", "manifest.json",
    f"engines/policy/{MODEL}", f"engines/value/{MODEL}", *(f"engines/policy/{OPTIM.format(r)}" for r in (0, 1)),
    f"engines/value/{OPTIM.format(1)}",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(forks: Forks, two_ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of an actor and a critic that ended after four steps: checkpoint-2 and checkpoint-4, at stage 2."""
    out = tmp_path_factory.mktemp("run") / "out"
    ended = forks.run(actor_and_critic, out, 2, None, 2, 4)
    assert [one.code for one in ended] == [0, 0], ended[0].text
    two_ranks.run(chosen, out, "latest")  # so that no case waits for imports
    return out


@pytest.fixture
def out(run: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(run, tmp_path / "out"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def timed(two_ranks: RankPool, out: Path) -> tuple[tuple[str, list[str]], float]:
    """(what --resume finds in an output folder, the seconds it takes)."""
    began = time.monotonic()
    return two_ranks.run(chosen, out, "latest"), time.monotonic() - began


def fell_back(found: tuple[str, list[str]], out: Path, *reasons: str) -> None:
    """The older checkpoint was taken, and one line says why."""
    name, (line,) = found
    assert name == "checkpoint-2"
    assert line.startswith(f"resume: skipping {out / 'checkpoint-4'}: ") and any(one in line for one in reasons), line


@pytest.mark.parametrize("damage", [flip, halve, zero, empty, Path.unlink], ids=lambda one: one.__name__)
def test_every_file_is_watched(damage: Callable[[Path], None], run: Path, two_ranks: RankPool, tmp_path: Path,
                               record: Record) -> None:  # fmt: skip
    """Each kind of file, damaged in five ways; the line names the file and what is wrong with it."""
    for name in FILES:
        out = Path(shutil.copytree(run, tmp_path / name.replace("/", "-")))
        damage(out / "checkpoint-4" / name)
        words = ("does not match its", "cannot be read", "has ", "is missing", "it has no manifest.json")
        found, seconds = timed(two_ranks, out)
        fell_back(found, out, *(f"{name} {word}" for word in words[:4]), *words[4:])
        record("corruption", f"{damage.__name__} {name}", "told, the checkpoint before it is used", seconds)


def swapped(out: Path) -> None:
    one, two = (out / "checkpoint-4/engines/policy" / OPTIM.format(rank) for rank in (0, 1))
    between = one.with_name("between")
    one.rename(between), two.rename(one), between.rename(two)


def of_another_step(name: str) -> Callable[[Path], None]:
    def put(out: Path) -> None:
        there = out / "checkpoint-4" / name
        shutil.rmtree(there) if there.is_dir() else there.unlink()
        source = out / "checkpoint-2" / name
        shutil.copytree(source, there) if source.is_dir() else shutil.copy(source, there)

    return put


def linked(out: Path) -> None:
    path = out / "checkpoint-4/engines/policy" / MODEL
    path.rename(out / "elsewhere.pt")
    path.symlink_to(out / "elsewhere.pt")


def linked_folder(out: Path) -> None:
    path = out / "checkpoint-4/engines/value"
    path.rename(out / "elsewhere")
    path.symlink_to(out / "elsewhere")


def listing(name: str) -> Callable[[Path], None]:
    """A manifest that an attacker wrote, which names a file outside."""

    def put(out: Path) -> None:
        listed = manifest.read(out / "checkpoint-4")
        files = {**listed.files, name: manifest.Entry(1, "0" * 64)}
        manifest.write(out / "checkpoint-4", replace(listed, files=files))

    return put


def edited(out: Path) -> None:
    path = out / "checkpoint-4/trainer.json"
    path.write_text(path.read_text().replace('"step": 4', '"step": 3'))


def without(name: str) -> Callable[[Path], None]:
    return lambda out: shutil.rmtree(out / "checkpoint-4" / name)


def of_a_later_version(out: Path) -> None:
    path = out / "checkpoint-4/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 2}))


class Planted:
    """An object that makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def planted(out: Path) -> None:
    torch.save({"module": Planted(out / "ran")}, out / "checkpoint-4/engines/policy" / MODEL)


def relisted(out: Path) -> None:
    """Write the manifest for what the files are now, as an attacker would."""
    folder = out / "checkpoint-4"
    listed = manifest.read(folder)
    manifest.write(folder, replace(listed, files={name: manifest.entry_of(folder / name) for name in listed.files}))


def planted_and_relisted(out: Path) -> None:
    planted(out)
    relisted(out)


def bare_pickle_and_relisted(out: Path) -> None:
    with (out / "checkpoint-4/engines/policy" / MODEL).open("wb") as file:
        pickle.dump(Planted(out / "ran"), file)
    relisted(out)


CASES = {
    "ranks' shards swapped": (swapped, f"engines/policy/{OPTIM.format(0)} "),
    "rank 1's shard of another step": (of_another_step(f"engines/policy/{OPTIM.format(1)}"), "does not match"),
    "critic of another step": (of_another_step("engines/value"), "does not match its checksum"),
    "actor of another step": (of_another_step("engines/policy"), "does not match its checksum"),
    "manifest of another step": (of_another_step("manifest.json"), "does not match its checksum"),
    "engines deleted": (without("engines"), "is missing"),
    "critic deleted": (without("engines/value"), "is missing"),
    "manifest names ../": (listing("../../etc/x"), "names '../../etc/x', which is no path inside the folder"),
    "manifest names /etc": (listing("/etc/passwd"), "names '/etc/passwd', which is no path inside"),
    "shard is a link": (linked, "is a link or lies behind one"),
    "critic is a link": (linked_folder, "is a link or lies behind one"),
    "trainer.json edited": (edited, "trainer.json does not match its checksum"),
    "manifest of a later version": (of_a_later_version, "is of format 2, written by a later version"),
    "pickle planted": (planted, "bytes, expected"),
    "pickle planted, manifest rewritten": (planted_and_relisted, "would import posix.system, which is no part of a"),
    "bare pickle, manifest rewritten": (bare_pickle_and_relisted, "is no file of torch.save"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_that_is_not_as_written(case: str, out: Path, two_ranks: RankPool, record: Record) -> None:
    """Whole files in wrong places, paths that lead outside, and code: the checkpoint before it is used; none runs."""
    damage, reason = CASES[case]
    damage(out)
    found, seconds = timed(two_ranks, out)
    fell_back(found, out, reason)
    assert not (out / "ran").exists()
    record("corruption", case, "told, the checkpoint before it is used", seconds)


def test_a_damaged_checkpoint_that_is_named_is_refused(out: Path, two_ranks: RankPool) -> None:
    flip(out / "checkpoint-4/engines/value" / MODEL)
    said, lines = two_ranks.run(chosen, out, str(out / "checkpoint-4"))
    name = f"engines/value/{MODEL}"
    assert said.startswith(
        f"resume: {out}/checkpoint-4 cannot be used: {name} does not match its checksum; in {out} are"
    )
    assert "are checkpoint-2 too: --resume takes the newest whole one" in said and not lines


def test_no_whole_checkpoint_is_an_error_and_never_step_0(out: Path, two_ranks: RankPool, record: Record) -> None:
    flip(out / "checkpoint-4/trainer.json")
    (out / "checkpoint-2/manifest.json").unlink()
    (said, lines), seconds = timed(two_ranks, out)
    assert said == (
        f"resume: no checkpoint in {out} can be used: checkpoint-4: trainer.json does not match its checksum; "
        "checkpoint-2: it has no manifest.json. Nothing was started: put a whole copy there, or give another "
        "--output_dir to begin from step 0"
    )
    assert len(lines) == 2
    record("corruption", "every checkpoint damaged", "refused with each one's reason, exit code 2", seconds)


def test_a_foreign_checkpoint_needs_trust(out: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """One of another output folder, and one that was copied in from another run; damage is no matter of trust."""
    other = tmp_path / "other"
    other.mkdir()
    for _ in range(2):
        said, _lines = two_ranks.run(chosen, other, str(out / "checkpoint-4"))
        assert f"cannot be used: it is no checkpoint of the run in {other}, and DeepSpeed's files may run code" in said
        (other / "run.json").write_text(json.dumps({"run": "another"}))
    shutil.copytree(out / "checkpoint-4", other / "checkpoint-4")
    said, (line,) = two_ranks.run(chosen, other, "latest")
    assert said.startswith(
        f"resume: no checkpoint in {other} can be used: checkpoint-4: it is no checkpoint of the run"
    )
    assert line.endswith("if you know who wrote them, give --trust_checkpoint true")
    assert two_ranks.run(chosen, other, str(out / "checkpoint-4"), True) == ("checkpoint-4", [])
    flip(out / "checkpoint-4/trainer.json")
    assert "trainer.json does not match" in two_ranks.run(chosen, other, str(out / "checkpoint-4"), True)[0]
    (out / "checkpoint-2/manifest.json").unlink()
    assert "it has no manifest.json" in two_ranks.run(chosen, out, str(out / "checkpoint-2"))[0]
    name, (line,) = two_ranks.run(chosen, out, str(out / "checkpoint-2"), True)
    assert name == "checkpoint-2" and line.endswith("has no manifest.json: nothing says whether its files are whole")


def test_a_moved_run_is_still_its_own(out: Path, two_ranks: RankPool) -> None:
    """A run is known by its identity, not by its path."""
    moved = out.rename(out.with_name("moved"))
    assert two_ranks.run(chosen, moved, "latest") == ("checkpoint-4", [])


def test_a_run_goes_on_from_the_whole_one(
    out: Path, forks: Forks, straight: Callable[[int], str], record: Record
) -> None:
    """One bit of checkpoint-4 is wrong: from checkpoint-2 the run ends as if nothing had been; the bad one is kept."""
    flip(out / "checkpoint-4/engines/policy" / OPTIM.format(1))
    (out / "final").rename(out.parent / "earlier")
    began = time.monotonic()
    ended = forks.run(actor_and_critic, out, 2, "latest")
    seconds = time.monotonic() - began
    assert [one.code for one in ended] == [0, 0]
    assert f"skipping {out}/checkpoint-4: engines/policy/{OPTIM.format(1)} does not match its checksum" in ended[0].text
    assert (out / "learnt.txt").read_text() == straight(2) and not leftovers(out)
    assert (out / "aside-1" / "checkpoint-4").is_dir()
    record("corruption", "one bit of a shard, the run goes on to its end", "resumed from step 2, equal", seconds)


def test_a_run_that_goes_back_keeps_both_branches(out: Path, forks: Forks, two_ranks: RankPool) -> None:
    """Back from 4 to 2 with one checkpoint kept: 4 is aside, what is saved stays, and latest follows the new branch."""
    ended = forks.run(actor_and_critic, out, 2, str(out / "checkpoint-2"), 1, 4)
    assert [one.code for one in ended] == [0, 0], ended[0].text
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-4"]
    assert sorted(p.name for p in (out / "aside-1").iterdir()) == ["checkpoint-4", "final"]
    assert two_ranks.run(chosen, out, "latest") == ("checkpoint-4", [])
    serials = [manifest.read(out / name / "checkpoint-4").serial for name in (".", "aside-1")]
    assert serials == [3, 2]
