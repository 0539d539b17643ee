r"""
The built-in set of arithmetic word problems with a worked solution (tutorial chapter II-12).

    python data/reason.py           # no network; a second

writes 12,000 records into data/raw/reason.jsonl, such as

    {"conversations": [{"role": "user", "content": "Ann has 47 eggs and gets 25 more. How many ... in all?"},
                       {"role": "assistant", "content": "<think>\nall: 47+25: 7+5=12, 40+20=60, 72\n
                                                         </think>\n<answer>\n72\n</answer>"}],
     "split": "train", "label": "new numbers"}

A sum is worked as one does it in the head, ones apart from tens. What is known by heart, sums of digits and
products, is practised by 2,500 more records without a story. Two kinds of problem are held out, and the
label tells them apart: 'new numbers' no training problem has together, and a 'new template', a story in words
that no training problem has, for operations that are trained.

A student can also learn from the answers of a teacher alone, out/reason, to questions of training problems:

    python sample.py --out_dir=out/reason --chat --lines < data/raw/reason_questions.txt > answers.txt
    python data/reason.py --taught=answers.txt      # keeps the right ones -> data/raw/reason_taught.jsonl
    python prepare.py --input=data/raw/reason_taught.jsonl --tokenizer=out/reason
    python distill.py --teacher= --dataset=reason_taught --max_new_tokens=100

Beside it stands reason_same.jsonl, the set's own answers to the same questions: what a teacher is worth.
"""
import hashlib
import json
import os
import random
import re
import sys

from files import fail, running, writing

RAW = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'raw')
HELD_OUT = 0.05             # share of the problems, of each kind

# Of each kind of problem: its stories, of which the last is held out; what may be asked; the steps, "what it
# is: x op y", where r1 is the result of the first; the ranges of its numbers. [this|that] is one of them.
IN_ALL = ['How many {things} are there in all?', 'How many {things} is that together?',
          'How many {things} are that in all?']
