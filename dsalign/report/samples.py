"""Sampled answers before and after training, beside each other."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from dsalign.config.secrets import redacted
from dsalign.report.story import short

SHOWN = 8  # prompts that stand in the open
Sample = Mapping[str, Any]


def pairs_of(samples: Sequence[Sample]) -> list[tuple[Sample, Sample | None]]:
    """(before, after) of each prompt that was sampled at two steps or more: its first and its last answer. Where no
    prompt came twice, the answers of the first table beside those of the last, whatever their prompts; where there is
    one table alone, its answers with None."""
    first: dict[str, Sample] = {}
    last: dict[str, Sample] = {}
    for one in samples:
        prompt = str(one.get("prompt", ""))
        first.setdefault(prompt, one)
        if one.get("step") != last.get(prompt, {}).get("step"):
            last[prompt] = one  # the first of several answers at one step, as in `first`
    both = [(one, last[prompt]) for prompt, one in first.items() if last[prompt].get("step") != one.get("step")]
    if both or not samples:
        return list(both)
    start, end = samples[0].get("step"), samples[-1].get("step")
    before = [one for one in samples if one.get("step") == start]
    if start == end:
        return [(one, None) for one in before]
    return list(zip(before, [one for one in samples if one.get("step") == end], strict=False))


def sample_section(samples: Sequence[Sample]) -> str:
    """The HTML of the samples of a run; empty where it has none, as an algorithm that reads its answers from rows."""
    pairs = pairs_of(samples)
    if not pairs:
        return ""
    cards = [_card(before, after) for before, after in pairs]
    more = cards[SHOWN:]
    folded = f"<details><summary>{len(more)} more</summary>{''.join(more)}</details>" if more else ""
    return f"<h2>Samples, before and after</h2>{''.join(cards[:SHOWN])}{folded}"


def _card(before: Sample, after: Sample | None) -> str:
    if after is None:
        return f'<div class="sample">{_prompt(before)}<div class="sides">{_answer(before)}</div></div>'
    if before.get("prompt") == after.get("prompt"):
        sides = _answer(before) + _answer(after)
        return f'<div class="sample">{_prompt(before)}<div class="sides">{sides}</div></div>'
    sides = "".join(f"<div>{_prompt(one)}{_answer(one)}</div>" for one in (before, after))
    return f'<div class="sample"><div class="sides">{sides}</div></div>'


def _prompt(one: Sample) -> str:
    return f'<div class="prompt" dir="auto">{_text(one.get("prompt", ""))}</div>'


def _answer(one: Sample) -> str:
    score = one.get("score")
    told = f", reward {short(score)}" if isinstance(score, (int, float)) else ""
    return (
        f'<div class="answer"><span class="quiet">step {_text(one.get("step", ""))}{told}</span>'
        f'<div dir="auto">{_text(one.get("completion", "")) or "<i>nothing</i>"}</div></div>'
    )


def _text(value: Any) -> str:
    return html.escape(redacted(str(value)).strip())
