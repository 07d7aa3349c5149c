"""What config/prune_smollm2.py has pruned, trained on under its source, on two CPU cores."""

stage = "continue"
out_dir = "out/smollm2/continue"
init_from = "out/smollm2/prune/model"
data = "data/smollm2/data"
seq_len = 256
batch_size = micro_batch_size = 2  # 512 tokens a step
max_steps = 240  # 0.12 M tokens
lr, lr_warmup = 6e-4, 8
teacher, distill = "data/smollm2/model", 0.9
mix = "constant"
eval_interval = 60
eval_sequences = 2
save_interval = 60
seed = 18  # not that of the stage before: its text would come again, in the same order
