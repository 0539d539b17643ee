"""
Text <-> token arrays: load a tokenizer, tokenise documents and conversations, write and read prepared data.

    python prepare.py                              # pydoc, docstrings of this machine's Python -> data/pydoc
    python prepare.py --dataset=verdict --tokenizer=gpt2        # a text of DOWNLOADS, fetched when missing
    python prepare.py --input=novel.txt            # your own text -> data/novel
    python prepare.py --input=corpus.jsonl --tokenizer=gpt2 --on_error=skip      # {"text": ...} a line
    python prepare.py --input=chats.jsonl --debug_mask      # conversations: look at the first one, then stop
    python prepare.py --input=mail.csv                      # label and text -> train, val and test by label
    python prepare.py --dataset=pydoc_dpo                   # the other sets that need no network: pydoc_sft,
                                                            # pydoc_dpo, reason and spam

The records say what they are for. Text is for pretraining, {"conversations": [{"role", "content"}, ...]} (or
"messages") and {"instruction", "input", "output"} for instruction tuning, {"chosen", "rejected"} for
preferences (two conversations, or two answers to an "instruction"), tables of label and text for
classification. A data set is a folder: for each of train and val (held out) three arrays, documents laid
end to end,

    train_tokens.npy    (n,) uint16 or uint32    token ids
    train_mask.npy      (n,) uint8               1 where the token is a target of the loss
    train_offsets.npy   (documents + 1,) int64   document i is tokens[offsets[i]:offsets[i + 1]]

then meta.json, and the tokenizer that made it. The arrays are read with mmap_mode='r', so memory stays flat
however large the corpus. Text ends in <|endoftext|> and is target throughout; of a conversation, what the
assistant says is (encode_chat); a pair is two documents, chosen and rejected, and their last answers are
(encode_pair); of a labelled text, the last token alone, where the classifier reads, and train_labels.npy
holds the label's number. (Tutorial chapters I-1, I-7, I-8 and II-8 to II-12.)
"""
import ast
import atexit
import codecs
import csv
import difflib
import hashlib
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from http.client import HTTPException
from typing import NamedTuple
from urllib.request import Request, urlopen

import numpy as np
import tiktoken
import tokenizers

from configurator import HERE, clock, configure, fail, make_folder

dataset = ''                # name of the folder in data/, or a path; '' is the input's own name, or pydoc
input = ''                  # a .txt, .jsonl, .json, .csv or .tsv file, or a folder of text; '' is built in
tokenizer = 'out/tokenizer' # folder of a trained tokenizer, or 'gpt2'
val_fraction = 0.0          # share of the text that is held out; 0 takes the data set's own, mostly 0.05
on_error = 'stop'           # at a malformed record: 'stop', or 'skip' and count
balance = True              # labelled text: cut each class down to the size of the smallest
seed = 1337                 # labelled text: of the split, and of what balance leaves out
debug_mask = False          # print the first document, token by token with its mask, and stop

FORMAT = 1                  # of the prepared folder; raised when its meaning changes
# Data sets that are a file on the network: its name in data/downloads/, its sha256, where to get it, in turn.
VERDICT, SHAKESPEARE = 'ch02/01_main-chapter-code/the-verdict.txt', 'data/tinyshakespeare/input.txt'
INSTRUCTION = 'ch07/01_main-chapter-code/instruction-data.json'
DOWNLOADS = {
    # chapters I-1 and I-5: a story by Edith Wharton, 20,479 characters
    'verdict': dict(file='the-verdict.txt',
                    sha256='b41e41a68f0398a3154ae69e2e4c0e2694e17fe0d66730536837f1b01935b31f',
                    urls=[f'https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/{VERDICT}',
                          f'https://cdn.jsdelivr.net/gh/rasbt/LLMs-from-scratch@main/{VERDICT}']),
    # 1.1 MB of plays
    'shakespeare': dict(file='shakespeare.txt',
                        sha256='86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed',
                        urls=[f'https://raw.githubusercontent.com/karpathy/char-rnn/master/{SHAKESPEARE}',
                              f'https://cdn.jsdelivr.net/gh/karpathy/char-rnn@master/{SHAKESPEARE}']),
    # chapter I-7: the SMS Spam Collection (Almeida et al. 2011), 5,574 messages
    'sms_spam': dict(file='sms_spam.zip',
                     sha256='1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3',
                     urls=['https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip',
                           'https://f001.backblazeb2.com/file/LLMs-from-scratch/sms%2Bspam%2Bcollection.zip']),
    # chapter I-8: 1,100 instructions with answers
    'instruction': dict(file='instruction.json',
                        sha256='7e09a9af353722ca15c18bc580f093f9c39d3178335a75177319cb1e1d163944',
                        urls=[f'https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/{INSTRUCTION}',
                              f'https://cdn.jsdelivr.net/gh/rasbt/LLMs-from-scratch@main/{INSTRUCTION}']),
}
# The sets that need no file from the user, and their task.
BUILT_IN = dict(pydoc='pretrain', pydoc_sft='sft', pydoc_dpo='dpo', reason='sft', spam='cls',
                verdict='pretrain', shakespeare='pretrain', sms_spam='cls', instruction='sft')
DOWNLOADED = os.path.join(HERE, 'data', 'downloads')


# ---- tokenizer ----

