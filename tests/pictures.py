"""The tutorial's pictures, drawn by this code: each number comes from the functions that a run uses.

    python tests/pictures.py                            # all of them -> out/pictures
    python tests/pictures.py gelu rope                  # some: the names are those of PICTURES
    python tests/pictures.py attention --out_dir=out/pretrain --prompt="def is_"
    python tests/pictures.py embeddings --out_dir=out/pretrain --token=" file"
    python tests/pictures.py loss --out_dir=out/sft
"""
import argparse
import functools
import io
import json
import os
import re
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from configurator import HERE, draw, fail, has_matplotlib, last_words, make_folder  # noqa: E402
from model_gpt2 import plain_gelu  # noqa: E402
from model_minimind import (MiniMindConfig, apply_rope, plain_attention, rope_table,  # noqa: E402
                            sinusoidal_positions)
from sample import distribution, evaluating, load_run, token_label  # noqa: E402

# the nine words of chapter I-6, and their logits behind "every effort moves you"
WORDS = 'closer every effort forward inches moves pizza toward you'.split()
LOGITS = torch.tensor([[4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])


def picture(name, *grid):
    """draw() of a file in out/pictures, whose path is printed."""
    path = os.path.join(HERE, 'out', 'pictures', f'{name}.png')
    make_folder(os.path.dirname(path))
    yield from draw(path, *grid)
    print(f"drawn: {path}")


# ---- of functions ----

def gelu():
    x = torch.linspace(-4, 4, 401)
    for axes in picture('I-4_gelu'):
        axes.plot(x, x.relu(), '--', label="ReLU")
        axes.plot(x, plain_gelu(x), label="GELU")
        axes.set(xlabel='x', ylabel='activation')
        axes.grid(alpha=0.3)
        axes.legend()


def sampling():
    """The nine words at three temperatures, and behind three filters, which remove some of them."""
    for name, ways in dict(
            temperature=[dict(temperature=t) for t in (1.0, 0.1, 5.0)],
            filters=[{}, dict(top_k=5), dict(top_p=0.9), dict(min_p=0.01)]).items():
        for axes in picture(f'I-6_{name}'):
            width = 0.8 / len(ways)
            for i, how in enumerate(ways):
                places = [word + width * (i - (len(ways) - 1) / 2) for word in range(len(WORDS))]
                label = ', '.join(f'{key} = {value}' for key, value in how.items()) or 'no filter'
                axes.bar(places, distribution(LOGITS, **how)[0].tolist(), width, label=label)
            axes.set_xticks(range(len(WORDS)), WORDS, rotation=45)
            axes.set(ylabel='probability', yscale='log' if name == 'filters' else 'linear')
            axes.legend(loc='upper left', bbox_to_anchor=(1, 1))


def sinusoids():
    table = sinusoidal_positions(128, 64)                                       # (positions, dim)
    for axes in picture('II-3_sinusoids'):
        image = axes.imshow(table.numpy(), aspect='auto', cmap='RdBu', interpolation='nearest')
        axes.set(xlabel='dimension', ylabel='position')
        axes.figure.colorbar(image)
    for axes in picture('II-3_sinusoids_columns'):
        for dim in (0, 8, 16, 32):
            axes.plot(table[:, dim], label=f'dimension {dim}')
        axes.set(xlabel='position', ylabel='value')
        axes.legend(loc='upper left', bbox_to_anchor=(1, 1))


def rope():
    """A vector that is turned by its position, and the score of two that are, against their distance."""
    table = rope_table(MiniMindConfig(head_dim=4, rope_theta=12.0, max_position_embeddings=6))
    turned = apply_rope(torch.tensor([1.0, 1.0, 0.0, 0.0]), *table)             # (positions, 4): two pairs
    for axes in picture('II-4_rope_turns'):
        for pair, length in ((0, 1.0), (1, 0.6)):                               # pair i is (x_i, x_{i+D/2})
            x, y = (length * turned[:, i] for i in (pair, pair + 2))
            axes.quiver(*torch.zeros(2, 6), x, y, color=f'C{pair}', angles='xy', scale_units='xy', scale=1,
                        width=0.008, label=f'pair {pair}: {12 ** (-pair / 2):.2f} radians a position')
            for position in range(6):
                axes.annotate(position, (1.14 * x[position], 1.14 * y[position]), ha='center', va='center',
                              bbox=dict(fc='white', ec='none', pad=0.5))
        axes.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect='equal', xlabel='first of the pair',
                 ylabel='second of the pair')
        axes.legend(loc='upper left', bbox_to_anchor=(1, 1), title='one vector at positions 0 to 5')
    for axes in picture('II-4_rope_score'):
        for i, theta in enumerate((1e4, 1e6)):
            table = rope_table(MiniMindConfig(head_dim=64, rope_theta=theta, max_position_embeddings=2049))
            q = apply_rope(torch.ones(64) / 8, *table)                          # (positions, 64); k = q
            near, far = torch.arange(1, 1025), 2 ** torch.arange(11)
            axes.plot(near, q[near] @ q[0], f'C{i}-', lw=1, label=f'theta = {theta:g}, k at 0')
            axes.plot(far, q[1000 + far] @ q[1000], f'C{i}o', label=f'theta = {theta:g}, k at 1000')
        axes.set(xscale='log', xlabel='position of q - position of k', ylabel='q k, of one vector')
        axes.grid(alpha=0.3)
        axes.legend()


