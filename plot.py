"""Figures from metrics.jsonl alone; several runs are laid over each other, and a run may still be going on.

    python plot.py out/demo/prune                     # figures into that folder
    python plot.py out/a out/b out/c --out=out/compare

loss.png: validation loss of each domain, its reference loss, and the moving training loss. mix.png: the ratio of each
domain and its reference ratio. sparsity.png: the share of units pruned of each mask type against its target; for masks
by count the share of units that compete for their place, and how many units have come in since the evaluation
before; for published masks the multipliers. step_time.png: milliseconds a step, evaluation apart.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only: no display is needed
import matplotlib.pyplot as plt
import numpy as np

import configurator
from configurator import UserError
from metrics import read_metrics

OF_MASKS = {  # a number for each mask type: what it is, and in which records
    "on_slope": ("share of units that compete", "train"),
    "entered": ("units that came in since the evaluation before", "evals"),
    "lambda1": ("lambda1 (nats)", "train"),
    "lambda2": ("lambda2 (nats)", "train"),
}
SMOOTH = 0.1  # weight of the newest point in the moving averages drawn


@dataclass(frozen=True)
class Run:
    name: str
    domains: list[str]
    train: list[dict]
    evals: list[dict]


def read_run(folder: str | Path, name: str = "") -> Run:
    """name: in the legends; that of the folder by default. Raises UserError for a run without an evaluation."""
    records = read_metrics(Path(folder, "metrics.jsonl"))
    train, evals = ([r for r in records if r["kind"] == kind] for kind in ("train", "eval"))
    if not evals:
        raise UserError(f"{folder}: no metrics.jsonl with an evaluation: give the out_dir of a run that has evaluated")
    return Run(name or Path(folder).name, records[0]["domains"], train, evals)


def panels(names: Iterable[str], title: str, y_label: str):
    """One small plot a name, shared axes labelled at the rim."""
    names = list(dict.fromkeys(names))
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    size = (4.2 * columns + 2.4 / columns, 2.6 * rows + 1.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, sharex=True, squeeze=False, layout="constrained")
    figure.suptitle(title)
    figure.supylabel(y_label)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    for name, axis in zip(names, axes.flat, strict=False):
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) - columns : len(names)]:  # nothing below these
        axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)
    return figure, dict(zip(names, axes.flat, strict=False))


def finish(figure, axes: dict, path: Path) -> Path:
    """One legend below all panels."""
    entries = {line.get_label(): line for a in axes.values() for line in a.get_legend_handles_labels()[0]}
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


def plot_loss(runs: list[Run], out: Path) -> Path:
    domains = (domain for run in runs for domain in run.domains)
    figure, axes = panels(domains, "Validation loss and reference loss by domain", "loss (nats per token)")
    training = {"color": "0.75", "lw": 1, "label": "training loss (moving average)"}
    for i, run in enumerate(runs):
        for m, axis in enumerate(axes[domain] for domain in run.domains):
            if len(runs) == 1:
                line(axis, run.train, "domain_loss", m, smooth=True, **training)
            line(axis, run.evals, "val_loss", m, color=f"C{i}", marker=".", ms=4, label=f"{run.name}: validation")
            line(axis, run.evals, "reference_loss", m, color=f"C{i}", ls="--", lw=1, label=f"{run.name}: reference")
    return finish(figure, axes, out / "loss.png")


def plot_mix(runs: list[Run], out: Path) -> Path:
    domains = (domain for run in runs for domain in run.domains)
    figure, axes = panels(domains, "Share of each domain in the training tokens", "ratio")
    for i, run in enumerate(runs):
        style = {"color": f"C{i}", "drawstyle": "steps-post"}
        for m, axis in enumerate(axes[domain] for domain in run.domains):
            line(axis, run.evals, "ratio", m, label=f"{run.name}: ratio", **style)
            line(axis, run.evals, "reference_ratio", m, ls="--", lw=1, label=f"{run.name}: reference ratio", **style)
            axis.set_ylim(bottom=0)
    return finish(figure, axes, out / "mix.png")


def plot_sparsity(runs: list[Run], out: Path) -> Path:
    """Of the runs that prune."""
    shown = [key for key in OF_MASKS if any(key in run.train[0] for run in runs)]
    names = [mask for run in runs for mask in run.train[0]["sparsity"]] + [OF_MASKS[key][0] for key in shown]
    figure, axes = panels(names, "Sparsity of each mask type, and how the masks move", "share of units pruned")
    for i, run in enumerate(runs):
        for j, mask in enumerate(run.train[0]["sparsity"], len(runs)):
            line(axes[mask], run.train, "sparsity", mask, color=f"C{i}", label=f"{run.name}: sparsity")
            line(axes[mask], run.train, "target_sparsity", mask, color="k", ls="--", lw=1, label="target sparsity")
            style = {"color": f"C{j}", "ls": "-" if i == 0 else ":", "label": f"of {mask}"}
            for key in shown:
                line(axes[OF_MASKS[key][0]], getattr(run, OF_MASKS[key][1]), key, mask, **style)
    return finish(figure, axes, out / "sparsity.png")


def plot_step_time(runs: list[Run], out: Path) -> Path:
    figure, axes = panels([""], "Time of a training step (evaluation apart)", "ms a step")
    usual = 1.0
    for i, run in enumerate(r for r in runs if r.train):
        steps, ms = zip(*((r["step"], 1e3 * r["step_s"]) for r in run.train), strict=True)
        axes[""].plot(steps, ms, ".", ms=2, alpha=0.4, color=f"C{i}")
        axes[""].plot(steps, smoothed(ms), color=f"C{i}", label=f"{run.name} (moving average)")
        usual = max(usual, np.percentile(ms, 95))
    axes[""].set_ylim(0, 1.3 * usual)  # a hiccup of the machine must not flatten the curves
    return finish(figure, axes, out / "step_time.png")


def plot(folders: list[str | Path], out: str | Path) -> list[Path]:
    """Draw every figure the runs have data for; returns their paths."""
    above = os.path.commonpath([os.path.dirname(os.path.abspath(f)) for f in folders])
    runs = [read_run(f, os.path.relpath(f, above)) for f in folders]  # out/a/prune and out/b/prune: a/prune and b/prune
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    pruning = [run for run in runs if run.train and "sparsity" in run.train[0]]
    figures = [plot_loss(runs, out), plot_mix(runs, out), *([plot_sparsity(pruning, out)] if pruning else [])]
    return [*figures, plot_step_time(runs, out)]


@dataclass(frozen=True)
class Config:
    out: str = ""  # folder for the figures; "" = that of the first run


def main(cfg: Config, *folders: str) -> None:
    print(*plot(list(folders), cfg.out or folders[0]), sep="\n")


if __name__ == "__main__":
    configurator.command(main, Config, words=(1, 99))
