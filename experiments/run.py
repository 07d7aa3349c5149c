"""make evidence: train the sources, then every run of PLAN.md that is not recorded yet.

    python -m experiments.run --study=A             # one study; a killed runner goes on when it is run again

Each run is a process with one thread, or as many as OMP_NUM_THREADS says. Its stages are train.py's; its record is one
JSON line of results.jsonl in --out. Weights are deleted when a run is recorded. The sources' weights and every stage's
metrics.jsonl stay.
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tqdm import tqdm

import configurator
import hf
import train
from checkpoint import Lock
from configurator import UserError
from data.loader import DomainLoader
from data.shards import read_meta, sha256
from data.tokenizer import load_tokenizer
from dro import Mix
from evaluate import evaluate
from experiments import tasks, views
from experiments.arms import ARMS, HEADLINE, SOURCES, STUDIES, runs, source_folder, stages
from metrics import read_metrics
from model import Llama
from out import MAY_CHANGE_ON_RESUME

HISTORY = 16  # points of a stage's course that are recorded
LAW = (0.25, 0.5, 0.75)  # shares of a stage that the law has seen
DOCUMENTS = 100  # of each zero-shot task
# What a run sets itself is no setting.
FOUND_OUT = MAY_CHANGE_ON_RESUME | {"domains", "ratios", "reference_losses", "init_from", "teacher"}
ANEW = "begin anew with another --out"


@dataclass(frozen=True)
class Options:
    study: str = "A"  # A | B | smollm2 | languages | law | added | longer | sweep
    out: str = "out/evidence"  # results.jsonl, metrics.jsonl of every stage, logs; weights while they are needed
    workers: int = 2  # runs at a time
    only: str = ""  # one run, as A/paper/3 or A/source, in this process; its record goes to its folder


def settings(configs: list[train.Config]) -> list[dict]:
    """What shapes a run's stages, as it comes back from JSON; the data is named by its view."""
    kept = [{k: v for k, v in asdict(cfg).items() if k not in FOUND_OUT} for cfg in configs]
    return json.loads(json.dumps([{**cfg, "data": Path(cfg["data"]).name} for cfg in kept]))


def loader(view: Path, seq_len: int, split: str = "val") -> DomainLoader:
    return DomainLoader(view, tuple(read_meta(view)["domains"]), seq_len, 0, split)


def measured(folder: str, data: Path, cfg: train.Config, sets: tuple[str, ...]) -> dict[str, list[float]]:
    """Loss of the model in a folder on each domain of the evaluation sets, nats a token, computed as cfg's run does."""
    model, vals = hf.load(folder), {name: loader(data / name, cfg.seq_len) for name in sets}
    with train.autocast(cfg, "cpu"):
        return {s: evaluate(model, v, int(v.size_M.max()), 16, "cpu").round(6).tolist() for s, v in vals.items()}


def text_of(source: str, view: Path) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """The domains of a view, and p0."""
    train = loader(view, SOURCES[source].train.seq_len, "train")
    share_M = train.size_M ** SOURCES[source].power
    return train.domains, tuple((share_M / share_M.sum()).tolist())


def bytes_per_token(val: DomainLoader, tokenizer) -> list[float]:
    """UTF-8 bytes of what is predicted in all windows of each domain."""
    windows = [val.read(val.fixed_batch(m, int(size)))[:, 1:] for m, size in enumerate(val.size_M)]
    return [sum(len(tokenizer.decode(w.tolist()).encode()) for w in ws) / ws.size for ws in windows]


def read_stage(cfg: train.Config) -> tuple[dict, list[dict], list[dict]]:
    """The header, steps and evaluations in a finished stage's metrics.jsonl."""
    header, *records = read_metrics(Path(cfg.out_dir, "metrics.jsonl"))
    return header, *([r for r in records if r["kind"] == kind] for kind in ("train", "eval"))


