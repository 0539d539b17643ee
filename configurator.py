"""
One run, whatever its stage: settings, device and ranks, checkpoints, files of weights, metrics and pictures.

All other files import from here; this one imports nothing of ours. A stage opens with a block of bare
settings, one comment each. The first line under its main guard overrides them with what config files, then
the command line say:

    config = configure(globals(), model=one_of('minimind', 'gpt2'), stride=at_least(0))

    python pretrain.py config/small.py --batch_size=8 --prompt="def is_"

Settings may have the names that nanoGPT and MiniMind give them, and be written `--batch_size 8` too.
A path in a script or a config file that begins with out/ or data/ starts at the repository, any other at the
current folder. A mistake of the user ends in one line on stderr and exit code 2, through `fail`.
"""
import ast
import atexit
import difflib
import errno
import fnmatch
import functools
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shutil
import sys
import time
import traceback
import zipfile
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, fields

HERE = os.path.dirname(os.path.abspath(__file__))
CHECKPOINTS = ('ckpt.pt', 'ckpt_previous.pt')           # of a run: the last one, and the one before it


def fail(message, code=2):
    """End the run with one line on stderr. Exit code 2 is a mistake of the user, 1 a run that went wrong.

    Under torchrun each rank waits as many seconds as its number on the machine: of a mistake that all have,
    the first to speak is the only one, as torchrun then ends the others.
    """
    time.sleep(int(os.environ.get('LOCAL_RANK', 0)))
    rank = f" (rank {os.environ['RANK']})" if os.environ.get('RANK', '0') != '0' else ''
    line = ' '.join(message.splitlines())               # a name or a value may hold line ends
    print(f"{os.path.basename(sys.argv[0])}{rank}: {line}", file=sys.stderr, flush=True)
    if 'dist' in globals() and dist.is_initialized():   # see Run.end
        end_process(code)
    sys.exit(code)


# ---- settings ----

# A rule is a function: value -> what is wrong with it, or '' where nothing is.

def at_least(least):
    return lambda value: '' if value >= least else f"must be at least {least}"


def above(low):
    return lambda value: '' if value > low else f"must be more than {low}"


def between(low, high):
    return lambda value: '' if low <= value <= high else f"must lie between {low} and {high}"


