"""Values that look like secrets are left out of what a run writes: config.yaml, command.txt and report.html are passed
around."""

from __future__ import annotations

import re

HIDDEN = "[redacted]"
_SHAPES = (  # of the hub, OpenAI and its like, GitHub, GitLab, AWS, Slack, Google; a JSON web token; a private key
    r"\bhf_[A-Za-z0-9]{16,}", r"\bapi_org_[A-Za-z0-9]{16,}", r"\bsk-[A-Za-z0-9_-]{16,}",
    r"\b(?:gh[pousr]_|github_pat_)[A-Za-z0-9_]{16,}", r"\bglpat-[A-Za-z0-9_-]{16,}", r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    r"\bxox[abprs]-[A-Za-z0-9-]{10,}", r"\bAIza[A-Za-z0-9_-]{30,}", r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+",
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|$)",
)  # fmt: skip
_SHAPE = re.compile("|".join(_SHAPES), re.DOTALL)
_IN_URL = re.compile(r"(?<=://)[^/\s:@'\"]*:?[^/\s@'\"]+(?=@)")
_NAMED = re.compile(  # token=..., "api_key": ..., --wandb_api_key ..., Authorization: Bearer ...
    r"(?i)((?:[\w-]*(?:api|access|secret|private|auth)[_-]?(?:key|token)|[\w-]*(?:token|password|passwd|secret)"
    r"|authorization)[\"']?\s*(?:=|:|\s)\s*[\"']?(?:bearer\s+)?)([A-Za-z0-9+/_.~%-]*\d[A-Za-z0-9+/_.~%-]{7,})"
)


def redacted(text: str) -> str:
    """The text with `HIDDEN` in the place of each value that looks like a secret: by its shape, by a name such as
    api_key in front of it, or as the user's part of a URL."""
    text = _IN_URL.sub(HIDDEN, _SHAPE.sub(HIDDEN, text))
    return _NAMED.sub(lambda found: found[1] + HIDDEN, text)
