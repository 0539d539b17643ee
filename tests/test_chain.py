"""The whole road, each stage from what the one before it left, from a folder that is not the repository.

The models are tiny and the steps are few. What is tested is that every hand-over fits, on the built-in data.
"""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, numbers

from model_minimind import weights_to_hf
from sample import load_run

SMALL = ['--max_iters=2', '--eval_interval=2', '--batch_size=2', '--block_size=128', '--dtype=float32',
         '--device=cpu', '--seed=1']
SHAPE = ['--n_layer=1', '--n_head=2', '--n_kv_head=1', '--n_embd=32']
REPORT = ['--eval_iters=1', '--report_size=2', '--max_new_tokens=4']


def test_the_road_from_nothing_to_every_stage(script, tmp_path):
    # nothing is prepared: pretrain.py trains the tokenizer and tokenises pydoc itself
    done = script('pretrain.py', *SMALL, *SHAPE, '--eval_iters=1', '--tokenizer=words', '--dataset=./pydoc',
                  '--out_dir=pretrain')
    assert 'train_tokenizer.py' in done.stdout and 'prepare.py' in done.stdout
    assert (tmp_path / 'words' / 'tokenizer.json').exists() and (tmp_path / 'pydoc' / 'meta.json').exists()
    script('sample.py', '--out_dir=pretrain', '--start=def is_', '--max_new_tokens=5')

    script('sft.py', *SMALL, *REPORT, '--init_from=pretrain', '--dataset=./pydoc_sft', '--out_dir=sft')
    script('dpo.py', *SMALL, '--eval_iters=1', '--init_from=sft', '--dataset=./pydoc_dpo', '--out_dir=dpo')
    script('lora.py', *SMALL, *REPORT, '--init_from=dpo', '--dataset=./reason', '--out_dir=lora')
    script('distill.py', *SMALL, *REPORT, *SHAPE, '--teacher=sft', '--dataset=./pydoc_sft',
           '--out_dir=distill')
    script('finetune_cls.py', *SMALL, '--init_from=pretrain', '--dataset=./spam', '--out_dir=spam_run')
    out = script('finetune_cls.py', '--out_dir=spam_run', '--classify=You won a prize').stdout
    assert out.split('\t')[0] in ('ham', 'spam')

    # every folder speaks, is a log of what happened, and leaves for Hugging Face
    for folder in ('sft', 'dpo', 'lora', 'distill'):
        script('sample.py', f'--out_dir={folder}', '--chat', '--max_new_tokens=3', input='What is a list?\n')
        lines = [json.loads(line) for line in (tmp_path / folder / 'metrics.jsonl').read_text().splitlines()]
        assert {line['step'] for line in lines} == {0, 1, 2}
    script('sample.py', '--out_dir=dpo', '--export_dir=hf')
    ours = script('sample.py', '--out_dir=dpo', '--temperature=0', '--max_new_tokens=5').stdout
    assert script('sample.py', '--init_from=hf', '--temperature=0', '--max_new_tokens=5').stdout == ours


