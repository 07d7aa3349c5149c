"""Text from a model, as it comes.

    python sample.py out/demo/continue/model "def main(" --data=data/embedded --temperature=0.8

Takes a model folder, or a checkpoint of a run (out_dir/step_NNNNNN). The tokenizer is the one in the model's folder
(tokenizer.json or tokenizer.model), or that of a data set: --data. The same seed gives the same text.
"""

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import configurator
import model as llama
from configurator import UserError
from data.shards import read_meta
from data.tokenizer import encoded, load_tokenizer, open_tokenizer, read_tokenizer_json, tokens_of
from evaluate import check_device, load_any

INCOMPLETE = "\ufffd"  # what decoders put in the place of bytes that are not a character yet


@dataclass(frozen=True)
class Config:
    max_tokens: int = 200  # to generate; fewer where the model ends the text or its context is full
    temperature: float = 0.8  # 0: always the likeliest token
    top_p: float = 0.95  # sample among the likeliest tokens that together have this probability
    seed: int = 17
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    data: str = ""  # data set whose tokenizer to use; "" = the one in the model's folder


class TokenizerJson:
    """A Hugging Face tokenizer.json, with what it adds around a text (such as BOS)."""

    def __init__(self, path: Path) -> None:
        self.path, self.model = path, read_tokenizer_json(path)

    def encode(self, text: str) -> list[int]:
        try:
            return encoded(self.model, text, add_special_tokens=True)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}: write something else") from None

    def decode(self, tokens: list[int]) -> str:
        return self.model.decode(tokens)


def tokenizer_of(path: Path, data: str):
    """What has encode and decode for this model, and the tokens that go before a text. Raises UserError."""
    if data:
        tokenizer = load_tokenizer(read_meta(data), data)
        return tokenizer, [tokenizer.bos]
    if (path / "tokenizer.json").is_file():
        return TokenizerJson(path / "tokenizer.json"), []
    if (path / "tokenizer.model").is_file():
        tokenizer = open_tokenizer(path / "tokenizer.model")
        return tokenizer, [tokenizer.bos]
    raise UserError(f"{path}: no tokenizer.json or tokenizer.model: name the data set it was trained on with --data=")


def choose(logits_V: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """One token: of the smallest set of likeliest ones whose probabilities sum to top_p or more (Holtzman et al. 2020,
    arXiv 1904.09751), drawn by softmax(logits / temperature); temperature 0: the likeliest."""
    if temperature == 0:
        return int(logits_V.argmax())
    p_V, token_V = (logits_V.double() / temperature).softmax(0).sort(descending=True, stable=True)
    p_V[p_V.cumsum(0) - p_V >= top_p] = 0.0  # those before it reach top_p already
    return int(token_V[torch.multinomial(p_V, 1, generator=generator)])


@torch.inference_mode()
def generate(model: llama.Llama, prompt: list[int], cfg: Config) -> Iterator[int]:
    """Tokens after the prompt, up to the end of the text, cfg.max_tokens or the end of the context."""
    end = model.config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    generator, cache = torch.Generator().manual_seed(cfg.seed), llama.Cache(model.config.n_layers)
    tokens = prompt
    for _ in range(min(cfg.max_tokens, model.config.context - len(prompt))):
        logits = model(torch.tensor([tokens], device=cfg.device), cache=cache)[0, -1]
        tokens = [choose(logits.cpu(), cfg.temperature, cfg.top_p, generator)]  # drawn on the CPU: the same everywhere
        if tokens[0] in ends:
            return
        yield tokens[0]


def pieces(decode, prompt: list[int], generated: Iterator[int]) -> Iterator[str]:
    """The text of the tokens as soon as it is whole characters, what follows the prompt only."""
    tokens = list(prompt)
    text = decode(tokens)
    for token in generated:
        tokens.append(token)
        longer = decode(tokens)
        if not longer.endswith(INCOMPLETE):
            yield longer[len(text) :]
            text = longer


def check(cfg: Config) -> None:
    if cfg.max_tokens < 1:
        raise UserError(f"max_tokens = {cfg.max_tokens}: must be at least 1")
    if not 0 <= cfg.temperature < math.inf:
        raise UserError(f"temperature = {cfg.temperature}: must be 0 or more")
    if not 0 < cfg.top_p <= 1:
        raise UserError(f"top_p = {cfg.top_p}: must be above 0 and at most 1")
    check_device(cfg.device)


def main(path: str, prompt: str, cfg: Config) -> None:
    """Raises UserError, UserError and UserError before anything is generated."""
    check(cfg)
    model = load_any(path, cfg.device).eval()
    tokenizer, before = tokenizer_of(Path(path), cfg.data)
    tokens, config = before + tokens_of(tokenizer, prompt), model.config
    if not tokens:
        raise UserError("the prompt is empty, and the tokenizer puts nothing before it: write something")
    if max(tokens) >= config.vocab_size:
        raise UserError(
            f"token {max(tokens)} is outside the model's vocabulary of {config.vocab_size}: "
            "this is not the model's tokenizer"
        )
    if len(tokens) >= config.context:
        raise UserError(f"the prompt has {len(tokens)} tokens, the model's context {config.context}: shorten it")
    if len(tokens) + cfg.max_tokens > config.context:
        room = config.context - len(tokens)
        print(f"warning: max_tokens = {cfg.max_tokens}: {room} fill the context of {config.context}", file=sys.stderr)
    print(prompt, end="", flush=True)
    for piece in pieces(tokenizer.decode, tokens, generate(model, tokens, cfg)):
        print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    words = [a for a in sys.argv[1:] if not a.startswith("--")]
    if len(words) != 2:
        sys.exit(__doc__)
    try:
        main(*words, configurator.load(Config, [a for a in sys.argv[1:] if a.startswith("--")]))
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped")
