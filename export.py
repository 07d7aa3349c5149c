"""A run's model as a folder for other tools: weights, config, tokenizer, and a card that says how it was made.

    python export.py out/llama2-1.3b/continue/model out/Llama-1.3B --dtype=bfloat16

Takes a model folder, or a checkpoint of a run (out_dir/step_NNNNNN): of a pruning run, what its masks would export
now. The result loads with transformers' AutoModelForCausalLM and AutoTokenizer. Tokenizer files come from the model
the run started from, or from --tokenizer.
"""

import json
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError

import checkpoint
import configurator
import hf
import model as llama
from configurator import UserError
from evaluate import load_any
from metrics import read_metrics
from train import Config as TrainConfig

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of these is enough to call a folder's tokenizer
CARRIED = (
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Config:
    dtype: str = "float32"  # float32: exactly what was trained | bfloat16: half the size
    tokenizer: str = ""  # folder or file to copy instead of the tokenizer of the model the run started from


@dataclass(frozen=True)
class Stage:
    """One run behind a model."""

    folder: Path
    run: dict  # its record of itself
    evaluated: dict | None  # its last evaluation that the model has seen


def stages(path: Path, step: float = math.inf) -> list[Stage]:
    """The runs behind a model (up to `step` of the last), oldest first; [] where none is recorded beside it."""
    found = []
    while os.path.isfile(path.parent / "metrics.jsonl") and path.parent not in [s.folder for s in found]:
        records = read_metrics(path.parent / "metrics.jsonl")
        if not records or records[0]["kind"] != "run":
            raise UserError(
                f"{path.parent / 'metrics.jsonl'}: does not begin with the record of a run of train.py: "
                "move it away to export without a recipe"
            )
        evaluated = [r for r in records if r["kind"] in ("eval", "extracted") and r["step"] <= step]
        found.append(Stage(path.parent, records[0], evaluated[-1] if evaluated else None))
        if not records[0]["config"]["init_from"]:
            break
        path, step = Path(records[0]["config"]["init_from"]), math.inf
    return found[::-1]


def tokenizer_files(path: Path, history: list[Stage], given: str) -> list[Path]:
    """Of --tokenizer, else of the first there is: the model's own folder, those the runs started from, the data's."""
    if given and Path(given).is_file():
        return [Path(given)]
    runs = [stage.run["config"] for stage in reversed(history)]
    folders = [path, *(Path(c["init_from"]) for c in runs if c["init_from"]), *(Path(c["data"]) for c in runs)]
    for folder in [Path(given)] if given else folders:
        if any(os.path.isfile(folder / name) for name in TOKENIZERS):
            return sorted(f for pattern in CARRIED for f in folder.glob(pattern) if f.is_file())
    if given:
        raise UserError(f"tokenizer = {given!r}: neither a file nor a folder with one of {', '.join(TOKENIZERS)}")
    return []


def markdown(columns: list[str], rows: list[list]) -> str:
    """A table; numbers that are not whole with four digits after the point."""
    text = [[f"{x:.4f}" if isinstance(x, float) else f"{x:,}" if type(x) is int else str(x) for x in r] for r in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *text])


def shape_table(history: list[Stage], model: llama.Llama) -> str:
    sizes = ("n_layers", "hidden_size", "intermediate_size", "n_heads", "n_kv_heads", "head_dim", "vocab_size")
    source, here = history[0].run["source"] if history else None, asdict(model.config)
    if not source or all(source[name] == here[name] for name in sizes):
        return markdown(["", "this model"], [[name, here[name]] for name in sizes])
    return markdown(["", "source", "this model"], [[name, source[name], here[name]] for name in sizes])


