"""
Prepare data: records of any format -> token ids and mask -> arrays; and read the arrays back.

    python prepare.py                              # pydoc, docstrings of this machine's Python -> data/pydoc
    python prepare.py --dataset=verdict --tokenizer=gpt2        # a built-in set, downloaded if it is missing
    python prepare.py --input=novel.txt            # your own text -> data/novel
    python prepare.py --input=corpus.jsonl --tokenizer=gpt2 --on_error=skip     # {"text": ...} on each line
    python prepare.py --input=chats.jsonl --debug_mask      # conversations: look at the first one, then stop
    python prepare.py --input=nanoGPT/data/openwebtext --tokenizer=gpt2         # its train.bin and val.bin
    python prepare.py --input=mail.csv                      # label and text -> train, val and test by label
    python prepare.py --dataset=pydoc_dpo --print_text | head           # look at the text before it is tokens

The fields of a record say its task. {"text"} is for pretraining. For instruction tuning are {"messages"} or
{"conversations"} of {"role", "content"}, with "reasoning_content", "tools" and "tool_calls" as OpenAI and
MiniMind have them, or ShareGPT's {"from", "value"}; and {"instruction", "input", "output"}. {"chosen",
"rejected"} are for preferences: two conversations, or two answers to a "prompt" or an "instruction". A table
of label and text is for classification. A record may name its "split" ('train', 'val' or 'test') and its
"label". What names no split is held out by a hash of its text; a .txt file is one document, and of one alone
the end is held out.

A prepared data set is a folder. For each split it holds the documents one after another:

    train_tokens.npy    (n,) uint16 or uint32    token ids
    train_mask.npy      (n,) uint8               1 where the token is a target of the loss; none if all are
    train_offsets.npy   (documents + 1,) int64   document i is tokens[offsets[i]:offsets[i + 1]]
    train_labels.npy    (documents,) int64       only if records have labels: the number of the label

and meta.json, and the tokenizer. The arrays are read with mmap_mode='r', so memory use does not grow with the
corpus. Tokenizer and chat layout come from train_tokenizer.py. (Chapters I-1, I-7, I-8, II-8 to II-12.)
"""
import csv
import difflib
import hashlib
import io
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from typing import NamedTuple

from configurator import HERE, Progress, between, configure, fail, fits, one_of, partial_folder, read_json

import numpy as np

from train_tokenizer import (Tokenizer, as_json, encode_chat, encode_pair, load_tokenizer, print_mask,
                             text_parts, train_lookup, unpacked)

dataset = ''                # name of the folder in data/, or a path; '' is the input's own name, or pydoc
input = ''                  # .txt, .jsonl, .json, .csv, .tsv, .gz of these, .parquet, .bin, or a folder
task = ''                   # 'pretrain', 'sft', 'dpo' or 'cls'; '' is what the fields of the first record say
tokenizer = 'out/tokenizer' # folder of a trained tokenizer, or 'gpt2'
val_fraction = 0.0          # share of the text that is held out; 0 takes the data set's own, mostly 0.05
special_tokens = True       # pretraining: the tokenizer's special tokens in the text are that; False: letters
on_error = 'stop'           # at a malformed record or file: 'stop', or 'skip' and count
balance = True              # labelled text: cut each class down to the size of the smallest
seed = 1337                 # labelled text: of the split, and of what balance leaves out
debug_mask = False          # print the first document, token by token with its mask, and stop
print_text = False          # print the text that would be tokenised, as JSON lines, and stop

SHAREGPT = dict(human='user', gpt='assistant', function_call='assistant', observation='tool')
# who may speak after whom: an assistant may greet first, or speak twice
AFTER = {'': ('user', 'assistant', 'system'), 'system': ('user', 'assistant'), 'user': ('assistant',),
         'assistant': ('user', 'assistant', 'tool'), 'tool': ('assistant', 'tool')}
FORMAT = 1                  # of the prepared folder; raised when its meaning changes
SPLITS = ('train', 'val', 'test')
# What meta.json holds; 'test' and 'labels' only of some sets.
META = dict(format=int, task=str, source=str, tokenizer=str, vocab_size=int, labels=[str],
            **dict.fromkeys(SPLITS, dict(documents=int, tokens=int, bytes=int)))
OWN_TOKENIZER = os.path.join(HERE, 'out', 'tokenizer')
PYTHON = platform.python_version()      # pydoc differs between versions
# The sets that need no file of the user: task, file in data/, and the command that writes the file.
BUILT_IN = {
    'pydoc': ('pretrain', f'raw/pydoc-{PYTHON}.jsonl', 'data/pydoc.py'),
    'pydoc_sft': ('sft', f'raw/pydoc_sft-{PYTHON}.jsonl', 'data/pydoc.py'),
    'pydoc_dpo': ('dpo', f'raw/pydoc_dpo-{PYTHON}.jsonl', 'data/pydoc.py'),
    'reason': ('sft', 'raw/reason.jsonl', 'data/reason.py'),
    'poems': ('pretrain', 'raw/poems.jsonl', 'data/poems.py'),
    'poems_sft': ('sft', 'raw/poems_sft.jsonl', 'data/poems.py'),
    'poems_dpo': ('dpo', 'raw/poems_dpo.jsonl', 'data/poems.py'),
    'poems_cls': ('cls', 'raw/poems_cls.csv', 'data/poems.py'),
    'ci_sft': ('sft', 'raw/ci_sft.jsonl', 'data/poems.py'),
    'spam': ('cls', 'spam.csv', ''),                    # comes with the code
    'verdict': ('pretrain', 'raw/the-verdict.txt', 'data/download.py verdict'),
    'shakespeare': ('pretrain', 'raw/shakespeare.txt', 'data/download.py shakespeare'),
    'shakespeare_char': ('pretrain', 'raw/shakespeare.txt', 'data/download.py shakespeare'),
    'sms_spam': ('cls', 'raw/sms_spam.tsv', 'data/download.py sms_spam'),
    'instruction': ('sft', 'raw/instruction.json', 'data/download.py instruction'),
}


# ---- files -> records: a line of .jsonl, an item of a .json list, a row of a table ----

