# A GPT-2 of 10.7 million parameters writes Shakespeare, character by character.
#
#     python pretrain.py config/shakespeare_char.py
#     python sample.py --out_dir=out/shakespeare_char --start="ROMEO:"
#
# The text, data/raw/shakespeare.txt of 1.1 MB, is downloaded when it is not there. As in nanoGPT each
# character is a token and the last tenth of the text is held out. nanoGPT reports a held-out loss of 1.47
# nats within 5,000 steps, three minutes on an A100; not timed here. The training loss falls on, which is
# overfitting, so the checkpoint of the lowest held-out loss is kept. On a CPU take
#     --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --max_iters=2000 --dropout=0
out_dir = 'out/shakespeare_char'
dataset = 'shakespeare_char'
prompt = '\n'

model = 'gpt2'
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
dropout = 0.2
bias = False

batch_size = 64
max_iters = 5000
eval_interval = 250
always_save_checkpoint = False

optimizer = 'adamw'
learning_rate = 1e-3
beta2 = 0.99
warmup_iters = 100
