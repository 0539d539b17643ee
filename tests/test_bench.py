"""bench.py: each row, at a size that takes a second; not its figures, but that there are any. And gpu.py."""
import itertools
import math
import re
import sys
import sysconfig

import bench
import gpu
import pytest
import torch

GPT = dict(bench.GPT, n_layer=1, n_head=2, n_embd=32)
MINI, MIXTURE = (dict(sizes, n_layer=1, n_head=2, n_embd=32) for sizes in (bench.MINIMIND, bench.MIXTURE))
TINY = dict(
    train=dict(rows=(2, 2), length=(16, 16), rounds=1, gpt=GPT, mini=MINI),
    moe=dict(rows=2, length=16, rounds=1, dense=MINI, mixture=MIXTURE),
    memory=dict(rows=1, length=16, vocab_size=64, gpt=GPT),
    decode=dict(prompt=20, new=2, rounds=1, mini=MINI),
    loss=dict(steps=2, characters=10_000),
    sft=dict(rows=2, length=64, rounds=1, mini=MINI),
    dpo=dict(count=2, length=64, rounds=1, mini=MINI),
    prepare=dict(size=2_000_000, rounds=1),
    start=dict(rounds=1))
TINY['gpu'] = dict(device='cpu', rows={row: TINY[row] for row in bench.GPU})


@pytest.mark.parametrize('row', bench.ROWS)
def test_a_row_is_lines_of_figures(row, capsys, monkeypatch):
    docs = [*itertools.islice(bench.PYDOC['docstrings'](sysconfig.get_path('stdlib')), 2000)]
    monkeypatch.setitem(bench.PYDOC, 'docstrings', lambda root: docs)
    monkeypatch.setattr(bench, 'read_rate', lambda device: 1e9)
    monkeypatch.setattr(bench, 'matmul_rate', lambda dtype, device: 1e9)
    bench.ROWS[row](**TINY[row])
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(re.search(r' (ms|tokens/s|MB/s|GiB|s)\b', line) for line in lines), lines


def test_a_row_for_a_gpu_without_one_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(sys, 'argv', ['bench.py', 'gpu'])
    with pytest.raises(SystemExit) as end:
        bench.main()
    assert end.value.code == 2 and capsys.readouterr().err.splitlines() == [
        'bench.py: torch sees no GPU for the row gpu: leave it out']


def test_what_is_held_on_a_gpu_holds_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: None)          # it would take minutes
    monkeypatch.setattr(gpu, 'failed', [])
    for kind, settings in gpu.KINDS.items():
        gpu.check_model(kind, settings, 'cpu')
    gpu.check_drawing('cpu', times=2)
    assert not gpu.failed
    for wrong in (1.1, math.nan):
        gpu.check('a wrong number', torch.tensor([wrong]), torch.ones(1), 0.01)
    assert len(gpu.failed) == 2


def test_without_a_gpu_that_is_one_line(script):
    assert 'no GPU' in script('tests/gpu.py', code=2, env={'CUDA_VISIBLE_DEVICES': ''}).stderr
