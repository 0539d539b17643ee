"""
Pretrain a language model on text: predict each token from those before it (tutorial chapters I-5 and II-8).

    loss = -1/N  sum over N targets of  log p(token | tokens before it)

N counts the targets of the whole step, over its micro-batches and ranks: how they are cut does not matter.

    python pretrain.py                            # offline, minutes on a laptop: tokenizer, data, training
    python pretrain.py --batch_size=8 --max_iters=20
    python pretrain.py --init_from=resume               # after Ctrl-C, a crash, or to go on
    torchrun --nproc_per_node=4 pretrain.py --dataset=mytext --gradient_accumulation_steps=16

What to expect: the loss starts near ln(vocabulary), falls fast while the frequencies of words are learned,
then ever slower. Bits per byte compare models of different tokenizers. A held-out loss that rises while the
training loss falls is overfitting, for which more text helps, a smaller model, or some dropout.
"""
import functools
import math
import os
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import torch
import torch.distributed as dist

from configurator import (HERE, MetricsLog, StopSignal, clock, configure, data_parallel, fail, keep_settings,
                          learning_rate_at, make_folder, restore_rng, save_checkpoint, start_run)
from model_gpt2 import GPT2, GPT2Config
from model_minimind import MiniMind, MiniMindConfig
from prepare import data_folder, load_tokenizer, prepare_missing, read_meta, read_split
from sample import generate, load_run, stop_ids

# the run
out_dir = 'out/pretrain'        # where checkpoint, tokenizer, metrics and picture go
init_from = 'scratch'           # 'scratch', 'resume' (in out_dir), a run's or Hugging Face folder, 'gpt2'
max_iters = 320                 # optimizer steps
eval_interval = 160             # save, measure the held-out loss and print a sample every so many steps
eval_iters = 200                # batches of held-out text to measure on, at most
log_interval = 10               # print a line every so many steps
prompt = 'def is_'              # what that sample continues
seed = 1337                     # of the weights, the order of the data, dropout
wandb_log = False               # log to Weights & Biases too
# the data
dataset = 'pydoc'               # name in data/, or a path; a built-in one is prepared when missing
tokenizer = ''                  # what the data must be tokenised with: a folder or 'gpt2'; '' takes its own
batch_size = 16                 # rows in a micro-batch
gradient_accumulation_steps = 1 # micro-batches in a step, over all ranks together
block_size = 256                # tokens in a row: the context
stride = 0                      # tokens from row to row (chapter I-1); 0 tiles the text anew each epoch
# the model, when from scratch: any other brings all of this itself, but for dropout
model = 'minimind'              # 'minimind' or 'gpt2'
n_layer = 4                     # blocks
n_head = 4                      # query heads
n_kv_head = 2                   # minimind: key and value heads; n_head is multi-head, 1 is multi-query
n_embd = 256                    # width
intermediate_size = 0           # minimind: width inside the feed-forward; 0 is 8/3 n_embd, up to 64
qk_norm = True                  # minimind: RMSNorm on queries and keys
qkv_bias = True                 # gpt2: biases on queries, keys and values
positions = 'learned'           # gpt2: 'learned' or 'sinusoidal'
init_std = 0.02                 # gpt2: standard deviation of new weights; 0 is PyTorch's own initialisation
tie_word_embeddings = True      # the output head shares the embedding's weights
dropout = 0.0                   # share of activations dropped while training
use_moe = False                 # feed-forwards become mixtures of experts (chapter II-6)
num_experts = 4                 # routed experts in a layer
num_experts_per_tok = 2         # how many of them each token visits
n_shared_experts = 0            # experts every token visits besides
moe_intermediate_size = 0       # width of an expert; 0: a token's experts are together as wide as one dense
norm_topk_prob = True           # weights of a token's experts sum to 1
router_aux_loss_coef = 0.02     # weight of the load-balancing loss
seq_aux = True                  # balance within each row, not over the micro-batch as a whole
# the optimizer
optimizer = 'muon'              # 'muon' for matrices and AdamW for the rest, or 'adamw' for all
learning_rate = 1e-2            # highest; with AdamW alone 2e-3 is better
min_lr = 3e-4                   # at the end of the cosine
warmup_iters = 20               # steps of linear warmup
weight_decay = 0.1              # on matrices only
grad_clip = 1.0                 # longest gradient; 0 is no limit
# the machine
device = 'auto'                 # 'auto' takes cuda, then mps, then cpu
dtype = 'auto'                  # 'float32', 'bfloat16' or 'float16'; 'auto' is bfloat16 where that is fast
compile = False                 # torch.compile: slow to start, faster on a GPU

