"""A run's model as a folder for other tools: weights, config, tokenizer, and a card that says how it was made.

    python export.py out/llama2-1.3b/continue/model out/Llama-1.3B --dtype=bfloat16

Takes a model folder, or a checkpoint of a run (out_dir/step_NNNNNN): that of a pruning run counts as the model that its
masks would extract now. The result loads with transformers' AutoModelForCausalLM and AutoTokenizer.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import checkpoint
import configurator
import hf
from configurator import UserError
from evaluate import load_any
from metrics import read_metrics
from model import Llama
from train import Config as TrainConfig

SIZES = ("n_layers", "hidden_size", "intermediate_size", "n_heads", "n_kv_heads", "head_dim", "vocab_size")


@dataclass(frozen=True)
class Config:
    dtype: str = "float32"  # float32: exactly what was trained | bfloat16: half the size


def stages(path: Path, step: float = math.inf) -> list[tuple[dict, dict]]:
    """The runs behind a model (up to `step` of the last), oldest first, each as its run record and last evaluation."""
    records = read_metrics(path.parent / "metrics.jsonl")
    evaluated = [r for r in records if r["kind"] in ("eval", "extracted") and r["step"] <= step]
    if not evaluated:
        return []
    began = records[0]["config"]["init_from"]
    before = stages(Path(began)) if began and Path(began).parent.resolve() != path.parent.resolve() else []
    return [*before, (records[0], evaluated[-1])]


def markdown(columns: list[str], rows: Iterable[Iterable]) -> str:
    """A table: whole numbers with commas, others with four digits after the point, a dash for what is not known."""

    def text(x: object) -> str:
        if isinstance(x, float):
            return "-" if math.isnan(x) else f"{x:.4f}"
        return "-" if x is None else f"{x:,}" if type(x) is int else str(x)

    texts = ([text(x) for x in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in [columns, ["---"] * len(columns), *texts])


def stage_card(run: dict, e: dict) -> str:
    """What a run did: settings that differ from their default, and by domain tokens, final mix and losses."""
    config, default = run["config"], json.loads(json.dumps(asdict(TrainConfig())))
    settings = "\n".join(f"    {key} = {value!r}" for key, value in config.items() if default.get(key) != value)
    rows = []
    for m, domain in enumerate(run["domains"]):
        loss, density = e["val_loss"][m], run["bytes_per_token"][m]
        bits = loss / math.log(2) / density if loss and density else None
        rows.append([domain, int(e["tokens"][m]), e["ratio"][m], loss, bits])
    return f"""### {config["stage"]}

Settings that are not the default:

{settings}

After {e["step"]:,} of {config["max_steps"]:,} steps and {int(sum(e["tokens"])):,} tokens, on at most
{config["eval_sequences"]} validation windows of {config["seq_len"]:,} tokens a domain:

{markdown(["domain", "tokens", "final ratio", "loss (nats)", "bits per byte"], rows)}
"""


def card(name: str, model: Llama, history: list, dtype: str) -> str:
    """README.md of the folder."""
    first = history[0][0] if history else {"config": {"init_from": ""}, "source": {}}
    came = first["config"]["init_from"] and f" from `{first['config']['init_from']}`"
    shape = ([size, first["source"].get(size), getattr(model.config, size)] for size in SIZES)
    how = "\n".join(stage_card(*stage) for stage in history) or "No record of a run was beside the model.\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

{model.n_parameters():,} parameters, {model.n_parameters(embeddings=False):,} of them not embeddings, {dtype}; a
{model.config.family} made{came} with DRPruning ([Deng et al., ACL 2025](https://arxiv.org/abs/2411.14055)). The licence
of the source model holds for what was pruned from it.

## Shape

{markdown(["", "source", "this model"], shape)}

## How it was made

{how}"""


def main(cfg: Config, source: str, target: str) -> None:
    if cfg.dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype = {cfg.dtype!r}: must be float32 or bfloat16")
    path, out = Path(source).resolve(), Path(target)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already: choose a folder that does not exist or is empty")
    model = load_any(path, "cpu")
    step = checkpoint.read_state(path)["step"] if (path / checkpoint.STATE).is_file() else math.inf
    history = stages(path, step)
    runs = [run["config"] for run, _ in reversed(history)]
    folders = [path, *(run["init_from"] for run in runs), *(run["data"] for run in runs)]
    hf.save(model, out, getattr(torch, cfg.dtype), folders)
    (out / "README.md").write_text(card(out.name, model, history, cfg.dtype), encoding="utf-8")
    print(f"{out}: {model.n_parameters():,} parameters, {cfg.dtype}; the card is its README.md")
    if not any((out / name).is_file() for name in hf.TOKENIZERS):
        print("warning: no tokenizer was found: copy tokenizer.json and tokenizer_config.json there")


if __name__ == "__main__":
    configurator.command(main, Config, words=(2, 2))
