"""Points of the tutorial that only a run can show: small models are trained, a table says what came out.

    python tests/show.py                        # which points there are
    python tests/show.py positions norms        # one or two minutes each on two cores

The runs are temporary. The points of pretraining leave a picture, out/pictures/NAME.png; classifier and
loss_on start from out/pretrain, which `python pretrain.py` makes. A held-out loss is in nats.
"""
import functools
import io
import json
import runpy
import signal
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import model_minimind  # noqa: E402  (the line above makes it importable)
from configurator import (clock, draw, draw_shares, fail, last_words, load_checkpoint, make_folder,  # noqa: E402
                          one_of, start_run)
from prepare import data_folder, read_split  # noqa: E402
from pretrain import bands_of, loss_by_position  # noqa: E402
from sample import generate, load_run  # noqa: E402

PICTURES = ROOT / 'out' / 'pictures'
SMALL = dict(dataset='pydoc', n_layer=2, n_head=4, n_kv_head=2, n_embd=128, block_size=64, batch_size=16,
             max_iters=200, log_interval=10)


def train(script, folder, **settings):
    """Run a stage in this process, evaluated at start and end. Returns what it logged, a dict per line."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    began, arguments = time.time(), [f'--{key}={value}' for key, value in settings.items()]
    sys.argv = [str(ROOT / script), f'--out_dir={folder}', *arguments, '--eval_interval=1000000']
    print(f"training: {folder.name}", file=sys.stderr, flush=True)     # a line: the stage may have words, too
    with redirect_stdout(io.StringIO()):
        try:
            runpy.run_path(sys.argv[0], run_name='__main__')
        except SystemExit as end:
            if end.code:                                # a mistake, or Ctrl-C
                raise
    for number, handler in handlers.items():            # the loop had its own
        signal.signal(number, handler)
    print(f"trained in {clock(time.time() - began)}", file=sys.stderr)
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def held_out(lines):
    """The held-out losses among what a run logged."""
    return [line['val_loss'] for line in lines if 'val_loss' in line]


def table(head, rows):
    """Print rows of texts and numbers below their heads, the first column to the left."""
    rows = [[f'{x:,.3f}' if isinstance(x, float) else f'{x:,}' if isinstance(x, int) else x for x in row]
            for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *rest in rows:
        print(first.ljust(widths[0]), *(x.rjust(width) for x, width in zip(rest, widths[1:])), sep='   ')


def positions(folder, **settings):
    """Trained on short rows, read in longer ones: RoPE, with YaRN, learned, sinusoids, none (II-3, II-4)"""
    settings, sums, run = {**SMALL, **settings}, {}, start_run('auto', 'float32')
    short = settings['block_size']
    for kind in model_minimind.POSITIONS:
        train('pretrain.py', folder / kind, positions=kind, eval_block_size=4 * short, **settings)
        val = read_split(data_folder(settings['dataset']), 'val')
        for name, factor in {kind: 1, **({'rope, YaRN x4': 4} if kind == 'rope' else {})}.items():
            model = load_run(str(folder / kind), run.device, yarn_factor=factor)[0]
            sums[name] = loss_by_position(model, run, val, 4 * short, settings['batch_size'], 50)
    table(['positions', *(f'{first}-{last}' for first, last, _ in bands_of(sums['rope'], short))],
          [[name, *(loss for *_, loss in bands_of(found, short))] for name, found in sums.items()])
    for axes in draw(PICTURES / 'positions.png'):
        for name, found in sums.items():
            total, count = found.unflatten(1, (-1, short // 8)).sum(2)          # means over so many positions
            axes.plot(torch.arange(len(total)) * (short // 8) + short // 16, total / count, label=name)
        axes.axvline(short, color='grey', linestyle=':')
        axes.set(xlabel=f"position in the row; dotted: the end of rows in training, {short}",
                 ylabel="held-out loss")
        axes.legend()


def norms(folder, **settings):
    """RMSNorm against LayerNorm: the loss over the steps, and the time they take (II-2)"""
    settings, rows, curves = {**SMALL, **settings}, [], {}
    kinds = dict(RMSNorm=model_minimind.RMSNorm, LayerNorm=nn.LayerNorm)
    tokens, width = settings['batch_size'] * settings['block_size'], settings['n_embd']
    x, best = torch.randn(tokens, width, requires_grad=True), dict.fromkeys(kinds, float('inf'))
    for _ in range(50):                                 # in turns, so that they meet the same machine
        for name, kind in kinds.items():
            norm, began = kind(width, 1e-5), time.perf_counter()
            norm(x).backward(x)
            best[name] = min(best[name], 1e3 * (time.perf_counter() - began))
    for name, kind in kinds.items():
        with mock.patch.object(model_minimind, 'RMSNorm', kind):
            lines = train('pretrain.py', folder / name, **settings)
        curves[name] = [(line['step'], line['loss']) for line in lines if 'loss' in line]
        fastest = max(line['tokens_per_second'] for line in lines if 'loss' in line)
        rows.append([name, held_out(lines)[-1], 1e3 * tokens / fastest, best[name]])
    table(['norm', 'held-out loss', 'ms a step', 'ms a norm, forward and backward'], rows)
    for axes in draw(PICTURES / 'norms.png'):
        for (name, curve), style in zip(curves.items(), ('-', '--')):
            axes.plot(*zip(*curve), style, label=name)
        axes.set(xlabel='step', ylabel='training loss')
        axes.legend()


def heads(folder, length=512, **settings):
    """Multi-head, grouped and multi-query attention, and decoding with the KV cache and without (II-5)"""
    settings, rows, curves = {**SMALL, 'n_head': 8, 'n_embd': 256, 'max_iters': 150, **settings}, [], {}
    for name, n_kv_head in {'multi-head': settings['n_head'], 'grouped': 2, 'multi-query': 1}.items():
        lines = train('pretrain.py', folder / name, **{**settings, 'n_kv_head': n_kv_head}, context=length)
        model, tokenizer, _ = load_run(str(folder / name))
        speeds, cache = [], model.make_cache(1, length)
        for use_cache in (True, False):
            began, seconds = time.time(), []
            for _ in generate(model, torch.tensor([[tokenizer.bos]]), length - 1, use_cache=use_cache):
                seconds.append(time.time() - began)
            speeds.append(len(seconds) / seconds[-1])
            curves[f"{name}, {'with' if use_cache else 'without'} cache"] = seconds
        size = sum(t.nbytes for t in cache.keys + cache.values)
        rows.append([f"{name}, {n_kv_head} of {settings['n_head']}", held_out(lines)[-1], size, *speeds])
    table(['key and value heads', 'held-out loss', f'bytes of cache, {length} tokens', 'tokens/s',
           'without cache'], rows)
    for axes in draw(PICTURES / 'heads.png'):
        for i, (name, seconds) in enumerate(curves.items()):
            axes.plot(seconds, '-:'[i % 2], color=f'C{i // 2}', label=name)
        axes.set(xlabel='tokens written', ylabel='seconds')
        axes.legend()


def experts(folder, **settings):
    """A mixture of experts with the load-balancing loss and without: who gets the tokens (II-6)"""
    settings = {**SMALL, 'use_moe': True, 'num_experts': 4, 'num_experts_per_tok': 1,
                'norm_topk_prob': False, **settings}
    rows, panels = [], {}
    for coefficient in (0.0, 0.02):
        lines = train('pretrain.py', folder / f'{coefficient}', router_aux_loss_coef=coefficient, **settings)
        steps, loads = zip(*((line['step'], line['expert_load']) for line in lines if 'loss' in line))
        rows.append([str(coefficient), held_out(lines)[-1]])
        for layer, shares in enumerate(zip(*loads)):
            panels[f"coef {coefficient}, layer {layer}"] = shares
            rows[-1] += ' '.join(f'{share:.0%}' for share in sorted(shares[-1], reverse=True)),
    table(['router_aux_loss_coef', 'held-out loss', *(
        f'layer {layer}: visits of each expert' for layer in range(settings['n_layer']))], rows)
    draw_shares(PICTURES / 'experts.png', steps, panels)


def classifier(folder, **settings):
    """Accuracy where the head reads the end of the text or of its padding, or the first token (I-7)"""
    settings, rows = {**dict(block_size=72, max_iters=60), **settings}, []     # 72 tokens: the longest text
    for words, how in {
            "text, all": {}, "text, last": dict(trainable='last'), "text, head": dict(trainable='head'),
            "padding, last (the chapter)": dict(reads='padding', trainable='last'),
            "padding, all": dict(reads='padding'), "first, last": dict(reads='first', trainable='last'),
            "text, all, from random weights": dict(random_weights=True)}.items():
        train('finetune_cls.py', folder / words, **how, **settings)
        report = json.loads((folder / words / 'report.json').read_text())
        rows.append([words, *(report[split]['accuracy'] for split in ('train', 'val', 'test'))])
    table(['reads, trainable', 'train', 'val', 'test'], rows)


def loss_on(folder, **settings):
    """Held-out loss on answers, and how many end, with answers as targets, or prompts too (I-8)"""
    settings, rows = {**dict(max_iters=30, report_size=24), **settings}, []
    for targets in ('answers', 'all'):
        val = held_out(train('sft.py', folder / targets, loss_on=targets, **settings))
        report = json.loads((folder / targets / 'report.json').read_text())
        ended = sum(entry['stopped'] for entry in report)
        rows.append([targets, val[0], val[-1], f'{ended} of {len(report)}'])
    table(['loss on', 'held-out loss before', 'after', 'answers that end'], rows)


POINTS = dict(positions=positions, norms=norms, heads=heads, experts=experts, classifier=classifier,
              loss_on=loss_on)


if __name__ == '__main__':
    sys.excepthook = functools.partial(last_words, ())
    names, rule = sys.argv[1:], one_of(*POINTS)
    for name in names:
        if rule(name):
            fail(f"a point to show {rule(name)}, not {name!r}")
    if {'classifier', 'loss_on'} & {*names}:
        load_checkpoint(ROOT / 'out' / 'pretrain')          # told before any point is worked at
    if not names:
        print(__doc__, *(f"{name:12}{point.__doc__}" for name, point in POINTS.items()), sep='\n')
    for name in names:
        make_folder(PICTURES)
        began = time.time()
        print(f"{name}: {POINTS[name].__doc__}")
        with tempfile.TemporaryDirectory() as folder:
            POINTS[name](Path(folder))
        print(f"({clock(time.time() - began)})\n")
