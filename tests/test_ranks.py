"""Several ranks: a model shared out over them (parallel='fsdp') trains as on one, and so does one on several
machines; of a block only the input is kept (activation_checkpointing); and no step waits for a GPU."""
import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from torch._dynamo import trace_rules
from torch.utils._python_dispatch import TorchDispatchMode
from conftest import ONE_THREAD, ROOT, TEXT
from test_training import CONFIG, make_training, metrics

from configurator import Run
from model_gpt2 import GPT2
from model_minimind import MiniMind
from prepare import Piece, write_data

SMALL = ['--block_size=48', '--max_iters=4', '--eval_interval=2', '--log_interval=1', '--device=cpu',
         '--dtype=float32', '--warmup_iters=0', '--learning_rate=1e-3']
# to start ranks takes longer than such a run: all runs of a test share them
RANKS = """
import json, os, runpy, sys
import configurator
import torch.distributed as dist
configurator.end_process = sys.exit
start, end = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda backend: dist.is_initialized() or start(backend)
dist.destroy_process_group = lambda: None
for arguments in json.loads(sys.argv[1]):
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name='__main__')
    except SystemExit as done:
        assert not done.code, arguments
end()
os._exit(0)                         # as configurator.end_process
"""


@pytest.fixture
def on_ranks(script, tmp_path):
    """on_ranks(2, ['pretrain.py', ...], ...) runs scripts one after another on two ranks."""
    def run(ranks, *runs):
        (tmp_path / 'ranks.py').write_text(RANKS)
        runs = json.dumps([[str(ROOT / name), *map(str, rest)] for name, *rest in runs])
        return script(tmp_path / 'ranks.py', runs, torchrun=ranks, env={'PYTHONPATH': str(ROOT)})
    return run


@pytest.fixture
def sets(tmp_path, tokenizer, byte_tokenizer):
    """sets(task) is --dataset=... of a small data set; of 'gpt2' that for pretraining, of bytes."""
    def make(task):
        contents = [f'{i}. {line}' for i, line in enumerate(8 * TEXT.splitlines())]
        chats = [(dict(role='user', content=f'Say {i}.'),
                  dict(role='assistant', content='One ' + 'more ' * (i % 7))) for i in range(24)]
        texts = [Piece('train', text) for text in contents]
        pieces = dict(
            pretrain=texts, gpt2=texts, sft=[Piece('train', (chat,)) for chat in chats],
            dpo=[Piece('train', (chat, dict(role='assistant', content='None.'))) for chat in chats],
            cls=[Piece('train', text, label='ab'[i % 2]) for i, text in enumerate(contents)])[task]
        pieces += [piece._replace(split=split) for split in ('val', 'test') for piece in pieces[:6]]
        folder = tmp_path / f'{task}_data'
        write_data(str(folder), byte_tokenizer if task == 'gpt2' else tokenizer, pieces, task,
                   'pretrain' if task == 'gpt2' else task)
        return f'--dataset={folder}'
    return make


def alike(folder, one, other, name='model', atol=1e-5):
    """The losses of two runs and their weights are the same but for rounding."""
    losses, held = ([[line[name] for line in metrics(folder / run) if name in line] for run in (one, other)]
                    for name in ('loss', 'val_loss'))
    assert len(losses[0]) >= 4 and losses[0] == pytest.approx(losses[1], abs=atol)
    assert held[0] == pytest.approx(held[1], abs=atol)
    first, second = (torch.load(folder / run / 'ckpt.pt', weights_only=True) for run in (one, other))
    assert first[name].keys() == second[name].keys()
    for key, value in first[name].items():
        torch.testing.assert_close(second[name][key], value, atol=atol, rtol=0, msg=key)
    states, others = ([o['state'] for o in run['optimizers']] for run in (first, second))
    assert [state.keys() for state in states] == [state.keys() for state in others]


