"""
The training loop, told once for all stages, and pretraining: predict each token from those before it
(tutorial chapters I-5 and II-8).

    loss = -1/N  sum over N targets of  log p(token | tokens before it)

N counts the targets of the whole step, over its micro-batches and ranks: how they are cut does not matter.

    python pretrain.py                            # offline, minutes on a laptop: tokenizer, data, training
    python pretrain.py --batch_size=8 --max_iters=20
    python pretrain.py --init_from=resume               # after Ctrl-C, a crash, or to go on
    torchrun --nproc_per_node=4 pretrain.py --dataset=mytext --gradient_accumulation_steps=16
    python pretrain.py train_gpt2.py                    # a config file of nanoGPT, see config/nanogpt.py

What to expect: the loss starts near ln(vocabulary), falls fast while the frequencies of words are learned,
then ever slower. Bits per byte compare models of different tokenizers. A held-out loss that rises while the
training loss falls is overfitting: take more text, a smaller model, or some dropout.

From configurator.py come settings, ranks and checkpoints, from prepare.py data, from sample.py models.
Every later stage takes from here its loop, Training, and its optimizers.
"""
import functools
import math
import re
import signal
import time
from contextlib import ExitStack, nullcontext
from shlex import quote

from configurator import (MetricsLog, at_least, check_weights, clock, configure, fail, make_folder, one_of,
                          restore_rng, save_checkpoint, start_run)

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint as recompute

from model_minimind import POSITIONS
from prepare import data_folder, open_data
from sample import MODELS, answers, blocks, evaluating, load_start
from train_tokenizer import load_tokenizer

# the run
out_dir = 'out/pretrain'        # where checkpoint, tokenizer, metrics and picture go
init_from = 'scratch'           # 'scratch', 'resume' (in out_dir), a run's or Hugging Face folder, 'gpt2'
max_iters = 320                 # optimizer steps
epochs = 0.0                    # passes over the data instead of max_iters; 0 takes max_iters
eval_interval = 160             # save, measure the held-out loss and print a sample every so many steps
always_save_checkpoint = True   # False: keep the checkpoint of the lowest held-out loss
eval_iters = 200                # batches of held-out text to measure on, at most
eval_block_size = 0             # tokens in a row whose loss is told by position at the end; 0: it is not
log_interval = 10               # print a line every so many steps
prompt = 'def is_'              # what that sample continues
seed = 1337                     # of the weights, the order of the data, dropout
wandb_log = False               # log to Weights & Biases too
# the data
dataset = 'pydoc'               # name in data/, or a path; a built-in one is prepared when missing
tokenizer = ''                  # what the data must be tokenised with: a folder or 'gpt2'; '' takes its own
batch_size = 16                 # rows in a micro-batch
gradient_accumulation_steps = 1 # micro-batches in a step, over all ranks together
block_size = 256                # tokens in a row
stride = 0                      # tokens from row to row (chapter I-1); 0 tiles the text anew each epoch
# the model, when from scratch: any other brings all of this itself, but for dropout
model = 'minimind'              # 'minimind' or 'gpt2'
context = 0                     # tokens the model can read at once; 0: as long as the rows it is given
n_layer = 4                     # blocks
n_head = 4                      # query heads
n_kv_head = 2                   # minimind: key and value heads; n_head is multi-head, 1 is multi-query
n_embd = 256                    # width
intermediate_size = 0           # minimind: width inside the feed-forward; 0 is 8/3 n_embd, up to 64
qk_norm = True                  # minimind: RMSNorm on queries and keys
positions = 'rope'              # minimind: or 'learned', 'sinusoidal', 'none', to compare (II-3, II-4)
bias = True                     # gpt2: biases, in LayerNorm too; False: none anywhere
qkv_bias = True                 # gpt2: biases on queries, keys and values
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
min_lr = -1.0                   # at the end of the cosine; -1 is a tenth of learning_rate
warmup_iters = 20               # steps of linear warmup
weight_decay = 0.1              # on matrices only
grad_clip = 1.0                 # longest gradient; 0 is no limit
# the machine
device = 'auto'                 # 'auto' takes cuda, then mps, then cpu
dtype = 'auto'                  # 'float32', 'bfloat16' or 'float16'; 'auto' is bfloat16 where that is fast
compile = False                 # torch.compile: slow to start, faster on a GPU


# ---- the loop ----

