"""What is worth knowing about a data set before it is trained on: pure functions of its groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsalign.data.tokenize import Group

EXAMPLES = 3  # rows that a finding names
ONE_SIDED = 0.65  # share of pairs in which one side is the longer, beyond which length gives the answer away
BINS = 10  # of a histogram


@dataclass(frozen=True)
class Finding:
    """severity: "error", "warning" or "note". rule: a short name that stays. advice: what it does, and what to do."""

    severity: str
    rule: str
    count: int
    examples: tuple[str, ...]  # file and line
    advice: str

    def line(self) -> str:
        """One line for people."""
        where = f" ({', '.join(self.examples)}{', ...' if self.count > len(self.examples) else ''})"
        return f"{self.severity}: {self.count} {self.rule}{where if self.examples else ''}: {self.advice}"


def check(groups: Sequence[Group], end_ids: frozenset[int], bos: int | None) -> list[Finding]:
    """Everything found in some groups, errors first. end_ids: tokens that end a turn. bos: the tokenizer's, if any."""
    pairs = [g for g in groups if len(g.completions) == 2]
    answers = [g for g in groups if g.completions]
    found = [
        _of(
            "error",
            "double BOS",
            groups,
            lambda g: bos is not None and g.prompt[:2] == (bos, bos),
            "the template writes a BOS and the tokenizer another one: remove it from the template",
        ),
        _of(
            "warning",
            "without end token",
            answers,
            lambda g: any(c[-1] not in end_ids for c in g.completions),
            "the answer was cut, so the model does not learn to stop there: raise --max_length",
        ),
        _of(
            "warning",
            "identical pairs",
            pairs,
            lambda g: g.completions[0] == g.completions[1],
            "chosen and rejected are the same: they teach nothing, leave them out",
        ),
        _of(
            "warning",
            "empty answers",
            answers,
            lambda g: any(len(c) == 1 for c in g.completions),
            "nothing but the end token: right only where silence is meant",
        ),
        _repeated(groups),
        *_one_sided(pairs),
    ]
    order = ("error", "warning", "note")
    return sorted((f for f in found if f.count), key=lambda f: order.index(f.severity))


def _of(severity: str, rule: str, groups: Iterable[Group], holds: Callable[[Group], bool], advice: str) -> Finding:
    places = [g.where for g in groups if holds(g)]
    return Finding(severity, rule, len(places), tuple(places[:EXAMPLES]), advice)


def _repeated(groups: Sequence[Group]) -> Finding:
    seen: set[tuple[Any, ...]] = set()
    places = []
    for group in groups:
        key = (group.prompt, group.completions, group.label)
        if key in seen:
            places.append(group.where)
        seen.add(key)
    advice = "the same row again: it counts double, and may stand on both sides of a split"
    return Finding("warning", "duplicates", len(places), tuple(places[:EXAMPLES]), advice)


def _one_sided(pairs: Sequence[Group]) -> list[Finding]:
    """Whether length alone tells the chosen answer from the rejected one."""
    if not pairs:
        return []
    chosen, rejected = (sum(len(g.completions[side]) for g in pairs) / len(pairs) for side in (0, 1))
    longer = sum(len(g.completions[0]) > len(g.completions[1]) for g in pairs) / len(pairs)
    shorter = sum(len(g.completions[0]) < len(g.completions[1]) for g in pairs) / len(pairs)
    if max(longer, shorter) <= ONE_SIDED:
        return []
    side = "longer" if longer > shorter else "shorter"
    advice = (
        f"chosen answers are {side} in {max(longer, shorter):.0%} of pairs ({chosen:.0f} against {rejected:.0f} tokens "
        "on average): a model can learn length instead of quality; simpo and ipo normalise it away"
    )
    return [Finding("warning", "length bias", len(pairs), (), advice)]


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens: percentiles by linear rank, and a histogram of equal bins from 0 to the largest."""

    p50: int
    p95: int
    largest: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Lengths:
        """Of at least one number."""
        ordered = sorted(numbers)
        width = max(1, -(-(ordered[-1] + 1) // BINS))
        bins = Counter(n // width for n in ordered)
        at = [ordered[round(q * (len(ordered) - 1))] for q in (0.5, 0.95)]
        return cls(at[0], at[1], ordered[-1], tuple(bins[i] for i in range(BINS)))


def lengths(groups: Sequence[Group]) -> dict[str, Lengths]:
    """Of prompts, of completions where there are some, and of a prompt with its longest completion."""
    answers = [len(c) for g in groups for c in g.completions]
    found = {"prompt": [len(g.prompt) for g in groups], "completion": answers}
    found["whole"] = [len(g.prompt) + max(map(len, g.completions), default=0) for g in groups]
    return {name: Lengths.of(numbers) for name, numbers in found.items() if numbers}


def as_json(findings: Sequence[Finding], measured: dict[str, Lengths]) -> dict[str, Any]:
    """{"findings": [...], "lengths": {...}} with the fields' names as keys."""
    return {
        "findings": [asdict(f) for f in findings],
        "lengths": {name: asdict(of) for name, of in measured.items()},
    }
