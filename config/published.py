"""Llama-2-7B to 1.3B by the paper's own recipe:  torchrun --nproc_per_node=8 train.py config/published.py

Masks that are sampled for every micro-batch under a Lagrangian, a cosine of their own, and no teacher; continue the
result with --distill=0. The state in float32 is 6.74 B * 16 bytes = 108 GB: fsdp gives every rank a share.
"""

stage = "prune"
out_dir = "out/llama2-1.3b-published/prune"
init_from = "models/Llama-2-7b-hf"
data = "data/slimpajama"  # 7 domains, prepared with data/prepare.py --preset=slimpajama and the model's own tokenizer
domains = ("cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4")
ratios = (0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15)
n_layers, hidden_size, intermediate_size, n_heads = 24, 2048, 5504, 16
seq_len = 4096
batch_size = 32  # 32 * 4096 = 131,072 tokens a step
micro_batch_size = 4  # a step sees 8 samples of the masks, one a micro-batch; with 1 it sees the paper's 32
max_steps = 3200  # 3,200 * 131,072 = 0.42 B tokens
lr, mask_lr = 1e-4, 1.0
masks = "published"
lr_warmup = 320
sparsity_warmup = 640
eval_interval = 50  # 65 evaluations; a fit takes at most 64
eval_sequences = 24  # 7 * 24 = 168 forward passes against 50 * 32 = 1,600 forward and backward: 4 % of the time
reference_losses = (1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251)  # 1.3B, predicted from Llama-2's (paper)
save_interval = 200
dtype = "bfloat16"
checkpoint_activations = True
parallel = "fsdp"