def test_the_road_of_minimind(script, tmp_path):
    """Its data, its names of settings, its .pth: tokenizer, pretraining, tools and thoughts, DPO, LoRA."""
    tool = json.dumps([dict(type='function', function=dict(name='add', parameters={}))])
    call = json.dumps([dict(name='add', arguments=dict(a=1, b=2))])
    user, sea = dict(role='user', content='Who keeps the light?'), dict(role='assistant', content='The sea.')
    keeper = dict(role='assistant', content='A keeper.', reasoning_content='A lamp needs a keeper.')
    using = [dict(role='system', content='# Tools', tools=tool), dict(role='user', content='1 + 2?'),
             dict(role='assistant', content='', tool_calls=call), dict(role='tool', content='3'),
             dict(role='assistant', content='It is 3.')]
    asked = [dict(user, content=f'Who {i}?') for i in range(90)]
    sums = [dict(using[1], content=f'{i} + 2?') for i in range(90)]
    files = dict(
        pretrain_hq=[dict(text=f'{i} {TEXT}') for i in range(60)],
        sft_t2t_mini=[dict(conversations=[user, keeper]) for user in asked]
        + [dict(conversations=[using[0], user, *using[2:]]) for user in sums],
        dpo=[dict(chosen=[user, keeper], rejected=[user, sea]) for user in asked])
    for name, records in files.items():
        lines = '\n'.join(json.dumps(record, ensure_ascii=False) for record in records)
        (tmp_path / f'{name}.jsonl').write_text(lines, encoding='utf-8')
    script('train_tokenizer.py', '--input=sft_t2t_mini.jsonl', '--vocab_size=320', '--out_dir=model')
    for name in files:
        script('prepare.py', f'--input={name}.jsonl', f'--dataset=./{name}', '--tokenizer=model')
    few = ['--max_iters', '2', '--eval_iters', '1', '--device', 'cpu', '--dtype', 'float32',
           '--batch_size', '2']
    script('pretrain.py', *few, '--hidden_size', '32', '--num_hidden_layers', '1',
           '--num_attention_heads', '2', '--num_key_value_heads', '1', '--max_seq_len', '34',
           '--context', '512', '--data_path', './pretrain_hq', '--save_dir', 'pretrain')
    out = script('sft.py', *few, '--max_seq_len=256', '--init_from=pretrain', '--dataset=./sft_t2t_mini',
                 '--out_dir=sft', '--report_size=4').stdout
    assert '2 steps' in out
    script('dpo.py', *few, '--max_seq_len=192', '--init_from=sft', '--dataset=./dpo', '--out_dir=dpo')
    script('lora.py', *few, '--max_seq_len=256', '--init_from=dpo', '--dataset=./sft_t2t_mini',
           '--out_dir=lora', '--report_size=0')
    chat = ['--chat', '--temperature=0', '--max_new_tokens=4', '--dtype=float32']
    for thinking in ([], ['--thinking']):
        script('sample.py', '--out_dir=lora', *chat, *thinking, input='Who keeps the light?\n')

    # the same model as a .pth in MiniMind's repository: out/ beside model/, half precision, no config
    model = load_run(str(tmp_path / 'sft'))[0].half()
    (tmp_path / 'out').mkdir()
    torch.save(weights_to_hf(model.state_dict()), tmp_path / 'out' / 'full_sft_32.pth')
    theta = '--weights_config=rope_theta=1e6'
    answers = [script('sample.py', *of, *chat, input='Who?\n').stdout
               for of in (['--out_dir=sft'], ['--init_from=out/full_sft_32.pth', theta])]
    assert answers[0] == answers[1]
    script('lora.py', *few, '--init_from=out/full_sft_32.pth', theta, '--dataset=./sft_t2t_mini',
           '--out_dir=lora_of_pth', '--report_size=0')
    pytest.importorskip('gguf')
    script('sample.py', '--out_dir=lora_of_pth', '--export_gguf=model.gguf')
    assert (tmp_path / 'model.gguf').read_bytes()[:4] == b'GGUF'


def test_the_road_of_nanogpt(script, tmp_path, byte_tokenizer):
    """train.bin and val.bin, a config as config/train_gpt2.py on two ranks, evaluation, a sample."""
    byte_tokenizer.save(tmp_path / 'bytes')
    for split in ('train', 'val'):
        ids = [*byte_tokenizer.encode(TEXT), byte_tokenizer.eot] * 3
        (tmp_path / 'owt').mkdir(exist_ok=True)
        np.array(ids, dtype=np.uint16).tofile(tmp_path / 'owt' / f'{split}.bin')
    script('prepare.py', '--input=owt', '--tokenizer=bytes', '--dataset=./openwebtext')
    (tmp_path / 'train_gpt2.py').write_text(
        "wandb_log = False\nwandb_project = 'owt'\nwandb_run_name = 'gpt2-124M'\n"
        "batch_size = 2\nblock_size = 64\ngradient_accumulation_steps = 1 * 2\n"
        "max_iters = 4\nlr_decay_iters = 600000\neval_interval = 2\neval_iters = 500\nlog_interval = 1\n"
        "weight_decay = 1e-1\n")
    small = ['--dataset=./openwebtext', '--device=cpu', '--dtype=float32', '--out_dir=out']
    shape = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--dropout=0.0']
    out = script('pretrain.py', 'train_gpt2.py', *small, *shape, torchrun=2).stdout
    assert "train_gpt2.py is nanoGPT's" in out and 'on 2 x cpu' in out
    (tmp_path / 'eval_gpt2.py').write_text("batch_size = 8\neval_iters = 500\neval_only = True\n"
                                           "wandb_log = False\ninit_from = 'out'\n")
    again = script('pretrain.py', 'eval_gpt2.py', *small[:3], '--block_size=64', '--out_dir=none').stdout
    losses = [numbers(r'held-out loss (\S+)', text)[-1] for text in (out, again)]
    assert abs(losses[0] - losses[1]) < 2e-4 and not (tmp_path / 'none').exists()
    text = script('sample.py', '--out_dir=out', '--start=the', '--max_new_tokens=5').stdout
    assert text.startswith('the')


# ---- tests/road.sh, with a stand-in for python that writes down what it should do ----

STUB = r"""#!/bin/bash
if [ "$1" = - ]; then exec REAL "$@"; fi
printf '%s\t' "$@" >> commands; echo >> commands
if [ "$1" = "$BREAK" ]; then exit 1; fi
if [ "$1" = sample.py ]; then cat > /dev/null; fi
for arg; do
    if [[ $arg = --out_dir=* ]]; then mkdir -p "${arg#*=}"; fi
done
"""
STAGES = ['pretrain', 'finetune_cls', 'sft', 'dpo', 'lora', 'distill']
TRIAL = ['--epochs=0', '--max_iters=3', '--eval_interval=3']


