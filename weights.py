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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import data.shards

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # of a safetensors file at most, as tools expect
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors names them


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or tensor and what was expected."""


@dataclass(frozen=True)
class Stored:
    """A tensor that has not been read yet."""

    path: Path  # its file, or the first of them
    key: str  # its name there
    shape: tuple[int, ...]
    dtype: torch.dtype | str  # a string: not one of DTYPES
    read: Callable[[], Tensor]


read_json = partial(data.shards.read_json, what_to_do="copy it again from the model", error_class=CheckpointError)


def read_config(folder: Path) -> tuple[Path, dict]:
    """The file that describes the model, and what it says in the terms of Hugging Face's config.json."""
    path = folder / "config.json"
    if path.is_file():
        return path, read_json(path)
    if (folder / "params.json").is_file():
        return folder / "params.json", MetaFolder(folder).config()
    raise CheckpointError(
        f"{path}: not found: a model is a folder in Hugging Face format (config.json and safetensors) or Meta's "
        "(params.json and consolidated.*.pth)"
    )


def tensors(folder: Path, shapes: dict[str, tuple[int, ...]], ignored: set[str]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) for each name in `shapes`, in that order, on the CPU in the dtype of the file.

    Before the first is read, raises CheckpointError for a file that cannot be read and for the first tensor that is
    missing, unexpected (unless in `ignored`), of another shape, or not floating point.
    """
    meta = not (folder / "config.json").is_file()
    stored = MetaFolder(folder).stored() if meta else hugging_face(folder)
    for name, t in stored.items():
        if name in ignored:
            continue
        if name not in shapes:
            raise CheckpointError(f"{t.path}: unexpected tensor {t.key}: the model that config.json describes has none")
        if t.shape != shapes[name]:
            raise CheckpointError(f"{t.path}: {t.key} has shape {t.shape}, config.json makes it {shapes[name]}")
        if t.dtype not in DTYPES.values():
            raise CheckpointError(f"{t.path}: {t.key} is {t.dtype}: expected float32, float16 or bfloat16")
    missing = [name for name in shapes if name not in stored]
    if missing:
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing, {missing[0]} among them: "
                              "copy the folder again")  # fmt: skip
    return ((name, stored[name].read()) for name in shapes)


# ---- Hugging Face


def safetensors_files(folder: Path) -> list[Path]:
    """Those that the index names; without an index, all there are."""
    index = folder / INDEX
    if not index.is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{folder}: no *.safetensors file: copy the weights there")
        return files
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map from tensors to files: copy it again from the model")
    names = sorted(set(map(str, weight_map.values())))
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise CheckpointError(f"{index}: names {name}, which is not a file in this folder: copy it there")
    return [folder / name for name in names]


def hugging_face(folder: Path) -> dict[str, Stored]:
    stored = {}
    for path in safetensors_files(folder):
        try:
            with safe_open(path, framework="pt") as f:
                for key in f.keys():  # noqa: SIM118 (not a dict)
                    name, at = key.removeprefix("model."), f.get_slice(key)
                    if name in stored:
                        raise CheckpointError(f"{path}: {key} is in {stored[name].path} too: "
                                              "remove the file that is not of this model")  # fmt: skip
                    dtype = DTYPES.get(at.get_dtype(), at.get_dtype())
                    stored[name] = Stored(path, key, tuple(at.get_shape()), dtype, partial(read_safetensor, path, key))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({error}): "
                                  "copy it again from the model") from None  # fmt: skip
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


# ---- Meta

META_NAMES = {  # Meta's: ours, and the axis that model-parallel parts are cut along (None: each has all of it)
    "tok_embeddings": ("embed_tokens", 0),  # 1 in Llama 1 and 2
    "norm": ("norm", None),
    "output": ("lm_head", 0),
    "attention_norm": ("input_layernorm", None),
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "ffn_norm": ("post_attention_layernorm", None),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
}
META_PARAMS = {
    "dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps",
    "rope_theta", "use_scaled_rope", "max_seq_len", "max_batch_size",
}  # fmt: skip


class MetaFolder:
    """params.json and the parts of every tensor, mapped. Raises CheckpointError for what is not a Llama of Meta's."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "params.json"
        self.params = read_json(self.path)
        unknown = sorted(self.params.keys() - META_PARAMS)
        if unknown:
            raise CheckpointError(f"{self.path}: {unknown[0]} is not supported; Llama 2 to 3.2, text only, are")
        for name, kinds in (("dim", (int,)), ("n_layers", (int,)), ("n_heads", (int,)), ("norm_eps", (int, float))):
            if type(self.params.get(name)) not in kinds or not self.params[name] > 0:
                raise CheckpointError(f"{self.path}: {name} = {self.params.get(name)!r}: expected a positive number")
        if self.params["dim"] % (2 * self.params["n_heads"]):
            raise CheckpointError(f"{self.path}: dim is not a multiple of 2 * n_heads: RoPE turns pairs of rows")
        self.files = sorted(folder.glob("consolidated.*.pth"))
        expected = [f"consolidated.{i:02d}.pth" for i in range(max(len(self.files), 1))]
        if [f.name for f in self.files] != expected:
            found = ", ".join(f.name for f in self.files) or "none"
            raise CheckpointError(f"{folder}: expected {expected[0]} and on without a gap, found {found}: "
                                  "copy them there")  # fmt: skip
        self.parts = [self._map(file) for file in self.files]

    def _map(self, file: Path) -> dict[str, Tensor]:
        try:
            part = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # whatever a broken file makes torch raise
            raise CheckpointError(f"{file}: not a readable file of weights ({type(error).__name__}): "
                                  "copy it again") from error  # fmt: skip
        if not isinstance(part, dict) or not all(isinstance(t, Tensor) for t in part.values()):
            raise CheckpointError(f"{file}: expected a dict of tensors: copy it again")
        part.pop("rope.freqs", None)
        for key, t in part.items():  # a view can make a few bytes look like any number of elements
            strided = t.layout == torch.strided and t.device.type == "cpu"
            if not isinstance(key, str) or not strided or not t.dim() or not t.is_contiguous():
                raise CheckpointError(f"{file}: {key!r} is not the name of a contiguous matrix or vector: "
                                      "copy it again")  # fmt: skip
        return part

    def rows(self, key: str) -> int:
        """Of a matrix cut by rows, all parts together."""
        if any(key not in part for part in self.parts):
            raise CheckpointError(f"{self.path.parent}: {key} is missing: copy the folder again")
        return sum(len(part[key]) for part in self.parts)

    def tied(self) -> bool:
        """Llama 3.2 1B and 3B: no output matrix, or the embedding once more."""
        output, embedding = (self.parts[0].get(f"{name}.weight") for name in ("output", "tok_embeddings"))
        return output is None or (embedding is not None and torch.equal(output, embedding))

    def config(self) -> dict:
        """As Hugging Face's config.json. Sizes that params.json leaves out are read off the tensors; the factor of RoPE
        scaling (Llama 3.1: 8, 3.2: 32, which alone has tied embeddings), context, BOS and EOS are those of the family.
        """
        p, tied = self.params, self.tied()
        theta, scaled = p.get("rope_theta", 10_000.0), bool(p.get("use_scaled_rope"))
        llama_3 = theta == 500_000.0
        scaling = {"rope_type": "llama3", "factor": 32.0 if tied else 8.0, "low_freq_factor": 1.0,
                   "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # fmt: skip
        return {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": self.rows("tok_embeddings.weight" if tied else "output.weight"),
            "hidden_size": p["dim"],
            "intermediate_size": self.rows("layers.0.feed_forward.w1.weight"),
            "num_hidden_layers": p["n_layers"],
            "num_attention_heads": p["n_heads"],
            "num_key_value_heads": p.get("n_kv_heads") or p["n_heads"],
            "rope_theta": theta,
            "rope_scaling": scaling if scaled else None,
            "rms_norm_eps": p["norm_eps"],
            "tie_word_embeddings": tied,
            "max_position_embeddings": 131_072 if scaled else 8192 if llama_3 else 4096,
            "bos_token_id": 128_000 if llama_3 else 1,
            "eos_token_id": 128_001 if llama_3 else 2,
        }

    def stored(self) -> dict[str, Stored]:
        stored, tied = {}, self.tied()
        for number, part in enumerate(self.parts):
            if part.keys() != self.parts[0].keys():
                differ = min(part.keys() ^ self.parts[0].keys())
                raise CheckpointError(f"{self.files[number]}: {differ} is not in both this part and the first: "
                                      "copy the folder again")  # fmt: skip
        for key, first in self.parts[0].items():
            layer = ".".join(key.split(".")[:2]) + "." if key.startswith("layers.") else ""
            inner = key.removeprefix(layer).removesuffix(".weight")
            if key == "output.weight" and tied:
                continue
            if inner not in META_NAMES:
                raise CheckpointError(f"{self.files[0]}: unexpected tensor {key}: no Llama of Meta's has one")
            name, axis = META_NAMES[inner]
            if inner == "tok_embeddings" and first.shape[-1] < self.params["dim"]:
                axis = 1
            for file, part in zip(self.files, self.parts, strict=True):
                if part[key].shape != first.shape:
                    raise CheckpointError(f"{file}: {key} has shape {tuple(part[key].shape)}, the first part's has "
                                          f"{tuple(first.shape)}")  # fmt: skip
            shape = tuple(n * (len(self.parts) if a == axis else 1) for a, n in enumerate(first.shape))
            read = partial(self.whole, key, axis, inner in ("attention.wq", "attention.wk"))
            stored[f"{layer}{name}.weight"] = Stored(self.files[0], key, shape, first.dtype, read)
        return stored

    def whole(self, key: str, axis: int | None, turned: bool) -> Tensor:
        """The parts put together; turned: RoPE turns its rows, in pairs (0, 1), (2, 3), ... of a head as Meta writes
        them, (0, K/2), (1, K/2 + 1), ... as Hugging Face and we do."""
        one = axis is None or len(self.parts) == 1
        w = self.parts[0][key] if one else torch.cat([part[key] for part in self.parts], dim=axis)
        if not turned:
            return w
        pairs = self.params["dim"] // self.params["n_heads"] // 2
        return w.unflatten(0, (-1, pairs, 2)).transpose(1, 2).flatten(0, 2)