class Training:
    """What every stage does besides its lesson. A stage writes

        for step in training:                               # resumes, stops, sets the learning rate
            if training.due:
                training.evaluated(line, val_loss=...)      # its held-out loss: logged, printed, saved
            for x, y in training.micro_batches(rows, make_batch):       # this rank's share, on the device
                training.backward(loss)                     # summed over the targets of the micro-batch
            training.update(tokens=...)                     # sum over ranks, clip, step; now and then a line
        training.close(...)

    The gradient is that of the mean over all targets of the step, however rows are cut into micro-batches
    and shared out over ranks. `position` counts the rows that are read; which rows a step reads is a function
    of it and the seed. The step behind the last one only evaluates.
    """

    def __init__(self, run, config, model, tokenizer, rows, what, checkpoint=None, saved=None):
        """rows: how many of them are an epoch; what: the data in words. checkpoint: of the run to resume.
        saved: a function, what a new one holds of the model. Says what is about to happen."""
        self.run, self.config, self.model, self.tokenizer = run, config, model, tokenizer
        self.saved = saved or (lambda: dict(model=model.state_dict()))
        self.first, self.position, self.counted = 0, 0, 0
        if config['init_from'] == 'resume':
            self.first, self.position, self.counted = (checkpoint[k] for k in ('step', 'position', 'counted'))
        starts = [(f"{what} and step {self.first:,}", rows, tokenizer.fingerprint)] * run.world_size
        if run.world_size > 1:                              # machines may have disks of their own
            dist.all_gather_object(starts, starts[0])
        for rank, start in enumerate(starts):
            if start != starts[0]:
                fail(f"rank {rank} starts from {start[0]} (tokenizer {start[2]}), rank 0 from {starts[0][0]} "
                     f"({starts[0][2]}): give all machines the same data, and the same {config['out_dir']}")
        self.sharded = spread_over_ranks(run, config, model)
        self.optimizers = make_optimizers(model, config.get('optimizer', 'adamw'), config['learning_rate'],
                                          config['weight_decay'], (config['beta1'], config['beta2']))
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
        self.rows = config['batch_size'] * config['gradient_accumulation_steps']        # of a step
        self.always_save = config.get('always_save_checkpoint', True)
        self.saved_step, self.lowest, self.norms = None, math.inf, []       # norms: [(step, of its gradient)]
        if config['init_from'] == 'resume':
            self.saved_step, self.lowest = self.first, checkpoint['lowest']
            restore_optimizers(self.optimizers, checkpoint['optimizers'])
            if run.dtype == torch.float16 and checkpoint['scaler']:     # {} where the run had no float16
                self.scaler.load_state_dict(checkpoint['scaler'])
            restore_rng(run, checkpoint['rng'], self.first)
        left = config['epochs'] * rows - self.position      # rows; a thousandth of one is rounding
        self.last = config['max_iters']
        if config['epochs']:
            self.last = self.first + math.ceil(left / self.rows - 1e-3)
        if config['eval_only']:
            self.last = self.first                          # the step that only evaluates
        elif self.first >= self.last:
            fail(f"{config['out_dir']} is at step {self.first}, and ends at {self.last}: raise "
                 f"--{'epochs' if config['epochs'] else 'max_iters'} to go on")
        length = model.config.trained_length or model.config.context
        model.config.trained_length = max(length, config['block_size'])
        if config['compile']:
            model.compile()                                 # in place
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask_to_stop)
        self.log = None
        if run.rank == 0 and not config['eval_only']:
            make_folder(config['out_dir'])
            self.log = MetricsLog(config['out_dir'], self.first, config['wandb_log'], config)
        size, trained = (sum(p.numel() for p in some) for some in (model.parameters(), self.params))
        part = f", {trained:,} of them trained ({trained / size:.2%})" if trained < size else ""
        # weights that stay have no gradient: of adapters it would be another sum
        self.flops = flops_per_token(model, config['block_size']) if trained > size / 2 else 0
        steps = f"{self.last * self.rows / rows:.1f} epochs in {self.last:,} steps"
        steps += f" (by epochs={config['epochs']})" if config['epochs'] else ""
        self.say(f"{size:,} parameters{part}; {what}: {'eval_only' if config['eval_only'] else steps} on "
                 f"{run.world_size} x {run.device.type} in {str(run.dtype)[6:]}"
                 f"{', weights and moments shared out (fsdp)' if self.sharded else ''}")

    def rate(self, step):
        """The learning rate of a step."""
        how = {key: self.config[key] for key in ('learning_rate', 'min_lr', 'warmup_iters')}
        if not self.config['decay_lr']:
            return self.config['learning_rate']
        return learning_rate_at(step, **how, max_iters=self.config['lr_decay_iters'] or self.last)

    def ask_to_stop(self, number, frame):
        """Ctrl-C or SIGTERM: save and stop at the next step. A second Ctrl-C ends the run at once."""
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def say(self, line):
        if self.run.rank == 0:
            print(line, flush=True)

    def __iter__(self):
        self.began, self.evaluation_seconds = time.time(), 0.0
        self.mark = self.began, self.counted, self.first        # time, count and step of the last line
        for step in range(self.first, self.last + 1):
            self.step = step
            self.stopping = self.run.sum(self.signal > 0)[0] > 0            # all ranks agree
            if self.stopping:
                if self.always_save and self.step > self.first:
                    self.save()
                break
            self.due = self.step % self.config['eval_interval'] == 0 or self.step == self.last
            self.lr = self.rate(self.step)
            for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
                group['lr'] = self.lr * group['scale']
            self.sums, self.step_began = {}, time.time()
            if self.due:
                self.gather(True)
            yield self.step
        self.gather(True)                                   # for a report, which rank 0 writes alone

    def gather(self, all_of_it):
        """Under fsdp: hold all weights on every rank, as for an evaluation, in which each rank does what it
        likes; or again a share, and all of a block only while the ranks compute it, all together."""
        for module in self.sharded:
            if module is not self.model:            # embedding and head stay: a loss may use the head again
                module.set_reshard_after_forward(not all_of_it)
            module.unshard() if all_of_it else module.reshard()

    def evaluated(self, line, **numbers):
        """Log the numbers of an evaluation, val_loss among them, print a line of them, and save."""
        self.check_finite(**numbers)
        self.say(f"step {self.step:6,}  {line}")
        if self.log:
            self.log.write(step=self.step, **numbers)
        if self.step > self.first:                          # where it starts there is nothing new to keep
            is_lowest, self.lowest = numbers['val_loss'] < self.lowest, min(numbers['val_loss'], self.lowest)
            if self.always_save or is_lowest:
                self.save()
        self.evaluation_seconds = time.time() - self.step_began
        self.mark = self.mark[0] + self.evaluation_seconds, *self.mark[1:]      # it is no time of training

    def micro_batches(self, rows, make_batch, weigh=lambda x, y, *_: (y != -100).sum().item()):
        """Yield this rank's share of the step's rows, batch_size at a time, as tensors on the device.

        make_batch  rows -> a tuple of tensors;  weigh  how many targets it has, over which its loss is a sum
        The host does both ahead of a GPU, which still works on the step before: no step waits for it.
        """
        if self.step == self.last:
            return
        self.gather(False)
        mine, size = rows[self.run.rank::self.run.world_size], self.config['batch_size']
        batches = [make_batch(mine[i:i + size]) for i in range(0, len(mine), size)]
        self.total_weight = self.run.sum(sum(weigh(*batch) for batch in batches))[0] or 1
        for batch in batches:
            yield to_device(batch, self.run.device)

    def backward(self, loss, /, **sums):
        """Add the gradient of a loss that is summed over the targets of a micro-batch. sums: more such sums,
        to log; a `loss` among them is logged in place of what is differentiated."""
        for name, value in {'loss': loss, **sums}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach()
        mean_over = self.run.world_size if self.sharded else 1          # fsdp takes a mean over the ranks
        self.scaler.scale(loss * (mean_over / self.total_weight)).backward()

    def update(self, **count):
        """Take the step. count: tokens=, pairs= or texts=, how many of them it had on all ranks."""
        if self.step == self.last:
            return
        if self.run.world_size > 1 and not self.sharded:    # once a step, over all micro-batches
            for p in self.params:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            for work in [dist.all_reduce(p.grad, async_op=True) for p in self.params]:
                work.wait()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.params, self.config['grad_clip'] or math.inf))
        self.norms.append((self.step, norm))
        overflow = self.scaler.is_enabled() and not norm.isfinite()     # float16: then no optimizer steps
        for optimizer in self.optimizers:
            if not overflow:
                with self.run.autocast():
                    self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        (unit, number), = count.items()
        self.position, self.counted = self.position + self.rows, self.counted + number
        if self.step % self.config['log_interval'] == 0 or self.step == self.last - 1:
            self.check_finite()
            self.print_line(unit, norm.item())

    def check_finite(self, **losses):
        """End a run that has diverged, before its weights are saved or logged: one line, exit code 1.

        float16 skips steps of infinite gradients and lowers its scale; it has diverged when that is used up.
        The norms of the gradients are looked at only here, as a GPU would have to be waited for at each step.
        """
        norms, self.norms = self.norms, []
        found = [(step, f"norm of the gradient is {norm:.2g}") for step, norm in norms if not norm.isfinite()]
        if self.scaler.is_enabled():
            found = found[-1:] if self.scaler.get_scale() < 1e-6 else []
        found += [(self.step, f"{name} is {n}") for name, n in losses.items() if not math.isfinite(n)]
        if found:
            step, what = found[0]
            kept = ("nothing is saved yet: start again" if self.saved_step is None else
                    f"step {self.saved_step:,} is still good in {self.config['out_dir']}: --init_from=resume")
            fail(f"step {step:,}: the {what} at a learning rate of {self.rate(step):.2e}, the run has "
                 f"diverged; {kept} with a lower --learning_rate", code=1)

    def print_line(self, unit, norm):
        """Log and print the means of the step's sums, the speed since the last line, and the time left."""
        means = {name: np.reshape(self.run.sum(*value.flatten().tolist()), value.shape) / self.total_weight
                 for name, value in self.sums.items()}
        (began, counted, step), self.mark = self.mark, (time.time(), self.counted, self.step + 1)
        seconds, steps, interval = self.mark[0] - began, self.mark[2] - step, self.config['eval_interval']
        speed = (self.counted - counted) / seconds
        mfu = speed * self.flops / (peak_flops(self.run) or math.inf) if unit == 'tokens' else 0
        evaluations = (self.last - 1) // interval - self.step // interval + 1
        left = (self.last - self.mark[2]) * seconds / steps + evaluations * self.evaluation_seconds
        if self.run.rank == 0:
            self.log.write(step=self.step, **{name: value.tolist() for name, value in means.items()},
                           lr=self.lr, grad_norm=norm, **{unit: self.counted, f'{unit}_per_second': speed},
                           **dict(mfu=mfu) if mfu else {})
            shown = [f"{name.replace('_', ' ')} {value.min():.4f}"
                     + f" to {value.max():.4f}" * (value.ndim > 0) for name, value in means.items()]
            print(f"step {self.step:6,}/{self.last:,}  {'  '.join(shown)}  lr {self.lr:.2e}  "
                  f"grad norm {norm:.2f}  {speed:,.0f} {unit}/s  "
                  f"{f'mfu {mfu:.1%}  ' if mfu else ''}{clock(left)} left", flush=True)

    def save(self):
        """Write ckpt.pt, the same whatever the ranks hold: under fsdp rank 0 gathers all of it in its memory
        on the host, of weights and moments a tensor at a time, so that must have room for the whole."""
        self.check_finite()
        self.saved_step = self.step
        state = dict(optimizers=[optimizer.state_dict() for optimizer in self.optimizers], **self.saved())
        if self.sharded:
            def collect(x):
                x = whole(x)
                return None if self.run.rank else x.cpu() if torch.is_tensor(x) else x
            state = tree_map(collect, state)
        save_checkpoint(self.run, self.config['out_dir'], self.tokenizer, self.model.config, step=self.step,
                        position=self.position, counted=self.counted, lowest=self.lowest,
                        scaler=self.scaler.state_dict(), settings=self.config, **state)

    @property
    def finished(self):
        """Whether this is rank 0 and the run came to its end: time for a report."""
        return self.log is not None and not self.stopping

    def close(self, goodbye):
        """Draw, say where the result is, and end the process."""
        if self.log:
            self.log.draw()
        folder, saved = self.config['out_dir'], self.saved_step
        if self.stopping:
            state = f"step {saved:,} is saved in {folder}; go on with --init_from=resume"
            self.say(f"stopped at step {self.step:,}; {'nothing to save yet' if saved is None else state}")
        elif self.config['eval_only']:
            self.say("nothing is written: eval_only=True")
        else:
            if saved != self.last:
                self.say(f"step {saved:,} is kept, of the lowest held-out loss {self.lowest:.4f}")
            self.say(f"done in {clock(time.time() - self.began)}; {goodbye}")
        self.run.end(128 + self.signal if self.stopping else 0)


