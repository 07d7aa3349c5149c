"""Models as Hugging Face folders: config.json, safetensors files and the tokenizer's files, read and written.

The rule: a folder gives the same numbers here as in transformers, or a UserError that says why not. Which key of
config.json and which file of the folder counts is transformers' choice (5.20.2). Files are memory-mapped and one tensor
is held at a time, so a rank that keeps a part of each tensor needs no more than its part. Names are Hugging Face's
without the leading "model."; those of model.py are the same.
"""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configurator import UserError
from data.shards import read_json, unreadable
from model import FAMILIES, Llama, LlamaConfig

INDEX = "model.safetensors.index.json"
WEIGHTS = ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")  # the first there is counts
OTHER_WEIGHTS = {  # what may be there in their place: what makes a model folder of it
    "adapter_model.*": "an adapter: merge it into its model with peft's merge_and_unload",
    "*.gguf": "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE)",
    "consolidated.*": "Meta's format: transformers' convert_llama_weights_to_hf",
    "model.*.safetensors": "a variant: rename it to model.safetensors",
    "*.safetensors": f"parts of a model without their {INDEX}: copy that too",
    "pytorch_model-*.bin": "parts of a model without their pytorch_model.bin.index.json: copy that too",
}
GENERATION = "generation_config.json"
SHARD_BYTES = 5 * 10**9  # of a safetensors file at most, as tools expect
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # as safetensors names them
TOKENIZERS = ("tokenizer.json", "tokenizer.model")  # a folder with one of these has a tokenizer
SETTINGS = "tokenizer_config.json"  # of the tokenizer
CARRIED = (  # what goes with the weights into every folder: what belongs to the tokenizer, and the source's licence
    *(SETTINGS, "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", GENERATION, "LICENSE*", "NOTICE*", "USE_POLICY*"),
)
SAMPLING = ("temperature", "top_p", "top_k", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")

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
    "llama": SILENT | {"max_position_embeddings": 2048},
    "mistral": SILENT | {"max_position_embeddings": 131_072, "sliding_window": 4096, "num_key_value_heads": 8},
    "qwen2": SILENT | {"max_position_embeddings": 32_768, "use_sliding_window": False, "num_key_value_heads": 32},
}
PRESUMED["qwen3"] = PRESUMED["qwen2"] | {"head_dim": 128}


# What tools ask of a shape beyond what model.py does. Those of transformers and llama.cpp (its converter and load) were
# tried; vLLM's Qwen2Attention was read. Nothing else is asked of the families here, once written as below.
LOADERS = ("transformers 4.46", "transformers 4.57", "transformers 5", "vLLM", "llama.cpp")
DERIVE_HEAD_DIM = {"transformers 4.46", "vLLM", "llama.cpp"}  # of a Qwen2: hidden_size / n_heads


def written_as(config: LlamaConfig) -> str:
    """The family in config.json. transformers 5 refuses a Llama whose hidden_size is no multiple of its heads. A
    Mistral without a window computes the same and has no such rule."""
    return "mistral" if config.family == "llama" and config.hidden_size % config.n_heads else config.family


