"""Settings and mistakes, the learning-rate curve, checkpoints, metrics: configurator.py."""
import json
import math
import runpy

import pytest
import torch
from conftest import ROOT

import configurator
from configurator import MetricsLog, clock, in_full, load_checkpoint, save_checkpoint, start_run
from model_minimind import MiniMindConfig
from pretrain import learning_rate_at

STAGE = '''"""A stage for the test."""
from configurator import at_least, between, configure, one_of

out_dir = 'out/stage'   # where it goes
steps = 10              # how many
rate = 0.5              # how fast
fast = False            # hurry
name = 'plain'          # 'plain' or 'fancy'
start = ''              # any text

if __name__ == '__main__':
    config = configure(globals(), steps=at_least(1), rate=between(0, 1), name=one_of('plain', 'fancy'))
    assert config == {k: globals()[k] for k in ('out_dir', 'steps', 'rate', 'fast', 'name', 'start')}
'''


@pytest.fixture
def stage(tmp_path, monkeypatch, capsys):
    """Run a stage with the given arguments: (steps, rate, fast, name, start), or its error line."""
    (tmp_path / 'stage.py').write_text(STAGE)
    monkeypatch.chdir(tmp_path)

    def run(*args, code=0):
        monkeypatch.setattr('sys.argv', ['stage.py', *args])
        try:
            done = runpy.run_path('stage.py', run_name='__main__')
        except SystemExit as end:
            line = capsys.readouterr().err
            assert end.code == code == 2 and line.count('\n') == 1, line
            return line
        assert code == 0
        return tuple(done[key] for key in ('steps', 'rate', 'fast', 'name', 'start'))
    return run


def test_values_are_python_literals(stage):
    assert stage() == (10, 0.5, False, 'plain', '')
    assert stage('--steps=1_000', '--rate=1', '--fast') == (1000, 1.0, True, 'plain', '')
    assert stage('--fast=True', '--start=a=b', '--name="fancy"') == (10, 0.5, True, 'fancy', 'a=b')
    assert stage('--start=3')[4] == '3'
    for text in ('"hello" # hm', '"Win", "now"', '"a" "b"', "'tis", r'"a\"'):      # it opens with a quote
        assert stage(f'--start={text}')[4] == text
    assert stage(r'--start="a\n\"b\""')[4] == 'a\n"b"'


def test_a_folder_is_kept_in_full_as_a_run_may_be_resumed_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ('run', 'gpt2'):
        (tmp_path / folder).mkdir()
    (tmp_path / 'run' / 'ckpt.pt').touch()
    for key, value, path in [('dataset', './text', 'text'), ('init_from', 'run', 'run'),
                             ('teacher', 'run/', 'run'), ('tokenizer', 'a/words', 'a/words')]:
        assert in_full(key, value) == str(tmp_path / path)
    for key, value in [('dataset', 'run'), ('init_from', 'gpt2'), ('init_from', 'resume'), ('tokenizer', ''),
                       ('start', './run'), ('out_dir', 'run/')]:
        assert in_full(key, value) == value         # names, texts, and what is typed anew each time


def test_later_wins_and_config_files_count_from_the_repository_too(stage, tmp_path):
    (tmp_path / 'small.py').write_text("steps = 2  # fewer\nrate = steps / 4\n")
    assert stage('small.py') == (2, 0.5, False, 'plain', '')
    assert stage('--steps=7', 'small.py')[0] == 2
    assert stage('small.py', '--steps=7')[0] == 7


@pytest.mark.parametrize('args, words', [
    (['--step=3'], ["--step=3", "unknown setting 'step'", "did you mean 'steps'"]),
    (['--steps=many'], ['steps takes a whole number', "'many'"]),
    (['--steps=1.5'], ['steps takes a whole number', '1.5']),
    (['--steps=0'], ['steps must be at least 1']),
    (['--steps=True'], ['steps takes a whole number']),
    (['--steps'], ['steps needs a value']),
    (['--rate=nan'], ['rate takes a number']),
    (['--rate=2'], ['rate must lie between 0 and 1']),
    (['--fast=2'], ['fast takes True or False']),
    (['--name=fanci'], ["name must be one of 'plain', 'fancy'", "did you mean 'fancy'"]),
    (['nowhere.py'], ['nowhere.py: no such config file']),
    (['typo.py'], ['typo.py:2:', "unknown setting 'raet'", "did you mean 'rate'"]),
    (['wrong.py'], ['wrong.py:1:', 'steps takes a whole number']),
    (['broken.py'], ['broken.py:2:', 'ZeroDivisionError']),
    (['syntax.py'], ['syntax.py:1:', 'SyntaxError']),
])
def test_a_mistake_ends_in_one_line_and_code_2(stage, tmp_path, args, words):
    (tmp_path / 'typo.py').write_text("steps = 3\nraet = 0.1\n")
    (tmp_path / 'wrong.py').write_text("steps = '3'\n")
    (tmp_path / 'broken.py').write_text("steps = 3\nrate = 1 / 0\n")
    (tmp_path / 'syntax.py').write_text("steps == = 3\n")
    line = stage(*args, code=2)
    for word in words:
        assert word in line


@pytest.mark.parametrize('name', sorted(p.name for p in ROOT.glob('*.py') if p.name != 'configurator.py'
                                        and 'configure(globals()' in p.read_text(encoding='utf-8')))
