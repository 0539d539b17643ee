"""dpo.py: the loss is the paper's, log-probabilities are sums over answers, and the reference never moves."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, numbers

from configurator import start_run
from dpo import answer_log_probs, batch_at, dpo_loss, learnable, open_pairs, reference_log_probs
from model_minimind import MiniMind, MiniMindConfig
from prepare import Split, encode_pair, pair_of
from pretrain import target_positions
from sample import load_run
from train_tokenizer import encode_chat


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
    found = answer_log_probs(model, tokens, targets, target_positions(targets))
    torch.testing.assert_close(found, torch.stack(wanted))


def test_padding_changes_nothing():
    model = small_model()
    tokens, targets = pairs_of(2, [4, 9])
    padded = [torch.cat([t, torch.full((2, 13), pad)], 1) for t, pad in ((tokens, 0), (targets, -100))]
    torch.testing.assert_close(*(answer_log_probs(model, x, y, target_positions(y))
                                 for x, y in (padded, (tokens, targets))))


# ---- data ----

USER, GOOD, BAD = ({'role': 'user', 'content': 'May I?'}, {'role': 'assistant', 'content': 'Yes.'},
                   {'role': 'assistant', 'content': 'No.'})
PAIR = {'chosen': [USER, GOOD], 'rejected': [USER, BAD]}


def test_prompt_is_shared_and_only_the_last_answer_is_target(tokenizer):
    messages = (USER, BAD, USER, GOOD)
    other = dict(role='assistant', content='No.')
    (chosen, chosen_mask), (rejected, rejected_mask) = encode_pair(tokenizer, messages, other)
    n = chosen_mask.index(1)
    assert n == rejected_mask.index(1) and chosen[:n] == rejected[:n]
    assert tokenizer.decode(chosen[n:]) == 'Yes.<|im_end|>' and all(chosen_mask[n:])
    assert tokenizer.decode(rejected[n:]) == 'No.<|im_end|>' and all(rejected_mask[n:])
    assert chosen + tokenizer.encode('\n') == encode_chat(tokenizer, messages)[0]


def test_instructions_with_two_answers_are_the_same_pairs():
    record = {'instruction': 'May I?', 'input': '', 'output': '?', 'chosen': 'Yes.', 'rejected': 'No.'}
    assert pair_of(record) == pair_of(PAIR) == ((USER, GOOD), BAD)


@pytest.mark.parametrize('record, reason', [
    (PAIR | {'rejected': [USER, GOOD]}, 'are the same answer'),
    (PAIR | {'rejected': [USER | {'content': 'Must I?'}, BAD]}, 'answer different prompts'),
    (PAIR | {'rejected': [USER, BAD | {'content': ' '}]}, '"rejected": turn 2, of the assistant, is empty'),
    ({'chosen': [USER, GOOD]}, 'no field "rejected"'),
    ({'instruction': 'May I?', 'chosen': 'Yes.', 'rejected': 'Yes. '}, 'are the same answer'),
])
def test_bad_pairs(record, reason):
    with pytest.raises(ValueError, match=reason):
        pair_of(record)


def test_a_bad_pair_is_one_line(script, tmp_path, tokenizer_folder):
    (tmp_path / 'pairs.jsonl').write_text(f"{json.dumps(PAIR)}\n{json.dumps({'chosen': [USER, GOOD]})}\n")
    done = script('prepare.py', '--input=pairs.jsonl', '--dataset=./d', f'--tokenizer={tokenizer_folder}',
                  code=2)
    assert 'pairs.jsonl:2: no field "rejected" among chosen' in done.stderr


def test_the_tutorials_preferences(script, shared, tokenizer_folder):
    """Six of the 1,100 records have the same answer on both sides."""
    done = script('prepare.py', f"--input={shared('data/instruction-data-with-preference.json')}",
                  '--dataset=./d', f'--tokenizer={tokenizer_folder}', '--on_error=skip')
    assert 'skipped 6 malformed records' in done.stderr
    assert sum(numbers(r'(?:train|val) +([\d,]+) documents', done.stdout)) == 2 * 1094


def split_of(*documents):
    """(ids, where the answer starts) of chosen, rejected, chosen, ... -> a Split."""
    return Split(np.array([t for ids, _ in documents for t in ids], dtype=np.uint16),
                 np.array([int(i >= n) for ids, n in documents for i in range(len(ids))], dtype=np.uint8),
                 np.cumsum([0, *(len(ids) for ids, _ in documents)]))


@pytest.fixture
def split():
    """Two pairs, of prompts 1 to 4 and 1 to 2."""
    return split_of(([1, 2, 3, 4, 5, 6, 7], 4), ([1, 2, 3, 4, 8], 4), ([1, 2, 9], 2), ([1, 2, 10, 11], 2))


def test_batch(split):
    x, y = batch_at(split, [1, 0], block_size=10)
    assert x.tolist() == [[1, 2, 0, 0, 0, 0], [1, 2, 10, 0, 0, 0], [1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 0, 0]]
    _ = -100
    assert y.tolist() == [[_, 9, _, _, _, _], [_, 10, 11, _, _, _], [_, _, _, 5, 6, 7], [_, _, _, 8, _, _]]


@pytest.mark.parametrize('block_size, rows', [
    (5, [([2, 3, 4, 5, 6], [-100, -100, 5, 6, 7]), ([2, 3, 4, 0, 0], [-100, -100, 8, -100, -100])]),
    (3, [([4, 5, 6], [5, 6, 7]), ([4, 0, 0], [8, -100, -100])]),
    (2, [([4, 5], [5, 6]), ([4, 0], [8, -100])]),           # only now the answer loses its end
])
def test_the_prompt_is_cut_first_and_alike(split, block_size, rows):
    x, y = batch_at(split, [0], block_size)
    assert list(zip(x.tolist(), y.tolist())) == rows


def test_pairs_alike_within_block_size_are_left_out_and_counted(split, capsys):
    same = [1, 2, 3, 4, 5, 6, 7]
    long = split_of((same + [8], 2), (same + [9], 2),               # differ in their last token only
                    ([1, 2, 3], 2), ([1, 2, 4], 2),
                    ([1, 2, 3], 2), ([1, 2, 3], 2),                 # alike: of a tokenizer that loses letters
                    (same + [8], 5), (same + [9], 5))               # the prompt is cut first
    assert learnable(long, 10) == ([0, 1, 3], 0)
    assert learnable(long, 4) == ([1, 3], 2)
    run = start_run('cpu', 'float32')
    assert open_pairs(run, 'there', 64, 4, train=long, val=split) == [[1, 3], [0, 1]]
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith('train: 2 pairs are cut to block_size=4; 2 are left out')
    assert said[1].startswith('val: 1 pairs are cut to block_size=4; 0 are left out')
    with pytest.raises(SystemExit) as end:
        open_pairs(run, 'there', 4, 4, train=split, val=split_of((same + [8], 2), (same + [9], 2)))
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count('\n') == 1
    assert 'there, val: no pair is left whose answers differ within --block_size=4' in line


# ---- the run ----

@pytest.fixture
def pairs_folder(tmp_path, tokenizer_folder, script):
    """Questions whose answer is preferred when it repeats the question's word."""
    words = [a + b for a in ('red', 'blue', 'green', 'grey', 'pink') for b in ('', 'ish', 'er', 'est')]
    with open(tmp_path / 'pairs.jsonl', 'w') as f:
        for i, word in enumerate(words * 3):
            asked = dict(role='user', content=f'{i}: {word}?')
            f.write(json.dumps(dict(chosen=[asked, dict(role='assistant', content=f'It is {word}.')],
                                    rejected=[asked, dict(role='assistant', content='The sea.')])) + '\n')
    script('prepare.py', '--input=pairs.jsonl', '--dataset=./pairs', f'--tokenizer={tokenizer_folder}',
           '--val_fraction=0.2')
    return tmp_path / 'pairs'


