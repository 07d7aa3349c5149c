"""make report: RESULTS.md and its figures from results.jsonl alone. Every verdict is computed.

Differences are paired by seed; intervals and verdicts follow PLAN.md. Runs that are missing are named.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats

import configurator
from configurator import UserError
from experiments import arms
from experiments.arms import ARMS, HEADLINE, MIXES, SOURCES, STEADIER, STUDIES
from experiments.run import LAW, read_results
from experiments.views import CORRUPTIONS
from export import markdown

RESAMPLES = 10_000
TIMES = ("step_s", "eval_s", "mix_s")  # what a stage takes: training, evaluation, mix with fits
HEADLINE_SOURCES = ("A", "B")
OVER = ("mean of domains", "worst domain", "worst excess")
DECIDING = ("count - oneshot", "count - published")
AS_GOOD = "as good as one-shot pruning"
BY_MIX = (
    *(f"{mix} - oneshot" for mix in MIXES),
    *(f"{mix} - uniform" for mix in MIXES if mix != "uniform"),
    *("paper - sheared", "paper-sqrt - sqrt"),
)
EXPLORATORY = (
    *(f"{mix} - {other}" for mix in STEADIER for other in ("oneshot", "uniform", "paper")),
    "oneshot - oneshot-alone-twice",
    *("count - count-frozen", "count-frozen - oneshot"),
    *(f"{way} - {way}-alone" for way in arms.STARTS),
    *("oneshot - published", "count-alone - oneshot-alone", "oneshot-alone - published-alone", "oneshot - random"),
    *(f"count-of{steps} - oneshot" for steps in (64, 256, 512)),
    *("count-16th - oneshot-16th", "count-16th - published-16th", "oneshot-16th - oneshot-alone-16th"),
    *("count-half - oneshot-half", "count-half - published-half", "oneshot-half - published-half"),
)
PAGE = """# Results

`make report` makes this page from results.jsonl. [PLAN.md](PLAN.md) says what was asked and how a verdict is found.
Losses are in nats a token, on held-out text, at the end of a run. A difference is one arm minus another, paired by
seed: below zero is better. Brackets hold a 95 % bootstrap interval over seeds. It is too narrow where seeds are few:
of normal values it covers about 80 % with 3 seeds and 88 % with 5. "Not by t" means that Student's interval holds
zero all the same.

## Headline

{claims}

{deciding}

{mixes}

