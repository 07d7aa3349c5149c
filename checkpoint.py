"""Checkpoints that are whole or not there, and the lock of the folder that they are in.

    out_dir/lock                              held by the run that is going on
            step_000100/shard-*.safetensors   weights, masks and the moments of both: one file, or one a rank
                        state.json            settings, counters, mix, position in the data; sizes of the other files

A checkpoint is written as step_000100.tmp, flushed and renamed; only then do older ones go. A model that is sharded
over ranks is copied once, to pinned memory that stays, and written from there in the background. Any number of ranks
reads any checkpoint.
"""

import fcntl
import json
import os
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
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from configurator import UserError
from parallel import position, refuse_unequal

STATE = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's state of a parameter, of its shape
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # said at every save of one process


class Lock:
    """Makes a folder one process's own, until that closes it or dies."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, None

    def take(self) -> None:
        """Makes the folder. Raises UserError where another process has it, or it cannot be written into."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = self.file or open(self.folder / "lock", "a")  # noqa: SIM115 (held open)
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            why = "another process uses it" if isinstance(error, BlockingIOError) else error.strerror
            raise UserError(f"{self.folder} cannot be used ({why}): choose another out_dir") from None

    def close(self) -> None:
        if self.file:
            self.file.close()
        self.file = None


@dataclass(frozen=True)
class Saved:
    """How writing a checkpoint went."""

    step: int
    seconds: float
    n_bytes: int
    error: str  # "" where it is on the disk


