"""What a file is by its first bytes: a page, a pointer, another format or encoding; a file that is right is not
refused."""

from __future__ import annotations

import gzip

import pytest

from dsalign.data.rows import first_bytes
from dsalign.data.rows.records import RowError

ROW = '{"a": 1}\n'


def checked(path, suffix):
    first_bytes.check(path, path.name, suffix)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ROW.encode()),
        ("a.jsonl", b"\xef\xbb\xbf\n" + ROW.encode()),
        ("a.json", b" \n[" + ROW.encode() + b"]"),
        ("a.csv", b"versions,b\n<html>,2\n"),
        ("a.csv", "é\x00".encode()),  # a NUL in a cell is for whoever reads the cell
        ("a.tsv", b"a"),
        ("a.jsonl", b""),
        ("a.jsonl.gz", gzip.compress(ROW.encode())),
        ("a.jsonl.gz", gzip.compress(ROW.encode())[:9]),  # cut off: whoever reads it says so
        ("a.parquet", b"PAR1...."),
        ("a.arrow", b"\xff\xff\xff\xff...."),
    ],
)
def test_what_is_right_is_not_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    checked(tmp_path / name, "." + name.removesuffix(".gz").rpartition(".")[2])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", b"\n<HTML><BODY>", "expected rows, got an HTML page: b'<HTML><BODY>'; the download failed"),
        ("a.jsonl", b"<Error><Code>AccessDenied", "expected rows, got XML"),
        ("a.parquet", b"version https://git-lfs.github.com", "expected rows, got a pointer of Git LFS"),
        ("a.jsonl", b"BZh91AY", "got packed as bz2 or xz: b'BZh91AY'; unpack it, or pack it as .gz or .zst"),
        ("a.jsonl", b"\xfd7zXZ\x00", "got packed as bz2 or xz"),
        ("a.json", b"\x80\x04\x95", "got another program's file"),
        ("a.csv", b"SQLite format 3\x00", "got another program's file"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd....", "got a file that is packed by zstd; call it a.jsonl.zst"),
        ("a.jsonl.gz", b"\x28\xb5\x2f\xfd....", "expected .gz by its name, got a file that is packed by zstd"),
        ("a.jsonl.gz", b"PAR1....", "expected .gz by its name, got a file that is Parquet; call it a.jsonl.parquet"),
        ("a.csv.gz", gzip.compress(b"PAR1...."), "expected .csv by its name, got a file that is Parquet"),
        ("a.arrow", b"PAR1....", "expected .arrow by its name, got a file that is Parquet; call it a.parquet"),
        ("a.parquet", b"ARROW1..", "expected .parquet by its name, got a file that is an Arrow file; call it a.arrow"),
        ("a.arrow", b'[{"a": 1}]', "got JSON: b'[{\"a\": 1}]'; call it a.json"),
        ("a.jsonl", ROW.encode("utf-16-be"), "expected UTF-8, got UTF-16: "),
        ("a.tsv", "a\tb".encode("utf-32-le"), "expected UTF-8, got UTF-32: "),
        ("a.csv", "\ufeffa,b".encode("utf-16-be"), "expected UTF-8, got UTF-16: "),
    ],
)
def test_what_is_something_else_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RowError) as caught:
        checked(tmp_path / name, "." + name.removesuffix(".gz").rpartition(".")[2])
    assert str(caught.value).startswith(f"{name}: expected ") and said in str(caught.value)
