"""Every error that a user reads says what was expected, or what to do. `python tests/raises.py` lists them."""

from __future__ import annotations

import re
from fnmatch import fnmatch

import pytest
from raises import GAP, Raise, is_tested, raises

EXPECTED = re.compile(r"\b(expected|must|needs?|at least|at most)\b", re.IGNORECASE)
TO_DO = re.compile(
    r"(^|[;:.,?!(] |\bor |\band )(give|write|take|merge|remove|raise|lower|leave|use|install|run|save|copy|check|name|"
    r"start|keep|choose|resume|set|wait|try|add|train|close|free|change|move|correct|replace|download|upgrade|stop|pass|see)\b",
    re.IGNORECASE,
)
# Raises whose text is made elsewhere, or is one line of a longer answer: file, first words -> why.
EXCEPTIONS = {
    ("config/ds_files.py", "deepspeed: {}"): "lines of ds_keys.problems, each with what was expected",
    ("data/rows/text_files.py", "{}:{}: {}"): "the place of a cause that the reader says",
    ("models/tokenizer.py", "model: {} could not be opened: {}{}"): "the library's own text says what it looked for",
    ("rollout/probe.py", "*log-probabilities of sampler and trainer differ*"): "_reason says what to do",
    ("rollout/vllm_server.py", "vllm_server: {}/{} {}"): "what the server said, with how it is started",
    ("rollout/vllm_server.py", "vllm_server: {} sampled from weights*"): "two causes, each with its cure",
    ("models/compare.py", "{} model {}: *"): "advice, which each caller gives: give the model that ...",
    ("checkpoint/checkpoints.py", "resume: *"): "the checkpoint that the user named is not whole",
    ("checkpoint/run_folders.py", "resume: *"): "rules.py has said before what was expected",
}


def excused(one: Raise) -> bool:
    """Whether a raise is listed with its reason, or its text is made elsewhere and only passed on."""
    return one.text == GAP or any(one.path == path and fnmatch(one.text, text) for path, text in EXCEPTIONS)


def unhelpful(text: str) -> bool:
    """Whether a message says neither what was expected nor what to do."""
    return EXPECTED.search(text) is None and TO_DO.search(text) is None


def test_every_message_says_what_was_expected_or_what_to_do() -> None:
    """Over the constant parts of each text; what it inserts is shown as {}."""
    bad = [f"dsalign/{one.path}:{one.line}: {one.text}" for one in raises() if not excused(one) and unhelpful(one.text)]
    assert not bad, "\n".join(bad)
    assert len(raises()) > 150


@pytest.mark.parametrize(
    ("text", "bad"),
    [("beta: wrong", True), ("beta: expected a number, got x", False), ("rows are gone; copy them again", False),
     ("the runner gave up", True), ("a name is missing: add it", False)],
)  # fmt: skip
def test_what_such_a_message_is(text: str, bad: bool) -> None:
    assert unhelpful(text) is bad


def test_an_exception_is_needed() -> None:
    """Each still excuses a raise that is there."""
    for path, text in EXCEPTIONS:
        assert any(one.path == path and fnmatch(one.text, text) for one in raises()), (path, text)


def test_most_messages_are_read_by_a_test() -> None:
    """All but those whose text is made elsewhere, whose parts are too short to be looked for."""
    untested = [one for one in raises() if not is_tested(one) and not excused(one)]
    assert len(untested) <= 3, [f"dsalign/{one.path}:{one.line}: {one.text}" for one in untested]
