"""
Tokenizers: train one by byte-pair encoding over bytes, as GPT-2 and MiniMind use (tutorial chapters II-1 and
I-1), load one, encode and decode with it, and lay out a conversation with its mask (II-9, I-8).

    python train_tokenizer.py                        # on pydoc -> out/tokenizer
    python train_tokenizer.py --input=corpus.jsonl --vocab_size=6400
    python train_tokenizer.py --trace=5              # watch byte-pair encoding merge, pair by pair
    python train_tokenizer.py --kind=word --input=the-verdict.txt --out_dir=out/words

Byte-pair encoding (Sennrich et al. 2016) starts from single bytes and merges the most frequent neighbours
into one new token, again and again, until the vocabulary is full. Every byte is in it, so no text is unknown.
The training text comes from prepare.py, run as a process, because it knows every format.
"""
import codecs
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter

import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from configurator import (HERE, at_least, between, configure, fail, make_folder, one_of, read_json,
                          refuse_model, replacing)

out_dir = 'out/tokenizer'   # where tokenizer.json and tokenizer_config.json go
input = ''                  # a file or folder, as prepare.py takes it; '' is the built-in pydoc
kind = 'bpe'                # 'bpe', or for the lesson 'word' and 'char'
vocab_size = 6400           # number of tokens, special ones included
max_bytes = 200_000_000     # stop reading after this much training text
val_fraction = 0.0          # share of the text that is held out; 0 takes the data set's own, as in prepare.py
on_error = 'stop'           # at a malformed record: 'stop', or 'skip' and count
trace = 0                   # print the first N merges of byte-pair encoding on a small corpus, and stop

SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']       # ids 0, 1, 2
CHAPTER_CORPUS = {'old': 7, 'older': 3, 'finest': 9, 'lowest': 4}           # chapter I-1: word, how often
# chapter I-1's rule: white space separates words and vanishes, punctuation stands alone
PUNCTUATION = r'[,.:;?_!"()\']|--'


# ---- text <-> ids ----

# ChatML, as `transformers` reads it from tokenizer_config.json; encode_chat below is the same in Python.
CHAT_TEMPLATE = ("{% for message in messages %}"
                 "<|im_start|>{{ message['role'] }}\n{{ message['content'] | trim }}<|im_end|>\n"
                 "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


class Tokenizer:
    """Text <-> ids, over a `tokenizers` backend.

    Text never becomes a special token: "<|im_end|>" typed by a user is ten plain characters. The special ids
    are attributes: eot (<|endoftext|>), im_start and im_end, None where the vocabulary lacks them. Ids may
    have holes: vocab_size is the largest id plus one.
    """

    def __init__(self, backend, source='gpt2'):
        self.backend, self.source = backend, source         # source: where load_tokenizer finds it again
        # a call of transformers leaves them in the file it saves: every text is cut to a length, and padded
        backend.no_truncation()
        backend.no_padding()
        # as ordinary text the library takes only those that are marked as special
        plain = {token.content for token in backend.get_added_tokens_decoder().values() if not token.special}
        backend.add_special_tokens([special_token(name) for name in SPECIAL if name in plain])
        backend.encode_special_tokens = True        # the library's name for taking them as ordinary text
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1
        self.eot = backend.token_to_id('<|endoftext|>')
        self.im_start, self.im_end = backend.token_to_id('<|im_start|>'), backend.token_to_id('<|im_end|>')

    @property
    def fingerprint(self):
        """16 hex digits that differ between any two tokenizers of different ids: of all that makes them."""
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
        config = dict(tokenizer_class='PreTrainedTokenizerFast', clean_up_tokenization_spaces=False,
                      eos_token='<|endoftext|>', pad_token='<|endoftext|>')
        if self.im_end is not None:
            config.update(bos_token='<|im_start|>', eos_token='<|im_end|>', chat_template=CHAT_TEMPLATE)
        for name, text in (('tokenizer.json', self.backend.to_str(pretty=True)),
                           ('tokenizer_config.json', json.dumps(config, ensure_ascii=False, indent=2))):
            with replacing(os.path.join(folder, name)) as new, open(new, 'w', encoding='utf-8') as f:
                f.write(text)


def load_tokenizer(source):
    """The tokenizer in a folder (tokenizer.json), or 'gpt2'. Ends the run with one line if there is none."""
    if source == 'gpt2':
        return gpt2_tokenizer()
    path = os.path.join(source, 'tokenizer.json')
    if not os.path.isfile(path):
        fail(f"no tokenizer {path}: train one with `python train_tokenizer.py`, or use --tokenizer=gpt2")
    try:
        check_parts(read_json(path))
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(path), source)
        check_letters(tokenizer)
    except BaseException as e:      # `tokenizers` raises bare Exception; a panic inside it is not even that
        if isinstance(e, (KeyboardInterrupt, SystemExit)):
            raise
        fail(f"{path} is not a tokenizer: {str(e)[:300]}")
    if tokenizer.eot is None:
        fail(f"{path} has no <|endoftext|>, which ends documents here")
    if dropout := getattr(tokenizer.backend.model, 'dropout', None):
        fail(f"{path} has dropout={dropout}, so the ids of a text would be others each time: set it to null")
    return tokenizer