def summary(cfg: train.Config) -> dict:
    """What metrics.jsonl says about a stage, in few numbers. Seconds are those of training steps alone."""
    header, steps, evals = read_stage(cfg)
    points = np.unique(np.linspace(0, len(evals) - 1, HISTORY).round().astype(int))
    seconds = np.cumsum([0.0, *(r["step_s"] for r in steps)])
    moments = [(evals[i], float(seconds[evals[i]["step"]])) for i in points]
    return {
        "stage": cfg.stage,
        "domains": header["domains"],
        "tokens": sum(evals[-1]["tokens"]),
        "steps": len(steps),
        "step_s": sum(r["step_s"] for r in steps),
        "eval_s": sum(r["eval_s"] for r in evals),
        "mix_s": sum(r["mix_s"] for r in evals),
        "largest_share_M": np.max([r["ratio"] for r in evals], axis=0).round(4).tolist(),
        "ratio": [[r["step"], np.round(r["ratio"], 4).tolist()] for r, _ in moments],
        "course": [[r["step"], round(s, 2), round(float(np.mean(r["val_loss"])), 4)] for r, s in moments],
    }


def law_errors(cfg: train.Config) -> dict[str, list[float]]:
    """What the law predicts for a finished stage's end minus what is reached, nats (M,), from each of LAW's shares."""
    header, _, evals = read_stage(cfg)
    mix, errors = Mix(tuple(header["domains"]), np.array(evals[0]["ratio"]), clip_reference=False), {}
    for r in evals[1:]:
        mix.update(np.array(r["val_loss"]), np.array(r["tokens"]), progress := r["step"] / cfg.max_steps)
        if mix.reference_loss_M is not None:
            errors[progress] = (mix.reference_loss_M - evals[-1]["val_loss"]).round(4).tolist()
    if not errors or min(errors) > LAW[0] + 0.05:
        return {}  # too few evaluations
    return {str(share): errors[min(errors, key=lambda p: abs(p - share))] for share in LAW}


def source_record(name: str, opt: Options, data: Path) -> dict:
    """Train the source if it is one of ours; its record, without hashes."""
    source = name.removesuffix("/source")
    domains, p0_M = text_of(source, data / "plain")
    configs = stages(name, opt.out, domains, p0_M)
    if random := SOURCES[source].random:
        model = Llama(random)
        model.init_weights(configs[0].seed)
        hf.save(model, configs[0].init_from)
    for cfg in configs:
        train.main(cfg)
    seq_len, text = SOURCES[source].train.seq_len, SOURCES[source].data
    val = loader(data / "heldout", seq_len)
    return {
        "domains": val.domains,
        "p0": p0_M,
        "bytes_per_token": bytes_per_token(val, load_tokenizer(read_meta(text), text)),
        "stages": [summary(cfg) for cfg in configs],
        "law": {cfg.stage: law_errors(cfg) for cfg in configs},
        "loss": {"final": measured(source_folder(source, opt.out), data, SOURCES[source].train, views.EVALUATION)},
        "tasks": {"source": zero_shot(source_folder(source, opt.out), SOURCES[source].tasks)},
    }


def zero_shot(folder: str, names: tuple[str, ...]) -> dict[str, list[float]]:
    """Accuracy in percent and its standard error, by task."""
    if not names:
        return {}
    documents, model_and_tokenizer, found = tasks.archive(), tasks.load(folder), {}
    for name in names:
        right = tasks.run_task(*model_and_tokenizer, tasks.read_documents(documents, name, DOCUMENTS))[:, 0]
        found[name] = [round(100 * float(f(right)), 2) for f in (np.mean, stats.sem)]
    return found


