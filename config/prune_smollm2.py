"""A real model pruned on two CPU cores: SmolLM2-135M to half of its parameters that are not embeddings.

The source is the instruct model, de-quantised from 4 bits: python data/smollm2/prepare.py writes it and the text.

30 layers, 576 channels, 9 heads in 3 groups, FFN 1536: 30 * (576 * 64 * (9 + 3) * 2 + 576 * 1536 * 3) = 106.2 M
28 layers, 576 channels, 6 heads in 2 groups, FFN 736: 28 * (576 * 64 * (6 + 2) * 2 + 576 * 736 * 3) = 52.1 M, 49 %

Of the shapes of that size, deep and narrow ones lose least: docs/log.md has the losses of 18. With
config/continue_smollm2.py it comes from 2.79 to 3.35 nats in 40 minutes.
"""

stage = "prune"
out_dir = "out/smollm2/prune"
init_from = "data/smollm2/model"
data = "data/smollm2/data"
n_layers, hidden_size, intermediate_size, n_heads = 28, 576, 736, 6
seq_len = 256
batch_size = micro_batch_size = 2  # 512 tokens a step
max_steps = 64  # config/continue_smollm2.py has the rest, and the decay
lr, lr_warmup = 6e-4, 8
distill = 0.9
mix = "constant"  # a learned one needs more text in an evaluation than two cores have time for
eval_interval = 32
eval_sequences = 2
save_interval = 32