def check_parts(state):
    """ValueError over what makes the library panic, or take all memory, in a tokenizer.json, as a dict."""
    model = state.get('model') if isinstance(state.get('model'), dict) else {}
    vocab = model.get('vocab') if isinstance(model.get('vocab'), dict) else {}
    if any(type(i) is int and i >= 1 << 24 for i in vocab.values()):
        raise ValueError(f"an id is above {1 << 24:,}")
    if model.get('continuing_subword_prefix') and model.get('type', 'BPE') == 'BPE':
        raise ValueError("BPE with a continuing_subword_prefix is not supported")
    parts = json.dumps([state.get('normalizer'), state.get('pre_tokenizer')])
    if found := re.search('"type": "(Precompiled|FixedLength)"', parts):
        raise ValueError(f"{found[1]} is not supported")


def check_letters(tokenizer):
    """ValueError where letters do not come back, and no <|unk|> stands for them. Case and white space may be
    lost, if the file says so."""
    text = 'a quick fox ' + ''.join(map(chr, range(33, 127))) + ' éЖ灯👍'
    back = tokenizer.decode(tokenizer.encode(text))
    unknown = getattr(tokenizer.backend.model, 'unk_token', None)
    if not unknown and ''.join(back.lower().split()) != ''.join(text.lower().split()):
        raise ValueError(f"letters get lost: {text!r} comes back as {back!r}")


def gpt2_tokenizer():
    """GPT-2's tokenizer from tiktoken, which has only the rank of each token. The two parts that a token was
    merged from are what remains when its bytes are merged by lower ranks only."""
    try:
        ranks = tiktoken.get_encoding('gpt2')._mergeable_ranks
    except OSError as e:                            # requests' errors are OSErrors
        fail(f"tiktoken cannot download its gpt2 files ({type(e).__name__}): run once with a network, or set "
             f"TIKTOKEN_CACHE_DIR to a folder that has them")
    # byte-level BPE writes each byte as a printable character: itself, or the next one from U+0100 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in printable}
    letters.update({b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(printable)))})
    vocab = {''.join(letters[b] for b in token): rank for token, rank in ranks.items()}
    merges = []
    for token in sorted(vocab, key=vocab.get)[256:]:
        parts = list(token)
        while len(parts) > 2:
            i = min(range(len(parts) - 1), key=lambda i: vocab.get(parts[i] + parts[i + 1], len(vocab)))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        merges.append(tuple(parts))
    return Tokenizer(byte_level_bpe(vocab, merges, ['<|endoftext|>']))


def special_token(name):
    return tokenizers.AddedToken(name, special=True, normalized=False)


def byte_level_bpe(vocab, merges, special):
    """A `tokenizers` backend that splits text as GPT-2 does, then merges bytes."""
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([special_token(name) for name in special])
    return backend


def text_parts(file, size=1 << 16):
    """Yield the text of a UTF-8 file in parts of about `size` bytes. UnicodeDecodeError says `where`.

    A part ends where white space follows a word. Tokenizers always split there, so the ids do not depend on
    the size.
    """
    decoder, text, line, raw = codecs.getincrementaldecoder('utf-8-sig')(), '', 1, b' '
    with open(file, 'rb') as f:
        while raw:
            raw = f.read(size)
            try:
                text += decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as e:
                e.where = f"{file}:{line + e.object[:e.start].count(10)}"
                raise
            line += raw.count(10)
            words = text.rsplit(None, 1)
            cut = len(words[0]) if len(words) == 2 else 0
            if not cut and len(text) > 16 * size:       # a megabyte of one word; a special token stays whole
                cut = max(text.rfind('<', len(text) - 64), 0) or len(text)
            if cut:
                yield text[:cut]
                text = text[cut:]
    yield text


