"""Mixture of experts (chapter II-6): against a plain loop over them, in every mode, and while training."""
import json
import time

import pytest
import torch
from conftest import TEXT, numbers
from torch.nn import functional as F

import model_minimind
from model_minimind import MiniMind, MiniMindConfig, MoEFeedForward, padded_rows, plain_moe
from pretrain import Muon, make_optimizers, orthogonalise


def config(**changes):
    return MiniMindConfig(**{**dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                    max_position_embeddings=64, use_moe=True, num_experts=4,
                                    moe_intermediate_size=24), **changes})


def layer(**changes):
    mlp = MoEFeedForward(config(**changes))
    for p in mlp.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return mlp


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


# ---- dispatch ----

@pytest.mark.parametrize('layout', ['grouped', 'padded'])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('k', [1, 2, 4])
@pytest.mark.parametrize('kind', [dict(), dict(norm_topk_prob=False), dict(n_shared_experts=2)],
                         ids=['renormalised', 'as-they-are', 'shared'])
def test_it_is_the_plain_moe(monkeypatch, kind, k, training, layout):
    """Outputs and all gradients, with experts that get no token among them."""
    monkeypatch.setattr(model_minimind, 'padded_rows', lambda ends, size: 6 * (layout == 'padded'))
    mlp = layer(num_experts=8, num_experts_per_tok=k, **kind).train(training)
    x = torch.randn(2, 3, 32, requires_grad=True)
    results = []
    for forward in (mlp, lambda x: plain_moe(mlp, x)):
        y = forward(x)
        (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
        results.append([y, x.grad, *(p.grad for p in mlp.parameters())])
        x.grad = None
        mlp.zero_grad()
    for ours, plain in zip(*results):
        torch.testing.assert_close(ours, plain if plain is not None else torch.zeros_like(ours),
                                   atol=1e-5, rtol=1e-5)


def test_experts_are_padded_to_the_busiest_where_that_is_cheap(two_threads):
    even, uneven = torch.tensor([10, 19, 30]), torch.tensor([28, 29, 30])
    assert padded_rows(even, size=10**6) == 11                          # a row too many each
    assert padded_rows(uneven, size=10**4) == 28
    assert padded_rows(uneven, size=10**6) == 0                         # 18 too many cost more than a call
    assert padded_rows(torch.tensor([0, 1, 1, 2]), size=1) == 0         # two visits would read four experts


def test_an_expert_without_tokens_has_a_gradient_of_zero():
    mlp = layer(num_experts=8, num_experts_per_tok=1)
    with torch.no_grad():
        mlp.gate.weight[1:] = 0
        mlp.gate.weight[0] = 1
    y = mlp(torch.ones(1, 5, 32))                                       # all five go to expert 0
    y.sum().backward()
    for p in mlp.experts.parameters():
        assert p.grad[0].abs().sum() > 0 and p.grad[1:].abs().sum() == 0
    mlp.auxiliary_loss(torch.ones(1, 5))
    assert mlp.load.tolist() == [1] + [0] * 7


def test_train_and_eval_agree():
    model, x = MiniMind(config()), torch.randint(64, (2, 16))
    torch.testing.assert_close(model.train()(x)[0], model.eval()(x)[0])


def test_half_precision_routes_alike():
    mlp, x = layer(), torch.randn(2, 50, 32)
    full, chosen = mlp(x), mlp.routed[1]
    with torch.autocast('cpu', torch.bfloat16):
        half = mlp(x)
    assert torch.equal(mlp.routed[1], chosen)
    torch.testing.assert_close(half.float(), full, atol=0.1, rtol=0.1)


def test_compiled_is_eager():
    model, x = MiniMind(config(num_hidden_layers=1)), torch.randint(64, (2, 16))
    gate = model.model.layers[0].mlp.gate.weight
    losses, grads = [], []
    for forward in (model, torch.compile(model, backend='aot_eager')):
        losses.append(forward(x, x)[1] + model.auxiliary_loss(torch.ones_like(x)))
        grads.append(torch.autograd.grad(losses[-1], gate)[0])
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*grads)


@pytest.mark.skipif(tuple(map(int, torch.__version__.split('.')[:2])) < (2, 13),
                    reason="older compilers break at the experts' product")
