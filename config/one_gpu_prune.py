"""Llama-2-7B to 1.3B on one GPU, in minutes:  python train.py config/one_gpu_prune.py

One-shot, as config/prune.py, with nothing that one GPU does not need: copy it for a model of your own. Weights are
frozen and in bfloat16: 6.74 B * 2 bytes = 13.5 GB, and little more. config/one_gpu_continue.py trains the result.
"""

stage = "prune"
out_dir = "out/one_gpu/prune"
init_from = "models/Llama-2-7b-hf"
data = "data/slimpajama"  # prepared with data/prepare.py --preset=slimpajama and the model's own tokenizer
n_layers, hidden_size, intermediate_size, n_heads = 24, 2048, 5504, 16
seq_len = 4096
batch_size = micro_batch_size = 1
max_steps = 0
calibration = 64  # 64 * 4096 = 262,144 tokens, forward and backward
eval_sequences = 8
mix = "constant"
dtype = "bfloat16"