# ChatML, as `transformers` reads it from tokenizer_config.json; encode_chat below is the same in Python.
CHAT_TEMPLATE = ("{% for message in messages %}"
                 "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
                 "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


class Tokenizer:
    """Text <-> ids, over a `tokenizers` backend.

    Text never becomes a special token: "<|im_end|>" typed by a user is ten plain characters. The special ids
    are attributes: eot (<|endoftext|>), im_start and im_end, None where the vocabulary lacks them.
    """

    def __init__(self, backend):
        self.backend = backend
        backend.encode_special_tokens = True        # the library's name for taking them as ordinary text
        self.vocab_size = backend.get_vocab_size()
        self.eot = backend.token_to_id('<|endoftext|>')
        self.im_start, self.im_end = backend.token_to_id('<|im_start|>'), backend.token_to_id('<|im_end|>')

    @property
    def fingerprint(self):
        """16 hex digits that differ between any two tokenizers of different ids."""
        state = json.loads(self.backend.to_str())
        parts = [state['model'], state['pre_tokenizer'], state['normalizer'], state['added_tokens']]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def encode(self, text):
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        """A list of id lists, encoded on all cores."""
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids):
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json; transformers.AutoTokenizer loads the folder too."""
        make_folder(folder)
        self.backend.save(os.path.join(folder, 'tokenizer.json'))
        config = dict(tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False,
                      eos_token='<|endoftext|>', pad_token='<|endoftext|>')
        if self.im_end is not None:
            config.update(bos_token='<|im_start|>', eos_token='<|im_end|>', chat_template=CHAT_TEMPLATE)
        with open(os.path.join(folder, 'tokenizer_config.json'), 'w', encoding='utf-8') as f:
            json.dump(config, f, ensure_ascii=False, indent=2)


def load_tokenizer(source):
    """The tokenizer in a folder (tokenizer.json), or 'gpt2'. Ends the run with one line if there is none."""
    if source == 'gpt2':
        return gpt2_tokenizer()
    path = os.path.join(source, 'tokenizer.json')
    if not os.path.isfile(path):
        fail(f"no tokenizer {path}: train one with `python train_tokenizer.py`, or use --tokenizer=gpt2")
    try:
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(path))
    except Exception as e:                          # `tokenizers` raises bare Exception over a broken file
        fail(f"{path} is not a tokenizer: {str(e).splitlines()[0]}")
    if tokenizer.eot is None:
        fail(f"{path} has no <|endoftext|>, which ends documents here")
    return tokenizer


def gpt2_tokenizer():
    """GPT-2's tokenizer from tiktoken. That knows tokens by rank alone; the pair of which a token was merged
    is what remains when only lower ranks are merged in its bytes."""
    try:
        ranks = tiktoken.get_encoding('gpt2')._mergeable_ranks
    except OSError as e:                            # requests' errors are OSErrors
        fail(f"tiktoken cannot download its gpt2 files ({type(e).__name__}): run once with a network, or set "
             f"TIKTOKEN_CACHE_DIR to a folder that has them")
    # byte-level BPE writes each byte as a printable character: itself, or the next one from U+0100 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in printable}
    letters.update({b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(printable)))})

    def spell(token):
        return ''.join(letters[b] for b in token)

    merges = []
    for token in sorted(ranks, key=ranks.get)[256:]:
        parts = [token[i:i + 1] for i in range(len(token))]
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges.append((spell(parts[0]), spell(parts[1])))
    vocab = {spell(token): rank for token, rank in ranks.items()}
    return Tokenizer(byte_level_bpe(vocab, merges, ['<|endoftext|>']))


def byte_level_bpe(vocab, merges, special):
    """A `tokenizers` backend that splits text as GPT-2 does, then merges bytes."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(s, special=True, normalized=False) for s in special])
    return backend


ALPACA_PREFACE = ("Below is an instruction that describes a task. "
                  "Write a response that appropriately completes the request.")


def encode_chat(tokenizer, messages, add_generation_prompt=False):
    """A conversation -> (ids, mask), two lists of one length: in ChatML (chapter II-9) where the tokenizer
    has its special tokens, else in the Alpaca layout (chapter I-8).

    messages  [{'role': 'system' | 'user' | 'assistant', 'content': text}, ...]; content is stripped. A user's
              turn may bring its material apart, as 'input'.
    mask      1 on what the assistant has to say: each token of its answer, and the <|im_end|> or
              <|endoftext|> behind it
    """
    ids, mask = [], []
    layout = alpaca if tokenizer.im_start is None else chatml
    for tokens, target in layout(tokenizer, messages, add_generation_prompt):
        ids.extend(tokens)
        mask.extend([target] * len(tokens))
    return ids, mask


def chatml(tokenizer, messages, add_generation_prompt):
    """Yield (ids, mask) piece by piece; of each turn `<|im_start|>role\\ncontent<|im_end|>\\n`."""
    opening = [tokenizer.im_start, *tokenizer.encode('assistant\n')]    # what generation is given, too
    for message in messages:
        role, content = message['role'], message['content'].strip()
        if message.get('input', '').strip():
            content += '\n\n' + message['input'].strip()
        if role == 'assistant':
            yield opening, 0
            yield [*tokenizer.encode(content), tokenizer.im_end], 1
        else:
            yield [tokenizer.im_start, *tokenizer.encode(f'{role}\n{content}'), tokenizer.im_end], 0
        yield tokenizer.encode('\n'), 0
    if add_generation_prompt:
        yield opening, 0


def alpaca(tokenizer, messages, add_generation_prompt):
    """Yield (ids, mask) piece by piece. A system message stands in for the sentence that opens the layout; a
    later turn follows the <|endoftext|> of the answer before it. Padding is <|endoftext|> as well, but the
    first one is learned: it is how the model stops."""
    opening = tokenizer.encode('\n\n### Response:\n')
    preface = ALPACA_PREFACE + '\n\n'
    for message in messages:
        role, content = message['role'], message['content'].strip()
        if role == 'system':
            preface = content + '\n\n'
        elif role == 'user':
            material = message.get('input', '').strip()
            yield tokenizer.encode(f'{preface}### Instruction:\n{content}'
                                   + (f'\n\n### Input:\n{material}' if material else '')), 0
            preface = ''
        else:
            yield opening, 0
            yield [*tokenizer.encode(content), tokenizer.eot], 1
    if add_generation_prompt:
        yield opening, 0


