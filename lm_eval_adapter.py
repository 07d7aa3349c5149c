"""lm-evaluation-harness on our own checkpoints: all of its tasks, where its data can be had.

    pip install lm_eval==0.4.13
    python lm_eval_adapter.py out/demo/continue/model --data=data/embedded --tasks=arc_easy,hellaswag --limit=100

The harness asks a model three things: the log-probability of a continuation, that of a whole text, and a greedy
answer. `Answers` gives them and needs no harness; `harness_model` makes of it what the harness takes for a model.
"""

import sys
from dataclasses import dataclass

import torch

import configurator
import model as llama
from configurator import UserError
from data.tokenizer import tokens_of
from evaluate import check_device, load_any
from tasks import adds_bos, encode_pair, score, text_tokenizer

REQUIREMENT = "lm_eval==0.4.13"
MAX_NEW_TOKENS = 256  # the harness's own default


@dataclass(frozen=True)
class Config:
    tasks: tuple[str, ...] = ()  # the harness's names
    data: str = "data/embedded"  # data set whose tokenizer is meant, if the model's folder has none
    limit: int = 0  # documents a task; 0 = all
    num_fewshot: int = 0  # examples before each question
    tokens_per_pass: int = 2048  # of all the rows of a forward pass
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


class Answers:
    """What the harness asks for. A request has its strings in `args`."""

    def __init__(self, model: llama.Llama, tokenizer, tokens_per_pass: int = 2048) -> None:
        super().__init__()
        self.model, self.tokenizer, self.tokens_per_pass = model, tokenizer, tokens_per_pass
        self.bos = adds_bos(tokenizer)
        self.context_size = model.config.context

    def loglikelihood(self, requests: list, **_: object) -> list[tuple[float, bool]]:
        """args: (context, continuation). Log-probability in nats, and whether it is what greedy decoding would say."""
        pairs = [encode_pair(self.tokenizer, *request.args, self.bos) for request in requests]
        return score(self.model, pairs, self.tokens_per_pass)

    def loglikelihood_rolling(self, requests: list, **_: object) -> list[float]:
        """args: (text,). Log-probability in nats of every token of it, given as much before it as the model can take.

        The text is cut into as few windows as cover it; the last one is full, with what it repeats as context only.
        """
        return [
            sum(logprob for logprob, _ in score(self.model, self._windows(request.args[0]), self.tokens_per_pass))
            for request in requests
        ]

    def _windows(self, text: str) -> list[tuple[list[int], int]]:
        tokens = [self.tokenizer.bos, *tokens_of(self.tokenizer, text)]
        ends = [
            min(start + self.context_size, len(tokens) - 1) for start in range(0, len(tokens) - 1, self.context_size)
        ]
        starts = [0, *ends][: len(ends)]
        return [
            (tokens[max(0, end - self.context_size) : end + 1], end - start)
            for start, end in zip(starts, ends, strict=True)
        ]

    def generate_until(self, requests: list, **_: object) -> list[str]:
        """args: (context, settings). Greedy text up to the first of settings["until"], max_gen_toks at most."""
        return [self._generate(*request.args) for request in requests]

    @torch.no_grad()
    def _generate(self, context: str, settings: dict) -> str:
        if settings.get("do_sample"):
            raise UserError("do_sample = True: only greedy decoding is offered: leave out tasks that sample")
        n_new, until = settings.get("max_gen_toks", MAX_NEW_TOKENS), settings.get("until") or []
        room = min(n_new, self.context_size // 2)  # for the answer; what does not fit beside it the prompt loses
        until = [until] if isinstance(until, str) else until
        prompt = [self.tokenizer.bos] * self.bos + tokens_of(self.tokenizer, context)
        tokens = prompt[-(self.context_size - room) :] or [self.tokenizer.bos]
        text, n_prompt = "", len(tokens)
        while len(tokens) < min(n_prompt + n_new, self.context_size):
            window = torch.tensor([tokens], device=self.model.norm.weight.device)
            tokens.append(int(self.model(window)[0, -1].argmax()))
            if tokens[-1] == self.tokenizer.eos:
                return self.tokenizer.decode(tokens[n_prompt:-1])
            text = self.tokenizer.decode(tokens[n_prompt:])
            if found := [at for stop in until if (at := text.find(stop)) >= 0]:
                return text[: min(found)]
        return text


def harness_model(model: llama.Llama, tokenizer, tokens_per_pass: int = 2048):
    """Answers as a model of the harness. Raises UserError where the harness is not installed."""
    try:
        from lm_eval.api.model import LM  # noqa: PLC0415 - optional
    except ImportError:
        raise UserError(f"the harness is not installed: pip install {REQUIREMENT}") from None
    return type("OurModel", (Answers, LM), {})(model, tokenizer, tokens_per_pass)


def main(folder: str, cfg: Config) -> None:
    check_device(cfg.device)
    tokenizer = text_tokenizer(folder, cfg.data)
    ours = harness_model(load_any(folder, cfg.device), tokenizer, cfg.tokens_per_pass)
    from lm_eval import simple_evaluate  # noqa: PLC0415 - optional
    from lm_eval.utils import make_table  # noqa: PLC0415

    settings = {"num_fewshot": cfg.num_fewshot, "limit": cfg.limit or None}
    print(make_table(simple_evaluate(model=ours, tasks=list(cfg.tasks), **settings)))


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("--"):
        sys.exit(__doc__)
    try:
        main(sys.argv[1], configurator.load(Config, sys.argv[2:]))
    except UserError as error:
        sys.exit(f"error: {error}")
