"""show.py: each point, at a size that takes a second. What comes out is not looked at, only that it does."""
import re
import shutil
import subprocess
import sys

import pytest
import show
from conftest import ONE_THREAD, ROOT, TEXT

from prepare import Piece, write_data

TINY = dict(n_layer=2, n_head=2, n_kv_head=1, n_embd=16, block_size=16, batch_size=2, max_iters=2,
            log_interval=1, eval_iters=1, device='cpu', dtype='float32')


@pytest.mark.parametrize('name, rows, columns', [
    ('positions', 5, 5), ('norms', 2, 3), ('heads', 3, 4), ('experts', 2, 3)])
def test_a_point_is_a_table_and_a_picture(name, rows, columns, tmp_path, tokenizer, capsys, monkeypatch):
    pytest.importorskip('matplotlib')
    write_data(str(tmp_path / 'rules'), tokenizer, [Piece('train', TEXT * 9), Piece('val', TEXT)], 'test')
    monkeypatch.setattr(show, 'PICTURES', tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('sys.argv', ['show.py'])
    longer = dict(length=24) if name == 'heads' else {}
    show.POINTS[name](tmp_path / 'runs', **{**TINY, 'dataset': f'{tmp_path}/rules', **longer})
    head, *lines = capsys.readouterr().out.splitlines()
    assert len(lines) == rows and len(re.split(' {3,}', head)) == columns + 1
    assert (tmp_path / f'{name}.png').stat().st_size > 5000


def test_the_points_are_listed_and_an_unknown_one_is_one_line(script):
    out = script('tests/show.py').stdout
    assert all(f'\n{name} ' in out for name in show.POINTS)
    assert "did you mean 'norms'" in script('tests/show.py', 'norm', code=2).stderr


def test_a_point_that_lacks_its_start_is_refused_before_any_is_shown(script, tmp_path, monkeypatch, capsys):
    for name in ('configurator.py', 'tests/show.py', *(f'{name}.py' for name in (
            'model_gpt2', 'model_minimind', 'prepare', 'pretrain', 'sample', 'train_tokenizer'))):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    done = script(tmp_path / 'tests' / 'show.py', 'norms', 'loss_on', code=2, process=True)
    assert 'train first, with `python pretrain.py`' in done.stderr and not done.stdout
    with pytest.raises(SystemExit):                             # a stage's own line stands alone
        monkeypatch.setattr('sys.argv', ['show.py'])
        show.train('sft.py', tmp_path / 'answers', init_from='nowhere')
    assert capsys.readouterr().err.startswith('training: answers\nsft.py: ')


INTERRUPTED = """
import builtins, runpy, signal, sys
real = print
builtins.print = lambda *args, file=None, **how: (
    real(*args, file=file, **how) if file else signal.raise_signal(2))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name='__main__')
"""


@pytest.mark.parametrize('tool', ['show.py norms', 'pictures.py', 'memory.py'])
def test_ctrl_c_is_one_line(tmp_path, tool):
    pytest.importorskip('matplotlib')
    (tmp_path / 'run.py').write_text(INTERRUPTED)
    name, *points = tool.split()
    done = subprocess.run([sys.executable, 'run.py', ROOT / 'tests' / name, *points], cwd=tmp_path,
                          capture_output=True, text=True, env=ONE_THREAD)
    assert (done.returncode, done.stderr.strip()) == (130, 'interrupted')
