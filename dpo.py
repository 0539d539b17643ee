"""
Align a model with preferences: make chosen answers likelier than rejected ones (tutorial chapter II-10).

    loss = -log sigmoid( beta [ log pi(c|x)/ref(c|x) - log pi(r|x)/ref(r|x) ] )  (Rafailov et al. 2023, eq. 7)

x is the prompt, c the chosen answer, r the rejected one. pi is the policy, which learns; ref the reference:
the model it starts from, which never moves. beta log pi/ref is the implicit reward of an answer, and the loss
asks for a margin between the two rewards.

    python dpo.py                                 # offline: pydoc_dpo, on top of out/sft -> out/dpo
    python dpo.py --dataset=mypairs --init_from=out/sft --beta=0.2

What the reference says of each answer is computed once, before training, and kept in the data folder; so
training holds one model, not two. A healthy run starts at loss ln 2 = 0.693 and accuracy one half, as nothing
is preferred yet; then loss falls, and margin and held-out accuracy rise together. Both rewards may sink, the
rejected one faster; a chosen reward that keeps falling is a model that forgets how to speak: raise beta, or
lower learning_rate. The loop comes from pretrain.py.
"""
import copy
import hashlib
import math
import os
from shlex import quote

from configurator import above, configure, fail, fingerprint, load_checkpoint, replacing, start_run

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from prepare import Progress, data_folder, open_data, read_split
from pretrain import Training, read_rows, target_positions, to_device
from sample import evaluating, given_by, load_run, model_of, parse_given

# the run
out_dir = 'out/dpo'             # where checkpoint, tokenizer, metrics and picture go
init_from = 'out/sft'           # the folder of the run to start from, which is the reference too, or 'resume'
max_iters = 200                 # optimizer steps
epochs = 0.0                    # passes over the data instead of max_iters; 0 takes max_iters
eval_interval = 50              # save and measure the held-out pairs every so many steps
always_save_checkpoint = True   # False: keep the checkpoint of the lowest held-out loss
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
beta = 0.1                      # how much it costs to leave the reference: a smaller one moves further
length_normalised = False       # divide an answer's log-probability by its length, as chapter II-10 does
cache_reference = True          # compute the reference's log-probabilities once; False holds its model beside
# the optimizer
optimizer = 'adamw'             # 'muon' for matrices and AdamW for the rest, or 'adamw' for all
learning_rate = 3e-4            # highest
min_lr = -1.0                   # at the end of the cosine; -1 is a tenth of learning_rate
warmup_iters = 20               # steps of linear warmup
weight_decay = 0.0              # on matrices only
grad_clip = 1.0                 # longest gradient; 0 is no limit
# the machine
device = 'auto'                 # 'auto' takes cuda, then mps, then cpu
dtype = 'auto'                  # 'float32', 'bfloat16' or 'float16'; 'auto' is bfloat16 where that is fast
compile = False                 # torch.compile: slow to start, faster on a GPU


# ---- batches ----

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


def learnable(split, block_size):
    """(numbers of the pairs whose answers differ once cut to block_size, how many pairs are cut)."""
    lengths = np.diff(split.offsets).reshape(-1, 2)                     # (pairs, 2)
    long, keep = lengths.max(1) > block_size + 1, np.ones(len(lengths), dtype=bool)
    for i in np.flatnonzero(long | (lengths[:, 0] == lengths[:, 1])):
        (chosen, rejected), _ = pair_at(split, i, block_size)
        keep[i] = not np.array_equal(chosen, rejected)
    return np.flatnonzero(keep).tolist(), int(long.sum())


def open_pairs(run, folder, context, block_size, **splits):
    """The numbers of the pairs to use, of each split a list. Says what block_size cuts and leaves out, and
    refuses data of which it leaves nothing. context: what the model can read."""
    result = []
    for name, split in splits.items():
        pairs, n_cut = learnable(split, block_size)
        n_left_out = len(split.offsets) // 2 - len(pairs)
        if not pairs:
            fail(f"{folder}, {name}: no pair is left whose answers differ within --block_size={block_size} "
                 f"tokens, where the model could read {context}")
        if (n_cut or n_left_out) and run.rank == 0:
            print(f"{name}: {n_cut:,} pairs are cut to block_size={block_size}; {n_left_out:,} are left out, "
                  f"as their answers do not differ there")
        result.append(pairs)
    return result


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


def answer_log_probs(model, tokens, targets, at, length_normalised=False):
    """log pi(answer | prompt) of each row, the sum of its tokens' log-probabilities: (B, T) -> (B,) float32.

    targets  (B, T), the token that follows each; -100 on prompts and padding, which get no logits at all: the
             head is the widest layer, and its softmax the largest tensor
    at       (N,) where the others are, from target_positions
    length_normalised  the mean instead of the sum
    """
    hidden, _ = model(tokens, head=False)                                                   # (B, T, C)
    logits = model.lm_head(hidden.flatten(0, 1)[at])                                        # (N, C) -> (N, V)
    log_probs = -F.cross_entropy(logits.float(), targets.flatten()[at], reduction='none')   # (N,)
    rows = at // tokens.size(1)
    sums = log_probs.new_zeros(len(tokens)).index_add(0, rows, log_probs)                   # (N,) -> (B,)
    return sums / (targets != -100).sum(1) if length_normalised else sums


# ---- the reference, and the held-out pairs ----