def stage_card(stage: Stage) -> str:
    """What a run did: settings that differ from their default, and by domain tokens, final mix and losses."""
    config, domains, e = stage.run["config"], stage.run["domains"], stage.evaluated
    default = json.loads(json.dumps(asdict(TrainConfig())))
    settings = "\n".join(f"    {key} = {value!r}" for key, value in config.items() if default.get(key) != value)
    text = f"### {config['stage']}\n\nSettings that are not the default:\n\n{settings}\n"
    if e is None:
        return text
    bytes_per_token, rows = stage.run["bytes_per_token"], []
    for m, domain in enumerate(domains):
        loss, tokens, ratio = e["val_loss"][m], int(e["tokens"][m]), e["ratio"][m]
        known = loss is not None
        bits = loss / math.log(2) / bytes_per_token[m] if known and bytes_per_token[m] > 0 else "-"
        perplexity = math.exp(min(loss, 700.0)) if known else "-"  # a float ends at exp(709)
        rows.append([domain, tokens, ratio, loss if known else "-", perplexity, bits])
    columns = ["domain", "tokens", "final ratio", "loss (nats)", "perplexity", "bits per byte"]
    windows = f"{config['eval_sequences']} windows of {config['seq_len']:,} tokens a domain"
    return (
        f"{text}\nAfter {e['step']:,} of {config['max_steps']:,} steps and {int(sum(e['tokens'])):,} tokens "
        f"(losses: validation, {windows}{', dtype ' + config['dtype']}):\n\n{markdown(columns, rows)}\n"
    )


def card(name: str, model: llama.Llama, history: list[Stage], dtype: str, has_tokenizer: bool) -> str:
    """README.md of the folder."""
    all_of_it, inner = model.n_parameters(), model.n_parameters(embeddings=False)
    first = history[0].run["config"] if history else {}
    came = f" from `{first['init_from']}`" if first.get("init_from") else ""
    how = "\n".join(stage_card(stage) for stage in history) or "No record of a run was beside the model.\n"
    tokenizer = "" if has_tokenizer else " No tokenizer files came with the model: copy those of its source here."
    tags = "tags:\n- pruning\n" if any(s.run["config"]["stage"] == "prune" for s in history) else ""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{tags}---
# {name}

{all_of_it:,} parameters, {inner:,} of them not embeddings, {dtype}; architecture {model.config.model_type}. Made{came}
with DRPruning ([Deng et al., ACL 2025](https://arxiv.org/abs/2411.14055)). The licence of the source model holds for
what was pruned from it.

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model, tokenizer = (c.from_pretrained("{name}") for c in (AutoModelForCausalLM, AutoTokenizer))

{tokenizer}
## Shape

{shape_table(history, model)}

## How it was made

{how}"""


def write(folder: Path, model: llama.Llama, dtype: torch.dtype, files: list[Path], card_text: str) -> None:
    hf.save(model, folder, dtype)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    c = model.config
    if c.eos_token_id is not None and not (folder / "generation_config.json").exists():
        ids = {"bos_token_id": c.bos_token_id, "eos_token_id": c.eos_token_id, "pad_token_id": c.pad_token_id}
        ids = {name: value for name, value in ids.items() if value is not None}
        (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    (folder / "README.md").write_text(card_text.replace("\n\n\n", "\n\n"), encoding="utf-8")


def main(path: str, out: str, cfg: Config) -> None:
    """Raises UserError, UserError and UserError; then nothing is written."""
    if cfg.dtype not in DTYPES:
        raise UserError(f"dtype = {cfg.dtype!r}: must be one of {', '.join(DTYPES)}")
    source, target = Path(path), Path(out)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"{target}: is there already: choose a folder that does not exist or is empty")
    model = load_any(path, "cpu")
    step = checkpoint.read_state(source)["step"] if (source / checkpoint.STATE).is_file() else math.inf
    history = stages(source, step)
    files = tokenizer_files(source, history, cfg.tokenizer)
    text = card(target.name, model, history, cfg.dtype, bool(files))
    try:
        write(target, model, DTYPES[cfg.dtype], files, text)
    except BaseException as error:
        for file in target.iterdir() if target.is_dir() else ():  # which was empty, or not there
            file.unlink()
        if isinstance(error, OSError | SafetensorError):
            raise UserError(f"{target}: cannot be written ({error}): make room or choose another folder") from None
        raise

    kind = f"{cfg.dtype}, {model.config.model_type}"
    print(f"{target}: {model.n_parameters():,} parameters, {kind}; the card is its README.md")
    if files:
        print(f"copied from {files[0].parent}: {', '.join(f.name for f in files)}")
    else:
        print("warning: no tokenizer was found: --tokenizer=FOLDER names one to copy")
    if not history:
        print("warning: no metrics.jsonl beside the model: the card has no recipe and no losses")


if __name__ == "__main__":
    paths = [a for a in sys.argv[1:] if not a.startswith("--")]
    if len(paths) != 2:
        sys.exit(__doc__)
    try:
        main(*paths, configurator.load(Config, [a for a in sys.argv[1:] if a.startswith("--")]))
    except UserError as error:
        sys.exit(f"error: {error}")
