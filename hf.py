"""Weights on disk, one tensor at a time: folders of Hugging Face and of Meta are read, Hugging Face's are written.

Hugging Face: config.json and safetensors files, with model.safetensors.index.json where there are several.
Meta: params.json and consolidated.00.pth, consolidated.01.pth, ..., each a model-parallel part of every matrix; here
they read as a Hugging Face folder would. Names are Hugging Face's without the leading "model.".

Files are memory-mapped and no more than one tensor is held: a model larger than half the memory can be read, and a rank
that keeps a part of each tensor needs no more than its part. Nothing here knows the architecture; model.py does.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
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
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors names them


@dataclass(frozen=True)
class Stored:
    """A tensor that has not been read yet."""

    path: Path  # its file, or the first of them
    key: str  # its name there
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a string: not one of DTYPES
    read: Callable[[], Tensor]


def _read_config_file(folder: Path) -> tuple[Path, dict]:
    """The file that describes the model, and what it says in the terms of Hugging Face's config.json."""
    path = folder / "config.json"
    if path.is_file():
        return path, read_json(path, "copy it again from the model")
    raise UserError(f"{path}: not found: a model is a folder in Hugging Face format: config.json and safetensors")


def tensors(folder: Path, shapes: dict[str, tuple[int, ...]], ignored: set[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for each name in `shapes`, in that order, on the CPU in the dtype of the file.

    Before the first is read, raises UserError for a file that cannot be read and for the first tensor that is
    missing, unexpected (unless in `ignored`), of another shape, or not floating point.
    """
    stored = hugging_face(folder)
    for name, t in stored.items():
        if name in ignored:
            continue
        if name not in shapes:
            raise UserError(f"{t.path}: unexpected tensor {t.key}: the model that config.json describes has none")
        if t.shape != shapes[name]:
            raise UserError(f"{t.path}: {t.key} has shape {t.shape}, config.json makes it {shapes[name]}")
        if t.dtype not in DTYPES.values():
            raise UserError(f"{t.path}: {t.key} is {t.dtype}: expected float32, float16 or bfloat16")
    missing = [name for name in shapes if name not in stored]
    if missing:
        raise UserError(f"{folder}: {len(missing)} tensors are missing, {missing[0]} among them: copy the folder again")
    return ((name, stored[name].read()) for name in shapes)


# ---- Hugging Face


def safetensors_files(folder: Path) -> list[Path]:
    """Those that the index names; without an index, all there are."""
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder}: no *.safetensors file: copy the weights there")
        return files
    weight_map = read_json(index, "copy it again from the model").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map from tensors to files: copy it again from the model")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise UserError(f"{index}: names {name}, which is not a file in this folder: copy it there")
    return [folder / name for name in names]


def hugging_face(folder: Path) -> dict[str, Stored]:
    stored = {}
    for path in safetensors_files(folder):
        try:
            with safe_open(path, framework="pt") as f:
                for key in f.keys():  # noqa: SIM118 (not a dict)
                    name, at = key.removeprefix("model."), f.get_slice(key)
                    if name in stored:
                        raise UserError(
                            f"{path}: {key} is in {stored[name].path} too: remove the file that is not of this model"
                        )
                    dtype = DTYPES.get(at.get_dtype(), at.get_dtype())
                    stored[name] = Stored(path, key, tuple(at.get_shape()), dtype, partial(read_safetensor, path, key))
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path}: not a readable safetensors file ({error}): copy it again from the model"
            ) from None
    return stored


def read_safetensor(path: Path, key: str) -> Tensor:
    with safe_open(path, framework="pt") as f:  # opened for each tensor: its pages are given back with it
        return f.get_tensor(key)


def write(
    folder: str | Path,
    config: dict,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """config.json and the tensors, in files of at most shard_bytes (a larger tensor has one to itself), with an index
    where there are several. One file's tensors are held at a time; readers never see half a file.

    config: in Hugging Face's terms. tensors: in our names; from any device, taken one after the other.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shard, size, shards = {}, 0, []

    def flush() -> None:
        save_file(shard, folder / f"model-{len(shards) + 1}.tmp", metadata={"format": "pt"})
        shards.append({key: t.nbytes for key, t in shard.items()})
        shard.clear()

    for name, tensor in tensors:
        t = tensor.detach().to("cpu", dtype).contiguous()
        if shard and size + t.nbytes > shard_bytes:
            flush()
            size = 0
        shard[name if name.startswith("lm_head") else f"model.{name}"] = t
        size += t.nbytes
    flush()

    n = len(shards)
    names = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)] if n > 1 else ["model.safetensors"]
    for i, name in enumerate(names):
        os.replace(folder / f"model-{i + 1}.tmp", folder / name)
    for left in folder.glob("model*.safetensors*"):  # by an earlier save into other files: tools would read those
        if left.name not in names:
            left.unlink()
    if n > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        total = sum(sum(keys.values()) for keys in shards)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in names:  # the library makes its files unreadable for other users
        shutil.copymode(folder / "config.json", folder / name)


