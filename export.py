"""A run's model as a folder for other tools: weights, config, tokenizer, and a card that says how it was made.

    python export.py out/llama2-1.3b/continue/model out/Llama-1.3B --dtype=bfloat16

Takes a model folder, or a checkpoint of a run (out_dir/step_NNNNNN): that of a pruning run counts as the model that its
masks would extract now. The result loads with transformers' AutoModelForCausalLM and AutoTokenizer.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

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


class Stage(NamedTuple):
    """A run behind a model: its record of itself, and its last evaluation that the model has seen."""

    run: dict
    evaluated: dict | None


def stages(path: Path, step: float = math.inf) -> list[Stage]:
    """The runs behind a model (up to `step` of the last), oldest first; [] where none is recorded beside it."""
    records = read_metrics(path.parent / "metrics.jsonl")
    if not records or records[0]["kind"] != "run":
        return []
    evaluated = [r for r in records if r["kind"] in ("eval", "extracted") and r["step"] <= step]
    began = records[0]["config"]["init_from"]
    before = stages(Path(began)) if began and Path(began).parent.resolve() != path.parent.resolve() else []
    return [*before, Stage(records[0], evaluated[-1] if evaluated else None)]


def markdown(columns: list[str], rows: list[list]) -> str:
    """A table; numbers that are not whole with four digits after the point, a dash for what is not known."""
    forms = {float: "{:.4f}", int: "{:,}", type(None): "-"}
    text = [[forms.get(type(cell), "{}").format(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *text])


def stage_card(stage: Stage) -> str:
    """What a run did: settings that differ from their default, and by domain tokens, final mix and losses."""
    run, e = stage
    config, default = run["config"], json.loads(json.dumps(asdict(TrainConfig())))
    settings = "\n".join(f"    {key} = {value!r}" for key, value in config.items() if default.get(key) != value)
    text = f"### {config['stage']}\n\nSettings that are not the default:\n\n{settings}\n"
    if e is None:
        return text
    rows = []
    for m, domain in enumerate(run["domains"]):
        loss, row = e["val_loss"][m], [domain, int(e["tokens"][m]), e["ratio"][m]]
        bits = loss / math.log(2) / run["bytes_per_token"][m] if loss and run["bytes_per_token"][m] else None
        rows.append([*row, loss, loss and math.exp(min(loss, 700.0)), bits])  # a float ends at exp(709)
    columns = ["domain", "tokens", "final ratio", "loss (nats)", "perplexity", "bits per byte"]
    return (
        f"{text}\nAfter {e['step']:,} of {config['max_steps']:,} steps and {int(sum(e['tokens'])):,} tokens "
        f"(validation, {config['eval_sequences']} windows of {config['seq_len']:,} tokens a domain):\n\n"
        f"{markdown(columns, rows)}\n"
    )


def card(name: str, model: Llama, history: list[Stage], dtype: str) -> str:
    """README.md of the folder."""
    began = history[0].run["config"]["init_from"] if history else ""
    came = f" from `{began}`" if began else ""
    shape = [[size, getattr(model.config, size)] for size in SIZES]
    if history:
        shape = [[size, history[0].run["source"][size], here] for size, here in shape]
    how = "\n".join(map(stage_card, history)) or "No record of a run was beside the model.\n"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {name}

{model.n_parameters():,} parameters, {model.n_parameters(embeddings=False):,} of them not embeddings, {dtype}; a
{model.config.family} made{came} with DRPruning ([Deng et al., ACL 2025](https://arxiv.org/abs/2411.14055)). The licence
of the source model holds for what was pruned from it.

## Shape

{markdown(["", "source", "this model"] if history else ["", "this model"], shape)}

## How it was made

{how}"""


def main(cfg: Config, source: str, target: str) -> None:
    if cfg.dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype = {cfg.dtype!r}: must be float32 or bfloat16")
    path, out = Path(source), Path(target)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is there already: choose a folder that does not exist or is empty")
    model = load_any(path, "cpu")
    state = checkpoint.read_state(path) if (path / checkpoint.STATE).is_file() else {"step": math.inf}
    history = stages(path, state["step"])
    runs = [stage.run["config"] for stage in reversed(history)]
    folders = [path, *(run["init_from"] for run in runs), *(run["data"] for run in runs)]
    hf.save(model, out, getattr(torch, cfg.dtype), folders)
    (out / "README.md").write_text(card(out.name, model, history, cfg.dtype), encoding="utf-8")
    print(f"{out}: {model.n_parameters():,} parameters, {cfg.dtype}; the card is its README.md")
    if not any((out / name).is_file() for name in hf.TOKENIZERS):
        print("warning: no tokenizer was found: copy tokenizer.json and tokenizer_config.json there")


if __name__ == "__main__":
    configurator.command(main, Config, words=(2, 2))
