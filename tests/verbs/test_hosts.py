"""Hostfiles are read strictly; machines are asked at once, by a program that stands for ssh."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dsalign.verbs import hosts
from dsalign.verbs.lines import ERROR, OK, WARNING


def hostfile(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def ssh(folder: Path, script: str) -> tuple[str, ...]:
    """A program in the place of ssh; in `script`, $host is the machine and $words what it is to run."""
    path = folder / "ssh"
    path.write_text(f'#!/bin/sh\nfor last; do host="$words"; words="$last"; done\n{script}\n')
    path.chmod(0o755)
    return (str(path),)


def test_a_hostfile(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "# ours\n\nnode-0.lab slots=8\n  a_1   slots=16\n")
    assert hosts.read(path) == {"node-0.lab": 8, "a_1": 16}


@pytest.mark.parametrize(
    "line", ["node0", "node0 slots=0", "node0 slots=08", "node0 slots=8 x", "-oProxyCommand=x slots=8", "a;b slots=1",
             "$(x) slots=1", "node0 slot=8", "node0 slots=٣", "user@node0 slots=8"],
)  # fmt: skip
def test_a_line_that_is_no_machine(line: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"hosts:2: expected NAME slots=N, as node0 slots=8, got "):
        hosts.read(hostfile(tmp_path, f"good slots=8\n{line}\n"))


def test_all_problems_are_told_and_nobody_is_asked(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "a slots=8\nb\na slots=8\n")
    found = hosts.examined(path, ssh(tmp_path, f"touch {tmp_path}/asked"))
    assert [line.state for line in found] == [ERROR, ERROR] and not (tmp_path / "asked").exists()
    assert "hosts:3: expected each machine once, got 'a' again, as in line 1" in found[1].found
    for text, said in (("# none\n", "expected a line NAME slots=N for each machine, got none"), (None, "No such file")):
        where = hostfile(tmp_path, text) if text else tmp_path / "nowhere"
        assert said in hosts.examined(where)[0].found


def test_machines_answer_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One answers, one refuses the key, one has another torch, one's clock is an hour late, one never answers; all at
    once, so that it takes no longer than the last."""
    monkeypatch.setattr(hosts, "SSH_S", 2)
    mine = '{"python": "3.12.1", "torch": "2.9"}'
    monkeypatch.setattr(hosts, "versions", lambda: {"python": "3.12.1", "torch": "2.9"})
    script = f"""case $host in
good) echo welcome; echo '{{"versions": {mine}, "time": '$(date +%s)'}}';;
key) echo 'Permission denied (publickey).' >&2; exit 255;;
old) echo '{{"versions": {{"python": "3.12.1", "torch": "2.8"}}, "time": 0}}';;
late) echo '{{"versions": {mine}, "time": '$(($(date +%s) - 3600))'}}';;
bare) echo 'python: not found' >&2; exit 127;;
*) exec sleep 20;;
esac"""
    text = "".join(f"{name} slots=8\n" for name in ("good", "key", "old", "late", "bare", "gone"))
    start = time.monotonic()
    found = hosts.examined(hostfile(tmp_path, text), ssh(tmp_path, script))
    assert time.monotonic() - start < 6
    states = {line.name: (line.state, line.found, line.advice) for line in found}
    assert states["hostfile"][1].endswith("6 machine(s), 48 GPUs")
    assert states["host good"][0] == OK and "same versions" in states["host good"][1]
    assert states["host key"][:2] == (ERROR, "exit code 255: Permission denied (publickey).")
    assert "authorized_keys" in states["host key"][2] and "must be there" in states["host bare"][2]
    assert states["host old"][:2] == (ERROR, "torch 2.8, here 2.9")
    assert states["host late"][0] == WARNING and "its clock differs by 36" in states["host late"][1]
    assert states["host gone"][:2] == (ERROR, "no answer in 2 s")


def test_what_a_machine_is_asked_is_what_is_known_here(tmp_path: Path) -> None:
    """The same interpreter as on this machine has the same versions; one machine is warned of."""
    found = hosts.examined(hostfile(tmp_path, "here slots=1\n"), ssh(tmp_path, 'exec sh -c "$words"'))
    assert [line.state for line in found] == [OK, WARNING, OK], found
    assert "--force_multi" in found[1].advice
