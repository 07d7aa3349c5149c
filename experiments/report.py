"""make report: RESULTS.md and its figures from results.jsonl alone. Every verdict is computed.

Differences are paired by seed; intervals and verdicts follow PLAN.md. Runs that are missing are named.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
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
PAPER_UPDATES, PAPER_HOURS = 64, 0.6  # of its pruning stage; hours of `train.py config/prune.py --plan`
OVER = {"mean of domains": np.mean, "worst domain": np.max}
REFERENCES = {"True": "published clip", "False": "no clip"}  # clip_reference: its name
TIMES = ("step_s", "eval_s", "mix_s")  # what a stage takes: training, evaluation, mix with fits
PRUNING, ALL_STAGES = slice(1), slice(None)

INTRODUCTION = """Made by `make report` from results.jsonl; PLAN.md says what was asked and how a verdict is found.
Differences are arm minus arm, paired by seed: below zero is better. The plan's bootstrap covers less than its 95 %
where seeds are few (of normal values about 80 % with 3 seeds, 88 % with 5, 90 % with 8): a verdict that the interval of
Student's t does not share says so, (not by t)."""
PAPER = """The paper's own figures, at its scale and not re-run here: perplexity -5.59 % and downstream +1.52 % on
average against Sheared LLaMA re-run, a 55.4 % win rate after instruction tuning, multilingual downstream +2.95 %."""
SHIFTS = "Loss after continuing, nats a token. Corrupted text has tokens of its own: compare arms on it, not texts."
EXPLORATORY = """All but the headline's differences are exploratory: of three seeds an interval is about the range, and
of dozens of comparisons some are off zero by chance. Compare arms on the same seeds."""
QUESTIONED = "Loss after continuing, nats a token. Exploratory, as said above."
COSTS = """Of the runs whose commit is that of constant's of the same seed: others were timed on another day. Ratios are
of pairs; seconds are means over each arm's own seeds."""
REFERENCE = """Loss that the law predicts for the end of the stage minus the loss reached there, nats a token, mean over
the histories of constant and paper, seeds 1 to 3."""
QUESTIONS = {  # arms and what each is compared with, in loss after continuing
    "Smaller targets": "constant_8th - random, paper_8th - random, constant_16th - random, paper_16th - random, "
    "paper_8th - constant_8th, paper_16th - constant_16th",
    "The mix when pretraining from scratch": "random_paper - random",
    "Domains merged or split": "paper_merged - paper, paper_split - paper, paper_merged - constant, "
    "paper_split - constant",
    "The mix updated more and less often": "paper_often - paper, paper_seldom - paper",
    "Parts of the method": "dro_fixed - constant, dro_dynamic - dro_fixed, paper - dro_dynamic, "
    "paper_train_loss - paper, paper_noclip - paper",
    "Other updates": "bandit - sheared, bandit - paper, sheared_law - sheared, sheared_law - constant, "
    "paper - sheared_law",
    "Robust, or merely flatter": "paper - uniform, uniform - constant",
    "Pruning itself": "constant - random, constant - oneshot, constant - oneshot_384, oneshot - oneshot_384, "
    "constant - masks_only",
    "The Lagrangian damped": "constant_damped - constant, paper_damped - paper, paper_damped - constant_damped, "
    "constant_damped - oneshot",
}

Metric = Callable[[dict], float]  # of a run's record


def bootstrap(values: list[float], resamples: int = RESAMPLES) -> tuple[float, float]:
    """95 % interval of the mean: percentile bootstrap, widened by sqrt(n / (n - 1)) (Hesterberg 2015)."""
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    mean, draws = np.mean(values), np.random.default_rng(0).integers(n, size=(resamples, n))
    means = mean + (np.asarray(values)[draws].mean(axis=1) - mean) * math.sqrt(n / (n - 1))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


