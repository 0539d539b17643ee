"""
Adapt a model with low-rank adapters: train a few hundredths of its parameters (tutorial chapter II-11).

    y = W x + alpha/r * B A x       W (out, in) frozen; A (r, in), B (out, r) trained  (Hu et al. 2021, eq. 3)

B starts at zero, so training starts at the very model it adapts. Adapters are saved alone, in a run's folder
that names their base, and sample.py speaks from it directly. Merged, W + alpha/r * B A, they cost nothing.

    python lora.py                                  # offline: `reason`, on top of out/sft -> out/lora
    python lora.py --targets=q_proj,o_proj --rank=16        # the chapter's: MiniMind's square layers
    python lora.py --merge_to=out/merged            # out/lora inside its base: a run like any other
    python lora.py --to_peft=out/peft               # out/lora in PEFT's layout, and back:
    python lora.py --from_peft=out/peft --init_from=out/sft --out_dir=out/again

It is sft.py but for what trains: loss, rows and report are imported from there.
"""
import json
import math
import os
import sys
import time
from dataclasses import asdict

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F

from configurator import (MetricsLog, StopSignal, clock, configure, data_parallel, fail, fingerprint,
                          keep_settings, learning_rate_at, load_checkpoint, make_folder, restore_rng,
                          save_checkpoint, start_run)
from model_gpt2 import GPT2
from prepare import data_folder, load_tokenizer, prepare_missing, read_meta, read_split
from sample import load_run
from sft import Rows, held_out_loss, learnable, to_device, write_report

# the run
out_dir = 'out/lora'            # where adapters, tokenizer, metrics, picture and report go
init_from = 'out/sft'           # the base: a run's or Hugging Face folder, or 'gpt2', ...; or 'resume'
max_iters = 150                 # optimizer steps
eval_interval = 50              # save and measure the held-out loss every so many steps
eval_iters = 50                 # batches of held-out conversations to measure on, at most
log_interval = 10               # print a line every so many steps
report_size = 48                # held-out conversations to answer for report.json, at the end
max_new_tokens = 80             # longest answer in it, in tokens
seed = 1337                     # of A, the order of the data, dropout
wandb_log = False               # log to Weights & Biases too
# instead of training
merge_to = ''                   # write out_dir's model here with its adapters merged, and stop
to_peft = ''                    # write out_dir's adapters here in PEFT's layout, and stop
from_peft = ''                  # take adapters in PEFT's layout from here into out_dir, and stop
# the data
dataset = 'reason'              # name in data/, or a path; a built-in one is prepared when missing
layout = 'packed'               # 'packed', 'bucketed' or 'padded', as in sft.py
batch_size = 16                 # rows in a micro-batch
gradient_accumulation_steps = 1 # micro-batches in a step, over all ranks together
block_size = 256                # tokens in a row; what is longer is cut
# the adapters
rank = 8                        # r
alpha = 16.0                    # over the rank, it scales B A; a larger one acts as a higher learning rate
targets = 'all'                 # names of layers, with commas; 'all': those of attention and feed-forward
dropout = 0.0                   # share of an adapter's input dropped while training
# the optimizer
learning_rate = 5e-3            # highest, of AdamW
min_lr = 5e-4                   # at the end of the cosine
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
    """Put an adapter on every linear layer with a name in `targets`, in place, and freeze everything else.

    targets  'all', or last names of layers with commas between: 'q_proj,o_proj' are the chapter's, which
             takes whatever is square. Named, they stay the same layers in a model of other shapes. A
             mixture's experts are stacks and no linear layers: they stay frozen.
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
    for name in sorted(own.keys() ^ state.keys()):
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
    except Exception as e:                      # of json, or SafetensorError, which is no ValueError
        fail(f"{folder}: its adapters are damaged ({type(e).__name__}: {str(e)[:80]})")
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


# ---- a run's folder with adapters ----

def save_adapters(run, out_dir, model, how, base, base_weights, words, **more):
    """Write the adapters into a run's folder, with the base they belong to and `how` they were injected."""
    # a folder is named from here, so that both may move together
    named = os.path.relpath(base, out_dir) if os.path.isdir(base) else base
    save_checkpoint(run, out_dir, words, adapters=adapter_state(model), lora=how, base=named,
                    base_fingerprint=base_weights, model_config=asdict(model.config),
                    model_type='gpt2' if isinstance(model, GPT2) else 'minimind', **more)


def load_base(source):
    """(model, tokenizer, fingerprint) of what adapters are put on."""
    model, words, checkpoint = load_run(source)
    if checkpoint and 'adapters' in checkpoint:
        fail(f"{source} holds adapters itself: merge them first, with --out_dir={source} --merge_to=FOLDER")
    return model, words, fingerprint(model.state_dict())


