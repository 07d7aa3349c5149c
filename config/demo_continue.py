"""The demo's continued training of the pruned model; the mix is still learned."""

stage = "continue"
out_dir = "out/demo/continue"
init_from = "out/demo/prune/model"
seq_len = 256
batch_size = micro_batch_size = 8  # 2,048 tokens a step
max_steps = 320  # 0.66 M tokens
lr = 2e-3
lr_warmup = 20
eval_interval = 10
eval_sequences = 2
seed = 19  # not that of the stage before: its text would come again, in the same order
