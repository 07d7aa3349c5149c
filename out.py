"""What a run leaves in out_dir: its lock, metrics.jsonl, checkpoints and model. Also how it is asked to stop.

out_dir/lock, metrics.jsonl        held and written by the run that is going on
        step_000100                checkpoints (checkpoint.py)
        model                      a Hugging Face folder with its tokenizer; the next stage starts there
        model/adamw                after masks by count that learned: AdamW's moments of these weights, for it, too
"""

import json
import math
import os
import re
import select
import shlex
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tqdm import tqdm

import checkpoint
import hf
import parallel
from checkpoint import Checkpoints, Lock
from configurator import Stopped, UserError
from metrics import Log, read_metrics

MAY_CHANGE_ON_RESUME = {
    *("resume", "out_dir", "device", "compile", "kernels", "checkpoint_activations", "save_interval"),
    *("keep_checkpoints", "plan", "gpus", "gpu_memory"),
}
ADAMW = "adamw"  # in a model's folder: AdamW's moments of its weights, and the steps that they have come from
SPARSITY_GAP = 0.02  # of a row, at the end; more is warned about
SAME = 0.01  # nats; rounding to bfloat16 moves a mean loss by a tenth of it
SKIPPED_AT_MOST = 10  # steps in a row without a finite loss and gradient end the run
STILL_S = 0.9 * parallel.TIMEOUT.total_seconds()  # a rank that stays on one line so long says it, before torch ends it
STOPPING_S = 20  # the same once it was asked to stop: torchrun, which asks all when one is lost, kills after 30


@dataclass
class Progress:
    """How far a run is. Steps that were skipped count as steps, their tokens do not count."""

    tokens_M: np.ndarray  # trained on, by domain
    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    carried: int = 0  # steps of the stage before that AdamW's moments have come from

    @property
    def learned(self) -> int:
        """Steps that AdamW has taken."""
        return self.carried + self.step - self.skipped


@dataclass
class StopSignals:
    """While it lasts, SIGTERM and the first SIGINT ask the run to stop after its step; a second SIGINT interrupts."""

    asked: str = ""
    before: dict = field(default_factory=dict)

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self.before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
            self.heard, wake = os.pipe2(os.O_NONBLOCK)
            signal.set_wakeup_fd(wake)  # written at once, where _ask waits until the main thread is back from C
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.before:
            os.close(signal.set_wakeup_fd(-1))
            os.close(self.heard)

    def _ask(self, number: int, _) -> None:
        if self.asked == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name