class Difference:
    """Arm minus arm, paired by seed: mean, 95 % interval, verdict, and all of it as text."""

    def __init__(self, values: list[float]) -> None:
        self.values = values
        self.mean = float(np.mean(values)) if values else math.nan
        self.low, self.high = bootstrap(values)

    @property
    def verdict(self) -> str:
        if len(self.values) < 2:
            return "one seed" if self.values else "missing"
        return "better" if self.high < 0 else "worse" if self.low > 0 else "no difference seen"

    @property
    def verdict_and_t(self) -> str:
        """The plan's verdict, and whether the 95 % interval of Student's t holds zero all the same."""
        if self.verdict not in ("better", "worse"):
            return self.verdict
        half = stats.t.ppf(0.975, len(self.values) - 1) * stats.sem(self.values)
        return self.verdict + " (not by t)" * bool(abs(self.mean) <= half)

    def text(self, form: Callable = "{:+.4f}".format, unit: str = "") -> str:
        if not self.values:
            return "-"
        mean, low, high = map(form, (self.mean, self.low, self.high))
        return f"{mean}{unit}" + f" [{low}, {high}]" * (len(self.values) > 1)

    @property
    def in_perplexity(self) -> str:
        """A difference of losses in nats as a change of the perplexity."""
        return self.text(lambda nats: f"{100 * math.expm1(nats):+.2f}", " %")

    @property
    def judged(self) -> list[str]:
        return [self.text(), self.verdict_and_t]


def loss_of(when: str = "final", text: str = "heldout", over: Callable = np.mean, scale_M=1.0) -> Metric:
    """Loss times scale over the domains; NaN for a run that was not evaluated then."""
    return lambda r: float(over(np.multiply(r["loss"][when][text], scale_M))) if when in r["loss"] else math.nan


def worst_mix(p0_M: list[float]) -> Callable:
    """Loss under the worst mix of the ball around p0: max q . loss with chi-square divergence <= RHO."""
    return lambda loss_M: chi_square_ratio(loss_M, 0 * loss_M, p0_M, RHO, floor=0.0, clamp_to_min=False) @ loss_M


@dataclass(frozen=True)
class Results:
    """The records of one source: the source's own, and those of its runs by arm and seed."""

    source: dict | None
    runs: dict[str, dict[int, dict]]

    @property
    def bits_M(self) -> np.ndarray:
        """What makes nats a token bits per byte, domain by domain."""
        return 1 / math.log(2) / np.array(self.source["bytes_per_token"])

    def arms(self) -> list[str]:
        return [arm for arm in ARMS if self.runs[arm]]

    def where(self, keep: Callable[[dict], bool]) -> "Results":
        return Results(self.source, {arm: {s: r for s, r in of.items() if keep(r)} for arm, of in self.runs.items()})

    def common(self, arms: list[str]) -> list[int]:
        """Seeds that all these arms have."""
        return sorted(set.intersection(*(set(self.runs[arm]) for arm in arms)))

    def on(self, seeds: list[int]) -> "Results":
        return self.where(lambda r: r["seed"] in seeds)

    def timed(self) -> "Results":
        """The runs whose commit is that of constant's of the same seed: others were timed on another day."""
        commits = {seed: r["commit"] for seed, r in self.runs["constant"].items()}
        return self.where(lambda r: r["commit"] == commits.get(r["seed"]))

    def rows(self) -> list[tuple[str, str, "Results"]]:
        """Label, arm and results of every arm with all its seeds, and again with those that all arms have."""
        common, rows = self.common(self.arms()), []
        for arm in self.arms():
            rows.append((arm, arm, self))
            if common and list(self.runs[arm]) != common:
                rows.append((f"{arm}, seeds {', '.join(map(str, common))}", arm, self.on(common)))
        return rows

    def mean(self, arm: str, metric: Metric) -> float:
        return float(np.mean([metric(r) for r in self.runs[arm].values()])) if self.runs[arm] else math.nan

    def means(self, arm: str, *when: str, scale_M=1.0) -> list[float]:
        """Mean and worst domain's loss."""
        return [self.mean(arm, loss_of(*when, over=over, scale_M=scale_M)) for over in OVER.values()]

    def difference(self, arm: str, base: str, metric: Metric) -> Difference:
        pairs = [(self.runs[arm][s], self.runs[base][s]) for s in self.common([arm, base])]
        return Difference([metric(ours) - metric(theirs) for ours, theirs in pairs])

    def differences(self, arm: str, base: str, *when: str, scale_M=1.0) -> list[Difference]:
        """Those of the mean's and the worst domain's loss."""
        return [self.difference(arm, base, loss_of(*when, over=over, scale_M=scale_M)) for over in OVER.values()]


def results_of(records: dict[str, dict], source: str) -> Results:
    runs: dict = {arm: {} for arm in ARMS}
    mine = (r for r in records.values() if r["source"] == source and r.get("arm") in ARMS)
    for r in sorted(mine, key=lambda r: r["seed"]):
        runs[r["arm"]][r["seed"]] = r
    return Results(records.get(f"{source}/source"), runs)


