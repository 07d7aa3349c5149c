"""make evidence: train the sources, then every run of PLAN.md that is not recorded yet.

    python -m experiments.run                       # all of it; killed at any point, it goes on when run again
    python -m experiments.run --study=smollm2       # the real model
    python -m experiments.run --shorten=32 --seeds=1 --out=out/short   # a rehearsal

Records go to results.jsonl in --out; the published ones are experiments/results.jsonl.

Each run is a process of its own with one thread: its stages are train.py's, its record one JSON line. Weights are
deleted when a run is recorded; its metrics.jsonl stay in --out, and the sources.
"""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

import configurator
import hf
import model as llama
import train
from configurator import UserError
from data.loader import DomainLoader
from data.shards import read_meta, sha256
from data.tokenizer import load_tokenizer
from dro import Mix
from evaluate import evaluate
from experiments import views
from experiments.arms import ARMS, SOURCES, STUDIES, Run, runs, shortened, source_config, source_folder, stages
from experiments.oneshot import one_shot
from prune import Masks, target_config

CALIBRATION = 64  # training windows that one-shot pruning looks at
HISTORY = 16  # points of the mix's course that are recorded for a stage
LAW_SEEDS = 3  # of constant and paper, whose histories the law is fitted to afterwards


@dataclass(frozen=True)
class Options:
    study: str = "evidence"  # evidence | smollm2
    out: str = "out/evidence"  # results.jsonl, metrics.jsonl of every stage, logs; weights while they are needed
    workers: int = 2  # runs at a time
    shorten: int = 1  # divides all steps, for a rehearsal
    seeds: int = 99  # at most so many of each arm
    only: str = ""  # one run, as A/paper/3 or A/source, in this process; its record goes to its folder


FOUND_OUT = train.FREE | {"domains", "ratios", "reference_losses", "init_from"}  # by the run, or no matter


def settings(configs: list[train.Config]) -> list[dict]:
    """What shapes a run's stages, as it comes back from JSON; the data is named by its view."""
    kept = [{k: v for k, v in asdict(cfg).items() if k not in FOUND_OUT} for cfg in configs]
    return json.loads(json.dumps([{**cfg, "data": Path(cfg["data"]).name} for cfg in kept]))


def planned(name: str, opt: Options) -> list[train.Config]:
    source, _, rest = name.partition("/")
    if rest == "source":
        configs = [source_config(source, opt.out)] if SOURCES[source].pretrain else []
    else:
        arm, seed = rest.split("/")
        configs = stages(Run(source, arm, int(seed)), opt.out, ("all",))
    return [shortened(cfg, opt.shorten) for cfg in configs]


# ---- one run


def domains_of(view: Path) -> tuple[str, ...]:
    return tuple(read_meta(view)["domains"])


def measured(folder: str, data: Path, seq_len: int, sets: tuple[str, ...]) -> dict[str, list[float]]:
    """Loss of the model in a folder on each domain of the evaluation sets, nats a token."""
    model, loss = hf.load(folder), {}
    for name in sets:
        val = DomainLoader(data / name, domains_of(data / name), seq_len, 0, "val")
        loss[name] = evaluate(model, val, int(val.size_M.max()), 16, "cpu").round(6).tolist()
    return loss


def bytes_per_token(val: DomainLoader, tokenizer) -> list[float]:
    """UTF-8 bytes of what is predicted in all windows of each domain."""
    windows = [val.read(val.fixed_batch(m, int(size)))[:, 1:] for m, size in enumerate(val.size_M)]
    return [sum(len(tokenizer.decode(w.tolist()).encode()) for w in ws) / ws.size for ws in windows]


