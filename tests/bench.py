"""How fast this project is, beside the projects it is compared with and beside what the machine can do.

    python tests/bench.py                                   # all rows, about ten minutes on two cores
    python tests/bench.py train decode --nanogpt=../nanoGPT --minimind=../minimind
    python tests/bench.py gpu --nanogpt=../nanoGPT          # a GPU's sizes, compiled

A peer takes part where its folder is given, or where it is installed (transformers). What is compared takes
turns in one process, so that it meets the same machine; the first turn warms up and is not counted. A line is

    what is measured   this project: least, or best (median)   the peer: the same   ratio   share of the limit

The limit is measured in the same run: for training a product of large matrices in the same dtype; for
decoding the sum of a large block, as each token reads all weights. Weights are random, files temporary.
BENCH.md holds results with their hardware, and what was tried and did not pay.
"""
import argparse
import copy
import functools
import importlib.util
import itertools
import json
import os
import pickle
import platform
import re
import runpy
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tokenizers
import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402  (the line above makes it importable)
from configurator import has_compiler, start_run  # noqa: E402
from dpo import answer_log_probs, batch_at, dpo_loss  # noqa: E402
from prepare import read_pieces, read_split, write_data  # noqa: E402
from pretrain import (flops_per_token, make_optimizers, new_model, target_positions,  # noqa: E402
                      to_device)
from sft import Rows, learnable  # noqa: E402
from train_tokenizer import Tokenizer, train_bpe  # noqa: E402

PEERS = dict(nanogpt='', minimind='')       # their folders, where given
PYDOC = runpy.run_path(ROOT / 'data' / 'pydoc.py')                          # text that is at hand everywhere
GPT = dict(kind='gpt2', n_layer=6, n_head=6, n_embd=384, bias=False)
GPT2_SMALL = dict(GPT, n_layer=12, n_head=12, n_embd=768)                           # 124 million parameters
MINIMIND = dict(kind='minimind', n_layer=8, n_head=8, n_kv_head=2, n_embd=512)      # 26 million parameters
MIXTURE = dict(MINIMIND, use_moe=True, num_experts=4, num_experts_per_tok=2)


# ---- seconds -> lines ----