def encode_pair(tokenizer, messages, rejected):
    """Two answers to one prompt -> [(ids, mask), (ids, mask)] of chosen and rejected (chapter II-10).

    messages  a conversation that ends in the chosen answer; rejected takes its place in the second
    The prompt is tokenised once, and only the last answer is target: turns before it are the same in both.
    """
    prompt, _ = encode_chat(tokenizer, messages[:-1], add_generation_prompt=True)
    end = tokenizer.eot if tokenizer.im_end is None else tokenizer.im_end
    answers = [[*tokenizer.encode(text.strip()), end] for text in (messages[-1]['content'], rejected)]
    return [(prompt + answer, [0] * len(prompt) + [1] * len(answer)) for answer in answers]


def print_mask(tokenizer, ids, mask):
    """The mask table: each token of a document, and whether it is a target of the loss."""
    print("position      id  target  token")
    for i, (token, target) in enumerate(zip(ids, mask)):
        print(f"{i:8}  {token:6}  {'yes' if target else '-':6}  {tokenizer.decode([token])!r}")


# ---- sources of text ----

class Progress:
    """A line with speed and time left, redrawn in a terminal, or every ten seconds in a log."""

    def __init__(self, what):
        self.what, self.start, self.shown = what, time.time(), time.time()

    def show(self, fraction, count=''):
        now, tty = time.time(), sys.stderr.isatty()
        if now - self.shown < (0.5 if tty else 10):
            return
        self.shown = now
        left = (now - self.start) * (1 - fraction) / max(fraction, 1e-9)
        print(f"{self.what} {100 * fraction:5.1f}%  {count}  {clock(left)} left   ", file=sys.stderr,
              end='\r' if tty else '\n', flush=True)


class Piece(NamedTuple):
    """Some text of one document. Long documents come in several pieces, so that memory stays bounded."""
    split: str              # 'train' or 'val'; labelled text has 'test' too
    text: str               # of a conversation, what its turns say
    ends_document: bool
    progress: float         # how much of the source has been read, 0 to 1
    messages: tuple = ()    # of a conversation, as encode_chat takes them
    label: int = -1         # of labelled text
    rejected: str = ''      # of a pair, the answer to reject; its messages end in the chosen one


def read_documents(source='', val_fraction=0.05, on_error='stop'):
    """Yield the Pieces of a source: '' is pydoc, else a .txt, .jsonl or .json file, or a folder of them.

    A record is held out by a hash of its text, so that equal texts stand on the same side; of a .txt file,
    which is one document, the last part is held out. Malformed input ends the run with file:line, or is
    counted in malformed.count.
    """
    if not source:
        yield from pydoc(val_fraction)
        return
    if os.path.isdir(source):
        files = sorted(os.path.join(d, f) for d, _, names in os.walk(source) for f in names
                       if f.endswith(('.txt', '.jsonl', '.json')))
        if not files:
            fail(f"{source} holds no .txt, .jsonl or .json file")
    else:
        files = [source]
    for file in files:
        if not os.path.isfile(file):
            fail(f"no such file: {file}")
        if not file.endswith(('.txt', '.jsonl', '.json')):
            fail(f"{file}: text is read from .txt, .jsonl and .json")
    sizes = [os.path.getsize(f) for f in files]
    for i, file in enumerate(files):
        if not sizes[i]:
            fail(f"{file} is empty")
        reader = read_txt(file, sizes[i], val_fraction) if file.endswith('.txt') else \
            ((side(text, val_fraction), text, True, progress)
             for _, text, progress in read_records(file, text_of, on_error))
        for split, text, ends_document, progress in reader:
            yield Piece(split, text, ends_document, (sum(sizes[:i]) + sizes[i] * progress) / sum(sizes))


def download(file, sha256, urls, folder=DOWNLOADED):
    """The path of a file in a folder, fetched from the first of the urls that has it, unless it is there.

    What a broken connection left is continued. A file put there by hand is as good, if its checksum is right.
    """
    path = os.path.join(folder, file)
    if os.path.isfile(path):
        if hash_of(path) != sha256:
            fail(f"{path} is not the file it should be (its sha256 is not {sha256[:16]}...): remove it first")
        return path
    make_folder(folder)
    for url in urls:
        try:
            fetch(url, path + '.part')
        except (OSError, HTTPException) as e:       # no network, no such file, a connection that broke
            reason = f"{type(e).__name__}: {e}"
            continue
        if hash_of(path + '.part') == sha256:
            os.replace(path + '.part', path)
            return path
        os.remove(path + '.part')
        reason = f"what {url} sends has another sha256 than {sha256[:16]}..."
    fail(f"cannot download {file} ({reason}): get it from {urls[0]} and put it at {path}")


def unzip(path):
    """The path of the table in a downloaded .zip, unpacked beside it: its largest file."""
    table = path.removesuffix('.zip') + '.tsv'
    with zipfile.ZipFile(path) as z, open(table, 'wb') as f:
        f.write(z.read(max(z.infolist(), key=lambda member: member.file_size)))
    return table


def fetch(url, path):
    """Append to a file what it lacks of a url."""
    have = os.path.getsize(path) if os.path.exists(path) else 0
    request = Request(url, headers={'Range': f'bytes={have}-'} if have else {})
    with urlopen(request, timeout=30) as response, open(path, 'ab') as f:
        if response.status != 206:                  # not the rest but the whole
            have = f.truncate(0)
        size = have + int(response.headers.get('Content-Length') or 0)
        progress = Progress(f'downloading {os.path.basename(path)}')
        while block := response.read(1 << 20):
            f.write(block)
            progress.show(f.tell() / max(size, f.tell()), f"{f.tell():,} bytes")
        if f.tell() < size:
            raise OSError(f"the connection ended after {f.tell():,} of {size:,} bytes")


def hash_of(path):
    """The sha256 of a file, in hex digits."""
    sha256 = hashlib.sha256()
    with open(path, 'rb') as f:
        while block := f.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()


def side(text, val_fraction):
    """'train' or 'val', by the text alone: stable between runs and machines."""
    return 'val' if int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) < val_fraction * 2**32 else 'train'


