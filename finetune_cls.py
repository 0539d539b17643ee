"""
Fine-tune a language model into a classifier: spam or not (tutorial chapter I-7).

    loss = -1/N  sum over N texts of  log p(label | text),   p = softmax(head(h_last))

The head is new: a matrix from the width of the model to the number of labels, where that to the vocabulary
was. It reads h_last, the hidden state of the last real token, the only one that has seen the whole text. The
padding stands behind it, where a causal model cannot look: it changes no prediction.

    python finetune_cls.py                          # after pretrain.py: on the spam set that ships
    python finetune_cls.py --dataset=mail           # on your own, from `python prepare.py --input=mail.csv`
    python finetune_cls.py --random_weights         # what is the pretraining worth?
    python finetune_cls.py --classify="You won a prize"             # label and probability, by out_dir
    python finetune_cls.py --classify_file=messages.txt             # of each line
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
import torch.nn as nn
from torch.nn import functional as F

from configurator import (MetricsLog, StopSignal, clock, configure, data_parallel, fail, keep_settings,
                          learning_rate_at, load_checkpoint, make_folder, restore_rng, save_checkpoint,
                          start_run)
from model_gpt2 import GPT2, GPT2Config
from model_minimind import MiniMind, MiniMindConfig
from prepare import (data_folder, load_tokenizer, prepare_missing, read_labels, read_meta, read_split,
                     whole_text)
from sample import load_run

# the run
out_dir = 'out/finetune_cls'    # where checkpoint, tokenizer, metrics, pictures and report go
init_from = 'out/pretrain'      # 'resume' (go on in out_dir), a run's or Hugging Face folder, or 'gpt2', ...
random_weights = False          # keep nothing of init_from but its shape and tokenizer
max_iters = 300                 # optimizer steps
eval_interval = 25              # save and measure loss and accuracy on val every so many steps
log_interval = 10               # print a line every so many steps
seed = 1337                     # of the head's weights, the order of the data, dropout
wandb_log = False               # log to Weights & Biases too
# what to classify with a trained run, instead of training
classify = ''                   # a text
classify_file = ''              # a file with a text a line
# the data
dataset = 'spam'                # name in data/, or a path; a built-in one is prepared when missing
batch_size = 16                 # texts in a micro-batch
gradient_accumulation_steps = 1 # micro-batches in a step, over all ranks together
block_size = 256                # longest text in tokens; what is longer loses its end
class_weights = False           # weigh a label's loss by how rare it is, for data that is not balanced
# the model: it keeps its shape
trainable = 'all'               # 'head', 'last' (with the last block and final norm: the chapter's), or 'all'
dropout = 0.1                   # share of activations dropped while training
# the optimizer
learning_rate = 3e-4            # highest, of AdamW
min_lr = 3e-5                   # at the end of the cosine
warmup_iters = 20               # steps of linear warmup
weight_decay = 0.1              # on matrices only
grad_clip = 1.0                 # longest gradient; 0 is no limit
# the machine
device = 'auto'                 # 'auto' takes cuda, then mps, then cpu
dtype = 'auto'                  # 'float32', 'bfloat16' or 'float16'; 'auto' is bfloat16 where that is fast
compile = False                 # torch.compile: slow to start, faster on a GPU


# ---- the classifier ----

def add_head(model, n_labels):
    """Put a head for n_labels where that for the vocabulary is; the embedding it may share stays."""
    width = model.lm_head.in_features
    model.lm_head = nn.Linear(width, n_labels)
    nn.init.normal_(model.lm_head.weight, std=0.02)
    nn.init.zeros_(model.lm_head.bias)
    return model


def freeze(model, trainable):
    """Let 'head', 'last' (head, last block and final norm) or 'all' of the model learn, and nothing else."""
    gpt2 = isinstance(model, GPT2)
    blocks = model.transformer.h if gpt2 else model.model.layers
    norm = model.transformer.ln_f if gpt2 else model.model.norm
    learns = dict(head=[model.lm_head], last=[model.lm_head, blocks[-1], norm], all=[model])[trainable]
    model.requires_grad_(False)
    for module in learns:
        module.requires_grad_(True)


def label_logits(model, tokens, lengths):
    """tokens (B, T), of which the first `lengths` (B,) of each row are real -> logits (B, labels)."""
    logits = model(tokens)[0]                                               # (B, T, labels)
    return logits[torch.arange(len(tokens), device=tokens.device), lengths - 1]


def load_classifier(folder):
    """(model, tokenizer, names of the labels) of a run's folder: the weights that were best on val."""
    checkpoint, tokenizer = load_checkpoint(folder), load_tokenizer(folder)
    if 'labels' not in checkpoint:
        fail(f"{folder} is no classifier: train one with `python finetune_cls.py --init_from={folder}`")
    gpt2 = checkpoint['model_type'] == 'gpt2'
    config = (GPT2Config if gpt2 else MiniMindConfig)(**checkpoint['model_config'])
    model = add_head((GPT2 if gpt2 else MiniMind)(config), len(checkpoint['labels']))
    model.load_state_dict(checkpoint['model'])
    return model.eval(), tokenizer, checkpoint['labels']


