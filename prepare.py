"""
Text <-> token arrays: load a tokenizer, tokenise documents and conversations, write and read prepared data.

    python prepare.py                              # pydoc, docstrings of this machine's Python -> data/pydoc
    python prepare.py --dataset=verdict --tokenizer=gpt2        # a text of DOWNLOADS, fetched when missing
    python prepare.py --input=novel.txt            # your own text -> data/novel
    python prepare.py --input=corpus.jsonl --tokenizer=gpt2 --on_error=skip      # {"text": ...} a line

A data set is a folder: for each of train and val (held out) three arrays, documents laid end to end,

    train_tokens.npy    (n,) uint16 or uint32    token ids; a document ends in <|endoftext|>
    train_mask.npy      (n,) uint8               1 where the token is a target of the loss
    train_offsets.npy   (documents + 1,) int64   document i is tokens[offsets[i]:offsets[i + 1]]

then meta.json, and the tokenizer that made it. The arrays are read with mmap_mode='r', so memory stays flat
however large the corpus. (Tutorial chapters I-1 and II-8.)
"""
import ast
import codecs
import hashlib
import json
import os
import re
import shutil
import sys
import sysconfig
import time
from http.client import HTTPException
from typing import NamedTuple
from urllib.request import Request, urlopen

import numpy as np
import tiktoken
import tokenizers

from configurator import HERE, clock, configure, fail, make_folder

dataset = ''                # name of the folder in data/, or a path; '' is the input's own name, or pydoc
input = ''                  # a .txt or .jsonl file, or a folder of them; '' is the built-in data set's own
tokenizer = 'out/tokenizer' # folder of a trained tokenizer, or 'gpt2'
val_fraction = 0.0          # share of the text that is held out; 0 takes the data set's own, mostly 0.05
on_error = 'stop'           # at a malformed line of .jsonl: 'stop', or 'skip' and count

FORMAT = 1                  # of the prepared folder; raised when its meaning changes

# Data sets that are a file on the network: its name in data/downloads/, its sha256, where to get it, in turn.
VERDICT, SHAKESPEARE = 'ch02/01_main-chapter-code/the-verdict.txt', 'data/tinyshakespeare/input.txt'
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
}
BUILT_IN = ('pydoc', *DOWNLOADS)
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
        os.makedirs(folder, exist_ok=True)
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


def encode_chat(tokenizer, messages, add_generation_prompt=False):
    """A conversation in ChatML -> (ids, mask), two lists of one length (chapter II-9).

    messages  [{'role': 'system' | 'user' | 'assistant', 'content': text}, ...]; content is stripped
    mask      1 on what the assistant has to say: each token of its answer, and the <|im_end|> behind it
    """
    ids, mask = [], []

    def add(tokens, target):
        ids.extend(tokens)
        mask.extend([target] * len(tokens))

    for message in messages:
        role, content = message['role'], message['content'].strip()
        if role == 'assistant':
            add([tokenizer.im_start, *tokenizer.encode('assistant\n')], 0)  # what generation is given, too
            add([*tokenizer.encode(content), tokenizer.im_end], 1)
        else:
            add([tokenizer.im_start, *tokenizer.encode(f'{role}\n{content}'), tokenizer.im_end], 0)
        add(tokenizer.encode('\n'), 0)
    if add_generation_prompt:
        add([tokenizer.im_start, *tokenizer.encode('assistant\n')], 0)
    return ids, mask


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
    split: str              # 'train' or 'val'
    text: str
    ends_document: bool
    progress: float         # how much of the source has been read, 0 to 1


def read_documents(source='', val_fraction=0.05, on_error='stop'):
    """Yield the Pieces of a source: '' is pydoc, else a .txt or .jsonl file, or a folder of them.

    A .jsonl document is held out by a hash of its text, so that equal texts stand on the same side; of a .txt
    file, which is one document, the last part is held out. Malformed input ends the run with file:line, or is
    counted in read_documents.skipped.
    """
    read_documents.skipped = 0
    if not source:
        yield from pydoc(val_fraction)
        return
    if os.path.isdir(source):
        files = sorted(os.path.join(d, f) for d, _, names in os.walk(source) for f in names
                       if f.endswith(('.txt', '.jsonl')))
        if not files:
            fail(f"{source} holds no .txt or .jsonl file")
    else:
        files = [source]
    for file in files:
        if not os.path.isfile(file):
            fail(f"no such file: {file}")
        if not file.endswith(('.txt', '.jsonl')):
            fail(f"{file}: only .txt and .jsonl are read")
    sizes = [os.path.getsize(f) for f in files]
    for i, file in enumerate(files):
        if not sizes[i]:
            fail(f"{file} is empty")
        reader = read_txt(file, sizes[i], val_fraction) if file.endswith('.txt') else \
            read_jsonl(file, val_fraction, on_error)
        for split, text, ends_document, position in reader:
            yield Piece(split, text, ends_document, (sum(sizes[:i]) + position) / sum(sizes))


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
    """(split, text, ends_document, position) of a text file, in pieces of about `piece` bytes.

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
                    yield split, text[:cut], False, position
                    text = text[cut:]
            yield split, text, True, position
            text = ''


def read_jsonl(file, val_fraction, on_error):
    """(split, text, True, position) for each {"text": ...} line."""
    position = 0
    with open(file, 'rb') as f:
        for number, raw in enumerate(f, 1):
            position += len(raw)
            if not raw.strip():
                continue
            try:
                text = text_of(raw.decode('utf-8-sig'))
            except UnicodeDecodeError as e:
                reason = f"not UTF-8 (byte 0x{raw[e.start]:02x} in column {e.start + 1})"
            except json.JSONDecodeError as e:
                reason = f"not JSON ({e.msg}, column {e.colno})"
            except ValueError as e:
                reason = str(e)
            else:
                yield side(text, val_fraction), text, True, position
                continue
            if on_error == 'stop':
                fail(f"{file}:{number}: {reason}; mend it, or pass --on_error=skip")
            read_documents.skipped += 1


def text_of(line):
    """The text of one line of .jsonl; ValueError says what is wrong with it."""
    record = json.loads(line)
    if not isinstance(record, dict) or 'text' not in record:
        fields = f" among {', '.join(record)}" if isinstance(record, dict) else ""
        raise ValueError('no field "text"' + fields)
    text = record['text']
    if not isinstance(text, str):
        raise ValueError(f'"text" is not a text but {json.dumps(text)[:40]}')
    if not text.strip():
        raise ValueError('"text" is empty')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError('"text" holds half of a surrogate pair') from None
    return text


def pydoc(val_fraction):
    """Every module, class and function of this machine's standard library: its signature, then its docstring.

    Read from source with `ast`; nothing is imported. Held out by docstring, so that functions which share one
    stand on the same side.
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
                yield Piece(side(doc, val_fraction), f"{title}:\n{doc}\n", True, i / len(files))
    if not seen:
        fail(f"{root} holds no Python source to read docstrings from; give your own text with --input=FILE")


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


