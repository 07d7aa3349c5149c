"""Loss, perplexity and bits per byte of a model on each domain of a data set, or its accuracy on the field's tasks.

    python evaluate.py out/demo/continue/model --data=data/embedded --seq_len=256
    python evaluate.py data/smollm2/model --tasks=arc_easy,sciq,piqa,hellaswag,lambada --limit=200

Takes a Hugging Face folder, or a checkpoint of a run (out_dir/step_NNNNNN): of a pruning run, what its masks would
export now. A token's loss depends on how much text precedes it: numbers at different seq_len must not be compared.
With tasks (tasks.py says how they are scored) the text's tokenizer is the one in the model's folder, or else the data
set's.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import checkpoint
import configurator
import hf
import model as llama
import tasks
from configurator import UserError
from data.loader import DomainLoader
from data.shards import read_meta
from prune import Masks, extract


@torch.no_grad()
def evaluate(model, val: DomainLoader, n_sequences: int, batch_size: int, device: str, subnetwork=None) -> np.ndarray:
    """Mean cross-entropy per token in nats of each domain, (M,) float64, over its first n_sequences windows.

    The windows are the same on every call. With torch.distributed running, ranks share the work and all of them
    return the numbers of rank 0.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    loss_sum_M = torch.zeros(len(val.domains), dtype=torch.float64, device=device)
    batches = [val.fixed_batch(m, n_sequences) for m in range(len(val.domains))]
    for m, rows in enumerate(batches):
        mine = np.arange(rank, -(-len(rows) // world_size) * world_size, world_size)  # as many on every rank: they
        for start in range(0, len(mine), batch_size):  # gather a sharded model together
            part = mine[start : start + batch_size]
            tokens = torch.from_numpy(val.read(rows[part % len(rows)])).to(device).long()
            loss_B = model(tokens[:, :-1], tokens[:, 1:], subnetwork).double().sum(dim=1)
            loss_sum_M[m] += (loss_B * torch.from_numpy(part < len(rows)).to(device)).sum()
    if world_size > 1:
        dist.all_reduce(loss_sum_M)
        dist.broadcast(loss_sum_M, src=0)  # to the last bit the same everywhere: the mix hangs on it
    return loss_sum_M.cpu().numpy() / np.array([len(rows) * val.seq_len for rows in batches])


def bits_per_byte(loss_M: np.ndarray, val: DomainLoader) -> np.ndarray:
    """Nats per token -> bits per byte of text, with the tokens per byte of each domain's whole validation split."""
    return loss_M / math.log(2) / np.array([w.bytes_per_token for w in val.windows])


def table(domains: tuple[str, ...], columns: dict[str, np.ndarray]) -> str:
    """One line a domain, one column a name, and the mean over the domains below."""
    width = max(len(d) for d in (*domains, "mean"))
    lines = [" " * width + "".join(f"{name:>{max(11, len(name) + 2)}}" for name in columns)]
    for m, domain in enumerate((*domains, "mean")):
        values = [np.mean(c) if m == len(domains) else c[m] for c in columns.values()]
        lines.append(
            f"{domain:{width}}" + "".join(f"{v:{max(11, len(n) + 2)}.4f}" for n, v in zip(columns, values, strict=True))
        )
    return "\n".join(lines)


def check_device(device: str) -> None:
    """Raises UserError for a device that is not there."""
    if device not in ("cpu", "cuda"):
        raise UserError(f"device = {device!r}: must be cpu or cuda (CUDA_VISIBLE_DEVICES chooses which)")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device = 'cuda': this machine or this build of torch has no CUDA")


@dataclass(frozen=True)
class Config:
    data: str = "data/embedded"  # folder of a prepared data set
    tasks: tuple[str, ...] = ()  # of tasks.TASKS, zero-shot; () = loss on the data set
    limit: int = 0  # documents a task; 0 = all
    domains: tuple[str, ...] = ()  # () = all of the data set
    seq_len: int = 256  # tokens of context
    sequences: int = 64  # windows per domain
    batch_size: int = 8  # windows per forward pass
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def load_any(path: str, device: str) -> llama.Llama:
    """The model of a Hugging Face folder or of a run's checkpoint. Raises UserError."""
    folder = Path(path)
    if not (folder / checkpoint.STATE).is_file():
        return hf.load(path, device)
    if problem := checkpoint.problem_of(folder):
        raise UserError(f"{path}: {problem}")
    try:
        state = checkpoint.read_state(folder)
        with torch.device("meta"):
            model, masks = llama.Llama(llama.LlamaConfig(**state["source"])), None
        learned = {"model": model}
        checkpoint.check_shapes(folder, dict(model.named_parameters("model")))  # before memory is asked for
        model.to_empty(device="cpu").tie()
        if state["target"]:
            masks = learned["masks"] = Masks(model.config, llama.LlamaConfig(**state["target"]), seed=0)
        checkpoint.load(folder, {n: p.detach() for k, m in learned.items() for n, p in m.named_parameters(k)})
    except (UserError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint of train.py ({error})") from None
    return (extract(model, masks) if masks else model).to(device)


def evaluate_tasks(folder: str, cfg: Config) -> None:
    tasks.check_tasks(cfg.tasks)
    tokenizer, model = tasks.text_tokenizer(folder, cfg.data), load_any(folder, cfg.device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"tokenizer of {tokenizer.vocab_size} tokens, the model's vocabulary has "
            f"{model.config.vocab_size}: give --data, the data set the model was trained on"
        )
    archive, results = tasks.request_archive(), {}
    for task in cfg.tasks:
        documents = tasks.read_documents(archive, task, cfg.limit)
        results[task] = tasks.run_task(model, tokenizer, documents, cfg.batch_size * cfg.seq_len)
    print(f"{folder}, zero-shot, standard errors in brackets\n{tasks.task_table(results)}")


def main(folder: str, cfg: Config) -> None:
    for name, least in (("seq_len", 1), ("sequences", 1), ("batch_size", 1), ("limit", 0)):
        if getattr(cfg, name) < least:
            raise UserError(f"{name} = {getattr(cfg, name)}: must be at least {least}")
    check_device(cfg.device)
    if cfg.tasks:
        evaluate_tasks(folder, cfg)
        return
    model = load_any(folder, cfg.device)
    domains = cfg.domains or tuple(read_meta(cfg.data)["domains"])
    val = DomainLoader(cfg.data, domains, cfg.seq_len, seed=0, split="val")
    if val.vocab_size > model.config.vocab_size:
        raise UserError(
            f"{cfg.data}: vocabulary of {val.vocab_size}, the model's has {model.config.vocab_size}: "
            "give --data, a data set prepared with the model's own tokenizer"
        )
    loss_M = evaluate(model, val, cfg.sequences, cfg.batch_size, cfg.device)
    print(f"{folder} on {cfg.data}, validation, {cfg.sequences} windows of {cfg.seq_len} tokens a domain at most")
    columns = {"loss (nats)": loss_M, "perplexity": np.exp(loss_M), "bits/byte": bits_per_byte(loss_M, val)}
    print(table(domains, columns))


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        sys.exit(__doc__)
    try:
        main(sys.argv[1], configurator.load(Config, sys.argv[2:]))
    except UserError as error:
        sys.exit(f"error: {error}")
