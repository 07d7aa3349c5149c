"""A real model pruned on two CPU cores: SmolLM2-135M to half of its parameters that are not embeddings.

The source is the instruct model, de-quantised from 4 bits: python data/smollm2/prepare.py writes it and the text.

30 layers, 576 channels, 9 heads in 3 groups, FFN 1536: 30 * (576 * 64 * (9 + 3) * 2 + 576 * 1536 * 3) = 106.2 M
24 layers, 480 channels, 6 heads in 2 groups, FFN 1184: 24 * (480 * 64 * (6 + 2) * 2 + 480 * 1184 * 3) = 52.7 M, 50 %
"""

stage = "prune"
out_dir = "out/smollm2/prune"
init_from = "data/smollm2/model"
data = "data/smollm2/data"
n_layers, hidden_size, intermediate_size, n_heads = 24, 480, 1184, 6
seq_len = 256
batch_size = micro_batch_size = 2  # 512 tokens a step: the masks need steps more than tokens
max_steps = 240  # 0.12 M tokens: enough to see it work, not to recover
lr, lr_warmup = 3e-4, 8
kappa, mask_lr = 30.0, 1.0  # few units on the slope at a time: there are only 3 key/value groups a layer
distill = 0.9
eval_interval = 20  # 13 evaluations
eval_sequences = 1  # 6 * 256 tokens forward against 20 * 512 forward and backward
save_interval = 120
