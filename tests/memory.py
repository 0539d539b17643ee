"""Which model fits which GPU: the memory of a training step, in GB of 10^9 bytes, without taking it.

    python tests/memory.py                                  # the table of the README
    python tests/memory.py config/gpt2_124m.py --batch_size=4 --optimizer=muon --activation_checkpointing
    python tests/memory.py config/gpt2_124m.py --ranks=8    # of one rank of eight, with parallel=fsdp

Two steps are taken with tensors that have shapes and no numbers (torch's FakeTensorMode), and the most bytes
that would be alive at once are counted: weights, moments, what there is of gradients then, and activations,
which are the rest. The model is a new one; dtype=auto is bfloat16, as on a GPU; the vocabulary has 6,400
tokens where no tokenizer is named. tests/test_memory.py holds the sum to what torch's profiler measures on a
CPU. On a GPU kernels keep a little more or less, and driver and allocator take some more: leave a GB or two.
"""
import functools
import io
import re
import sys
import weakref
from contextlib import redirect_stdout
from pathlib import Path
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pretrain  # noqa: E402  (the line above makes it importable)
from configurator import (RULES, Run, configure, fail, last_words, one_of, open_script,  # noqa: E402
                          read_arguments, read_config_file)
from train_tokenizer import load_tokenizer  # noqa: E402

GPUS = (8, 12, 16, 24, 40, 80)      # GB


class Peak(TorchDispatchMode):
    """The most bytes of tensors made under it that are alive at once, and those of gradients then, of which
    each of so many ranks holds a share: with more of them another moment may be the fullest."""

    def __init__(self, ranks=1):
        super().__init__()
        self.ranks, self.known, self.params = ranks, set(), []
        self.alive, self.peak, self.gradients = 0, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.count(storage._cdata, storage.nbytes())
                    weakref.finalize(storage, self.count, storage._cdata, -storage.nbytes())
        return out

    def count(self, key, n):
        (self.known.add if n >= 0 else self.known.discard)(key)
        self.alive += n
        if n > 0 and self.alive > self.peak:            # while a gradient is freed, it must not be touched
            whole = sum(4 * p.numel() for p in self.params if p.grad is not None)
            own = whole // self.ranks
            if self.alive - whole + own > self.peak:
                self.peak, self.gradients = self.alive - whole + own, own


def take_steps(config, vocab_size, ranks=1, params=None):
    """Train a new model for two steps on rows of zeros, as the loop does. Returns model and optimizers."""
    run = Run(torch.device('cpu'), getattr(torch, config['dtype']), 0, ranks)
    model = pretrain.new_model(config, vocab_size).train()
    pretrain.spread_over_ranks(run, config, model)
    if params is not None:
        params.extend(model.parameters())
    optimizers = pretrain.make_optimizers(model, config['optimizer'], 1e-3, config['weight_decay'])
    x = torch.zeros(config['batch_size'], config['block_size'], dtype=torch.long)
    for _ in range(2):
        with run.autocast(), patch('torch.compiler.is_compiling', lambda: True):    # all rows, as on a GPU
            loss = model(x, x)[1]
            loss = loss + model.auxiliary_loss(x == 0)
        loss.backward()
        del loss
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            with run.autocast():
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return model, optimizers


