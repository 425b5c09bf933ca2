"""The table of versions and the machine."""

from __future__ import annotations

import getpass
import platform
import socket

import torch

from dsalign.report.environment import environment, memory_gib, memory_now, memory_peak


def test_versions_and_no_names() -> None:
    """Python's and torch's versions are there, whoever's machine it is is not."""
    found = environment()
    assert found["Python"] == platform.python_version() and found["torch"][0].isdigit()
    assert "cores to use" in found["processor"] and found["memory"].endswith(" GiB")
    words = " ".join(found.values()).split()
    assert socket.gethostname() not in words and getpass.getuser() not in words


def test_memory_of_this_process() -> None:
    """64 MiB that are held are seen, and stay in the peak when they are gone; Linux counts pages in batches, so 2 MiB
    may be missing. Other tests in this process may have held more before."""
    before, at_most, batch = memory_now(), memory_peak(), 2**21
    held = torch.ones(2**24)
    assert memory_now() - before > 60 * 2**20 and memory_peak() >= max(at_most, memory_now()) - batch
    peak = memory_peak()
    del held
    assert memory_peak() >= peak - batch and memory_now() > 10 * 2**20
    assert abs(memory_gib()["memory"] * 2**30 - memory_now()) < batch