FAST = ['--device=cpu', '--dtype=float32', '--dataset=./pairs', '--batch_size=4', '--block_size=64',
        '--log_interval=1', '--learning_rate=2e-3', '--min_lr=2e-3', '--warmup_iters=1', '--max_iters=12',
        '--eval_interval=4']


def test_a_run_in_many_ways(script, pairs_folder, run_folder, tmp_path):
    before = (run_folder / 'ckpt.pt').read_bytes()
    start = [f'--init_from={run_folder}', *FAST]
    whole = script('dpo.py', '--out_dir=whole', *start)
    # it starts at ln 2, with no preference, and learns
    losses = numbers(r'held-out loss (\S+)', whole.stdout)
    accuracy = numbers(r'accuracy (\S+)%', whole.stdout)
    assert (losses[0], accuracy[0]) == (0.6931, 50) and accuracy[-1] > 99
    assert numbers(r'step +0/12  loss (\S+)', whole.stdout) == [0.6931]
    log = [json.loads(line) for line in open(tmp_path / 'whole' / 'metrics.jsonl')]
    margins = [line['val_margin'] for line in log if 'val_margin' in line]
    assert margins[0] == 0 and margins == sorted(margins) and margins[-1] > 0.1
    # the reference has not moved
    assert (run_folder / 'ckpt.pt').read_bytes() == before
    # two ranks of two micro-batches are one of one, and the reference is not computed again
    losses = numbers(r'loss (\S+)', whole.stdout)
    cache = {file: file.stat().st_mtime_ns for file in pairs_folder.glob('*_reference_*.npy')}
    cut = script('dpo.py', '--out_dir=cut', *start, '--batch_size=1', '--gradient_accumulation_steps=4',
                 '--eval_iters=100', torchrun=2)
    assert losses == pytest.approx(numbers(r'loss (\S+)', cut.stdout), abs=2e-4)
    assert {file: file.stat().st_mtime_ns for file in pairs_folder.glob('*_reference_*.npy')} == cache
    # nor does it matter when the reference is computed
    live = script('dpo.py', '--out_dir=live', *start, '--cache_reference=False')
    assert losses == pytest.approx(numbers(r'loss (\S+)', live.stdout), abs=2e-4)
    # 4 + 8 steps are 12
    script('dpo.py', '--out_dir=parts', *start, '--max_iters=4')
    script('dpo.py', '--out_dir=parts', '--init_from=resume', '--max_iters=12')
    one, two = (torch.load(tmp_path / name / 'ckpt.pt') for name in ('whole', 'parts'))
    assert one['step'] == two['step'] == 12 and one['reference'] == two['reference']
    assert all(torch.equal(one['model'][name], two['model'][name]) for name in one['model'])
    # a mean over the answer instead of the sum: rewards are several times smaller
    mean = script('dpo.py', '--out_dir=mean', *start, '--length_normalised')
    assert numbers(r'margin (\S+) =', mean.stdout)[1] < margins[1] / 2
    script('sample.py', '--out_dir=whole', '--max_new_tokens=3')


