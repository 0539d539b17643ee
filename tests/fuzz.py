"""
Malformed inputs for all that the project reads: good files with random faults, read in this process.

    python tests/fuzz.py --n=2500 --seed=0
    python tests/fuzz.py --only=checkpoint --number=17      # that one again, with its traceback

An input is refused, with one line on stderr, exit code 2 and nothing left behind, or it is read, where its
fault does no harm. All else is a fault of the project: a traceback, a hang, another code, a second line.
"""
import argparse
import atexit
import contextlib
import copy
import functools
import gzip
import io
import json
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from conftest import ROOT, TEXT

import configurator
import finetune_cls
import lora
import model_minimind
import pretrain
import sft
from configurator import IDLE, LOOP, NAMES, Run, configure, fingerprint, save_checkpoint
from model_gpt2 import GPT2, GPT2Config
from model_minimind import MiniMind, MiniMindConfig
from prepare import Piece, open_data, write_data
from sample import load_run
from train_tokenizer import Tokenizer, encode_chat, load_tokenizer, train_bpe

RUN = Run(torch.device('cpu'), torch.float32, 0, 1)
SECONDS = 20            # more is a hang
ODD = [None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**70, 10**400, 0.5, -1.5, 1e300, float('nan'),
       float('inf'), '', 'x', 'é\n灯', '\0', '1', 'nan', [], {}, [1], ['a', 'b'], [[0.5]], {'a': 1}]
PARTS = ['</w>', '##', {'type': 'Lowercase'}, {'type': 'FixedLength', 'length': 0},
         {'type': 'Precompiled', 'precompiled_charsmap': 'AAAA'},
         {'type': 'Replace', 'pattern': {'Regex': 'a'}, 'content': ''}]         # of a tokenizer


# ---- faults ----

def places(value, path=()):
    """The path of each part of nested dicts and lists."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


def spoil(rng, value, odd=ODD):
    """A copy of nested dicts and lists in which some part is odd, missing, or one too many."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2])):
        paths = list(places(value))
        if not paths or rng.random() < 0.03:
            return rng.choice(odd)
        # first how deep, then where, or a long list would get all the faults
        depth = rng.choice(sorted({len(path) for path in paths}))
        *above, key = rng.choice([path for path in paths if len(path) == depth])
        part = functools.reduce(lambda part, key: part[key], above, value)
        if rng.random() < 0.15:
            del part[key]
        elif rng.random() < 0.1 and isinstance(part, dict):
            part['odd'] = rng.choice(odd)
        else:
            part[key] = spoil_tensor(rng, part[key]) if torch.is_tensor(part[key]) else rng.choice(odd)
    return value


def spoil_tensor(rng, tensor):
    if tensor.layout != torch.strided:
        return 'x'
    return rng.choice([
        lambda: tensor[..., :-1].clone(), lambda: tensor[None].clone(), lambda: tensor.double() * 1e300,
        lambda: tensor.int(), lambda: tensor.to(torch.complex64), lambda: tensor * float('nan'),
        lambda: tensor.to_sparse(), lambda: torch.empty(0), lambda: tensor.half(), lambda: 'x'])()


def spoil_bytes(rng, raw):
    """Bytes cut, turned, doubled or replaced."""
    at, raw = rng.randrange(len(raw) + 1), bytearray(raw)
    kind = rng.choice(['flip', 'flip', 'cut', 'insert', 'delete', 'empty', 'noise', 'append'])
    if kind == 'flip' and at < len(raw):
        raw[at] ^= 1 << rng.randrange(8)
    elif kind == 'cut':
        del raw[at:]
    elif kind == 'insert':
        raw[at:at] = rng.choice([b'\xff', b'\0', b'"', b'{', b'\n', b'\xef\xbb\xbf', rng.randbytes(9)])
    elif kind == 'delete':
        del raw[at:at + rng.choice([1, 7, 500])]
    elif kind in ('empty', 'noise'):
        raw[:] = rng.randbytes(200 * (kind == 'noise'))
    else:
        raw += rng.choice([b'\0' * 64, bytes(raw)])
    return bytes(raw)


def spoil_file(rng, path, odd=ODD):
    path.write_bytes(spoil_bytes(rng, path.read_bytes()))


def spoil_json(rng, path, odd=ODD):
    path.write_text(json.dumps(spoil(rng, json.loads(path.read_text(encoding='utf-8')), odd)))


# ---- good inputs, made once ----