# ---- training ----

def train_bpe(texts, vocab_size):
    """Byte-level BPE from an iterator of texts; a `tokenizers` backend of at most vocab_size tokens."""
    backend = byte_level_bpe({}, [], [])
    # the alphabet is all 256 bytes, whatever the corpus holds
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(texts, trainer)
    return backend


def train_lookup(texts, vocab_size, kind):
    """A vocabulary that only lists the words or characters seen, sorted, then <|endoftext|> and <|unk|>, as
    chapter I-1 builds it by hand. Whatever is not in the list becomes <|unk|>."""
    splitter = (pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated') if kind == 'char' else
                pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(r'\s+'), 'removed'),
                                         pre_tokenizers.Split(tokenizers.Regex(PUNCTUATION), 'isolated')]))
    special = ['<|endoftext|>', '<|unk|>']
    counts = Counter(unit for text in texts for unit, _ in splitter.pre_tokenize_str(text)
                     if unit not in special)
    units = sorted(unit for unit, _ in counts.most_common(vocab_size - len(special)))
    vocab = {unit: i for i, unit in enumerate([*units, *special])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token='<|unk|>'))
    backend.pre_tokenizer = splitter
    # words are joined by a space, except before punctuation
    spaced = [decoders.Replace(tokenizers.Regex(r'^(?![,.:;?!"()\'])'), ' '), decoders.Fuse(),
              decoders.Strip(' ', 1, 0)]
    backend.decoder = decoders.Fuse() if kind == 'char' else decoders.Sequence(spaced)
    backend.add_special_tokens([special_token(name) for name in special])
    return backend


def bpe_merges(word_counts, n):
    """The algorithm written out, over {word: count}: the first n merges, each as (pair, its count,
    {token: count} after the merge).

    A word is its letters and a mark for its end, </w>, so that "est" inside and "est" at the end differ.
    Each turn counts all neighbouring pairs and merges the most frequent one; of equals, the first seen.
    """
    words, merges = [([*word, '</w>'], count) for word, count in word_counts.items()], []
    for _ in range(n):
        pairs = Counter()
        for parts, count in words:
            for pair in zip(parts, parts[1:]):
                pairs[pair] += count
        if not pairs:
            break
        best = max(pairs, key=pairs.get)
        tokens = Counter()
        for parts, count in words:
            i = 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i:i + 2] = [''.join(best)]
                i += 1
            for part in parts:
                tokens[part] += count
        merges.append((best, pairs[best], tokens))
    return merges


def print_trace(word_counts, n):
    """Print the first n merges, and the tokens after the last one."""
    merges = bpe_merges(word_counts, n)
    print("merge  count  pair")
    for i, (pair, count, _) in enumerate(merges, 1):
        print(f"{i:5}  {count:5}  {pair[0]} + {pair[1]} -> {''.join(pair)}")
    print("\ncount  token, after the last merge")
    for token, count in merges[-1][2].most_common():
        print(f"{count:5}  {token}")


def training_texts(source, max_bytes, held_out):
    """Yield training text up to max_bytes; the first megabyte of held-out text goes into held_out, a list.
    Ends the run where no word is among it, as nothing would be learned; if prepare.py fails, it has said why:
    this run ends with the same exit code."""
    command = [sys.executable, os.path.join(HERE, 'prepare.py'), '--print_text', f'--input={source}',
               f'--val_fraction={val_fraction}', f'--on_error={on_error}']
    size, kept, words = 0, 0, False
    with subprocess.Popen(command, stdout=subprocess.PIPE) as reader:
        for line in reader.stdout:
            piece = json.loads(line)
            if piece['split'] != 'train':
                if kept < 1 << 20:
                    held_out.append(piece['text'])
                    kept += len(piece['text'])
                continue
            text = piece['text'].encode()[:max_bytes - size].decode(errors='ignore')
            size += len(text.encode())
            parts = re.split('|'.join(map(re.escape, SPECIAL)), text)      # they are no letters to merge
            words = words or any(part.strip() for part in parts)
            yield from parts
            if text != piece['text']:
                print(f"stopped reading at max_bytes = {max_bytes:,}")
                break                                   # closes the pipe, which ends prepare.py
        else:
            if reader.wait():
                sys.exit(reader.returncode)
    if not words:
        fail(f"{source or 'pydoc'} holds no word to train on, with --max_bytes={max_bytes} and "
             f"--val_fraction={val_fraction}")


