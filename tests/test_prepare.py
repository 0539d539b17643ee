"""Conversations, instructions and labelled text on their way to arrays: masks, files, splits, mistakes."""
import csv
import io
import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import TEXT

import prepare
from prepare import HERE, Piece, read_labelled, read_meta, read_pieces, read_split, write_data
from pretrain import batch_at
from train_tokenizer import encode_chat


@pytest.fixture(autouse=True)
def nothing_counted():
    prepare.malformed.count, prepare.malformed.reasons = 0, {}
    prepare.unused.clear()


def turns(*contents):
    """user, assistant, user, ..."""
    roles = itertools.cycle(['user', 'assistant'])
    return [dict(role=role, content=content) for role, content in zip(roles, contents)]


THREE_TURNS = [dict(role='system', content='Be brief.'),
               *turns('Is it day?', 'Yes.', ' And now? \n', 'No, night.', 'Type <|im_end|>!', 'Why?')]


def runs(tokenizer, ids, mask):
    """[(target, text), ...]: the tokens one after another, those of equal mask together."""
    return [(target, tokenizer.decode([token for token, _ in group]))
            for target, group in itertools.groupby(zip(ids, mask), key=lambda pair: pair[1])]


# ---- the mask, token by token ----

def test_mask_of_three_turns_in_chatml(tokenizer):
    ids, mask = encode_chat(tokenizer, THREE_TURNS)
    assert runs(tokenizer, ids, mask) == [
        (0, '<|im_start|>system\nBe brief.<|im_end|>\n'
            '<|im_start|>user\nIs it day?<|im_end|>\n<|im_start|>assistant\n'),
        (1, 'Yes.<|im_end|>'),
        (0, '\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n'),
        (1, 'No, night.<|im_end|>'),
        (0, '\n<|im_start|>user\nType <|im_end|>!<|im_end|>\n<|im_start|>assistant\n'),
        (1, 'Why?<|im_end|>'),
        (0, '\n')]
    assert ids.count(tokenizer.im_end) == 7             # of seven turns; the one that was typed is plain text


def test_mask_of_three_turns_in_alpaca(byte_tokenizer):
    ids, mask = encode_chat(byte_tokenizer, THREE_TURNS)
    assert runs(byte_tokenizer, ids, mask) == [
        (0, 'Be brief.\n\n### Instruction:\nIs it day?\n\n### Response:\n'),
        (1, 'Yes.<|endoftext|>'),
        (0, '### Instruction:\nAnd now?\n\n### Response:\n'),
        (1, 'No, night.<|endoftext|>'),
        (0, '### Instruction:\nType <|im_end|>!\n\n### Response:\n'),
        (1, 'Why?<|endoftext|>')]
    assert ids.count(byte_tokenizer.eot) == 3


@pytest.mark.parametrize('name', ['tokenizer', 'byte_tokenizer'])
def test_what_generation_is_given_is_what_training_saw(name, request):
    tokenizer = request.getfixturevalue(name)
    ids, mask = encode_chat(tokenizer, THREE_TURNS)
    prompt, targets = encode_chat(tokenizer, THREE_TURNS[:-1], add_generation_prompt=True)
    assert ids[:len(prompt)] == prompt
    assert targets == mask[:len(prompt)] and mask[len(prompt)] == 1


def test_debug_mask_prints_the_table(script, tmp_path, tokenizer_folder):
    (tmp_path / 'chat.jsonl').write_text(json.dumps(dict(messages=turns('Hi', 'Yo'))))
    done = script('prepare.py', '--input=chat.jsonl', f'--tokenizer={tokenizer_folder}', '--debug_mask')
    rows = [re.split(r'\s{2,}', line.strip()) for line in done.stdout.splitlines()[1:]]
    targets = [row[3] for row in rows if row[2] == 'yes']
    assert targets[-1] == "'<|im_end|>'" and ''.join(t.strip("'") for t in targets) == 'Yo<|im_end|>'
    assert not (tmp_path / 'chat').exists()


# ---- conversations from files ----