def one_of(*values):
    def rule(value):
        near = difflib.get_close_matches(str(value), values, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        return '' if value in values else f"must be one of {', '.join(map(repr, values))}{hint}"
    return rule


# The rules of settings that several stages have. A stage tells `configure` those of its own.
RULES = dict(dtype=one_of('auto', 'float32', 'bfloat16', 'float16', 'int8'),
             optimizer=one_of('adamw', 'muon'),
             layout=one_of('packed', 'bucketed', 'padded'), dropout=between(0, 1), seed=between(0, 2**62),
             parallel=one_of('ddp', 'fsdp'),
             min_lr=lambda value: '' if value >= 0 or value == -1 else "must be at least 0, or -1")
RULES.update(dict.fromkeys(('batch_size', 'gradient_accumulation_steps', 'block_size', 'max_iters', 'n_layer',
                            'eval_interval', 'eval_iters', 'log_interval', 'max_new_tokens', 'n_head',
                            'n_kv_head', 'n_embd'), at_least(1)))
RULES.update(dict.fromkeys(('learning_rate', 'warmup_iters', 'weight_decay', 'grad_clip', 'report_size',
                            'epochs', 'context', 'lr_decay_iters'), at_least(0)))
RULES.update(dict.fromkeys(('beta1', 'beta2'), lambda beta: '' if 0 <= beta < 1 else "must lie in [0, 1)"),
             yarn_factor=at_least(1))

# Settings of the loop that each stage has and few runs need: (default, what it is). The names are nanoGPT's.
LOOP = dict(
    weights_config=('', "of a .pth to start from, what it cannot say: 'tokenizer=FOLDER,rope_theta=1e4'"),
    eval_only=(False, "measure the held-out loss where the run starts, write nothing, and stop"),
    decay_lr=(True, "False: the rate stays at learning_rate, without warmup"),
    lr_decay_iters=(0, "step at which the cosine has come down to min_lr; 0 is the last one"),
    beta1=(0.9, "AdamW's: how slowly its mean gradient moves"),
    beta2=(0.95, "AdamW's: how slowly its mean squared gradient moves"),
    parallel=('ddp', "under torchrun: 'ddp', each rank holds all, or 'fsdp': a share of weights and moments"),
    activation_checkpointing=(False, "True: keep a block's input alone and compute the rest of it twice"),
    wandb_project=('from-scratch', "with wandb_log: the name of the project"),
    wandb_run_name=('', "with wandb_log: the name of the run; '' is that of out_dir"))

# What nanoGPT and MiniMind call a setting that we have.
NAMES = dict(
    hidden_size='n_embd', num_hidden_layers='n_layer', num_attention_heads='n_head',
    num_key_value_heads='n_kv_head', max_position_embeddings='context', n_positions='context',
    student_hidden_size='n_embd', student_num_layers='n_layer', max_seq_len='block_size',
    accumulation_steps='gradient_accumulation_steps', use_compile='compile', use_wandb='wandb_log',
    save_interval='eval_interval', save_dir='out_dir', from_weight='init_from',
    from_student_weight='init_from', from_teacher_weight='teacher', data_path='dataset')
# What they have and we have not, as nothing depends on it; and what is found elsewhere.
IDLE = dict(backend="the device says which", num_workers="data is mapped into memory, and needs none")
ELSEWHERE = dict(
    load_from="a model is named by --init_from=FOLDER, or a .pth",
    save_weight="a run is a folder: --out_dir=out/NAME", lora_name="a run is a folder: --out_dir=out/NAME",
    **dict.fromkeys(('n_layer', 'n_head', 'n_kv_head', 'n_embd', 'use_moe', 'context', 'teacher_hidden_size',
                     'teacher_num_layers', 'teacher_use_moe', 'student_use_moe'), "the model brings its own"))
# Weights of others, and runs that learned as slowly, would lose what they know at the rates of a stage, which
# are meant for the small models that start here: they get AdamW, at 5e-5 or what the stage has in this table.
GENTLE = {'lora.py': 2e-4, 'dpo.py': 5e-6}

# Settings by which a stage does something else than train.
INSTEAD = ('classify', 'classify_file', 'merge_to', 'to_peft', 'from_peft', 'debug_mask')

# What a resumed run may change. With all other settings its state was made.
RESUME_MAY_CHANGE = {
    'init_from', 'out_dir', 'max_iters', 'eval_interval', 'eval_iters', 'log_interval', 'report_size',
    'max_new_tokens', 'prompt', 'wandb_log', 'tokenizer', 'batch_size', 'gradient_accumulation_steps',
    'cache_reference', 'learning_rate', 'min_lr', 'warmup_iters', 'grad_clip', 'device', 'dtype', 'compile',
    'always_save_checkpoint', 'epochs', 'eval_only', 'eval_block_size', 'decay_lr', 'lr_decay_iters',
    'wandb_project', 'wandb_run_name', 'parallel', 'activation_checkpointing', *INSTEAD}


def configure(settings, only=None, **rules):
    """Override a script's settings from config files and the command line; return them all as a dict.

    settings  globals() of the script: every lower-case name that holds a bool, int, float or str is a setting
    only      {condition: names}: these settings apply only under 'model=gpt2', 'teacher' (it is not empty) or
              '!chat' (it is)
    rules     what the script's own settings may be: at_least(0), between(0, 1), one_of('a', 'b')
    With init_from='resume' the settings of the interrupted run stand in for the defaults.
    """
    keys = open_script(settings)
    rules = {**RULES, **rules}
    given, places, base = read_arguments(settings, keys, rules)
    settings.update({key: check(settings, keys, rules, key, *place) for key, place in base.items()})
    if places.get('max_iters', '').startswith('--'):        # typed, it counts, whatever a file or a run says
        if places.get('epochs', '').startswith('--') and given['epochs']:
            fail(f"{places['max_iters']}: does not apply beside {places['epochs']}: give one of the two")
        given['epochs'] = 0.0
    for key in keys:
        settings[key] = given.get(key, anchored(settings[key]))
    for key in (*INSTEAD, 'export_dir', 'export_gguf', 'input'):
        if given.get(key) == '':                        # as of a variable of the shell that is not set
            fail(f"{places[key]}: {key} is empty: give one, or leave it out")
    trains = 'max_iters' in keys and all(given.get(key, False) is False for key in INSTEAD)
    if trains and not base:
        settings.update(gentle_rates(settings, keys, given))
    if settings.get('init_from') == 'resume' or is_restarted(settings, keys):
        resume_settings(settings, keys, rules, given, places)
    else:
        check_apply(settings, places, only or {})
        if settings.get('weights_config') and not any(
                bare_weights(settings.get(key, '')) for key in ('init_from', 'teacher')):
            fail(f"{places['weights_config']}: weights_config is for a .pth file, or nanoGPT's ckpt.pt, as "
                 f"--init_from; all else says what it is")
    idle = [key for key in ('min_lr', 'warmup_iters', 'lr_decay_iters') if key in places]
    if idle and not settings.get('decay_lr', True):
        tell(f"decay_lr=False: the rate is always {settings['learning_rate']}, {' and '.join(idle)} not used")
    if settings.get('decay_lr') and settings['min_lr'] > settings['learning_rate']:
        fail(f"min_lr={settings['min_lr']} is above learning_rate={settings['learning_rate']}: the rate "
             f"would climb; give a lower one, or --min_lr=-1 for a tenth of the rate")
    if trains:                                          # what can be refused, is before any work
        check_folder(settings['out_dir'])
        if not settings['eval_only'] and settings['init_from'] != 'resume':
            check_replaces(settings['out_dir'], os.path.basename(settings['__file__']))
    if settings.get('wandb_log') and not any(map(importlib.util.find_spec, TRACKERS)):
        fail("wandb_log=True needs a package: pip install wandb, or swanlab")
    if settings.get('compile') and not has_compiler():
        fail("compile=True needs a C++ compiler, which is not here: install g++, or leave it out")
    if settings.get('compile') and settings.get('layout') == 'bucketed':
        fail("compile=True would compile anew for each length of bucketed rows: take layout=packed")
    rows = settings.get('batch_size', 1) * settings.get('gradient_accumulation_steps', 1)
    ranks, fsdp = int(os.environ.get('WORLD_SIZE', 1)), settings.get('parallel') == 'fsdp'
    if 'batch_size' in keys and (rows < ranks or fsdp and rows % ranks):
        fail(f"batch_size x gradient_accumulation_steps = {rows} rows, but {ranks} ranks want "
             f"{'as many each, with parallel=fsdp' if fsdp else 'one each'}")
    if ranks == 1 and given.get('parallel') == 'fsdp':
        fail(f"{places['parallel']}: parallel=fsdp shares a model out over ranks, and here is one: start "
             f"several, with `torchrun --nproc_per_node=2`")
    return {key: settings[key] for key in keys}


def open_script(settings):
    """The names of a script's settings, LOOP's among them. From here on it ends with last words; --help ends
    it at once."""
    if isinstance(sys.stdout, io.TextIOWrapper):        # what a terminal's encoding lacks is shown as \u....
        sys.stdout.reconfigure(errors='backslashreplace')
    keys = [k for k, v in settings.items()
            if k.islower() and k[0] != '_' and type(v) in (bool, int, float, str)]
    if 'max_iters' in keys:
        settings.update({key: default for key, (default, _) in LOOP.items()})
        keys += LOOP
    sys.excepthook = functools.partial(last_words, keys)
    if {'-h', '--help'} & set(sys.argv[1:]):
        print_help(settings, keys)
        sys.exit(0)
    return keys


def read_arguments(settings, keys, rules):
    """What config files and the command line say: {name: value}, {name: where}, and nanogpt_defaults."""
    given, places, arguments, base = {}, {}, sys.argv[1:], {}

    def give(key, value, where):
        if key not in keys and key in IDLE:
            tell(f"{where}: {key} changes nothing here: {IDLE[key]}")
            return
        if key == 'from_weight' and given.get('init_from') == 'resume':
            return                                      # MiniMind resumes, whatever the weights
        for name, own in ({key: value} if key in keys else in_our_words(key, value, where)).items():
            given[name], places[name] = in_full(name, check(settings, keys, rules, name, own, where)), where

    while arguments:
        arg = arguments.pop(0)
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')
            if not equals and arguments and not re.search(r'^(--|$)|\.py$', arguments[0]):
                arg, equals, text = f'{arg}={arguments[0]}', '=', arguments.pop(0)      # --key value
            give(key, parse(text, settings.get(NAMES.get(key, key))) if equals else True, arg)
        else:
            found = read_config_file(arg)
            base = base or nanogpt_defaults(arg, found, keys)
            for key, (value, where) in found.items():
                give(key, anchored(value), where)
    return given, places, base


def has_compiler():
    """Whether there is a compiler for what torch.compile writes: the one that torch looks for."""
    usual = dict(win32='cl', darwin='clang++').get(sys.platform, 'g++')
    return bool(shutil.which(os.environ.get('CXX') or usual))


def tell(line, file=None):
    """Say what was read or taken, once for all ranks."""
    if os.environ.get('RANK', '0') == '0':
        print(line, file=file, flush=True)


def in_our_words(key, value, where):
    """{our name: value} of a setting in the words of nanoGPT or MiniMind; itself, if it is neither's."""
    name = NAMES.get(key, key)
    if key == 'accumulation_steps' and type(value) is int:      # MiniMind counts those of one rank
        value *= int(os.environ.get('WORLD_SIZE', 1))
    elif key == 'from_resume':
        return dict(init_from='resume') if value else {}
    elif name in ('init_from', 'teacher'):                      # it names weights by their stage
        value = dict(none='scratch', pretrain='out/pretrain', full_sft='out/sft').get(str(value), value)
    elif key == 'data_path' and not os.path.isfile(os.path.join(str(value), 'meta.json')):
        fail(f"{where}: data is prepared first: `python prepare.py --input={value} --dataset=NAME`, then "
             f"--dataset=NAME")
    return {name: anchored(value)}


def nanogpt_defaults(path, found, keys):
    """{name: (value, place)} that a config file of nanoGPT leaves open; {} if it is none, or the stage lacks
    nanoGPT's settings. It is one if it sets what only nanoGPT has, and no model or optimizer."""
    marks = [key for key in found if key in {*LOOP, 'bias', 'backend'}]
    if not marks or {'model', 'optimizer'} & found.keys() or 'bias' not in keys:
        return {}
    tell(f"{path} is nanoGPT's, as it sets {marks[0]} and no model: what it leaves open is as in "
         f"config/nanogpt.py")
    return read_config_file(os.path.join(HERE, 'config', 'nanogpt.py'))


def gentle_rates(settings, keys, given):
    """{name: value}: optimizer and learning_rate, where not given, for a start that GENTLE is meant for."""
    start, why = settings['init_from'], ''
    if not bare_weights(start) and any(os.path.isfile(os.path.join(start, name)) for name in CHECKPOINTS):
        rate = load_checkpoint(start)['settings'].get('learning_rate')
        why = f"learned at {rate}" if type(rate) is float and rate <= max(GENTLE.values()) else ''
    elif start not in ('scratch', 'resume') and (os.path.exists(start) or start.startswith('gpt2')):
        why = "is no run of ours"
    gentle = dict(optimizer='adamw', learning_rate=GENTLE.get(os.path.basename(settings['__file__']), 5e-5))
    taken = {key: value for key, value in gentle.items() if why and key in keys and key not in given}
    if taken:
        tell(f"{start} {why}: " + ', '.join(f"{key}={value}" for key, value in taken.items()))
    return taken


def check_apply(settings, places, only):
    """One line on a setting that was given, but does nothing beside the others."""
    for condition, names in only.items():
        key, equals, value = condition.removeprefix('!').partition('=')
        if equals:
            applies, words = str(settings[key]) == value, f"only with --{condition}"
        elif condition[0] == '!':
            applies, words = not settings[key], f"not with --{key}"
        else:
            applies, words = settings[key], f"only with a {key}"
        for name in names.split():
            if name in places and not applies:
                fail(f"{places[name]}: {name} applies {words}")


def is_restarted(settings, keys):
    """Whether torchrun started this run anew after a crash (--max-restarts), and out_dir holds a checkpoint
    of the same settings to go on from."""
    path = os.path.join(settings.get('out_dir', ''), 'ckpt.pt')
    if os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') == '0' or not os.path.isfile(path):
        return False
    checkpoint = load_checkpoint(settings['out_dir'])
    same = all(checkpoint['settings'].get(key) == settings[key] for key in keys if key != 'init_from')
    return same and (settings.get('epochs', 0) > 0 or checkpoint['step'] < settings.get('max_iters', 0))


def resume_settings(settings, keys, rules, given, places):
    """Take over the settings of the run in out_dir, and refuse what does not go with its state."""
    out_dir, stage = settings['out_dir'], os.path.basename(settings['__file__'])
    checkpoint = load_checkpoint(out_dir)
    if checkpoint['stage'] != stage:
        fail(f"{out_dir} is no run of {stage} to resume, but one of {checkpoint['stage']}; "
             f"start from it with --init_from={out_dir} and another --out_dir")
    saved = {key: check(settings, keys, rules, key, value, f'{out_dir}/ckpt.pt')
             for key, value in checkpoint['settings'].items() if key in keys}
    for key in given:
        if key not in RESUME_MAY_CHANGE and given[key] != saved.get(key, given[key]):
            fail(f"{places[key]}: {out_dir} has {key}={saved[key]}, and a resumed run keeps that")
    fixed, settings['init_from'] = {*given, 'init_from', 'out_dir'}, 'resume'
    settings.update({key: value for key, value in saved.items() if key not in fixed})


def parse(text, default):
    """The Python literal that text from the command line holds. A str is the text as it is, or all quoted."""
    if isinstance(default, str) and not re.fullmatch(r"""(["'])(\\.|(?!\1)[^\\])*\1""", text, re.DOTALL):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):    # of an odd or deep one
        return text


