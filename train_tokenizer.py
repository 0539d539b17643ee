"""
Train a tokenizer: byte-pair encoding over bytes, as GPT-2 and MiniMind use (tutorial chapters II-1 and I-1).

    python train_tokenizer.py                        # on pydoc -> out/tokenizer
    python train_tokenizer.py --input=corpus.jsonl --vocab_size=6400
    python train_tokenizer.py --trace=5              # watch byte-pair encoding merge, pair by pair
    python train_tokenizer.py --kind=word --input=the-verdict.txt --out_dir=out/words

Byte-pair encoding (Sennrich et al. 2016) starts from single bytes and merges the most frequent neighbours
into one new token, again and again, until the vocabulary is full. Every byte is in it, so no text is unknown.
"""
import os
from collections import Counter

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from configurator import configure, fail
from prepare import Progress, Tokenizer, byte_level_bpe, load_tokenizer, read_documents

out_dir = 'out/tokenizer'   # where tokenizer.json and tokenizer_config.json go
input = ''                  # a .txt or .jsonl file, or a folder of them; '' is the built-in pydoc
kind = 'bpe'                # 'bpe', or for the lesson 'word' and 'char'
vocab_size = 6400           # number of tokens, special ones included
max_bytes = 200_000_000     # stop reading after this much training text
val_fraction = 0.05         # share of the text that is held out, as in prepare.py
trace = 0                   # print the first N merges of byte-pair encoding on a small corpus, and stop

SPECIAL = ['<|endoftext|>', '<|im_start|>', '<|im_end|>']       # ids 0, 1, 2
CHAPTER_CORPUS = {'old': 7, 'older': 3, 'finest': 9, 'lowest': 4}           # chapter I-1: word, how often
# chapter I-1's rule: white space separates words and vanishes, punctuation stands alone
PUNCTUATION = r'[,.:;?_!"()\']|--'


def train_bpe(texts, vocab_size):
    """Byte-level BPE from an iterator of texts; a `tokenizers` backend of at most vocab_size tokens."""
    backend = byte_level_bpe({}, [], [])
    # the alphabet is all 256 bytes, whatever the corpus holds
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(texts, trainer)
    return backend


def train_lookup(texts, vocab_size, kind):
    """A vocabulary that is a mere list of the words or characters seen, sorted, then <|endoftext|> and
    <|unk|>, as chapter I-1 builds it by hand. Whatever is not in the list becomes <|unk|>."""
    splitter = (pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated') if kind == 'char' else
                pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(r'\s+'), 'removed'),
                                         pre_tokenizers.Split(tokenizers.Regex(PUNCTUATION), 'isolated')]))
    counts = Counter(unit for text in texts for unit, _ in splitter.pre_tokenize_str(text))
    for special in ('<|endoftext|>', '<|unk|>'):
        counts.pop(special, None)
    units = sorted(unit for unit, _ in counts.most_common(vocab_size - 2))
    vocab = {unit: i for i, unit in enumerate([*units, '<|endoftext|>', '<|unk|>'])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token='<|unk|>'))
    backend.pre_tokenizer = splitter
    # words are joined by a space, except before punctuation
    spaced = [decoders.Replace(tokenizers.Regex(r'^(?![,.:;?!"()\'])'), ' '), decoders.Fuse(),
              decoders.Strip(' ', 1, 0)]
    backend.decoder = decoders.Fuse() if kind == 'char' else decoders.Sequence(spaced)
    backend.add_special_tokens([tokenizers.AddedToken(s, special=True, normalized=False)
                                for s in ('<|endoftext|>', '<|unk|>')])
    return backend


def bpe_merges(word_counts, n):
    """The algorithm in the open, over {word: how often}: the first n merges, each as (pair, its count, and
    {token: how often} after the merge).

    A word is its letters and a mark for its end, </w>, so that "est" inside and "est" at the end differ.
    Each turn counts all neighbouring pairs and merges the most frequent one; of equals, the first met.
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


def training_texts(source, val_fraction, max_bytes, held_out):
    """Yield training text up to max_bytes; the first megabyte of held-out text goes into held_out, a list."""
    size, kept, progress = 0, 0, Progress('reading')
    for piece in read_documents(source, val_fraction):
        if piece.split == 'val':
            if kept < 1 << 20:
                held_out.append(piece.text)
                kept += len(piece.text)
            continue
        size += len(piece.text.encode())
        if size > max_bytes:
            print(f"stopped reading at max_bytes = {max_bytes:,}")
            return
        progress.show(piece.progress, f"{size / 1e6:.0f} MB")
        yield piece.text


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


if __name__ == '__main__':
    configure(globals(), kind=('bpe', 'word', 'char'), vocab_size=3, max_bytes=1, val_fraction=[0, 1],
              trace=0)
    if trace:
        words = Counter()
        for text in training_texts(input, val_fraction, 10_000_000, []) if input else ():
            words.update(text.split())
        merges = bpe_merges(words if input else CHAPTER_CORPUS, trace)
        if not merges:
            fail(f"{input} holds no word")
        print("merge  count  pair")
        for i, (pair, count, _) in enumerate(merges, 1):
            print(f"{i:5}  {count:5}  {pair[0]} + {pair[1]} -> {''.join(pair)}")
        print("\ncount  token, after the last merge")
        for token, count in merges[-1][2].most_common():
            print(f"{count:5}  {token}")
        raise SystemExit
    if kind == 'bpe' and vocab_size < len(SPECIAL) + 256:
        fail(f"--vocab_size={vocab_size}: byte-level BPE needs {len(SPECIAL)} special tokens and 256 bytes")
    held_out = []
    texts = training_texts(input, val_fraction, max_bytes, held_out)
    backend = train_bpe(texts, vocab_size) if kind == 'bpe' else train_lookup(texts, vocab_size, kind)
    Tokenizer(backend).save(out_dir)
    report(load_tokenizer(out_dir), held_out)
    print(f"wrote {os.path.join(out_dir, 'tokenizer.json')}")