def test_every_kind_of_file_holds_the_same_conversations(tmp_path, tokenizer):
    chats = [turns(f'What is {n} plus one?', str(n + 1)) for n in range(60)]
    files = {'a.jsonl': '\n'.join(json.dumps(dict(conversations=chat)) for chat in chats),
             'b.jsonl': '\n\n'.join(json.dumps(dict(messages=chat, other=1)) for chat in chats),
             'c.json': json.dumps([dict(messages=chat) for chat in chats], indent=2),
             'd.json': json.dumps([dict(instruction=q['content'], input='', output=a['content'])
                                   for q, a in chats])}
    arrays = []
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        folder = str(tmp_path / f'{name}_data')
        meta = write_data(folder, tokenizer, read_pieces(str(tmp_path / name), 'sft', 0.2), name, 'sft')
        assert meta['train']['documents'] + meta['val']['documents'] == 60
        assert read_meta(folder, 'sft') == meta
        arrays.append([np.concatenate(read_split(folder, split)[:3]) for split in ('train', 'val')])
    for other in arrays[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(arrays[0], other))


MISTAKES = {
    'role.jsonl': (dict(messages=[dict(role='human', content='Hi')]), ["unknown role 'human'"]),
    'two.jsonl': (dict(messages=[*turns('Hi'), *turns('Hey')]), ["turn 2 is the user's"]),
    'first.jsonl': (dict(messages=turns('a', 'b')[1:]), ["no turn is the user's"]),
    'system.jsonl': (dict(messages=[*turns('a', 'b'), dict(role='system', content='c')]),
                     ["turn 3 is the system's"]),
    'last.jsonl': (dict(messages=turns('a')), ["nothing answers it"]),
    'empty.jsonl': (dict(messages=turns('Hi', ' ')), ["turn 2, of the assistant, is empty"]),
    'content.jsonl': (dict(messages=[dict(role='user')]), ['no field "content" among role']),
    'type.jsonl': (dict(messages='Hi'), ['"messages" is not a list of turns but "Hi"']),
    'output.jsonl': (dict(instruction='Hi', input=''), ['no field "output" among instruction, input']),
    'answer.jsonl': (dict(instruction='Hi', output=''), ['"output" is empty']),
    'other.jsonl': (dict(prompt='Hi'),
                    ['no field "conversations" or "messages" or "instruction" among prompt']),
}


@pytest.mark.parametrize('name', MISTAKES)
def test_a_malformed_conversation_is_one_line_or_skipped(tmp_path, capsys, name):
    record, words = MISTAKES[name]
    good = json.dumps(dict(messages=turns('fine', 'fine')))
    file = tmp_path / name
    file.write_text(f'{good}\n{json.dumps(record)}\n{good}\n')
    with pytest.raises(SystemExit, match='2'):
        list(read_pieces(str(file), 'sft'))
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1 and f'{name}:2: ' in line and '--on_error=skip' in line
    assert all(word in line for word in words), line
    prepare.malformed.count = 0
    assert len(list(read_pieces(str(file), 'sft', on_error='skip'))) == 2 and prepare.malformed.count == 1


@pytest.mark.parametrize('text, words', [
    ('{"messages": []}', 'a.json:1: not a list'), ('[\n\n{"messages": [}]', 'a.json:3: not JSON'),
    ('[{"instruction": "a", "output": "b"}\n{', 'a.json:2: not JSON'),
    ('[\n{"instruction": "a", "output": "b"},\n{"instruction": "a"}]', 'a.json, record 2: no field "output"'),
    ('[\n' + '[' * 10**6, 'a.json:1: JSON nested too deep')])
def test_a_broken_json_list_is_reported_with_its_line(tmp_path, capsys, text, words):
    (tmp_path / 'a.json').write_text(text)
    with pytest.raises(SystemExit):
        list(read_pieces(str(tmp_path / 'a.json'), 'sft'))
    assert words in capsys.readouterr().err


def test_a_malformed_record_leaves_no_folder_behind(script, tmp_path, tokenizer_folder):
    (tmp_path / 'chats.jsonl').write_text(json.dumps(dict(messages=turns('Hi', 'Yo'))) + '\n' + '[' * 10**6)
    line = script('prepare.py', '--input=chats.jsonl', f'--tokenizer={tokenizer_folder}', '--dataset=./chats',
                  code=2, process=True).stderr
    assert 'chats.jsonl:2: JSON nested too deep' in line
    assert [path.name for path in tmp_path.iterdir()] == ['chats.jsonl']


# ---- the split ----

def sides_of(tmp_path, records, task='sft', val_fraction=0.3):
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, records)))
    return [piece.split for piece in read_pieces(str(tmp_path / 'a.jsonl'), task, val_fraction)]


def test_conversations_that_open_alike_are_split(tmp_path):
    chats = [dict(messages=turns('Hello', 'Hello!', f'Price of {i}?', '3')) for i in range(200)]
    sides = sides_of(tmp_path, chats)
    assert 40 < sides.count('val') < 80


