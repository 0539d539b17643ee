"""The classifier: what it reads, what of it learns, its scores, and whole runs."""
import json
import os

import numpy as np
import pytest
import show
import torch
from conftest import numbers
from torch.nn import functional as F

from configurator import save_checkpoint, start_run
from finetune_cls import (add_head, batch_at, classify_texts, confusion, freeze, label_logits,
                          load_classifier, naive_bayes, predictions, scores)
from model_gpt2 import GPT2, GPT2Config
from model_minimind import MiniMind, MiniMindConfig
from prepare import Split, open_data, read_labelled, write_data


def classifier(kind, n_labels=3):
    if kind == 'gpt2':
        model = GPT2(GPT2Config(vocab_size=100, n_positions=128, n_embd=32, n_layer=2, n_head=4))
    else:
        model = MiniMind(MiniMindConfig(
            vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128))
    return add_head(model, n_labels).eval()


def texts(lengths):
    tokens = np.random.default_rng(0).integers(1, 100, sum(lengths)).astype(np.uint16)
    return Split(tokens, np.zeros(len(tokens), np.uint8), np.cumsum([0, *lengths]))


# ---- the classifier ----

def test_naive_bayes_is_the_plain_count():
    train = texts([5, 30, 17, 9])._replace(labels=np.array([0, 1, 2, 1]))
    test = texts([4, 8, 3, 11, 6])._replace(labels=np.array([0, 1, 2, 1, 0]))
    rows = [[split.tokens[a:b].tolist() for a, b in zip(split.offsets, split.offsets[1:])]
            for split in (train, test)]
    right = 0
    for row, label in zip(rows[1], test.labels):
        values = []
        for k in range(3):
            seen = [i for ids, own in zip(rows[0], train.labels) if own == k for i in ids]
            values.append(np.log(1 + (train.labels == k).sum()) + sum(
                np.log((1 + seen.count(i)) / (100 + len(seen))) for i in row))
        right += np.argmax(values) == label
    assert naive_bayes(train, test, 3, 100) == right / 5



@pytest.mark.parametrize('kind', ['minimind', 'gpt2'])
def test_fifty_more_tokens_of_padding_change_neither_prediction_nor_loss(kind):
    model, labels = classifier(kind), np.array([0, 1, 2, 1])
    x, y, lengths = batch_at(texts([5, 30, 17, 1])._replace(labels=labels), range(4), 64)
    longer = torch.cat([x, torch.full((4, 50), 7)], dim=1)
    with torch.no_grad():
        expected, given = label_logits(model, x, lengths), label_logits(model, longer, lengths)
        alone = torch.cat([label_logits(model, row[None, :n], n[None]) for row, n in zip(x, lengths)])
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(given, alone, atol=1e-5, rtol=1e-5)
    assert F.cross_entropy(given, y).item() == pytest.approx(F.cross_entropy(expected, y).item(), abs=1e-6)


@pytest.mark.parametrize('kind', ['minimind', 'gpt2'])
def test_what_learns(kind):
    learning = {}
    for trainable in ('head', 'last', 'all'):
        model = classifier(kind)
        before = {name: p.clone() for name, p in model.named_parameters()}
        freeze(model, trainable)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        tokens = torch.arange(100).view(2, 50)
        logits = label_logits(model, tokens, torch.tensor([50, 40]))
        F.cross_entropy(logits, torch.tensor([0, 2])).backward()
        optimizer.step()
        learning[trainable] = {k for k, p in model.named_parameters() if not torch.equal(p, before[k])}
    head = {'lm_head.weight', 'lm_head.bias'}
    block, norm = dict(gpt2=('transformer.h.1.', 'transformer.ln_f.'),
                       minimind=('model.layers.1.', 'model.norm.'))[kind]
    assert learning['head'] == head
    assert learning['last'] - head and all(name.startswith((block, norm)) for name in learning['last'] - head)
    assert any(name.startswith(norm) for name in learning['last'])
    assert any('wte' in name or 'embed' in name for name in learning['all'])


