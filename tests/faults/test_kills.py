"""A rank killed at every point of a save: what is visible is whole, and the resumed run ends as if nothing had been."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from faulty_runs import actor_and_critic, command, learnt, leftovers, on_a_disk_of_its_own, words
from forks import GRACE_S, Ended, Forks
from support import quick_if

from dsalign.checkpoint import manifest, run_folders

Record = Callable[[str, str, str, float], None]
# (point, rank, files of the rank in a save at stage 2 and at 3 or None where a save comes there once, steps that are
# visible afterwards); all in the second of three saves, of two engines, and one checkpoint is kept.
POINTS: list[tuple[str, int, dict[int, int] | None, int]] = [
    ("in_export", 0, {2: 2, 3: 2}, 2),
    ("before_shard", 0, {2: 4, 3: 4}, 2),
    ("before_shard", 1, {2: 2, 3: 4}, 2),
    ("mid_shard", 0, {2: 4, 3: 4}, 2),
    ("mid_shard", 1, {2: 2, 3: 4}, 2),
    ("after_policy", 0, None, 2),
    ("after_policy", 1, None, 2),
    ("after_value", 1, None, 2),
    ("in_seal", 1, {2: 3, 3: 5}, 2),
    ("after_shards", 0, None, 2),
    ("after_shards", 1, None, 2),
    ("before_manifest", 0, None, 2),
    ("after_manifest", 0, None, 2),
    ("before_rename", 0, None, 2),
    ("after_commit", 0, None, 4),
]
QUICK = {("mid_shard", 1), ("after_manifest", 0)}
WHOLE = [
    (algo, stage, tuner) for algo in ("sft", "dpo", "ppo", "grpo") for stage in (2, 3) for tuner in ("full", "lora")
]


def whole_checkpoints(output_dir: Path) -> dict[int, list[str]]:
    """Step -> what is wrong with its checkpoint's files."""
    found = {}
    for path in run_folders.newest_first(output_dir):
        listed = manifest.read(path)
        faults = [manifest.fault_of(path, name, entry) for name, entry in listed.files.items()]
        found[listed.step] = [one for one in faults if one]
    return found


def killed(ended: list[Ended], rank: int) -> float:
    """Seconds until the other rank had ended too, which it did by itself."""
    assert ended[rank].code == -9, ended[rank].text
    other = ended[1 - rank]
    assert other.code not in (0, -9) and other.after_s < GRACE_S, other.text
    return max(one.after_s for one in ended)


@pytest.mark.parametrize(
    ("stage", "point", "rank", "files", "left"),
    [quick_if(stage == 3 and case[:2] in QUICK, stage, *case) for stage in (2, 3) for case in POINTS],
)
def test_a_kill_in_a_save(
    stage: int, point: str, rank: int, files: dict[int, int] | None, left: int,
    forks: Forks, straight: Callable[[int], str], record: Record, tmp_path: Path,
) -> None:  # fmt: skip
    """Actor and critic: the old checkpoint or the new one, never a mixture; equal to the last bit in the end."""
    visit = 2 if files is None else files[stage] + 1
    ended = forks.run(actor_and_critic, tmp_path / "out", stage, fault=f"{point}:{rank}:kill:{visit}")
    seconds = killed(ended, rank)
    assert whole_checkpoints(tmp_path / "out") == ({2: []} if left == 2 else {2: [], 4: []})
    assert [one.code for one in forks.run(actor_and_critic, tmp_path / "out", stage, "latest")] == [0, 0]
    assert (tmp_path / "out" / "learnt.txt").read_text() == straight(stage)
    assert not leftovers(tmp_path / "out") and set(whole_checkpoints(tmp_path / "out")) == {6}
    record("kill", f"rank {rank} killed at {point}, ZeRO-{stage}", f"resumed from step {left}, equal", seconds)


@pytest.mark.parametrize(
    ("fault", "seen"),
    [
        pytest.param("in_rotation:0:kill", {4: []}, id="rotation"),
        pytest.param("in_export:0:kill:7", {6: []}, id="final", marks=pytest.mark.slow),
        pytest.param("before_rename:0:kill:4", {6: []}, id="final-before-rename", marks=pytest.mark.slow),
    ],
)
def test_a_kill_in_rotation_or_in_the_last_export(
    fault: str, seen: dict[int, list[str]],
    forks: Forks, straight: Callable[[int], str], record: Record, tmp_path: Path,
) -> None:  # fmt: skip
    """An old checkpoint is removed whole or not at all, and final/ is whole or not there."""
    out = tmp_path / "out"
    seconds = killed(forks.run(actor_and_critic, out, 3, fault=fault), 0)
    assert whole_checkpoints(out) == seen and not (out / "final").exists()
    assert [one.code for one in forks.run(actor_and_critic, out, 3, "latest")] == [0, 0]
    assert (out / "learnt.txt").read_text() == straight(3) and not leftovers(out)
    record("kill", f"rank 0 killed, {fault.split(':')[0]}", f"resumed from step {max(seen)}, equal", seconds)


