"""Two points that only runs can show, of chapters I-7 and I-8; a table says what came out.

    python tests/show_classifier.py classifier      # where the head reads, and what learns
    python tests/show_classifier.py loss_on         # targets: answers alone, or prompts too

Both start from out/pretrain, which `python pretrain.py` makes.
"""
import io
import json
import os
import runpy
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configurator import clock, fail  # noqa: E402  (the line above makes it importable)


def train(script, folder, **settings):
    """Run a stage in this process. Returns what it logged, a dict per line, and its report."""
    began, arguments = time.time(), [f'--{key}={value}' for key, value in settings.items()]
    sys.argv = [str(ROOT / script), f'--out_dir={folder}', *arguments]
    print(f"training: {folder.name}", end='', file=sys.stderr, flush=True)
    with redirect_stdout(io.StringIO()):
        try:
            runpy.run_path(sys.argv[0], run_name='__main__')
        except SystemExit as end:
            if end.code:                                # a mistake, or Ctrl-C
                raise
    print(f", {clock(time.time() - began)}", file=sys.stderr)
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return lines, json.loads((folder / 'report.json').read_text())


def table(head, rows):
    """Print rows of texts and numbers below their heads, the first column to the left."""
    rows = [[f'{x:,.3f}' if isinstance(x, float) else str(x) for x in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *rest in rows:
        print(first.ljust(widths[0]), *(x.rjust(width) for x, width in zip(rest, widths[1:])), sep='   ')


def classifier(folder, **settings):
    """Accuracy where the head reads the end of the text or of its padding, or the first token (I-7)"""
    settings, rows = {**dict(block_size=72, max_iters=60), **settings}, []     # 72 tokens: the longest text
    for words, how in {
            "text, all": {}, "text, last": dict(trainable='last'), "text, head": dict(trainable='head'),
            "padding, last (the chapter)": dict(reads='padding', trainable='last'),
            "padding, all": dict(reads='padding'), "first, last": dict(reads='first', trainable='last'),
            "text, all, from random weights": dict(random_weights=True)}.items():
        _, report = train('finetune_cls.py', folder / words, **how, **settings)
        rows.append([words, *(report[split]['accuracy'] for split in ('train', 'val', 'test'))])
    table(['reads, trainable', 'train', 'val', 'test'], rows)


def loss_on(folder, **settings):
    """Held-out loss on answers, and how many end, with answers as targets, or prompts too (I-8)"""
    settings, rows = {**dict(max_iters=30, eval_interval=30, report_size=24), **settings}, []
    for targets in ('answers', 'all'):
        lines, report = train('sft.py', folder / targets, loss_on=targets, **settings)
        val = [line['val_loss'] for line in lines if 'val_loss' in line]
        ended = sum(entry['stopped'] for entry in report)
        rows.append([targets, val[0], val[-1], f'{ended} of {len(report)}'])
    table(['loss on', 'held-out loss before', 'after', 'answers that end'], rows)


POINTS = dict(classifier=classifier, loss_on=loss_on)

if __name__ == '__main__':
    if len(sys.argv) != 2 or sys.argv[1] not in POINTS:
        fail(f"name a point: {', '.join(POINTS)}")
    if not os.path.isfile(ROOT / 'out' / 'pretrain' / 'ckpt.pt'):
        fail("no run in out/pretrain to start from: `python pretrain.py`")
    with tempfile.TemporaryDirectory() as folder:
        POINTS[sys.argv[1]](Path(folder))
