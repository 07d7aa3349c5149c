"""From GGUF to a Hugging Face folder: a small file with known weights, written here and read back."""

import json
import zipfile

import numpy as np
import pytest
import tiktoken
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf
import model as llama
from configurator import UserError
from data.shards import read_meta, verify
from data.smollm2 import prepare
from data.tokenizer import load_tokenizer

gguf = pytest.importorskip("gguf")

LAYERS, HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 96, 4, 2, 16
# SmolLM2's splitting, as tiktoken has it
SPLITTING = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MISSING = 6  # a byte without a piece of its own, as SmolLM2 has some
MERGES = [
    "\u0120 t",
    "h e",
    "\u0120t he",
    "\u0120 \u0120",
    "\u0120\u0120 \u0120\u0120",
    "1 2",
    "\u0120 1",
    "i n",
    "\u0120 in",
    "' s",
    "\u010a \u010a",
    "\u00c3 \u00a9",
]
TEXTS = [
    "the  in\n\n\n  the 12 in's x=121;\t\r\n   1  2    the",
    "The'S don't 'll I'll caf\u00e9 \u6f22\u5b57 \u00b2\u0663\u2460 \u3000 \u00a0 \U0001f600 12 the",
    " \n the   ",
]


def byte_characters() -> dict[int, str]:
    """GPT-2's printable character of every byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def vocabulary() -> list[str]:
    return [
        *SPECIALS,
        *(c for b, c in byte_characters().items() if b != MISSING),
        *(m.replace(" ", "") for m in MERGES),
    ]


def known_weights(tied: bool) -> dict[str, torch.Tensor]:
    """Hugging Face names and order of rows."""
    generator = torch.Generator().manual_seed(0)
    q, kv, vocab = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, len(vocabulary())
    shapes = {"model.embed_tokens.weight": (vocab, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (vocab, HIDDEN)
    for layer in range(LAYERS):
        block = {
            "self_attn.q_proj": (q, HIDDEN),
            "self_attn.k_proj": (kv, HIDDEN),
            "self_attn.v_proj": (kv, HIDDEN),
            "self_attn.o_proj": (HIDDEN, q),
            "mlp.gate_proj": (FFN, HIDDEN),
            "mlp.up_proj": (FFN, HIDDEN),
            "mlp.down_proj": (HIDDEN, FFN),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head in GGUF's order, one by one: row 2i + j of a head is its row i + j K/2."""
    out = np.empty_like(weight)
    size = len(weight) // heads
    for head in range(heads):
        for i in range(size // 2):
            for j in (0, 1):
                out[head * size + 2 * i + j] = weight[head * size + i + j * size // 2]
    return out


def write_gguf(path, tied=True, leave_out="", pre="smollm", architecture="llama", quantise=False):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(5e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(vocabulary()) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages }}")
    theirs = {ours: name for name, ours in prepare.NAMES.items()}
    block = {ours: name for name, ours in prepare.BLOCK_NAMES.items()}
    for name, weight in known_weights(tied).items():
        stem = name.removeprefix("model.").removesuffix(".weight")
        if stem.startswith("layers."):
            _, layer, part = stem.split(".", 2)
            stem = f"blk.{layer}.{block[part]}"
        else:
            stem = theirs[stem]
        values = weight.numpy()
        if stem.endswith(("attn_q", "attn_k")):
            values = interleaved(values, HEADS if stem.endswith("q") else KV_HEADS)
        if leave_out and stem.endswith(leave_out):
            continue
        if quantise and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q4_1
            writer.add_tensor(f"{stem}.weight", gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{stem}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A package with the file where the real one has it."""
    folder = tmp_path_factory.mktemp("package")
    with zipfile.ZipFile(folder / "a.whl", "w") as wheel:
        wheel.write(write_gguf(folder / "a.gguf"), prepare.GGUF_FILE)
    return folder / "a.whl"


@pytest.fixture
def offline(archive, monkeypatch):
    class Local:
        def __init__(self, *_):
            pass

        def wait(self, *_):
            return archive

    monkeypatch.setattr(prepare, "Download", Local)
    texts = {d: [f"the {d} {i} in\n" * 9 for i in range(40)] for d in prepare.ABOUT}
    monkeypatch.setattr(prepare, "collect", lambda: texts)


@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_of_a_gguf_file_come_back_under_our_names_and_in_our_order_of_rows(tmp_path, tied):
    model = prepare.model_of(prepare.Gguf(write_gguf(tmp_path / "a.gguf", tied)))
    assert model.config.tied_embeddings == tied
    parameters = dict(model.named_parameters())
    for name, weight in known_weights(tied).items():
        assert torch.equal(parameters[name.removeprefix("model.")], weight), name


def test_the_sizes_of_a_gguf_file_become_the_config(tmp_path):
    config = prepare.model_of(prepare.Gguf(write_gguf(tmp_path / "a.gguf"))).config
    assert config == llama.LlamaConfig(
        vocab_size=len(vocabulary()),
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        n_layers=LAYERS,
        n_heads=HEADS,
        n_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        rope_theta=5e4,
        norm_eps=1e-5,
        tied_embeddings=True,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
    )


def test_weights_of_4_bits_are_read_to_half_a_step_of_their_block(tmp_path):
    model = prepare.model_of(prepare.Gguf(write_gguf(tmp_path / "a.gguf", quantise=True)))
    for name, weight in known_weights(tied=True).items():
        ours = dict(model.named_parameters())[name.removeprefix("model.")].detach()
        if weight.dim() == 2:
            blocks = weight.view(len(weight), -1, 32)
            half_step = (blocks.amax(2) - blocks.amin(2)) / 15 / 2
            error = (ours - weight).abs().view_as(blocks).amax(2)
            assert (error <= 1.05 * half_step + 1e-3).all()  # scale and offset are float16
            assert error.max() > 0


def test_the_folder_is_what_transformers_reads(tmp_path, offline):
    prepare.main(["--out", str(tmp_path)])
    ours, theirs = hf.load(tmp_path / "model"), AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokens = torch.arange(3, 40)[None]
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    spec = read_meta(tmp_path / "data")["tokenizer"]
    for text in TEXTS:
        expected = load_tokenizer(spec, tmp_path / "data").encode(text)
        assert tokenizer(text, add_special_tokens=False).input_ids == expected


def test_the_tokenizer_splits_as_the_published_pattern_does(tmp_path):
    tokenizer = prepare.tokenizer_of(prepare.Gguf(write_gguf(tmp_path / "a.gguf")))
    byte_of = {c: b for b, c in byte_characters().items()}
    ranks = {bytes(byte_of[c] for c in piece): i for i, piece in enumerate(vocabulary()) if i >= len(SPECIALS)}
    ranks[bytes([MISSING])] = len(vocabulary())
    reference = tiktoken.Encoding("small", pat_str=SPLITTING, mergeable_ranks=ranks, special_tokens={})
    for text in TEXTS:
        assert tokenizer.encode(text).ids == reference.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_a_byte_without_a_piece_is_left_out_and_specials_are_known(tmp_path):
    tokenizer = prepare.tokenizer_of(prepare.Gguf(write_gguf(tmp_path / "a.gguf")))
    assert tokenizer.decode(tokenizer.encode("in\x06the").ids) == "inthe"
    assert tokenizer.encode("<|im_end|>").ids == [2]


def test_the_data_set_is_whole_and_a_second_call_does_nothing(tmp_path, offline, capsys):
    prepare.main(["--out", str(tmp_path)])
    verify(tmp_path / "data")
    meta = read_meta(tmp_path / "data")
    assert set(meta["domains"]) == set(prepare.ABOUT)
    assert (meta["vocab_size"], meta["bos"], meta["eos"]) == (len(vocabulary()), 0, 0)
    assert "instruct model, de-quantised from 4 bits" in capsys.readouterr().out
    assert not (tmp_path / "model" / "model.gguf").exists()
    before = (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns
    prepare.main(["--out", str(tmp_path)])
    assert capsys.readouterr().out.count("nothing to do") == 2
    assert (tmp_path / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_an_interrupted_conversion_starts_again(tmp_path, offline, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "model_of", stop)
        prepare.main(["--out", str(tmp_path)])
    prepare.main(["--out", str(tmp_path)])
    assert json.loads((tmp_path / "model" / "config.json").read_text())["hidden_size"] == HIDDEN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(leave_out="attn_k"), "Missing key.*k_proj"),
        (dict(architecture="mamba"), "architecture 'mamba': only 'llama' is read"),
    ],
)
def test_a_file_of_another_model_is_refused(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        prepare.model_of(prepare.Gguf(write_gguf(tmp_path / "a.gguf", **change)))


def test_a_tokenizer_that_splits_otherwise_is_refused(tmp_path):
    with pytest.raises(UserError, match="tokenizer gpt2/llama-bpe: only byte-level BPE as SmolLM2 splits it"):
        prepare.tokenizer_of(prepare.Gguf(write_gguf(tmp_path / "a.gguf", pre="llama-bpe")))


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"not a model" * 9)
    with pytest.raises(UserError, match=r"a\.gguf: not a readable GGUF file"):
        prepare.Gguf(tmp_path / "a.gguf")
