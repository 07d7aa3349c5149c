"""The demo's source model: 4.2 M parameters from random weights, every domain in proportion to its text."""

stage = "pretrain"
out_dir = "out/demo/pretrain"
n_layers, hidden_size, intermediate_size = 6, 192, 512
n_heads, n_kv_heads, head_dim = 6, 3, 32
seq_len = 256
batch_size = micro_batch_size = 8  # 8 * 256 = 2,048 tokens a step
max_steps = 500  # 1.0 M tokens
lr = 2e-3
lr_warmup = 50
mix = "constant"
eval_interval = 100
eval_sequences = 8
