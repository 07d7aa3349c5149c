"""Many ranks on one model: DDP, where each holds all of it, and FSDP, where each holds a share.

DDP keeps weights, gradients and both moments of AdamW on every rank: 16 bytes a parameter in float32, 108 GB for a 7B.
FSDP (torch's fully_shard) splits all of that over the ranks and gathers one block at a time, for its forward and again
for its backward pass. HSDP splits within a node and copies between nodes, whose network is slower.

A mask sample may drop a block on one rank and keep it on another. DDP looks for what took no part. FSDP's ranks must
meet at the same gathers and sums, so there a dropped block still hands zeros to its gradients (model._TakePart).
"""

import ctypes
import faulthandler
import json
import os
import shutil
import signal
import sys
import sysconfig
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from configurator import UserError
from model import Llama

TIMEOUT = timedelta(seconds=600)  # that a rank waits for the others; then torch ends it with an error


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: str  # of this rank: cpu, cuda:3
    kind: str  # ddp | fsdp | hsdp

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.world_size > 1 and self.kind != "ddp"


def setup(kind: str, device: str) -> Ranks:
    """Take this process's place among the ranks that torchrun started; alone, it is rank 0 of 1."""
    if device == "cuda":
        rank, n_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        if rank >= n_gpus:
            raise UserError(f"more ranks than the {n_gpus} GPUs seen here: --nproc_per_node={n_gpus}")
        device = f"cuda:{rank}"
    if device.startswith("cuda"):
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # sizes vary: fewer holes
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    else:
        keep_pages()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        faulthandler.enable()  # the line of Python where torch's watchdog ends the process, as a collective hangs;
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")  # and the last 2,000 collectives, in ~/.cache/torch
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)
    return Ranks(*position(), device, kind)