def summary(cfg: train.Config) -> dict:
    """What metrics.jsonl says about a stage, in few numbers."""
    header, *records = train.read_metrics(Path(cfg.out_dir, "metrics.jsonl"))
    steps, evals = ([r for r in records if r["kind"] == kind] for kind in ("train", "eval"))
    points = np.unique(np.linspace(0, len(evals) - 1, HISTORY).round().astype(int))
    mask = {}
    if cfg.stage == "prune":
        gaps = [abs(s - steps[-1]["target_sparsity"][m]) for m, s in steps[-1]["sparsity"].items()]
        mask = {"sparsity_gap": max(gaps), "final_sparsity": steps[-1]["overall_sparsity"]}
    return {
        "stage": cfg.stage,
        "domains": header["domains"],
        "tokens": sum(evals[-1]["tokens"]),
        "tokens_M": evals[-1]["tokens"],
        "steps": len(steps),
        "updates": len(evals) - 1,
        "threads": header["threads"],
        "n_parameters": header["n_parameters"],
        "step_s": sum(r["step_s"] for r in steps),
        "median_step_s": float(np.median([r["step_s"] for r in steps])),
        "eval_s": sum(r["eval_s"] for r in evals),
        "mix_s": sum(r["mix_s"] for r in evals),
        "largest_share_M": np.max([r["ratio"] for r in evals], axis=0).round(4).tolist(),
        "ratio": [[evals[i]["step"], np.round(evals[i]["ratio"], 4).tolist()] for i in points],
        **mask,
    }


def predictions(cfg: train.Config, clip: bool) -> dict:
    """What the law would have predicted at each evaluation of a finished stage, and what was reached at its end."""
    header, *records = train.read_metrics(Path(cfg.out_dir, "metrics.jsonl"))
    evals = [r for r in records if r["kind"] == "eval"]
    mix = Mix(tuple(header["domains"]), np.array(evals[0]["ratio"]), "constant", clip_reference=clip)
    end = ()
    if header["target"]:
        shapes = [llama.LlamaConfig(**header[name]) for name in ("source", "target")]
        end = (Masks(*shapes, seed=0).overall_target(),)
    predicted = []
    for r in evals[1:]:
        sparsity = (r["overall_sparsity"], *end) if end else ()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # too few different points for a law: no prediction then
            mix.update(np.array(r["val_loss"]), np.array(r["tokens"]), r["step"] / cfg.max_steps, *sparsity)
        if mix.reference_loss_M is not None:
            predicted.append([r["step"] / cfg.max_steps, mix.reference_loss_M.round(4).tolist()])
    return {"predicted": predicted, "reached": evals[-1]["val_loss"]}


def prune_at_once(cfg: train.Config, source: str, target: dict, data: Path) -> None:
    """Write the model that the run continues with."""
    loader = DomainLoader(data / "plain", domains_of(data / "plain"), cfg.seq_len, cfg.seed - 1, "train")
    batch = loader.next_batch(0, loader.size_M / loader.size_M.sum(), CALIBRATION)
    tokens = torch.from_numpy(loader.read(batch)).long()[:, :-1]
    model = hf.load(source)
    small = one_shot(model, target_config(model.config, **target), tokens)
    hf.save(small, cfg.init_from)


def source_record(name: str, opt: Options, data: Path) -> dict:
    """Train the source if it is one of ours; its record, without hashes."""
    configs = planned(f"{name}/source", opt)
    for cfg in configs:
        train.main(cfg)
    seq_len = SOURCES[name].prune.seq_len
    val = DomainLoader(data / "heldout", domains_of(data / "heldout"), seq_len, 0, "val")
    size_M = DomainLoader(data / "plain", val.domains, seq_len, 0, "train").size_M
    tokenizer = load_tokenizer(read_meta(SOURCES[name].data), SOURCES[name].data)
    loss = measured(source_folder(name, opt.out), data, seq_len, views.EVALUATION)
    return {
        "domains": val.domains,
        "p0": (size_M / size_M.sum()).tolist(),
        "bytes_per_token": bytes_per_token(val, tokenizer),
        "stages": [summary(cfg) for cfg in configs],
        "loss": {"final": loss},
    }


