"""Speed, as ratios from one run: medians with the spread between quartiles, also written to out/bench.json.

    make bench

A ratio of two times taken in turns on one machine carries over to another machine; the times themselves do not.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import torch
from transformers import LlamaConfig as HFLlamaConfig
from transformers import LlamaForCausalLM

import demo
from data.loader import DomainLoader
from data.shards import open_shard, write_meta, write_shard
from dro import Mix
from model import BlockUnits, Llama, LlamaConfig, Subnetwork, Units
from prune import LOG_ALPHA_RANGE, PAD, Masks, backward_to_masks, extract, probability_dead, subnetwork, target_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SOURCE = LlamaConfig(4096, 512, 1408, 6, n_heads=8, n_kv_heads=8, head_dim=64)
DEMO = LlamaConfig(4096, 192, 512, 6, n_heads=6, n_kv_heads=3, head_dim=32)  # the demo's source model
HALF = dict(hidden_size=256, intermediate_size=704, n_heads=4, n_layers=4)  # half of every width, 2/3 of the layers
B, T = 8, 256  # sequences and tokens of a step


def in_turns(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, the ways taking turns so that a slow minute hits them all; two rounds of warm-up."""
    seconds = {name: [] for name in ways}
    for round_ in range(rounds + 2):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if round_ >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(a: list[float], b: list[float]) -> dict:
    """Median and quartiles of a / b over the rounds."""
    each = [x / y for x, y in zip(a, b, strict=True)]
    low, _, high = quantiles(each, n=4)
    return {"ratio": median(each), "quartiles": [low, high], "a_ms": 1e3 * median(a), "b_ms": 1e3 * median(b)}


def report(results: dict, name: str, value: dict, line: str) -> None:
    results[name] = value
    print(line, flush=True)


def masked_dense(z: dict[str, torch.Tensor], c: LlamaConfig) -> Subnetwork:
    """Every unit computed and every mask multiplied in: what a pruning step costs without the subnetwork."""
    flat = torch.cat([v.flatten() for v in z.values()])
    leaf = flat.detach().to(DEVICE).requires_grad_()
    parts = leaf.split([v.numel() for v in z.values()])
    full = {mask: part.view_as(v) for (mask, v), part in zip(z.items(), parts, strict=True)}
    z_D = full["hidden"][0]
    norm = Units(row_scale=z_D, fill=float((z["hidden"] > 0).sum()) / c.hidden_size)
    blocks = []
    for layer in range(c.n_layers):
        out = z_D * full["layer"][0, layer]
        blocks.append(BlockUnits(
            input_layernorm=norm, post_attention_layernorm=norm,
            v_proj=Units(row_scale=full["head"][layer].repeat_interleave(c.head_dim)), o_proj=Units(row_scale=out),
            up_proj=Units(row_scale=full["intermediate"][layer]), down_proj=Units(row_scale=out),
        ))  # fmt: skip
    return Subnetwork(blocks, Units(col_scale=z_D), norm, Units(), z=flat, z_device=leaf)


def settled_masks() -> Masks:
    """Masks as they are once the sparsity has reached its target: logits at both ends, the expected sparsity right."""
    masks = Masks(SOURCE, target_config(SOURCE, **HALF), seed=0)
    generator = torch.Generator().manual_seed(0)
    p_dead_low, p_dead_high = probability_dead(torch.tensor(LOG_ALPHA_RANGE)).tolist()
    with torch.no_grad():
        for mask, a in masks.log_alpha.items():
            share = (masks.target_sparsity()[mask] - p_dead_high) / (p_dead_low - p_dead_high)
            order = torch.rand(a.shape, generator=generator).argsort(dim=1)
            a.copy_(torch.where(order < round(share * a.shape[1]), *torch.tensor(LOG_ALPHA_RANGE)))
    return masks


def training_step(model, forward: Callable, masks: Masks | None = None) -> Callable[[], None]:
    """One optimizer step on random tokens; forward(tokens, targets) returns the loss and what to do after backward."""
    parameters = list(model.parameters())
    optimizers = [torch.optim.AdamW(parameters, 1e-4, weight_decay=0.0, fused=True)]
    if masks:
        optimizers.append(torch.optim.Adam(masks.parameters(), 0.0, fused=True))  # lr 0: the masks stay settled
    tokens = torch.randint(0, SOURCE.vocab_size, (B, T + 1), device=DEVICE)
    for p in parameters:
        p.grad = torch.zeros_like(p)

    def step() -> None:
        loss, after = forward(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        if masks:
            backward_to_masks([after])
            masks.lagrangian(1.0).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)

    return step


def fresh(config: LlamaConfig) -> Llama:
    model = Llama(config)
    model.init_weights(0)
    return model.to(DEVICE)


def bench_pruning_step(results: dict) -> None:
    masks, counter = settled_masks(), iter(range(10**9))
    dense, gathered = fresh(SOURCE), fresh(SOURCE)
    small = extract(gathered, masks)

    def masked(model, build):
        def forward(x, y):
            s = build(masks.sample(0, next(counter), 0))
            return model(x, y, s).mean(), s

        return training_step(model, forward, masks)

    ways = {
        "dense": masked(dense, lambda z: masked_dense(z, SOURCE)),
        "subnetwork": masked(gathered, lambda z: subnetwork(SOURCE, z, DEVICE, PAD[DEVICE])),
        "small": training_step(small, lambda x, y: (small(x, y).mean(), None)),
    }
    s = in_turns(ways, 15)
    for name, a, b, bound in (("dense / subnetwork", "dense", "subnetwork", "at least 3"),
                              ("subnetwork / small model", "subnetwork", "small", "at most 1.25")):  # fmt: skip
        r = ratio(s[a], s[b])
        report(results, f"pruning step: {name}", r, f"pruning step, {name}: {show(r)} ({bound})")