def test_compiled_in_bfloat16_it_is_one_graph():
    model, x, graphs = MiniMind(config(num_hidden_layers=3)), torch.randint(64, (2, 16)), []
    torch._dynamo.reset()
    model.compile(backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    with torch.autocast('cpu', torch.bfloat16):
        model(x, x)[1].backward()
    assert len(graphs) == 1


# ---- the auxiliary loss ----

def test_the_auxiliary_loss_is_its_formula():
    x = torch.randn(3, 10, 32)
    losses = {}
    for seq_aux in (True, False):
        mlp = layer(seq_aux=seq_aux, router_aux_loss_coef=0.1)
        mlp.gate.weight.data = torch.linspace(-1, 1, 4 * 32).view(4, 32)
        mlp(x)
        p = mlp.gate(x).softmax(dim=-1)
        groups = p.unbind() if seq_aux else [p.flatten(0, 1)]           # each row, or the batch as a whole
        each = []
        for group in groups:
            f = F.one_hot(group.topk(2).indices, 4).float().mean(dim=(0, 1))
            each.append(0.1 * 4 * (f * group.mean(dim=0)).sum())
        losses[seq_aux] = mlp.auxiliary_loss(torch.ones(3, 10)).item()
        assert losses[seq_aux] == pytest.approx(torch.stack(each).mean().item(), rel=1e-5)
    assert losses[True] != pytest.approx(losses[False], rel=1e-3)


def test_an_even_router_has_the_least():
    mlp = layer(router_aux_loss_coef=0.1, num_experts_per_tok=1)
    with torch.no_grad():
        mlp.gate.weight.zero_()
        mlp.gate.weight[:, :4] = 20 * torch.eye(4)
    even = torch.eye(4, 32).repeat(2, 1)[None]                          # token i prefers expert i mod 4
    all_of_them = torch.ones(1, 8)
    mlp(even)
    assert mlp.auxiliary_loss(all_of_them).item() == pytest.approx(0.1) and mlp.load.tolist() == [0.25] * 4
    mlp(even[:, :1].expand(1, 8, 32))                                   # all prefer expert 0: E times as much
    assert mlp.auxiliary_loss(all_of_them).item() == pytest.approx(0.4, rel=1e-3)


@pytest.mark.parametrize('seq_aux', [True, False])
def test_it_is_added_once_and_moves_the_router(seq_aux):
    model, x = MiniMind(config(seq_aux=seq_aux, router_aux_loss_coef=0.1)), torch.randint(64, (2, 16))
    language = model.eval()(x, x)[1]
    assert model.auxiliary_loss(torch.ones_like(x)) == 0.0              # evaluation has none of it
    loss = model.train()(x, x)[1]
    layers = [block.mlp for block in model.model.layers]
    aux = model.auxiliary_loss(torch.ones_like(x))
    torch.testing.assert_close(loss, language)                          # added only by who asks for it
    torch.testing.assert_close(aux, sum(mlp.auxiliary_loss(torch.ones_like(x)) for mlp in layers))
    assert aux > 0.1 * len(layers) * 0.99                               # coef per layer is the least
    assert model.expert_load().shape == (2, 4)
    torch.testing.assert_close(model.expert_load().sum(dim=1), torch.ones(2))
    for mlp in layers:
        assert torch.autograd.grad(aux, mlp.gate.weight, retain_graph=True)[0].abs().sum() > 0


def test_a_balance_within_rows_depends_neither_on_padding_nor_on_how_a_step_is_cut():
    """Rows of 3, 10 and 7 tokens, each weighing as many; -100 marks the padding, as in a batch of sft.py."""
    model = MiniMind(config(seq_aux=True, router_aux_loss_coef=0.5))
    x, lengths = torch.randint(64, (3, 10)), torch.tensor([3, 10, 7])
    y = torch.where(torch.arange(10) < lengths[:, None], x, -100)
    wider = [F.pad(x, (0, 5), value=1), F.pad(y, (0, 5), value=-100)]
    grads, loads = [], []
    for pieces in ([(x, y)], [wider], [(x[:1, :3], y[:1, :3]), (x[1:], y[1:])]):
        model.zero_grad()
        for tokens, targets in pieces:
            loss = model(tokens, targets)[1] + model.auxiliary_loss(targets != -100)
            (loss * (targets != -100).sum() / 20).backward()
        grads.append([p.grad for p in model.parameters()])
        loads.append(model.expert_load())
    torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(grads[0], grads[2], atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(loads[0], loads[1])


# ---- training ----

def test_muon_moves_matrices_together_as_each_alone():
    """Stacks, and matrices of their shape beside them; torch.optim.Muon, of five other steps, goes about the
    same way, and as far."""
    start = torch.randn(4, 24, 16)
    stack, beside = torch.nn.Parameter(start[:3].clone()), torch.nn.Parameter(start[3].clone())
    alone, theirs = ([torch.nn.Parameter(m.clone()) for m in start] for _ in range(2))
    optimizers = [Muon([stack, beside], lr=0.01, weight_decay=0.1),
                  *(Muon([p], lr=0.01, weight_decay=0.1) for p in alone),
                  torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn='match_rms_adamw')]
    for _ in range(5):
        grads = torch.randn(4, 24, 16)
        stack.grad, beside.grad = grads[:3].clone(), grads[3].clone()
        for params in (alone, theirs):
            for p, grad in zip(params, grads):
                p.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    ours = torch.cat([stack.data, beside.data[None]])
    torch.testing.assert_close(ours, torch.stack(list(alone)).data, atol=1e-4, rtol=0)
    moved, moved_theirs = ((w - start).flatten() for w in (ours, torch.stack(list(theirs)).data))
    assert F.cosine_similarity(moved, moved_theirs, dim=0) > 0.95
    assert moved.norm() == pytest.approx(moved_theirs.norm().item(), rel=0.1)


@pytest.mark.parametrize('dtype, error', [(torch.float32, 0.27), (torch.bfloat16, 0.8)])
@pytest.mark.parametrize('shape', [(2, 48, 96), (2, 96, 48), (2, 64, 64)])
def test_muon_keeps_directions_and_makes_their_lengths_one(shape, dtype, error):
    u, s, vh = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    s = torch.logspace(0, -1.4, s.size(-1)).expand_as(s)            # a direction 25 times as long as another
    x = orthogonalise(u * s[:, None] @ vh, dtype).float()
    lengths = u.mT @ x @ vh.mT
    assert (lengths.diagonal(dim1=1, dim2=2) - 1).abs().max() < error + 0.01
    assert (lengths - lengths.diagonal(dim1=1, dim2=2).diag_embed()).abs().max() < (
        1e-3 if dtype == torch.float32 else 0.1)
    assert not orthogonalise(torch.zeros(1, 3, 4)).any()


def test_muon_multiplies_in_the_dtype_of_autocast():
    """In float32 without, which is the formula in float64 to its rounding: a CPU that has no unit for
    bfloat16 takes 50 times as long."""
    start, grad = torch.randn(12, 20), torch.randn(12, 20)
    direction = orthogonalise(grad.double()[None], torch.float64)[0]
    expected = start * (1 - 0.01 * 0.1) - 0.01 * 0.2 * 20**0.5 * direction
    errors = {}
    for dtype in (torch.float32, torch.bfloat16):
        p = torch.nn.Parameter(start.clone())
        p.grad = grad                                       # the first momentum has the gradient's direction
        with torch.autocast('cpu', dtype, enabled=dtype == torch.bfloat16):
            Muon([p], lr=0.01, weight_decay=0.1).step()
        errors[dtype] = (p.data.double() - expected).abs().max()
    assert errors[torch.float32] < 1e-6 < errors[torch.bfloat16] < 1e-3


@pytest.mark.parametrize('optimizer', ['muon', 'adamw'])
def test_routers_learn_slowly_and_experts_as_fast_as_they_are_many(optimizer):
    model = MiniMind(config(num_experts_per_tok=2))
    groups = {id(p): (type(o), g) for o in make_optimizers(model, optimizer, 1e-2, 0.1)
              for g in o.param_groups for p in g['params']}
    assert len(groups) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        kind, group = groups[id(p)]
        router, last = name.endswith('mlp.gate.weight'), name.endswith('experts.down')
        assert group['scale'] == (0.1 if router else 2 if last else 1), name
        assert (group['weight_decay'] > 0) == (p.dim() >= 2 and not router), name
        assert (kind is Muon) == (optimizer == 'muon' and '.layers.' in name and p.dim() >= 2 and not router)


def test_many_small_experts_are_faster_than_the_loop(two_threads):
    """A training step of 64 experts, top-4; the loop costs a dozen small operations an expert."""
    mlp = layer(hidden_size=128, moe_intermediate_size=64, num_experts=64, num_experts_per_tok=4)
    x, best = torch.randn(1, 256, 128), {}
    for _ in range(6):
        for name, forward in (('grouped', mlp), ('loop', lambda x: plain_moe(mlp, x))):
            began = time.perf_counter()
            forward(x).sum().backward()
            best[name] = min(best.get(name, 9), time.perf_counter() - began)
    assert best['loop'] > 2 * best['grouped'], best


@pytest.mark.parametrize('ranks', [0, 2], ids=['alone', 'two-ranks'])
def test_pretraining_a_mixture(script, tmp_path, tokenizer_folder, ranks):
    """With so many experts that some of them get nothing in a step."""
    (tmp_path / 'rules.txt').write_text(TEXT * 20)
    script('prepare.py', '--input=rules.txt', f'--tokenizer={tokenizer_folder}', '--dataset=./rules',
           '--val_fraction=0.2')
    done = script('pretrain.py', '--dataset=./rules', '--out_dir=run', '--max_iters=4', '--eval_iters=2',
                  '--n_layer=2', '--n_head=2', '--n_kv_head=1', '--n_embd=32', '--block_size=16',
                  '--batch_size=1', '--gradient_accumulation_steps=2', '--log_interval=1', '--device=cpu',
                  '--dtype=float32', '--use_moe=True', '--num_experts=32', torchrun=ranks)
    assert 'deprecated' not in done.stderr
    lines = [json.loads(line) for line in (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()]
    steps = [line for line in lines if 'loss' in line]
    assert len(steps) == 4
    for line in steps:
        load = torch.tensor(line['expert_load'])
        assert load.shape == (2, 32) and (load == 0).any()
        torch.testing.assert_close(load.sum(dim=1), torch.ones(2), atol=2e-3, rtol=0)
        assert 2 * 0.02 < line['aux'] < 2 * 0.02 * 32                   # layers x coef, when all is even
    assert numbers(r'  loss (\S+)', done.stdout) == pytest.approx([line['loss'] for line in steps], abs=1e-4)
    assert steps[0]['loss'] == pytest.approx(lines[0]['val_loss'], abs=0.2)     # the language loss alone
    pytest.importorskip('matplotlib')
    assert (tmp_path / 'run' / 'experts.png').stat().st_size > 5000
