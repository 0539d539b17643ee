"""
Distil a teacher into a student (tutorial chapter II-12).

    loss = alpha CE(student, data) + (1 - alpha) T^2 KL(teacher || student)       (Hinton et al. 2015, sec. 2)

White box: the student learns the teacher's whole distribution at each target token, softened by temperature
T; T^2 keeps the size of the gradient whatever T is. Black box (teacher=''): only the teacher's answers are
known, and the loss is their cross-entropy, in which the tags <think> and <answer> weigh tag_weight times.

    python distill.py                               # offline: out/sft into a student a fifth its size
    python distill.py --teacher= --out_dir=out/alone        # the same student without a teacher
    python distill.py config/reason.py              # black box: out/sft learns to think before it answers

It is sft.py but for the loss: rows and held-out loss are imported from there.
"""
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from configurator import (HERE, MetricsLog, StopSignal, clock, configure, data_parallel, fail, keep_settings,
                          learning_rate_at, make_folder, restore_rng, save_checkpoint, start_run)
from dpo import hidden_states
from model_gpt2 import GPT2
from model_minimind import MiniMind, MiniMindConfig
from prepare import data_folder, load_tokenizer, prepare_missing, read_labels, read_meta, read_split
from sample import load_run
from sft import Rows, answers, held_out_loss, last_answers, learnable, to_device, write_report

# the run
out_dir = 'out/distill'         # where checkpoint, tokenizer, metrics, picture and report go
init_from = 'scratch'           # the student: 'scratch', 'resume', or a run's or Hugging Face folder
teacher = 'out/sft'             # a run's or Hugging Face folder; '' is black box: the data's answers alone
max_iters = 200                 # optimizer steps
eval_interval = 50              # save and measure the held-out loss every so many steps
eval_iters = 50                 # batches of held-out conversations to measure on, at most
log_interval = 10               # print a line every so many steps
report_size = 48                # held-out conversations to answer for report.json, at the end
max_new_tokens = 80             # longest answer in it, in tokens
seed = 1337                     # of the student's weights, the order of the data, dropout
wandb_log = False               # log to Weights & Biases too
# the data
dataset = 'pydoc_sft'           # name in data/, or a path; a built-in one is prepared when missing
layout = 'packed'               # 'packed', 'bucketed' or 'padded', as in sft.py
batch_size = 16                 # rows in a micro-batch
gradient_accumulation_steps = 1 # micro-batches in a step, over all ranks together
block_size = 256                # tokens in a row; what is longer is cut
# the student, from scratch
n_layer = 3                     # blocks
n_head = 4                      # query heads
n_kv_head = 2                   # key and value heads
n_embd = 128                    # width
# the method
alpha = 0.5                     # share of the data's cross-entropy; the teacher's KL has the rest
temperature = 2.0               # T: higher shows more of what the teacher holds for less likely
tag_weight = 10.0               # of the tokens of <think>, </think>, <answer>, </answer>; 1 is like any other
# the optimizer
learning_rate = 3e-3            # highest, of AdamW
min_lr = 3e-4                   # at the end of the cosine
warmup_iters = 20               # steps of linear warmup
weight_decay = 0.1              # on matrices only
grad_clip = 1.0                 # longest gradient; 0 is no limit
# the machine
device = 'auto'                 # 'auto' takes cuda, then mps, then cpu
dtype = 'auto'                  # 'float32', 'bfloat16' or 'float16'; 'auto' is bfloat16 where that is fast
compile = False                 # torch.compile: slow to start, faster on a GPU


TAGS = ('<think>', '</think>', '<answer>', '</answer>')
WELL_FORMED = re.compile(r'\s*<think>(.+)</think>\s*<answer>(.+)</answer>\s*', re.DOTALL)


# ---- the loss ----

def distillation_loss(student, teacher, targets, weights, alpha, temperature):
    """Sums over N tokens, (3,): the loss, the cross-entropy in it (unweighted), the KL in it.

    student  logits (N, V);  teacher  the same, or None: then the loss is the weighted cross-entropy alone
    targets  (N,) int64;  weights  (N,) of each token's cross-entropy
    """
    student = student.float()
    ce = F.cross_entropy(student, targets, reduction='none')                                # (N,)
    if teacher is None:
        return torch.stack([(weights * ce).sum(), ce.sum(), ce.new_zeros(())])
    kl = F.kl_div((student / temperature).log_softmax(-1), (teacher.float() / temperature).log_softmax(-1),
                  reduction='sum', log_target=True)
    loss = alpha * (weights * ce).sum() + (1 - alpha) * temperature ** 2 * kl
    return torch.stack([loss, ce.sum(), kl])


