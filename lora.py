"""
Adapt a model with low-rank adapters: train a few percent of its parameters (tutorial chapter II-11).

    y = W x + alpha/r * B A x       W (out, in) frozen; A (r, in), B (out, r) trained  (Hu et al. 2021, eq. 3)

B starts at zero, so training starts at the model it adapts. Only the adapters are saved, in a run's folder
that names their base, and sample.py speaks from it directly. Merged, W + alpha/r * B A, they cost nothing.

    python lora.py                                  # offline: `reason`, on top of out/sft -> out/lora
    python lora.py --targets=q_proj,o_proj --rank=16        # the chapter's: MiniMind's square layers
    python lora.py --merge_to=out/merged            # out/lora inside its base: a run like any other
    python lora.py --to_peft=out/peft               # out/lora in PEFT's layout, and back:
    python lora.py --from_peft=out/peft --init_from=out/sft --out_dir=out/again   # or MiniMind's .pth

The loop comes from pretrain.py; loss, rows and report from sft.py. What differs is what trains.
"""
import importlib.util
import json
import math
import os
import re
import sys
from shlex import quote

from configurator import (above, at_least, check_weights, configure, fail, fingerprint, load_checkpoint,
                          make_folder, read_json, read_weights, refuse_model, save_checkpoint, start_run)

import torch
import torch.nn as nn
from torch.nn import functional as F

from model_gpt2 import OFFICIAL
from prepare import open_data
from pretrain import Training
from sample import export, load_base, load_start
from sft import held_out_loss, open_rows, write_report
from train_tokenizer import load_tokenizer

# the run
out_dir = 'out/lora'            # where adapters, tokenizer, metrics, picture and report go
init_from = 'out/sft'           # the base: a run's or Hugging Face folder, or 'gpt2', ...; or 'resume'
max_iters = 150                 # optimizer steps
epochs = 0.0                    # passes over the data instead of max_iters; 0 takes max_iters
eval_interval = 50              # save and measure the held-out loss every so many steps
always_save_checkpoint = True   # False: keep the checkpoint of the lowest held-out loss
eval_iters = 50                 # batches of held-out conversations to measure on, at most
log_interval = 10               # print a line every so many steps
report_size = 48                # held-out conversations to answer for report.json, at the end
max_new_tokens = 100            # longest answer in it, in tokens
seed = 1337                     # of A, the order of the data, dropout
wandb_log = False               # log to Weights & Biases too
# instead of training
merge_to = ''                   # write out_dir's model here with its adapters merged, and stop
to_peft = ''                    # write out_dir's adapters here in PEFT's layout, and stop
from_peft = ''                  # put adapters of a PEFT folder, or MiniMind's .pth, on init_from, and stop
# the data
dataset = 'reason'              # name in data/, or a path; a built-in one is prepared when missing
layout = 'packed'               # 'packed', 'bucketed' or 'padded', as in sft.py
batch_size = 16                 # rows in a micro-batch
gradient_accumulation_steps = 1 # micro-batches in a step, over all ranks together
block_size = 256                # tokens in a row; what is longer is cut
# the adapters
rank = 8                        # r
alpha = 16.0                    # alpha / rank scales B A; a larger one acts as a higher learning rate
targets = 'all'                 # layers, 'q_proj,attn.c_proj'; 'all': those of attention and feed-forward
dropout = 0.0                   # share of an adapter's input dropped while training
# the optimizer
learning_rate = 5e-3            # highest
min_lr = -1.0                   # at the end of the cosine; -1 is a tenth of learning_rate
warmup_iters = 10               # steps of linear warmup
weight_decay = 0.0              # on A and B
grad_clip = 1.0                 # longest gradient; 0 is no limit
# the machine
device = 'auto'                 # 'auto' takes cuda, then mps, then cpu
dtype = 'auto'                  # 'float32', 'bfloat16' or 'float16'; 'auto' is bfloat16 where that is fast
compile = False                 # torch.compile: slow to start, faster on a GPU