def tensors(modules: dict[str, nn.Module], optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Every parameter and its moments (model.norm.weight, exp_avg.model.norm.weight, ...), and buffers."""
    state_of = {p: o.state[p] for o in optimizers for group in o.param_groups for p in group["params"]}
    named = {}
    for prefix, module in modules.items():
        for name, p in module.named_parameters(prefix):
            state = state_of[p]
            if not state:  # as Adam makes it at its first step
                state |= {"step": torch.zeros((), device=p.device)} | {m: torch.zeros_like(p) for m in MOMENTS}
            named |= {name: p.detach()} | {f"{m}.{name}": state[m] for m in MOMENTS}
        named |= dict(module.named_buffers(prefix))
    return named


def set_steps(optimizers: Iterable[torch.optim.Optimizer], steps: int) -> None:
    """Tell the optimizers, whose states `tensors` has made, how many steps they have taken."""
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state["step"].fill_(steps)


class Writer(dcp.HuggingFaceStorageWriter):
    """The same bytes as torch's, which makes two more copies of them and lets no other thread run meanwhile."""

    def write_data(self, plan: dcp.SavePlan, planner: dcp.SavePlanner) -> torch.futures.Future:
        tensors = {item.index.fqn: planner.resolve_data(item) for item in plan.items}
        offsets = {item.index.fqn: {"saved_offsets": item.tensor_data.chunk.offsets} for item in plan.items}
        if tensors:
            path = self.path / f"shard-{plan.storage_data['shard_index']:05}-model-00001-of-00001.safetensors"
            metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
            save_file(tensors, path, metadata)
            _flush(path)
        written = torch.futures.Future()
        written.set_result([])
        return written


def stager(pinned: bool) -> DefaultStager:
    """What copies a sharded model to the host before `save` returns; into pinned memory at the bus's speed."""
    return DefaultStager(StagingOptions(pinned, False, False, pinned))


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
        self.stager = stager(pinned=torch.cuda.is_available())
        self.writing: Future[Saved] | None = None

    def save(self, step: int, state: dict, named: dict[str, Tensor]) -> None:
        """Take a checkpoint of what is there now; a sharded one is copied, and written while training goes on.

        The one before must be finished. state: what JSON takes.
        """
        start, tmp, state = time.perf_counter(), self.out_dir / f"step_{step:06}.tmp", json.loads(json.dumps(state))
        for left in self.out_dir.glob("step_*.tmp") if self.is_main else ():  # by a killed run
            shutil.rmtree(left, ignore_errors=True)
        writer = Writer(str(tmp), save_distributed=True)  # makes the folder
        if self.group:
            stage = partial(dcp.async_save, named, storage_writer=writer, process_group=self.group)
            try:
                write = stage(async_stager=self.stager).result
            except RuntimeError:  # perhaps this rank has no memory that may be pinned
                write = None
            if write is None:  # here, where what the failed copy took is free again
                self.stager = stager(pinned=False)
                write = stage(async_stager=self.stager).result
        else:
            write = partial(dcp.save, named, storage_writer=writer, no_dist=True)
        self.writing = self.background.submit(self._finish, step, start, tmp, state, write)
        if not self.group:
            self.writing.result()

    def finished(self) -> Saved | None:
        """Waits until the last checkpoint is written. None where there was none since the last call."""
        saved, self.writing = self.writing and self.writing.result(), None
        return saved

    def _finish(self, step: int, start: float, tmp: Path, state: dict, write: Callable[[], object]) -> Saved:
        n_bytes, problem = 0, ""
        try:
            write()  # raises on every rank where one could not write
            if self.is_main:
                n_bytes = self._commit(tmp, state)
        except OSError as error:
            problem = str(error)
        except dcp.CheckpointException as error:  # torch's, from every rank that failed
            problem = "; ".join(sorted({str(e) for e, _ in error.failures.values()}))
        if problem:
            shutil.rmtree(tmp, ignore_errors=True)  # a full disk has better uses
        return Saved(step, time.perf_counter() - start, n_bytes, problem)

    def _commit(self, tmp: Path, state: dict) -> int:
        """Make what all ranks have written a checkpoint. Returns its bytes."""
        sizes = {f.name: f.stat().st_size for f in tmp.iterdir()}
        (tmp / STATE).write_text(json.dumps({"files": sizes} | state))
        for path in tmp.iterdir():
            _flush(path)
        folder = tmp.with_suffix("")
        shutil.rmtree(folder, ignore_errors=True)  # one that was found damaged
        os.replace(tmp, folder)
        _flush(self.out_dir)
        folders = checkpoints(self.out_dir)
        n = folders.index(folder) + 1
        for other in folders[: max(0, n - self.keep)] + folders[n:]:  # newer ones were found damaged at resume
            shutil.rmtree(other, ignore_errors=True)
        return sum(sizes.values()) + (folder / STATE).stat().st_size


def _flush(path: Path) -> None:
    """To the disk: a file's content, or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def checkpoints(out_dir: Path) -> list[Path]:
    """Oldest first, whole or not."""
    return sorted(out_dir.glob("step_*[0-9]"), key=lambda folder: (len(folder.name), folder.name))


def read_state(folder: Path) -> dict:
    """What `Checkpoints.save` was given, and `files`. Raises UserError where the checkpoint is damaged."""
    try:
        state = json.loads((folder / STATE).read_text())
        damaged = [name for name, size in state["files"].items() if (folder / name).stat().st_size != size]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} is damaged ({type(error).__name__}: {error}): remove it") from None
    if damaged:
        raise UserError(f"{folder} is damaged ({damaged[0]} has not the size it was written with): remove it")
    return state


def newest(out_dir: Path) -> tuple[tuple[Path, dict] | None, dict[Path, str]]:
    """The last whole checkpoint and its state, None where there is none at all; and what is wrong with newer ones.

    All ranks call it. Raises UserError where not one is whole: the run must not start anew by itself.
    """
    found, skipped = None, {}
    for folder in reversed(checkpoints(out_dir)):
        try:
            found = folder, read_state(folder)
            break
        except UserError as error:
            skipped[folder] = str(error)
    refuse_unequal({"newest checkpoint": found and found[0].name})
    if skipped and not found:
        raise UserError(f"{out_dir}: none of its checkpoints is whole: choose another out_dir")
    return found, skipped


def load(folder: Path, named: dict[str, Tensor]) -> None:
    """Fill these tensors, sharded over any number of ranks or whole, from a checkpoint."""
    reader = dcp.HuggingFaceStorageReader(str(folder))
    dcp.load(named, storage_reader=reader, no_dist=not dist.is_initialized())
