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
import gzip
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace
from typing import NamedTuple

from configurator import (HERE, at_least, between, configure, fail, make_folder, one_of, read_json,
                          refuse_model, replacing)

import tiktoken
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

out_dir = 'out/tokenizer'   # where tokenizer.json and tokenizer_config.json go
input = ''                  # a file or folder, as prepare.py takes it; '' is the built-in pydoc
kind = 'bpe'                # 'bpe', or for the lesson 'word' and 'char'
split_han = False           # bpe: no token spans two Chinese characters, so that lines can be counted in them
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

class Tokenizer:
    """Text <-> ids, over a `tokenizers` backend.

    Text never becomes a special token: "<|im_end|>" typed by a user is ten plain characters. Ids may have
    holes: vocab_size is the largest id plus one. What came with a model stays with it: words, the contents of
    its tokenizer_config.json with the chat template, and generation, those of its generation_config.json.

    eot               ends a document: <|endoftext|>, or where the vocabulary lacks that the eos_token
    bos               opens a text: the bos_token, or eot, which ended the text before
    im_start, im_end  of ChatML, or None
    ends              all ids that end an answer
    layout            of conversations: a ChatML, or None for Alpaca's; strange: the template is another one
    """

    def __init__(self, backend, source='gpt2', words=None, generation=None):
        self.backend, self.source = backend, source         # source: where load_tokenizer finds it again
        self.words, self.generation = dict(words or {}), dict(generation or {})
        # a call of transformers leaves them in the file it saves: every text is cut to a length, and padded
        backend.no_truncation()
        backend.no_padding()
        # as ordinary text the library takes only those that are marked as special
        plain = {token.content for token in backend.get_added_tokens_decoder().values() if not token.special}
        backend.add_special_tokens([special_token(name) for name in SPECIAL if name in plain])
        backend.encode_special_tokens = True        # the library's name for taking them as ordinary text
        keep_from_words(backend)
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1
        self.im_start, self.im_end = backend.token_to_id('<|im_start|>'), backend.token_to_id('<|im_end|>')
        eos = backend.token_to_id(self.special('eos_token'))
        ids = self.generation.get('eos_token_id')
        ids = [i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int
               and backend.id_to_token(i) is not None]
        self.eot = next((i for i in (backend.token_to_id('<|endoftext|>'), eos, *ids) if i is not None), None)
        self.bos = self.special_ids['bos_token']
        self.ends = {self.eot, self.im_end, eos, *ids} - {None}
        self.layout = None if None in (self.im_start, self.im_end) else ChatML()
        template = self.words.get('chat_template')
        found = find_layouts(self, template) if template else [self.layout]
        self.strange = not found
        if found:
            self.layout = found[0]
        if self.layout == ChatML(lead='', tools=False):     # what this project wrote before it had tools
            self.words, self.layout, self.bos = {}, ChatML(), self.eot

    def special(self, key):
        """The text of a special token that tokenizer_config.json names, or ''."""
        word = self.words.get(key)
        word = word.get('content') if isinstance(word, dict) else word
        return word if isinstance(word, str) else ''

    @property
    def special_ids(self):
        """{name in tokenizer_config.json: id} of the three that every client asks for."""
        own = dict(bos_token=self.eot, eos_token=self.eot if self.im_end is None else self.im_end,
                   pad_token=self.eot)
        named = {key: self.backend.token_to_id(self.special(key)) for key in own}
        return {key: i if named[key] is None else named[key] for key, i in own.items()}

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

    @property
    def template(self):
        """The chat template: that of the model's folder, else that of the layout in use."""
        return self.words.get('chat_template', own_template(self.layout))

    def take_own_layout(self, aloud=True):
        """From here on the chat template is that of the layout in use: the model is trained on it."""
        if self.strange:
            if aloud:
                print(f"the chat template of {self.source} is none that is known here: conversations take "
                      f"{'plain ChatML' if self.layout else 'the Alpaca layout'}", file=sys.stderr)
            self.words['chat_template'], self.strange = own_template(self.layout), False

    def save(self, folder):
        """Write tokenizer.json and tokenizer_config.json, which AutoTokenizer of transformers reads too, and
        the generation_config.json that came with the model."""
        make_folder(folder)
        special = {key: self.backend.id_to_token(i) for key, i in self.special_ids.items()}
        # no default of one version: transformers 4 would send token_type_ids, which no model here takes
        config = {**self.words, **special, 'chat_template': self.template,
                  'tokenizer_class': 'PreTrainedTokenizerFast',
                  'clean_up_tokenization_spaces': False, 'model_input_names': ['input_ids', 'attention_mask']}
        if isinstance(config.get('extra_special_tokens'), list):       # transformers 5's name for them
            config['additional_special_tokens'] = config.pop('extra_special_tokens')
        files = {'tokenizer.json': self.backend.to_str(pretty=True), 'tokenizer_config.json': config,
                 **({'generation_config.json': self.generation} if self.generation else {})}
        for name, content in files.items():
            with replacing(os.path.join(folder, name)) as new, open(new, 'w', encoding='utf-8') as f:
                f.write(content if isinstance(content, str) else
                        json.dumps(content, ensure_ascii=False, indent=2))


