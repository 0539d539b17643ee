"""distill.py: the loss is its formula whatever the chunks, and a tag weighs what it should."""
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TEXT, data_script, numbers
from distill import TAGS, chunked_loss, distillation_loss, parse_answer, tag_weights
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from train_tokenizer import Tokenizer, load_tokenizer, train_bpe

N, V = 500, 300


@pytest.fixture
def batch():
    """hidden states and heads of student and teacher, targets, weights"""
    return dict(head=torch.nn.Linear(16, V), hidden=torch.randn(N, 16, requires_grad=True),
                teacher_head=torch.nn.Linear(24, V).requires_grad_(False), teacher_hidden=torch.randn(N, 24),
                targets=torch.randint(V, (N,)), weights=torch.rand(N))


def test_loss_is_the_formula():
    """Every sum written out: KL(p || q) = sum p (log p - log q), both at temperature 2."""
    student, teacher = torch.randn(2, 6, 5) * 2
    targets, weights = torch.tensor([0, 4, 2, 2, 1, 3]), torch.tensor([1., 1, 10, 1, 1, 10])
    loss, ce, kl = distillation_loss(student, teacher, targets, weights, alpha=0.3, temperature=2.0)
    wanted_ce = [-torch.log(row.exp()[y] / row.exp().sum()) for row, y in zip(student, targets)]
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    wanted_kl = sum(p[i, v] * (p[i, v] / q[i, v]).log() for i in range(6) for v in range(5))
    torch.testing.assert_close(ce, sum(wanted_ce))
    torch.testing.assert_close(kl, wanted_kl)
    weighted = sum(w * c for w, c in zip(weights, wanted_ce))
    torch.testing.assert_close(loss, 0.3 * weighted + 0.7 * 4 * wanted_kl)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    logits = torch.randn(6, 5, requires_grad=True)
    ones = torch.ones(6)
    loss = distillation_loss(logits, logits.detach(), torch.zeros(6, dtype=torch.long), ones, 0.0, 2.0)[0]
    loss.backward()
    assert loss.abs() < 1e-6 and logits.grad.abs().max() < 1e-6


def test_temperature_squared_keeps_the_gradients_size():
    """d KL / d logits is (q - p) / T, and p and q differ 1/T as much: without T^2 it would vanish."""
    student, teacher = torch.randn(2, 200, 50) * 0.1
    sizes = []
    for temperature in (1.0, 4.0):
        x = student.clone().requires_grad_()
        distillation_loss(x, teacher, torch.zeros(200, dtype=torch.long), torch.ones(200), 0.0,
                          temperature)[0].backward()
        sizes.append(x.grad.norm())
    assert 0.9 < sizes[1] / sizes[0] < 1.1


@pytest.mark.parametrize('with_teacher', [True, False])
def test_chunks_change_nothing(batch, with_teacher):
    if not with_teacher:
        batch.update(teacher_head=None, teacher_hidden=None)
    results = []
    for size in (N, 70):
        batch['hidden'].grad = batch['head'].weight.grad = None
        sums = chunked_loss(**batch, alpha=0.5, temperature=1.5, chunk_size=size)
        sums[0].backward()
        results.append([sums.detach(), batch['hidden'].grad, batch['head'].weight.grad])
    for whole, pieces in zip(*results):
        torch.testing.assert_close(whole, pieces)


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor any operation returns."""
    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return out


def test_memory_does_not_grow_with_tokens_times_vocabulary(batch):
    """Neither is any tensor larger than a chunk's logits, nor are logits kept for the way back."""
    kept = []
    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.shape) or t, lambda t: t):
        loss = chunked_loss(**batch, alpha=0.5, temperature=1.5, chunk_size=20)[0]
        assert kept and (20, V) not in kept
        loss.backward()
    assert largest.size <= max(N * 24, 24 * V)          # hidden states, the teacher's weights

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.append(t.shape) or t, lambda t: t):
        distillation_loss(batch['head'](batch['hidden']), batch['teacher_head'](batch['teacher_hidden']),
                          batch['targets'], batch['weights'], 0.5, 1.5)
    assert largest.size == N * V and (N, V) in kept         # what the chunks avoid


def test_tags_weigh_ten_and_nothing_else_does(tokenizer):
    text = 'a < b and c > d\n<think>\nthink < 3\n</think>\n<answer>\n12\n</answer>'
    ids = tokenizer.encode(text)
    weights = tag_weights(torch.tensor([ids]), [tokenizer.encode(tag) for tag in TAGS], 10.0)[0]
    heavy = [token for token, weight in zip(ids, weights) if weight == 10]
    assert tokenizer.decode(heavy) == ''.join(TAGS)
    assert weights.sum() == 10 * len(heavy) + len(ids) - len(heavy)


def test_a_tag_that_is_cut_by_a_prompt_is_none():
    targets = torch.tensor([[5, 6, -100, 5, 6, 7]])
    assert tag_weights(targets, [[5, 6]], 10.0).tolist() == [[10, 10, 1, 10, 10, 1]]


