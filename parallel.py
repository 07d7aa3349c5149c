"""Many ranks on one model: DDP, where each holds all of it, and FSDP, where each holds a share.

DDP keeps weights, gradients and both moments of AdamW on every rank: 16 bytes a parameter in float32, 108 GB for a 7B.
FSDP (torch's fully_shard) splits all of that over the ranks and gathers one block at a time, for its forward and again
for its backward pass. HSDP splits within a node and copies between nodes, whose network is the slower one.

A mask sample may leave a block dead on one rank and alive on another. DDP looks for what took no part. FSDP's ranks
must meet at the same gathers and sums, so there a dead block still hands zeros to its gradients (model._TakePart).

A sharded checkpoint is a folder of safetensors files, one a rank, written by torch.distributed.checkpoint while
training goes on; any number of ranks, or none, can read it. Masks, lambdas and mix are small and the same everywhere.
"""

import os
import shutil
from concurrent.futures import Future
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from model import Llama

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, of its shape


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


def shares(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every weight and its moments, by name."""
    tensors = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        if not state:  # as AdamW makes it at its first step
            state |= {"step": torch.zeros((), device=p.device)} | {m: torch.zeros_like(p) for m in MOMENTS}
        tensors |= {f"weight.{name}": p.detach()} | {f"{m}.{name}": state[m] for m in MOMENTS}
    return tensors


def write_shares(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, group: dist.ProcessGroup
) -> Future:
    """Copies the shares to the CPU, then writes them in the background; done when every rank's file is on the disk.

    group: of all ranks, used for nothing else: training's own messages would get between those of the writers.
    """
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed while it wrote here
        folder.mkdir(parents=True)
    dist.barrier()
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    return dcp.async_save(shares(model, optimizer), storage_writer=writer, process_group=group)


def load_from(folder: Path, tensors: dict[str, Tensor]) -> None:
    dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=not dist.is_initialized())


def read_shares(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Into a model that is sharded over any number of ranks, or whole. steps: that the optimizer had taken."""
    load_from(folder, shares(model, optimizer))
    set_steps(optimizer, steps)


def read_weights(folder: Path, model: nn.Module) -> None:
    weights = {f"weight.{name}": p.detach() for name, p in model.named_parameters()}
    load_from(folder, weights)


def read_whole(state: dict, moments: dict, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """The same from the state dicts of a model and its optimizer that were not sharded."""
    into = shares(model, optimizer)
    for i, (name, _) in enumerate(model.named_parameters()):
        put(into[f"weight.{name}"], state[name])
        for moment in MOMENTS:
            put(into[f"{moment}.{name}"], moments[i][moment])
    set_steps(optimizer, steps)


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    for state in optimizer.state.values():
        state["step"].fill_(steps)


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
