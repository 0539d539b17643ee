"""pretrain.py: batches, the loss over micro-batches and ranks, stopping and resuming, and mistakes."""
import json
import math
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ONE_THREAD, ROOT, TEXT, numbers

from configurator import start_run
from model_minimind import MiniMind, MiniMindConfig
from prepare import Piece, Split, read_split, write_data
from pretrain import (bands_of, batch_at, held_out_loss, loss_by_position, make_optimizers, read_rows,
                      read_starts, shuffled)
from sample import load_run

TINY = ['--n_layer=2', '--n_head=2', '--n_kv_head=1', '--n_embd=32', '--block_size=32', '--batch_size=4',
        '--dtype=float32', '--device=cpu', '--log_interval=1', '--eval_iters=2', '--prompt=The keeper']


@pytest.fixture(scope='module')
def data(tokenizer, tmp_path_factory):
    """A prepared data set in which a third of the tokens are no targets, unevenly spread."""
    folder = tmp_path_factory.mktemp('data') / 'rules'
    pieces = [Piece('train', TEXT * 20), Piece('val', TEXT)]
    meta = write_data(str(folder), tokenizer, pieces, 'test')
    n = meta['train']['tokens']
    mask = (np.random.default_rng(0).random(n) < np.linspace(0.3, 1, n)).astype(np.uint8)
    np.save(folder / 'train_mask.npy', mask)
    meta['train']['targets'] = int(mask.sum())
    (folder / 'meta.json').write_text(json.dumps(meta))
    return folder


@pytest.fixture
def model():
    sizes = dict(vocab_size=350, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    return MiniMind(MiniMindConfig(**sizes))


def losses(folder):
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    return {line['step']: line['loss'] for line in lines if 'loss' in line}


def last_line(folder):
    return json.loads((folder / 'metrics.jsonl').read_text().splitlines()[-1])


def weights(folder):
    return torch.load(folder / 'ckpt.pt', weights_only=True)['model']


# ---- batches ----

def test_an_epoch_reads_every_window_once_in_an_order_of_its_own():
    n, block = 1000, 32
    windows = 1000 // block - 1
    epochs = [read_starts(n, block, seed=1, position=i * windows, rows=windows) for i in range(3)]
    for starts in epochs:
        assert len({s % block for s in starts}) == 1, 'windows of an epoch tile the text'
        assert sorted(starts) == list(range(min(starts), max(starts) + 1, block))
        assert max(starts) + block + 1 <= n
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])
    # a function of (seed, step) alone, however the steps are cut
    assert read_starts(n, block, 1, position=21, rows=7) == sum(epochs, [])[21:28]


def test_targets_are_the_next_tokens_where_the_mask_says_so():
    mask = np.array([1, 1, 0, 1, 1, 1, 1, 1, 1, 1], dtype=np.uint8)
    split = Split(np.arange(10, dtype=np.uint16), mask, None)
    x, y = batch_at(split, [0, 4, 7], 4)
    assert x.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [7, 8, 0, 0]]
    assert y.tolist() == [[1, -100, 3, 4], [5, 6, 7, 8], [8, 9, -100, -100]]


def test_held_out_loss_is_the_mean_over_tokens(data, model):
    run, val = start_run('cpu', 'float32'), read_split(str(data), 'val')
    x, y = batch_at(val, range(0, len(val.tokens) - 1, 32), 32)
    with torch.no_grad():
        expected = model(x, y)[1].item()
    for batch_size in (1, 3, 64):
        assert held_out_loss(model, run, val, 32, batch_size, 10**6) == pytest.approx(expected, abs=1e-5)


