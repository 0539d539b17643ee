"""What the loop of all stages promises at its edges (pretrain.Training, configurator.py): a run that
diverges, a full disk, settings without effect, damaged checkpoints, ranks that fail alone."""
import errno
import json
import math
import os
import re
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT

import configurator
import dpo
import finetune_cls
import pretrain
import sft
from configurator import CHECKPOINTS, Run, fail, last_words, load_checkpoint, save_checkpoint, start_run
from model_minimind import MiniMind, MiniMindConfig
from prepare import Piece, Split, write_data
from pretrain import Training, learning_rate_at

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
def test_in_each_stage_the_rate_cannot_climb(script, stage):
    assert re.search(r'^min_lr = -1\.0 ', (ROOT / f'{stage}.py').read_text(encoding='utf-8'), re.MULTILINE)
    line = script(f'{stage}.py', '--learning_rate=4e-8', '--min_lr=1e-5', code=2).stderr
    assert 'min_lr=1e-05 is above learning_rate=4e-08' in line


# ---- numbers that are not finite ----

@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(script, data, steps, tmp_path, bad):
    steps.at[12] = lambda loss: loss * bad
    done = script('pretrain.py', *TINY, data, '--max_iters=20', '--eval_interval=5', code=1)
    out, line = done.stdout, done.stderr
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
              wandb_log=False, epochs=0.0, block_size=8, optimizer='muon', weight_decay=0.1,
              **{key: default for key, (default, _) in configurator.LOOP.items()})


class Words:
    """A stand-in for a tokenizer: it only has to be saved."""
    fingerprint = '0' * 16

    def save(self, folder):
        pass


def make_training(run, config, checkpoint=None):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = MiniMind(MiniMindConfig(**sizes))
    return Training(run, config, model.to(run.device), Words(), 10, 'ten rows', checkpoint)


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

def test_resumed_with_another_batch_size_each_row_is_read_once(script, data, steps, tmp_path):
    common = [data, '--eval_interval=2', '--log_interval=1']
    script('pretrain.py', *TINY, *common, '--max_iters=2')
    assert load_checkpoint(tmp_path / 'run')['position'] == 8
    again = ['--out_dir=run', '--init_from=resume', '--max_iters=6', '--batch_size=2']
    script('pretrain.py', *common[1:], *again)
    assert [len(rows) for rows in steps] == [4, 4, 2, 2, 2, 2]
    first = [tuple(row.tolist()) for rows in steps for row in rows]
    assert len(set(first)) == 16, 'no row twice'
    counted = [line['tokens'] for line in metrics(tmp_path / 'run') if 'tokens' in line]
    assert counted == [128, 256, 320, 384, 448, 512]


def test_resumed_on_two_ranks_it_reads_the_rows_that_follow(script, data, tmp_path):
    """At a learning rate of 0 the loss of a step tells which rows it read."""
    common = [*TINY, data, '--eval_interval=2', '--learning_rate=0']
    script('pretrain.py', *common, '--max_iters=4', '--out_dir=whole')
    script('pretrain.py', *common, '--max_iters=2')
    script('pretrain.py', '--out_dir=run', '--init_from=resume', '--max_iters=4', '--batch_size=2',
           '--gradient_accumulation_steps=2', torchrun=2)
    whole, run = ([(line['loss'], line['tokens']) for line in metrics(tmp_path / name) if 'loss' in line]
                  for name in ('whole', 'run'))
    assert [tokens for _, tokens in run] == [tokens for _, tokens in whole] == [128, 256, 384, 512]
    assert [loss for loss, _ in run] == pytest.approx([loss for loss, _ in whole], abs=1e-5)


@pytest.mark.parametrize('dtypes', [('float32', 'float16', 'bfloat16'), ('bfloat16', 'float32', 'float16'),
                                    ('float16', 'bfloat16', 'float16')])
def test_any_dtype_can_follow_any(script, data, tmp_path, dtypes):
    script('pretrain.py', *TINY, data, '--max_iters=1', f'--dtype={dtypes[0]}')
    for step, dtype in enumerate(dtypes[1:], 2):
        again = [f'--max_iters={step}', f'--dtype={dtype}']
        script('pretrain.py', '--out_dir=run', '--init_from=resume', *again)
    assert load_checkpoint(tmp_path / 'run')['step'] == 3
    assert all(w.isfinite().all() for w in weights(tmp_path / 'run').values())


