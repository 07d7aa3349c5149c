"""Text from a model, as it comes.

    python sample.py out/demo/continue/model "def main(" --temperature=0.8

The model is a Hugging Face folder with its tokenizer.json, or a checkpoint of a run (out_dir/step_NNNNNN), whose
tokenizer is that of the model the run began from or of its data set. The same seed gives the same text.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

import configurator
from configurator import UserError
from data.tokenizer import read_tokenizer_json
from evaluate import check_device, homes_of, load_any
from model import Cache, Llama

INCOMPLETE = "\ufffd"  # what decoders put in the place of bytes that are not a character yet


@dataclass(frozen=True)
class Config:
    max_tokens: int = 200  # to generate; fewer where the model ends the text or its context is full
    temperature: float = 0.8  # 0: always the likeliest token
    top_p: float = 0.95  # sample among the likeliest tokens that together have this probability
    seed: int = 17  # the same seed gives the same text
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # CUDA_VISIBLE_DEVICES chooses which


def tokenizer_of(folder: Path) -> Tokenizer:
    """Raises UserError where there is no tokenizer.json."""
    files = [home / "tokenizer.json" for home in (folder, *homes_of(folder))]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"{folder}: no tokenizer.json: copy that of the model or of the data set it was trained on")
    tokenizer = read_tokenizer_json(file)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def choose(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token: of the smallest set of likeliest ones whose probabilities sum to top_p or more (Holtzman et al. 2020,
    arXiv 1904.09751), drawn by softmax(logits / temperature); temperature 0: the likeliest."""
    if temperature <= 0:
        return int(logits_V.argmax())
    p_V, token_V = (logits_V.double() / temperature).softmax(0).sort(descending=True, stable=True)
    before_V = p_V.cumsum(0) - p_V
    p_V[1:][before_V[1:] >= top_p] = 0.0  # those before it reach top_p already
    return int(token_V[torch.multinomial(p_V, 1, generator=generator)])


@torch.inference_mode()
def generate(model: Llama, prompt: list[int], cfg: Config) -> Iterator[int]:
    """Tokens after the prompt, up to the end of the text, cfg.max_tokens or the end of the context."""
    end = model.config.eos_token_id
    ends = end if isinstance(end, list) else [end]
    generator, cache = torch.Generator().manual_seed(cfg.seed), Cache(model.config.n_layers)
    tokens = prompt
    for _ in range(min(cfg.max_tokens, model.config.context - len(prompt))):
        logits = model(torch.tensor([tokens], device=cfg.device), cache=cache)[0, -1]
        tokens = [choose(logits.cpu(), cfg.temperature, cfg.top_p, generator)]  # drawn on the CPU: the same everywhere
        if tokens[0] in ends:
            return
        yield tokens[0]


def pieces(decode: Callable[[list[int]], str], prompt: list[int], generated: Iterator[int]) -> Iterator[str]:
    """The text of the tokens as soon as it is whole characters, what follows the prompt only."""
    tokens = list(prompt)
    text = decode(tokens)
    for token in generated:
        tokens.append(token)
        longer = decode(tokens)
        if not longer.endswith(INCOMPLETE):
            yield longer[len(text) :]
            text = longer


def main(cfg: Config, folder: str, prompt: str) -> None:
    check_device(cfg.device)
    model, tokenizer = load_any(folder, cfg.device), tokenizer_of(Path(folder))
    tokens, context = tokenizer.encode(prompt).ids, model.config.context
    if not 0 < len(tokens) < context:
        raise UserError(f"the prompt has {len(tokens)} tokens: 1 to {context - 1} fit into the model's context")
    if beyond := [tokenizer.id_to_token(i) for i in tokens if i >= model.config.vocab_size]:
        raise UserError(f"the prompt has {beyond[0]!r}, which is in the tokenizer and not in the model: leave it out")
    print(prompt, end="", flush=True)
    for piece in pieces(tokenizer.decode, tokens, generate(model, tokens, cfg)):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    configurator.command(main, Config, words=(2, 2))
