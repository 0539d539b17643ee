"""
Instruction tuning: the loss of pretraining, on conversations, where only answers are targets (tutorial
chapters I-8 and II-9; Ouyang et al. 2022, section 3.1, step 1).

    loss = -1/N  sum over N answer tokens of  log p(token | conversation before it)

The token that ends an answer is a target too: by it the model learns to stop. MiniMind's tokenizer has the
special tokens of ChatML, GPT-2's has not and takes the Alpaca layout; prepare.py writes and masks either.

    python sft.py                                   # after pretrain.py: on pydoc_sft, in minutes -> out/sft
    python sft.py --debug_mask                      # which tokens are targets, in the first conversation
    python sft.py --loss_on=all                     # prompts are targets too, as in chapter I-8
    python sft.py --init_from=gpt2 --dataset=data/gpt2/instruction
    python sample.py --out_dir=out/sft --chat

Conversations are short and of every length, so a row for each is mostly padding. --layout says what to do:
    packed     several conversations share a row; attention stays inside each, and positions start anew
    bucketed   a row for each, in batches of like length, padded to the longest of the batch
    padded     a row for each, padded to block_size
The loss is the same, token by token; what differs is how much of the work goes into padding. (Only experts
are balanced over a row, whatever it holds.)

The loop comes from pretrain.py. lora.py and distill.py take their rows and their report from here.
"""
import json
import math
import os
import sys
from shlex import quote

from configurator import configure, fail, one_of, start_run

import numpy as np
import torch

from prepare import data_folder, open_data, print_mask
from pretrain import Training, mean_loss
from sample import answers, load_start

# the run
out_dir = 'out/sft'             # where checkpoint, tokenizer, metrics, picture and report go
init_from = 'out/pretrain'      # 'resume' (go on in out_dir), a run's or Hugging Face folder, or 'gpt2', ...
max_iters = 200                 # optimizer steps
epochs = 0.0                    # passes over the data instead of max_iters; 0 takes max_iters
eval_interval = 50              # save, measure the held-out loss and print an answer every so many steps
always_save_checkpoint = True   # False: keep the checkpoint of the lowest held-out loss
eval_iters = 50                 # batches of held-out conversations to measure on, at most
log_interval = 10               # print a line every so many steps
report_size = 48                # held-out conversations to answer for report.json, at the end
max_new_tokens = 80             # longest answer in it, in tokens
seed = 1337                     # of the order of the data, and dropout
wandb_log = False               # log to Weights & Biases too
# the data
dataset = 'pydoc_sft'           # name in data/, or a path; a built-in one is prepared when missing
layout = 'packed'               # 'packed', 'bucketed' or 'padded', see above
batch_size = 16                 # rows in a micro-batch
gradient_accumulation_steps = 1 # micro-batches in a step, over all ranks together
block_size = 256                # tokens in a row; what is longer is cut
loss_on = 'answers'             # targets: 'answers', or 'all' tokens of a conversation, as in chapter I-8
debug_mask = False              # print the first conversation, token by token with its mask, and stop
# the model: it keeps its shape
yarn_factor = 1.0               # minimind: read texts so many times longer than before, by YaRN
dropout = 0.0                   # share of activations dropped while training
# the optimizer
optimizer = 'muon'              # 'muon' for matrices and AdamW for the rest, or 'adamw' for all
learning_rate = 3e-3            # highest; with AdamW alone 1e-3 is better
min_lr = -1.0                   # at the end of the cosine; -1 is a tenth of learning_rate
warmup_iters = 10               # steps of linear warmup
weight_decay = 0.1              # on matrices only
grad_clip = 1.0                 # longest gradient; 0 is no limit
# the machine
device = 'auto'                 # 'auto' takes cuda, then mps, then cpu
dtype = 'auto'                  # 'float32', 'bfloat16' or 'float16'; 'auto' is bfloat16 where that is fast
compile = False                 # torch.compile: slow to start, faster on a GPU


BUCKET = 64                     # rows of like length that are read one after another


# ---- batches ----

def learnable(split, block_size):
    """(numbers of the conversations that have a target once cut to block_size, how many are cut, how many
    answers that loses whole)."""
    lengths = np.diff(split.offsets)
    keep, lost = np.ones(len(lengths), dtype=bool), 0
    long = np.flatnonzero(lengths > block_size + 1)
    for doc in long:
        mask = split.mask[split.offsets[doc]:split.offsets[doc + 1]]
        lost += int((mask[block_size + 1:] > mask[block_size:-1]).sum())    # answers that begin behind it
        keep[doc] = mask[1:block_size + 1].any()
    return np.flatnonzero(keep), len(long), lost