def arm_record(run: Run, opt: Options, data: Path) -> dict:
    """Prune and continue; the run's record, without hashes."""
    source, arm, source_model = SOURCES[run.source], ARMS[run.arm], source_folder(run.source, opt.out)
    view, seq_len = data / arm.view, source.prune.seq_len
    reference = reference_losses(source_model, view, source.prune)
    configs = [shortened(cfg, opt.shorten) for cfg in stages(run, opt.out, domains_of(view), reference)]
    loss, peaks, resumed, carried = {}, [], [], {}
    if arm.start.startswith("oneshot"):
        prune_at_once(configs[0], source_model, source.targets[arm.target], data)
        loss["pruned"] = measured(configs[0].init_from, data, seq_len, ("heldout",))
    for cfg in configs:
        resumed.append(Path(cfg.out_dir, "metrics.jsonl").exists())
        train.main(replace(cfg, **carried))
        peaks.append(peak_bytes())
        if cfg.stage == "prune":
            loss["pruned"] = measured(f"{cfg.out_dir}/model", data, seq_len, ("heldout",))
        if arm.carries_mix:
            carried = {"ratios": last_ratio(cfg)}
    loss["final"] = measured(f"{configs[-1].out_dir}/model", data, seq_len, views.EVALUATION)
    record = {
        "arm": run.arm,
        "seed": run.seed,
        "reference_losses": reference,
        "loss": loss,
        "peak_bytes": peaks,
        "resumed": resumed,
        "stages": [summary(cfg) for cfg in configs],
    }
    if run.arm in ("constant", "paper") and run.seed <= LAW_SEEDS:
        record["law"] = {cfg.stage: {str(clip): predictions(cfg, clip) for clip in (True, False)} for cfg in configs}
    return record


def execute(name: str, opt: Options) -> dict:
    """Do one run from wherever it stands; returns its record."""
    source, _, rest = name.partition("/")
    data, start = Path(opt.out, source, "views"), time.time()
    record = {"run": name, "source": source, "commit": commit(), "config": settings(planned(name, opt))}
    record["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    if rest == "source":
        record |= source_record(source, opt, data)
        model = source_folder(source, opt.out)
    else:
        arm, seed = rest.split("/")
        record |= arm_record(Run(source, arm, int(seed)), opt, data)
        model = f"{planned(name, opt)[-1].out_dir}/model"
    record["hashes"] = {
        "data": sha256(data / "plain" / "meta.json"),
        "heldout": sha256(data / "heldout" / "meta.json"),
        "source": weights_hash(source_folder(source, opt.out)),
        "model": weights_hash(model),
    }
    return record | {"seconds": time.time() - start, "cpu_s": time.process_time()}


def last_ratio(cfg: train.Config) -> tuple[float, ...]:
    """The mix that a finished stage ended with."""
    evals = [r for r in train.read_metrics(Path(cfg.out_dir, "metrics.jsonl")) if r.get("kind") == "eval"]
    return tuple(evals[-1]["ratio"])


def peak_bytes() -> int:
    """Of this process so far. Not getrusage's, which begins at the peak of the process that started this one."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


def reference_losses(folder: str, view: Path, cfg: train.Config) -> tuple[float, ...]:
    """The source's loss on the windows that will steer the mix."""
    val = DomainLoader(view, domains_of(view), cfg.seq_len, 0, "val")
    return tuple(evaluate(hf.load(folder), val, cfg.eval_sequences, cfg.micro_batch_size, "cpu").tolist())


def weights_hash(folder: str) -> str:
    return sha256(sorted(Path(folder).glob("*.safetensors"))[0])


def commit() -> str:
    """Of the code, with a + where files differ from it; "" outside a repository."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--", "*.py") else "")


# ---- all runs


def read_results(path: str | Path) -> dict[str, dict]:
    """The recorded runs by name. Raises UserError for a line that is none."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    records = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            records[record["run"]] = record
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}:{number}: not a run's record: delete the line, to make it again") from None
    return records


def add_result(path: Path, record: dict) -> None:
    """Append a line: whoever reads or is killed sees it whole or not at all."""
    before = path.read_text() if path.exists() else ""
    beside = path.with_suffix(".tmp")
    beside.write_text(before + json.dumps(record) + "\n")
    os.replace(beside, path)


