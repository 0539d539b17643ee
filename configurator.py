"""
One run, whatever its stage: settings, device and ranks, learning rate, checkpoints, metrics, stopping.

A stage opens with a block of bare settings, one comment each. The first line under its main guard,

    config = configure(globals(), optimizer=('adamw', 'muon'))

overrides them with what the config files and then the command line say:

    python pretrain.py config/small.py --batch_size=8 --start="def is_"

A path in a script or a config file that begins with out/ or data/ starts at the repository, any other where
you are.
A mistake of the user ends in one line on stderr and exit code 2, through `fail`.
"""
import ast
import difflib
import hashlib
import inspect
import io
import json
import math
import os
import signal
import sys
import tokenize
import traceback
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

HERE = os.path.dirname(os.path.abspath(__file__))

# What settings of common names may be: a tuple lists the values, a list gives bounds, a number is the least.
LEGAL = dict(dtype=('auto', 'float32', 'bfloat16', 'float16'), batch_size=1, gradient_accumulation_steps=1,
             block_size=1, max_iters=1, eval_interval=1, eval_iters=1, log_interval=1, learning_rate=0,
             min_lr=0, warmup_iters=0, weight_decay=0, grad_clip=0, n_layer=1, n_head=1, n_kv_head=1,
             n_embd=1, dropout=[0, 1], seed=[0, 2**62])


def fail(message):
    """End the run over a mistake of the user: one line on stderr (from rank 0 alone), exit code 2."""
    if os.environ.get('RANK', '0') == '0':
        print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(2)


# ---- settings ----

def configure(settings, **legal):
    """Override a script's settings from config files and the command line; return them all as a dict.

    settings  globals() of the script: every lower-case name that holds a bool, int, float or str is a setting
    legal     what the script's own settings may be, in the form of LEGAL
    With init_from='resume' the settings of the interrupted run stand in for the defaults.
    """
    sys.excepthook = quiet_interrupt
    keys = [k for k, v in settings.items()
            if k.islower() and k[0] != '_' and type(v) in (bool, int, float, str)]
    legal = {**LEGAL, **legal}
    if {'-h', '--help'} & set(sys.argv[1:]):
        print_help(settings, keys)
        sys.exit(0)

    given = {}
    for arg in sys.argv[1:]:
        if arg.startswith('--'):
            key, equals, text = arg[2:].partition('=')
            value = check(settings, keys, legal, key, parse(text, settings.get(key)) if equals else True, arg)
            given[key] = in_full(key, value)
        else:
            for key, (value, where) in read_config_file(arg).items():
                given[key] = in_full(key, anchored(check(settings, keys, legal, key, value, where)))
    for key in keys:
        settings[key] = given.get(key, anchored(settings[key]))
    if settings.get('init_from') == 'resume':
        saved = load_checkpoint(settings['out_dir'])
        if saved.get('stage') != os.path.basename(settings['__file__']):
            fail(f"{settings['out_dir']} is no run of this script to resume but one of {saved.get('stage')}; "
                 f"start from it with --init_from={settings['out_dir']} and another --out_dir")
        saved = saved['settings']
        fixed = {*given, 'init_from', 'out_dir'}
        settings.update({k: v for k, v in saved.items() if k in keys and k not in fixed})
    return {key: settings[key] for key in keys}


def parse(text, default):
    """The Python literal that text from the command line holds. A str takes it as it is, or quoted."""
    if isinstance(default, str) and text[:1] not in ('"', "'"):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def check(settings, keys, legal, key, value, where):
    """The value of a setting in its own type, or one line that names `where` and what is allowed."""
    if key not in keys:
        near = difflib.get_close_matches(key, keys, n=1)
        hint = f"did you mean {near[0]!r}? (--help lists all)" if near else f"there are {', '.join(keys)}"
        fail(f"{where}: unknown setting {key!r}; {hint}")
    kind = type(settings[key])
    if value is True and kind is not bool and where == f'--{key}':
        fail(f"{where}: {key} needs a value, as in --{key}={settings[key]}")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or kind is float and not math.isfinite(value):
        want = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text'}[kind]
        fail(f"{where}: {key} takes {want}, not {value!r}")
    rule = legal.get(key)
    if isinstance(rule, tuple) and value not in rule:
        near = difflib.get_close_matches(str(value), rule, n=1)
        fail(f"{where}: {key} must be one of {', '.join(map(repr, rule))}, not {value!r}"
             + (f"; did you mean {near[0]!r}?" if near else ""))
    if isinstance(rule, list) and not rule[0] <= value <= rule[1]:
        fail(f"{where}: {key} must lie between {rule[0]} and {rule[1]}, not {value!r}")
    if isinstance(rule, (int, float)) and value < rule:
        fail(f"{where}: {key} must be at least {rule}, not {value!r}")
    return value


