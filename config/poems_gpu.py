# The poems at the size of GPT-2 (80 million parameters), for one GPU: all 310,000 poems of Tang and Song.
#
#   python data/poems.py --all
#   python train_tokenizer.py --input=data/raw/poems.jsonl --split_han --out_dir=out/poems_gpu/tokenizer
#   python pretrain.py config/poems_gpu.py
#   python sft.py --init_from=out/poems_gpu/pretrain --dataset=poems_sft --epochs=1 --batch_size=64 \
#       --block_size=512 --learning_rate=2e-3 --compile --out_dir=out/poems_gpu/sft
#
# What an H200 wrote after five minutes of this stands in the README.
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
epochs = 2.0
eval_interval = 500
learning_rate = 5e-3
dropout = 0.1
compile = True