# ---- tables


def table(head: str, rows: Iterable[Iterable]) -> str:
    """In Markdown. head: the columns' names, with | between them."""

    def text(x) -> str:
        return str(x) if not isinstance(x, float) else "-" if math.isnan(x) else f"{x:.4f}"

    lines = [head, "---" + " | ---" * head.count("|"), *(" | ".join(map(text, row)) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def claim(on_mean: list[str], on_worst: list[str]) -> str:
    """PLAN.md's rule."""
    if {"missing", "one seed"} & set(on_mean):
        return "too few seeds, nothing can be concluded"
    if set(on_mean) == {"better"} and "worse" not in on_worst:
        return "the paper's claim holds at this scale"
    if "worse" in on_mean:
        return "the paper's claim fails at this scale"
    return "the paper's claim as a whole is neither confirmed nor refuted at this scale"


def conclusion(results: Results) -> str:
    against = [results.differences("paper", base) for base in ("sheared", "constant")]
    return claim(*([d.verdict for d in over] for over in zip(*against, strict=True)))


def headline_table(sources: dict[str, Results]) -> str:
    """Paper against its two bases, and two controls: the bases against each other; and uniform, a constant mix that
    the metric, which weighs domains equally, favours as well."""
    pairs = [("paper", "sheared"), ("paper", "constant"), ("sheared", "constant"), ("paper", "uniform")]
    rows = []
    for (name, results), (number, (arm, base)) in product(sources.items(), enumerate(pairs)):
        mean, worst = results.differences(arm, base)
        label = f"{name}: {arm} - {base}" + " (control)" * (number > 1)
        if mean.values or number < 2:
            rows.append([label, len(mean.values), mean.text(), mean.in_perplexity, mean.verdict_and_t, *worst.judged])
    return table(
        "source: difference after continuing | seeds | mean of domains, nats a token [95 %] | perplexity [95 %] | "
        "verdict | worst domain, nats a token [95 %] | verdict",
        rows,
    )


def measures_table(results: Results, when: str) -> str:
    """Paper against its two bases in loss, perplexity and bits per byte; the verdict is the loss's."""
    rows = []
    for base in ("sheared", "constant"):
        bits = results.differences("paper", base, when, scale_M=results.bits_M)
        for over, d, b in zip(OVER, results.differences("paper", base, when), bits, strict=True):
            what = [f"paper - {base}", over, d.text(), d.in_perplexity, b.text()]
            rows.append([*what, len(d.values), d.verdict_and_t])
    return table(
        "difference | over | loss, nats a token [95 %] | perplexity [95 %] | bits per byte [95 %] | seeds | "
        "verdict on loss",
        rows,
    )


def worst_domains(results: Results, arm: str, scale_M=1.0) -> str:
    """The domains whose loss times its scale is the largest after continuing, in one seed or another."""
    losses = (r["loss"]["final"]["heldout"] for r in results.runs[arm].values())
    worst = {int(np.argmax(np.multiply(loss_M, scale_M))) for loss_M in losses}
    return " or ".join(results.source["domains"][m] for m in sorted(worst))


def largest_miss(runs: dict[int, dict]) -> str:
    """The largest |expected - target sparsity| of all masks and seeds at the end of pruning."""
    gaps = [(stage["sparsity_gap"], s) for s, r in runs.items() for stage in r["stages"][:1] if "sparsity_gap" in stage]
    return "{:.3f} (seed {})".format(*max(gaps)) if gaps else "-"


def largest_share(runs: dict[int, dict]) -> str:
    """The largest share of the tokens that a domain had, over all stages and seeds."""
    stages = [(stage, seed) for seed, r in runs.items() for stage in r["stages"]]
    share, domain, stage, seed = max(
        (share, domain, stage["stage"], seed)
        for stage, seed in stages
        for domain, share in zip(stage["domains"], stage["largest_share_M"], strict=True)
    )
    return f"{100 * share:.0f} % {domain} (seed {seed}, {stage})"


def arms_table(results: Results) -> str:
    rows = []
    for label, arm, r in results.rows():
        (mean, worst), bits = r.means(arm), r.means(arm, scale_M=r.bits_M)
        columns = [
            *(r.means(arm, "pruned") if ARMS[arm].start == "masks" else ("-", "-")),
            mean,
            f"{worst:.4f} {worst_domains(r, arm)}",
            f"{math.exp(mean):.2f} / {math.exp(worst):.2f}",
            f"{bits[0]:.4f} / {bits[1]:.4f} {worst_domains(r, arm, r.bits_M)}",
        ]
        rows.append([label, len(r.runs[arm]), *columns, largest_share(r.runs[arm]), largest_miss(r.runs[arm])])
    source = results.source["loss"]["final"]["heldout"]
    all_runs = [r for of_arm in results.runs.values() for r in of_arm.values()]
    tokens = sorted({int(sum(stage["tokens"] for stage in r["stages"])) for r in all_runs})
    return (
        f"Loss in nats a token; the source has mean {np.mean(source):.4f}, worst {np.max(source):.4f}. "
        f"Training tokens of an arm: {', '.join(f'{n:,}' for n in tokens)}.\n\n"
    ) + table(
        "arm | seeds | pruned: mean | worst | continued: mean | worst | perplexity, mean / worst | "
        "bits per byte, mean / worst | largest share of a domain | largest miss of a target",
        rows,
    )


def differences_table(results: Results) -> str:
    """Every arm minus constant, after pruning and after continuing."""
    rows = []
    for label, arm, r in (row for row in results.rows() if row[1] != "constant"):
        mean, worst = r.differences(arm, "constant")
        pruned = [d.text() for d in r.differences(arm, "constant", "pruned")]
        rows.append([label, len(mean.values), *(pruned if ARMS[arm].start == "masks" else ("-", "-"))])
        rows[-1] += [*mean.judged, *worst.judged]
    head = "arm - constant | seeds | pruned: mean [95 %] | worst | continued: mean [95 %] | verdict | worst | verdict"
    return table(head, rows)


def shifts(results: Results) -> dict[str, Metric]:
    domains, p0_M = results.source["domains"], results.source["p0"]
    mixes = {f"{domain} alone": lambda loss_M, m=m: loss_M[m] for m, domain in enumerate(domains)}
    mixes |= {"uniform": np.mean, "training mix": lambda loss_M: np.dot(p0_M, loss_M)}
    mixes[f"worst mix within {RHO} of it"] = worst_mix(p0_M)
    metrics = {name: loss_of(over=over) for name, over in mixes.items()}
    return metrics | {f"{name} text, mean of domains": loss_of(text=name) for name in CORRUPTIONS}


def shift_table(results: Results) -> str:
    rows = []
    for name, metric in shifts(results).items():
        against = [results.difference("paper", base, metric).judged for base in ("sheared", "constant")]
        rows.append([name, *(results.mean(arm, metric) for arm in HEADLINE), *against[0], *against[1]])
    head = f"evaluated on | {' | '.join(HEADLINE)} | paper - sheared | verdict | paper - constant | verdict"
    return table(head, rows)


def shifts_of_arms(results: Results) -> str:
    metrics = shifts(results)
    rows = [[label, *(r.mean(arm, m) for m in metrics.values())] for label, arm, r in results.rows()]
    return table(" | ".join(["arm", *metrics]), rows)


def reference_errors(results: Results, stage: str, clip: str) -> tuple[np.ndarray, np.ndarray]:
    """Shares of the stage seen (n,), and predicted - reached loss in nats (n, histories, domains); nan: no law yet."""
    all_runs = [r for of_arm in results.runs.values() for r in of_arm.values()]
    laws = [r["law"][stage][clip] for r in all_runs if stage in r.get("law", ())]
    shares = np.array([share for share, _ in max((law["predicted"] for law in laws), key=len, default=[])])
    errors = np.full((len(shares), len(laws), len(results.source["domains"])), np.nan)
    for history, law in enumerate(laws):
        for share, loss_M in law["predicted"]:
            errors[np.abs(shares - share).argmin(), history] = np.subtract(loss_M, law["reached"])
    return shares, errors


def reference_table(results: Results) -> str:
    rows = []
    for stage, (clip, name) in product(("prune", "continue"), REFERENCES.items()):
        shares, errors = reference_errors(results, stage, clip)
        for seen in (0.25, 0.5, 0.75, 1.0) if len(shares) else ():
            error = errors[np.abs(shares - seen).argmin()]  # (histories, domains)
            what = [f"{stage}, first fit at {100 * shares[0]:.0f} %", name, f"{100 * seen:.0f} %"]
            rows.append([*what, np.nanmean(np.abs(error)), *(f"{x:+.4f}" for x in np.nanmean(error, axis=0))])
    head = f"stage | reference | seen | mean size of the error | {' | '.join(results.source['domains'])}"
    return table(head, rows) if rows else "No histories yet."


def total(keys: Iterable[str], stages: slice, per: str = "") -> Metric:
    """What these keys of some stages sum up to, in all or for each of `per`."""

    def summed(record: dict, key: str) -> float:
        return sum(stage[key] for stage in record["stages"][stages])

    return lambda r: sum(summed(r, key) for key in keys) / (summed(r, per) if per else 1)


def memory(stages: slice) -> Metric:
    """Peak of the process in MiB; nan for a stage that was resumed, since the process did not do all of it."""
    return lambda r: math.nan if any(r["resumed"][stages]) else max(r["peak_bytes"][stages]) / 2**20


def ratio_to_constant(results: Results, arm: str, metric: Metric) -> str:
    ours, theirs = results.runs[arm], results.runs["constant"]
    ratios = [metric(ours[s]) / metric(theirs[s]) for s in results.common([arm, "constant"])]
    ratios = [r for r in ratios if not math.isnan(r)]
    return f"{np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})" if ratios else "-"


def cost_table(results: Results, stages: slice) -> str:
    """What these stages cost, arm by arm; only arms that start with masks have PRUNING and continued training apart."""
    results, rows = results.timed(), []
    all_s, token_s, peak = total(TIMES, stages), total(["step_s"], stages, "tokens"), memory(stages)
    for arm in (a for a in results.arms() if stages == ALL_STAGES or ARMS[a].start == "masks"):
        took, mix_s = results.mean(arm, all_s), results.mean(arm, total(["mix_s"], stages))
        peaks = [mib for r in results.runs[arm].values() if not math.isnan(mib := peak(r))]
        columns = [
            f"{took:.0f}",
            ratio_to_constant(results, arm, all_s),
            f"{1e6 * results.mean(arm, token_s):.0f}",
            ratio_to_constant(results, arm, token_s),
            f"{100 * results.mean(arm, total(['eval_s'], stages)) / took:.1f} %",
            f"{1e3 * results.mean(arm, total(['mix_s'], stages, 'updates')):.1f}",
            f"{100 * mix_s / took:.2f} %",
            f"{np.mean(peaks):.0f}" if peaks else "-",
            ratio_to_constant(results, arm, peak),
        ]
        rows.append([arm, len(results.runs[arm]), *columns])
    return table(
        "arm | seeds | seconds | of constant's, median (range) | us a training token | of constant's | "
        "evaluation, share | mix and fits, ms each | share | peak memory, MiB | of constant's",
        rows,
    )


def cost_sentence(results: Results) -> str:
    """Is the mix under 1 % here, and would it be at the paper's size, where an update costs the same?"""
    if not results.runs["paper"]:
        return ""
    share = results.mean("paper", total(["mix_s"], PRUNING)) / results.mean("paper", total(TIMES, PRUNING))
    there = PAPER_UPDATES * results.mean("paper", total(["mix_s"], PRUNING, "updates")) / (3600 * PAPER_HOURS)
    return (
        f"Mix and fits take {100 * share:.2f} % of paper's pruning time here, {'under' if share < 0.01 else 'over'} "
        f"1 %. An update costs the same at any model's size: the published {PAPER_UPDATES} would take "
        f"{100 * there:.2f} % of the {PAPER_HOURS} h that `--plan` gives its pruning stage on 8 H100."
    )


def questions(results: Results) -> str:
    parts = []
    for question, pairs in QUESTIONS.items():
        rows = []
        for pair in pairs.split(", "):
            mean, worst = results.differences(*pair.split(" - "))
            rows.append([pair, len(mean.values), *mean.judged, *worst.judged])
        head = "difference | seeds | mean of domains [95 %] | verdict | worst domain [95 %] | verdict"
        parts += [f"### {question}", table(head, rows)]
        parts += [collapsed(results)] if question == "Smaller targets" and results.runs["random"] else []
    return "\n\n".join(parts)


def collapsed(results: Results) -> str:
    """The targets whose loss is not below that of a model with a quarter's size and no source."""
    level = results.mean("random", loss_of())
    targets = (f"{arm}{size}" for size in ("", "_8th", "_16th") for arm in ("constant", "paper"))
    fallen = [arm for arm in targets if results.mean(arm, loss_of()) >= level]
    return f"Collapsed, by the plan's rule: {', '.join(fallen) or 'none'}."


# ---- figures


def plot_arms(results: Results):
    """Each mix minus constant, pruned in the same way to the same target: seeds, mean and interval."""
    of_a_mix = [a for a, arm in ARMS.items() if (arm.start, arm.target, arm.damping) == ("masks", "4th", 1.0)]
    rows = [row for row in results.rows() if row[1] in of_a_mix[1:]][::-1]
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.9 + 0.28 * len(rows)), sharey=True, layout="constrained")
    for axis, (what, over) in zip(axes, OVER.items(), strict=True):
        for y, (_, arm, r) in enumerate(rows):
            d = r.difference(arm, "constant", loss_of(over=over))
            colour = {"better": "C2", "worse": "C3"}.get(d.verdict, "0.4")
            axis.plot(d.values, [y] * len(d.values), ".", color=colour, alpha=0.4, ms=6)
            axis.errorbar(d.mean, y, xerr=[[d.mean - d.low], [d.high - d.mean]], fmt="o", color=colour, capsize=3, ms=4)
        axis.axvline(0, color="k", lw=0.8)
        axis.set_title(what)
        axis.set_xlabel("nats per token, arm minus constant (left: better)")
    labels = [label if "," in label else f"{label} ({len(r.runs[arm])})" for label, arm, r in rows]
    axes[0].set_yticks(range(len(rows)), labels, fontsize=9)
    title = "Loss after continuing: seeds (dots, their number in brackets), mean, 95 % interval; "
    figure.suptitle(title + "green: better, red: worse, grey: no difference seen", fontsize=10)
    return figure


