"""Which engine computes a role, and that none stands in for a model that is not there."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from dsalign.engines import roles
from dsalign.engines.roles import Role, Roles


class Lora:
    """What a PEFT model is to `Roles`."""


def engine(model: object) -> SimpleNamespace:
    return SimpleNamespace(module=SimpleNamespace(model=model))


def test_a_role_is_its_own_engine_or_the_start_of_a_lora_policy() -> None:
    """The reference is the policy's start where nobody said otherwise; an engine of its own comes first."""
    with mock.patch.object(roles, "PeftModel", Lora):
        shared = Roles({"policy": engine(Lora())}, torch.device("cpu"), 1)
        assert shared.role("policy") == Role("policy")
        assert shared.role("reference") == Role("policy", start_weights=True)
        own = Roles({"policy": engine(Lora()), "reference": engine(None)}, torch.device("cpu"), 1)
        assert own.role("reference") == Role("reference")


@pytest.mark.parametrize(("model", "start"), [(None, ["reference"]), (Lora(), [])], ids=["full", "another model"])
def test_no_model_stands_in_for_another(model: object, start: list[str]) -> None:
    """A reference that was given back, or never built: of a policy with all weights, and of a run with a ref_model."""
    with mock.patch.object(roles, "PeftModel", Lora):
        found = Roles({"policy": engine(model), "reference": engine(None)}, torch.device("cpu"), 1, start_weights=start)
        found.release("reference")
        for name in ("reference", "reward"):
            with pytest.raises(ValueError, match=rf"^{name}: expected its model in memory, found none"):
                found.role(name)


def test_engines_are_stepped_and_not_roles() -> None:
    """The roles of one engine come together, in the order of the algorithm."""
    found = Roles({"policy": engine(None), "value": engine(None)}, torch.device("cpu"), 1)
    assert found.stepped(("policy", "value")) == {"policy": ("policy",), "value": ("value",)}
    with mock.patch.object(Roles, "role", lambda self, name: Role("policy")):
        assert found.stepped(("policy", "value")) == {"policy": ("policy", "value")}
