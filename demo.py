"""The whole method on real text: pretrain, prune, continue; then what happened, domain by domain.

`make demo` calls this. Stopped half-way, it goes on where it was; finished, it only shows the summary again.
Writes out/demo/summary.json and figures in out/demo and in the folder of each stage.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

import configurator
import evaluate
import hf
import plot
import train
from data.loader import DomainLoader
from metrics import read_metrics

OUT = Path("out/demo")
STAGES = {"pretrain": "source", "prune": "extracted", "continue": "continued"}  # stage: the model it leaves
SEQUENCES = 64  # validation windows a domain in the final table


@dataclass(frozen=True)
class Config:
    """The demo has no settings of its own; those of its stages are in config/demo_*.py."""


def steps_of(stage: str, kind: str = "train") -> list[dict]:
    return [r for r in read_metrics(OUT / stage / "metrics.jsonl") if r["kind"] == kind]


def step_ms(stage: str, first: float, last: float) -> float:
    """The median time of the steps between two shares of the stage's run."""
    steps = steps_of(stage)
    return 1e3 * median(r["step_s"] for r in steps[int(first * len(steps)) : int(last * len(steps))])


def summary(cfg: train.Config) -> dict:
    """Losses and sizes of the three models and times of the three stages."""
    val = DomainLoader(cfg.data, tuple(steps_of("prune", "run")[0]["domains"]), cfg.seq_len, cfg.seed, "val")
    models = {name: hf.load(OUT / stage / "model", cfg.device) for stage, name in STAGES.items()}
    loss = {name: evaluate.evaluate(m, val, SEQUENCES, 8, cfg.device) for name, m in models.items()}
    bits = {name: evaluate.bits_per_byte(loss_M, val) for name, loss_M in loss.items()}
    train_s = {stage: sum(r["step_s"] for r in steps_of(stage)) for stage in STAGES}
    eval_s = {stage: sum(r["eval_s"] + r["mix_s"] for r in steps_of(stage, "eval")) for stage in STAGES}
    print(f"validation, {SEQUENCES} windows of {cfg.seq_len} tokens a domain; loss in nats per token:")
    print(evaluate.table(val.domains, loss))
    print("bits per byte of text:")
    print(evaluate.table(val.domains, bits))
    return {
        "domains": list(val.domains),
        "loss": {name: x.tolist() for name, x in loss.items()},
        "bits_per_byte": {name: x.tolist() for name, x in bits.items()},
        "mean_loss": {name: float(np.mean(x)) for name, x in loss.items()},
        "parameters": {n: [m.n_parameters(), m.n_parameters(embeddings=False)] for n, m in models.items()},
        "step_ms": {
            "source": step_ms("pretrain", 0.1, 1.0),
            "pruning, first tenth": step_ms("prune", 0.0, 0.1),
            "pruning, last half": step_ms("prune", 0.5, 1.0),
            "pruned model": step_ms("continue", 0.1, 1.0),
        },
        "evaluation_and_mix_share": eval_s["prune"] / (eval_s["prune"] + train_s["prune"]),
        "seconds": sum(train_s.values()) + sum(eval_s.values()),
    }


def main(_: Config) -> None:
    for stage in STAGES:
        print(f"\n==== {stage} ====", flush=True)
        cfg = configurator.load(train.Config, [f"config/demo_{stage}.py", "--resume"])
        train.main(cfg)
    print("\n==== summary ====", flush=True)
    found = summary(cfg)
    print("parameters, and how many of them are not embeddings:")
    for name, (everything, non_embedding) in found["parameters"].items():
        print(f"  {name:10} {everything:>10,} {non_embedding:>10,}")
    print("median time of a training step:")
    for name, ms in found["step_ms"].items():
        print(f"  {name:21} {ms:7.0f} ms")
    print(f"evaluation and mix took {found['evaluation_and_mix_share']:.1%} of the pruning time")
    (OUT / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    figures = [path for stage in STAGES for path in plot.plot([OUT / stage], OUT / stage)]
    figures += [plot.plot_step_time([plot.read_run(OUT / stage) for stage in STAGES], OUT)]
    print(f"\n{found['seconds']:.0f} s of training; numbers in {OUT / 'summary.json'}, figures:")
    print(*figures, sep="\n")


if __name__ == "__main__":
    configurator.command(main, Config)
