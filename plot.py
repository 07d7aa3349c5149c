"""Figures from metrics.jsonl alone; several runs are laid over each other, and a run may still be going on.

    python plot.py out/demo/prune                     # figures into that folder
    python plot.py out/a out/b out/c --out=out/compare    # several runs need a folder of their own

loss.png: validation loss of each domain, its reference loss, and the moving training loss. mix.png: the ratio of each
domain and its reference ratio. sparsity.png: expected against target sparsity of each mask, and the multipliers.
step_time.png: milliseconds a step, evaluation apart.
"""

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
import numpy as np

from configurator import UserError
from data.shards import DOMAIN
from metrics import read_metrics

MAX_PANELS = 200  # small plots in one figure
SMOOTH = 0.1  # weight of the newest point in the moving averages drawn


@dataclass(frozen=True)
class Run:
    name: str
    header: dict
    train: list[dict]
    evals: list[dict]


def read_run(folder: str) -> Run:
    """Raises UserError where there is no run, or one without any evaluation yet."""
    records = read_metrics(Path(folder, "metrics.jsonl"))
    kinds = {kind: [r for r in records if r["kind"] == kind] for kind in ("run", "train", "eval")}
    if not kinds["run"] or not kinds["eval"]:
        raise UserError(
            f"{folder}: no metrics.jsonl with an evaluation in it: give the out_dir of a run that has evaluated"
        )
    names = kinds["run"][0]["domains"] + [name for r in kinds["train"][:1] for name in r.get("sparsity", ())]
    if len(names) > MAX_PANELS or not all(DOMAIN.fullmatch(name) for name in names):
        raise UserError(
            f"{folder}: metrics.jsonl names {len(names)} domains and masks: expected at most {MAX_PANELS}, "
            "of letters, digits, '_', '.', '-'"
        )
    return Run(Path(folder).name, kinds["run"][0], kinds["train"], kinds["eval"])


def panels(names: list[str], title: str, y_label: str):
    """One small plot a name, shared axes labelled at the rim."""
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    size = (4.2 * columns + 2.4 / columns, 2.6 * rows + 1.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, squeeze=False, layout="constrained")
    figure.suptitle(title)
    figure.supylabel(y_label)
    for i, axis in enumerate(axes.flat):
        axis.set_visible(i < len(names))
        axis.set_title(names[i] if i < len(names) else "", fontsize=10)
        axis.grid(alpha=0.3)
        if i + columns >= len(names):  # nothing below it
            axis.set_xlabel("step")
            axis.tick_params(labelbottom=True)
    return figure, dict(zip(names, axes.flat, strict=False))


def finish(figure, axes: dict, path: Path) -> Path:
    drawn = [zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes.values()]
    entries = {label: line for pairs in drawn for line, label in pairs}
    columns = min(4, len(entries))
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", ncols=columns, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def smoothed(values: list[float | None]) -> list[float]:
    """Exponential moving average; a step without a value keeps the last."""
    out, average = [], math.nan
    for value in values:
        if value is not None:
            average = value if math.isnan(average) else (1 - SMOOTH) * average + SMOOTH * value
        out.append(average)
    return out


def column(records: list[dict], key: str, place: int | str) -> list:
    """records[...][key][place], place being a domain's number or a mask's name; None where there is no such value."""
    if isinstance(place, str):
        return [r.get(key, {}).get(place) for r in records]
    return [None if r.get(key) is None else r[key][place] for r in records]


def numbers(values: list) -> np.ndarray:
    return np.array([math.nan if v is None else v for v in values], dtype=float)


def colour(i: int) -> str:
    return f"C{i % 10}"


def plot_loss(runs: list[Run], out: Path) -> Path:
    domains = runs[0].header["domains"]
    figure, axes = panels(domains, "Validation loss and reference loss by domain", "loss (nats per token)")
    for i, run in enumerate(runs):
        for m, domain in enumerate(run.header["domains"]):
            if domain not in axes:
                continue
            steps = [r["step"] for r in run.evals]
            if len(runs) == 1:
                train_steps = [r["step"] for r in run.train]
                axes[domain].plot(
                    train_steps,
                    smoothed(column(run.train, "domain_loss", m)),
                    color="0.75",
                    lw=1,
                    label="training loss (moving average)",
                )
            axes[domain].plot(
                steps,
                numbers(column(run.evals, "val_loss", m)),
                color=colour(i),
                marker=".",
                ms=4,
                label=f"{run.name}: validation",
            )
            reference = numbers(column(run.evals, "reference_loss", m))
            if not np.isnan(reference).all():
                axes[domain].plot(steps, reference, color=colour(i), ls="--", lw=1, label=f"{run.name}: reference")
    return finish(figure, axes, out / "loss.png")


