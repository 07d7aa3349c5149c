"""Speed, as ratios from one run: medians with the spread between quartiles, also written to out/bench.json.

    make bench

A ratio of two times taken in turns on one machine carries over to another machine; the times themselves do not.

On a GPU also every kernel at the shapes of Llama-2-7B to 1.3B, beside plain PyTorch, torch.compile and cuBLAS, and
beside the ceilings: what the device reached in a large matrix product and a large copy just before.
"""

import base64
import inspect
import json
import os
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig as HFLlamaConfig
from transformers import LlamaForCausalLM

import demo
import train
from data.loader import Batch, DomainLoader
from data.reader import text_of
from data.shards import HEADER_BYTES, header, open_shard, write_meta, write_shard
from data.tokenizer import FAMILIES, install_tokenizer, load_tokenizer, train_tokenizer
from data.writer import Parcel, encode_parcel, load_worker
from dro import Mix
from kernels import ops as dispatch
from kernels.cases import Case, cases
from kernels.linear_cross_entropy import linear_cross_entropy
from kernels.machine_code import LLAMA_1B, LLAMA_7B
from kernels.masked_linear import masked_linear, packed_linear
from kernels.reference import CHUNKS
from metrics import read_metrics
from model import BlockUnits, Llama, LlamaConfig, Subnetwork, Units
from prune import LOG_ALPHA_RANGE, PAD, Masks, backward_to_masks, extract, probability_dead, subnetwork, target_config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SOURCE = LlamaConfig(4096, 512, 1408, 6, n_heads=8, n_kv_heads=8, head_dim=64)
DEMO = LlamaConfig(4096, 192, 512, 6, n_heads=6, n_kv_heads=3, head_dim=32)  # the demo's source model
HALF = dict(hidden_size=256, intermediate_size=704, n_heads=4, n_layers=4)  # half of every width, 2/3 of the layers
B, T = 8, 256  # sequences and tokens of a step
# Two of its 32 layers, and 2/32 of the vocabulary: the LM head keeps the share of the time it has in the whole model.
TWO_LAYERS = replace(LLAMA_7B, vocab_size=2000, n_layers=2)
TWO_SMALL_LAYERS = replace(LLAMA_1B, vocab_size=2000, n_layers=2)
WARM_UP, ROUNDS = 2, 21  # rounds: of every measurement before it counts; of those on a GPU that count
FLUSH = 2**30  # bytes written before a measurement on a GPU: more than any L2 cache holds

# Launches of a kernel in an op's forward pass, and in forward and backward.
LAUNCHES = {
    "rmsnorm.forward": (1, 1),
    "rmsnorm.backward": (0, 1),
    "masked_swiglu.forward": (1, 1),
    "masked_swiglu.backward": (0, 1),
    "rope.rotate": (1, 2),  # backward is the same kernel with -sin
    "linear_cross_entropy.fold": (CHUNKS, CHUNKS),
    "linear_cross_entropy.gradient": (0, CHUNKS),
    "pack.pack": (1, 1),
    "pack.unpack": (0, 1),
    "masked_linear.forward": (1, 1),
    "masked_linear.dx": (0, 1),
}
# Matrix products that it leaves to the library, likewise; without the logits that the loss makes again in backward.
LIBRARY_PRODUCTS = {packed_linear: (1, 3), masked_linear: (0, 1), linear_cross_entropy: (1, 3)}


def wall_s(way: Callable[[], object]) -> float:
    """Seconds until the result is there."""
    start = time.perf_counter()
    way()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def device_s(way: Callable[[], object]) -> float:
    """Seconds of the GPU alone, its caches cold. On a CPU the wall clock."""
    if DEVICE == "cpu":
        return wall_s(way)
    for _ in range(4):  # 1 to 3 ms: the host runs ahead, so that its launches do not count
        torch.zeros(FLUSH, dtype=torch.uint8, device=DEVICE)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    way()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def in_turns(
    ways: dict[str, Callable[[], object]], rounds: int, clock: Callable[[Callable], float] = wall_s
) -> dict[str, list[float]]:
    """Seconds of every call, the ways taking turns so that a slow minute hits them all; after a warm-up."""
    seconds = {name: [] for name in ways}
    for round_ in range(WARM_UP + rounds):
        for name, way in ways.items():
            s = clock(way)
            if round_ >= WARM_UP:
                seconds[name].append(s)
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
        out = z_D * full["layer"][0, layer] if "layer" in full else z_D
        blocks.append(
            BlockUnits(
                input_layernorm=norm,
                post_attention_layernorm=norm,
                v_proj=Units(row_scale=full["head"][layer].repeat_interleave(c.head_dim)),
                o_proj=Units(row_scale=out),
                up_proj=Units(row_scale=full["intermediate"][layer]),
                down_proj=Units(row_scale=out),
            )
        )
    return Subnetwork(blocks, Units(col_scale=z_D), norm, Units(), z_backward=flat.backward, z_device=leaf)