# What 'all' means: the linear layers of attention and feed-forward, as Llama's and GPT-2's layouts call them.
ALL = ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj',
       'c_attn', 'c_proj', 'c_fc')


# ---- the adapters ----

class LoRALinear(nn.Module):
    """A frozen linear layer with its adapter: W x + alpha/rank * B A dropout(x), (..., in) -> (..., out)."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base, self.scale, self.dropout = base, alpha / rank, nn.Dropout(dropout)
        w = base.weight
        # A keeps the size of x at any width; B is zero, so that the adapter starts as nothing at all
        self.lora_A = nn.Parameter(w.new_empty(rank, base.in_features).normal_(std=base.in_features ** -0.5))
        self.lora_B = nn.Parameter(w.new_zeros(base.out_features, rank))

    def forward(self, x):
        low = F.linear(self.dropout(x), self.lora_A)                        # (..., in) -> (..., rank)
        return self.base(x) + self.scale * F.linear(low, self.lora_B)       # (..., rank) -> (..., out)


def adapters(model):
    """{name of the layer: its LoRALinear}, in the model's order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALinear)}


def inject(model, rank, alpha, dropout=0.0, targets='all'):
    """Put an adapter on every linear layer that `targets` names, in place, and freeze everything else.

    targets  'all', or names with commas between, each a layer's path or the end of one: 'q_proj,o_proj' are
             the chapter's, which takes whatever is square; 'attn.c_proj' is one of GPT-2's two. A mixture's
             experts, stacks and no linear layers, stay frozen, and the output head, often the embedding, too.
    ValueError where a name fits no layer, or the model has adapters already.
    """
    if adapters(model):
        raise ValueError("the model has adapters already; merge them first")
    if not (rank >= 1 and math.isfinite(alpha) and 0 <= dropout <= 1):
        raise ValueError(f"rank {rank} must be at least 1, alpha {alpha} finite, dropout {dropout} 0 to 1")
    linear = {path: layer for path, layer in model.named_modules()
              if isinstance(layer, nn.Linear) and '.' in path}
    wanted = ALL if targets == 'all' else targets.split(',')
    for name in wanted:
        if targets != 'all' and not any(f'.{path}'.endswith(f'.{name}') for path in linear):
            known = sorted({path.split('.')[-1] for path in linear})
            raise ValueError(f"targets: no linear layer is called {name!r}; there are {', '.join(known)}")
    model.requires_grad_(False)
    for path, layer in linear.items():
        if f'.{path}'.endswith(tuple(f'.{name}' for name in wanted)):
            parent, _, last = path.rpartition('.')
            setattr(model.get_submodule(parent), last,
                    LoRALinear(layer, rank, alpha, dropout).train(layer.training))
    return model


@torch.no_grad()
def merge(model):
    """Add each adapter to the weight it adapts and take it out, in place: W + alpha/rank * B A.

    ValueError where there is none, as after merging once: a second time would add it twice.
    """
    if not adapters(model):
        raise ValueError("the model has no adapters; they are merged already, or were never injected")
    for name, layer in adapters(model).items():
        layer.base.weight += layer.scale * layer.lora_B @ layer.lora_A
        parent, _, last = name.rpartition('.')
        setattr(model.get_submodule(parent), last, layer.base)
    return model.requires_grad_(True)


def adapter_state(model):
    """{'<layer>.lora_A': (rank, in), '<layer>.lora_B': (out, rank), ...}"""
    return {f'{name}.{part}': getattr(layer, part).detach()
            for name, layer in adapters(model).items() for part in ('lora_A', 'lora_B')}


@torch.no_grad()
def load_adapter_state(model, state):
    """Fill the injected adapters; ValueError where names or shapes are others."""
    own = adapter_state(model)
    for name in sorted(own.keys() ^ state.keys()):
        raise ValueError(f"adapter {name} is in {'the file' if name in state else 'the model'} alone")
    for name, layer in adapters(model).items():
        for part in ('lora_A', 'lora_B'):
            new, old = state[f'{name}.{part}'], getattr(layer, part)
            if new.shape != old.shape:
                raise ValueError(f"adapter {name}.{part} is {tuple(new.shape)}, not {tuple(old.shape)}")
            old.copy_(new)


