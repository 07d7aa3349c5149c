"""One-shot pruning by activation size, as a baseline for learned masks: keep what was most active on some text.

Scores after Minitron (Muralidharan et al. 2024, arXiv 2407.14679), over all tokens of a calibration batch:
    hidden         mean |output of the blocks' norms| of a channel, summed over norms
    head           mean |output| of a key/value head's query heads, before o_proj
    intermediate   mean |input of down_proj| of an FFN channel
    layer          1 - mean cosine of a block's input and output (block influence)
The best of each row become masks of ones and zeros, and prune.extract writes the small model as for learned ones.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Llama, LlamaConfig
from prune import MASK_TYPES, Masks, extract

CERTAIN = 100.0  # a logit whose soft mask value is 1 (or, negative, 0) to the last bit


@torch.no_grad()
def scores(model: Llama, tokens: Tensor, batch_size: int = 8) -> dict[str, Tensor]:
    """Importance of every unit of each mask type, in the shapes of Masks.log_alpha; tokens (N, T)."""
    c = model.config
    found = {m: torch.zeros(c.n_layers if t.per_layer else 1, getattr(c, t.size)) for m, t in MASK_TYPES.items()}

    def size(x: Tensor) -> Tensor:
        return x.abs().sum(dim=(0, 1)) / tokens.numel()

    def hook_layer(layer: int, block: torch.nn.Module) -> list:
        def on_norm(_module, _inputs, output) -> None:
            found["hidden"][0] += size(output[0])

        def on_block(_module, inputs, output) -> None:
            (x, delta, *_), (y, change) = inputs, output
            before = x if delta is None else x + delta
            found["layer"][0, layer] += (1 - F.cosine_similarity(before, y + change, dim=-1)).sum() / tokens.numel()

        def on_heads(_module, inputs) -> None:
            found["head"][layer] += size(inputs[0]).view(c.n_kv_heads, -1).mean(dim=1)

        def on_ffn(_module, inputs) -> None:
            found["intermediate"][layer] += size(inputs[0])

        return [
            block.input_layernorm.register_forward_hook(on_norm),
            block.post_attention_layernorm.register_forward_hook(on_norm),
            block.register_forward_hook(on_block),
            block.self_attn.o_proj.register_forward_pre_hook(on_heads),
            block.mlp.down_proj.register_forward_pre_hook(on_ffn),
        ]

    hooks = [hook for layer, block in enumerate(model.layers) for hook in hook_layer(layer, block)]
    for part in tokens.split(batch_size):
        model(part)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def one_shot_masks(source: LlamaConfig, target: LlamaConfig, score: dict[str, Tensor]) -> Masks:
    """Masks that are 1 on the units with the highest scores of each row and 0 elsewhere; ties go to the lower index."""
    masks = Masks(source, target, seed=0)
    for mask, log_alpha in masks.log_alpha.items():
        kept = score[mask].argsort(dim=1, descending=True, stable=True)[:, : getattr(target, MASK_TYPES[mask].size)]
        log_alpha.fill_(-CERTAIN).scatter_(1, kept, CERTAIN)
    return masks


def one_shot(model: Llama, target: LlamaConfig, tokens: Tensor) -> Llama:
    return extract(model, one_shot_masks(model.config, target, scores(model, tokens)))