def learning_rate_at(step, learning_rate, min_lr, warmup_iters, max_iters):
    """Linear warmup to learning_rate, then half a cosine down to min_lr at max_iters (-1: to a tenth)."""
    min_lr = learning_rate / 10 if min_lr < 0 else min_lr
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    progress = min(1.0, (step - warmup_iters) / max(1, max_iters - warmup_iters))
    return min_lr + 0.5 * (learning_rate - min_lr) * (1 + math.cos(math.pi * progress))


# What GPUs multiply at most in bfloat16 or float16, in flop per second, by patterns of their names.
PEAKS = {'H100 PCIe': 756e12, 'H100 NVL': 835e12, 'H100': 989e12, 'H200': 989e12, 'H800': 989e12,
         'A100': 312e12, 'A800': 312e12, 'L40S': 362e12, 'RTX 4090$': 165e12, 'RTX 3090$': 71e12}


def peak_flops(run):
    """Of all ranks together; 0 if that is not known, as of a CPU, or of products in float32."""
    name = torch.cuda.get_device_name(run.device) if run.device.type == 'cuda' else ''
    known = next((peak for pattern, peak in PEAKS.items() if re.search(pattern, name)), 0)
    return known * run.world_size * (run.dtype != torch.float32)


def flops_per_token(model, length):
    """6 N + 12 L H Q T, forward and backward, in rows of T = length tokens (Chowdhery et al. 2022, appendix
    B): N parameters that a token meets, without positions, in L layers of H heads, Q wide."""
    config = model.config
    idle = 1 - config.num_experts_per_tok / config.num_experts if config.use_moe else 0
    N = sum(p.numel() * (1 - idle * ('.mlp.experts.' in name))
            for name, p in model.named_parameters() if name.split('.')[1] not in ('wpe', 'embed_positions'))
    L, width = ((config.n_layer, config.n_embd) if config.model_type == 'gpt2' else
                (config.num_hidden_layers, config.num_attention_heads * config.head_dim))
    return 6 * N + 12 * L * width * length