def settled_masks(source: LlamaConfig, target: LlamaConfig) -> Masks:
    """Masks as they are once the sparsity has reached its target: logits at both ends, the expected sparsity right."""
    masks = Masks(source, target, seed=0)
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
    masks, counter = settled_masks(SOURCE, target_config(SOURCE, **HALF)), iter(range(10**9))
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
    for name, a, b, bound in (
        ("dense / subnetwork", "dense", "subnetwork", "at least 3"),
        ("subnetwork / small model", "subnetwork", "small", "at most 1.25"),
    ):
        r = ratio(s[a], s[b])
        report(results, f"pruning step: {name}", r, f"pruning step, {name}: {show(r)} ({bound})")


def bench_against_transformers(results: dict) -> None:
    c = DEMO
    theirs = LlamaForCausalLM(
        HFLlamaConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            head_dim=c.head_dim,
        )
    ).to(DEVICE)
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
    """Updates with all their fits, one of four a search: 7 domains, 61 to 64 points of history, sparsity among them."""
    M, rng = 7, np.random.default_rng(0)
    seconds = []
    for _ in range(11):
        mix = Mix(tuple("abcdefg"), np.ones(M), "dro")
        alpha_M, E_M = rng.uniform(0.15, 0.6, M), rng.uniform(0.5, 2, M)
        took = []
        for i in range(1, 65):
            s, t = min(0.75, 0.75 * i / 13), i / 64
            loss_M = E_M + 0.3 * t**-alpha_M * s**0.2 + rng.normal(0, 2e-3, M)
            if i < 60:
                mix.history.append([[1e8 * t] * M, loss_M.tolist(), s])
                continue
            start = time.perf_counter()
            mix.update(loss_M, np.full(M, 1e8 * t), t, s, 0.75)
            took.append(time.perf_counter() - start)
        seconds.append(sum(took[1:]) / 4)
    low, _, high = quantiles(seconds, n=4)
    value = {"ms": 1e3 * median(seconds), "quartiles": [1e3 * low, 1e3 * high]}
    name = "mix update, 7 domains, 64 points"
    report(results, name, value, f"{name}: {value['ms']:.1f} ms ({1e3 * low:.1f} to {1e3 * high:.1f}; under 100)")


def write_domain(folder: str, domain: str, shards: list[np.ndarray | int]) -> dict:
    """Shards of uint16 tokens, or as many zeros that take no disk; returns meta.json's entry of the domain."""
    part = {"tokens": 0, "bytes": 0, "shards": []}
    for i, tokens in enumerate(shards):
        file = f"{domain}_{i}.bin"
        n = tokens if isinstance(tokens, int) else len(tokens)
        if isinstance(tokens, int):
            Path(folder, file).write_bytes(header(n, 32_000))
            os.truncate(Path(folder, file), HEADER_BYTES + 2 * n)
        else:
            write_shard(Path(folder, file), tokens, 32_000)
        part["shards"].append({"file": file, "tokens": n})
        part["tokens"] += n
        part["bytes"] += 4 * n
    return {"train": part, "val": part}


