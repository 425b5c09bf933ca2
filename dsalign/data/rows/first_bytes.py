"""What a file is by its first bytes, where that is not what its name says: a page in the place of a download, a pointer
of Git LFS, another format, another encoding. Read as what it is called, it would be answered with a wrong cause."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from dsalign.data.rows.records import RowError, shorten
from dsalign.data.rows.text_files import BROKEN, COMPRESSED, opened

HEAD = 512  # bytes that are looked at
PAGE = "the download failed and left this page: get the file again, perhaps after logging in"
# How a file begins, blanks aside -> what it is, what to do.
NO_ROWS = {
    rb"version https://git-lfs": ("a pointer of Git LFS", "run git lfs pull where the data set was cloned"),
    rb"(?i)<(!doctype html|html|head|body)\b": ("an HTML page", PAGE),
    rb"(?i)<(\?xml|error)\b": ("XML", PAGE),
    rb"PK\x03\x04": ("a zip archive", "unpack it"),
    rb"BZh\d|\xfd7zXZ\x00": ("packed as bz2 or xz", "unpack it, or pack it as .gz or .zst"),
    rb"%PDF|\x89HDF|\x93NUMPY|SQLite format 3\x00|\x80[\x02-\x05]": ("another program's file", "export it as .jsonl"),
}
# How the files of a format begin -> its name, and the suffix that belongs to it.
FORMATS = {
    b"\x1f\x8b": ("packed by gzip", ".gz"),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", ".zst"),
    b"PAR1": ("Parquet", ".parquet"),
    b"ARROW1": ("an Arrow file", ".arrow"),
}
WIDE = {  # of the encodings with several bytes a character: their marks, the longer one first
    "UTF-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE),
    "UTF-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE),
}


def check(path: Path, name: str, suffix: str) -> None:
    """Raises RowError, which says what the file is and what to do, where it is not what its name says.

    name: how messages call it. suffix: of its format, such as .jsonl for rows.jsonl.gz.
    """
    with path.open("rb") as file:
        head = file.read(HEAD)
    packed = path.suffix in COMPRESSED
    _check_format(head, name, path.suffix if packed else suffix)
    if packed:
        try:
            with opened(path) as file:
                head = file.read(HEAD)
        except BROKEN:  # whoever reads it says so
            return
        _check_format(head, name, suffix)
    if suffix not in (".parquet", ".arrow"):
        _check_encoding(head, name)


def _check_format(head: bytes, name: str, suffix: str) -> None:
    begins = head.removeprefix(codecs.BOM_UTF8).lstrip()
    for pattern, (what, fix) in NO_ROWS.items():
        if re.match(pattern, begins):
            raise RowError(f"{name}: expected rows, got {what}: {shorten(begins[:60])}; {fix}")
    stem = name.removesuffix(suffix)
    for mark, (what, own) in FORMATS.items():
        if head.startswith(mark) and suffix != own:
            better = name + own if own in COMPRESSED else stem + own
            raise RowError(f"{name}: expected {suffix} by its name, got a file that is {what}; call it {better}")
    text = begins[:1] in (b"{", b"[")
    if text and suffix in (*COMPRESSED, ".parquet", ".arrow"):
        better = stem if suffix in COMPRESSED else stem + (".jsonl" if begins.startswith(b"{") else ".json")
        raise RowError(f"{name}: expected {suffix} by its name, got JSON: {shorten(begins[:60])}; call it {better}")


def _check_encoding(head: bytes, name: str) -> None:
    wide = next((code for code, marks in WIDE.items() if head.startswith(marks)), None)
    if wide is None:  # without a mark: every second byte of plain letters is 0, or three of four
        nuls = [i for i, byte in enumerate(head[:4]) if byte == 0]
        wide = "UTF-32" if len(nuls) == 3 else "UTF-16" if nuls in ([1, 3], [0, 2]) else None
    if wide is not None:
        raise RowError(f"{name}: expected UTF-8, got {wide}: {shorten(head[:60])}; save the file as UTF-8")