def to_device(batch, device):
    """The tensors of a batch on the device; what is None stays None."""
    if device.type == 'cuda':
        return [t if t is None else t.pin_memory().to(device, non_blocking=True) for t in batch]
    return [t if t is None else t.to(device) for t in batch]


# ---- a model on several ranks ----

def spread_over_ranks(run, config, model):
    """Give all ranks the weights of rank 0, or under fsdp a share of each (FSDP2; ZeRO-3, Rajbhandari et al.
    2020). Returns the modules whose weights are then gathered together, a block each, and the rest."""
    for block in blocks(model) if config['activation_checkpointing'] else ():
        moe = dict(context_fn=functools.partial(contexts, block.mlp)) if model.config.use_moe else {}
        # the compiler gives up a model where fsdp or a mixture stands around such a block: so each by itself
        forward = torch.compile(block.forward) if config['compile'] else block.forward
        block.forward = functools.partial(keep_inputs, block.forward, functools.partial(
            recompute, forward, use_reentrant=False, **moe))
    if run.world_size > 1:
        for tensor in model.state_dict().values():          # every rank drew its own
            dist.broadcast(tensor, 0)
    if run.world_size == 1 or config['parallel'] == 'ddp':
        return []
    from torch.distributed.fsdp import fully_shard          # here, as it takes a second to import
    mesh = dist.init_device_mesh(run.device.type, (run.world_size,))
    return [fully_shard(module, mesh=mesh) for module in (*blocks(model), model)]


