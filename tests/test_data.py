"""prepare.py on text: what is read, how it is split and stored, and how malformed input is told."""
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TEXT

import prepare
from prepare import Piece, load_tokenizer, read_documents, read_meta, read_split, read_txt, write_data


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
    pieces = [t for _, t, _, _ in read_txt(str(path), path.stat().st_size, val_fraction=0, piece=piece)]
    assert ''.join(pieces) == text and len(pieces) > 1
    assert [i for t in pieces for i in tokenizer.encode(t)] == tokenizer.encode(text)


MEASURE = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from prepare import load_tokenizer, read_documents, write_data
write_data('data', load_tokenizer(sys.argv[2]), read_documents('big.txt'), 'big.txt')
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


def test_a_folder_is_read_file_by_file(tmp_path):
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'b.txt').write_text('second')
    (tmp_path / 'sub' / 'c.jsonl').write_text('{"text": "third"}')
    (tmp_path / 'a.txt').write_text('first')
    (tmp_path / 'ignored.md').write_text('not text for us')
    pieces = list(read_documents(str(tmp_path), val_fraction=0))
    assert [p.text for p in pieces if p.text] == ['first', 'second', 'third']
    assert pieces[-1].progress == 1


def test_pydoc_is_real_and_held_out_by_docstring():
    pieces = list(read_documents('', 0.05))
    documents = {p.text for p in pieces}
    assert len(pieces) > 4000 and len(documents) == len(pieces)
    assert sum(len(d) for d in documents) > 1_000_000
    assert any(d.startswith('def dumps(obj, *, skipkeys=False') and 'JSON formatted' in d for d in documents)
    sides = {}
    for p in pieces:
        sides.setdefault(p.text.split(':\n', 1)[1], set()).add(p.split)
    assert all(len(s) == 1 for s in sides.values())


def test_arrays_are_mapped_and_small(tmp_path, tokenizer):
    pieces = [Piece('train', 'one two', False, 0), Piece('train', ' three', True, 0)]
    write_data(str(tmp_path / 'd'), tokenizer, [*pieces, Piece('val', 'four', True, 1)], 'test')
    train = read_split(str(tmp_path / 'd'), 'train')
    assert isinstance(train.tokens, np.memmap) and train.tokens.dtype == np.uint16
    assert train.tokens.tolist() == [*tokenizer.encode('one two'), *tokenizer.encode(' three'), tokenizer.eot]
    assert train.mask.all() and train.offsets.tolist() == [0, len(train.tokens)]


def test_an_interrupted_preparation_leaves_the_old_data(tmp_path, tokenizer):
    folder = str(tmp_path / 'd')
    good = [Piece('train', 'old', True, 0), Piece('val', 'old', True, 1)]
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
    ('broken.jsonl', ['broken.jsonl:2: not JSON', '--on_error=skip']),
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
        list(read_documents(source))
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