def malformed(where, reason, on_error):
    """Report input that cannot be used: end the run, or count it under its reason, with the first place."""
    if on_error == 'stop':
        fail(f"{where}: {reason}; mend it, or pass --on_error=skip")
    kind = re.sub(r'\d+|(but|among) .*', '', reason)    # without what differs from record to record
    malformed.reasons.setdefault(kind, [f"{reason}, first at {where}", 0])[1] += 1
    malformed.count += 1


malformed.count, malformed.reasons = 0, {}
unused = Counter()                              # fields of records, files of a folder, repeated texts
DAMAGE = ValueError, RecursionError, OSError, EOFError, zlib.error     # of a record, a file, a .gz
# no number has a use here, and int() refuses one of thousands of digits
DECODER = json.JSONDecoder(parse_int=lambda digits: int(digits) if len(digits) < 4000 else float(digits))


@contextmanager
def checking(where, on_error):
    """An error inside is malformed input. It may say `where` itself."""
    try:
        yield
    except DAMAGE as e:
        malformed(getattr(e, 'where', where), reason_of(e), on_error)


def reason_of(error):
    """What is wrong with a record or a file, from the exception that it raised."""
    if isinstance(error, json.JSONDecodeError):
        lines = ", but perhaps a .jsonl file" if error.lineno > 1 and error.msg == 'Extra data' else ""
        return f"not JSON ({error.msg}, column {error.colno}){lines}"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte 0x{error.object[error.start]:02x})"
    nested = 'JSON nested too deep: ' if isinstance(error, RecursionError) else ''
    return nested + (getattr(error, 'strerror', None) or str(error).split('\n')[0])


def listed(counts):
    return '; '.join(f"{count:,} x {what}" for what, count in counts)


def skipped():
    """What was malformed, to go on a line with; '' where nothing was."""
    told = f"; skipped {malformed.count:,} malformed records: {listed(malformed.reasons.values())}"
    return told if malformed.count else ''


def ending(file):
    return os.path.splitext(file.lower().removesuffix('.gz'))[1]


def read_records(file, parse, on_error='stop'):
    """Yield (where, parse(record)) of each record of a file that READERS names.

    where is "file:line", or in a .json list or a .parquet file "file, record 3". parse takes a JSON value, of
    a table a dict, and raises ValueError with the reason if it is not what it should be.
    """
    with checking(file, on_error):
        if ending(file) == '.txt':
            raise ValueError("a .txt file is for pretraining")
        if not os.path.getsize(file):
            raise ValueError("the file is empty")
        for where, record in READERS[ending(file)](file):
            with checking(where, on_error):
                if isinstance(record, bytes):
                    record = DECODER.decode(record.decode('utf-8-sig'))
                if isinstance(record, ValueError):
                    raise record
                yield where, parse(record)


def whole_text(file):
    """The text of a UTF-8 file. Ends with file:line if it is not UTF-8."""
    try:
        return ''.join(text_parts(file))
    except DAMAGE as e:
        fail(f"{getattr(e, 'where', file)}: {reason_of(e)}")


def json_lines(file):
    """(where, bytes of the line) of each line of a .jsonl file that is not blank."""
    size, progress = os.path.getsize(file), Progress(f'reading {file}')
    with open(file, 'rb') as f:
        for number, raw in enumerate(unpacked(f), 1):
            progress.show(f.tell() / size)
            if raw.strip(b'\xef\xbb\xbf \t\r\n'):        # which begin with a byte order mark
                yield f'{file}:{number}', raw


def json_list(file):
    """(where, item) of a .json list. It is held in memory; a .jsonl file is not."""
    text = ''.join(text_parts(file))
    try:
        records = DECODER.decode(text)
        if not isinstance(records, list):
            raise ValueError("not a list; a .json file is a list of records, a .jsonl file a record per line")
    except (ValueError, RecursionError) as e:
        e.where = f"{file}:{getattr(e, 'lineno', 1)}"
        raise
    for number, record in enumerate(records, 1):
        yield f'{file}, record {number}', record


def table_rows(file):
    """(where, row as a dict) of each row of a .csv or .tsv file, or the error in place of a row.

    A first line that names the columns label and text is a header, in any order and among others; without one
    the label stands first. A .csv follows RFC 4180: quotes may hold separators, lines and doubled quotes; the
    first comma, semicolon or tab separates. In a .tsv each line is a record and a quote is a plain character,
    unless it wraps the whole field as spreadsheets write it. Separators too many belong to the text.
    """
    text, is_csv, columns, row = ''.join(text_parts(file)), ending(file) == '.csv', ['label', 'text'], []
    first = re.search('[,;\t]', re.sub('"[^"]*"', '', text.partition('\n')[0]) + ',')[0] if is_csv else '\t'
    form = dict(strict=True) if is_csv else dict(quoting=csv.QUOTE_NONE)
    csv.field_size_limit(1 << 30)                       # the library's own is 128 KB
    rows = csv.reader(io.StringIO(text, newline=''), delimiter=first, **form)
    while row is not None:
        start = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as e:
            yield f'{file}:{start}', ValueError(f"not a row of {ending(file)} ({e})")
            continue
        names = [cell.strip().lower() for cell in row or ()]
        if start == 1 and {'label', 'text'} <= set(names):
            columns = names
        elif any(names):
            while len(row) > len(columns) and not row[-1]:
                row.pop()
            at, extra = columns.index('text'), max(0, len(row) - len(columns))
            row[at:at + extra + 1] = [first.join(row[at:at + extra + 1])]
            if not is_csv:
                row = [cell[1:-1].replace('""', '"') if re.fullmatch(r'"([^"]|"")*"', cell) else cell
                       for cell in row]
            row += [''] * len(columns)                  # a row may be cut short
            yield f'{file}:{start}', dict(zip(columns, row))