# ---- config.json and models

HF_NAMES = {  # ours: Hugging Face's
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
    "max_position_embeddings": "max_position_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
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
        **({"sliding_window": config.sliding_window} if config.family == "mistral" else {}),
    }


def read_config(folder: str | Path) -> LlamaConfig:
    """The config of a Llama, Qwen2, Qwen3 or Mistral in Hugging Face's format, or of a Llama in Meta's.

    Raises UserError for what model.py cannot run.
    """
    path, theirs = _read_config_file(Path(folder))
    try:
        arch = theirs["architectures"][0]
    except (KeyError, IndexError, TypeError) as error:
        raise UserError(f"{path}: not a model's config ({type(error).__name__}: {error})") from None
    family = next((name for name, f in FAMILIES.items() if f.architecture == arch), None)
    if family is None:
        raise UserError(f"{path}: {arch} is not supported; {', '.join(f.architecture for f in FAMILIES.values())} are")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{path}: rope_scaling is {rope!r}, expected an object")
    rope = {"rope_type": rope.get("type", "default"), **rope}
    for holds, reason in (
        (theirs.get("hidden_act", "silu") != "silu", f"hidden_act {theirs.get('hidden_act')!r}; silu is"),
        (theirs.get("attention_bias") and family != "qwen2", "biases in the output projection (attention_bias)"),
        (theirs.get("mlp_bias"), "biases in the FFN projections (mlp_bias)"),
        (theirs.get("use_sliding_window"), "layers that see only the last tokens (use_sliding_window)"),
        (
            theirs.get("layer_types") and any(kind != "full_attention" for kind in theirs["layer_types"]),
            "layer_types other than full_attention",
        ),
        (theirs.get("quantization_config"), "quantized weights (quantization_config)"),
        ((theirs | rope).get("partial_rotary_factor", 1.0) != 1.0, "RoPE on a part of a head (partial_rotary_factor)"),
    ):
        if holds:
            raise UserError(f"{path}: not supported: {reason}")
    values = {name: theirs[key] for name, key in HF_NAMES.items() if theirs.get(key) is not None}
    values["rope_theta"] = rope.get("rope_theta", theirs.get("rope_theta", 10_000.0))
    values.setdefault("norm_eps", 1e-6)  # what transformers takes where config.json is silent, here and below
    if family == "llama":
        values.setdefault("n_kv_heads", values.get("n_heads"))
    sizes = values.get("hidden_size"), values.get("n_heads")
    if "head_dim" not in values and family != "qwen3" and all(type(size) is int and size > 0 for size in sizes):
        values["head_dim"] = sizes[0] // sizes[1]
    scaling = {k: v for k, v in rope.items() if k not in ("type", "rope_theta", "partial_rotary_factor")}
    try:
        return LlamaConfig(
            **values,
            family=family,
            rope_scaling=None if scaling["rope_type"] == "default" else scaling,
            sliding_window=theirs.get("sliding_window", 4096) if family == "mistral" else None,
        )
    except (TypeError, UserError) as error:
        raise UserError(f"{path}: {error}") from None


def tensors_of(folder: str | Path, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every parameter in a folder, one by one, in the order of Llama(config).named_parameters().

    On the CPU, in the dtype of the file. Raises UserError, before the first one, naming the missing, unexpected
    or mis-shaped tensor.
    """
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Llama(config).named_parameters()}
    ignored = {f"layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(config.n_layers)}
    ignored |= {"lm_head.weight"} if config.tied_embeddings else set()
    return tensors(Path(folder), shapes, ignored)


def load(folder: str | Path, device: str = "cpu") -> Llama:
    """The model in a folder (formats: read_config), float32. Raises UserError."""
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


def save(model: Llama, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write a folder that transformers' AutoModelForCausalLM loads: config.json and model.safetensors."""
    write(folder, to_hugging_face(model.config, dtype), model.named_parameters(), dtype)