def keep_inputs(forward, twice, *inputs):
    """A block's forward; with gradients twice, so that in between only its inputs are kept."""
    return (twice if torch.is_grad_enabled() else forward)(*inputs)


def contexts(moe):
    """Of the first forward and the second, which leaves no note of the routing: nobody reads that any more,
    and it would hold all that was computed again."""
    second = ExitStack()
    second.callback(setattr, moe, 'routed', None)
    return nullcontext(), second


def whole(x):
    """A tensor of which each rank holds a share, whole on every rank; all else as it is."""
    return x.full_tensor() if hasattr(x, 'full_tensor') else x


def share(x, like):
    """Of a whole tensor, which all ranks hold, the share that they have of `like`, if that is shared out."""
    if not hasattr(like, 'full_tensor'):
        return x
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)     # nothing is sent


# ---- the optimizers ----

# a s + b s^3 + c s^5, one after another, bring singular values s from 0.01 to 1 within 0.27 of 1: each is the
# best there is, by linear programming, for what the one before leaves (Amsel et al. 2025, section 3)
POLYNOMIALS = (8.0934, -23.6204, 17.4462), (3.6366, -2.7219, 0.5365), (2.6613, -1.9772, 0.4526)


def orthogonalise(x, dtype=torch.float32):
    """Pull all singular values of each matrix near 1, by products alone, in dtype: (N, m, n) -> (N, m, n)."""
    if x.size(1) > x.size(2):
        return orthogonalise(x.mT, dtype).mT
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)).to(dtype)
    square = x @ x.mT                                   # (N, m, m); its norm bounds that of x, and closer
    bound = 1.02 * square.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    x, square = x / bound.sqrt(), square / bound
    for i, (a, b, c) in enumerate(POLYNOMIALS):
        square = x @ x.mT if i else square
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def orthogonalise_shared(x, dtype):
    """The same, shared out over the ranks, which all hold all matrices: (N, m, n) -> (N, m, n)."""
    if len(x) == 1 or not dist.is_initialized():
        return orthogonalise(x, dtype)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    n = math.ceil(len(x) / ranks)                       # matrices a rank; the last ranks may have fewer
    own = orthogonalise(x[n * rank:n * (rank + 1)], dtype)
    found = own.new_zeros(ranks, n, *x.shape[1:])
    found[rank, :len(own)] = own
    dist.all_gather([*found], found[rank].clone())
    return found.flatten(0, 1)[:len(x)]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) replaces the gradient of a matrix by the nearest orthogonal matrix, so that
    no direction dominates the step; 0.2 sqrt(max(m, n)) gives the step AdamW's size. Matrices of one shape,
    stacks of experts too, take it together, in the dtype of autocast."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = {}                                                              # shape -> parameters
            for p in group['params']:
                if p.grad is not None:          # of those that are shared out, only one is whole at a time
                    alike.setdefault((p.shape[-2:], id(p) * hasattr(p, 'full_tensor')), []).append(p)
            for (shape, _), params in alike.items():
                ahead = []
                for p in params:
                    if not self.state[p]:
                        self.state[p]['momentum_buffer'] = torch.zeros_like(p.grad)
                    average = self.state[p]['momentum_buffer'].lerp_(p.grad, 1 - group['momentum'])
                    x = whole(p.grad.lerp(average, group['momentum']))              # Nesterov's look ahead
                    ahead.append(x.view(-1, *shape))
                kind = p.device.type
                dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
                steps = orthogonalise_shared(torch.cat(ahead), dtype).split([len(x) for x in ahead])
                size = 0.2 * math.sqrt(max(shape))
                for p, x in zip(params, steps):
                    p.mul_(1 - group['lr'] * group['weight_decay'])
                    p.add_(share(x.view(p.shape).to(p.dtype), p), alpha=-group['lr'] * size)