def plot_reference(results: Results):
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
        row[0].set_ylabel(f"{stage}: nats per token")
    for top, bottom, domain in zip(*axes, domains, strict=True):
        top.set_title(domain)
        bottom.set_xlabel("% of the stage seen")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    figure.suptitle("Loss predicted for the end of the stage, minus the loss reached there", fontsize=11)
    return figure


def plot_targets(results: Results):
    """Loss against the target's size, on the seeds that all of these arms have."""
    sizes = {"": 1 / 4, "_8th": 1 / 8, "_16th": 1 / 16}
    arms = {name: [f"{name}{s}" for s in sizes if results.runs[f"{name}{s}"]] for name in ("constant", "paper")}
    results = results.on(results.common(["constant", *arms["constant"], *arms["paper"]]))
    figure, axis = plt.subplots(figsize=(7, 5), layout="constrained")
    for (name, style), (colour, over) in product((("constant", "o-"), ("paper", "s--")), enumerate(OVER)):
        shares = [sizes[arm.removeprefix(name)] for arm in arms[name]]
        losses = [results.means(arm)[colour] for arm in arms[name]]
        axis.plot(shares, losses, style, color=f"C{colour}", label=f"{name}, {over}")
    for colour, what in enumerate(("mean", "worst") if results.runs["random"] else ()):
        label = f"quarter, from random weights, {what}"
        axis.axhline(results.means("random")[colour], color=f"C{colour}", ls=":", label=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks([1 / 16, 1 / 8, 1 / 4], ["1/16", "1/8", "1/4"])
    axis.set_xlabel("target's share of the source's parameters that are not embeddings")
    axis.set_ylabel("loss after continuing (nats per token)")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


def plot_mix(results: Results):
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), sharex=True, sharey=True, layout="constrained")
    for axis, (m, domain) in zip(axes.flat, enumerate(results.source["domains"]), strict=False):
        for arm in (a for a in (*HEADLINE, "dro_fixed", "bandit") if results.runs[a]):
            courses = [r["stages"] for r in results.runs[arm].values()]
            before = np.cumsum([0, *(stage["steps"] for stage in courses[0])])
            x = [start + step for start, stage in zip(before, courses[0], strict=False) for step, _ in stage["ratio"]]
            y = np.mean([[ratio[m] for stage in stages for _, ratio in stage["ratio"]] for stages in courses], axis=0)
            axis.plot(x, 100 * y, label=arm)
        axis.axvline(before[1], color="0.6", lw=0.8, ls=":")
        axis.set_title(domain)
    for axis in axes[1]:
        axis.set_xlabel("step (dotted: pruning ends)")
    figure.supylabel("share of the training tokens (%)", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9)
    figure.suptitle("The mix at 16 moments of each stage, mean over seeds", fontsize=11)
    return figure