def read_words(folder):
    """(tokenizer_config.json, generation_config.json) of a folder as dicts: what goes with its model. Older
    folders keep the end tokens in config.json, newer ones the chat template in a file of its own."""
    words, generation, config = (read_json(path) if os.path.isfile(path) else {} for path in (
        os.path.join(folder, name) for name in (
            'tokenizer_config.json', 'generation_config.json', 'config.json')))
    if 'eos_token_id' in config and 'eos_token_id' not in generation:
        generation['eos_token_id'] = config['eos_token_id']
    path, template = os.path.join(folder, 'chat_template.jinja'), words.get('chat_template')
    if os.path.isfile(path):
        template = ''.join(text_parts(path))
    if isinstance(template, list):                          # several by name
        template = next((t.get('template') for t in template if isinstance(t, dict)
                         and t.get('name') == 'default'), None)
    words = {key: value for key, value in words.items() if key != 'chat_template'}
    words.update(dict(chat_template=template) if isinstance(template, str) else {})
    json.dumps([words, generation], ensure_ascii=False).encode()        # half of a surrogate pair: ValueError
    return words, generation


def load_tokenizer(source):
    """The tokenizer in a folder (tokenizer.json), or 'gpt2'. Ends the run with one line if there is none."""
    if source == 'gpt2':
        return gpt2_tokenizer()
    path = os.path.join(source, 'tokenizer.json')
    if not os.path.isfile(path):
        fail(f"no tokenizer {path}: train one with `python train_tokenizer.py`, or name another, as gpt2")
    try:
        words = read_words(source)
    except (OSError, ValueError) as e:
        fail(str(e) if str(source) in str(e) else f"{getattr(e, 'where', source)}: {e}")
    try:
        check_parts(read_json(path))
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_file(path), source, *words)
        check_letters(tokenizer)
    except BaseException as e:      # `tokenizers` raises bare Exception; a panic inside it is not even that
        if isinstance(e, (KeyboardInterrupt, SystemExit)):
            raise
        fail(f"{path} is not a tokenizer: {str(e)[:300]}")
    if tokenizer.eot is None:
        fail(f"{path} has no <|endoftext|>, and no tokenizer_config.json beside it names another eos_token: "
             f"what ends a document?")
    if dropout := getattr(tokenizer.backend.model, 'dropout', None):
        fail(f"{path} has dropout={dropout}, so the ids of a text would be others each time: set it to null")
    return tokenizer


def check_parts(state):
    """ValueError over what makes the library panic, or take all memory, in a tokenizer.json, as a dict."""
    model = state.get('model') if isinstance(state.get('model'), dict) else {}
    vocab = model.get('vocab') if isinstance(model.get('vocab'), dict) else {}
    if any(type(i) is int and i >= 1 << 24 for i in vocab.values()):
        raise ValueError(f"an id is above {1 << 24:,}")
    if len({str(i) for i in vocab.values()}) < len(vocab):
        raise ValueError("two tokens have the same id")
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


def keep_from_words(backend):
    """Part the first character of a special token from the rest, where the model would find the whole among
    its words: one that looks words up (WordLevel, WordPiece, BPE with ignore_merges), or Unigram."""
    words = []
    for i, token in backend.get_added_tokens_decoder().items():
        found = backend.encode(token.content, add_special_tokens=False)
        if token.special and (i, (0, len(token.content))) in zip(found.ids, found.offsets):
            words.append(f'{re.escape(token.content[0])}(?={re.escape(token.content[1:])})')
    if words:
        part = pre_tokenizers.Split(tokenizers.Regex('|'.join(words)), 'isolated')
        parts = [part, backend.pre_tokenizer] if backend.pre_tokenizer else [part]
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)


