"""The 1.3B of config/prune.py, trained on:  torchrun --nproc_per_node=8 train.py config/continue.py

1.35 B parameters * 16 bytes = 22 GB of state a rank, some 18 GB of activations at micro-batches of 2, and the teacher
in bfloat16: 13.5 GB.
Per GPU: 256 sequences / 8 ranks = 16 micro-batches of 2.
"""

stage = "continue"
out_dir = "out/llama2-1.3b/continue"
init_from = "out/llama2-1.3b/prune/model"
data = "data/slimpajama"
domains = ("cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4")
ratios = (0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15)
seq_len = 4096
batch_size = 256  # 256 * 4096 = 1,048,576 tokens a step
micro_batch_size = 2
max_steps = 48_000  # 48,000 * 1,048,576 = 50.3 B tokens
lr = 1e-4
lr_warmup = 1440  # 3 % of the steps; masks that have learned leave AdamW's moments, and then there is none
teacher, distill = "models/Llama-2-7b-hf", 0.9
eval_interval = 400
eval_sequences = 500  # 7 * 500 forward passes against 400 * 256 = 102,400 forward and backward: 1 % of the time
reference_losses = (1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251)
save_interval = 400
dtype = "bfloat16"
compile = True  # shapes are fixed here
seed = 18  # not that of the stage before: its text would come again, in the same order