# ---- of a run ----

def read_losses(options):
    """(curves, unit, seen, steps): {label: [(step, loss), ...]}, and how much of a unit so many steps saw."""
    path = os.path.join(options.out_dir, 'metrics.jsonl')
    try:
        with open(path, encoding='utf-8') as f:
            lines = [json.loads(line) for line in f]
        curves = {label: [(line['step'], float(line[name])) for line in lines if line.get(name) is not None]
                  for name, label in (('loss', 'training loss'), ('val_loss', 'held-out loss'))}
        unit, seen, steps = max((unit, line[unit], line['step'] + 1) for line in lines
                                for unit in ('tokens', 'texts', 'pairs') if unit in line)
        if not (0 < seen < float('inf') and 0 < steps < float('inf')):
            raise ValueError(f"{seen} {unit} in {steps} steps")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        fail(f"{path} holds no losses of a run ({type(e).__name__}: {e})")
    return curves, unit, seen, steps


def loss(curves, unit, seen, steps):
    """Loss against steps, and against what was seen by then: tokens, texts, or pairs."""
    for axes in picture('I-5_loss'):
        for (label, curve), style in zip(curves.items(), ('-', 'o--')):
            axes.plot([step for step, _ in curve], [value for _, value in curve], style, label=label)
        axes.set(xlabel='step', ylabel='loss')
        axes.legend()
        top = axes.secondary_xaxis('top', functions=(lambda x: x * seen / steps, lambda x: x * steps / seen))
        top.set_xlabel(f'{unit} seen')


def attention_weights(model, tokens):
    """Of each layer (B, H, T, T): how much each query (row) takes of each token (column). The kernel that the
    model uses keeps them to itself: the plain formula makes them of the same queries and keys, as what it
    makes of the values 1 and 0."""
    kernel, found = F.scaled_dot_product_attention, []

    def watched(q, k, v, attn_mask=None, **how):
        B, H, S, _ = k.shape
        allowed = torch.ones(q.size(2), S).tril().bool() if attn_mask is None else attn_mask
        found.append(plain_attention(q, k, torch.eye(S).expand(B, H, S, S), allowed))
        return kernel(q, k, v, attn_mask=attn_mask, **how)

    with evaluating(model), patch.object(F, 'scaled_dot_product_attention', watched):
        model(tokens)
    return found


def read_prompt(options):
    """(model, tokenizer, ids) of --prompt."""
    model, tokenizer, _ = load_run(options.out_dir)
    ids = [tokenizer.bos, *tokenizer.encode(options.prompt)]
    if len(ids) > min(48, model.config.context):
        fail(f"--prompt has {len(ids)} tokens, too many for a picture: give at most 47, and no more than the "
             f"context of {options.out_dir}, {model.config.context}")
    return model, tokenizer, ids


