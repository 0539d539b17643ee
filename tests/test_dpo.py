"""dpo.py: the loss is the paper's, log-probabilities are sums over answers, and the reference never moves."""
import math

import torch
from dpo import answer_log_probs, dpo_loss
from model_minimind import MiniMind, MiniMindConfig


def small_model():
    return MiniMind(MiniMindConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                   num_key_value_heads=2, max_position_embeddings=64)).eval()


def pairs_of(rows, answers):
    """Random tokens (B, T) and targets, -100 but for the last `answers[i]` tokens of row i."""
    tokens = torch.randint(300, (rows, 20))
    targets = torch.randint(300, (rows, 20))
    for row, n in enumerate(answers):
        targets[row, :20 - n] = -100
    return tokens, targets


def test_loss_is_ln_2_where_policy_equals_reference():
    chosen, rejected = torch.randn(5), torch.randn(5)
    loss, chosen_reward, rejected_reward = dpo_loss(chosen, rejected, chosen, rejected, beta=0.1)
    torch.testing.assert_close(loss, torch.full((5,), math.log(2)))
    assert not chosen_reward.any() and not rejected_reward.any()


def test_loss_by_hand():
    """beta 0.5, log-ratios -10 - -12 = 2 and -20 - -19 = -1: rewards 1 and -0.5, margin 1.5, and
    -log sigmoid(1.5) = log(1 + e^-1.5) = 0.201413."""
    loss, chosen, rejected = dpo_loss(*map(torch.tensor, ([-10.], [-20.], [-12.], [-19.])), beta=0.5)
    torch.testing.assert_close(loss, torch.tensor([0.201413]), atol=1e-6, rtol=0)
    assert (chosen.item(), rejected.item()) == (1.0, -0.5)


def test_loss_is_trls():
    """trl's DPOTrainer (loss_type='sigmoid') takes the difference of the two models' log-ratios."""
    chosen, rejected, ref_chosen, ref_rejected = torch.randn(4, 8) * 20
    ours = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)[0]
    logits = (chosen - rejected) - (ref_chosen - ref_rejected)
    torch.testing.assert_close(ours, -torch.nn.functional.logsigmoid(0.1 * logits))


def test_the_gradient_raises_chosen_and_lowers_rejected():
    """Rafailov et al. 2023, section 4: beta * sigmoid(rejected reward - chosen reward) on each side."""
    chosen, rejected = torch.tensor([-10.], requires_grad=True), torch.tensor([-20.], requires_grad=True)
    dpo_loss(chosen, rejected, torch.tensor([-12.]), torch.tensor([-19.]), beta=0.5)[0].backward()
    weight = 0.5 * torch.sigmoid(torch.tensor([-1.5]))
    torch.testing.assert_close(chosen.grad, -weight)
    torch.testing.assert_close(rejected.grad, weight)


def test_log_probs_are_sums_over_the_answer():
    model = small_model()
    tokens, targets = pairs_of(4, [3, 7, 1, 20])
    log_p = model(tokens)[0].log_softmax(-1)
    wanted = [sum(log_p[b, t, targets[b, t]] for t in range(20) if targets[b, t] != -100) for b in range(4)]
    torch.testing.assert_close(answer_log_probs(model, model, tokens, targets), torch.stack(wanted))


def test_padding_changes_nothing():
    model = small_model()
    tokens, targets = pairs_of(2, [4, 9])
    padded = [torch.cat([t, torch.full((2, 13), pad)], 1) for t, pad in ((tokens, 0), (targets, -100))]
    torch.testing.assert_close(answer_log_probs(model, model, *padded),
                               answer_log_probs(model, model, tokens, targets))
