"""Qwen2-7B to 1.8B on eight languages, in minutes:  python train.py config/prune_qwen2.py

7B: 28 layers, 3584 channels, 28 heads in 4 groups of 7, FFN 18944. 1.8B: 28, 1792, 14 (2 groups), 7040: every layer
stays, so there is no layer mask. One-shot, as config/prune.py, which says what --max_steps=3200 is.
The paper's target of as many parameters has 1536 channels and FFN 8960. Tools that take hidden_size / n_heads for the
size of a Qwen2's heads (vLLM, llama.cpp, transformers before 4.48) do not load that one; all load 14 * 128 = 1792.

CulturaX has 2846.97, 737.20, 227.06, 107.87, 69.35, 64.29, 24.77 and 15.72 billion tokens of these languages; ratios
are in proportion to their 0.3th powers: rare languages get more than their share of the text.
"""

stage = "prune"
out_dir = "out/qwen2-1.8b/prune"
init_from = "models/Qwen2-7B"
data = "data/culturax"  # prepared with data/prepare.py --preset=culturax and the model's own tokenizer
domains = ("en", "ru", "zh", "ja", "ar", "tr", "ko", "th")
ratios = (0.277042, 0.184717, 0.12974, 0.103777, 0.090896, 0.088853, 0.066743, 0.058232)
n_layers, hidden_size, intermediate_size, n_heads = 28, 1792, 7040, 14
seq_len = 4096
max_steps = 0
eval_sequences = 24
dtype = "bfloat16"
parallel = "fsdp"
# what follows is for --max_steps=3200, but for micro_batch_size, which evaluation takes, too
batch_size = 32  # 32 * 4096 = 131,072 tokens a step
micro_batch_size = 4
lr, mask_lr = 1e-4, 1.0
distill = 0.9  # the source is the teacher
lr_warmup = 320
eval_interval = 50
reference_losses = (2.389493, 1.795453, 2.626018, 2.362056, 2.453045, 2.535048, 2.155811, 1.835680)
save_interval = 200
checkpoint_activations = True
compile = True  # shapes are fixed: masks by count, without a ramp