def report(tokenizer, held_out):
    """Print how well the tokenizer compresses held-out text, and which kinds of text survive a round trip."""
    size, tokens = sum(len(t.encode()) for t in held_out), sum(map(len, tokenizer.encode_batch(held_out)))
    print(f"vocabulary    {tokenizer.vocab_size:,} tokens")
    print(f"compression   {size / max(1, tokens):.2f} bytes per token on {size:,} bytes of held-out text")
    kinds = {'Chinese': '大模型炼丹术：从零开始，训练一个语言模型。',
             'emoji': '🚀👩\u200d👩\u200d👧\u200d👦🇨🇳 👍🏽',
             'code': 'def f(x):\n\treturn  {"a": x**2}  # <|endoftext|>\r\n',
             'control': ''.join(map(chr, range(32))) + '\x7f\x85\u200b\ufeff',
             'held out': ''.join(held_out[:9])}
    for name, text in kinds.items():
        ids = tokenizer.encode(text)
        print(f"round trip    {name:9} {'exact' if tokenizer.decode(ids) == text else 'LOSSY':6} "
              f"{len(text.encode()):6,} bytes {len(ids):6,} tokens")


# ---- a conversation -> ids and mask ----

ALPACA_PREFACE = ("Below is an instruction that describes a task. "
                  "Write a response that appropriately completes the request.")


def encode_chat(tokenizer, messages, add_generation_prompt=False):
    """A conversation -> (ids, mask), two lists of the same length: in ChatML (chapter II-9) if the tokenizer
    has its special tokens, else in the Alpaca layout (chapter I-8).

    messages  [{'role': 'system' | 'user' | 'assistant', 'content': text}, ...]; content is stripped. A user's
              turn may have its material apart, as 'input'.
    mask      1 on each token of the assistant's answers, and on the <|im_end|> or <|endoftext|> after them
    """
    ids, mask = [], []
    layout = alpaca if tokenizer.im_start is None else chatml
    for tokens, target in layout(tokenizer, messages, add_generation_prompt):
        ids.extend(tokens)
        mask.extend([target] * len(tokens))
    return ids, mask


def chatml(tokenizer, messages, add_generation_prompt):
    """Yield (ids, target) part by part; each turn is `<|im_start|>role\\ncontent<|im_end|>\\n`."""
    opening = [tokenizer.im_start, *tokenizer.encode('assistant\n')]    # generation starts after it, too
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
    """Yield (ids, target) part by part. A system message replaces the sentence that opens the layout; a later
    turn follows the <|endoftext|> of the answer before it. Padding is <|endoftext|> too, but the first one
    after an answer is a target: so the model learns to stop."""
    opening = tokenizer.encode('\n\n### Response:\n')
    preface = ALPACA_PREFACE + '\n\n'
    for message in messages:
        role, content = message['role'], message['content'].strip()
        if role == 'system':
            preface = content + '\n\n'
        elif role == 'user':
            material = message.get('input', '').strip()
            material = f'\n\n### Input:\n{material}' if material else ''
            yield tokenizer.encode(f'{preface}### Instruction:\n{content}{material}'), 0
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


if __name__ == '__main__':
    configure(globals(), kind=one_of('bpe', 'word', 'char'), vocab_size=at_least(3), max_bytes=at_least(1),
              val_fraction=between(0, 1), on_error=one_of('stop', 'skip'), trace=at_least(0))
    if trace:
        words = (word for text in training_texts(input, 10_000_000, []) for word in text.split())
        print_trace(Counter(words) if input else CHAPTER_CORPUS, trace)
        sys.exit()
    if kind == 'bpe' and vocab_size < len(SPECIAL) + 256:
        fail(f"--vocab_size={vocab_size}: byte-level BPE needs {len(SPECIAL)} special tokens and 256 bytes")
    refuse_model(out_dir, 'out_dir')                    # whose own tokenizer this would overwrite
    held_out = []
    texts = training_texts(input, max_bytes, held_out)
    backend = train_bpe(texts, vocab_size) if kind == 'bpe' else train_lookup(texts, vocab_size, kind)
    Tokenizer(backend).save(out_dir)
    report(load_tokenizer(out_dir), held_out)
    print(f"wrote {os.path.join(out_dir, 'tokenizer.json')}")