def check(settings, keys, rules, key, value, where):
    """The value of a setting in its own type, or one line that names `where` and what is allowed."""
    if key not in keys:
        near = difflib.get_close_matches(key, keys, n=1)
        if key in ELSEWHERE:
            fail(f"{where}: does not apply here, as {ELSEWHERE[key]}")
        hint = f"did you mean {near[0]!r}? " if near else ''
        fail(f"{where}: unknown setting {key!r}; {hint}--help lists all")
    kind = type(settings[key])
    if value is True and kind is not bool and where == f'--{key}':
        fail(f"{where}: {key} needs a value, as in --{key}={settings[key]}")
    if type(value) is int and not -1 << 63 <= value < 1 << 63:
        fail(f"{where}: {key} takes no number beyond 64 bits")
    if type(value) is str and ('\0' in value or re.search('[\ud800-\udfff]', value)):
        fail(f"{where}: {key} takes UTF-8 text without NUL, not {value!r}")
    if kind is float and type(value) is int:
        value = float(value)
    if kind is bool and type(value) is int and value in (0, 1):
        value = bool(value)
    if type(value) is not kind or kind is float and not math.isfinite(value):
        want = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}[kind]
        fail(f"{where}: {key} takes {want}, not {value!r}")
    if key in rules and (wrong := rules[key](value)):
        fail(f"{where}: {key} {wrong}, not {value!r}")
    return value


