# GPT-2 small (124,439,808 parameters) on a folder of text of your own, .txt or .jsonl:
#
#     python prepare.py --input=FOLDER --dataset=mytext --tokenizer=gpt2
#     python pretrain.py config/gpt2_124m.py --dataset=mytext
#     torchrun --nproc_per_node=8 pretrain.py config/gpt2_124m.py --dataset=mytext
#
# A step is 480 rows x 1,024 tokens, about half a million, on one GPU or eight: gradient_accumulation_steps
# counts the micro-batches of all ranks. 20,000 steps read ten billion tokens. Where memory is short, take a
# smaller batch_size and more gradient_accumulation_steps.
out_dir = 'out/gpt2_124m'
tokenizer = 'gpt2'

model = 'gpt2'
n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

batch_size = 12
gradient_accumulation_steps = 40
max_iters = 20_000
eval_interval = 1000
prompt = 'The'

optimizer = 'adamw'
learning_rate = 6e-4
warmup_iters = 700
weight_decay = 0.1
grad_clip = 1.0
dtype = 'bfloat16'
compile = True
