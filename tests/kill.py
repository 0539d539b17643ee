"""Kill runs with SIGKILL at random moments, resume them, and compare with runs that nobody killed.

    python tests/kill.py                    # five kills in each of the six stages
    python tests/kill.py --kills=1 --stage=dpo

Every run saves at each step, so that many kills fall into a save. It must go on from the last save that was
printed or a later one, and end with the same checkpoint bit for bit: weights, optimizers, random numbers.
"""
import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
WORDS = "keeper light sea rule storm lamp wind rock boat night".split()
SHAPE = ['--n_layer=1', '--n_embd=32', '--n_head=2', '--n_kv_head=1']
LOOP = ['--max_iters=25', '--eval_interval=1', '--log_interval=1', '--dtype=float32', '--device=cpu']
STAGES = {
    'pretrain': ['--dataset=./text', '--block_size=32', '--batch_size=4', '--eval_iters=1', '--dropout=0.1',
                 *SHAPE],
    'finetune_cls': ['--init_from=base', '--dataset=./mail', '--block_size=32', '--batch_size=4',
                     '--dropout=0.1'],
    'sft': ['--init_from=base', '--dataset=./chats', '--block_size=32', '--batch_size=4', '--eval_iters=1',
            '--dropout=0.1', '--max_new_tokens=2', '--report_size=0'],
    'dpo': ['--init_from=base', '--dataset=./pairs', '--block_size=32', '--batch_size=2', '--eval_iters=1'],
    'lora': ['--init_from=base', '--dataset=./chats', '--block_size=32', '--batch_size=4', '--eval_iters=1',
             '--dropout=0.1', '--report_size=0'],
    'distill': ['--teacher=base', '--dataset=./chats', '--block_size=32', '--batch_size=4', '--eval_iters=1',
                '--report_size=0', *SHAPE]}


def start(folder, script, *args):
    return subprocess.Popen([sys.executable, '-u', ROOT / script, *args], cwd=folder, text=True,
                            env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)


def run(folder, script, *args):
    """Run a script to its end; what it printed."""
    child = start(folder, script, *args)
    out, _ = child.communicate()
    assert child.returncode == 0, f"{script} {args} ended with {child.returncode}:\n{out}"
    return out


def make_inputs(folder):
    """A tokenizer, a data set for each task and a model to start from, all made up of ten words."""
    rng = random.Random(0)

    def text(n=12):
        return ' '.join(rng.choices(WORDS, k=n))
    chats = [dict(instruction=text(), output=text(4)) for _ in range(120)]
    pairs = [dict(instruction=text(), chosen=text(4), rejected='never ' + text(3)) for _ in range(120)]
    files = {'text.txt': '\n'.join(text() for _ in range(400)),
             'chats.jsonl': '\n'.join(map(json.dumps, chats)),
             'pairs.jsonl': '\n'.join(map(json.dumps, pairs)),
             'mail.csv': 'label,text\n' + '\n'.join(f"{label},{label} {text()}" for label in 'ab' * 40)}
    for name, content in files.items():
        (folder / name).write_text(content)
    run(folder, 'train_tokenizer.py', '--input=text.txt', '--out_dir=words', '--vocab_size=300')
    for name in files:
        run(folder, 'prepare.py', f'--input={name}', f"--dataset=./{name.split('.')[0]}", '--tokenizer=words')
    run(folder, 'pretrain.py', *STAGES['pretrain'], '--max_iters=5', '--out_dir=base')


def state(folder):
    return torch.load(folder / 'ckpt.pt', weights_only=True)


def equal(left, right):
    """Whether two checkpoints hold the same, but for the settings that name their folders."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        keys = [key for key in left if key != 'settings']
        return left.keys() == right.keys() and all(equal(left[key], right[key]) for key in keys)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(equal, left, right))
    return left == right


def kill(folder, stage, rng):
    """One run that is killed and resumed. Returns (step printed last, step found, whether it ended equal)."""
    args, after = [*STAGES[stage], *LOOP, '--out_dir=cut'], rng.randrange(2, 45)
    child, printed, lines = start(folder, f'{stage}.py', *args), 0, 0
    for line in child.stdout:
        if re.match(r'step .*(val|held-out) loss', line):       # of a step whose save has begun
            printed = max(printed, int(line.split()[1].replace(',', '')) - 1)
        lines += line.startswith('step')
        if lines == after:
            time.sleep(rng.random() * 0.03)
            child.kill()
            break
    child.communicate()
    if not (folder / 'cut' / 'ckpt.pt').exists() and printed < 1:
        return printed, 0, True                                 # there was no save yet, so nothing is lost
    found = state(folder / 'cut')['step']
    if found < 25:
        run(folder, f'{stage}.py', '--out_dir=cut', '--init_from=resume')
    return printed, found, equal(state(folder / 'cut'), state(folder / 'whole'))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--kills', type=int, default=5, help='in each stage')
    parser.add_argument('--stage', choices=STAGES, help='only this one')
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    rng, good, all_kills = random.Random(options.seed), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make_inputs(folder)
        for stage in [options.stage] if options.stage else STAGES:
            run(folder, f'{stage}.py', *STAGES[stage], *LOOP, '--out_dir=whole')
            for _ in range(options.kills):
                printed, found, same = kill(folder, stage, rng)
                fine = found >= printed and same
                good, all_kills = good + fine, all_kills + 1
                print(f"{stage:13} killed behind step {printed:2}, resumed from {found:2}: "
                      f"{'the same bit for bit' if same else 'ANOTHER END'}", flush=True)
                shutil.rmtree(folder / 'cut', ignore_errors=True)
            shutil.rmtree(folder / 'whole')
    print(f"{good} of {all_kills} resumed and ended as if nothing had happened")
    sys.exit(good != all_kills)


if __name__ == '__main__':
    main()