# ---- batches ----

def step_texts(n, seed, step, rows):
    """Which texts a step has: the next rows of an endless run of epochs, each shuffled anew."""
    return [np.random.default_rng([seed, i // n]).permutation(n)[i % n]
            for i in range(step * rows, (step + 1) * rows)]


def batch_at(split, labels, texts, block_size):
    """Tokens (B, T), real tokens of each row (B,) and labels (B,), int64; T is the longest row.

    A text that is too long loses its end, but never the last token, where the head reads."""
    bounds = [(split.offsets[i], split.offsets[i + 1]) for i in texts]
    rows = [split.tokens[start:end].astype(np.int64) for start, end in bounds]
    rows = [row if len(row) <= block_size else np.append(row[:block_size - 1], row[-1]) for row in rows]
    x = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for i, row in enumerate(rows):
        x[i, :len(row)] = row
    lengths = torch.tensor([len(row) for row in rows])
    return torch.from_numpy(x), lengths, torch.from_numpy(labels[list(texts)])


def to_device(batch, device):
    return [t.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else t.to(device)
            for t in batch]


# ---- evaluation ----

@torch.no_grad()
def predictions(model, run, split, labels, block_size, batch_size=64):
    """Logits (n, labels) for all texts of a split, on the CPU."""
    model.eval()
    n, logits = len(labels), []
    for i in range(0, n, batch_size):
        texts = range(i, min(i + batch_size, n))
        x, lengths, _ = to_device(batch_at(split, labels, texts, block_size), run.device)
        with run.autocast():
            logits.append(label_logits(model, x, lengths).float().cpu())
    model.train()
    return torch.cat(logits)


def confusion(predicted, labels, n_labels):
    """(true label, predicted label) -> how many: (n_labels, n_labels)."""
    return torch.bincount(labels * n_labels + predicted, minlength=n_labels ** 2).view(n_labels, n_labels)


def scores(matrix):
    """accuracy, and of each label precision = hits / predicted, recall = hits / true and F1, their harmonic
    mean, from a confusion matrix. A ratio of nothing is 0."""
    matrix = matrix.double()
    hits, predicted, true = matrix.diag(), matrix.sum(0), matrix.sum(1)
    precision, recall = hits / predicted.clamp(min=1), hits / true.clamp(min=1)
    f1 = 2 * hits / (predicted + true).clamp(min=1)
    return dict(accuracy=(hits.sum() / matrix.sum()).item(), precision=precision.tolist(),
                recall=recall.tolist(), f1=f1.tolist())


def print_scores(split, names, matrix, result):
    """Print the accuracy and, of each true label, the scores and how often each label was predicted."""
    width = max(6, *map(len, names))
    heads = ' '.join(f'{name:>{width}}' for name in names)
    print(f"{split:5} accuracy {result['accuracy']:.3f} of {matrix.sum().item():,} texts\n"
          f"      {'true':{width}}  precision  recall     F1  predicted: {heads}")
    for i, name in enumerate(names):
        counts = ' '.join(f'{n:{width}}' for n in matrix[i].tolist())
        print(f"      {name:{width}}  {result['precision'][i]:9.3f}  {result['recall'][i]:6.3f}  "
              f"{result['f1'][i]:5.3f}             {counts}")


if __name__ == '__main__':
    config = configure(globals(), trainable=('head', 'last', 'all'))
    run = start_run(device, dtype, seed)
    master = run.rank == 0

    if any(arg in ('--classify=', '--classify_file=') for arg in sys.argv):
        fail("--classify and --classify_file need a text and a file")
    if classify or classify_file:
        model, words, names = load_classifier(out_dir)
        model.to(run.device)
        if classify_file:
            try:
                texts = [line.strip() for line in whole_text(classify_file).split('\n') if line.strip()]
            except OSError as e:
                fail(f"--classify_file={classify_file}: {e.strerror}")
            if not texts:
                fail(f"--classify_file={classify_file}: no line with text")
        else:
            texts = [classify]
        for text in texts:
            ids = words.encode(text)[:model.config.context - 1] + [words.eot]
            with torch.no_grad():
                logits = label_logits(model, torch.tensor([ids], device=run.device), torch.tensor([len(ids)]))
            p, label = logits[0].float().softmax(dim=-1).max(dim=-1)
            print(f"{names[label]}\t{p:.3f}\t{text}")
        sys.exit()

    stop = StopSignal()
    # model
    source = out_dir if init_from == 'resume' else init_from
    checkpoint, first_step = None, 0
    if init_from == 'resume':
        model, words, names = load_classifier(out_dir)
        checkpoint = load_checkpoint(out_dir)
        model.load_state_dict(checkpoint['last'])
    else:
        model, words, _ = load_run(source)
    if block_size > model.config.context:
        fail(f"--block_size={block_size} is more than the context of {source}, {model.config.context}")

    # data
    prepare_missing(run, dataset, source if os.path.isdir(source) else 'gpt2')
    meta = read_meta(dataset, 'cls')
    if meta['tokenizer'] != words.fingerprint:
        fail(f"{data_folder(dataset)} was tokenised otherwise than {source}: run `python prepare.py "
             f"--dataset={dataset} --tokenizer={source if os.path.isdir(source) else 'gpt2'}`"
             + (f" with --input={meta['source']}" if os.path.exists(meta['source']) else ""))
    names = meta['labels']
    data = {split: (read_split(dataset, split), read_labels(dataset, split))
            for split in ('train', 'val', 'test')}
    rows = batch_size * gradient_accumulation_steps             # of a step; the ranks share them out
    if rows < run.world_size:
        fail(f"batch_size x gradient_accumulation_steps = {rows} texts, but {run.world_size} ranks")
    counts = np.bincount(data['train'][1], minlength=len(names))
    n_cut = int((np.diff(data['train'][0].offsets) > block_size).sum())
    weights = torch.ones(len(names), device=run.device)
    if class_weights:                                           # 1 on average over the texts
        weights = torch.tensor(counts.sum() / (len(names) * counts), dtype=torch.float32, device=run.device)

    # the classifier
    old = model
    model = type(model)(replace(model.config, dropout=dropout))
    if init_from == 'resume':
        add_head(model, len(names))
    if not random_weights or init_from == 'resume':
        model.load_state_dict(old.state_dict())
    if init_from != 'resume':
        add_head(model, len(names))
    freeze(model, trainable)
    model.to(run.device)
    named = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([dict(params=[p for p in named if p.dim() >= 2], weight_decay=weight_decay),
                                   dict(params=[p for p in named if p.dim() < 2], weight_decay=0.0)],
                                  lr=learning_rate, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    best = dict(accuracy=-1.0, loss=math.inf, step=0)
    best_weights = None
    if init_from == 'resume':
        keep_settings(config, checkpoint, 'weight_decay', 'trainable')
        first_step, best, best_weights = checkpoint['step'], checkpoint['best'], checkpoint['model']
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
        size, learning = (sum(p.numel() for p in ps) for ps in (model.parameters(), named))
        print(f"{size:,} parameters, {learning:,} of them learn; {counts.sum():,} training texts: "
              f"{max_iters * rows / counts.sum():.1f} epochs in {max_iters:,} steps "
              f"on {run.world_size} x {run.device.type} in {str(run.dtype)[6:]}", flush=True)
        if n_cut:
            print(f"{n_cut:,} texts are longer than block_size={block_size} and lose their end")

    # train
    began = time.time()
    seconds, since, eval_seconds = 0.0, 0, 0.0          # time and steps since the last line; of an evaluation
    wrapped.train()
    for step in range(first_step, max_iters + 1):
        clock_start = time.time()
        mine = step_texts(counts.sum(), seed, step, rows)[run.rank::run.world_size]
        batches = [batch_at(*data['train'], mine[i:i + batch_size], block_size)
                   for i in range(0, len(mine), batch_size)]
        # all ranks agree on the sum of the weights, and on whether to stop
        weight = sum(weights.cpu()[y].sum().item() for *_, y in batches)
        total_weight, stopping = run.sum(weight, stop.signal > 0)

        due = step % eval_interval == 0 or step == max_iters
        if due:
            logits, y = predictions(compiled, run, *data['val'], block_size), torch.from_numpy(data['val'][1])
            loss = F.cross_entropy(logits, y).item()
            accuracy = (logits.argmax(-1) == y).double().mean().item()
            if (accuracy, -loss) > (best['accuracy'], -best['loss']):
                best = dict(accuracy=accuracy, loss=loss, step=step)
                best_weights = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
            if master:
                log.write(step=step, val_loss=loss, val_accuracy=accuracy)
                print(f"step {step:6,}  val loss {loss:.4f}  accuracy {accuracy:.3f}  "
                      f"(best {best['accuracy']:.3f} at step {best['step']:,})", flush=True)
            eval_seconds, clock_start = time.time() - clock_start, time.time()
        if step > first_step and (due or stopping):
            # the best weights are the run's result; the last ones, to go on with
            save_checkpoint(run, out_dir, words, step=step, settings=config,
                            model_type='gpt2' if isinstance(model, GPT2) else 'minimind',
                            model_config=asdict(model.config), model=best_weights, last=model.state_dict(),
                            labels=names, best=best, optimizer=optimizer.state_dict(),
                            scaler=scaler.state_dict())
        if stopping or step == max_iters:
            break

        lr = learning_rate_at(step, learning_rate, min_lr, warmup_iters, max_iters)
        for group in optimizer.param_groups:
            group['lr'] = lr
        total = correct = 0.0
        for i, batch in enumerate(batches):
            x, lengths, y = to_device(batch, run.device)
            if run.world_size > 1:
                wrapped.require_backward_grad_sync = i == len(batches) - 1      # sum over ranks once
            with run.autocast():
                logits = label_logits(wrapped, x, lengths).float()
            loss = (F.cross_entropy(logits, y, reduction='none') * weights[y]).sum()
            total, correct = total + loss.item(), correct + (logits.argmax(-1) == y).sum().item()
            # DDP averages gradients over ranks; times world_size that is the sum which the loss asks for
            scaler.scale(loss * (run.world_size / total_weight)).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(named, grad_clip or math.inf)
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        scaler.update()

        seconds, since = seconds + time.time() - clock_start, since + 1
        if step % log_interval == 0 or step == max_iters - 1:
            total, correct = run.sum(total, correct)
            if master:
                left = (max_iters - 1 - step) * seconds / since
                evals = (max_iters - 1) // eval_interval - step // eval_interval + 1
                log.write(step=step, loss=total / total_weight, accuracy=correct / rows, lr=lr,
                          grad_norm=norm.item(), texts_per_second=since * rows / seconds)
                print(f"step {step:6,}/{max_iters:,}  loss {total / total_weight:.4f}  lr {lr:.2e}  "
                      f"grad norm {norm:.2f}  {since * rows / seconds:,.0f} texts/s  "
                      f"{clock(left + evals * eval_seconds)} left", flush=True)
            seconds, since = 0.0, 0

    if master:
        log.draw()
        log.draw('accuracy', 'share of texts')
        if stopping:
            saved = f"saved in {out_dir}; go on with --init_from=resume" if step else "nothing to save yet"
            print(f"stopped at step {step:,}; {saved}")
        else:
            model.load_state_dict(best_weights)
            report = {}
            for split, (texts, labels) in data.items():
                predicted = predictions(model, run, texts, labels, block_size).argmax(-1)
                matrix = confusion(predicted, torch.from_numpy(labels), len(names))
                report[split] = dict(scores(matrix), labels=names, confusion=matrix.tolist())
                print_scores(split, names, matrix, report[split])
            with open(os.path.join(out_dir, 'report.json'), 'w', encoding='utf-8') as f:
                json.dump(report, f, ensure_ascii=False, indent=2)
            print(f"done in {clock(time.time() - began)}; the classifier, of step {best['step']:,}, is in "
                  f"{out_dir}: python finetune_cls.py --out_dir={out_dir} --classify=\"You won a prize\"")
    run.barrier()
    if run.world_size > 1:
        dist.destroy_process_group()
    sys.exit(128 + stop.signal if stopping else 0)
