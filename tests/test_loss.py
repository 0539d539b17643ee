"""The loss over the vocabulary without the logits, of both models: against the formula, in every use."""
import inspect
import subprocess
import sys

import pytest
import torch
from conftest import ONE_THREAD, ROOT
from torch.utils._python_dispatch import TorchDispatchMode

import model_gpt2
import model_minimind
from model_gpt2 import GPT2, GPT2Config, head_loss, plain_loss
from model_minimind import MiniMind, MiniMindConfig
from pretrain import mean_loss, start_run

KINDS = ['gpt2', 'minimind', 'untied']


def make(kind):
    torch.manual_seed(0)
    if kind == 'minimind':
        return MiniMind(MiniMindConfig(vocab_size=67, hidden_size=16, num_hidden_layers=1,
                                       num_attention_heads=2, max_position_embeddings=600))
    return GPT2(GPT2Config(vocab_size=67, n_positions=600, n_embd=16, n_layer=1, n_head=2,
                           tie_word_embeddings=kind != 'untied'))


def batch():
    """1,800 tokens, two pieces, and 1,700 of them targets."""
    x = torch.randint(67, (3, 600))
    y = x.roll(-1, 1)
    y[1, 50:150] = -100
    return x, y


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad for p in model.parameters()]


def test_the_two_models_have_one_loss():
    for name in ('plain_loss', 'HeadLoss', 'head_loss'):
        ours, theirs = (inspect.getsource(getattr(model, name)) for model in (model_gpt2, model_minimind))
        assert ours.replace('I-5', 'II-7') == theirs


@pytest.mark.parametrize('kind', KINDS)
def test_it_is_the_plain_loss(kind):
    model, (x, y) = make(kind).train(), batch()
    plain = plain_loss(model(x)[0], y)
    logits, loss = model(x, y)
    assert logits is None
    torch.testing.assert_close(loss, plain, atol=1e-6, rtol=0)
    torch.testing.assert_close(gradients(model, 3 * loss), gradients(model, 3 * plain), atol=1e-6, rtol=1e-4)
    logits, loss = model.eval()(x, y)
    torch.testing.assert_close(loss, plain_loss(logits, y), atol=1e-6, rtol=0)
    with torch.no_grad():
        hidden, again = model(x, y, head=False)
    assert hidden.shape == (3, 600, 16) and again == loss


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_in_half_precision_it_is_near(dtype):
    """Scaled as by a GradScaler, too; the weight's gradient is float32's."""
    model, (x, y) = make('gpt2').train(), batch()
    full = gradients(model, model(x, y)[1])
    with torch.autocast('cpu', dtype):
        loss = model(x, y)[1]
    half = gradients(model, loss * 1024)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(model(x, y)[1].item(), abs=2e-3)
    for ours, exact in zip(half, full):
        assert (ours / 1024 - exact).norm() < 0.02 * exact.norm()


def test_a_frozen_head_has_no_gradient_and_what_is_below_it_has():
    model, (x, y) = make('untied').train(), batch()
    expected = gradients(model, model(x, y)[1])[:-1]
    model.lm_head.requires_grad_(False)
    found = gradients(model, model(x, y)[1])
    assert found[-1] is None
    torch.testing.assert_close(found[:-1], expected)


def test_a_batch_without_targets_has_a_loss_of_zero():
    model, (x, y) = make('gpt2').train(), batch()
    loss = model(x, torch.full_like(y, -100))[1]
    assert loss == 0 and not any(grad.any() for grad in gradients(model, loss))


def test_no_more_than_a_piece_of_the_logits_is_there():
    """And none for tokens that are no targets, as prompts of sft.py. 5,056 is a multiple of 64."""
    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            if torch.is_tensor(result) and result.shape[-1:] == (5056,):
                self.numbers = max(self.numbers, result.numel())
            return result
    x, weight = torch.randn(4, 1000, 4, requires_grad=True), torch.randn(5000, 4)
    for targets, rows in ((torch.zeros(4, 1000, dtype=torch.long), 1024),
                          (torch.where(torch.arange(1000) < 990, -100, 0).expand(4, -1), 40)):
        with Largest() as largest:
            head_loss(x, weight, targets).backward()
        assert largest.numbers == rows * 5056


@pytest.mark.parametrize('kind', ['gpt2', 'minimind'])
def test_compiled_it_is_one_graph_and_held_out_batches_make_no_other(kind):
    model, (x, y), graphs = make(kind).train(), batch(), []
    expected = model(x, y)[1]
    expected = [expected, *gradients(model, expected)]

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    model.compile(backend=count)
    run = start_run('cpu', 'float32')
    for _ in range(2):
        loss = model(x, y)[1]
        torch.testing.assert_close([loss, *gradients(model, loss)], expected)
        mean_loss(model, run, [0, 1, 2], lambda rows: (x[rows, :9], y[rows, :9], None), batch_size=2)
    assert len(graphs) == 1


def test_a_start_does_not_load_the_compiler():
    """It takes a second."""
    code = "import sys, pretrain; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT, env=ONE_THREAD).returncode == 0
