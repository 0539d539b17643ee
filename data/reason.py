r"""
The built-in set of arithmetic word problems with a worked solution (tutorial chapter II-12).

    python data/reason.py           # no network; less than a second

writes 6,000 records into data/raw/reason.jsonl, such as

    {"conversations": [{"role": "user", "content": "Ann has 3 eggs and gets 4 more. How many eggs ... now?"},
                       {"role": "assistant",
                        "content": "<think>\nall eggs: 3 + 4 = 7\n</think>\n<answer>\n7\n</answer>"}],
     "split": "train", "label": "new numbers"}

Two kinds of problem are held out, and the label tells them apart: 'new numbers' no training problem has
together, and a 'new template' no training problem is made from.
"""
import hashlib
import json
import os
import random
import sys

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'raw', 'reason.jsonl')
HELD_OUT = 0.05             # share of the problems, of each kind

# The question; its steps, "what it is: x op y", where r1 is the result of the first step; the ranges of
# its numbers.
TEMPLATES = [
    ('{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?',
     ['all {things}: {a} + {b}'], dict(a=(2, 50), b=(2, 50))),
    ('{name} has {a} {things} and gives {b} of them to {friend}. How many {things} are left?',
     ['{things} left: {a} - {b}'], dict(a=(30, 80), b=(2, 29))),
    ('There are {a} boxes with {b} {things} in each. How many {things} are there?',
     ['{things} in the boxes: {a} * {b}'], dict(a=(2, 12), b=(2, 12))),
    ('{name} buys {a} bags of {b} {things} and finds {c} more. How many {things} are that?',
     ['in the bags: {a} * {b}', 'with those found: {r1} + {c}'], dict(a=(2, 10), b=(2, 10), c=(2, 30))),
    ('{name} has {a} {things}, {friend} has {b} more than {name}. How many {things} do they have together?',
     ['{friend} has: {a} + {b}', 'together: {a} + {r1}'], dict(a=(2, 40), b=(2, 20))),
    ('A shop has {a} {things}. It sells {b} in the morning and {c} in the evening. How many {things} remain?',
     ['after the morning: {a} - {b}', 'after the evening: {r1} - {c}'],
     dict(a=(50, 99), b=(2, 25), c=(2, 24))),
    ('{name} puts {a} {things} into each of {b} boxes and has {c} left over. '
     'How many {things} were there at first?',
     ['in the boxes: {b} * {a}', 'at first: {r1} + {c}'], dict(a=(2, 10), b=(2, 10), c=(1, 9))),
    ('One of the {things} costs {a} coins. {name} buys {b} of them and pays with {c} coins. '
     'How many coins does {name} get back?',
     ['the price: {b} * {a}', 'coins back: {c} - {r1}'], dict(a=(2, 9), b=(2, 9), c=(82, 99))),
    ('{name} reads {a} pages a day for {b} days, then {c} pages on the last day. How many pages are that?',
     ['pages before the last day: {b} * {a}', 'all pages: {r1} + {c}'],
     dict(a=(2, 10), b=(2, 10), c=(2, 30))),
    ('{name} has {a} {things}, loses {b} of them, then finds {c}. How many {things} does {name} have now?',
     ['after the loss: {a} - {b}', 'after the find: {r1} + {c}'], dict(a=(30, 60), b=(2, 29), c=(2, 30))),
]
HELD_OUT_TEMPLATES = [      # other words for operations that are trained
    ('{friend} had {a} {things} and took {b} from {name}. How many {things} does {friend} have now?',
     ['all {things}: {a} + {b}'], dict(a=(2, 50), b=(2, 50))),
    ('In {a} rows stand {b} {things} each; {c} of them are broken. How many {things} are whole?',
     ['{things} in the rows: {a} * {b}', 'whole {things}: {r1} - {c}'],
     dict(a=(4, 10), b=(4, 10), c=(2, 15))),
]
NAMES = ('Ann', 'Ben', 'Carl', 'Dora', 'Emil', 'Fay', 'Gus', 'Hana', 'Ivo', 'June')
THINGS = ('apples', 'books', 'cards', 'eggs', 'keys', 'marbles', 'pens', 'shells', 'stamps', 'stones')
CALCULATE = {'+': int.__add__, '-': int.__sub__, '*': int.__mul__}


def problems(count=6000):
    """Yield the records. The answer shows the steps in <think>, "what it is: x op y = z", and the last z in
    <answer>."""
    rng, asked = random.Random(1337), set()
    while len(asked) < count:
        is_new = rng.random() < HELD_OUT            # the template
        question, steps, ranges = rng.choice(HELD_OUT_TEMPLATES if is_new else TEMPLATES)
        values = {key: rng.randint(*bounds) for key, bounds in ranges.items()}
        digest = hashlib.sha256(' '.join(map(str, values.values())).encode()).hexdigest()
        split = 'val' if is_new or int(digest[:8], 16) < HELD_OUT * 2**32 else 'train'
        name, friend = rng.sample(NAMES, 2)
        values.update(name=name, friend=friend, things=rng.choice(THINGS))
        worked = []
        for step in steps:
            step = step.format(**values)
            x, op, y = step.split(': ')[1].split()
            result = CALCULATE[op](int(x), int(y))
            worked.append(f"{step} = {result}\n")
            values[f'r{len(worked)}'] = result
        question = question.format(**values)
        if question not in asked:
            asked.add(question)
            answer = f"<think>\n{''.join(worked)}</think>\n<answer>\n{result}\n</answer>"
            yield dict(conversations=[dict(role='user', content=question),
                                      dict(role='assistant', content=answer)],
                       split=split, label='new template' if is_new else 'new numbers')


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')       # the path may have letters that a log lacks
    # all or nothing; two runs at once do not disturb each other
    part = f'{PATH}.{os.getpid()}.part'
    try:
        os.makedirs(os.path.dirname(PATH), exist_ok=True)
        with open(part, 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(record) + '\n' for record in problems())
        os.replace(part, PATH)
    except OSError as e:
        print(f"reason.py: {e}; put records as in its docstring into {PATH}", file=sys.stderr)
        sys.exit(2)
    print(f"wrote {PATH}")