def parquet_rows(file):
    """(where, row as a dict) of each row of a .parquet file; what is null is left out."""
    try:
        from pyarrow import parquet
    except ImportError:
        fail(f"{file}: .parquet files need a package: pip install pyarrow")
    table, progress = parquet.ParquetFile(file), Progress(f'reading {file}')
    rows = (row for group in table.iter_batches(1024) for row in group.to_pylist())
    for number, row in enumerate(rows, 1):              # one row group is held in memory
        progress.show(number / table.metadata.num_rows)
        # dates and bytes are no JSON, and as a list they are no text
        row = json.loads(json.dumps(row, default=lambda value: [str(value)]))
        yield f'{file}, record {number}', {key: value for key, value in row.items() if value is not None}


READERS = {'.jsonl': json_lines, '.json': json_list, '.csv': table_rows, '.tsv': table_rows,
           '.parquet': parquet_rows}


# ---- records -> what is encoded ----

def check_text(text, what):
    """text, if it is one; ValueError says what else `what` is."""
    if not isinstance(text, str):
        raise ValueError(f'{what} is not a text but {json.dumps(text)[:40]}')
    if not text.strip():
        raise ValueError(f'{what} is empty')
    text.encode()                       # half of a surrogate pair raises UnicodeEncodeError, a ValueError
    return text


def field_of(record, *wanted):
    """The first of the wanted fields that a record has. ValueError names them if it has none."""
    found = record if isinstance(record, dict) else {}
    for field in wanted:
        if field in found:
            return field
    names = ' or '.join(f'"{field}"' for field in wanted)
    raise ValueError(f'no field {names}' + (f" among {', '.join(record)}" if found else ''))


def from_instruction(record):
    """A record of Alpaca -> messages."""
    question = dict(role='user', content=check_text(record['instruction'], '"instruction"').strip())
    if str(record.get('input') or '').strip():
        question['input'] = check_text(record['input'], '"input"').strip()
    answer = check_text(record[field_of(record, 'output')], '"output"').strip()
    return [question, dict(role='assistant', content=answer)]


def from_turn(turn, what):
    """A turn of OpenAI, MiniMind or ShareGPT -> a message."""
    if field_of(turn, 'role', 'from') == 'from':
        key = 'tool_calls' if turn['from'] == 'function_call' else 'content'
        turn = {'role': SHAREGPT.get(str(turn['from']), turn['from']), key: turn[field_of(turn, 'value')]}
    role, content, more = turn['role'], turn.get('content'), {}
    if role not in ('system', 'user', 'assistant', 'tool'):
        raise ValueError(f"{what} has the unknown role {role!r}; there are system, user, assistant and tool")
    what = f"{what}, of the {role},"
    if role == 'assistant' and (thought := turn.get('reasoning_content')):
        more['reasoning_content'] = check_text(thought, f"the thought of {what}").strip()
    if role == 'assistant' and (calls := items_of(turn.get('tool_calls') or [])):
        more['tool_calls'] = [call_of(call, f"the call of {what}") for call in calls]
    if isinstance(content, list):                       # of parts; of an image it has no text
        content = ''.join(check_text(part[field_of(part, 'text')], what) for part in content)
    content = content.strip() if isinstance(content, str) else content
    if content or not (more or role in ('system', 'tool')):
        check_text(content or turn[field_of(turn, 'content')], what)
    return dict(role=role, content=content or '', **more)


def call_of(call, what):
    """A call of a tool, OpenAI's or MiniMind's; one without a name is taken as it is, and counted."""
    call = call['function'] if isinstance(call, dict) and isinstance(call.get('function'), dict) else call
    if not isinstance(call, dict) or not call:
        raise ValueError(f"{what} is no call of a tool but {as_json(call)[:40]}")
    if 'name' not in call:
        unused['place for the name of a call, which has none'] += 1
        return call
    return dict(name=check_text(call['name'], what), arguments=call.get('arguments') or {})


def items_of(value):
    """The list in a field, which may stand there as JSON text. Text that is not JSON is an item as it is."""
    with suppress(json.JSONDecodeError):
        value = DECODER.decode(value) if isinstance(value, str) else value
    as_json(value).encode()                             # as in check_text
    return value if isinstance(value, list) else [value] if value else []


def messages_of(record):
    """The conversation in a record, as encode_chat takes it, stripped. What follows the last answer teaches
    nothing, and is left out."""
    field = field_of(record, 'conversations', 'messages', 'instruction')
    turns = [] if field == 'instruction' else record[field]
    messages = from_instruction(record) if field == 'instruction' else isinstance(turns, list) and [
        from_turn(turn, f"turn {i}") for i, turn in enumerate(turns, 1)]
    if not messages:
        raise ValueError(f'"{field}" is not a list of turns but {json.dumps(turns)[:40]}')
    roles = [message['role'] for message in messages]
    for i, (before, role) in enumerate(zip(['', *roles], roles), 1):
        if role not in AFTER[before]:
            raise ValueError(f"turn {i} is the {role}'s, where the {AFTER[before][0]}'s is expected")
    if 'user' not in roles or 'assistant' not in roles[roles.index('user'):]:
        raise ValueError("no turn is the user's, or nothing answers it")
    for turn, message in zip(turns, messages):
        count_unused(turn, {*message, 'from', 'value', 'tools'}, ' of a turn')
    if tools := next((items_of(of['tools']) for of in (record, *turns) if of.get('tools')), None):
        messages[0]['tools'] = tools
    while messages[-1]['role'] != 'assistant':
        messages.pop()
        unused['turn after the last answer'] += 1
    return tuple(messages)


def pair_of(record):
    """(conversation that ends in the chosen answer, the rejected one, a message) of a record: two
    conversations, or two answers to an instruction or a prompt."""
    sides, prompt = [], field_of(record, 'chosen') and (record.get('prompt') or record.get('conversations'))
    prompt = [dict(role='user', content=prompt)] if isinstance(prompt, str) else prompt
    for key in ('chosen', 'rejected'):
        answer = record[field_of(record, key)]
        try:
            if isinstance(prompt, list) and prompt:
                answer = [dict(role='assistant', content=answer)] if isinstance(answer, str) else (
                    answer if isinstance(answer, list) else [answer])
                asks = any(turn[field_of(turn, 'role', 'from')] in ('user', 'human') for turn in answer)
                answer = prompt * (not asks) + answer
            kind = 'output' if 'instruction' in record else 'conversations'
            sides.append(messages_of({**record, kind: answer}))
        except ValueError as e:
            raise ValueError(f'"{key}": {e}') from None
    (*prompt, chosen), (*other, rejected) = sides
    if prompt != other:
        raise ValueError('"chosen" and "rejected" answer different prompts')
    if chosen == rejected:
        raise ValueError('"chosen" and "rejected" are the same answer')
    return sides[0], rejected