class Good:
    """A folder of good inputs, to be copied and spoilt."""

    def __init__(self, folder):
        self.folder, self.tokenizer = Path(folder), Tokenizer(train_bpe([TEXT] * 5, 350))
        self.tokenizer.save(self.folder / 'tokenizer')
        self.tokenizer = load_tokenizer(self.folder / 'tokenizer')
        chat = dict(role='user', content='Who?'), dict(role='assistant', content='A keeper.')
        other = dict(role='assistant', content='The sea.')
        contents = dict(pretrain=TEXT, cls=TEXT[:40], sft=(chat,), dpo=(chat, other))
        for task, content in contents.items():
            pieces = [Piece(split, content, label=label) for split in ('train', 'val', 'test')
                      for label in ('abab' if task == 'cls' else ['', ''])]
            write_data(self.folder / task, self.tokenizer, pieces, task, task)
        torch.manual_seed(0)
        small = dict(vocab_size=350, hidden_size=16, num_attention_heads=2, num_key_value_heads=1,
                     num_hidden_layers=2, max_position_embeddings=64)
        moe = dict(qk_norm=True, use_moe=True, moe_intermediate_size=8)
        models = dict(llama=MiniMind(MiniMindConfig(**small)),
                      qwen3_moe=MiniMind(MiniMindConfig(**small, **moe)),
                      gpt2=GPT2(GPT2Config(vocab_size=350, n_positions=64, n_embd=16, n_head=2, n_layer=2)))
        for name, model in models.items():
            model.save_pretrained(self.folder / name)
            self.tokenizer.save(self.folder / name)
            self.save(f'run_{name}', model.config, model=model.state_dict())
        self.base = models['llama']
        self.fingerprint = fingerprint(self.base.state_dict())
        plain = lora.inject(copy.deepcopy(self.base), rank=2, alpha=4.0)
        lora.write_peft(plain, self.folder / 'peft', 'base', 'minimind')
        self.save('run_lora', self.base.config, adapters=lora.adapter_state(plain), base='../run_llama',
                  base_fingerprint=self.fingerprint,
                  lora=dict(rank=2, alpha=4.0, dropout=0.0, targets='all'))
        head = finetune_cls.add_head(copy.deepcopy(self.base), 2)
        self.save('run_cls', head.config, model=head.state_dict(), last=head.state_dict(), labels=['a', 'b'],
                  best=dict(accuracy=0.5, loss=1.0, step=1))
        code, _ = run_script(
            'pretrain.py', f'--out_dir={self.folder}/run', f'--dataset={self.folder}/pretrain', '--n_layer=1',
            '--n_head=2', '--n_kv_head=1', '--n_embd=16', '--block_size=16', '--batch_size=2', '--device=cpu',
            '--dtype=float32', '--eval_iters=1', '--eval_interval=1000', '--warmup_iters=0', '--max_iters=2')
        assert code == 0

    def save(self, name, config, **state):
        (self.folder / name).mkdir()
        save_checkpoint(RUN, self.folder / name, self.tokenizer, config, step=1,
                        settings=dict(block_size=32), **state)


def run_script(name, *args):
    """(exit code, stdout) of a script, run in this process as a user runs it."""
    before, sys.argv, out = sys.argv, [name, *map(str, args)], io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(str(ROOT / name), run_name='__main__')
        return 0, out.getvalue()
    except SystemExit as end:
        return end.code or 0, out.getvalue()
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)


def logits(model):
    return model(torch.zeros(1, min(5, model.config.context), dtype=torch.long))[0]


# ---- what is read: of each kind a function that spoils a copy in the folder `here`, and reads it ----