def read_txt(file, size, val_fraction, piece=1 << 16):
    """(split, text, ends_document, progress) of a text file, in pieces of about `piece` bytes.

    A piece ends where white space follows a word: tokenizers always split there, so no id depends on where.
    """
    decoder = codecs.getincrementaldecoder('utf-8-sig')()
    text, lines, position, border = '', 1, 0, round(size * (1 - val_fraction))
    with open(file, 'rb') as f:
        for split, end in (('train', border), ('val', size)):
            while position < end:
                raw = f.read(min(piece, end - position))
                position += len(raw)
                try:
                    new = decoder.decode(raw, final=position == size)
                except UnicodeDecodeError as e:
                    line = lines + e.object[:e.start].count(10)
                    fail(f"{file}:{line}: not UTF-8 (byte 0x{e.object[e.start]:02x}); convert the file first")
                lines += new.count('\n')
                text += new
                gap = re.search(r'\s+\S*\Z', text)
                cut = gap.start() if gap else 0
                if not cut and len(text) > 16 * piece:
                    cut = len(text)                 # a megabyte without white space
                if cut:
                    yield split, text[:cut], False, position / size
                    text = text[cut:]
            yield split, text, True, position / size
            text = ''


# ---- records: a line of .jsonl, an item of a .json list, a row of a table ----

def malformed(where, reason, on_error):
    """Report a record that cannot be used: end the run, or count it in malformed.count."""
    if on_error == 'stop':
        fail(f"{where}: {reason}; mend it, or pass --on_error=skip")
    malformed.count += 1


malformed.count = 0


def read_records(file, parse, on_error='stop'):
    """Yield (line, parse(record), share of the file read) of a .jsonl, .json, .csv or .tsv file.

    parse takes a JSON value, or the list [label, text] of a table, and raises ValueError with the reason if
    it is not what it should be.
    """
    kind = os.path.splitext(file)[1]
    for line, record, progress in (json_lines if kind == '.jsonl' else json_list if kind == '.json' else
                                   table_rows)(file):
        try:
            if isinstance(record, bytes):
                record = json.loads(record.decode('utf-8-sig'))
            result = parse(record)
        except UnicodeDecodeError as e:
            reason = f"not UTF-8 (byte 0x{e.object[e.start]:02x} in column {e.start + 1})"
        except json.JSONDecodeError as e:
            reason = f"not JSON ({e.msg}, column {e.colno})"
        except RecursionError:
            reason = "JSON nested too deep"
        except ValueError as e:
            reason = str(e)
        else:
            yield line, result, progress
            continue
        malformed(f"{file}:{line}", reason, on_error)


def json_lines(file):
    """(line, its bytes, progress) of each line of a .jsonl file that is not blank."""
    position, size = 0, os.path.getsize(file)
    with open(file, 'rb') as f:
        for number, raw in enumerate(f, 1):
            position += len(raw)
            if raw.strip():
                yield number, raw, position / size


def whole_text(file):
    with open(file, 'rb') as f:
        raw = f.read()
    try:
        return raw.decode('utf-8-sig')
    except UnicodeDecodeError as e:
        line = raw[:e.start].count(10) + 1
        fail(f"{file}:{line}: not UTF-8 (byte 0x{raw[e.start]:02x}); convert the file first")


def json_list(file):
    """(line, item, progress) of a .json list. It is held in memory, as .jsonl need not be."""
    text, gap, decode = whole_text(file), re.compile(r'\s*').match, json.JSONDecoder().raw_decode
    at, line, counted = gap(text).end(), 1, 0
    if text[at:at + 1] != '[':
        fail(f"{file}:1: not a list; a .json file holds one list of records, a .jsonl file a record a line")
    separator = '['
    while separator != ']':
        at = gap(text, at + 1).end()
        line, counted = line + text.count('\n', counted, at), at
        if separator == '[' and text[at:at + 1] == ']':
            return
        try:
            item, at = decode(text, at)
        except json.JSONDecodeError as e:
            fail(f"{file}:{e.lineno}: not JSON ({e.msg}, column {e.colno})")
        except RecursionError:
            fail(f"{file}:{line}: JSON nested too deep")
        yield line, item, at / len(text)
        at = gap(text, at).end()
        separator = text[at:at + 1]
        if separator not in (',', ']') or not separator:
            fail(f"{file}:{line}: not JSON (the record that starts here is followed by neither , nor ])")


def table_rows(file):
    """(line, [label, text], progress) of a .csv or .tsv file.

    A first line that names the columns label and text is a header, in any order and among others; without one
    the label stands first. A .csv follows RFC 4180: quotes may hold commas, lines and doubled quotes. In a
    .tsv each line is a record and a quote is a plain character, unless it wraps the whole field as
    spreadsheets write it. Separators too many belong to the text.
    """
    text, comma = whole_text(file), file.endswith('.csv')
    if comma:
        rows = csv.reader(io.StringIO(text, newline=''), strict=True)
    else:
        rows = (line.rstrip('\r').split('\t') for line in text.split('\n'))
    columns, end, total = ['label', 'text'], 0, text.count('\n') + 1
    while True:
        start = end + 1
        try:
            row = next(rows, None)
        except csv.Error as e:
            fail(f"{file}:{start}: not a row of .csv ({e})")
        end = rows.line_num if comma else start
        if row is None:
            return
        names = [cell.strip().lower() for cell in row]
        if start == 1 and {'label', 'text'} <= set(names):
            columns = names
        elif any(names):
            extra, at = max(0, len(row) - len(columns)), columns.index('text')
            row[at:at + extra + 1] = [(',' if comma else '\t').join(row[at:at + extra + 1])]
            if not comma:
                row = [cell[1:-1].replace('""', '"') if re.fullmatch(r'"([^"]|"")*"', cell) else cell
                       for cell in row]
            yield start, [row[i] if i < len(row) else '' for i in (columns.index('label'), at)], end / total


def check_text(text, what):
    """text, if it is one; ValueError says what else `what` is."""
    if not isinstance(text, str):
        raise ValueError(f'{what} is not a text but {json.dumps(text)[:40]}')
    if not text.strip():
        raise ValueError(f'{what} is empty')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f'{what} holds half of a surrogate pair') from None
    return text


