"""
The judge of form: whether a classical Chinese poem has the lines, the rhyme and the tones of its kind, and
whether it is what an order asks. poems.py makes its sets with it, and has the command that judges a file.

What a character rhymes with and which tone it has is computed from the collection, by tables() below. The
classes of rhyme that come out are those of the old rhyme books (萧, 肴 and 豪 are three). Sounds have changed
since: of real Tang poems 96% rhyme by these classes, and 58% by today's readings.
"""
import json
import os
import random
import re
from collections import Counter, defaultdict

FORMS = {(4, 5): ('五言绝句', '五绝'), (4, 7): ('七言绝句', '七绝'),         # lines, characters a line
         (8, 5): ('五言律诗', '五律'), (8, 7): ('七言律诗', '七律')}
FORM_NAMED = {name: form for form, names in FORMS.items() for name in names}
THEMES = '春夏秋冬日月星云风雨雪霜山水江海花草松竹梅柳莲菊雁莺蝉马舟剑琴酒茶书梦'
# The wordings of orders. The judge reads an order by the same wordings that make it.
ORDERS = dict(
    title=['以《{title}》为题写一首{form}', '写一首题为《{title}》的{form}', '{form}，题为《{title}》',
           '请以《{title}》为题作{form}一首', '作{form}一首，题目是《{title}》',
           '我想要一首{form}，题目叫《{title}》'],
    form=['写一首{form}', '作{form}一首', '请写一首{form}', '来一首{form}', '请作一首{form}',
          '我想读一首{form}'],
    theme=['写一首关于“{theme}”的{form}', '以“{theme}”为主题作一首{form}', '写一首咏{theme}的{form}',
           '请写一首{form}，要写到{theme}', '作{form}一首，其中要有“{theme}”字'],
    manner=['仿{author}的风格写一首{form}', '学{author}作一首{form}', '用{author}的口吻写一首{form}',
            '如果你是{author}，请作{form}一首'],
    first=['以“{first}”为首句写一首{form}', '首句是“{first}”，请续成一首{form}',
           '以“{first}”开头作一首{form}', '“{first}”，请接着写完这首{form}'],
    next=['“{line}”的下一句是什么', '请接下一句：{line}', '{line}，请对出下一句', '“{line}”，下一句怎么写'])
CI_ORDERS = dict(
    tune=['以《{tune}》为词牌填一首词', '填一首《{tune}》', '请填一首《{tune}》', '用词牌《{tune}》写一首词',
          '写一首词，词牌是《{tune}》', '来一首《{tune}》'],
    first=['以“{first}”开头填一首《{tune}》', '词牌《{tune}》，首句是“{first}”，请续完'],
    manner=['仿{author}的风格填一首《{tune}》', '学{author}填一首《{tune}》'])
FIELDS = dict(form='|'.join(FORM_NAMED), theme=f'[{THEMES}]')
PATTERNS = [re.compile(re.sub(r'\{(\w+)\}', lambda m: f'(?P<{m[1]}>{FIELDS.get(m[1], ".+?")})', wording))
            for orders in (ORDERS, CI_ORDERS) for wordings in orders.values() for wording in wordings]


def read_order(text):
    """What an order asks, {field: value}, from the last row of a prompt that has a known wording; of another
    wording the name of a form; {} of anything else."""
    for row in reversed(re.split(r'\n|<\|\w+\|>', text)):
        for pattern in PATTERNS:
            if found := pattern.fullmatch(row.strip().rstrip('。？！')):
                return found.groupdict()
    found = re.search(FIELDS['form'], text)
    return dict(form=found[0]) if found else {}


# ---- text <-> lines ----

def lines_of(text):
    """The lines of verse in a text, without punctuation. Rows that have none, a title, a name or a rhyme, are
    left out where others have it."""
    rows = text.replace('、', '').split('\n')               # a pause within a line of a ci
    rows = [row for row in rows if re.search('[，。？！；]', row)] or rows
    return tuple(line for row in rows for line in re.split('[，。？！；：]', row.strip()) if line)