def loaders(config: LlamaConfig) -> tuple[str, str]:
    """The tools that load a model of this shape, and a warning where another size would be loaded by more."""
    refusing = {"transformers 4.46"} if config.family == "qwen3" else set()  # it knows no Qwen3 of any shape
    if config.rope_scaling and written_as(config) == "mistral":
        refusing = {"transformers 4.46"}  # its Mistral does not scale RoPE, without a word
    if config.family == "qwen2" and config.hidden_size != config.n_heads * config.head_dim:
        refusing = DERIVE_HEAD_DIM
    names = ", ".join(tool for tool in LOADERS if tool not in refusing)
    if written_as(config) != config.family and refusing:
        below = config.hidden_size - config.hidden_size % config.n_heads
        which = f"hidden_size = {config.hidden_size}, no multiple of n_heads = {config.n_heads}"
        said = f"transformers 4.46 ignores its rope_scaling; all load hidden_size = {below or config.n_heads}"
        return names, f"{which}: {said} or {below + config.n_heads}"
    if refusing != DERIVE_HEAD_DIM:
        return names, ""
    step = config.n_heads // config.n_kv_heads
    sizes = [(n, n * config.head_dim) for n in range(step, 2 * config.n_heads + step, step)]
    sizes.sort(key=lambda size: (abs(size[1] - config.hidden_size), abs(size[0] - config.n_heads)))
    nearest = " or ".join(f"hidden_size = {hidden} with n_heads = {n}" for n, hidden in sizes[:2])
    shape = f"hidden_size = {config.hidden_size} with n_heads = {config.n_heads} of {config.head_dim}"
    return names, f"{shape}: {', '.join(t for t in LOADERS if t in refusing)} cannot load it; all load {nearest}"


