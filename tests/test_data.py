"""prepare.py on text: what is read, how it is split and stored, and how malformed input is told."""
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, data_script

import prepare
import train_tokenizer
from configurator import Run
from prepare import (Piece, files_of, lot_of, open_data, read_meta, read_pieces, read_split, read_txt,
                     skipped, write_data)
from train_tokenizer import load_tokenizer, text_parts


def texts_of(folder, split):
    """The documents of a prepared folder, decoded, each with its <|endoftext|>."""
    tokenizer, data = load_tokenizer(folder), read_split(str(folder), split)
    return [tokenizer.decode(data.tokens[a:b].tolist()) for a, b in zip(data.offsets, data.offsets[1:])]


def write_lines(file, records):
    file.write_text('\n'.join(map(json.dumps, records)))


@pytest.fixture(autouse=True)
def nothing_counted():
    prepare.malformed.count, prepare.malformed.reasons = 0, {}
    prepare.unused.clear()


# ---- plain text ----

def test_a_text_file_comes_back_whole(script, tmp_path, tokenizer_folder):
    text = TEXT * 3000 + '结束 👍🏽\n'
    (tmp_path / 'novel.txt').write_text('\ufeff' + text)
    script('prepare.py', '--input=novel.txt', f'--tokenizer={tokenizer_folder}', '--dataset=./novel')
    train, val = texts_of(tmp_path / 'novel', 'train'), texts_of(tmp_path / 'novel', 'val')
    assert [*train, *val] == [train[0], val[0]]
    assert train[0].removesuffix('<|endoftext|>') + val[0].removesuffix('<|endoftext|>') == text
    meta = read_meta(str(tmp_path / 'novel'))
    assert meta['train']['bytes'] + meta['val']['bytes'] == len(text.encode())
    assert meta['val']['bytes'] == pytest.approx(0.05 * len(text.encode()), rel=0.01)
    assert meta['vocab_size'] == 350 and meta['tokenizer'] == load_tokenizer(tokenizer_folder).fingerprint


@pytest.mark.parametrize('piece', [7, 64, 1000])
def test_pieces_change_no_id(tmp_path, tokenizer, piece):
    """However a file is cut while it is read, its ids are those of the text in one piece."""
    text = TEXT * 3 + 'x' * 300 + "  it's\n\n\n 3.14 结束了，再见。👍🏽 the end"
    path = tmp_path / 'a.txt'
    path.write_text(text)
    pieces = [p.content for p in read_txt(str(path), val_fraction=0, size=piece)]
    assert ''.join(pieces) == text and len(pieces) > 1
    assert [i for t in pieces for i in tokenizer.encode(t)] == tokenizer.encode(text)


@pytest.mark.parametrize('text, held_out', [
    (' '.join(f'word{i}' for i in range(1000)), ' word950'),        # a little more than the last 5%
    (' '.join(f'word{i}' for i in range(1000)) + '\n' * 9000, ' word950'),     # of what is not blank
    (' '.join(f'a<b{i:03}' for i in range(1000)), ' a<b950'),
    ('炼' * 1900 + '丹' * 100, '丹'),                               # no white space: exactly there
    ('炼' * 1896 + '<|im_end|>' + '丹' * 94, '<|im_end|>')])        # but not inside a special token
def test_one_file_is_held_out_from_a_white_space_on(tmp_path, tokenizer, text, held_out):
    (tmp_path / 'a.txt').write_text(text)
    write_data(str(tmp_path / 'd'), tokenizer, read_pieces(str(tmp_path / 'a.txt')), 'a.txt')
    train, val = (read_split(str(tmp_path / 'd'), split) for split in ('train', 'val'))
    begin = text.index(held_out)
    assert tokenizer.decode(train.tokens) == text[:begin]           # and no <|endoftext|> is learned there
    assert tokenizer.decode(val.tokens) == text[begin:] + '<|endoftext|>'
    for split in (train, val):
        assert split.offsets.tolist() == [0, len(split.tokens)]     # still a whole document
    assert read_meta(str(tmp_path / 'd'))['train']['documents'] == 1


def test_reading_is_linear(tmp_path):
    (tmp_path / 'a.txt').write_text('name' + ' ' * 200_000 + 'value')
    start = time.time()
    assert sum(len(p.content) for p in read_pieces(str(tmp_path / 'a.txt'))) == 200_009
    assert time.time() - start < 5                                  # it was minutes