def test_help_tells_every_setting_with_its_comment(script, name):
    text = script(name, '--help').stdout
    settings = [line for line in text.split('Settings, as --key=value:\n')[1].splitlines()]
    assert settings
    for line in settings:
        assert '=' in line.split()[0] and len(line.split()) > 1, f"no comment beside {line.split()[0]}"


def test_learning_rate_warms_up_then_follows_half_a_cosine():
    def at(step):
        return learning_rate_at(step, learning_rate=1.0, min_lr=0.1, warmup_iters=9, max_iters=109)
    assert [at(0), at(4), at(9), at(59), at(109), at(10**6)] == pytest.approx([0.1, 0.5, 1.0, 0.55, 0.1, 0.1])


@pytest.mark.parametrize('device, environment, expected', [
    ('auto', {}, 'cuda:0'), ('cuda', {}, 'cuda:0'), ('cuda:1', {}, 'cuda:1'),
    ('auto', dict(RANK='3', WORLD_SIZE='4', LOCAL_RANK='1'), 'cuda:1')])
def test_a_gpu_has_an_index(monkeypatch, device, environment, expected):
    """torch.cuda.set_device takes a device with an index only; a stand-in for torch.cuda says so here."""
    chosen = []

    def set_device(device):
        if torch.device(device).index is None:
            raise ValueError('Expected a torch.device with a specified index')
        chosen.append(str(device))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda **_: True)
    monkeypatch.setattr(torch.cuda, 'set_device', set_device)
    monkeypatch.setattr(torch, 'zeros', lambda *size, device: torch.ones(*size))
    monkeypatch.setattr(configurator.dist, 'init_process_group', lambda backend: None)
    plans = []                          # cuDNN's attention would make one for each new length
    monkeypatch.setattr(torch.backends.cuda, 'enable_cudnn_sdp', plans.append)
    run = start_run(device)
    assert [str(run.device)] == chosen == [expected] and run.dtype == torch.bfloat16 and plans == [False]


def test_checkpoint_is_whole_or_the_old_one(tmp_path, tokenizer, monkeypatch):
    run = start_run('cpu', 'float32', seed=1)
    save_checkpoint(run, tmp_path, tokenizer, MiniMindConfig(), step=1, settings={}, weight=torch.ones(3))
    def crash(state, f):
        f.write(b'half of a checkpo')
        raise OSError('disk full')
    monkeypatch.setattr(configurator.torch, 'save', crash)
    with pytest.raises(OSError):
        save_checkpoint(run, tmp_path, tokenizer, MiniMindConfig(), step=2)
    state = load_checkpoint(tmp_path)
    assert state['step'] == 1 and torch.equal(state['weight'], torch.ones(3))


def test_checkpoint_brings_the_random_numbers_back(tmp_path, tokenizer):
    run = start_run('cpu', 'float32', seed=1)
    save_checkpoint(run, tmp_path, tokenizer, MiniMindConfig(), step=0, settings={})
    expected = torch.rand(3)
    torch.manual_seed(99)
    configurator.restore_rng(run, load_checkpoint(tmp_path)['rng'], step=0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize('content', [None, b'', b'not a checkpoint', 'foreign'])
def test_a_missing_or_foreign_checkpoint_is_one_line(tmp_path, capsys, content):
    if content == 'foreign':
        torch.save({'weights': torch.ones(1)}, tmp_path / 'ckpt.pt')
    elif content is not None:
        (tmp_path / 'ckpt.pt').write_bytes(content)
    with pytest.raises(SystemExit) as end:
        load_checkpoint(tmp_path)
    line = capsys.readouterr().err
    assert end.value.code == 2 and len(line.splitlines()) == 1 and 'ckpt.pt' in line


def test_metrics_of_steps_that_come_again_are_dropped(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(4):
        log.write(step=step, loss=float(step))
    with open(tmp_path / 'metrics.jsonl', 'a') as f:
        f.write('{"step": 4, "lo')                                      # what a crash leaves
    MetricsLog(tmp_path, step=2).write(step=2, loss=20.0)
    lines = [json.loads(line) for line in (tmp_path / 'metrics.jsonl').read_text().splitlines()]
    assert lines == [{'step': 0, 'loss': 0.0}, {'step': 1, 'loss': 1.0}, {'step': 2, 'loss': 20.0}]


def test_the_picture_is_drawn_where_matplotlib_is_installed(tmp_path):
    pytest.importorskip('matplotlib')
    log = MetricsLog(tmp_path)
    for step in range(3):
        log.write(step=step, loss=math.exp(-step), val_loss=1.0)
    log.draw()
    assert (tmp_path / 'loss.png').read_bytes()[:4] == b'\x89PNG'


def test_a_collapse_lies_inside_the_picture_of_experts(tmp_path, monkeypatch):
    plt, seen = pytest.importorskip('matplotlib.pyplot'), []
    monkeypatch.setattr(plt, 'close', lambda figure: seen.append(figure.axes))
    log, even = MetricsLog(tmp_path), [0.25, 0.26, 0.24, 0.25]
    for step in range(3):
        log.write(step=step, expert_load=[even, even if step < 2 else [0.9, 0.1, 0.0, 0.0]])
    log.draw()
    (first, second), = seen
    for axes in (first, second):                            # one scale for all layers
        low, high = axes.get_ylim()
        assert low <= 0.0 and 0.9 <= high
    assert [text.get_text() for text in second.get_legend().get_texts()] == [f'expert {e}' for e in range(4)]
    assert second.lines[0].get_ydata()[-1] == 0.9


def test_clock():
    assert [clock(s) for s in (5, 75, 3675)] == ['0:05', '1:15', '1:01:15']
