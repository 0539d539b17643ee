"""
Align a model with preferences: make chosen answers likelier than rejected ones (tutorial chapter II-10).

    loss = -log sigmoid( beta [ log pi(c|x)/ref(c|x) - log pi(r|x)/ref(r|x) ] )  (Rafailov et al. 2023, eq. 7)

x is the prompt, c the chosen answer, r the rejected; pi is the policy, which learns, ref the reference: the
model it starts from, which never moves. beta log pi/ref is an answer's implicit reward, and the loss asks
for a margin between the two.

    python dpo.py                                 # offline: pydoc_dpo, on top of out/sft -> out/dpo
    python dpo.py --dataset=mypairs --init_from=out/sft --beta=0.2

What the reference says of each answer is computed once, before training, and kept in the data folder; so
training holds one model, not two. A healthy run starts at loss ln 2 = 0.693 and accuracy one half, as nothing
is preferred yet; then loss falls, and margin and held-out accuracy rise together. Both rewards may sink, the
rejected one faster; a chosen reward that keeps falling is a model that forgets how to speak: raise beta, or
lower learning_rate.
"""
import copy
import functools
import hashlib
import math
import os
import sys
import time
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from configurator import (MetricsLog, StopSignal, clock, configure, data_parallel, fail, fingerprint,
                          keep_settings, learning_rate_at, load_checkpoint, make_folder, restore_rng,
                          save_checkpoint, start_run)
from model_gpt2 import GPT2
from prepare import Progress, data_folder, prepare_missing, read_meta, read_split
from sample import load_run

# the run
out_dir = 'out/dpo'             # where checkpoint, tokenizer, metrics and picture go
init_from = 'out/sft'           # the folder of the run to start from, which is the reference too, or 'resume'
max_iters = 200                 # optimizer steps
eval_interval = 50              # save and measure the held-out pairs every so many steps
eval_iters = 25                 # batches of held-out pairs to measure on, at most
log_interval = 10               # print a line every so many steps
seed = 1337                     # of the order of the data
wandb_log = False               # log to Weights & Biases too
# the data
dataset = 'pydoc_dpo'           # name in data/, or a path; pydoc_dpo is prepared when missing
batch_size = 8                  # pairs in a micro-batch
gradient_accumulation_steps = 1 # micro-batches in a step, over all ranks together
block_size = 256                # longest prompt and answer, in tokens; cut from the start of the prompt first
# the method
beta = 0.1                      # how dear it is to leave the reference: smaller strays further
length_normalised = False       # divide an answer's log-probability by its length, as chapter II-10 does
cache_reference = True          # compute the reference's log-probabilities once; False holds its model beside
# the optimizer
learning_rate = 3e-4            # highest, of AdamW
min_lr = 3e-5                   # at the end of the cosine
warmup_iters = 20               # steps of linear warmup
weight_decay = 0.0              # on matrices only
grad_clip = 1.0                 # longest gradient; 0 is no limit
# the machine
device = 'auto'                 # 'auto' takes cuda, then mps, then cpu
dtype = 'auto'                  # 'float32', 'bfloat16' or 'float16'; 'auto' is bfloat16 where that is fast
compile = False                 # torch.compile: slow to start, faster on a GPU


# ---- batches ----

