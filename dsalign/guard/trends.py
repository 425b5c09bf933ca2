"""Guards that speak: trends of the logged metrics that are known to end badly, each with the number, the paper that
explains it and what to try. A metric that a run does not log keeps its guards silent; no algorithm is named."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

ENOUGH = 12  # logged points before a trend is judged
MOST = 240  # points kept of a metric; of more, neighbours are averaged in pairs
SURE = 3.0  # standard errors by which a mean must have moved


class Trend:
    """The course of one metric over a run, in at most MOST points."""

    def __init__(self) -> None:
        self._points: list[float] = []
        self._width = 1  # logged values in a point
        self._open: list[float] = []
        self.recent: list[float] = []  # the last three values as they were logged

    def add(self, value: float) -> None:
        """Add a logged value; one that is not finite is left out, as other guards speak of it."""
        if not math.isfinite(value):
            return
        self.recent = [*self.recent[-2:], value]
        self._open.append(value)
        if len(self._open) < self._width:
            return
        self._points.append(sum(self._open) / len(self._open))
        self._open = []
        if len(self._points) >= MOST:
            pairs = zip(self._points[::2], self._points[1::2], strict=False)
            self._points = [(a + b) / 2 for a, b in pairs]
            self._width *= 2

    def __len__(self) -> int:
        return len(self._points)

    @property
    def before(self) -> float:
        """The mean of the first third."""
        return statistics.fmean(self._points[: len(self._points) // 3])

    @property
    def after(self) -> float:
        """The mean of the last third."""
        return statistics.fmean(self._points[-(len(self._points) // 3) :])

    @property
    def moved(self) -> float:
        """How many standard errors the mean of the last third is above that of the first; negative = below."""
        third = len(self._points) // 3
        first, last = self._points[:third], self._points[-third:]
        error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / third)
        change = self.after - self.before
        return change / error if error else math.copysign(math.inf, change) if change else 0.0


Trends = Mapping[str, Trend]


@dataclass(frozen=True)
class Guard:
    """A trend to watch for.

    name: of the trouble. needs: metrics without which it is silent. sees(trends) -> what was seen with its numbers, ""
    for nothing; every metric of `needs` then has ENOUGH points. paper: where it is explained. advice: what to try.
    """

    name: str
    needs: tuple[str, ...]
    sees: Callable[[Trends], str]
    paper: str
    advice: str


def _displacement(of: Trends) -> str:
    """Chosen answers lose at least a tenth of what the margin gains, so that the margin is paid for by both sides."""
    chosen, margin = of["rewards/chosen"], of["rewards/margins"]
    lost, won = chosen.before - chosen.after, margin.after - margin.before
    if chosen.moved > -SURE or margin.moved < SURE or lost < won / 10:
        return ""
    return (
        f"chosen answers become less likely (rewards/chosen {chosen.before:.3g} to {chosen.after:.3g}) while margins "
        f"rise ({margin.before:.3g} to {margin.after:.3g})"
    )


def _overoptimised(of: Trends) -> str:
    reward, kl = of["objective/scores"], of["objective/kl"]
    if reward.moved < SURE or kl.moved < SURE or kl.after < KL_FAR:
        return ""
    return (
        f"the reward rises ({reward.before:.3g} to {reward.after:.3g}) with the KL to the reference, to {kl.after:.3g} "
        "nats an answer: it may be the reward model's taste alone"
    )


def _longer(of: Trends) -> str:
    reward, length = of["objective/scores"], of["rollout/length"]
    if reward.moved < SURE or length.moved < SURE or length.after < LONGER * length.before:
        return ""
    return (
        f"the reward rises ({reward.before:.3g} to {reward.after:.3g}) with the length of answers ({length.before:.0f} "
        f"to {length.after:.0f} tokens): the reward may be paid for length"
    )


def _entropy(of: Trends) -> str:
    entropy = of["policy/entropy_avg"]
    if entropy.moved > -SURE or entropy.after > COLLAPSED * entropy.before:
        return ""
    return f"entropy of sampled tokens fell from {entropy.before:.3g} to {entropy.after:.3g} nats: answers are alike"


def _endless(of: Trends) -> str:
    ended = of["val/num_eos_tokens"]
    if ended.moved > -SURE or ended.after > ended.before / 2:
        return ""
    return f"answers with an end token fell from {ended.before:.3g} to {ended.after:.3g} a rollout: they no longer end"


def _silent(of: Trends) -> str:
    length = of["rollout/length"]
    if length.moved > -SURE or length.after > SHORT_ANSWER or length.after > length.before / 4:
        return ""
    return f"answers end at once: {length.after:.2g} tokens, {length.before:.0f} before"


def _explosion(of: Trends) -> str:
    recent = of["objective/kl"].recent
    if min(recent) < KL_EXPLODED:
        return ""
    return f"the KL to the reference is {recent[-1]:.3g} nats an answer"


def _guess(of: Trends) -> str:
    accuracy = of["rewards/accuracies"]
    if len(accuracy) < LONG or abs(accuracy.after - 0.5) > HALF or abs(accuracy.moved) > SURE:
        return ""
    if abs(accuracy.before - 0.5) > HALF:
        return ""
    return f"reward accuracy stays at {accuracy.after:.2f} over {len(accuracy)} logged points, which is a guess"


KL_FAR = 10.0  # nats an answer, beyond which a rising reward is suspect
KL_EXPLODED = 100.0  # nats an answer, three logged values in a row
LONGER = 1.5  # times the length at first
COLLAPSED = 0.1  # of the entropy at first
SHORT_ANSWER = 2.0  # tokens, the end token among them
LONG, HALF = 30, 0.05  # logged points before an accuracy is stuck, and how near 0.5
GUARDS = (
    Guard("likelihood displacement", ("rewards/chosen", "rewards/margins"), _displacement, "arXiv:2410.08847",
          "a larger --rpo_alpha, a lower --learning_rate, or leave out pairs whose answers are nearly alike"),
    Guard("reward over-optimisation", ("objective/scores", "objective/kl"), _overoptimised, "arXiv:2210.10760",
          "read samples.jsonl, raise --kl_coef or --beta, or take an earlier checkpoint"),
    Guard("reward by length", ("objective/scores", "rollout/length"), _longer, "arXiv:2310.03716",
          "read samples.jsonl, lower --max_new_tokens, or subtract length in a reward function"),
    Guard("entropy collapse", ("policy/entropy_avg", "objective/scores"), _entropy, "arXiv:2505.22617",
          "a lower --learning_rate, a larger --kl_coef or --beta, or a higher upper clip where there is one"),
    Guard("answers without end", ("val/num_eos_tokens",), _endless, "arXiv:2403.17031",
          "--missing_eos_penalty 1, a larger --max_new_tokens, or a start from a model that ends its turns"),
    Guard("empty answers", ("rollout/length",), _silent, "arXiv:2403.17031",
          "a reward that does not pay for silence, or a larger --kl_coef or --beta"),
    Guard("KL explosion", ("objective/kl",), _explosion, "arXiv:2307.04964",
          "a lower --learning_rate, a larger --kl_coef or --beta, and an earlier checkpoint"),
    Guard("accuracy of a guess", ("rewards/accuracies",), _guess, "arXiv:2405.19534",
          "dsalign data check for pairs that are alike or swapped, a larger --learning_rate, or a smaller --beta"),
)  # fmt: skip


class Watch:
    """The guards of one run. They see means over all ranks, so every rank comes to the same judgement."""

    def __init__(self) -> None:
        self._trends: dict[str, Trend] = {}
        self._left = list(GUARDS)

    def recall(self, logged: Iterable[Mapping[str, Any]], step: int, *, spoken: bool) -> None:
        """Add what the run logged before it was resumed at optimizer step `step`, so that its trends go on.

        logged: lines of metrics.jsonl; those behind `step` are taken anew and left out. spoken: whether guards that
        these steps trip have had their say, and are silent from here on; if not, the next step may trip them again.
        """
        before = list(self._left)
        for numbers in logged:
            if numbers.get("step", step + 1) <= step:
                self.add({name: x for name, x in numbers.items() if isinstance(x, (int, float))})
        if not spoken:
            self._left = before

    def add(self, numbers: Mapping[str, float]) -> list[str]:
        """Add a logged step; returns the warnings that it gives rise to, each guard's once a run."""
        for name in {name for guard in self._left for name in guard.needs}.intersection(numbers):
            self._trends.setdefault(name, Trend()).add(numbers[name])
        said = []
        for guard in list(self._left):
            if any(len(self._trends.get(name, ())) < ENOUGH for name in guard.needs):
                continue
            if seen := guard.sees(self._trends):
                self._left.remove(guard)
                said.append(f"guard: {guard.name}: {seen} ({guard.paper}); try {guard.advice}")
        return said
