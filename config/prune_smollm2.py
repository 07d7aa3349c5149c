"""A real model pruned on two CPU cores: SmolLM2-135M to half of its parameters that are not embeddings.

The source is the instruct model, de-quantised from 4 bits: python data/smollm2/prepare.py writes it and the text.

30 layers, 576 channels, 9 heads in 3 groups, FFN 1536: 30 * (576 * 64 * (9 + 3) * 2 + 576 * 1536 * 3) = 106.2 M
28 layers, 576 channels, 6 heads in 2 groups, FFN 736: 28 * (576 * 64 * (6 + 2) * 2 + 576 * 736 * 3) = 52.1 M, 49 %

Of the shapes of that size, deep and narrow ones lose least: docs/log.md has the losses of 18. One-shot, since masks
that learn in the first steps (--max_steps=64) end no better here.
"""

stage = "prune"
out_dir = "out/smollm2/prune"
init_from = "data/smollm2/model"
data = "data/smollm2/data"
n_layers, hidden_size, intermediate_size, n_heads = 28, 576, 736, 6
seq_len = 256
batch_size = micro_batch_size = 2  # 512 tokens a step
max_steps = 0  # config/continue_smollm2.py has them all
lr, lr_warmup = 6e-4, 8  # these and the next line count with --max_steps=64
distill, save_interval = 0.9, 32
mix = "constant"  # a learned one needs more text in an evaluation than two cores have time for
eval_interval = 32
eval_sequences = 2