def test_no_part_of_a_text_ends_inside_a_special_token(tmp_path):
    text = 'ab<|im_end|>' * 500                                     # and no white space
    (tmp_path / 'a.txt').write_text(text)
    parts = list(text_parts(str(tmp_path / 'a.txt'), size=7))
    assert ''.join(parts) == text and len(parts) > 10
    assert sum(part.count('<|im_end|>') for part in parts) == 500


MEASURE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from prepare import load_tokenizer, read_pieces, write_data
write_data('data', load_tokenizer(sys.argv[2]), read_pieces('big.txt'), 'big.txt')
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))
"""


def test_memory_stays_flat(tmp_path, tokenizer_folder):
    """Ten times the text may cost no more memory than the first tenth did."""
    peaks = []
    for size in (2_000_000, 20_000_000):
        (tmp_path / 'big.txt').write_text(TEXT * (size // len(TEXT)))
        command = [sys.executable, '-c', MEASURE, str(ROOT), str(tokenizer_folder)]
        peaks.append(int(subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout))
    assert peaks[1] - peaks[0] < 60e6


# ---- documents ----

def test_jsonl_documents_keep_their_side(script, tmp_path, tokenizer_folder):
    documents = [f'Rule {i}: {TEXT[i:i + 50]}' for i in range(200)]
    lines = [json.dumps({'text': d}) for d in [*documents, *documents]]
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines) + '\n\n')
    script('prepare.py', '--input=a.jsonl', f'--tokenizer={tokenizer_folder}', '--dataset=./a',
           '--val_fraction=0.2')
    train, val = (texts_of(tmp_path / 'a', split) for split in ('train', 'val'))
    assert sorted(train + val) == sorted(d + '<|endoftext|>' for d in [*documents, *documents])
    assert not set(train) & set(val), 'a text stands on both sides'
    assert 20 < len(val) / 2 < 60


def test_a_folder_is_read_file_by_file(tmp_path, monkeypatch):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'b.txt').write_text('second')
    (tmp_path / 'sub' / 'c.jsonl').write_text('{"text": "third"}')
    (tmp_path / 'a.txt').write_text('first')
    (tmp_path / 'ignored.md').write_text('not text for us')
    shown = []
    monkeypatch.setattr(prepare.Progress, 'show', lambda self, fraction: shown.append(fraction))
    pieces = list(read_pieces(str(tmp_path), val_fraction=0))
    assert [p.content for p in pieces if p.content] == ['first', 'second', 'third']
    assert shown == [1, 1, 1]               # each file was read to its end


def test_in_a_folder_a_file_is_a_document(tmp_path):
    texts = [f'Sentence {i} stays\n  whole.' for i in range(60)]
    for i, text in enumerate(texts):
        (tmp_path / f'{i:02}.txt').write_text(text)
        (tmp_path / f'{i:02}b.TXT').write_bytes(f'\ufeff {text} \r\n'.encode())       # its twin
    documents, begun = [], ''
    for piece in read_pieces(str(tmp_path), val_fraction=0.3):
        begun += piece.content
        if piece.ends_document:
            documents.append((piece.split, begun.strip()))
            begun = ''
    # whole, twins on the same side, and on the side of a record
    sides = ['val' if lot_of([text]) < 0.3 else 'train' for text in texts]
    assert documents == [pair for pair in zip(sides, texts) for _ in 'ab'] and not begun
    assert 8 <= [split for split, _ in documents[::2]].count('val') <= 30


def test_the_side_of_a_file_does_not_depend_on_how_it_is_read(tmp_path):
    text = 'one  two\n\nthree ' * 2000 + '\n'
    (tmp_path / 'a.txt').write_text(text)
    for size in (100, 1 << 16):
        assert lot_of(text_parts(str(tmp_path / 'a.txt'), size)) == lot_of([' '.join(text.split())])


def test_of_a_few_files_one_is_held_out_and_of_one_good_file_the_end(tmp_path, capsys):
    for name in 'abc':
        (tmp_path / f'{name}.txt').write_text(f'The text {name}. ' * 40)
    (tmp_path / 'empty.txt').touch()
    lots = {name: lot_of([f'The text {name}. ' * 40]) for name in 'abc'}
    held_out = {p.content[9] for p in read_pieces(str(tmp_path), val_fraction=1e-9, on_error='skip')
                if p.split == 'val' and p.content.startswith('The text')}
    assert held_out == {min(lots, key=lots.get)}
    for name in 'bc':
        (tmp_path / f'{name}.txt').write_bytes(b'\xb5')
    pieces = list(read_pieces(str(tmp_path), val_fraction=0.25, on_error='skip'))
    text = {side: ''.join(p.content for p in pieces if p.split == side) for side in ('train', 'val')}
    assert text['train'] + text['val'] == 'The text a. ' * 40
    assert len(text['val']) == pytest.approx(0.25 * 12 * 40, abs=15)


@pytest.mark.parametrize('as_such', [True, False])
def test_special_tokens_in_a_corpus(script, tmp_path, tokenizer, tokenizer_folder, as_such):
    """Each record as MiniMind's pretraining set has them; each second one ends as TinyStories' do."""
    texts = [f'<|im_start|>Rule {i}<|im_end|>' + '<|endoftext|>\n' * (i % 2) for i in range(40)]
    write_lines(tmp_path / 'a.jsonl', [dict(text=text) for text in texts])
    done = script('prepare.py', '--input=a.jsonl', '--dataset=./d', f'--tokenizer={tokenizer_folder}',
                  *([] if as_such else ['--special_tokens=False']))
    how = 'such' if as_such else 'letters'
    told = done.stdout.splitlines()[-1].removeprefix(f'special tokens in the text, read as {how}: ')
    assert sorted(told.split('; ')) == ['20 x <|endoftext|>', '40 x <|im_end|>', '40 x <|im_start|>']
    data = [read_split('./d', split) for split in ('train', 'val')]
    ids = [split.tokens[a:b].tolist() for split in data for a, b in zip(split.offsets, split.offsets[1:])]
    if as_such:                                                     # each ends once
        wanted = [[tokenizer.im_start, *tokenizer.encode(f'Rule {i}'), tokenizer.im_end, tokenizer.eot,
                   *tokenizer.encode('\n' * (i % 2))] for i in range(40)]
    else:
        wanted = [[*tokenizer.encode(text), tokenizer.eot] for text in texts]
    assert sorted(ids) == sorted(wanted)


def test_special_tokens_in_conversations_stay_text(script, tmp_path, tokenizer, tokenizer_folder):
    write_lines(tmp_path / 'a.jsonl', [dict(instruction=f'Type <|im_end|> {i}', output='<|im_end|>')
                                       for i in range(60)])
    done = script('prepare.py', '--input=a.jsonl', '--dataset=./d', f'--tokenizer={tokenizer_folder}')
    assert 'special tokens' not in done.stdout
    tokens = np.concatenate([read_split('./d', split).tokens for split in ('train', 'val')])
    assert (tokens == tokenizer.im_end).sum() == 2 * 60             # of two turns each


def test_a_tokenizer_learns_nothing_from_special_tokens(monkeypatch):
    class Reader:                                                   # prepare.py --print_text
        stdout = [json.dumps(dict(split='train', text='one<|im_end|>\ntwo<|endoftext|>'))]
        wait = staticmethod(lambda: 0)

        def __init__(self, *args, **options):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass
    monkeypatch.setattr(subprocess, 'Popen', Reader)
    assert list(train_tokenizer.training_texts('a', 1000, [])) == ['one', '\ntwo', '']


def test_arrays_are_mapped_and_small(tmp_path, tokenizer):
    pieces = [Piece('train', 'one two', ends_document=False), Piece('train', ' three')]
    write_data(str(tmp_path / 'd'), tokenizer, [*pieces, Piece('val', 'four')], 'test')
    train = read_split(str(tmp_path / 'd'), 'train')
    assert isinstance(train.tokens, np.memmap) and train.tokens.dtype == np.uint16
    assert train.tokens.tolist() == [*tokenizer.encode('one two'), *tokenizer.encode(' three'), tokenizer.eot]
    assert train.mask.all() and train.offsets.tolist() == [0, len(train.tokens)]


def test_an_interrupted_preparation_leaves_the_old_data(tmp_path, tokenizer):
    folder = str(tmp_path / 'd')
    good = [Piece('train', 'old'), Piece('val', 'old')]
    write_data(folder, tokenizer, good, 'test')

    def broken():
        yield good[0]
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_data(folder, tokenizer, broken(), 'test')
    assert texts_of(folder, 'train') == ['old<|endoftext|>']


def test_only_prepared_data_is_written_over(script, tmp_path, tokenizer_folder):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'novel.txt').write_text(TEXT * 20)
    options = ['--input=mine/novel.txt', f'--tokenizer={tokenizer_folder}']
    assert 'no prepared data set' in script('prepare.py', *options, '--dataset=./mine', code=2).stderr
    assert 'no prepared data set' in script('prepare.py', *options, '--dataset=./.', code=2).stderr
    assert (tmp_path / 'mine' / 'novel.txt').exists()
    for _ in range(2):                                                  # but that is, again and again
        script('prepare.py', *options, '--dataset=./data')


def test_the_data_folder_may_be_empty_or_a_link(tmp_path, tokenizer, monkeypatch):
    (tmp_path / 'disk').mkdir()                                     # empty
    os.symlink(tmp_path / 'disk', tmp_path / 'link')
    for text in ('old', 'new'):
        pieces = [Piece('train', text), Piece('val', text)]
        with monkeypatch.context() as other_drive:                  # there commonpath raises
            other_drive.setattr(os.path, 'commonpath', lambda paths: int('no'))
            write_data(str(tmp_path / 'link'), tokenizer, pieces, str(tmp_path / 'a'))
        assert texts_of(tmp_path / 'disk', 'train') == [f'{text}<|endoftext|>']
    assert (tmp_path / 'link').is_symlink() and sorted(os.listdir(tmp_path)) == ['disk', 'link']


def test_a_source_inside_the_data_folder_is_refused(tmp_path, tokenizer, capsys):
    pieces = [Piece('train', 'a'), Piece('val', 'b')]
    write_data(str(tmp_path / 'd'), tokenizer, pieces, 'test')
    os.symlink(tmp_path / 'd', tmp_path / 'link')
    for source in (tmp_path / 'd' / 'a.txt', tmp_path / 'link' / 'a.txt', tmp_path / 'd'):
        with pytest.raises(SystemExit):
            write_data(str(tmp_path / 'd'), tokenizer, pieces, str(source))
        assert 'which is written anew' in capsys.readouterr().err
    write_data(str(tmp_path / 'd'), tokenizer, pieces, str(tmp_path / 'dd' / 'a.txt'))


# ---- built-in sets: scripts in data/ that write the files a user would bring ----

@pytest.fixture(scope='module')
def pydoc():
    return data_script('pydoc')


@pytest.fixture(scope='module')
def docs(pydoc):
    return list(pydoc.docstrings(sysconfig.get_path('stdlib')))


def test_pydoc_is_real_and_held_out_by_docstring(pydoc, docs):
    pieces = [Piece(record['split'], record['text']) for record in pydoc.texts(docs)]
    documents = {p.content for p in pieces}
    assert len(pieces) > 4000 and len(documents) == len(pieces)
    assert sum(len(d) for d in documents) > 1_000_000
    assert any(d.startswith('def dumps(obj, *, skipkeys=False') and 'JSON formatted' in d for d in documents)
    sides = {}
    for p in pieces:
        sides.setdefault(p.content.split(':\n', 1)[1], set()).add(p.split)
    assert all(len(s) == 1 for s in sides.values())


def test_pydoc_sft_has_all_kinds_of_conversation_and_keeps_held_out_ones_apart(pydoc, docs, monkeypatch):
    monkeypatch.setattr(pydoc, 'HELD_OUT', 0.1)
    records = list(itertools.islice(pydoc.conversations(docs), 2500))
    roles = [tuple(m['role'] for m in record['conversations']) for record in records]
    assert {('user', 'assistant'), ('user', 'assistant') * 2, ('system', 'user', 'assistant')} <= set(roles)
    answers = {split: {r['conversations'][-1]['content'] for r in records
                       if r['split'] == split and len(r['conversations']) == 2
                       and len(r['conversations'][1]['content']) > 60} for split in ('train', 'val')}
    assert len(answers['val']) > 30 and not answers['train'] & answers['val']


def test_pydoc_dpo_tells_nothing_by_style(pydoc, docs):
    """Each answer is chosen once and rejected once, beside one of its length; train and val share none."""
    sides = {'train': [], 'val': []}
    for record in pydoc.pairs(docs):
        sides[record['split']].append(tuple(record[key][-1]['content'] for key in ('chosen', 'rejected')))
    chosen = {split: sorted(c for c, _ in pairs) for split, pairs in sides.items()}
    for split, pairs in sides.items():
        assert chosen[split] == sorted(r for _, r in pairs) and all(c != r for c, r in pairs)
        assert len(set(chosen[split])) == len(pairs) >= 50
    assert not set(chosen['train']) & set(chosen['val'])
    assert sum(abs(len(c) - len(r)) for c, r in sides['train']) / len(sides['train']) < 3


def test_a_built_in_set_is_a_file_that_is_written_once(script, tmp_path, tokenizer_folder):
    """In a copy of the repository, since data/raw/ lies in it; its path can't be printed in ascii."""
    copy, ascii = tmp_path / '灯塔', {'PYTHONIOENCODING': 'ascii'}
    for name in ('configurator.py', 'train_tokenizer.py', 'prepare.py', 'data/reason.py',
                 'data/files.py', 'data/chatml.jinja'):
        (copy / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / name, copy / name)
    options = [f'--tokenizer={tokenizer_folder}', '--dataset=./reason']
    first, second = (script(copy / 'prepare.py', *options, env=ascii).stdout for _ in range(2))
    assert '$ python data/reason.py' in first and '$ python' not in second
    raw = copy / 'data' / 'raw'
    assert {path.name for path in raw.iterdir()} == {'reason.jsonl', 'reason_questions.txt'}
    records = [json.loads(line) for line in (raw / 'reason.jsonl').read_text().splitlines()]
    val, meta = read_split(str(tmp_path / 'reason'), 'val'), read_meta(str(tmp_path / 'reason'), 'sft')
    assert [meta['labels'][i] for i in val.labels] == [r['label'] for r in records if r['split'] == 'val']
    assert len(read_split(str(tmp_path / 'reason'), 'train').labels) == meta['train']['documents']
    line = script(copy / 'prepare.py', *options, '--val_fraction=0.1', code=2, process=True).stderr
    assert '--val_fraction=0.1: the records of' in line and 'name their split' in line


