"""
Fine-tune a language model into a classifier: spam or not (tutorial chapter I-7).

    loss = -1/N  sum over N texts of  log p(label | text),   p = softmax(head(h_last))

The head is new: a matrix from the width of the model to the number of labels, in place of that to the
vocabulary. It reads h_last, the hidden state of the last real token: only that one has seen the whole text.
Padding stands behind it, where a causal model cannot look, so it changes no prediction. The chapter's head
reads the last position of a padded row instead (reads='padding'), and asks what its first token knows, which
has seen nothing else (reads='first'). The loop comes from pretrain.py.

    python finetune_cls.py                          # after pretrain.py: on the spam set that ships
    python finetune_cls.py --dataset=mail           # on your own, from `python prepare.py --input=mail.csv`
    python finetune_cls.py --random_weights         # what is the pretraining worth?
    python finetune_cls.py --reads=padding --block_size=120 --trainable=last        # as the chapter does
    python finetune_cls.py --classify="You won a prize"             # label and probability, by out_dir
    python finetune_cls.py --classify_file=messages.txt             # of each line
"""
import json
import math
import os
import sys
from shlex import quote

from configurator import configure, fail, one_of, start_run

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F

from prepare import TASKS, Piece, Split, open_data, whole_text
from pretrain import Training, read_rows, to_device, whole
from sample import blocks, evaluating, load_own, load_start, model_of

# the run
out_dir = 'out/finetune_cls'    # where checkpoint, tokenizer, metrics, pictures and report go
init_from = 'out/pretrain'      # 'resume' (go on in out_dir), a run's or Hugging Face folder, or 'gpt2', ...
random_weights = False          # keep nothing of init_from but its shape and tokenizer
max_iters = 150                 # optimizer steps
epochs = 0.0                    # passes over the data instead of max_iters; 0 takes max_iters
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
reads = 'text'                  # the end of the 'text', of its 'padding' (the chapter), or the 'first' token
dropout = 0.1                   # share of activations dropped while training
# the optimizer
optimizer = 'muon'              # 'muon' for matrices and AdamW for the rest, or 'adamw' for all
learning_rate = 1e-3            # highest; with AdamW alone 3e-4 is better
min_lr = -1.0                   # at the end of the cosine; -1 is a tenth of learning_rate
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
    gpt2 = model.config.model_type == 'gpt2'
    norm = model.transformer.ln_f if gpt2 else model.model.norm
    learns = dict(head=[model.lm_head], last=[model.lm_head, blocks(model)[-1], norm], all=[model])[trainable]
    model.requires_grad_(False)
    for module in learns:
        module.requires_grad_(True)


def label_logits(model, tokens, lengths):
    """tokens (B, T), of which the head knows the first `lengths` (B,) of each row -> logits (B, labels)."""
    hidden = model(tokens, head=False)[0]                                   # (B, T, C)
    return model.lm_head(hidden[torch.arange(len(tokens), device=tokens.device), lengths - 1])


def load_classifier(folder, dropout=0.0, weights='model'):
    """(model, tokenizer, checkpoint) of a run's folder. weights: 'model', the best on val, or 'last'."""
    checkpoint, tokenizer = load_own(folder)
    if 'labels' not in checkpoint:
        fail(f"{folder} is no classifier: train one with `python finetune_cls.py --init_from={folder}`")
    model = model_of(checkpoint, folder, weights, lambda model: add_head(model, len(checkpoint['labels'])),
                     dropout=dropout)
    return model, tokenizer, checkpoint


# ---- batches ----

def cut_text(ids, block_size):
    """A text that is too long loses its end, but never the last token, where the head reads."""
    return ids if len(ids) <= block_size else np.append(ids[:block_size - 1], ids[-1])