def log_probs_of(model, run, split, pairs, block_size, batch_size, length_normalised, progress=None):
    """answer_log_probs of many pairs, (P, 2) float32 of chosen and rejected; the ranks share the work."""
    # pairs of about one length beside each other, so that there is little padding
    order = np.argsort(np.diff(split.offsets[::2])[pairs], kind='stable')
    order = order[run.rank::run.world_size]
    result = np.zeros((len(pairs), 2))
    with evaluating(model):
        for i in range(0, len(order), batch_size):
            some = order[i:i + batch_size]
            x, y = batch_at(split, [pairs[k] for k in some], block_size)
            x, y, at = to_device([x, y, target_positions(y)], run.device)
            with run.autocast():
                log_probs = answer_log_probs(model, x, y, at, length_normalised)
            result[some] = log_probs.view(-1, 2).cpu()                          # (2P,) -> (P, 2)
            if progress:
                progress.show(i / len(order))
    return np.array(run.sum(*result.ravel()), dtype=np.float32).reshape(result.shape)


def reference_log_probs(model, run, folder, name, pairs, block_size, batch_size, length_normalised):
    """log_probs_of under the reference, read from the data folder if the same was computed before."""
    split = read_split(folder, name)
    key = hashlib.sha256(repr([fingerprint(model.state_dict()), str(run.dtype), block_size, length_normalised,
                               pairs]).encode())
    for array in split[:3]:
        key.update(array)
    path = os.path.join(data_folder(folder), f'{name}_reference_{key.hexdigest()[:16]}.npy')
    known = [None]
    if run.rank == 0 and os.path.exists(path):
        try:
            known = [np.load(path)]
        except (OSError, EOFError, ValueError) as e:
            fail(f"{path} is damaged ({e}): delete it, and it is computed again")
    if run.world_size > 1:                      # another node may have another disk: rank 0 tells all ranks
        dist.broadcast_object_list(known, 0)
    if known[0] is not None:
        return known[0]
    result = log_probs_of(model, run, split, pairs, block_size, batch_size, length_normalised,
                          Progress(f'reference, {name}') if run.rank == 0 else None)
    if run.rank == 0:
        try:
            with replacing(path) as new, open(new, 'wb') as f:
                np.save(f, result)
        except OSError as e:                    # others may own the data
            print(f"the reference is not kept for the next run: cannot write {path} ({e.strerror})")
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
    config = configure(globals(), beta=above(0))
    run = start_run(device, dtype, seed)
    checkpoint = load_checkpoint(out_dir) if init_from == 'resume' else None
    source = checkpoint['reference'] if checkpoint else init_from
    given = given_by(checkpoint, out_dir) if checkpoint else parse_given(config['weights_config'])
    # as it is, the reference
    model, tokenizer, _ = load_run(source, run.device, block_size=block_size, given=given)
    weights = fingerprint(model.state_dict())
    if checkpoint and checkpoint['reference_fingerprint'] != weights:
        fail(f"{source} is no longer the reference that {out_dir} was trained against: its weights changed")
    meta, train, val = open_data(run, dataset, 'dpo', tokenizer)
    train_pairs, val_pairs = open_pairs(run, data_folder(dataset), model.config.context, block_size,
                                        train=train, val=val)
    val_pairs = val_pairs[::math.ceil(len(val_pairs) / (eval_iters * batch_size))]
    how = block_size, batch_size, length_normalised
    if cache_reference:
        ref_train = reference_log_probs(model, run, dataset, 'train', train_pairs, *how)
        ref_val = reference_log_probs(model, run, dataset, 'val', val_pairs, *how)
    else:
        reference = copy.deepcopy(model).requires_grad_(False)
        ref_val = log_probs_of(model, run, val, val_pairs, *how)
    if checkpoint:                                              # from here on it is the policy
        model = model_of(checkpoint, out_dir).to(run.device)
    what = f"{len(train_pairs):,} pairs"
    training = Training(run, config, model, tokenizer, len(train_pairs), what, checkpoint, lambda: dict(
        model=model.state_dict(), reference=source, reference_fingerprint=weights))

    def make_batch(rows):
        ref = torch.from_numpy(ref_train[rows].ravel()) if cache_reference else None        # (P, 2) -> (2P,)
        x, y = batch_at(train, [train_pairs[row] for row in rows], block_size)
        return x, y, target_positions(y), ref

    # the model stays in evaluation mode, without dropout, which would hide what the policy prefers
    for _ in training:
        if training.due:
            numbers = held_out(log_probs_of(model, run, val, val_pairs, *how), ref_val, beta)
            line = ("held-out loss {val_loss:.4f}  accuracy {val_accuracy:.1%}  margin {val_margin:.3f} = "
                    "{val_chosen_reward:.3f} - {val_rejected_reward:.3f}").format(**numbers)
            training.evaluated(line, **numbers)
        rows = read_rows(len(train_pairs), seed, training.position, training.rows)
        for x, y, at, ref in training.micro_batches(rows, make_batch, weigh=lambda x, *_: len(x) // 2):
            with run.autocast():
                policy = answer_log_probs(model, x, y, at, length_normalised)               # (2P,)
                if not cache_reference:
                    with torch.no_grad():
                        ref = answer_log_probs(reference, x, y, at, length_normalised)
            loss, chosen, rejected = (part.sum() for part in dpo_loss(
                policy[0::2], policy[1::2], ref[0::2], ref[1::2], beta))
            training.backward(loss, margin=chosen - rejected, chosen_reward=chosen, rejected_reward=rejected)
        training.update(pairs=len(rows))
    training.close(f"the model is in {out_dir}: python sample.py --out_dir={quote(out_dir)} --chat")