SHAPE = ('model', 'n_layer', 'n_head', 'n_kv_head', 'n_embd', 'intermediate_size', 'qk_norm', 'qkv_bias',
         'positions', 'tie_word_embeddings', 'use_moe', 'num_experts', 'num_experts_per_tok',
         'n_shared_experts', 'moe_intermediate_size', 'norm_topk_prob', 'router_aux_loss_coef', 'seq_aux',
         'optimizer', 'weight_decay')


# ---- batches ----

@functools.lru_cache(maxsize=2)
def window_starts(n_tokens, block_size, seed, epoch, stride=0):
    """Where each row of an epoch starts: windows that tile the text, shuffled, and shifted anew each epoch.
    It is a function of its arguments alone, so there is no sampler state to lose. 8 bytes a window.

    With a stride they are chapter I-1's: one every `stride` tokens, the same in each epoch, shuffled."""
    windows = max(1, (n_tokens - 1) // block_size - 1)
    rng = np.random.default_rng([seed, epoch])
    if stride:
        return rng.permutation(np.arange(0, max(1, n_tokens - block_size), stride))
    shift = rng.integers(max(1, n_tokens - windows * block_size))
    return shift + block_size * rng.permutation(windows)


def step_starts(n_tokens, block_size, seed, step, rows, stride=0):
    """Where the rows of a step start: rows [step * rows, (step + 1) * rows) of an endless run of epochs."""
    windows = len(window_starts(n_tokens, block_size, seed, 0, stride))
    return [window_starts(n_tokens, block_size, seed, i // windows, stride)[i % windows]
            for i in range(step * rows, (step + 1) * rows)]


def batch_at(split, starts, block_size):
    """Rows of tokens and their targets, the token that follows each: two (B, T) int64 tensors.

    Targets are -100, ignored, where the mask is 0 and beyond the end of the text."""
    x = np.zeros((len(starts), block_size), dtype=np.int64)
    y = np.full((len(starts), block_size), -100, dtype=np.int64)
    for row, at in enumerate(starts):
        tokens = split.tokens[at:at + block_size + 1].astype(np.int64)
        n = len(tokens) - 1
        x[row, :n] = tokens[:-1]
        y[row, :n] = np.where(split.mask[at + 1:at + block_size + 1], tokens[1:], -100)
    return torch.from_numpy(x), torch.from_numpy(y)


def to_device(batch, device):
    if device.type == 'cuda':
        return [t.pin_memory().to(device, non_blocking=True) for t in batch]
    return [t.to(device) for t in batch]


# ---- held-out loss and a sample ----

@torch.no_grad()
def held_out_loss(model, run, split, block_size, batch_size, eval_iters):
    """Mean nats per token of a split, over at most eval_iters batches spread evenly; ranks share the work."""
    starts = range(0, len(split.tokens) - 1, block_size)
    starts = starts[::math.ceil(len(starts) / (eval_iters * batch_size))][run.rank::run.world_size]
    model.eval()
    total = count = 0
    for i in range(0, len(starts), batch_size):
        x, y = to_device(batch_at(split, starts[i:i + batch_size], block_size), run.device)
        with run.autocast():
            loss = model(x, y)[1]
        n = (y != -100).sum()
        total, count = total + loss.item() * n.item(), count + n.item()
    model.train()
    total, count = run.sum(total, count)
    return total / max(1, count)


def sample_text(model, tokenizer, prompt, device, max_new_tokens=60):
    """A short text at temperature 0.7, the same random numbers each time, so that samples compare."""
    model.eval()
    ids = [tokenizer.eot, *tokenizer.encode(prompt)][-model.config.context // 2:]
    generator = torch.Generator(device).manual_seed(0)
    new = [token.item() for token in generate(model, torch.tensor([ids], device=device), max_new_tokens,
                                              stop_ids(tokenizer), generator, vocab_size=tokenizer.vocab_size,
                                              temperature=0.7, top_p=0.95)]
    model.train()
    return prompt + tokenizer.decode(new[:-1] if new[-1] in stop_ids(tokenizer) else new)


# ---- the parts of a run ----

class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) replaces the gradient of a matrix by the nearest orthogonal matrix, so that
    no direction dominates the step. It is torch.optim.Muon, for stacks of matrices too, as experts are.

    Five Newton-Schulz steps pull all singular values near 1; 0.2 sqrt(max(m, n)) gives the step AdamW's size.
    """

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group['params']:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]['momentum_buffer'] = torch.zeros_like(p.grad)
                average = self.state[p]['momentum_buffer']
                average.lerp_(p.grad, 1 - group['momentum'])
                x = p.grad.lerp(average, group['momentum']).bfloat16()              # Nesterov's look ahead
                tall = x.size(-2) > x.size(-1)
                x = x.mT if tall else x
                x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
                p.mul_(1 - group['lr'] * group['weight_decay'])
                size = 0.2 * math.sqrt(max(p.shape[-2:]))
                p.add_(x.mT if tall else x, alpha=-group['lr'] * size)


def new_model(config, vocab_size):
    """The model of the settings, with random weights."""
    if config['model'] == 'gpt2' and config['use_moe']:
        fail("use_moe is for --model=minimind; GPT-2 has no experts")
    try:
        if config['model'] == 'gpt2':
            return GPT2(GPT2Config(
                vocab_size=vocab_size, n_positions=config['block_size'], n_embd=config['n_embd'],
                n_layer=config['n_layer'], n_head=config['n_head'], dropout=config['dropout'],
                initializer_range=config['init_std'], qkv_bias=config['qkv_bias'],
                positions=config['positions'], tie_word_embeddings=config['tie_word_embeddings']))
        own = {key: config[key] for key in MiniMindConfig.__dataclass_fields__ if key in config}
        sizes = MiniMindConfig(**own, vocab_size=vocab_size, max_position_embeddings=config['block_size'],
                               hidden_size=config['n_embd'], num_hidden_layers=config['n_layer'],
                               num_attention_heads=config['n_head'], num_key_value_heads=config['n_kv_head'])
        if sizes.use_moe and not config['moe_intermediate_size']:
            visits = sizes.num_experts_per_tok + sizes.n_shared_experts     # together as wide as one dense
            sizes.moe_intermediate_size = 8 * math.ceil(sizes.intermediate_size / visits / 8)
        return MiniMind(sizes)
    except ValueError as e:
        experts = ', --num_experts, --num_experts_per_tok, --moe_intermediate_size' * config['use_moe']
        fail(f"{e}; see --n_embd (hidden_size), --n_head, --n_kv_head{experts}")


def make_optimizers(model, optimizer, learning_rate, weight_decay):
    """Muon is made for the matrices inside the blocks; embedding, head and norms take AdamW, the norms
    without weight decay. With AdamW alone that has all.

    A mixture of experts has rates of its own. A token's k experts are averaged where the parts of a dense
    feed-forward are summed, so their last matrix moves k times as fast, or the first steps lag behind dense.
    And the router, of a few rows, takes AdamW at a tenth: it must not turn faster than experts can follow.
    """
    visits = model.config.num_experts_per_tok if getattr(model.config, 'use_moe', False) else 1
    groups = dict(adamw={}, muon={})                    # of each: (weight decay, scale) -> parameters
    for name, p in model.named_parameters():
        router = name.endswith('mlp.gate.weight')
        inside = '.layers.' in name or '.h.' in name
        kind = optimizer if inside and p.dim() >= 2 and not router else 'adamw'
        decay = weight_decay if p.dim() >= 2 and not router else 0.0
        scale = 0.1 if router else visits if name.endswith('experts.down') else 1
        groups[kind].setdefault((decay, scale), []).append(p)
    adamw, muon = ([dict(params=params, weight_decay=decay, scale=scale)
                    for (decay, scale), params in own.items()] for own in groups.values())
    optimizers = [torch.optim.AdamW(adamw, lr=learning_rate, betas=(0.9, 0.95), fused=True)]
    return optimizers + [Muon(muon, learning_rate, weight_decay)] if muon else optimizers


def draw_experts(log, out_dir):
    """Draw each expert's share of the tokens, a panel a layer, into experts.png, if matplotlib is there."""
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        return
    lines = [line for line in log.lines if 'expert_load' in line]
    layers, experts = np.shape(lines[0]['expert_load'])
    figure, panels = plt.subplots(1, layers, figsize=(2.5 * layers, 2.5), sharey=True, squeeze=False)
    for layer, axes in enumerate(panels[0]):
        axes.plot([line['step'] for line in lines], [line['expert_load'][layer] for line in lines])
        axes.axhline(1 / experts, color='grey', linestyle=':')              # the fair share
        axes.set(title=f"layer {layer}", xlabel='step', ylim=(0, None))
    panels[0, 0].set(ylabel="share of each expert")
    figure.savefig(os.path.join(out_dir, 'experts.png'), dpi=120, bbox_inches='tight')
    plt.close(figure)


if __name__ == '__main__':
    config = configure(globals(), optimizer=('muon', 'adamw'), model=('minimind', 'gpt2'), stride=0,
                       positions=('learned', 'sinusoidal'), init_std=0, intermediate_size=0,
                       moe_intermediate_size=0, num_experts=1, num_experts_per_tok=1, n_shared_experts=0,
                       router_aux_loss_coef=0)
    stop = StopSignal()
    run = start_run(device, dtype, seed)
    master = run.rank == 0

    # data
    prepare_missing(run, dataset, tokenizer or os.path.join(HERE, 'out', 'tokenizer'))
    meta = read_meta(dataset)
    words = load_tokenizer(data_folder(dataset))
    if tokenizer and load_tokenizer(tokenizer).fingerprint != words.fingerprint:
        fail(f"{data_folder(dataset)} was tokenised otherwise than by {tokenizer}: run `python prepare.py "
             f"--dataset={dataset} --tokenizer={tokenizer}`")
    train, val = read_split(dataset, 'train'), read_split(dataset, 'val')
    if not (train.mask.any() and val.mask.any()):
        fail(f"{data_folder(dataset)} holds no target to learn: run prepare.py again")
    # as much of the training text, for a loss to set beside the held-out one: dropout off in both
    seen = train._replace(tokens=train.tokens[:len(val.tokens)], mask=train.mask[:len(val.tokens)])
    rows = batch_size * gradient_accumulation_steps         # of a step; the ranks share them out
    if rows < run.world_size:
        fail(f"batch_size x gradient_accumulation_steps = {rows} rows are fewer than {run.world_size} ranks")

    # model
    checkpoint, first_step = None, 0
    if init_from == 'scratch':
        model = new_model(config, words.vocab_size)
    else:
        model, its_words, checkpoint = load_run(out_dir if init_from == 'resume' else init_from)
        if its_words.fingerprint != words.fingerprint:
            fail(f"{init_from}: its tokenizer is not the one that made {data_folder(dataset)}")
        if init_from == 'resume':
            keep_settings(config, checkpoint, *SHAPE)
        if block_size > model.config.context:
            fail(f"--block_size={block_size} is more than the context of {init_from}, {model.config.context}")
        weights = model.state_dict()
        model = type(model)(replace(model.config, dropout=dropout))
        model.load_state_dict(weights)
    model.to(run.device)
    moe = isinstance(model, MiniMind) and model.config.use_moe
    optimizers = make_optimizers(model, optimizer, learning_rate, weight_decay)
    scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
    if init_from == 'resume':
        first_step = checkpoint['step']
        for o, state in zip(optimizers, checkpoint['optimizers']):
            o.load_state_dict(state)
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
        size, tokens = sum(p.numel() for p in model.parameters()), rows * block_size
        print(f"{size:,} parameters, {len(train.tokens):,} training tokens, {tokens:,} a step: "
              f"{max_iters * tokens / len(train.tokens):.1f} epochs in {max_iters:,} steps "
              f"on {run.world_size} x {run.device.type} in {str(run.dtype)[6:]}", flush=True)

    # train
    began = time.time()
    seconds, since, eval_seconds = 0.0, 0, 0.0          # time and steps since the last line; of an evaluation
    wrapped.train()
    for step in range(first_step, max_iters + 1):
        clock_start = time.time()
        starts = step_starts(len(train.tokens), block_size, seed, step, rows, stride)
        starts = starts[run.rank::run.world_size]
        batches = [batch_at(train, starts[i:i + batch_size], block_size)
                   for i in range(0, len(starts), batch_size)]
        # all ranks agree on the number of targets, and on whether to stop
        n_targets, stopping = run.sum(sum((y != -100).sum().item() for _, y in batches), stop.signal > 0)

        due = step % eval_interval == 0 or step == max_iters
        if step > first_step and (due or stopping):
            save_checkpoint(run, out_dir, words, step=step, settings=config,
                            model_type='gpt2' if isinstance(model, GPT2) else 'minimind',
                            model_config=asdict(model.config),
                            model=model.state_dict(), scaler=scaler.state_dict(),
                            optimizers=[o.state_dict() for o in optimizers])
        if stopping:
            break
        if due:
            loss = held_out_loss(compiled, run, val, block_size, batch_size, eval_iters)
            seen_loss = held_out_loss(compiled, run, seen, block_size, batch_size, eval_iters)
            bits = loss / math.log(2) * meta['val']['tokens'] / meta['val']['bytes']
            if master:
                log.write(step=step, val_loss=loss, train_loss=seen_loss, val_bits_per_byte=bits)
                text = sample_text(model, words, prompt, run.device)
                print(f"step {step:6,}  held-out loss {loss:.4f}  training loss {seen_loss:.4f}  "
                      f"{bits:.4f} bits/byte\n    | " + text.replace('\n', '\n    | '), flush=True)
            eval_seconds, clock_start = time.time() - clock_start, time.time()
        if step == max_iters:
            break

        lr = learning_rate_at(step, learning_rate, min_lr, warmup_iters, max_iters)
        for o in optimizers:
            for group in o.param_groups:
                group['lr'] = lr * group['scale']
        total = torch.zeros((), device=run.device)
        aux_total, load = torch.zeros_like(total), 0.0      # of the mixtures of experts
        for i, batch in enumerate(batches):
            x, y = to_device(batch, run.device)
            if run.world_size > 1:
                wrapped.require_backward_grad_sync = i == len(batches) - 1      # sum over ranks once
            with run.autocast():
                loss = wrapped(x, y)[1] * (y != -100).sum()                     # mean -> sum over the targets
            total += loss.detach()
            if moe:
                aux_total += model.aux_loss * (y != -100).sum()
                load = load + model.expert_load()
            # DDP averages gradients over ranks; times world_size that is the sum which the loss asks for
            scaler.scale(loss * (run.world_size / max(1, n_targets))).backward()
        for o in optimizers:
            scaler.unscale_(o)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
        for o in optimizers:
            scaler.step(o)
            o.zero_grad(set_to_none=True)
        scaler.update()

        seconds, since = seconds + time.time() - clock_start, since + 1
        if step % log_interval == 0 or step == max_iters - 1:
            # the language loss, and the auxiliary loss apart from it
            loss, aux = (n / max(1, n_targets) for n in run.sum((total - aux_total).item(), aux_total.item()))
            experts, spread = {}, ''
            if moe:
                load = np.reshape(run.sum(*load.flatten().tolist()), load.shape)    # (layers, experts)
                load /= load.sum(axis=1, keepdims=True)
                experts = dict(aux=aux, expert_load=load.round(4).tolist())
                spread = f"aux {aux:.4f}  experts get {load.min():.3f} to {load.max():.3f}  "
            if master:
                speed = since / max(seconds, 1e-9)
                evals = (max_iters - 1) // eval_interval - step // eval_interval + 1
                log.write(step=step, loss=loss, lr=lr, grad_norm=norm.item(),
                          tokens=(step + 1) * rows * block_size, tokens_per_second=speed * rows * block_size,
                          **experts)
                print(f"step {step:6,}/{max_iters:,}  loss {loss:.4f}  lr {lr:.2e}  grad norm {norm:.2f}  "
                      f"{spread}{speed * rows * block_size:,.0f} tokens/s  "
                      f"{clock((max_iters - 1 - step) / speed + evals * eval_seconds)} left", flush=True)
            seconds, since = 0.0, 0

    if master:
        log.draw()
        if moe and any('expert_load' in line for line in log.lines):
            draw_experts(log, out_dir)
        if stopping:
            saved = f"saved in {out_dir}; go on with --init_from=resume" if step else "nothing to save yet"
            print(f"stopped at step {step:,}; {saved}")
        else:
            print(f"done in {clock(time.time() - began)}; the model is in {out_dir}: python sample.py "
                  f"--out_dir={out_dir}")
    if run.world_size > 1:
        run.barrier()               # a rank that leaves while rank 0 still draws is aborted by gloo
        dist.destroy_process_group()
    sys.exit(128 + stop.signal if stopping else 0)
