"""Figures from metrics.jsonl alone; several runs are laid over each other, and a run may still be going on.

    python plot.py out/demo/prune                     # figures into that folder
    python plot.py out/a out/b out/c --out=out/compare

loss.png: validation loss of each domain, its reference loss, and the moving training loss. mix.png: the ratio of each
domain and its reference ratio. sparsity.png: expected against target sparsity of each mask, and the multipliers.
step_time.png: milliseconds a step, evaluation apart.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
import numpy as np

import configurator
from configurator import UserError
from metrics import read_metrics

SMOOTH = 0.1  # weight of the newest point in the moving averages drawn


@dataclass(frozen=True)
class Run:
    name: str
    domains: list[str]
    train: list[dict]
    evals: list[dict]


def read_run(folder: str | Path) -> Run:
    """Raises UserError where there is no run, or one without any evaluation yet."""
    records = read_metrics(Path(folder, "metrics.jsonl"))
    runs, train, evals = ([r for r in records if r["kind"] == kind] for kind in ("run", "train", "eval"))
    if not runs or not evals:
        raise UserError(f"{folder}: no metrics.jsonl with an evaluation: give the out_dir of a run that has evaluated")
    return Run(Path(folder).name, runs[0]["domains"], train, evals)


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
    """One legend below all panels."""
    entries = {}
    for axis in axes.values():
        entries |= {line.get_label(): line for line in axis.get_legend_handles_labels()[0]}
    columns = max(1, min(4, len(entries)))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def smoothed(values: Iterable[float]) -> list[float]:
    """Exponential moving average; a step without a value keeps the last."""
    out, average = [], math.nan
    for value in values:
        if not math.isnan(value):
            average = value if math.isnan(average) else (1 - SMOOTH) * average + SMOOTH * value
        out.append(average)
    return out


def line(axis, records: list[dict], key: str, place: int | str, smooth: bool = False, **style) -> None:
    """records[...][key][place] over the steps, with the number of a domain or the name of a mask; gaps where None."""
    values = np.array([None if r.get(key) is None else r[key][place] for r in records], dtype=float)
    if not np.isnan(values).all():
        axis.plot([r["step"] for r in records], smoothed(values) if smooth else values, **style)


def union(names: Iterable[Iterable[str]]) -> list[str]:
    return list(dict.fromkeys(name for some in names for name in some))


def plot_loss(runs: list[Run], out: Path) -> Path:
    domains = union(run.domains for run in runs)
    figure, axes = panels(domains, "Validation loss and reference loss by domain", "loss (nats per token)")
    training = {"color": "0.75", "lw": 1, "label": "training loss (moving average)"}
    for i, run in enumerate(runs):
        colour = f"C{i % 10}"
        for m, axis in enumerate(axes[domain] for domain in run.domains):
            if len(runs) == 1:
                line(axis, run.train, "domain_loss", m, smooth=True, **training)
            line(axis, run.evals, "val_loss", m, color=colour, marker=".", ms=4, label=f"{run.name}: validation")
            line(axis, run.evals, "reference_loss", m, color=colour, ls="--", lw=1, label=f"{run.name}: reference")
    return finish(figure, axes, out / "loss.png")


def plot_mix(runs: list[Run], out: Path) -> Path:
    domains = union(run.domains for run in runs)
    figure, axes = panels(domains, "Share of each domain in the training tokens", "ratio")
    for i, run in enumerate(runs):
        style = {"color": f"C{i % 10}", "drawstyle": "steps-post"}
        for m, axis in enumerate(axes[domain] for domain in run.domains):
            line(axis, run.evals, "ratio", m, label=f"{run.name}: ratio", **style)
            line(axis, run.evals, "reference_ratio", m, ls="--", lw=1, label=f"{run.name}: reference ratio", **style)
            axis.set_ylim(bottom=0)
    return finish(figure, axes, out / "mix.png")


def plot_sparsity(runs: list[Run], out: Path) -> Path | None:
    """None where no run prunes."""
    masks = union(run.train[0].get("sparsity", ()) for run in runs if run.train)
    if not masks:
        return None
    title = "Expected and target sparsity of each mask type, and its Lagrange multipliers"
    figure, axes = panels([*masks, "lambda1", "lambda2"], title, "share of units pruned  |  multiplier (nats)")
    runs = [run for run in runs if run.train and "sparsity" in run.train[0]]
    for i, run in enumerate(runs):
        for j, mask in enumerate(run.train[0]["sparsity"]):
            line(axes[mask], run.train, "sparsity", mask, color=f"C{i % 10}", label=f"{run.name}: expected sparsity")
            line(axes[mask], run.train, "target_sparsity", mask, color="k", ls="--", lw=1, label="target sparsity")
            style = {"color": f"C{(j + len(runs)) % 10}", "ls": "-" if i == 0 else ":"}
            for name in ("lambda1", "lambda2"):
                line(axes[name], run.train, name, mask, label=f"multiplier of {mask}", **style)
    return finish(figure, axes, out / "sparsity.png")


def plot_step_time(runs: list[Run], out: Path) -> Path:
    figure, axes = panels([""], "Time of a training step (evaluation apart)", "ms a step")
    usual = 1.0
    for i, run in enumerate(r for r in runs if r.train):
        steps, ms = zip(*((r["step"], 1e3 * r["step_s"]) for r in run.train), strict=True)
        axes[""].plot(steps, ms, ".", ms=2, alpha=0.4, color=f"C{i % 10}")
        axes[""].plot(steps, smoothed(ms), color=f"C{i % 10}", label=f"{run.name} (moving average)")
        usual = max(usual, np.percentile(ms, 95))
    axes[""].set_ylim(0, 1.3 * usual)  # a hiccup of the machine must not flatten the curves
    return finish(figure, axes, out / "step_time.png")


def plot(folders: list[str | Path], out: str | Path) -> list[Path]:
    """Draw every figure the runs have data for; returns their paths."""
    runs, out = [read_run(folder) for folder in folders], Path(out)
    if len(runs) > 1:  # out/a/prune and out/b/prune are a/prune and b/prune
        above = os.path.commonpath([os.path.abspath(f) for f in folders])
        runs = [replace(run, name=os.path.relpath(f, above)) for run, f in zip(runs, folders, strict=True)]
    out.mkdir(parents=True, exist_ok=True)
    figures = [draw(runs, out) for draw in (plot_loss, plot_mix, plot_sparsity, plot_step_time)]
    return [path for path in figures if path]


@dataclass(frozen=True)
class Config:
    out: str = ""  # folder for the figures; "" = that of the first run


def main(cfg: Config, *folders: str) -> None:
    print(*plot(list(folders), cfg.out or folders[0]), sep="\n")


if __name__ == "__main__":
    configurator.command(main, Config, words=(1, 99))