def special_token(name):
    return tokenizers.AddedToken(name, special=True, normalized=False)


def byte_level_bpe(vocab, merges, special):
    """A `tokenizers` backend that splits text as GPT-2 does, then merges bytes."""
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([special_token(name) for name in special])
    return backend


def unpacked(file):
    """The bytes of an open file as a stream; of a .gz those that are packed in it."""
    return gzip.open(file) if file.name.lower().endswith('.gz') else file


def text_parts(file, size=1 << 16):
    """Yield the text of a UTF-8 file in parts of about `size` bytes. UnicodeDecodeError says `where`.

    A part ends where white space follows a word. Tokenizers always split there, so the ids do not depend on
    the size.
    """
    decoder, text, line, raw = codecs.getincrementaldecoder('utf-8-sig')(), '', 1, b' '
    with open(file, 'rb') as f:
        stream = unpacked(f)
        while raw:
            raw = stream.read(size)
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

def train_bpe(texts, vocab_size, split_han=False):
    """Byte-level BPE from an iterator of texts: a `tokenizers` backend of up to vocab_size tokens. Each digit
    is one, as in SmolLM and Qwen: sums can be done digit by digit. With split_han each Chinese character is a
    word of its own, within which bytes are merged."""
    backend = byte_level_bpe({}, [], [])
    han = [pre_tokenizers.Split(tokenizers.Regex(r'\p{Han}'), 'isolated')] * split_han
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*han, digits, backend.pre_tokenizer])
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
    command = [sys.executable, os.path.join(HERE, 'prepare.py'), '--print_text',
               *[f'--input={source}'] * bool(source),
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
NO_THOUGHT = '<think>\n\n</think>\n\n'
TOOLS = ('''# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>''', '''
</tools>

For each function call, return a json object with function name and arguments within \
<tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>''')


class ChatML(NamedTuple):
    """The layout of Qwen, SmolLM and MiniMind, and what differs between them."""
    system: str = ''            # what the system says where a conversation leaves that open
    thinks: str = 'given'       # which answers have a <think> part: 'given', those with thoughts; 'always';
    #                             'last', those behind the last question, as older thoughts are forgotten
    lead: str = '<think>\n'     # how a prompt ends whose answer shall begin with thoughts
    tools: bool = True          # whether there is a place for tools
    trim: bool = True           # whether texts lose the white space at their ends


def encode_chat(tokenizer, messages, add_generation_prompt=False, thinking=False):
    """A conversation -> (ids, mask), two lists of the same length: in ChatML (chapter II-9) if the tokenizer
    has its special tokens, else in the Alpaca layout (chapter I-8).

    messages  [{'role': 'system' | 'user' | 'assistant' | 'tool', 'content': text}, ...]. A user's turn may
              have its material apart, as 'input'; an answer its thoughts, as 'reasoning_content', and
              'tool_calls', [{'name': text, 'arguments': a dict, or JSON as text}, ...]; the first message
              'tools', a list of what may be called, each a dict, or text that is taken as it is
    thinking  whether the answer that add_generation_prompt asks for begins with thoughts
    mask      1 on each token of the assistant's answers, and on the <|im_end|> or <|endoftext|> after them
    Raises ValueError where the layout has no place for something.
    """
    ids, mask, layout = [], [], tokenizer.layout
    if not (layout and layout.tools) and any(
            m['role'] == 'tool' or m.get('tools') or m.get('tool_calls') for m in messages):
        raise ValueError("tools, and the chat template of this tokenizer has no place for them")
    if not layout or layout.trim:
        messages = [{key: text.strip() if isinstance(text, str) else text for key, text in message.items()}
                    for message in messages]
    parts = (chatml if layout else alpaca)(tokenizer, messages, add_generation_prompt, thinking)
    for tokens, target in parts:
        ids.extend(tokens)
        mask.extend([target] * len(tokens))
    return ids, mask


def as_json(value):
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def chatml(tokenizer, messages, add_generation_prompt, thinking):
    """Yield (ids, target) part by part; each turn is `<|im_start|>role\\ncontent<|im_end|>\\n`. What a prompt
    ends with is tokenised apart, and no target: so an answer follows the same ids as in training."""
    layout, opening = tokenizer.layout, [tokenizer.im_start, *tokenizer.encode('assistant\n')]

    def turn(role, content):
        return [tokenizer.im_start, *tokenizer.encode(f'{role}\n{content}'), tokenizer.im_end]

    system = messages[0]['content'] if messages[0]['role'] == 'system' else None
    if tools := messages[0].get('tools'):
        listed = ''.join('\n' + as_json(tool) for tool in tools)
        system = ('' if system is None else f'{system}\n\n') + TOOLS[0] + listed + TOOLS[1]
    elif system is None:
        system = layout.system or None
    turns = [*([] if system is None else [dict(role='system', content=system)]),
             *messages[messages[0]['role'] == 'system':]]
    question = max((i for i, message in enumerate(turns) if message['role'] == 'user' and not re.fullmatch(
        '<tool_response>.*</tool_response>', message['content'], re.DOTALL)), default=len(turns))
    responses = []
    for i, message in enumerate(turns):
        role, content = message['role'], message['content']
        if role == 'assistant':
            lead, text = answer_text(message, layout, i > question, i == len(turns) - 1)
            yield opening + tokenizer.encode(lead), 0
            yield [*tokenizer.encode(text), tokenizer.im_end], 1
        elif role == 'tool':                                # responses one after another share a turn
            responses.append(f'<tool_response>\n{content}\n</tool_response>')
            if turns[i + 1:] and turns[i + 1]['role'] == 'tool':
                continue
            yield turn('user', '\n'.join(responses)), 0
            responses = []
        else:
            yield turn(role, content + ('\n\n' + message['input'] if message.get('input') else '')), 0
        yield tokenizer.encode('\n'), 0
    if add_generation_prompt:
        lead = layout.lead if thinking else '' if layout.thinks == 'given' else NO_THOUGHT
        yield opening + tokenizer.encode(lead), 0


def answer_text(message, layout, is_answer_to_last, is_last):
    """(what the prompt gives of an answer, the rest of its text): thoughts, content and calls of tools."""
    content, thought, calls = message['content'], message.get('reasoning_content', ''), ''
    if layout.thinks != 'given' and not thought and '</think>' in content:
        thought, *_, content = content.split('</think>')
        thought, content = thought.rpartition('<think>')[2], content.lstrip('\n')
    thought = thought.strip('\n')
    for call in message.get('tool_calls', ()):
        if isinstance(call, dict) and 'name' in call:
            call = '{"name": "' + call['name'] + '", "arguments": ' + as_json(call['arguments']) + '}'
        calls += '\n' * bool(content or calls) + f'<tool_call>\n{as_json(call)}\n</tool_call>'
    if layout.thinks == 'last' and not (is_answer_to_last and (thought or is_last)) or (
            layout.thinks == 'given' and not thought):
        return '', content + calls
    lead, content = layout.lead if thought else NO_THOUGHT, content.lstrip('\n')
    return lead, f'<think>\n{thought}\n</think>\n\n{content}{calls}'.removeprefix(lead)


def alpaca(tokenizer, messages, add_generation_prompt, thinking):
    """Yield (ids, target) part by part. A system message replaces the sentence that opens the layout; a later
    turn follows the <|endoftext|> of the answer before it. Padding is <|endoftext|> too, but the first one
    after an answer is a target: so the model learns to stop."""
    opening = tokenizer.encode('\n\n### Response:\n')
    preface = ALPACA_PREFACE + '\n\n'
    for message in messages:
        role, content = message['role'], message['content']
        if role == 'system':
            preface = content and content + '\n\n'
        elif role == 'user':
            material = f"\n\n### Input:\n{message['input']}" if message.get('input') else ''
            yield tokenizer.encode(f'{preface}### Instruction:\n{content}{material}'), 0
            preface = ''
        else:
            if thought := message.get('reasoning_content'):
                content = f'{thought}\n</think>\n\n{content}'
            yield opening + tokenizer.encode('<think>\n' * bool(thought)), 0
            yield [*tokenizer.encode(content), tokenizer.eot], 1
    if add_generation_prompt:
        yield opening + tokenizer.encode('<think>\n' * thinking), 0


def encode_pair(tokenizer, messages, rejected):
    """Two answers to one prompt -> [(ids, mask), (ids, mask)] of chosen and rejected (chapter II-10).

    messages  a conversation that ends in the chosen answer; rejected, a message, stands for it in the second
    Only the last answer is target: turns before it are the same in both.
    """
    pair = []
    for answer in (messages[-1], rejected):
        ids, mask = encode_chat(tokenizer, [*messages[:-1], answer])
        end = len(mask) - mask[::-1].index(1)
        begin = end - mask[:end][::-1].index(0)
        pair.append((ids[:end], [0] * begin + [1] * (end - begin)))
    return pair


# ---- the same as templates, for `transformers` and servers ----

def own_template(layout):
    """The chat template of the layouts that are the project's own: plain ChatML, or Alpaca's."""
    name = 'chatml.jinja' if layout else 'alpaca.jinja'
    with open(os.path.join(HERE, 'data', name), encoding='utf-8') as f:
        return f.read().strip()


def find_layouts(tokenizer, template):
    """The layouts that render as a chat template does: ChatMLs, or None for Alpaca's; [] if there is none.
    Compared is what both make of the same conversations, so it does not matter how it is written."""
    for layout in (tokenizer.layout, None):
        if template == own_template(layout):
            return [layout]
    from jinja2.sandbox import ImmutableSandboxedEnvironment             # torch brings jinja2
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=['jinja2.ext.loopcontrols'])
    environment.filters['tojson'] = lambda value: json.dumps(value, ensure_ascii=False)
    # a template is a program: without these it can take neither all time nor all memory
    environment.globals = dict(namespace=environment.globals['namespace'])
    environment.intercepted_binops, environment.call_binop = {'*', '**'}, None
    special = {key: tokenizer.special(key) for key in tokenizer.words if key.endswith('_token')}
    try:
        template = environment.from_string(template)
    except Exception:                                       # damaged
        return []

    def theirs(messages, prompt, thinking=None):
        how = {} if thinking is None else dict(enable_thinking=thinking, open_thinking=thinking)
        try:
            return template.render(messages=messages, tools=messages[0].get('tools'),
                                   add_generation_prompt=prompt, **special, **how)
        except Exception:                                   # it may refuse a role
            return None

    def ours(layout, messages, prompt, thinking=None):
        letters = SimpleNamespace(encode=lambda text: [text], layout=layout, im_start='<|im_start|>',
                                  im_end='<|im_end|>', eot=tokenizer.backend.id_to_token(tokenizer.eot or 0))
        return ''.join(encode_chat(letters, messages, prompt, bool(thinking))[0])

    # with white space at the ends, which a template may trim
    system, *turns = (dict(role=role, content=f' {role} {i}\n') for i, role in enumerate(
        ('system', 'user', 'assistant', 'user', 'assistant', 'user')))
    plain = [(turns[:2], False), ([system, *turns[:2]], False), (turns, True), ([system, *turns], True)]
    thought = [turns[0], dict(turns[1], reasoning_content='r')]
    # a template that passes over thoughts gives them no place, so ours is free
    recalled = [] if theirs(thought, False) == theirs(*plain[0]) else [
        (thought, False), ([*thought, turns[2]], True)]
    call, tools = dict(turns[1], tool_calls=[dict(name='f', arguments=dict(x=1))] * 2), [dict(name='f')]
    using = [([dict(first, tools=tools), *rest, call, *[dict(role='tool', content='t')] * 2], True)
             for first, *rest in ([system, turns[0]], [turns[0]])]

    def fits(layout):
        cases, off = plain, None
        if layout:
            cases, off = plain + recalled + using * layout.tools, None if layout.thinks == 'given' else False
        return all(theirs(*case, off) == ours(layout, *case, off) for case in cases) and (
            not layout or theirs(turns, True, True) == ours(layout, turns, True, True))

    default = re.match(r'<\|im_start\|>system\n(.*?)<\|im_end\|>', theirs(turns[:1], True) or '', re.DOTALL)
    layouts = [ChatML(default[1] if default else '', *options) for options in itertools.product(
        ('given', 'always', 'last'), ('<think>\n', ''), (True, False), (True, False))]
    return [layout for layout in [*layouts * bool(tokenizer.layout), None] if fits(layout)]


