"""Data sets made from a prepared one: for training (plain, windows) and for the final evaluation.

The validation text of each domain is cut in two: the first quarter steers the mix, the rest is for the end. `windows`
steers it by the second half of that quarter. From the rest come `heldout` and three corruptions of it, whose domains
keep their names. All of it follows from the text alone.
"""

import json
import re
from pathlib import Path

import numpy as np

from configurator import UserError
from data.shards import SPLITS, open_shard, read_meta, sha256, write_meta, write_shard
from data.tokenizer import load_tokenizer

STEERING = 4  # one in so many validation tokens steers the mix
NOISE = 0.05  # share of characters
RUN = 16  # tokens taken from one domain at a time where two are mixed
CORRUPTIONS = ("noise", "shuffled", "mixed")
EVALUATION = ("heldout", *CORRUPTIONS)

Text = tuple[np.ndarray, float]  # tokens (n,), and UTF-8 bytes a token


def build(data: str, out: Path, seq_len: int, windows: int, corrupted_windows: int) -> None:
    """Write every view of the data set into folders below out, once. Raises UserError where out holds others."""
    made_of, meta, rng = out / "made_of.json", read_meta(data), np.random.default_rng(0)
    sizes = (seq_len, windows, corrupted_windows)
    settings = json.dumps([sha256(Path(data, "meta.json")), *sizes, STEERING, NOISE, RUN])
    if made_of.exists():
        if made_of.read_text() != settings:
            raise UserError(f"{out} was made of other text or with other settings: give another --out")
        return
    plain, other, heldout, few = {}, {}, {}, {}
    for domain, splits in meta["domains"].items():
        text = {}
        for split in SPLITS:
            tokens = np.concatenate([open_shard(Path(data, s["file"])) for s in splits[split]["shards"]])
            text[split] = tokens, splits[split]["bytes"] / max(splits[split]["tokens"], 1)
        val, density = text["val"]
        cut = len(val) // STEERING
        plain[domain] = {"train": text["train"], "val": (val[:cut], density)}
        other[domain] = {"train": text["train"], "val": (val[cut // 2 : cut], density)}
        w = spread(val[cut:], windows, seq_len + 1)
        heldout[domain] = {"val": (w.ravel(), density)}
        few[domain] = w[:: max(1, len(w) // corrupted_windows)][:corrupted_windows], density
    views = {"plain": plain, "windows": other, "heldout": heldout, "mixed": mixed(few)}
    tokenizer = load_tokenizer(meta, data)
    for name, corrupt in (("noise", noisy), ("shuffled", shuffled)):
        views[name] = {d: {"val": rewritten(w, corrupt, tokenizer, rng)} for d, (w, _) in few.items()}
    for name, domains in views.items():
        write_view(out / name, meta, domains)
    made_of.write_text(settings)  # last: the views are whole


def write_view(folder: Path, meta: dict, domains: dict[str, dict[str, Text]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    described = {domain: {split: {"tokens": 0, "bytes": 0, "shards": []} for split in SPLITS} for domain in domains}
    for domain, splits in domains.items():
        for split, (tokens, density) in splits.items():
            path = folder / f"{domain}_{split}_000000.bin"
            write_shard(path, tokens, meta["vocab_size"])
            shard = {"file": path.name, "tokens": len(tokens), "sha256": sha256(path)}
            described[domain][split] = {"tokens": len(tokens), "bytes": round(len(tokens) * density), "shards": [shard]}
    write_meta(folder, {**meta, "domains": described})


def spread(tokens: np.ndarray, n: int, length: int) -> np.ndarray:
    """n windows, (n, length), evenly over the text; all there are where it is shorter."""
    all_windows = tokens[: len(tokens) // length * length].reshape(-1, length)
    return all_windows[np.unique(np.linspace(0, len(all_windows) - 1, n).astype(int))]


def rewritten(windows: np.ndarray, corrupt, tokenizer, rng: np.random.Generator) -> Text:
    """The windows' text, each corrupted, as one stream of tokens."""
    texts = [corrupt(tokenizer.decode(window.tolist()), rng) for window in windows]
    tokens = np.concatenate([np.asarray(tokenizer.encode(text)) for text in texts])
    return tokens, sum(len(text.encode()) for text in texts) / len(tokens)


def noisy(text: str, rng: np.random.Generator) -> str:
    """NOISE of the characters become another one of the text or change places with the next."""
    letters = list(text)
    for i in np.flatnonzero(rng.random(len(letters)) < NOISE):
        if rng.random() < 0.5 or i + 1 == len(letters):
            letters[i] = letters[rng.integers(len(letters))]
        else:
            letters[i], letters[i + 1] = letters[i + 1], letters[i]
    return "".join(letters)


def shuffled(text: str, rng: np.random.Generator) -> str:
    """Sentences and lines in random order."""
    pieces = [piece for piece in re.split(r"(?<=[.!?]\s)|(?<=\n)", text) if piece]
    return "".join(pieces[i] for i in rng.permutation(len(pieces)))


def mixed(windows: dict[str, tuple[np.ndarray, float]]) -> dict:
    """Every other RUN of tokens is the next domain's."""
    names, out = list(windows), {}
    for domain, other in zip(names, names[1:] + names[:1], strict=True):
        (own, own_density), (foreign, foreign_density) = windows[domain], windows[other]
        n = min(len(own), len(foreign))
        is_own = np.arange(own.shape[1]) // RUN % 2 == 0
        out[domain] = {"val": (np.where(is_own, own[:n], foreign[:n]).ravel(), (own_density + foreign_density) / 2)}
    return out