def test_the_loss_by_position_is_that_of_each_position(data, model):
    run, val = start_run('cpu', 'float32'), read_split(str(data), 'val')
    length = 24
    x, y = batch_at(val, range(0, len(val.tokens) - 1, length), length)
    with torch.no_grad():
        losses = -model(x)[0].log_softmax(2).gather(2, y.clamp(min=0)[..., None])[..., 0]
    for batch_size in (1, 3, 64):
        sums = loss_by_position(model, run, val, length, batch_size, 10**6)
        torch.testing.assert_close(sums[0], (losses * (y != -100)).sum(0), atol=1e-3, rtol=1e-4)
        assert sums[1].tolist() == (y != -100).sum(0).tolist()
    total, count = sums.sum(1).tolist()
    assert total / count == pytest.approx(held_out_loss(model, run, val, length, 4, 10**6), abs=1e-4)


def test_bands_double_and_one_ends_with_the_rows_of_training():
    sums = torch.stack([torch.arange(250.), torch.ones(250)])
    assert [band[:2] for band in bands_of(sums, 64)] == [[1, 16], [17, 32], [33, 64], [65, 128], [129, 250]]
    assert bands_of(sums[:, :4], 4) == [[1, 1, 0], [2, 2, 1], [3, 4, 2.5]]
    sums[1, 64:128] = 0                                     # no target: no mean
    assert [band[:2] for band in bands_of(sums, 64)][3:] == [[129, 250]]


@pytest.mark.parametrize('how', [['--positions=learned'], ['--positions=none'], ['--model=gpt2']])
def test_rows_longer_than_those_of_training_are_told_by_position(script, tmp_path, data, how):
    gpt2 = '--model=gpt2' in how
    tiny = [option for option in TINY if not (gpt2 and 'n_kv_head' in option)] + [f'--dataset={data}']
    out = script('pretrain.py', *tiny, *how, '--max_iters=2', '--out_dir=run', '--eval_block_size=64').stdout
    assert re.search(r'by position  1-8 \S+  9-16 \S+  17-32 \S+  33-64 \S+\ndone', out), out
    config = load_run(tmp_path / 'run')[0].config
    assert (config.context, config.trained_length) == (64, 32)
    bands = ['1_8', '9_16', '17_32', '33_64']
    assert [*last_line(tmp_path / 'run')] == ['step', *(f'val_loss_{band}' for band in bands)]
    again = [*TINY[4:], f'--dataset={data}', '--init_from=run', '--eval_only']
    if 'none' in how[0]:
        out = script('pretrain.py', *again, '--eval_block_size=128').stdout
        assert re.search(r'  65-82 \S+  \(the held-out text ends there\)\n', out), out
    else:
        words = 'the longest --block_size is 64' if gpt2 else 'learned positions end at 64'
        assert words in script('pretrain.py', *again, '--eval_block_size=128', code=2).stderr
    line = script('pretrain.py', *tiny, *how, '--eval_block_size=64', '--context=48', code=2).stderr
    assert '--context=48 is less than --eval_block_size=64' in line


def test_an_epoch_has_each_row_once():
    """And it is shuffled once, not for each of its rows: of a million that is 0.02 s."""
    shuffled.cache_clear()
    first, second = ([row for step in steps for row in read_rows(20, 1, 4 * step, 4)]
                     for steps in (range(5), range(5, 10)))
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    assert shuffled.cache_info().misses == 2


# ---- the step ----

def test_weight_decay_is_for_matrices_only(model):
    for name, muon in (('adamw', 0), ('muon', 2 * 7)):
        groups = [g for o in make_optimizers(model, name, 1e-3, 0.1) for g in o.param_groups]
        params = [p for g in groups for p in g['params']]
        assert len(params) == len(set(map(id, params))) == len(list(model.parameters()))
        assert all((g['weight_decay'] > 0) == (p.dim() == 2) for g in groups for p in g['params'])
        assert sum(len(g['params']) for g in groups if 'momentum' in g) == muon