def step_bytes(config, vocab_size, ranks=1):
    """{part: bytes} of a step on one rank of so many under fsdp, where it is right to a fifth."""
    torch.set_num_threads(1)            # with more, experts on a CPU ask how many tokens each of them got
    with FakeTensorMode(), Peak(ranks) as peak:
        model, optimizers = take_steps({**config, 'parallel': 'ddp'}, vocab_size, params=peak.params)
        weights = 4 * sum(p.numel() for p in model.parameters())
        moments = sum(t.untyped_storage().nbytes() for optimizer in optimizers
                      for state in optimizer.state.values() for t in state.values())
        blocks = [4 * sum(p.numel() for p in block.parameters()) for block in pretrain.blocks(model)]
    parts = dict(weights=weights, gradients=peak.gradients, moments=moments,
                 activations=peak.peak - weights - peak.gradients - moments)
    if ranks > 1:
        # whole on each rank are embedding and head, and two blocks, as the next is fetched; gradients so long
        gathered = 2 * (weights - sum(blocks) + 2 * max(blocks))
        parts.update(weights=weights // ranks, moments=moments // ranks, gathered=gathered)
    return parts


def fits(n):
    return next((f'{gpu} GB' for gpu in GPUS if n / 1e9 < gpu - 1), 'none')


def table():
    """Sizes of both models, at what their folders in config/ ask for: AdamW and Muon, all activations kept or
    those of one block, one GPU or eight."""
    gpt2 = {name: (dict(model='gpt2', n_layer=layers, n_head=heads, n_embd=width, block_size=1024,
                        batch_size=8), 50257)
            for name, layers, heads, width in (('gpt2', 12, 12, 768), ('gpt2-medium', 24, 16, 1024),
                                               ('gpt2-large', 36, 20, 1280), ('gpt2-xl', 48, 25, 1600))}
    ours = {name: ({key: value for key, (value, _) in read_config_file(f'config/{name}.py').items()}, 6400)
            for name in ('minimind2_small', 'minimind2', 'minimind2_moe', 'minimind3', 'minimind3_moe')}
    defaults = {key: value for key, value in vars(pretrain).items() if type(value) in (bool, int, float, str)}
    print("| model | parameters | rows x tokens | AdamW | Muon | AdamW, checkpointed | Muon, checkpointed | "
          "AdamW, checkpointed, fsdp on 8 |\n" + "|---" * 8 + "|")
    for name, (sizes, vocab_size) in {**ours, **gpt2}.items():
        cells = []
        for optimizer, checkpointed, ranks in (('adamw', False, 1), ('muon', False, 1), ('adamw', True, 1),
                                               ('muon', True, 1), ('adamw', True, 8)):
            config = {**defaults, **sizes, 'dtype': 'bfloat16', 'optimizer': optimizer,
                      'activation_checkpointing': checkpointed}
            parts = step_bytes(config, vocab_size, ranks)
            cells.append(f"{sum(parts.values()) / 1e9:.1f} ({fits(sum(parts.values()))})")
        print(f"| {name} | {parts['weights'] * 2 / 1e6:,.0f}M | {config['batch_size']} x "
              f"{config['block_size']:,} | {' | '.join(cells)} |", flush=True)


def read_command_line():
    """(settings of pretrain.py, number of ranks)."""
    given = [arg for arg in sys.argv[1:] if arg.partition('=')[0] == '--ranks']
    if len(given) > 1 or not all(re.fullmatch('--ranks=0*[1-9][0-9]{0,5}', arg) for arg in given):
        fail(f"{' '.join(given)}: give the number of ranks once, from 1 up, as in --ranks=8")
    sys.argv = [arg for arg in sys.argv if arg not in given] + ['--eval_only']
    keys = open_script(settings := {**vars(pretrain), '__doc__': __doc__})
    with redirect_stdout(io.StringIO()):                # `configure` tells it
        asked = read_arguments(settings, keys, RULES)[0]
    if asked.get('parallel') == 'fsdp':
        fail("parallel=fsdp: leave it out, and say of how many ranks it is with --ranks=8")
    if asked.get('init_from', 'scratch') != 'scratch':
        fail(f"init_from={asked['init_from']}: only a new model is counted; give its sizes instead")
    config = configure(settings, pretrain.ONLY, model=one_of(*pretrain.MODELS),
                       positions=one_of(*pretrain.POSITIONS),
                       dtype=one_of('auto', 'float32', 'bfloat16', 'float16'))
    if config['dtype'] == 'auto':
        config['dtype'] = 'bfloat16'
    if config['use_moe'] and config['dtype'] != 'bfloat16':
        fail(f"dtype={config['dtype']}: a mixture of experts can be counted in bfloat16 alone")
    return config, *(int(arg[8:]) for arg in given or ['--ranks=1'])


if __name__ == '__main__':
    sys.excepthook = functools.partial(last_words, ())
    if len(sys.argv) == 1:
        sys.exit(table())
    config, ranks = read_command_line()
    sizes = {'': 6400, 'gpt2': 50257}
    vocab_size = sizes.get(config['tokenizer']) or load_tokenizer(config['tokenizer']).vocab_size
    parts = step_bytes(config, vocab_size, ranks)
    print(f"{sum(parts.values()) / 1e9:.2f} GB: "
          + ', '.join(f"{n / 1e9:.2f} {part}" for part, n in parts.items()))