def read_data(rng, good, here):
    task = rng.choice(['pretrain', 'sft', 'dpo', 'cls'])
    folder = here / 'data'
    shutil.copytree(good.folder / task, folder)
    if rng.random() < 0.4:
        rng.choice([spoil_json, spoil_json, spoil_file])(rng, folder / 'meta.json')
    else:
        path = rng.choice(sorted(folder.glob('*.npy')))
        if rng.random() < 0.3:
            spoil_file(rng, path)
        else:
            array = np.load(path)
            at, number = rng.randrange(len(array)), rng.choice([0, 1, 2, 349, 350, 65535, -1, 2**31, 2**62])
            changed = array.astype(np.int64)
            changed[at] = number
            np.save(path, rng.choice([
                lambda: changed.astype(array.dtype), lambda: changed.astype(array.dtype), lambda: array[:at],
                lambda: array[None], lambda: np.append(array, array), lambda: np.roll(array, at),
                lambda: array[::-1], lambda: np.array(['x'] * len(array), dtype=object),
                lambda: array.astype(rng.choice(['f4', 'i2', 'u8', '>u2', 'U3', 'c8', '?']))])())
    meta, train, val, *test = open_data(RUN, str(folder), task, good.tokenizer)
    for split in (train, val, *test):
        if task == 'cls':
            _, labels, _ = finetune_cls.batch_at(split, range(len(split.labels)), 16)
            assert labels.min() >= 0 and labels.max() < len(meta['labels'])
        x, y = pretrain.batch_at(split, range(0, len(split.tokens), 16), 16)
        assert good.base(x, y)[1].isfinite()
    if task == 'sft':
        config = dict(dataset='d', block_size=32, layout='packed', seed=0, batch_size=2)
        rows, *_ = sft.open_rows(RUN, dict(config, gradient_accumulation_steps=1), train, val)
        rows.batch(rows.read(0, 2))
        sft.last_answers(val, range(len(val.offsets) - 1))


def read_checkpoint(rng, good, here):
    name = rng.choice(['run_llama', 'run_gpt2', 'run_qwen3_moe', 'run_lora', 'run_cls'])
    for part in {name, 'run_llama'}:
        shutil.copytree(good.folder / part, here / part)
    path, bytewise = here / name / 'ckpt.pt', rng.random() < 0.3
    if bytewise:
        spoil_file(rng, path)
    else:
        torch.save(spoil(rng, torch.load(path)), path)
    if name == 'run_cls':
        model = finetune_cls.load_classifier(str(here / name), weights=rng.choice(['model', 'last']))[0]
        finetune_cls.classify_texts(str(here / name), ['The keeper'], RUN)
    else:
        model = load_run(str(here / name))[0]
        assert not bytewise or name != 'run_llama' or fingerprint(model.state_dict()) == good.fingerprint
    if name == 'run_lora':
        lora.load_adapted(str(here / name), configurator.load_checkpoint(str(here / name)))
    assert logits(model).isfinite().all()


def resume(rng, good, here):
    shutil.copytree(good.folder / 'run', here / 'run')
    path, metrics = here / 'run' / 'ckpt.pt', here / 'run' / 'metrics.jsonl'
    which = rng.random()
    if which < 0.2:
        spoil_file(rng, path)
    elif which < 0.8:
        torch.save(spoil(rng, torch.load(path)), path)
    elif which < 0.9:
        spoil_file(rng, metrics)
    else:
        metrics.write_text('\n'.join(json.dumps(spoil(rng, json.loads(line))) for line in
                                     metrics.read_text().splitlines()))
    return run_script('pretrain.py', f'--out_dir={here}/run', '--init_from=resume', '--max_iters=3')[0]


def read_hugging_face(rng, good, here):
    name = rng.choice(['llama', 'gpt2', 'qwen3_moe'])
    folder = here / 'hf'
    shutil.copytree(good.folder / name, folder)
    weights, which = folder / 'model.safetensors', rng.random()
    if which < 0.5:
        spoil_json(rng, folder / 'config.json')
    elif which < 0.6:
        spoil_file(rng, folder / 'config.json')
    elif which < 0.7:
        spoil_file(rng, weights)
    elif which < 0.8:
        shutil.copy(weights, folder / 'model-2.safetensors')
    else:
        state = spoil(rng, configurator.read_weights(weights))
        weights.unlink()
        torch.save(state, folder / 'pytorch_model.bin')
    model = load_run(str(folder))[0]
    assert logits(model).isfinite().all() or 0.6 <= which < 0.7    # a bit may be an exponent


def read_bare(rng, good, here):
    """Weights alone: a .pth of MiniMind's, or of a checkpoint to resume from, and nanoGPT's ckpt.pt."""
    name, path = rng.choice(['llama', 'qwen3_moe', 'gpt2']), here / 'ckpt.pt'
    run = torch.load(good.folder / f'run_{name}' / 'ckpt.pt')
    content = model_minimind.weights_to_hf(run['model']) if name != 'gpt2' else run['model']
    if name == 'gpt2':
        sizes = {key: run['model_config'][key] for key in ('vocab_size', 'n_embd', 'n_head', 'n_layer')}
        content = dict(model=content, model_args=dict(sizes, block_size=64, bias=True), iter_num=1)
    elif rng.random() < 0.5:
        content = dict(model=content, step=1, optimizer={})
    torch.save(spoil(rng, content), path)
    bytewise = rng.random() < 0.2
    if bytewise:
        spoil_file(rng, path)
    model = load_run(str(path), given=dict(tokenizer=str(good.folder / 'tokenizer')))[0]
    assert logits(model).isfinite().all() or bytewise                   # a bit may be an exponent