def test_pydoc_is_of_this_python(pydoc):
    assert prepare.BUILT_IN['pydoc'][1] == f'raw/pydoc-{pydoc.VERSION}.jsonl'
    assert pydoc.VERSION == platform.python_version()


def test_a_record_may_name_its_split_and_its_label(tmp_path, tokenizer, capsys):
    splits = ['train', 'val', 'test', 'val']
    lines = [json.dumps(dict(text=f'text {i}', split=split)) for i, split in enumerate(splits)]
    file, folder = tmp_path / 'a.jsonl', str(tmp_path / 'd')
    file.write_text('\n'.join(lines))
    write_data(folder, tokenizer, read_pieces(str(file)), str(file))
    assert [texts_of(folder, split) for split in ('train', 'val', 'test')] == [
        [f'text {i}<|endoftext|>' for i in numbers] for numbers in ([0], [1, 3], [2])]
    assert read_split(folder, 'val').labels is None
    with_labels = [dict(text='a', split='train', label='easy'), dict(text='b', split='val', label='hard'),
                   dict(text='c', split='val')]
    file.write_text('\n'.join(map(json.dumps, with_labels)))
    assert write_data(folder, tokenizer, read_pieces(str(file)), str(file))['labels'] == ['easy', 'hard']
    assert [read_split(folder, split).labels.tolist() for split in ('train', 'val')] == [[0], [1, -1]]
    file.write_text(json.dumps(dict(text='text', split='dev')))
    with pytest.raises(SystemExit):
        list(read_pieces(str(file)))
    assert 'a.jsonl:1: "split" is "dev", not one of train, val, test' in capsys.readouterr().err