def make_optimizers(model, optimizer, learning_rate, weight_decay, betas=(0.9, 0.95)):
    """Muon is made for the matrices inside the blocks; embedding, head and norms take AdamW, the norms
    without weight decay. With optimizer='adamw' that has all. Only what requires a gradient is trained.

    A mixture of experts has rates of its own. A token's k experts are averaged where the parts of a dense
    feed-forward are summed, so their last matrix moves k times as fast, or the first steps lag behind dense.
    And the router, of a few rows, takes AdamW at a tenth: it must not turn faster than experts can follow.
    """
    visits = model.config.num_experts_per_tok if model.config.use_moe else 1
    groups = dict(adamw={}, muon={})                    # of each: (weight decay, scale) -> parameters
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        router = name.endswith('mlp.gate.weight')
        inside = '.layers.' in name or '.h.' in name
        kind = optimizer if inside and p.dim() >= 2 and not router else 'adamw'
        decay = weight_decay if p.dim() >= 2 and not router else 0.0
        scale = 0.1 if router else visits if name.endswith('experts.down') else 1
        groups[kind].setdefault((decay, scale), []).append(p)
    adamw, muon = ([dict(params=params, weight_decay=decay, scale=scale)
                    for (decay, scale), params in own.items()] for own in groups.values())
    optimizers = [torch.optim.AdamW(adamw, lr=learning_rate, betas=betas, fused=True)] if adamw else []
    return optimizers + ([Muon(muon, learning_rate, weight_decay)] if muon else [])


def restore_optimizers(optimizers, saved):
    """Take over moments from a checkpoint, or one line if they are of other parameters. Groups and rates are
    those of the settings, which have made the optimizers anew."""
    try:
        for optimizer, old in zip(optimizers, saved, strict=True):
            shapes = [p.shape for group in optimizer.param_groups for p in group['params']]
            names = ['momentum_buffer'] if isinstance(optimizer, Muon) else ['step', 'exp_avg', 'exp_avg_sq']
            for i, moments in old['state'].items():
                check_weights(moments, f"parameter {i}")
                if {name: moments[name].shape for name in names} != {
                        name: () if name == 'step' else shapes[i] for name in names}:
                    raise ValueError(f"parameter {i} has another shape")
            groups = optimizer.state_dict()['param_groups']
            optimizer.load_state_dict(dict(state=old['state'], param_groups=groups))
            for p, moments in optimizer.state.items():
                moments.update((name, share(moments[name], p)) for name in names if name != 'step')
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        fail(f"the optimizers' state in the checkpoint is not of this model ({type(e).__name__}: {e})")


# ---- batches of text ----

