"""The demo's continued training of the pruned model under its source; the mix is still learned."""

stage = "continue"
out_dir = "out/demo/continue"
init_from = "out/demo/prune/model"
seq_len = 256
batch_size = micro_batch_size = 8  # 2,048 tokens a step
max_steps = 400  # 0.82 M tokens
lr = 2e-3  # without a warm-up: pruning has left AdamW's moments
teacher, distill = "out/demo/pretrain/model", 0.9
eval_interval = 20
eval_sequences = 8  # two a domain would move the mix by chance as far as by what they say (docs/log.md)
seed = 19  # not that of the stage before: its text would come again, in the same order
