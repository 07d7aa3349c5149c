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
from experiments import arms
from experiments.arms import ARMS, HEADLINE, STUDIES
from experiments.run import read_results
from experiments.views import CORRUPTIONS
from export import markdown

RESAMPLES = 10_000
RHO = 0.1  # radius of the chi-square ball of the worst mix
OVER = {"mean of domains": np.mean, "worst domain": np.max}
REFERENCES = {"True": "published clip", "False": "no clip"}  # clip_reference: its name
TIMES = ("step_s", "eval_s", "mix_s")  # what a stage takes: training, evaluation, mix with fits
DECIDING = ("paper - sheared", "paper - constant", "sheared - constant", "paper - uniform")  # and two controls
EXPLORATORY = (
    *("dro_dynamic - dro_fixed", "paper - dro_dynamic", "paper_noclip - paper", "paper_train_loss - paper"),
    *("paper_often - paper", "paper_seldom - paper", "bandit - paper", "sheared_law - sheared"),
    *("random_paper - random", "constant_damped - oneshot_384", "constant_damped - oneshot"),
)
PAGE = """# Results

`make report` makes this page from results.jsonl. PLAN.md says what was asked and how a verdict is found.

Losses are in nats a token, on held-out text, after continued training. A difference is one arm minus another, paired by
seed: below zero is better. Brackets hold the plan's 95 % interval, a bootstrap over seeds. It is too narrow where seeds
are few: of normal values it covers about 80 % with 3 seeds, 88 % with 5 and 90 % with 8. "Not by t" means that the
interval of Student's t holds zero all the same. Verdicts are those of the loss.

## Headline

{claims}

{deciding}

The first two differences of a source decide. The others are controls; the metric favours uniform shares, because it
weighs domains equally. The paper reports a perplexity 5.59 % below that of Sheared LLaMA re-run, at its own scale.

## All arms

All differences but the headline's are exploratory. With three seeds an interval is about the range, and of dozens of
comparisons some are off zero by chance. Compare arms on the same seeds. The figures show source A.

{arms}

![Loss of every mix minus that of a constant one](figures/arms.png)
![Shares of the domains over training](figures/mix.png)

## Loss by domain, under other mixes and on corrupted text

The second column is the source's loss before it was pruned. The training mix is in proportion to the text; the worst
mix is within a chi-square divergence of 0.1 from it. Corrupted text has other tokens: compare arms on it, not texts.

{texts}

## Error of the law

The error is the loss that the law predicts for the end of a stage minus the loss reached there. The table has its mean
size over domains and over the histories of constant and paper, seeds 1 to 3, and its signed mean at the end.

{law}

## Costs, and the largest share of a domain

Only runs at the commit of the same seed's constant count: the others ran on another day. The ratio to constant is a
median over pairs. Seconds and memory are those of all stages. Evaluations and the mix with its fits are shares of the
first stage. The last column is the largest share of the tokens that a domain had, over all stages and seeds.

{costs}

## Runs

The page counts {n_runs} runs. Of the planned ones these are missing: {missing}. With their sources they took {hours}
hours of training and evaluation, each on one thread. Their commits are {commits}. They ran with {versions}.
"""

Metric = Callable[[dict], float]  # of a run's record
Runs = dict[int, dict]  # an arm's records by seed
Pair = tuple[str, Runs, Runs]  # what one arm minus another is called, and their runs


def bootstrap(values: list[float]) -> tuple[float, float]:
    """95 % interval of the mean: percentile bootstrap, widened by sqrt(n / (n - 1)) (Hesterberg 2015)."""
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    mean, draws = np.mean(values), np.random.default_rng(0).integers(n, size=(RESAMPLES, n))
    means = mean + (np.asarray(values)[draws].mean(axis=1) - mean) * math.sqrt(n / (n - 1))
    return tuple(np.quantile(means, (0.025, 0.975)))