class Out:
    """The folder of one run. Only the main rank writes the log and the model; all ranks share the checkpoints."""

    def __init__(self, cfg, ranks: parallel.Ranks, data_sha256: str) -> None:
        self.cfg, self.ranks, self.folder = cfg, ranks, Path(cfg.out_dir)
        self.identity = {"config": json.loads(json.dumps(asdict(cfg))), "data": data_sha256}
        self.log = Log(self.folder / "metrics.jsonl", ranks.is_main)
        self.lock, self.signals, self.bar = Lock(self.folder), StopSignals(), None
        self.progress, self.over = Progress(np.zeros(0)), threading.Event()

    def __enter__(self) -> "Out":
        """Raises UserError where the folder holds another run, or another process has it."""
        parallel.refuse_unequal({"data": self.identity["data"], **self.identity["config"]})
        parallel.on_main(self._claim)
        self.found, self.broken = checkpoint.newest(self.folder)
        if self.found:
            self._same_run(self.found[1], self.found[0])
        self.signals.__enter__()
        self.watch = threading.Thread(target=self._watch, daemon=True)  # not sooner: it keeps the lock of a refused run
        if self.ranks.world_size > 1 and self.signals.before:  # signals are heard in the main thread alone
            self.watch.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _) -> None:
        if error and not isinstance(error, (UserError, Stopped, KeyboardInterrupt)):
            self._say("ends", self._place(traceback.extract_tb(error.__traceback__)))
        self.over.set()
        if self.watch.is_alive():
            self.watch.join()
        self.signals.__exit__()
        if self.bar is not None:
            self.bar.close()
        self.log.close()
        self.lock.close()

    def _place(self, stack: traceback.StackSummary) -> str:
        at = [frame for frame in stack if frame.filename.endswith("train.py")][-1]
        return f"after step {self.progress.step}, train.py:{at.lineno} in {at.name}: {at.line.partition('  #')[0]}"

    def _say(self, what: str, place: str) -> None:
        """On every rank's own terminal: what it does, where, and the command that goes on from there."""
        started = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else "self"  # torchrun is the parent
        words = Path(f"/proc/{started}/cmdline").read_text().split("\0")[:-1]
        command = shlex.join(words + ["--resume"] * ("--resume" not in words))
        said = f"\nrank {self.ranks.rank} of {self.ranks.world_size} {what} {place}\nto go on: {command}\n"
        print(said, end="", file=sys.stderr, flush=True)

    def _watch(self) -> None:
        """Say where this rank hangs. In a thread, as the main one waits in C for a rank that is lost."""
        seen = said = ""
        since = time.monotonic()
        while not self.over.wait(1):
            place = self._place(traceback.extract_stack(sys._current_frames()[threading.main_thread().ident]))
            if place != seen:
                seen, since = place, time.monotonic()
            writes = ": out." in place  # it may take its time
            stopping = select.select([self.signals.heard], [], [], 0)[0] and not writes
            limit_s = STOPPING_S if stopping else STILL_S
            if place != said and time.monotonic() - since > limit_s:
                said = place
                self._say(f"stands still for {limit_s:.0f} s, as if another was lost,", place)

    def _claim(self) -> None:
        files = [self.folder / "metrics.jsonl", self.folder / "model", *checkpoint.checkpoints(self.folder)[-1:]]
        there = [f.name for f in files if f.exists()]
        if there and not self.cfg.resume:
            raise UserError(f"{self.folder} holds a run ({', '.join(there)}): add --resume or choose another out_dir")
        headers = read_metrics(self.log.path)[:1]
        if set(there) - {"metrics.jsonl"} and not headers:
            raise UserError(f"{self.folder} holds {', '.join(there)} of an unknown run: choose another out_dir")
        self.lock.take()
        for header in headers:
            self._same_run({**self.identity, "config": header["config"]}, self.log.path)

    def _same_run(self, saved: dict, where: Path) -> None:
        """Raises UserError where a setting that shapes the run differs. One that is new since is at its default."""
        before = {"masks": "published"} if saved["config"]["stage"] == "prune" else {}  # there were no others
        settings = json.loads(json.dumps(asdict(type(self.cfg)()))) | before | saved["config"]
        for name, value in self.identity["config"].items():
            if name in MAY_CHANGE_ON_RESUME or settings[name] == value:
                continue
            if os.path.realpath(str(settings[name])) != os.path.realpath(str(value)):  # a folder in other words
                differs = f"was written with {name} = {settings[name]!r}, this run has {value!r}"
                raise UserError(f"{where}: {differs}: give the same, or choose another out_dir")
        if saved["data"] != self.identity["data"]:
            raise UserError(f"{where}: {self.cfg.data} was prepared anew since: put it back or choose another out_dir")

    def resume(self, progress: Progress, shapes: dict, learned: dict, optimizers: list, mix, loader) -> dict:
        """Fill all of them from the newest whole checkpoint, where there is one, and open the log at its step.

        -> the record of the last evaluation before it; {} where there is none.
        """
        self.shapes, self.learned, self.optimizers, self.mix, self.loader = shapes, learned, optimizers, mix, loader
        self.progress = progress
        if self.found:
            folder, state = self.found
            for name, here in json.loads(json.dumps(shapes)).items():
                if state[name] != here:
                    raise UserError(f"{folder}: its {name} model is not the run's: put init_from back as it was")
            if state["progress"].get("carried", 0) != progress.carried:
                raise UserError(
                    f"{folder}: went on with other moments than {self.cfg.init_from}/{ADAMW}: put them back"
                )
            checkpoint.load(folder, checkpoint.tensors(learned, optimizers))
            progress.__dict__.update(state["progress"], tokens_M=np.array(state["progress"]["tokens_M"]))
            checkpoint.set_steps(optimizers, progress.learned)
            mix.load_state_dict(state["mix"])
            loader.load_state_dict(state["loader"])
        self.begun_M = loader.begun_M
        group = torch.distributed.new_group(backend="gloo") if self.ranks.sharded else None
        self.checkpoints = Checkpoints(self.folder, self.cfg.keep_checkpoints, group)
        last = parallel.on_main(lambda: self.log.open(progress.step))
        if self.cfg.resume:
            self.log.say(f"resumed at step {progress.step}" if self.found else f"{self.folder} has no checkpoint yet")
        for folder, problem in self.broken.items():
            self.log.warn(progress.step, f"the checkpoint {folder} is skipped: {problem}")
        hidden = None if self.ranks.is_main else True  # None: where the output is no terminal
        total, initial = self.cfg.max_steps, progress.step
        self.bar = tqdm(total=total, initial=initial, disable=hidden, desc=self.cfg.stage, unit="step")
        self.found = None
        return last

    # ---- the log

    def log_eval(self, loss_M: np.ndarray, warnings: list[str], seconds: dict, more: dict) -> dict:
        """The record of an evaluation, and one line of it. seconds: eval_s, mix_s. more: what the stage adds."""
        mix, step, tokens_M = self.mix, self.progress.step, self.progress.tokens_M
        for text in warnings:
            self.log.warn(step, text, now=False)
        worst = int(np.nanargmax(loss_M)) if np.isfinite(loss_M).any() else 0
        self.log.say(f"step {step}: mean {loss_M.mean():.4f}, worst {mix.domains[worst]} {loss_M[worst]:.4f}")
        record = {"kind": "eval", "step": step, "val_loss": loss_M, "tokens": tokens_M, "ratio": mix.ratio_M}
        record |= {"reference_ratio": mix.reference_ratio_M, "reference_loss": mix.reference_loss_M}
        return self.log.record({**record, **more, **seconds, "memory_bytes": memory_bytes(self.ranks.device)})

    def log_train(self, loss_sum_M: np.ndarray, count_M: np.ndarray, step_s: float, more: dict) -> None:
        """loss_sum_M: summed over the tokens of each domain; count_M: those tokens, none where the step was skipped."""
        progress, begun_M, self.begun_M = self.progress, self.begun_M, self.loader.begun_M
        for m in np.flatnonzero(np.frexp(np.maximum(begun_M, 1))[1] < np.frexp(self.begun_M)[1]):  # the 2nd, 4th, ...
            again = f"the same {self.loader.size_M[m]} sequences in a new order"
            self.log.warn(progress.step, f"domain {self.mix.domains[m]} begins its epoch {self.begun_M[m]}, {again}")
        tokens_per_s = self.cfg.batch_size * self.cfg.seq_len / step_s
        loss = loss_sum_M.sum() / count_M.sum() if count_M.any() else None
        mean_M = np.divide(loss_sum_M, count_M, out=np.full(len(loss_sum_M), np.nan), where=count_M > 0)
        self.bar.set_postfix_str(f"loss {loss or math.nan:.3f}, {tokens_per_s:,.0f} tokens/s", refresh=False)
        self.bar.update()
        record = {"kind": "train", "step": progress.step, "loss": loss, "domain_loss": mean_M, "step_s": step_s}
        record |= {"tokens_per_s": tokens_per_s, "tokens": progress.tokens_M, "ratio": self.mix.ratio_M}
        self.log.record({**record, "skipped": progress.skipped, **more})

    def log_extracted(self, last: dict, loss_M: np.ndarray, masks) -> dict:
        """last: the record of the last evaluation, which was masked. loss_M: that of the extracted model."""
        for mask, sparsity in masks.expected_sparsity().items() if masks.sampled else ():  # by count, it is exact
            gap = (sparsity - masks.target_sparsity()[mask]).abs().max().item()
            if gap > SPARSITY_GAP:
                advice = "more max_steps, a shorter sparsity_warmup or a higher mask_lr bring it there"
                self.log.warn(last["step"], f"mask {mask} misses its target sparsity by up to {gap:.3f}: {advice}")
        masked = np.array(last["val_loss"], dtype=float).mean()
        self.log.say(f"extracted: mean {loss_M.mean():.4f}, as masked {masked:.4f}")
        if not abs(loss_M.mean() - masked) < SAME:
            self.log.warn(last["step"], "the extracted model is not the masked one: try --resume --kernels=torch")
        extracted = {"kind": "extracted", "val_loss": loss_M, "masked_val_loss": last["val_loss"]}
        return self.log.record({**last, **extracted})

    def skip(self, loss_N: np.ndarray, batch) -> None:
        """Count a step without a finite loss and gradient. Raises UserError after SKIPPED_AT_MOST of them in a row."""
        progress = self.progress
        progress.skipped, progress.skipped_in_a_row = progress.skipped + 1, progress.skipped_in_a_row + 1
        bad_N = np.flatnonzero(~np.isfinite(loss_N))
        n = bad_N[0] if len(bad_N) else np.argmax(loss_N)
        why = "the loss is not finite" if len(bad_N) else "the gradient is not finite, the highest loss is"
        why += f" on domain {self.mix.domains[batch.domain_N[n]]}, {self.loader.file_of(batch, n)}"
        self.log.warn(progress.step, f"the step was skipped, {why}")
        if progress.skipped_in_a_row == SKIPPED_AT_MOST:
            said = f"step {progress.step}: {SKIPPED_AT_MOST} steps in a row were skipped, at last since {why}"
            raise UserError(f"{said}: look at the data, or start with a lower lr in another out_dir")

    # ---- checkpoints and the model

    def save(self) -> None:
        self.wait_for_save()
        if self.ranks.is_main or self.ranks.sharded:
            step, progress = self.progress.step, {**vars(self.progress), "tokens_M": self.progress.tokens_M.tolist()}
            state = {**self.identity, **self.shapes, "step": step, "progress": progress}
            state |= {"mix": self.mix.state_dict(), "loader": self.loader.state_dict()}
            self.checkpoints.save(step, state, checkpoint.tensors(self.learned, self.optimizers))

    def stop(self) -> None:
        """Raises Stopped when the checkpoint of this step is whole, else UserError."""
        step, last = self.progress.step, self.cfg.max_steps
        if problem := self.wait_for_save():
            raise UserError(f"asked to stop at step {step}, and could not save it: {problem}")
        raise Stopped(f"stopped at step {step} of {last}, which is saved: the same command with --resume goes on")

    def wait_for_save(self) -> str:
        """What went wrong with the last checkpoint; empty where nothing did."""
        saved = self.checkpoints.finished()
        if not saved:
            return ""
        if saved.error:
            self.log.warn(self.progress.step, f"the checkpoint of step {saved.step} was not written: {saved.error}")
        else:
            self.log.record({"kind": "save", "step": saved.step, "save_s": saved.seconds, "bytes": saved.n_bytes})
        return saved.error

    def write_model(self, model, moments: dict, steps: int) -> None:
        """The main rank writes out_dir/model, with the tokenizer of init_from or of the data set.

        moments: AdamW's, each as a model; they go into a folder of it, for the stage that continues.
        """

        def write() -> None:
            sources = [folder for folder in (self.cfg.init_from, self.cfg.data) if folder]
            try:
                for name, moment in moments.items():
                    hf.save(moment, self.folder / "model" / ADAMW / name)
                    (self.folder / "model" / ADAMW / "steps.json").write_text(json.dumps({"steps": steps}))
                hf.save(model, self.folder / "model", tokenizer=sources)
            except (OSError, SafetensorError) as error:
                room = "make room; " if re.search("No space left|quota exceeded", str(error)) else ""
                problem = f"{self.folder}/model could not be written ({error})"
                raise UserError(f"{problem}: {room}--resume writes it again") from None

        parallel.on_main(write)
        self.bar.close()
        self.log.say(f"model written to {self.folder}/model")
        self.log.sum_up()


def memory_bytes(device: str) -> int:
    """Bytes at the peak of a GPU, or bytes of the process now where there is none."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