def now():
    """Seconds, when all that a GPU was given is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def pairs(rounds, calls):
    """{name: [seconds, ...]} of calls, {name: function}, that take turns."""
    times = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            began = now()
            call()
            if turn:
                times[name].append(now() - began)
    return times


def show(what, ours, peer=(), name='', amount=0, unit='ms', limit=0):
    """Print one line. ours, peer: seconds; what is shown is milliseconds, or the amount per second. limit:
    the least seconds that the machine would take."""
    def text(times):
        least, median = (amount / t if amount else 1000 * t for t in (min(times), statistics.median(times)))
        return f"{least:,.0f} ({median:,.0f}) {unit}"
    beside = f"{name} {text(peer)}" if peer else ''
    ratio = f"{min(peer) / min(ours):.2f} x" if peer else ''
    print(f"{what:49} {text(ours):24} {beside:48} {ratio:8}" + (f"{limit / min(ours):.0%}" if limit else ''),
          flush=True)


def matmul_rate(dtype, device='cpu'):
    """Floating-point operations per second of the product of two (n, n) matrices."""
    n = 2048 if device == 'cpu' else 8192
    a = torch.randn(n, n, device=device).to(dtype)
    return 2 * n ** 3 / min(pairs(5, dict(product=lambda: a @ a))['product'])


def read_rate(device='cpu', numbers=1 << 26):
    """Bytes per second that are read while many numbers are added up."""
    a = torch.ones(numbers, device=device)
    return a.nbytes / min(pairs(5, dict(sum=a.sum))['sum'])


# ---- models, and a step of training ----

def our_model(kind, vocab_size, block_size=1024, **sizes):
    """A model of this project with random weights. sizes: settings of pretrain.py."""
    settings = dict(model=kind, block_size=block_size, qk_norm=True, moe_intermediate_size=0)
    return new_model({**settings, **sizes}, vocab_size)


def peer_model(folder, ours):
    """nanoGPT's or MiniMind's own model, of the same shape."""
    def take(config_class, names, **more):
        return config_class(**{name: getattr(ours.config, name) for name in names.split()}, **more)
    gpt2 = ours.config.model_type == 'gpt2'
    spec = importlib.util.spec_from_file_location(
        'peer', os.path.join(folder, 'model.py' if gpt2 else 'model/model_minimind.py'))
    sys.modules['peer'] = peer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(peer)
    if gpt2:
        with redirect_stdout(sys.stderr):                                   # it counts its parameters
            return peer.GPT(take(peer.GPTConfig, 'vocab_size n_layer n_head n_embd bias', dropout=0.0,
                                 block_size=ours.config.context))
    return peer.MiniMindForCausalLM(take(
        peer.MiniMindConfig, 'vocab_size hidden_size num_hidden_layers num_attention_heads '
        'num_key_value_heads intermediate_size use_moe num_experts num_experts_per_tok '
        'moe_intermediate_size'))


class Step:
    """A step of training, to be called. spent: the seconds of its optimizers in each."""

    def __init__(self, model, loss, optimizers, dtype='float32'):
        """loss: a function of nothing, under autocast in that dtype. On a GPU the model is compiled."""
        self.model, self.loss, self.optimizers, self.spent = model, loss, optimizers, []
        device = next(model.parameters()).device.type
        self.autocast = lambda: torch.autocast(device, getattr(torch, dtype), enabled=dtype != 'float32')
        if device == 'cuda':
            model.compile()

    def __call__(self):
        with self.autocast():
            loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        began = now()
        for optimizer in self.optimizers:
            with self.autocast():
                optimizer.step()
        self.spent.append(now() - began)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)


def our_step(model, x, y, optimizer='adamw', segments=None):
    model = model.to(x.device)
    return Step(model, lambda: model(x, y, segments=segments)[1] + model.auxiliary_loss(y != -100),
                make_optimizers(model, optimizer, 1e-4, 0.1), our_dtype(x.device.type))


def peer_step(model, x, y, dtype='float32'):
    model = model.to(x.device)
    if hasattr(model, 'configure_optimizers'):                              # nanoGPT's
        with redirect_stdout(sys.stderr):
            optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), x.device.type)
        return Step(model, lambda: model(x, y)[1], [optimizer], dtype)

    def loss():
        found = model(x, labels=x)                                          # MiniMind's shifts them itself
        return found.loss + found.aux_loss
    return Step(model, loss, [torch.optim.AdamW(model.parameters(), lr=1e-4)], dtype)


def our_dtype(device='cpu'):
    """What --dtype=auto is on this machine."""
    return str(start_run(device).dtype).removeprefix('torch.')


# ---- the rows ----

def compare_steps(what, folder, rows, length, rounds, vocab_size, device, **sizes):
    """A line per optimizer of ours and per dtype of the peer: float32, as its scripts run on a CPU, and
    bfloat16 by autocast, which they do not offer there."""
    x, y = torch.randint(vocab_size, (2, rows, length), device=device)
    dtypes = ('float32', 'bfloat16') if device == 'cpu' else ('bfloat16',)
    models = [our_model(vocab_size=vocab_size, block_size=length, **sizes) for _ in range(2)]
    steps = {name: our_step(model, x, y, name) for name, model in zip(('adamw', 'muon'), models)}
    if folder:
        steps.update({dtype: peer_step(peer_model(folder, models[0]), x, y, dtype)
                      for dtype in dtypes})
    times = pairs(rounds, steps)
    rate = matmul_rate(getattr(torch, our_dtype(device)), device)
    limit = flops_per_token(models[0], length) * rows * length / rate
    for name in ('adamw', 'muon'):
        share = min(steps[name].spent) / min(times[name])
        for peer in dtypes if folder else ('',):
            show(f"{what}, {name} ({share:.0%} of it)", times[name], times.get(peer, ()),
                 f"{os.path.basename(folder)} {peer}", limit=limit)


def train(rows=(12, 4), length=(256, 512), rounds=3, gpt=GPT, mini=MINIMIND, device='cpu'):
    """Milliseconds of a step, and what part of it the optimizer is."""
    for vocab_size in (50304, 6400):
        what = "GPT {n_layer} x {n_embd}, vocabulary".format(**gpt)
        compare_steps(f"{what} {vocab_size}", PEERS['nanogpt'], rows[0], length[0], rounds, vocab_size,
                      device, **gpt)
    what = "MiniMind {n_layer} x {n_embd}".format(**mini)
    compare_steps(what, PEERS['minimind'], rows[1], length[1], rounds, 6400, device, **mini)


def moe(rows=4, length=512, rounds=3, dense=MINIMIND, mixture=MIXTURE, device='cpu'):
    """A mixture beside a dense model of the same active size, and beside MiniMind's mixture."""
    x, y = torch.randint(6400, (2, rows, length), device=device)
    ours, plain = (our_model(vocab_size=6400, block_size=length, **sizes) for sizes in (mixture, dense))
    steps = dict(ours=our_step(ours, x, y), dense=our_step(plain, x, y))
    if minimind := PEERS['minimind']:
        steps.update({f'minimind {dtype}': peer_step(peer_model(minimind, ours), x, y, dtype)
                      for dtype in ('float32', 'bfloat16')})
    times = pairs(rounds, steps)
    for peer in list(times)[1:]:
        show("mixture of 4 experts, 2 a token", times['ours'], times[peer], peer)