class Difference:
    """One arm minus another, over the seeds that both have: mean, 95 % interval, verdict, and all of it as text."""

    def __init__(self, ours: Runs, theirs: Runs, metric: Metric) -> None:
        self.values = [metric(ours[seed]) - metric(theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]
        self.mean = float(np.mean(self.values)) if self.values else math.nan
        self.low, self.high = bootstrap(self.values)

    @property
    def verdict(self) -> str:
        if len(self.values) < 2:
            return "one seed" if self.values else "missing"
        return "better" if self.high < 0 else "worse" if self.low > 0 else "no difference seen"

    def text(self, form: Callable = "{:+.4f}".format, unit: str = "") -> str:
        mean, low, high = map(form, (self.mean, self.low, self.high))
        return f"{mean}{unit}" + f" [{low}, {high}]" * (len(self.values) > 1) if self.values else "-"

    @property
    def judged(self) -> list[str]:
        """Its text; and the verdict, with a note where the 95 % interval of Student's t holds zero all the same."""
        verdict = self.verdict
        if verdict in ("better", "worse"):
            half = stats.t.ppf(0.975, len(self.values) - 1) * stats.sem(self.values)
            verdict += " (not by t)" * bool(abs(self.mean) <= half)
        return [self.text(), verdict]


def loss_of(over: Callable = np.mean, scale_M=1.0, text: str = "heldout", when: str = "final") -> Metric:
    """Loss times scale over the domains."""
    return lambda r: float(over(np.multiply(r["loss"][when][text], scale_M)))


def worst_mix(p0_M: list[float]) -> Callable:
    """Loss under the worst mix of the ball around p0: max q . loss with chi-square divergence <= RHO."""
    return lambda loss_M: chi_square_ratio(loss_M, 0 * loss_M, p0_M, RHO, floor=0.0, clamp_to_min=False) @ loss_M


@dataclass(frozen=True)
class Results:
    """One source's own record, and those of its runs by arm and seed."""

    source: dict
    runs: dict[str, Runs]  # of every arm; an empty one where there are none

    def pairs(self, names: Iterable[str]) -> list[Pair]:
        return [(name, *(self.runs[arm] for arm in name.split(" - "))) for name in names]

    def against_constant(self) -> list[Pair]:
        """Every other arm: on all its seeds, and again on those that all arms have."""
        there, pairs = {arm: runs for arm, runs in self.runs.items() if runs}, []
        common = sorted(set.intersection(*map(set, there.values())))
        for arm in (arm for arm in there if arm != "constant"):
            pairs += self.pairs([f"{arm} - constant"])
            if common and list(there[arm]) != common:
                some = {seed: there[arm][seed] for seed in common}
                pairs.append((f"{arm} - constant, seeds {', '.join(map(str, common))}", some, self.runs["constant"]))
        return pairs


def results_of(records: dict[str, dict]) -> dict[str, Results]:
    """The results of every source, by its name. A source without runs is left out."""
    found = {}
    for name in (name for study in STUDIES.values() for name in study):
        mine = sorted((r for r in records.values() if r["source"] == name and "arm" in r), key=lambda r: r["seed"])
        if mine and f"{name}/source" in records:
            runs = {arm: {r["seed"]: r for r in mine if r["arm"] == arm} for arm in ARMS}
            found[name] = Results(records[f"{name}/source"], runs)
    return found


def claim(results: Results) -> str:
    """What PLAN.md's rule makes of paper's differences to the other two mixes."""
    pairs = [pair[1:] for pair in results.pairs(DECIDING[:2])]
    on_mean, on_worst = ({Difference(*pair, loss_of(over)).verdict for pair in pairs} for over in OVER.values())
    if {"missing", "one seed"} & on_mean:
        return "there are too few seeds, and nothing can be concluded"
    if on_mean == {"better"} and "worse" not in on_worst:
        return "the paper's claim holds at this scale"
    if "worse" in on_mean:
        return "the paper's claim fails at this scale"
    return "the paper's claim as a whole is neither confirmed nor refuted at this scale"


def differences_table(sources: dict[str, Results], pairs_of: Callable[[Results], list[Pair]]) -> str:
    rows = []
    for source, label, ours, theirs in ((source, *pair) for source, r in sources.items() for pair in pairs_of(r)):
        if seeds := ours.keys() & theirs.keys():
            two_stages = all(len(r["stages"]) == 2 for r in (*ours.values(), *theirs.values()))
            pruned = Difference(ours, theirs, loss_of(when="pruned")).text() if two_stages else "-"
            row = [f"{source}: {label}", len(seeds), pruned]
            bits_M = 1 / math.log(2) / np.array(sources[source].source["bytes_per_token"])
            for over in OVER.values():
                d, bits = (Difference(ours, theirs, loss_of(over, scale_M)) for scale_M in (1.0, bits_M))
                row += [*d.judged, d.text(lambda nats: f"{100 * math.expm1(nats):+.2f}", " %"), bits.text()]
            rows.append(row)
    measures = (name for over in OVER for name in (over, "verdict", "perplexity", "bits per byte"))
    return markdown(["difference [95 %]", "seeds", "mean after pruning", *measures], rows)


def texts_table(sources: dict[str, Results]) -> str:
    """The loss on every domain, over all of them, under other mixes and on corrupted text."""
    rows = []
    for source, results in sources.items():
        p0_M, names = results.source["p0"], results.source["domains"]
        over = {domain: lambda loss_M, m=m: loss_M[m] for m, domain in enumerate(names)} | OVER
        over |= {"training mix": lambda loss_M, p0_M=p0_M: np.dot(p0_M, loss_M), "worst mix": worst_mix(p0_M)}
        metrics = {name: loss_of(function) for name, function in over.items()}
        metrics |= {f"{name} text, mean of domains": loss_of(text=name) for name in CORRUPTIONS}
        for name, metric in metrics.items():
            row = [f"{source}: {name}", metric(results.source)]
            row += [np.mean([metric(r) for r in results.runs[arm].values()] or [math.nan]) for arm in HEADLINE]
            for _, ours, theirs in results.pairs(DECIDING[:2]):
                row += Difference(ours, theirs, metric).judged
            rows.append(row)
    return markdown(["text", "source", *HEADLINE, DECIDING[0], "verdict", DECIDING[1], "verdict"], rows)


def law_table(sources: dict[str, Results]) -> str:
    rows = []
    for (source, results), stage, (clip, name) in product(sources.items(), ("prune", "continue"), REFERENCES.items()):
        errors: dict = {}  # predicted - reached loss of every history, nats (M,), by the share seen
        for record in (r for runs in results.runs.values() for r in runs.values() if stage in r.get("law", ())):
            law = record["law"][stage][clip]
            for share, loss_M in law["predicted"]:
                errors.setdefault(share, []).append(np.subtract(loss_M, law["reached"]))
        if errors:
            nearest = [errors[min(errors, key=lambda share: abs(share - seen))] for seen in (0.25, 0.5, 0.75, 1.0)]
            row = [f"{source}: {stage}", name, f"{100 * min(errors):.0f} %", *(np.abs(e).mean() for e in nearest)]
            rows.append([*row, f"{np.mean(nearest[-1]):+.4f}"])
    seen = (f"{share} % seen" for share in (25, 50, 75, 100))
    return markdown(["stage", "reference", "first fit at", *seen, "signed"], rows)


def seconds(record: dict) -> float:
    return sum(stage[key] for stage in record["stages"] for key in TIMES)


def cost_table(sources: dict[str, Results]) -> str:
    rows = []
    for (source, results), arm in product(sources.items(), ARMS):
        constant = results.runs["constant"]
        both = [(r, constant[seed]) for seed, r in results.runs[arm].items() if seed in constant]
        timed = [(r, c) for r, c in both if r["commit"] == c["commit"] and not any(r["resumed"] + c["resumed"])]
        if timed:  # in one go, and on the day of constant's
            first = [r["stages"][0] for r, _ in timed]
            spent = np.sum([[stage[key] for key in TIMES] for stage in first], axis=0)
            _, evaluations, mix = 100 * spent / spent.sum()
            stages = [stage for r in results.runs[arm].values() for stage in r["stages"]]
            share, domain = max(max(zip(s["largest_share_M"], s["domains"], strict=True)) for s in stages)
            took, peak = np.mean([(seconds(r), max(r["peak_bytes"]) / 2**20) for r, _ in timed], axis=0)
            ratio = np.median([seconds(r) / seconds(c) for r, c in timed])
            row = [f"{source}: {arm}", len(timed), f"{took:.0f}", f"{ratio:.3f}", f"{peak:.0f}"]
            rows.append([*row, f"{evaluations:.1f} %", f"{mix:.2f} %", f"{100 * share:.0f} % {domain}"])
    costs = ("seconds", "to constant's", "peak memory, MiB", "evaluations", "mix and fits")
    return markdown(["arm", "seeds", *costs, "largest share"], rows)


def plot_arms(results: Results):
    """Each mix minus constant, pruned in the same way to the same target: seeds, mean and interval."""
    mixes = [a for a, arm in ARMS.items() if (arm.start, arm.target, arm.damping) == ("masks", "4th", 1.0)]
    pairs = [(label.replace(" - constant", ""), *of) for label, *of in results.against_constant()]
    pairs = [pair for pair in pairs if pair[0].partition(",")[0] in mixes][::-1]
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.9 + 0.28 * len(pairs)), sharey=True, layout="constrained")
    for axis, (what, over) in zip(axes, OVER.items(), strict=True):
        for y, (_, ours, theirs) in enumerate(pairs):
            d = Difference(ours, theirs, loss_of(over))
            colour = {"better": "C2", "worse": "C3"}.get(d.verdict, "0.4")
            axis.plot(d.values, [y] * len(d.values), ".", color=colour, alpha=0.4, ms=6)
            axis.errorbar(d.mean, y, xerr=[[d.mean - d.low], [d.high - d.mean]], fmt="o", color=colour, capsize=3, ms=4)
        axis.axvline(0, color="k", lw=0.8)
        axis.set_title(what)
        axis.set_xlabel("nats per token, arm minus constant (left: better)")
    labels = [label if "," in label else f"{label} ({len(runs)})" for label, runs, _ in pairs]
    axes[0].set_yticks(range(len(pairs)), labels, fontsize=9)
    title = "Loss after continuing: seeds (dots, their number in brackets), mean, 95 % interval; "
    figure.suptitle(title + "green: better, red: worse, grey: no difference seen", fontsize=10)
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