def bench_loader(results: dict, shards: int = 1000, rounds: int = 15) -> None:
    """Tokens of 7 domains at T = 4096, from the page cache, on one core; beside a bare copy of a memory map.

    Then one domain of shards * 100 M tokens beside one of 100 M in one shard. As in training no window comes twice:
    what the processor's caches hold of the last round does not help. But all are in the page cache, of either. The same
    reads by bare pread calls, each round those of other windows, say what part of the difference is the kernel's.
    """
    length, n, domains = 4096, 8_000_000, tuple("abcdefg")
    with tempfile.TemporaryDirectory() as folder:
        tokens = np.random.default_rng(0).integers(0, 32_000, n)
        entries = {domain: write_domain(folder, domain, [tokens]) for domain in domains}
        entries |= {"large": write_domain(folder, "large", [100_000_000] * shards)}
        entries |= {"small": write_domain(folder, "small", [100_000_000])}
        write_meta(folder, {"tokenizer": {}, "vocab_size": 32_000, "bos": 1, "eos": 2, "domains": entries})
        loader, map_ = DomainLoader(folder, domains, length, 17, "train"), open_shard(f"{folder}/a_0.bin")
        start_s, sizes, bare = {}, {}, {}
        for name in ("small", "large"):
            start = time.perf_counter()
            sizes[name] = DomainLoader(folder, (name,), length, 17, "train")
            start_s[name] = time.perf_counter() - start
        ratio_M, step = np.ones(7) / 7, iter(range(10**9))

        def load(batch_size: int) -> None:
            for _ in range(1024 // batch_size):
                batch = loader.next_batch(next(step), ratio_M, batch_size)
                for i in range(0, batch_size, 8):
                    loader.read(batch[i : i + 8])

        def copy() -> None:
            for i in range(1024):
                map_[i * length : (i + 1) * length].copy()

        def steps(loader: DomainLoader) -> list[Batch]:
            batches = [loader.next_batch(step, np.ones(1), 128) for step in range(8)]
            for batch in batches:
                loader.read(batch)
            return batches

        def reads(calls: Iterator[list[tuple[int, int]]], out: np.ndarray) -> None:
            for descriptor, start in next(calls):
                os.preadv(descriptor, [out], start)

        for name, of_size in sizes.items():  # every window comes into the page cache, every file is open
            batches = [steps(of_size) for _ in range(WARM_UP + rounds)]
            of_size.load_state_dict({name: [0, 0]})
            half = len(batches) // 2
            calls = [
                [
                    (of_size.files.descriptor[s], start)
                    for batch in part
                    for s, start in zip(batch.shard_N.tolist(), batch.start_N.tolist(), strict=True)
                ]
                for part in batches[half:] + batches[:half]
            ]
            bare[name] = partial(reads, iter(calls), np.empty(length + 1, np.uint16))
        s = in_turns(
            {
                "32": lambda: load(32),
                "256": lambda: load(256),
                "copy": copy,
                "small": lambda: steps(sizes["small"]),
                "large": lambda: steps(sizes["large"]),
                "bare small": bare["small"],
                "bare large": bare["large"],
            },
            rounds,
        )
    value = {name: 1024 * length / median(s[name]) / 1e6 for name in ("32", "256", "copy")}
    report(
        results,
        "loader, M tokens/s",
        value,
        f"loader at T = 4096: {value['32']:.0f} M tokens/s in batches of 32, {value['256']:.0f} in batches of 256 "
        f"(at least 200); a bare copy {value['copy']:.0f}",
    )
    r, kernel = ratio(s["large"], s["small"]), ratio(s["bare large"], s["bare small"])
    report(
        results,
        f"loader: {shards} shards of 100 M tokens / one",
        r | {"start_s": start_s, "bare": kernel},
        f"loader: step on 100 M tokens in each of {shards} shards / in one: {show(r)} (about 1); such reads alone: "
        f"{show(kernel)}; opened in {start_s['large']:.2f} s (under 1)",
    )


def write_ranks(bpe: tokenizers.Tokenizer, path: Path) -> None:
    """The same tokens as a byte-level BPE's, as tiktoken ranks."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves (GPT-2)
    others = [i for i in range(256) if i not in printable]
    byte_of = {chr(i): i for i in printable} | {chr(256 + n): i for n, i in enumerate(others)}
    ranks = sorted((rank, bytes(byte_of[c] for c in token)) for token, rank in bpe.get_vocab().items())
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in ranks))


def bench_tokenize(results: dict, n_bytes: int = 1_000_000, rounds: int = 7) -> None:
    """JSON lines of Python source to tokens by what one process of prepare.py runs, beside the library alone."""
    texts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        if (size := size + len(texts[-1].encode())) >= n_bytes:
            break
    parcel = Parcel(0, 0, [json.dumps({"text": text}).encode() for text in texts], "python")
    with tempfile.TemporaryDirectory() as folder:
        bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
        bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.train_from_iterator(
            texts,
            tokenizers.trainers.BpeTrainer(
                vocab_size=4096, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
            ),
        )
        write_ranks(bpe, Path(folder, "ranks"))
        FAMILIES[bpe.get_vocab_size()] = FAMILIES[128_000]
        bpe.add_special_tokens(["<|endoftext|>"])
        bpe.save(f"{folder}/bpe.json")
        specs = {
            "sentencepiece": train_tokenizer(texts, 4096, folder),
            "tiktoken": install_tokenizer(f"{folder}/ranks", folder),
            "huggingface": install_tokenizer(f"{folder}/bpe.json", folder),
        }
        for kind, spec in specs.items():
            model = load_tokenizer(spec, folder).model
            alone = {
                "sentencepiece": lambda m=model: [m.encode(text) for text in texts],
                "tiktoken": lambda m=model: [m.encode_to_numpy(text, disallowed_special=()) for text in texts],
                "huggingface": lambda m=model: [m.encode(text, add_special_tokens=False).ids for text in texts],
            }[kind]
            load_worker(spec, folder, text_of, 0.01)
            s = in_turns({"alone": alone, "ours": lambda: encode_parcel(parcel, {"python"})}, rounds)
            r = ratio(s["alone"], s["ours"]) | {"MB/s": {name: size / median(s[name]) / 1e6 for name in s}}
            report(
                results,
                f"tokenizing, {kind}",
                r,
                f"tokenizing, {kind}: {r['MB/s']['ours']:.2f} MB/s a core, alone {r['MB/s']['alone']:.2f}: "
                f"{show(r)} (at least 0.80)",
            )


def bench_share(results: dict) -> None:
    """The part of the demo's pruning stage that evaluation and mix took, from its metrics."""
    steps_s, other_s = demo.time_spent("prune")
    if not steps_s:
        print("share of evaluation and mix in the demo's pruning: run make demo first")
        return
    share = other_s / (other_s + steps_s)
    report(
        results,
        "share of evaluation and mix in the demo's pruning",
        {"share": share},
        f"share of evaluation and mix in the demo's pruning: {share:.1%} (under 10 %)",
    )


def bench_long_run(results: dict, steps: int = 20_000) -> None:
    """Resident memory of a run of many tiny steps, with evaluations, fits and checkpoints, early and at its end."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        domains = {d: write_domain(folder, d, [rng.integers(0, 64, 50_000, np.uint16)]) for d in ("a", "b")}
        write_meta(folder, {"tokenizer": {}, "vocab_size": 64, "bos": 1, "eos": 2, "domains": domains})
        train.main(
            train.Config(
                data=folder,
                out_dir=f"{folder}/run",
                n_layers=1,
                hidden_size=16,
                intermediate_size=32,
                n_heads=2,
                n_kv_heads=1,
                head_dim=8,
                seq_len=16,
                batch_size=2,
                micro_batch_size=2,
                max_steps=steps,
                eval_interval=100,
                eval_sequences=2,
                log_interval=steps // 10,
                save_interval=500,
                device=DEVICE,
            )
        )
        evaluations = [r for r in read_metrics(Path(folder, "run/metrics.jsonl")) if r["kind"] == "eval"]
    early, last = (1e-6 * evaluations[i]["memory_bytes"] for i in (len(evaluations) // 10, -1))
    value = {"steps": steps, "MB after a tenth": early, "MB at the end": last}
    line = f"memory of a run of {steps:,} steps: {early:.0f} MB after a tenth of them, {last:.0f} MB at the end"
    report(results, "memory of a long run", value, line)


def show(r: dict) -> str:
    return (
        f"{r['ratio']:.2f} ({r['quartiles'][0]:.2f} to {r['quartiles'][1]:.2f}; {r['a_ms']:.0f} and {r['b_ms']:.0f} ms)"
    )


def bench_ceilings(results: dict, n: int = 8192, size: int = 2**30, rounds: int = ROUNDS) -> None:
    """What the device reaches in a bf16 product of (n, n) matrices and in a copy; size bytes are read and written."""
    a, b = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    c, old, new = torch.empty_like(a), *(torch.zeros(size, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    s = in_turns({"product": lambda: torch.mm(a, b, out=c), "copy": lambda: new.copy_(old)}, rounds, device_s)
    rates = {"TFLOP/s": [2e-12 * n**3 / t for t in s["product"]], "GB/s": [2e-9 * size / t for t in s["copy"]]}
    value, shown = {}, {}
    for unit, each in rates.items():
        low, _, high = quantiles(each, n=4)
        value |= {unit: median(each), f"{unit}, quartiles": [low, high]}
        shown[unit] = f"{median(each):,.4g} ({low:,.4g} to {high:,.4g}) {unit}"
    line = f"ceilings: {shown['TFLOP/s']} in a bf16 product of {n}^3, {shown['GB/s']} in a copy of {size:,} bytes"
    report(results, "ceilings", value, line)


def whole_logits_loss(h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The token loss as it is usually written. (linear_cross_entropy_torch makes chunks of the logits, like ours.)"""
    logits = F.linear(h, weight).float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def in_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def call(way: Callable, inputs: tuple, upstream: list[Tensor] | None = None) -> Callable[[], tuple[Tensor, ...]]:
    """A call of forward in bf16 autocast, and of backward where gradients of the outputs are given."""
    leaves = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]

    def run() -> tuple[Tensor, ...]:
        with torch.autocast(DEVICE, torch.bfloat16):
            outputs = in_tuple(way(*inputs))
        return torch.autograd.grad(outputs, leaves, upstream) if upstream else outputs

    return run