def memory(rows=8, length=1024, vocab_size=50304, gpt=GPT2_SMALL):
    """The most memory that a process holds which takes two steps: the optimizer's too, therefore."""
    peaks = {}
    for name, folder in dict(ours='', nanogpt=PEERS['nanogpt']).items():
        if folder or name == 'ours':
            with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
                peaks[name] = pool.submit(peak_of, folder, rows, length, vocab_size, gpt).result()
    line = f"GPT {gpt['n_layer']} x {gpt['n_embd']}, {rows} rows x {length}"
    beside = f"   {peaks['ours'] / peaks['nanogpt']:.2f} of nanogpt's" if len(peaks) > 1 else ''
    print(f"{line:49} {', '.join(f'{name} {peak:.2f} GiB' for name, peak in peaks.items())}{beside}",
          flush=True)


def peak_of(folder, rows, length, vocab_size, gpt):
    """GiB that this process has held at most, after two steps: a short one, for the optimizer's state."""
    import resource
    x, y = torch.randint(vocab_size, (2, rows, length))
    model = our_model(vocab_size=vocab_size, block_size=length, **gpt)
    if folder:
        model = peer_model(folder, model)
    for n in (1, length):
        (peer_step if folder else our_step)(model, x[:, :n], y[:, :n])()
    unit = 1 if sys.platform == 'darwin' else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def decode(prompt=1000, new=64, rounds=3, mini=MINIMIND, device='cpu'):
    """Tokens per second of one stream and of 16 rows, and the first token after a long prompt."""
    model, peers = our_model(vocab_size=6400, block_size=prompt + new, **mini).eval(), {}
    if importlib.util.find_spec('transformers'):
        from transformers import AutoModelForCausalLM
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            peers['transformers'] = AutoModelForCausalLM.from_pretrained(folder)
    if minimind := PEERS['minimind']:
        peers['minimind'] = peer_model(minimind, model)
    size = sum(p.numel() for p in model.parameters())
    for kind, width in dict(float32=4, bfloat16=2, int8=1).items():
        if kind == 'int8' and device != 'cpu':
            continue
        dtype = getattr(torch, kind) if kind != 'int8' else torch.bfloat16      # which the peers take
        ours = {words: sample.for_decoding(copy.deepcopy(model).to(device), dtype, kind == 'int8')
                for words in ['', *[', compiled'] * has_compiler()]}
        torch.compiler.reset()                  # or graphs of other dtypes count, and there may be eight
        if ', compiled' in ours:
            sample.compile_blocks(ours[', compiled'])
        for rows, length, n in ((1, 16, new), (16, 16, new), (1, prompt, 1)):
            x = torch.randint(3, 6400, (rows, length), device=device)
            calls = {words: lambda own=own, x=x, n=n: list(sample.generate(own, x, n, temperature=0))
                     for words, own in ours.items()}
            for name, peer in peers.items():
                how = dict(eos_token_id=None) if name == 'minimind' else dict(min_new_tokens=n)
                calls[name] = functools.partial(
                    peer.to(device, dtype).eval().generate, x, attention_mask=torch.ones_like(x),
                    max_new_tokens=n, do_sample=False, **how)
            times = pairs(rounds, calls)
            what = f"{kind}, {rows} rows" if n > 1 else f"{kind}, first token after {length:,}"
            limit = (2 * size * length / matmul_rate(dtype, device) if n == 1 else
                     n * size * width / read_rate(device))
            amount = dict(amount=rows * n, unit='tokens/s') if n > 1 else {}
            for words, name in itertools.product(ours, list(peers) or ['-']):
                show(what + words, times[words], times.get(name, ()), f"{name} {str(dtype)[6:]}", limit=limit,
                     **amount)