def chunked_loss(head, hidden, teacher_head, teacher_hidden, targets, weights, alpha, temperature,
                 chunk_size=512):
    """distillation_loss from what the two output heads are given, hidden (N, C) and teacher_hidden (N, C').

    Logits exist for chunk_size tokens at a time: a chunk's are thrown away and computed again on the way
    back. Memory grows with N x C and chunk_size x V, where all logits at once would take N x V, four times.
    """
    def loss(h, t, y, w):
        return distillation_loss(head(h), None if t is None else teacher_head(t), y, w, alpha, temperature)

    def chunks(tensor):
        return tensor.split(chunk_size)

    teacher_chunks = [None] * len(chunks(hidden)) if teacher_hidden is None else chunks(teacher_hidden)
    return sum(recompute(loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in
               zip(chunks(hidden), teacher_chunks, chunks(targets), chunks(weights)))


def tag_weights(targets, tags, tag_weight):
    """(B, T) floats: tag_weight on the tokens that spell a tag, 1 on all others.

    tags  the ids of each tag. White space, letters and signs are never merged with each other, so a tag has
          the same ids wherever it stands; and as sequences they are not mistaken for any other '<'.
    """
    weights = torch.ones(targets.shape, device=targets.device)
    for ids in tags:
        windows = targets.unfold(1, len(ids), 1)                            # (B, T) -> (B, T - n + 1, n)
        found = (windows == torch.tensor(ids, device=targets.device)).all(-1)
        for i in range(len(ids)):
            weights[:, i:i + found.size(1)][found] = tag_weight
    return weights


# ---- report ----

def parse_answer(text):
    """What stands between <answer> and </answer>, or None if the text is not well-formed: one thought, then
    one answer, each tag once, nothing around them."""
    match = WELL_FORMED.fullmatch(text)
    if not match or any(text.count(tag) != 1 for tag in TAGS):
        return None
    return match[2].strip()


def write_reasoning(path, model, tokenizer, split, docs, groups, max_new_tokens):
    """Answer held-out problems; write all to a .json file and print, for each group of them, the share of
    answers that are well-formed and the share that is right. groups: {its name: the documents in it}."""
    pairs = last_answers(split, docs)
    given = answers(model, tokenizer, [prompt for prompt, _ in pairs], max_new_tokens)
    report = {}
    for doc, (prompt, expected), (text, _) in zip(docs, pairs, given):
        expected = parse_answer(tokenizer.decode(expected[:-1]))
        report[doc] = dict(prompt=tokenizer.decode(prompt), expected=expected, answer=text,
                           well_formed=parse_answer(text) is not None, right=parse_answer(text) == expected)
    with open(path, 'w', encoding='utf-8') as f:
        json.dump(list(report.values()), f, ensure_ascii=False, indent=2)
    for entry in list(report.values())[:3]:
        print('    | ' + (entry['prompt'] + entry['answer']).replace('\n', '\n    | '))
    for name, members in {**groups, 'all': docs}.items():
        some = [report[doc] for doc in members if doc in report]
        formed, right = (sum(entry[key] for entry in some) / max(1, len(some))
                         for key in ('well_formed', 'right'))
        print(f"{name:13} {len(some):5,} problems  well-formed {formed:6.1%}  right {right:6.1%}")


if __name__ == '__main__':
    config = configure(globals(), layout=('packed', 'bucketed', 'padded'), report_size=0, max_new_tokens=1,
                       alpha=[0, 1], temperature=1e-3, tag_weight=0)
    stop = StopSignal()
    run = start_run(device, dtype, seed)
    master = run.rank == 0

    # models
    source = out_dir if init_from == 'resume' else init_from
    checkpoint, guide, words = None, None, None
    if source != 'scratch':
        model, words, checkpoint = load_run(source)
    if teacher:
        guide, guide_words, _ = load_run(teacher, run.device)
        guide.requires_grad_(False)
        words = words or guide_words
        if guide_words.fingerprint != words.fingerprint:
            fail(f"--teacher={teacher} has another vocabulary than {source}: tokens must mean the same")
    tokens_of = teacher or (source if source != 'scratch' else os.path.join(HERE, 'out', 'tokenizer'))
    tokens_of = tokens_of if os.path.isdir(tokens_of) else 'gpt2'
    prepare_missing(run, dataset, tokens_of)
    words = words or load_tokenizer(data_folder(dataset))
    if source == 'scratch':
        torch.manual_seed(seed)                     # the same student, whoever teaches it
        try:
            model = MiniMind(MiniMindConfig(
                vocab_size=guide.config.vocab_size if teacher else words.vocab_size, hidden_size=n_embd,
                num_hidden_layers=n_layer, num_attention_heads=n_head, num_key_value_heads=n_kv_head,
                qk_norm=True, max_position_embeddings=block_size))
        except ValueError as e:
            fail(f"{e}; see --n_embd, --n_head and --n_kv_head")
    if teacher and guide.config.vocab_size != model.config.vocab_size:
        fail(f"--teacher={teacher} has {guide.config.vocab_size} logits a token, {source} has "
             f"{model.config.vocab_size}: a distribution needs the same vocabulary")
    for name, one in ((source, model), (teacher, guide)):
        if one and block_size > one.config.context:
            fail(f"--block_size={block_size} is more than the context of {name}, {one.config.context}")
    model.to(run.device)

    # data
    meta = read_meta(dataset, 'sft')
    if meta['tokenizer'] != words.fingerprint:
        fail(f"{data_folder(dataset)} was tokenised otherwise than {teacher or source}: run `python "
             f"prepare.py --dataset={dataset} --tokenizer={tokens_of}`"
             + (f" with --input={meta['source']}" if os.path.exists(meta['source']) else ""))
    train, val = read_split(dataset, 'train'), read_split(dataset, 'val')
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
        keep_settings(config, checkpoint, 'weight_decay', 'n_layer', 'n_head', 'n_kv_head', 'n_embd')
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

    tags = [words.encode(tag) for tag in TAGS]

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
        if teacher:
            print(f"teacher: {sum(p.numel() for p in guide.parameters()):,} parameters", flush=True)
        if n_cut:
            left_out = meta['train']['documents'] - len(docs)
            print(f"{n_cut:,} conversations are cut to block_size={block_size}: {n_lost:,} answers are lost "
                  f"whole, {left_out:,} conversations left out, as nothing of an answer remains")

    # train
    began = time.time()
    seconds, since, useful, eval_seconds = 0.0, 0, 0, 0.0       # since the last line; of an evaluation
    if teacher:
        loss = held_out_loss(guide, run, val_rows, batch_size, eval_iters)
        guide.eval()
        if master:
            print(f"the teacher's held-out loss {loss:.4f}")
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
                print(f"step {step:6,}  held-out loss {loss:.4f}", flush=True)
            eval_seconds, clock_start = time.time() - clock_start, time.time()
        if step == max_iters:
            break

        lr = learning_rate_at(step, learning_rate, min_lr, warmup_iters, max_iters)
        for group in optimizer.param_groups:
            group['lr'] = lr
        total = torch.zeros(3, device=run.device)       # of the loss, its cross-entropy, its KL
        for i, batch in enumerate(batches):
            x, y, segments = to_device(batch, run.device)
            if run.world_size > 1:
                wrapped.require_backward_grad_sync = i == len(batches) - 1      # sum over ranks once
            is_target, weights = y != -100, tag_weights(y, tags, tag_weight)
            with run.autocast():
                hidden = hidden_states(model, wrapped, x, segments)[is_target]              # (N, C)
                if teacher:
                    with torch.no_grad():
                        told = hidden_states(guide, guide, x, segments)[is_target]          # (N, C')
                parts = chunked_loss(model.lm_head, hidden, guide.lm_head if teacher else None,
                                     told if teacher else None, y[is_target], weights[is_target], alpha,
                                     temperature)
            loss = parts[0]
            total += parts.detach()
            if getattr(model.config, 'use_moe', False):     # a mean, as the sum over all targets is divided
                loss = loss + model.auxiliary_loss(is_target) * is_target.sum()
            # DDP averages gradients over ranks; times world_size that is the sum which the loss asks for
            scaler.scale(loss * (run.world_size / max(1, n_targets))).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        scaler.update()

        seconds, since = seconds + time.time() - clock_start, since + 1
        if step % log_interval == 0 or step == max_iters - 1:
            loss, ce, kl = (n / max(1, n_targets) for n in run.sum(*total.tolist()))
            if master:
                left = (max_iters - 1 - step) * seconds / since
                evals = (max_iters - 1) // eval_interval - step // eval_interval + 1
                log.write(step=step, loss=loss, ce_loss=ce, kl=kl, lr=lr, grad_norm=norm.item(),
                          tokens_per_second=useful / seconds)
                print(f"step {step:6,}/{max_iters:,}  loss {loss:.4f}  ce {ce:.4f}  kl {kl:.4f}  "
                      f"lr {lr:.2e}  grad norm {norm:.2f}  {useful / seconds:,.0f} tokens/s less padding  "
                      f"{clock(left + evals * eval_seconds)} left", flush=True)
            seconds, since, useful = 0.0, 0, 0

    if master:
        log.draw()
        if stopping:
            saved = f"saved in {out_dir}; go on with --init_from=resume" if step else "nothing to save yet"
            print(f"stopped at step {step:,}; {saved}")
        else:
            if report_size:
                some = val_docs[::math.ceil(len(val_docs) / report_size)].tolist()
                path = os.path.join(out_dir, 'report.json')
                if parse_answer(words.decode(last_answers(val, some[:1])[0][1][:-1])) is None:
                    print(write_report(path, model, words, val, some, max_new_tokens))
                else:
                    of = read_labels(dataset, 'val') if 'labels' in meta else []
                    groups = {name: np.flatnonzero(of == i).tolist()
                              for i, name in enumerate(meta.get('labels', []))}
                    write_reasoning(path, model, words, val, some, groups, max_new_tokens)
            print(f"done in {clock(time.time() - began)}; the model is in {out_dir}: python sample.py "
                  f"--out_dir={out_dir} --chat")
    run.barrier()
    if run.world_size > 1:
        dist.destroy_process_group()
    sys.exit(128 + stop.signal if stopping else 0)
