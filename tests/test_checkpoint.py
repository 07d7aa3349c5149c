"""Nothing lost: killed, stopped, corrupted, full disks, two runs at once, ranks that die or differ."""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import chaos
import numpy as np
import pytest
import torch
from test_train import RANKS, ROOT, T, data, metrics, prune_tiny, source, tensors_in, tiny, torchrun  # noqa: F401 (fixtures)

import checkpoint
import evaluate
import metrics as run_metrics
import model as llama
import plot
import train
from checkpoint import Lock, problem_of
from configurator import UserError
from metrics import Log
from train import Stopped


@pytest.fixture(scope="module")
def whole(data, source, tmp_path_factory):  # noqa: F811
    """A pruning run that nothing happened to."""
    out = tmp_path_factory.mktemp("run") / "whole"
    train.main(prune_tiny(data, out, source, save_interval=4, eval_interval=2, eval_sequences=4))
    return out


def config_of(whole, out_dir, **changes):
    """The settings of that run, elsewhere."""
    settings = run_metrics.read_metrics(whole / "metrics.jsonl")[0]["config"]
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
    return train.Config(**(settings | {"out_dir": str(out_dir)} | changes))


def command(cfg):
    default = dataclasses.asdict(train.Config())
    return [f"--{k}={v}" for k, v in dataclasses.asdict(cfg).items() if v != default[k] and v != ()]


@pytest.mark.parametrize("where", ["while tensors are written", "between a checkpoint's files"])
def test_a_run_killed_with_sigkill_ends_with_the_same_bytes(where, whole, tmp_path):
    cfg, (function, nth) = config_of(whole, tmp_path / "r", resume=True), chaos.MOMENTS[where]
    killed = chaos.start(command(cfg), function, nth)
    assert killed.wait(120) == -signal.SIGKILL, killed.stderr.read()
    train.main(cfg)
    assert chaos.differences(whole, tmp_path / "r") == []


class Death(BaseException):
    """As sudden as a signal, for one process."""