def anchored(value):
    """A default path made absolute, so that it is the same place from every current folder."""
    is_path = isinstance(value, str) and value.startswith(('out/', 'data/'))
    return os.path.join(HERE, value) if is_path else value


def in_full(key, value):
    """The path of a folder or file that a run reads, made absolute, as the run may be resumed from another
    current folder. A bare name is a path if a model is there; of a data set it is one in data/."""
    if key not in ('dataset', 'init_from', 'teacher', 'tokenizer'):
        return value
    is_path = os.path.basename(value) != value or key != 'dataset' and any(map(os.path.isfile, (
        value if '.' in value else '', *(os.path.join(value, name) for name in (
            'ckpt.pt', 'config.json', 'tokenizer.json')))))
    return os.path.abspath(value) if is_path else value


def read_config_file(path):
    """Run a Python file of assignments; return {name: (value, 'file:line')}."""
    found = next((p for p in (path, os.path.join(HERE, path)) if os.path.isfile(p)), None)
    if not found:
        fail(f"{path}: no such config file (a setting is written --key=value)")
    values = {}
    try:
        with open(found, encoding='utf-8') as f:
            tree = ast.parse(f.read(), found)
        exec(compile(tree, found, 'exec'), values)
    except (Exception, SystemExit) as e:                # it is the user's own code: report whatever it does
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == found]
        fail(f"{path}:{getattr(e, 'lineno', None) or (lines or [1])[-1]}: {type(e).__name__}: {e}")
    lines = {node.id: node.lineno for node in ast.walk(tree)
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {k: (v, f"{path}:{lines[k]}") for k, v in values.items() if k in lines and k[0] != '_'}


def print_help(settings, keys):
    """Print the script's docstring, then each setting with its default and the comment beside it."""
    with open(settings['__file__'], encoding='utf-8') as f:
        comments = dict(re.findall(r'^(\w+) = .*?# (.+)$', f.read(), re.MULTILINE))
    comments = {**{key: comment for key, (_, comment) in LOOP.items()}, **comments}
    print(settings['__doc__'].strip(), "\n\nSettings, as --key=value:")
    for key in keys:
        print(f"  {key + '=' + repr(settings[key]):32} {comments.get(key, '')}")


def end_process(code):
    """End the process as it is: to take Python down aborts one whose native threads still hold tensors."""
    atexit._run_exitfuncs()                             # they take away what is half written
    os._exit(code)


def last_words(keys, kind, error, trace):
    """Ctrl-C, a reader that has gone (`| head`), memory or disk that is full: one line, and no traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
        end_process(130)
    if issubclass(kind, BrokenPipeError):
        os._exit(141)
    try:
        if kind.__name__ == 'InductorError':
            fail(f"torch.compile failed, leave out --compile: {str(error).splitlines()[0]}", code=1)
        if issubclass(kind, MemoryError) or re.search("out of memory|can't allocate memory", str(error)):
            lower = ' or '.join(f'--{key}' for key in MEMORY if key in keys)
            fail(f"out of memory: lower {lower or 'what is read at once'}", code=1)
        if issubclass(kind, OSError) and error.errno in DISK:
            fail(f"{error.filename or 'cannot write'}: {error.strerror}; what is on the disk is whole",
                 code=1 if error.errno in FULL else 2)
    except SystemExit as end:
        os._exit(end.code)
    sys.__excepthook__(kind, error, trace)


MEMORY = ('batch_size', 'block_size', 'num_samples', 'max_new_tokens')         # settings that cost memory
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS)


def flush_last():
    """What is still held back may not be written: Python would end with two lines of its own and code 120."""
    try:
        sys.stdout and sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"{os.path.basename(sys.argv[0])}: cannot write: {error.strerror}", file=sys.stderr)
        os._exit(141 if isinstance(error, BrokenPipeError) else 1)


atexit.register(flush_last)             # the first to be registered is the last to run


# ---- the script that runs, before torch, which takes a second to load ----

def settings_in(path):
    """The settings of a stage as its source has them, without running it; {} of a file that is none, or that
    computes one."""
    try:
        with open(path, encoding='utf-8') as f:
            tree = ast.parse(source := f.read())
        settings = dict(__file__=path, __doc__=ast.get_docstring(tree, clean=False))
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.If)):       # here its block has ended
                break
            if isinstance(node, ast.Assign) and node.targets[0].id.islower():
                settings[node.targets[0].id] = ast.literal_eval(node.value)
    except (OSError, ValueError, SyntaxError, AttributeError):
        return {}
    return settings if re.search(r'\bconfigure\(\s*globals\(\)', source) else {}


# A script imports this file first: what it says of its settings, and what is wrong with the command line, is
# then told before torch. `configure` reads all again, with the rules of the stage, and tells what it takes.
if script := settings_in(getattr(sys.modules['__main__'], '__file__', '')):
    its_keys = open_script(script)
    with redirect_stdout(io.StringIO()):
        read_arguments(script, its_keys, RULES)

import torch                                            # noqa: E402
import torch.distributed as dist                        # noqa: E402

# ---- device and ranks ----

@dataclass
class Run:
    device: torch.device
    dtype: torch.dtype
    rank: int                # of this process among world_size; rank 0 prints and saves
    world_size: int

    def autocast(self):
        """Matrix products in self.dtype; norms and the loss stay in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    def end(self, code=0):
        """End the process; among ranks, when all are done: gloo aborts one that leaves while others work, and
        one whose group a model in pieces, or torch itself, still holds when Python comes down."""
        if self.world_size > 1:
            self.barrier()
            dist.destroy_process_group()
            end_process(code)
        sys.exit(code)

    def sum(self, *numbers):
        """Each number summed over the ranks, as a list of floats."""
        if self.world_size == 1:
            return [float(n) for n in numbers]
        total = torch.tensor(numbers, dtype=torch.float64)      # on the host: no GPU is waited for
        dist.all_reduce(total)
        return total.tolist()


def start_run(device='auto', dtype='auto', seed=0):
    """Resolve device and dtype, join the other ranks under torchrun, seed torch differently on each rank."""
    if dtype == 'int8':                                 # sample.py asks for bfloat16 instead
        fail("dtype='int8' is for sample.py: choose 'auto', 'float32', 'bfloat16' or 'float16'")
    world_size = int(os.environ.get('WORLD_SIZE', 1))
    rank = int(os.environ.get('RANK', 0)) if world_size > 1 else 0
    if device == 'auto':
        mps = torch.backends.mps.is_available()
        device = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    if device == 'cuda':                                # a device has an index: set_device wants one
        device = f"cuda:{os.environ.get('LOCAL_RANK') or rank % max(1, torch.cuda.device_count())}"
    try:
        torch.zeros(1, device=device).item()            # 'meta' makes tensors, but holds no numbers
        device = torch.device(device)
    except (RuntimeError, AssertionError, ImportError) as e:
        reason = re.split(r'\.\s|\n', str(e))[0].rstrip('.')
        fail(f"device={device!r} does not work here ({reason}); device='auto' takes what there is")
    if device.type == 'cuda':
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)     # makes a plan for each new length
    if world_size > 1:
        dist.init_process_group('cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo')
    if dtype == 'auto':
        if device.type == 'cuda':
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = device.type == 'cpu' and (torch.cpu._is_avx512_bf16_supported()
                                             or torch.cpu._is_amx_tile_supported())
        dtype = 'bfloat16' if fast else 'float32'
    torch.set_float32_matmul_precision('high')          # TF32 on a GPU; no change on a CPU
    torch.manual_seed(seed + rank)
    return Run(device, getattr(torch, dtype), rank, world_size)


