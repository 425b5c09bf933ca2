"""The table of versions and the machine."""

from __future__ import annotations

import getpass
import platform
import socket

from dsalign.report.environment import environment


def test_versions_and_no_names() -> None:
    """Python's and torch's versions are there, whoever's machine it is is not."""
    found = environment()
    assert found["Python"] == platform.python_version() and found["torch"][0].isdigit()
    assert "cores to use" in found["processor"] and found["memory"].endswith(" GiB")
    words = " ".join(found.values()).split()
    assert socket.gethostname() not in words and getpass.getuser() not in words
