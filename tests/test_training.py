"""What the loop of all stages promises at its edges (pretrain.Training, configurator.py): a run that
diverges, a full disk, settings without effect, damaged checkpoints, ranks that fail alone."""
import errno
import json
import math
import os
import re

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT

import configurator
from configurator import CHECKPOINTS, Run, fail, last_words, load_checkpoint, save_checkpoint, start_run
from model_minimind import MiniMind, MiniMindConfig
from prepare import Piece, write_data
from pretrain import Training, learning_rate_at, make_optimizers

TINY = ['--n_layer=1', '--n_head=2', '--n_kv_head=1', '--n_embd=32', '--block_size=32', '--batch_size=4',
        '--dtype=float32', '--device=cpu', '--log_interval=1', '--eval_iters=2', '--prompt=The keeper',
        '--out_dir=run']


@pytest.fixture
def data(tokenizer, tmp_path):
    """--dataset=... of the rules of the light, 40 times, numbered."""
    text = ''.join(f'{i}. {line}' for i in range(40) for line in TEXT.splitlines(keepends=True))
    write_data(str(tmp_path / 'rules'), tokenizer, [Piece('train', text), Piece('val', TEXT)], 'test')
    return f"--dataset={tmp_path / 'rules'}"


@pytest.fixture
def steps(monkeypatch):
    """A list of the tokens of each training batch; `steps.at[n] = f` lets f change the n-th batch's loss."""
    class Steps(list):
        at = {}
    read, forward = Steps(), MiniMind.forward

    def spy(model, tokens, targets=None, **other):
        logits, loss = forward(model, tokens, targets, **other)
        if model.training:
            loss = read.at.get(len(read), lambda loss: loss)(loss)
            read.append(tokens)
        return logits, loss
    monkeypatch.setattr(MiniMind, 'forward', spy)
    Steps.at = {}
    return read