# ---- checkpoints ----

def refuse_model(folder, setting, tokenizer=True):
    """One line if a model or a run, or a tokenizer, lies in a folder that another one is to be written to."""
    check_folder(folder)
    names = os.listdir(folder) if os.path.isdir(folder) else []
    for pattern in ('ckpt*.pt', 'config.json', '*.safetensors', '*.bin',
                    *['tokenizer*.json', 'generation_config.json'] * tokenizer):
        if taken := fnmatch.filter(names, pattern):
            fail(f"--{setting}={folder} holds {taken[0]} already: choose another folder, or remove that")


def check_replaces(folder, stage):
    """One line if a new run of a stage would write over somebody's model, or over another stage's run. Over
    one of its own it says so."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    for pattern in ('config.json', '*.safetensors', '*.bin'):
        if taken := fnmatch.filter(names, pattern):
            fail(f"--out_dir={folder} holds a model, {taken[0]}: choose another folder")
    if {'tokenizer.json', *CHECKPOINTS, 'metrics.jsonl', 'meta.json'} & {*names} == {'tokenizer.json'}:
        fail(f"--out_dir={folder} holds a tokenizer, which a run would replace: choose another folder")
    if CHECKPOINTS[0] in names:
        there = load_checkpoint(folder)
        if there['stage'] != stage:
            fail(f"--out_dir={folder} holds a run of {there['stage']}: choose another folder, or remove that")
        tell(f"{folder} holds a run at step {there['step']:,}, which this one replaces")


def check_folder(path):
    """One line if this folder can't be written to, or made."""
    there = os.path.abspath(path)
    while not os.path.lexists(there):
        there = os.path.dirname(there)
    if not os.path.isdir(there):
        fail(f"cannot make the folder {path}: {there} is no folder")
    if not os.access(there, os.W_OK):
        fail(f"cannot write to the folder {path}: permission denied")


def make_folder(path):
    check_folder(path)
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:                                # a name too long, a folder of the system's
        fail(f"cannot make the folder {path}: {e.strerror}")


def partial_folder(folder):
    """A new folder beside another, to be filled for it. What is left of it when the process ends is gone."""
    partial = f'{os.path.normpath(folder)}.{os.getpid()}.partial'       # a name that nobody else has
    atexit.register(shutil.rmtree, partial, ignore_errors=True)
    make_folder(partial)
    return partial


