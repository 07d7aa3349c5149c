"""The whole method on real text: pretrain, prune, continue; then what happened, domain by domain.

`make demo` calls this. Stopped half-way, it goes on where it was; finished, it shows the summary again.
Writes figures in out/demo and in the folder of each stage.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import median

import configurator
import evaluate
import hf
import plot
import train
from data.loader import DomainLoader

OUT = Path("out/demo")
STAGES = {"pretrain": "source", "prune": "extracted", "continue": "continued"}  # stage: the model it leaves
SEQUENCES = 64  # validation windows a domain in the final table
STEPS = {  # which steps are timed: stage, from and to which share of it
    "source": ("pretrain", 0.1, 1.0),
    "pruning, first tenth": ("prune", 0.0, 0.1),
    "pruning, last half": ("prune", 0.5, 1.0),
    "pruned model": ("continue", 0.1, 1.0),
}


@dataclass(frozen=True)
class Config:
    """The demo has no settings of its own; those of its stages are in config/demo_*.py."""


def main(_: Config) -> None:
    for stage in STAGES:
        print(f"\n==== {stage} ====", flush=True)
        cfg = configurator.load(train.Config, [f"config/demo_{stage}.py", "--resume"])
        train.main(cfg)
    print("\n==== summary ====", flush=True)
    runs = {stage: plot.read_run(OUT / stage) for stage in STAGES}
    val = DomainLoader(cfg.data, tuple(runs["prune"].domains), cfg.seq_len, cfg.seed, "val")
    models = {name: hf.load(OUT / stage / "model", cfg.device) for stage, name in STAGES.items()}
    loss = {name: evaluate.evaluate(m, val, SEQUENCES, 8, cfg.device) for name, m in models.items()}
    print(f"validation, {SEQUENCES} windows of {cfg.seq_len} tokens a domain; loss in nats per token:")
    print(evaluate.table(val.domains, loss))
    print("parameters, and how many of them are not embeddings:")
    for name, model in models.items():
        print(f"  {name:10} {model.n_parameters():>10,} {model.n_parameters(embeddings=False):>10,}")
    print("median time of a training step:")
    for name, (stage, first, last) in STEPS.items():
        seconds = [r["step_s"] for r in runs[stage].train]
        ms = 1e3 * median(seconds[int(first * len(seconds)) : int(last * len(seconds))])
        print(f"  {name:21} {ms:7.0f} ms")
    figures = [path for stage in STAGES for path in plot.plot([OUT / stage], OUT / stage)]
    print("\nfigures:", *figures, plot.plot_step_time(list(runs.values()), OUT), sep="\n")


if __name__ == "__main__":
    configurator.command(main, Config)