def test_answers_to_one_question_are_on_one_side(tmp_path):
    """With other white space, too: what is encoded is the same, or nearly."""
    asked = [(f'Is {i} even?', f' Is {i}  even?\n') for i in range(60)]
    chats = [dict(messages=turns('Hi', 'Hi!', question, answer))
             for pair in asked for question in pair for answer in ('Yes.', 'No.')]
    sides = sides_of(tmp_path, chats)
    assert sides[::4] == sides[1::4] == sides[2::4] == sides[3::4] and 8 < sides[::4].count('val') < 30
    pairs = [dict(instruction=question, chosen='Yes', rejected=no)
             for pair in asked for question in pair for no in ('No', 'Perhaps')]
    sides = sides_of(tmp_path, pairs, 'dpo')
    assert sides[::4] == sides[1::4] == sides[2::4] == sides[3::4] and 8 < sides[::4].count('val') < 30
    texts = [dict(text=question) for pair in asked for question in pair]
    sides = sides_of(tmp_path, texts, 'pretrain')
    assert sides[::2] == sides[1::2] and 8 < sides[::2].count('val') < 30


def test_no_conversation_is_in_train_and_val_token_for_token(tmp_path, tokenizer):
    chats = [dict(messages=turns(f'Is {i} even?{end}', f'No.{end}'))
             for i in range(60) for end in ('', ' ', '\n')]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, chats)))
    write_data(str(tmp_path / 'd'), tokenizer, read_pieces(str(tmp_path / 'a.jsonl'), 'sft', 0.3), 'a', 'sft')
    train, val = ({tuple(split.tokens[a:b]) for a, b in zip(split.offsets, split.offsets[1:])}
                  for split in (read_split(str(tmp_path / 'd'), name) for name in ('train', 'val')))
    assert len(train) + len(val) == 60 and len(val) > 8


def test_prompts_of_a_pair_may_differ_in_white_space_at_the_end():
    pair = prepare.pair_of(dict(chosen=turns('Hi ', 'Yes'), rejected=turns('Hi', 'No')))
    assert pair == (tuple(turns('Hi', 'Yes')), dict(role='assistant', content='No'))


@pytest.mark.parametrize('name, setting', [
    ('text.txt', '--seed=3'), ('text.txt', '--balance=False'), ('chats.jsonl', '--special_tokens=False'),
    ('mail.csv', '--val_fraction=0.2')])
def test_a_setting_without_effect_on_the_task_is_refused(script, tmp_path, tokenizer_folder, name, setting):
    (tmp_path / 'text.txt').write_text('one two three ' * 99)
    (tmp_path / 'chats.jsonl').write_text(json.dumps(dict(messages=turns('Hi', 'Yo'))))
    (tmp_path / 'mail.csv').write_text(''.join(f'{label},{label} {i}\n' for label in 'ab' for i in range(9)))
    line = script('prepare.py', f'--input={name}', setting, f'--tokenizer={tokenizer_folder}', code=2).stderr
    assert f"{setting.partition('=')[0]} has no effect on data for the task" in line


# ---- labelled text ----

def labelled(folder, name, text, **options):
    (folder / name).write_bytes(text.encode())
    return {(p.label, p.content) for p in read_labelled(str(folder / name), **options)}


def test_tables_in_all_their_forms(tmp_path):
    texts = [f'text {i}, "quoted"' for i in range(3)] + ['tab\there', 'line\nbreak', 'plain']
    expected = {('a' if i < 3 else 'b', text) for i, text in enumerate(texts)}
    for columns, header in [((0, 1), None), ((1, 0), ['Text', 'LABEL']),
                            ((0, 2, 1), ['label', 'id', 'text'])]:
        file = io.StringIO(newline='')
        rows = csv.writer(file)
        rows.writerows([header] if header else [])
        rows.writerows([(label, text, 7)[c] for c in columns] for label, text in sorted(expected))
        assert labelled(tmp_path, 'a.csv', file.getvalue()) == expected
    # a .tsv as UCI's: no header, no quoting, one record a line; and as spreadsheets write it
    assert labelled(tmp_path, 'd.tsv', 'a\tone\r\na\t"two" of "them\r\na\tthree\tand a tab\r\n'
                    'b\t"it\tsaid ""so"""\r\nb\t5\r\nb\t6') == {
        ('a', 'one'), ('a', '"two" of "them'), ('a', 'three\tand a tab'), ('b', 'it\tsaid "so"'), ('b', '5'),
        ('b', '6')}


