"""Rows as files hold them and as readers give them, for the tests of this folder."""

from __future__ import annotations

import dataclasses

import pyarrow.parquet

from dsalign.data.rows import hub
from dsalign.data.rows.readers import read_source
from dsalign.data.rows.records import RowError
from dsalign.data.rows.registry import REGISTERED


def raised(items):
    """(where, values) of each record; the first RowError among them is raised."""
    for item in items:
        if isinstance(item, RowError):
            raise item
        yield item.where, dict(item.values)


def read(source, seed=42):
    """(where, values) of each record of a source."""
    return list(raised(read_source(source, seed)))


def parquet(name, rows):
    """Write rows as Parquet."""
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), name)


def turns(*texts, system=None):
    """user, assistant, user, ... messages."""
    found = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return [{"role": "system", "content": system}, *found] if system else found


def said(*texts):
    """The same as ShareGPT writes them."""
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


def answer(text):
    """One turn of the assistant."""
    return [{"role": "assistant", "content": text}]


def register(monkeypatch, short, folder):
    """The registered data set, with a local folder in the place of its hub repository."""
    known = REGISTERED[short]
    moved = dataclasses.replace(known, hub_name=folder)
    monkeypatch.setattr(hub, "REGISTERED", {**REGISTERED, short: moved})