![Mean and worst domain of every way to prune](figures/ways.png)
![How long the masks learn](figures/lengths.png)
![Loss over seconds of training](figures/seconds.png)
![Every mix minus a constant one](figures/mixes.png)
![The paper's mix, steered by different windows](figures/shares.png)

## Every arm

Means over seeds. "Excess" is the largest loss minus the source's on the same domain. "Mean by p0" weighs the domains
with p0, where the others weigh them alike. Seconds are those of training, evaluation and mix on one thread, with
another run beside it (PLAN.md names one that had two threads); scoring the units is not
in them. The largest share is that of a domain in the training text at any moment.

{arms}

## Differences that decide nothing

They are exploratory: of dozens some lie off zero by chance.

{exploratory}

## How far the mix moves

The mean of |share - share| over domains, evaluations and seeds, in percentage points: {movement}.

## Error of the law

What the law predicts for the end of a stage minus what is reached there: the mean size over domains and runs, from a
quarter, half and three quarters of it, and the signed mean from half. "paper" is the training of that arm.

{law}

## Corrupted text

Mean of domains. Corrupted text has other tokens: compare arms on it, not texts.

{corrupted}

## SmolLM2

Losses by domain, means over seeds:

{domains}

Zero-shot accuracy in percent, with the standard error: the first seed, 100 documents of each task.

{tasks}

The first seed to a half, trained for as many steps as the others and for ten times as many:

{longer}

## Runs

The page counts {n_runs} runs. Of the planned ones and their sources these are missing: {missing}. Training,
evaluation and mix of what is there took {hours} hours. Commits: {commits}. Versions: {versions}. Computed in {dtypes}.
"""

LONGER_FIGURE = "![The loss over steps, as long as the others and ten times longer](figures/longer.png)"
Metric = Callable[[dict], float]  # of a run's record
Runs = dict[int, dict]  # an arm's records by seed


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
    def ends(self) -> np.ndarray:
        """How far the interval reaches to both sides of the mean; 0 where there is none."""
        return np.nan_to_num([self.mean - self.low, self.high - self.mean])

    @property
    def verdict(self) -> str:
        if len(self.values) < 2:
            return "one seed" if self.values else "missing"
        return "better" if self.high < 0 else "worse" if self.low > 0 else "no difference seen"

    @property
    def text(self) -> str:
        mean, low, high = map("{:+.4f}".format, (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]" if len(self.values) > 1 else mean if self.values else "-"

    @property
    def judged(self) -> list[str]:
        """Its text; and the verdict, with a note where the 95 % interval of Student's t holds zero all the same."""
        verdict = self.verdict
        if verdict in ("better", "worse"):
            half = stats.t.ppf(0.975, len(self.values) - 1) * stats.sem(self.values)
            verdict += " (not by t)" * bool(abs(self.mean) <= half)
        return [self.text, verdict]


@dataclass(frozen=True)
class Results:
    """One source's own record, and those of its runs by arm and seed."""

    name: str
    source: dict
    runs: dict[str, Runs]  # of every arm; an empty one where there are none

    def losses(self, record: dict, text: str = "heldout", when: str = "final") -> np.ndarray:
        return np.array(record["loss"][when][text])

    @property
    def metrics(self) -> dict[str, Metric]:
        nats_per_bit_M = math.log(2) * np.array(self.source["bytes_per_token"])
        source_M = self.losses(self.source)
        return {
            "mean of domains": lambda r: self.losses(r).mean(),
            "worst domain": lambda r: self.losses(r).max(),
            "worst excess": lambda r: (self.losses(r) - source_M).max(),
            "mean by p0": lambda r: self.losses(r) @ self.source["p0"],
            "bits per byte, mean": lambda r: (self.losses(r) / nats_per_bit_M).mean(),
            "bits per byte, worst": lambda r: (self.losses(r) / nats_per_bit_M).max(),
        }

    def ways(self, size: str) -> list[str]:
        return [way for way in arms.WAYS if self.runs.get(way + size)]

    def difference(self, label: str, metric: str) -> Difference:
        ours, theirs = (self.runs[arm] for arm in label.split(" - "))
        return Difference(ours, theirs, self.metrics[metric])


def results_of(records: dict[str, dict]) -> list[Results]:
    """The results of every source that has any."""
    found = []
    for name in SOURCES:
        mine = sorted((r for r in records.values() if r["source"] == name and "arm" in r), key=lambda r: r["seed"])
        if f"{name}/source" in records:
            runs = {arm: {r["seed"]: r for r in mine if r["arm"] == arm} for arm in ARMS}
            found.append(Results(name, records[f"{name}/source"], runs))
    return found


def claims(results: Results) -> list[str]:
    """What PLAN.md's rules make of a source's differences."""

    def verdicts(label: str) -> list[str]:
        return [results.difference(label, metric).judged[1] for metric in ("mean of domains", "worst domain")]

    said = []
    mean, worst = verdicts("count - oneshot")
    if mean not in ("missing", "one seed"):
        better = mean.startswith("better") and not worst.startswith("worse")
        worth = "worth their stage" if better else "not worth it" if mean.startswith("worse") else AS_GOOD
        said.append(f"masks that learn are {worth}{' (not by t)' * ('not by t' in mean)}")
    if results.runs["paper"]:
        helps = []
        for mix in (mix for mix in MIXES if mix != "uniform"):
            against = [verdicts(f"{mix} - {other}") for other in ("oneshot", "uniform")]
            if all(w.startswith("better") and not m.startswith("worse") for m, w in against):
                helps.append(mix + " (not by t)" * any("not by t" in w for _, w in against))
        said.append(f"mixes that help: {', '.join(helps) or 'none'}")
    return [f"- **Source {results.name}: {'; '.join(said)}.**"] * bool(said)


def differences_table(sources: list[Results], labels: Iterable[str]) -> str:
    rows = []
    for results, label in product(sources, labels):
        differences = [results.difference(label, metric) for metric in OVER]
        if differences[0].values:
            judged = [text for d in differences for text in d.judged]
            rows.append([f"{results.name}: {label}", len(differences[0].values), *judged])
    heads = ["difference [95 %]", "seeds", *(name for metric in OVER for name in (metric, "verdict"))]
    return markdown(heads, rows) if rows else ""


def seconds(record: dict) -> float:
    return sum(stage[key] for stage in record["stages"] for key in TIMES)


def arms_table(sources: list[Results]) -> str:
    rows = []
    for results in sources:
        of_source = (metric(results.source) for metric in results.metrics.values())
        rows.append([f"{results.name}: source", "", "", *of_source, "", "", ""])
        for arm, runs in ((arm, list(runs.values())) for arm, runs in results.runs.items() if runs):
            pruned = [results.losses(r, when="pruned").mean() for r in runs if "pruned" in r["loss"]]
            row = [f"{results.name}: {arm}", len(runs), np.mean(pruned) if pruned else ""]
            row += [np.mean([metric(r) for r in runs]) for metric in results.metrics.values()]
            whole = [r for r in runs if not any(r["resumed"])]
            row += [f"{np.mean([seconds(r) for r in whole]):.0f}" if whole else "-"]
            row += [f"{np.mean([max(r['peak_bytes']) for r in runs]) / 2**20:.0f}"]
            stages = [stage for r in runs for stage in r["stages"]]
            share, domain = max(max(zip(s["largest_share_M"], s["domains"], strict=True)) for s in stages)
            rows.append([*row, f"{100 * share:.0f} % {domain}"])
    measures = list(sources[0].metrics)
    return markdown(
        ["arm", "seeds", "mean after the pruning stage", *measures, "seconds", "MiB", "largest share"], rows
    )


def corrupted_table(sources: list[Results]) -> str:
    rows = []
    for results, text in product(sources, CORRUPTIONS):
        records = [list(results.runs[arm].values()) for arm in HEADLINE]
        if any(records):
            row = [np.mean([results.losses(r, text).mean() for r in runs]) if runs else "-" for runs in records]
            rows.append([f"{results.name}: {text}", results.losses(results.source, text).mean(), *row])
    return markdown(["text", "source", *HEADLINE], rows)


def law_table(sources: list[Results]) -> str:
    rows = []
    for results in sources:
        found = {"training the source": [results.source["law"].get("pretrain")]}
        found["paper"] = [r["law"].get("continue") for r in results.runs["paper"].values()]
        for what, errors in ((what, list(filter(None, errors))) for what, errors in found.items()):
            if errors:
                sizes = [np.abs([e[str(share)] for e in errors]).mean() for share in LAW]
                signed = np.mean([e["0.5"] for e in errors])
                rows.append([f"{results.name}: {what}", len(errors), *sizes, f"{signed:+.4f}"])
    return markdown(["run", "runs", *(f"{100 * share:.0f} % seen" for share in LAW), "signed, 50 %"], rows)


def tasks_table(sources: list[Results]) -> str:
    rows = []
    for results in sources:
        models = [("source", results.source["tasks"].get("source"))]
        for arm, runs in results.runs.items():
            models += [(f"{arm}, {when}", right) for r in runs.values() for when, right in r["tasks"].items()]
        rows += [[name, *(f"{acc:.0f} ({se:.0f})" for acc, se in right.values())] for name, right in models if right]
    names = next((source.tasks for source in SOURCES.values() if source.tasks), ())
    return markdown(["SmolLM2", *names], rows) if rows else "No runs yet."


def domains_table(sources: list[Results]) -> str:
    """The loss of SmolLM2's arms on each domain, after pruning and at the end."""
    rows, domains = [], []
    for results in (results for results in sources if SOURCES[results.name].tasks):
        domains = results.source["domains"]
        rows.append(["source", *results.losses(results.source)])
        for (arm, runs), when in product(results.runs.items(), ("pruned", "final")):
            if runs:
                mean_M = np.mean([results.losses(r, when=when) for r in runs.values()], axis=0)
                rows.append([f"{arm}, {when}", *mean_M])
    return markdown(["SmolLM2", *domains], rows) if rows else "No runs yet."


def course(record: dict, last_stage: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of a run up to each recorded moment, over all stages or in the last one, and the loss there."""
    points, before = [], 0.0
    for stage in record["stages"]:
        if last_stage:
            points = []
        points += [(before + took, loss) for _, took, loss in stage["course"]]
        before += stage["step_s"]
    return tuple(np.array(points).T)


def shares(record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Steps of a run's training up to each recorded moment, and the mix there, (moments, M)."""
    steps, ratio = zip(*record["stages"][-1]["ratio"], strict=True)
    return np.array(steps), np.array(ratio)


def movement(results: Results) -> str:
    """How far apart the mixes of two runs are on average: other windows, another seed, and no learning at all."""
    paper, windows, steadier = (
        {seed: shares(r)[1][1:] for seed, r in results.runs[arm].items()}  # all begin with p0
        for arm in ("paper", "paper-windows", "paper-32")
    )
    same = sorted(paper.keys() & windows.keys())
    if len(same) < 2:
        return ""
    pairs = {
        "other windows": [(paper[seed], windows[seed]) for seed in same],
        "from p0": [(paper[seed], results.source["p0"]) for seed in same],
        "another seed": list(combinations(paper.values(), 2)),
        "another seed with 32 windows": list(combinations(steadier.values(), 2)),
    }
    apart = {what: 100 * np.mean([np.abs(a - b).mean() for a, b in two]) for what, two in pairs.items() if two}
    return f"on {results.name} " + ", ".join(f"{what} {points:.1f}" for what, points in apart.items())


def dots(axis, y: float, d: Difference) -> None:
    colour = {"better": "C2", "worse": "C3"}.get(d.verdict, "0.4")
    axis.plot(d.values, [y] * len(d.values), ".", color=colour, alpha=0.4, ms=6)
    if d.values:
        inside = "white" if "not by t" in d.judged[1] else colour
        axis.errorbar(d.mean, y, xerr=[[end] for end in d.ends], fmt="o", color=colour, mfc=inside, capsize=3, ms=5)


SIZES = {"-half": "half", "": "quarter", "-16th": "sixteenth"}  # of a target, by the end of an arm's name


def plot_ways(sources: list[Results]):
    """The loss of every way to prune, every seed a dot; a source a row, targets side by side."""
    panels = [(r, size) for r, size in product(sources, SIZES) if len(r.ways(size)) > 1]
    n_rows = -(-len(panels) // 2) or 1
    grid = {"figsize": (9, 2.7 * n_rows), "sharex": "row", "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(n_rows, 2, **grid)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (results, size) in zip(axes.flat, panels, strict=False):
        ways = sorted(results.ways(size), key=lambda way: "alone" in way)
        for y, way in enumerate(ways[::-1]):
            for metric, colour in (("mean of domains", "C0"), ("worst domain", "C1")):
                values = [results.metrics[metric](r) for r in results.runs[way + size].values()]
                axis.plot(values, [y] * len(values), "o", color=colour, alpha=0.5, ms=5, label=metric * (y == 0))
        for metric, colour in (("mean of domains", "C0"), ("worst domain", "C1")):
            axis.axvline(results.metrics[metric](results.source), color=colour, lw=0.8, ls=":")
        axis.set_yticks(range(len(ways)), ways[::-1])
        axis.set_title(f"{results.name} to a {SIZES[size]}")
        axis.set_xlabel("nats (dotted: the source)")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


def plot_lengths(sources: list[Results]):
    """Masks by count minus one-shot pruning, by the share of all steps in which the masks learn."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for axis, metric in zip(axes, ("mean of domains", "worst domain"), strict=True):
        for i, (results, size) in enumerate(product(sources, ("", "-half"))):
            settings, points = SOURCES[results.name], []
            lengths = {f"count{size}": settings.count_steps} | {f"count-of{n}{size}": n for n in (64, 256, 512)}
            for arm, steps in sorted(lengths.items(), key=lambda item: item[1]):
                if results.runs.get(arm) and results.runs.get(f"oneshot{size}"):
                    d = results.difference(f"{arm} - oneshot{size}", metric)
                    points.append((100 * steps / settings.train.max_steps, d.mean, *d.ends))
            if points:
                (x, y), ends = np.split(np.array(points).T, [2])
                label, beside = f"{results.name} to a {SIZES[size]}", 0.5 * i  # bars of one length lie side by side
                axis.errorbar(x + beside, y, yerr=ends, fmt="o-", color=f"C{i}", capsize=3, ms=4, label=label)
        axis.axhline(0, color="k", lw=0.8)
        axis.set_title(metric)
        axis.set_xlabel("steps in which the masks learn (% of all)")
        axis.legend()
    axes[0].set_ylabel("nats, minus one-shot")
    return figure


def plot_seconds(sources: list[Results]):
    """The loss over seconds; of published masks after their stage, in which the model is still the whole one."""
    shown = [r for r in sources if len(r.ways("") or r.ways("-half")) > 1]
    figure, axes = plt.subplots(1, len(shown) or 1, figsize=(11, 3.4), layout="constrained", squeeze=False)
    for axis, results in zip(axes.flat, shown, strict=False):
        size = "" if results.ways("") else "-half"
        for way in (way for way in results.ways(size) if "random" not in way):
            courses = [course(r, way.startswith("published")) for r in results.runs[way + size].values()]
            n = min(len(x) for x, _ in courses)
            x, y = (np.mean([c[i][:n] for c in courses], axis=0) for i in (0, 1))
            colour, line = f"C{arms.STARTS.index(way.split('-')[0])}", ":" if "alone" in way else "-"
            axis.plot(x, y, line, color=colour, label=way)
        axis.set_ylim(top=max(line.get_ydata()[len(line.get_ydata()) // 4] for line in axis.lines))
        axis.set_title(f"{results.name} to a {SIZES[size]}")
        axis.set_xlabel("seconds of training steps, one thread")
    axes.flat[0].set_ylabel("loss on the steering windows (nats)")
    axes.flat[0].legend(fontsize=8)
    return figure


def plot_mixes(sources: list[Results]):
    """Each mix minus the constant one: seeds, mean and interval."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True, layout="constrained")
    rows = [(r, mix) for r in sources for mix in (*MIXES, *STEADIER) if r.runs[mix]][::-1]
    for axis, metric in zip(axes, OVER, strict=True):
        for y, (results, mix) in enumerate(rows):
            dots(axis, y, results.difference(f"{mix} - oneshot", metric))
        axis.axvline(0, color="k", lw=0.8)
        axis.locator_params(axis="x", nbins=5)
        axis.set_title(metric)
        axis.set_xlabel("nats, minus the constant mix")
    axes[0].set_yticks(range(len(rows)), [f"{r.name}: {mix} ({len(r.runs[mix])})" for r, mix in rows])
    figure.suptitle(
        "Seeds (their number in brackets), mean, 95 % interval; green: better, red: worse, hollow: not by t",
        fontsize=10,
    )
    return figure


def plot_shares(sources: list[Results]):
    """The mix of the first seed of paper and paper-windows: one text, other evaluations."""
    results = sources[0]
    figure, axes = plt.subplots(2, 3, figsize=(10, 4.6), sharex=True, sharey=True, layout="constrained")
    for axis, (m, domain) in zip(axes.flat, enumerate(results.source["domains"]), strict=False):
        for arm, colour in (("paper", "C0"), ("paper-windows", "C1"), ("bandit", "C2")):
            for seed, record in list(results.runs[arm].items())[:1]:
                steps, ratio = shares(record)
                axis.plot(steps, 100 * ratio[:, m], color=colour, label=f"{arm}, seed {seed}")
        axis.axhline(100 * results.source["p0"][m], color="0.5", lw=0.8, ls=":")
        axis.set_title(domain)
    figure.supxlabel("step (dotted: p0)", fontsize=10)
    figure.supylabel("share of the training tokens (%)", fontsize=10)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def plot_longer(sources: list[Results]):
    """SmolLM2 to a half by one-shot pruning: the loss over the steps, of a run like others and of a longer one."""
    figure, axis = plt.subplots(figsize=(7, 3.4), layout="constrained")
    for results, arm in product(sources, ("oneshot-half", "oneshot-half-tenfold")):
        for record in list(results.runs[arm].values())[:1]:
            steps, _, losses = zip(*record["stages"][-1]["course"][1:], strict=True)
            axis.plot(steps, losses, "o-", ms=4, label=f"{steps[-1]} steps, {record['config'][-1]['dtype']}")
            axis.axhline(np.mean(record["reference_losses"]), color="0.5", lw=0.8, ls=":")
    axis.set_xscale("log")
    axis.set_xlabel("step (dotted: the source)")
    axis.set_ylabel("loss on the steering windows (nats)")
    if axis.lines:
        axis.legend()
    return figure


PLOTS = {
    plot.__name__.removeprefix("plot_"): plot
    for plot in (plot_ways, plot_lengths, plot_seconds, plot_mixes, plot_shares, plot_longer)
}


def planned() -> list[str]:
    """Every run of PLAN.md, sources first."""
    studies = {study: sources for study, sources in STUDIES.items() if study != "sweep"}
    sources = dict.fromkeys(f"{name}/source" for names in studies.values() for name in names)
    return [*sources, *(run for study in studies for run in arms.runs(study))]


def read(path: str | Path) -> dict[str, dict]:
    """The records of planned runs, in the plan's order."""
    records = read_results(path)
    return {name: records[name] for name in planned() if name in records}


def page(records: dict[str, dict]) -> str:
    """RESULTS.md."""
    sources, runs = results_of(records), records.values()
    missing = Counter(name.partition("/")[0] for name in planned() if name not in records)
    headline = [results for results in sources if results.name in HEADLINE_SOURCES]
    others = [results for results in sources if results not in headline]
    exploratory = differences_table(others, (*DECIDING, *BY_MIX)), differences_table(sources, EXPLORATORY)
    facts = {
        "missing": (f"{n} of {source}" for source, n in missing.items()),
        "commits": (r["commit"] for r in runs),
        "dtypes": (stage["dtype"] for r in runs for stage in r["config"]),
        "versions": (f"{name} {version}" for r in runs for name, version in r["versions"].items()),
    }
    return PAGE.format(
        claims="\n".join(line for results in headline for line in claims(results)),
        deciding=differences_table(headline, DECIDING),
        mixes=differences_table(headline, BY_MIX),
        exploratory="\n\n".join(filter(None, exploratory)),
        arms=arms_table(sources),
        movement="; ".join(filter(None, map(movement, sources))) or "no runs yet",
        law=law_table(sources),
        corrupted=corrupted_table(sources),
        domains=domains_table(sources),
        tasks=tasks_table(sources),
        longer=LONGER_FIGURE if any(results.runs["oneshot-half-tenfold"] for results in sources) else "No runs yet.",
        n_runs=sum("arm" in r for r in runs),
        hours=f"{sum(map(seconds, runs)) / 3600:.1f}",
        **{fact: ", ".join(sorted(set(texts))) or "none" for fact, texts in facts.items()},
    )


@dataclass(frozen=True)
class Options:
    results: str = "experiments/results.jsonl"  # RESULTS.md and figures/ go into its folder


def main(opt: Options) -> None:
    records, out = read(opt.results), Path(opt.results).parent
    if not (sources := results_of(records)):
        raise UserError(f"{opt.results}: no results yet: make evidence makes them")
    (out / "RESULTS.md").write_text(page(records))
    (out / "figures").mkdir(exist_ok=True)
    pruned = [results for results in sources if any(results.runs.values())]
    for name, plot in PLOTS.items() if pruned else ():
        with plt.rc_context({"axes.grid": True, "grid.alpha": 0.3, "axes.titlesize": 10}):
            figure = plot(pruned)
        figure.savefig(out / "figures" / f"{name}.png", dpi=100)
        plt.close(figure)
    print(out / "RESULTS.md")


if __name__ == "__main__":
    configurator.command(main, Options)
