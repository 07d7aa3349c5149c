"""Models as Hugging Face folders: config.json, safetensors files and the tokenizer's files, read and written.

The rule: a folder gives the same numbers here as in transformers, or a UserError that says why not. Files are
memory-mapped and one tensor is held at a time, so a rank that keeps a part of each tensor needs no more than its part.
Names are Hugging Face's without the leading "model."; those of model.py are the same.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configurator import UserError
from data.shards import read_json
from model import FAMILIES, Llama, LlamaConfig

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # of a safetensors file at most, as tools expect
DTYPES = ("F32", "F16", "BF16")  # as safetensors names them
TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # a folder with one of these has a tokenizer
FAST = ("tokenizer.json", "tokenizer_config.json")  # what transformers' AutoTokenizer needs
CARRIED = (  # what goes with the weights into every folder: the tokenizer, and the licence of the source
    *(*FAST, "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*"),
)

# ---- config.json

RENAMED = {
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
OURS = {f.name for f in fields(LlamaConfig)} - {"family", "rope_scaling"}
HF_NAMES = {name: RENAMED.get(name, name) for name in sorted(OURS)}  # ours: Hugging Face's
SILENT = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10_000.0}
PRESUMED = {  # what transformers takes where a family's config.json is silent; any other family has to say it
    "llama": SILENT,
    "mistral": SILENT | {"sliding_window": 4096},
    "qwen2": SILENT | {"use_sliding_window": False},
    "qwen3": SILENT | {"use_sliding_window": False},
}


def to_hugging_face(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> dict:
    """config.json, in words that transformers 4 and 5 both read."""
    ours = asdict(config)
    return {
        "architectures": [FAMILIES[config.family].architecture],
        "model_type": config.family,
        "hidden_act": "silu",
        "torch_dtype": str(dtype).removeprefix("torch."),
        **{theirs: ours[name] for name, theirs in HF_NAMES.items()},
        **({"rope_scaling": config.rope_scaling} if config.rope_scaling else {}),
    }


def read_config(folder: str | Path) -> LlamaConfig:
    """The shape of the model in a folder. Raises UserError for what model.py cannot run as transformers would."""
    path = Path(folder, "config.json")
    theirs = read_json(path, "a model is a folder of config.json and safetensors files")
    name = (theirs.get("architectures") or ["a file without architectures"])[0]
    family = next((key for key, f in FAMILIES.items() if f.architecture == name), None)
    if family is None:
        raise UserError(f"{path}: {name} is not supported; {', '.join(f.architecture for f in FAMILIES.values())} are")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    try:
        rope = {"rope_type": rope.get("type", "default")} | rope
        theirs = PRESUMED.get(family, {}) | theirs | rope
        if reason := _unsupported(theirs, family):
            raise UserError(f"not supported: {reason}")
        if theirs.get("use_sliding_window") is False:
            theirs["sliding_window"] = None
        scaling = {key: rope[key] for key in rope.keys() - {"type", "rope_theta", "partial_rotary_factor"}}
        values = {ours: theirs[key] for ours, key in HF_NAMES.items() if theirs.get(key) is not None}
        values.setdefault("n_kv_heads", values["n_heads"])  # a wrong guess of these two does not fit the tensors
        values.setdefault("head_dim", values["hidden_size"] // values["n_heads"])
        scaling = None if scaling["rope_type"] == "default" else scaling
        return LlamaConfig(**values, family=family, rope_scaling=scaling)
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, UserError) as error:
        raise UserError(f"{path}: {error}") from None


def _unsupported(theirs: dict, family: str) -> str:
    """The first thing in config.json that model.py does not have; "" where there is none."""
    silent = [key for key in SILENT if key not in theirs]
    reasons = {
        f"a {family} whose config.json does not say {', '.join(silent)}": silent,
        f"hidden_act {theirs.get('hidden_act')!r}; silu is": theirs.get("hidden_act") != "silu",
        "biases in the output projection (attention_bias)": theirs.get("attention_bias")
        and not FAMILIES[family].qkv_bias,
        "biases in the FFN projections (mlp_bias)": theirs.get("mlp_bias"),
        "layers that see only the last tokens (use_sliding_window)": theirs.get("use_sliding_window"),
        "layer_types other than full_attention": set(theirs.get("layer_types") or ()) - {"full_attention"},
        "quantized weights (quantization_config)": theirs.get("quantization_config"),
        "RoPE on a part of a head (partial_rotary_factor)": theirs.get("partial_rotary_factor", 1.0) != 1.0,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


# ---- reading


def load(folder: str | Path, device: str = "cpu") -> Llama:
    """The model in a folder, float32. Raises UserError."""
    with torch.device("meta"):
        model = Llama(read_config(folder))
    tensors_of(folder, model.config)  # before memory is asked for: config.json may promise anything
    model.to_empty(device=device).tie()
    fill(model, folder)
    return model


@torch.no_grad()
def fill(model: Llama, folder: str | Path, put: Callable[[Tensor, Tensor], object] = Tensor.copy_) -> None:
    """Hand every parameter its tensor in the folder, one at a time: put(parameter, tensor). Raises UserError."""
    parameters = dict(model.named_parameters())
    for name, tensor in tensors_of(folder, model.config):
        put(parameters[name], tensor)


def tensors_of(folder: str | Path, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter, in the order of Llama(config).named_parameters(), on the CPU, as stored.

    Raises UserError, before the first is read, for a tensor that is missing, unexpected, of another shape, or not
    floating point.
    """
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}
    places: dict[str, tuple[Path, str]] = {}  # file and key
    for path in _safetensors_files(Path(folder)):
        for key, (shape, dtype) in _header(path).items():
            name = key.removeprefix("model.")
            if name in places:
                raise UserError(f"{path}: {key} is in {places[name][0]} too: remove the file of another model")
            places[name] = path, key
            if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tied_embeddings):
                continue  # follow from the rest
            if name not in shapes:
                raise UserError(f"{path}: unexpected tensor {key}: the model that config.json describes has none")
            if shape != shapes[name]:
                raise UserError(f"{path}: {key} has shape {shape}, config.json makes it {shapes[name]}")
            if dtype not in DTYPES:
                raise UserError(f"{path}: {key} is {dtype}: expected one of {', '.join(DTYPES)}")
    if missing := [name for name in shapes if name not in places]:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, {missing[0]} among them: copy the folder again")
    return ((name, _read(*places[name])) for name in shapes)


