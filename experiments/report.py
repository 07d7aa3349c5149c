"""make report: RESULTS.md and its figures from experiments/results.jsonl alone; every verdict in it is computed.

Differences are paired by seed; intervals and verdicts follow PLAN.md. Whatever runs are missing are named.
"""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

import configurator
from configurator import UserError
from dro import chi_square_ratio
from experiments.arms import ARMS, HEADLINE, STUDIES
from experiments.run import read_results
from experiments.views import CORRUPTIONS

RESAMPLES = 10_000
RHO = 0.1  # radius of the chi-square ball of the worst mix
PAPER = """The paper's own figures, at its scale and not re-run here: perplexity -5.59 % and downstream +1.52 % on
average against Sheared LLaMA re-run, a 55.4 % win rate after instruction tuning, multilingual downstream +2.95 %."""

PAPER_UPDATES, PAPER_HOURS = 64, 0.6  # of its pruning stage; hours of `train.py config/prune.py --plan`
INTRODUCTION = """Made by `make report` from results.jsonl; PLAN.md says what was asked and how a verdict is found.
Differences are arm minus arm, paired by seed: below zero is better. The plan's bootstrap covers less than its 95 %
where seeds are few (of normal values about 80 % with 3 seeds, 88 % with 5, 90 % with 8): a verdict that the interval of
Student's t does not share says so, (not by t)."""
SHIFTS = "Loss after continuing, nats a token. Corrupted text has tokens of its own: compare arms on it, not texts."
EXPLORATORY = """All but the headline's differences are exploratory: of three seeds an interval is about the range, and
of dozens of comparisons some are off zero by chance. Compare arms on the same seeds."""
QUESTIONED = "Loss after continuing, nats a token. Exploratory, as said above."
COSTS = """Of the runs whose commit is that of constant's of the same seed: others were timed on another day. Ratios are
of pairs; seconds are means over each arm's own seeds."""
REFERENCE = """Loss that the law predicts for the end of the stage minus the loss reached there, nats a token, mean over
the histories of constant and paper, seeds 1 to 3."""

REFERENCES = {True: "published clip", False: "no clip"}
TIMES = ("step_s", "eval_s", "mix_s")  # of a stage: training, evaluation, mix with fits
PRUNING, ALL_STAGES = slice(1), slice(None)

Metric = Callable[[dict], float]  # of a run's record


@dataclass(frozen=True)
class Difference:
    """Of two arms, paired by seed: mean and 95 % interval."""

    values: list[float]
    low: float
    high: float

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def verdict(self) -> str:
        if not self.values:
            return "missing"
        if len(self.values) < 2:
            return "one seed"
        return "better" if self.high < 0 else "worse" if self.low > 0 else "no difference seen"

    @property
    def verdict_and_t(self) -> str:
        """The plan's verdict, and whether the 95 % interval of Student's t holds zero all the same."""
        if self.verdict not in ("better", "worse"):
            return self.verdict
        half = stats.t.ppf(0.975, len(self.values) - 1) * stats.sem(self.values)
        return self.verdict + " (not by t)" * bool(abs(self.mean) <= half)

    def __str__(self) -> str:
        if not self.values:
            return "-"
        if len(self.values) < 2:
            return f"{self.mean:+.4f}"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"

    @property
    def in_perplexity(self) -> str:
        """Of a difference of losses in nats: the ratio of perplexities, as a change."""
        if not self.values:
            return "-"
        mean, low, high = (f"{100 * math.expm1(nats):+.2f}" for nats in (self.mean, self.low, self.high))
        return f"{mean} %" if len(self.values) < 2 else f"{mean} % [{low}, {high}]"


