"""The demo's pruning: to a quarter of the parameters that are not embeddings, with every mask type.

6 layers, 192 channels, 6 heads, 512 FFN channels: 6 * (192 * 32 * (6 + 3) * 2 + 192 * 512 * 3) = 2.43 M
4 layers, 128 channels, 4 heads, 256 FFN channels: 4 * (128 * 32 * (4 + 2) * 2 + 128 * 256 * 3) = 0.59 M, 24 %
"""

stage = "prune"
out_dir = "out/demo/prune"
init_from = "out/demo/pretrain/model"
n_layers, hidden_size, intermediate_size, n_heads = 4, 128, 256, 4
seq_len = 256
batch_size = micro_batch_size = 8  # 2,048 tokens a step
max_steps = 200  # 0.41 M tokens
lr = 1e-3
lr_warmup = 10
mask_lr = 0.5  # the paper's 1.0 has 3,200 steps to settle in
sparsity_warmup = 64
eval_interval = 8  # 25 evaluations; the scaling law has its first fit at the eleventh
eval_sequences = 2  # 2 * 256 tokens a domain: evaluation must stay under a tenth of the stage
seed = 18  # not that of the stage before: its text would come again, in the same order
