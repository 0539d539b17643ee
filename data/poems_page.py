"""
The road of the poems as a page: what each stage wrote to the same orders, marked by the judge of form.

    python data/poems_page.py out/poems         # reads samples.txt of each run in it -> out/poems/page.html

samples.txt is what sample.py prints, poems or orders with their poems. `bash tests/road.sh poems` makes them.
"""
import html
import itertools
import os
import sys

from files import fail, running, writing
from poems import RAW
from poetry_form import COLUMNS, limits, load_judge, samples_of, shares

WORDS = dict(form='合体裁', order='合要求', rhyme='押韵', line_tones='句合平仄', tones='全诗合律',
             copied='抄句')
COLOURS = '#c8c2b4 #7a9e9f #c0703c #8c3b2e #51688c #6b8e4e #9a6fa0 #3d3d3d #d9a441'.split()
STAGES = dict(真诗='没有参加训练', pretrain='预训练', sft='指令微调', dpo='按偏好对齐', ci_lora='填词，LoRA',
              ci_sft='填词，全参数微调', student='小模型，有老师', alone='小模型，没有老师',
              taught='小模型，只读老师写的诗')
STYLE = """body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; background: #faf7f0; color: #222;
  font: 16px/1.7 'Songti SC', 'Noto Serif CJK SC', SimSun, serif } h1, h2 { font-weight: normal }
table { border-collapse: collapse } td, th { padding: .2rem .8rem; text-align: right; font-weight: normal }
th:first-child, td:first-child { text-align: left } tr:first-child { border-bottom: 1px solid #999 }
.poems { display: flex; flex-wrap: wrap; gap: .8rem } .poems > div { background: #fff; padding: .6rem 1rem;
  border: 1px solid #e4ddcc; white-space: pre-line } small { color: #777; font-size: .75rem }
svg { display: block; margin-top: 1.5rem } .yes { color: #4a7a3a }
.no { color: #b04030 } .yes::before { content: '✓' } .no::before { content: '×' }"""


def picture(table):
    """Bars of the shares as SVG: a group for each mark, in it a bar for each row of the table."""
    bars, step = [], 760 // len(WORDS)
    width = (step - 24) // len(table)
    for i, (mark, word) in enumerate(WORDS.items()):
        for j, (_, marks) in enumerate(table.values()):
            height = 160 * marks.get(mark, 0)
            bars.append(f'<rect x="{i * step + j * width}" y="{180 - height:.1f}" width="{width - 1}" '
                        f'height="{height:.1f}" fill="{COLOURS[j % len(COLOURS)]}"/>')
        bars.append(f'<text x="{i * step}" y="198" font-size="13">{word}</text>')
    return f'<svg viewBox="0 16 780 188">{"".join(bars)}</svg>'


def poem_box(judge, name, order, text):
    """One poem with its marks."""
    marks = judge.marks(text, order)
    shown = ' '.join(f'<span class="{"yes" if marks[mark] else "no"}">{WORDS[mark]}</span>'
                     for mark in ('form', 'order', 'rhyme', 'tones') if mark in marks)
    return f'<div><small>{html.escape(name)} {shown}</small>\n{html.escape(text.strip())}</div>'


def page(judge, real, stages, n=10):
    """HTML. real: held-out poems as lines; stages: {name: [(order, text), ...]}, an order perhaps ''.

    Of each stage without orders the first n poems, then its first n orders with the poems of every stage."""
    samples = [('真诗', order, text) for name, order, text in limits(real) if name.startswith('real')]
    samples += [(name, order, text) for name, found in stages.items() for order, text in found]
    table, parts = shares(judge, samples), []
    rows = [['', '首数', *(f'{WORDS[mark]}<br><small>{COLUMNS[mark]}</small>' for mark in WORDS)]]
    for colour, (name, (count, marks)) in zip(itertools.cycle(COLOURS), table.items()):
        row = [f'{marks[mark]:.1%}' if mark in marks else '–' for mark in WORDS]
        rows.append([f'<span style="color: {colour}">■</span> {html.escape(name)} '
                     f'<small>{STAGES.get(name, "")}</small>', f'{count:,}', *row])
    ordered = {name: found for name, found in stages.items() if any(order for order, _ in found)}
    for name, found in stages.items():
        if name not in ordered:
            boxes = ''.join(poem_box(judge, '', *one) for one in found[:n])
            parts.append(f'<h2>{html.escape(name)}</h2><div class="poems">{boxes}</div>')
    firsts = [list(dict.fromkeys(order for order, _ in found if order))[:n] for found in ordered.values()]
    for order in dict.fromkeys(order for some in firsts for order in some):
        boxes = ''.join(poem_box(judge, name, order, dict(reversed(found))[order])
                        for name, found in ordered.items() if order in dict(found))
        parts.append(f'<h2>{html.escape(order)}</h2><div class="poems">{boxes}</div>')
    cells = ''.join('<tr>' + ''.join(f'<{tag}>{cell}</{tag}>' for cell in row) + '</tr>'
                    for tag, row in zip(['th', *['td'] * len(rows)], rows))
    return (f'<!doctype html><html lang="zh"><meta charset="utf-8"><title>诗</title><style>{STYLE}</style>'
            '<h1>从零开始学写诗</h1><p>对同样的要求，每个阶段写出的诗，按格律打分。</p>'
            f'<table>{cells}</table>{picture(table)}{"".join(parts)}</html>\n')


if __name__ == '__main__':
    with running():
        if len(sys.argv) != 2 or sys.argv[1].startswith('-'):
            fail("give the folder of the runs, as in `python data/poems_page.py out/poems`")
        folder = sys.argv[1]
        judge, held_out = load_judge(RAW)
        found = [os.path.join(folder, name, 'samples.txt') for name in os.listdir(folder)]
        found = sorted(filter(os.path.isfile, found), key=os.path.getmtime)
        if not found:
            fail(f"{folder} holds no run with a samples.txt: `bash tests/road.sh poems` makes them")
        stages = {os.path.basename(os.path.dirname(path)): [sample[1:] for sample in samples_of(path)]
                  for path in found}
        text = page(judge, held_out, stages)
        with writing(os.path.join(folder, 'page.html')) as f:
            f.write(text)