def fields_of(record, *wanted):
    """The one of the wanted fields that a record has, in words for an error if there is none."""
    found = [field for field in wanted if isinstance(record, dict) and field in record]
    if not found:
        names = ' or '.join(f'"{field}"' for field in wanted)
        fields = f" among {', '.join(record)}" if isinstance(record, dict) and record else ""
        raise ValueError(f'no field {names}{fields}')
    return found[0]


def text_of(record):
    """The text of a record for pretraining."""
    return check_text(record[fields_of(record, 'text')], '"text"')


def messages_of(record):
    """The conversation in a record, as encode_chat takes it. Users and assistant take turns, a system message
    may open, and the assistant has the last word."""
    field = fields_of(record, 'conversations', 'messages', 'instruction')
    if field == 'instruction':
        question = dict(role='user', content=check_text(record['instruction'], '"instruction"'))
        if record.get('input'):
            question['input'] = check_text(record['input'], '"input"')
        answer = check_text(record[fields_of(record, 'output')], '"output"')
        return question, dict(role='assistant', content=answer)
    turns, messages = record[field], []
    if not isinstance(turns, list) or not turns:
        raise ValueError(f'"{field}" is not a list of turns but {json.dumps(turns)[:40]}')
    for i, turn in enumerate(turns, 1):
        role = turn[fields_of(turn, 'role')]
        content = turn[fields_of(turn, 'content')]
        if role not in ('system', 'user', 'assistant'):
            raise ValueError(f"turn {i} has the unknown role {role!r}; there are system, user and assistant")
        messages.append(dict(role=role, content=check_text(content, f"turn {i}, of the {role},")))
        expected = 'assistant' if i > 1 and turns[i - 2]['role'] == 'user' else 'user'
        if role != expected and not (role == 'system' and i == 1):
            raise ValueError(f"turn {i} is the {role}'s, where the {expected}'s is expected")
    if role != 'assistant':
        raise ValueError("the last turn is not the assistant's, so nothing answers it")
    return tuple(messages)


def pair_of(record):
    """(conversation that ends in the chosen answer, rejected answer) of a record: two conversations, or two
    answers to an instruction."""
    sides = {key: record[fields_of(record, key)] for key in ('chosen', 'rejected')}
    for key, value in sides.items():
        if 'instruction' in record:
            sides[key] = messages_of({**record, 'output': check_text(value, f'"{key}"')})
        else:
            try:
                sides[key] = messages_of(dict(messages=value))
            except ValueError as e:
                raise ValueError(f'"{key}": {e}') from None
    (*prompt, chosen), (*other, rejected) = sides['chosen'], sides['rejected']
    if prompt != other:
        raise ValueError('"chosen" and "rejected" answer different prompts')
    if chosen['content'].strip() == rejected['content'].strip():
        raise ValueError('"chosen" and "rejected" are the same answer')
    return sides['chosen'], rejected['content']


def label_and_text(row):
    """(label, text) of a table's row."""
    return check_text(row[0], 'the label').strip(), check_text(row[1], 'the text').strip()


TASK_OF_FIELD = dict(chosen='dpo', text='pretrain', conversations='sft', messages='sft', instruction='sft')


def task_of(source, on_error='stop'):
    """What a source is for: by its ending, and of .jsonl and .json by the fields of its first good record."""
    if source.endswith(('.csv', '.tsv')):
        return 'cls'
    if not source.endswith(('.jsonl', '.json')) or not os.path.isfile(source):
        return 'pretrain'
    for _, field, _ in read_records(source, lambda record: fields_of(record, *TASK_OF_FIELD), on_error):
        malformed.count = 0                     # the reader that follows counts again
        return TASK_OF_FIELD[field]
    fail(f"{source} holds no record with one of the fields {', '.join(TASK_OF_FIELD)}")


def read_conversations(source='', val_fraction=0.05, on_error='stop'):
    """Yield the conversations of a source ('' is pydoc_sft) as Pieces, held out by a hash of the question."""
    if not source:
        yield from pydoc_sft(val_fraction)
        return
    for _, messages, progress in read_records(source, messages_of, on_error):
        question = next(m for m in messages if m['role'] == 'user')
        split = side(question['content'] + question.get('input', ''), val_fraction)
        yield conversation(split, messages, progress)


def read_pairs(source='', val_fraction=0.05, on_error='stop'):
    """Yield the pairs of a source ('' is pydoc_dpo) as Pieces, held out by a hash of the question."""
    if not source:
        yield from pydoc_dpo(val_fraction)
        return
    for _, (messages, rejected), progress in read_records(source, pair_of, on_error):
        question = next(m for m in messages if m['role'] == 'user')
        split = side(question['content'] + question.get('input', ''), val_fraction)
        yield conversation(split, messages, progress)._replace(rejected=rejected)


def conversation(split, messages, progress):
    text = '\n'.join(m[part] for m in messages for part in ('content', 'input') if part in m)
    return Piece(split, text, True, progress, tuple(messages))