def bootstrap(values: list[float], resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % interval of the mean: percentile bootstrap, widened by sqrt(n / (n - 1)) (Hesterberg 2015)."""
    n, mean = len(values), np.mean(values)
    if n < 2:
        return math.nan, math.nan
    draws = np.random.default_rng(0).integers(n, size=(resamples, n))
    means = mean + (np.asarray(values)[draws].mean(axis=1) - mean) * math.sqrt(n / (n - 1))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


class Results:
    """The records of one source, and what is asked of them."""

    def __init__(self, records: dict[str, dict], source: str) -> None:
        self.source = records.get(f"{source}/source")
        self.runs = {(r["arm"], r["seed"]): r for r in records.values() if r["source"] == source and "arm" in r}

    def seeds(self, arm: str) -> list[int]:
        return sorted(seed for name, seed in self.runs if name == arm)

    def arms(self) -> list[str]:
        return [arm for arm in ARMS if self.seeds(arm)]

    def on(self, seeds: list[int]) -> "Results":
        few = copy.copy(self)
        few.runs = {(arm, seed): r for (arm, seed), r in self.runs.items() if seed in seeds}
        return few

    def timed(self) -> "Results":
        """The runs whose commit is that of constant's of the same seed: others were timed on another day."""
        few = copy.copy(self)
        commits = {seed: r["commit"] for (arm, seed), r in self.runs.items() if arm == "constant"}
        few.runs = {(arm, s): r for (arm, s), r in self.runs.items() if r["commit"] == commits.get(s)}
        return few

    def rows(self) -> list[tuple[str, str, "Results"]]:
        """Label, arm and results of every arm with all its seeds, and again with those that all arms have."""
        common = [s for s in sorted({s for _, s in self.runs}) if all(s in self.seeds(arm) for arm in self.arms())]
        rows = []
        for arm in self.arms():
            rows.append((arm, arm, self))
            if common and self.seeds(arm) != common:
                rows.append((f"{arm}, seeds {', '.join(map(str, common))}", arm, self.on(common)))
        return rows

    def mean(self, arm: str, metric: Metric) -> float:
        values = [metric(self.runs[arm, seed]) for seed in self.seeds(arm)]
        return float(np.mean(values)) if values else math.nan

    def difference(self, arm: str, base: str, metric: Metric) -> Difference:
        """arm - base over the seeds that both have."""
        both = [s for s in self.seeds(arm) if s in self.seeds(base)]
        values = [metric(self.runs[arm, s]) - metric(self.runs[base, s]) for s in both]
        return Difference(values, *(bootstrap(values) if values else (math.nan, math.nan)))


# ---- metrics


def loss_of(when: str = "final", text: str = "heldout", over: Callable = np.mean) -> Metric:
    return lambda record: float(over(record["loss"][when][text])) if when in record["loss"] else math.nan


def bits_of(bytes_per_token: list[float], over: Callable, when: str = "final") -> Metric:
    scale_M = 1 / math.log(2) / np.array(bytes_per_token)
    return loss_of(when, over=lambda loss_M: over(np.array(loss_M) * scale_M))


def weighted(ratio_M: list[float]) -> Callable:
    return lambda loss_M: float(np.dot(ratio_M, loss_M))


def worst_mix(p0_M: list[float]) -> Callable:
    """Loss under the worst mix of the ball around p0: max q . loss with chi-square divergence <= RHO."""

    def worst(loss_M: list[float]) -> float:
        loss_M = np.array(loss_M)
        return float(chi_square_ratio(loss_M, 0 * loss_M, p0_M, RHO, floor=0.0, clamp_to_min=False) @ loss_M)

    return worst


# ---- text


def table(head: list[str], rows: list[list]) -> str:
    def text(x) -> str:
        return "-" if isinstance(x, float) and math.isnan(x) else f"{x:.4f}" if isinstance(x, float) else str(x)

    lines = [head, ["---"] * len(head), *([text(x) for x in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def conclusion(results: Results, name: str) -> str:
    verdicts = [
        [results.difference("paper", base, loss_of(over=over)).verdict for base in ("sheared", "constant")]
        for over in (np.mean, np.max)
    ]
    return f"**Source {name}: {claim(*verdicts)}.**"


def headline_table(all_results: dict[str, Results]) -> str:
    """Paper against its two bases, and two controls: the bases against each other; and uniform, a constant mix that
    the metric, which weighs domains equally, favours as well."""
    pairs = [
        ("paper", "sheared", ""),
        ("paper", "constant", ""),
        ("sheared", "constant", " (control)"),
        ("paper", "uniform", " (control)"),
    ]
    rows = []
    for name, results in all_results.items():
        for arm, base, control in pairs:
            mean, worst = (results.difference(arm, base, loss_of(over=over)) for over in (np.mean, np.max))
            if mean.values or not control:
                rows.append(
                    [
                        f"{name}: {arm} - {base}{control}",
                        len(mean.values),
                        str(mean),
                        mean.in_perplexity,
                        mean.verdict_and_t,
                        str(worst),
                        worst.verdict_and_t,
                    ]
                )
    head = [
        "source: difference after continuing",
        "seeds",
        "mean of domains, nats a token [95 %]",
        "perplexity [95 %]",
        "verdict",
        "worst domain, nats a token [95 %]",
        "verdict",
    ]
    return table(head, rows)


def measures_table(results: Results, when: str) -> str:
    """Paper against its two bases in loss, perplexity and bits per byte; the verdict is the loss's."""
    rows = []
    for base in ("sheared", "constant"):
        for what, over in (("mean of domains", np.mean), ("worst domain", np.max)):
            loss = results.difference("paper", base, loss_of(when, over=over))
            bits = results.difference("paper", base, bits_of(results.source["bytes_per_token"], over, when))
            rows.append(
                [
                    f"paper - {base}",
                    what,
                    str(loss),
                    loss.in_perplexity,
                    str(bits),
                    len(loss.values),
                    loss.verdict_and_t,
                ]
            )
    head = [
        "difference",
        "over",
        "loss, nats a token [95 %]",
        "perplexity [95 %]",
        "bits per byte [95 %]",
        "seeds",
        "verdict on loss",
    ]
    return table(head, rows)


def claim(on_mean: list[str], on_worst: list[str]) -> str:
    """PLAN.md's rule."""
    if {"missing", "one seed"} & set(on_mean):
        return "too few seeds, nothing can be concluded"
    if set(on_mean) == {"better"} and "worse" not in on_worst:
        return "the paper's claim holds at this scale"
    if "worse" in on_mean:
        return "the paper's claim fails at this scale"
    return "the paper's claim as a whole is neither confirmed nor refuted at this scale"


def worst_domains(results: Results, arm: str, scale_M: list[float]) -> str:
    """Whose loss times its scale is the largest of all after continuing, in one seed or another."""
    of_seeds = (results.runs[arm, seed]["loss"]["final"]["heldout"] for seed in results.seeds(arm))
    worst = {int(np.argmax(np.multiply(loss_M, scale_M))) for loss_M in of_seeds}
    return " or ".join(results.source["domains"][m] for m in sorted(worst))


def arms_table(results: Results) -> str:
    density_M = results.source["bytes_per_token"]
    rows = []
    for label, arm, r in results.rows():
        mean, worst = (r.mean(arm, loss_of(over=over)) for over in (np.mean, np.max))
        bits = [f"{r.mean(arm, bits_of(density_M, over)):.4f}" for over in (np.mean, np.max)]
        pruned = (r.mean(arm, loss_of("pruned", over=over)) for over in (np.mean, np.max))
        rows.append(
            [
                label,
                len(r.seeds(arm)),
                *(pruned if ARMS[arm].start == "masks" else ("-", "-")),
                mean,
                f"{worst:.4f} {worst_domains(r, arm, [1.0] * len(density_M))}",
                f"{math.exp(mean):.2f} / {math.exp(worst):.2f}",
                f"{' / '.join(bits)} {worst_domains(r, arm, 1 / np.array(density_M))}",
                largest_share(r, arm),
                largest_miss(r, arm),
            ]
        )
    head = [
        "arm",
        "seeds",
        "pruned: mean",
        "worst",
        "continued: mean",
        "worst",
        "perplexity, mean / worst",
        "bits per byte, mean / worst",
        "largest share of a domain",
        "largest miss of a target",
    ]
    source = results.source["loss"]["final"]["heldout"]
    tokens = sorted({int(sum(stage["tokens"] for stage in r["stages"])) for r in results.runs.values()})
    return (
        f"Loss in nats a token; the source has mean {np.mean(source):.4f}, worst {np.max(source):.4f}. "
        f"Training tokens of an arm: {', '.join(f'{n:,}' for n in tokens)}.\n\n{table(head, rows)}"
    )


def largest_miss(results: Results, arm: str) -> str:
    """Of all masks and seeds at the end of pruning: |expected - target sparsity|."""
    gaps = [
        (results.runs[arm, seed]["stages"][0]["sparsity_gap"], seed)
        for seed in results.seeds(arm)
        if "sparsity_gap" in results.runs[arm, seed]["stages"][0]
    ]
    return "{:.3f} (seed {})".format(*max(gaps)) if gaps else "-"


def largest_share(results: Results, arm: str) -> str:
    """Of all domains, stages and seeds."""
    share, domain, stage, seed = max(
        (share, domain, stage["stage"], seed)
        for seed in results.seeds(arm)
        for stage in results.runs[arm, seed]["stages"]
        for domain, share in zip(stage["domains"], stage["largest_share_M"], strict=True)
    )
    return f"{100 * share:.0f} % {domain} (seed {seed}, {stage})"


def differences_table(results: Results) -> str:
    """Every arm minus constant, after pruning and after continuing."""
    rows = []
    for label, arm, r in (row for row in results.rows() if row[1] != "constant"):
        measured = [
            r.difference(arm, "constant", loss_of(when, over=over))
            for when in ("pruned", "final")
            for over in (np.mean, np.max)
        ]
        pruned = map(str, measured[:2]) if ARMS[arm].start == "masks" else ("-", "-")
        after = (x for d in measured[2:] for x in (str(d), d.verdict_and_t))
        rows.append([label, len(measured[2].values), *pruned, *after])
    head = [
        "arm - constant",
        "seeds",
        "pruned: mean [95 %]",
        "worst",
        "continued: mean [95 %]",
        "verdict",
        "worst",
        "verdict",
    ]
    return table(head, rows)


def shifts(results: Results) -> dict[str, Metric]:
    domains, p0 = results.source["domains"], results.source["p0"]
    mixes = {f"{domain} alone": loss_of(over=lambda loss_M, m=m: loss_M[m]) for m, domain in enumerate(domains)}
    mixes |= {
        "uniform": loss_of(),
        "training mix": loss_of(over=weighted(p0)),
        f"worst mix within {RHO} of it": loss_of(over=worst_mix(p0)),
    }
    return mixes | {f"{name} text, mean of domains": loss_of(text=name) for name in CORRUPTIONS}


def shift_table(results: Results) -> str:
    rows = []
    for name, metric in shifts(results).items():
        against = [results.difference("paper", base, metric) for base in ("sheared", "constant")]
        rows.append(
            [
                name,
                *(results.mean(arm, metric) for arm in HEADLINE),
                *(x for d in against for x in (str(d), d.verdict_and_t)),
            ]
        )
    return table(["evaluated on", *HEADLINE, "paper - sheared", "verdict", "paper - constant", "verdict"], rows)


def shifts_of_arms(results: Results) -> str:
    metrics = shifts(results)
    rows = [[label, *(r.mean(arm, m) for m in metrics.values())] for label, arm, r in results.rows()]
    return table(["arm", *metrics], rows)


def reference_errors(results: Results, stage: str, clip: bool) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the stage seen (n,), and predicted - reached loss in nats (n, histories, domains); nan: no law yet."""
    laws = [r["law"][stage][str(clip)] for r in results.runs.values() if "law" in r and stage in r["law"]]
    laws = [law for law in laws if law["predicted"]]
    if not laws:
        return np.empty(0), np.empty((0, 0, 0))
    shares = np.array([share for share, _ in max((law["predicted"] for law in laws), key=len)])
    errors = []
    for law in laws:
        at = dict((round(share, 6), loss_M) for share, loss_M in law["predicted"])
        rows = [at.get(round(share, 6), [math.nan] * len(law["reached"])) for share in shares]
        errors.append(np.array(rows) - np.array(law["reached"]))
    return shares, np.stack(errors, axis=1)


def reference_table(results: Results) -> str:
    rows = []
    for stage in ("prune", "continue"):
        for clip, name in REFERENCES.items():
            shares, errors = reference_errors(results, stage, clip)
            for seen in (0.25, 0.5, 0.75, 1.0) if len(shares) else ():
                error = errors[np.abs(shares - seen).argmin()]  # (histories, domains)
                rows.append(
                    [
                        f"{stage}, first fit at {100 * shares[0]:.0f} %",
                        name,
                        f"{100 * seen:.0f} %",
                        float(np.nanmean(np.abs(error))),
                        *(f"{x:+.4f}" for x in np.nanmean(error, axis=0)),
                    ]
                )
    head = ["stage", "reference", "seen", "mean size of the error", *results.source["domains"]]
    return table(head, rows) if rows else "No histories yet."


def seconds(*keys: str, stages: slice, per: str = "") -> Metric:
    """What these take in some stages, in total or for each of something."""

    def total(record: dict) -> float:
        return sum(stage[key] for key in keys for stage in record["stages"][stages]) / (
            sum(stage[per] for stage in record["stages"][stages]) if per else 1
        )

    return total


def memory(stages: slice) -> Metric:
    """Peak of the process in MiB; nan for a stage that was resumed, since the process did not do all of it."""
    return lambda r: math.nan if any(r["resumed"][stages]) else max(r["peak_bytes"][stages]) / 2**20


def ratio_to_constant(results: Results, arm: str, metric: Metric) -> str:
    both = [s for s in results.seeds(arm) if s in results.seeds("constant")]
    ratios = [metric(results.runs[arm, s]) / metric(results.runs["constant", s]) for s in both]
    ratios = [r for r in ratios if not math.isnan(r)]
    return f"{np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})" if ratios else "-"


def cost_table(results: Results, stages: slice) -> str:
    """Of these stages, arm by arm; only arms that start with masks have PRUNING and continued training apart."""
    results, rows = results.timed(), []
    for arm in (a for a in results.arms() if stages == ALL_STAGES or ARMS[a].start == "masks"):
        total, training = seconds(*TIMES, stages=stages), seconds("step_s", stages=stages, per="tokens")
        took = results.mean(arm, total)
        peaks = [memory(stages)(results.runs[arm, seed]) for seed in results.seeds(arm)]
        rows.append(
            [
                arm,
                len(results.seeds(arm)),
                f"{took:.0f}",
                ratio_to_constant(results, arm, total),
                f"{1e6 * results.mean(arm, training):.0f}",
                ratio_to_constant(results, arm, training),
                f"{100 * results.mean(arm, seconds('eval_s', stages=stages)) / took:.1f} %",
                f"{1e3 * results.mean(arm, seconds('mix_s', stages=stages, per='updates')):.1f}",
                f"{100 * results.mean(arm, seconds('mix_s', stages=stages)) / took:.2f} %",
                "-" if np.isnan(peaks).all() else f"{np.nanmean(peaks):.0f}",
                ratio_to_constant(results, arm, memory(stages)),
            ]
        )
    head = [
        "arm",
        "seeds",
        "seconds",
        "of constant's, median (range)",
        "us a training token",
        "of constant's",
        "evaluation, share",
        "mix and fits, ms each",
        "share",
        "peak memory, MiB",
        "of constant's",
    ]
    return table(head, rows)


def cost_sentence(results: Results) -> str:
    """Is the mix under 1 % here, and would it be at the paper's size, where an update costs the same?"""
    if not results.seeds("paper"):
        return ""
    mix, total = seconds("mix_s", stages=PRUNING), seconds(*TIMES, stages=PRUNING)
    share = results.mean("paper", mix) / results.mean("paper", total)
    update_s = results.mean("paper", seconds("mix_s", stages=PRUNING, per="updates"))
    there = PAPER_UPDATES * update_s / (3600 * PAPER_HOURS)
    over_or_under = "under" if share < 0.01 else "over"
    return (
        f"Mix and fits take {100 * share:.2f} % of paper's pruning time here, {over_or_under} 1 %. "
        f"An update costs the same at any model's size: the published {PAPER_UPDATES} would take "
        f"{100 * there:.2f} % of the {PAPER_HOURS} h that `--plan` gives its pruning stage on 8 H100."
    )


QUESTIONS = {  # arms and what each is compared with, in loss after continuing
    "Smaller targets": [
        ("constant_8th", "random"),
        ("paper_8th", "random"),
        ("constant_16th", "random"),
        ("paper_16th", "random"),
        ("paper_8th", "constant_8th"),
        ("paper_16th", "constant_16th"),
    ],
    "The mix when pretraining from scratch": [("random_paper", "random")],
    "Domains merged or split": [
        ("paper_merged", "paper"),
        ("paper_split", "paper"),
        ("paper_merged", "constant"),
        ("paper_split", "constant"),
    ],
    "The mix updated more and less often": [("paper_often", "paper"), ("paper_seldom", "paper")],
    "Parts of the method": [
        ("dro_fixed", "constant"),
        ("dro_dynamic", "dro_fixed"),
        ("paper", "dro_dynamic"),
        ("paper_train_loss", "paper"),
        ("paper_noclip", "paper"),
    ],
    "Other updates": [
        ("bandit", "sheared"),
        ("bandit", "paper"),
        ("sheared_law", "sheared"),
        ("sheared_law", "constant"),
        ("paper", "sheared_law"),
    ],
    "Robust, or merely flatter": [("paper", "uniform"), ("uniform", "constant")],
    "Pruning itself": [
        ("constant", "random"),
        ("constant", "oneshot"),
        ("constant", "oneshot_384"),
        ("oneshot", "oneshot_384"),
        ("constant", "masks_only"),
    ],
    "The Lagrangian damped": [
        ("constant_damped", "constant"),
        ("paper_damped", "paper"),
        ("paper_damped", "constant_damped"),
        ("constant_damped", "oneshot"),
    ],
}


def questions(results: Results) -> str:
    parts = []
    for question, pairs in QUESTIONS.items():
        rows = []
        for arm, base in pairs:
            mean, worst = (results.difference(arm, base, loss_of(over=over)) for over in (np.mean, np.max))
            rows.append(
                [f"{arm} - {base}", len(mean.values), str(mean), mean.verdict_and_t, str(worst), worst.verdict_and_t]
            )
        head = ["difference", "seeds", "mean of domains [95 %]", "verdict", "worst domain [95 %]", "verdict"]
        parts.append(f"### {question}\n\n{table(head, rows)}")
        if question == "Smaller targets" and results.seeds("random"):
            level = results.mean("random", loss_of())
            targets = ("constant", "paper", *(arm for arm, base in pairs if base == "random"))
            fallen = [arm for arm in targets if results.seeds(arm) and results.mean(arm, loss_of()) >= level]
            parts.append(f"Collapsed, by the plan's rule: {', '.join(fallen) or 'none'}.")
    return "\n\n".join(parts)


# ---- figures


def save(figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_arms(results: Results, path: Path) -> None:
    """Each mix minus constant, pruned in the same way to the same target: seeds, mean and interval."""
    of_a_mix = [a for a, arm in ARMS.items() if (arm.start, arm.target, arm.damping) == ("masks", "4th", 1.0)]
    rows = [row for row in results.rows() if row[1] in of_a_mix[1:]][::-1]
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.9 + 0.28 * len(rows)), sharey=True, layout="constrained")
    for axis, (what, over) in zip(axes, (("mean of domains", np.mean), ("worst domain", np.max)), strict=True):
        for y, (_, arm, r) in enumerate(rows):
            d = r.difference(arm, "constant", loss_of(over=over))
            colour = {"better": "C2", "worse": "C3"}.get(d.verdict, "0.4")
            axis.plot(d.values, [y] * len(d.values), ".", color=colour, alpha=0.4, ms=6)
            axis.errorbar(d.mean, y, xerr=[[d.mean - d.low], [d.high - d.mean]], fmt="o", color=colour, capsize=3, ms=4)
        axis.axvline(0, color="k", lw=0.8)
        axis.set_title(what, fontsize=10)
        axis.set_xlabel("nats per token, arm minus constant (left: better)")
        axis.grid(alpha=0.3)
    labels = [label if "," in label else f"{label} ({len(r.seeds(arm))})" for label, arm, r in rows]
    axes[0].set_yticks(range(len(rows)), labels, fontsize=9)
    figure.suptitle(
        "Loss after continuing: seeds (dots, their number in brackets), mean, 95 % interval; "
        "green: better, red: worse, grey: no difference seen",
        fontsize=10,
    )
    save(figure, path)


def plot_reference(results: Results, path: Path) -> None:
    """Predicted minus reached loss by domain: median and range over the histories."""
    domains = results.source["domains"]
    figure, axes = plt.subplots(2, len(domains), figsize=(12, 5), sharex=True, sharey="row", layout="constrained")
    for row, stage in zip(axes, ("prune", "continue"), strict=True):
        for clip, name in REFERENCES.items():
            shares, errors = reference_errors(results, stage, clip)
            for m, axis in enumerate(row if len(shares) else ()):
                low, middle, high = np.nanquantile(errors[:, :, m], (0, 0.5, 1), axis=1)
                (line,) = axis.plot(100 * shares, middle, label=f"{name}: median and range")
                axis.fill_between(100 * shares, low, high, color=line.get_color(), alpha=0.2, lw=0)
        for axis in row:
            axis.axhline(0, color="k", lw=0.8)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(f"{stage}: nats per token")
    for axis, domain in zip(axes[0], domains, strict=True):
        axis.set_title(domain, fontsize=10)
    for axis in axes[1]:
        axis.set_xlabel("% of the stage seen")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle("Loss predicted for the end of the stage, minus the loss reached there", fontsize=11)
    save(figure, path)


def plot_targets(results: Results, path: Path) -> None:
    """On the seeds that all of these arms have."""
    of_sizes = [f"{name}{size}" for name in ("constant", "paper") for size in ("", "_8th", "_16th")]
    arms = [a for a in results.arms() if a in of_sizes]
    results = results.on([s for s in results.seeds("constant") if all(s in results.seeds(a) for a in arms)])
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, style in (("constant", "o-"), ("paper", "s--")):
        sizes = [
            (arm, share)
            for arm, share in ((name, 1 / 4), (f"{name}_8th", 1 / 8), (f"{name}_16th", 1 / 16))
            if results.seeds(arm)
        ]
        for over, colour in ((np.mean, "C0"), (np.max, "C1")):
            what = "mean of domains" if over is np.mean else "worst domain"
            losses = [results.mean(arm, loss_of(over=over)) for arm, _ in sizes]
            axis.plot([share for _, share in sizes], losses, style, color=colour, label=f"{name}, {what}")
    for over, colour in ((np.mean, "C0"), (np.max, "C1")):
        if results.seeds("random"):
            what = "mean" if over is np.mean else "worst"
            level = results.mean("random", loss_of(over=over))
            axis.axhline(level, color=colour, ls=":", label=f"quarter, from random weights, {what}")
    axis.set_xscale("log", base=2)
    axis.set_xticks([1 / 16, 1 / 8, 1 / 4], ["1/16", "1/8", "1/4"])
    axis.set_xlabel("target's share of the source's parameters that are not embeddings")
    axis.set_ylabel("loss after continuing (nats per token)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    save(figure, path)


def plot_mix(results: Results, path: Path) -> None:
    domains = results.source["domains"]
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), sharex=True, sharey=True, layout="constrained")
    for axis, (m, domain) in zip(axes.flat, enumerate(domains), strict=False):
        for arm in (a for a in (*HEADLINE, "dro_fixed", "bandit") if results.seeds(a)):
            courses = [results.runs[arm, seed]["stages"] for seed in results.seeds(arm)]
            x, before = [], 0
            for stage in courses[0]:
                x += [before + step for step, _ in stage["ratio"]]
                before += stage["steps"]
            y = np.mean([[ratio[m] for stage in stages for _, ratio in stage["ratio"]] for stages in courses], axis=0)
            axis.plot(x, 100 * y, label=arm)
        axis.axvline(courses[0][0]["steps"], color="0.6", lw=0.8, ls=":")
        axis.set_title(domain, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step (dotted: pruning ends)")
    figure.supylabel("share of the training tokens (%)", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    figure.suptitle("The mix at 16 moments of each stage, mean over seeds", fontsize=11)
    save(figure, path)


# ---- the page


def missing(records: dict[str, dict]) -> str:
    lines = []
    for study in STUDIES.values():
        for source, arms in study.items():
            results = Results(records, source)
            gone = [f"{arm} {n - len(results.seeds(arm))}" for arm, n in arms.items() if len(results.seeds(arm)) < n]
            lines += [f"- source {source}: seeds missing of {', '.join(gone)}"] if gone else []
    return "\n".join(lines) or "Nothing."


def provenance(records: dict[str, dict]) -> str:
    hashes = {f"{r['source']}: {r['hashes']['source'][:12]}" for r in records.values()}
    hours = sum(seconds(*TIMES, stages=ALL_STAGES)(r) for r in records.values()) / 3600
    threads = {str(stage["threads"]) for r in records.values() for stage in r["stages"]}
    versions = {" ".join(f"{name} {v}" for name, v in r["versions"].items()) for r in records.values()}
    sources = sum("arm" not in r for r in records.values())
    return (
        f"{len(records) - sources} runs and {sources} sources, {hours:.1f} hours of training with its evaluations, "
        f"at {', '.join(sorted(threads))} thread(s) a run; "
        f"commits {', '.join(sorted({r['commit'] for r in records.values()}))}; {', '.join(sorted(versions))}; "
        f"source weights {', '.join(sorted(hashes))}."
    )


def page(records: dict[str, dict], figures: Path) -> str:
    """RESULTS.md; draws the figures on the way."""
    figures.mkdir(parents=True, exist_ok=True)
    parts = ["# Results", INTRODUCTION, "## Headline"]
    sources = [s for s in ("A", "B", "smollm2") if Results(records, s).source and Results(records, s).runs]
    parts += [conclusion(Results(records, s), s) for s in sources]
    parts += [headline_table({s: Results(records, s) for s in sources}), PAPER]
    for s in sources:
        results = Results(records, s)
        parts += [f"## Source {s}: the headline in every measure"]
        parts += ["After continuing:", measures_table(results, "final")]
        parts += ["After pruning, before continuing:", measures_table(results, "pruned")]
        parts += [f"## Source {s}: all arms", arms_table(results), EXPLORATORY, differences_table(results)]
        if s == "A" and results.seeds("constant"):
            for draw in (plot_arms, plot_mix, plot_targets, plot_reference):
                draw(results, figures / f"{draw.__name__.removeprefix('plot_')}.png")
            parts += [f"![Every arm against constant]({figures.name}/arms.png)", f"![The mix]({figures.name}/mix.png)"]
        parts += [f"## Source {s}: shifts", SHIFTS, shift_table(results), shifts_of_arms(results)]
        parts += [f"## Source {s}: reference losses", REFERENCE, reference_table(results)]
        parts += [f"![Error of the reference losses]({figures.name}/reference.png)"] if s == "A" else []
        parts += [
            f"## Source {s}: costs",
            COSTS,
            "Pruning, the first stage:",
            cost_table(results, PRUNING),
            cost_sentence(results),
            "All stages:",
            cost_table(results, ALL_STAGES),
        ]
        if s == "A":
            parts += ["## Open questions", QUESTIONED, questions(results), f"![Sizes]({figures.name}/targets.png)"]
    parts += ["## Missing", missing(records), "## Made with", provenance(records)]
    return "\n\n".join(part for part in parts if part) + "\n"


@dataclass(frozen=True)
class Options:
    results: str = "experiments/results.jsonl"  # RESULTS.md and figures/ go into its folder


def main(opt: Options) -> None:
    records = read_results(opt.results)
    if not records:
        raise UserError(f"{opt.results}: no results yet: make evidence makes them")
    out = Path(opt.results).parent
    (out / "RESULTS.md").write_text(page(records, out / "figures"))
    print(out / "RESULTS.md")


if __name__ == "__main__":
    try:
        main(configurator.load(Options, sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