def test_shared_out_it_trains_as_on_one_rank(script, on_ranks, sets, tiny_run, tmp_path):
    """Each stage, with each optimizer where it has both: two ranks of one row are one of two."""
    start, gpt2 = f'--init_from={tiny_run("minimind")}', f'--init_from={tiny_run("gpt2")}'
    shape = ['--n_layer=2', '--n_head=2', '--n_kv_head=1', '--n_embd=32', '--eval_iters=99', '--prompt=The']
    sft = [sets('sft'), '--eval_iters=99', '--report_size=2', '--max_new_tokens=4']
    runs = dict(
        adamw=['pretrain.py', *shape, sets('pretrain'), '--optimizer=adamw'],
        muon=['pretrain.py', *shape, sets('pretrain'), '--activation_checkpointing'],
        experts=['pretrain.py', *shape, sets('pretrain'), '--use_moe', '--num_experts=3'],
        gpt2=['pretrain.py', gpt2, sets('gpt2'), '--eval_iters=99', '--prompt=The', '--optimizer=muon'],
        sft=['sft.py', start, *sft, '--optimizer=muon'],
        distill=['distill.py', f'--teacher={tiny_run("minimind")}', *shape[:4], *sft],
        lora=['lora.py', start, *sft],
        dpo=['dpo.py', start, sets('dpo'), '--eval_iters=99'],
        cls=['finetune_cls.py', start, sets('cls'), '--trainable=last', '--dropout=0'])
    one = ['--batch_size=4', *SMALL]
    two = ['--batch_size=1', '--gradient_accumulation_steps=4', '--parallel=fsdp', *SMALL]
    for name, (stage, *rest) in runs.items():
        script(stage, *rest, *one, f'--out_dir={name}/one')
    on_ranks(2, *([*run, *two, f'--out_dir={name}/two'] for name, run in runs.items()))
    for name in runs:
        alike(tmp_path / name, 'one', 'two', dict(lora='adapters', cls='last').get(name, 'model'))
    script('sample.py', '--out_dir=muon/two', '--max_new_tokens=3')


def test_a_shared_run_goes_on_on_any_number_of_ranks(script, on_ranks, sets, tmp_path):
    """Two ranks -> one, one -> two, fsdp -> ddp; and N + N steps are 2N steps, bit for bit."""
    shape = ['--n_layer=2', '--n_head=2', '--n_kv_head=1', '--n_embd=32', '--eval_iters=99', '--prompt=The']
    run = ['pretrain.py', *shape, sets('pretrain'), *SMALL, '--batch_size=2',
           '--gradient_accumulation_steps=2', '--lr_decay_iters=4']
    half, fsdp, dropout = '--max_iters=2', '--parallel=fsdp', '--dropout=0.1'
    again = ['pretrain.py', '--init_from=resume', '--max_iters=4']
    script(*run, '--out_dir=whole')
    script(*run, '--out_dir=one', half)
    on_ranks(2, [*run, fsdp, '--out_dir=two', half], [*run, fsdp, '--out_dir=ddp', half],
             [*again, fsdp, '--out_dir=one'], [*again, '--parallel=ddp', '--out_dir=ddp'],
             [*run, fsdp, dropout, '--out_dir=dropped'], [*run, fsdp, dropout, '--out_dir=parts', half],
             [*again, '--out_dir=parts'])
    script(*again, '--out_dir=two')
    for name in ('one', 'two', 'ddp'):
        alike(tmp_path, 'whole', name)
    alike(tmp_path, 'dropped', 'parts', atol=0)


@pytest.mark.parametrize('model', ['minimind', 'minimind --use_moe', 'gpt2'])
def test_computed_twice_it_is_the_same_bit_for_bit(script, sets, tmp_path, model):
    run = ['pretrain.py', '--n_layer=2', '--n_head=2', '--n_embd=32', '--eval_iters=1', '--prompt=The',
           *SMALL, sets('pretrain'), '--batch_size=2', '--dropout=0.2', *f'--model={model}'.split()]
    script(*run, '--out_dir=kept')
    script(*run, '--out_dir=twice', '--activation_checkpointing')
    alike(tmp_path, 'kept', 'twice', atol=0)