def load_adapted(folder, checkpoint):
    """(model, path of its base) of a run's folder with adapters: the base, with them in place."""
    if 'adapters' not in checkpoint:
        fail(f"{folder} holds no adapters: they are merged already, or it is no run of lora.py")
    base = os.path.normpath(os.path.join(folder, checkpoint['base']))
    base = base if os.path.isdir(base) else checkpoint['base']
    model, _, weights = load_base(base)
    if weights != checkpoint['base_fingerprint']:
        fail(f"{folder} holds adapters for another base than {base}: its weights are not those they were "
             f"trained on")
    inject(model, **checkpoint['lora'])
    load_adapter_state(model, checkpoint['adapters'])
    return model.eval(), base


if __name__ == '__main__':
    config = configure(globals(), layout=('packed', 'bucketed', 'padded'), report_size=0, max_new_tokens=1,
                       rank=1, alpha=0)
    stop = StopSignal()
    run = start_run(device, dtype, seed)
    master = run.rank == 0

    # instead of training
    if merge_to or to_peft:
        checkpoint = load_checkpoint(out_dir)
        model, source = load_adapted(out_dir, checkpoint)
        if to_peft:
            write_peft(model, to_peft, source, checkpoint['model_type'])
            print(f"wrote the adapters of {out_dir} to {to_peft}; their base is {source}")
        if merge_to:
            for taken in (out_dir, source):
                if os.path.realpath(merge_to) == os.path.realpath(taken):
                    fail(f"--merge_to={merge_to} would overwrite {taken}: choose another folder")
            make_folder(merge_to)
            save_checkpoint(run, merge_to, load_tokenizer(out_dir), model=merge(model).state_dict(),
                            **{key: checkpoint[key] for key in ('step', 'settings', 'model_type',
                                                                'model_config')})
            print(f"merged {out_dir} into {source}; the model is in {merge_to}")
        sys.exit()

    # model
    checkpoint = load_checkpoint(out_dir) if init_from == 'resume' else None
    if checkpoint:
        model, source = load_adapted(out_dir, checkpoint)
        words, base_weights = load_tokenizer(out_dir), checkpoint['base_fingerprint']
    else:
        source = init_from
        model, words, base_weights = load_base(source)
    if from_peft:
        how = read_peft(model, from_peft)
        make_folder(out_dir)
        save_adapters(run, out_dir, model, how, source, base_weights, words, step=0,
                      settings={**config, **how, 'from_peft': ''})
        print(f"took the adapters of {from_peft} on top of {source} to {out_dir}")
        sys.exit()
    if block_size > model.config.context:
        fail(f"--block_size={block_size} is more than the context of {source}, {model.config.context}")
    how = checkpoint['lora'] if checkpoint else dict(rank=rank, alpha=alpha, dropout=dropout, targets=targets)
    if not checkpoint:
        try:
            torch.manual_seed(seed)                 # every rank draws the same A
            inject(model, **how)
            torch.manual_seed(seed + run.rank)      # and its own dropout
        except ValueError as e:
            fail(f"--{e}")
    model.to(run.device)

    # data
    prepare_missing(run, dataset, source if os.path.isdir(source) else 'gpt2')
    meta = read_meta(dataset, 'sft')
    if meta['tokenizer'] != words.fingerprint:
        fail(f"{data_folder(dataset)} was tokenised otherwise than {source}: run `python prepare.py "
             f"--dataset={dataset} --tokenizer={source if os.path.isdir(source) else 'gpt2'}`"
             + (f" with --input={meta['source']}" if os.path.exists(meta['source']) else ""))
    train, val = read_split(dataset, 'train'), read_split(dataset, 'val')
    per_step = batch_size * gradient_accumulation_steps         # rows of a step; the ranks share them out
    if per_step < run.world_size:
        fail(f"batch_size x gradient_accumulation_steps = {per_step} rows, but {run.world_size} ranks")
    docs, n_cut, n_lost = learnable(train, block_size)
    val_docs = learnable(val, block_size)[0]
    if not len(docs) or not len(val_docs):
        fail(f"{data_folder(dataset)}: no answer is left within --block_size={block_size} tokens; raise it")
    rows = Rows(train, docs, block_size, layout, seed, per_step)
    val_rows = Rows(val, val_docs, block_size, layout)

    # optimizer
    named = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([dict(params=[p for p in named if p.dim() >= 2], weight_decay=weight_decay),
                                   dict(params=[p for p in named if p.dim() < 2], weight_decay=0.0)],
                                  lr=learning_rate, betas=(0.9, 0.95), fused=True)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    first_step = 0
    if init_from == 'resume':
        keep_settings(config, checkpoint, 'weight_decay', 'rank', 'alpha', 'targets', 'dropout')
        first_step = checkpoint['step']
        optimizer.load_state_dict(checkpoint['optimizer'])
        scaler.load_state_dict(checkpoint['scaler'])
        restore_rng(run, checkpoint['rng'], first_step)
        if first_step >= max_iters:
            fail(f"{out_dir} is at step {first_step} of max_iters={max_iters}: raise --max_iters to go on")
    compiled = torch.compile(model) if compile else model
    wrapped = compiled
    if run.world_size > 1:
        wrapped = data_parallel(compiled)

    # say what is about to happen
    log = None
    if master:
        make_folder(out_dir)
        log = MetricsLog(out_dir, first_step, wandb_log, config)
        fill = rows.lengths[docs].sum() / len(rows.rows) / block_size
        total, trained = sum(p.numel() for p in model.parameters()), sum(p.numel() for p in named)
        print(f"{total:,} parameters, {trained:,} of them trained ({trained / total:.2%})")
        print(f"{len(docs):,} conversations in "
              f"{len(rows.rows):,} rows {layout} ({100 * fill:.0f}% of block_size in use): "
              f"{max_iters * per_step / len(rows.rows):.1f} epochs in {max_iters:,} steps "
              f"on {run.world_size} x {run.device.type} in {str(run.dtype)[6:]}", flush=True)
        if n_cut:
            left_out = meta['train']['documents'] - len(docs)
            print(f"{n_cut:,} conversations are cut to block_size={block_size}: {n_lost:,} answers are lost "
                  f"whole, {left_out:,} conversations left out, as nothing of an answer remains")

    # train
    began = time.time()
    seconds, since, useful, eval_seconds = 0.0, 0, 0, 0.0       # since the last line; of an evaluation
    wrapped.train()
    for step in range(first_step, max_iters + 1):
        clock_start = time.time()
        mine = rows.of_step(step)
        useful += sum(rows.lengths[row].sum().item() for row in mine)
        mine = mine[run.rank::run.world_size]
        batches = [rows.batch(mine[i:i + batch_size]) for i in range(0, len(mine), batch_size)]
        # all ranks agree on the number of targets, and on whether to stop
        n_targets, stopping = run.sum(sum((y != -100).sum().item() for _, y, _ in batches), stop.signal > 0)

        due = step % eval_interval == 0 or step == max_iters
        if step > first_step and (due or stopping):
            save_adapters(run, out_dir, model, how, source, base_weights, words, step=step, settings=config,
                          optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        if stopping:
            break
        if due:
            loss = held_out_loss(compiled, run, val_rows, batch_size, eval_iters)
            if master:
                log.write(step=step, val_loss=loss)
                print(f"step {step:6,}  held-out loss {loss:.4f}", flush=True)
            eval_seconds, clock_start = time.time() - clock_start, time.time()
        if step == max_iters:
            break

        lr = learning_rate_at(step, learning_rate, min_lr, warmup_iters, max_iters)
        for group in optimizer.param_groups:
            group['lr'] = lr
        total = torch.zeros((), device=run.device)
        for i, batch in enumerate(batches):
            x, y, segments = to_device(batch, run.device)
            if run.world_size > 1:
                wrapped.require_backward_grad_sync = i == len(batches) - 1      # sum over ranks once
            with run.autocast():
                loss = wrapped(x, y, segments=segments)[1] * (y != -100).sum()  # mean -> sum over the targets
            # to log: without what a mixture of experts adds to it, as the held-out loss is
            total += loss.detach() - getattr(model, 'aux_loss', 0.0) * (y != -100).sum()
            # DDP averages gradients over ranks; times world_size that is the sum which the loss asks for
            scaler.scale(loss * (run.world_size / max(1, n_targets))).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        scaler.update()

        seconds, since = seconds + time.time() - clock_start, since + 1
        if step % log_interval == 0 or step == max_iters - 1:
            loss = run.sum(total.item())[0] / max(1, n_targets)
            if master:
                left = (max_iters - 1 - step) * seconds / since
                evals = (max_iters - 1) // eval_interval - step // eval_interval + 1
                log.write(step=step, loss=loss, lr=lr, grad_norm=norm.item(),
                          tokens_per_second=useful / seconds)
                print(f"step {step:6,}/{max_iters:,}  loss {loss:.4f}  lr {lr:.2e}  grad norm {norm:.2f}  "
                      f"{useful / seconds:,.0f} tokens/s less padding  "
                      f"{clock(left + evals * eval_seconds)} left", flush=True)
            seconds, since, useful = 0.0, 0, 0

    if master:
        log.draw()
        if stopping:
            saved = f"saved in {out_dir}; go on with --init_from=resume" if step else "nothing to save yet"
            print(f"stopped at step {step:,}; {saved}")
        else:
            if report_size:
                some = val_docs[::math.ceil(len(val_docs) / report_size)]
                path = os.path.join(out_dir, 'report.json')
                print(write_report(path, model, words, val, some, max_new_tokens))
            print(f"done in {clock(time.time() - began)}; the adapters are in {out_dir}: python sample.py "
                  f"--out_dir={out_dir} --chat")
    run.barrier()
    if run.world_size > 1:
        dist.destroy_process_group()
    sys.exit(128 + stop.signal if stopping else 0)