def product_work(x: Tensor, weight: Tensor) -> tuple[int, int]:
    """Bytes (operands and result) and operations of x @ weight^T in bf16. Each product of its backward has as many."""
    (n, m), N = weight.shape, x.numel() // x.shape[-1]
    return 2 * (N * m + n * m + N * n), 2 * N * n * m


def op_work(case: Case, x: Tensor, weight: Tensor, backward: bool) -> tuple[float, float]:
    """Bytes and operations of the kernels and of the products beside them; x, weight: the operands of those."""
    parts = [(LAUNCHES[kernel][backward], work) for kernel, work in case.work.items()]
    if case.fused in LIBRARY_PRODUCTS:
        parts.append((LIBRARY_PRODUCTS[case.fused][backward], product_work(x, weight)))
    return sum(times * work[0] for times, work in parts), sum(times * work[1] for times, work in parts)


def peak_bytes(way: Callable[[], object]) -> int:
    """GPU memory at its highest during a call, less what was there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    return torch.cuda.max_memory_allocated() - before


def ways_of(case: Case, inputs: tuple, compiler: str) -> dict[str, tuple[Callable, tuple]]:
    """The op by its kernels, in plain PyTorch, that compiled, and a linear's product alone; with the inputs of each."""
    checks = "checked" in inspect.signature(case.fused).parameters
    ours = partial(case.fused, checked=True) if checks else case.fused  # as a run calls it: the host waits for nothing
    dtypes = [y.dtype for y in call(ours, inputs)()]
    whole = whole_logits_loss if case.op == "linear_cross_entropy" else case.torch

    def plain(*inputs) -> tuple[Tensor, ...]:  # cast, as the op that comes next would
        return tuple(y.to(dtype) for y, dtype in zip(in_tuple(whole(*inputs)), dtypes, strict=True))

    torch.compiler.reset()  # each case is compiled for its own shapes
    compiled = torch.compile(plain, dynamic=False, backend=compiler)
    ways = {"ours": (ours, inputs), "plain": (plain, inputs), "compiled": (compiled, inputs)}
    if case.op == "linear":
        x, weight, bias, rows, *_ = inputs
        n = len(weight if rows is None else rows)
        small = torch.randn(n, x.shape[-1], device=DEVICE, dtype=x.dtype).requires_grad_()
        ways["cuBLAS"] = F.linear, (x, small, bias)
    return ways