GPU = dict(train=dict(rows=(16, 64), length=(1024, 512), rounds=10, gpt=GPT2_SMALL),
           moe=dict(rows=64, rounds=10), sft=dict(rows=64, rounds=10), decode=dict(rounds=5))


def gpu(device='cuda', rows=GPU):
    """Steps of GPT-2 124M and MiniMind, of a mixture, packed rows, and decoding, on one GPU."""
    for name, sizes in rows.items():
        ROWS[name](**sizes, device=device)


def loss(steps=500, characters=1_100_000, nanogpt_steps=2000):
    """Seconds of training until the held-out loss that nanoGPT has at the end of its run, on characters. The
    seconds of evaluations are left out."""
    shape = ['--n_layer=4', '--n_head=4', '--n_embd=128', '--block_size=64', '--batch_size=12']
    with tempfile.TemporaryDirectory() as folder:
        write_characters(folder, characters)
        script('prepare.py', f'--input={folder}', f'--dataset={folder}/prepared')
        script('pretrain.py', *shape, f'--dataset={folder}/prepared', f'--out_dir={folder}/run',
               f'--max_iters={steps}', '--eval_interval=50')
        with open(f'{folder}/run/metrics.jsonl') as f:
            lines = [json.loads(line) for line in f]
        logged = [line for line in lines if 'tokens' in line]
        seconds = sum((b['tokens'] - a['tokens']) / b['tokens_per_second']
                      for a, b in itertools.pairwise([dict(tokens=0), *logged])) / steps      # of a step
        losses = {line['step']: line['val_loss'] for line in lines if 'val_loss' in line}
        at, beside = steps, ''
        if PEERS['nanogpt']:
            text = script('train.py', 'config/train_shakespeare_char.py', *shape, '--device=cpu',
                          '--compile=False', f'--dataset={folder}', f'--out_dir={folder}/nanogpt',
                          f'--max_iters={nanogpt_steps}', f'--lr_decay_iters={nanogpt_steps}',
                          f'--eval_interval={nanogpt_steps}', '--log_interval=1', '--dropout=0.0',
                          cwd=PEERS['nanogpt'])
            times = re.findall(r'^iter .* time ([\d.]+)ms', text, re.M)[1:-1]    # at both ends it evaluates
            peer, goal = sum(map(float, times)) / 1000, float(re.findall(r'val loss ([\d.]+)', text)[-1])
            at = next((step for step, value in losses.items() if value <= goal), steps)
            ratio = f"{peer / (at * seconds):.2f} x" if losses[at] <= goal else "not reached"
            beside = f"   nanogpt {peer:.1f} s, {goal:.4f}   {ratio}"
        line = "held-out loss, 4 x 128, characters"
        print(f"{line:49} {at * seconds:.1f} s, {losses[at]:.4f}, step {at:,}{beside}", flush=True)


