"""
Align a model with preferences: make chosen answers likelier than rejected ones (tutorial chapter II-10).

    loss = -log sigmoid( beta [ log pi(c|x)/ref(c|x) - log pi(r|x)/ref(r|x) ] )  (Rafailov et al. 2023, eq. 7)

x is the prompt, c the chosen answer, r the rejected; pi is the policy, which learns, ref the reference: the
model it starts from, which never moves. beta log pi/ref is an answer's implicit reward, and the loss asks
for a margin between the two.
"""
import torch
from torch.nn import functional as F


# ---- the loss ----

def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta):
    """The loss of each pair and the rewards of its two answers, three tensors (P,).

    chosen, rejected          (P,) log pi(answer | prompt), of the policy
    ref_chosen, ref_rejected  (P,) the same of the reference; equal to the policy's, the loss is ln 2
    Rafailov et al. 2023: the loss is eq. 7, the reward eq. 5 without the prompt's term, which cancels.
    """
    chosen_reward = beta * (chosen - ref_chosen)
    rejected_reward = beta * (rejected - ref_rejected)
    return -F.logsigmoid(chosen_reward - rejected_reward), chosen_reward, rejected_reward


def hidden_states(model, wrapped, tokens):
    """What the output head is given, (B, T) -> (B, T, C). `wrapped` is the model under compile and DDP."""
    head, model.lm_head = model.lm_head, torch.nn.Identity()
    try:
        return wrapped(tokens)[0]
    finally:
        model.lm_head = head


def answer_log_probs(model, wrapped, tokens, targets):
    """log pi(answer | prompt) of each row, the sum of its tokens' log-probabilities: (B, T) -> (B,) float32.

    targets  (B, T), the token that follows each; -100 on prompts and padding, which get no logits at all: the
             head is the widest layer, and its softmax the largest tensor
    """
    is_target = targets != -100
    logits = model.lm_head(hidden_states(model, wrapped, tokens)[is_target])        # (N, C) -> (N, V)
    log_probs = -F.cross_entropy(logits.float(), targets[is_target], reduction='none')      # (N,)
    rows = is_target.nonzero()[:, 0]
    return log_probs.new_zeros(len(tokens)).index_add(0, rows, log_probs)                   # (N,) -> (B,)