def pack(lengths, block_size, open_rows=64):
    """Lay documents of these lengths into rows of block_size: a list of lists of their indices.

    Each goes into the fullest row that has room for it. Only so many rows are open at a time, which keeps
    this linear; the fullest is closed for a new one.
    """
    closed, rows = [], []                       # of an open row: [room left, documents]
    for i, length in enumerate(lengths):
        fits = [row for row in rows if row[0] >= length]
        if fits:
            row = min(fits, key=lambda row: row[0])
        else:
            if len(rows) == open_rows:
                closed.append(rows.pop(rows.index(min(rows, key=lambda row: row[0]))))
            row = [block_size, []]
            rows.append(row)
        row[0] -= length
        row[1].append(i)
    return [docs for _, docs in closed + rows]


class Rows:
    """The rows of a split, each a list of conversations, in an order that is a function of the seed."""

    def __init__(self, split, docs, block_size, layout, seed=0):
        self.split, self.block_size, self.layout = split, block_size, layout
        self.seed, self.epoch = seed, None
        docs = np.random.default_rng(seed).permutation(docs)            # neighbours in the file share no row
        self.lengths = np.minimum(np.diff(split.offsets) - 1, block_size)       # inputs of each conversation
        if layout == 'packed':
            self.rows = [docs[row] for row in pack(self.lengths[docs], block_size)]
        else:
            self.rows = [[doc] for doc in docs]

    def order(self, epoch):
        """A permutation of the rows; in buckets, of groups of BUCKET rows of like length."""
        if epoch != self.epoch:
            rng, n = np.random.default_rng([self.seed, epoch]), len(self.rows)
            self.epoch, self.permutation = epoch, rng.permutation(n)
            if self.layout == 'bucketed':
                # a little noise, so that a row meets others in the next epoch
                like = np.argsort(self.lengths[[row[0] for row in self.rows]] * rng.uniform(1, 1.1, n))
                groups = [like[i:i + BUCKET] for i in range(0, n, BUCKET)]
                self.permutation = np.concatenate([groups[i] for i in rng.permutation(len(groups))])
        return self.permutation

    def read(self, position, n):
        """The next n rows of an endless run of epochs, when `position` rows are read."""
        return [self.rows[self.order(i // len(self.rows))[i % len(self.rows)]]
                for i in range(position, position + n)]

    def tokens(self, rows):
        """How many inputs some rows have, padding not counted."""
        return sum(self.lengths[row].sum().item() for row in rows)

    def batch(self, rows):
        """Tokens, targets and segments of some rows, (B, T) int64 each; unshared rows have no segments.

        T is block_size, or in buckets the longest row. Targets are -100, ignored, where the mask is 0 and in
        the padding, which is a segment of its own.
        """
        split = self.split
        T = max(self.lengths[row].sum() for row in rows) if self.layout == 'bucketed' else self.block_size
        x = np.zeros((len(rows), T), dtype=np.int64)
        y = np.full((len(rows), T), -100, dtype=np.int64)
        segments = np.zeros((len(rows), T), dtype=np.int64)
        for i, row in enumerate(rows):
            at = 0
            for number, doc in enumerate(row):
                start, n = split.offsets[doc], self.lengths[doc]
                tokens = split.tokens[start:start + n + 1].astype(np.int64)
                x[i, at:at + n] = tokens[:-1]
                y[i, at:at + n] = np.where(split.mask[start + 1:start + n + 1], tokens[1:], -100)
                segments[i, at:at + n] = number
                at += n
            segments[i, at:] = len(row)
        segments = torch.from_numpy(segments) if self.layout == 'packed' else None
        return torch.from_numpy(x), torch.from_numpy(y), segments


def open_rows(run, config, train, val):
    """(the Rows to train on; those of held-out loss; the numbers of the held-out conversations; the rows in
    words). Says what block_size cuts, and refuses data of which it leaves no answer."""
    block_size, layout = config['block_size'], config['layout']
    docs, n_cut, n_lost = learnable(train, block_size)
    val_docs = learnable(val, block_size)[0]
    if not len(docs) or not len(val_docs):
        fail(f"{data_folder(config['dataset'])}: no answer is left within --block_size={block_size} tokens; "
             f"raise it")
    rows = Rows(train, docs, block_size, layout, config['seed'])
    if n_cut and run.rank == 0:
        left_out = len(train.offsets) - 1 - len(docs)
        print(f"{n_cut:,} conversations are cut to block_size={block_size}: {n_lost:,} answers are lost "
              f"whole, {left_out:,} conversations left out, as nothing of an answer remains")
    fill = rows.tokens([docs]) / len(rows.rows) / block_size
    what = (f"{len(docs):,} conversations in {len(rows.rows):,} rows {layout} ({fill:.0%} of block_size in "
            f"use)")
    return rows, Rows(val, val_docs, block_size, layout), val_docs, what


# ---- held-out loss and report ----

def held_out_loss(model, run, rows, batch_size, eval_iters):
    """Mean nats per held-out answer token, over at most eval_iters batches; ranks share the work."""
    return mean_loss(model, run, rows.rows[:eval_iters * batch_size], rows.batch, batch_size)


def last_answers(split, docs):
    """[(ids up to the last answer, ids of that answer with the token that ends it), ...]"""
    pairs = []
    for doc in docs:
        start, end = split.offsets[doc:doc + 2]
        mask = split.mask[start:end].tolist()
        stop = len(mask) - mask[::-1].index(1)                  # behind the last target
        begin = stop - (mask[:stop][::-1] + [0]).index(0)
        ids = split.tokens[start:end].tolist()
        pairs.append((ids[:begin], ids[begin:stop]))
    return pairs


def spread(docs, size):
    """At most `size` of the documents, evenly spread."""
    return docs[::math.ceil(len(docs) / size)]


def exact_match(expected, answer):
    """Whether two answers say the same but for case and white space. None where that cannot be checked, as
    free text may be right in other words: checked is what <answer></answer> holds, else up to eight words."""
    if '<answer>' in expected:
        expected, answer = (text.rpartition('<answer>')[2].partition('</answer>')[0]
                            if '<answer>' in text else '' for text in (expected, answer))
    elif len(expected.split()) > 8:
        return None
    return expected.casefold().split() == answer.casefold().split()


def write_report(out_dir, model, tokenizer, split, docs, size, max_new_tokens):
    """Answer `size` held-out conversations; write prompt, expected and generated answer to report.json, print
    some of them, and return a line that sums it up."""
    path = os.path.join(out_dir, 'report.json')
    asked = last_answers(split, spread(docs, size))
    pairs = [(prompt, expected) for prompt, expected in asked
             if len(prompt) + max_new_tokens <= model.config.context]
    if len(pairs) < len(asked):
        print(f"{len(asked) - len(pairs)} of {len(asked)} questions are left out of the report: with an "
              f"answer of max_new_tokens={max_new_tokens} they exceed the context of {model.config.context}")
    given = answers(model, tokenizer, [prompt for prompt, _ in pairs], max_new_tokens)
    report = []
    for (prompt, expected), (text, stopped) in zip(pairs, given):
        expected = tokenizer.decode(expected[:-1])
        report.append(dict(prompt=tokenizer.decode(prompt), expected=expected, answer=text, stopped=stopped,
                           exact_match=exact_match(expected, text)))
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(report, f, ensure_ascii=False, indent=2)
    for entry in report[:6]:
        for name in ('prompt', 'expected', 'answer'):
            text = entry[name].replace('\n', ' ')
            print(f"{name:8} | {'...' + text[-90:] if name == 'prompt' and len(text) > 90 else text[:93]}")
        print("---------+")
    checked = [entry['exact_match'] for entry in report if entry['exact_match'] is not None]
    stopped = sum(entry['stopped'] for entry in report)
    return (f"{len(report)} held-out answers: {stopped} ended by themselves, {sum(checked)} of "
            f"{len(checked)} checkable ones match exactly; all are in {path}")


if __name__ == '__main__':
    config = configure(globals(), loss_on=one_of('answers', 'all'))
    run = start_run(device, dtype, seed)
    model, tokenizer, checkpoint = load_start(run, config)
    meta, train, val = open_data(run, dataset, 'sft', tokenizer)
    targets = train.mask if loss_on == 'answers' else np.broadcast_to(np.uint8(1), train.mask.shape)
    if debug_mask:
        end = train.offsets[1]
        print_mask(tokenizer, train.tokens[:end], [0, *targets[1:end]])         # nothing predicts the first
        sys.exit()
    rows, val_rows, val_docs, what = open_rows(run, config, train, val)
    rows.split = train._replace(mask=targets)               # the same rows, whatever the loss is on
    training = Training(run, config, model, tokenizer, len(rows.rows), what, checkpoint)
    if loss_on == 'all':
        training.say("loss is over all tokens of a conversation; held-out loss is over its answers alone, as "
                     "with --loss_on=answers, to compare the two")
    prompt, _ = last_answers(val, val_docs[:1])[0]

    model.train()
    for _ in training:
        if training.due:
            loss = held_out_loss(model, run, val_rows, batch_size, eval_iters)
            text = answers(model, tokenizer, [prompt[-(model.config.context // 2):]], max_new_tokens)[0][0]
            text = (tokenizer.decode(prompt) + text).replace('\n', '\n    | ')
            training.evaluated(f"held-out loss {loss:.4f}\n    | {text}", val_loss=loss)
        step_rows = rows.read(training.position, training.rows)
        for x, y, segments in training.micro_batches(step_rows, rows.batch):
            with run.autocast():
                loss = model(x, y, segments=segments)[1]
                aux = model.auxiliary_loss(y != -100)
            n = (y != -100).sum()                                           # a mean times n is a sum
            training.backward((loss + aux) * n, loss=loss * n)
        training.update(tokens=rows.tokens(step_rows))
    if training.finished and report_size:
        print(write_report(out_dir, model, tokenizer, val, val_docs, report_size, max_new_tokens))
    training.close(f"the model is in {out_dir}: python sample.py --out_dir={quote(out_dir)} --chat")