def bench_against_transformers(results: dict) -> None:
    c = DEMO
    theirs = LlamaForCausalLM(HFLlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.n_layers, num_attention_heads=c.n_heads, num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
    )).to(DEVICE)  # fmt: skip
    ours, loss = fresh(c), torch.nn.functional.cross_entropy
    ways = {
        "transformers": training_step(
            theirs, lambda x, y: (loss(theirs(x, use_cache=False).logits.flatten(0, 1), y.flatten()), None)
        ),
        "ours": training_step(ours, lambda x, y: (ours(x, y).mean(), None)),
    }
    s = in_turns(ways, 31)
    r = ratio(s["transformers"], s["ours"])
    name = "training tokens/s at the demo's shape, ours / transformers"
    report(results, name, r, f"{name}: {show(r)} (at least 1.0); {B * T / median(s['ours']):,.0f} tokens/s")


def bench_mix(results: dict) -> None:
    """One update with all its fits: 7 domains, 64 points of history, sparsity among them."""
    M, rng = 7, np.random.default_rng(0)
    seconds = []
    for _ in range(11):
        mix = Mix(tuple("abcdefg"), np.ones(M), "dro")
        alpha_M, E_M = rng.uniform(0.15, 0.6, M), rng.uniform(0.5, 2, M)
        for i in range(1, 65):
            s, t = min(0.75, 0.75 * i / 13), i / 64
            loss_M = E_M + 0.3 * t**-alpha_M * s**0.2 + rng.normal(0, 2e-3, M)
            if i < 64:
                mix.history.append([[1e8 * t] * M, loss_M.tolist(), s])
        start = time.perf_counter()
        mix.update(loss_M, np.full(M, 1e8), 1.0, s, 0.75)
        seconds.append(time.perf_counter() - start)
    low, _, high = quantiles(seconds, n=4)
    value = {"ms": 1e3 * median(seconds), "quartiles": [1e3 * low, 1e3 * high]}
    name = "mix update, 7 domains, 64 points"
    report(results, name, value, f"{name}: {value['ms']:.0f} ms ({1e3 * low:.0f} to {1e3 * high:.0f}; under 100)")


def bench_loader(results: dict) -> None:
    """Tokens of 7 domains at T = 4096, from the page cache, on one core; beside a bare copy of the same map."""
    length, n, domains = 4096, 8_000_000, tuple("abcdefg")
    with tempfile.TemporaryDirectory() as folder:
        meta = {"tokenizer": {}, "vocab_size": 32_000, "bos": 1, "eos": 2, "domains": {}}
        for domain in domains:
            write_shard(f"{folder}/{domain}.bin", np.random.default_rng(0).integers(0, 32_000, n), 32_000)
            part = {"tokens": n, "bytes": 4 * n, "shards": [{"file": f"{domain}.bin"}]}
            meta["domains"][domain] = {"train": part, "val": part}
        write_meta(folder, meta)
        loader, map_ = DomainLoader(folder, domains, length, 17, "train"), open_shard(f"{folder}/a.bin")
        ratio_M, step = np.ones(7) / 7, iter(range(10**9))

        def load(batch_size: int) -> None:
            for _ in range(1024 // batch_size):
                batch = loader.next_batch(next(step), ratio_M, batch_size)
                for i in range(0, batch_size, 8):
                    loader.read(batch[i : i + 8])

        def copy() -> None:
            for i in range(1024):
                map_[i * length : (i + 1) * length].copy()

        s = in_turns({"32": lambda: load(32), "256": lambda: load(256), "copy": copy}, 9)
    value = {name: 1024 * length / median(seconds) / 1e6 for name, seconds in s.items()}
    report(results, "loader, M tokens/s", value,
           f"loader at T = 4096: {value['32']:.0f} M tokens/s in batches of 32, {value['256']:.0f} in batches of 256 "
           f"(at least 200); a bare copy {value['copy']:.0f}")  # fmt: skip


def bench_share(results: dict) -> None:
    """The part of the demo's pruning stage that evaluation and mix took, from its metrics."""
    steps_s, other_s = demo.time_spent("prune")
    if not steps_s:
        print("share of evaluation and mix in the demo's pruning: run make demo first")
        return
    share = other_s / (other_s + steps_s)
    report(results, "share of evaluation and mix in the demo's pruning", {"share": share},
           f"share of evaluation and mix in the demo's pruning: {share:.1%} (under 10 %)")  # fmt: skip


def show(r: dict) -> str:
    return (
        f"{r['ratio']:.2f} ({r['quartiles'][0]:.2f} to {r['quartiles'][1]:.2f}; {r['a_ms']:.0f} and {r['b_ms']:.0f} ms)"
    )


if __name__ == "__main__":
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}; {SOURCE}; {B} sequences of {T} tokens")
    results = {"where": where, "torch": torch.__version__}
    for bench in (bench_pruning_step, bench_against_transformers, bench_mix, bench_loader, bench_share):
        bench(results)
        Path("out").mkdir(exist_ok=True)
        Path("out/bench.json").write_text(json.dumps(results, indent=1) + "\n")
