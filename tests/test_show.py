"""show.py: each point, at a size that takes a second. What comes out is not looked at, only that it does."""
import re

import pytest
import show
from conftest import TEXT

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
