"""Tokenising in other processes: the same groups, the same errors, and no process that outlives its parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from dsalign.data.rows.iterate import Skipped
from dsalign.data.rows.records import Row
from dsalign.data.tokens import encoder, processes
from dsalign.data.tokens.encoder import Encoder, Tally, tokenize_rows
from dsalign.data.tokens.group_store import write_store
from dsalign.data.tokens.load_template import load_template
from dsalign.data.tokens.processes import num_processes, tokenised_chunks

ROWS = [
    Row(f"f:{i}", ({"role": "user", "content": "q" * (i % 5 + 1)},), (f"a{i}", "b"), columns={"id": i})
    for i in range(50)
]


class Ending(Encoder):
    """Ends the process it runs in, as the system does for want of memory."""

    def __call__(self, rows):
        os._exit(9)


class Sleeping(Encoder):
    """Says which process it is in, and never comes back."""

    def __call__(self, rows):
        print(os.getpid(), flush=True)
        time.sleep(600)


@pytest.fixture
def template(make_tokenizer):
    return load_template(make_tokenizer(), "plain", [])[0]


@pytest.fixture
def chunks_of_ten(monkeypatch):
    monkeypatch.setattr(encoder, "CHUNK", 10)


@pytest.mark.parametrize("number", [1, 2])
def test_groups_and_counts_are_those_of_one_process(number, template, chunks_of_ten, tmp_path):
    """Prompts of 1 to 5 tokens, of which those of 5 are too long: written part by part, in order."""
    how = {"max_length": 7, "truncation": "delete"}
    tally, parts = Tally(), []
    for part, counted in tokenised_chunks(iter(ROWS), Encoder(template, **how), number):
        parts.append(part)
        tally.add(counted)
    want = tokenize_rows(ROWS, template, **how)
    assert len(parts) == 5 and list(write_store(parts, tally, Skipped(), tmp_path / "s")) == list(want.groups)
    assert (tally.num_rows, dict(tally.dropped), tally.truncated) == (want.num_rows, want.dropped, want.truncated)
    assert len(want.groups) == tally.num_rows - sum(want.dropped.values()) > 30 and want.dropped


@pytest.mark.parametrize("number", [1, 2])
def test_a_row_that_cannot_be_used_is_named(number, template, chunks_of_ten):
    rows = [*ROWS[:25], replace(ROWS[25], prompt=({"role": "user", "content": ""},)), *ROWS[26:]]
    with pytest.raises(ValueError, match=r"^f:25: template 'plain': expected at least one prompt token"):
        list(tokenised_chunks(rows, Encoder(template, 9, "left"), number))


def test_a_process_that_is_ended_is_said(template):
    with pytest.raises(ValueError, match=r"one of 2 processes .* ended from outside.* --dataset_num_proc 1"):
        list(tokenised_chunks(ROWS, Ending(template, 9, "left"), 2))


def test_no_process_outlives_its_parent(tmp_path):
    """A parent that is killed, as a launcher does, leaves a process that works; it ends by itself."""
    script = tmp_path / "parent.py"
    script.write_text(
        f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]
if __name__ == "__main__":
    import test_processes as t
    from support import tiny_tokenizer
    template = t.load_template(tiny_tokenizer(), "plain", [])[0]
    list(t.tokenised_chunks(t.ROWS, t.Sleeping(template, 9, "left"), 2))
"""
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        parent.kill()
        end = time.monotonic() + 20
        while time.monotonic() < end and _runs(child):
            time.sleep(0.1)
        alive = _runs(child)
        if alive:
            os.kill(child, signal.SIGKILL)
    assert not alive


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_how_many_processes(template, monkeypatch, caplog):
    """As many as cores and rows allow, 8 at most; what was asked for; one for a class that is not transformers' own,
    which is said where more were asked for."""
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: range(4))
    tokenizer = template.tokenizer
    found = [num_processes(None, rows, tokenizer) for rows in (10, 4 * 1024, 8 * 1024, 10.0**6, None)]
    assert found == [1, 1, 2, 4, 4] and {type(x) for x in found} == {int}
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: range(64))
    assert num_processes(None, None, tokenizer) == 8
    assert num_processes(3, 10, tokenizer) == 3
    with mock.patch.object(multiprocessing.current_process(), "_config", {"daemon": True}):
        assert num_processes(3, 10**6, tokenizer) == 1
    own = type("Own", (type(tokenizer),), {"__module__": "transformers_modules.own"})
    assert [num_processes(n, 10**6, own(tokenizer_object=tokenizer.backend_tokenizer)) for n in (None, 1, 3)] == [
        1,
        1,
        1,
    ]
    assert caplog.messages == ["dataset_num_proc: 1 instead of 3, as the tokenizer comes with its own code"]