def test_the_speed_counts_the_time_that_a_device_is_waited_for(tmp_path, monkeypatch):
    """The numbers of a step are there when the device has done it: the clock is read behind them."""
    training = make_training(start_run('cpu', 'float32'), dict(CONFIG, out_dir=str(tmp_path)))
    clock = [100.0]
    monkeypatch.setattr('pretrain.time.time', lambda: clock[0])
    sums = Run.sum

    def wait(self, *numbers):
        clock[0] += 0.5
        return sums(self, *numbers)
    steps = iter(training)
    next(steps)
    monkeypatch.setattr(Run, 'sum', wait)
    training.total_weight = 1
    training.backward(training.model(torch.arange(8)[None], torch.arange(1, 9)[None])[1])
    training.update(tokens=8)
    assert metrics(tmp_path)[0]['tokens_per_second'] == 8 / 0.5


def test_after_torchrun_restarts_a_rank_that_died_the_run_goes_on(script, data, steps, tmp_path, monkeypatch):
    arguments = [*TINY, data, '--max_iters=6', '--eval_interval=2', '--dropout=0.1']
    script('pretrain.py', *arguments)
    whole = weights(tmp_path / 'run')

    def die(loss):
        raise ConnectionError('a rank is gone')
    for name in CHECKPOINTS:
        (tmp_path / 'run' / name).unlink()
    steps.clear()
    steps.at[5] = die
    with pytest.raises(ConnectionError):
        script('pretrain.py', *arguments)
    assert load_checkpoint(tmp_path / 'run')['step'] == 4
    steps.at.clear()
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    script('pretrain.py', *arguments)
    assert len(steps) == 5 + 2 and same(weights(tmp_path / 'run'), whole)
    steps.clear()
    script('pretrain.py', *arguments, '--seed=3')           # not the run that lies there: from the beginning
    assert len(steps) == 6


# ---- what has no effect is refused, and before any work ----

@pytest.mark.parametrize('stage, args, words', [
    ('pretrain', ['--model=gpt2', '--positions=sinusoidal'], 'positions applies only with --model=minimind'),
    ('pretrain', ['--model=gpt2', '--n_kv_head=1'], 'n_kv_head applies only with --model=minimind'),
    ('pretrain', ['--model=gpt2', '--use_moe'], 'use_moe applies only with --model=minimind'),
    ('pretrain', ['--num_experts=8'], 'num_experts applies only with --use_moe=True'),
    ('pretrain', ['--init_from=run', '--n_layer=3'], 'n_layer applies only with --init_from=scratch'),
    ('pretrain', ['shape.py', '--init_from=run'], 'shape.py:2: n_head applies only with --init_from=scratch'),
    *[(stage, ['--layout=bucketed', '--compile'], 'for each length of bucketed rows: take layout=packed')
      for stage in ('sft', 'lora', 'distill')],
    ('dpo', ['--beta=0'], 'beta must be more than 0'),
    ('lora', ['--alpha=0'], 'alpha must be more than 0'),
    ('lora', ['--from_peft=there', '--rank=4'], 'rank applies not with --from_peft'),
    ('lora', ['--to_peft=there', '--alpha=4'], 'alpha applies not with --to_peft'),
    ('lora', ['--from_peft=here', '--merge_to=there'], 'merge_to applies not with --from_peft'),
    ('distill', ['--teacher=', '--temperature=3'], 'temperature applies only with a teacher'),
    ('distill', ['--init_from=run', '--n_embd=64'], 'n_embd applies only with --init_from=scratch'),
    ('finetune_cls', ['--classify=a', '--classify_file=b'], 'classify_file applies not with --classify'),
    ('finetune_cls', ['--classify=a', '--block_size=9'], 'block_size applies not with --classify'),
    ('sample', ['--chat', '--start=Hello'], 'start applies not with --chat'),
    ('sample', ['--system=Be brief'], 'system applies only with a chat'),
    ('sample', ['--init_from=gpt2', '--out_dir=run'], 'out_dir applies not with --init_from'),
    ('sample', ['--export_dir=hf', '--num_samples=3'], 'num_samples applies not with --export_dir'),
])
def test_a_setting_without_effect_is_refused(script, tmp_path, stage, args, words):
    (tmp_path / 'shape.py').write_text('seed = 3\nn_head = 8\n')
    assert words in script(f'{stage}.py', *args, code=2).stderr


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
def test_what_can_be_refused_is_refused_before_any_work(script, tmp_path, stage, args, words):
    """A built-in data set that is missing would be prepared first, and its tokenizer trained."""
    (tmp_path / 'file').touch()
    builtin = dict(pretrain='pydoc', dpo='pydoc_dpo', finetune_cls='spam').get(stage, 'pydoc_sft')
    assert words in script(f'{stage}.py', f'--dataset=./{builtin}', *args, code=2).stderr
    assert sorted(os.listdir(tmp_path)) == ['file']


