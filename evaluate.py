"""Loss, perplexity and bits per byte of a model on each domain of a data set.

    python evaluate.py out/demo/continue/model --data=data/embedded --seq_len=256

The model is a Hugging Face folder, or a checkpoint of a run (out_dir/step_NNNNNN): that of a pruning run counts as the
model that its masks would extract now. A token's loss depends on how much text comes before it, so numbers at different
seq_len must not be compared. Zero-shot tasks are lm-evaluation-harness's, as it is:

    lm_eval --model hf --model_args pretrained=out/demo/continue/model --tasks arc_easy,piqa
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint
import configurator
import hf
from configurator import UserError
from data.loader import DomainLoader
from data.shards import read_meta
from model import Llama, LlamaConfig
from parallel import position, sum_over_ranks
from prune import MASKS, extract


@torch.no_grad()
def evaluate(model, val: DomainLoader, n_sequences: int, batch_size: int, device: str, subnetwork=None) -> np.ndarray:
    """Mean cross-entropy per token in nats of each domain, (M,) float64, over its first n_sequences windows.

    The windows are the same on every call. With torch.distributed running, ranks share the work and all of them
    return the numbers of rank 0.
    """
    rank, world_size = position()
    loss_sum_M = torch.zeros(len(val.domains), dtype=torch.float64, device=device)
    batches = [val.fixed_batch(m, n_sequences) for m in range(len(val.domains))]
    for m, rows in enumerate(batches):
        mine = np.arange(rank, -(-len(rows) // world_size) * world_size, world_size)  # as many on every rank: they
        for start in range(0, len(mine), batch_size):  # gather a sharded model together
            part = mine[start : start + batch_size]
            tokens = torch.from_numpy(val.read(rows[part % len(rows)])).to(device).long()
            loss_B = model(tokens[:, :-1], tokens[:, 1:], subnetwork).cross_entropy.double().sum(dim=1)
            loss_sum_M[m] += (loss_B * torch.from_numpy(part < len(rows)).to(device)).sum()
    sum_over_ranks(loss_sum_M)
    return loss_sum_M.cpu().numpy() / np.array([len(rows) * val.seq_len for rows in batches])


def bits_per_byte(loss_M: np.ndarray, val: DomainLoader) -> np.ndarray:
    """Nats per token -> bits per byte of text, with the tokens per byte of each domain's whole validation split."""
    return loss_M / math.log(2) / np.array([w.bytes_per_token for w in val.windows])


def table(domains: tuple[str, ...], columns: dict[str, np.ndarray]) -> str:
    """One line a domain, one column a name, and the mean over the domains below."""
    width = max(map(len, (*domains, "mean")))
    lines = [" " * width + "".join(f"{name:>13}" for name in columns)]
    for m, domain in enumerate((*domains, "mean")):
        values = [np.mean(c) if m == len(domains) else c[m] for c in columns.values()]
        lines.append(f"{domain:{width}}" + "".join(f"{v:13.4f}" for v in values))
    return "\n".join(lines)


def check_device(device: str) -> None:
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"device = {device!r}: must be cpu, or cuda where this machine and its torch have it")


def load_any(path: str | Path, device: str) -> Llama:
    """The model of a Hugging Face folder or of a run's checkpoint. Raises UserError."""
    folder = Path(path)
    if not (folder / checkpoint.STATE).is_file():
        return hf.load(folder, device)
    state = checkpoint.read_state(folder)
    with torch.device("meta"):
        model = Llama(LlamaConfig(**state["source"]))
    model.to_empty(device="cpu").tie()
    kind = MASKS[state["config"].get("masks", "published")]  # where nothing is said, there were no others
    masks = kind(model.config, LlamaConfig(**state["target"]), seed=0) if state["target"] else None
    named = dict(model.named_parameters("model")) | (dict(masks.named_parameters("masks")) if masks else {})
    checkpoint.load(folder, {name: p.detach() for name, p in named.items()})
    return (extract(model, masks) if masks else model).to(device)


def homes_of(path: str | Path) -> list[Path]:
    """Where the tokenizer of a model is: in its folder, or in those that a checkpoint's run began from."""
    folder = Path(path)
    if not (folder / checkpoint.STATE).is_file():
        return [folder]
    run = checkpoint.read_state(folder)["config"]
    return [Path(run[name]) for name in ("init_from", "data") if run[name]]


@dataclass(frozen=True)
class Config:
    data: str = "data/embedded"  # folder of a data set, prepared with the model's own tokenizer
    domains: tuple[str, ...] = ()  # () = all of the data set
    seq_len: int = 256  # tokens of context
    sequences: int = 64  # windows a domain
    batch_size: int = 8  # windows a forward pass
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # CUDA_VISIBLE_DEVICES chooses which


def main(cfg: Config, folder: str) -> None:
    check_device(cfg.device)
    for name in ("seq_len", "sequences", "batch_size"):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name} = {getattr(cfg, name)}: must be at least 1")
    model, domains = load_any(folder, cfg.device), cfg.domains or tuple(read_meta(cfg.data)["domains"])
    val = DomainLoader(cfg.data, domains, cfg.seq_len, seed=0, split="val")
    if val.vocab_size > model.config.vocab_size:
        raise UserError(f"{cfg.data}: has more tokens than the model: prepare it with the model's own tokenizer")
    for home in homes_of(folder):
        hf.check_tokenizer(home, cfg.data)
    if cfg.seq_len > model.config.context:
        print(f"warning: seq_len = {cfg.seq_len} exceeds the model's context of {model.config.context} tokens")
    loss_M = evaluate(model, val, cfg.sequences, cfg.batch_size, cfg.device)
    print(f"{folder} on {cfg.data}, validation, at most {cfg.sequences} windows of {cfg.seq_len} tokens a domain")
    columns = {"loss (nats)": loss_M, "perplexity": np.exp(loss_M), "bits/byte": bits_per_byte(loss_M, val)}
    print(table(domains, columns))


if __name__ == "__main__":
    configurator.command(main, Config, words=(1, 1))