# ---- adapters of PEFT and MiniMind ----

PEFT_PREFIX = 'base_model.model.'       # before a layer's name in adapter_model.safetensors
# adapter_config.json: what a key may be; keys that may be anything, as they are read, or said by the weights,
# or change nothing in a trained adapter. All others must be unset.
PEFT_VALUES = dict(peft_type=('LORA',), task_type=('CAUSAL_LM', None), bias=('none',),
                   init_lora_weights=(True, False, None, 'gaussian', 'orthogonal', 'eva', 'mica'))
PEFT_ANY = ('r lora_alpha lora_dropout use_rslora base_model_name_or_path revision peft_version auto_mapping '
            'inference_mode target_modules exclude_modules layers_to_transform layers_pattern fan_in_fan_out '
            'eva_config megatron_core qalora_group_size ensure_weight_tying').split()


def write_peft(model, folder, base, model_type):
    """Write a model's adapters as adapter_config.json and adapter_model.safetensors, for `peft` to load over
    the base in Hugging Face's layout."""
    from safetensors.torch import save_file
    layer, *_ = adapters(model).values()
    rank = len(layer.lora_A)
    config = dict(peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=base, r=rank,
                  lora_alpha=layer.scale * rank, lora_dropout=layer.dropout.p, bias='none',
                  target_modules=[*adapters(model)],
                  fan_in_fan_out=model_type == 'gpt2')      # its matrices are transposed there
    make_folder(folder)
    with open(os.path.join(folder, 'adapter_config.json'), 'w', encoding='utf-8') as f:
        json.dump(config, f, indent=2)
    state = {f'{PEFT_PREFIX}{name}.weight': t.contiguous() for name, t in adapter_state(model).items()}
    save_file(state, os.path.join(folder, 'adapter_model.safetensors'))


def read_peft(model, source):
    """Inject adapters into a model: those of a folder in PEFT's layout, or of a .pth of MiniMind's. Returns
    the arguments of `inject`."""
    try:
        if os.path.isfile(source):
            state = read_weights(source)
            ranks = [len(A) for name, A in state.items() if name.endswith('.lora.A.weight') and A.dim()]
            if not ranks:
                raise ValueError("no name in it ends in .lora.A.weight; of PEFT's layout, name the folder")
            how = dict(rank=ranks[0], alpha=float(ranks[0]), dropout=0.0)           # MiniMind has no alpha
        else:
            how = settings_of_peft(read_json(os.path.join(source, 'adapter_config.json')))
            names = [name for name in os.listdir(source) if name.startswith('adapter_model.')]
            if not names:
                raise ValueError("it has no adapter_model.safetensors")
            state = read_weights(os.path.join(source, max(names)))          # older ones end in .bin
    except (OSError, ImportError, ValueError) as e:
        fail(f"{source} holds no adapters that can be read: {e}")
    prefixes = rf'({re.escape(PEFT_PREFIX)}|module\.|_orig_mod\.)*'
    state = {re.sub(prefixes, '', name, count=1).removesuffix('.weight').replace('.lora.', '.lora_'): value
             for name, value in state.items()}
    how['targets'] = ','.join(dict.fromkeys(name.rpartition('.')[0] for name in state))
    put_on(model, how, state, source)
    return how