def read_labelled(source='', balance=True, seed=1337, on_error='stop'):
    """The labelled texts of a .csv or .tsv file ('' is the spam set that ships): (Pieces, names of labels).

    Of texts that are equal but for case and white space one is kept, so none stands in two splits. With
    balance, the larger classes are cut at random to the smallest. Each class is dealt out 70 / 10 / 20 to
    train, val and test.
    """
    source = source or os.path.join(HERE, 'data', 'spam.csv')
    seen, classes, repeated = {}, {}, 0
    for line, (label, text), _ in read_records(source, label_and_text, on_error):
        key = ' '.join(text.casefold().split())
        if key in seen:
            other, its_line, its_text = seen[key]
            if label != other and text == its_text:
                reason = f"this text has the label {label!r}, but {other!r} in line {its_line}"
                malformed(f"{source}:{line}", reason, on_error)
            else:
                repeated += 1
            continue
        seen[key] = label, line, text
        classes.setdefault(label, []).append((line, text))
    for label, texts in sorted(classes.items()):
        if len(texts) < 3:
            times = 'once' if len(texts) == 1 else 'twice'
            reason = (f"the label {label!r} is seen {times}, but train, val and test need a text each (if it "
                      f"stands in a header, that must name label and text)")
            malformed(f"{source}:{texts[0][0]}", reason, on_error)
            del classes[label]
    if len(classes) < 2:
        fail(f"{source}: a classifier needs two labels, and here " +
             (f"is one, {next(iter(classes))!r}" if classes else "is none"))
    names = sorted(classes)
    rng, pieces = np.random.default_rng(seed), []
    smallest = min(map(len, classes.values()))
    for label, name in enumerate(names):
        texts = classes[name]
        order = rng.permutation(len(texts))[:smallest if balance else len(texts)]
        n_val, n_test = max(1, round(0.1 * len(order))), max(1, round(0.2 * len(order)))
        splits = ['val'] * n_val + ['test'] * n_test + ['train'] * (len(order) - n_val - n_test)
        pieces += [Piece(split, texts[i][1], True, 1.0, label=label) for split, i in zip(splits, order)]
    for label, name in enumerate(names):
        print(f"label {name!r}: {sum(p.label == label for p in pieces):,} of {len(classes[name]):,} texts")
    if repeated:
        print(f"left out {repeated:,} repeated texts")
    return pieces, names


# ---- built-in sources ----

def docstrings():
    """Yield (title, docstring, progress) of each module, class and function of this machine's standard
    library. The title is the signature: 'def dedent(text)', 'class Thread', 'module json.tool'. Read from
    source with `ast`; nothing is imported.
    """
    root = sysconfig.get_path('stdlib')
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages'})
        files += [os.path.join(folder, name) for name in sorted(names) if name.endswith('.py')]
    seen = set()
    for i, file in enumerate(files):
        with open(file, 'rb') as f:
            try:
                tree = ast.parse(f.read())
            except (SyntaxError, ValueError):       # templates and the like
                continue
        for node in ast.walk(tree):
            if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            doc = ast.get_docstring(node)
            if isinstance(node, ast.Module):
                name = os.path.relpath(file, root).removesuffix('.py').replace(os.sep, '.')
                title = f"module {name.removesuffix('.__init__')}"
            elif isinstance(node, ast.ClassDef):
                title = f"class {node.name}({', '.join(map(ast.unparse, node.bases))})".replace('()', '')
            else:
                title = f"def {node.name}({ast.unparse(node.args)})"
            if doc and (title, doc) not in seen:
                seen.add((title, doc))
                yield title, doc, i / len(files)
    if not seen:
        fail(f"{root} holds no Python source to read docstrings from; give your own text with --input=FILE")


def pydoc(val_fraction):
    """Each title with its docstring. Held out by docstring, so that functions which share one stand on the
    same side."""
    for title, doc, progress in docstrings():
        yield Piece(side(doc, val_fraction), f"{title}:\n{doc}\n", True, progress)


PYDOC_SYSTEM = "You know the Python standard library. Answer briefly."
PYDOC_QUESTIONS = dict(
    purpose=["What does this {kind} do?\n{title}", "Explain in short:\n{title}", "{title}\nWhat is it for?",
             "Write a docstring for this {kind}:\n{title}", "Can you tell me what {title} is about?"],
    parameters=["Which parameters does it take?\n{title}", "List the parameters of this function:\n{title}",
                "{title}\nWhat do I have to pass?"],
    follow_up=["And which parameters does it take?", "List its parameters.", "What do I have to pass?"])


def pick_of(title):
    """A number for a title: random, yet always the same."""
    return int(hashlib.sha256(title.encode()).hexdigest()[:8], 16)


def pydoc_question(form, title):
    """A user's question about a title, in one of the wordings of its form."""
    forms, kind = PYDOC_QUESTIONS[form], title.split()[0].replace('def', 'function')
    return dict(role='user', content=forms[pick_of(title) % len(forms)].format(kind=kind, title=title))


def pydoc_sft(val_fraction):
    """Conversations about what pydoc reads: what a thing is for (the first paragraph of its docstring), and
    the parameters of a function. One in four opens with a system message. What pydoc holds out is held out
    here, too."""
    for title, doc, progress in docstrings():
        summary = ' '.join(doc.split('\n\n')[0].split())
        if not 10 < len(summary) <= 300:
            continue
        pick = pick_of(title)
        names = parameters(title) if title.startswith('def ') else ''
        listed = dict(role='assistant', content=names)
        messages = [pydoc_question('purpose', title), dict(role='assistant', content=summary)]
        if names and pick // 7 % 3 == 1:
            messages += [pydoc_question('follow_up', title), listed]
        elif names and pick // 7 % 3 == 2:
            messages = [pydoc_question('parameters', title), listed]
        if pick // 11 % 4 == 0:
            messages.insert(0, dict(role='system', content=PYDOC_SYSTEM))
        yield conversation(side(doc, val_fraction), messages, progress)


def parameters(title):
    """'def f(self, a, *, b=1, **kw)' -> 'a, b, kw'."""
    args = ast.parse(title + ': pass').body[0].args
    names = [a.arg for a in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg) if a]
    return ', '.join(names[names[:1] in (['self'], ['cls']):])


def pydoc_dpo(val_fraction):
    """Pairs about what pydoc_sft asks: what is this for? Chosen is the summary of the function or class that
    is asked about, rejected that of something else and of the other kind, a class or a function, as long as
    it. Each summary is chosen once and rejected once, so an answer by itself tells nothing: what is right is
    only what fits the question."""
    found = {}
    for title, doc, progress in docstrings():
        summary = ' '.join(doc.split('\n\n')[0].split())
        if not title.startswith('module ') and 10 < len(summary) <= 300:
            found.setdefault(summary, (side(doc, val_fraction), title.split()[0], title, progress))
    for split in ('train', 'val'):
        functions, classes = (sorted((s for s in found if found[s][:2] == (split, kind)),
                                     key=lambda s: (len(s), s)) for kind in ('def', 'class'))
        upward = iter(functions)
        for one in classes:                         # there are several functions to a class
            other = next((s for s in upward if len(s) >= len(one)), None)
            for chosen, rejected in ((one, other), (other, one)) if other else ():
                title, progress = found[chosen][2:]
                messages = pydoc_question('purpose', title), dict(role='assistant', content=chosen)
                yield conversation(split, messages, progress)._replace(rejected=rejected)


