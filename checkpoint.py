"""Checkpoints that are whole or not there, and the lock of the folder that they are in.

    out_dir/lock                              held by the run that is going on
            step_000100/state.json            settings, counters, mix, position in the data
                        shard-*.safetensors   weights, masks and the moments of both: one file, or one a rank
                        SHA256SUMS            of all of them; `sha256sum -c SHA256SUMS` checks a folder by hand

A checkpoint is written as step_000100.tmp, flushed, read back and renamed; only then do older ones go. A model that is
sharded over ranks is copied to the CPU and written in the background. Any number of ranks reads any checkpoint.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from configurator import UserError
from data.shards import sha256
from metrics import fits
from parallel import exchange, position

STATE, SUMS = "state.json", "SHA256SUMS"
FIELDS = {
    "config": {},
    "data": str,
    "step": int,
    "skipped": int,
    "skipped_in_a_row": int,
    "tokens_M": [float | int],
    "source": {},
    "target": ({}, None),
    "mix": {},
    "loader": {str: [int]},
}
warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # said at every save of one process
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's state of a parameter, of its shape


def on_chief(action: Callable[[], None]) -> None:
    """Call it on the first rank; a UserError there is raised on every rank."""
    problem = ""
    if position()[0] == 0:
        try:
            action()
        except UserError as error:
            problem = str(error)
    if problem := exchange(problem)[0]:
        raise UserError(problem)


# ---- the lock


class Lock:
    """Makes a folder one process's own, until that closes it or dies."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, None

    def take(self) -> None:
        """Raises UserError where another process has it, or the folder cannot be written into."""
        if self.file:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.file = open(self.folder / "lock", "a+")  # noqa: SIM115 (held open)
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip() or "of unknown number"
            self.close()
            raise UserError(f"{self.folder} is in use by process {holder}: choose another out_dir") from None
        except OSError as error:
            raise UserError(f"{self.folder} cannot be used ({error.strerror}): choose another out_dir") from None
        with suppress(OSError):  # on a full disk it is locked without a name
            os.ftruncate(self.file.fileno(), 0)
            os.write(self.file.fileno(), f"{os.getpid()} on {os.uname().nodename}\n".encode())

    def close(self) -> None:
        if self.file:
            self.file.close()
        self.file = None


# ---- checkpoints


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