def test_print_text_is_what_would_be_tokenised(script, tmp_path):
    """As JSON lines, before there is any tokenizer, and for every kind of file."""
    (tmp_path / 'a.txt').write_text('one ' * 99 + 'end')
    (tmp_path / 'b.jsonl').write_text(json.dumps(dict(instruction='Say', input='it', output='\u517b')))
    (tmp_path / 'c.csv').write_text(''.join(f'{label},{label} {i}\n' for label in 'ab' for i in range(3)))
    lines = [script('prepare.py', f'--input={name}', '--print_text', process=True).stdout.splitlines()
             for name in ('a.txt', 'b.jsonl', 'c.csv')]
    texts = [[json.loads(line) for line in some] for some in lines]
    assert ''.join(piece['text'] for piece in texts[0]) == 'one ' * 99 + 'end'
    assert texts[0][-1]['split'] == 'val' and [piece['text'] for piece in texts[1]] == ['Say\nit\n\u517b']
    assert sorted(piece['text'] for piece in texts[2]) == ['a 0', 'a 1', 'a 2', 'b 0', 'b 1', 'b 2']
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


# ---- opening ----

def test_a_built_in_set_older_than_its_script_is_told(tmp_path, tokenizer, capsys, monkeypatch):
    """As after an update: what it trains on is not what the script says now."""
    monkeypatch.setitem(prepare.BUILT_IN, 'rules', ('pretrain', 'raw/rules.jsonl', 'data/reason.py'))
    write_data(str(tmp_path / 'rules'), tokenizer, [Piece('train', TEXT), Piece('val', TEXT)], 'rules')
    for age, told in ((None, False), ((0, 0), True)):
        os.utime(tmp_path / 'rules' / 'meta.json', age)
        open_data(Run('cpu', torch.float32, 0, 1), str(tmp_path / 'rules'), 'pretrain', tokenizer)
        assert ('is older than' in capsys.readouterr().out) == told