@pytest.mark.parametrize("where", sorted(set(chaos.MOMENTS) - {"while tensors are written"}))
def test_a_run_that_dies_at_any_moment_ends_with_the_same_bytes(where, whole, tmp_path, monkeypatch):
    cfg, function = config_of(whole, tmp_path / "r", resume=True), chaos.MOMENTS[where][0]
    *path, name = function.split(".")
    owner = sys.modules[path[0]]
    for part in path[1:]:
        owner = getattr(owner, part)
    call, calls = getattr(owner, name), []

    def deadly(*arguments, **named):
        calls.append(1)
        if len(calls) == min(2, chaos.MOMENTS[where][1]):
            raise Death
        return call(*arguments, **named)

    with monkeypatch.context() as m, pytest.raises(Death):
        m.setattr(owner, name, deadly)
        train.main(cfg)
    train.main(cfg)
    assert chaos.differences(whole, tmp_path / "r") == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint_and_it_goes_on_from_there(
    name, whole, tmp_path, monkeypatch
):
    cfg, rate = config_of(whole, tmp_path / "r", save_interval=100), train.learning_rate
    with monkeypatch.context() as m, pytest.raises(Stopped, match="stopped at step 15 of 40, which is saved"):
        signalled = lambda step, c: [step == 13 and signal.raise_signal(signal.Signals[name]), rate(step, c)][1]  # noqa: E731
        m.setattr(train, "learning_rate", signalled)
        train.main(cfg)
    assert [f.name for f in checkpoint.checkpoints(tmp_path / "r")] == ["step_000015"]
    train.main(dataclasses.replace(cfg, resume=True))
    assert chaos.differences(whole, tmp_path / "r") == []
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_command_line_ends_a_stopped_run_with_success_and_the_command_that_resumes_it(whole, tmp_path):
    cfg = config_of(whole, tmp_path / "r", max_steps=100_000, log_interval=1)
    process = subprocess.Popen([sys.executable, "train.py", *command(cfg)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 3:"):
            process.send_signal(signal.SIGTERM)
            break
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    last = out.splitlines()[-1]
    assert "which is saved; to go on: python train.py" in last
    assert last.endswith("--resume")
    assert f"--out_dir={tmp_path / 'r'}" in last


def test_the_newest_checkpoints_stay_and_every_kth(data, tmp_path):  # noqa: F811
    train.main(tiny(data, tmp_path / "r", save_interval=4, keep_checkpoints=2, keep_every=12, max_steps=30))
    kept = [checkpoint.step_of(f) for f in checkpoint.checkpoints(tmp_path / "r")]
    assert kept == [12, 24, 28, 30]
    saves = metrics(tmp_path / "r", "save")
    assert [r["step"] for r in saves] == [4, 8, 12, 16, 20, 24, 28, 30]
    folder = checkpoint.checkpoints(tmp_path / "r")[-1]
    assert saves[-1]["bytes"] == sum(f.stat().st_size for f in folder.iterdir())
    assert saves[-1]["save_s"] > 0


def test_a_broken_newer_checkpoint_does_not_push_out_the_one_just_written(whole, tmp_path, monkeypatch):
    out, rate = tmp_path / "r", train.learning_rate
    shutil.copytree(whole, out)
    before, broken = checkpoint.checkpoints(out)[-2:]
    (broken / "state.json").unlink()
    at, cfg = checkpoint.step_of(before) + 1, config_of(whole, out, resume=True, keep_checkpoints=1)
    with monkeypatch.context() as m, pytest.raises(Stopped):
        signalled = lambda step, c: [step == at and signal.raise_signal(signal.SIGTERM), rate(step, c)][1]  # noqa: E731
        m.setattr(train, "learning_rate", signalled)
        train.main(cfg)
    assert [checkpoint.step_of(f) for f in checkpoint.checkpoints(out)] == [at + 2]
    train.main(cfg)
    assert chaos.differences(whole, out) == []


def test_a_checkpoint_that_cannot_be_read_is_skipped_with_the_reason(whole, tmp_path, monkeypatch):
    def failing(path):
        if path.parent.name == newest and path.suffix == ".safetensors":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return digest(path)

    digest, newest = checkpoint.sha256, checkpoint.checkpoints(whole)[-1].name
    monkeypatch.setattr(checkpoint, "sha256", failing)
    found, problems = checkpoint.newest(whole)
    assert found[0].name != newest
    assert re.search(r"\.safetensors cannot be read \(Input/output error\)", problems[str(whole / newest)])


def test_a_full_disk_does_not_keep_a_run_from_taking_its_folder(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    lock = Lock(tmp_path)
    lock.take()
    with pytest.raises(UserError, match="is in use by process of unknown number"):
        Lock(tmp_path).take()
    lock.close()


def test_anyone_can_check_a_checkpoint_with_sha256sum(whole):
    folder = checkpoint.checkpoints(whole)[-1]
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert set(sums) == {f.name for f in folder.iterdir()} - {"SHA256SUMS"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest for name, digest in sums.items())


DAMAGE = {
    "a flipped bit": lambda f: flip(next(f.glob("*.safetensors"))),
    "a cut file": lambda f: os.truncate(next(f.glob("*.safetensors")), 1000),
    "no tensors": lambda f: next(f.glob("*.safetensors")).unlink(),
    "another state": lambda f: (f / "state.json").write_text("{}"),
    "no checksums": lambda f: (f / "SHA256SUMS").unlink(),
    "nonsense for checksums": lambda f: (f / "SHA256SUMS").write_bytes(b"\xff\n../../etc/passwd\n"),
    "empty checksums": lambda f: (f / "SHA256SUMS").write_text(""),
}


def flip(path, at=-1):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def shortened(whole, folder, step):
    """A copy of a run that was killed after a step that is a multiple of 4: its last two checkpoints are whole."""
    cfg = config_of(whole, folder)
    rate = train.learning_rate
    with pytest.MonkeyPatch.context() as m, pytest.raises(Death):
        m.setattr(train, "learning_rate", lambda at, c: die() if at == step else rate(at, c))
        train.main(cfg)
    return dataclasses.replace(cfg, resume=True)


def die():
    raise Death


@pytest.fixture(scope="module")
def unfinished(whole, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "unfinished"
    return out, shortened(whole, out, 27)


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before_and_said_so(damage, whole, unfinished, tmp_path, capsys):
    out, cfg = tmp_path / "r", dataclasses.replace(unfinished[1], out_dir=str(tmp_path / "r"))
    shutil.copytree(unfinished[0], out)
    DAMAGE[damage](out / "step_000024")
    train.main(cfg)
    printed = capsys.readouterr().out
    said = f"step 20: the checkpoint {out / 'step_000024'} is skipped: "
    assert printed.count(said) == 2  # at the start and at the end
    assert f"resumed at step 20, from {out / 'step_000020'}" in printed
    assert chaos.differences(whole, out) == []


def test_a_checkpoint_of_before_a_setting_existed_had_its_default():
    cfg = train.Config(stage="continue", seed=5)
    saved = {k: v for k, v in dataclasses.asdict(cfg).items() if k != "damping"}
    train.same_run(saved, cfg, "r")
    with pytest.raises(UserError, match=r"r: was written with damping = 1.0, this run has 10.0"):
        train.same_run(saved, dataclasses.replace(cfg, damping=10.0), "r")


def test_a_run_without_any_whole_checkpoint_does_not_start_anew_by_itself(unfinished, tmp_path):
    out, cfg = tmp_path / "r", dataclasses.replace(unfinished[1], out_dir=str(tmp_path / "r"))
    shutil.copytree(unfinished[0], out)
    for folder in checkpoint.checkpoints(out):
        flip(folder / "state.json", at=5)
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"none of its checkpoints is whole \(step_000020: state.json"):
        train.main(cfg)
    assert (out / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_neither_evaluated_nor_exported(damage, unfinished, tmp_path):
    shutil.copytree(unfinished[0] / "step_000024", tmp_path / "step_000024")
    DAMAGE[damage](tmp_path / "step_000024")
    with pytest.raises(UserError):
        evaluate.load_any(str(tmp_path / "step_000024"), "cpu")


@pytest.mark.parametrize("change", [{"source": {}}, {"step": "3"}, {"mix": None}, {"config": []}, None])
def test_a_state_that_is_none_is_refused_by_field_though_its_checksum_agrees(change, unfinished, tmp_path):
    folder = tmp_path / "step_000024"
    shutil.copytree(unfinished[0] / "step_000024", folder)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | change if change is not None else [1]))
    digest = hashlib.sha256((folder / "state.json").read_bytes()).hexdigest()
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    lines = [f"{digest}  state.json" if line.endswith("state.json") else line for line in lines]
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    assert problem_of(folder) == ""
    with pytest.raises(UserError, match="not a checkpoint of train"):
        evaluate.load_any(str(folder), "cpu")


@pytest.mark.parametrize("change", [{"mix": {}}, {"mix": {"ratio_M": "x"}}, {"loader": {"count": [1]}}, {"loader": {}}])
def test_a_state_of_no_run_of_this_kind_is_refused_in_one_line(change, unfinished, tmp_path):
    shutil.copytree(unfinished[0], tmp_path / "r")
    folder = tmp_path / "r/step_000024"
    state = json.loads((folder / "state.json").read_text())
    for name, value in change.items():
        state[name] = state[name] | value if name == "mix" and value else value
    (folder / "state.json").write_text(json.dumps(state))
    lines = [line for line in (folder / "SHA256SUMS").read_text().splitlines() if not line.endswith("state.json")]
    lines.append(f"{hashlib.sha256((folder / 'state.json').read_bytes()).hexdigest()}  state.json")
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="step_000024: its mix or position in the data is of no run") as caught:
        train.main(dataclasses.replace(unfinished[1], out_dir=str(tmp_path / "r")))
    assert "\n" not in str(caught.value)


def test_figures_are_drawn_of_a_run_in_progress(unfinished, tmp_path):
    (tmp_path / "r").mkdir()
    raw = (unfinished[0] / "metrics.jsonl").read_bytes()
    (tmp_path / "r/metrics.jsonl").write_bytes(raw[:-100])  # half a line at the end
    assert len(plot.plot([str(tmp_path / "r")], tmp_path)) == 4


# ---- disks


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
def test_a_save_that_fails_is_warned_about_and_the_run_goes_on(error, whole, tmp_path, monkeypatch, capsys):
    replace, failing = os.replace, []

    def full(a, b):
        if str(b).endswith(("step_000008", "step_000012")):
            failing.append(b)
            raise OSError(error, os.strerror(error))
        replace(a, b)

    monkeypatch.setattr(checkpoint.os, "replace", full)
    train.main(config_of(whole, tmp_path / "r"))
    printed = capsys.readouterr().out
    warning = f"the checkpoint of step 8 was not written, those before it stay: [Errno {error}] {os.strerror(error)}"
    assert f"warning: step 8: {warning}" in printed
    assert f"  step 8: {warning}" in printed[printed.index("warnings of this run: ") :]
    assert len(failing) == 2
    assert chaos.differences(whole, tmp_path / "r") == []
    assert not list((tmp_path / "r").glob("*.tmp"))


SMALL_DISK = """
import resource, signal, sys
sys.path.insert(0, {root!r})
import train
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(train.command_line(sys.argv[1:]))
"""


def test_a_run_that_can_save_nothing_says_so_at_every_save_and_ends_in_an_error(whole, tmp_path):
    """No file may become larger than 12 kB, metrics.jsonl neither."""
    assert (whole / "model/model.safetensors").stat().st_size > 12_000
    code = SMALL_DISK.format(root=str(ROOT), limit=12_000)
    run = [sys.executable, "-c", code, *command(config_of(whole, tmp_path / "r"))]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("was not written, those before it stay: ") >= 10
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'r' / 'model'} could not be written (")
    assert not checkpoint.checkpoints(tmp_path / "r")
    assert len(run_metrics.read_metrics(tmp_path / "r/metrics.jsonl")) > 5


def test_records_that_a_full_disk_refuses_are_written_whole_when_there_is_room(tmp_path, monkeypatch):
    log = Log(tmp_path / "metrics.jsonl", chief=True)
    log.open(0)
    log.record({"kind": "save", "step": 0})
    pwrite, room = os.pwrite, [7, 0, 10_000]  # bytes that go onto the disk

    def small(descriptor, raw, at):
        n = room.pop(0)
        if not n:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, raw[:n], at)

    monkeypatch.setattr(run_metrics.os, "pwrite", small)
    for step in (1, 2):
        log.record({"kind": "save", "step": step})
        assert run_metrics.read_metrics(log.path) == [{"kind": "save", "step": 0}]
    log.record({"kind": "save", "step": 3})
    log.close()
    assert [r["step"] for r in run_metrics.read_metrics(log.path)] == [0, 1, 2, 3]