def bench_kernels(
    results: dict,
    source: LlamaConfig = LLAMA_7B,
    target: LlamaConfig = LLAMA_1B,
    batch: int = 4,
    length: int = 4096,
    rounds: int = ROUNDS,
    compiler: str = "inductor",
) -> None:
    """Every op beside its other ways, and beside the ceilings that bench_ceilings found."""
    for case in cases(source, target, batch, length, torch.bfloat16, DEVICE, PAD[DEVICE]):
        inputs = case.inputs()
        ways = ways_of(case, inputs, compiler)
        gradients = [torch.randn_like(y) for y in call(*ways["plain"])()]
        for backward in (False, True):
            calls = {name: call(*way, gradients if backward else None) for name, way in ways.items()}
            s = in_turns(calls, rounds, device_s)
            _, operands = ways.get("cuBLAS", ways["ours"])
            value = against_ceilings(s, *op_work(case, *operands[:2], backward), results["ceilings"])
            if DEVICE == "cuda":
                value["peak MiB"] = {name: peak_bytes(calls[name]) / 2**20 for name in ("ours", "plain")}
            name = f"{case.fused.__name__}, {case.where}, {'forward and backward' if backward else 'forward'}"
            report(results, name, value, table(name, case, value))


def against_ceilings(s: dict[str, list[float]], bytes_: float, operations: float, ceilings: dict) -> dict:
    memory_s, product_s = 1e-9 * bytes_ / ceilings["GB/s"], 1e-12 * operations / ceilings["TFLOP/s"]
    bound = "copy" if memory_s > product_s else "product"
    value = {"bytes": bytes_, "operations": operations, "bound": bound, "ways": {}}
    for name, seconds in s.items():
        low, t, high = quantiles(seconds, n=4)
        value["ways"][name] = {
            "ms": 1e3 * t,
            "quartiles": [1e3 * low, 1e3 * high],
            "TFLOP/s": 1e-12 * operations / t,
            "GB/s": 1e-9 * bytes_ / t,
            "of ceiling": max(memory_s, product_s) / t,
            "over ours": ratio(seconds, s["ours"])["ratio"],
        }
    return value


