"""The demo's control, not part of `make demo`: the pruned shape from random weights, on as many tokens as pruning and
continued training took together (200 + 320 steps of 2,048), with the same learning rate and the same learned mix."""

stage = "pretrain"
out_dir = "out/demo/control"
n_layers, hidden_size, intermediate_size = 4, 128, 256
n_heads, n_kv_heads, head_dim = 4, 2, 32
seq_len = 256
batch_size = micro_batch_size = 8  # 2,048 tokens a step
max_steps = 200 + 320
lr = 2e-3
lr_warmup = 20
eval_interval = 10
eval_sequences = 2