def anchored(value):
    """A default path made absolute, so that it is the same place from every current folder."""
    is_path = isinstance(value, str) and value.startswith(('out/', 'data/'))
    return os.path.join(HERE, value) if is_path else value


def in_full(key, value):
    """The path of a folder that a run reads, made absolute: it may be resumed, or its base looked for, from
    another current folder. A bare name is a path if a model is there; of a data set it is one in data/."""
    if key not in ('dataset', 'init_from', 'teacher', 'tokenizer'):
        return value
    is_path = os.path.basename(value) != value or key != 'dataset' and any(
        os.path.isfile(os.path.join(value, name)) for name in ('ckpt.pt', 'config.json', 'tokenizer.json'))
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
    except Exception as e:                              # it is the user's own code: report whatever it does
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == found]
        fail(f"{path}:{getattr(e, 'lineno', None) or (lines or [1])[-1]}: {type(e).__name__}: {e}")
    lines = {node.id: node.lineno for node in ast.walk(tree)
             if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return {k: (v, f"{path}:{lines[k]}") for k, v in values.items() if k in lines and k[0] != '_'}


def print_help(settings, keys):
    """Print the script's docstring, then each setting with its default and the comment beside it."""
    with open(settings['__file__'], encoding='utf-8') as f:
        source = f.read()
    comments = {token.start[0]: token.string.lstrip('# ')
                for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT}
    lines = {node.targets[0].id: node.lineno for node in ast.parse(source).body
             if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    print(settings['__doc__'].strip(), "\n\nSettings, as --key=value:")
    for key in keys:
        print(f"  {key + '=' + repr(settings[key]):32} {comments.get(lines.get(key), '')}")


def quiet_interrupt(kind, error, trace):
    """Ctrl-C, or a reader that has gone (`| head`), is no reason for a traceback."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
        os._exit(130)
    if issubclass(kind, BrokenPipeError):
        os._exit(141)
    sys.__excepthook__(kind, error, trace)


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

    def sum(self, *numbers):
        """Each number summed over the ranks, as a list of floats."""
        if self.world_size == 1:
            return [float(n) for n in numbers]
        total = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()


def start_run(device='auto', dtype='auto', seed=0):
    """Resolve device and dtype, join the other ranks under torchrun, seed torch differently on each rank."""
    rank, world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    if device == 'auto':
        mps = torch.backends.mps.is_available()
        device = 'cuda' if torch.cuda.is_available() else 'mps' if mps else 'cpu'
    if device == 'cuda':                                # a device has an index: set_device wants one
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=device).item()            # 'meta' makes tensors, but holds no numbers
        device = torch.device(device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).splitlines()[0].rstrip('.')
        fail(f"device={device!r} does not work here ({reason}); device='auto' takes what there is")
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')
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


def data_parallel(model):
    """The model with its gradients averaged over the ranks. Its buffers are tables, the same on each."""
    known = inspect.signature(DistributedDataParallel).parameters
    sync = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'   # before 2.13
    return DistributedDataParallel(model, **{sync: False})


def learning_rate_at(step, learning_rate, min_lr, warmup_iters, max_iters):
    """Linear warmup to learning_rate, then half a cosine down to min_lr at max_iters."""
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    progress = min(1.0, (step - warmup_iters) / max(1, max_iters - warmup_iters))
    return min_lr + 0.5 * (learning_rate - min_lr) * (1 + math.cos(math.pi * progress))


# ---- checkpoints ----

def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        fail(f"cannot make the folder {path}: {e.strerror}")
    if not os.access(path, os.W_OK):
        fail(f"cannot write to the folder {path}: permission denied")


def save_checkpoint(run, out_dir, words, **state):
    """Write out_dir/ckpt.pt, whole or not at all, and the tokenizer `words`, which it is of no use without.
    Every rank calls this; rank 0 writes."""
    rng = {'cpu': torch.get_rng_state()}
    if run.device.type == 'cuda':
        rng['cuda'] = torch.cuda.get_rng_state(run.device)
    rngs = [rng]
    if run.world_size > 1:
        rngs = [None] * run.world_size
        dist.all_gather_object(rngs, rng)
    if run.rank == 0:
        words.save(out_dir)
        state.update(tokenizer=words.fingerprint, stage=os.path.basename(sys.argv[0]), rng=rngs)
        path = os.path.join(out_dir, 'ckpt.pt')
        with open(path + '.tmp', 'wb') as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())                        # on the disk before the old file is given up
        os.replace(path + '.tmp', path)


def fingerprint(state):
    """16 hex digits of a state dict's names, shapes and numbers: are these the weights they should be?"""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f'{name} {tuple(tensor.shape)} {tensor.dtype}'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def load_checkpoint(out_dir):
    """What save_checkpoint wrote, on the CPU; one line if there is none."""
    path = os.path.join(out_dir, 'ckpt.pt')
    if not os.path.isfile(path):
        stage = os.path.basename(os.path.normpath(out_dir)) + '.py'
        known = os.path.isfile(os.path.join(HERE, stage))
        fail(f"no checkpoint {path}: " + (f"train first, with `python {stage}`" if known else
                                          "name the folder of a run, or train it first"))
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
        if 'model_config' in state:
            return state
        reason = 'it holds no model_config'
    except Exception as e:                      # torch raises many kinds over a file that is not its own
        reason = f"{type(e).__name__}: {str(e).partition(chr(10))[0][:80]}"
    fail(f"{path} is not a checkpoint of this project ({reason})")


def keep_settings(config, checkpoint, *keys):
    """Refuse to resume a run with another value of a setting that its state was made with."""
    for key in keys:
        was = checkpoint['settings'].get(key, config[key])
        if config[key] != was:
            fail(f"--{key}={config[key]}: {config['out_dir']} has {key}={was}, and a resumed run keeps that")


def restore_rng(run, rngs, step):
    """Continue each rank's random numbers where they stopped; another number of ranks starts new ones."""
    if len(rngs) != run.world_size:
        torch.manual_seed(torch.initial_seed() + 1_000_003 * step)
        return
    torch.set_rng_state(rngs[run.rank]['cpu'])
    if run.device.type == 'cuda' and 'cuda' in rngs[run.rank]:
        torch.cuda.set_rng_state(rngs[run.rank]['cuda'], run.device)


# ---- metrics and stopping ----

class MetricsLog:
    """out_dir/metrics.jsonl, one JSON object a line, and a picture of the losses in it. For rank 0."""

    def __init__(self, out_dir, step=0, wandb_log=False, settings=None):
        """step: where this run starts; what an earlier one logged from there on is dropped."""
        self.path, self.lines, self.wandb = os.path.join(out_dir, 'metrics.jsonl'), [], None
        if step and os.path.isfile(self.path):
            with open(self.path, encoding='utf-8') as f:
                for line in f:
                    try:
                        line = json.loads(line)
                    except ValueError:                  # cut short by a crash
                        break
                    if line['step'] < step:
                        self.lines.append(line)
        with open(self.path, 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(line) + '\n' for line in self.lines)
        if wandb_log:
            try:
                import wandb
            except ImportError:
                fail("wandb_log=True needs a package: pip install wandb")
            self.wandb = wandb.init(project='from-scratch', name=os.path.basename(out_dir), config=settings)

    def write(self, **numbers):
        self.lines.append(numbers)
        with open(self.path, 'a', encoding='utf-8') as f:
            f.write(json.dumps(numbers) + '\n')
        if self.wandb:
            self.wandb.log(numbers, step=numbers['step'])

    def draw(self, what='loss', unit='nats per token'):
        """Draw all that is called a loss over the steps into loss.png, where matplotlib is installed."""
        try:
            import matplotlib
        except ImportError:
            return
        matplotlib.use('Agg')
        from matplotlib import pyplot as plt
        figure, axes = plt.subplots(figsize=(7, 4))
        for name in sorted({key for line in self.lines for key in line if key.endswith(what)}):
            points = [(line['step'], line[name]) for line in self.lines if name in line]
            axes.plot(*zip(*points), label=name)
        axes.set(xlabel='step', ylabel=unit)
        axes.legend()
        figure.savefig(os.path.join(os.path.dirname(self.path), f'{what}.png'), dpi=120, bbox_inches='tight')
        plt.close(figure)


class StopSignal:
    """Ctrl-C or SIGTERM asks a loop to save and stop at its next step; a second Ctrl-C ends it at once."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)


def clock(seconds):
    """75 -> '1:15'; 3675 -> '1:01:15'."""
    hours, seconds = divmod(int(seconds), 3600)
    return (f"{hours}:{seconds // 60:02}" if hours else f"{seconds // 60}") + f":{seconds % 60:02}"
