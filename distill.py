"""
Distil a teacher into a student (tutorial chapter II-12).

    loss = alpha CE(student, data) + (1 - alpha) T^2 KL(teacher || student)       (Hinton et al. 2015, sec. 2)

White box: the student learns the teacher's whole distribution at each target token, softened by temperature
T; T^2 keeps the size of the gradient whatever T is. Black box (teacher=''): only the teacher's answers are
known, and the loss is their cross-entropy, in which the tags <think> and <answer> weigh tag_weight times.

    python distill.py                               # offline: out/sft into a student, blocks a fifth as large
    python distill.py --teacher= --out_dir=out/alone        # the same student without a teacher
    python distill.py config/reason.py              # black box: out/sft learns to think before it answers

The loop comes from pretrain.py; rows, held-out loss and report from sft.py. What differs is the loss.
"""
import json
import os
from shlex import quote
import re

from configurator import at_least, between, configure, fail, start_run

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute

from prepare import data_folder, open_data
from pretrain import Training, check_shape, new_model, target_positions
from sample import answers, load_run, load_start, parse_given
from sft import held_out_loss, last_answers, open_rows, spread, write_report
from train_tokenizer import load_tokenizer

# the run
out_dir = 'out/distill'         # where checkpoint, tokenizer, metrics, picture and report go
init_from = 'scratch'           # the student: 'scratch', 'resume', or a run's or Hugging Face folder
teacher = 'out/sft'             # a run's or Hugging Face folder; '' is black box: the data's answers alone
max_iters = 800                 # optimizer steps
epochs = 0.0                    # passes over the data instead of max_iters; 0 takes max_iters
eval_interval = 200             # save and measure the held-out loss every so many steps
always_save_checkpoint = True   # False: keep the checkpoint of the lowest held-out loss
eval_iters = 50                 # batches of held-out conversations to measure on, at most
log_interval = 10               # print a line every so many steps
report_size = 48                # held-out conversations to answer for report.json, at the end
max_new_tokens = 80             # longest answer in it, in tokens
seed = 1337                     # of the student's weights, the order of the data, dropout
wandb_log = False               # log to Weights & Biases too
# the data
dataset = 'pydoc_sft'           # name in data/, or a path; a built-in one is prepared when missing
layout = 'packed'               # 'packed', 'bucketed' or 'padded', as in sft.py
batch_size = 4                  # rows in a micro-batch: many small steps teach a small student most
gradient_accumulation_steps = 1 # micro-batches in a step, over all ranks together
block_size = 256                # tokens in a row; what is longer is cut
# the student, from scratch: a MiniMind with qk_norm
n_layer = 3                     # blocks
n_head = 4                      # query heads
n_kv_head = 2                   # key and value heads
n_embd = 128                    # width
# the method
alpha = 0.5                     # share of the data's cross-entropy; the teacher's KL has the rest
temperature = 2.0               # T: higher shows more of what the teacher holds for less likely
tag_weight = 10.0               # of the tokens of <think>, </think>, <answer>, </answer>; 1 is like any other
# the optimizer
optimizer = 'muon'              # 'muon' for matrices and AdamW for the rest, or 'adamw' for all
learning_rate = 1e-2            # highest; with AdamW alone 3e-3 is better
min_lr = -1.0                   # at the end of the cosine; -1 is a tenth of learning_rate
warmup_iters = 20               # steps of linear warmup
weight_decay = 0.1              # on matrices only
grad_clip = 1.0                 # longest gradient; 0 is no limit
# the machine
device = 'auto'                 # 'auto' takes cuda, then mps, then cpu
dtype = 'auto'                  # 'float32', 'bfloat16' or 'float16'; 'auto' is bfloat16 where that is fast
compile = False                 # torch.compile: slow to start, faster on a GPU

STUDENT = dict(model='minimind', qk_norm=True)                      # what new_model asks besides
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


def shows_its_work(tokenizer, split, doc):
    """Whether the answer of a document is a thought and a result, in their tags."""
    return parse_answer(tokenizer.decode(last_answers(split, [doc])[0][1][:-1])) is not None