def table(name: str, case: Case, value: dict) -> str:
    lines = [f"{name}: {1e-6 * value['bytes']:,.4g} MB, {1e-9 * value['operations']:,.4g} GFLOP"]
    for way, v in value["ways"].items():
        low, high = v["quartiles"]
        least_share = " (at least 80 %)" if way == "ours" and value["bound"] == "copy" else ""
        least_ratio = " (at least 0.85)" if way == "cuBLAS" and case.fused is packed_linear else ""
        lines.append(
            f"    {way:8} {v['ms']:.4g} ms ({low:.4g} to {high:.4g}), {v['over ours']:.2f} of ours{least_ratio}; "
            f"{v['TFLOP/s']:,.4g} TFLOP/s, {v['GB/s']:,.4g} GB/s, "
            f"{v['of ceiling']:.0%} of the {value['bound']}{least_share}"
        )
    if "peak MiB" in value:
        ours, plain = value["peak MiB"]["ours"], value["peak MiB"]["plain"]
        most = " (at most 0.125)" if case.op == "linear_cross_entropy" else ""
        lines.append(f"    peak memory {ours:,.0f} MiB, plain {plain:,.0f} MiB: {ours / plain:.3f}{most}")
    return "\n".join(lines)


def bench_block(
    results: dict,
    source: LlamaConfig = TWO_LAYERS,
    target: LlamaConfig = TWO_SMALL_LAYERS,
    batch: int = 4,
    length: int = 4096,
    rounds: int = ROUNDS,
) -> None:
    """Forward and backward of two pruned blocks, to the masks' logits, by the kernels in bf16 autocast."""
    dispatch.use("triton", DEVICE)
    masks, counter, model = settled_masks(source, target), iter(range(10**9)), fresh(source)
    tokens = torch.randint(0, source.vocab_size, (batch, length + 1), device=DEVICE)

    def step(build: Callable[[dict], Subnetwork]) -> None:
        s = build(masks.sample(0, next(counter), 0))
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = model(tokens[:, :-1], tokens[:, 1:], s).mean()
        loss.backward()
        backward_to_masks([s])
        model.zero_grad()
        masks.zero_grad()

    ways = {
        "dense": lambda: step(lambda z: masked_dense(z, source)),
        "subnetwork": lambda: step(lambda z: subnetwork(source, z, DEVICE, PAD[DEVICE])),
    }
    s = in_turns(ways, rounds)
    r, name = ratio(s["dense"], s["subnetwork"]), "forward and backward of pruned blocks: dense / subnetwork"
    report(results, name, r, f"{name}: {show(r)} (at least 3)")


if __name__ == "__main__":
    dispatch.use("auto", DEVICE)
    where = torch.cuda.get_device_name() if DEVICE == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}; {SOURCE}; {B} sequences of {T} tokens")
    results = {"where": where, "torch": torch.__version__}
    benches = [
        bench_pruning_step,
        bench_against_transformers,
        bench_mix,
        bench_loader,
        bench_tokenize,
        bench_share,
        bench_long_run,
    ]
    if DEVICE == "cuda":
        benches += [bench_ceilings, bench_kernels, bench_block]
    else:
        print("kernels: no GPU, not measured")
    for bench in benches:
        bench(results)
        Path("out").mkdir(exist_ok=True)
        Path("out/bench.json").write_text(json.dumps(results, indent=1) + "\n")