def keep_pages() -> None:
    """Large tensors on the CPU are made of memory that the process has. By default glibc gives it back when they are
    freed, and to ask the kernel for the same pages again takes up to a quarter of a step."""
    set_to = ctypes.CDLL(None).mallopt
    if set_to(-3, 2**31 - 1):  # M_MMAP_THRESHOLD, of which old ones refuse so much: then nothing changes
        set_to(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def position() -> tuple[int, int]:
    """Rank and number of ranks; (0, 1) alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# ---- the model


def shard(model: Llama, ranks: Ranks, dtype: torch.dtype, several: bool) -> None:
    """Split a model of the meta device over the ranks, block by block; its weights are then to be filled.

    dtype: what weights are gathered and computed in; shares and sums over ranks are float32. several: a step has more
    than one micro-batch. Then weights are gathered once a step and stay until its last backward pass (2 bytes a
    parameter in bfloat16, beside the 4 of gradients that are not shared out until then); else twice, block by block.
    """
    node = int(os.environ["LOCAL_WORLD_SIZE"])  # ranks of one
    axes = {"fsdp": {"shard": ranks.world_size}, "hsdp": {"copy": ranks.world_size // node, "shard": node}}[ranks.kind]
    mesh = init_device_mesh(ranks.device.partition(":")[0], tuple(axes.values()), mesh_dim_names=tuple(axes))
    lower = dtype if dtype != torch.float32 else None
    warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # a block's outputs are never changed
    policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        block.always_takes_part = True
        fully_shard(block.to_empty(device=ranks.device), mesh=mesh, mp_policy=policy)
    for module in (model.embed_tokens, model.norm, model.lm_head):
        module.to_empty(device=ranks.device)
    model.tie()
    fully_shard(model, mesh=mesh, mp_policy=policy)
    if several:
        model.set_reshard_after_forward(False)
    register_fsdp_forward_method(model, "teach")  # a teacher's weights are gathered for it as for forward


def wrap(network: nn.Module, ranks: Ranks, find_unused: bool) -> nn.Module:
    """DDP around the network, or the network itself where there is one rank or it is sharded.

    find_unused: a step may leave out parameters that another rank uses.
    """
    if ranks.world_size == 1 or ranks.sharded:
        return network
    return DistributedDataParallel(network, find_unused_parameters=find_unused, gradient_as_bucket_view=True)


def accumulating(network: nn.Module, ranks: Ranks, is_last: bool) -> AbstractContextManager:
    """For a forward and backward pass: the ranks add up their gradients after the last one of a step only."""
    if ranks.sharded:
        network.set_requires_gradient_sync(is_last)
        network.set_reshard_after_backward(is_last)
    return nullcontext() if is_last or ranks.sharded or ranks.world_size == 1 else network.no_sync()


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value into a parameter, or this rank's share of it into a share."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        value = distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)  # all ranks have it
    parameter.copy_(value)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def let_go(model: Llama) -> None:
    """Give back what a forward pass has left gathered: each parameter is a float32 share again, not a bfloat16 copy."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def learn_again(model: Llama) -> None:
    """FSDP chooses what it sums over ranks in by the weights that learn when it gathers them: now, and not before."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()


def gather(model: Llama) -> Llama:
    """The whole model, on the CPU of rank 0; other ranks help and get one whose weights mean nothing."""
    let_go(model)
    with torch.device("meta"):
        gathered = Llama(model.config)
    gathered.to_empty(device="cpu").tie()
    for p, share in zip(gathered.parameters(), model.parameters(), strict=True):
        full = whole(share.detach())
        if position()[0] == 0:
            p.data.copy_(full)
    return gathered


def average_over_ranks(grads: list[Tensor]) -> None:
    """In place, in one message; the masks' gradients live on the CPU, where gloo takes them."""
    n_ranks = position()[1]
    if n_ranks > 1:
        flat = parameters_to_vector(grads)
        dist.all_reduce(flat)
        vector_to_parameters(flat / n_ranks, grads)


def sum_over_ranks(total: Tensor) -> None:
    """In place, and to the last bit the same on every rank: the mix and shapes hang on it."""
    if position()[1] > 1:
        dist.all_reduce(total)
        dist.broadcast(total, src=0)


# ---- what the ranks say to each other, and to the user


def exchange(value: object) -> list:
    """What every rank gave, in their order; all must call it. The values travel as JSON."""
    if not dist.is_initialized():
        return [value]
    text = json.dumps(value).encode()
    size = torch.tensor(len(text))
    dist.all_reduce(size, dist.ReduceOp.MAX)
    mine = torch.frombuffer(bytearray(text.ljust(int(size))), dtype=torch.uint8)
    texts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(texts, mine)
    return [json.loads(t.numpy().tobytes()) for t in texts]


def on_main(action: Callable[[], object]) -> object:
    """Call it on rank 0; what it returns (JSON takes it) or the UserError that it raises is every rank's."""
    value, problem = None, ""
    if position()[0] == 0:
        try:
            value = action()
        except UserError as error:
            problem = str(error)
    value, problem = exchange([value, problem])[0]
    if problem:
        raise UserError(problem)
    return value


def versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}


def check_compiler() -> None:
    """For a run whose kernels are Triton's. Raises UserError where its first launch could not compile its host code."""
    without = "or give kernels=torch and compile=false"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        raise UserError(f"Triton needs a C compiler, and finds no gcc, clang or CC: install gcc, {without}")
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # as Triton has it
    if not Path(sysconfig.get_paths(scheme)["include"], "Python.h").is_file():
        raise UserError(f"Triton needs Python's headers, and finds no Python.h: install python3-dev, {without}")


def refuse_unequal(settings: dict) -> None:
    """Raises UserError, on every rank, where one has other settings or libraries than rank 0."""
    for rank, here in enumerate(of_ranks := exchange(versions() | settings)):
        for name, value in of_ranks[0].items():
            if here[name] != value:
                raise UserError(f"rank {rank} has {name} = {here[name]!r}, rank 0 {value!r}: give all of them the same")


def first_to_say(message: str) -> bool:
    """Whether no other rank has asked the same before: asked of torchrun's store, which outlives every rank."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, when a rank has ended before this one has spoken
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10)).add(message, 1) == 1


def close(network: nn.Module) -> None:
    """Leave the group of ranks. Each calls it when it has nothing more to say to the others.

    One of gloo's threads needs the interpreter's lock to free the last collective, and the group's destructor waits for
    that thread. Python's reference to the group lets go of the lock before it destroys; those of DDP's Reducer and
    Logger do not. If one of them were the last, both would wait for ever: they go first, whoever has the network.
    """
    if isinstance(network, DistributedDataParallel):
        network.reducer = network.logger = None
    if dist.is_initialized():
        dist.destroy_process_group()