def settings_of_peft(config):
    """rank, alpha and dropout of an adapter_config.json; ValueError where it asks for more than LoRA."""
    for key, value in {'peft_type': None, **config}.items():
        if value not in PEFT_VALUES[key] if key in PEFT_VALUES else value and key not in PEFT_ANY:
            raise ValueError(f"adapter_config.json has {key}={value!r:.80}, and plain LoRA is read only")
    r, alpha, dropout = numbers = [config.get(key) for key in ('r', 'lora_alpha', 'lora_dropout')]
    if not all(type(n) in (int, float) and abs(n) < 1e12 for n in numbers) or type(r) is not int or r < 1:
        raise ValueError(f"adapter_config.json: r, lora_alpha and lora_dropout are {numbers}; they should be "
                         f"three numbers, the first a whole one")
    alpha *= r ** 0.5 if config.get('use_rslora') else 1        # alpha / sqrt(r) there (Kalajdzievski 2023)
    return dict(rank=r, alpha=float(alpha), dropout=float(dropout))


def put_on(model, how, state, folder):
    """Inject adapters and fill them; one line on the folder they come from if they do not fit."""
    try:
        check_weights(state, 'the file')
        if (how['rank'],) not in {value.shape[:1] for value in state.values()}:     # before memory is taken
            raise ValueError(f"their rank is not {how['rank']}")
        inject(model, **{key: how[key] for key in ('rank', 'alpha', 'dropout', 'targets')})
        load_adapter_state(model, state)
    except ValueError as e:
        fail(f"{folder}: its adapters are not for this model: {e}")


# ---- a run's folder with adapters ----

def load_adapted(folder, checkpoint):
    """(model, path of its base) of a run's folder with adapters: the base, with them in place."""
    if 'adapters' not in checkpoint:
        fail(f"{folder} holds no adapters: they are merged already, or it is no run of lora.py")
    model, base = load_base(folder, checkpoint)
    put_on(model, checkpoint['lora'], checkpoint['adapters'], folder)
    return model, base


def load_plain(run, config):
    """(model, tokenizer, what a checkpoint says of it): the base that new adapters are put on."""
    source = config['init_from']
    model, tokenizer, checkpoint = load_start(run, {**config, 'dropout': 0.0})      # that is the adapters'
    if checkpoint and 'adapters' in checkpoint:
        fail(f"{source} holds adapters itself: merge them first, with --out_dir={source} --merge_to=FOLDER")
    base = source
    if os.path.exists(source):
        try:
            base = os.path.relpath(source, config['out_dir'])       # so that both may move together
        except ValueError:                                          # on another drive there is no such path
            base = os.path.abspath(source)
    return model, tokenizer, dict(base=base, base_fingerprint=fingerprint(model.state_dict()))


def load_adaptable(run, config):
    """(model, tokenizer, checkpoint, what a checkpoint says besides the adapters): init_from with new
    adapters, or to resume out_dir with its own."""
    if config['init_from'] == 'resume':
        checkpoint = load_checkpoint(config['out_dir'])
        model, _ = load_adapted(config['out_dir'], checkpoint)
        about = {key: checkpoint[key] for key in ('lora', 'base', 'base_fingerprint')}
        return model.to(run.device), load_tokenizer(config['out_dir']), checkpoint, about
    model, tokenizer, about = load_plain(run, config)
    how = {key: config[key] for key in ('rank', 'alpha', 'dropout', 'targets')}
    try:
        torch.manual_seed(config['seed'])               # every rank draws the same A
        inject(model, **how)
        torch.manual_seed(config['seed'] + run.rank)    # and its own dropout
    except ValueError as e:
        fail(f"--{e}")
    return model, tokenizer, None, dict(about, lora=how)


def merge_run(run, out_dir, folder):
    """Write the model of out_dir into a folder, its adapters merged: a run like any other."""
    checkpoint = load_checkpoint(out_dir)
    model, base = load_adapted(out_dir, checkpoint)
    for taken in (out_dir, base):
        if os.path.realpath(folder) == os.path.realpath(taken):
            fail(f"--merge_to={folder} would overwrite {taken}: choose another folder")
    refuse_model(folder, 'merge_to')
    make_folder(folder)
    save_checkpoint(run, folder, load_tokenizer(out_dir), model.config, model=merge(model).state_dict(),
                    step=checkpoint['step'], settings=checkpoint['settings'])
    print(f"wrote {folder}: {base} with the adapters of {out_dir} merged into it")