@contextmanager
def replacing(path, previous=None):
    """Yield the name of a new file that takes the place of `path` at the end, whole and on the disk; if it
    can't be written, what was there before stays. previous: what to call that from then on."""
    partial = f'{path}.tmp'
    try:
        yield partial
        with open(partial, 'rb+') as f:
            os.fsync(f.fileno())
        if previous and os.path.exists(path):           # by a second name: there is a `path` at any moment
            with suppress(FileNotFoundError):
                os.remove(f'{previous}.tmp')
            try:
                os.link(path, f'{previous}.tmp')
            except OSError:                             # a file system without second names
                shutil.copyfile(path, f'{previous}.tmp')
            os.replace(f'{previous}.tmp', previous)
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def save_checkpoint(run, out_dir, tokenizer, config, **state):
    """Write out_dir/ckpt.pt, whole or not at all, and the tokenizer, without which it is of no use; the one
    before stays as ckpt_previous.pt. Every rank calls this; rank 0 writes. config: that of the model."""
    rng = [torch.get_rng_state()]
    if run.device.type == 'cuda':
        rng.append(torch.cuda.get_rng_state(run.device))
    rngs = [rng] * run.world_size
    if run.world_size > 1:
        dist.all_gather_object(rngs, rng)
    if run.rank == 0:
        tokenizer.save(out_dir)
        state.update(model_type=config.model_type, model_config=asdict(config), rng=rngs,
                     tokenizer=tokenizer.fingerprint, stage=os.path.basename(sys.argv[0]))
        path, previous = (os.path.join(out_dir, name) for name in CHECKPOINTS)
        with replacing(path, previous) as new, open(new, 'wb') as f:
            torch.save(state, f)


def restore_rng(run, rngs, step):
    """Continue each rank's random numbers where they stopped; another number of ranks starts new ones."""
    if len(rngs) != run.world_size:
        torch.manual_seed(torch.initial_seed() + 1_000_003 * step)
        return
    try:
        torch.set_rng_state(rngs[run.rank][0])
        if run.device.type == 'cuda' and len(rngs[run.rank]) == 2:
            torch.cuda.set_rng_state(rngs[run.rank][1], run.device)
    except (RuntimeError, TypeError, IndexError) as e:
        fail(f"the random numbers in the checkpoint are damaged ({e})")


def fingerprint(state):
    """16 hex digits of a state dict's names, shapes and numbers: are these the weights they should be?"""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f'{name} {tuple(tensor.shape)} {tensor.dtype}'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# What a checkpoint holds always, and what of which kind.
ALWAYS = ('model_type', 'model_config', 'tokenizer', 'stage', 'step', 'settings')
KINDS = dict(model_type=str, model_config=dict, tokenizer=str, stage=str, step=int, settings=dict,
             rng=[[torch.Tensor]], optimizers=[dict(state=dict)], scaler=dict, position=int, counted=int,
             model=dict, last=dict, labels=[str], best=dict(accuracy=float, loss=float, step=int),
             adapters=dict, lora=dict(rank=int, alpha=float, dropout=float, targets=str),
             base=str, base_fingerprint=str, reference=str, reference_fingerprint=str, lowest=float)


def fits(value, kind):
    """Whether a value is of a kind: a type, [kind] of all items of a list, {key: kind} of parts of a dict. An
    int in a file of ours is a count, never negative."""
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(item, kind[0]) for item in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(key in value and fits(value[key], kind[key]) for key in kind)
    if kind is dict:
        return isinstance(value, dict)                  # or a subclass: a state dict is one
    return type(value) is kind and (kind is not int or value >= 0)


class Checkpoint(dict):
    """The contents of a checkpoint. A part that it lacks ends the run with one line, whoever asks for it."""

    def __missing__(self, key):
        fail(f"the checkpoint of {self['stage']} at step {self['step']} holds no {key!r}: is it of another "
             f"stage, or of older code?")


def load_checkpoint(out_dir):
    """What save_checkpoint wrote, on the CPU; if that is damaged, the one before it, and a line that says so.
    One line if there is none. The checksums, which torch does not look at, cost 0.4 s per 500 MB."""
    broken = []
    for path in (os.path.join(out_dir, name) for name in CHECKPOINTS):
        if not os.path.isfile(path):
            continue
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            mmap = os.name != 'nt'                      # Windows replaces no file that is mapped into memory
            state = {} if damaged else torch.load(path, 'cpu', weights_only=True, mmap=mmap)
            if 'model_args' in state:
                fail(f"{path} is nanoGPT's: start from it, with --init_from={out_dir} and another --out_dir")
            wrong = [k for k in KINDS if k in {*ALWAYS, *state} and not fits(state.get(k), KINDS[k])]
            if not wrong:
                if broken:
                    print(f"{broken[0]}; taken is {path}, of step {state['step']:,}", file=sys.stderr)
                return Checkpoint(state)
            reason = f"{damaged} in it is damaged" if damaged else f"it holds no {wrong[0]} as it should be"
        except PermissionError:
            fail(f"{path}: permission denied")
        except Exception as e:                  # torch raises many kinds over a file that is not its own
            reason = f"{type(e).__name__}: {str(e).partition(chr(10))[0][:80]}"
        broken.append(f"{path} is not a checkpoint of this project, or damaged ({reason})")
    if broken:
        fail(broken[0])
    stage = os.path.basename(os.path.normpath(out_dir)) + '.py'
    known = os.path.isfile(os.path.join(HERE, stage))
    if os.path.isfile(there := os.path.join(HERE, out_dir, CHECKPOINTS[0])):
        fail(f"no checkpoint {os.path.join(out_dir, 'ckpt.pt')} in this folder; there is {there}")
    fail(f"no checkpoint {os.path.join(out_dir, 'ckpt.pt')}: " + (
        f"train first, with `python {stage}`" if known else "name the folder of a run, or train it first"))


# ---- files of weights ----

