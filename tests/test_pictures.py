"""pictures.py: the weights it draws are the model's, each picture is drawn, and mistakes are one line."""
import json
import warnings

import pictures
import pytest
import torch
from torch.nn import functional as F

from configurator import MetricsLog
from sample import load_run, token_label

DRAWN = ['I-4_gelu', 'I-6_temperature', 'I-6_filters', 'II-3_sinusoids', 'II-3_sinusoids_columns',
         'II-4_rope_turns', 'II-4_rope_score']


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where pictures are drawn to: in a repository that lies in tmp_path."""
    monkeypatch.setattr('configurator.HERE', str(tmp_path))
    return tmp_path / 'out' / 'pictures'


@pytest.mark.parametrize('kind', ['minimind', 'gpt2'])
def test_attention_weights_are_those_that_the_model_uses(tiny_run, kind, monkeypatch):
    model, kernel, seen = load_run(str(tiny_run(kind)))[0], F.scaled_dot_product_attention, []

    def watched(q, k, v, **how):
        seen.append((v, kernel(q, k, v, **how)))
        return seen[-1][1]

    tokens = torch.randint(0, 250, (2, 12))
    expected = model(tokens)[0]
    monkeypatch.setattr(F, 'scaled_dot_product_attention', watched)
    found = pictures.attention_weights(model, tokens)
    assert F.scaled_dot_product_attention is watched and torch.equal(model(tokens)[0], expected)
    assert len(found) == 2
    for weights, (v, y) in zip(found, seen):
        assert weights.shape == (2, 4, 12, 12)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))
        assert not weights.triu(1).any() and (weights.tril() + torch.ones(12, 12).triu(1) > 0).all()
        v = v.repeat_interleave(4 // v.size(1), dim=1)
        torch.testing.assert_close(weights @ v, y, atol=1e-5, rtol=1e-5)


def test_neighbours_are_those_of_the_largest_cosine(tiny_run):
    model, tokenizer, _ = load_run(str(tiny_run('gpt2')))
    table = model.transformer.wte.weight.data
    table[[7, 9, 30]] = 3 * table[5] + 0.01 * torch.tensor([[1.0], [2.0], [4.0]]) * torch.randn(64)
    table[11] = -table[5]
    near = pictures.neighbours(model, tokenizer, 5, n=len(table))
    assert [i for i, _ in near[:3]] == [7, 9, 30] and near[-1][0] == 11 and len(near) == len(table) - 1
    assert near[0][1] > 0.98 and near[-1][1] == pytest.approx(-1, abs=1e-5)


def test_each_picture_is_drawn(script, folder, tiny_run):
    pytest.importorskip('matplotlib')
    done = script('tests/pictures.py')
    assert sorted(path.stem for path in folder.iterdir()) == sorted(DRAWN)
    for name in ('attention', 'embeddings', 'loss'):
        assert f'{name}: no run in {folder.parent}/pretrain' in done.stdout
    for kind in ('minimind', 'gpt2'):
        run = tiny_run(kind)
        log = MetricsLog(str(run))
        log.write(step=0, val_loss=6.0)
        for step in range(3):
            log.write(step=step, loss=5.0 - step, tokens=64 * (step + 1))
        with warnings.catch_warnings():
            warnings.simplefilter('error', UserWarning)                 # of a letter that the font lacks
            done = script('tests/pictures.py', 'attention', 'embeddings', 'loss', f'--out_dir={run}',
                          '--prompt=a 灯 $x$ $$', '--token=a')
        assert len(done.stdout.splitlines()) == 1 + 12 + 3 and '\ncosine' in '\n' + done.stdout
        new = [folder / f'{name}.png' for name in ('I-3_attention', 'I-2_embeddings', 'I-5_loss')]
        assert all(path.read_bytes()[:4] == b'\x89PNG' for path in new)
        [path.unlink() for path in new]


def test_a_label_has_no_letter_that_the_font_lacks_and_no_mathematics(byte_tokenizer):
    class Words:
        decode = staticmethod(lambda ids: [' a$b$', '灯', '\n'][ids[0]])
    assert [token_label(Words, i) for i in range(3)] == [r"' a\$b\$'", r"'\u706f'", r"'\n'"]


def test_mistakes_are_one_line(script, folder, tiny_run, tmp_path):
    pytest.importorskip('matplotlib')
    run = tiny_run('minimind')
    (tmp_path / 'damaged').mkdir()
    (tmp_path / 'damaged' / 'metrics.jsonl').write_text('{"step": 0, "lo')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'metrics.jsonl').write_text('')
    for name, step, tokens in ('before', -1, 5), ('none', 0, 0):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'metrics.jsonl').write_text(json.dumps(dict(step=step, loss=1.0, tokens=tokens)))
    for options, words in [
            (['gleu'], "no picture 'gleu'; there are embeddings"),
            (['loss', '--out_dir=nowhere'], 'train one with `python pretrain.py`'),
            (['loss', '--out_dir=damaged'], 'holds no losses of a run'),
            (['loss', '--out_dir=empty'], 'holds no losses of a run'),
            (['loss', '--out_dir=before'], 'holds no losses of a run'),
            (['loss', '--out_dir=none'], 'holds no losses of a run'),
            (['--out_dir=nowhere'], 'no run in nowhere to draw'), (['--nope'], 'unrecognized arguments'),
            (['embeddings', '--token=\udcff'], "--token takes UTF-8 text, not '\\udcff'"),
            (['gelu', 'embeddings', f'--out_dir={run}', '--token=two words'], 'tokens, give one of these'),
            (['gelu', '--token=a'], '--token is for embeddings'),
            (['attention', f'--out_dir={run}', f'--prompt={"sea " * 50}'], 'tokens, too many for a picture'),
            (['embeddings', f'--out_dir={run}', '--token=zebra'], "is 5 tokens, give one of these: 'z'")]:
        assert words in script('tests/pictures.py', *options, code=2).stderr
    assert not folder.exists()                              # nothing was drawn before


def test_without_matplotlib_a_run_says_it_once(tmp_path, capsys, no_matplotlib):
    log = MetricsLog(tmp_path)
    log.write(step=0, val_loss=1.0, val_accuracy=0.5, expert_load=[[0.5, 0.5]])
    log.draw()
    assert capsys.readouterr().err == 'no pictures: `pip install matplotlib`\n'
    assert [path.name for path in tmp_path.iterdir()] == ['metrics.jsonl']


def test_without_matplotlib_it_is_said_how_to_get_it(script, no_matplotlib):
    assert 'no pictures: `pip install matplotlib`' in script('tests/pictures.py', code=2).stderr