def read_meta(name):
    """meta.json of a prepared data set, or one line on how to prepare it."""
    path = os.path.join(data_folder(name), 'meta.json')
    if not os.path.isfile(path):
        fail(f"no prepared data in {data_folder(name)}: make it with `python prepare.py --input=FILE "
             f"--dataset={name}`, or use the built-in --dataset=pydoc")
    with open(path, encoding='utf-8') as f:
        meta = json.load(f)
    if meta.get('format') != FORMAT:
        fail(f"{path} is of format {meta.get('format')}, this code reads {FORMAT}: run prepare.py again")
    return meta


def read_split(name, split):
    """The arrays of 'train' or 'val', mapped into memory rather than read."""
    return Split(*(np.load(os.path.join(data_folder(name), f'{split}_{field}.npy'), mmap_mode='r')
                   for field in Split._fields))


def write_data(folder, tokenizer, pieces, source):
    """Tokenise the Pieces into a prepared folder, all or nothing. Returns its meta.json."""
    partial = folder.rstrip('/' + os.sep) + '.partial'
    shutil.rmtree(partial, ignore_errors=True)
    os.makedirs(partial)
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    kinds = dict(tokens=dtype, mask=np.uint8, offsets=np.int64)
    writers = {split: Split(**{field: ArrayWriter(os.path.join(partial, f'{split}_{field}.npy'), kind)
                               for field, kind in kinds.items()}) for split in ('train', 'val')}
    counts = {split: dict(documents=0, tokens=0, bytes=0) for split in writers}
    for w in writers.values():
        w.offsets.append([0])

    def flush(batch):
        for piece, ids in zip(batch, tokenizer.encode_batch([p.text for p in batch])):
            ids = ids + [tokenizer.eot] * piece.ends_document
            w, count = writers[piece.split], counts[piece.split]
            w.tokens.append(ids)
            w.mask.append(np.ones(len(ids)))
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
            shutil.rmtree(partial)
            fail(f"{source}: no document falls into {split!r}; give more text, or another --val_fraction")
    tokenizer.save(partial)
    meta = dict(format=FORMAT, task='pretrain', source=source, tokenizer=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size, **counts)
    with open(os.path.join(partial, 'meta.json'), 'w', encoding='utf-8') as f:
        json.dump(meta, f, ensure_ascii=False, indent=2)
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(partial, folder)
    return meta


if __name__ == '__main__':
    configure(globals(), val_fraction=[0, 1], on_error=('stop', 'skip'))
    folder = data_folder(dataset or os.path.splitext(os.path.basename(input.rstrip('/')))[0] or 'pydoc')
    name = os.path.basename(folder)
    if name not in BUILT_IN and not input:
        fail(f"--dataset={dataset} is not built in ({', '.join(BUILT_IN)} are): name its text with "
             f"--input=FILE")
    # chapter I-5 holds out a tenth of its short text, which is two rows
    val_fraction = val_fraction or (0.1 if name == 'verdict' else 0.05)
    if name in DOWNLOADS and not input:
        input = download(**DOWNLOADS[name])
    words = load_tokenizer(tokenizer)
    meta = write_data(folder, words, read_documents(input, val_fraction, on_error), input or 'pydoc')
    for split in ('train', 'val'):
        m = meta[split]
        print(f"{split:5} {m['documents']:9,} documents {m['tokens']:13,} tokens {m['bytes']:14,} bytes "
              f"{m['bytes'] / m['tokens']:5.2f} bytes/token")
    if read_documents.skipped:
        print(f"skipped {read_documents.skipped:,} malformed lines", file=sys.stderr)
    print(f"wrote {folder}")