def write_reasoning(out_dir, model, tokenizer, split, docs, size, max_new_tokens, names=()):
    """Answer `size` held-out problems; write all to report.json and print, for each label of the documents,
    the share of answers that are well-formed and the share that is right. names: of the labels."""
    path, docs = os.path.join(out_dir, 'report.json'), spread(docs, size).tolist()
    groups = {name: np.flatnonzero(split.labels == i).tolist() for i, name in enumerate(names)}
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
        if not (some := [report[doc] for doc in members if doc in report]):
            continue
        formed, right = (sum(entry[key] for entry in some) / len(some) for key in ('well_formed', 'right'))
        print(f"{name:13} {len(some):5,} problems  well-formed {formed:6.1%}  right {right:6.1%}")


def load_models(run, config):
    """(student or None, teacher or None, tokenizer or '', checkpoint): all that is there before the data."""
    student = teacher = checkpoint = None
    tokenizer, name = '', config['teacher']
    if config['init_from'] != 'scratch':
        student, tokenizer, checkpoint = load_start(run, config)
    else:
        check_shape({**config, **STUDENT})
    if name:
        teacher, its_tokenizer, _ = load_run(name, run.device, block_size=config['block_size'],
                                             given=parse_given(config['weights_config']))
        teacher.requires_grad_(False)
        tokenizer = tokenizer or its_tokenizer
        if its_tokenizer.fingerprint != tokenizer.fingerprint:
            fail(f"--teacher={name} has another vocabulary than {config['init_from']}: tokens must mean the "
                 "same")
        if student and teacher.config.vocab_size != student.config.vocab_size:
            fail(f"--teacher={name} has {teacher.config.vocab_size} logits per token, the student has "
                 f"{student.config.vocab_size}: a distribution needs the same vocabulary")
    return student, teacher, tokenizer, checkpoint


if __name__ == '__main__':
    config = configure(globals(), {'teacher': 'alpha temperature',
                                   'init_from=scratch': 'n_layer n_head n_kv_head n_embd'},
                       alpha=between(0, 1), temperature=at_least(1e-3), tag_weight=at_least(0))
    run = start_run(device, dtype, seed)
    model, guide, tokenizer, checkpoint = load_models(run, config)
    meta, train, val = open_data(run, dataset, 'sft', tokenizer)
    tokenizer = tokenizer or load_tokenizer(data_folder(dataset))
    if not model:
        torch.manual_seed(seed)                     # the same student, whoever teaches it
        size = guide.config.vocab_size if guide else tokenizer.vocab_size
        model = new_model({**config, **STUDENT}, size).to(run.device)
    rows, val_rows, val_docs, what = open_rows(run, config, train, val)
    training = Training(run, config, model, tokenizer, len(rows.rows), what, checkpoint)
    if guide:
        loss = held_out_loss(guide, run, val_rows, batch_size, eval_iters)
        size = sum(p.numel() for p in guide.parameters())
        training.say(f"teacher: {size:,} parameters, held-out loss {loss:.4f}")
    tags = [tokenizer.encode(tag) for tag in TAGS]

    def make_batch(some):
        x, y, segments = rows.batch(some)
        at = target_positions(y)
        return x, y, segments, at, tag_weights(y, tags, tag_weight).flatten()[at]

    model.train()
    for _ in training:
        if training.due:
            loss = held_out_loss(model, run, val_rows, batch_size, eval_iters)
            training.evaluated(f"held-out loss {loss:.4f}", val_loss=loss)
        step_rows = rows.read(training.position, training.rows)
        for x, y, segments, at, weights in training.micro_batches(step_rows, make_batch):
            told = None
            with run.autocast():
                hidden = model(x, segments=segments, head=False)[0].flatten(0, 1)[at]       # (N, C)
                if guide:
                    with torch.no_grad():
                        told = guide(x, segments=segments, head=False)[0].flatten(0, 1)[at]     # (N, C')
                loss, ce, kl = chunked_loss(model.lm_head, hidden, guide and guide.lm_head, told,
                                            y.flatten()[at], weights, alpha, temperature)
                aux = model.auxiliary_loss(y != -100) * len(at)
            training.backward(loss + aux, loss=loss, ce_loss=ce, kl=kl)
        training.update(tokens=rows.tokens(step_rows))
    if training.finished and report_size:
        if shows_its_work(tokenizer, val, val_docs[0]):
            write_reasoning(out_dir, model, tokenizer, val, val_docs, report_size, max_new_tokens,
                            meta.get('labels', ()))
        else:
            print(write_report(out_dir, model, tokenizer, val, val_docs, report_size, max_new_tokens))
    training.close(f"the model is in {out_dir}: python sample.py --out_dir={quote(out_dir)} --chat")