def arm_record(name: str, opt: Options, data: Path) -> dict:
    """Prune and continue; the run's record, without hashes."""
    source_name, arm_name, seed = name.split("/")
    source, arm, start = SOURCES[source_name], ARMS[arm_name], source_folder(source_name, opt.out)
    val = loader(data / arm.view, source.train.seq_len)
    n_windows = arm.mix.get("eval_sequences", source.train.eval_sequences)
    with train.autocast(source.train, "cpu"):
        reference = evaluate(hf.load(start), val, n_windows, source.train.micro_batch_size, "cpu")
    configs = stages(name, opt.out, *text_of(source_name, data / arm.view), tuple(reference.tolist()))
    asked = source.tasks if int(seed) == 1 else ()
    loss, right, peaks, resumed = {}, {}, [], []
    for cfg in configs:
        resumed.append(Path(cfg.out_dir, "metrics.jsonl").exists())
        train.main(cfg)
        peaks.append(peak_bytes())
        if cfg.stage == "prune":
            loss["pruned"] = measured(f"{cfg.out_dir}/model", data, cfg, ("heldout",))
            right["pruned"] = zero_shot(f"{cfg.out_dir}/model", asked)
    sets = views.EVALUATION if arm_name in HEADLINE else ("heldout",)
    loss["final"] = measured(f"{configs[-1].out_dir}/model", data, configs[-1], sets)
    right["final"] = zero_shot(f"{configs[-1].out_dir}/model", asked)
    record = {"arm": arm_name, "seed": int(seed), "reference_losses": reference.tolist(), "loss": loss, "tasks": right}
    record |= {"law": {cfg.stage: law_errors(cfg) for cfg in configs if cfg.stage == "continue"}}
    return record | {"peak_bytes": peaks, "resumed": resumed, "stages": [summary(cfg) for cfg in configs]}


