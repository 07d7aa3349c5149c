"""Many ranks on one model: DDP, where each holds all of it, and FSDP, where each holds a share.

DDP keeps weights, gradients and both moments of AdamW on every rank: 16 bytes a parameter in float32, 108 GB for a 7B.
FSDP (torch's fully_shard) splits all of that over the ranks and gathers one block at a time, for its forward and again
for its backward pass. HSDP splits within a node and copies between nodes, whose network is the slower one.

A mask sample may leave a block dead on one rank and alive on another. DDP looks for what took no part. FSDP's ranks
must meet at the same gathers and sums, so there a dead block still hands zeros to its gradients (model._TakePart).
"""

import hashlib
import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from configurator import UserError
from model import Llama


def mesh_of(kind: str, device: str) -> DeviceMesh:
    """One axis of all ranks for fsdp; (nodes, ranks of a node) for hsdp."""
    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if kind == "fsdp":
        return init_device_mesh(device, (world,))
    return init_device_mesh(device, (world // local, local), mesh_dim_names=("replicate", "shard"))


def shard(model: Llama, kind: str, device: str, dtype: torch.dtype) -> None:
    """Split a model of the meta device over the ranks, block by block; its weights are then to be filled.

    dtype: what blocks are gathered and computed in. Sums over ranks, embeddings, head and every share are float32.
    """
    mesh = mesh_of(kind, device.partition(":")[0])
    lower = dtype if dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.layers:
        block.always_takes_part = True
        fully_shard(block.to_empty(device=device), mesh=mesh, mp_policy=policy)
    for module in (model.embed_tokens, model.norm, model.lm_head):
        module.to_empty(device=device)
    model.tie()
    fully_shard(model, mesh=mesh)


@torch.no_grad()
def put(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole value into a parameter, or this rank's share of it into a share."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        value = distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)  # all ranks have it
    parameter.copy_(value)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def average_over_ranks(grads: list[Tensor], device: str) -> None:
    """In place; the masks' gradients live on the CPU and travel as one tensor of the device, which nccl asks for."""
    flat = torch.cat([g.flatten() for g in grads]).to(device)
    dist.all_reduce(flat)
    mean = (flat / dist.get_world_size()).cpu()
    for g, part in zip(grads, mean.split([g.numel() for g in grads]), strict=True):
        g.copy_(part.view_as(g))


def position() -> tuple[int, int]:
    """Rank and number of ranks; (0, 1) alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def exchange(value: object, group: dist.ProcessGroup | None = None) -> list:
    """What every rank gave, in their order; all must call it. The values travel as JSON."""
    if not dist.is_initialized():
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(text)]), group=group)
    padded = torch.zeros(int(max(sizes)), dtype=torch.uint8)
    padded[: len(text)] = text
    texts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(texts, padded, group=group)
    return [json.loads(t[: int(n)].numpy().tobytes()) for t, n in zip(texts, sizes, strict=True)]


def hash_of_code() -> str:
    root, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *root.glob("data/*.py"), *root.glob("kernels/*.py")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    return {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}


def refuse_unequal(settings: dict) -> None:
    """Raises UserError, on every rank, where one has other settings, code or libraries than the first."""
    of_ranks = exchange({"code of this project": hash_of_code(), **versions(), **settings})
    for rank, here in enumerate(of_ranks):
        for name, value in of_ranks[0].items():
            if here.get(name) != value:
                raise UserError(
                    f"rank {rank} runs with {name} = {here.get(name)!r}, rank 0 with {value!r}: "
                    "give every rank the same"
                )


def is_first_to_say(message: str) -> bool:
    """Whether no other rank has asked the same before: asked of torchrun's store, which outlives every rank."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(message, 1) == 1
    except (RuntimeError, ValueError, KeyError):
        return True


def gather(model: Llama) -> Llama:
    """The whole model, on the CPU of rank 0; other ranks help and get one whose weights mean nothing."""
    with torch.device("meta"):
        gathered = Llama(model.config)
    gathered.to_empty(device="cpu").tie()
    for p, share in zip(gathered.parameters(), model.parameters(), strict=True):
        full = whole(share.detach())
        if dist.get_rank() == 0:
            p.data.copy_(full)
    return gathered
