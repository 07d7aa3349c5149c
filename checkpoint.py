"""Checkpoints that are whole or not there, and the lock of the folder that they are in.

    out_dir/lock                              held by the run that is going on
            step_000100/shard-*.safetensors   weights, masks and the moments of both: one file, or one a rank
                        state.json            settings, counters, mix, position in the data; sizes of the other files

A checkpoint is written as step_000100.tmp, flushed and renamed; only then do older ones go. A model that is sharded
over ranks is copied to the CPU and written in the background. Any number of ranks reads any checkpoint.
"""

import fcntl
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from configurator import UserError
from parallel import exchange, on_main, position

STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's state of a parameter, of its shape
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # said at every save of one process


class Lock:
    """Makes a folder one process's own, until that closes it or dies."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, None

    def take(self) -> None:
        """Makes the folder. Raises UserError where another process has it, or it cannot be written into."""
        if self.file:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = open(self.folder / "lock", "a")  # noqa: SIM115 (held open)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder} is in use by another process: choose another out_dir") from None
        except OSError as error:
            raise UserError(f"{self.folder} cannot be used ({error.strerror}): choose another out_dir") from None
        self.file = file

    def close(self) -> None:
        if self.file:
            self.file.close()
        self.file = None


# ---- writing


@dataclass(frozen=True)
class Saved:
    """How writing a checkpoint went."""

    step: int
    seconds: float
    n_bytes: int
    error: str  # "" where it is on the disk


def tensors(modules: dict[str, nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every parameter and its moments: model.norm.weight, exp_avg.model.norm.weight, ..."""
    state_of = {p: o.state[p] for o in optimizers for group in o.param_groups for p in group["params"]}
    named = {}
    for prefix, module in modules.items():
        for name, p in module.named_parameters(prefix):
            state = state_of[p]
            if not state:  # as Adam makes it at its first step
                state |= {"step": torch.zeros((), device=p.device)} | {m: torch.zeros_like(p) for m in MOMENTS}
            named |= {name: p.detach()} | {f"{m}.{name}": state[m] for m in MOMENTS}
    return named


def set_steps(optimizers: Iterable[torch.optim.Optimizer], steps: int) -> None:
    """Tell the optimizers, whose states `tensors` has made, how many steps they have taken."""
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state["step"].fill_(steps)


class Checkpoints:
    """Writes the checkpoints of one run. How it went is told, never raised: the run is worth more than a checkpoint.

    keep: how many of the newest stay.
    group: all ranks of a sharded model, and used for nothing else, since training's own messages would get between
    those of the writers. None: this process has all of the model.
    """

    def __init__(self, out_dir: Path, keep: int, group: dist.ProcessGroup | None = None) -> None:
        self.out_dir, self.keep, self.group = out_dir, keep, group
        self.is_main = group is None or position()[0] == 0
        self.background = ThreadPoolExecutor(1)
        self.writing: Future[Saved] | None = None

    def save(self, step: int, state: dict, named: dict[str, Tensor]) -> None:
        """Take a checkpoint of what is there now; a sharded one is copied, and written while training goes on.

        The last one must be finished. state: what JSON takes.
        """
        start, tmp = time.perf_counter(), self.out_dir / f"step_{step:06}.tmp"
        problem = self._first(attempt(_empty, tmp) if self.is_main else "", None)
        writer = HuggingFaceStorageWriter(str(tmp), save_distributed=True)
        if problem:
            write = partial(str, problem)
        elif self.group:
            write = partial(attempt, dcp.async_save(named, storage_writer=writer, process_group=self.group).result)
        else:
            write = partial(attempt, dcp.save, named, storage_writer=writer, no_dist=True)
        self.writing = self.background.submit(self._finish, step, start, tmp, json.dumps(state), write)
        if not self.group:
            self.writing.result()

    def finished(self, wait: bool = False) -> list[Saved]:
        """The checkpoint whose writing has ended since the last call, if one has."""
        if self.writing is None or not (wait or self.writing.done()):
            return []
        saved, self.writing = self.writing.result(), None
        return [saved]

    def _first(self, problem: str, group: dist.ProcessGroup | None) -> str:
        """The first problem that a rank has, "" where none has one."""
        problems = exchange(problem, group) if self.group else [problem]
        return next(filter(None, problems), "")

    def _finish(self, step: int, start: float, tmp: Path, text: str, write: Callable[[], str]) -> Saved:
        """Where every rank has written its share, rank 0 makes it a checkpoint."""
        problem, n_bytes = self._first(write(), self.group), 0
        if self.is_main and not problem:
            problem = attempt(self._commit, tmp, text)
        if self.is_main and problem:
            shutil.rmtree(tmp, ignore_errors=True)  # a full disk has better uses
        elif self.is_main:
            n_bytes = sum(f.stat().st_size for f in tmp.with_suffix("").iterdir())
        return Saved(step, time.perf_counter() - start, n_bytes, problem)

    def _commit(self, tmp: Path, text: str) -> None:
        files = sorted(tmp.iterdir())
        for file in files:
            flush(file)
        sizes = {f.name: f.stat().st_size for f in files}
        (tmp / STATE).write_text(json.dumps({"files": sizes} | json.loads(text)))
        flush(tmp / STATE)
        folder = tmp.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)  # one that was found damaged
        os.replace(tmp, folder)
        flush(self.out_dir)
        self._drop_others(folder)

    def _drop_others(self, written: Path) -> None:
        """Older ones beyond those to keep, and newer ones: they were found damaged when the run was resumed."""
        folders = checkpoints(self.out_dir)
        n = folders.index(written) + 1
        for folder in folders[: max(0, n - self.keep)] + folders[n:]:
            shutil.rmtree(folder, ignore_errors=True)


