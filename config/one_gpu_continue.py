"""The 1.3B of config/one_gpu_prune.py, trained on under its source:  python train.py config/one_gpu_continue.py

State: 1.35 B * 16 bytes = 21.6 GB; the teacher in bfloat16: 13.5 GB. FLOPs a token: 11.7 G of the model, whose blocks
are computed again in backward, and 14.3 G of the teacher; 100 M tokens at 40 % of an H100 (989 TFLOP/s): 1.8 hours.
"""

stage = "continue"
out_dir = "out/one_gpu/continue"
init_from = "out/one_gpu/prune/model"
data = "data/slimpajama"
seq_len = 4096
batch_size = 64  # 64 * 4096 = 262,144 tokens a step
micro_batch_size = 1
max_steps = 384  # 384 * 262,144 = 100.7 M tokens
lr, lr_warmup = 1e-4, 12
teacher, distill = "models/Llama-2-7b-hf", 0.9
eval_interval = 24  # 17 evaluations; the scaling law has its first fit at the twelfth
eval_sequences = 24  # 7 * 24 = 168 forward passes against 24 * 64 = 1,536 forward and backward
save_interval = 96
dtype = "bfloat16"
checkpoint_activations = True
compile = True
seed = 18  # not that of the stage before: its text would come again, in the same order
