"""Nothing is lost: runs that are killed, stopped or out of disk, damaged checkpoints, two runs at once."""

import dataclasses
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tiny import ROOT, Death, at_step, config_of, die, differences, metrics, tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import checkpoint
import evaluate
import hf
import train
from checkpoint import Checkpoints, Lock
from configurator import Stopped, UserError
from metrics import Log, read_metrics
from model import Llama, LlamaConfig

torch.set_num_threads(1)
TENSORS = {"a": torch.arange(6.0).view(2, 3), "exp_avg.a": torch.ones(2, 3)}


# ---- the files of a checkpoint


def saved(out_dir, *steps, keep=9):
    checkpoints = Checkpoints(out_dir, keep)
    for step in steps:
        checkpoints.save(step, {"step": step}, TENSORS)
    return checkpoints.finished()


def steps_in(out_dir):
    return [json.loads((f / "state.json").read_text())["step"] for f in checkpoint.checkpoints(out_dir)]


def test_a_checkpoint_gives_back_its_state_and_tensors(tmp_path):
    last = saved(tmp_path, 1, 2)
    (folder, state), skipped = checkpoint.newest(tmp_path)
    named = {name: torch.zeros_like(t) for name, t in TENSORS.items()}
    checkpoint.load(folder, named)
    assert (state["step"], skipped) == (2, {})
    assert all(torch.equal(named[name], t) for name, t in TENSORS.items())
    assert (last.step, last.error) == (2, "")
    assert last.n_bytes == sum(f.stat().st_size for f in folder.iterdir())


def test_a_checkpoint_is_written_as_torch_s_own_writer_writes_it(tmp_path):
    written = []
    for writer in (checkpoint.Writer, dcp.HuggingFaceStorageWriter):
        folder = tmp_path / writer.__name__
        storage = writer(str(folder), save_distributed=True)
        dcp.save({**TENSORS, "b": torch.ones(3, dtype=torch.uint8)}, storage_writer=storage, no_dist=True)
        (file,) = folder.iterdir()
        with file.open("rb") as f:  # of safetensors: bytes of the header, the header, whose order varies, the tensors
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
            written.append((file.name, header, f.read()))
    assert written[0] == written[1]