def test_blocks_that_are_computed_twice_are_compiled(script, on_ranks, sets, tmp_path):
    """Shared out or not, dense or a mixture: one graph for all blocks. The model around them breaks."""
    (tmp_path / 'graphs.py').write_text("""
import torch as _torch
def _told(graph, inputs):
    parts = (part.graph.nodes for part in graph.modules() if isinstance(part, _torch.fx.GraphModule))
    if any('scaled_dot' in str(node.target) for nodes in parts for node in nodes):
        print('graph of attention\\n', end='', flush=True)
    return graph.forward
if not hasattr(_torch, 'plain'):
    _torch.plain = _torch.compile
__import__('configurator').has_compiler = lambda: True
_torch._dynamo.reset()
_torch.compile = lambda forward: _torch.plain(forward, backend=_told)
_torch.nn.Module.compile = lambda self: setattr(
    self, '_compiled_call_impl', _torch.plain(self._call_impl, backend=_told))
""")
    run = ['pretrain.py', 'graphs.py', sets('pretrain'), '--n_layer=3', '--n_head=2', '--n_embd=32', *SMALL,
           '--eval_iters=1', '--prompt=The', '--dtype=bfloat16', '--activation_checkpointing', '--compile']
    for i, more in enumerate(([], ['--use_moe'])):
        out = script(*run, *more, f'--out_dir=alone{i}', process=True).stdout
        assert out.count('graph of attention') == 1
    shared = [*run, '--parallel=fsdp', '--batch_size=2']
    out = on_ranks(2, [*shared, '--out_dir=two'], [*shared, '--model=gpt2', '--out_dir=three']).stdout
    assert out.count('graph of attention') == 4


def test_the_work_of_muon_is_shared_out_over_ranks(script, tmp_path):
    """Each of three makes the steps of its share of the matrices; there may be fewer than ranks."""
    (tmp_path / 'muon.py').write_text("""
import pretrain, torch
from unittest.mock import patch
run, asked, plain = pretrain.start_run('cpu', 'float32'), [], pretrain.orthogonalise
for n in range(1, 8):
    x = torch.randn(n, 4, 8, generator=torch.Generator().manual_seed(n))
    expected = plain(x)
    with patch('pretrain.orthogonalise', lambda x, dtype: asked.append(len(x)) or plain(x, dtype)):
        torch.testing.assert_close(pretrain.orthogonalise_shared(x, torch.float32), expected)
assert run.sum(*asked) == [3, 2, 3, 4, 5, 6, 7]        # one alone by all, else each by one
run.end()
""")
    script(tmp_path / 'muon.py', torchrun=3, env={'PYTHONPATH': str(ROOT)})


# ---- machines ----

