"""
Instruction tuning: the loss of pretraining, on conversations, where only answers are targets (tutorial
chapters I-8 and II-9; Ouyang et al. 2022, section 3.1, step 1).

    loss = -1/N  sum over N answer tokens of  log p(token | conversation before it)

The token that ends an answer is a target too: by it the model learns to stop. MiniMind's tokenizer has the
special tokens of ChatML, GPT-2's has not and takes the Alpaca layout; prepare.py writes and masks either.

    python sft.py                                   # after pretrain.py: on pydoc_sft, in minutes -> out/sft
    python sft.py --debug_mask                      # which tokens are targets, in the first conversation
    python sft.py --init_from=gpt2 --dataset=data/gpt2/instruction --batch_size=8 --learning_rate=5e-5
    python sample.py --out_dir=out/sft --chat

Conversations are short and of every length, so a row for each is mostly padding. --layout says what to do:
    packed     several conversations share a row; attention stays inside each, and positions start anew
    bucketed   a row for each, in batches of like length, padded to the longest of the batch
    padded     a row for each, padded to block_size
The loss is the same, token by token; what differs is how much of the work goes into padding. (Experts alone
are balanced over a row, whatever it holds.)
"""
import json
import math
import os
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.distributed as dist

from configurator import (MetricsLog, StopSignal, clock, configure, data_parallel, fail, keep_settings,
                          learning_rate_at, make_folder, restore_rng, save_checkpoint, start_run)
from model_gpt2 import GPT2
from prepare import data_folder, prepare_missing, print_mask, read_meta, read_split
from sample import generate, left_pad, load_run, stop_ids

