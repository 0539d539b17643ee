"""What the tests hold on a CPU, once more on a GPU, in five minutes: `python tests/gpu.py`.

A line is the norm of a difference over that of what is expected, and how large it may be. Compiling takes
most of the time. How fast all of it is, says `python tests/bench.py gpu`.
"""
import copy
import functools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sample  # noqa: E402  (the line above makes it importable)
from configurator import start_run  # noqa: E402
from pretrain import make_optimizers, new_model  # noqa: E402

SHAPE = dict(n_layer=3, n_head=4, n_kv_head=2, n_embd=128, block_size=128, qk_norm=True)
KINDS = {
    'GPT-2': dict(model='gpt2', bias=True), 'MiniMind': dict(model='minimind'),
    'MiniMind, learned positions': dict(model='minimind', positions='learned'),
    'mixture': dict(model='minimind', use_moe=True, num_experts=8, num_experts_per_tok=2, n_shared_experts=1,
                    moe_intermediate_size=64)}
PROMPTS = [[7, 8, 9], [5] * 20, [3, 1] * 4]
failed = []


def check(what, found, expected, allowed):
    error = ((found.cpu().float() - expected.cpu().float()).norm() / expected.float().norm().cpu()).item()
    line = f"{what:70} {error:8.1e}  {'up to' if error <= allowed else 'NOT'} {allowed:.0e}"
    failed.extend([line] * (not error <= allowed))      # a NaN fails too
    print(line, flush=True)


def gradient(model, device, dtype=torch.float32, packed=False):
    """Of the loss of two rows, all parameters' in one tensor, behind the loss itself."""
    model = model.to(device).train()
    model.zero_grad()
    x, y = torch.randint(500, (2, 2, 96), generator=torch.Generator().manual_seed(1)).to(device)
    y[:, :30] = -100
    segments = (torch.arange(96, device=device) // 40).expand(2, -1) if packed else None
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        loss = model(x, y, segments=segments)[1] + model.auxiliary_loss(y != -100)
    loss.backward()
    return torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.parameters())])


def step(model, optimizer, device):
    """How a step changes all parameters."""
    moved = copy.deepcopy(model)
    gradient(moved, device)
    for one in make_optimizers(moved, optimizer, 1e-2, 0.1):
        one.step()
    return torch.cat([(p.detach().cpu() - q).flatten() for p, q in zip(moved.parameters(),
                                                                       model.parameters())])


def text(model, prompts, n=40, **how):
    """Greedy continuations of prompts, tokens (n, B), and the logits behind each (n, B, V)."""
    tokens, padding = sample.left_pad(prompts, next(model.parameters()).device)
    logits = []
    new = list(sample.generate(model, tokens, n, padding=padding, temperature=0, **how,
                               watch=lambda now, *_: logits.append(now.cpu())))
    return torch.stack(new).cpu(), torch.stack(logits)


def check_model(name, settings, device='cuda'):
    torch.manual_seed(0)
    model = new_model(dict(SHAPE, **settings), 500)
    for packed in (False, True):
        what = f"{name}, {'packed rows' if packed else 'plain rows'}: gradient in"
        expected = gradient(copy.deepcopy(model), 'cpu', packed=packed)
        own, compiled = copy.deepcopy(model), copy.deepcopy(model)
        compiled.compile()
        check(f"{what} float32", gradient(own, device, packed=packed), expected, 1e-4)
        check(f"{what} bfloat16", gradient(own, device, torch.bfloat16, packed), expected, 3e-2)
        check(f"{what} bfloat16, compiled", gradient(compiled, device, torch.bfloat16, packed), expected,
              3e-2)
        torch.compiler.reset()
    for optimizer in ('adamw', 'muon'):
        check(f"{name}: a step of {optimizer}", step(model, optimizer, device), step(model, optimizer, 'cpu'),
              2e-2)
    with torch.no_grad():           # as large as after training, so that a text does not repeat one token
        for part, p in model.named_parameters():
            p.mul_(16 if p.dim() > 1 and ('.h.' in part or '.layers.' in part) else 4 if p.dim() > 1 else 1)
    model, own = model.eval(), copy.deepcopy(model).to(device).eval()
    for prompts in (PROMPTS[:1], PROMPTS):
        expected = text(model, prompts)[0]
        what = f"{name}: greedy text, {len(prompts)} rows"
        check(what, text(own, prompts)[0], expected, 0)
        check(f"{what}, without the cache", text(own, prompts, use_cache=False)[0], expected, 0)
    slide = functools.partial(text, prompts=[[5] * 100], on_full='slide')
    check(f"{name}: greedy text that slides", slide(own)[0], slide(model)[0], 0)
    half = functools.partial(text, sample.for_decoding(copy.deepcopy(own), torch.bfloat16), PROMPTS[1:2], 2)
    check(f"{name}: two logits in bfloat16, cache or not", half()[1], half(use_cache=False)[1], 3e-2)
    sample.compile_blocks(own)
    check(f"{what}, compiled", text(own, PROMPTS)[0], expected, 0)
    torch.compiler.reset()


def check_drawing(device='cuda', times=50):
    """What top-p has filtered out is never drawn, and the rest as often as its probability says."""
    p = torch.rand(1, 50_000, device=device).pow(8)
    p[:, ::2] = 0
    p = (p / p.sum()).expand(4096, -1).contiguous()
    generator = torch.Generator(device).manual_seed(1)
    drawn = torch.cat([sample.draw_token(p, generator) for _ in range(times)])
    counts = torch.bincount(drawn, minlength=50_000) / len(drawn)
    check("tokens drawn that are filtered out", 1 + counts[::2].sum()[None], torch.ones(1), 0)
    chance = (500 / len(drawn)) ** 0.5              # the error to be expected
    check("shares of a hundred tokens each", counts.view(500, 100).sum(1), p[0].view(500, 100).sum(1),
          1.5 * chance)


if __name__ == '__main__':
    if not torch.cuda.is_available():
        print("gpu.py: torch sees no GPU; on a CPU the tests do: python -m pytest", file=sys.stderr)
        sys.exit(2)
    start_run('cuda')
    torch.set_float32_matmul_precision('highest')       # no TF32: float32 is held against a CPU's
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    for kind, settings in KINDS.items():
        check_model(kind, settings)
    check_drawing()
    if failed:
        sys.exit('\n'.join(['', f"{len(failed)} fail:", *failed]))