def test_two_machines_without_a_shared_disk(tiny_run, tmp_path):
    """Two launchers: each prepares the data that its folder lacks, and rank 0 of all writes the run."""
    with socket.socket() as port:
        port.bind(('localhost', 0))
        where = f'localhost:{port.getsockname()[1]}'
    launch = ['-m', 'torch.distributed.run', '--nnodes=2', '--nproc_per_node=1', '--rdzv_backend=c10d',
              f'--rdzv_endpoint={where}', '--local_addr=localhost', str(ROOT / 'finetune_cls.py'),
              f'--init_from={tiny_run("minimind")}', '--dataset=./spam', *SMALL, '--max_iters=1',
              '--out_dir=run']
    machines = []
    for name in ('one', 'two'):
        (tmp_path / name).mkdir()
        machines.append(subprocess.Popen(
            [sys.executable, *launch], cwd=tmp_path / name, env=ONE_THREAD, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    found = sorted(sorted(path.name for path in (tmp_path / name).iterdir()) for name in ('one', 'two'))
    assert found == [['run', 'spam'], ['spam']] and ''.join(said).count('on 2 x cpu') == 1


@pytest.mark.parametrize('other, words', [
    (('nine rows and step 0', 10, '0' * 16), 'rank 1 starts from nine rows and step 0'),
    (('ten rows and step 4', 10, '0' * 16), 'rank 1 starts from ten rows and step 4'),
    (('ten rows and step 0', 10, '1' * 16), f"(tokenizer {'1' * 16}), rank 0 from ten rows and step 0 (0")])
def test_machines_that_hold_different_things_do_not_start(tmp_path, monkeypatch, capsys, other, words):
    """A disk that is not shared may lack the checkpoint, or hold data that were prepared otherwise."""
    monkeypatch.setattr('pretrain.dist.all_gather_object', lambda starts, own: starts.__setitem__(1, other))
    with pytest.raises(SystemExit, match='2'):
        make_training(Run(torch.device('cpu'), torch.float32, 0, 2), dict(CONFIG, out_dir=str(tmp_path)))
    assert words in capsys.readouterr().err and not os.listdir(tmp_path)


# ---- a GPU ----

class Waits(TorchDispatchMode):
    """Notes what a host would wait for a GPU for: numbers read from it, shapes that depend on numbers, and
    tensors made of Python's numbers."""
    READS = ('_local_scalar_dense', 'nonzero', 'masked_select', '_unique2', 'lift_fresh')
    on, forwards = False, 0

    def __init__(self):
        super().__init__()
        self.seen, self.found = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = [t for t in args[1] if t is not None and t.dtype == torch.bool] if name[:5] == 'index' and (
            isinstance(args[1], (list, tuple))) else []
        if self.on:
            self.seen.add(name)
            self.found += [name] * (name in self.READS or len(masks) > 0)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('stage', ['pretrain', 'pretrain --use_moe', 'pretrain --activation_checkpointing',
                                   'sft', 'lora', 'distill', 'dpo', 'finetune_cls'])
def test_on_a_gpu_no_step_waits_for_it(script, sets, tiny_run, monkeypatch, stage):
    """From the model's forward to the end of the step, in steps without a line: the host only queues work."""
    stage, *more = stage.split()
    start = {'pretrain': ['--n_layer=1', '--n_head=2', '--n_embd=32', '--prompt=The', '--eval_iters=1'],
             'distill': [f'--teacher={tiny_run("minimind")}', '--n_layer=1', '--n_head=2', '--n_embd=32']}
    task = dict(pretrain='pretrain', dpo='dpo', finetune_cls='cls').get(stage, 'sft')
    report = ['--report_size=0'] * (task == 'sft')
    trace_rules.get_torch_obj_rule_map()        # a table of functions, made once, must not hold the next one
    monkeypatch.setattr('model_minimind.torch.compiler.is_compiling', lambda: True)     # the loss as on a GPU
    with Waits() as waits:
        def spy(forward):
            def call(*args, **kwargs):
                if torch.is_grad_enabled():
                    waits.on, waits.forwards = waits.forwards in (1, 2), waits.forwards + 1
                return forward(*args, **kwargs)
            return call

        def sums(run, *numbers, sums=Run.sum):
            waits.on = False                            # a step begins: its rows are read by the host
            return sums(run, *numbers)
        for model in (GPT2, MiniMind):
            monkeypatch.setattr(model, 'forward', spy(model.forward))
        monkeypatch.setattr(Run, 'sum', sums)
        script(f'{stage}.py', *start.get(stage, [f'--init_from={tiny_run("minimind")}']), *more, *report,
               *SMALL, sets(task), '--log_interval=4', '--eval_interval=4', '--batch_size=2', '--out_dir=run')
    assert waits.forwards == 4 and {'mm', '_fused_adamw_'} <= waits.seen and not waits.found