def execute(name: str, opt: Options) -> dict:
    """Do one run from wherever it stands; returns its record."""
    source, rest = name.split("/", 1)
    data, configs, start = Path(opt.out, source, "views"), stages(name, opt.out), source_folder(source, opt.out)
    record = {"run": name, "source": source, "commit": commit(), "config": settings(configs)}
    record["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    record |= (source_record if rest == "source" else arm_record)(name, opt, data)
    folders = {"source": start, "model": start if rest == "source" else f"{configs[-1].out_dir}/model"}
    files = {what: min(Path(folder).glob("*.safetensors")) for what, folder in folders.items()}
    files |= {what: data / view / "meta.json" for what, view in (("data", "plain"), ("heldout", "heldout"))}
    return record | {"hashes": {what: sha256(file) for what, file in files.items()}}


def peak_bytes() -> int:
    """This process's peak so far. getrusage's begins at the peak of the process that started this one."""
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def commit() -> str:
    """The code's commit, with a + where files differ from it; "" outside a repository."""
    commands = ("git", "rev-parse", "--short", "HEAD"), ("git", "status", "--porcelain", "--", "*.py")
    head, changed = (subprocess.run(c, capture_output=True, text=True, check=False).stdout.strip() for c in commands)
    return head + "+" * bool(changed)


def read_results(path: str | Path) -> dict[str, dict]:
    """The recorded runs by name."""
    return {record["run"]: record for record in read_metrics(path)}


def in_own_process(name: str, opt: Options) -> dict | None:
    """The record of a run, None where it failed; what it said is in its log."""
    folder, options = Path(opt.out, name), [f"--only={name}", f"--out={opt.out}"]
    folder.mkdir(parents=True, exist_ok=True)
    (record := folder / "record.json").unlink(missing_ok=True)
    with open(folder / "log.txt", "a") as log:
        command, env = [sys.executable, "-m", "experiments.run", *options], {"OMP_NUM_THREADS": "1", **os.environ}
        ended = subprocess.run(command, stdout=log, stderr=log, env=env, check=False)
    return json.loads(record.read_text()) if record.exists() and not ended.returncode else None


def forget_weights(folder: Path) -> None:
    for made in [path for models in ("model", "step_*") for path in folder.rglob(models)]:
        shutil.rmtree(made, ignore_errors=True)


def check_recorded(done: dict[str, dict], names: list[str], opt: Options) -> None:
    """Raises UserError for a record of other settings; one that either side does not have is no difference."""
    for name in (name for name in names if name in done):
        now, then = settings(stages(name, opt.out)), done[name]["config"]
        pairs = [(value, old.get(k, value)) for new, old in zip(now, then, strict=False) for k, value in new.items()]
        if len(now) != len(then) or any(new != old for new, old in pairs):
            raise UserError(f"{opt.out}: {name} was made with other settings than experiments/arms.py has: {ANEW}")


def check_source(record: dict, done: dict[str, dict]) -> None:
    """Raises UserError where a run did not start from the same weights and text as the source's others."""
    others = (other["hashes"] for other in done.values() if other["source"] == record["source"])
    if any(record["hashes"][what] != hashes[what] for hashes in others for what in ("source", "data", "heldout")):
        raise UserError(f"{record['run']}: its source or text is not that of the recorded runs: {ANEW}")


def make(names: list[str], done: dict[str, dict], opt: Options) -> None:
    """Make runs and add their records to `done` and to results.jsonl. A run that fails is left out, and named."""
    out, pool = Path(opt.out), ThreadPoolExecutor(opt.workers)
    try:
        jobs = {pool.submit(in_own_process, name, opt): name for name in names}
        for job in tqdm(as_completed(jobs), "runs", len(jobs)):
            name, record = jobs[job], job.result()
            if record is None:
                tqdm.write(f"{name}: failed, see {out / name / 'log.txt'}")
                continue
            check_source(record, done)
            done.setdefault(name, record)
            (out / "results.tmp").write_text("".join(json.dumps(r) + "\n" for r in done.values()))
            (out / "results.tmp").replace(out / "results.jsonl")  # a killed runner leaves all of it
            if not name.endswith("/source"):
                forget_weights(out / name)
            tqdm.write(f"{name}: loss {np.mean(record['loss']['final']['heldout']):.4f}")
    finally:
        pool.shutdown(cancel_futures=True)  # no other run is begun once this one has to stop


def run_all(opt: Options) -> None:
    """Make the runs that are missing. Raises UserError."""
    out, done = Path(opt.out), read_results(Path(opt.out, "results.jsonl"))
    arms, sources = runs(opt.study), [f"{name}/source" for name in STUDIES[opt.study]]
    check_recorded(done, sources + arms, opt)
    for name in done.keys() & set(arms):
        forget_weights(out / name)  # of a run that ended just before the runner was killed
    for name in STUDIES[opt.study]:
        source = SOURCES[name]
        views.build(source.data, out / name / "views", source.train.seq_len, source.windows, source.corrupted_windows)
    missing = [name for name in arms if name not in done]
    needed = {name.partition("/")[0] for name in missing}  # a source whose weights are gone is trained again
    gone = {f"{name}/source" for name in needed if not Path(source_folder(name, opt.out)).exists()}
    first = [name for name in sources if name not in done or name in gone]
    print(f"{opt.study}, in {out}: {len(first)} sources and {len(missing)} of {len(arms)} runs to do", flush=True)
    make(first, done, opt)  # runs need their source
    if lost := [name for name in first if name not in done]:
        raise UserError(f"{', '.join(lost)} failed: run again to try it again")
    make(missing, done, opt)
    if not all(name in done for name in sources + arms):
        raise UserError("some runs are missing: run again to try them again")


def main(opt: Options) -> None:
    if opt.study not in STUDIES:
        raise UserError(f"study = {opt.study!r}: must be one of {', '.join(STUDIES)}")
    if opt.only:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        Path(opt.out, opt.only, "record.json").write_text(json.dumps(execute(opt.only, opt)))
        return
    with closing(Lock(Path(opt.out))) as lock:
        lock.take()
        run_all(opt)


if __name__ == "__main__":
    configurator.command(main, Options)
