"""The 1.8B of config/prune_qwen2.py, trained on:  torchrun --nproc_per_node=8 train.py config/continue_qwen2.py"""

stage = "continue"
out_dir = "out/qwen2-1.8b/continue"
init_from = "out/qwen2-1.8b/prune/model"
data = "data/culturax"
domains = ("en", "ru", "zh", "ja", "ar", "tr", "ko", "th")
ratios = (0.277042, 0.184717, 0.12974, 0.103777, 0.090896, 0.088853, 0.066743, 0.058232)
seq_len = 4096
batch_size = 256  # 256 * 4096 = 1,048,576 tokens a step
micro_batch_size = 2
max_steps = 40_000  # 40,000 * 1,048,576 = 41.9 B tokens
lr = 1e-4
lr_warmup = 1440
teacher, distill = "models/Qwen2-7B", 0.9
eval_interval = 400
eval_sequences = 500
reference_losses = (2.389493, 1.795453, 2.626018, 2.362056, 2.453045, 2.535048, 2.155811, 1.835680)
save_interval = 400
dtype = "bfloat16"
compile = True
seed = 18  # not that of the stage before: its text would come again, in the same order