# ---- checkpoints ----

def test_the_last_two_checkpoints_are_kept_and_a_damaged_one_is_not_used(script, data, tmp_path, capsys):
    script('pretrain.py', *TINY, data, '--max_iters=6', '--eval_interval=2')
    steps = [torch.load(tmp_path / 'run' / name, weights_only=True)['step'] for name in CHECKPOINTS]
    whole = weights(tmp_path / 'run')
    assert steps == [6, 4]
    content = (tmp_path / 'run' / 'ckpt.pt').read_bytes()
    (tmp_path / 'run' / 'ckpt.pt').write_bytes(content[:len(content) // 2])
    assert load_checkpoint(tmp_path / 'run')['step'] == 4
    line = capsys.readouterr().err
    assert 'ckpt.pt is not a checkpoint' in line and 'ckpt_previous.pt, of step 4' in line
    script('pretrain.py', '--out_dir=run', '--init_from=resume')
    assert same(weights(tmp_path / 'run'), whole)


def test_always_save_checkpoint_false_keeps_the_lowest_held_out_loss(tmp_path, capsys):
    config = dict(CONFIG, out_dir=str(tmp_path), always_save_checkpoint=False)
    training = make_training(start_run('cpu', 'float32'), config)
    saved = []
    # that of the untrained model, 1.0, is no checkpoint: a run that never gets there still leaves its best
    for _, loss in zip(training, [1.0, 3.0, 2.0, 4.0, 3.5, 2.5]):
        training.evaluated('line', val_loss=loss)
        saved.append(training.saved_step)
    assert saved == [None, 1, 2, 2, 2, 2] and load_checkpoint(tmp_path)['step'] == 2
    with pytest.raises(SystemExit, match='0'):
        training.close('goodbye')
    assert 'step 2 is kept, of the lowest held-out loss 2.0000' in capsys.readouterr().out


def test_a_checkpoint_is_on_the_disk_before_the_old_one_goes(tmp_path, tokenizer, monkeypatch):
    """Renamed before fsync, it may be empty after a power cut, and the old one gone."""
    run, calls = start_run('cpu', 'float32'), []
    save_checkpoint(run, tmp_path, tokenizer, MiniMindConfig(), step=1, settings={})
    replace = os.replace

    def spy(old, new):
        calls.append(os.path.basename(new))
        replace(old, new)
        assert load_checkpoint(tmp_path)['step'] == 1 + (calls[-1] == 'ckpt.pt')    # if killed here
        assert (tmp_path / 'ckpt.pt').exists()
    monkeypatch.setattr(os, 'fsync', lambda number: calls.append(f'fsync {os.fstat(number).st_size}'))
    monkeypatch.setattr(os, 'replace', spy)
    save_checkpoint(run, tmp_path, tokenizer, MiniMindConfig(), step=2, settings={})
    size = (tmp_path / 'ckpt.pt').stat().st_size
    assert calls[-3:] == [f'fsync {size}', 'ckpt_previous.pt', 'ckpt.pt']


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
    assert said(error.value, monkeypatch, capsys) == (1, 'ckpt.pt.tmp: No space left on device')


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


def test_what_the_compiler_says_is_one_line(monkeypatch, capsys):
    error = type('InductorError', (RuntimeError,), {})('CppCompileError: Python.h: No such file')
    code, line = said(error, monkeypatch, capsys)
    assert code == 1 and 'leave out --compile' in line


def test_a_last_line_that_finds_the_disk_full_is_one_line(monkeypatch, capsys):
    """Python itself would end with two lines and exit code 120."""
    codes = []

    class Full:
        def flush(self):
            raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(configurator.os, '_exit', codes.append)
    monkeypatch.setattr(sys, 'stdout', Full())
    configurator.flush_last()
    assert codes == [1] and 'cannot write: No space left on device' in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    (tmp_path / 'loss.png').mkdir()
    with pytest.raises(SystemExit, match='1'):
        [*configurator.draw(tmp_path / 'loss.png')]
    assert 'loss.png: Is a directory' in capsys.readouterr().err


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


def test_each_rank_goes_on_with_its_own_random_numbers():
    """Rank 1 of two takes the second state; where the number of ranks changed, new numbers are drawn."""
    states, expected = [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append([torch.get_rng_state()])
        expected.append(torch.rand(3))
    for rank in (0, 1):
        configurator.restore_rng(Run(torch.device('cpu'), torch.float32, rank, 2), states, step=7)
        assert torch.equal(torch.rand(3), expected[rank])
    drawn = []
    for rank in range(3):
        torch.manual_seed(1337 + rank)
        configurator.restore_rng(Run(torch.device('cpu'), torch.float32, rank, 3), states, step=7)
        drawn.append(torch.rand(3))
    assert len({tuple(numbers.tolist()) for numbers in (*drawn, *expected)}) == 5


def test_torchrun_starts_a_run_again_whose_rank_was_killed(script, data, tmp_path):
    """Rank 1 of two is killed once the first checkpoint is there; --max-restarts goes on, bit for bit."""
    (tmp_path / 'killed.py').write_text("""
import os, threading, time
def _kill():
    while not os.path.exists('run/ckpt.pt'):
        time.sleep(0.01)
    os.kill(os.getpid(), 9)
if os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':
    threading.Thread(target=_kill, daemon=True).start()
""")
    arguments = [*TINY, data, '--max_iters=40', '--eval_interval=10', '--dropout=0.1']
    # with the store of the ranks that died, torch may let their successors wait for them (its issue 135712)
    out = script('pretrain.py', *arguments, 'killed.py', torchrun=2, restarts=1,
                 env={'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'}).stdout
    assert out.count('parameters;') == 2 and out.count('step      0 ') == 1
    cut = weights(tmp_path / 'run')
    # gloo's threads, still there, abort one rank in fifty as Python comes down: it must not
    (tmp_path / 'down.py').write_text("""
class _Kept:
    def __del__(self):
        print('Python comes down')
__import__('builtins').kept = _Kept()
""")
    out = script('pretrain.py', *arguments, 'down.py', '--out_dir=whole', torchrun=2).stdout
    assert 'done in' in out and 'comes down' not in out
    assert same(cut, weights(tmp_path / 'whole'))


def test_a_rank_that_fails_has_its_exit_code(monkeypatch, capsys):
    """Python is not taken down, see Run.end: with SIGABRT it would end with another code."""
    codes = []
    monkeypatch.setattr(configurator.dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(configurator, 'end_process', codes.append)
    with pytest.raises(SystemExit):
        fail('step 7: the loss is nan', code=1)
    assert codes == [1] and 'step 7: the loss is nan' in capsys.readouterr().err


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


def test_held_out_losses_are_measured_without_dropout(script, data, tmp_path):
    """Twice in one run, at a learning rate of 0: equal, though the model drops half of its activations."""
    script('pretrain.py', *TINY, data, '--max_iters=2', '--eval_interval=1', '--dropout=0.5',
           '--learning_rate=0')
    found = [line for line in metrics(tmp_path / 'run') if 'val_loss' in line]
    assert len(found) == 3 and len({line['val_loss'] for line in found}) == 1
    losses = [line['loss'] for line in metrics(tmp_path / 'run') if 'loss' in line]
    assert np.mean(losses) != pytest.approx(found[0]['train_loss'], abs=1e-3)


def test_a_resumed_cosine_goes_on_where_it_stopped(script, data, tmp_path):
    common = [data, '--eval_interval=3', '--warmup_iters=1']
    script('pretrain.py', *TINY, *common, '--max_iters=9')
    rates = {line['step']: line['lr'] for line in metrics(tmp_path / 'run') if 'lr' in line}
    os.replace(tmp_path / 'run' / 'ckpt_previous.pt', tmp_path / 'run' / 'ckpt.pt')
    script('pretrain.py', '--out_dir=run', '--init_from=resume')
    again = {line['step']: line['lr'] for line in metrics(tmp_path / 'run') if 'lr' in line}
    assert again == rates and len(rates) == 9


@pytest.mark.parametrize('stage', ['pretrain', 'sft', 'dpo', 'finetune_cls'])
def test_in_each_stage_what_is_held_out_is_read_without_dropout(stage):
    """Twice the same, equal to the model in evaluation mode, and it goes on training."""
    run = start_run('cpu', 'float32')
    mask = np.tile(np.array([0] * 4 + [1] * 6, np.uint8), 4)        # ten tokens a document, six targets
    split = Split(np.arange(40, dtype=np.uint16), mask, np.arange(0, 41, 10),
                  np.array([0, 1, 0, 1]))
    sizes = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, dropout=0.5)
    model = MiniMind(MiniMindConfig(**sizes)).train()
    if stage == 'finetune_cls':
        finetune_cls.add_head(model, 2)
    measure = dict(
        pretrain=lambda: pretrain.held_out_loss(model, run, split, 8, 2, 100),
        sft=lambda: sft.held_out_loss(model, run, sft.Rows(split, np.arange(4), 16, 'packed'), 2, 100),
        dpo=lambda: dpo.log_probs_of(model, run, split, [0, 1], 16, 2, False),
        finetune_cls=lambda: finetune_cls.predictions(model, run, split, 16)[0])[stage]
    first, second = measure(), measure()
    tokens = torch.ones(1, 9, dtype=torch.long)
    assert model.training and not torch.equal(model(tokens)[0], model(tokens)[0])
    model.eval()
    assert np.array_equal(first, second) and np.array_equal(first, measure())


# ---- what a run may write over ----

def test_a_new_run_replaces_only_one_of_its_own_stage(script, run_folder, tmp_path, tokenizer):
    write_data(str(tmp_path / 'rules'), tokenizer, [Piece('train', TEXT * 9), Piece('val', TEXT)], 'test')
    run = ['--dataset=./rules', '--n_layer=1', '--n_head=2', '--n_kv_head=1', '--n_embd=32', '--max_iters=1',
           '--block_size=32', '--batch_size=2', '--eval_iters=1', '--device=cpu', '--out_dir=my run']
    first, second = (script('pretrain.py', *run).stdout for _ in range(2))
    assert 'replaces' not in first and 'holds a run at step 1, which this one replaces' in second
    assert "python sample.py --out_dir='my run'" in first            # as a shell wants it
    before = (tmp_path / 'my run' / 'ckpt.pt').read_bytes()
    chats = ['--dataset=./rules', f'--init_from={run_folder}', '--out_dir=my run']
    line = script('sft.py', *chats, code=2).stderr
    assert '--out_dir=my run holds a run of pretrain.py' in line
    assert (tmp_path / 'my run' / 'ckpt.pt').read_bytes() == before
    script('sample.py', '--out_dir=my run', '--export_dir=hf')
    kept = {path.name: path.read_bytes() for path in (tmp_path / 'hf').iterdir()}
    line = script('pretrain.py', *run, '--out_dir=hf', code=2).stderr
    assert '--out_dir=hf holds a model, config.json: choose another folder' in line
    assert {path.name: path.read_bytes() for path in (tmp_path / 'hf').iterdir()} == kept


@pytest.mark.parametrize('script_name, setting', [('pretrain', 'out_dir'), ('train_tokenizer', 'out_dir')])
def test_a_folder_that_cannot_be_made_is_one_line(script, tokenizer_folder, script_name, setting):
    line = script(f'{script_name}.py', f'--{setting}=out/{"x" * 300}', code=2).stderr
    assert 'cannot make the folder' in line and 'File name too long' in line


def test_a_run_in_the_repository_is_named_from_elsewhere(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('configurator.HERE', str(tmp_path / 'repository'))
    (tmp_path / 'repository' / 'out' / 'sft').mkdir(parents=True)
    (tmp_path / 'repository' / 'out' / 'sft' / 'ckpt.pt').touch()
    with pytest.raises(SystemExit):
        load_checkpoint('out/sft')
    assert f"there is {tmp_path / 'repository' / 'out' / 'sft' / 'ckpt.pt'}" in capsys.readouterr().err