@pytest.mark.parametrize('kind', ['minimind', 'gpt2'])
def test_the_head_reads_the_end_of_the_text_or_of_its_padding_or_the_first_token(kind):
    """Whatever batch a text stands in: in padding the row is block_size long, and repeats the text's end."""
    model, split = classifier(kind), texts([9, 20, 3])._replace(labels=np.array([0, 1, 2]))
    rows = [split.tokens[i:j].tolist() for i, j in zip(split.offsets, split.offsets[1:])]
    seen = dict(text=rows, padding=[row + row[-1:] * (32 - len(row)) for row in rows],
                first=[row[:1] for row in rows])
    for reads, whole in seen.items():
        expected = torch.cat([model(torch.tensor([row]))[0][:, -1] for row in whole])
        for some in ([0, 1, 2], [2], [0, 2]):
            x, _, lengths = batch_at(split, some, 32, reads)
            torch.testing.assert_close(label_logits(model, x, lengths), expected[some], atol=1e-5, rtol=1e-5)


def test_a_text_too_long_loses_its_end_but_not_its_last_token():
    split = texts([10, 3])._replace(labels=np.array([0, 1]))
    x, _, lengths = batch_at(split, [0, 1], 6)
    assert x.shape == (2, 6) and lengths.tolist() == [6, 3]
    assert x[0].tolist() == [*split.tokens[:5], split.tokens[9]]
    assert x[1, :3].tolist() == split.tokens[10:].tolist()


def test_scores_by_hand():
    true, predicted = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 0, 1])
    matrix = confusion(predicted, true, 3)
    assert matrix.tolist() == [[2, 1, 0], [1, 1, 0], [0, 1, 0]]
    result = scores(matrix)
    assert result['accuracy'] == pytest.approx(3 / 6)
    assert result['precision'] == pytest.approx([2 / 3, 1 / 3, 0])
    assert result['recall'] == pytest.approx([2 / 3, 1 / 2, 0])
    assert result['f1'] == pytest.approx([2 / 3, 2 / 5, 0])


# ---- runs ----

@pytest.fixture
def moods(tmp_path, tokenizer, byte_tokenizer):
    """moods(kind): texts that a word makes glad or sad, twice as many glad, prepared for tiny_run(kind)."""
    def make(kind):
        words = dict(glad=['sun', 'song', 'gift', 'feast'], sad=['rain', 'loss'])
        rows = [f'{label}\t{when} {who} the {word}' for label, some in words.items() for word in some
                for who in ('I saw', 'we know', 'she likes', 'they had') for when in ('today', 'again', 'so')]
        (tmp_path / 'moods.tsv').write_text('\n'.join(rows))
        pieces = read_labelled(str(tmp_path / 'moods.tsv'), balance=False)
        folder = str(tmp_path / f'moods_{kind}')
        words = byte_tokenizer if kind == 'gpt2' else tokenizer
        write_data(folder, words, pieces, 'moods.tsv', 'cls')
        return folder
    return make


SMALL = ['--batch_size=8', '--optimizer=adamw', '--learning_rate=3e-3', '--min_lr=3e-3', '--warmup_iters=0',
         '--dtype=float32', '--device=cpu', '--log_interval=1']


@pytest.mark.parametrize('kind', ['minimind', 'gpt2'])
def test_a_run_learns_and_then_classifies(script, tmp_path, tiny_run, moods, kind, tokenizer, byte_tokenizer):
    done = script('finetune_cls.py', f'--init_from={tiny_run(kind)}', f'--dataset={moods(kind)}',
                  '--out_dir=run', '--max_iters=60', '--eval_interval=20', '--class_weights', *SMALL)
    report = json.loads((tmp_path / 'run' / 'report.json').read_text())
    assert set(report) == {'train', 'val', 'test'} and report['test']['labels'] == ['glad', 'sad']
    assert report['train']['accuracy'] > 0.9 and report['test']['accuracy'] > 0.8
    assert np.sum(report['test']['confusion']) == 15
    printed = numbers(r'accuracy (\S+) of naive', done.stdout)
    assert printed == pytest.approx([report['test']['naive_bayes']], abs=1e-3) and printed[0] > 0.5
    printed = numbers(r'test  accuracy (\S+)', done.stdout)
    assert printed == pytest.approx([report['test']['accuracy']], abs=1e-3)
    (tmp_path / 'more.txt').write_text('today I saw the rain\n\nagain we know the song\n')
    done = script('finetune_cls.py', '--out_dir=run', '--classify_file=more.txt')
    lines = done.stdout.splitlines()
    assert '1 lines without text are left out' in done.stderr
    assert [line.split('\t')[0] for line in lines] == ['sad', 'glad']
    assert all(0.5 <= float(line.split('\t')[1]) <= 1 for line in lines)
    one = script('finetune_cls.py', '--out_dir=run', '--classify=today I saw the rain').stdout
    assert one.strip() == lines[0]
    assert 'classifier' in script('sample.py', '--out_dir=run', code=2).stderr
    (tmp_path / 'blank.txt').write_text('\n \n')
    (tmp_path / 'latin.txt').write_bytes('caf\ncafé'.encode('latin-1'))
    for file, words in (('nowhere', 'No such file'), ('blank.txt', 'no line with text'),
                        ('latin.txt', 'latin.txt:2: not UTF-8 (byte 0xe9)')):
        assert words in script('finetune_cls.py', '--out_dir=run', f'--classify_file={file}', code=2).stderr
    (tokenizer if kind == 'gpt2' else byte_tokenizer).save(tmp_path / 'run')
    assert 'another tokenizer' in script('finetune_cls.py', '--out_dir=run', '--classify=rain', code=2).stderr


