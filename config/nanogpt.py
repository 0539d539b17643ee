# What nanoGPT's train.py starts from: a model of 124 million parameters on OpenWebText.
#
#     python pretrain.py THEIR_FILE.py
#
# A config file of nanoGPT leaves most of it open, and is read on top of this. It is known by a setting as
# wandb_project or lr_decay_iters, which few runs here need, and by naming neither a model nor an optimizer.
import torch

model = 'gpt2'
optimizer = 'adamw'
prompt = '\n'

out_dir = 'out'
eval_interval = 2000
log_interval = 1
eval_iters = 200
wandb_project = 'owt'
wandb_run_name = 'gpt2'

dataset = 'openwebtext'
gradient_accumulation_steps = 40
batch_size = 12
block_size = 1024

n_layer = 12
n_head = 12
n_embd = 768
dropout = 0.0
bias = False

learning_rate = 6e-4
max_iters = 600_000
lr_decay_iters = 600_000
min_lr = 6e-5
warmup_iters = 2000
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0
compile = torch.cuda.is_available()     # nanoGPT's True is for a GPU