def print_mask(tokenizer, ids, mask):
    """The mask table: each token of a document, and whether it is a target of the loss."""
    print("position      id  target  token")
    for i, (token, target) in enumerate(zip(ids, mask)):
        print(f"{i:8}  {token:6}  {'yes' if target else '-':6}  {tokenizer.decode([token])!r}")


# ---- the same for llama.cpp ----

QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
               r"\s*[\r\n]+|\s+(?!\S)|\s+")


def gguf_words(tokenizer, vocab_size):
    """What a GGUF file says of a tokenizer, {key: value}. ValueError if llama.cpp would make other ids."""
    def said(splitter):         # in a tokenizer.json, less what changes no ids
        return re.sub(rb'"trim_offsets":\w+', b'', splitter.__getstate__()) if splitter else b''

    gpt2, bare = (pre_tokenizers.ByteLevel(False, use_regex=use) for use in (True, False))
    qwen2, llama3 = (pre_tokenizers.Split(tokenizers.Regex(regex), 'isolated') for regex in (
        QWEN2_SPLIT, QWEN2_SPLIT.replace(r'|\p{N}|', r'|\p{N}{1,3}|')))
    known = {'gpt-2': gpt2, 'smollm': pre_tokenizers.Sequence([pre_tokenizers.Digits(True), gpt2]),
             'qwen2': pre_tokenizers.Sequence([qwen2, bare]),
             'llama-bpe': pre_tokenizers.Sequence([llama3, bare])}
    backend, state = tokenizer.backend, json.loads(tokenizer.backend.to_str())
    split = next((name for name, how in known.items() if said(how) == said(backend.pre_tokenizer)), None)
    bpe, normalizer, added = state['model'], state['normalizer'], backend.get_added_tokens_decoder()
    if (not split or not bpe.get('merges') or bpe['end_of_word_suffix'] or len(tokenizer.ends) > 3
            or bpe['ignore_merges'] != (split == 'llama-bpe') or normalizer not in (None, {'type': 'NFC'})
            or any(token.lstrip or token.rstrip for token in added.values() if not token.special)):
        raise ValueError("llama.cpp would make other ids than this tokenizer: it takes byte-level BPE that "
                         "splits text as GPT-2, SmolLM, Qwen2 or Llama 3 do, with up to three end tokens")
    if normalizer:
        print("llama.cpp does not compose accents (NFC), as this tokenizer does", file=sys.stderr)
    tokens, types = [f'[PAD{i}]' for i in range(vocab_size)], [5] * vocab_size     # 5: an id without a token
    for token, i in backend.get_vocab().items():
        tokens[i], types[i] = token, 1
    for i, token in added.items():              # 3: text never becomes it; 4: it does wherever it stands
        types[i] = 3 if token.special else 4
    bos, eos, pad = tokenizer.special_ids.values()
    ids = dict(zip(('bos', 'padding', 'eos', 'eot', 'eom'), (bos, pad, eos, *sorted(tokenizer.ends - {eos}))))
    words = dict(model='gpt2', pre=split, tokens=tokens, token_type=types, add_bos_token=False,
                 merges=[*map(' '.join, bpe['merges'])], **{f'{name}_token_id': i for name, i in ids.items()})
    return {'tokenizer.chat_template': tokenizer.template,
            **{f'tokenizer.ggml.{key}': value for key, value in words.items()}}


if __name__ == '__main__':
    configure(globals(), {'kind=bpe': 'split_han'}, kind=one_of('bpe', 'word', 'char'),
              vocab_size=at_least(3), max_bytes=at_least(1), val_fraction=between(0, 1),
              on_error=one_of('stop', 'skip'), trace=at_least(0))
    if trace:
        words = (word for text in training_texts(input, 10_000_000, []) for word in text.split())
        print_trace(Counter(words) if input else CHAPTER_CORPUS, trace)
        sys.exit()
    if kind == 'bpe' and vocab_size < len(SPECIAL) + 256:
        fail(f"--vocab_size={vocab_size}: byte-level BPE needs {len(SPECIAL)} special tokens and 256 bytes")
    refuse_model(out_dir, 'out_dir', tokenizer=False)   # whose own tokenizer this would overwrite
    held_out = []
    texts = training_texts(input, max_bytes, held_out)
    backend = (train_bpe(texts, vocab_size, split_han) if kind == 'bpe' else
               train_lookup(texts, vocab_size, kind))
    Tokenizer(backend).save(out_dir)
    report(load_tokenizer(out_dir), held_out)
    print(f"wrote {os.path.join(out_dir, 'tokenizer.json')}")
