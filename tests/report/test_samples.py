"""Answers before and after, by prompt where one came twice."""

from __future__ import annotations

from typing import Any

from dsalign.report.samples import pairs_of, sample_section


def one(step: int, prompt: str, completion: str) -> dict[str, Any]:
    return {"step": step, "prompt": prompt, "completion": completion, "score": 0.5}


def test_the_first_and_last_answer_to_a_prompt() -> None:
    """Of several answers at one step the first; a prompt that came once is left out."""
    rows = [one(0, "p", "a"), one(0, "p", "b"), one(0, "q", "c"), one(4, "p", "d"), one(8, "p", "e"), one(8, "p", "f")]
    assert [(x["completion"], y and y["completion"]) for x, y in pairs_of(rows)] == [("a", "e")]


def test_prompts_that_never_came_twice() -> None:
    """The first table beside the last; one table alone stands alone."""
    rows = [one(0, "p", "a"), one(0, "q", "b"), one(4, "r", "c"), one(8, "s", "d"), one(8, "t", "e")]
    assert [(x["completion"], y and y["completion"]) for x, y in pairs_of(rows)] == [("a", "d"), ("b", "e")]
    assert [(x["completion"], y) for x, y in pairs_of(rows[:2])] == [("a", None), ("b", None)]


def test_text_of_a_model_is_text() -> None:
    page = sample_section([one(0, "<script>", "</div><b> hf_abcdefghijklmnopqrstuv")])
    assert "&lt;script&gt;" in page and "&lt;/div&gt;&lt;b&gt; [redacted]" in page and "reward 0.5" in page
    assert sample_section([]) == ""