LEFT = ['How many {things} are left?', 'How many {things} remain?', 'How many {things} are still there?']
NOW = ['How many {things} are there now?', 'How many {things} is that now?', 'How many {things} is it then?']
KINDS = [
    (['{name} has {a} {things} and [gets|finds|buys|wins] {b} more.',
      '{name} had {a} {things}. {friend} [gives|brings|sends] {name} {b} more.',
      'There are {a} {things} in a [box|bag|drawer]. {name} puts {b} more into it.',
      '{name} has {a} {things}, {friend} has {b}.',
      'On [Monday|Friday] {name} [collects|finds] {a} {things}, on Sunday {b}.',
      '{a} {things} lie on the table and {b} on the floor.',
      '{name} [makes|packs] {a} {things} today and {b} tomorrow.',
      '{a} {things} are in the kitchen, {b} [are|lie] in the garden.',
      '{friend} finds {b} {things}. {name} had {a} before that.',
      'To the {a} {things} on the [desk|wall|shelf] {friend} adds {b}.',
      'One shelf holds {a} {things}, another shelf holds {b}.'],
     IN_ALL, ['all: {a} + {b}'], dict(a=(2, 50), b=(2, 50))),
    (['{name} has {a} {things} and [gives|sells|sends] {b} of them to {friend}.',
      '{name} had {a} {things} but [lost|broke|dropped] {b} of them.',
      'There are {a} {things} in a [box|bag|drawer]. {name} takes {b} out.',
      'A shop has {a} {things} and sells {b} of them.',
      'Of {a} {things} {b} are [broken|lost|gone].',
      '{friend} [takes|borrows] {b} of the {a} {things} that {name} has.',
      '{name} [picked|made|bought] {a} {things} and gave {b} away.',
      '{b} of the {a} {things} in the garden are [stolen|taken].',
      'On the [desk|wall|shelf] were {a} {things}, but {b} fell down.',
      '{friend} gets {b} {things} from {name}, who had {a}.',
      '{a} {things} lie on the table. {name} takes {b} of them away.'],
     LEFT, ['left: {a} - {b}'], dict(a=(30, 80), b=(2, 29))),
    (['There are {a} [boxes|bags|drawers] with {b} {things} in each.',
      '{name} buys {a} [boxes|bags] of {b} {things} each.',
      '{name} [finds|collects|gets] {a} {things} a day for {b} days.',
      '{a} [children|friends|teachers] have {b} {things} each.',
      'In {a} rows stand {b} {things} each.',
      'Each of {a} [boxes|bags|rows] holds {b} {things}.',
      '{a} times {name} brings {b} {things}.',
      'On every [desk|wall|shelf] are {a} {things}, and there are {b} of these in the house.',
      '{name} packs {a} {things} into each of {b} [boxes|bags].',
      'Every one of {a} shops sells {b} {things}.',
      '{name} has {a} shelves, and {b} {things} lie on each of them.'],
     IN_ALL, ['all: {a} * {b}'], dict(a=(2, 12), b=(2, 12))),
    (['{name} buys {a} [boxes|bags] of {b} {things} and [finds|gets] {c} more.',
      'There are {a} [boxes|bags] with {b} {things} in each, and {c} {things} beside them.',
      '{name} [finds|collects|gets] {a} {things} a day for {b} days, then {c} on the last day.',
      '{a} [children|friends] have {b} {things} each, their teacher has {c}.',
      '{name} puts {a} {things} into each of {b} [boxes|drawers] and has {c} left over.',
      'In {a} rows stand {b} {things} each, and {c} more lie on the floor.',
      'Every one of {a} shops sells {b} {things}. {name} sells {c}.',
      '{name} packs {a} [boxes|bags] with {b} {things} each and keeps {c}.',
      'On each of {a} [desks|shelves] are {b} {things}, and {c} are in the garden.',
      '{a} times {name} brings {b} {things}. Then {friend} brings {c} more.',
      'Each of {a} drawers holds {b} {things}. {friend} brings {c} more.'],
     IN_ALL, ['first: {a} * {b}', 'all: {r1} + {c}'], dict(a=(2, 10), b=(2, 10), c=(2, 30))),
    (['{name} has {a} {things}, {friend} has {b} more than {name}.',
      '{name} [finds|collects|buys] {a} {things} and {friend} {b} more than that.',
      'A red box holds {a} {things}, a blue box {b} more than the red one.',
      'On [Monday|Friday] {name} sells {a} {things}, on Sunday {b} more than that.',
      'There are {a} {things} on the table, and on the floor {b} more than on the table.',
      'One shop has {a} {things}, another shop has {b} more than the first.',
      '{a} {things} are in the kitchen, in the garden are {b} more than in the kitchen.',
      '{name} [makes|packs] {a} {things} today and tomorrow {b} more than today.',
      'On one [desk|shelf] are {a} {things}, on another {b} more than on that.',
      '{friend} [gets|needs] {b} {things} more than {name}, who [gets|needs] {a}.',
      '{name} brings {a} {things}, and {friend} brings {b} more than {name} does.'],
     IN_ALL, ['others: {a} + {b}', 'all: {a} + {r1}'], dict(a=(2, 40), b=(2, 20))),
    (['A shop has {a} {things}. It sells {b} in the morning and {c} in the evening.',
      '{name} has {a} {things}, gives {b} to {friend} and [loses|breaks|drops] {c}.',
      'There are {a} {things} in a [box|bag|drawer]. {name} takes {b} out, {friend} takes {c} out.',
      'Of {a} {things} {b} are broken and {c} are lost.',
      '{name} had {a} {things}. {friend} [takes|borrows] {b}, then {c} more.',
      '{name} has {a} {things} and sells {b} on [Monday|Friday] and {c} on Sunday.',
      'On the [desk|shelf] were {a} {things}, but {b} fell down and {c} were taken.',
      '{name} [made|bought] {a} {things}, gave {b} away and sold {c}.',
      'From {a} {things} {name} takes {b} and {friend} {c}.',
      '{friend} gets {b} {things} and {c} {things} from {name}, who had {a}.',
      '{a} {things} lie on the table. {name} takes {b} of them away and loses {c}.'],
     LEFT, ['first: {a} - {b}', 'left: {r1} - {c}'], dict(a=(50, 99), b=(2, 25), c=(2, 24))),
    (['{name} has {c} {things} and gives {b} to each of {a} [friends|children].',
      'A shop has {c} {things} and sells {a} [boxes|bags] of {b}.',
      'There are {c} {things}. {name} puts {b} into each of {a} [boxes|bags|drawers].',
      '{name} had {c} {things} and [lost|sold|broke] {a} a day for {b} days.',
      'Of {c} {things} {a} [children|friends] take {b} each.',
      '{name} has {c} {things} and lays {a} of them into each of {b} rows.',
      '{name} made {c} {things} and packs {a} [boxes|bags] with {b} each.',
      'On the shelf were {c} {things}, but {a} fell down on each of {b} days.',
      '{a} times {name} takes {b} of the {c} {things} in the garden.',
      '{name} had {c} {things}. Each of {a} friends [takes|borrows] {b}.',
      '{a} friends of {name} borrow {b} each of {c} {things}.'],
     LEFT, ['first: {a} * {b}', 'left: {c} - {r1}'], dict(a=(2, 9), b=(2, 9), c=(82, 99))),
    (['{name} has {a} {things}, [loses|sells|breaks] {b} of them, then [finds|buys|gets] {c}.',
      'A shop has {a} {things}, sells {b} and [gets|buys] {c} new ones.',
      'There are {a} {things} in a [box|bag|drawer]. {name} takes {b} out and puts {c} into it.',
      '{name} had {a} {things}. {friend} [takes|borrows] {b} and brings {c}.',
      'Of {a} {things} {b} are lost, but {c} more are found.',
      '{name} has {a} {things}, gives {b} to {friend} and gets {c} back.',
      'On the [desk|shelf] were {a} {things}, but {b} fell down and {name} adds {c}.',
      '{name} [made|bought] {a} {things}, gave {b} away and makes {c} more.',
      'From {a} {things} {name} takes {b}, and {friend} adds {c} to the rest.',
      '{friend} gets {b} of the {a} {things} of {name}, who then buys {c}.',
      '{a} {things} lie on the table. {name} takes {b} of them away, {friend} brings {c} more.'],
     NOW, ['first: {a} - {b}', 'all: {r1} + {c}'], dict(a=(30, 60), b=(2, 29), c=(2, 30))),
]
NAMES = ('Ann', 'Ben', 'Carl', 'Dora', 'Emil', 'Fay', 'Gus', 'Hana', 'Ivo', 'June')
THINGS = ('apples', 'books', 'cards', 'eggs', 'keys', 'marbles', 'pens', 'shells', 'stamps', 'stones')
CALCULATE = {'+': int.__add__, '-': int.__sub__, '*': int.__mul__}