class Piece(NamedTuple):
    """What is encoded at once: a document, or a part of a long text, so that memory use stays bounded."""
    split: str                  # 'train', 'val' or 'test'
    content: str | tuple        # text, or (messages,) of a conversation, or (messages, the rejected one)
    ends_document: bool = True
    label: str = ''             # '' if the record has none
    begins_document: bool = True
    where: str = ''             # it comes from, for what is malformed only to a chat template


def plain_text(content, between='\n'):
    """The text in what is encoded; of messages all that is said."""
    return content if isinstance(content, str) else between.join(
        as_json(part) for message in content[0] for key, part in message.items() if key != 'role' and part)


def lot_of(texts):
    """A number from 0 to 1 by a hash of a text, given in parts: held out are those below val_fraction, the
    same in every run. White space counts as one space, and at the ends as none, so texts that differ in
    nothing else are on one side."""
    digest = hashlib.sha256()
    for i, text in enumerate(texts):
        digest.update((' ' * (i > 0) + ' '.join(text.split())).encode())    # a part begins with white space
    return int(digest.hexdigest()[:8], 16) / 2**32


def count_unused(record, used, place=''):
    """Count the fields of a record, or of a turn in it, that hold text or lists and are not used."""
    for name, value in record.items():
        if name not in used and value and isinstance(value, (str, list, dict)):
            unused[f'"{name}"{place}'] += 1


def task_of(source, on_error='stop'):
    """(task, whether the records name their split) of a source: by the ending of its name, and of all but
    tables by the fields of the first good record. A "text" beside other fields is a copy of them; beside a
    "label" it is a table's in a .parquet file."""
    files = files_of(source)
    if ending(files[0]) in ('.csv', '.tsv'):
        return 'cls', False
    tasks = dict(chosen='dpo', conversations='sft', messages='sft', instruction='sft', label='cls',
                 text='pretrain')
    if ending(files[0]) != '.parquet':                  # a text may have a label, too
        del tasks['label']
    records = (found for file in files if ending(file) != '.txt' for _, found in read_records(
        file, lambda record: (tasks[field_of(record, *tasks)], 'split' in record), on_error))
    found = next(records, '.txt' in map(ending, files) and ('pretrain', False)) or fail(
        f"{source} holds no record with one of the fields {', '.join(tasks)}{skipped()}")
    malformed.count, malformed.reasons = 0, {}      # the reader that follows counts again
    unused.clear()
    return found


def files_of(source):
    """The files of a source: itself, or the visible ones of text in a folder. Fails if there is none."""
    if os.path.isdir(source):
        files = []
        for folder, folders, names in os.walk(source):                  # which follows no link to a folder
            folders[:] = [name for name in folders if name[0] != '.']
            paths = (os.path.join(folder, name) for name in folders + names if name[0] != '.')
            files += [path for path in paths if os.path.isfile(path) or os.path.islink(path)]
        texts = sorted(file for file in files if ending(file) in ('.txt', '.jsonl', '.json', '.parquet'))
        unused.update(f'*{ending(file)} file' for file in set(files) - set(texts))
        return texts or fail(f"{source} holds no .txt, .jsonl or .json file, and no .parquet")
    if not os.path.isfile(source):
        fail(f"{source} is a pipe, and read more than once: write it into a file" if os.path.exists(source)
             else f"no such file: {source}")
    if ending(source) not in ('.txt', *READERS):
        fail(f"{source}: text is read from .txt, .jsonl and .json, labelled text from .csv and .tsv; "
             f"each may be .gz; both from .parquet")
    return [source]


def read_pieces(source, task='pretrain', val_fraction=0.05, on_error='stop'):
    """Yield the Pieces of a file, or of a folder of them, for any task but 'cls'.

    A record that names no split is held out by its lot. So is one of several .txt files, each of which is a
    document, and at least one of them; of one alone the last part is held out. Malformed input ends the run
    with file:line, or is counted.
    """
    parse, _, used = TASKS[task]

    def piece_of(record):
        content = parse(record)
        asked = content if isinstance(content, str) else plain_text([content[0][:-1]], '')
        split = record.get('split', 'val' if lot_of([asked]) < val_fraction else 'train')
        if split not in SPLITS:
            raise ValueError(f'"split" is {json.dumps(split)[:40]}, not one of {", ".join(SPLITS)}')
        count_unused(record, {*used, 'split', 'label'})
        return Piece(split, content, label=label if isinstance(label := record.get('label'), str) else '')

    files, lots, piece = files_of(source), {}, None
    texts = [file for file in files if ending(file) == '.txt' and task == 'pretrain']
    for file in texts:
        with checking(file, on_error):
            if not any(text.strip() for text in text_parts(file)):
                raise ValueError("the file is empty")
            lots[file] = lot_of(text_parts(file))
    for file in files:
        with checking(file, on_error):
            pieces = ()
            if file in lots:
                val = lots[file] <= max(val_fraction, min(lots.values()))
                pieces = read_txt(file, val_fraction, ('train', 'val')[val] if len(lots) > 1 else None)
            elif file not in texts:
                pieces = (piece._replace(where=where) for where, piece in
                          read_records(file, piece_of, on_error))
            for piece in pieces:
                yield piece
    if not piece:
        fail(f"{source}: nothing is left to read{skipped()}")


