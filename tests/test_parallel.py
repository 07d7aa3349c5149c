"""Ranks: what they say to each other, the gradients and checkpoints they have together, and how they end."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import configurator
import parallel
import prune
import train
from configurator import UserError
from model import Llama, LlamaConfig

ROOT = Path(__file__).parents[1]
SHAPE = LlamaConfig(64, 16, 32, n_layers=2, n_heads=2, n_kv_heads=2, head_dim=8)
N_MICRO_BATCHES, ROUNDS = 4, 50
torch.set_num_threads(1)

# ---- on each rank


def built(ranks, shape=SHAPE, dtype=torch.float32, several=True):
    with torch.device("meta"):
        model = Llama(shape)
    if ranks.sharded:
        parallel.shard(model, ranks, dtype, several)
    else:
        model.to_empty(device="cpu").tie()
    model.init_weights(17, parallel.put)
    return model


def backward(network, ranks):
    """The gradients of four micro-batches, shared by the ranks."""
    tokens = torch.randint(0, 64, (N_MICRO_BATCHES, 2, 9), generator=torch.Generator().manual_seed(0))
    for i in range(ranks.rank, N_MICRO_BATCHES, ranks.world_size):
        with parallel.accumulating(network, ranks, is_last=i + ranks.world_size >= N_MICRO_BATCHES):
            loss = network(tokens[i, :, :-1], tokens[i, :, 1:])
            (loss.objective * ranks.world_size / N_MICRO_BATCHES).backward()


class Ops(TorchDispatchMode):
    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def gathers(network, ranks):
    """How often the ranks gather weights in a step."""
    network.zero_grad()
    with Ops() as ops:
        backward(network, ranks)
    return sum(name.startswith("c10d::") and "allgather" in name for name in ops.names)


def gradient_in_bfloat16(ranks, scored):
    """The largest element of every gradient of one micro-batch a rank, in bfloat16; scored: prune.scores ran before."""
    model, tokens = built(ranks, dtype=torch.bfloat16, several=False), np.arange(18).reshape(2, 9)
    rows = torch.from_numpy(tokens[[ranks.rank]])
    with torch.autocast("cpu", torch.bfloat16):
        if scored:
            prune.scores(model, replace(SHAPE, hidden_size=8), tokens, "cpu")
        model(rows[:, :-1], rows[:, 1:]).objective.backward()
    return {name: g.abs().max().item() for name, g in whole_gradients(model).items()}


def graphs(ranks, steps=20):
    """How many there are after the first step and after the last, compiled as train.py does but for the backend."""
    wide = replace(SHAPE, hidden_size=192, intermediate_size=768)  # a block fills more than DDP's first bucket
    made, found = [], []

    def backend(graph, inputs):
        made.append(graph)
        return graph

    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
        network = train.prepare_network(train.Config(stage="continue", compile=True), ranks, built(ranks, wide))
    for _ in range(steps):
        backward(network, ranks)
        found.append(len(made))
    if not ranks.sharded:
        network.reducer = network.logger = None
    return found[0], found[-1]


def whole_gradients(model):
    return {name: parallel.whole(p.grad).clone() for name, p in model.named_parameters()}


def problem_of(action, *arguments):
    try:
        action(*arguments)
    except UserError as error:
        return str(error)
    return ""


def fail(message):
    raise UserError(message)


def said(ranks):
    """What comes out of everything that the ranks say to each other."""
    mean = [torch.full((2,), float(ranks.rank)), torch.full((1, 1), 4.0 * ranks.rank)]
    parallel.average_over_ranks(mean)
    return {
        "exchange": parallel.exchange({"rank": ranks.rank, "text": "\u00e4" * 100 * ranks.rank}),
        "of_main": parallel.on_main(lambda: [ranks.rank]),
        "on_main": problem_of(parallel.on_main, lambda: fail("the dog ate it")),
        "equal": problem_of(parallel.refuse_unequal, {"seed": 17}),
        "unequal": problem_of(parallel.refuse_unequal, {"seed": 17 + ranks.rank}),
        "mean": [m.flatten().tolist() for m in mean],
    }


def optimized(model):
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    optimizer.step()
    return checkpoint.tensors({"model": model}, [optimizer])


class NoMemory:
    should_synchronize_after_execute = False

    def stage(self, *arguments, **options):
        raise RuntimeError("CUDA error: out of memory")


def saved_together(model, ranks, out):
    """A checkpoint of both ranks, of what there was before it changed, though one finds no memory to pin at first.

    Then one that rank 1's disk has no room for.
    """
    named = optimized(model)
    checkpoints = checkpoint.Checkpoints(out / "run", 2, dist.new_group(backend="gloo"))
    if ranks.rank == 1:
        checkpoints.stager = NoMemory()
    checkpoints.save(1, {"step": 1}, named)
    with torch.no_grad():
        for tensor in named.values():
            tensor.add_(1)
    saved = [checkpoints.finished()]
    if ranks.rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    checkpoints.save(2, {"step": 2}, named)
    return [asdict(s) for s in [*saved, checkpoints.finished()]]


def come_and_go(store):
    """Two ranks meet, and part right after a collective, whose thread may still have to free it."""
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=int(os.environ["RANK"]), world_size=2)
    ranks = parallel.Ranks(*parallel.position(), "cpu", "ddp")
    network = parallel.wrap(built(ranks), ranks, find_unused=True)
    backward(network, ranks)
    dist.barrier()
    parallel.close(network)


def on_each_rank(kind, out):
    ranks = parallel.setup(kind, "cpu")
    model = built(ranks)
    network = parallel.wrap(model, ranks, find_unused=False)
    backward(network, ranks)
    results = said(ranks)
    gradients, together = whole_gradients(model), parallel.gather(model)
    if ranks.is_main:
        torch.save({"gradients": gradients, "weights": together.state_dict()}, out / "tensors.pt")
    results["graphs"] = graphs(ranks)
    if ranks.sharded:
        results["gathers"] = gathers(network, ranks)
        results["bfloat16"] = [gradient_in_bfloat16(ranks, scored) for scored in (False, True)]
        results["saved"] = saved_together(model, ranks, out)
    parallel.close(network)
    for i in range(0 if ranks.sharded else ROUNDS):  # they hang in one of them if DDP ends after the group
        come_and_go(str(out / f"store{i}"))
    print(json.dumps(results))


@dataclass(frozen=True)
class Config:
    kind: str = "ddp"
    out: str = ""
    fails: str = ""  # all | one | killed


def main(cfg):
    if not cfg.fails:
        return on_each_rank(cfg.kind, Path(cfg.out))
    ranks = parallel.setup(cfg.kind, "cpu")
    network = parallel.wrap(built(ranks), ranks, find_unused=False)
    for step in range(4):
        backward(network, ranks)
        if step == 2 and (cfg.fails == "all" or ranks.rank == 1):
            os.kill(os.getpid(), signal.SIGKILL) if cfg.fails == "killed" else fail("the dog ate it")


# ---- the tests

FSDP = pytest.mark.parametrize("two", [pytest.param("fsdp", marks=pytest.mark.full)], indirect=True)


def start(kind, out):
    """Both ranks of this file's main, without torchrun; what each has printed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    env |= {"LOCAL_WORLD_SIZE": "2", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, f"--kind={kind}", f"--out={out}"]
    ranks = [subprocess.Popen(command, env=env | {"RANK": str(rank)}, stdout=subprocess.PIPE) for rank in range(2)]
    try:
        printed = [rank.communicate(timeout=200)[0] for rank in ranks]
    finally:
        [rank.kill() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [json.loads(text) for text in printed]


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp", marks=pytest.mark.full)])
def two(request, tmp_path_factory):
    """(kind, folder, what each rank found)"""
    out = tmp_path_factory.mktemp(request.param)
    return request.param, out, start(request.param, out)


def test_more_ranks_than_gpus_are_refused_before_they_meet(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(UserError, match="more ranks than the 4 GPUs seen here: --nproc_per_node=4"):
        parallel.setup("ddp", "cuda")


def test_large_tensors_on_a_cpu_are_made_of_pages_that_the_process_has():
    faults = "[torch.ones(2**24).sum() for _ in range(4)] and resource.getrusage(0).ru_minflt"  # 64 MiB each
    code = f"import resource, torch, parallel; parallel.setup('ddp', 'cpu'); n = [{faults} for _ in 'abc']; print(n)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    _, before, after = json.loads(done.stdout)
    assert after - before < 1000  # a tensor has 16,384 pages


def test_every_rank_hears_what_each_one_said(two):
    for rank in two[2]:
        assert rank["exchange"] == [{"rank": 0, "text": ""}, {"rank": 1, "text": "\u00e4" * 100}]
        assert (rank["mean"], rank["of_main"]) == ([[0.5, 0.5], [2.0]], [0])


def test_an_error_of_rank_0_and_a_difference_between_ranks_are_raised_on_all_of_them(two):
    assert [rank["on_main"] for rank in two[2]] == ["the dog ate it"] * 2
    assert [rank["equal"] for rank in two[2]] == ["", ""]
    assert all("rank 1 has seed = 18, rank 0 17" in rank["unequal"] for rank in two[2])


def test_ranks_together_have_the_weights_and_gradients_of_one(two):
    together = torch.load(two[1] / "tensors.pt", weights_only=True)
    alone = parallel.Ranks(0, 1, "cpu", "ddp")
    model = built(alone)
    backward(parallel.wrap(model, alone, find_unused=False), alone)
    for name, gradient in whole_gradients(model).items():
        torch.testing.assert_close(together["gradients"][name], gradient)
    assert all(torch.equal(together["weights"][name], value) for name, value in model.state_dict().items())


def test_a_block_has_one_graph_and_it_is_compiled_once(two):
    assert [rank["graphs"] for rank in two[2]] == [[2, 2]] * 2  # the first block has nothing to add up, and its own


@FSDP
def test_weights_are_gathered_once_a_step(two):
    assert [rank["gathers"] for rank in two[2]] == [SHAPE.n_layers + 1] * 2  # each block, and what is around them


@FSDP
def test_gradients_are_summed_over_ranks_in_float32_after_scores_as_without_them(two):
    for rank in two[2]:
        without, after = rank["bfloat16"]
        assert after == without


@FSDP
def test_a_checkpoint_of_two_ranks_is_read_by_one_and_written_without_pinned_memory_if_need_be(two):
    (folder, state), skipped = checkpoint.newest(two[1] / "run")
    assert (state["step"], skipped, len(state["files"])) == (1, {}, 2)
    model = built(parallel.Ranks(0, 1, "cpu", "ddp"))
    model.init_weights(5)
    named = optimized(model)
    checkpoint.load(folder, named)
    together = torch.load(two[1] / "tensors.pt", weights_only=True)
    for name, gradient in together["gradients"].items():
        torch.testing.assert_close(named[f"exp_avg.model.{name}"], 0.1 * gradient)


@FSDP
def test_a_rank_without_room_for_its_share_is_told_and_leaves_the_checkpoint_before(two):
    for first, second in (rank["saved"] for rank in two[2]):
        assert (first["step"], first["error"]) == (1, "")
        assert "File too large" in second["error"]
    assert [f.name for f in (two[1] / "run").iterdir()] == ["step_000001"]


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.full)])
@pytest.mark.parametrize("fails", ["one", *(pytest.param(f, marks=pytest.mark.full) for f in ("all", "killed"))])
def test_a_rank_that_fails_ends_all_of_them_and_an_error_is_said_once(fails, kind):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [f"--kind={kind}", f"--fails={fails}"]
    done = subprocess.run([*command, *arguments], env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert done.stderr.count("error: the dog ate it\n") == (fails != "killed")


def test_a_run_of_triton_s_kernels_is_refused_where_triton_finds_no_compiler_or_headers(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="finds no gcc, clang or CC: install gcc"):
        parallel.check_compiler()
    (tmp_path / "gcc").touch(mode=0o755)
    parallel.check_compiler()
    monkeypatch.setattr(sysconfig, "get_paths", lambda _: {"include": str(tmp_path)})
    with pytest.raises(UserError, match=r"finds no Python\.h: install python3-dev"):
        parallel.check_compiler()


if __name__ == "__main__":
    configurator.command(main, Config, speaks=parallel.first_to_say)
