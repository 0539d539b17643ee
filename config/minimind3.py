# MiniMind-3, 63,912,192 parameters: a Qwen3.
#
#     python prepare.py --input=pretrain_t2t_mini.jsonl --dataset=minimind --tokenizer=FOLDER
#     python pretrain.py config/minimind3.py --dataset=minimind
#
# Data: MiniMind's own pretrain_t2t_mini.jsonl, or any text; FOLDER holds its tokenizer (its model/ folder),
# or yours. A step is 256 rows x 768 tokens, 4,000 steps read 0.8 billion tokens. Meant for one GPU of 24
# GB; not timed here. Where memory is short, take a smaller batch_size and more gradient_accumulation_steps.
out_dir = 'out/minimind3'

n_layer = 8
n_head = 8
n_kv_head = 4
n_embd = 768
intermediate_size = 2432        # pi x 768, up to a multiple of 64
qk_norm = True
block_size = 768
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
