# MiniMind-3-MoE, 198,416,640 parameters, 4 experts of which a token visits 1: a Qwen3-MoE.
#
#     python prepare.py --input=pretrain_t2t_mini.jsonl --dataset=minimind --tokenizer=FOLDER
#     python pretrain.py config/minimind3_moe.py --dataset=minimind
#
# Data: MiniMind's own pretrain_t2t_mini.jsonl, or any text; FOLDER holds its tokenizer (its model/ folder),
# or yours. A step is 256 rows x 768 tokens, 4,000 steps read 0.8 billion tokens. Meant for one GPU of 24
# GB; not timed here. Where memory is short, take a smaller batch_size and more gradient_accumulation_steps.
out_dir = 'out/minimind3_moe'

n_layer = 8
n_head = 8
n_kv_head = 4
n_embd = 768
intermediate_size = 2432        # pi x 768, up to a multiple of 64
qk_norm = True
block_size = 768
context = 32768
use_moe = True
num_experts = 4
num_experts_per_tok = 1
moe_intermediate_size = 2432
norm_topk_prob = True           # as MiniMind-3 has it: the weight of the one expert is always 1
router_aux_loss_coef = 5e-4
seq_aux = False

batch_size = 32
gradient_accumulation_steps = 8
max_iters = 4_000
eval_interval = 1000
warmup_iters = 300
prompt = '大模型'

optimizer = 'adamw'
learning_rate = 5e-4
dtype = 'bfloat16'