def metrics(folder):
    """The lines of metrics.jsonl. NaN and Infinity are no JSON."""
    def refuse(word):
        raise ValueError(f'{word} is no JSON')
    lines = (folder / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def weights(folder, name='ckpt.pt'):
    return torch.load(folder / name, weights_only=True)['model']


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# ---- the learning rate ----

def test_the_lowest_rate_follows_the_highest():
    """dpo.py --learning_rate=4e-8 used to end at 3e-5."""
    rates = [learning_rate_at(step, 4e-8, -1.0, warmup_iters=2, max_iters=20) for step in range(21)]
    assert max(rates) == pytest.approx(4e-8) and rates[-1] == pytest.approx(4e-9)
    assert learning_rate_at(20, 4e-8, 0.0, 2, 20) == 0


@pytest.mark.parametrize('stage', ['pretrain', 'sft', 'dpo', 'lora', 'distill', 'finetune_cls'])
def test_in_each_stage_the_rate_cannot_climb(inline, stage):
    assert re.search(r'^min_lr = -1\.0 ', (ROOT / f'{stage}.py').read_text(encoding='utf-8'), re.MULTILINE)
    _, line = inline(f'{stage}.py', '--learning_rate=4e-8', '--min_lr=1e-5', code=2)
    assert 'min_lr=1e-05 is above learning_rate=4e-08' in line


# ---- numbers that are not finite ----

@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(inline, data, steps, tmp_path, bad):
    steps.at[12] = lambda loss: loss * bad
    out, line = inline('pretrain.py', *TINY, data, '--max_iters=20', '--eval_interval=5', code=1)
    assert 'done' not in out and len(line.splitlines()) == 1
    for words in ('step 12: the norm of the gradient is', 'learning rate of', 'step 10 is still good in run'):
        assert words in line
    assert load_checkpoint(tmp_path / 'run')['step'] == 10
    assert all(w.isfinite().all() for w in weights(tmp_path / 'run').values())
    assert metrics(tmp_path / 'run')[-1]['step'] == 11


def test_a_held_out_loss_that_is_not_finite_is_not_saved(tmp_path):
    training = make_training(start_run('cpu', 'float32'), dict(CONFIG, out_dir=str(tmp_path)))
    with pytest.raises(SystemExit, match='1'):
        for _, loss in zip(training, [5.0, 4.0, math.nan, 3.0]):
            training.evaluated('line', val_loss=loss)
    assert training.step == 2 and training.saved_step == 1


CONFIG = dict(init_from='scratch', max_iters=5, eval_interval=1, log_interval=1, batch_size=2, compile=False,
              gradient_accumulation_steps=1, learning_rate=1e-2, min_lr=-1.0, warmup_iters=0, grad_clip=1.0,
              wandb_log=False)


class Words:
    """A stand-in for a tokenizer: it only has to be saved."""
    fingerprint = '0' * 16

    def save(self, folder):
        pass


def make_training(run, config):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = MiniMind(MiniMindConfig(**sizes))
    optimizers = make_optimizers(model, 'muon', 1e-2, 0.1)
    return Training(run, config, model.to(run.device), optimizers, Words())


def test_in_float16_all_optimizers_skip_a_step_together(tmp_path):
    """A gradient of NaN in a matrix of Muon's only: clipping spreads it, so AdamW must not step either."""
    run = Run(torch.device('cpu'), torch.float16, 0, 1)
    training = make_training(run, dict(CONFIG, out_dir=str(tmp_path)))
    next(iter(training))
    before = {name: p.clone() for name, p in training.model.named_parameters()}
    loss = training.model(torch.arange(8)[None], torch.arange(1, 9)[None])[1]
    training.total_weight = 1
    training.backward(loss)
    training.model.model.layers[0].mlp.up_proj.weight.grad[0, 0] = math.nan
    scale = training.scaler.get_scale()
    training.update(tokens=8)
    assert same(before, dict(training.model.named_parameters())) and training.scaler.get_scale() == scale / 2
    assert metrics(tmp_path)[0]['grad_norm'] is None


# ---- going on ----

def test_resumed_with_another_batch_size_each_row_is_read_once(inline, data, steps, tmp_path):
    common = [data, '--eval_interval=2', '--log_interval=1']
    inline('pretrain.py', *TINY, *common, '--max_iters=2')
    assert load_checkpoint(tmp_path / 'run')['position'] == 8
    again = ['--out_dir=run', '--init_from=resume', '--max_iters=6', '--batch_size=2']
    inline('pretrain.py', *common[1:], *again)
    assert [len(rows) for rows in steps] == [4, 4, 2, 2, 2, 2]
    first = [tuple(row.tolist()) for rows in steps for row in rows]
    assert len(set(first)) == 16, 'no row twice'
    counted = [line['tokens'] for line in metrics(tmp_path / 'run') if 'tokens' in line]
    assert counted == [128, 256, 320, 384, 448, 512]


def test_after_torchrun_restarts_a_rank_that_died_the_run_goes_on(inline, data, steps, tmp_path, monkeypatch):
    arguments = [*TINY, data, '--max_iters=6', '--eval_interval=2', '--dropout=0.1']
    inline('pretrain.py', *arguments)
    whole = weights(tmp_path / 'run')

    def die(loss):
        raise ConnectionError('a rank is gone')
    for name in CHECKPOINTS:
        (tmp_path / 'run' / name).unlink()
    steps.clear()
    steps.at[5] = die
    with pytest.raises(ConnectionError):
        inline('pretrain.py', *arguments)
    assert load_checkpoint(tmp_path / 'run')['step'] == 4
    steps.at.clear()
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    inline('pretrain.py', *arguments)
    assert len(steps) == 5 + 2 and same(weights(tmp_path / 'run'), whole)
    steps.clear()
    inline('pretrain.py', *arguments, '--seed=3')           # not the run that lies there: from the beginning
    assert len(steps) == 6


# ---- what has no effect is refused, and before any work ----

@pytest.mark.parametrize('stage, args, words', [
    ('pretrain', ['--model=minimind', '--positions=sinusoidal'], 'positions applies only with --model=gpt2'),
    ('pretrain', ['--model=gpt2', '--n_kv_head=1'], 'n_kv_head applies only with --model=minimind'),
    ('pretrain', ['--model=gpt2', '--use_moe'], 'use_moe applies only with --model=minimind'),
    ('pretrain', ['--num_experts=8'], 'num_experts applies only with --use_moe=True'),
    ('pretrain', ['--init_from=run', '--n_layer=3'], 'n_layer applies only with --init_from=scratch'),
    ('pretrain', ['shape.py', '--init_from=run'], 'shape.py:2: n_head applies only with --init_from=scratch'),
    ('dpo', ['--beta=0'], 'beta must be more than 0'),
    ('lora', ['--alpha=0'], 'alpha must be more than 0'),
    ('lora', ['--from_peft=there', '--rank=4'], 'rank applies not with --from_peft'),
    ('distill', ['--teacher=', '--temperature=3'], 'temperature applies only with a teacher'),
    ('distill', ['--init_from=run', '--n_embd=64'], 'n_embd applies only with --init_from=scratch'),
    ('finetune_cls', ['--classify=a', '--classify_file=b'], 'classify_file applies not with --classify'),
    ('finetune_cls', ['--classify=a', '--block_size=9'], 'block_size applies not with --classify'),
    ('sample', ['--chat', '--start=Hello'], 'start applies not with --chat'),
    ('sample', ['--system=Be brief'], 'system applies only with a chat'),
    ('sample', ['--init_from=gpt2', '--out_dir=run'], 'out_dir applies not with --init_from'),
    ('sample', ['--export_dir=hf', '--num_samples=3'], 'num_samples applies not with --export_dir'),
])
def test_a_setting_without_effect_is_refused(inline, tmp_path, stage, args, words):
    (tmp_path / 'shape.py').write_text('seed = 3\nn_head = 8\n')
    assert words in inline(f'{stage}.py', *args, code=2)[1]


@pytest.mark.parametrize('stage, args, words', [
    ('pretrain', ['--init_from=NOWHERE'], 'NOWHERE'),
    ('pretrain', ['--n_embd=30', '--n_head=4'], 'not a multiple of num_attention_heads'),
    ('pretrain', ['--use_moe', '--num_experts=2', '--num_experts_per_tok=3'], 'num_experts_per_tok'),
    ('pretrain', ['--out_dir=file/run'], 'file is no folder'),
    ('distill', ['--teacher=', '--n_embd=30'], 'not a multiple of num_attention_heads'),
    ('distill', ['--teacher=NOWHERE'], 'NOWHERE'),
    ('sft', ['--init_from=NOWHERE'], 'NOWHERE'),
    ('dpo', ['--init_from=NOWHERE'], 'NOWHERE'),
    ('lora', ['--init_from=NOWHERE'], 'NOWHERE'),
    ('finetune_cls', ['--init_from=NOWHERE'], 'NOWHERE'),
])
def test_what_can_be_refused_is_refused_before_any_work(inline, tmp_path, stage, args, words):
    """A built-in data set that is missing would be prepared first, and its tokenizer trained."""
    (tmp_path / 'file').touch()
    builtin = dict(pretrain='pydoc', dpo='pydoc_dpo', finetune_cls='spam').get(stage, 'pydoc_sft')
    assert words in inline(f'{stage}.py', f'--dataset=./{builtin}', *args, code=2)[1]
    assert sorted(os.listdir(tmp_path)) == ['file']


# ---- checkpoints ----

def test_the_last_two_checkpoints_are_kept_and_a_damaged_one_is_not_used(inline, data, tmp_path, capsys):
    inline('pretrain.py', *TINY, data, '--max_iters=6', '--eval_interval=2')
    steps = [torch.load(tmp_path / 'run' / name, weights_only=True)['step'] for name in CHECKPOINTS]
    whole = weights(tmp_path / 'run')
    assert steps == [6, 4]
    content = (tmp_path / 'run' / 'ckpt.pt').read_bytes()
    (tmp_path / 'run' / 'ckpt.pt').write_bytes(content[:len(content) // 2])
    assert load_checkpoint(tmp_path / 'run')['step'] == 4
    line = capsys.readouterr().err
    assert 'ckpt.pt is not a checkpoint' in line and 'ckpt_previous.pt, of step 4' in line
    inline('pretrain.py', '--out_dir=run', '--init_from=resume')
    assert same(weights(tmp_path / 'run'), whole)


def test_always_save_checkpoint_false_keeps_the_lowest_held_out_loss(tmp_path, capsys):
    config = dict(CONFIG, out_dir=str(tmp_path), always_save_checkpoint=False)
    training = make_training(start_run('cpu', 'float32'), config)
    saved = []
    for _, loss in zip(training, [5.0, 3.0, 2.0, 4.0, 3.5, 2.5]):
        training.evaluated('line', val_loss=loss)
        saved.append(training.saved_step)
    assert saved == [None, 1, 2, 2, 2, 2] and load_checkpoint(tmp_path)['step'] == 2
    with pytest.raises(SystemExit, match='0'):
        training.close('goodbye')
    assert 'step 2 is kept, of the lowest held-out loss 2.0000' in capsys.readouterr().out


def test_a_full_disk_keeps_the_old_checkpoint_and_is_one_line(tmp_path, tokenizer, monkeypatch, capsys):
    run = start_run('cpu', 'float32')
    save_checkpoint(run, tmp_path, tokenizer, MiniMindConfig(), step=1, settings={}, weight=torch.ones(3))

    def no_space(state, f):
        f.write(b'half of a checkpo')
        raise OSError(errno.ENOSPC, 'No space left on device', 'ckpt.pt.tmp')
    monkeypatch.setattr(configurator.torch, 'save', no_space)
    with pytest.raises(OSError) as error:
        save_checkpoint(run, tmp_path, tokenizer, MiniMindConfig(), step=2, settings={})
    assert not list(tmp_path.glob('*.tmp'))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)['step'] == 1
    assert said(error.value, monkeypatch, capsys) == (2, 'ckpt.pt.tmp: No space left on device')


def said(error, monkeypatch, capsys):
    """(exit code, line) of a run that an exception ends."""
    codes = []
    monkeypatch.setattr(configurator.os, '_exit', codes.append)
    monkeypatch.setattr(configurator.sys, '__excepthook__', lambda *_: codes.append('traceback'))
    last_words(['batch_size', 'block_size', 'seed'], type(error), error, None)
    line = capsys.readouterr().err.strip()
    assert len(line.splitlines()) == 1
    return codes[0], line.partition(': ')[2].partition(';')[0]


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 MiB'), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_names_the_settings_to_lower(monkeypatch, capsys, error):
    assert said(error, monkeypatch, capsys) == (1, 'out of memory: lower --batch_size or --block_size')


# ---- ranks ----

def test_a_mistake_that_one_rank_meets_is_told_by_it(monkeypatch, capsys):
    for name, value in dict(RANK='3', WORLD_SIZE='4', LOCAL_RANK='0').items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit, match='2'):
        fail('no data here')
    assert '(rank 3): no data here' in capsys.readouterr().err


def test_ranks_without_a_local_one_and_one_alone(monkeypatch):
    monkeypatch.setenv('RANK', '5')                     # left over from something else: there is one process
    assert start_run('cpu', 'float32').rank == 0
    monkeypatch.setattr(configurator.dist, 'init_process_group', lambda backend: None)
    monkeypatch.setenv('WORLD_SIZE', '8')
    assert start_run('cpu', 'float32').rank == 5


# ---- the step, held to its formula ----

def test_each_group_of_parameters_has_its_own_rate(tmp_path):
    training = make_training(start_run('cpu', 'float32'), dict(CONFIG, out_dir=str(tmp_path), min_lr=1e-3))
    training.optimizers[0].param_groups[0]['scale'] = 0.1
    for step in training:
        for group in (g for o in training.optimizers for g in o.param_groups):
            assert group['lr'] == group['scale'] * learning_rate_at(step, 1e-2, 1e-3, 0, 5)
    assert training.optimizers[0].param_groups[0]['lr'] == pytest.approx(1e-4)


@pytest.mark.parametrize('grad_clip', [0.05, 0.0])
def test_the_gradient_is_cut_to_grad_clip_and_0_is_no_limit(tmp_path, grad_clip):
    config = dict(CONFIG, out_dir=str(tmp_path), grad_clip=grad_clip)
    training = make_training(start_run('cpu', 'float32'), config)
    seen = []
    training.optimizers[0].register_step_pre_hook(lambda *_: seen.append(torch.cat(
        [p.grad.flatten() for p in training.params]).norm().item()))
    next(iter(training))
    training.total_weight = 1
    training.backward(3 * training.model(torch.arange(8)[None], torch.arange(1, 9)[None])[1])
    training.update(tokens=8)
    length = metrics(tmp_path)[0]['grad_norm']
    assert length > 1 and seen[0] == pytest.approx(grad_clip or length, rel=1e-4)


def test_held_out_losses_are_measured_without_dropout(inline, data, tmp_path):
    """Twice in one run, at a learning rate of 0: equal, though the model drops half of its activations."""
    inline('pretrain.py', *TINY, data, '--max_iters=2', '--eval_interval=1', '--dropout=0.5',
           '--learning_rate=0')
    found = [line for line in metrics(tmp_path / 'run') if 'val_loss' in line]
    assert len(found) == 3 and len({line['val_loss'] for line in found}) == 1
    losses = [line['loss'] for line in metrics(tmp_path / 'run') if 'loss' in line]
    assert np.mean(losses) != pytest.approx(found[0]['train_loss'], abs=1e-3)


def test_a_resumed_cosine_goes_on_where_it_stopped(inline, data, tmp_path):
    common = [data, '--eval_interval=3', '--warmup_iters=1']
    inline('pretrain.py', *TINY, *common, '--max_iters=9')
    rates = {line['step']: line['lr'] for line in metrics(tmp_path / 'run') if 'lr' in line}
    os.replace(tmp_path / 'run' / 'ckpt_previous.pt', tmp_path / 'run' / 'ckpt.pt')
    inline('pretrain.py', '--out_dir=run', '--init_from=resume')
    again = {line['step']: line['lr'] for line in metrics(tmp_path / 'run') if 'lr' in line}
    assert again == rates and len(rates) == 9