@pytest.mark.parametrize('text', [
    'label;text\r\na;"one; ""two"""\r\na;two, three\r\na;3\r\nb;4\r\nb;5\r\nb;6\r\n',       # Excel
    'a;"one; ""two"""\na;two, three\na;3\nb;4\nb;5\nb;6\n',
    'Text\t"label"\n"one; ""two"""\ta\ntwo, three\ta\n3\ta\n4\tb\n5\tb\n6\tb\n',
    'label,text,,\na,"one; ""two""",,\na,"two, three",,\na,3,,\nb,4,,\nb,5,,\nb,6,,\n',        # Kaggle
    'a,"one; ""two""",,\na,"two, three",,\na,3,,\nb,4,,\nb,5,,\nb,6,,\n'])
def test_separators_and_empty_columns_of_a_csv(tmp_path, text):
    assert labelled(tmp_path, 'A.CSV', '\ufeff' + text) == {
        ('a', 'one; "two"'), ('a', 'two, three'), ('a', '3'), ('b', '4'), ('b', '5'), ('b', '6')}


def test_a_bad_row_of_a_table_is_skipped_alone(tmp_path):
    long = 'word ' * 30_000                                             # more than csv's own 131,072
    rows = f'a,1\na,"Free" entry\na,2\na,3\nb,4\nb,5\nb,"{long}"\nb,"7\nb,8'
    assert labelled(tmp_path, 'a.csv', rows, on_error='skip') == {
        ('a', '1'), ('a', '2'), ('a', '3'), ('b', '4'), ('b', '5'), ('b', long.strip())}
    assert prepare.skipped().replace(f'{tmp_path}/', '') == (
        "; skipped 2 malformed records: 1 x not a row of .csv (',' expected after '\"'), first at a.csv:2; "
        "1 x not a row of .csv (unexpected end of data), first at a.csv:8")


def test_splits_are_70_10_20_of_each_label_and_share_no_text(tmp_path, tokenizer):
    rows = [f'{"xyz"[i % 3]}\tmessage number {i}' for i in range(300)]
    rows += [f'x\tMessage  NUMBER {i}' for i in range(0, 90, 3)] + [f'x\tmore {i}' for i in range(70)]
    (tmp_path / 'a.tsv').write_text('\n'.join(rows))
    for balance, counts in [(True, [100, 100, 100]), (False, [170, 100, 100])]:
        pieces = read_labelled(str(tmp_path / 'a.tsv'), balance)
        assert Counter(p.label for p in pieces) == dict(zip('xyz', counts))
        assert len({p.content.casefold() for p in pieces}) == len(pieces)
        for split, share in dict(train=0.7, val=0.1, test=0.2).items():
            of_split = Counter(p.label for p in pieces if p.split == split)
            assert of_split == {name: round(share * n) for name, n in zip('xyz', counts)}
    assert read_labelled(str(tmp_path / 'a.tsv')) == read_labelled(str(tmp_path / 'a.tsv'))
    assert read_labelled(str(tmp_path / 'a.tsv'), seed=2) != read_labelled(str(tmp_path / 'a.tsv'))
    folder = str(tmp_path / 'd')
    write_data(folder, tokenizer, pieces, 'a.tsv', 'cls')
    test, names = read_split(folder, 'test'), read_meta(folder, 'cls')['labels']
    assert len(test.labels) == len(test.offsets) - 1 == 74 and names == ['x', 'y', 'z']
    assert [names[i] for i in test.labels] == [p.label for p in pieces if p.split == 'test']
    assert test.tokens[test.offsets[1] - 1] == tokenizer.eot
    assert test.mask.sum() == 74 and test.mask[test.offsets[1:] - 1].all()      # where the classifier reads


@pytest.mark.parametrize('text, words', [
    ('a,1\na,2\na,3\n', ["needs two labels, and here is one, 'a'"]),
    ('a,1\na,2\na,3\nb,4\nb,5\nb,6\nc,7\n', ["a.csv:7: the label 'c' is seen once"]),
    ('kind,message\na,1\na,2\na,3\nb,4\nb,5\nb,6', ["a.csv:1: the label 'kind' is seen once", 'header']),
    ('a,1\n,2\n', ['a.csv:2: the label is empty']), ('a,1\nb\n', ['a.csv:2: the text is empty']),
    ('a,1\nb,1\n', ["a.csv:2: this text has the label 'b', but 'a' at", 'a.csv:1']),
    ('a,1\n"b,2\n', ['a.csv:2: not a row of .csv']), ('a,caf\udce9\n', ['a.csv:1: not UTF-8 (byte 0xe9)'])])