def worked(x, op, y):
    """How a sum is done in the head, ones before tens: '47+25: 7+5=12, 40+20=60, 72', and with a ten borrowed
    '63-28: 13-8=5, 50-20=30, 35'. A product, or a sum of two digits, is known: '7*8=56'."""
    result = CALCULATE[op](x, y)
    if op == '*' or max(x, y) < 10:
        return f"{x}{op}{y}={result}"
    ones, last = x % 10 + 10 * (op == '-' and x % 10 < y % 10), y % 10
    tens = CALCULATE[op](x - ones, y - last)
    return f"{x}{op}{y}: {ones}{op}{last}={result - tens}, {x - ones}{op}{y - last}={tens}, {result}"


def conversation(question, answer, **more):
    return dict(conversations=[dict(role='user', content=question),
                               dict(role='assistant', content=answer)], **more)


def problems(count=12000):
    """Yield the records. The answer shows the steps in <think>, "what it is: x op y = z", and the last z in
    <answer>."""
    rng, asked = random.Random(1337), set()
    while len(asked) < count:
        is_new = rng.random() < HELD_OUT            # the template
        stories, questions, steps, ranges = rng.choice(KINDS)
        story = stories[-1] if is_new else rng.choice(stories[:-1])
        question = re.sub(r'\[(.+?)\]', lambda found: rng.choice(found[1].split('|')), story)
        question += ' ' + rng.choice(questions)
        values = {key: rng.randint(*bounds) for key, bounds in ranges.items()}
        digest = hashlib.sha256(' '.join(map(str, sorted(values.values()))).encode()).hexdigest()
        split = 'val' if is_new or int(digest[:8], 16) < HELD_OUT * 2**32 else 'train'
        name, friend = rng.sample(NAMES, 2)
        values.update(name=name, friend=friend, things=rng.choice(THINGS))
        thought = ''
        for number, step in enumerate(steps, 1):
            what, sum_of_two = step.format(**values).split(': ')
            x, op, y = sum_of_two.split()
            values[f'r{number}'] = result = CALCULATE[op](int(x), int(y))
            thought += f"{what}: {worked(int(x), op, int(y))}\n"
        question = question.format(**values)
        if question not in asked:
            asked.add(question)
            answer = f"<think>\n{thought}</think>\n<answer>\n{result}\n</answer>"
            yield conversation(question, answer, split=split,
                               label='new template' if is_new else 'new numbers')