def export_peft(out_dir, folder):
    """Write the adapters of out_dir into a folder in PEFT's layout, with their base in folder/base unless
    transformers can load it where it is."""
    beside = os.path.join(folder, 'base')
    for taken in (folder, beside):
        refuse_model(taken, 'to_peft')
    if not importlib.util.find_spec('safetensors'):
        fail("--to_peft needs a package: pip install safetensors")
    checkpoint, tokenizer = load_checkpoint(out_dir), load_tokenizer(out_dir)
    model, base = load_adapted(out_dir, checkpoint)
    path = os.path.join(base, 'config.json')
    if base in OFFICIAL:
        base = f'openai-community/{base}'
    else:
        if (not os.path.isfile(path) or os.path.isfile(os.path.join(base, 'ckpt.pt'))
                or read_json(path)['model_type'] == 'minimind'):
            export(load_base(out_dir, checkpoint)[0], tokenizer, base := beside)
        base = os.path.abspath(base)            # a relative path would start at the reader's current folder
    write_peft(model, folder, base, model.config.model_type)
    tokenizer.save(folder)                      # peft looks for one here, then on the internet
    print(f"wrote {folder}, which AutoPeftModelForCausalLM.from_pretrained of peft loads over {base}; when "
          f"you move that, change base_model_name_or_path in adapter_config.json")


def import_peft(run, config, source):
    """Put the adapters of PEFT's or MiniMind's on init_from, as a run in out_dir that can be resumed."""
    refuse_model(config['out_dir'], 'out_dir')
    model, tokenizer, about = load_plain(run, config)
    how = read_peft(model, source)
    make_folder(config['out_dir'])
    save_checkpoint(run, config['out_dir'], tokenizer, model.config, adapters=adapter_state(model), **about,
                    lora=how, step=0, position=0, counted=0, lowest=math.inf, scaler={},
                    optimizers=[dict(state={})], settings={**config, **how, 'from_peft': ''})
    print(f"took the adapters of {source} on top of {config['init_from']} to {config['out_dir']}")


if __name__ == '__main__':
    config = configure(globals(), {
        '!merge_to': 'rank alpha targets dropout', '!to_peft': 'rank alpha targets dropout',
        '!from_peft': 'rank alpha targets dropout merge_to to_peft'}, rank=at_least(1), alpha=above(0))
    run = start_run(device, dtype, seed)
    if to_peft:
        export_peft(out_dir, to_peft)
    if merge_to:
        merge_run(run, out_dir, merge_to)
    if from_peft:
        import_peft(run, config, from_peft)
    if to_peft or merge_to or from_peft:
        sys.exit()
    model, tokenizer, checkpoint, about = load_adaptable(run, config)
    meta, train, val = open_data(run, dataset, 'sft', tokenizer)
    rows, val_rows, val_docs, what = open_rows(run, config, train, val)
    training = Training(run, config, model, tokenizer, len(rows.rows), what, checkpoint,
                        lambda: dict(adapters=adapter_state(model), **about))

    model.train()
    for _ in training:
        if training.due:
            loss = held_out_loss(model, run, val_rows, batch_size, eval_iters)
            training.evaluated(f"held-out loss {loss:.4f}", val_loss=loss)
        step_rows = rows.read(training.position, training.rows)
        for x, y, segments in training.micro_batches(step_rows, rows.batch):
            with run.autocast():
                loss = model(x, y, segments=segments)[1]
                aux = model.auxiliary_loss(y != -100)
            n = (y != -100).sum()                                           # a mean times n is a sum
            training.backward((loss + aux) * n, loss=loss * n)
        training.update(tokens=rows.tokens(step_rows))
    if training.finished and report_size:
        print(write_report(out_dir, model, tokenizer, val, val_docs, report_size, max_new_tokens))
    training.close(f"the adapters are in {out_dir}: python sample.py --out_dir={quote(out_dir)} --chat")