# ---- the page


def missing(records: dict[str, dict]) -> str:
    lines = []
    for source, arms in (item for study in STUDIES.values() for item in study.items()):
        runs = results_of(records, source).runs
        gone = [f"{arm} {n - len(runs[arm])}" for arm, n in arms.items() if len(runs[arm]) < n]
        lines += [f"- source {source}: seeds missing of {', '.join(gone)}"] if gone else []
    return "\n".join(lines) or "Nothing."


def provenance(records: dict[str, dict]) -> str:
    def listed(texts: Iterable[str]) -> str:
        return ", ".join(sorted(set(texts)))

    runs = records.values()
    sources, hours = sum("arm" not in r for r in runs), sum(total(TIMES, ALL_STAGES)(r) for r in runs) / 3600
    return (
        f"{len(runs) - sources} runs and {sources} sources, {hours:.1f} hours of training with its evaluations, "
        f"at {listed(str(stage['threads']) for r in runs for stage in r['stages'])} thread(s) a run; "
        f"commits {listed(r['commit'] for r in runs)}; "
        f"{listed(' '.join(f'{name} {v}' for name, v in r['versions'].items()) for r in runs)}; "
        f"source weights {listed(r['source'] + ': ' + r['hashes']['source'][:12] for r in runs)}."
    )


