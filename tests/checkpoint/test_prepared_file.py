"""A prepared batch comes back from its file with every number that a loss reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from support import random_groups

from dsalign.checkpoint import prepared_file
from dsalign.contract.groups import Prepared


def test_a_prepared_batch_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Fields of floats, among them one that no short decimal writes, of booleans and of one number a group; a metric of
    a tensor; a mask; what only rewards read is left out."""
    groups = [*random_groups("pairs", 3), random_groups("labels", 1)[0]]
    masks = tuple(tuple(i % 2 == 0 for i in range(len(c))) for c in groups[0].completions)
    groups[0] = dataclasses.replace(groups[0], masks=masks, columns={"answer": object()})
    third = torch.tensor([1 / 3, -0.0, float("nan"), 1e-45])
    prepared = Prepared(
        groups,
        {
            "old": [third, torch.randn(2), torch.empty(0), torch.randn(5)],
            "half": [torch.randn(1).bfloat16() for _ in groups],
            "kept": [torch.tensor([True, False]) for _ in groups],
        },
        {"limit": 0.1},
        {"loss": (torch.tensor(1 / 3), 7), "count": (2.5, torch.tensor(3))},
        [{"completion": "a", "score": 1.0}],
        [5, 0, 3, 9],
    )
    prepared_file.write(prepared, tmp_path / "one")
    found = prepared_file.read(tmp_path / "one")
    assert found.groups == [dataclasses.replace(group, columns={}) for group in groups]
    assert found.fields.keys() == prepared.fields.keys()
    for name, parts in prepared.fields.items():
        for want, got in zip(parts, found.fields[name], strict=True):
            assert got.dtype == want.dtype and torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    assert found.shared == prepared.shared and found.positions == [5, 0, 3, 9] and not found.samples
    assert found.metrics == {"loss": (float(torch.tensor(1 / 3)), 7.0), "count": (2.5, 3.0)}


def test_a_rank_without_groups_keeps_the_names_of_its_fields(tmp_path: Path) -> None:
    """Losses read fields by name on every rank."""
    prepared_file.write(Prepared([], {"old": []}, positions=[]), tmp_path / prepared_file.name_of(1))
    found = prepared_file.read(tmp_path / "prepared-1.safetensors")
    assert found == Prepared([], {"old": []}, positions=[])


def test_a_batch_of_two_ranks_is_dealt_to_one_and_to_three(tmp_path: Path) -> None:
    """Five groups at the places 0 to 4: each goes to one rank, with its fields, and metrics still add up to those of
    all: 1 + 2 of 3 + 4, and 5 of 6 that rank 1 alone had."""
    groups = random_groups("pairs", 5)
    held = ((0, (4, 0, 3)), (1, (1, 2)))
    for rank, places in held:
        metrics = {"loss": (1.0 + rank, 3 + rank), **({"kl": (5.0, 6)} if rank else {})}
        fields = {"old": [torch.tensor([float(at), 0.5]) for at in places]}
        part = Prepared([groups[at] for at in places], fields, {"limit": 0.1}, metrics, positions=list(places))
        prepared_file.write(part, tmp_path / prepared_file.name_of(rank))
    assert prepared_file.read_dealt(tmp_path, 2, 1, 2) == prepared_file.read(tmp_path / prepared_file.name_of(1))
    for ranks in (1, 3):
        parts = [prepared_file.read_dealt(tmp_path, 2, rank, ranks) for rank in range(ranks)]
        assert sorted(at for part in parts for at in part.positions or ()) == [0, 1, 2, 3, 4]
        assert {len(part.groups) for part in parts} <= ({5} if ranks == 1 else {1, 2})
        for part in parts:
            assert part.groups == [groups[at] for at in part.positions or ()] and part.shared == {"limit": 0.1}
            assert [float(one[0]) for one in part.fields["old"]] == list(part.positions or ())
        for name, total, count in (("loss", 3.0, 7), ("kl", 5.0, 6)):
            sums = [part.metrics[name] for part in parts]
            assert (sum(float(a) for a, _ in sums), sum(float(b) for _, b in sums)) == (total, count)