def read_adapters(rng, good, here):
    from safetensors.torch import save_file
    shutil.copytree(good.folder / 'peft', here / 'peft')
    weights, which = here / 'peft' / 'adapter_model.safetensors', rng.random()
    if which < 0.5:
        spoil_json(rng, here / 'peft' / 'adapter_config.json')
    elif which < 0.65:
        spoil_file(rng, here / 'peft' / 'adapter_config.json')
    else:
        state = spoil(rng, configurator.read_weights(weights))
        state = state if isinstance(state, dict) else {}
        save_file({name: t.contiguous() for name, t in state.items() if configurator.is_dense(t)}, weights)
    model = copy.deepcopy(good.base)
    lora.read_peft(model, str(here / 'peft'))
    assert logits(model).isfinite().all()


TEMPLATES = [
    '{{ raise_exception("no") }}', '{% for m in messages %}', '{{ messages[9].content }}',
    '{{ 1 / 0 }}', '\udc80',
    '{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}',
    '{% for i in range(10 ** 9) %}x{% endfor %}',
    '{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}', "{{ 'x' * 10 ** 10 }}",
    '{{ 9 ** 9 ** 9 }}', '{{ lipsum(10 ** 9) }}', 'x' * 10**6, '{{' + '(' * 10**5, '{% if 1 %}' * 500,
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", '{% for m in messages %}{{ m.content }}{% endfor %}']


def read_tokenizer(rng, good, here):
    shutil.copytree(good.folder / 'tokenizer', here / 'tok')
    path, words = here / 'tok' / 'tokenizer.json', here / 'tok' / 'tokenizer_config.json'
    generation, template = here / 'tok' / 'generation_config.json', here / 'tok' / 'chat_template.jinja'
    generation.write_text(json.dumps(dict(bos_token_id=0, eos_token_id=[2, 0])))
    own, which = json.loads(words.read_text(encoding='utf-8'))['chat_template'], rng.random()
    if which < 0.2:
        spoil_file(rng, path)
    elif which < 0.5:
        spoil_json(rng, path, ODD + PARTS * 3)
    elif which < 0.8:
        changed = rng.choice([words, words, generation])
        rng.choice([spoil_json, spoil_json, spoil_file])(rng, changed, ODD + TEMPLATES)
    else:
        odd = rng.choice(TEMPLATES).encode('utf-8', 'surrogatepass')
        template.write_bytes(rng.choice([spoil_bytes(rng, own.encode()), odd]))
    tokenizer = load_tokenizer(str(here / 'tok'))
    if which >= 0.5:
        tokenizer.take_own_layout(aloud=False)
        encode_chat(tokenizer, [dict(role='user', content='Who?'), dict(role='assistant', content='I.')])
        tokenizer.save(here / 'again')
        assert load_tokenizer(str(here / 'again')).layout == tokenizer.layout
    ids = tokenizer.encode(TEXT)
    assert max(ids) < tokenizer.vocab_size
    assert ''.join(tokenizer.decode(ids).lower().split()) == ''.join(TEXT.lower().split())


TEXTS = [*map(repr, ODD), '9' * 400, '9' * 5000, '10**400', '1e400', '-1', 'x\udcff', 'a\0b', 'a\nb', 'True',
         '{[]: 1}', '-' * 5000 + '1', '(' * 500, '0x10', 'é']
CONFIGS = ['exit()', 'raise SystemExit', '1 / 0', 'x = = 1', 'seed = 10**5000', 'learning_rate = 10**400',
           'out_dir = "a\nb"', 'raise ValueError("two\\nlines")', 'def f(): f()\nf()', '\0', '\xff',
           'seed = None', 'out_dir = "\\ud800"', 'out_dir = b"x"']


def read_settings(rng, good, here):
    keys = [key for key, value in vars(pretrain).items()
            if key.islower() and key[0] != '_' and type(value) in (bool, int, float, str)]

    def setting():
        names = [*keys, *LOOP, *NAMES, *IDLE, 'from_resume', 'odd', '', 'lr']
        return f'{rng.choice(names)}={rng.choice(TEXTS)}'

    args = [f'--{setting()}' for _ in range(rng.choice([1, 1, 2]))]
    if rng.random() < 0.5:
        content = rng.choice([*CONFIGS, *(setting() for _ in range(9))])
        (here / 'config.py').write_bytes(content.encode(rng.choice(['utf-8', 'latin-1']), 'replace'))
        args.append(str(here / 'config.py'))
    settings, before = dict(vars(pretrain)), sys.argv
    sys.argv = ['pretrain.py', f'--out_dir={here}/out', *args]
    try:
        config = configure(settings)
    finally:
        sys.argv = before
    defaults = {**vars(pretrain), **{key: default for key, (default, _) in LOOP.items()}}
    assert all(type(config[key]) is type(defaults[key]) for key in config)
    json.dumps(config, ensure_ascii=False).encode()


RECORDS = dict(
    text=[dict(text=f'{TEXT[i:i + 60]} {i}') for i in range(30)],
    sft=[dict(conversations=[dict(role='user', content=f'Who {i}?'), dict(role='assistant', content='I.')])
         for i in range(30)],
    tools=[dict(messages=[
        dict(role='system', content='', tools='[{"name": "f"}]'), dict(role='user', content=f'Who {i}?'),
        dict(role='assistant', content=None, tool_calls=[dict(function=dict(name='f', arguments='{}'))]),
        dict(role='tool', content='x'), dict(role='assistant', content=[dict(type='text', text='I.')]),
        dict(role='user', content='bye')], tools=[dict(name='f')]) for i in range(30)],
    thoughts=[dict(conversations=[
        dict(role='user', content=f'Who {i}?'), dict(role='assistant', content='I.', reasoning_content='Hm.',
             tool_calls='[{"name": "f", "arguments": {"a": 1}}]')]) for i in range(30)],
    sharegpt=[dict(conversations=[
        {'from': 'human', 'value': f'Who {i}?'}, {'from': 'function_call', 'value': '{"name": "f"}'},
        {'from': 'observation', 'value': 'x'}, {'from': 'gpt', 'value': 'I.'}]) for i in range(30)],
    trl=[dict(prompt=f'Who {i}?', chosen='I.', rejected=[dict(role='assistant', content='it')])
         for i in range(30)],
    alpaca=[dict(instruction=f'Say {i}', input='', output='yes') for i in range(30)],
    dpo=[{side: [dict(role='user', content=f'Who {i}?'), dict(role='assistant', content=side)]
          for side in ('chosen', 'rejected')} for i in range(30)])


def read_records(rng, good, here):
    name, skip = rng.choice(['a.jsonl', 'a.jsonl', 'a.json', 'a.csv', 'a.tsv', 'a.txt']), rng.random() < 0.3
    records = RECORDS[rng.choice(sorted(RECORDS))]
    if name.endswith(('.jsonl', '.json')):
        records = spoil(rng, records) if rng.random() < 0.7 else records
        lines = map(json.dumps, records if isinstance(records, list) else [records])
        raw = ('\n'.join(lines) if name.endswith('.jsonl') else json.dumps(records)).encode()
    elif name.endswith('.txt'):
        raw = (TEXT * 3).encode()
    else:
        mark = ',' if name.endswith('.csv') else '\t'
        rows = [f'label{mark}text', *(f'{"ab"[i % 2]}{mark}"row {i}, {TEXT[i:i + 9]}"' for i in range(20))]
        raw = '\n'.join(rows).encode()
    raw = spoil_bytes(rng, raw) if rng.random() < 0.6 else raw
    if rng.random() < 0.2:
        name, raw = f'{name}.gz', gzip.compress(raw)
        raw = spoil_bytes(rng, raw) if rng.random() < 0.6 else raw
    (here / name).write_bytes(raw)
    code, _ = run_script('prepare.py', f'--input={here / name}', f'--dataset={here}/prepared',
                         f'--tokenizer={good.folder}/tokenizer', *['--on_error=skip'] * skip)
    if code == 0:
        meta = json.loads((here / 'prepared' / 'meta.json').read_text(encoding='utf-8'))
        open_data(RUN, f'{here}/prepared', meta['task'], good.tokenizer)
    return code


KINDS = dict(data=read_data, checkpoint=read_checkpoint, resume=resume, hugging_face=read_hugging_face,
             bare=read_bare, adapters=read_adapters, tokenizer=read_tokenizer, settings=read_settings,
             records=read_records)
SHARES = dict(data=4, checkpoint=4, resume=1, hugging_face=4, bare=2, adapters=2, tokenizer=3, settings=4,
              records=3)


# ---- one input, and all of them ----

@contextlib.contextmanager
def watched(errors):
    """Append to errors what Python and libraries write to stderr; end what takes too long; run what is
    registered for the end of the process."""
    def hang(number, frame):
        raise TimeoutError(f"more than {SECONDS} seconds")

    ends, register, hook = [], atexit.register, sys.excepthook
    own, text = os.dup(2), io.StringIO()
    before = signal.signal(signal.SIGALRM, hang)
    with tempfile.TemporaryFile() as low:
        os.dup2(low.fileno(), 2)
        atexit.register = lambda f, *args, **how: ends.append(functools.partial(f, *args, **how))
        signal.alarm(SECONDS)
        try:
            with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()), \
                    warnings.catch_warnings():
                warnings.simplefilter('ignore')         # a warning beside the one line is no second line
                yield
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            atexit.register, sys.excepthook = register, hook
            for end in ends:
                end()
            os.dup2(own, 2)
            os.close(own)
            low.seek(0)
            errors.append(text.getvalue() + low.read().decode(errors='replace'))


