"""A hook of mkdocs: a link to a file of the repository that is no page becomes the file's name, as the site has pages
alone. tests/test_docs.py holds all links to the files."""

from __future__ import annotations

import posixpath
import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text with `[text](../file)` as `text (file)` where that leaves docs/."""
    folder = posixpath.dirname(page.file.src_uri)

    def inside(found: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join("docs", folder, found[2].partition("#")[0]))
        if file.startswith("docs/") or ":" in found[2] or found[2].startswith("#"):
            return found[0]
        return found[1] if found[1] == file else f"{found[1]} (`{file}`)"

    return re.sub(r"\[([^\]]+)\]\(([^)\s]+)\)", inside, markdown)