@functools.lru_cache(maxsize=2)
def window_starts(n_tokens, block_size, seed, epoch, stride=0):
    """Where each row of an epoch starts: windows that tile the text, shuffled, and shifted anew each epoch.
    It is a function of its arguments only. 8 bytes per window.

    With a stride they are chapter I-1's: one every `stride` tokens, the same in each epoch, shuffled."""
    windows = max(1, (n_tokens - 1) // block_size - 1)
    rng = np.random.default_rng([seed, epoch])
    if stride:
        return rng.permutation(np.arange(0, max(1, n_tokens - block_size), stride))
    shift = rng.integers(max(1, n_tokens - windows * block_size))
    return shift + block_size * rng.permutation(windows)


def read_starts(n_tokens, block_size, seed, position, rows, stride=0):
    """Where the next `rows` rows start, when `position` of them are read: an endless run of epochs."""
    windows = len(window_starts(n_tokens, block_size, seed, 0, stride))
    return [window_starts(n_tokens, block_size, seed, i // windows, stride)[i % windows]
            for i in range(position, position + rows)]


@functools.lru_cache(maxsize=2)
def shuffled(n, seed, epoch):
    """The order of n rows in an epoch, where a row is a document: a function of its arguments only."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def read_rows(n, seed, position, rows):
    """The next `rows` of n rows, when `position` are read: an endless run of epochs, each shuffled anew."""
    return [int(shuffled(n, seed, i // n)[i % n]) for i in range(position, position + rows)]


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


def target_positions(targets):
    """(N,) int64: where in targets.flatten() the targets are. Found on the host, which would have to wait for
    a GPU to learn how many there are."""
    return torch.from_numpy(np.flatnonzero(targets.numpy() != -100))


# ---- held-out loss and a sample ----

def held_out_starts(split, block_size, rows):
    """Where rows that tile a split start: all, or at most so many of them, spread evenly."""
    starts = range(0, len(split.tokens) - 1, block_size)
    return starts[::math.ceil(len(starts) / rows)]


def held_out_loss(model, run, split, block_size, batch_size, eval_iters):
    """Mean nats per token of a split, over at most eval_iters batches spread evenly; ranks share the work."""
    starts = held_out_starts(split, block_size, eval_iters * batch_size)
    return mean_loss(model, run, starts, lambda rows: (*batch_at(split, rows, block_size), None), batch_size)


def mean_loss(model, run, rows, make_batch, batch_size):
    """Mean nats per target over all rows, in evaluation mode; ranks share the work."""
    mine, losses, counts = rows[run.rank::run.world_size], [], []
    with evaluating(model):
        for i in range(0, len(mine), batch_size):
            batch = make_batch(mine[i:i + batch_size])
            counts.append((batch[1] != -100).sum().item())
            x, y, segments = to_device(batch, run.device)
            with run.autocast():
                losses.append(model(x, y, segments=segments, head=False)[1])
    total, count = run.sum(sum(loss.item() * n for loss, n in zip(losses, counts)), sum(counts))
    return total / max(1, count)


def loss_by_position(model, run, split, length, batch_size, eval_iters):
    """Nats at each position of rows of so many tokens, (2, length): their sum over the rows, and how many
    targets stand there. The first position has one token to look at, the last one the whole row."""
    starts, sums = held_out_starts(split, length, eval_iters * batch_size), torch.zeros(2, length)
    mine = starts[run.rank::run.world_size]
    with evaluating(model):
        for i in range(0, len(mine), batch_size):
            x, y = to_device(batch_at(split, mine[i:i + batch_size], length), run.device)
            with run.autocast():
                hidden = model(x, head=False)[0]                                       # (B, T, C)
                for row, own in zip(hidden, y):         # all logits at once would be large
                    losses = F.cross_entropy(model.lm_head(row).float(), own, reduction='none')
                    sums += torch.stack([losses, own != -100]).cpu()
    return torch.tensor(run.sum(*sums.flatten().tolist())).view(2, length)


def bands_of(sums, block_size):
    """[[first, last position, mean loss], ...] of loss_by_position: bands that double, so that one ends with
    the rows of training. What has no target is left out."""
    length = sums.size(1)
    ends = sorted({min(int(block_size * 2.0**k), length) for k in range(-2, 30)} - {0})
    sums = [(first, last, *sums[:, first:last].sum(1).tolist()) for first, last in zip([0, *ends], ends)]
    return [[first + 1, last, total / count] for first, last, total, count in sums if count]


def report_positions(training, split):
    """Say and log the held-out loss by position, of rows of eval_block_size."""
    config = training.config
    length = min(config['eval_block_size'], len(split.tokens) - 1)
    bands = bands_of(loss_by_position(training.model, training.run, split, length, config['batch_size'],
                                      config['eval_iters']), config['block_size'])
    training.say("held-out nats by position  " + "  ".join(
        f"{first}-{last} {loss:.4f}" for first, last, loss in bands)
        + "  (the held-out text ends there)" * (length < config['eval_block_size']))
    if training.log:
        training.log.write(step=training.step, **{
            f'val_loss_{first}_{last}': loss for first, last, loss in bands})


# ---- the stage ----

EXPERTS = ('num_experts num_experts_per_tok n_shared_experts moe_intermediate_size norm_topk_prob '
           'router_aux_loss_coef seq_aux')
ONLY = {        # settings that apply only under a condition, see configure
    'init_from=scratch': 'model tokenizer context n_layer n_head n_kv_head n_embd intermediate_size qk_norm '
                         f'positions bias qkv_bias init_std tie_word_embeddings use_moe {EXPERTS}',
    'model=minimind': 'n_kv_head intermediate_size qk_norm positions use_moe',
    'model=gpt2': 'bias qkv_bias init_std',
    'use_moe=True': EXPERTS}


def new_model(config, vocab_size):
    """The model of the settings, with random weights. Its sizes have the settings' names, or these."""
    rows = {key: config.get(key, 0) for key in ('block_size', 'eval_block_size')}
    config = {**config, 'context': config.get('context') or max(rows.values())}
    for key, length in rows.items():
        if config['context'] < length:
            fail(f"--context={config['context']} is less than --{key}={length}")
    names = dict(n_positions='context', initializer_range='init_std', hidden_size='n_embd',
                 num_hidden_layers='n_layer', num_attention_heads='n_head', num_key_value_heads='n_kv_head',
                 max_position_embeddings='context', trained_length='block_size')
    model_class, config_class = MODELS[config['model']]
    try:
        sizes = config_class(vocab_size=vocab_size, **{
            field: config[names.get(field, field)] for field in config_class.__dataclass_fields__
            if names.get(field, field) in config})
        if sizes.use_moe and not config['moe_intermediate_size']:
            visits = sizes.num_experts_per_tok + sizes.n_shared_experts     # together as wide as one dense
            sizes.moe_intermediate_size = 8 * math.ceil(sizes.intermediate_size / visits / 8)
        return model_class(sizes)
    except ValueError as e:
        fail(f"{e}; see --n_embd (hidden_size), --n_head, --n_kv_head and the settings of experts")


def check_shape(config):
    """Refuse a model that can't be made before tokenizer and data are: shapes only, on the meta device."""
    with torch.device('meta'):
        new_model(config, vocab_size=256)


if __name__ == '__main__':
    config = configure(
        globals(), ONLY, model=one_of('minimind', 'gpt2'), positions=one_of(*POSITIONS),
        num_experts=at_least(1), num_experts_per_tok=at_least(1), **{key: at_least(0) for key in (
            'stride', 'eval_block_size', 'init_std', 'intermediate_size', 'moe_intermediate_size',
            'n_shared_experts', 'router_aux_loss_coef')})
    run = start_run(device, dtype, seed)
    checkpoint = None
    if init_from != 'scratch':
        model, tokenizer, checkpoint = load_start(run, config)
    else:
        check_shape(config)
    meta, train, val = open_data(run, dataset, 'pretrain', tokenizer)
    if init_from == 'scratch':
        tokenizer = load_tokenizer(data_folder(dataset))
        model = new_model(config, tokenizer.vocab_size).to(run.device)
    # as much of the training text, for a loss to set beside the held-out one: dropout off in both
    seen = train._replace(tokens=train.tokens[:len(val.tokens)], mask=train.mask[:len(val.tokens)])
    epoch = len(window_starts(len(train.tokens), block_size, seed, 0, stride))
    what = f"{len(train.tokens):,} training tokens"
    training = Training(run, config, model, tokenizer, epoch, what, checkpoint)
    prompt_ids = [tokenizer.bos, *tokenizer.encode(prompt)][-model.config.context // 2:]

    model.train()
    for _ in training:
        if training.due:
            val_loss, seen_loss = (held_out_loss(model, run, split, block_size, batch_size, eval_iters)
                                   for split in (val, seen))
            training.check_finite(val_loss=val_loss)            # a model of NaN has no sample
            bits = val_loss / math.log(2) * meta['val']['tokens'] / meta['val']['bytes']
            text = answers(model, tokenizer, [prompt_ids], 60, temperature=0.7, top_p=0.95)[0][0]
            text = (prompt + text).replace('\n', '\n    | ')
            training.evaluated(f"held-out loss {val_loss:.4f}  training loss {seen_loss:.4f}  {bits:.4f} "
                               f"bits/byte\n    | {text}", val_loss=val_loss, train_loss=seen_loss,
                               val_bits_per_byte=bits)
        starts = read_starts(len(train.tokens), block_size, seed, training.position, training.rows, stride)
        for x, y in training.micro_batches(starts, lambda rows: batch_at(train, rows, block_size)):
            with run.autocast():
                loss = model(x, y)[1]
                aux = model.auxiliary_loss(y != -100)                       # of a mixture's routers; else 0
            n = (y != -100).sum()                                           # a mean times n is a sum
            experts = dict(aux=aux * n, expert_load=model.expert_load() * n) if model.config.use_moe else {}
            training.backward((loss + aux) * n, loss=loss * n, **experts)
        training.update(tokens=training.rows * block_size)
    if eval_block_size and not training.stopping:
        report_positions(training, val)
    training.close(f"the model is in {out_dir}: python sample.py --out_dir={quote(out_dir)}")