@pytest.fixture
def sharded():
    """A weight that is sharded over a group of one rank, and the group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    weight = distribute_tensor(torch.zeros(2, 3), init_device_mesh("cpu", (1,)), [Shard(0)])
    yield weight, dist.group.WORLD
    dist.destroy_process_group()


def test_a_weight_that_changes_right_after_a_save_does_not_reach_the_checkpoint(sharded, tmp_path, monkeypatch):
    weight, group = sharded
    write, changed = checkpoint.Writer.write_data, threading.Event()
    monkeypatch.setattr(checkpoint.Writer, "write_data", lambda *a: changed.wait(60) and write(*a))
    checkpoints = Checkpoints(tmp_path, 9, group)
    for step in (1, 2):
        changed.clear()
        checkpoints.save(step, {"step": step}, {"w": weight})
        weight += 1
        changed.set()
        assert checkpoints.finished().error == ""
    loaded = [torch.zeros(2, 3), torch.zeros(2, 3)]
    for tensor, folder in zip(loaded, checkpoint.checkpoints(tmp_path), strict=True):
        checkpoint.load(folder, {"w": tensor})
    assert [t.unique().tolist() for t in loaded] == [[0.0], [1.0]]


def test_the_newest_checkpoints_stay_in_the_order_of_their_steps(tmp_path):
    saved(tmp_path, 999_998, 999_999, 1_000_000, 1_000_001, keep=3)
    assert steps_in(tmp_path) == [999_999, 1_000_000, 1_000_001]


DAMAGE = {
    "a cut file": lambda f: os.truncate(next(f.glob("*.safetensors")), 100),
    "no tensors": lambda f: next(f.glob("*.safetensors")).unlink(),
    "no state": lambda f: (f / "state.json").unlink(),
    "half a state": lambda f: os.truncate(f / "state.json", 20),
    "another state": lambda f: (f / "state.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before_and_never_read(damage, tmp_path):
    saved(tmp_path, 1, 2)
    damaged = checkpoint.checkpoints(tmp_path)[-1]
    DAMAGE[damage](damaged)
    (folder, state), skipped = checkpoint.newest(tmp_path)
    assert (folder.name, state["step"], list(skipped)) == ("step_000001", 1, [damaged])
    with pytest.raises(UserError, match="step_000002 is damaged"):
        checkpoint.read_state(damaged)
    if (damaged / "state.json").exists():
        with pytest.raises(UserError):
            evaluate.load_any(str(damaged), "cpu")


def test_a_folder_without_a_whole_checkpoint_is_an_error_and_one_without_any_is_not(tmp_path):
    assert checkpoint.newest(tmp_path) == (None, {})
    saved(tmp_path, 1)
    DAMAGE["no state"](tmp_path / "step_000001")
    with pytest.raises(UserError, match="none of its checkpoints is whole"):
        checkpoint.newest(tmp_path)


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_just_written(tmp_path):
    saved(tmp_path, 1, 2, 3)
    DAMAGE["no state"](tmp_path / "step_000003")
    saved(tmp_path, 2, keep=1)
    assert steps_in(tmp_path) == [2]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_save_that_fails_is_told_and_leaves_the_checkpoint_before_and_no_remains(error, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(error, os.strerror(error))

    saved(tmp_path, 1)
    monkeypatch.setattr(checkpoint.os, "replace", full)
    assert os.strerror(error) in saved(tmp_path, 2, keep=1).error
    assert [f.name for f in tmp_path.iterdir()] == ["step_000001"]


def test_what_a_killed_run_has_left_does_not_get_into_a_checkpoint(tmp_path):
    (tmp_path / "step_000002.tmp").mkdir(parents=True)
    (tmp_path / "step_000002.tmp/shard-00002.safetensors").write_bytes(b"half a file")
    saved(tmp_path, 2)
    folder = tmp_path / "step_000002"
    assert list(checkpoint.read_state(folder)["files"]) == [f.name for f in folder.glob("*.safetensors")]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_lock_is_free_again_when_its_process_has_died(tmp_path):
    code = f"import fcntl; f = open({str(tmp_path / 'lock')!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(1); input()"
    holder = subprocess.Popen([sys.executable, "-u", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    lock = Lock(tmp_path)
    with pytest.raises(UserError, match="another process uses it"):
        lock.take()
    holder.kill()
    holder.wait()
    lock.take()
    lock.take()  # its own already
    with open(tmp_path / "lock") as f, pytest.raises(BlockingIOError):
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.close()


# ---- runs


def command(cfg):
    default = dataclasses.asdict(train.Config())
    return [f"--{k}={v}" for k, v in dataclasses.asdict(cfg).items() if v != default[k] and v != ()]


MOMENTS = {  # where: the function that kills instead of being called, and at which call
    "in an evaluation": ("train.evaluate", 4),
    "in a step": ("train.learning_rate", 30),
    "while tensors are written": ("checkpoint.dcp.HuggingFaceStorageWriter.finish", 1),
    "between a checkpoint's files": ("checkpoint._flush", 2),
    "before a checkpoint is renamed": ("checkpoint.os.replace", 2),
    "before the folder is flushed": ("checkpoint._flush", 4),
    "while an older checkpoint is dropped": ("checkpoint.shutil.rmtree", 3),
    "while metrics are cut back": ("metrics.os.replace", 1),
    "in a fit": ("dro.refloss.fit", 3),
    "before the model is extracted": ("train.extract", 1),
    "while the model is written": ("hf.save_file", 1),
}


def found(name):
    """(owner, last part) of a dotted name."""
    *path, last = name.split(".")
    owner = sys.modules[path[0]]
    for part in path[1:]:
        owner = getattr(owner, part)
    return owner, last


def deadly(call, nth, death):
    calls = []

    def trapped(*arguments, **named):
        calls.append(1)
        return death() if len(calls) == nth else call(*arguments, **named)

    return trapped


@pytest.mark.parametrize("where", ["in a step", "between a checkpoint's files", "while the model is written"])
def test_a_run_that_dies_ends_with_the_same_bytes(where, whole, tmp_path, monkeypatch):
    cfg = config_of(whole, tmp_path / "r", resume=True)
    owner, name = found(MOMENTS[where][0])
    with monkeypatch.context() as m, pytest.raises(Death):
        m.setattr(owner, name, deadly(getattr(owner, name), MOMENTS[where][1], die))
        train.main(cfg)
    train.main(cfg)
    assert differences(whole, tmp_path / "r") == []


def killed(arguments, where):
    """A process of its own that kills itself there."""
    code = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import configurator, test_checkpoint, train
owner, name = test_checkpoint.found({MOMENTS[where][0]!r})
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, test_checkpoint.deadly(getattr(owner, name), {MOMENTS[where][1]}, kill))
train.main(configurator.load(train.Config, sys.argv[1:]))
"""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, timeout=200, check=False)
    assert done.returncode == -signal.SIGKILL, (where, done.stderr[-2000:])