def couplets(lines):
    """A text of lines, two in a row."""
    ends = [f'{line}{"，。"[i % 2]}' for i, line in enumerate(lines)]
    return '\n'.join(map(''.join, zip(ends[::2], [*ends[1::2], ''])))


def chinese(lines):
    return all(re.fullmatch('[\u3400-\u9fff\U00020000-\U0003ffff]+', line) for line in lines)


def form_of(lines):
    """(number of lines, characters a line) if that is one of FORMS, else None."""
    form = (len(lines), len(lines[0]) if lines else 0)
    return form if form in FORMS and all(len(line) == form[1] for line in lines) and chinese(lines) else None


# ---- the rules ----

class Judge:
    """Marks the form of poems. It knows

    tone        {character: 0 level (平) or 1 oblique (仄)}; what may be both is missing, and fits everywhere
    rhymes      {character: the numbers of its rhyme classes};  classes  their characters, frequent ones first
    tunes       {tune of a ci: the lengths of its lines}
    known       the lines of training poems, to count what is copied
    """

    def __init__(self, tables, known=()):
        self.tone = {c: i for i, name in enumerate(('level', 'oblique')) for c in tables[name]}
        self.classes, self.rhymes = tables['rhymes'], defaultdict(set)
        for number, characters in enumerate(self.classes):
            for c in characters:
                self.rhymes[c].add(number)
        self.tunes = {tune: tuple(lengths) for tune, lengths in tables['tunes'].items()}
        self.known = set(known)

    def rhyme_class(self, lines):
        """The number of the class in which the even lines rhyme; None if they do not."""
        return min(set.intersection(*(self.rhymes[line[-1]] for line in lines[1::2])), default=None)

    def rhyme(self, lines):
        """Whether the even lines end in different characters of one rhyme class."""
        ends = [line[-1] for line in lines[1::2]]
        return len(set(ends)) == len(ends) and self.rhyme_class(lines) is not None

    def line_tones(self, line):
        """Whether the second, fourth and sixth characters take turns, level and oblique. A line that ends
        level-oblique-level-oblique is the usual one with two characters swapped, and allowed (拗救)."""
        tone = [self.tone.get(c) for c in line]
        if tone[-4:] == [0, 1, 0, 1]:
            tone[-3:-1] = 0, 1
        return all(differ(a, b) for a, b in zip(tone[1::2], tone[3::2]))

    def tones(self, lines):
        """Whether a poem is regulated: all its lines are; second characters differ within a couplet (对) and
        agree between couplets (粘); even lines end level, odd lines from the third on oblique."""
        second, last = ([self.tone.get(line[i]) for line in lines] for i in (1, -1))
        pairs = list(zip(second, second[1:]))
        return (all(map(self.line_tones, lines)) and all(differ(a, b) for a, b in pairs[::2])
                and all(a == b or None in (a, b) for a, b in pairs[1::2])
                and 1 not in last[1::2] and 0 not in last[2::2])

    def marks(self, text, order=''):
        """{name in COLUMNS: whether, or which share of the lines} of a text. 'order' is marked only where the
        order asks something that can be seen; rhyme and tones not in a ci and a single line. What is of no
        regular form does not rhyme and is not regulated."""
        lines, asked = lines_of(text), read_order(order)
        form, count = form_of(lines), max(1, len(lines))
        marks = dict(form=bool(form), rhyme=bool(form) and self.rhyme(lines),
                     line_tones=sum(map(self.line_tones, lines)) / count,
                     tones=bool(form) and self.tones(lines),
                     copied=sum(line in self.known for line in lines) / count)
        if 'form' in asked:
            marks['form'] = form == FORM_NAMED[asked['form']]
        elif asked:
            lengths = self.tunes.get(asked['tune']) if 'tune' in asked else (len(asked['line']),)
            marks = dict(form=tuple(map(len, lines)) == lengths and chinese(lines), copied=marks['copied'])
        if asked:
            marks['order'] = (marks['form'] and asked.get('theme', '') in ''.join(lines)
                              and asked.get('first') in (None, lines[0]))
        return marks


def differ(a, b):
    """Whether two tones do; None may be either."""
    return a != b or a is None