@functools.lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    """The order of an epoch: a function of its arguments alone, so there is no sampler state to lose."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def step_pairs(n, seed, step, rows):
    """The pairs of a step: rows [step * rows, (step + 1) * rows) of an endless run of epochs over n pairs."""
    return [int(shuffled(n, seed, i // n)[i % n]) for i in range(step * rows, (step + 1) * rows)]


def pair_at(split, pair, block_size):
    """The ids of chosen and of rejected, and where in both the answer starts, cut to block_size + 1 tokens.

    The prompt's beginning is cut first, by the same length in both, so that they stay answers to one prompt;
    the ends of the answers only when of the prompt a single token is left.
    """
    chosen, rejected = (slice(*split.offsets[i:i + 2]) for i in (2 * pair, 2 * pair + 1))
    answer = int(split.mask[chosen].argmax())
    longest = max(chosen.stop - chosen.start, rejected.stop - rejected.start)
    cut = min(max(0, longest - (block_size + 1)), answer - 1)
    return [split.tokens[part][cut:][:block_size + 1] for part in (chosen, rejected)], answer - cut


def batch_at(split, pairs, block_size):
    """Tokens and targets of P pairs, two (2P, T) int64 tensors: chosen in even rows, rejected in odd ones, T
    that of the longest. Targets are -100, ignored, on prompts and padding."""
    cut = [pair_at(split, pair, block_size) for pair in pairs]
    length = max(len(ids) for both, _ in cut for ids in both) - 1
    x = np.zeros((2 * len(pairs), length), dtype=np.int64)
    y = np.full((2 * len(pairs), length), -100, dtype=np.int64)
    for i, (both, answer) in enumerate(cut):
        for row, ids in enumerate(both, 2 * i):
            x[row, :len(ids) - 1] = ids[:-1]
            y[row, answer - 1:len(ids) - 1] = ids[answer:]
    return torch.from_numpy(x), torch.from_numpy(y)


def check_pairs(split, name, block_size):
    """One line on a pair that block_size leaves no difference between; return the number of pairs."""
    lengths = np.diff(split.offsets)
    for i in np.flatnonzero(np.maximum(lengths[::2], lengths[1::2]) > block_size + 1).tolist():
        (chosen, rejected), _ = pair_at(split, i, block_size)
        if np.array_equal(chosen, rejected):
            fail(f"{name}, pair {i + 1}: nothing is left of its answers that differs within "
                 f"--block_size={block_size}; raise it to {max(lengths[2 * i:2 * i + 2])}")
    return len(lengths) // 2


def to_device(batch, device):
    return [t.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else t.to(device)
            for t in batch]


# ---- the loss ----

def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """The loss of each pair and the rewards of its two answers, three tensors (P,).

    chosen, rejected          (P,) log pi(answer | prompt), of the policy
    ref_chosen, ref_rejected  (P,) the same of the reference; equal to the policy's, the loss is ln 2
    Rafailov et al. 2023: the loss is eq. 7, the reward eq. 5 without the prompt's term, which cancels.
    """
    chosen_reward = beta * (chosen - ref_chosen)
    rejected_reward = beta * (rejected - ref_rejected)
    return -F.logsigmoid(chosen_reward - rejected_reward), chosen_reward, rejected_reward


NO_HEAD = torch.nn.Identity()


def hidden_states(model, wrapped, tokens, segments=None):
    """What the output head is given, (B, T) -> (B, T, C). `wrapped` is the model under compile and DDP."""
    head, model.lm_head = model.lm_head, NO_HEAD
    try:
        return wrapped(tokens, segments=segments)[0]
    finally:
        model.lm_head = head


def answer_log_probs(model, wrapped, tokens, targets, length_normalised=False):
    """log pi(answer | prompt) of each row, the sum of its tokens' log-probabilities: (B, T) -> (B,) float32.

    targets  (B, T), the token that follows each; -100 on prompts and padding, which get no logits at all: the
             head is the widest layer, and its softmax the largest tensor
    length_normalised  the mean instead of the sum
    """
    is_target = targets != -100
    logits = model.lm_head(hidden_states(model, wrapped, tokens)[is_target])        # (N, C) -> (N, V)
    log_probs = -F.cross_entropy(logits.float(), targets[is_target], reduction='none')      # (N,)
    rows = is_target.nonzero()[:, 0]
    sums = log_probs.new_zeros(len(tokens)).index_add(0, rows, log_probs)                   # (N,) -> (B,)
    return sums / is_target.sum(1) if length_normalised else sums


# ---- the reference, and the held-out pairs ----

@torch.no_grad()
def log_probs_of(model, run, split, pairs, block_size, batch_size, length_normalised, progress=None):
    """answer_log_probs of many pairs, (P, 2) float32 of chosen and rejected; the ranks share the work."""
    # pairs of about one length beside each other, so that there is little padding
    order = np.argsort(np.diff(split.offsets[::2])[pairs], kind='stable')
    order = order[run.rank::run.world_size]
    result = np.zeros((len(pairs), 2))
    for i in range(0, len(order), batch_size):
        x, y = to_device(batch_at(split, [pairs[k] for k in order[i:i + batch_size]], block_size), run.device)
        with run.autocast():
            log_probs = answer_log_probs(model, model, x, y, length_normalised)
        result[order[i:i + batch_size]] = log_probs.view(-1, 2).cpu()           # (2P,) -> (P, 2)
        if progress:
            progress.show(i / len(order))
    return np.array(run.sum(*result.ravel()), dtype=np.float32).reshape(result.shape)


def reference_log_probs(model, run, folder, name, pairs, block_size, batch_size, length_normalised):
    """log_probs_of under the reference, read from the data folder if the same was computed before."""
    split = read_split(folder, name)
    key = hashlib.sha256(repr([fingerprint(model.state_dict()), str(run.dtype), block_size, length_normalised,
                               pairs]).encode())
    for array in split:
        key.update(array)
    path = os.path.join(data_folder(folder), f'{name}_reference_{key.hexdigest()[:16]}.npy')
    if os.path.exists(path):
        return np.load(path)
    result = log_probs_of(model, run, split, pairs, block_size, batch_size, length_normalised,
                          Progress(f'reference, {name}') if run.rank == 0 else None)
    if run.rank == 0:
        with open(path + '.tmp', 'wb') as f:
            np.save(f, result)
        os.replace(path + '.tmp', path)
    run.barrier()
    return result


def held_out(policy, reference, beta):
    """Loss, rewards, margin and accuracy over (P, 2) log-probabilities. A tie is half right, and before the
    first step all are ties."""
    loss, chosen, rejected = dpo_loss(*torch.from_numpy(policy).T, *torch.from_numpy(reference).T, beta)
    margin = chosen - rejected
    numbers = dict(loss=loss, chosen_reward=chosen, rejected_reward=rejected, margin=margin,
                   accuracy=(margin > 0) + 0.5 * (margin == 0))
    return {f'val_{name}': values.mean().item() for name, values in numbers.items()}


if __name__ == '__main__':
    config = configure(globals(), beta=0)
    stop = StopSignal()
    run = start_run(device, dtype, seed)
    master = run.rank == 0

    # model: as it is loaded it is the reference, and becomes the policy
    checkpoint = load_checkpoint(out_dir) if init_from == 'resume' else None
    source = checkpoint['reference'] if checkpoint else init_from
    model, words, _ = load_run(source, run.device)
    weights = fingerprint(model.state_dict())
    if checkpoint and checkpoint['reference_fingerprint'] != weights:
        fail(f"{source} is no more the reference that {out_dir} was trained against: its weights changed")
    if block_size > model.config.context:
        fail(f"--block_size={block_size} is more than the context of {source}, {model.config.context}")

    # data
    prepare_missing(run, dataset, source if os.path.isdir(source) else 'gpt2')
    meta = read_meta(dataset, 'dpo')
    if meta['tokenizer'] != words.fingerprint:
        fail(f"{data_folder(dataset)} was tokenised otherwise than {source}: run `python prepare.py "
             f"--dataset={dataset} --tokenizer={source if os.path.isdir(source) else 'gpt2'}`"
             + (f" with --input={meta['source']}" if os.path.exists(meta['source']) else ""))
    train, val = read_split(dataset, 'train'), read_split(dataset, 'val')
    n_train, n_val = (check_pairs(split, f'{data_folder(dataset)}, {name}', block_size)
                      for split, name in ((train, 'train'), (val, 'val')))
    per_step = batch_size * gradient_accumulation_steps         # pairs of a step; the ranks share them out
    if per_step < run.world_size:
        fail(f"batch_size x gradient_accumulation_steps = {per_step} pairs, but {run.world_size} ranks")

    # reference
    val_pairs = list(range(0, n_val, math.ceil(n_val / (eval_iters * batch_size))))
    how = block_size, batch_size, length_normalised
    if cache_reference:
        ref_train = reference_log_probs(model, run, dataset, 'train', list(range(n_train)), *how)
        ref_val = reference_log_probs(model, run, dataset, 'val', val_pairs, *how)
    else:
        reference = copy.deepcopy(model).requires_grad_(False)
        ref_val = log_probs_of(model, run, val, val_pairs, *how)

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
        model.load_state_dict(checkpoint['model'])
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
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {n_train:,} pairs, {per_step} a "
              f"step: {max_iters * per_step / n_train:.1f} epochs in {max_iters:,} steps "
              f"on {run.world_size} x {run.device.type} in {str(run.dtype)[6:]}", flush=True)

    # train; the model stays in evaluation mode, without dropout, which would hide what the policy prefers
    began = time.time()
    seconds, since, eval_seconds = 0.0, 0, 0.0          # time and steps since the last line; of an evaluation
    for step in range(first_step, max_iters + 1):
        clock_start = time.time()
        pairs = step_pairs(n_train, seed, step, per_step)[run.rank::run.world_size]
        stopping, = run.sum(stop.signal > 0)            # all ranks agree on whether to stop

        due = step % eval_interval == 0 or step == max_iters
        if step > first_step and (due or stopping):
            save_checkpoint(run, out_dir, words, step=step, settings=config,
                            model_type='gpt2' if isinstance(model, GPT2) else 'minimind',
                            model_config=asdict(model.config), model=model.state_dict(),
                            optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                            reference=source, reference_fingerprint=weights)
        if stopping:
            break
        if due:
            numbers = held_out(log_probs_of(model, run, val, val_pairs, *how), ref_val, beta)
            if master:
                log.write(step=step, **numbers)
                print("step {:6,}  held-out loss {val_loss:.4f}  accuracy {val_accuracy:.1%}  margin "
                      "{val_margin:.3f} = {val_chosen_reward:.3f} - {val_rejected_reward:.3f}"
                      .format(step, **numbers), flush=True)
            eval_seconds, clock_start = time.time() - clock_start, time.time()
        if step == max_iters:
            break

        lr = learning_rate_at(step, learning_rate, min_lr, warmup_iters, max_iters)
        for group in optimizer.param_groups:
            group['lr'] = lr
        total = torch.zeros(3, device=run.device)       # of loss, chosen reward, rejected reward
        batches = [pairs[i:i + batch_size] for i in range(0, len(pairs), batch_size)]
        for i, batch in enumerate(batches):
            x, y = to_device(batch_at(train, batch, block_size), run.device)
            if run.world_size > 1:
                wrapped.require_backward_grad_sync = i == len(batches) - 1      # sum over ranks once
            with run.autocast():
                policy = answer_log_probs(model, wrapped, x, y, length_normalised)          # (2P,)
                if cache_reference:
                    ref = torch.from_numpy(ref_train[batch].ravel()).to(run.device)         # (P, 2) -> (2P,)
                else:
                    with torch.no_grad():
                        ref = answer_log_probs(reference, reference, x, y, length_normalised)
            parts = dpo_loss(policy[0::2], policy[1::2], ref[0::2], ref[1::2], beta)
            total += torch.stack([part.detach().sum() for part in parts])
            # DDP averages gradients over ranks; times world_size that is the sum which the mean asks for
            scaler.scale(parts[0].sum() * (run.world_size / per_step)).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        scaler.update()

        seconds, since = seconds + time.time() - clock_start, since + 1
        if step % log_interval == 0 or step == max_iters - 1:
            loss, chosen, rejected = (n / per_step for n in run.sum(*total.tolist()))
            if master:
                left = (max_iters - 1 - step) * seconds / since
                evals = (max_iters - 1) // eval_interval - step // eval_interval + 1
                log.write(step=step, loss=loss, chosen_reward=chosen, rejected_reward=rejected,
                          margin=chosen - rejected, lr=lr, grad_norm=norm.item(),
                          pairs_per_second=since * per_step / seconds)
                print(f"step {step:6,}/{max_iters:,}  loss {loss:.4f}  margin {chosen - rejected:.3f}  "
                      f"lr {lr:.2e}  grad norm {norm:.2f}  {since * per_step / seconds:,.1f} pairs/s  "
                      f"{clock(left + evals * eval_seconds)} left", flush=True)
            seconds, since = 0.0, 0

    if master:
        log.draw()
        if stopping:
            saved = f"saved in {out_dir}; go on with --init_from=resume" if step else "nothing to save yet"
            print(f"stopped at step {step:,}; {saved}")
        else:
            print(f"done in {clock(time.time() - began)}; the model is in {out_dir}: python sample.py "
                  f"--out_dir={out_dir} --chat")
    run.barrier()
    if run.world_size > 1:
        dist.destroy_process_group()
    sys.exit(128 + stop.signal if stopping else 0)