def read_json(path):
    """The dict in a JSON file. Raises OSError, or ValueError with one line."""
    with open(path, encoding='utf-8-sig') as f:
        try:
            found = json.load(f)
        except (ValueError, RecursionError) as e:
            raise ValueError(f"{path} is not JSON ({e})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def check_sizes(config, **highest):
    """Raise ValueError, one line, over a field of a model's config that has not the type it is declared with,
    or is out of range. A size is at least 1, or 0 where that is its default; highest: its limit by name."""
    for field in fields(config):
        value, kind = getattr(config, field.name), field.type
        low = int(kind is int and field.default != 0)
        high = highest.get(field.name, 1 << 20 if kind is int else 1e12)
        if kind in (int, float):
            good = type(value) in {int, kind} and low <= value <= high              # NaN is not
            wanted = f"a {'whole ' * (kind is int)}number from {low} to {high}"
        else:
            good, wanted = isinstance(value, kind), getattr(kind, '__name__', kind)
        if not good:
            raise ValueError(f"{field.name} must be {wanted}, not {value!r}")


def is_dense(value):
    """Whether a value is an ordinary tensor, in memory."""
    return torch.is_tensor(value) and value.layout is torch.strided and not value.is_meta


def check_weights(state, source):
    """Raise ValueError, one line, over a value of {name: tensor} that is no tensor of finite real numbers."""
    for name, value in state.items():
        if not is_dense(value) or not value.is_floating_point():
            raise ValueError(f"{source}: {name} is {getattr(value, 'dtype', type(value))}, no weights")
        if value.numel() and not all(map(math.isfinite, value.float().aminmax())):
            raise ValueError(f"{source}: {name} holds NaN or infinity")


def read_file(file):
    """What one .pth, .pt, .bin or .safetensors file holds, a dict, mapped into memory rather than read.
    Raises ImportError or ValueError with one line."""
    try:
        if file.endswith('.safetensors'):
            from safetensors.torch import load_file
            return load_file(file)
        mmap = zipfile.is_zipfile(file)                 # before torch 1.6 it was none
        return dict(torch.load(file, 'cpu', weights_only=True, mmap=mmap))
    except ImportError:
        raise ImportError(f"{file} needs a package: pip install safetensors") from None
    except Exception as e:                              # each library has kinds of its own for a broken file
        raise ValueError(f"{file} holds no weights ({type(e).__name__}: {str(e)[:80]!r})") from None


def bare_weights(source):
    """The path of a file of weights that comes without what describes them: itself (MiniMind's .pth), or
    nanoGPT's ckpt.pt in a folder. None if source is something else."""
    if os.path.isfile(source):
        return source
    path = os.path.join(source, 'ckpt.pt')
    try:
        return path if os.path.isfile(path) and 'model_args' in read_file(path) else None
    except ValueError:                                  # damaged: load_checkpoint has words for that
        return None


def read_weights(source):
    """{name: tensor} of one file (of a checkpoint of nanoGPT's or MiniMind's, the model), or of all weight
    files in a Hugging Face folder. Raises OSError, ImportError or ValueError with one line."""
    names = sorted(os.listdir(source)) if os.path.isdir(source) else []
    names = fnmatch.filter(names, 'model*.safetensors') or fnmatch.filter(names, 'pytorch_model*.bin')
    files = [source] if os.path.isfile(source) else [os.path.join(source, name) for name in names]
    if not files:
        raise FileNotFoundError(f"{source} holds neither model.safetensors nor pytorch_model.bin")
    weights = {}
    for file in map(os.fspath, files):
        found = read_file(file)
        if isinstance(found.get('model'), dict):
            if 'model_config' in found:
                raise ValueError(f"{file} belongs to a run: name its folder, {os.path.dirname(file) or '.'}")
            found = found['model']
        if twice := weights.keys() & found.keys():
            raise ValueError(f"{file} and another file beside it both hold {min(twice)}: take one away")
        weights.update(found)
    if others := [name for name, value in weights.items() if type(name) is not str or not is_dense(value)]:
        raise ValueError(f"{source} holds more than weights: {others[0]!r}, for one")
    # torch.compile and DistributedDataParallel put their prefix before all names
    return {re.sub(r'^(_orig_mod\.|module\.)+', '', name): value for name, value in weights.items()}


def write_model(folder, config, state):
    """Write a Hugging Face folder: config.json, and {name: tensor} as model.safetensors where that package is
    installed, else as pytorch_model.bin; whole or not at all, as it may be mapped into memory as `state`."""
    os.makedirs(folder, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    dtype = str(next(iter(state.values())).dtype).removeprefix('torch.')
    with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as f:
        json.dump(dict(config, torch_dtype=dtype), f, indent=2)
    try:
        from safetensors import SafetensorError
        from safetensors.torch import save_file
    except ImportError:
        with replacing(os.path.join(folder, 'pytorch_model.bin')) as path:
            torch.save(state, path)
    else:
        with replacing(os.path.join(folder, 'model.safetensors')) as path:
            try:
                save_file(state, path, metadata={'format': 'pt'})
            except SafetensorError as e:                # of a full disk, say: "... (os error 28)"
                number = int((re.search(r'os error (\d+)', str(e)) or [0, errno.EIO])[1])
                raise OSError(number, os.strerror(number), path) from None


def build_model(model_class, config, state, source):
    """model_class(config) with exactly the weights in state, {name: tensor}, in evaluation mode. It takes the
    tensors of state themselves where their dtype fits. Of a matrix with two names (a tied output head) one is
    enough. Raises ValueError, one line on `source`, over the first name that does not fit."""
    with torch.device('meta'):                          # shapes only: no memory, no random numbers
        model = model_class(config)
    check_weights(state, source)
    first, tied, state = {}, {}, dict(state)            # tied: {second name of a parameter: its first}
    for name, p in model.named_parameters(remove_duplicate=False):
        if first.setdefault(p, name) != name:
            tied[name] = first[p]
    for second, name in tied.items():
        value = state.setdefault(second, state.get(name))
        if value is not None and not torch.equal(state.setdefault(name, value), value):
            raise ValueError(f"{source}: {second} and {name} should be one matrix, but differ")
    wanted = model.state_dict()
    for name, p in wanted.items():
        if state.get(name) is None or state[name].shape != p.shape:
            found = 'missing' if state.get(name) is None else tuple(state[name].shape)
            raise ValueError(f"{source}: {name} is {found}, but its config asks for {tuple(p.shape)}")
        state[name] = state[name].to(p.dtype).contiguous()
    if unknown := sorted(state.keys() - wanted.keys()):
        raise ValueError(f"{source}: {unknown[0]} has no place in this model")
    model.load_state_dict(state, assign=True)
    for second, name in tied.items():                   # one Parameter again
        module, _, attribute = second.rpartition('.')
        setattr(model.get_submodule(module), attribute, model.get_parameter(name))
    return model.eval()


# ---- metrics and pictures ----

TRACKERS = ('wandb', 'swanlab')                          # packages with one and the same interface


class MetricsLog:
    """out_dir/metrics.jsonl, one JSON object per line, and pictures of it. For rank 0."""

    def __init__(self, out_dir, step=0, wandb_log=False, settings=None):
        """step: where this run starts; what an earlier one logged from there on is dropped."""
        self.out_dir, self.lines, self.wandb, odd = out_dir, [], None, 0
        self.path = os.path.join(out_dir, 'metrics.jsonl')
        if step and os.path.isfile(self.path):
            with open(self.path, encoding='utf-8', errors='replace') as f:
                for text in f:
                    try:
                        line = json.loads(text)
                    except (ValueError, RecursionError):                # cut short by a crash
                        line = None
                    if fits(line, dict(step=int)) and all(
                            value is None or type(value) in (int, float) or fits(value, [[float]])
                            for value in line.values()):
                        self.lines.append(line)
                    else:
                        odd += 1
        if odd:
            print(f"{self.path}: left out {odd:,} lines that are not the numbers of a step", file=sys.stderr)
        self.lines = [line for line in self.lines if line['step'] < step]
        with replacing(self.path) as new, open(new, 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(line) + '\n' for line in self.lines)
        if wandb_log:
            package = importlib.import_module(next(filter(importlib.util.find_spec, TRACKERS)))
            self.wandb = package.init(project=settings['wandb_project'], config=settings,
                                      name=settings['wandb_run_name'] or os.path.basename(out_dir))

    def write(self, **numbers):
        """Numbers that are not finite (float16 skips such a step) become null, so that it stays JSON."""
        numbers = {name: None if isinstance(value, float) and not math.isfinite(value) else value
                   for name, value in numbers.items()}
        self.lines.append(numbers)
        with open(self.path, 'a', encoding='utf-8') as f:
            f.write(json.dumps(numbers) + '\n')
        if self.wandb:
            self.wandb.log(numbers, step=numbers['step'])

    def draw(self):
        """Draw losses and accuracies over the steps, and each expert's load, a panel per layer."""
        curves = {}                                     # name -> [(step, value), ...]
        for line in self.lines:
            for name, value in line.items():
                curves.setdefault(name, []).append((line['step'], value))
        for what in ('loss', 'accuracy'):
            found = [name for name in sorted(curves) if name.endswith(what)]
            for axes in draw(os.path.join(self.out_dir, f'{what}.png')) if found else ():
                for name in found:
                    axes.plot(*zip(*curves[name]), label=name)
                axes.set(xlabel='step', ylabel=what)
                axes.legend()
        if 'expert_load' in curves:
            steps, loads = zip(*curves['expert_load'])                  # loads: (lines, layers, experts)
            draw_shares(os.path.join(self.out_dir, 'experts.png'), steps,
                        {f"layer {layer}": shares for layer, shares in enumerate(zip(*loads))})


def draw_shares(path, steps, panels):
    """Draw what share of the visits each expert gets over the steps: panels {title: (lines, experts)}."""
    for axes, (title, shares) in zip(draw(path, len(panels)), panels.items()):
        for e, share in enumerate(zip(*shares)):        # colours come again after ten
            axes.plot(steps, share, label=f"expert {e}", linestyle=('-', '--', '-.', ':')[e // 10 % 4])
        axes.axhline(1 / len(shares[0]), color='grey', linestyle=':')                   # the fair share
        axes.set(title=title, xlabel='step', ylabel='share of the visits')
        if title == [*panels][-1]:
            axes.legend(loc='upper left', bbox_to_anchor=(1, 1), ncols=math.ceil((e + 1) / 10))


@functools.cache
def has_matplotlib():
    """Whether pictures can be drawn. Where not, a line says how, once in a run."""
    try:
        import matplotlib  # noqa: F401
        return True
    except ImportError:
        print("no pictures: `pip install matplotlib`", file=sys.stderr)
        return False


def draw(path, panels=1, rows=1):
    """Yield the axes of each panel to draw on, row by row, then write the picture. Without matplotlib, say so
    once."""
    if not has_matplotlib():
        return
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    size = (7, 4) if panels == rows == 1 else (2.5 * panels, 2.5 * rows)
    figure, axes = plt.subplots(rows, panels, figsize=size, sharex=rows > 1, sharey=True, squeeze=False)
    yield from axes.flat
    try:
        figure.savefig(path, dpi=120, bbox_inches='tight')
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror}", code=1)
    plt.close(figure)


def clock(seconds):
    """75 -> '1:15'; 3675 -> '1:01:15'."""
    hours, seconds = divmod(int(seconds), 3600)
    return (f"{hours}:{seconds // 60:02}" if hours else f"{seconds // 60}") + f":{seconds % 60:02}"


# ---- progress ----

class Progress:
    """A line with speed and time left, redrawn in a terminal, or every ten seconds in a log."""

    def __init__(self, what):
        self.what, self.start, self.shown = what, time.time(), time.time()

    def show(self, fraction, count=''):
        now, tty = time.time(), sys.stderr.isatty()
        if now - self.shown < (0.5 if tty else 10):
            return
        self.shown = now
        left = (now - self.start) * (1 - fraction) / max(fraction, 1e-9)
        print(f"{self.what} {100 * fraction:5.1f}%  {count}  {clock(left)} left   ", file=sys.stderr,
              end='\r' if tty else '\n', flush=True)