# Arithmetic word problems: the question; its steps, "what it is: x op y", where r1 is the first one's result;
# the ranges of its numbers.
REASON_TEMPLATES = [
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
REASON_HELD_OUT = [             # other words for operations that are trained
    ('{friend} had {a} {things} and took {b} from {name}. How many {things} does {friend} have now?',
     ['all {things}: {a} + {b}'], dict(a=(2, 50), b=(2, 50))),
    ('In {a} rows stand {b} {things} each; {c} of them are broken. How many {things} are whole?',
     ['{things} in the rows: {a} * {b}', 'whole {things}: {r1} - {c}'],
     dict(a=(4, 10), b=(4, 10), c=(2, 15))),
]
REASON_NAMES = ('Ann', 'Ben', 'Carl', 'Dora', 'Emil', 'Fay', 'Gus', 'Hana', 'Ivo', 'June')
REASON_THINGS = ('apples', 'books', 'cards', 'eggs', 'keys', 'marbles', 'pens', 'shells', 'stamps', 'stones')
REASON_LABELS = ['new numbers', 'new template']
CALCULATE = {'+': int.__add__, '-': int.__sub__, '*': int.__mul__}


def reason(val_fraction, count=6000):
    """Word problems whose answers show their work: the steps in <think>, "what it is: x op y = z", and the
    last z in <answer> (chapter II-12). Held out twice over, and labelled so: numbers that no training problem
    brings together, and templates that no training problem is made of."""
    rng, asked = random.Random(1337), set()
    while len(asked) < count:
        label = int(rng.random() < val_fraction)
        question, steps, ranges = rng.choice(REASON_HELD_OUT if label else REASON_TEMPLATES)
        values = {key: rng.randint(*bounds) for key, bounds in ranges.items()}
        split = 'val' if label else side(' '.join(map(str, values.values())), val_fraction)
        name, friend = rng.sample(REASON_NAMES, 2)
        values.update(name=name, friend=friend, things=rng.choice(REASON_THINGS))
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
            messages = dict(role='user', content=question), dict(role='assistant', content=answer)
            yield conversation(split, messages, len(asked) / count)._replace(label=label)


# ---- prepared data ----

class ArrayWriter:
    """A one-dimensional .npy file, written piece by piece; its length goes into the header at the end."""

    def __init__(self, path, dtype):
        self.file, self.dtype, self.length = open(path, 'wb'), np.dtype(dtype), 0
        self.header()

    def header(self):
        # numpy leaves room in the header for the length to grow, so writing it again keeps its size
        np.lib.format.write_array_header_1_0(self.file, dict(
            descr=self.dtype.str, fortran_order=False, shape=(self.length,)))

    def append(self, values):
        self.file.write(np.asarray(values, dtype=self.dtype).tobytes())
        self.length += len(values)

    def close(self):
        self.file.seek(0)
        self.header()
        self.file.close()


class Split(NamedTuple):
    tokens: np.ndarray      # (n,)
    mask: np.ndarray        # (n,)
    offsets: np.ndarray     # (documents + 1,)


def data_folder(name):
    """A data set's folder: data/<name> beside this script, or a path that holds a separator."""
    return name if os.sep in name or '/' in name else os.path.join(HERE, 'data', name)


def read_meta(name, task='pretrain'):
    """meta.json of a data set prepared for a task, or one line on how to prepare it."""
    path = os.path.join(data_folder(name), 'meta.json')
    if not os.path.isfile(path):
        fail(f"no prepared data in {data_folder(name)}: make it with `python prepare.py --input=FILE "
             f"--dataset={name}`, or use the built-in --dataset="
             + ' or '.join(k for k, t in BUILT_IN.items() if t == task))
    with open(path, encoding='utf-8') as f:
        try:
            meta = json.load(f)
        except ValueError as e:
            fail(f"{path} is damaged ({e}): run prepare.py again")
    if meta.get('format') != FORMAT:
        fail(f"{path} is of format {meta.get('format')}, this code reads {FORMAT}: run prepare.py again")
    if meta['task'] != task:
        fail(f"{path}: prepared for the task {meta['task']!r}, not {task!r}: choose another --dataset")
    return meta


def read_split(name, split):
    """The arrays of 'train' or 'val', mapped into memory rather than read."""
    try:
        return Split(*(np.load(os.path.join(data_folder(name), f'{split}_{field}.npy'), mmap_mode='r')
                       for field in Split._fields))
    except (OSError, ValueError) as e:
        fail(f"{data_folder(name)} is damaged ({e}): run prepare.py again")


def read_labels(name, split):
    """(documents,) int64, the number of each labelled text's label in meta['labels']."""
    return np.load(os.path.join(data_folder(name), f'{split}_labels.npy'))


def encode_pieces(tokenizer, pieces, task):
    """Yield (Piece, ids, mask) as the task wants them; a pair gives two, chosen and rejected in turn."""
    if task == 'dpo':
        for piece in pieces:
            for ids, mask in encode_pair(tokenizer, piece.messages, piece.rejected):
                yield piece, ids, mask
    elif task == 'sft':
        for piece in pieces:
            yield piece, *encode_chat(tokenizer, piece.messages)
    else:
        for piece, ids in zip(pieces, tokenizer.encode_batch([p.text for p in pieces])):
            ids = ids + [tokenizer.eot] * piece.ends_document
            yield piece, ids, [1] * len(ids) if task == 'pretrain' else [0] * (len(ids) - 1) + [1]


def write_data(folder, tokenizer, pieces, source, task='pretrain', labels=()):
    """Tokenise the Pieces into a prepared folder, all or nothing. Returns its meta.json."""
    folder = os.path.abspath(folder)
    if os.path.exists(folder) and not os.path.isfile(os.path.join(folder, 'meta.json')):
        fail(f"{folder} is there, and is no prepared data set: move it, or choose another --dataset")
    if os.path.exists(source) and os.path.commonpath([folder, os.path.abspath(source)]) == folder:
        fail(f"{source} lies in {folder}, which is written anew: choose another --dataset")
    partial = folder + '.partial'
    shutil.rmtree(partial, ignore_errors=True)
    atexit.register(shutil.rmtree, partial, ignore_errors=True)     # a run that fails leaves nothing behind
    make_folder(partial)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    kinds = dict(tokens=dtype, mask=np.uint8, offsets=np.int64)
    writers = {split: Split(**{field: ArrayWriter(os.path.join(partial, f'{split}_{field}.npy'), kind)
                               for field, kind in kinds.items()})
               for split in ('train', 'val', 'test')[:3 if task == 'cls' else 2]}
    numbers = {split: [] for split in writers}          # of the labels
    counts = {split: dict(documents=0, tokens=0, bytes=0) for split in writers}
    for w in writers.values():
        w.offsets.append([0])

    def flush(batch):
        for piece, ids, mask in encode_pieces(tokenizer, batch, task):
            w, count = writers[piece.split], counts[piece.split]
            w.tokens.append(ids)
            w.mask.append(mask)
            numbers[piece.split].append(piece.label)
            count['tokens'] += len(ids)
            count['bytes'] += len(piece.text.encode())
            if piece.ends_document:
                w.offsets.append([count['tokens']])
                count['documents'] += 1

    batch, size, progress = [], 0, Progress('tokenising')
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size > 1 << 20:                          # a megabyte at a time is enough to keep all cores busy
            flush(batch)
            batch, size = [], 0
            progress.show(piece.progress, f"{counts['train']['tokens']:,} tokens")
    flush(batch)
    for w in writers.values():
        for array in w:
            array.close()
    for split, count in counts.items():
        if not count['bytes']:
            fail(f"{source}: no document falls into {split!r}; give more text, or another --val_fraction")
        if labels:
            np.save(os.path.join(partial, f'{split}_labels.npy'), np.array(numbers[split], dtype=np.int64))
    tokenizer.save(partial)
    meta = dict(format=FORMAT, task=task, source=source, tokenizer=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size, **counts, **({'labels': labels} if labels else {}))
    with open(os.path.join(partial, 'meta.json'), 'w', encoding='utf-8') as f:
        json.dump(meta, f, ensure_ascii=False, indent=2)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    return meta


def prepare_missing(run, dataset, tokenizer):
    """Before a stage reads a built-in data set that is not there yet: do what a newcomer would type. Every
    rank calls this. tokenizer: a folder, trained first if it has none, or 'gpt2'."""
    folder = data_folder(dataset)
    if os.path.basename(folder) in BUILT_IN and not os.path.exists(folder):
        if run.rank == 0:
            commands = [['prepare.py', f'--dataset={dataset}', f'--tokenizer={tokenizer}']]
            if tokenizer != 'gpt2' and not os.path.isfile(os.path.join(tokenizer, 'tokenizer.json')):
                commands.insert(0, ['train_tokenizer.py', f'--out_dir={tokenizer}'])
            env = {k: v for k, v in os.environ.items() if k != 'RANK'}
            for script, *options in commands:
                print('$ python', script, *options, flush=True)
                done = subprocess.run([sys.executable, os.path.join(HERE, script), *options], env=env)
                if done.returncode:
                    sys.exit(done.returncode)
    run.barrier()


if __name__ == '__main__':
    configure(globals(), val_fraction=[0, 1], on_error=('stop', 'skip'))
    folder = data_folder(dataset or os.path.splitext(os.path.basename(input.rstrip('/')))[0] or 'pydoc')
    name = os.path.basename(folder)
    if not input and name not in BUILT_IN:
        near = difflib.get_close_matches(name, BUILT_IN, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(BUILT_IN)}"
        fail(f"--dataset={dataset} is not built in ({hint}): name its source with --input=FILE")
    # chapter I-5 holds out a tenth of its short text, which is two rows
    val_fraction = val_fraction or (0.1 if name == 'verdict' else 0.05)
    if name in DOWNLOADS and not input:
        input = download(**DOWNLOADS[name])
        input = unzip(input) if input.endswith('.zip') else input
    if input and not os.path.exists(input):
        fail(f"no such file: {input}")
    if input and not os.path.isdir(input) and not os.path.getsize(input):
        fail(f"{input} is empty")
    words = load_tokenizer(tokenizer)
    task, labels = task_of(input, on_error) if input else BUILT_IN[name], ()
    if task == 'cls':
        pieces, labels = read_labelled(input, balance, seed, on_error)
    elif task == 'dpo':
        pieces = read_pairs(input, val_fraction, on_error)
    elif name == 'reason' and not input:
        pieces, labels = reason(val_fraction), REASON_LABELS
    elif task == 'sft':
        pieces = read_conversations(input, val_fraction, on_error)
    else:
        pieces = read_documents(input, val_fraction, on_error)
    if debug_mask:
        for _, ids, mask in encode_pieces(words, [next(iter(pieces))], task):
            print_mask(words, ids, mask)
        sys.exit()
    meta = write_data(folder, words, pieces, input or name, task, labels)
    for split in ('train', 'val', 'test')[:3 if task == 'cls' else 2]:
        m = meta[split]
        print(f"{split:5} {m['documents']:9,} documents {m['tokens']:13,} tokens {m['bytes']:14,} bytes "
              f"{m['bytes'] / m['tokens']:5.2f} bytes/token")
    if malformed.count:
        print(f"skipped {malformed.count:,} malformed records", file=sys.stderr)
    print(f"wrote {folder}")
