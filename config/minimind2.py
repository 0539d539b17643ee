# MiniMind2, 104,030,976 parameters (chapter II-7): a Llama.
#
#     python prepare.py --input=pretrain_hq.jsonl --dataset=minimind --tokenizer=FOLDER
#     python pretrain.py config/minimind2.py --dataset=minimind
#
# Data: MiniMind's own pretrain_hq.jsonl, or any text; FOLDER holds its tokenizer (its model/ folder), or
# yours. A step is 256 rows x 512 tokens, 4,000 steps read 0.5 billion tokens. Meant for one GPU of 24 GB;
# not timed here. Where memory is short, take a smaller batch_size and more gradient_accumulation_steps.
out_dir = 'out/minimind2'

n_layer = 16
n_head = 8
n_kv_head = 2
n_embd = 768
qk_norm = False
block_size = 512
context = 32768

batch_size = 32
gradient_accumulation_steps = 8
max_iters = 4_000
eval_interval = 1000
warmup_iters = 300
prompt = '大模型'

optimizer = 'adamw'
learning_rate = 5e-4
dtype = 'bfloat16'