def test_the_cut_into_micro_batches_and_ranks_does_not_matter(script, tmp_path, data):
    """1 x 8 rows = 8 x 1 = two ranks of 2 x 2, though rows differ in how many targets they have."""
    common = [*TINY, f'--dataset={data}', '--max_iters=4', '--optimizer=adamw', '--learning_rate=1e-3',
              '--eval_iters=99', '--eval_block_size=32']
    for name, rows, micro, ranks in (('whole', 8, 1, 0), ('cut', 1, 8, 0), ('ranks', 2, 4, 2)):
        script('pretrain.py', *common, f'--out_dir={name}', f'--batch_size={rows}',
               f'--gradient_accumulation_steps={micro}', torchrun=ranks)
    expected, by_position = losses(tmp_path / 'whole'), last_line(tmp_path / 'whole')
    assert len(expected) == 4 and 'val_loss_17_32' in by_position
    for name in ('cut', 'ranks'):
        assert losses(tmp_path / name) == pytest.approx(expected, abs=1e-5)
        assert last_line(tmp_path / name) == pytest.approx(by_position, abs=1e-5)
        for key, w in weights(tmp_path / 'whole').items():
            torch.testing.assert_close(weights(tmp_path / name)[key], w, atol=2e-5, rtol=0, msg=key)


def test_the_loss_of_the_first_step_is_the_mean_over_all_targets(script, tmp_path, data):
    script('pretrain.py', *TINY, f'--dataset={data}', '--max_iters=1', '--out_dir=run',
           '--gradient_accumulation_steps=3', '--learning_rate=0', '--min_lr=0')
    model, _, _ = load_run(tmp_path / 'run')
    train = read_split(str(data), 'train')
    x, y = batch_at(train, read_starts(len(train.tokens), 32, 1337, 0, 12), 32)
    with torch.no_grad():
        assert losses(tmp_path / 'run')[0] == pytest.approx(model(x, y)[1].item(), abs=1e-5)


def test_a_terminal_that_is_not_utf_8_ends_no_run(script, tmp_path, data):
    ascii = {'PYTHONIOENCODING': 'ascii'}
    done = script('pretrain.py', *TINY, f'--dataset={data}', '--out_dir=run', '--max_iters=1',
                  '--prompt=灯塔🚀', env=ascii)
    assert '| \\u706f\\u5854\\U0001f680' in done.stdout
    (tmp_path / 'text.txt').write_text('灯塔🚀', encoding='utf-8')
    done = script('sample.py', '--out_dir=run', '--start=FILE:text.txt', '--max_new_tokens=3', env=ascii)
    assert done.stdout.startswith('\\u706f\\u5854\\U0001f680')
    done = script('train_tokenizer.py', '--input=text.txt', '--trace=1', env=ascii)
    assert '1  \\u706f + \\u5854 -> \\u706f\\u5854' in done.stdout


def test_it_learns_a_text_by_heart_and_sample_tells_it(script, tmp_path, data):
    out = script('pretrain.py', *TINY, f'--dataset={data}', '--out_dir=run', '--n_embd=64', '--batch_size=8',
                 '--max_iters=120', '--warmup_iters=10', '--log_interval=40').stdout
    held_out = numbers(r'held-out loss (\S+)', out)
    assert held_out[0] == pytest.approx(math.log(350), abs=0.1) and held_out[-1] < 0.5
    text = script('sample.py', '--out_dir=run', '--start=Read the rules', '--temperature=0',
                  '--max_new_tokens=20').stdout
    assert text.strip()[:60] == TEXT[TEXT.index('Read the rules'):][:60]


# ---- stopping and going on ----

