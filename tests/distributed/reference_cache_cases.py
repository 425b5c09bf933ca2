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
from dsalign.engines import reference_cache as refcache
from dsalign.models.names import resolve
from dsalign.verbs import train as run


def mismatched() -> Group:
    """The first prompt with the completions of the second row."""
    one, two = random_groups("pairs", 2)
    return dataclasses.replace(one, completions=two.completions)


def cached(folder: Path, kept: Path, stage: str, tuner: str) -> tuple[list[Any], list[int]]:
    """(log-probabilities of nine pairs and of a mismatched one, how many groups each of two fillings computed)."""
    models = build("dpo", folder, stage=stage, tuner=tuner, batch_size=3).models
    groups = random_groups("pairs", 9)
    key = refcache.weights_key(resolve(str(folder)), torch.float32)
    with mock.patch.object(refcache, "cache_folder", lambda: kept), mock.patch.object(refcache, "PART", 4):
        computed = [refcache.ReferenceCache([groups[:6], groups[6:]], key).fill(models) for _ in range(2)]
        cache = refcache.ReferenceCache([groups[:6], groups[6:]], key)
        assert cache.complete(models.device)
        found = cache.logps(models, [*groups, mismatched()])
    return [one.tolist() for one in found], computed


def train(words: list[str], kept: Path) -> list[str]:
    """A whole run with its cache under `kept`; the roles for which it built a model."""
    built: list[str] = []
    plain = run._models

    def models(config: Any, sources: Any, *more: Any) -> Any:
        found = plain(config, sources, *more)
        built.extend(found.engines)
        return found

    with mock.patch.object(refcache, "cache_folder", lambda: kept), mock.patch.object(run, "_models", models):
        whole_runs.train(words)
    return built
