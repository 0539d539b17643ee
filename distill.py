"""
Distil a teacher into a student (tutorial chapter II-12).

    loss = alpha CE(student, data) + (1 - alpha) T^2 KL(teacher || student)       (Hinton et al. 2015, sec. 2)

White box: the student learns the teacher's whole distribution at each target token, softened by temperature
T; T^2 keeps the size of the gradient whatever T is. Black box (teacher=''): only the teacher's answers are
known, and the loss is their cross-entropy, in which the tags <think> and <answer> weigh tag_weight times.
"""
import re

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

TAGS = ('<think>', '</think>', '<answer>', '</answer>')
WELL_FORMED = re.compile(r'\s*<think>(.+)</think>\s*<answer>(.+)</answer>\s*', re.DOTALL)


# ---- the loss ----

def distillation_loss(student, teacher, targets, weights, alpha, temperature):
    """Sums over N tokens, (3,): the loss, the cross-entropy in it (unweighted), the KL in it.

    student  logits (N, V);  teacher  the same, or None: then the loss is the weighted cross-entropy alone
    targets  (N,) int64;  weights  (N,) of each token's cross-entropy
    """
    student = student.float()
    ce = F.cross_entropy(student, targets, reduction='none')                                # (N,)
    if teacher is None:
        return torch.stack([(weights * ce).sum(), ce.sum(), ce.new_zeros(())])
    kl = F.kl_div((student / temperature).log_softmax(-1), (teacher.float() / temperature).log_softmax(-1),
                  reduction='sum', log_target=True)
    loss = alpha * (weights * ce).sum() + (1 - alpha) * temperature ** 2 * kl
    return torch.stack([loss, ce.sum(), kl])


def chunked_loss(head, hidden, teacher_head, teacher_hidden, targets, weights, alpha, temperature,
                 chunk_size=512):
    """distillation_loss from what the two output heads are given, hidden (N, C) and teacher_hidden (N, C').

    Logits exist for chunk_size tokens at a time: a chunk's are thrown away and computed again on the way
    back. Memory grows with N x C and chunk_size x V, where all logits at once would take N x V, four times.
    """
    def loss(h, t, y, w):
        return distillation_loss(head(h), None if t is None else teacher_head(t), y, w, alpha, temperature)

    def chunks(tensor):
        return tensor.split(chunk_size)

    teacher_chunks = [None] * len(chunks(hidden)) if teacher_hidden is None else chunks(teacher_hidden)
    return sum(checkpoint(loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in
               zip(chunks(hidden), teacher_chunks, chunks(targets), chunks(weights)))


def tag_weights(targets, tags, tag_weight):
    """(B, T) floats: tag_weight on the tokens that spell a tag, 1 on all others.

    tags  the ids of each tag. White space, letters and signs are never merged with each other, so a tag has
          the same ids wherever it stands; and as sequences they are not mistaken for any other '<'.
    """
    weights = torch.ones(targets.shape, device=targets.device)
    for ids in tags:
        windows = targets.unfold(1, len(ids), 1)                            # (B, T) -> (B, T - n + 1, n)
        found = (windows == torch.tensor(ids, device=targets.device)).all(-1)
        for i in range(len(ids)):
            weights[:, i:i + found.size(1)][found] = tag_weight
    return weights


# ---- judging an answer ----

def parse_answer(text):
    """What stands between <answer> and </answer>, or None if the text is not well-formed: one thought, then
    one answer, each tag once, nothing around them."""
    match = WELL_FORMED.fullmatch(text)
    if not match or any(text.count(tag) != 1 for tag in TAGS):
        return None
    return match[2].strip()
