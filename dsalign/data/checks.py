"""What is worth knowing about a data set before training on it: pure functions of its token groups."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dsalign.contract.groups import Group

EXAMPLES = 3  # rows that a finding names
ONE_SIDED = 0.65  # share of pairs in which one side is the longer, beyond which length gives the answer away
BINS = 10  # of a histogram


@dataclass(frozen=True)
class Finding:
    """One kind of trouble in a data set.

    severity: "error", "warning" or "note". rule: a short name that scripts may rely on. count: groups concerned.
    examples: file and line of the first few. advice: what the trouble does to training, and what to do.
    """

    severity: str
    rule: str
    count: int
    examples: tuple[str, ...]  # file and line
    advice: str

    def line(self) -> str:
        """The finding as one line for people."""
        where = f" ({', '.join(self.examples)}{', ...' if self.count > len(self.examples) else ''})"
        return f"{self.severity}: {self.count} {self.rule}{where if self.examples else ''}: {self.advice}"


@dataclass(frozen=True)
class GroupRule:
    """What may be wrong with a single group.

    severity, name, advice: those of its `Finding`. holds(group, end ids, BOS id or None): whether this group has the
    trouble.
    """

    severity: str
    name: str
    holds: Callable[[Group, frozenset[int], int | None], bool]
    advice: str


GROUP_RULES = (
    GroupRule(
        "error",
        "prompts with two BOS",
        lambda g, ends, bos: bos is not None and g.prompt[:2] == (bos, bos),
        "the template writes a BOS and the tokenizer another one: remove it from the template",
    ),
    GroupRule(
        "warning",
        "rows without end token",
        lambda g, ends, bos: any(c[-1] not in ends for c in g.completions),
        "the answer was cut, so the model does not learn to stop there: raise --max_length",
    ),
    GroupRule(
        "warning",
        "identical pairs",
        lambda g, ends, bos: len(g.completions) == 2 and g.completions[0] == g.completions[1],
        "chosen and rejected are the same: they teach nothing, leave them out",
    ),
    GroupRule(
        "warning",
        "empty answers",
        lambda g, ends, bos: any(len(c) == 1 for c in g.completions),
        "nothing but the end token: right only where silence is meant",
    ),
)
TRAINED = "rows trained on too"
# Of rules about a group beside others: the advice.
BESIDE = {
    "duplicates": "the same row again: it counts double, and may stand on both sides of a split",
    "contradictions": "another row says the opposite of the same answers: they cancel out, keep what is meant",
    TRAINED: "the training data has them: what is measured on them says little of new ones, leave them out",
}


@dataclass(frozen=True)
class Lengths:
    """Numbers of tokens in a data set: median, 95th percentile (by rank) and maximum; counts: a histogram of BINS equal
    bins from 0 to the maximum."""

    p50: int
    p95: int
    largest: int
    counts: tuple[int, ...]

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Lengths:
        """The lengths of one number of tokens or more."""
        ordered = sorted(numbers)
        width = max(1, -(-(ordered[-1] + 1) // BINS))
        bins = Counter(n // width for n in ordered)
        at = [ordered[round(q * (len(ordered) - 1))] for q in (0.5, 0.95)]
        return cls(at[0], at[1], ordered[-1], tuple(bins[i] for i in range(BINS)))


class Survey:
    """Counts of everything that is looked for in some groups. Groups are visited once and not kept: some 30 bytes are
    left of each.

    end_ids: tokens that end a turn. bos: the tokenizer's BOS, None = it has none. trained: where the groups are
    evaluated on, the survey of those that are trained on.
    """

    def __init__(
        self, groups: Iterable[Group], end_ids: frozenset[int], bos: int | None, trained: Survey | None = None
    ) -> None:
        self._counts, self._examples = Counter[str](), dict[str, list[str]]()
        self._seen: set[int] = set()
        self._sides: Counter[str] = Counter()  # of pairs: how many, the tokens of each side, where one is the longer
        self._lengths = {name: array("i") for name in ("prompt", "completion", "whole")}
        for group in groups:
            for rule in GROUP_RULES:
                if rule.holds(group, end_ids, bos):
                    self._count(rule.name, group)
            self._look_beside(group, trained)
            self._measure(group)

    def _look_beside(self, group: Group, trained: Survey | None) -> None:
        key, opposite = _key(group), _opposite(group)
        if key in self._seen:
            self._count("duplicates", group)
        if opposite in self._seen:
            self._count("contradictions", group)
        if trained is not None and key in trained._seen:
            self._count(TRAINED, group)
        self._seen.add(key)

    def _count(self, rule: str, group: Group) -> None:
        self._counts[rule] += 1
        if self._counts[rule] <= EXAMPLES:
            self._examples.setdefault(rule, []).append(group.where)

    def _measure(self, group: Group) -> None:
        sizes = [len(c) for c in group.completions]
        self._lengths["prompt"].append(len(group.prompt))
        self._lengths["completion"].extend(sizes)
        self._lengths["whole"].append(len(group.prompt) + max(sizes, default=0))
        if len(sizes) == 2:
            chosen, rejected = sizes
            self._sides.update(pairs=1, chosen=chosen, rejected=rejected)
            self._sides.update(longer=chosen > rejected, shorter=chosen < rejected)

    def findings(self) -> list[Finding]:
        """What was found, errors first, then warnings and notes."""
        rules = [(rule.severity, rule.name, rule.advice) for rule in GROUP_RULES]
        rules += [("warning", name, advice) for name, advice in BESIDE.items()]
        found = [
            Finding(severity, name, self._counts[name], tuple(self._examples[name]), advice)
            for severity, name, advice in rules
            if self._counts[name]
        ]
        order = ("error", "warning", "note")
        return sorted([*found, *self._one_sided()], key=lambda f: order.index(f.severity))

    def _one_sided(self) -> list[Finding]:
        """Whether length alone tells the chosen answer from the rejected one."""
        sides, num = self._sides, self._sides["pairs"]
        side = "longer" if sides["longer"] > sides["shorter"] else "shorter"
        if not num or sides[side] / num <= ONE_SIDED:
            return []
        advice = (
            f"chosen answers are {side} in {sides[side] / num:.0%} of pairs ({sides['chosen'] / num:.0f} against "
            f"{sides['rejected'] / num:.0f} tokens on average): a model can learn length instead of quality; simpo and "
            "ipo normalise it away"
        )
        return [Finding("warning", "pairs with a length bias", num, (), advice)]

    def lengths(self) -> dict[str, Lengths]:
        """Name -> lengths: "prompt", "completion" (left out where groups have none) and "whole", a prompt with its
        longest completion."""
        return {name: Lengths.of(numbers) for name, numbers in self._lengths.items() if numbers}


def as_json(findings: Sequence[Finding], measured: dict[str, Lengths]) -> dict[str, Any]:
    """{"findings": [...], "lengths": {...}}, with the names of the fields as keys."""
    return {
        "findings": [asdict(f) for f in findings],
        "lengths": {name: asdict(of) for name, of in measured.items()},
    }


def _key(group: Group) -> int:
    return hash((group.prompt, group.completions, group.label))


def _opposite(group: Group) -> int | None:
    """The key of a group that says the opposite, a pair turned round or the other label; None where there is none."""
    if group.label is not None:
        return hash((group.prompt, group.completions, not group.label))
    if len(group.completions) == 2 and group.completions[0] != group.completions[1]:
        return hash((group.prompt, group.completions[::-1], None))
    return None