def test_open_data_refuses_another_tokenizer_and_another_task(tmp_path, tokenizer, byte_tokenizer, capsys):
    run, folder, file = Run(torch.device('cpu'), torch.float32, 0, 1), str(tmp_path / 'd'), tmp_path / 'a.txt'
    file.write_text(TEXT)
    write_data(folder, tokenizer, [Piece('train', 'old'), Piece('val', 'old')], str(file))
    meta, train, val = open_data(run, folder, 'pretrain', tokenizer)
    assert meta == read_meta(folder) and train.tokens.tolist() == val.tokens.tolist()
    again = f'run `python prepare.py --dataset={folder} --tokenizer=gpt2` with --input={file}'
    for task, other, words in [
            ('pretrain', byte_tokenizer, [f'was tokenised otherwise than by gpt2: {again}']),
            ('sft', tokenizer, ["prepared for the task 'pretrain', not 'sft'"])]:
        with pytest.raises(SystemExit, match='2'):
            open_data(run, folder, task, other)
        line = capsys.readouterr().err
        assert line.count('\n') == 1 and all(word in line for word in words), line


# ---- mistakes ----

FILES = {'empty.txt': b'', 'latin.txt': 'one\ntwo\ncaf\u00e9\n'.encode('latin-1') * 20, 'a.pdf': b'%PDF',
         'broken.jsonl': b'{"text": "fine"}\n{"text": "broken\n', 'field.jsonl': b'{"txt": "no text"}\n',
         'type.jsonl': b'{"text": 3}\n', 'blank.jsonl': b'{"text": " "}\n', 'list.jsonl': b'[1]\n',
         'latin.jsonl': b'\n{"text": "caf\xe9"}\n', 'half.jsonl': b'{"text": "\\ud83d"}\n',
         'one.jsonl': b'{"text": "one"}\n'}


