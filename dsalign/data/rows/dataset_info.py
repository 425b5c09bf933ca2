"""A dataset_info.json beside a file, as LLaMA-Factory's users keep it: what the columns of the file mean."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsalign.data.rows.records import shorten

NAME = "dataset_info.json"
# The meaning that a note gives a column -> the name that a layout of formats.py has for it.
OURS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "system": "system",
    "tools": "tools",
    "messages": "conversations",
    "chosen": "chosen",
    "rejected": "rejected",
    "kto_tag": "label",
    "images": "images",
    "videos": "videos",
    "audios": "audios",
}
ROLES = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


@dataclass(frozen=True)
class Notes:
    """What a note says of one file.

    columns: their name -> ours. keys: of a message, their name of the role and of the content -> "role" and "content".
    roles: their name of a role -> ours.
    """

    columns: Mapping[str, str]
    keys: Mapping[str, str]
    roles: Mapping[str, str]

    def applied(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The columns of a record under our names, and so the keys and roles of its messages."""
        return {self.columns.get(name, name): self._messages(value) for name, value in values.items()}

    def _messages(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._messages(item) for item in value]
        role = next((name for name, ours in self.keys.items() if ours == "role"), None)
        if not isinstance(value, dict) or role not in value:
            return value
        renamed = {self.keys.get(name, name): item for name, item in value.items()}
        renamed["role"] = self.roles.get(str(renamed["role"]), renamed["role"])
        return renamed


def notes_of(path: Path) -> Notes | None:
    """What the dataset_info.json beside a file says of it; None where there is none, or it does not name the file.

    Raises ValueError where it names the file and cannot be used.
    """
    beside = path.parent / NAME
    if not beside.is_file():
        return None
    try:
        every = json.loads(beside.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{beside}: expected JSON, got an error: {shorten(str(error))}; correct it, as it says what the columns "
            f"of {path.name} mean, or move it away"
        ) from error
    entries = every.values() if isinstance(every, dict) else ()
    entry = next((e for e in entries if isinstance(e, dict) and e.get("file_name") == path.name), None)
    if entry is None:
        return None
    columns, tags = entry.get("columns") or {}, entry.get("tags") or {}
    unknown = sorted(set(columns) - set(OURS))
    if unknown:
        raise ValueError(
            f"{beside}: columns of {path.name}: expected some of {', '.join(OURS)}, got {unknown}; remove them"
        )
    sharegpt = entry.get("formatting") == "sharegpt"
    role, content = tags.get("role_tag", "from"), tags.get("content_tag", "value")
    return Notes(
        {theirs: OURS[meaning] for meaning, theirs in columns.items() if theirs},
        {role: "role", content: "content"} if sharegpt else {},
        {tags[tag]: ours for tag, ours in ROLES.items() if tag in tags},
    )