def attention(model, tokenizer, ids):
    weights = torch.cat(attention_weights(model, torch.tensor([ids])))          # (layers, H, T, T)
    layers, heads = weights.shape[:2]
    words = [token_label(tokenizer, i) for i in ids]
    for i, axes in enumerate(picture('I-3_attention', heads, layers)):
        axes.figure.set_size_inches(*(max(2.5, 0.9 + 0.15 * len(ids)) * n for n in (heads, layers)))
        image = axes.imshow(weights[i // heads, i % heads].numpy(), vmin=0, vmax=1, cmap='Blues')
        axes.set_title(f'layer {i // heads}, head {i % heads}', fontsize=8)
        axes.set_xticks(range(len(ids)), words, rotation=90, fontsize=7)
        axes.set_yticks(range(len(ids)), words, fontsize=7)
        if i + 1 == layers * heads:
            axes.figure.colorbar(image, ax=axes.figure.axes, label='weight, from row to column')


def neighbours(model, tokenizer, token, n=12):
    """[(id, cosine of its embedding with that of a token), ...] of the n nearest other tokens."""
    table = (model.transformer.wte if model.config.model_type == 'gpt2' else model.model.embed_tokens).weight
    table = table.detach()[:tokenizer.vocab_size]                               # (V, C)
    cosines = F.cosine_similarity(table, table[token], dim=1)
    return [(i, cosines[i].item()) for i in cosines.argsort(descending=True).tolist() if i != token][:n]


def read_token(options):
    """(model, tokenizer, id) of --token."""
    model, tokenizer, _ = load_run(options.out_dir)
    ids = tokenizer.encode(options.token)
    if len(ids) != 1:
        fail(f"--token={options.token!r} is {len(ids)} tokens, give one of these: "
             f"{', '.join(repr(tokenizer.decode([i])) for i in ids)}")
    return model, tokenizer, ids[0]


def embeddings(model, tokenizer, token):
    near = neighbours(model, tokenizer, token)
    print(f"cosine  nearest to {tokenizer.decode([token])!r}")
    for i, cosine in near:
        print(f"{cosine:6.3f}  {tokenizer.decode([i])!r}")
    for axes in picture('I-2_embeddings'):
        axes.barh(range(len(near)), [cosine for _, cosine in near])
        axes.set_yticks(range(len(near)), [token_label(tokenizer, i) for i, _ in near])
        axes.invert_yaxis()
        axes.set(xlabel=f"cosine with the embedding of {token_label(tokenizer, token)}")


PICTURES = dict(embeddings=embeddings, attention=attention, gelu=gelu, loss=loss, sampling=sampling,
                sinusoids=sinusoids, rope=rope)
OF_A_RUN = dict(embeddings=('ckpt.pt', read_token), attention=('ckpt.pt', read_prompt),
                loss=('metrics.jsonl', read_losses))                                    # what it is drawn of
OPTIONS = dict(out_dir=(os.path.join(HERE, 'out', 'pretrain'), OF_A_RUN),               # default, what for
               prompt=('def is_', ['attention']), token=(' file', ['embeddings']))

if __name__ == '__main__':
    sys.excepthook = functools.partial(last_words, ())
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.error = fail                                                 # in one line
    parser.add_argument('names', nargs='*')
    for option in OPTIONS:
        parser.add_argument(f'--{option}')
    options = parser.parse_args()
    if unknown := set(options.names) - set(PICTURES):
        fail(f"no picture {min(unknown)!r}; there are {', '.join(PICTURES)}")
    asked = options.names or options.out_dir is not None and not any(   # for what is not there
        os.path.isfile(os.path.join(options.out_dir, file)) for file, _ in OF_A_RUN.values())
    for option, (default, names) in OPTIONS.items():
        value = getattr(options, option)
        if value is None:
            setattr(options, option, default)
        elif option != 'out_dir' and re.search('[\ud800-\udfff]', value):
            fail(f"--{option} takes UTF-8 text, not {value!r}")
        elif options.names and not {*names} & {*options.names}:
            fail(f"--{option} is for {', '.join(names)}, and here {', '.join(options.names)} is drawn")
    if not has_matplotlib():
        sys.exit(2)
    if isinstance(sys.stdout, io.TextIOWrapper):                        # a terminal may lack letters
        sys.stdout.reconfigure(errors='backslashreplace')
    found = {}                                                          # read before any picture is drawn
    for name in options.names or PICTURES:
        file, read = OF_A_RUN.get(name, ('', None))
        if os.path.isfile(os.path.join(options.out_dir, file)):
            found[name] = read(options)
        elif file:
            line = f"{name}: no run in {options.out_dir} to draw; train one with `python pretrain.py`"
            fail(line) if asked else print(line)
        else:
            found[name] = ()
    for name, what in found.items():
        PICTURES[name](*what)
