"""The one table of metric names: which curves stand in one chart, in which order, and what each is in plain words."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

EVAL = "eval/"


@dataclass(frozen=True)
class Chart:
    """A chart of one or several metrics in the same unit.

    names: the metrics, those that a run lacks are left out. section: the heading it stands under. about: one sentence
    for somebody who has not read the paper. bounds: of the vertical axis, where the metric has some. better: the
    direction that is meant to be good: "up", "down" or "", where it depends.
    """

    title: str
    names: tuple[str, ...]
    section: str
    about: str
    bounds: tuple[float, float] | None = None
    better: str = ""


MAIN, MORE, OPTIMISATION, SPEED = "Main curves", "More of the algorithm", "Optimisation", "Time and memory"
SECTIONS = (MAIN, MORE, OPTIMISATION, SPEED)
# Which of these an algorithm logs decides what stands first: one that samples has objective/*, one of pairs rewards/*.
CHARTS = (
    Chart("Reward", ("objective/scores", "objective/rlhf_reward"), MAIN,
          "mean score of sampled answers, and the score less the KL penalty", better="up"),
    Chart("KL to the reference", ("objective/kl", "policy/kl_avg"), MAIN,
          "how far sampled answers have moved away from the reference model, nats an answer"),
    Chart("Loss", ("loss",), MAIN, "what the optimizer lowers", better="down"),
    Chart("Reward accuracy", ("rewards/accuracies",), MAIN,
          "share of pairs whose chosen answer has the larger reward; 0.5 is a guess", (0.0, 1.0), "up"),
    Chart("Reward margin", ("rewards/margins",), MAIN, "reward of the chosen less that of the rejected", better="up"),
    Chart("Rewards", ("rewards/chosen", "rewards/rejected"), MAIN, "mean reward of chosen and of rejected answers"),
    Chart("Log-probability of answers", ("logps/chosen", "logps/rejected"), MAIN,
          "nats a whole answer; if chosen falls while margins rise, the model moves away from both"),
    Chart("KL estimate", ("kl",), MAIN, "the baseline of the loss, nats an answer"),
    Chart("Negative log-likelihood", ("nll_loss",), MORE, "nats a token of the answers learnt from", better="down"),
    Chart("Entropy", ("entropy", "policy/entropy_avg"), MORE, "nats a token; towards 0 answers become all alike"),
    Chart("Entropy of an answer", ("objective/entropy",), MORE, "minus the log-probability of sampled answers, nats"),
    Chart("KL penalty", ("objective/non_score_reward",), MORE, "what the KL takes from the reward of an answer"),
    Chart("Mean log-probability", ("logps/mean_chosen", "logps/mean_rejected"), MORE, "nats a token"),
    Chart("Log odds ratio", ("log_odds_ratio", "log_odds_chosen"), MORE, "the preference term"),
    Chart("Policy loss", ("loss/policy_avg",), MORE, "the clipped policy-gradient loss; its mean says little"),
    Chart("Critic's loss", ("loss/value_avg",), MORE, "squared error of predicted returns", better="down"),
    Chart("Clipped tokens", ("policy/clipfrac_avg", "val/clipfrac_avg"), MORE, "share with a cut update", (0.0, 1.0)),
    Chart("KL of an update", ("policy/approxkl_avg",), MORE,
          "how far the steps on a rollout move the policy, nats a token"),
    Chart("Probability ratio", ("val/ratio",), MORE, "new over old probability of sampled tokens; near 1"),
    Chart("Variance of the ratio", ("val/ratio_var",), MORE, "over the steps on one rollout; large: too many passes"),
    Chart("Length of answers", ("rollout/length",), MORE, "tokens of a sampled answer, its end token among them"),
    Chart("Answers that ended", ("val/num_eos_tokens",), MORE, "sampled answers with an end token, of a rollout"),
    Chart("Sampler against trainer", ("rollout/logp_gap",), MORE, "gap of their log-probabilities, nats a token"),
    Chart("Importance weights", ("rollout/is_weight", "rollout/is_capped"), MORE, "mean weight, share capped"),
    Chart("Groups kept", ("rollout/groups_kept",), MORE, "share of prompts whose answers differ in score", (0.0, 1.0)),
    Chart("Balancing loss", ("aux_loss",), MORE, "of the experts"),
    Chart("Skipped steps", ("bad_steps",), OPTIMISATION, "so far, as a loss or a gradient was not finite"),
    Chart("Gradient norm", ("grad_norm", "value/grad_norm"), OPTIMISATION, "before clipping"),
    Chart("Learning rate", ("lr", "value/lr"), OPTIMISATION, "of each step"),
    Chart("Tokens a second", ("tokens_per_s",), SPEED, "trained on, all ranks together", better="up"),
    Chart("Memory", ("memory/peak",), SPEED,
          "GiB, the most that a rank has held so far: on its GPU, or of the machine where it has none"),
    Chart("Seconds a step", tuple(f"time/{p}" for p in ("rollout", "score", "reference", "train", "wait")), SPEED,
          "where the time of an optimizer step goes"),
)  # fmt: skip
NOT_DRAWN = frozenset({"step", "epoch", "num_tokens", "episode"})
LABELS = {
    "objective/scores": "reward",
    "objective/rlhf_reward": "reward less KL",
    "objective/kl": "KL",
    "policy/kl_avg": "KL in the loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "rewards/chosen": "chosen",
    "rewards/rejected": "rejected",
    "logps/chosen": "chosen",
    "logps/rejected": "rejected",
    "logps/mean_chosen": "chosen",
    "logps/mean_rejected": "rejected",
    "policy/entropy_avg": "entropy",
    "nll_loss": "nll",
    "bad_steps": "skipped steps",
    "grad_norm": "gradient norm",
    "value/grad_norm": "critic",
    "lr": "learning rate",
    "value/lr": "critic",
    "policy/clipfrac_avg": "policy",
    "val/clipfrac_avg": "critic",
    "loss/value_avg": "critic's loss",
    "tokens_per_s": "tok/s",
    "memory/peak": "peak",
    "kl": "KL",
}


def label(name: str) -> str:
    """The word for a metric inside its chart or on a line; a name that the table lacks is its own."""
    return LABELS.get(name, name.removeprefix("time/"))


def charts_of(names: Collection[str]) -> Iterator[Chart]:
    """The charts of a run that logs `names`, main curves first; a metric that the table lacks has one to itself. A
    metric of evaluation, "eval/NAME", stands with NAME."""
    present = {name.removeprefix(EVAL) for name in names} - NOT_DRAWN
    placed: set[str] = set()
    for chart in CHARTS:
        if kept := tuple(name for name in chart.names if name in present):
            placed.update(kept)
            yield Chart(chart.title, kept, chart.section, chart.about, chart.bounds, chart.better)
    for name in sorted(present - placed):
        section = SPEED if name.startswith("time/") else MORE
        yield Chart(name, (name,), section, "")


LINE = ("objective/scores", "objective/kl", "loss", "rewards/accuracies", "rewards/margins", "kl", "log_odds_ratio")
MOST_ON_A_LINE = 5


def on_the_line(names: Collection[str]) -> list[str]:
    """The main numbers among `names`, for one line of a log: those of LINE in its order, MOST_ON_A_LINE at most; of an
    evaluation its own. A run that has none of them shows its first number."""
    for prefix in ("", EVAL):
        if found := [prefix + name for name in LINE if prefix + name in names]:
            return found[:MOST_ON_A_LINE]
    return sorted(set(names) - NOT_DRAWN)[:1]