def try_one(good, kind, number, seed):
    """('read' | 'refused' | what is wrong, stderr) of one input, which is a function of its arguments."""
    rng, errors, code = random.Random(f'{kind} {number} {seed}'), [], 0
    with tempfile.TemporaryDirectory() as here:
        fault = ''
        try:
            with watched(errors):
                torch.manual_seed(0)
                code = KINDS[kind](rng, good, Path(here)) or 0
        except SystemExit as end:
            code = end.code or 0
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                raise
            fault = f"{type(e).__name__} in {traceback.extract_tb(e.__traceback__)[-1].name}"
            errors.append(traceback.format_exc())
        lines = errors[0].splitlines()
        left = [name for name in os.listdir(here) if name.startswith(('prepared', 'out'))]
    if fault:
        return fault, '\n'.join(errors)
    if code not in (0, 2) and not (kind == 'resume' and code == 1):         # 1: the run has diverged
        return f"exit code {code}", errors[0]
    if code and (len(lines) != 1 or not lines[0].split(': ')[0].endswith('.py')):
        return f"{len(lines)} lines", errors[0]
    if code and kind != 'settings' and len(lines[0]) > 1000:
        return "a line of no end", errors[0]
    if code and left:
        return f"left {left}", errors[0]
    return 'refused' if code else 'read', errors[0]


