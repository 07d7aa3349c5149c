"""A real model pruned on two CPU cores: SmolLM2-135M to half of its parameters that are not embeddings.

The source is the instruct model, de-quantised from 4 bits: python data/smollm2/prepare.py writes it and the text.

30 layers, 576 channels, 9 heads in 3 groups, FFN 1536: 30 * (576 * 64 * (9 + 3) * 2 + 576 * 1536 * 3) = 106.2 M
24 layers, 512 channels, 6 heads in 2 groups, FFN 1088: 24 * (512 * 64 * (6 + 2) * 2 + 512 * 1088 * 3) = 52.7 M, 50 %
"""

stage = "prune"
out_dir = "out/smollm2/prune"
init_from = "data/smollm2/model"
data = "data/smollm2/data"
n_layers, hidden_size, intermediate_size, n_heads = 24, 512, 1088, 6
seq_len = 256
batch_size, micro_batch_size = 4, 2  # 1,024 tokens a step, two mask samples; the source trains at 140 tokens/s
max_steps = 160  # 0.16 M tokens, 19 minutes at that speed: enough to see it work, not enough to recover
lr, lr_warmup = 3e-4, 8
mask_lr = 0.4  # the Lagrangian alone, without text, comes to rest at its target by step 80
sparsity_warmup = 40
eval_interval = 10  # 16 evaluations
eval_sequences = 1  # 6 * 256 tokens forward against 10 * 1,024 forward and backward
save_interval = 80