# ---- a step that went wrong


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the loss of one sequence, or the gradient, NaN at given forward passes of training."""

    def poison(calls_that_are_bad, of_gradient=False):
        forward, calls = llama.Llama.forward, []

        def broken(self, tokens, targets=None, subnetwork=None):
            loss = forward(self, tokens, targets, subnetwork)
            if torch.is_grad_enabled():
                calls.append(1)
                if len(calls) in calls_that_are_bad:
                    if of_gradient:
                        loss.register_hook(lambda g: g * torch.nan)
                    else:
                        loss = torch.cat((loss[:-1], loss[-1:] * torch.nan))
            return loss

        monkeypatch.setattr(llama.Llama, "forward", broken)

    return poison


@pytest.mark.parametrize("of_gradient", [False, True])
def test_a_step_that_is_not_finite_is_skipped_counted_and_said_with_domain_and_shard(
    of_gradient,
    whole,
    data,
    tmp_path,
    poisoned,
    capsys,
):
    poisoned({13}, of_gradient)  # two micro-batches a step: the seventh
    last = train.main(config_of(whole, tmp_path / "r"))
    assert np.isfinite(last["val_loss"]).all()
    steps = metrics(tmp_path / "r", "train")
    assert [r["skipped"] for r in steps] == [0] * 6 + [1] * 34
    assert steps[6]["loss"] is None and steps[6]["tokens"] == steps[5]["tokens"]
    assert sum(steps[-1]["tokens"]) == 39 * 8 * T
    (warning,) = [r for r in metrics(tmp_path / "r", "warning") if "skipped" in r["text"]]
    assert warning["step"] == 6
    what = "the gradient is not finite, the highest loss is" if of_gradient else "the loss is not finite"
    domain = "pairs" if "pairs" in warning["text"] else "count"
    assert warning["text"] == f"the step was skipped, {what} on domain {domain}, {data / f'{domain}_train.bin'}"
    assert f"  step 6: {warning['text']}" in capsys.readouterr().out  # in the summary


def test_the_sequence_that_is_blamed_for_a_skipped_step_is_the_one(whole, tmp_path, poisoned):
    poisoned({13})
    train.main(config_of(whole, tmp_path / "r"))
    cfg = config_of(whole, "")
    loader = train.DomainLoader(cfg.data, ("count", "pairs"), T, cfg.seed, "train")
    for step in range(7):
        batch = loader.next_batch(step, loader.size_M / loader.size_M.sum(), 8)
    (warning,) = [r for r in metrics(tmp_path / "r", "warning") if "skipped" in r["text"]]
    assert f"on domain {('count', 'pairs')[batch.domain_N[3]]}, " in warning["text"]  # last of the first micro-batch


def test_a_skipped_step_touches_neither_weights_nor_masks_nor_multipliers(whole, tmp_path, poisoned):
    poisoned({27})  # step index 13
    cfg = config_of(whole, tmp_path / "r", save_interval=1, keep_checkpoints=100)
    train.main(cfg)
    before, after = tensors_in(tmp_path / "r/step_000013"), tensors_in(tmp_path / "r/step_000014")
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_ten_steps_in_a_row_that_are_not_finite_stop_the_run_and_nine_do_not(whole, tmp_path, poisoned):
    poisoned(set(range(5, 5 + 18)))
    train.main(config_of(whole, tmp_path / "nine"))
    poisoned(set(range(5, 500)))
    with pytest.raises(UserError, match="10 steps in a row were skipped, at last since the loss is not finite on"):
        train.main(config_of(whole, tmp_path / "ten"))


def test_a_run_with_a_skipped_step_resumes_to_the_same_bytes(whole, tmp_path, poisoned, monkeypatch):
    poisoned({13})
    train.main(config_of(whole, tmp_path / "a"))
    poisoned({13})
    rate = train.learning_rate
    with monkeypatch.context() as m, pytest.raises(Death):
        m.setattr(train, "learning_rate", lambda at, c: die() if at == 21 else rate(at, c))
        train.main(config_of(whole, tmp_path / "b"))
    poisoned(set())
    train.main(config_of(whole, tmp_path / "b", resume=True))
    assert chaos.differences(tmp_path / "a", tmp_path / "b") == []


def test_evaluation_that_eats_more_than_its_share_is_warned_about_once(data, tmp_path, capsys):  # noqa: F811
    train.main(tiny(data, tmp_path / "r", eval_interval=1, eval_sequences=64, max_steps=20))
    assert capsys.readouterr().out.count("warning: step 4: evaluation takes ") == 1


# ---- two runs, many ranks


def test_a_second_run_in_an_out_dir_is_refused_as_long_as_the_first_lives(whole, tmp_path, monkeypatch):
    cfg, rate, refused = config_of(whole, tmp_path / "r"), train.learning_rate, []

    def second(at, c):
        if at == 5:
            with pytest.raises(UserError, match=rf"r is in use by process {os.getpid()} on "):
                train.main(dataclasses.replace(cfg, resume=True))
            refused.append(at)
        return rate(at, c)

    monkeypatch.setattr(train, "learning_rate", second)
    train.main(cfg)
    assert refused == [5]
    assert chaos.differences(whole, tmp_path / "r") == []


def test_a_lock_is_free_again_when_its_process_has_died(tmp_path):
    code = f"import fcntl; f = open({str(tmp_path / 'lock')!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(1); input()"
    holder = subprocess.Popen([sys.executable, "-u", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    lock = Lock(tmp_path)
    with pytest.raises(UserError, match="is in use by process"):
        lock.take()
    holder.kill()
    holder.wait()
    lock.take()
    with open(tmp_path / "lock") as f, pytest.raises(BlockingIOError):
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    lock.close()


def test_an_out_dir_that_cannot_be_written_is_refused_before_the_first_step(data, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/r cannot be used \(Not a directory\): choose another out_dir"):
        train.main(tiny(data, tmp_path / "file/r"))


AT_STEP_25 = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
rate = train.learning_rate
def harmed(step, cfg):
    if step == 25 and os.environ["RANK"] == "1":
        {harm}
    return rate(step, cfg)
train.learning_rate = harmed
sys.exit(train.command_line(sys.argv[1:]))
"""
HARM = {
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", "rank 0, taking step 2[67]: another rank is gone, or made"),
    "fails": ("raise UserError('the dog ate it')", "the dog ate it"),
    "hangs": ("os.kill(os.getpid(), signal.SIGSTOP)", "longer than rank_timeout = 5 s"),
}


