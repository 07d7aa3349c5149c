"""The whole method on real text: pretrain, prune, continue; then what happened, domain by domain.

`make demo` calls this. Stopped half-way, it goes on where it was; finished, it only shows the summary again.
Writes out/demo/summary.json and figures in out/demo and in the folder of each stage.
"""

import json
import sys
from pathlib import Path
from statistics import median

import numpy as np

import configurator
import evaluate
import hf
import plot
import train
from configurator import UserError
from data.loader import DomainLoader
from metrics import read_metrics

OUT = Path("out/demo")
STAGES = ("pretrain", "prune", "continue")
NAMES = {"pretrain": "source", "prune": "extracted", "continue": "continued"}
SEQUENCES = 64  # validation windows a domain in the final table


def step_ms(stage: str, share: slice) -> float:
    """Median time of the steps in a share of the stage's run."""
    steps = [r for r in read_metrics(OUT / stage / "metrics.jsonl") if r["kind"] == "train"]
    return 1e3 * median(r["step_s"] for r in steps[int(share.start * len(steps)) : int(share.stop * len(steps))])


def time_spent(stage: str) -> tuple[float, float]:
    """Seconds of the stage's steps, and of its evaluations with the mix."""
    records = read_metrics(OUT / stage / "metrics.jsonl")
    evaluation_s = sum(r["eval_s"] + r["mix_s"] for r in records if r["kind"] == "eval")
    return sum(r["step_s"] for r in records if r["kind"] == "train"), evaluation_s


def main() -> None:
    for stage in STAGES:
        print(f"\n==== {stage} ====", flush=True)
        cfg = configurator.load(train.Config, [f"config/demo_{stage}.py", "--resume"])
        train.main(cfg)

    print("\n==== summary ====", flush=True)
    run = read_metrics(OUT / "prune" / "metrics.jsonl")[0]
    val = DomainLoader(cfg.data, tuple(run["domains"]), cfg.seq_len, cfg.seed, "val")
    models = {NAMES[stage]: hf.load(OUT / stage / "model", cfg.device) for stage in STAGES}
    loss = {name: evaluate.evaluate(m, val, SEQUENCES, 8, cfg.device) for name, m in models.items()}
    bits = {name: evaluate.bits_per_byte(loss_M, val) for name, loss_M in loss.items()}
    parameters = {
        name: {"all": m.n_parameters(), "non_embedding": m.n_parameters(embeddings=False)} for name, m in models.items()
    }
    times = {
        "source": step_ms("pretrain", slice(0.1, 1.0)),
        "pruning, first tenth": step_ms("prune", slice(0.0, 0.1)),
        "pruning, last half": step_ms("prune", slice(0.5, 1.0)),
        "pruned model": step_ms("continue", slice(0.1, 1.0)),
    }
    spent = {stage: time_spent(stage) for stage in STAGES}
    seconds = sum(sum(s) for s in spent.values())
    step_s, mix_s = spent["prune"]

    print(f"validation, {SEQUENCES} windows of {cfg.seq_len} tokens a domain; loss in nats per token:")
    print(evaluate.table(val.domains, loss))
    print("bits per byte of text:")
    print(evaluate.table(val.domains, bits))
    print("parameters (of them not embeddings):")
    for name, n in parameters.items():
        print(f"  {name:10} {n['all']:>10,} ({n['non_embedding']:,})")
    print("median time of a training step:")
    for name, ms in times.items():
        print(f"  {name:21} {ms:7.0f} ms")
    print(f"evaluation and mix took {100 * mix_s / (mix_s + step_s):.1f} % of the pruning time")

    summary = {
        "domains": list(val.domains),
        "seq_len": cfg.seq_len,
        "windows_per_domain": SEQUENCES,
        "loss": {name: x.tolist() for name, x in loss.items()},
        "bits_per_byte": {name: x.tolist() for name, x in bits.items()},
        "mean_loss": {name: float(np.mean(x)) for name, x in loss.items()},
        "parameters": parameters,
        "step_ms": times,
        "evaluation_and_mix_share": mix_s / (mix_s + step_s),
        "training_seconds": seconds,
    }
    (OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    figures = [path for stage in STAGES for path in plot.plot([OUT / stage], OUT / stage)]
    figures += [plot.plot_step_time([plot.read_run(OUT / stage) for stage in STAGES], OUT)]
    print(f"\n{seconds:.0f} s of training; numbers in {OUT / 'summary.json'}, figures:")
    print(*figures, sep="\n")


if __name__ == "__main__":
    try:
        main()
    except train.Stopped as stopped:
        print(f"{stopped}; make demo goes on from there")
    except UserError as error:
        sys.exit(f"error: {error}\n(rm -r {OUT} starts the demo from the beginning)")
