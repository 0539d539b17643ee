"""prepare.py on text: what is read, how it is split and stored, and how malformed input is told."""
import itertools
import json
import platform
import shutil
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, data_script

import prepare
from configurator import Run
from prepare import Piece, open_data, read_meta, read_pieces, read_split, read_txt, write_data
from train_tokenizer import load_tokenizer


def texts_of(folder, split):
    """The documents of a prepared folder, decoded, each with its <|endoftext|>."""
    tokenizer, data = load_tokenizer(folder), read_split(str(folder), split)
    return [tokenizer.decode(data.tokens[a:b].tolist()) for a, b in zip(data.offsets, data.offsets[1:])]


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
    for name in ('configurator.py', 'train_tokenizer.py', 'prepare.py', 'data/reason.py'):
        (copy / name).parent.mkdir(exist_ok=True, parents=True)
        shutil.copy(ROOT / name, copy / name)
    options = [f'--tokenizer={tokenizer_folder}', '--dataset=./reason']
    first, second = (script(copy / 'prepare.py', *options, env=ascii).stdout for _ in range(2))
    assert '$ python data/reason.py' in first and '$ python' not in second
    raw = copy / 'data' / 'raw'
    assert [path.name for path in raw.iterdir()] == ['reason.jsonl']
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
    ('empty.txt', ['empty.txt is empty']),
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