def read_txt(file, val_fraction, side=None, size=1 << 16):
    """Yield a text file, which is one document, as Pieces of about `size` bytes: all of it on a side, or its
    end held out."""
    length = blank = 0
    for text in text_parts(file, size):
        length, blank = length + len(text), len(text) - len(text.rstrip())
    split, border, at = side or 'train', length if side else round((length - blank) * (1 - val_fraction)), 0
    progress = Progress(f'reading {file}')
    for text in text_parts(file, size):
        if split == 'train' and border < min(length - blank, at + len(text)):
            # at a white space nearby; where there is none, before the < that a special token begins with
            near = range(border - at, max(-1, border - at - 200), -1)
            cut = next((i for mark in (str.isspace, '<'.__eq__) for i in near if mark(text[i])), border - at)
            yield Piece('train', text[:cut], ends_document=False, begins_document=at == 0)
            split, text, at = 'val', text[cut:], at + cut
        progress.show((at + len(text)) / length)
        yield Piece(split, text, ends_document=at + len(text) == length, begins_document=at == 0)
        at += len(text)


class Encoded(str):
    """Text that comes with its ids."""


def bins_of(source):
    """{split: ids} of nanoGPT's train.bin and val.bin, uint16 without a header, in a folder or beside each
    other; {} if the source is neither."""
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    if ending(source) != '.bin' and not os.path.isfile(os.path.join(source, 'train.bin')):
        return {}
    bins = {}
    for split in SPLITS[:2]:
        path = os.path.join(folder, f'{split}.bin')
        size = os.path.getsize(path) if os.path.isfile(path) else fail(
            f"{path} is missing: nanoGPT's train.bin and val.bin stand side by side")
        if size % 2 or not size:
            fail(f"{path} holds {size:,} bytes, not a whole number of token ids of two bytes each")
        bins[split] = np.memmap(path, '<u2', 'r')
    return bins


def read_bins(bins, tokenizer, source, size=1 << 20):
    """Yield the ids of bins_of as Pieces; <|endoftext|> ends a document. One line over an id that the
    tokenizer has not."""
    for split, ids in bins.items():
        progress = Progress(f'reading {split}.bin')
        for at in range(0, len(ids), size):
            part = ids[at:at + size]
            if (most := part.max()) >= tokenizer.vocab_size:
                fail(f"{source}: {split}.bin holds the id {most}, and the tokenizer {tokenizer.vocab_size} "
                     f"ids: name the one it was made with, as in --tokenizer=gpt2")
            documents = np.split(part, np.flatnonzero(part == tokenizer.eot) + 1)
            documents = [document.tolist() for document in documents if len(document)]
            texts = tokenizer.backend.decode_batch(documents)           # which skips <|endoftext|>
            for ids_of_text, text in zip(documents, map(Encoded, texts)):
                text.ids = ids_of_text
                yield Piece(split, text, ends_document=ids_of_text[-1] == tokenizer.eot)
            progress.show(at / len(ids))


def char_tokenizer(file):
    """nanoGPT's tokenizer of a text, the ids its characters, sorted; <|endoftext|> and <|unk|> follow."""
    return Tokenizer(train_lookup(text_parts(file), 1 << 21, 'char'))


def tokenizer_of_bins(bins, source, tokenizer):
    """The tokenizer that made nanoGPT's ids, by its name; or, where a meta.pkl says that they are characters,
    of the input.txt beside it. A pickle may run any code, so it is not opened."""
    folder = source if os.path.isdir(source) else os.path.dirname(source)
    text = os.path.join(folder, 'input.txt')
    if tokenizer != OWN_TOKENIZER or not os.path.isfile(os.path.join(folder, 'meta.pkl')):
        return load_tokenizer(tokenizer)
    if not os.path.isfile(text):
        fail(f"{folder} has a meta.pkl, so its ids are characters, but pickles are not opened here: put the "
             f"text beside it as input.txt, or name the folder of its tokenizer with --tokenizer")
    tokenizer, start = char_tokenizer(text), next(text_parts(text))[:len(bins['train'])]
    if tokenizer.encode(start) != bins['train'][:len(start)].tolist():
        fail(f"{folder}: train.bin does not begin with the characters of input.txt")
    print(f"the tokenizer is that of the characters of {text}; meta.pkl is not opened")
    return tokenizer


def read_labelled(source, balance=True, seed=1337, on_error='stop'):
    """The list of the labelled texts of a source, as Pieces.

    Of texts that are equal but for case and white space one is kept, so none stands in two splits. With
    balance, the larger classes are cut at random to the smallest. Each class is dealt out 70 / 10 / 20 to
    train, val and test.
    """
    seen, classes, (parse, _, used) = {}, {}, TASKS['cls']
    rows = (row for file in files_of(source) for row in read_records(
        file, lambda record: (*parse(record), record), on_error))
    for where, (label, text, record) in rows:
        count_unused(record, used)
        key = ' '.join(text.casefold().split())
        other, first, its_text = seen.setdefault(key, (label, where, text))
        if first == where:
            classes.setdefault(label, []).append((where, text))
        elif label != other and text == its_text:
            malformed(where, f"this text has the label {label!r}, but {other!r} at {first}", on_error)
        else:
            unused['repeated text'] += 1
    for label in [label for label, texts in sorted(classes.items()) if len(texts) < 3]:
        (first, _), *second = classes.pop(label)
        malformed(first, f"the label {label!r} is seen {'twice' if second else 'once'}, but train, val and "
                  "test need one each (if it stands in a header, that must name label and text)", on_error)
    if len(classes) < 2:
        fail(f"{source}: a classifier needs two labels, and here " +
             (f"is one, {next(iter(classes))!r}" if classes else "is none") + skipped())
    rng, pieces, smallest = np.random.default_rng(seed), [], min(map(len, classes.values()))
    for label, texts in sorted(classes.items()):
        order = rng.permutation(len(texts))[:smallest if balance else len(texts)]
        n_val, n_test = max(1, round(0.1 * len(order))), max(1, round(0.2 * len(order)))
        splits = ['val'] * n_val + ['test'] * n_test + ['train'] * (len(order) - n_val - n_test)
        pieces += [Piece(split, texts[i][1], label=label) for split, i in zip(splits, order)]
        print(f"label {label!r}: {len(order):,} of {len(texts):,} texts")
    return pieces


# ---- what is encoded -> ids and mask: of each task a function, Pieces -> (Piece, ids, mask) ----

