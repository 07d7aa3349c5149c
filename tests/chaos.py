"""Kill the demo's pruning stage thirty times with SIGKILL, and see that it ends with the same bytes: make chaos.

Half of the kills come at a random time, the others at a moment of MOMENTS. `python tests/chaos.py --kills=5 --seed=3`
is shorter, with other kills.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import checkpoint
from data.shards import sha256
from metrics import read_metrics

MOMENTS = {  # where: the function that kills instead of being called, and the call at which it does, at most
    "in a step": ("train.learning_rate", 9),
    "in an evaluation": ("train.evaluate", 2),
    "while tensors are written": ("checkpoint.HuggingFaceStorageWriter.finish", 2),
    "between a checkpoint's files": ("checkpoint.write_text", 4),
    "before a checkpoint is renamed": ("checkpoint.os.replace", 2),
    "while an older checkpoint is dropped": ("checkpoint.Checkpoints._drop", 2),
    "while metrics are cut back": ("metrics.os.replace", 1),
    "in a fit": ("dro.refloss.fit_domains", 2),
    "between two stages": ("train.extract", 1),
    "while the model is written": ("weights.save_file", 1),
}

TRAP = """
import os, signal, sys
sys.path.insert(0, {root!r})
import checkpoint, dro, metrics, train, weights
*path, name = {function!r}.split(".")
owner = sys.modules[path[0]]
for part in path[1:]:
    owner = getattr(owner, part)
whole, calls = getattr(owner, name), []
def deadly(*arguments, **named):
    calls.append(1)
    if len(calls) == {nth}:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*arguments, **named)
setattr(owner, name, deadly)
sys.exit(train.command_line(sys.argv[1:]))
"""


def start(arguments: list[str], function: str = "", nth: int = 0) -> subprocess.Popen:
    """train.py with these arguments, which dies at the nth call of a function, if one is named."""
    how = ["-c", TRAP.format(root=str(ROOT), function=function, nth=nth)] if function else ["train.py"]
    return subprocess.Popen(
        [sys.executable, *how, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def reproducible(record: dict) -> dict:
    """What does not depend on the machine."""
    return {k: v for k, v in record.items() if not k.endswith("_s") and k != "memory_bytes"}


def differences(one: Path, other: Path) -> list[str]:
    """Between two runs, in what they leave and log."""
    found = []
    for a in (one / "model").iterdir():
        b = other / a.relative_to(one)
        if not b.is_file() or sha256(a) != sha256(b):
            found.append(f"{a} and {b} differ")
    ends = [checkpoint.checkpoints(run)[-1] for run in (one, other)]
    tensors = [{n: t for f in sorted(end.glob("*.safetensors")) for n, t in load_file(f).items()} for end in ends]
    for name in sorted(tensors[0] | tensors[1]):  # their files begin with a few words in any order
        if not all(name in t for t in tensors) or not torch.equal(tensors[0][name], tensors[1][name]):
            found.append(f"{name} differs between {ends[0]} and {ends[1]}")
    for kind in ("train", "eval", "extracted"):
        records = [[r for r in read_metrics(run / "metrics.jsonl") if r["kind"] == kind] for run in (one, other)]
        logged = [[reproducible(r) for r in rs] for rs in records]
        if json.dumps(logged[0]) != json.dumps(logged[1]):
            found.append(f"the {kind} records of {one} ({len(records[0])}) and {other} ({len(records[1])}) differ")
    return found


def main(kills: int, seed: int) -> None:
    out, rng = ROOT / "out" / "chaos", random.Random(seed)
    shutil.rmtree(out, ignore_errors=True)
    trained = (ROOT / "out/demo/pretrain/model/config.json").is_file()
    if not trained and start(["config/demo_pretrain.py", "--resume"]).wait():
        sys.exit("error: the demo's source could not be trained: make demo says why")
    run = ["config/demo_prune.py", "--save_interval=5"]
    print("the run that is not killed", flush=True)
    if start([*run, f"--out_dir={out / 'whole'}"]).wait():
        sys.exit("error: the run failed: make demo says why")
    killed = [*run, f"--out_dir={out / 'killed'}", "--resume"]
    names, lives, done = list(MOMENTS), 0, 0
    while done < kills:
        lives += 1
        if lives % 2:
            where, life_s = "at a random time", rng.uniform(3, 15)  # it starts for some seconds, then 2 or 3 steps each
            process = start(killed)
            try:
                process.wait(life_s)
            except subprocess.TimeoutExpired:
                process.kill()
        else:
            now = names[-2:] if kills - done <= 5 else names[:-2]  # the last two come when the steps are done
            where = now[lives // 2 % len(now)]
            function, at_most = MOMENTS[where]
            process = start(killed, function, rng.randint(1, at_most))
        status = process.wait()
        if status not in (0, -signal.SIGKILL):
            sys.exit(f"error: {where}: the run ended with {status}: {process.stderr.read()[-2000:]}")
        done += status != 0
        steps = [folder.name for folder in checkpoint.checkpoints(out / "killed")]
        outcome = f"kill {done}" if status else "no kill, the stage came to its end"
        print(f"{where}: {outcome}; checkpoints: {', '.join(steps) or 'none'}", flush=True)
    if start(killed).wait():
        sys.exit("error: the killed run could not be brought to its end")
    found = differences(out / "whole", out / "killed")
    sys.exit("\n".join(found) if found else print(f"after {kills} kills: the same bytes, every step logged once"))


if __name__ == "__main__":
    options = dict(a.removeprefix("--").split("=") for a in sys.argv[1:])
    main(int(options.get("kills", 30)), int(options.get("seed", 0)))