def batch_at(split, texts, block_size, reads='text'):
    """Tokens (B, T), labels (B,) and how many tokens of each row the head is to know (B,), int64. T is the
    longest row; where the head reads padding it is block_size, the same in training and in use. Padding
    repeats the token that ends a text."""
    rows = [cut_text(split.tokens[split.offsets[i]:split.offsets[i + 1]].astype(np.int64), block_size)
            for i in texts]
    T = block_size if reads == 'padding' else max(map(len, rows))
    x = np.stack([np.pad(row, (0, T - len(row)), 'edge') for row in rows])
    lengths = torch.tensor([dict(text=len(row), padding=T, first=1)[reads] for row in rows])
    return torch.from_numpy(x), torch.from_numpy(split.labels[list(texts)]), lengths


# ---- evaluation ----

def predictions(model, run, split, block_size, reads='text', batch_size=64):
    """Logits (n, labels) for all texts of a split, on the CPU, and the labels (n,)."""
    n, logits = len(split.labels), []
    with evaluating(model):
        for i in range(0, n, batch_size):
            texts = range(i, min(i + batch_size, n))
            x, _, lengths = to_device(batch_at(split, texts, block_size, reads), run.device)
            with run.autocast():
                logits.append(label_logits(model, x, lengths).float().cpu())
    return torch.cat(logits), torch.tensor(split.labels)


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


def naive_bayes(train, split, n_labels, vocab_size):
    """The accuracy on a split of counting alone: the label of the highest log p(label) + sum of
    log p(token | label), one added to each count. So much tell the words without their order."""
    counts = np.ones((n_labels, vocab_size))
    np.add.at(counts, (np.repeat(train.labels, np.diff(train.offsets)), train.tokens), 1)
    per_token = np.log(counts / counts.sum(1, keepdims=True)).T[split.tokens]           # (tokens, labels)
    priors = np.log(1 + np.bincount(train.labels, minlength=n_labels))
    return ((priors + np.add.reduceat(per_token, split.offsets[:-1])).argmax(1) == split.labels).mean()


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


def write_report(out_dir, model, run, splits, names, block_size, reads):
    """Print the scores of each split, and on the last what counting reaches; write them to report.json."""
    report = {}
    for name, split in splits.items():
        logits, labels = predictions(model, run, split, block_size, reads)
        matrix = confusion(logits.argmax(-1), labels, len(names))
        report[name] = dict(scores(matrix), labels=names, confusion=matrix.tolist())
        print_scores(name, names, matrix, report[name])
    report[name]['naive_bayes'] = naive_bayes(splits['train'], split, len(names), model.config.vocab_size)
    print(f"      accuracy {report[name]['naive_bayes']:.3f} of naive Bayes, which counts the same tokens")
    with open(os.path.join(out_dir, 'report.json'), 'w', encoding='utf-8') as f:
        json.dump(report, f, ensure_ascii=False, indent=2)


# ---- a trained classifier at work ----

def classify_texts(out_dir, texts, run):
    """Print label, probability and text of each text, read by the functions that read the training data."""
    model, tokenizer, checkpoint = load_classifier(out_dir)
    parse, encode = TASKS['cls'][:2]
    try:
        pieces = [Piece('test', parse(dict(label='?', text=text))[1]) for text in texts]
    except ValueError as e:
        fail(f"--classify: {e}")
    rows = [ids for _, ids, _ in encode(tokenizer, pieces)]
    split = Split(np.concatenate(rows), None, np.cumsum([0, *map(len, rows)]), np.zeros(len(rows), np.int64))
    settings = checkpoint['settings']
    block_size, reads = settings['block_size'], settings.get('reads', 'text')   # older runs knew no other
    if n_cut := sum(len(ids) > block_size for ids in rows):
        print(f"{n_cut:,} of {len(rows):,} texts are longer than block_size={block_size} and lose their end",
              file=sys.stderr)
    logits, _ = predictions(model.to(run.device), run, split, block_size, reads, batch_size=1)
    for piece, row in zip(pieces, logits.softmax(dim=-1)):
        p, label = row.max(dim=-1)
        print(f"{checkpoint['labels'][label]}\t{p:.3f}\t{piece.content}")


def lines_of(path):
    """The lines of a file that hold text."""
    try:
        lines = whole_text(path).removesuffix('\n').split('\n')
    except OSError as e:
        fail(f"--classify_file={path}: {e.strerror}")
    texts = [line.strip() for line in lines if line.strip()]
    if texts and len(texts) < len(lines):
        print(f"{path}: {len(lines) - len(texts):,} lines without text are left out", file=sys.stderr)
    return texts or fail(f"--classify_file={path}: no line with text")