# the run
out_dir = 'out/sft'             # where checkpoint, tokenizer, metrics, picture and report go
init_from = 'out/pretrain'      # 'resume' (go on in out_dir), a run's or Hugging Face folder, or 'gpt2', ...
max_iters = 200                 # optimizer steps
eval_interval = 50              # save, measure the held-out loss and print an answer every so many steps
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
debug_mask = False              # print the first conversation, token by token with its mask, and stop
# the model: it keeps its shape
dropout = 0.0                   # share of activations dropped while training
# the optimizer
learning_rate = 1e-3            # highest, of AdamW
min_lr = 1e-4                   # at the end of the cosine
warmup_iters = 10               # steps of linear warmup
weight_decay = 0.1              # on matrices only
grad_clip = 1.0                 # longest gradient; 0 is no limit
# the machine
device = 'auto'                 # 'auto' takes cuda, then mps, then cpu
dtype = 'auto'                  # 'float32', 'bfloat16' or 'float16'; 'auto' is bfloat16 where that is fast
compile = False                 # torch.compile: slow to start, faster on a GPU


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
    """The rows of a split, each a list of conversations, in an order that is a function of (seed, step):
    there is no sampler state to lose."""

    def __init__(self, split, docs, block_size, layout, seed=0, per_step=1):
        self.split, self.block_size, self.layout = split, block_size, layout
        self.seed, self.per_step, self.epoch = seed, per_step, None
        docs = np.random.default_rng(seed).permutation(docs)            # so that strangers share a row
        self.lengths = np.minimum(np.diff(split.offsets) - 1, block_size)       # inputs of each conversation
        if layout == 'packed':
            self.rows = [docs[row] for row in pack(self.lengths[docs], block_size)]
        else:
            self.rows = [[doc] for doc in docs]

    def order(self, epoch):
        """A permutation of the rows; in buckets, of steps that each have rows of like length."""
        if epoch != self.epoch:
            rng, n = np.random.default_rng([self.seed, epoch]), len(self.rows)
            self.epoch, self.permutation = epoch, rng.permutation(n)
            if self.layout == 'bucketed':
                # a little noise, so that a row meets others in the next epoch
                like = np.argsort(self.lengths[[row[0] for row in self.rows]] * rng.uniform(1, 1.1, n))
                whole = n - n % self.per_step
                steps = rng.permutation(like[:whole].reshape(-1, self.per_step))
                self.permutation = np.concatenate([steps.flatten(), like[whole:]])
        return self.permutation

    def of_step(self, step):
        """The rows of a step: the next per_step of an endless run of epochs."""
        n = len(self.rows)
        return [self.rows[self.order(i // n)[i % n]]
                for i in range(step * self.per_step, (step + 1) * self.per_step)]

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


def to_device(batch, device):
    return [t if t is None else t.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else
            t.to(device) for t in batch]


# ---- held-out loss and report ----

@torch.no_grad()
def held_out_loss(model, run, rows, batch_size, eval_iters):
    """Mean nats per held-out answer token, over at most eval_iters batches; ranks share the work."""
    mine = rows.rows[:eval_iters * batch_size][run.rank::run.world_size]
    model.eval()
    total = count = 0
    for i in range(0, len(mine), batch_size):
        x, y, segments = to_device(rows.batch(mine[i:i + batch_size]), run.device)
        with run.autocast():
            loss = model(x, y, segments=segments)[1]
        n = (y != -100).sum()
        total, count = total + loss.item() * n.item(), count + n.item()
    model.train()
    total, count = run.sum(total, count)
    return total / count


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


@torch.no_grad()
def answers(model, tokenizer, prompts, max_new_tokens, batch_size=16):
    """Greedy answers to prompts (id lists of any length): [(text, whether it ended by itself), ...]"""
    device, training, results = next(model.parameters()).device, model.training, []
    model.eval()
    for i in range(0, len(prompts), batch_size):
        tokens, padding = left_pad(prompts[i:i + batch_size], device)
        new = list(generate(model, tokens, max_new_tokens, stop_ids(tokenizer), padding=padding,
                            temperature=0, vocab_size=tokenizer.vocab_size))
        for row in torch.stack(new, dim=1).tolist() if new else [[]] * len(tokens):
            ends = [j for j, token in enumerate(row) if token in stop_ids(tokenizer)]
            results.append((tokenizer.decode(row[:ends[0]] if ends else row), bool(ends)))
    model.train(training)
    return results


def exact_match(expected, answer):
    """Whether two answers say the same but for case and white space. None where that cannot be checked, as
    free text may be right in other words: checked is what <answer></answer> holds, else up to eight words."""
    if '<answer>' in expected:
        expected, answer = (text.rpartition('<answer>')[2].partition('</answer>')[0]
                            if '<answer>' in text else '' for text in (expected, answer))
    elif len(expected.split()) > 8:
        return None
    return expected.casefold().split() == answer.casefold().split()


def write_report(path, model, tokenizer, split, docs, max_new_tokens):
    """Answer held-out conversations; write prompt, expected and generated answer to a .json file, print some
    of them, and return a line that sums it up."""
    pairs = [(prompt, expected) for prompt, expected in last_answers(split, docs)
             if len(prompt) + max_new_tokens <= model.config.context]
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
    config = configure(globals(), layout=('packed', 'bucketed', 'padded'), report_size=0, max_new_tokens=1)
    stop = StopSignal()
    run = start_run(device, dtype, seed)
    master = run.rank == 0

    # model
    source = out_dir if init_from == 'resume' else init_from
    model, words, checkpoint = load_run(source)
    if block_size > model.config.context:
        fail(f"--block_size={block_size} is more than the context of {source}, {model.config.context}")
    weights = model.state_dict()
    model = type(model)(replace(model.config, dropout=dropout))
    model.load_state_dict(weights)
    model.to(run.device)

    # data
    prepare_missing(run, dataset, source if os.path.isdir(source) else 'gpt2')
    meta = read_meta(dataset, 'sft')
    if meta['tokenizer'] != words.fingerprint:
        fail(f"{data_folder(dataset)} was tokenised otherwise than {source}: run `python prepare.py "
             f"--dataset={dataset} --tokenizer={source if os.path.isdir(source) else 'gpt2'}`"
             + (f" with --input={meta['source']}" if os.path.exists(meta['source']) else ""))
    train, val = read_split(dataset, 'train'), read_split(dataset, 'val')
    if debug_mask:
        print_mask(words, train.tokens[:train.offsets[1]], train.mask[:train.offsets[1]])
        sys.exit()
    per_step = batch_size * gradient_accumulation_steps         # rows of a step; the ranks share them out
    if per_step < run.world_size:
        fail(f"batch_size x gradient_accumulation_steps = {per_step} rows, but {run.world_size} ranks")
    docs, n_cut, n_lost = learnable(train, block_size)
    val_docs = learnable(val, block_size)[0]
    if not len(docs) or not len(val_docs):
        fail(f"{data_folder(dataset)}: no answer is left within --block_size={block_size} tokens; raise it")
    rows = Rows(train, docs, block_size, layout, seed, per_step)
    val_rows = Rows(val, val_docs, block_size, layout)

    # optimizer
    named = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([dict(params=[p for p in named if p.dim() >= 2], weight_decay=weight_decay),
                                   dict(params=[p for p in named if p.dim() < 2], weight_decay=0.0)],
                                  lr=learning_rate, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    first_step = 0
    if init_from == 'resume':
        keep_settings(config, checkpoint, 'weight_decay')
        first_step = checkpoint['step']
        optimizer.load_state_dict(checkpoint['optimizer'])
        scaler.load_state_dict(checkpoint['scaler'])
        restore_rng(run, checkpoint['rng'], first_step)
        if first_step >= max_iters:
            fail(f"{out_dir} is at step {first_step} of max_iters={max_iters}: raise --max_iters to go on")
    compiled = torch.compile(model) if compile else model
    wrapped = compiled
    if run.world_size > 1:
        wrapped = data_parallel(compiled)

    # say what is about to happen
    log = None
    if master:
        make_folder(out_dir)
        log = MetricsLog(out_dir, first_step, wandb_log, config)
        fill = rows.lengths[docs].sum() / len(rows.rows) / block_size
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(docs):,} conversations in "
              f"{len(rows.rows):,} rows {layout} ({100 * fill:.0f}% of block_size in use): "
              f"{max_iters * per_step / len(rows.rows):.1f} epochs in {max_iters:,} steps "
              f"on {run.world_size} x {run.device.type} in {str(run.dtype)[6:]}", flush=True)
        if n_cut:
            left_out = meta['train']['documents'] - len(docs)
            print(f"{n_cut:,} conversations are cut to block_size={block_size}: {n_lost:,} answers are lost "
                  f"whole, {left_out:,} conversations left out, as nothing of an answer remains")

    # train
    began = time.time()
    seconds, since, useful, eval_seconds = 0.0, 0, 0, 0.0       # since the last line; of an evaluation
    wrapped.train()
    for step in range(first_step, max_iters + 1):
        clock_start = time.time()
        mine = rows.of_step(step)
        useful += sum(rows.lengths[row].sum().item() for row in mine)
        mine = mine[run.rank::run.world_size]
        batches = [rows.batch(mine[i:i + batch_size]) for i in range(0, len(mine), batch_size)]
        # all ranks agree on the number of targets, and on whether to stop
        n_targets, stopping = run.sum(sum((y != -100).sum().item() for _, y, _ in batches), stop.signal > 0)

        due = step % eval_interval == 0 or step == max_iters
        if step > first_step and (due or stopping):
            save_checkpoint(run, out_dir, words, step=step, settings=config,
                            model_type='gpt2' if isinstance(model, GPT2) else 'minimind',
                            model_config=asdict(model.config), model=model.state_dict(),
                            optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        if stopping:
            break
        if due:
            loss = held_out_loss(compiled, run, val_rows, batch_size, eval_iters)
            if master:
                log.write(step=step, val_loss=loss)
                prompt, expected = last_answers(val, val_docs[:1])[0]
                text = answers(model, words, [prompt[-(model.config.context // 2):]], max_new_tokens)[0][0]
                print(f"step {step:6,}  held-out loss {loss:.4f}\n    | "
                      + (words.decode(prompt) + text).replace('\n', '\n    | '), flush=True)
            eval_seconds, clock_start = time.time() - clock_start, time.time()
        if step == max_iters:
            break

        lr = learning_rate_at(step, learning_rate, min_lr, warmup_iters, max_iters)
        for group in optimizer.param_groups:
            group['lr'] = lr
        total = torch.zeros((), device=run.device)
        for i, batch in enumerate(batches):
            x, y, segments = to_device(batch, run.device)
            if run.world_size > 1:
                wrapped.require_backward_grad_sync = i == len(batches) - 1      # sum over ranks once
            with run.autocast():
                loss = wrapped(x, y, segments=segments)[1] * (y != -100).sum()  # mean -> sum over the targets
            # to log: without what a mixture of experts adds to it, as the held-out loss is
            total += loss.detach() - getattr(model, 'aux_loss', 0.0) * (y != -100).sum()
            # DDP averages gradients over ranks; times world_size that is the sum which the loss asks for
            scaler.scale(loss * (run.world_size / max(1, n_targets))).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        scaler.update()

        seconds, since = seconds + time.time() - clock_start, since + 1
        if step % log_interval == 0 or step == max_iters - 1:
            loss = run.sum(total.item())[0] / max(1, n_targets)
            if master:
                left = (max_iters - 1 - step) * seconds / since
                evals = (max_iters - 1) // eval_interval - step // eval_interval + 1
                log.write(step=step, loss=loss, lr=lr, grad_norm=norm.item(),
                          tokens_per_second=useful / seconds)
                print(f"step {step:6,}/{max_iters:,}  loss {loss:.4f}  lr {lr:.2e}  grad norm {norm:.2f}  "
                      f"{useful / seconds:,.0f} tokens/s less padding  "
                      f"{clock(left + evals * eval_seconds)} left", flush=True)
            seconds, since, useful = 0.0, 0, 0

    if master:
        log.draw()
        if stopping:
            saved = f"saved in {out_dir}; go on with --init_from=resume" if step else "nothing to save yet"
            print(f"stopped at step {step:,}; {saved}")
        else:
            if report_size:
                some = val_docs[::math.ceil(len(val_docs) / report_size)]
                path = os.path.join(out_dir, 'report.json')
                print(write_report(path, model, words, val, some, max_new_tokens))
            print(f"done in {clock(time.time() - began)}; the model is in {out_dir}: python sample.py "
                  f"--out_dir={out_dir} --chat")
    run.barrier()
    if run.world_size > 1:
        dist.destroy_process_group()
    sys.exit(128 + stop.signal if stopping else 0)
