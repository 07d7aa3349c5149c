"""The demo's pruning: to a quarter of the parameters that are not embeddings, with every mask type.

Scores choose the units, and 64 steps under the source as teacher let the masks change their mind. They are here to be
seen: --max_steps=0 should end as low (docs/evidence.md).
6 layers, 128 channels, 4 heads, 320 FFN channels: 6 * (128 * 32 * (4 + 2) * 2 + 128 * 320 * 3) = 1.03 M
4 layers,  96 channels, 2 heads, 160 FFN channels: 4 * ( 96 * 32 * (2 + 1) * 2 +  96 * 160 * 3) = 0.26 M, 25 %
"""

stage = "prune"
out_dir = "out/demo/prune"
init_from = "out/demo/pretrain/model"
n_layers, hidden_size, intermediate_size, n_heads = 4, 96, 160, 2
seq_len = 256
batch_size = micro_batch_size = 8  # 2,048 tokens a step
max_steps = 64  # 0.13 M tokens
lr = 2e-3
lr_warmup = 8
distill = 0.9
eval_interval = 5  # 14 evaluations; the scaling law has its first fit at the twelfth
eval_sequences = 4  # 4 * 256 tokens a domain
seed = 18  # not that of the stage before: its text would come again, in the same order