def test_a_malformed_table_is_one_line(tmp_path, capsys, text, words):
    (tmp_path / 'a.csv').write_bytes(text.encode(errors='surrogateescape'))
    with pytest.raises(SystemExit, match='2'):
        read_labelled(str(tmp_path / 'a.csv'))
    line = capsys.readouterr().err
    assert len(line.splitlines()) == 1 and all(word in line for word in words), line


def test_a_label_seen_once_can_be_skipped(tmp_path):
    assert {label for label, _ in labelled(tmp_path, 'a.csv', 'a,1\na,2\na,3\nb,4\nb,5\nb,6\nc,7\n',
                                           on_error='skip')} == {'a', 'b'}


# ---- the spam set that ships ----

def test_the_spam_set_is_half_spam_without_near_duplicates():
    with open(f'{HERE}/data/spam.csv', encoding='utf-8', newline='') as f:
        rows = list(csv.DictReader(f))
    labels = [row['label'] for row in rows]
    assert len(rows) >= 600 and labels.count('spam') == labels.count('ham') == len(rows) / 2
    words = [set(re.findall(r"[a-z0-9']+", row['text'].lower())) for row in rows]
    closest = max(len(a & b) / len(a | b) for a, b in itertools.combinations(words, 2))
    assert closest < 0.4, "two messages share two words in five"


def test_no_simple_rule_sorts_the_spam_set():
    with open(f'{HERE}/data/spam.csv', encoding='utf-8', newline='') as f:
        rows = list(csv.DictReader(f))
    spam = np.array([row['label'] == 'spam' for row in rows])
    lengths = np.array([len(row['text']) for row in rows])
    assert max(((lengths > n) == spam).mean() for n in range(300)) < 0.7
    for pattern in [r'free|win|won|prize|claim|cash|urgent|click|offer|loan|guaranteed', r'\.example', r'!',
                    r'\d', r'[A-Z]{3}', r'\b(reply|txt|text|call)\b']:
        found = np.array([bool(re.search(pattern, row['text'])) for row in rows])
        assert (found == spam).mean() < 0.75, pattern


# ---- the command ----

@pytest.mark.parametrize('options, words', [
    (['--dataset=pydoc_stf'], ["did you mean 'pydoc_sft'?"]), (['--input=no.csv'], ['no such file: no.csv'])])
def test_a_wrong_source_is_one_line(script, options, words):
    line = script('prepare.py', *options, code=2).stderr
    assert all(word in line for word in words)


def test_data_of_another_task_is_refused(tmp_path, tokenizer, capsys):
    folder = str(tmp_path / 'd')
    pieces = [Piece(split, (turns('a', 'b'),)) for split in ('train', 'val')]
    write_data(folder, tokenizer, pieces, 'test', 'sft')
    with pytest.raises(SystemExit):
        read_meta(folder, 'cls')
    assert "prepared for the task 'sft', not 'cls'" in capsys.readouterr().err


def test_a_last_document_that_fills_the_batch_is_all(tmp_path, byte_tokenizer):
    pieces = [Piece('val', 'a b'), Piece('train', 'a b ' * (1 << 18))]
    meta = write_data(tmp_path / 'data', byte_tokenizer, pieces, 'text')
    assert [meta[split]['documents'] for split in ('train', 'val')] == [1, 1]


def test_where_all_tokens_are_targets_there_is_no_mask(script, tmp_path, tokenizer):
    """It would be a byte a token. Read back it is one number, however often it is asked for."""
    texts = [Piece(split, TEXT) for split in ('train', 'train', 'val')]
    meta = write_data(str(tmp_path / 'd'), tokenizer, texts, 'test')
    assert {path.name for path in (tmp_path / 'd').glob('*.npy')} == {
        f'{split}_{field}.npy' for split in ('train', 'val') for field in ('tokens', 'offsets')}
    train, n = read_split(str(tmp_path / 'd'), 'train'), meta['train']['tokens']
    assert meta['train']['targets'] == n and train.mask.shape == (n,) and train.mask.all()
    assert train.mask.dtype == np.uint8 and train.mask.strides == (0,)
    ones = train._replace(mask=np.ones(n, dtype=np.uint8))
    for found, wanted in zip(batch_at(train, [0, 9, n - 5], 16), batch_at(ones, [0, 9, n - 5], 16)):
        assert torch.equal(found, wanted)
    done = script('pretrain.py', '--dataset=./d', '--n_layer=1', '--n_embd=32', '--block_size=16',
                  '--max_iters=1', '--device=cpu', '--eval_iters=1', '--out_dir=run').stdout
    assert 'training loss' in done