# ---- what the judge knows, from the collection ----

def tables(poems, tones):
    """What a Judge knows, from training poems with .lines, .form, .era and .title, and from a Counter of
    (character, tone). A character is of a tone if it has that at least 8 times in 10."""
    of = defaultdict(Counter)
    for (c, tone), n in tones.items():
        if tone in '平仄○':                                   # the last is both
            of[c][tone] += n
    return dict({name: ''.join(c for c in of if of[c][tone] >= 0.8 * of[c].total())
                 for name, tone in (('level', '平'), ('oblique', '仄'))},
                rhymes=rhyme_classes([poem.lines for poem in poems if poem.form]),
                tunes=tunes_of([poem for poem in poems if poem.era == 'ci']))


def rhyme_classes(poems):
    """Strings of characters that rhyme with each other, from those that end the even lines of one poem.

    In the graph of these ties each character moves into the class to which it is tied most beyond chance,
    until none moves (modularity; Blondel et al. 2008, first phase). It is also in any other that has a tenth
    of its ties: some have two readings, and some are two characters in traditional script.
    """
    ties = defaultdict(Counter)
    for lines in poems:
        ends = dict.fromkeys(line[-1] for line in lines[1::2])
        for a in ends:
            for b in ends:
                if a != b:
                    ties[a][b] += 1 / (len(ends) - 1)
    weight = {c: ties[c].total() for c in ties}
    by_weight = sorted(ties, key=lambda c: (-weight[c], c))
    class_of, total, whole = {c: c for c in ties}, Counter(weight), sum(weight.values())
    moved = True
    while moved:
        moved = False
        for c in by_weight:
            own = class_of[c]
            total[own] -= weight[c]
            pull = Counter({own: 0})                        # first, so that c stays where both are as good
            for other, n in ties[c].items():
                pull[class_of[other]] += n
            class_of[c] = max(pull, key=lambda k: pull[k] - weight[c] * total[k] / whole)
            total[class_of[c]] += weight[c]
            moved = moved or class_of[c] != own
    classes = defaultdict(str)
    for c in by_weight:
        pull = Counter()
        for other, n in ties[c].items():
            pull[class_of[other]] += n
        for k in pull:
            if pull[k] >= 0.1 * weight[c]:
                classes[k] += c
    return list(classes.values())


def tunes_of(ci):
    """{tune: lengths of its lines} of the shorter tunes that have 50 ci, most of them of one pattern."""
    patterns, tunes = defaultdict(Counter), {}
    for poem in ci:
        for tune in poem.title.split('・'):                  # some have two names
            patterns[tune][tuple(map(len, poem.lines))] += 1
    for tune, found in patterns.items():
        lengths, n = found.most_common(1)[0]
        if found.total() >= 50 and n > 0.7 * found.total() and 20 < sum(lengths) <= 70:
            tunes[tune] = lengths
    return tunes


# ---- a table of marks ----

COLUMNS = dict(form='in form', order='as ordered', rhyme='rhymes', line_tones='lines in tone',
               tones='regulated', copied='lines copied')


def shares(judge, samples):
    """{name: (number of poems, {mark: share that has it})} of samples, (name, order, text)."""
    rows = defaultdict(list)
    for name, order, text in samples:
        rows[name].append(judge.marks(text, order))
    result = {}
    for name, row in rows.items():
        found = {mark: [marks[mark] for marks in row if mark in marks] for mark in COLUMNS}
        result[name] = len(row), {mark: sum(values) / len(values) for mark, values in found.items() if values}
    return result


def print_marks(judge, samples):
    """Print the shares of samples as a table."""
    print(f"{'':20} {'poems':>6}", *(f"{column:>13}" for column in COLUMNS.values()))
    for name, (n, marks) in shares(judge, samples).items():
        print(f"{name:20} {n:6,}", *(f"{marks[mark] if mark in marks else '-':>13{'.1%' * (mark in marks)}}"
                                     for mark in COLUMNS))