def plot_mix(runs: list[Run], out: Path) -> Path:
    domains = runs[0].header["domains"]
    figure, axes = panels(domains, "Share of each domain in the training tokens", "ratio")
    for i, run in enumerate(runs):
        steps = [r["step"] for r in run.evals]
        for m, domain in enumerate(run.header["domains"]):
            if domain in axes:
                draw, ratio = axes[domain].step, column(run.evals, "ratio", m)
                reference = column(run.evals, "reference_ratio", m)
                draw(steps, ratio, where="post", color=colour(i), label=f"{run.name}: ratio")
                draw(steps, reference, "--", where="post", color=colour(i), lw=1, label=f"{run.name}: reference ratio")
                axes[domain].set_ylim(bottom=0)
    return finish(figure, axes, out / "mix.png")


def plot_sparsity(runs: list[Run], out: Path) -> Path | None:
    runs = [run for run in runs if run.train and "sparsity" in run.train[0]]
    if not runs:
        return None
    masks = list(dict.fromkeys(mask for run in runs for mask in run.train[0]["sparsity"]))
    title = "Expected and target sparsity of each mask type, and its Lagrange multipliers"
    figure, axes = panels([*masks, "lambda1", "lambda2"], title, "share of units dead  |  multiplier (nats)")
    for i, run in enumerate(runs):
        steps = [r["step"] for r in run.train]
        for j, mask in enumerate(run.train[0]["sparsity"]):
            expected, target = column(run.train, "sparsity", mask), column(run.train, "target_sparsity", mask)
            axes[mask].plot(steps, expected, color=colour(i), label=f"{run.name}: expected sparsity")
            axes[mask].plot(steps, target, "k--", lw=1, label="target sparsity")
            for name in ("lambda1", "lambda2"):
                style = {"color": colour(j + len(runs)), "ls": "-" if i == 0 else ":"}
                axes[name].plot(steps, column(run.train, name, mask), **style, label=f"multiplier of {mask}")
    return finish(figure, axes, out / "sparsity.png")


def plot_step_time(runs: list[Run], out: Path) -> Path:
    figure, axes = panels([""], "Time of a training step (evaluation apart)", "ms a step")
    usual = 0.0
    for i, run in enumerate(r for r in runs if r.train):
        steps, ms = [r["step"] for r in run.train], [1e3 * r["step_s"] for r in run.train]
        axes[""].plot(steps, ms, ".", ms=2, alpha=0.4, color=colour(i))
        axes[""].plot(steps, smoothed(ms), color=colour(i), label=f"{run.name} (moving average)")
        usual = max(usual, np.percentile(ms, 95))
    axes[""].set_ylim(0, 1.3 * usual)  # a hiccup of the machine must not flatten the curves
    return finish(figure, axes, out / "step_time.png")


def plot(folders: list[str], out: str | Path) -> list[Path]:
    """Draw every figure the runs have data for; returns their paths."""
    runs, out = [read_run(folder) for folder in folders], Path(out)
    for depth in range(2, 9):  # out/a/prune and out/b/prune: as much of the path as tells them apart
        if len({run.name for run in runs}) < len(runs):
            names = ["/".join(Path(folder).parts[-depth:]) for folder in folders]
            runs = [replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    figures = [plot_loss(runs, out), plot_mix(runs, out), plot_sparsity(runs, out), plot_step_time(runs, out)]
    return [path for path in figures if path]


if __name__ == "__main__":
    runs = [a for a in sys.argv[1:] if not a.startswith("--")]
    options = dict(a[2:].partition("=")[::2] for a in sys.argv[1:] if a.startswith("--"))
    if not runs or set(options) - {"out"} or "" in options.values() or (len(runs) > 1 and "out" not in options):
        sys.exit(__doc__)
    try:
        print(*plot(runs, options.get("out", runs[0])), sep="\n")
    except UserError as error:
        sys.exit(f"error: {error}")
