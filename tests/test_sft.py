"""Instruction tuning: rows, the loss they give however they are laid out, and whole runs in both formats."""
import json
import os
import re

import numpy as np
import pytest
import show
import torch
from conftest import numbers

from model_gpt2 import GPT2, GPT2Config
from model_minimind import MiniMind, MiniMindConfig
from prepare import Piece, Split, read_split, write_data
from train_tokenizer import encode_chat
from sample import load_run, prompt_that_fits
from sft import Rows, answers, exact_match, last_answers, learnable, pack

LETTERS = 'abcdefghij'


def turns(*contents):
    return [dict(role=role, content=content) for role, content in zip(['user', 'assistant'] * 4, contents)]


def split_of(documents):
    """A Split from [(ids, mask), ...]."""
    ids, masks = zip(*documents)
    return Split(np.concatenate(ids).astype(np.uint16), np.concatenate(masks).astype(np.uint8),
                 np.cumsum([0, *map(len, ids)]))


def random_split(n=60, vocab=100, seed=0):
    """Conversations of 5 to 60 tokens, whose last third is the answer."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 60, n)
    return split_of([(rng.integers(1, vocab, k), np.arange(k) >= k - k // 3 - 1) for k in lengths])


def tiny(kind):
    if kind == 'gpt2':
        return GPT2(GPT2Config(vocab_size=100, n_positions=192, n_embd=32, n_layer=2, n_head=4)).eval()
    return MiniMind(MiniMindConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                                   num_key_value_heads=2, max_position_embeddings=192)).eval()


def loss_and_gradient(model, rows):
    model.zero_grad()
    x, y, segments = rows.batch(rows.rows)
    loss = model(x, y, segments=segments)[1]
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


# ---- rows ----

@pytest.mark.parametrize('kind', ['minimind', 'gpt2'])
def test_packed_rows_have_the_loss_and_gradient_of_padded_ones(kind):
    model, split = tiny(kind), random_split()
    docs = np.arange(60)
    loss, gradient = loss_and_gradient(model, Rows(split, docs, 128, 'padded'))
    for layout, block_size in [('packed', 128), ('packed', 64), ('bucketed', 128), ('padded', 178)]:
        rows = Rows(split, docs, block_size, layout)
        other, its_gradient = loss_and_gradient(model, rows)
        assert other == pytest.approx(loss, abs=1e-5), (layout, block_size)
        torch.testing.assert_close(its_gradient, gradient, atol=1e-5, rtol=1e-4)
    # padded to 178 instead of 128: 50 more tokens of padding change nothing


@pytest.mark.parametrize('kind', ['minimind', 'gpt2'])
def test_in_a_packed_row_no_conversation_sees_another(kind):
    model, split = tiny(kind), random_split(3)
    rows = Rows(split, [0, 1, 2], 192, 'packed')
    x, _, segments = rows.batch(rows.rows)
    assert len(x) == 1 and segments[0].unique().numel() == 4             # three, and the padding
    together = model(x, segments=segments)[0][0]
    for number in range(3):
        own = segments[0] == number
        alone = model(x[:, own])[0][0]
        torch.testing.assert_close(together[own], alone, atol=1e-5, rtol=1e-4)


def test_pack_puts_each_once_and_wastes_little():
    lengths = np.random.default_rng(0).integers(5, 120, 2000)
    rows = pack(lengths, 256)
    assert sorted(i for row in rows for i in row) == list(range(2000))
    fill = [sum(lengths[i] for i in row) for row in rows]
    assert max(fill) <= 256 and np.mean(fill) > 0.97 * 256
    assert pack([256, 256, 1], 256) == [[0], [1], [2]]


@pytest.mark.parametrize('layout', ['packed', 'bucketed', 'padded'])
def test_an_epoch_reads_each_conversation_once_in_an_order_of_seed_and_step(layout):
    split, docs = random_split(), np.arange(60)
    rows = Rows(split, docs, 64, layout, seed=3)
    whole = len(rows.rows) // 4 * 4
    read = [doc for step in range(whole // 4) for row in rows.read(4 * step, 4) for doc in row]
    assert len(set(read)) == len(read) and (len(rows.rows) != whole or len(read) == 60)
    again = Rows(split, docs, 64, layout, seed=3)
    assert all(map(np.array_equal, again.read(4 * 37, 4), rows.read(4 * 37, 4)))    # without those before
    other = Rows(split, docs, 64, layout, seed=4)
    assert [list(row) for row in other.read(0, 4)] != [list(row) for row in rows.read(0, 4)]


def test_buckets_hold_rows_of_like_length():
    split = random_split(400)
    rows = Rows(split, np.arange(400), 64, 'bucketed')
    steps = [rows.batch(rows.read(8 * step, 8)) for step in range(50)]
    padding = sum((~(x != 0)).sum().item() for x, _, _ in steps) / sum(x.numel() for x, _, _ in steps)
    assert padding < 0.1 and len({x.shape[1] for x, _, _ in steps}) > 10


def test_the_first_end_of_text_is_learned_and_padding_is_not(byte_tokenizer):
    """Chapter I-8: <|endoftext|> ends the answer, and pads."""
    chats = [encode_chat(byte_tokenizer, turns(*pair)) for pair in (('Hi', 'Yo'), ('Hello', 'Ho'))]
    rows = Rows(split_of(chats), [0, 1], 256, 'padded')
    for row, answer in zip(rows.rows, ('Yo', 'Ho') if rows.rows[0] == [0] else ('Ho', 'Yo')):
        x, y, _ = rows.batch([row])
        assert byte_tokenizer.decode(y[y != -100].tolist()) == f'{answer}<|endoftext|>'
        assert y[0, -100:].eq(-100).all()


def test_what_cutting_loses_is_counted():
    answer_at = lambda *where: (np.ones(40), [int(i in where) for i in range(40)])      # noqa: E731
    split = split_of([answer_at(5, 6), answer_at(5, 30), answer_at(5, 20, 21), answer_at(30, 35)])
    keep, n_cut, n_lost = learnable(split, 20)          # targets up to number 20
    assert keep.tolist() == [0, 1, 2] and n_cut == 4 and n_lost == 3
    assert learnable(split, 40)[1:] == (0, 0)


# ---- report ----

def test_last_answers(tokenizer):
    chats = [turns('a?', 'A', 'b?', 'B'), turns('c?', 'C')]
    split = split_of([encode_chat(tokenizer, chat) for chat in chats])
    texts = [tuple(map(tokenizer.decode, pair)) for pair in last_answers(split, [1, 0])]
    assert texts[0] == ('<|im_start|>user\nc?<|im_end|>\n<|im_start|>assistant\n', 'C<|im_end|>')
    assert texts[1][0].endswith('A<|im_end|>\n<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\n')
    assert texts[1][1] == 'B<|im_end|>'


@pytest.mark.parametrize('expected, answer, same', [
    ('a, b', 'A,  b', True), ('a, b', 'a', False), ('more words than can be checked by a match', 'x', None),
    ('<think>2 + 2</think><answer>4</answer>', 'So <answer>4</answer>', True),
    ('<answer>4</answer>', '4', False)])
def test_exact_match(expected, answer, same):
    assert exact_match(expected, answer) == same


# ---- runs ----

@pytest.fixture
def counting(tmp_path, tokenizer, byte_tokenizer):
    """counting(kind): prepared conversations about the next letter, with the tokenizer of tiny_run(kind)."""
    def make(kind):
        folder = tmp_path / f'counting_{kind}'
        asks = ['After {}?', 'What follows {}?', '{}, and then?']
        pieces = [Piece('train' if (i + j) % 5 else 'val', (turns(ask.format(letter), after),))
                  for i, (letter, after) in enumerate(zip(LETTERS, LETTERS[1:] + 'a'))
                  for j, ask in enumerate(asks)]
        write_data(str(folder), byte_tokenizer if kind == 'gpt2' else tokenizer, pieces, 'test', 'sft')
        return folder
    return make


SMALL = ['--batch_size=8', '--block_size=200', '--eval_interval=30', '--learning_rate=5e-3', '--min_lr=5e-3',
         '--warmup_iters=0', '--max_new_tokens=12', '--dtype=float32', '--device=cpu']


@pytest.mark.parametrize('kind', ['minimind', 'gpt2'])
def test_a_run_learns_to_answer_in_the_format_and_to_stop(script, tmp_path, tiny_run, counting, kind):
    done = script('sft.py', f'--init_from={tiny_run(kind)}', f'--dataset={counting(kind)}', '--out_dir=out',
                  '--max_iters=60', *SMALL)
    losses = numbers(r'held-out loss (\S+)', done.stdout)
    assert losses[-1] < 0.5 * losses[0]
    report = json.loads((tmp_path / 'out' / 'report.json').read_text())
    assert len(report) == 6 and all(entry['stopped'] for entry in report)
    assert all(re.fullmatch('[a-j]', entry['answer']) for entry in report)
    assert f"{sum(entry['exact_match'] for entry in report)} of 6 checkable ones" in done.stdout
    assert {'ckpt.pt', 'tokenizer.json', 'metrics.jsonl', 'report.json'} <= set(os.listdir(tmp_path / 'out'))


def test_n_and_n_steps_are_2n_steps(script, tmp_path, tiny_run, counting):
    options = [f'--init_from={tiny_run("minimind")}', f'--dataset={counting("minimind")}', '--dropout=0.2',
               '--report_size=0', *SMALL]
    script('sft.py', *options, '--out_dir=whole', '--max_iters=8')
    script('sft.py', *options, '--out_dir=parts', '--max_iters=4')
    script('sft.py', '--init_from=resume', '--out_dir=parts', '--max_iters=8')
    whole, parts = (load_run(str(tmp_path / name))[0].state_dict() for name in ('whole', 'parts'))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_two_ranks_are_two_micro_batches(script, tmp_path, tiny_run, counting):
    options = [f'--init_from={tiny_run("minimind")}', f'--dataset={counting("minimind")}', '--max_iters=3',
               '--log_interval=1', '--report_size=0', '--layout=bucketed', *SMALL]
    one = script('sft.py', *options, '--out_dir=one', '--batch_size=8')
    two = script('sft.py', *options, '--out_dir=two', '--batch_size=4', '--gradient_accumulation_steps=2',
                 torchrun=2)
    losses = [numbers(r'(?:held-out )?loss (\S+)', done.stdout) for done in (one, two)]
    assert len(losses[0]) == 5 and losses[0] == pytest.approx(losses[1], abs=2e-4)


def test_mistakes_are_one_line(script, tmp_path, tiny_run, counting):
    run, data = tiny_run('minimind'), counting('minimind')
    for options, words in [
            ([f'--dataset={counting("gpt2")}'], 'was tokenised otherwise than'),
            ([f'--init_from={tiny_run("gpt2")}', '--block_size=400'], 'longer than the context'),
            ([f'--dataset={data}', '--block_size=2'], 'no answer is left within --block_size=2'),
            ([f'--dataset={data}', '--layout=pack'], "did you mean 'packed'?"),
            (['--dataset=nothing'], 'pydoc_sft'), ([f'--dataset={data}', '--init_from=nowhere'], 'nowhere')]:
        assert words in script('sft.py', f'--init_from={run}', *options, code=2).stderr


def test_debug_mask(script, tiny_run, counting):
    done = script('sft.py', f'--init_from={tiny_run("minimind")}', f'--dataset={counting("minimind")}',
                  '--debug_mask')
    assert done.stdout.splitlines()[1].split() == ['0', '1', '-', "'<|im_start|>'"]
    assert done.stdout.count('yes') < done.stdout.count('\n') / 2


def test_loss_on_all_makes_targets_of_prompts_but_not_in_the_held_out_loss(script, tiny_run, counting):
    """Not of padding, nor of the first token. The same rows, so that only the targets differ."""
    options = [f'--init_from={tiny_run("minimind")}', f'--dataset={counting("minimind")}']
    table = script('sft.py', *options, '--loss_on=all', '--debug_mask').stdout.splitlines()[1:]
    assert [line.split()[2] for line in table] == ['-'] + ['yes'] * (len(table) - 1)
    options += ['--max_iters=1', '--out_dir=run', '--report_size=0', *SMALL]
    done = {how: script('sft.py', *options, f'--loss_on={how}').stdout for how in ('answers', 'all')}
    first = [re.findall(r'held-out loss (\d\S+)', out)[0] for out in done.values()]
    assert first[0] == first[1]
    loss = [numbers(r'step +0/1 +loss (\S+)', out) for out in done.values()]
    assert loss[0] != loss[1] and 'over its answers alone' in done['all']
    assert re.findall(r'\d+ conversations in .+? in use', done['answers'])[0] in done['all']


def test_loss_on_all_is_the_mean_over_each_token_that_follows_another(script, tiny_run, counting):
    folder, data = tiny_run('minimind'), counting('minimind')
    train, model = read_split(str(data), 'train'), load_run(str(folder))[0]
    texts = [torch.tensor([train.tokens[i:j].tolist()]) for i, j in zip(train.offsets, train.offsets[1:])]
    out = script('sft.py', f'--init_from={folder}', f'--dataset={data}', '--loss_on=all', '--layout=padded',
                 '--out_dir=run', '--max_iters=1', '--report_size=0', *SMALL,
                 f'--batch_size={len(texts)}').stdout
    total = sum(model(text[:, :-1], text[:, 1:])[1].item() * (text.numel() - 1) for text in texts)
    mean = total / sum(text.numel() - 1 for text in texts)
    assert numbers(r'step +0/1 +loss (\S+)', out) == pytest.approx([mean], abs=2e-4)


def test_the_table_of_both_losses(tmp_path, tiny_run, counting, capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['show'])
    settings = dict(arg.removeprefix('--').split('=') for arg in SMALL)
    run, data = tiny_run('minimind'), counting('minimind')
    show.loss_on(tmp_path, init_from=run, dataset=data, max_iters=1, **settings)
    _, answers, everything = capsys.readouterr().out.splitlines()
    assert answers.split()[0] == 'answers' and everything.split()[0] == 'all'
    assert answers.split()[1] == everything.split()[1] and 'of 6' in answers


# ---- conversation ----

def test_a_conversation_is_answered_as_its_whole_history(script, tiny_run):
    """`sample.py --chat` says what the model says to the conversation in one piece."""
    folder = tiny_run('minimind')
    model, its_tokenizer, _ = load_run(str(folder))
    typed = 'Hi\nWhat is \\\na <|im_end|>?\n/reset\n\nHi\n/exit\nnot read\n'
    done = script('sample.py', f'--out_dir={folder}', '--chat', '--system=Be kind.', '--temperature=0',
                  '--device=cpu', '--max_new_tokens=6', '--dtype=float32', input=typed)
    system, messages, expected = dict(role='system', content='Be kind.'), [], []
    for text in ('Hi', 'What is \na <|im_end|>?'):
        messages.append(dict(role='user', content=text))
        prompt = encode_chat(its_tokenizer, [system, *messages], add_generation_prompt=True)[0]
        expected.append(answers(model, its_tokenizer, [prompt], 6)[0][0])
        messages.append(dict(role='assistant', content=expected[-1]))
    assert done.stdout == ''.join(answer + '\n' for answer in [*expected, expected[0]])


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(tokenizer):
    messages = [dict(role='system', content='Be kind.'), *turns('a', 'b', 'c', 'd', 'e')]
    whole = encode_chat(tokenizer, messages, add_generation_prompt=True)[0]
    assert prompt_that_fits(tokenizer, messages, len(whole)) == whole and len(messages) == 6
    shorter = prompt_that_fits(tokenizer, messages, len(whole) - 1)
    assert [m['content'] for m in messages] == ['Be kind.', 'c', 'd', 'e']
    assert shorter == encode_chat(tokenizer, messages, add_generation_prompt=True)[0]
    assert prompt_that_fits(tokenizer, messages, 5) is None


def test_questions_that_leave_no_room_for_an_answer_are_counted(script, run_folder, tmp_path, tokenizer):
    chat = (dict(role='user', content='Who? ' * 20), dict(role='assistant', content='A keeper.'))
    pieces = [Piece('train', (chat,)), Piece('val', (chat,))]
    write_data(str(tmp_path / 'chats'), tokenizer, pieces, 'x', 'sft')
    out = script('sft.py', f'--init_from={run_folder}', '--dataset=./chats', '--out_dir=out',
                 '--max_iters=1', '--batch_size=1', '--block_size=256', '--max_new_tokens=250',
                 '--device=cpu', '--dtype=float32').stdout
    assert '1 of 1 questions are left out of the report' in out and '0 held-out answers' in out