def attempt(action: Callable, *arguments, **named) -> str:
    """Call it; what went wrong with a disk, "" where nothing did."""
    try:
        action(*arguments, **named)
    except CheckpointException as error:  # torch's: what went wrong on each rank
        return "; ".join(sorted({str(cause).partition("\n")[0] for cause, _ in error.failures.values()}))
    except (OSError, RuntimeError, SafetensorError) as error:
        return str(error)
    return ""


def _empty(folder: Path) -> None:
    """Make it, without what a killed run has left there or in others."""
    for left in folder.parent.glob("step_*.tmp"):
        shutil.rmtree(left)
    folder.mkdir(parents=True)


def flush(path: Path) -> None:
    """To the disk: a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


# ---- reading


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def checkpoints(out_dir: Path) -> list[Path]:
    """Oldest first, whole or not."""
    return sorted((f for f in out_dir.glob("step_*") if re.fullmatch(r"step_\d+", f.name)), key=step_of)


def read_state(folder: Path) -> dict:
    """What `Checkpoints.save` was given, and `files`. Raises UserError where the checkpoint is damaged."""
    try:
        state = json.loads((folder / STATE).read_text())
        damaged = [name for name, size in state["files"].items() if (folder / name).stat().st_size != size]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder}: damaged ({type(error).__name__}: {error}): remove it") from None
    if damaged:
        raise UserError(f"{folder}: damaged: {damaged[0]} has not the size it was written with: remove it")
    return state


def newest(out_dir: Path) -> tuple[tuple[Path, dict] | None, dict[str, str]]:
    """The last whole checkpoint and its state, None where there is none at all; and what is wrong with newer ones.

    All ranks call it. Raises UserError where not one is whole: the run must not start anew by itself.
    """
    found, skipped = None, {}

    def look() -> None:
        nonlocal found
        for folder in reversed(checkpoints(out_dir)):
            try:
                found = folder.name, read_state(folder)
                return
            except UserError as error:
                skipped[str(folder)] = str(error)
        if skipped:
            raise UserError(f"{out_dir}: none of its checkpoints is whole: choose another out_dir")

    on_main(look)
    found, skipped = exchange([found, skipped])[0]
    return (out_dir / found[0], found[1]) if found else None, skipped


def load(folder: Path, named: dict[str, Tensor]) -> None:
    """Fill these tensors, sharded over any number of ranks or whole, from a checkpoint.

    Raises UserError where one is missing there or has another shape.
    """
    reader = HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    for name, tensor in named.items():
        shape = tuple(stored[name].size) if name in stored else None
        if shape != tuple(tensor.shape):
            raise UserError(
                f"{folder}: {name} has shape {shape}, the model's {tuple(tensor.shape)}: not its checkpoint"
            )
    dcp.load(named, storage_reader=reader, no_dist=not dist.is_initialized())


on_chief = on_main  # old names, until train.py and evaluate.py have moved


def problem_of(folder: Path, *_) -> str:
    try:
        read_state(folder)
    except UserError as error:
        return str(error)
    return ""