def in_own_process(name: str, opt: Options) -> dict | None:
    """The record of a run, None where it failed; what it said is in its log."""
    folder = Path(opt.out, name)
    folder.mkdir(parents=True, exist_ok=True)
    options = [f"--only={name}", f"--out={opt.out}", f"--shorten={opt.shorten}"]
    with open(folder / "log.txt", "a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "experiments.run", *options],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if process.wait():
            return None
    return json.loads((folder / "record.json").read_text())


def leave_with_parent() -> None:
    """End this process when the runner that started it is gone: its end of the pipe closes then."""
    sys.stdin.read()
    os._exit(1)


def forget_weights(folder: Path) -> None:
    for models in ("model", "oneshot", "step_*"):
        for made in list(folder.rglob(models)):
            shutil.rmtree(made, ignore_errors=True)


def check_recorded(done: dict[str, dict], names: list[str], opt: Options) -> None:
    """Raises UserError for a record of other settings; one that its Config did not have yet is at its default."""
    for name in (name for name in names if name in done):
        now, then = settings(planned(name, opt)), done[name]["config"]
        if len(now) != len(then) or any(
            old.get(k, v) != v for new, old in zip(now, then, strict=True) for k, v in new.items()
        ):
            raise UserError(
                f"{opt.out}/results.jsonl: {name} was made with other settings than "
                "experiments/arms.py has: give another --out, or delete its line"
            )


def same_source(done: dict[str, dict]) -> None:
    """Raises UserError where runs of one source did not start from the same weights and text."""
    for record in done.values():
        of_source = done.get(f"{record['source']}/source", record)
        for what in ("source", "data", "heldout"):
            if record["hashes"][what] != of_source["hashes"][what]:
                raise UserError(
                    f"{record['run']}: its {what} is not that of {record['source']}/source: the text "
                    "or the machine changed: begin anew with another --out"
                )


def in_parallel(names: list[str], opt: Options) -> Generator[tuple[str, dict | None], None, None]:
    """(name, record or None) of each run as it ends; once it is closed no other run is begun."""
    pool = ThreadPoolExecutor(opt.workers)
    try:
        jobs = {pool.submit(in_own_process, name, opt): name for name in names}
        for job in as_completed(jobs):
            yield jobs[job], job.result()
    finally:
        pool.shutdown(cancel_futures=True)


def main(opt: Options) -> bool:
    """Make the runs that are missing; True when all are there. Raises UserError, UserError, UserError."""
    out = Path(opt.out)
    results = out / "results.jsonl"
    if opt.study not in STUDIES:
        raise UserError(f"study = {opt.study!r}: must be one of {', '.join(STUDIES)}")
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "lock", "w")  # noqa: SIM115 (held until the process ends)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{out}: another runner is at work there") from None
    arms, sources = [str(run) for run in runs(opt.study, opt.seeds)], [f"{name}/source" for name in STUDIES[opt.study]]
    done = read_results(results)
    check_recorded(done, sources + arms, opt)
    for name in (name for name in arms if name in done):
        forget_weights(out / name)  # of a run that ended just before the runner was killed
    for name in STUDIES[opt.study]:
        source = SOURCES[name]
        views.build(source.data, out / name / "views", source.prune.seq_len, source.windows, source.corrupted_windows)
    missing = [name for name in arms if name not in done]
    needed = {name.partition("/")[0] for name in missing}  # a source whose weights are gone is trained again
    gone = {f"{name}/source" for name in needed if not Path(source_folder(name, opt.out)).exists()}
    first = [name for name in sources if name not in done or name in gone]
    print(f"{opt.study}, in {out}: {len(first)} sources and {len(missing)} of {len(arms)} runs to do", flush=True)
    for names in (first, missing):  # runs need their source
        begun = time.time()
        with closing(in_parallel(names, opt)) as ended:
            for n, (name, record) in enumerate(ended, start=1):
                if record is None:
                    print(f"{name}: failed, see {out / name / 'log.txt'}", flush=True)
                    continue
                same_source(done | {name: record})
                if name not in done:
                    add_result(results, record)
                done[name] = record
                if names is missing:
                    forget_weights(out / name)
                left_s, loss = (time.time() - begun) / n * (len(names) - n), np.mean(record["loss"]["final"]["heldout"])
                print(f"{n}/{len(names)} {name}: {record['seconds']:.0f} s, loss {loss:.4f}", end="; ")
                print(f"{left_s / 60:.0f} min left", flush=True)
    return all(name in done for name in sources + arms)


def start(opt: Options) -> None:
    if opt.only:
        threading.Thread(target=leave_with_parent, daemon=True).start()
        torch.set_num_threads(1)
        beside = Path(opt.out, opt.only, "record.tmp")
        beside.write_text(json.dumps(execute(opt.only, opt)))
        os.replace(beside, beside.with_name("record.json"))
    elif not main(opt):
        sys.exit("some runs are missing: run again to try them again")


if __name__ == "__main__":
    try:
        start(configurator.load(Options, sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {error}")
    except train.Stopped as stopped:
        sys.exit(str(stopped))
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on")