def test_parse_answer():
    good = '<think>\n2 + 3 = 5\n</think>\n<answer>\n5\n</answer>'
    assert parse_answer(good) == '5'
    for bad in ('', '5', good + ' so', good.replace('</think>', ''), good + good,
                '<think></think><answer>5</answer>', good.replace('<answer>', '<answer><answer>')):
        assert parse_answer(bad) is None, bad


def test_cross_entropy_part_is_unweighted(batch):
    sums = chunked_loss(**batch, alpha=0.5, temperature=1.0)
    wanted = F.cross_entropy(batch['head'](batch['hidden']), batch['targets'], reduction='sum')
    torch.testing.assert_close(sums[1], wanted)


# ---- reason ----

def test_every_reason_answer_checks_and_nothing_held_out_was_trained():
    reason = data_script('reason')
    trained, held_out = [], []
    for record in reason.problems(count=3000):
        question, answer = (message['content'] for message in record['conversations'])
        thought = answer.split('<think>\n')[1].split('\n</think>')[0]
        for step in thought.split('\n'):
            asked, *parts, right = re.split('=|: |, ', step.partition(': ')[2])
            assert eval(asked) == int(right) > 0 and all(map(
                lambda left, result: eval(left) == int(result), parts[::2], parts[1::2])), step
        assert parse_answer(answer) == right
        # the numbers of a problem, and its story without names, things and numbers
        found = (tuple(sorted(re.findall(r'\d+', question))), re.sub(
            '|'.join([r'\d+', *reason.NAMES, *reason.THINGS]), '_', question.partition(' How many')[0]))
        assert set(found[0]) <= set(re.findall(r'\d+', answer))
        (trained if record['split'] == 'train' else held_out).append((record['label'], found))
    combinations = {key for _, (key, _) in trained}
    templates = {key for _, (_, key) in trained}
    assert {label for label, _ in trained} == {'new numbers'}
    assert {label for label, _ in held_out} == {'new numbers', 'new template'}
    for label, (combination, template) in held_out:
        assert (template in templates) == (label == 'new numbers')
        assert label == 'new template' or combination not in combinations
    new = {key for label, (_, key) in held_out if label == 'new template'}
    assert len(new) == len(reason.KINDS) and len(templates) > 10 * len(new)


@pytest.mark.parametrize('steps', [
    '47+25: 7+5=12, 40+20=60, 72', '63-28: 13-8=5, 50-20=30, 35', '67-25: 7-5=2, 60-20=40, 42',
    '100+30: 0+0=0, 100+30=130, 130', '98+7: 8+7=15, 90+0=90, 105', '43-8: 13-8=5, 30-0=30, 35', '7+5=12',
    '12*12=144'])
def test_sums_are_done_in_the_head(steps):
    x, op, y = re.match(r'(\d+)(.)(\d+)', steps).groups()
    assert data_script('reason').worked(int(x), op, int(y)) == steps


def test_tables_are_right_and_of_what_the_steps_take_as_known():
    for record in data_script('reason').tables(count=50):
        asked, known = (message['content'] for message in record['conversations'])
        assert [line.split('=')[0] for line in known.split('\n')] == asked.split(', ')
        for line in known.split('\n'):
            assert re.fullmatch(r'(\d\+\d|1?\d-\d|1?\d\*1?\d)=\d+', line) and eval(line.replace('=', '=='))


def test_a_student_is_taught_the_right_answers_of_a_teacher(tmp_path):
    reason, line = data_script('reason'), '-' * 40 + '\n'
    records = list(reason.problems())
    asked, others = ([message['content'] for message in record['conversations']] for record in records[:2])
    wrong = asked[1].replace('</answer>', '0</answer>')
    (tmp_path / 'a.txt').write_text(''.join('\n'.join(pair) + '\n' + line for pair in (
        asked, asked, [asked[0], wrong], [asked[0], 'so'], [others[0], asked[1]], ['Who?', asked[1]],
        ['Who?', '<think>'], [others[0], others[1].replace(':', ' :')])))
    both, same = (records[:2] for records in reason.taught(tmp_path / 'a.txt'))
    pairs = [asked, [others[0], others[1].replace(':', ' :')]]
    assert both == [reason.conversation(*pair, split='train') for pair in sorted(pairs)]
    assert same == [reason.conversation(*pair, split='train') for pair in sorted([asked, others])]
    assert reason.taught(tmp_path / 'a.txt')[0][2:] == [
        *reason.tables(), *(record for record in records if record['split'] == 'val')]
    (tmp_path / 'b.txt').write_text('so\n')
    with pytest.raises(ValueError, match='no right answer'):
        reason.taught(tmp_path / 'b.txt')


def test_a_student_is_not_taught_what_is_held_out(tmp_path, capsys):
    """A file may open with a byte order mark, too."""
    reason = data_script('reason')
    sides = {record['split']: [turn['content'] for turn in record['conversations']]
             for record in reason.problems(count=3000)}
    (tmp_path / 'a.txt').write_text(f'\n{"-" * 40}\n'.join(map('\n'.join, sides.values())), 'utf-8-sig')
    for found in reason.taught(tmp_path / 'a.txt'):
        texts = [[turn['content'] for turn in r['conversations']] for r in found if r['split'] == 'train']
        assert texts[0] == sides['train'] and sides['val'] not in texts
    assert '1 of 2 different answers are left out: their problems are held out' in capsys.readouterr().out