def limits(poems):
    """Samples that show what the marks are worth, from poems as lists of lines: as they are, the ceiling; and
    the floor, with the characters of each shuffled, and with lines drawn from all of them."""
    rng, pool = random.Random(1337), defaultdict(list)
    for lines in poems:
        pool[len(lines[0])] += lines
    for lines in pool.values():
        rng.shuffle(lines)
    for lines in poems:
        size, characters = len(lines[0]), list(''.join(lines))
        rng.shuffle(characters)
        yield 'real, held out', '', couplets(lines)
        yield 'characters shuffled', '', couplets([''.join(characters[i:i + size])
                                                   for i in range(0, len(characters), size)])
        yield 'lines mixed', '', couplets([pool[size].pop() for _ in lines])


def read_text(path):
    """A file's text. A byte order mark is no part of it."""
    with open(path, encoding='utf-8-sig') as f:
        try:
            return f.read()
        except UnicodeDecodeError as e:
            raise ValueError(f"{path} is not UTF-8 text ({e})") from None


def records_of(path):
    """Yield (where, record) of a .json file that holds a list, or of a .jsonl file. ValueError: no record."""
    text = read_text(path)
    if path.endswith('.json'):
        records = read_json(path, text)
        if not isinstance(records, list):
            raise ValueError(f"{path} holds no list of records")
        records = ((f'{path}, record {i}', record) for i, record in enumerate(records, 1))
    else:
        records = ((f'{path}:{i}', read_json(f'{path}:{i}', line))
                   for i, line in enumerate(text.split('\n'), 1) if line.strip())
    for where, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{where} is no record, but {str(record)[:40]!r}")
        yield where, record


def read_json(where, text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{where} is not JSON ({e})") from None


def samples_in(where, record):
    """[(name, order, text), ...] of a record of a report, or of one that poems.py writes."""
    try:
        found = [(name, record.get('prompt', ''), record[name]) for name in ('text', 'expected', 'answer')
                 if name in record]
        found += [(name, *(turn['content'] for turn in record[name][-2:]))
                  for name in ('conversations', 'chosen', 'rejected') if name in record]
    except (KeyError, TypeError) as e:
        raise ValueError(f"{where} holds no poem ({type(e).__name__}: {e})") from None
    for sample in found:
        if len(sample) != 3 or not all(isinstance(part, str) for part in sample):
            raise ValueError(f"{where}: {sample[0]!r} holds no poem, or no order for it, as text")
    return found


def samples_of(path):
    """[(name, order, text), ...] of a file: report.json of a stage, records as poems.py writes them, or text
    as sample.py prints it, rows of dashes between poems, or where it has none empty rows, each poem perhaps
    below its order. ValueError: it is none."""
    found = []
    if path.endswith(('.json', '.jsonl')):
        found = [sample for place in records_of(path) for sample in samples_in(*place)]
    else:
        content = read_text(path)
        between = r'-{40}\n' if '-' * 40 in content else r'\n\s*\n'
        for part in filter(str.strip, re.split(between, content)):
            first, _, rest = part.strip().partition('\n')           # below an order there may be no poem
            is_order = not first.startswith('《') and read_order(first)         # else a title
            found.append(('text', first, rest) if is_order else ('text', '', part))
    if not found:
        raise ValueError(f"{path} holds no poems")
    return found


def load_judge(folder):
    """(Judge, held-out poems of regular form as lines) from the files of poems.py."""
    path, held_out, anew = os.path.join(folder, 'poems_form.json'), [], 'run `python data/poems.py` anew'
    try:
        judge = Judge(read_json(path, read_text(path)))
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is damaged ({type(e).__name__}: {e}): {anew}") from None
    for name in ('poems', 'ci_sft'):
        for where, record in records_of(os.path.join(folder, f'{name}.jsonl')):
            for _, _, text in samples_in(where, record):
                lines = lines_of(text)
                if record.get('split') == 'train':
                    judge.known.update(lines)
                elif name == 'poems' and form_of(lines):
                    held_out.append(lines)
    if not held_out or not judge.known:
        raise ValueError(f"{folder}/poems.jsonl holds no poems of both splits: {anew}")
    return judge, held_out