@pytest.mark.parametrize("harm", ["killed", *(pytest.param(h, marks=pytest.mark.full) for h in ("fails", "hangs"))])
def test_a_rank_that_dies_ends_the_others_with_its_error_on_top(harm, data, source, tmp_path):  # noqa: F811
    (tmp_path / "harmed.py").write_text(AT_STEP_25.format(root=str(ROOT), harm=HARM[harm][0]))
    cfg = prune_tiny(data, tmp_path / "r", source, rank_timeout=5 if harm == "hangs" else 60, **RANKS)
    errors = torchrun(cfg, 2, script=tmp_path / "harmed.py", succeeds=False)
    first = next(line for line in errors.splitlines() if line.startswith("error: "))
    assert re.search(HARM[harm][1], first), errors[-3000:]
    train.main(dataclasses.replace(cfg, resume=True))
    assert metrics(tmp_path / "r", "train")[-1]["step"] == 30


STOPPED_WHILE_SAYING_WHY = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
first = train.is_first_to_say
def asked_to_stop(message):
    os.kill(os.getpid(), signal.SIGTERM)
    return first(message)
train.is_first_to_say = asked_to_stop
sys.exit(train.command_line(sys.argv[1:]))
"""


def test_a_rank_says_its_error_though_torchrun_stops_it_for_another_that_is_gone(tmp_path):
    (tmp_path / "stopped.py").write_text(STOPPED_WHILE_SAYING_WHY.format(root=str(ROOT)))
    command = [sys.executable, tmp_path / "stopped.py", f"--data={tmp_path / 'none'}", f"--out_dir={tmp_path / 'r'}"]
    done = subprocess.run(
        [*command, "--device=cpu"],
        env=os.environ | {"RANK": "0", "WORLD_SIZE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and done.stderr.startswith("error: "), (done.returncode, done.stderr)


def test_a_rank_that_loses_another_before_the_first_step_says_so_too(tmp_path, monkeypatch):
    def lost(*_):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3")

    monkeypatch.setattr(train, "run", lost)
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "get_rank", lambda: 1)
    with pytest.raises(UserError, match="rank 1, reading the data and building the model: another rank is gone"):
        train.main(tiny(tmp_path, tmp_path / "r"))


@pytest.mark.full
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_ends_them_all_after_the_same_step(parallel, data, source, tmp_path):  # noqa: F811
    (tmp_path / "asked.py").write_text(AT_STEP_25.format(root=str(ROOT), harm="os.kill(os.getpid(), signal.SIGTERM)"))
    cfg = prune_tiny(data, tmp_path / "r", source, parallel=parallel, **RANKS)
    torchrun(cfg, 2, script=tmp_path / "asked.py")
    assert checkpoint.checkpoints(tmp_path / "r")[-1].name == "step_000027"
    torchrun(dataclasses.replace(cfg, resume=True), 2)
    assert [r["step"] for r in metrics(tmp_path / "r", "train")] == list(range(1, 31))


OTHER_RANK = """
import dataclasses, os, sys
sys.path.insert(0, {root!r})
import configurator, parallel, train
if os.environ["RANK"] == "1":
    {difference}
sys.exit(train.command_line(sys.argv[1:]))
"""
DIFFERENCES = {
    "seed = 5, rank 0 with 17": "sys.argv.append('--seed=5')",
    "meta.json of the data = ": "train.sha256 = lambda path: 'other'",
    "code of this project = ": "parallel.hash_of_code = lambda: 'other'",
}


@pytest.mark.parametrize(
    "what", [d if i == 0 else pytest.param(d, marks=pytest.mark.full) for i, d in enumerate(DIFFERENCES)]
)
def test_a_rank_with_other_settings_data_or_code_is_refused_at_the_start_once(what, data, source, tmp_path):  # noqa: F811
    (tmp_path / "other.py").write_text(OTHER_RANK.format(root=str(ROOT), difference=DIFFERENCES[what]))
    errors = torchrun(prune_tiny(data, tmp_path / "r", source, **RANKS), 2, tmp_path / "other.py", succeeds=False)
    assert [line for line in errors.splitlines() if line.startswith("error: ")] == [
        line for line in errors.splitlines() if line.startswith("error: rank 1 runs with ") and what in line
    ]
    assert errors.count("error: rank 1 runs with ") == 1
    assert not (tmp_path / "r").exists()