def tables(count=2500):
    """Yield records to practise what `worked` takes as known, ten at a time: sums of two digits, differences
    back to a digit, products."""
    rng = random.Random(1337)
    for _ in range(count):
        asked, known = [], []
        for op in rng.choices('+-*', k=10):
            x, y = (rng.randint(2, 12) if op == '*' else rng.randint(0, 9) for _ in range(2))
            x += y * (op == '-')
            asked.append(f"{x}{op}{y}")
            known.append(f"{asked[-1]}={CALCULATE[op](x, y)}")
        yield conversation(', '.join(asked), '\n'.join(known), split='train', label='tables')


def taught(path):
    """Two lists of records for a student: what a teacher answers to training problems, as sample.py prints
    it, where that is right, each once; and the set's own answers to the same questions. Both end with the
    tables and the problems held out."""
    real, known = list(problems()), dict(train={}, val={})
    for record in real:
        question, answer = (turn['content'] for turn in record['conversations'])
        known[record['split']][question] = answer
    own, held_out = known.values()
    try:
        with open(path, encoding='utf-8-sig') as f:
            pairs = {part.strip().partition('\n')[::2] for part in f.read().split('-' * 40)} - {('', '')}
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is not UTF-8 text ({e})") from None
    if n := sum(question in held_out for question, _ in pairs):
        print(f"{n:,} of {len(pairs):,} different answers are left out: their problems are held out")
    right = sorted((question, answer) for question, answer in pairs if question in own and answer.startswith(
        '<think>') and answer.partition('</think>')[2] == own[question].partition('</think>')[2])
    if not right:
        raise ValueError(f"{path} holds no right answer to a training problem of this set")
    print(f"{len(right):,} of {len(pairs):,} different answers are right, "
          f"{sum(answer == own[question] for question, answer in right):,} of them the set's own words")
    both = right, [(question, own[question]) for question in sorted(dict(right))]
    return [[*(conversation(*pair, split='train') for pair in pairs), *tables(),
             *(record for record in real if record['split'] == 'val')] for pairs in both]


def write(name, lines):
    """Write a file in data/raw/, all of it or nothing."""
    os.makedirs(RAW, exist_ok=True)
    with writing(os.path.join(RAW, name)) as f:
        f.writelines(line + '\n' for line in lines)


if __name__ == '__main__':
    with running():
        match sys.argv[1:]:
            case []:
                records = list(problems())
                write('reason.jsonl', map(json.dumps, [*records, *tables()]))
                write('reason_questions.txt', [record['conversations'][0]['content'] for record in records
                                               if record['split'] == 'train'][:6000])
            case [argument] if argument.startswith('--taught='):
                for name, records in zip(('taught', 'same'), taught(argument.partition('=')[2])):
                    write(f'reason_{name}.jsonl', map(json.dumps, records))
            case arguments:
                fail(f"{' '.join(arguments)}: give nothing, or --taught=FILE")