NODES = """
import sys
import numpy as np
import torch
from configurator import start_run
from dpo import reference_log_probs
from sample import load_run

run, model = start_run('cpu', 'float32'), load_run(sys.argv[1])[0]
how = 'train', [3, 1, 4], 64, 2, False
first = reference_log_probs(model, run, './pairs', *how)
again = reference_log_probs(model, run, './pairs' if run.rank == 0 else './elsewhere', *how)
assert np.array_equal(first, again) and first.shape == (3, 2) and (first < 0).all()
run.end()
"""


def test_rank_0_tells_the_others_what_the_reference_is(script, pairs_folder, run_folder, tmp_path):
    """Nodes may not share a disk: one of them has the file of the reference, the other has not."""
    shutil.copytree(pairs_folder, tmp_path / 'elsewhere')
    (tmp_path / 'nodes.py').write_text(NODES)
    script(tmp_path / 'nodes.py', run_folder, torchrun=2, env={'PYTHONPATH': str(ROOT)})
    assert len([*tmp_path.glob('*/*_reference_*.npy')]) == 1


def test_a_reference_that_cannot_be_kept_or_read(pairs_folder, run_folder, monkeypatch, capsys):
    run, model = start_run('cpu', 'float32'), load_run(run_folder)[0]
    how = model, run, str(pairs_folder), 'train', [0, 1], 64, 2, False
    monkeypatch.setattr('os.replace', lambda *_: (_ for _ in ()).throw(OSError(30, 'Read-only file system')))
    result = reference_log_probs(*how)
    assert 'is not kept for the next run' in capsys.readouterr().out
    monkeypatch.undo()
    assert np.array_equal(reference_log_probs(*how), result)
    path, = pairs_folder.glob('*_reference_*.npy')
    path.write_bytes(path.read_bytes()[:90])
    with pytest.raises(SystemExit) as end:
        reference_log_probs(*how)
    line = capsys.readouterr().err
    assert end.value.code == 2 and f'{path} is damaged' in line and line.count('\n') == 1


def test_other_data_is_one_line(script, run_folder, tmp_path):
    (tmp_path / 'text.txt').write_text('some words ' * 200)
    script('prepare.py', '--input=text.txt', '--dataset=./pairs', f'--tokenizer={run_folder}')
    assert "'pretrain'" in script('dpo.py', f'--init_from={run_folder}', *FAST, code=2).stderr