@pytest.mark.parametrize('source, words', [
    ('nowhere.txt', ['no such file: nowhere.txt']),
    ('empty.txt', ['empty.txt: the file is empty']),
    ('latin.txt', ['latin.txt:3: not UTF-8', '0xe9']),
    ('a.pdf', ['text is read from .txt, .jsonl and .json']),
    ('broken.jsonl', ['broken.jsonl:2: not JSON', 'column 17', '--on_error=skip']),
    ('field.jsonl', ['field.jsonl:1: no field "text" among txt']),
    ('type.jsonl', ['type.jsonl:1: "text" is not a text but 3']),
    ('blank.jsonl', ['blank.jsonl:1: "text" is empty']),
    ('list.jsonl', ['list.jsonl:1: no field "text"']),
    ('latin.jsonl', ['latin.jsonl:2: not UTF-8', '0xe9']),
    ('half.jsonl', ['half.jsonl:1:', 'surrogate']),
    ('.', ['holds no .txt, .jsonl or .json file']),
])
def test_malformed_input_is_one_line(tmp_path, monkeypatch, capsys, source, words):
    monkeypatch.chdir(tmp_path)
    if source != '.':
        for name, content in FILES.items():
            (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as end:
        list(read_pieces(source))
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count('\n') == 1
    for word in words:
        assert word in line


def test_malformed_lines_can_be_skipped_and_are_counted(script, tmp_path, tokenizer_folder):
    good = [json.dumps({'text': f'{TEXT}{i}'}) for i in range(60)]
    (tmp_path / 'mixed.jsonl').write_text('\n'.join(['{"text": ', *good[:30], '[]', *good[30:]]))
    options = ['--input=mixed.jsonl', f'--tokenizer={tokenizer_folder}', '--dataset=./mixed',
               '--val_fraction=0.3']
    script('prepare.py', *options, code=2)
    assert not (tmp_path / 'mixed').exists()
    assert 'skipped 2 malformed records' in script('prepare.py', *options, '--on_error=skip').stderr
    assert len(texts_of(tmp_path / 'mixed', 'train') + texts_of(tmp_path / 'mixed', 'val')) == 60


FOLDER = {'docs.jsonl': b'{"text": "one"}\r\n{"text": \n{"text": "two"}\n[3]\n{"text": 4}\n[5]\n',
          'bom.jsonl': b'\xef\xbb\xbf{"text": "bom"}\r\n\r\n{"text": "crlf"}\r\n',
          'blank_bom.jsonl': b'\xef\xbb\xbf\r\n{"text": "after"}\r\n',
          'big.json': b'[{"text": "big", "id": ' + b'7' * 5000 + b'}, {"text": ' + b'7' * 5000 + b'}]',
          'UPPER.TXT': b'upper', 'blank.txt': b' \n', 'empty.txt': b'', 'empty.jsonl': b'',
          'gbk.txt': b'fine\n' + '炼丹'.encode('gbk'), 'dataset_infos.json': b'{"default": {}}',
          'named.json': b'{"text": "a"}\n{"text": "b"}\n', 'table.csv': b'a,b', 'notes.md': b'no',
          '._a.txt': b'\x00\x05\x16', '.git/a.txt': b'no', 'sub/.ipynb_checkpoints/a.txt': b'no'}


def test_what_is_malformed_in_a_folder_is_skipped_and_told(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in FOLDER.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(content)
    os.symlink('nowhere', 'gone.txt')
    os.symlink('.', 'loop')
    os.mkfifo('pipe.txt')
    pieces = list(read_pieces('.', on_error='skip'))
    assert sorted(p.content for p in pieces) == ['after', 'big', 'bom', 'crlf', 'one', 'two', 'upper']
    told = skipped().replace('./', '')
    assert told.startswith('; skipped 12 malformed records: ')
    assert sorted(told.partition('records: ')[2].split('; ')) == sorted([
        '1 x not JSON (Expecting value, column 1), first at docs.jsonl:2',
        '2 x no field "text", first at docs.jsonl:4',
        '2 x "text" is not a text but Infinity, first at big.json, record 2',
        '3 x the file is empty, first at blank.txt',
        '1 x not UTF-8 (byte 0xc1), first at gbk.txt:2',
        '1 x not a list', 'a .json file is a list of records, a .jsonl file a record per line, first at '
        'dataset_infos.json:1',
        '1 x not JSON (Extra data, column 1), but perhaps a .jsonl file, first at named.json:2',
        '1 x No such file or directory, first at gone.txt'])
    assert prepare.unused == {'*.csv file': 1, '*.md file': 1, '* file': 1}      # the last is a link
    for name in ('blank.txt', 'empty.txt', 'empty.jsonl', 'gbk.txt', 'dataset_infos.json', 'named.json'):
        with pytest.raises(SystemExit, match='2'):
            list(read_pieces(name))
        line = capsys.readouterr().err
        assert line.count('\n') == 1 and f'{name}:' in line and '--on_error=skip' in line


@pytest.mark.parametrize('options', [[], ['--debug_mask'], ['--print_text']])
def test_where_nothing_is_left_the_reasons_are_told(script, tmp_path, tokenizer_folder, options):
    (tmp_path / 'a.jsonl').write_text('{"text": " "}\n' * 3 + '{"text": 4}\n')
    done = script('prepare.py', '--input=a.jsonl', '--dataset=./d', f'--tokenizer={tokenizer_folder}',
                  '--on_error=skip', *options, code=2)
    assert done.stderr == (
        'prepare.py: a.jsonl: nothing is left to read; skipped 4 malformed records: 3 x "text" is empty, '
        'first at a.jsonl:1; 1 x "text" is not a text but 4, first at a.jsonl:4\n')
    assert not (tmp_path / 'd').exists()


def test_a_tokenizer_is_trained_on_what_is_left(script, tmp_path):
    """What was skipped is told even if the reader has enough before the end."""
    lines = ['{"text": ', *(json.dumps(dict(text=TEXT)) for _ in range(2000))]
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'docs.jsonl').write_text('\n'.join(lines))
    (tmp_path / 'a' / 'b.txt').write_bytes(b'')
    done = script('train_tokenizer.py', '--input=a', '--out_dir=t', '--vocab_size=300', '--on_error=skip',
                  '--max_bytes=100000', process=True)
    assert 'stopped reading at max_bytes' in done.stdout and 'wrote t' in done.stdout
    assert done.stderr == ('skipped 2 malformed records: 1 x the file is empty, first at a/b.txt; '
                           '1 x not JSON (Expecting value, column 1), first at a/docs.jsonl:1\n')


def test_a_pipe_is_one_line(tmp_path, capsys):
    os.mkfifo(tmp_path / 'a.jsonl')
    for source in (tmp_path / 'a.jsonl', '/dev/null'):
        with pytest.raises(SystemExit, match='2'):
            files_of(str(source))
        assert f'{source} is a pipe, and read more than once: write it into a file' in capsys.readouterr().err


@pytest.mark.parametrize('options, task, words', [
    ([], 'sft', '60 x "text"; 60 x "system"; 30 x "history"'),      # empty ones are no loss, numbers no text
    (['--task=pretrain'], 'pretrain', '60 x "instruction"; 60 x "output"; 60 x "system"; 30 x "history"')])
def test_the_task_and_what_has_no_use_in_it(script, tmp_path, tokenizer_folder, options, task, words):
    write_lines(tmp_path / 'a.jsonl', [
        dict(text=f'Say {i}: {i}', instruction=f'Say {i}', input='', output=str(i), system='Be brief.', id=i,
             history=[['Hi', 'Yo']] * (i % 2)) for i in range(60)])
    done = script('prepare.py', '--input=a.jsonl', '--dataset=./d',
                  f'--tokenizer={tokenizer_folder}', *options)
    assert read_meta('./d', task) and done.stderr == f'not used: {words}\n'


def test_unused_fields_of_turns_and_columns(tmp_path):
    turns = [dict(role='user', content='Hi', reasoning_content='Hm'),
             dict(role='assistant', content='Yo', reasoning_content='Hm', name='Bo')]
    write_lines(tmp_path / 'a.jsonl', [dict(messages=turns, tools=['t'], label=['x'], kind='y')] * 3)
    assert len(list(read_pieces(str(tmp_path / 'a.jsonl'), 'sft'))) == 3
    assert prepare.unused == {'"reasoning_content" of a turn': 3, '"name" of a turn': 3, '"kind"': 3}
    prepare.unused.clear()
    rows = [f'{label},me,{label}{i}' for label in 'ab' for i in range(3)]
    (tmp_path / 'a.csv').write_text('\n'.join(['label,from,text', *rows, 'a,,A1']))
    assert len(prepare.read_labelled(str(tmp_path / 'a.csv'))) == 6
    assert prepare.unused == {'"from"': 6, 'repeated text': 1}


def test_a_task_that_a_file_is_not_for_is_one_line(script, tmp_path, tokenizer_folder):
    (tmp_path / 'a.txt').write_text(TEXT)
    (tmp_path / 'a.csv').write_text(''.join(f'{x},{x}{i}\n' for x in 'ab' for i in range(3)))
    for name, task, words in [('a.txt', 'cls', "is for 'pretrain'"), ('a.csv', 'sft', "is for 'cls'"),
                              ('a.txt', 'sft', "a.txt: a .txt file is for pretraining"),
                              ('a.txt', 'stf', "did you mean 'sft'?")]:
        options = [f'--input={name}', f'--tokenizer={tokenizer_folder}', f'--task={task}']
        assert words in script('prepare.py', *options, code=2).stderr


def test_a_folder_of_conversations_is_for_sft(script, tmp_path, tokenizer_folder):
    (tmp_path / 'chats').mkdir()
    records = [dict(instruction=f'Say {i}', output='it') for i in range(60)]
    write_lines(tmp_path / 'chats' / 'a.jsonl', records)
    script('prepare.py', '--input=chats', '--dataset=./d', f'--tokenizer={tokenizer_folder}')
    assert read_meta(str(tmp_path / 'd'), 'sft')['train']['documents'] > 50


def test_a_split_without_a_second_token_is_refused(tmp_path, tokenizer, capsys):
    """The first token of a text is nothing that can be predicted."""
    for text in ('', 'a'):
        pieces = [Piece('train', 'one two'), Piece('val', text, ends_document=not text)]
        with pytest.raises(SystemExit, match='2'):
            write_data(str(tmp_path / 'd'), tokenizer, pieces, 'test')
        assert "no document falls into 'val'" in capsys.readouterr().err


def test_a_source_too_small_to_split_is_one_line(script, tmp_path, tokenizer_folder):
    (tmp_path / 'one.jsonl').write_bytes(FILES['one.jsonl'])
    options = ['--input=one.jsonl', f'--tokenizer={tokenizer_folder}', '--dataset=./d']
    assert "no document falls into 'val'" in script('prepare.py', *options, code=2).stderr
    assert not (tmp_path / 'd').exists()


def test_unknown_data_sets_and_old_formats_are_one_line(script, tmp_path, capsys):
    assert 'is not built in' in script('prepare.py', '--dataset=pydocs', code=2).stderr
    (tmp_path / 'meta.json').write_text(json.dumps({'format': prepare.FORMAT - 1}))
    with pytest.raises(SystemExit):
        read_meta(str(tmp_path))
    assert 'run prepare.py again' in capsys.readouterr().err