def encode_texts(tokenizer, pieces):
    """For pretraining: each token is a target. eot ends a document, and where that does not open the next,
    bos opens it, which nothing predicts; neither if the text has its own."""
    if isinstance(pieces[0].content, Encoded):
        yield from ((piece, piece.content.ids, [1] * len(piece.content.ids)) for piece in pieces)
        return
    end = tokenizer.backend.id_to_token(tokenizer.eot)
    for piece, ids in zip(pieces, tokenizer.encode_batch([piece.content for piece in pieces])):
        ended = piece.content.rstrip().endswith(end) and tokenizer.eot in ids
        opened = tokenizer.bos in (tokenizer.eot, *ids[:1]) or not piece.begins_document
        bos, ids = [tokenizer.bos] * (not opened), ids + [tokenizer.eot] * (piece.ends_document and not ended)
        yield piece, bos + ids, [0] * len(bos) + [1] * len(ids)


def encode_conversations(tokenizer, pieces):
    """For instruction tuning: what the assistant says is target. For preferences: a pair is two documents."""
    for piece in pieces:
        with checking(piece.where, on_error):           # the layout may have no place for something
            documents = (encode_pair(tokenizer, *piece.content) if len(piece.content) == 2 else
                         [encode_chat(tokenizer, *piece.content)])
            yield from ((piece, *document) for document in documents)


# task: (record -> what is encoded, (tokenizer, Pieces) -> (Piece, ids, mask) of each document, fields used)
TASKS = dict(
    pretrain=(lambda record: check_text(record[field_of(record, 'text')], '"text"'), encode_texts, ['text']),
    # a label may be a number in a .parquet file. Only the last token is a target, where the classifier reads
    cls=(lambda record: [check_text(str(value) if type(value := record[field_of(record, field)]) is int
                                    else value, f'the {field}').strip() for field in ('label', 'text')],
         lambda *of: ((piece, ids, [0] * (len(ids) - 1) + [1]) for piece, ids, _ in encode_texts(*of)),
         ['label', 'text']),
    sft=(lambda record: (messages_of(record),), encode_conversations,
         ['conversations', 'messages', 'instruction', 'input', 'output', 'tools']),
    dpo=(pair_of, encode_conversations, ['chosen', 'rejected', 'instruction', 'input', 'tools', 'prompt',
          'conversations']))


# ---- ids and mask -> arrays ----