def interrupt(options, cwd, marker, sent):
    """Start pretrain.py, send a signal when it has printed the marker; its exit code and what it printed."""
    child = subprocess.Popen([sys.executable, '-u', str(ROOT / 'pretrain.py'), *options], cwd=cwd, text=True,
                             env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    out = ''
    for line in child.stdout:
        out += line
        if marker in line and sent:
            child.send_signal(sent)
            sent = None
    return child.wait(), out


@pytest.mark.parametrize('sent, code', [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_a_run_cut_short_ends_bit_for_bit_as_an_uninterrupted_one(script, tmp_path, data, sent, code):
    options = [*TINY, f'--dataset={data}', '--max_iters=40', '--dropout=0.2', '--eval_interval=5']
    script('pretrain.py', *options, '--out_dir=whole')
    ended, out = interrupt([*options, '--out_dir=cut'], tmp_path, 'step     17/', sent)
    assert ended == code and 'Traceback' not in out
    step = torch.load(tmp_path / 'cut' / 'ckpt.pt', weights_only=True)['step']
    if sent == signal.SIGKILL:
        assert step % 5 == 0
    else:
        assert f'stopped at step {step}' in out and '--init_from=resume' in out
    assert 0 < step < 40
    script('pretrain.py', '--out_dir=cut', '--init_from=resume')      # its settings come from the checkpoint
    whole, cut = weights(tmp_path / 'whole'), weights(tmp_path / 'cut')
    assert all(torch.equal(whole[key], cut[key]) for key in whole)
    assert losses(tmp_path / 'whole') == losses(tmp_path / 'cut')


def test_a_finished_run_goes_on_only_when_asked_for_more(script, tmp_path, data):
    script('pretrain.py', *TINY, f'--dataset={data}', '--max_iters=2', '--out_dir=run')
    assert 'raise --max_iters' in script('pretrain.py', '--out_dir=run', '--init_from=resume', code=2).stderr
    script('pretrain.py', '--out_dir=run', '--init_from=resume', '--max_iters=3')
    script('pretrain.py', *TINY[4:], f'--dataset={data}', '--max_iters=1', '--out_dir=other',
           '--init_from=run', '--learning_rate=0')
    assert all(torch.equal(w, weights(tmp_path / 'run')[k]) for k, w in weights(tmp_path / 'other').items())


def test_a_run_is_resumed_by_its_own_stage_with_its_own_shape(script, tmp_path, data):
    script('pretrain.py', *TINY, f'--dataset={data}', '--max_iters=1', '--out_dir=run')
    line = script('sft.py', '--init_from=resume', '--out_dir=run', code=2).stderr
    assert 'one of pretrain.py' in line and '--init_from=run' in line
    for change in ('--n_layer=3', '--optimizer=adamw', '--weight_decay=0.9'):
        again = ['--init_from=resume', '--out_dir=run', '--max_iters=2', change]
        line = script('pretrain.py', *again, code=2).stderr
        assert change in line and 'a resumed run keeps that' in line


# ---- mistakes ----

@pytest.mark.parametrize('args, words', [
    (['--dataset=nowhere'], 'no prepared data in'),
    (['--init_from=resume', '--out_dir=nowhere'], 'no checkpoint'),
    (['--n_head=3'], 'not a multiple of num_attention_heads'),
    (['--n_head=4', '--n_kv_head=3'], 'not a multiple of num_key_value_heads'),
    (['--device=cud'], "device='cud' does not work here"),
    (['--device=hpu'], "device='hpu' does not work here"),
    (['--tokenizer=nowhere'], 'no tokenizer'),
    (['--optimizer=adam'], "did you mean 'adamw'"),
])
def test_a_mistake_is_one_line(script, data, args, words):
    assert words in script('pretrain.py', f'--dataset={data}', *args, code=2).stderr


def test_data_without_a_target_is_refused(script, tmp_path, data):
    shutil.copytree(data, tmp_path / 'masked')
    np.load(tmp_path / 'masked' / 'train_mask.npy', mmap_mode='r+')[:] = 0
    assert 'no target' in script('pretrain.py', *TINY, '--dataset=./masked', code=2).stderr


def test_another_tokenizer_than_the_datas_is_refused(script, tmp_path, data):
    (tmp_path / 'other.txt').write_text('The sea is wide, and the sea is deep. ' * 99)
    script('train_tokenizer.py', '--input=other.txt', '--out_dir=other', '--vocab_size=280')
    done = script('pretrain.py', f'--dataset={data}', '--tokenizer=other', code=2)
    assert 'was tokenised otherwise' in done.stderr
