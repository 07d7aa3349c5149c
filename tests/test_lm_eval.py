"""lm-evaluation-harness's own hf backend on a folder of ours: the same log-likelihoods and accuracies as ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from test_model import random_model
from test_sample import write_tokenizer

import hf

TASK = """
task: ours
dataset_path: json
dataset_kwargs:
  data_files: {docs}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def loglikelihood(model, tokenizer, context, continuation):
    """Nats of the continuation's tokens after the context, of one text that begins with BOS."""
    n = len(tokenizer.encode(context).ids)
    tokens = torch.tensor([tokenizer.encode(context + continuation).ids])
    with torch.no_grad():
        return -model(tokens[:, :-1], tokens[:, 1:]).cross_entropy[0, n - 1 :].double().sum().item()


@pytest.mark.full
def test_the_harness_scores_a_folder_of_ours_as_we_do(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
    model = random_model(300, 32, 40, 2, 4, 2, 8, max_position_embeddings=64, bos_token_id=0, eos_token_id=1)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # so that it prefers something
    hf.save(model, tmp_path / "model", tokenizer=[tokenizer])

    words = ["quick", "brown", "fox", "jumps", "over", "lazy", "dog"]
    docs = [{"q": f"the {w}", "choices": [v for v in words if v != w][:4], "gold": i % 4} for i, w in enumerate(words)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (tmp_path / "ours.yaml").write_text(TASK.format(docs=tmp_path / "docs.jsonl"))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "ours", "--include_path", str(tmp_path)]
    command += [
        "--model_args",
        f"pretrained={tmp_path / 'model'},dtype=float32",
        "--device",
        "cpu",
        "--batch_size",
        "1",
    ]
    command += ["--output_path", str(tmp_path / "results"), "--log_samples"]
    environment = os.environ | OFFLINE | {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr

    texts = tokenizers.Tokenizer.from_file(str(tmp_path / "model/tokenizer.json"))
    ours = [[loglikelihood(model, texts, doc["q"], f" {choice}") for choice in doc["choices"]] for doc in docs]
    (samples,) = (tmp_path / "results").rglob("samples_ours_*.jsonl")
    theirs = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    for sample, expected in zip(theirs, ours, strict=True):
        found = [float(response[0][0]) for response in sample["resps"]]
        assert found == pytest.approx(expected, abs=1e-3)
    (results,) = (tmp_path / "results").rglob("results_*.json")
    scores = json.loads(Path(results).read_text())["results"]["ours"]
    best = [max(range(4), key=answers.__getitem__) for answers in ours]
    assert scores["acc,none"] == pytest.approx(sum(b == doc["gold"] for b, doc in zip(best, docs, strict=True)) / 7)
    by_length = [
        max(range(4), key=lambda i, a=answers, c=doc["choices"]: a[i] / len(c[i]))
        for answers, doc in zip(ours, docs, strict=True)
    ]
    right = sum(b == doc["gold"] for b, doc in zip(by_length, docs, strict=True))
    assert scores["acc_norm,none"] == pytest.approx(right / 7)
