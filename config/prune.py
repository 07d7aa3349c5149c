"""Llama-2-7B to 1.3B, the paper's shapes and data, in minutes:  python train.py config/prune.py

7B: 32 layers, 4096 channels, 32 heads of 128, FFN 11008. 1.3B: 24, 2048, 16, 5504: half of every width, three
quarters of the layers. 64 windows of text score every unit, and the best stay as they are. Weights are frozen and in
bfloat16: 6.74 B * 2 bytes = 13.5 GB, and little more. One GPU is enough; torchrun --nproc_per_node=8 shares it out.

Masks that learn from there (--max_steps=3200, 0.42 B tokens under the source) end no better in the evidence. They need
eight GPUs: weights, gradients and both moments in float32 are 6.74 B * 16 bytes = 108 GB, of which fsdp gives every
rank a share. `--plan` says 26 GiB a GPU. config/published.py has the paper's own masks.
"""

stage = "prune"
out_dir = "out/llama2-1.3b/prune"
init_from = "models/Llama-2-7b-hf"
data = "data/slimpajama"  # 7 domains, prepared with data/prepare.py --preset=slimpajama and the model's own tokenizer
domains = ("cc", "github", "book", "stackexchange", "wiki", "arxiv", "c4")
ratios = (0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15)
n_layers, hidden_size, intermediate_size, n_heads = 24, 2048, 5504, 16
seq_len = 4096
max_steps = 0
calibration = 64  # 64 * 4096 = 262,144 tokens, forward and backward
eval_sequences = 24
dtype = "bfloat16"
parallel = "fsdp"
# what follows is for --max_steps=3200, but for micro_batch_size, which evaluation takes, too
batch_size = 32  # 32 * 4096 = 131,072 tokens a step
micro_batch_size = 4  # masks by count are one subnetwork a step, whatever this is
lr, mask_lr = 1e-4, 1.0
distill = 0.9  # of the loss is KL(source || model); the teacher in bfloat16: 13.5 GB / 8 ranks
lr_warmup = 320
eval_interval = 50  # 65 evaluations; a fit takes at most 64
reference_losses = (1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449, 2.1251)  # 1.3B, predicted from Llama-2's (paper)
save_interval = 200
checkpoint_activations = True
compile = True  # shapes are fixed: masks by count, without a ramp