def _read(path: Path, key: str) -> Tensor:
    with safe_open(path, framework="pt") as f:  # opened for each tensor: its pages are given back with it
        return f.get_tensor(key)


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every tensor in a file, by its key."""
    try:
        with safe_open(path, framework="pt") as f:
            stored = {key: f.get_slice(key) for key in f.keys()}  # noqa: SIM118 (not a dict)
            return {key: (tuple(t.get_shape()), t.get_dtype()) for key, t in stored.items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}): copy it again") from None


def _safetensors_files(folder: Path) -> list[Path]:
    """Those that the index names; without an index, all there are."""
    names = {path.name for path in folder.glob("*.safetensors")}
    if (folder / INDEX).is_file():
        names = set(read_json(folder / INDEX, "copy it again from the model").get("weight_map", {}).values())
    if not names:
        raise UserError(f"{folder}: no *.safetensors file, or an index that names none: copy the weights there")
    return [folder / name for name in sorted(names)]


# ---- writing


def save(model: Llama, folder: str | Path, dtype: torch.dtype = torch.float32, tokenizer: Sequence = ()) -> None:
    """Write a folder that transformers' AutoModelForCausalLM loads, and AutoTokenizer where a tokenizer is found.

    tokenizer: folders to copy the tokenizer's files from; the first that has some is taken. A file of weights is held
    in memory at a time.
    """
    folder, groups, size = Path(folder), [{}], 0
    folder.mkdir(parents=True, exist_ok=True)
    for name, p in model.named_parameters():
        if groups[-1] and size + p.numel() * dtype.itemsize > SHARD_BYTES:
            groups, size = [*groups, {}], 0
        groups[-1][name if name.startswith("lm_head") else f"model.{name}"] = p
        size += p.numel() * dtype.itemsize
    n = len(groups)
    names = ["model.safetensors"] if n == 1 else [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)]
    _write_json(folder / "config.json", to_hugging_face(model.config, dtype))
    for left in set(folder.glob("model*.safetensors*")) - {folder / name for name in names}:
        left.unlink()  # of an earlier save into other files: tools would read those
    for name, group in zip(names, groups, strict=True):
        tmp = folder / f"{name}.tmp"
        save_file({key: p.detach().to("cpu", dtype).contiguous() for key, p in group.items()}, tmp, {"format": "pt"})
        shutil.copymode(folder / "config.json", tmp)  # the library hides its files from other users
        os.replace(tmp, folder / name)
    if n > 1:
        weight_map = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        size = model.n_parameters() * dtype.itemsize
        _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    copy_tokenizer(tokenizer, folder)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def copy_tokenizer(sources: Sequence[str | Path], folder: Path) -> None:
    """The files of the first source that has a tokenizer; tokenizer.json from a later one if need be: a sentencepiece
    model, say, that a data set has in both forms."""
    homes = [Path(s) for s in sources if s and any(Path(s, name).is_file() for name in TOKENIZERS)]
    fast = [home for home in homes if (home / "tokenizer.json").is_file()]
    taken = {f.name: f for home in homes[:1] for pattern in CARRIED for f in home.glob(pattern)}
    taken |= {f.name: f for home in fast[:1] for name in FAST for f in home.glob(name)}
    for name, file in taken.items():
        if file.parent.resolve() != folder.resolve():
            shutil.copyfile(file, folder / name)