def fuzz(n, seed=0, only='', number=None):
    """Try n inputs of all kinds, or of one, or a single one. Returns a Counter of (kind, 'refused', 'read' or
    'fault') and the faults, a list of (kind, number, what is wrong, stderr)."""
    counts, faults = Counter(), []
    kinds = [only] if only else [kind for kind, share in SHARES.items() for _ in range(share)]
    draw, configurator.draw = configurator.draw, lambda path, panels=1: iter(())            # no pictures
    before, sys.argv = sys.argv, ['pretrain.py']
    try:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            good = Good(folder)
            for i in range(n) if number is None else [number]:
                kind = kinds[i % len(kinds)]
                result, errors = try_one(good, kind, i, seed)
                if result not in ('read', 'refused'):
                    faults.append((kind, i, result, errors))
                    result = 'fault'
                counts[kind, result] += 1
    finally:
        configurator.draw, sys.argv = draw, before
    return counts, faults


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument('--n', type=int, default=2500)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only', choices=KINDS, default='')
    parser.add_argument('--number', type=int)
    given, began = parser.parse_args(), time.time()
    torch.set_num_threads(1)
    counts, faults = fuzz(given.n, given.seed, given.only, given.number)
    print(f"{'kind':14}{'inputs':>8}{'refused':>9}{'read':>6}{'faults':>8}")
    for kind in KINDS:
        numbers = [counts[kind, result] for result in ('refused', 'read', 'fault')]
        print(f"{kind:14}{sum(numbers):8,}{numbers[0]:9,}{numbers[1]:6,}{numbers[2]:8,}")
    for kind, number, wrong, errors in faults[:40]:
        print(f"\n--only={kind} --number={number} --seed={given.seed}: {wrong}\n"
              f"{errors.strip()[-300 if given.number is None else -3000:]}")
    print(f"{counts.total():,} inputs in {time.time() - began:.0f} s: {len(faults)} faults")
    sys.exit(bool(faults))
