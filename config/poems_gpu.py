# The poems at the size of GPT-2, for one GPU: all 310,000 poems of Tang and Song. Not run yet: no GPU was at
# hand, so its figures are open.
#
#   python data/poems.py --all
#   python train_tokenizer.py --input=data/raw/poems.jsonl --split_han --out_dir=out/poems_gpu/tokenizer
#   python pretrain.py config/poems_gpu.py
#   python sft.py --init_from=out/poems_gpu/pretrain --dataset=poems_sft --epochs=2 --block_size=512
out_dir = 'out/poems_gpu/pretrain'
dataset = 'poems'
tokenizer = 'out/poems_gpu/tokenizer'
prompt = '《'
n_layer = 12
n_head = 12
n_kv_head = 4
n_embd = 768
block_size = 512
batch_size = 64
gradient_accumulation_steps = 1
epochs = 3.0
eval_interval = 500
dropout = 0.1
compile = True
