# Chapter I-5: GPT-2 small learns one short story by heart.
#
#     python pretrain.py config/verdict.py
#
# Ten epochs of nine steps; after each a sample. The training loss falls from 11 below 1, the held-out loss
# stays above 6: 4,600 tokens teach 163 million parameters this story, and no English. loss.png shows it.
# As in the chapter: AdamW at a constant 4e-4, no biases on queries, keys and values, a separate head.
out_dir = 'out/verdict'
dataset = 'verdict'
tokenizer = 'gpt2'

model = 'gpt2'
n_layer = 12
n_head = 12
n_embd = 768
qkv_bias = False
tie_word_embeddings = False
init_std = 0.0                  # PyTorch's: embeddings of size 1 are learned by heart faster than small ones
dropout = 0.1

batch_size = 2
block_size = 256
stride = 256                    # rows side by side, as in the chapter: 18 of them, two a step
max_iters = 90
eval_interval = 9               # once an epoch
log_interval = 1
prompt = 'Every effort moves you'

optimizer = 'adamw'
learning_rate = 4e-4
min_lr = 4e-4
warmup_iters = 0
weight_decay = 0.1
grad_clip = 1.0                 # a single odd gradient would slow AdamW for dozens of steps