def page(records: dict[str, dict]) -> str:
    """RESULTS.md."""
    sources, runs = results_of(records), records.values()
    facts = {
        "missing": (name for study in STUDIES if study != "sweep" for name in arms.runs(study) if name not in records),
        "commits": (r["commit"] for r in runs),
        "versions": (f"{name} {version}" for r in runs for name, version in r["versions"].items()),
    }
    return PAGE.format(
        claims="\n".join(f"- **On source {source} {claim(results)}.**" for source, results in sources.items()),
        deciding=differences_table(sources, lambda r: r.pairs(DECIDING)),
        arms=differences_table(sources, lambda r: r.against_constant() + r.pairs(EXPLORATORY)),
        texts=texts_table(sources),
        law=law_table(sources),
        costs=cost_table(sources),
        n_runs=sum("arm" in r for r in runs),
        hours=f"{sum(map(seconds, runs)) / 3600:.1f}",
        **{fact: ", ".join(sorted(set(texts))) or "none" for fact, texts in facts.items()},
    )


@dataclass(frozen=True)
class Options:
    results: str = "experiments/results.jsonl"  # RESULTS.md and figures/ go into its folder


def main(opt: Options) -> None:
    records, out = read_results(opt.results), Path(opt.results).parent
    if not (sources := results_of(records)):
        raise UserError(f"{opt.results}: no results yet: make evidence makes them")
    (out / "RESULTS.md").write_text(page(records))
    (out / "figures").mkdir(exist_ok=True)
    for plot in (plot_arms, plot_mix):
        with plt.rc_context({"axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 10}):
            figure = plot(next(iter(sources.values())))
        figure.savefig(out / "figures" / f"{plot.__name__.removeprefix('plot_')}.png", dpi=120)
        plt.close(figure)
    print(out / "RESULTS.md")


if __name__ == "__main__":
    configurator.command(main, Options)