@pytest.mark.parametrize('reads', ['text', 'padding', 'first'])
def test_what_is_asked_is_read_as_what_is_learned(tmp_path, tokenizer, moods, capsys, reads):
    """By ids: a text of the test split gets the same logits, with white space around it, and cut."""
    folder, run = str(tmp_path / 'run'), start_run('cpu', 'float32')
    meta, _, _, test = open_data(run, moods('minimind'), 'cls', tokenizer)
    texts = [tokenizer.decode(test.tokens[i:j - 1]) for i, j in zip(test.offsets, test.offsets[1:])]
    model = add_head(MiniMind(MiniMindConfig(vocab_size=350, hidden_size=32, num_hidden_layers=2,
                                             num_attention_heads=4)), 2)
    torch.nn.init.normal_(model.lm_head.weight)                     # so that probabilities differ
    block_size = int(np.diff(test.offsets).max()) - 1
    save_checkpoint(run, folder, tokenizer, model.config, model=model.state_dict(), step=1,
                    labels=meta['labels'], settings=dict(block_size=block_size, reads=reads))
    capsys.readouterr()
    p, labels = predictions(model, run, test, block_size, reads)[0].softmax(-1).max(-1)
    classify_texts(folder, [f' {text}\t\n' for text in texts], run)
    shown, said = capsys.readouterr()
    rows = [line.split('\t')[:2] for line in shown.splitlines()]
    assert rows == [[meta['labels'][i], f'{q:.3f}'] for i, q in zip(labels, p)]
    n_cut = int((np.diff(test.offsets) > block_size).sum())
    assert f'{n_cut} of {len(texts)} texts are longer than block_size={block_size}' in said
    with pytest.raises(SystemExit):
        classify_texts(folder, [' \n'], run)
    assert 'the text is empty' in capsys.readouterr().err


@pytest.mark.parametrize('reads', ['padding', 'first'])
def test_a_run_remembers_where_its_head_reads(script, tmp_path, tiny_run, moods, reads):
    data = moods('minimind')
    script('finetune_cls.py', f'--init_from={tiny_run("minimind")}', f'--dataset={data}', '--out_dir=run',
           '--max_iters=30', '--block_size=32', f'--reads={reads}', *SMALL)
    report = json.loads((tmp_path / 'run' / 'report.json').read_text())
    assert report['train']['accuracy'] > 0.9 if reads == 'padding' else report['test']['accuracy'] < 0.8
    folder, run = str(tmp_path / 'run'), start_run('cpu', 'float32')
    model, its_tokenizer, checkpoint = load_classifier(folder)
    test = open_data(run, data, 'cls', its_tokenizer)[3]
    logits, labels = predictions(model, run, test, 32, checkpoint['settings']['reads'])
    assert (logits.argmax(-1) == labels).double().mean().item() == pytest.approx(report['test']['accuracy'])
    text = its_tokenizer.decode(test.tokens[:test.offsets[1] - 1])
    said = script('finetune_cls.py', '--out_dir=run', f'--classify={text}', '--device=cpu').stdout.split('\t')
    p, label = logits[0].softmax(-1).max(-1)
    assert said[0] == checkpoint['labels'][label] and float(said[1]) == pytest.approx(p.item(), abs=0.02)


