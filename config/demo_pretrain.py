"""The demo's source model: 2.1 M parameters from random weights, every domain in proportion to its text.

It is small, and sees 2.0 M tokens in three minutes: pruning needs something to keep, a teacher something to teach.
"""

stage = "pretrain"
out_dir = "out/demo/pretrain"
n_layers, hidden_size, intermediate_size = 6, 128, 320
n_heads, n_kv_heads, head_dim = 4, 2, 32
seq_len = 256
batch_size = micro_batch_size = 8  # 8 * 256 = 2,048 tokens a step, as in the other stages
max_steps = 1000  # 2.0 M tokens
lr = 2e-3
lr_warmup = 100
mix = "constant"
eval_interval = 200
eval_sequences = 8