def section(results: Results, source: str) -> list[str]:
    """What RESULTS.md says about one source; source A's has figures and the open questions, too."""
    title, is_A = f"## Source {source}: ", source == "A"
    parts = [f"{title}the headline in every measure", "After continuing:", measures_table(results, "final")]
    parts += ["After pruning, before continuing:", measures_table(results, "pruned")]
    parts += [f"{title}all arms", arms_table(results), EXPLORATORY, differences_table(results)]
    parts += ["![Every arm against constant](figures/arms.png)", "![The mix](figures/mix.png)"] if is_A else []
    parts += [f"{title}shifts", SHIFTS, shift_table(results), shifts_of_arms(results)]
    parts += [f"{title}reference losses", REFERENCE, reference_table(results)]
    parts += ["![Error of the reference losses](figures/reference.png)"] if is_A else []
    parts += [f"{title}costs", COSTS, "Pruning, the first stage:", cost_table(results, PRUNING)]
    parts += [cost_sentence(results), "All stages:", cost_table(results, ALL_STAGES)]
    parts += ["## Open questions", QUESTIONED, questions(results), "![Sizes](figures/targets.png)"] if is_A else []
    return parts


def page(records: dict[str, dict]) -> str:
    """RESULTS.md."""
    sources = {source: results_of(records, source) for source in ("A", "B", "smollm2")}
    sources = {source: results for source, results in sources.items() if results.source and results.arms()}
    parts = ["# Results", INTRODUCTION, "## Headline"]
    parts += [f"**Source {source}: {conclusion(results)}.**" for source, results in sources.items()]
    parts += [headline_table(sources), PAPER]
    parts += [part for source, results in sources.items() for part in section(results, source)]
    parts += ["## Missing", missing(records), "## Made with", provenance(records)]
    return "\n\n".join(part for part in parts if part) + "\n"


def draw(results: Results, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for plot in (plot_arms, plot_mix, plot_targets, plot_reference):
        with plt.rc_context({"axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 10}):
            figure = plot(results)
        figure.savefig(folder / f"{plot.__name__.removeprefix('plot_')}.png", dpi=120)
        plt.close(figure)


@dataclass(frozen=True)
class Options:
    results: str = "experiments/results.jsonl"  # RESULTS.md and figures/ go into its folder


def main(opt: Options) -> None:
    records, out = read_results(opt.results), Path(opt.results).parent
    if not records:
        raise UserError(f"{opt.results}: no results yet: make evidence makes them")
    (out / "RESULTS.md").write_text(page(records))
    if (source_A := results_of(records, "A")).runs["constant"]:
        draw(source_A, out / "figures")
    print(out / "RESULTS.md")


if __name__ == "__main__":
    configurator.command(main, Options)
