"""The demo's pruning: to about a quarter of the parameters that are not embeddings, with every mask type."""

stage = "prune"
out_dir = "out/demo/prune"
init_from = "out/demo/pretrain/model"
n_layers, hidden_size, intermediate_size, n_heads = 4, 128, 256, 4
seq_len = 256
batch_size = micro_batch_size = 8  # 2,048 tokens a step
max_steps = 200
lr = 1e-3
lr_warmup = 10
mask_lr = 0.5
sparsity_warmup = 80
eval_interval = 10
eval_sequences = 4
