"""Reference log-probabilities from disk: the model's own numbers, computed once, and missed when they must be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import reference_cache_cases
import torch
from plain import plain_logps
from support import RankPool, quick_if, random_groups, tiny_folder
from transformers import AutoModelForCausalLM

from dsalign.algos.dpo import DPO
from dsalign.algos.kto import KTO, mismatched
from dsalign.contract.groups import Group
from dsalign.data.batches.loader import Loader
from dsalign.engines.reference_cache import asked_of, digest, weights_key
from dsalign.models.names import Source, resolve


@pytest.mark.parametrize(("stage", "tuner"), [("0", "full"), ("3", "full"), ("0", "lora"), ("3", "lora")])
def test_cached_is_what_the_model_says(stage: str, tuner: str, tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """Nine pairs in parts of four on two ranks, read back for each; a group put together elsewhere is computed. The
    second time nothing is computed."""
    found, computed = two_ranks.run(reference_cache_cases.cached, tiny, tmp_path, stage, tuner)
    assert computed == [9, 0]
    groups, other = random_groups("pairs", 9), reference_cache_cases.mismatched()
    want = plain_logps(AutoModelForCausalLM.from_pretrained(tiny), [*groups, other])
    assert len(found) == 10
    for ours, theirs in zip(found, want, strict=True):
        torch.testing.assert_close(torch.tensor(ours), theirs, atol=1e-5, rtol=1e-5)
    files = {p.parent: [] for p in tmp_path.rglob("*") if p.is_file()}
    for path in sorted(p for p in tmp_path.rglob("*") if p.is_file()):
        files[path.parent].append(path.name)
    two_parts = [f"part-0000{i}.safetensors" for i in range(2)]
    assert sorted(files.values()) == [two_parts[:1], two_parts], "sets of 6 and 3, and no staging file is left"


def test_a_stopped_run_goes_on_and_a_broken_file_is_computed_again(
    tiny: Path, one_rank: RankPool, tmp_path: Path
) -> None:
    """Sets of six and three groups in parts of four. One part of two groups is gone, one of four has a flipped byte in
    its numbers: 2 + 4 are computed again."""
    one_rank.run(reference_cache_cases.cached, tiny, tmp_path, "0", "full")
    (last,) = tmp_path.rglob("part-00001.safetensors")
    last.unlink()
    second = last.with_name("part-00000.safetensors")
    (first,) = set(tmp_path.rglob("*.safetensors")) - {second}
    broken = bytearray(second.read_bytes())
    broken[-1] ^= 1
    second.write_bytes(broken)
    before = first.stat().st_mtime_ns
    found, computed = one_rank.run(reference_cache_cases.cached, tiny, tmp_path, "0", "full")
    assert computed == [6, 0] and first.stat().st_mtime_ns == before
    second.write_bytes(b"no safetensors at all")
    again, computed = one_rank.run(reference_cache_cases.cached, tiny, tmp_path, "0", "full")
    assert computed == [4, 0] and again == found


def test_a_flipped_byte_of_the_weights_is_a_miss(tiny: Path, tmp_path: Path) -> None:
    """Any byte of the weights or the adapter, another dtype; not a file that is no part of the model."""
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    key = weights_key(resolve(str(tiny)), torch.float32)
    assert weights_key(resolve(str(copy)), torch.float32) == key
    (copy / "notes.txt").write_text("mine")
    assert weights_key(resolve(str(copy)), torch.float32) == key
    assert weights_key(resolve(str(copy)), torch.bfloat16) != key
    assert weights_key(resolve(str(copy)), torch.float32, four_bit=True) != key
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_model.safetensors").write_bytes(b"a")
    assert weights_key(Source(str(copy), adapter=adapter), torch.float32) != key
    weights = copy / "model.safetensors"
    flipped = bytearray(weights.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    weights.write_bytes(flipped)
    assert weights_key(resolve(str(copy)), torch.float32) != key


@pytest.mark.parametrize("size", [2, 3])
def test_what_an_algorithm_asks_the_reference_about(size: int) -> None:
    """KTO's rows and mismatched pairs of two epochs over five rows, in batches of two, of which a last row is left out,
    and of three with a last one of two: each group once, a row's pair behind it where both are new."""
    groups = random_groups("labels", 5)
    loader = Loader(groups, global_batch=size, seed=1, rank=0, world_size=1, min_groups=2)
    replayed = asked_of(KTO(), loader, 4, 9)
    want: list[Group] = []
    for step in range(4):
        own = loader.batch(step).groups
        for two in zip(own, mismatched(own, 9)[0], strict=True):
            want += [group for group in two if digest(group) not in map(digest, want)]
    assert list(replayed) == want == replayed[:] and [replayed[i] for i in (7, 0, -1)] == [want[i] for i in (7, 0, -1)]
    with pytest.raises(IndexError, match="of"):
        replayed[len(replayed)]
    assert len(asked_of(KTO(), loader, 1, 9)) == 2 * size, "a run that ends in its first epoch"