@pytest.mark.full
def test_a_run_that_is_killed_eleven_times_leaves_the_same_model_tensors_and_log(whole, tmp_path):
    cfg = config_of(whole, tmp_path / "r", resume=True)
    for where in MOMENTS:
        killed(command(cfg), where)
    train.main(cfg)
    assert differences(whole, tmp_path / "r") == []
    assert [r["step"] for r in metrics(tmp_path / "r", "train")] == list(range(1, 25))


def test_a_run_that_dies_gives_each_warning_once_and_loses_none(data, tmp_path, monkeypatch):
    young = Llama(LlamaConfig(64, 32, 48, 1, 4, 2, 8))
    young.init_weights(17)
    hf.save(young, tmp_path / "young")
    settings = {"domains": ("pairs",), "n_layers": 1, "batch_size": 147, "micro_batch_size": 147, "lr_warmup": 0}
    settings |= {"max_steps": 10, "save_interval": 9, "eval_interval": 5}
    settings |= {"teacher": str(tmp_path / "young"), "distill": 0.1}
    train.main(tiny(data, tmp_path / "whole", **settings))
    with monkeypatch.context() as m, pytest.raises(Death):
        at_step(m, 9, die)
        train.main(tiny(data, tmp_path / "r", **settings))
    train.main(tiny(data, tmp_path / "r", resume=True, **settings))
    said = [[(w["step"], w["text"]) for w in metrics(tmp_path / run, "warning")] for run in ("whole", "r")]
    assert said[0] == said[1]
    assert [step for step, text in said[0] if "passed its teacher" in text or "begins its epoch 2" in text] == [5, 9]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_from_there(name, whole, tmp_path, monkeypatch):
    cfg = config_of(whole, tmp_path / "r", save_interval=100)
    with monkeypatch.context() as m, pytest.raises(Stopped, match="stopped at step 15 of 24, which is saved"):
        at_step(m, 13, lambda: signal.raise_signal(signal.Signals[name]))
        train.main(cfg)
    assert steps_in(tmp_path / "r") == [15]
    train.main(dataclasses.replace(cfg, resume=True))
    assert differences(whole, tmp_path / "r") == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_that_breaks_says_where_and_how_to_go_on(whole, tmp_path, monkeypatch, capsys):
    def broken():
        raise RuntimeError("CUDA error: device-side assert triggered")

    at_step(monkeypatch, 5, broken)
    with pytest.raises(RuntimeError, match="device-side"):
        train.main(config_of(whole, tmp_path / "r"))
    where, command = capsys.readouterr().err.splitlines()[-2:]
    assert re.fullmatch(r"rank 0 of 1 ends after step 5, train.py:\d+ in rate: return learning_rate.*", where)
    assert command.startswith("to go on: ") and command.endswith(" --resume")


LOSES_RANK_1 = f"""
import datetime, os, signal, sys
sys.path[:0] = [{str(ROOT)!r}]
import torch.distributed as dist
import configurator, out, train
out.STOPPING_S, rate, store = 1, train.learning_rate, dist.HashStore()
store.set_timeout(datetime.timedelta(seconds=6))

def lost(step, cfg):
    if step == 5 and not cfg.resume:
        os.environ["RANK"] == "1" and os.kill(os.getpid(), signal.SIGKILL)
        cfg.mix == "constant" and store.get("never")  # as with NCCL: no error comes, and Python hears no signal
    return rate(step, cfg)

train.learning_rate = lost
configurator.command(train.main, train.Config, config_files=True)
"""