def to_hugging_face(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> dict:
    """config.json, in words that transformers 4 and 5 both read."""
    ours, family = asdict(config), written_as(config)
    return {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "hidden_act": "silu",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "5.20.2",  # where none is said, it advises a setting that changes token ids
        **{theirs: ours[name] for name, theirs in HF_NAMES.items()},
        **({"rope_scaling": config.rope_scaling} if config.rope_scaling else {}),
    }


def read_config(folder: str | Path) -> LlamaConfig:
    """The shape of the model in a folder. Raises UserError for what model.py cannot run as transformers would.

    eos_token_id: the ids of config.json and of generation_config.json, at any of which a text ends.
    """
    path = Path(folder, "config.json")
    inside = [*path.parent.glob("model/config.json"), *path.parent.glob("snapshots/*/config.json")]
    advice = f"give {inside[0].parent}" if inside else "`hf download NAME --local-dir=FOLDER` brings one"
    theirs, generation = read_json(path, f"a model is a folder with it; {advice}"), _generation(folder)
    by_name = {f.architecture: family for family, f in FAMILIES.items()}
    family = theirs.get("model_type") or by_name.get((theirs.get("architectures") or [""])[0])
    try:
        if family not in FAMILIES:
            what = f"model_type {family!r} ({', '.join(theirs.get('architectures') or ['no architectures'])})"
            raise UserError(f"{what} is not supported; {', '.join(FAMILIES)} are: see docs/models.md")
        theirs = PRESUMED.get(family, {}) | theirs
        rope = _rope(theirs)
        if reason := _unsupported(theirs | rope, family):
            raise UserError(f"not supported: {reason}")
        if family != "mistral":
            theirs["sliding_window"] = None  # the others have none, or have it switched off
        theirs["eos_token_id"] = merged_ids(theirs.get("eos_token_id"), generation.get("eos_token_id"))
        scaling = {key: rope[key] for key in rope.keys() - {"type", "rope_theta", "partial_rotary_factor"}}
        scaling = None if scaling["rope_type"] == "default" else scaling
        silent = [ours for ours in ("n_kv_heads", "head_dim") if theirs.get(HF_NAMES[ours]) is None]
        values = {ours: theirs[key] for ours, key in HF_NAMES.items() if key in theirs and ours not in silent}
        values["rope_theta"] = rope["rope_theta"]
        _check_types(values, scaling or {})
        values.setdefault("n_kv_heads", values["n_heads"])  # a wrong guess of these two does not fit the tensors
        values.setdefault("head_dim", values["hidden_size"] // values["n_heads"])
        config = LlamaConfig(**values, family=family, rope_scaling=scaling)
        if config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size:
            config = replace(config, pad_token_id=None)  # transformers does not load one beyond the embedding
    except (KeyError, TypeError, AttributeError, ZeroDivisionError, UserError) as error:
        said = f"config.json does not say {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{path}: {said}") from None
    return replace(config, tied_embeddings=config.tied_embeddings and not _has_head_of_its_own(Path(folder)))


def _rope(theirs: dict) -> dict:
    """What config.json says of RoPE, complete. Raises UserError where its two places, of which transformers 5 takes
    rope_scaling and older ones know no other, mean different things."""
    places = [theirs[key] for key in ("rope_scaling", "rope_parameters") if theirs.get(key)] or [{}]
    theta = {"rope_theta": theirs["rope_theta"]} if "rope_theta" in theirs else {}
    found = [{"rope_type": place.get("type", "default")} | theta | place for place in places]
    name = "original_max_position_embeddings"
    for rope in (rope for rope in found if rope["rope_type"] == "llama3"):
        rope[name] = theirs.get(name, rope.get(name, theirs.get("max_position_embeddings")))  # the top level wins
    meant = [{key: value for key, value in rope.items() if key != "type"} for rope in found]
    if meant[0] != meant[-1]:
        raise UserError(f"rope_scaling means {meant[0]}, rope_parameters {meant[-1]}: remove the one that is not meant")
    return found[0]


def _check_types(values: dict, scaling: dict) -> None:
    """Raises UserError for a value of config.json of another type than model.py's; an int serves as a float."""
    kinds = get_type_hints(LlamaConfig)
    typed = [(HF_NAMES[name], value, kinds[name]) for name, value in values.items()]
    typed += [(name, value, float) for name, value in scaling.items() if name != "rope_type"]
    for name, value, kind in typed:
        items = value if isinstance(value, list) else ()
        if not all(isinstance(v, int | float if kind is float else kind) for v in (value, *items)):
            raise UserError(f"{name} = {value!r}: must be {getattr(kind, '__name__', kind)}")


def _generation(folder: str | Path) -> dict:
    path = Path(folder, GENERATION)
    return read_json(path, "remove it or copy it again") if path.is_file() else {}


def merged_ids(*places: int | list | None) -> int | list | None:
    """Token ids of several places, each once: none, one, or a list of them."""
    ids = dict.fromkeys(i for ids in places if ids is not None for i in (ids if isinstance(ids, list) else [ids]))
    return list(ids) if len(ids) > 1 else next(iter(ids), None)


def _unsupported(theirs: dict, family: str) -> str:
    """The first thing in config.json that model.py does not have; "" where there is none."""
    silent = [key for key in SILENT if key not in theirs]
    reasons = {
        f"a {family} whose config.json does not say {', '.join(silent)}": silent,
        f"hidden_act {theirs.get('hidden_act')!r}; silu is": theirs.get("hidden_act") not in ("silu", "swish"),
        "biases in the output projection (attention_bias)": theirs.get("attention_bias")
        and not FAMILIES[family].qkv_bias,
        "biases in the FFN projections (mlp_bias)": theirs.get("mlp_bias"),
        "layers that see only the last tokens (use_sliding_window)": theirs.get("use_sliding_window"),
        "layer_types other than full_attention": set(theirs.get("layer_types") or ()) - {"full_attention"},
        "quantized weights (quantization_config)": theirs.get("quantization_config"),
        "RoPE on a part of a head (partial_rotary_factor)": (theirs.get("partial_rotary_factor") or 1.0) != 1.0,
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
    places = _places(Path(folder))
    for name, (path, key, shape, dtype) in places.items():
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tied_embeddings):
            continue  # follow from the rest
        if name not in shapes:
            raise UserError(f"{path}: unexpected tensor {key}: the model that config.json describes has none")
        if shape != shapes[name]:
            raise UserError(f"{path}: {key} has shape {shape}, config.json makes it {shapes[name]}")
        if dtype not in DTYPES:
            raise UserError(f"{path}: {key} is {dtype}: expected one of {', '.join(DTYPES)}")
    if config.tied_embeddings and "lm_head.weight" in places:
        places.setdefault("embed_tokens.weight", places["lm_head.weight"])
    if missing := [name for name in shapes if name not in places]:
        advice = "copy the folder again"
        if missing == ["lm_head.weight"]:
            advice = f"{advice}, or say tie_word_embeddings in config.json where the embedding is the head"
        raise UserError(f"{folder}: {len(missing)} tensors are missing, {missing[0]} among them: {advice}")
    return ((name, _read(*places[name][:2])) for name in shapes)


def _places(folder: Path) -> dict[str, tuple[Path, str, tuple[int, ...], str]]:
    """File, key, shape and type of every tensor in a folder, by its name here. Raises UserError."""
    places = {}
    for path in weight_files(folder):
        for key, kind in _header(path).items():
            if (name := key.removeprefix("model.")) in places:
                raise UserError(f"{path}: {key} is in {places[name][0]} too: remove the file of another model")
            places[name] = path, key, *kind
    return places


def _has_head_of_its_own(folder: Path) -> bool:
    """Whether the files hold an lm_head other than the embedding (a merged fine-tune, say): then nothing is tied."""
    if not any((folder / name).is_file() for name in WEIGHTS):
        return False
    places = _places(folder)
    pair = [places[name][:2] for name in ("embed_tokens.weight", "lm_head.weight") if name in places]
    return len(pair) == 2 and not torch.equal(_read(*pair[0]), _read(*pair[1]))


def _read(path: Path, key: str) -> Tensor:
    if path.suffix == ".bin":
        return _pickled(path)[key]
    with safe_open(path, framework="pt") as f:  # opened for each tensor: its pages are given back with it
        return f.get_tensor(key)


@lru_cache(1)
def _pickled(path: Path) -> dict[str, Tensor]:
    """What torch.save wrote, memory-mapped where its format allows. No code in it runs."""
    try:
        found = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {key: found[key] for key in found if isinstance(found[key], Tensor)}
    except (OSError, RuntimeError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0]
        raise unreadable(path, f"not a readable file of weights ({reason}): copy it again") from None


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type of every tensor in a file, by its key."""
    if path.suffix == ".bin":
        names = {dtype: name for name, dtype in DTYPES.items()}
        return {key: (tuple(t.shape), names.get(t.dtype, str(t.dtype))) for key, t in _pickled(path).items()}
    try:
        with safe_open(path, framework="pt") as f:
            stored = {key: f.get_slice(key) for key in f.keys()}  # noqa: SIM118 (not a dict)
            return {key: (tuple(t.get_shape()), t.get_dtype()) for key, t in stored.items()}
    except (OSError, SafetensorError) as error:
        raise unreadable(path, f"not a readable safetensors file ({error}): copy it again") from None


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads, sorted. Raises UserError where there are none, and for a folder in which
    transformers would load an adapter's model instead."""
    named = read_json(folder / "config.json", "copy it again").get("transformers_weights")
    expected = (named,) if named else WEIGHTS
    found = next((folder / name for name in expected if (folder / name).is_file()), None)
    others = [f"{pattern} is {what}" for pattern, what in OTHER_WEIGHTS.items() if any(folder.glob(pattern))]
    if (folder / "adapter_config.json").is_file():
        others, found = [f"adapter_config.json is {OTHER_WEIGHTS['adapter_model.*']}"], None
    if found is None:
        there = others[0] if others else "there are no weights: copy them there"
        raise UserError(f"{folder}: expected {' or '.join(expected)}; {there}")
    if not found.name.endswith(".index.json"):
        return [found]
    weight_map = read_json(found, "copy it again from the model").get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else set()
    if absent := sorted(name for name in names if not (folder / name).is_file()) or (not names and ["any file"]):
        missing = f"names {absent[0]}, which is not there ({len(absent)} missing)"
        raise UserError(f"{found}: {missing}: copy it from the model")
    return [folder / name for name in sorted(names)]


def check_tokenizer(folder: str | Path, data: str | Path) -> None:
    """Raises UserError where a model and a data set have two tokens for one id, by their tokenizers' files."""
    theirs, ours = _tokens(folder), _tokens(data)
    if (i := next((i for i in theirs.keys() & ours.keys() if theirs[i] != ours[i]), None)) is not None:
        words = f"token {i} is {theirs[i]!r} for the model and {ours[i]!r} in the data"
        raise UserError(f"{data}: was made with another tokenizer than {folder}'s ({words}): prepare it with that one")


def _tokens(folder: str | Path) -> dict[int, str]:
    """The tokens of a folder's tokenizer.json, without added ones, or of its sentencepiece model, by id; {} where there
    is neither. Raises UserError."""
    from data.tokenizer import SentencePiece, kind_of  # noqa: PLC0415 (brings three libraries)

    file = _tokenizer(folder)
    if file and file.suffix == ".json":
        try:
            vocab = read_json(file, "copy it again")["model"]["vocab"]
            is_unigram = isinstance(vocab, list)  # of pairs of token and score
            return dict(enumerate(t for t, _ in vocab) if is_unigram else ((i, t) for t, i in vocab.items()))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UserError(f"{file}: not a tokenizer.json with a vocabulary: copy it again") from None
    if not file or kind_of(file) is not SentencePiece:
        return {}
    model = SentencePiece(file).model
    return {i: model.id_to_piece(i) for i in range(len(model))}


def _tokenizer(folder: str | Path) -> Path | None:
    return next((Path(folder, name) for name in TOKENIZERS if Path(folder, name).is_file()), None)


# ---- writing


def save(model: Llama, folder: str | Path, dtype: torch.dtype = torch.float32, tokenizer: Sequence = ()) -> None:
    """Write a folder that transformers' AutoModelForCausalLM loads, and AutoTokenizer where a tokenizer is found.
    Its generate ends at the model's eos_token_id, whatever a generation_config.json said that came along.

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
    settings = read_json(folder / SETTINGS, "copy it again") if copy_tokenizer(tokenizer, folder) else {}
    generation, longest = _generation(folder), model.config.max_position_embeddings
    ids = {f"{name}_token_id": getattr(model.config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    found = generation | {name: value for name, value in ids.items() if value is not None}
    if found.get("do_sample") is not True:  # transformers does not save such a model again
        found = {name: value for name, value in found.items() if name not in SAMPLING}
    for name, said, length in ((GENERATION, found, "max_length"), (SETTINGS, settings, "model_max_length")):
        if isinstance(said.get(length), int | float) and said[length] < longest:
            said[length] = longest  # the model was trained on longer sequences than its source
        if said:
            _write_json(folder / name, said)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def copy_tokenizer(sources: Sequence[str | Path], folder: Path) -> bool:
    """The tokenizer of the first source that has one, with what belongs to it. Whether there is a tokenizer.json now.

    That is written anew, from a later source with the same tokens if need be (a data set has a sentencepiece model in
    both forms), and for a class that takes it as it stands: to others, transformers 5 gives other ids.
    """
    from data.tokenizer import open_tokenizer, write_json  # noqa: PLC0415

    homes, problem = [Path(s) for s in sources if s and _tokenizer(s)], None
    for file in [f for home in homes[:1] for pattern in CARRIED for f in home.glob(pattern) if f.is_file()]:
        target = folder / file.relative_to(homes[0])
        target.parent.mkdir(exist_ok=True)
        if file.resolve() != target.resolve():
            shutil.copyfile(file, target)
    for home in sorted(homes, key=lambda home: not (home / "tokenizer.json").is_file()):
        try:
            check_tokenizer(homes[0], home)
            write_json(open_tokenizer(_tokenizer(home)), folder)
            return (folder / "tokenizer.json").is_file()
        except UserError as error:
            problem = problem or error
    if problem:
        print(f"warning: {folder}: has no tokenizer.json: {problem}")
    return False