class Checkpoints:
    """Writes the checkpoints of one run. How it went is told, never raised: the run is worth more than a checkpoint.

    keep: how many of the newest stay; keep_every: so do those at multiples of this step, 0 for none.
    group: of all ranks of a sharded model, used for nothing else: training's own messages would get between those of
    the writers. None: this process has all of the model.
    """

    def __init__(self, out_dir: Path, keep: int, keep_every: int, group: dist.ProcessGroup | None) -> None:
        self.out_dir, self.keep, self.keep_every, self.group = out_dir, keep, keep_every, group
        self.chief = group is None or position()[0] == 0
        self.background = ThreadPoolExecutor(1)
        self.writing: Future[Saved] | None = None

    def save(self, step: int, state: dict, named: dict[str, Tensor]) -> None:
        """Take a checkpoint of what is there now; a sharded one is copied, and written while training goes on."""
        start, text, beside = time.perf_counter(), json.dumps(state), self.out_dir / f"step_{step:06}.tmp"
        finish = partial(self._finish, step, start, beside, text, set(named))
        problem = attempt(empty, beside) if self.chief else ""
        if problem := first(self._of_all_ranks(problem)):
            self.writing = done(Saved(step, 0.0, 0, problem))
            return
        writer = HuggingFaceStorageWriter(str(beside), save_distributed=True)
        if self.group:
            written = dcp.async_save(named, storage_writer=writer, process_group=self.group)
            self.writing = self.background.submit(finish, written.result)
        else:
            self.writing = done(finish(partial(dcp.save, named, storage_writer=writer, no_dist=True)))

    def finished(self, wait: bool = False) -> list[Saved]:
        """The checkpoint whose writing has ended since the last call, if one has."""
        if self.writing is None or not (wait or self.writing.done()):
            return []
        saved, self.writing = self.writing.result(), None
        return [saved]

    def _of_all_ranks(self, value: object, group: dist.ProcessGroup | None = None) -> list:
        return exchange(value, group) if self.group else [value]

    def _finish(self, step: int, start: float, beside: Path, text: str, names: set, write: Callable) -> Saved:
        """The ranks compute the checksums together; the first writes them and the state, and makes it a checkpoint."""
        sums: dict[str, str] = {}
        problem = attempt(write) or attempt(lambda: sums.update(sums_of_share(beside, self.group is not None)))
        of_ranks = self._of_all_ranks([problem, sums], self.group)
        problem = first(p for p, _ in of_ranks)
        folder, n_bytes = beside.with_suffix(""), 0
        if self.chief and not problem:
            for _, part in of_ranks:
                sums |= part
            problem = attempt(self._commit, beside, folder, text, names, sums)
        if self.chief and problem:
            shutil.rmtree(beside, ignore_errors=True)  # a full disk has better uses
        elif self.chief:
            n_bytes = sum(f.stat().st_size for f in folder.iterdir())
        return Saved(step, time.perf_counter() - start, n_bytes, problem)

    def _commit(self, beside: Path, folder: Path, text: str, names: set[str], sums: dict[str, str]) -> None:
        missing = names - {key for name in sums for key in keys_of(beside / name)}
        if missing:
            raise UserError(f"{beside}: {len(missing)} tensors were not written, {min(missing)} among them")
        write_text(beside / STATE, text)
        sums[STATE] = sha256(beside / STATE)
        if sums[STATE] != hashlib.sha256(text.encode()).hexdigest():
            raise UserError(f"{beside / STATE}: reads otherwise than it was written")
        write_text(beside / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
        shutil.rmtree(folder, ignore_errors=True)  # one that was found broken
        os.replace(beside, folder)
        flush(folder.parent)
        self._drop(folder)

    def _drop(self, written: Path) -> None:
        """Older ones beyond those to keep, and newer ones: they were found broken when the run was resumed."""
        folders = checkpoints(self.out_dir)
        n_up_to_now = folders.index(written) + 1
        older, newer = folders[: max(0, n_up_to_now - self.keep)], folders[n_up_to_now:]
        for folder in [f for f in older if not self.keep_every or step_of(f) % self.keep_every] + newer:
            shutil.rmtree(folder, ignore_errors=True)


def attempt(action: Callable, *arguments) -> str:
    """Call it; what went wrong, "" where nothing did."""
    try:
        action(*arguments)
    except CheckpointException as error:  # of torch: what went wrong on each rank
        return "; ".join(sorted({str(cause).partition("\n")[0] for cause, _ in error.failures.values()}))
    except (OSError, RuntimeError, SafetensorError) as error:
        return str(error)
    return ""


def first(problems: Iterable[str]) -> str:
    return next(filter(None, problems), "")


def done(result: Saved) -> Future[Saved]:
    future = Future()
    future.set_result(result)
    return future


def empty(folder: Path) -> None:
    """Make it, without what a killed run has left there or in others."""
    for left in folder.parent.glob("step_*.tmp"):
        shutil.rmtree(left)
    folder.mkdir(parents=True)


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    path.write_text(text)
    flush(path)


def sums_of_share(folder: Path, shared: bool) -> dict[str, str]:
    """Checksums of the tensors' files, of every world_size-th one where the ranks share the work."""
    rank, world_size = position() if shared else (0, 1)
    return {f.name: sha256(f) for f in sorted(folder.glob("*.safetensors"))[rank::world_size]}


def keys_of(path: Path) -> set[str]:
    with safe_open(path, framework="pt") as f:
        return set(f.keys())


# ---- and back


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def checkpoints(out_dir: Path) -> list[Path]:
    """Oldest first, whole or not."""
    return sorted((f for f in out_dir.glob("step_*") if re.fullmatch(r"step_\d+", f.name)), key=step_of)


def problem_of(folder: Path, rank: int = 0, world_size: int = 1) -> str:
    """What is wrong with a checkpoint's files, "" where nothing is; a rank looks at every world_size-th of them."""
    try:
        return _problem_of(folder, rank, world_size)
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read ({error.strerror})"


def _problem_of(folder: Path, rank: int, world_size: int) -> str:
    if not (folder / SUMS).is_file():
        return f"{SUMS} is missing"
    lines = (folder / SUMS).read_text(errors="replace").splitlines()
    matches = [re.fullmatch(r"([0-9a-f]{64})  ([\w.-]+)", line) for line in lines]
    if not all(matches) or STATE not in (m[2] for m in matches):
        return f"{SUMS} is broken"
    for digest, name in [m.groups() for m in matches][rank::world_size]:
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != digest:
            return f"{name} does not have the checksum it was written with"
    return ""


def read_state(folder: Path) -> dict:
    """state.json, of a folder whose checksums agree. Raises UserError."""
    try:
        state = json.loads((folder / STATE).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / STATE}: cannot be read ({type(error).__name__}): remove the folder") from None
    for name, form in FIELDS.items():
        if not isinstance(state, dict) or name not in state or not fits(state[name], form):
            raise UserError(f"{folder / STATE}: {name} is missing or no such thing: no run of this version wrote it")
    return state


def newest(out_dir: Path) -> tuple[tuple[Path, dict] | None, dict[str, str]]:
    """The last whole checkpoint and its state, None where there is none at all; and what is wrong with newer ones.

    All ranks call it. Raises UserError where not one is whole: the run must not start anew by itself.
    """
    problems = {}
    names = exchange([f.name for f in checkpoints(out_dir)])[0]
    for name in reversed(names):
        problem = first(exchange(problem_of(out_dir / name, *position())))
        if not problem:
            return (out_dir / name, read_state(out_dir / name)), problems
        problems[str(out_dir / name)] = problem
    if names:
        raise UserError(f"{out_dir}: none of its checkpoints is whole ({name}: {problem}): choose another out_dir")
    return None, {}


def check_shapes(folder: Path, named: dict[str, Tensor]) -> HuggingFaceStorageReader:
    """Raises UserError naming the first of these tensors, of any device, that is missing or of another shape."""
    reader = HuggingFaceStorageReader(str(folder))
    try:
        stored = reader.read_metadata().state_dict_metadata
    except Exception as error:  # whatever a broken header makes torch raise
        raise UserError(f"{folder}: its tensors cannot be read ({type(error).__name__}): remove it") from error
    for name, tensor in named.items():
        shape = tuple(stored[name].size) if name in stored else None
        if shape != tuple(tensor.shape):
            raise UserError(
                f"{folder}: {name} has shape {shape}, the model's {tuple(tensor.shape)}: not its checkpoint"
            )
    return reader


def load(folder: Path, named: dict[str, Tensor]) -> None:
    """Fill these tensors, shared out over any number of ranks or whole, from a checkpoint. Raises UserError."""
    reader = check_shapes(folder, named)
    dcp.load(named, storage_reader=reader, no_dist=not dist.is_initialized())


def set_steps(optimizers: Iterable[torch.optim.Optimizer], steps: int) -> None:
    """That the optimizers have taken."""
    for optimizer in optimizers:
        for state in optimizer.state.values():
            state["step"].fill_(steps)