@pytest.fixture
def road(tmp_path):
    """road(*arguments, STEPS='3') is (what came of it, the commands, folder of the repository)."""
    here = tmp_path / 'a b'
    for folder in 'tests', 'bin', 'data/raw', 'data/poems', *(f'out/{name}' for name in [*STAGES, 'reason']):
        (here / folder).mkdir(parents=True)
    shutil.copy(ROOT / 'tests' / 'road.sh', here / 'tests')
    for name in STAGES:
        shutil.copy(ROOT / f'{name}.py', here)
    for path in here.glob('out/*'):
        (path / 'metrics.jsonl').write_text('{"val_bits_per_byte": 1, "val_accuracy": 1, "val_loss": 1}\n')
    for name in ('poems_practice', 'poems_orders', 'ci_orders'):
        (here / 'data' / 'raw' / f'{name}.txt').write_text('x\n' * 300)
    (here / 'out' / 'road.md').write_text('before\n')
    (here / 'bin' / 'python').write_text(STUB.replace('REAL', sys.executable))
    (here / 'bin' / 'python').chmod(0o755)

    def run(*arguments, **env):
        done = subprocess.run(['bash', here / 'tests' / 'road.sh', *arguments], capture_output=True,
                              text=True, stdin=subprocess.DEVNULL,
                              env={'PATH': f"{here / 'bin'}:{os.environ['PATH']}", **env})
        path = here / 'commands'
        rows = path.read_text().splitlines() if path.exists() else []
        return done, [row.rstrip('\t').split('\t') for row in rows], here
    return run


@pytest.mark.parametrize('env, words', [
    (dict(STEPS='abc'), 'STEPS=abc: give a whole number from 1 up'), (dict(STEPS='0'), 'STEPS=0'),
    (dict(STEPS='-1'), 'STEPS=-1'), (dict(SEED='abc'), 'SEED=abc: give a whole number from 0 up'),
    (dict(SEED='2'), 'SEED and OUT are for poems'), (dict(OUT='out/x'), 'SEED and OUT are for poems')])
def test_a_road_that_cannot_be_walked_changes_nothing(road, env, words):
    for arguments in [[], ['poems']] if 'give' in words or 'STEPS' in env else [[]]:
        done, commands, here = road(*arguments, **env)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count('\n') == 1 and not commands
        assert (here / 'out' / 'road.md').read_text() == 'before\n' and (here / 'data' / 'poems').exists()


@pytest.mark.parametrize('steps', ['', '3'])
def test_the_default_road_is_a_table_that_is_whole_or_not_there(road, steps):
    done, _, here = road(STEPS=steps, BREAK='lora.py')
    assert done.returncode == 1 and (here / 'out' / 'road.md').read_text() == 'before\n'
    (here / 'commands').unlink()
    done, commands, _ = road(STEPS=steps)
    assert done.returncode == 0, done.stderr
    trains = [command for command in commands if command[0] != 'sample.py']
    assert [c[0] for c in trains] == [*(f'{name}.py' for name in STAGES), 'distill.py']
    assert all(command[-3:] == TRIAL if steps else len(command) < 3 for command in trains)
    assert ['--report_size=4' in command for command in trains] == [bool(steps) and name not in (
        'pretrain', 'finetune_cls', 'dpo') for name in [*STAGES, 'distill']]
    assert len((here / 'out' / 'road.md').read_text().splitlines()) == 2 + 7
    assert not list(here.glob('out/road.*t')) and not (here / 'out' / 'stage.log').exists()


@pytest.mark.parametrize('steps', ['', '3'])
def test_the_road_of_poems_trains_each_stage_for_as_many_steps(road, steps):
    done, commands, here = road('poems', STEPS=steps, SEED='2', OUT='out/again and again')
    assert done.returncode == 0, done.stderr
    trains = [command for command in commands if command[0][:-3] in STAGES]
    assert [command[0][:-3] for command in trains] == [
        'pretrain', 'finetune_cls', 'finetune_cls', 'sft', 'dpo', 'lora', 'sft', *['distill'] * 3]
    assert all((command[-3:] == TRIAL) == bool(steps) for command in trains)
    assert [arg for command in trains for arg in command if arg.startswith('--teacher=')] == [
        '--teacher=out/again and again/sft', '--teacher=', '--teacher=']
    assert sum('--seed=2' in command for command in trains) == 3
    runs = ['alone', 'ci_lora', 'ci_sft', 'cls', 'cls_random', 'dpo', 'pretrain', 'sft', 'student', 'taught',
            'tokenizer']
    out = here / 'out' / 'again and again'
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == runs
    assert ([command[0] for command in commands].count('data/poems.py') == 10) == (not steps)
    assert commands[-1] == ['data/poems_page.py', 'out/again and again']