@pytest.mark.full
@pytest.mark.parametrize(
    ("mix", "how"), [("dro", "ends"), ("constant", "stands still for 1 s, as if another was lost,")]
)
def test_a_rank_that_loses_another_says_where_it_was_and_the_command_that_ends_the_run(mix, how, data, tmp_path):
    (tmp_path / "run.py").write_text(LOSES_RANK_1)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "run.py"]
    options = dict(cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200)
    cfg = tiny(data, tmp_path / "r", max_steps=8, save_interval=4, mix=mix)
    lost = subprocess.run([*ranks, *command(cfg)], check=False, **options)
    where = re.search(rf"\nrank 0 of 2 {how} after step (\d), train.py:\d+ in (\w+): .+\nto go on: (.+)\n", lost.stderr)
    assert (where[1], where[2]) == (("6", "forward_backward") if how == "ends" else ("5", "rate"))
    subprocess.run(where[3], shell=True, check=True, **options)
    assert [r["step"] for r in metrics(tmp_path / "r", "train")] == list(range(1, 9))


def test_a_damaged_checkpoint_is_warned_about_and_the_run_ends_with_the_same_bytes(whole, tmp_path, monkeypatch):
    cfg = config_of(whole, tmp_path / "r", resume=True)
    with monkeypatch.context() as m, pytest.raises(Death):
        at_step(m, 18, die)
        train.main(cfg)
    DAMAGE["a cut file"](tmp_path / "r/step_000016")
    train.main(cfg)
    (warning,) = [r for r in metrics(tmp_path / "r", "warning") if "damaged" in r["text"]]
    assert warning["step"] == 12 and "step_000016" in warning["text"]
    assert differences(whole, tmp_path / "r") == []


def test_a_run_goes_on_where_a_checkpoint_could_not_be_written(whole, tmp_path, monkeypatch):
    replace = os.replace

    def full(a, b):
        if str(b).endswith(("step_000008", "step_000012")):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(a, b)

    monkeypatch.setattr(checkpoint.os, "replace", full)
    train.main(config_of(whole, tmp_path / "r"))
    warnings = [r["text"] for r in metrics(tmp_path / "r", "warning") if "not written" in r["text"]]
    assert len(warnings) == 2 and all("No space left on device" in text for text in warnings)
    assert differences(whole, tmp_path / "r") == []


def test_records_that_a_full_disk_refuses_are_written_whole_when_there_is_room(tmp_path, monkeypatch):
    log = Log(tmp_path / "metrics.jsonl", True)
    log.open(0)
    pwrite, room = os.pwrite, [10_000, 7, 0, 10_000]  # bytes that go onto the disk
    monkeypatch.setattr(os, "pwrite", lambda fd, raw, at: pwrite(fd, raw[: room.pop(0)], at))
    for step, there in enumerate([[0], [0], [0], [0, 1, 2, 3]]):
        log.record({"kind": "save", "step": step})
        assert [r["step"] for r in read_metrics(log.path)] == there
    log.close()


def test_records_that_cannot_be_written_say_why(tmp_path, monkeypatch, capsys):
    log = Log(tmp_path / "metrics.jsonl", True)
    log.open(0)

    def refuse(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "pwrite", refuse)
    log.record({"kind": "save", "step": 0})
    log.close()
    assert "metrics.jsonl: Disk quota exceeded: its records wait" in capsys.readouterr().out


def test_a_second_run_in_an_out_dir_is_refused_as_long_as_the_first_lives(whole, tmp_path, monkeypatch):
    cfg, refused = config_of(whole, tmp_path / "r"), []

    def second():
        with pytest.raises(UserError, match="another process uses it"):
            train.main(dataclasses.replace(cfg, resume=True))
        refused.append(1)

    at_step(monkeypatch, 5, second)
    train.main(cfg)
    assert refused == [1]
    assert differences(whole, tmp_path / "r") == []
