"""What the ranks run for the reference cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import whole_runs
from cases import build
from support import random_groups

from dsalign.contract.groups import Group
from dsalign.engines import build as builder
from dsalign.engines import reference_cache as refcache
from dsalign.models.names import resolve


def mismatched() -> Group:
    """The first prompt with the completions of the second row."""
    one, two = random_groups("pairs", 2)
    return dataclasses.replace(one, completions=two.completions)


def cached(folder: Path, kept: Path, stage: str, tuner: str) -> tuple[list[Any], list[int]]:
    """(log-probabilities of nine pairs and of a mismatched one, how many groups each of two fillings computed)."""
    roles = build("dpo", folder, stage=stage, tuner=tuner, batch_size=3).roles
    groups = random_groups("pairs", 9)
    sets = [groups[:6], groups[6:]]
    key = refcache.weights_key(resolve(str(folder)), torch.float32)
    with mock.patch.object(refcache, "cache_folder", lambda: kept), mock.patch.object(refcache, "PART", 4):
        computed = [refcache.ReferenceCache(sets, key).fill(roles) for _ in range(2)]
        cache = refcache.ReferenceCache(sets, key)
        assert cache.complete(roles.device)
        found = cache.logps(roles, [*groups, mismatched()])
    return [one.tolist() for one in found], computed


def train(words: list[str], kept: Path) -> list[str]:
    """A whole run with its cache under `kept`; the roles for which it built a model."""
    built: list[str] = []
    plain = builder.roles_of

    def roles_of(config: Any, sources: Any, *more: Any) -> Any:
        found = plain(config, sources, *more)
        built.extend(found.engines)
        return found

    with mock.patch.object(refcache, "cache_folder", lambda: kept), mock.patch.object(builder, "roles_of", roles_of):
        whole_runs.train(words)
    return built