def load_learner(run, config):
    """(model, tokenizer, checkpoint): init_from, or the state of out_dir to resume."""
    if config['init_from'] == 'resume':
        model, tokenizer, checkpoint = load_classifier(config['out_dir'], config['dropout'], 'last')
        return model.to(run.device), tokenizer, checkpoint
    model, tokenizer, _ = load_start(run, config)
    if config['random_weights']:
        model = type(model)(model.config).to(run.device)
    return model, tokenizer, None


if __name__ == '__main__':
    config = configure(globals(), {'!classify': 'classify_file init_from dataset block_size reads',
                                   '!classify_file': 'init_from dataset block_size reads'},
                       trainable=one_of('head', 'last', 'all'), reads=one_of('text', 'padding', 'first'))
    run = start_run(device, dtype, seed)
    if classify or classify_file:
        sys.exit(classify_texts(out_dir, lines_of(classify_file) if classify_file else [classify], run))
    model, tokenizer, checkpoint = load_learner(run, config)
    meta, train, val, test = open_data(run, dataset, 'cls', tokenizer)
    counts, names = np.bincount(train.labels, minlength=len(meta['labels'])), meta['labels']
    if not checkpoint:
        add_head(model, len(names)).to(run.device)
    freeze(model, trainable)
    weights = torch.ones(len(names))
    if class_weights:                                           # 1 on average over the texts
        weights = torch.tensor(counts.sum() / (len(names) * counts), dtype=torch.float32)
    device_weights = weights.to(run.device)
    best = checkpoint['best'] if checkpoint else dict(accuracy=-1.0, loss=math.inf, step=0)
    best_weights = checkpoint['model'] if checkpoint else {}
    # the best weights are the run's result; the last ones, to go on with
    what = f"{len(train.labels):,} training texts"
    training = Training(run, config, model, tokenizer, len(train.labels), what, checkpoint, lambda: dict(
        model=best_weights, last=model.state_dict(), labels=names, best=best))
    if n_cut := int((np.diff(train.offsets) > block_size).sum()):
        training.say(f"{n_cut:,} texts are longer than block_size={block_size} and lose their end")

    model.train()
    for step in training:
        if training.due:
            logits, y = predictions(model, run, val, block_size, reads)
            loss = F.cross_entropy(logits, y).item()
            accuracy = (logits.argmax(-1) == y).double().mean().item()
            loss, accuracy = (n / run.world_size for n in run.sum(loss, accuracy))  # ranks must not differ
            if (accuracy, -loss) > (best['accuracy'], -best['loss']):
                best = dict(accuracy=accuracy, loss=loss, step=step)
                best_weights = {k: whole(v).cpu().clone() for k, v in model.state_dict().items()}
            training.evaluated(f"val loss {loss:.4f}  accuracy {accuracy:.3f}  (best {best['accuracy']:.3f} "
                               f"at step {best['step']:,})", val_loss=loss, val_accuracy=accuracy)
        texts = read_rows(len(train.labels), seed, training.position, training.rows)
        for x, y, lengths in training.micro_batches(
                texts, lambda texts: batch_at(train, texts, block_size, reads),
                weigh=lambda x, y, lengths: weights[y].sum().item()):
            with run.autocast():
                logits = label_logits(model, x, lengths).float()
            weight = device_weights[y]                                                      # (B,)
            loss = (F.cross_entropy(logits, y, reduction='none') * weight).sum()
            training.backward(loss, accuracy=((logits.argmax(-1) == y) * weight).sum())
        training.update(texts=len(texts))
    if training.finished:
        model = load_classifier(out_dir)[0].to(run.device)
        write_report(out_dir, model, run, dict(train=train, val=val, test=test), names, block_size, reads)
    training.close(f"the classifier, of step {best['step']:,}, is in {out_dir}: python finetune_cls.py "
                   f"--out_dir={quote(out_dir)} --classify=\"You won a prize\"")
