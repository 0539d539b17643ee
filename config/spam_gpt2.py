# Chapter I-7: GPT-2 small with OpenAI's weights learns to tell spam, on the SMS Spam Collection.
#
#     python finetune_cls.py config/spam_gpt2.py
#     python finetune_cls.py config/spam_gpt2.py --classify="You are a winner, claim your prize"
#
# The figures are the chapter's: 747 spam, less what is repeated, and as many ham, 8 a step, five epochs of
# about 130 steps; the head, the last block and the final norm learn, by AdamW at a constant 5e-5. Data and
# weights are downloaded when missing.
out_dir = 'out/spam_gpt2'
init_from = 'gpt2'
dataset = 'data/gpt2/sms_spam'

trainable = 'last'
dropout = 0.0
batch_size = 8
max_iters = 650
eval_interval = 50

optimizer = 'adamw'
learning_rate = 5e-5
min_lr = 5e-5
warmup_iters = 0
weight_decay = 0.1