def test_rows_alone_are_asked_about_once() -> None:
    """DPO asks about its rows alone: they are found again by a run with another seed or batch size."""
    groups = random_groups("pairs", 5)
    for seed, size in ((1, 2), (7, 3)):
        loader = Loader(groups, global_batch=size, seed=seed, rank=0, world_size=1)
        assert asked_of(DPO(loss_type=("sigmoid", "aot")), loader, 30, 9) is groups


def test_a_group_is_its_token_ids() -> None:
    """Not its place or its text: where a prompt ends and which tokens count are part of it."""
    group = Group(0, "a:1", (5, 6), ((7, 2), (8, 2)), "x")
    same = Group(9, "b:3", (5, 6), ((7, 2), (8, 2)), "y")
    others = [
        Group(0, "a:1", (5,), ((6, 7, 2), (8, 2)), "x"),
        Group(0, "a:1", (5, 6), ((8, 2), (7, 2)), "x"),
        Group(0, "a:1", (5, 6), ((7, 2), (8, 2)), "x", masks=((True, True), (False, True))),
        Group(0, "a:1", (5, 6), ((7, 2),), "x"),
    ]
    assert digest(group) == digest(same)
    assert len({digest(g) for g in [group, *others]}) == 5


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("algo", "more"),
    [
        ("dpo", ["--tuner", "full"]),
        quick_if(False, "kto", []),
        quick_if(False, "kto", ["--tuner", "full"]),
        quick_if(False, "dpo", ["--deepspeed", "zero3"]),
    ],
)
def test_a_run_is_the_same_with_it(algo: str, more: list[str], tmp_path: Path, two_ranks: RankPool) -> None:
    """Two epochs with evaluations: the metrics of a run without it, one that fills it and one that reads it."""
    folder = tiny_folder(tmp_path / "model")
    words = ["--algo", algo, "--model", str(folder), "--dataset", f"demo:{'labels' if algo == 'kto' else 'pairs'}#16"]
    words += ["--split_dataset_ratio", "0.25", "--num_train_epochs", "2", "--learning_rate", "0.01"]
    words += ["--gradient_accumulation_steps", "2", "--logging_steps", "1", *more]
    found = []
    for name, cache in (("off", "off"), ("fill", "on"), ("read", "auto")):
        built = two_ranks.run(
            reference_cache_cases.train,
            [*words, "--ref_cache", cache, "--output_dir", str(tmp_path / name)],
            tmp_path / "kept",
        )
        assert ("reference" in built) == (name != "read" and "full" in more), "read from disk, no reference is built"
        found.append(lines(tmp_path / name))
    for other in found[1:]:
        assert [sorted(line) for line in other] == [sorted(line) for line in found[0]]
        for mine, theirs in zip(other, found[0], strict=True):
            for name in ("loss", "rewards/chosen", "eval/loss", "kl"):
                if name in mine:
                    # KL is a difference of sums of some hundred nats, whose last bit is 3e-5.
                    near = 1e-4 if name == "kl" else 1e-6
                    assert mine[name] == pytest.approx(theirs[name], rel=1e-5, abs=near), name


def test_where_it_would_not_pay_there_is_none(tmp_path: Path, two_ranks: RankPool) -> None:
    """LoRA, one epoch, no evaluation; and a run shorter than its rows."""
    folder = tiny_folder(tmp_path / "model")
    words = ["--algo", "dpo", "--model", str(folder), "--dataset", "demo:pairs#16", "--max_steps", "1"]
    for more in ([], ["--tuner", "full", "--gradient_accumulation_steps", "1"]):
        command = [*words, *more, "--output_dir", str(tmp_path / f"out{len(more)}")]
        two_ranks.run(reference_cache_cases.train, command, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()