class SplitWriter:
    """The arrays of one split as .npy files, written document by document. The header of each, 128 bytes with
    the length of the array, is written last."""

    def __init__(self, path, dtype):
        self.kinds = dict(tokens=np.dtype(dtype), mask=np.dtype(np.uint8), offsets=np.dtype(np.int64))
        self.files = {field: open(f'{path}_{field}.npy', 'wb') for field in self.kinds}
        for file in self.files.values():
            file.seek(128)
        self.labels, self.count = [], dict(documents=0, tokens=0, bytes=0, targets=0)
        self.write('offsets', [0])

    def write(self, field, values):
        self.files[field].write(np.asarray(values, dtype=self.kinds[field]).tobytes())

    def append(self, piece, ids, mask):
        self.write('tokens', ids)
        self.write('mask', mask)
        self.count['tokens'] += len(ids)
        self.count['targets'] += sum(mask)
        self.count['bytes'] += len(plain_text(piece.content).encode())
        self.last = piece
        if piece.ends_document:
            self.write('offsets', [self.count['tokens']])
            self.count['documents'] += 1
            self.labels.append(piece.label)

    def close(self):
        if not self.last.ends_document:             # the rest of it is held out
            self.append(Piece('', ''), [], [])
        for field, kind in self.kinds.items():
            with self.files[field] as f:
                header = dict(descr=kind.str, fortran_order=False, shape=((f.tell() - 128) // kind.itemsize,))
                f.seek(0)
                np.lib.format.write_array_header_1_0(f, header)
                assert f.tell() == 128, "this version of numpy writes another header"
        if self.count['targets'] == self.count['tokens']:       # as in most corpora
            os.remove(self.files['mask'].name)


def write_data(folder, tokenizer, pieces, source, task='pretrain'):
    """Tokenise the Pieces into a prepared folder, all or nothing. Returns its meta.json.

    source  the name of a built-in set, or the absolute path of what was read
    """
    folder = os.path.realpath(folder)               # behind a link
    used = os.listdir(folder) if os.path.isdir(folder) else os.path.exists(folder)
    if used and not os.path.isfile(os.path.join(folder, 'meta.json')) or os.path.ismount(folder):
        fail(f"{folder} is there, and is no prepared data set: move it, or choose another --dataset")
    if os.path.isabs(source) and (os.path.realpath(source) + os.sep).startswith(folder + os.sep):
        fail(f"{source} lies in {folder}, which is written anew: choose another --dataset")
    partial = partial_folder(folder)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    writers = {}                                    # of the splits that the Pieces name

    batch, size = [], 0
    for piece in itertools.chain(pieces, [None]):
        if piece:
            batch.append(piece)
            size += len(plain_text(piece.content))
        if batch and (size > 1 << 20 or not piece):     # a megabyte at once keeps all cores busy
            for of, ids, mask in TASKS[task][1](tokenizer, batch):
                if of.split not in writers:
                    writers[of.split] = SplitWriter(os.path.join(partial, of.split), dtype)
                writers[of.split].append(of, ids, mask)
            batch, size = [], 0
    labels = sorted({label for writer in writers.values() for label in writer.labels} - {''})
    number = {'': -1, **{label: i for i, label in enumerate(labels)}}
    for split in SPLITS[:3 if task == 'cls' else 2]:
        if split not in writers or writers[split].count['tokens'] < 2:
            fail(f"{source}: no document falls into {split!r}; give more text, another --val_fraction, or a "
                 f"single .txt, of which the end is held out{skipped()}")
    for split, writer in writers.items():
        writer.close()
        if labels:
            np.save(os.path.join(partial, f'{split}_labels.npy'),
                    np.array([number[label] for label in writer.labels], dtype=np.int64))
    tokenizer.save(partial)
    meta = dict(format=FORMAT, task=task, source=source, tokenizer=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                **{split: writers[split].count for split in SPLITS if split in writers},
                **({'labels': labels} if labels else {}))
    with open(os.path.join(partial, 'meta.json'), 'w', encoding='utf-8') as f:
        json.dump(meta, f, ensure_ascii=False, indent=2)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    return meta


# ---- reading them back ----

class Split(NamedTuple):
    tokens: np.ndarray                  # (n,)
    mask: np.ndarray                    # (n,) uint8; where all are targets, one number seen n times
    offsets: np.ndarray                 # (documents + 1,)
    labels: np.ndarray | None = None    # (documents,) int64: numbers in meta['labels'], -1 is none


def data_folder(name):
    """A data set's folder: data/<name> beside this script, or a path that holds a separator."""
    return name if os.sep in name or '/' in name else os.path.join(HERE, 'data', name)


def read_meta(name, task=''):
    """meta.json of a data set prepared for a task ('' is any), or one line on how to prepare it."""
    path = os.path.join(data_folder(name), 'meta.json')
    if not os.path.isfile(path):
        fail(f"no prepared data in {data_folder(name)}: make it with `python prepare.py --input=FILE "
             f"--dataset={name}` (of nanoGPT's: --input=FOLDER_OF_TRAIN.BIN --tokenizer=gpt2), or use the "
             f"built-in --dataset="
             + ' or '.join(k for k, (t, _, _) in BUILT_IN.items() if t == task or not task))
    try:
        meta = read_json(path)
    except (OSError, ValueError) as e:
        fail(f"{path} is damaged ({e}): run prepare.py again")
    if meta.get('format') != FORMAT:
        fail(f"{path} is of format {meta.get('format')}, this code reads {FORMAT}: run prepare.py again")
    for key, kind in META.items():
        needed = key in meta or key not in ('test', 'labels') or meta['task'] == 'cls'
        if needed and not fits(meta.get(key), kind):
            fail(f"{path} is damaged ({key} is {str(meta.get(key))[:40]!r}): run prepare.py again")
    if meta['task'] != (task or meta['task']):
        fail(f"{path}: prepared for the task {meta['task']!r}, not {task!r}: choose another --dataset")
    return meta


def read_split(name, split):
    """The Split 'train', 'val' or 'test' of a data set, mapped into memory rather than read; its labels are
    None if the set has none. One line if it is not as it was written."""
    meta, path = read_meta(name), os.path.join(data_folder(name), split)
    count = meta.get(split, dict.fromkeys(('documents', 'tokens', 'bytes'), 0))
    fields = [field for field in Split._fields[:4 if 'labels' in meta else 3]
              if field != 'mask' or count.get('targets') != count['tokens']]
    try:
        arrays = {field: np.lib.format.open_memmap(f'{path}_{field}.npy', 'r') for field in fields}
    except Exception as e:                              # numpy raises many kinds over a broken header
        wrong = f"{type(e).__name__}: {e}"
    else:
        data = Split(**{'mask': np.broadcast_to(np.uint8(1), count['tokens']), **arrays})
        wrong = damage(data, meta, count)
    if wrong:
        fail(f"{data_folder(name)}: {split} is damaged ({wrong}): run prepare.py again")
    return data


def damage(data, meta, count):
    """What is wrong with the arrays of a Split, in words, or ''. count: its part of meta.json."""
    n, documents = count['tokens'], count['documents']
    for field, length, *kinds in (('tokens', n, 'uint16', 'uint32'), ('mask', n, 'uint8'),
                                  ('offsets', documents + 1, 'int64'), ('labels', documents, 'int64')):
        array = getattr(data, field)
        if array is not None and (array.shape != (length,) or str(array.dtype) not in kinds):
            return f"{field} are {array.dtype} {array.shape}, not {kinds[0]} ({length},)"
    if not n or not documents or not count['bytes']:
        return "it holds nothing"
    starts = data.offsets[:-1]
    if starts[0] != 0 or data.offsets[-1] != n or not (np.diff(data.offsets) > 0).all():
        return "offsets do not ascend from 0 to the number of tokens"
    if data.labels is not None:
        least = 0 if meta['task'] == 'cls' else -1
        if data.labels.min() < least or data.labels.max() >= len(meta['labels']):
            return f"a label is not one of {len(meta['labels'])}"
    if largest(data.tokens) >= meta['vocab_size']:
        return f"a token is not below the vocabulary's {meta['vocab_size']}"
    if largest(data.mask) > 1:
        return "the mask is not of 0 and 1"
    if meta['task'] in ('sft', 'dpo') and (
            data.mask[starts].any() or not np.maximum.reduceat(data.mask, starts).all()):
        return "a document begins with a target, or has none"
    return "a pair is half" if meta['task'] == 'dpo' and documents % 2 else ''


def largest(array, at_most=1 << 29, piece=1 << 20):
    """The largest number of an array; of one that is longer than at_most, of pieces spread evenly over it, as
    10 GB take a second from memory, but minutes from a slow disk."""
    step = piece * -(-len(array) // at_most)
    return max(array[i:i + piece].max() for i in range(0, len(array), step))


def run_script(script, *arguments):
    """Print a command and run it. If it fails it has said why, and this run ends with its exit code."""
    print('$', shlex.join(['python', script, *arguments]), flush=True)
    env = {key: value for key, value in os.environ.items() if key != 'RANK'}        # it is no rank of ours
    done = subprocess.run([sys.executable, os.path.join(HERE, script), *arguments], env=env,
                          stdout=sys.stderr if print_text else None)
    if done.returncode:
        sys.exit(done.returncode)


def open_data(run, dataset, task, tokenizer=''):
    """(meta, train, val) of a data set for a task, as meta.json and Splits; for 'cls' (meta, train, val,
    test). Every rank calls this.

    tokenizer  the Tokenizer of a model, or the folder of one, or 'gpt2': a built-in set that is missing is
               prepared with it first (by one rank), and data of another one is refused. A folder without one
               gets it, trained on pydoc. '' is out/tokenizer, or whatever made the data.
    """
    folder = data_folder(dataset)
    made_with = getattr(tokenizer, 'source', tokenizer) or OWN_TOKENIZER
    # the first rank of all, then of each machine, as another one may have another disk
    for prepares in (run.rank == 0, os.environ.get('LOCAL_RANK') == '0'):
        if prepares and os.path.basename(folder) in BUILT_IN and not os.path.exists(folder):
            arguments = [f'--dataset={dataset}']
            if os.path.basename(folder) != 'shakespeare_char':          # which brings its tokenizer
                arguments.append(f'--tokenizer={made_with}')
                if made_with != 'gpt2' and not os.path.isfile(os.path.join(made_with, 'tokenizer.json')):
                    run_script('train_tokenizer.py', f'--out_dir={made_with}')
            run_script('prepare.py', *arguments)
        run.barrier()
    meta = read_meta(dataset, task)
    command = BUILT_IN.get(os.path.basename(folder), ('', '', ''))[2]
    script, made = os.path.join(HERE, command.partition(' ')[0]), os.path.join(folder, 'meta.json')
    if run.rank == 0 and os.path.isfile(script) and os.path.getmtime(script) > os.path.getmtime(made):
        print(f"{folder} is older than {script}: `python {command}`, then `python prepare.py "
              f"--dataset={dataset} --tokenizer=FOLDER` makes it anew", flush=True)
    if isinstance(tokenizer, str) and tokenizer:
        tokenizer = load_tokenizer(tokenizer)
    if tokenizer and task in ('sft', 'dpo'):
        tokenizer.take_own_layout(run.rank == 0)
    if tokenizer and (meta['tokenizer'] != tokenizer.fingerprint or task in ('sft', 'dpo') and (
            load_tokenizer(folder).layout != tokenizer.layout)):
        fail(f"{folder} was tokenised otherwise than by {made_with}: run `python prepare.py "
             f"--dataset={dataset} --tokenizer={made_with}`"
             + (f" with --input={meta['source']}" if os.path.isabs(meta['source']) else ""))
    splits = [read_split(dataset, split) for split in SPLITS[:3 if task == 'cls' else 2]]
    for split, name in zip(splits, SPLITS):
        if not split.mask.any():
            fail(f"{folder}: {name} holds no target to learn: run prepare.py again")
    return meta, *splits


if __name__ == '__main__':
    configure(globals(), val_fraction=between(0, 1), on_error=one_of('stop', 'skip'), task=one_of('', *TASKS))
    if print_text:
        sys.stdout = sys.stderr                     # for anything else that is printed
    its_name = os.path.splitext(os.path.basename(input.rstrip('/')).removesuffix('.gz'))[0]
    folder = data_folder(dataset or its_name or 'pydoc')
    name, source, found = os.path.basename(folder), input, Counter()
    bins = bins_of(input) if input and not print_text else {}
    if input:
        bins or files_of(input)
    elif name not in BUILT_IN:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(BUILT_IN)}"
        fail(f"--dataset={dataset} is not built in ({hint}): name its source with --input=FILE")
    is_char = name == 'shakespeare_char' and not bins
    if is_char and tokenizer != OWN_TOKENIZER:
        fail(f"--tokenizer={tokenizer}: {name} has a tokenizer of its own, of its characters: leave it out")
    if bins:
        tokenizer = tokenizer_of_bins(bins, input, tokenizer)
    elif not is_char:
        tokenizer = None if print_text else load_tokenizer(tokenizer)
    if not input:
        _, file, command = BUILT_IN[name]
        source = os.path.join(HERE, 'data', file)
        if not os.path.isfile(source):
            run_script(*command.split())
    if is_char:
        tokenizer = None if print_text else char_tokenizer(source)
    kind, names_split = ('pretrain', True) if bins else task_of(source, on_error)
    if task and task != kind and 'cls' in (task, kind) and ending(source) != '.parquet':
        fail(f"--task={task}: {source} is for {kind!r}; tables are for 'cls', and all else is not")
    kind = task or kind
    if kind in ('sft', 'dpo') and tokenizer:
        tokenizer.take_own_layout()
    for key, idle in dict(val_fraction=kind == 'cls' and val_fraction, balance=kind != 'cls' and not balance,
                          seed=kind != 'cls' and seed != 1337,
                          special_tokens=(bins or kind != 'pretrain') and not special_tokens).items():
        if idle:
            fail(f"--{key} has no effect on data for the task {kind!r}: leave it out")
    if val_fraction and names_split:
        fail(f"--val_fraction={val_fraction}: the records of {source} name their split themselves")
    if kind == 'cls':
        pieces = read_labelled(source, balance, seed, on_error)
    elif bins:
        pieces = read_bins(bins, tokenizer, input)
    else:
        # chapter I-5 holds out a tenth of its short text, which is two rows; nanoGPT a tenth of Shakespeare
        share = 0.1 if name in ('verdict', 'shakespeare', 'shakespeare_char') else 0.05
        pieces = read_pieces(source, kind, val_fraction or share, on_error)
    if kind == 'pretrain' and tokenizer:
        tokenizer.backend.encode_special_tokens = not special_tokens        # True: as letters
        special = [t.content for t in tokenizer.backend.get_added_tokens_decoder().values() if t.special]
        pieces = (found.update({t: piece.content.count(t) for t in special}) or piece for piece in pieces)
    if print_text:
        with suppress(BrokenPipeError):             # the reader has enough
            for piece in pieces:
                line = json.dumps(dict(split=piece.split, text=plain_text(piece.content))) + '\n'
                os.write(sys.__stdout__.fileno(), line.encode())
    elif debug_mask:
        for _, ids, mask in TASKS[kind][1](tokenizer, [next(iter(pieces))]):
            print_mask(tokenizer, ids, mask)
    else:
        meta = write_data(folder, tokenizer, pieces, os.path.abspath(input) if input else name, kind)
        for split in SPLITS:
            if m := meta.get(split):
                print(f"{split:5} {m['documents']:9,} documents {m['tokens']:13,} tokens "
                      f"{m['bytes']:14,} bytes {m['bytes'] / m['tokens']:5.2f} bytes/token")
        print(f"wrote {folder}")
    if +found:
        print(f"special tokens in the text, read as {'such' if special_tokens else 'letters'}: "
              f"{listed((+found).items())}")
    for line in (unused and f"not used: {listed(unused.items())}", skipped()[2:]):
        if line:
            print(line, file=sys.stderr)