@pytest.mark.slow
def test_a_kill_while_final_is_replaced(
    forks: Forks, straight: Callable[[int], str], record: Record, tmp_path: Path
) -> None:
    """The old final/ comes back under its name when the next run begins."""
    out = tmp_path / "out"
    straight(3)
    assert [one.code for one in forks.run(actor_and_critic, out, 3)] == [0, 0]
    seconds = killed(forks.run(actor_and_critic, out, 3, "latest", fault="mid_replace:0:kill"), 0)
    assert not (out / "final").exists()
    assert [one.code for one in forks.run(actor_and_critic, out, 3, "latest")] == [0, 0]
    assert (out / "learnt.txt").read_text() == straight(3) and not leftovers(out)
    record("kill", "rank 0 killed while final/ is replaced", "the old one is put back, then replaced", seconds)


def said(ended: list[Ended]) -> list[str]:
    return [line for one in ended for line in one.text.splitlines() if line.startswith("said: ")]


@pytest.mark.parametrize(
    ("point", "rank", "visit"), [("mid_shard", 1, 5), ("in_seal", 1, 6), quick_if(False, "before_manifest", 0, 2)]
)
def test_a_full_disk_on_one_rank(
    point: str, rank: int, visit: int,
    forks: Forks, straight: Callable[[int], str], record: Record, tmp_path: Path,
) -> None:  # fmt: skip
    """Every rank ends in a second, one says why, and the checkpoint from before is as it was."""
    out = tmp_path / "out"
    ended = forks.run(actor_and_critic, out, 3, fault=f"{point}:{rank}:full:{visit}")
    seconds = max(one.after_s for one in ended)
    assert [one.code for one in ended] == [2, 2] and seconds < 1
    (line,) = said(ended)
    assert line.startswith(f"said: {out}/checkpoint-4 was not saved: No space left on device: ")
    assert "MB are free in" in line and line.endswith("go on from the last one with --resume")
    assert whole_checkpoints(out) == {2: []} and not leftovers(out)
    assert [one.code for one in forks.run(actor_and_critic, out, 3, "latest")] == [0, 0]
    assert (out / "learnt.txt").read_text() == straight(3)
    record(
        "disk", f"disk full for rank {rank}, {point}", "all ranks end with the reason, old checkpoint whole", seconds
    )


def test_a_disk_that_is_not_shared_is_noticed_at_the_first_save(forks: Forks, record: Record, tmp_path: Path) -> None:
    """Rank 0 looks for every part: those of rank 1 are on another disk."""
    ended = forks.run(on_a_disk_of_its_own, tmp_path)
    assert [one.code for one in ended] == [2, 2]
    (line,) = said(ended)
    assert "rank 1 on " in line and " finds nothing there. Expected one disk for all ranks: give an --output_d" in line
    assert [sorted(p.name for p in (tmp_path / rank / "out").iterdir()) for rank in "01"] == [[], []]
    record("disk", "ranks write to disks of their own", "told at the first save", max(one.after_s for one in ended))


@pytest.mark.slow
@pytest.mark.parametrize(("algo", "stage", "tuner"), WHOLE)
@pytest.mark.parametrize(
    ("point", "rank"),
    [("in_export", 0), ("mid_shard", 1), ("after_policy", 0), ("after_shards", 1), ("after_manifest", 0),
     ("after_commit", 0), ("in_rotation", 0)],
)  # fmt: skip
def test_a_kill_in_a_save_of_a_whole_run(
    point: str, rank: int, algo: str, stage: int, tuner: str,
    forks: Forks, whole: Callable[[str, int, str], str], record: Record, tiny: Path, tmp_path: Path,
) -> None:  # fmt: skip
    """The command, killed in its second save, then the same command with --resume."""
    roles = 2 if algo == "ppo" else 1
    shards = roles * (2 if stage == 3 or rank == 0 else 1)
    visit = {"in_export": roles + 1, "mid_shard": shards + 1, "in_rotation": 1}.get(point, 2)
    given = [*words(algo, stage, tuner, tiny, tmp_path), "--output_dir", str(tmp_path / "out")]
    seconds = killed(forks.run(command, given, fault=f"{point}:{rank}:kill:{visit}"), rank)
    assert all(not faults for faults in whole_checkpoints(tmp_path / "out").values())
    ended = forks.run(command, [*given, "--resume"])
    assert [one.code for one in ended] == [0, 0], ended[0].text
    assert learnt(tmp_path / "out") == whole(algo, stage, tuner) and not leftovers(tmp_path / "out")
    record("kill", f"{algo} ZeRO-{stage} {tuner}: rank {rank} killed at {point}", "resumed, equal", seconds)
