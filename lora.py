"""
Adapt a model with low-rank adapters: train about a thirtieth of its parameters (tutorial chapter II-11).

    y = W x + alpha/r * B A x       W (out, in) frozen; A (r, in), B (out, r) trained  (Hu et al. 2021, eq. 3)

B starts at zero, so training starts at the very model it adapts. Adapters are saved alone, in a run's folder
that names their base, and sample.py speaks from it directly. Merged, W + alpha/r * B A, they cost nothing.
"""
import json
import os

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import fail, make_folder

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
    """Put an adapter on every linear layer with a name in `targets`, in place, and freeze everything else.

    targets  'all', or last names of layers with commas between: 'q_proj,o_proj' are the chapter's, which
             takes whatever is square. Named, they stay the same layers in a model of other shapes.
    ValueError where a name fits no layer, or the model has adapters already.
    """
    if adapters(model):
        raise ValueError("the model has adapters already; merge them first")
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    known = sorted({name.split('.')[-1] for name in linear if '.' in name})
    wanted = [name for name in ALL if name in known] if targets == 'all' else targets.split(',')
    for name in wanted:
        if name not in known:
            raise ValueError(f"targets: no linear layer is called {name!r}; there are {', '.join(known)}")
    model.requires_grad_(False)
    for name, layer in linear.items():
        parent, _, last = name.rpartition('.')
        if last in wanted:
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
    return {f'{name}.{part}': getattr(layer, part).detach().cpu()
            for name, layer in adapters(model).items() for part in ('lora_A', 'lora_B')}


@torch.no_grad()
def load_adapter_state(model, state):
    """Fill the injected adapters; ValueError where names or shapes are others."""
    own = adapter_state(model)
    for name in own.keys() ^ state.keys():
        raise ValueError(f"adapter {name} is in {'the file' if name in state else 'the model'} alone")
    for name, layer in adapters(model).items():
        for part in ('lora_A', 'lora_B'):
            new, old = state[f'{name}.{part}'], getattr(layer, part)
            if new.shape != old.shape:
                raise ValueError(f"adapter {name}.{part} is {tuple(new.shape)}, not {tuple(old.shape)}")
            old.copy_(new)


# ---- PEFT's layout ----

PEFT_PREFIX = 'base_model.model.'       # before a layer's name in adapter_model.safetensors


def safetensors():
    try:
        import safetensors.torch
    except ImportError:
        fail("PEFT's layout needs a package: pip install safetensors")
    return safetensors.torch


def write_peft(model, folder, base, model_type):
    """Write a model's adapters as adapter_config.json and adapter_model.safetensors, for `peft` to load over
    the base in Hugging Face's layout."""
    layers = adapters(model)
    layer = next(iter(layers.values()))
    rank = layer.lora_A.size(0)
    config = dict(peft_type='LORA', task_type='CAUSAL_LM', base_model_name_or_path=base, r=rank,
                  lora_alpha=layer.scale * rank, lora_dropout=layer.dropout.p, bias='none',
                  target_modules=sorted({name.split('.')[-1] for name in layers}),
                  fan_in_fan_out=model_type == 'gpt2')      # its matrices are transposed there
    make_folder(folder)
    with open(os.path.join(folder, 'adapter_config.json'), 'w', encoding='utf-8') as f:
        json.dump(config, f, indent=2)
    state = {f'{PEFT_PREFIX}{name}.weight': t.contiguous() for name, t in adapter_state(model).items()}
    safetensors().save_file(state, os.path.join(folder, 'adapter_model.safetensors'))


def read_peft(model, folder):
    """Inject the adapters of a folder in PEFT's layout into a model. Returns the arguments of `inject`."""
    try:
        with open(os.path.join(folder, 'adapter_config.json'), encoding='utf-8') as f:
            config = json.load(f)
        state = safetensors().load_file(os.path.join(folder, 'adapter_model.safetensors'))
    except OSError as e:
        fail(f"{folder} holds no adapters in PEFT's layout ({e.filename or e}: {e.strerror})")
    for key in ('use_dora', 'use_rslora', 'rank_pattern', 'alpha_pattern', 'modules_to_save'):
        if config.get(key):
            fail(f"{folder}/adapter_config.json: {key} is set, and is not supported here; plain LoRA is")
    state = {name.removeprefix(PEFT_PREFIX).removesuffix('.weight'): t for name, t in state.items()}
    targets = ','.join(sorted({name.split('.')[-2] for name in state}))
    how = dict(rank=config['r'], alpha=float(config['lora_alpha']), dropout=float(config['lora_dropout']),
               targets=targets)
    try:
        inject(model, **how)
        load_adapter_state(model, state)
    except ValueError as e:
        fail(f"{folder}: its adapters are not for this model: {e}")
    return how