def test_what_ends_reason_is_one_line_and_leaves_nothing(script, tmp_path):
    """Ctrl-C; a full disk, for a file and for stdout; a file that is no text. stdout may be closed."""
    for name in ('reason', 'files'):
        shutil.copy(ROOT / 'data' / f'{name}.py', tmp_path)
    (tmp_path / 'bad.txt').write_bytes(b'\xff')
    assert 'bad.txt is not UTF-8' in script(tmp_path / 'reason.py', '--taught=bad.txt', code=2).stderr
    command = f'{sys.executable} reason.py'
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "\
            "resource.setrlimit(resource.RLIMIT_FSIZE, (9, 9)); "
    run_it = "import runpy, sys; sys.argv = ['reason.py']; runpy.run_path('reason.py', run_name='__main__')"
    for shell, code, words in [
            (f"{command} > /dev/full", 1, 'No space left'),
            (f'{sys.executable} -c "{limit}{run_it}"', 1, 'reason.jsonl: File too large'),
            (f'{sys.executable} -c "import json, signal; json.dumps = lambda _: signal.raise_signal(2); '
             f'{run_it}"', 130, 'interrupted'),
            (f"{command} >&-", 0, '')]:
        done = subprocess.run(shell, shell=True, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code and words in done.stderr and len(done.stderr.split('\n')) <= 3, done
        assert not list(tmp_path.glob('raw/*.part'))


# ---- the run ----

FAST = ['--device=cpu', '--dtype=float32', '--batch_size=4', '--block_size=128', '--log_interval=1',
        '--max_iters=4', '--eval_interval=2', '--report_size=4', '--max_new_tokens=8']
SMALL = ['--n_layer=1', '--n_embd=32']          # a student from scratch


def test_black_box_on_reason(script, tmp_path, run_folder):
    done = script('distill.py', str(ROOT / 'config/reason.py'), f'--init_from={run_folder}', '--out_dir=a',
                  '--dataset=./reason', *FAST, '--batch_size=2', '--max_iters=6')
    losses = numbers(r'held-out loss (\S+)', done.stdout)
    assert losses == sorted(losses, reverse=True)
    assert re.search(r'new template +\d+ problems  well-formed +0.0%  right +0.0%', done.stdout)
    # the loss counts a tag ten times, the cross-entropy beside it once
    loss, ce = numbers(r'loss (\S+)  ce', done.stdout)[0], numbers(r'  ce loss (\S+)', done.stdout)[0]
    assert loss > 2 * ce
    assert len(json.load(open(tmp_path / 'a' / 'report.json'))) == 4


def test_white_box_and_its_mistakes(script, tmp_path, run_folder):
    (tmp_path / 'chats.jsonl').write_text(''.join(
        json.dumps(dict(instruction=f'Say {i} twice.', input='', output=f'{i} {i}')) + '\n'
        for i in range(60)))
    script('prepare.py', '--input=chats.jsonl', f'--tokenizer={run_folder}', '--dataset=./chats',
           '--val_fraction=0.2')
    start = ['--dataset=./chats', f'--teacher={run_folder}', *FAST, *SMALL, '--report_size=0',
             '--min_lr=3e-3']
    done = script('distill.py', '--out_dir=whole', *start)
    # alpha 0.5, T 2: the loss is made of the parts printed beside it
    parts = [numbers(pattern, done.stdout)
             for pattern in (r'  loss (\S+)  ce', r'  ce loss (\S+)', r'  kl (\S+)')]
    for loss, ce, kl in zip(*parts):
        assert loss == pytest.approx(0.5 * ce + 0.5 * 4 * kl, abs=2e-4)
    # two ranks of two micro-batches are one of one
    cut = script('distill.py', '--out_dir=cut', *start, '--batch_size=1', '--gradient_accumulation_steps=4',
                 torchrun=2)
    assert numbers(r'  loss (\S+)  ce', cut.stdout) == pytest.approx(parts[0], abs=2e-4)
    script('distill.py', '--out_dir=parts', *start, '--max_iters=2')
    script('distill.py', '--out_dir=parts', '--init_from=resume', '--max_iters=4')
    whole, pieces = (torch.load(tmp_path / name / 'ckpt.pt')['model'] for name in ('whole', 'parts'))
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    # a teacher of another vocabulary
    other = tmp_path / 'other'
    shutil.copytree(run_folder, other)
    Tokenizer(train_bpe([TEXT] * 5, 340)).save(other)
    saved = torch.load(other / 'ckpt.pt')
    saved['tokenizer'] = load_tokenizer(other).fingerprint
    torch.save(saved, other / 'ckpt.pt')
    done = script('distill.py', '--out_dir=b', f'--init_from={run_folder}', '--dataset=./chats',
                  '--teacher=other', *FAST, code=2)
    assert 'has another vocabulary than' in done.stderr