def script(name, *arguments, cwd=ROOT):
    """What a script prints."""
    done = subprocess.run([sys.executable, os.path.join(cwd, name), *arguments], cwd=cwd, capture_output=True,
                          text=True)
    if done.returncode:
        sys.exit(f"{name} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def write_characters(folder, count):
    """The standard library's docstrings as nanoGPT keeps characters: input.txt, its bins, and meta.pkl."""
    docs = PYDOC['docstrings'](sysconfig.get_path('stdlib'))
    text = ''.join(f"{title}\n{doc}\n\n" for title, doc in docs if doc.isascii())[:count]
    Path(folder, 'input.txt').write_text(text)
    stoi = {character: i for i, character in enumerate(sorted(set(text)))}
    ids = np.array([stoi[character] for character in text], dtype=np.uint16)
    cut = len(ids) * 9 // 10
    ids[:cut].tofile(f'{folder}/train.bin')
    ids[cut:].tofile(f'{folder}/val.bin')
    with open(f'{folder}/meta.pkl', 'wb') as f:
        pickle.dump(dict(vocab_size=len(stoi), stoi=stoi, itos={i: c for c, i in stoi.items()}), f)


def prepared(folder, kind):
    """The training split of a set of data/pydoc.py, with a tokenizer of its own."""
    docs = list(PYDOC['docstrings'](sysconfig.get_path('stdlib')))
    make = dict(pydoc=PYDOC['texts'], pydoc_sft=PYDOC['conversations'], pydoc_dpo=PYDOC['pairs'])
    with open(file := f'{folder}/{kind}.jsonl', 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(record) + '\n' for record in make[kind](docs))
    tokenizer = Tokenizer(train_bpe((record['text'] for record in PYDOC['texts'](docs)), 6400))
    tokenizer.save(f'{folder}/tokenizer')
    task = kind[6:] or 'pretrain'
    write_data(f'{folder}/data', tokenizer, read_pieces(file, task), file, task)
    return read_split(f'{folder}/data', 'train')


def sft(rows=4, length=512, rounds=3, mini=MINIMIND, device='cpu'):
    """Tokens of conversations per second, padding not counted."""
    with tempfile.TemporaryDirectory() as folder:
        split = prepared(folder, 'pydoc_sft')
        docs, steps, tokens = learnable(split, length)[0], {}, {}
        for layout in ('packed', 'padded'):
            its = Rows(split, docs, length, layout)
            tokens[layout] = its.tokens([docs]) / len(its.rows) * rows              # of a step, on average
            x, y, segments = to_device(its.batch(its.read(0, rows)), torch.device(device))
            steps[layout] = our_step(our_model(vocab_size=6400, block_size=length, **mini), x, y, 'muon',
                                     segments=segments)
        times = {name: [t / tokens[name] for t in found] for name, found in pairs(rounds, steps).items()}
    show(f"SFT, {rows} rows x {length}, packed", times['packed'], times['padded'], 'padded', 1, 'tokens/s')


def dpo(count=8, length=256, rounds=3, mini=MINIMIND):
    """A step with what the reference says known beforehand, beside one that asks it, and beside MiniMind's,
    which asks it for the logits of all tokens."""
    with tempfile.TemporaryDirectory() as folder:
        x, y = batch_at(prepared(folder, 'pydoc_dpo'), range(count), length)
    at = target_positions(y)

    def all_log_probs(model):                                               # MiniMind's
        log_probs = F.log_softmax(model(x).logits, dim=-1).gather(2, y.clamp(min=0)[..., None])[..., 0]
        return (log_probs * (y != -100)).sum(1)

    def make(model, reference, log_probs, optimizers, dtype):
        known = torch.zeros(2 * count)

        def loss():
            policy, ref = log_probs(model), known
            if reference:
                with torch.no_grad():
                    ref = log_probs(reference)
            return dpo_loss(policy[0::2], policy[1::2], ref[0::2], ref[1::2], 0.1)[0].mean()
        return Step(model, loss, optimizers, dtype)

    models = [our_model(vocab_size=6400, block_size=length, **mini) for _ in range(3)]
    steps = {name: make(model, reference, lambda model: answer_log_probs(model, x, y, at),
                        make_optimizers(model, 'adamw', 1e-4, 0.0), our_dtype())
             for name, model, reference in (('ours', models[0], None), ('two models', models[1], models[2]))}
    if minimind := PEERS['minimind']:
        policy, reference = (peer_model(minimind, models[0]) for _ in range(2))
        steps['minimind float32'] = make(policy, reference, all_log_probs,
                                         [torch.optim.AdamW(policy.parameters(), lr=1e-4)], 'float32')
    times = pairs(rounds, steps)
    for name in list(times)[1:]:
        show(f"DPO, {count} pairs x {x.size(1)}", times['ours'], times[name], name)


def prepare(size=20_000_000, rounds=3):
    """Megabytes of Python source per second: the command, beside the library's bare encode_batch."""
    with tempfile.TemporaryDirectory() as folder:
        prepared(folder, 'pydoc')
        texts, left = [], size
        for file in sorted(Path(sysconfig.get_path('stdlib')).rglob('*.py')):
            if left and 'site-packages' not in file.parts:
                texts.append(file.read_text(encoding='utf-8', errors='ignore')[:left])
                left -= len(texts[-1])
        with open(f'{folder}/source.jsonl', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(dict(text=text)) + '\n' for text in texts if text.strip())
        tokenizer = tokenizers.Tokenizer.from_file(f'{folder}/tokenizer/tokenizer.json')
        times = pairs(rounds, dict(
            ours=lambda: script('prepare.py', f'--input={folder}/source.jsonl', f'--dataset={folder}/source',
                                f'--tokenizer={folder}/tokenizer'),
            peer=lambda: tokenizer.encode_batch(texts)))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    show(f"prepare.py, {megabytes:.0f} MB, start-up included", *times.values(), 'encode_batch', megabytes,
         'MB/s')


def start(rounds=5):
    """Milliseconds until --help is there and until modules are imported, beside `import torch`."""
    commands = {'pretrain.py --help': ['pretrain.py', '--help'], 'import pretrain': ['-c', 'import pretrain'],
                'import sample': ['-c', 'import sample'], 'import torch': ['-c', 'import torch']}
    times = pairs(rounds, {name: lambda command=command: subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        for name, command in commands.items()})
    for name in list(times)[:-1]:
        show(name, times[name], times['import torch'], 'import torch')


ROWS = dict(train=train, moe=moe, memory=memory, decode=decode, loss=loss, sft=sft, dpo=dpo, prepare=prepare,
            start=start, gpu=gpu)


def main():
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument('rows', nargs='*')
    for name in PEERS:
        parser.add_argument(f'--{name}', default='')
    options = parser.parse_args()
    if unknown := set(options.rows) - set(ROWS):
        parser.exit(2, f"bench.py: no row {min(unknown)!r}; there are {', '.join(ROWS)}\n")
    for name, file in dict(nanogpt='train.py', minimind='model/model_minimind.py').items():
        PEERS[name] = folder = getattr(options, name) and os.path.abspath(getattr(options, name))
        if folder and not os.path.isfile(os.path.join(folder, file)):
            parser.exit(2, f"bench.py: --{name}={folder} holds no {file}\n")
    if 'gpu' in options.rows and not torch.cuda.is_available():
        parser.exit(2, "bench.py: torch sees no GPU for the row gpu: leave it out\n")
    if len(options.rows) == 1:
        return ROWS[options.rows[0]]()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {our_dtype()}",
          flush=True)
    there = [row for row in ROWS if row != 'gpu' or torch.cuda.is_available()]
    for row in options.rows or there:                   # each in a process of its own, with memory of its own
        print(f"\n{row}: {ROWS[row].__doc__}", flush=True)
        subprocess.run([sys.executable, __file__, row, *(f'--{name}={PEERS[name]}' for name in PEERS)],
                       check=True)


if __name__ == '__main__':
    main()