def test_the_table_of_variants(tmp_path, tiny_run, moods, capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['show'])
    settings = dict(arg.removeprefix('--').split('=') for arg in SMALL)
    run, data = tiny_run('minimind'), moods('minimind')
    show.classifier(tmp_path, init_from=run, dataset=data, max_iters=1, **settings)
    head, *rows = capsys.readouterr().out.splitlines()[-8:]
    assert head.split() == ['reads,', 'trainable', 'train', 'val', 'test'] and len(rows) == 7
    assert all(0 <= float(n) <= 1 for row in rows for n in row.split()[-3:])


def test_pictures(script, tmp_path, tiny_run, moods):
    pytest.importorskip('matplotlib')
    script('finetune_cls.py', f'--init_from={tiny_run("minimind")}', f'--dataset={moods("minimind")}',
           '--out_dir=run', '--max_iters=2', *SMALL)
    assert {'loss.png', 'accuracy.png'} <= set(os.listdir(tmp_path / 'run'))


def test_n_and_n_steps_are_2n_steps(script, tmp_path, tiny_run, moods):
    options = [f'--init_from={tiny_run("minimind")}', f'--dataset={moods("minimind")}', '--dropout=0.2',
               '--eval_interval=2', *SMALL]
    script('finetune_cls.py', *options, '--out_dir=whole', '--max_iters=8')
    script('finetune_cls.py', *options, '--out_dir=parts', '--max_iters=4')
    script('finetune_cls.py', '--init_from=resume', '--out_dir=parts', '--max_iters=8')
    whole, parts = (torch.load(tmp_path / name / 'ckpt.pt', weights_only=True) for name in ('whole', 'parts'))
    assert all(torch.equal(whole[part][key], parts[part][key])
               for part in ('model', 'last') for key in whole[part])
    assert whole['best'] == parts['best']
    model = load_classifier(str(tmp_path / 'whole'))[0]                 # the best weights, not the last
    assert all(torch.equal(p, whole['model'][key]) for key, p in model.state_dict().items())


def test_two_ranks_are_two_micro_batches(script, tmp_path, tiny_run, moods):
    options = [f'--init_from={tiny_run("minimind")}', f'--dataset={moods("minimind")}', '--max_iters=3',
               '--class_weights', '--dropout=0', *SMALL]
    one = script('finetune_cls.py', *options, '--out_dir=one')
    two = script('finetune_cls.py', *options, '--out_dir=two', '--batch_size=4',
                 '--gradient_accumulation_steps=2', torchrun=2)
    losses = [numbers(r'(?:val )?loss (\S+)', done.stdout) for done in (one, two)]
    assert len(losses[0]) == 5 and losses[0] == pytest.approx(losses[1], abs=2e-4)
    reports = [json.loads((tmp_path / name / 'report.json').read_text()) for name in ('one', 'two')]
    assert reports[0] == reports[1]


def test_mistakes_are_one_line(script, tiny_run, moods, tmp_path):
    run, data = tiny_run('minimind'), moods('minimind')
    (tmp_path / 'empty.py').write_text("classify_file = ''")
    for options, words in [
            ([f'--init_from={run}', f'--dataset={moods("gpt2")}'], 'was tokenised otherwise than'),
            ([f'--init_from={run}', f'--dataset={data}', '--trainable=most'], "'head', 'last', 'all'"),
            ([f'--init_from={run}', f'--dataset={data}', '--reads=last'], "'text', 'padding', 'first'"),
            ([f'--out_dir={run}', '--classify=x', '--reads=first'], 'reads applies not with --classify'),
            ([f'--out_dir={run}', '--classify=x'], 'is no classifier'),
            ([f'--out_dir={run}', '--classify='], 'classify is empty: give one'),
            ([f'--out_dir={run}', '--classify=""'], 'classify is empty: give one'),
            (['empty.py', f'--out_dir={run}'], 'empty.py:1: classify_file is empty: give one'),
            (['--out_dir=nowhere', '--classify=x'], 'nowhere'),
            ([f'--init_from={run}', '--dataset=none'], 'spam')]:
        assert words in script('finetune_cls.py', *options, code=2).stderr
