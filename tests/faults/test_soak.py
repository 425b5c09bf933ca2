"""200 steps of PPO in which something breaks every 20 or so, and that go on as in a queue: equal to the last bit."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from faulty_runs import command, learnt, leftovers, words
from forks import GRACE_S, Ended, Forks
from test_kills import whole_checkpoints

from dsalign.checkpoint import manifest, run_folders

Record = Callable[[str, str, str, float], None]
STEPS, EVERY, PASSES = 200, 5, 2  # of the run, between checkpoints, steps over a batch: so some saves lie within passes
SHORTEST, LONGEST = 8, 32  # steps from a start to its fault
LEAST = 8  # faults of a run
# Points within a step -> visits a step; those of rank 0 and 1 in a save -> visits a save, of two engines at ZeRO-3.
IN_STEP = {"phase micro-batch": 2.0, "phase optimizer step": 1.0, "phase log": 1.0, "phase reward function": 1 / PASSES,
           "phase rollout": 3 / PASSES, "phase prepare": 1 / PASSES}  # fmt: skip
IN_SAVE = {"mid_shard": (4, 4), "before_shard": (4, 4), "after_policy": (1, 1), "after_shards": (1, 1),
           "in_export": (2, 0), "before_manifest": (1, 0), "after_manifest": (1, 0), "before_rename": (1, 0),
           "after_commit": (1, 0), "in_rotation": (1, 0)}  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One thing that breaks. spec: as in DSALIGN_FAULT. codes: exit codes that the ranks may have then, by rank, None
    for whatever ends with a reason. damage: one bit of the newest checkpoint is flipped afterwards."""

    spec: str
    codes: tuple[int | None, int | None]
    damage: bool = False


def drawn(draw: random.Random, start: int) -> Fault:
    """The next fault of a run that goes on from step `start`."""
    rank, steps = draw.randrange(2), draw.randint(SHORTEST, LONGEST)
    codes = (-9, None) if rank == 0 else (None, -9)
    kind = draw.choice(["step", "step", "save", "save", "term", "damage", "nan"])
    if kind == "term":
        return Fault(f"phase micro-batch:{rank}:term:{2 * steps}", (75, 75))
    if kind == "save":
        point = draw.choice([name for name, visits in IN_SAVE.items() if visits[rank]])
        return Fault(f"{point}:{rank}:kill:{IN_SAVE[point][rank] * (steps // EVERY) + 1}", codes)
    if kind == "nan":  # in the step before the kill, and no checkpoint between them: what is done again has none
        while (start + steps) % EVERY in (0, 1):
            steps += 1
        bad, end = 2 * steps - 2 + draw.randrange(1, 3), 2 * steps + 1
        return Fault(f"loss:{1 - rank}:nan:{bad},phase micro-batch:{rank}:kill:{end}", codes)
    point = draw.choice(list(IN_STEP))
    return Fault(f"{point}:{rank}:kill:{max(1, int(IN_STEP[point] * steps))}", codes, damage=kind == "damage")


def flip(out: Path, draw: random.Random) -> Path | None:
    """Flip one bit of one file of the newest checkpoint, where another one is left; returns the checkpoint."""
    found = run_folders.newest_first(out)
    if len(found) < 2:
        return None
    path = found[0] / draw.choice(sorted(manifest.read(found[0]).files))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return found[0]


def command_line(model: Path, folder: Path) -> list[str]:
    """The run without its output folder."""
    given = words("ppo", 3, "lora", model, folder)
    changes = {"max_steps": STEPS, "save_steps": EVERY, "save_total_limit": 2, "num_ppo_epochs": PASSES,
               "logging_steps": 20}  # fmt: skip
    for name, value in changes.items():
        given[given.index(f"--{name}") + 1] = str(value)
    return [*given, "--num_train_epochs", str(STEPS)]


def check(ended: list[Ended], fault: Fault) -> None:
    """The ranks ended as the fault lets them, soon after one another."""
    text = "".join(one.text for one in ended)
    for one, code in zip(ended, fault.codes, strict=True):
        assert one.code == code or (code is None and one.code in (3, 77)), (fault, text[-4000:])
        assert one.after_s < GRACE_S, (fault, text[-4000:])


@pytest.mark.slow
@pytest.mark.timeout(3600)  # ten minutes of two quiet cores
def test_a_soak_of_ppo(forks: Forks, record: Record, tiny: Path, tmp_path: Path) -> None:
    """Kills in steps and in saves, SIGTERM, a damaged checkpoint, a loss that is NaN: drawn by a seed."""
    given = command_line(tiny, tmp_path)
    straight, out = tmp_path / "straight", tmp_path / "out"
    ended = forks.run(command, [*given, "--output_dir", str(straight)], limit_s=1200.0)
    assert [one.code for one in ended] == [0, 0], ended[0].text
    draw, happened, slowest, began = random.Random(20), list[Fault](), 0.0, time.monotonic()
    damaged: Path | None = None
    while True:
        whole = [path for path in run_folders.newest_first(out) if path != damaged]
        start = (run_folders.step_of(whole[0]) or 0) if whole else 0
        fault = drawn(draw, start)
        again = [*given, "--output_dir", str(out), "--resume", "auto"]
        ended = forks.run(command, again, fault=fault.spec, limit_s=1200.0)
        if damaged is not None:
            assert f"skipping {damaged}: " in ended[0].text, ended[0].text
        if [one.code for one in ended] == [0, 0]:
            break
        check(ended, fault)
        assert not any(whole_checkpoints(out).values()), fault
        happened.append(fault)
        slowest = max(slowest, *(one.after_s for one in ended))
        damaged = flip(out, draw) if fault.damage else None
        print(f"from step {start}: {fault}", flush=True)
        assert len(happened) < 40
    assert len(happened) >= LEAST, happened
    assert learnt(out, STEPS) == learnt(straight, STEPS), happened
    assert not set(leftovers(out)) - {"bad"}
    what = f"{STEPS} steps of PPO at ZeRO-3 with LoRA and {len(happened)} faults: kills, SIGTERM, damage, NaN"
    record("soak", what, "resumed each time, equal", slowest)
    print(f"{len(happened)} faults in {time.monotonic() - began:.0f} s, the slowest end {slowest:.1f} s", flush=True)
