"""
The tutorial's worked examples, computed by the code of this project: read a function beside its chapter.

    python tests/test_chapters.py I-3           # prints the examples of a chapter: its figures, by our code
    python tests/test_chapters.py               # of all twenty chapters
    python -m pytest tests/test_chapters.py -k test_I_3

The tutorial is github.com/hans0809/llm-in-depth: part I 大模型炼丹术, part II MiniMind 源码解读. A function
prints what its chapter prints, and fails where a figure is another. Where the chapter errs, its first line
says so, and what is right.
"""
import functools
import json
import math
import os
import sys
import textwrap
from collections import Counter
from pathlib import Path
from unittest import SkipTest

import numpy as np
import tiktoken
import tokenizers
import torch
from torch import nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get('TUTORIAL_FILES', ROOT.parent / 'shared'))
sys.path.insert(0, str(ROOT))

import finetune_cls  # noqa: E402  (the line above makes it importable)
import model_minimind  # noqa: E402
import prepare  # noqa: E402
from configurator import fail, last_words  # noqa: E402
from distill import distillation_loss, parse_answer, tag_weights  # noqa: E402
from dpo import dpo_loss  # noqa: E402
from lora import adapter_state, inject, load_adapter_state  # noqa: E402
from model_gpt2 import (GPT2, Attention, Block, FeedForward, GPT2Config, plain_loss, plain_attention,  # noqa: E402
                        plain_gelu, plain_layer_norm)
from model_minimind import (MiniMind, MiniMindConfig, RMSNorm, apply_rope, rope_table,  # noqa: E402
                            sinusoidal_positions)
from pretrain import batch_at, window_starts  # noqa: E402
from sample import choose, distribution, generate  # noqa: E402
from sft import Rows  # noqa: E402
from train_tokenizer import (ALPACA_PREFACE, CHAPTER_CORPUS, Tokenizer, bpe_merges, encode_chat,  # noqa: E402
                             load_tokenizer, print_mask, train_bpe, train_lookup)


def check(label, value, expected=True, digits=4):
    """Print a value, and hold it to what is expected: exactly, or floats to so many digits."""
    text = f'{value:.6g}' if isinstance(value, float) else str(value)
    print(f"  {label}:" + ('\n' + textwrap.indent(text, '      ') if '\n' in text else f' {text}'))
    if torch.is_tensor(value) and value.is_floating_point() or isinstance(value, float):
        torch.testing.assert_close(torch.as_tensor(value).double(), torch.as_tensor(expected).double(),
                                   atol=0.51 * 10 ** -digits, rtol=0)
    else:
        value = value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value
        assert value == expected, f"{label} is {value}, expected {expected}"


def tutorial_file(name, dataset):
    """The text of a file of the tutorial: where prepare.py downloads it to, or in TUTORIAL_FILES/data."""
    for path in (ROOT / 'data' / prepare.BUILT_IN[dataset][1], SHARED / 'data' / name):
        if path.exists():
            return path.read_text(encoding='utf-8')
    raise SkipTest(f"{name} is not here: python data/download.py {dataset}")


@functools.cache
def story():
    return tutorial_file('the-verdict.txt', 'verdict')


@functools.cache
def gpt2():
    """GPT-2's tokenizer. For a reader it is downloaded, once; a test takes what is on disk."""
    if (SHARED / 'tiktoken').exists():
        os.environ.setdefault('TIKTOKEN_CACHE_DIR', str(SHARED / 'tiktoken'))
    try:
        if 'TIKTOKEN_CACHE_DIR' not in os.environ and __name__ != '__main__':
            raise OSError
        tiktoken.get_encoding('gpt2')
    except OSError:
        raise SkipTest("GPT-2's tokenizer is not here: set TIKTOKEN_CACHE_DIR to a folder, and run "
                       "`python tests/test_chapters.py I-1` once with a network") from None
    return load_tokenizer('gpt2')


@functools.cache
def small_tokenizer():
    """A byte-level BPE tokenizer with the tokens of ChatML."""
    return Tokenizer(train_bpe(['the keeper of the light reads the rules of the light aloud\n'] * 5, 290))


def as_split(ids, lengths=()):
    """Token ids as prepared data, all of them targets; lengths: of its documents."""
    return prepare.Split(np.array(ids), np.ones(len(ids), np.uint8), np.cumsum([0, *lengths]))


def n_parameters(module):
    return sum(p.numel() for p in module.parameters())


def shapes(*tensors):
    return [tuple(tensor.shape) for tensor in tensors]


def same(a, b):
    return torch.allclose(a, b, atol=1e-5)


def chapters_gpt2(**changes):
    """The chapters' GPT-2: PyTorch's initialisation, no biases on query, key and value, a head of its own."""
    return GPT2(GPT2Config(initializer_range=0, qkv_bias=False, tie_word_embeddings=False, **changes)).eval()


def tiny_minimind(**changes):
    return MiniMind(MiniMindConfig(**{**dict(vocab_size=64, num_hidden_layers=2), **changes})).eval()


def marked(tokenizer, ids, mask):
    """The text of the tokens that are targets."""
    return tokenizer.decode([i for i, target in zip(ids, mask) if target])


# ---- I-1 tokenizer and data ----

def word_tokenizer():
    return Tokenizer(train_lookup([story()], vocab_size=10_000, kind='word'))


def test_I_1_words():
    """The story as words: punctuation stands alone. (51 entries are printed, 50 are announced)."""
    check('characters', len(story()), 20479)
    start = ('I HAD always thought Jack Gisburn rather a cheap genius--though a good fellow enough--so it '
             'was no ')
    check('the first 99', story()[:99], start)
    tokenizer = word_tokenizer()
    words = [word for word, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(story())]
    check('the first 30', ' '.join(words[:30]),
          start.replace('--', ' -- ') + 'great surprise to me to hear that , in')
    check('words', len(words), 4690)
    check('different ones, with special ones', [len(set(words)), tokenizer.vocab_size], [1130, 1132])
    check('0 to 50', ' '.join(tokenizer.backend.id_to_token(i) for i in range(51)),
          "! \" ' ( ) , -- . : ; ? A Ah Among And Are Arrt As At Be Begin Burlington But By Carlo Chicago "
          "Claude Come Croft Destroyed Devonshire Don Dubarry Emperors Florence For Gallery Gideon Gisburn "
          "Gisburns Grafton Greek Grindle Grindles HAD Had Hang Has He Her Hermia")


def test_I_1_words_to_ids_and_back():
    """A word that is not in the list has no id, or is <|unk|>. White space comes back changed."""
    tokenizer = word_tokenizer()
    said = '"It\'s the last he painted, you know,"\nMrs. Gisburn said with pardonable pride.'
    ids = tokenizer.encode(said)
    check('ids', ids, [1, 56, 2, 850, 988, 602, 533, 746, 5, 1126, 596, 5, 1, 67, 7, 38, 851, 1108, 754, 793,
                       7])
    check('back', tokenizer.decode(ids), said.replace('\n', ' ').replace('"It\'s', '" It\' s'))
    check("'Hello' is in the list", 'Hello' in tokenizer.backend.get_vocab(), False)
    ids = tokenizer.encode('Hello, do you like tea?')
    check('with <|unk|>', [ids, tokenizer.decode(ids)],
          [[1131, 5, 355, 1126, 628, 975, 10], '<|unk|>, do you like tea?'])


def test_I_1_byte_pair_encoding():
    """Merges on four words. What counts is the pair, not in how many words it is: the sixth is f + i."""
    rest = dict(o=14, l=14, d=10, r=3, f=9, i=9, n=9, w=4)
    tables = [{**rest, 'e': 3, 't': 13, '</w>': 23, 'es': 13}, {**rest, 'e': 3, '</w>': 23, 'est': 13},
              {**rest, 'e': 3, '</w>': 10, 'est</w>': 13},
              {**rest, 'e': 3, '</w>': 10, 'est</w>': 13, 'o': 4, 'l': 4, 'ol': 10},
              {**rest, 'e': 3, '</w>': 10, 'est</w>': 13, 'o': 4, 'l': 4, 'old': 10}]
    del tables[4]['d']
    merges = bpe_merges(CHAPTER_CORPUS, 6)
    for (pair, count, tokens), table in zip(merges, tables):
        check(f"{' + '.join(pair)}, {count} times", dict(tokens), table)
    check('counts', [count for _, count, _ in merges], [13, 13, 13, 10, 10, 9])
    check('the sixth', merges[5][0], ('f', 'i'))


def test_I_1_gpt2_ids():
    """GPT-2's ids: every byte comes back, no space got lost in 'terracesof'. BPE knows no grammar."""
    before, after = 'Hello, do you like tea? ', ' In the sunlit terracesof someunknownPlace.'
    ids = [*gpt2().encode(before), gpt2().eot, *gpt2().encode(after)]
    check('ids', ids, [15496, 11, 466, 345, 588, 8887, 30, 220, 50256, 554, 262, 4252, 18250, 8812, 2114,
                       1659, 617, 34680, 27271, 13])
    check('back', gpt2().decode(ids), f'{before}<|endoftext|>{after}')
    check('typed by a user, <|endoftext|> is text', gpt2().eot not in gpt2().encode('<|endoftext|>'))
    for word, parts in ((' terracesof', [' terr', 'aces', 'of']), ('unhappiness', ['un', 'h', 'appiness']),
                        (' boys', [' boys']), (' sketch', [' sketch'])):
        check(f'{word!r}', [gpt2().decode([i]) for i in gpt2().encode(word)], parts)


def test_I_1_next_token_prediction():
    """A row of four tokens holds four predictions."""
    ids = gpt2().encode(story())
    check('tokens', len(ids), 5145)
    x, y = batch_at(as_split(ids), [0], block_size=4)
    check('x, y', [x.tolist(), y.tolist()], [[[40, 367, 2885, 1464]], [[367, 2885, 1464, 1807]]])
    for i, pair in enumerate((('I', 'H'), ('I H', 'AD'), ('I HAD', 'always'), ('I HAD always', 'thought'))):
        said, follows = gpt2().decode(x[0, :i + 1]), gpt2().decode(y[0, i:i + 1])
        check(f'{ids[:i + 1]} ----> {ids[i + 1]}', f'{said} ----> {follows}'.replace('  ', ' '),
              ' ----> '.join(pair))


def test_I_1_batches():
    """Windows over the story. With the loader's defaults, rows of 4 at stride 128, 164 tokens are read."""
    text = as_split(gpt2().encode(story()))
    by_1, by_4, by_128 = (np.sort(window_starts(5145, 4, seed=0, epoch=0, stride=n)) for n in (1, 4, 128))
    check('windows at stride 1', len(by_1), 5141)
    x, y = batch_at(text, by_4[:8], 4)
    check('stride 4, inputs', x, [[40, 367, 2885, 1464], [1807, 3619, 402, 271], [10899, 2138, 257, 7026],
                                  [15632, 438, 2016, 257], [922, 5891, 1576, 438], [568, 340, 373, 645],
                                  [1049, 5975, 284, 502], [284, 3285, 326, 11]])
    check('targets are one ahead', torch.equal(y[:, :-1], x[:, 1:]))
    check('    and end in', y[:, -1], [1807, 10899, 15632, 922, 568, 1049, 284, 287])
    check('tokens read at stride 128', 4 * len(by_128), 164)


# ---- I-2 embeddings and positions ----

def test_I_2_lookup():
    """An embedding is a table; its rows are looked up by id."""
    torch.manual_seed(123)
    table = chapters_gpt2(vocab_size=6, n_embd=3, n_head=1, n_layer=1).transformer.wte
    check('table', table.weight.detach(), [
        [0.3374, -0.1778, -0.1690], [0.9178, 1.5810, 1.3010], [1.2753, -0.2010, -0.1606],
        [-0.4015, 0.9666, -1.1481], [-1.1589, 0.3255, -0.6315], [-2.8400, -0.7849, -1.4096]])
    ids = [2, 3, 5, 1]
    check('rows 2, 3, 5, 1', table(torch.tensor(ids)).detach(), table.weight.detach()[ids])


def test_I_2_embedding_is_a_linear_layer_on_one_hot():
    """Three rows, by lookup and by multiplication."""
    table = GPT2(GPT2Config(vocab_size=10, n_embd=4, n_head=1, n_layer=1)).transformer.wte
    linear, ids = nn.Linear(10, 4, bias=False), torch.tensor([1, 3, 5])
    one_hot = torch.eye(10)[ids]
    linear.weight.data = table.weight.T                     # (out, in): the table lies on its side
    check('one-hot, vectors', shapes(one_hot, linear(one_hot)), [(3, 10), (3, 4)])
    check('the same', torch.equal(linear(one_hot), table(ids)))


@torch.no_grad()
def test_I_2_order_is_lost_without_positions():
    """'the cat on the sofa', 'the sofa on the cat': attention to all sees no order, causal layers do."""
    cat, sofa, x = torch.tensor([[0, 1, 2, 0, 3]]), torch.tensor([[0, 3, 2, 0, 1]]), torch.randn(4, 8)
    on = [plain_attention(x[ids], x[ids], x[ids], torch.tensor(True))[0, 2] for ids in (cat, sofa)]
    check("attention to all gives the same for 'on'", same(*on))
    model = GPT2(GPT2Config(vocab_size=4, n_positions=8, n_embd=16, n_head=2, n_layer=2, initializer_range=1))
    nn.init.zeros_(model.transformer.wpe.weight)
    ends = [model(ids)[0][0, -1] for ids in (torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1, 0, 2, 3]]))]
    check('a causal model without positions', same(*ends), False)


def test_I_2_positions():
    """Positions that are computed, and a table that learns: GPT's is learned, not sines and cosines."""
    learned = GPT2(GPT2Config(vocab_size=8, n_positions=100, n_embd=512, n_layer=1, n_head=8)).transformer.wpe
    computed = MiniMind(MiniMindConfig(vocab_size=8, max_position_embeddings=100, num_hidden_layers=1,
                                       positions='sinusoidal')).table
    check('learned, of 10 tokens', shapes(learned(torch.arange(10))), [(10, 512)])
    check('computed, of 10 tokens', shapes(computed[:10]), [(10, 512)])
    check('which learns', [learned.weight.requires_grad, computed.requires_grad], [True, False])
    with torch.device('meta'):
        table = GPT2(GPT2Config()).transformer.wpe.weight
    check("in OpenAI's weights", [*shapes(table), table.requires_grad], [(1024, 768), True])


# ---- I-3 attention ----

JOURNEY = torch.tensor([[0.43, 0.15, 0.89], [0.55, 0.87, 0.66], [0.57, 0.85, 0.64], [0.22, 0.58, 0.33],
                        [0.77, 0.25, 0.10], [0.05, 0.80, 0.55]])       # Your journey starts with one step
CAUSAL = torch.ones(6, 6, dtype=torch.bool).tril()


def unscaled(x):
    """Attention as the first example has it, without the division: queries are multiplied before."""
    return plain_attention(x * math.sqrt(x.size(-1)), x, x, torch.tensor(True))


def test_I_3_attention_scores():
    """'Your journey starts with one step'. By dot product, unlike cosine, four fit another word best."""
    scores, cosine = JOURNEY @ JOURNEY.T, F.normalize(JOURNEY) @ F.normalize(JOURNEY).T
    check("of 'journey'", scores[1], [0.9544, 1.4950, 1.4754, 0.8434, 0.7070, 1.0865])
    check('all', scores, [
        [0.9995, 0.9544, 0.9422, 0.4753, 0.4576, 0.6310], [0.9544, 1.4950, 1.4754, 0.8434, 0.7070, 1.0865],
        [0.9422, 1.4754, 1.4570, 0.8296, 0.7154, 1.0605], [0.4753, 0.8434, 0.8296, 0.4937, 0.3474, 0.6565],
        [0.4576, 0.7070, 0.7154, 0.3474, 0.6654, 0.2935], [0.6310, 1.0865, 1.0605, 0.6565, 0.2935, 0.9450]])
    check('what fits each best', scores.argmax(dim=1), [0, 1, 1, 1, 2, 1])
    check('by cosine', cosine.argmax(dim=1), [0, 1, 2, 3, 4, 5])


def test_I_3_attention_weights():
    """Softmax makes each row a distribution over the six words."""
    weights = (JOURNEY @ JOURNEY.T).softmax(dim=-1)
    check('weights', weights, [
        [0.2098, 0.2006, 0.1981, 0.1242, 0.1220, 0.1452], [0.1385, 0.2379, 0.2333, 0.1240, 0.1082, 0.1581],
        [0.1390, 0.2369, 0.2326, 0.1242, 0.1108, 0.1565], [0.1435, 0.2074, 0.2046, 0.1462, 0.1263, 0.1720],
        [0.1526, 0.1958, 0.1975, 0.1367, 0.1879, 0.1295], [0.1385, 0.2184, 0.2128, 0.1420, 0.0988, 0.1896]])
    check('sums', weights.sum(dim=1), [1.0] * 6)
    check('contexts', unscaled(JOURNEY), [
        [0.4421, 0.5931, 0.5790], [0.4419, 0.6515, 0.5683], [0.4431, 0.6496, 0.5671],
        [0.4304, 0.6298, 0.5510], [0.4671, 0.5910, 0.5266], [0.4177, 0.6503, 0.5645]])


def test_I_3_the_seventh_vector():
    """Weights of seven vectors are printed. The last is the context of 'journey', of an earlier cell."""
    seven = torch.cat([JOURNEY, torch.tensor([[0.4419, 0.6515, 0.5683]])])      # the context of 'journey'
    check('weights', (seven @ seven.T).softmax(dim=-1), [
        [0.1792, 0.1713, 0.1692, 0.1061, 0.1042, 0.1240, 0.1459],
        [0.1180, 0.2026, 0.1986, 0.1056, 0.0921, 0.1346, 0.1486],
        [0.1184, 0.2017, 0.1981, 0.1058, 0.0943, 0.1332, 0.1485],
        [0.1223, 0.1768, 0.1744, 0.1246, 0.1077, 0.1467, 0.1476],
        [0.1305, 0.1675, 0.1689, 0.1169, 0.1607, 0.1108, 0.1446],
        [0.1180, 0.1861, 0.1813, 0.1211, 0.0842, 0.1615, 0.1478],
        [0.1277, 0.1889, 0.1860, 0.1121, 0.1011, 0.1359, 0.1483]])
    check('contexts', unscaled(seven), [
        [0.4420, 0.6016, 0.5774], [0.4419, 0.6515, 0.5683], [0.4429, 0.6499, 0.5673],
        [0.4321, 0.6330, 0.5536], [0.4635, 0.5997, 0.5326], [0.4213, 0.6505, 0.5651],
        [0.4397, 0.6372, 0.5635]])


def test_I_3_one_head():
    """Queries, keys and values of a width of their own. Scaled are the scores, not the weights."""
    q, k, v = (JOURNEY @ w for w in torch.rand(3, 3, 2))
    contexts = plain_attention(q, k, v, torch.tensor(True))
    check('scores, contexts', shapes(q @ k.T, contexts), [(6, 6), (6, 2)])
    check('softmax(q k^T / sqrt(d)) v', same(contexts, (q @ k.T / 2 ** 0.5).softmax(dim=-1) @ v))
    batch = torch.stack([JOURNEY, JOURNEY])
    q, k, v = (batch @ w for w in torch.rand(3, 3, 1024))
    contexts = plain_attention(q, k, v, CAUSAL)
    check('batch, causal contexts', shapes(batch, contexts), [(2, 6, 3), (2, 6, 1024)])
    check('the first token sees itself alone', same(contexts[:, 0], v[:, 0]))


def test_I_3_why_the_root_of_d():
    """Without the division the variance of the scores is d, and softmax saturates."""
    for d, variance in ((4, 4), (64, 64), (1024, 1036)):
        torch.manual_seed(0)
        q, k = torch.randn(2, 10_000, d)
        scores = (q * k).sum(-1)
        check(f'd = {d}: variance', scores.var().item(), variance, digits=0)
        check('    divided', (scores / d ** 0.5).var().item(), 1.0, digits=1)
    scores = torch.tensor([1.0, -0.5, 0.3, 0.8])
    for factor, weight, slope in ((1, 0.3939, 0.2388), (32, 0.9983, 0.0017)):      # 32 is sqrt(1024)
        weights = (factor * scores).softmax(dim=-1)
        check(f'scores x {factor}: largest weight', weights.max().item(), weight)
        check('    steepest d weight / d score', (weights * (1 - weights)).max().item(), slope)


def test_I_3_causal_mask():
    """The mask, the scores, the weights: -inf stands in the scores, and the weights are 0 there."""
    future = ~CAUSAL[:4, :4]                                # True where the models' `allowed` is False
    check('mask', future.float(), [[0., 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
    scores = torch.tensor([[0.35, 9, 9, 9], [-0.75, 1.21, 9, 9], [0.88, -1.02, 0.54, 9],
                           [-0.23, 0.67, -0.44, 0.91]]).masked_fill(future, -math.inf)
    check('scores that are -inf', scores == -math.inf, future.tolist())
    check('weights', scores.softmax(dim=-1), [
        [1, 0, 0, 0], [0.1235, 0.8765, 0, 0], [0.5372, 0.0804, 0.3824, 0], [0.1352, 0.3325, 0.1096, 0.4227]])


def test_I_3_multi_head():
    """Four heads of 8, side by side 32: no more parameters than one head (II-5 says they multiply)."""
    one, attention = (Attention(GPT2Config(n_embd=32, n_head=n)) for n in (1, 4))
    x = torch.rand(2, 5, 32)
    check('in, out', shapes(x, attention(x)), [(2, 5, 32), (2, 5, 32)])
    q, k, v = attention.c_attn(x).split(32, dim=-1)
    heads = [plain_attention(*(t[..., i:i + 8] for t in (q, k, v)), CAUSAL[:5, :5])
             for i in range(0, 32, 8)]
    check('heads', shapes(*heads), [(2, 5, 8)] * 4)
    check('one by one, then c_proj', same(attention.c_proj(torch.cat(heads, -1)), attention(x)))
    check('parameters of 1 head, of 4', [n_parameters(one), n_parameters(attention)], [4224, 4224])


# ---- I-4 GPT-2 ----

def test_I_4_layer_norm():
    """Each token by itself: mean 0, variance 1."""
    x = torch.arange(1., 25.).view(2, 3, 4)
    check('means', x[0].mean(dim=-1), [2.5, 6.5, 10.5])
    check('variances', x[0].var(dim=-1, correction=0), [1.25] * 3)
    y = plain_layer_norm(x, torch.ones(4), torch.zeros(4))
    check('normalised', y[0], [[-1.34, -0.45, 0.45, 1.34]] * 3, digits=2)
    check('one mean for each token', shapes(y, y.mean(dim=-1, keepdim=True)), [(2, 3, 4), (2, 3, 1)])
    check("PyTorch's is the same", same(nn.LayerNorm(4)(x), y))


def test_I_4_gelu_and_feed_forward():
    """GELU, and its approximation by tanh; each token becomes four times wider, and narrow again."""
    x = torch.linspace(-6, 6, 1201)
    check('GELU of -1, 0, 1', plain_gelu(torch.tensor([-1., 0, 1])), [-0.1588, 0, 0.8412])
    check('erf less tanh, at most', (F.gelu(x) - plain_gelu(x)).abs().max().item(), 0.0005)
    block, x = FeedForward(GPT2Config()), torch.rand(2, 3, 768)
    check('in, inside, out', shapes(x, block.c_fc(x), block(x)), [(2, 3, 768), (2, 3, 3072), (2, 3, 768)])


def test_I_4_gradients_with_and_without_shortcuts():
    """Gradients of five layers. Without shortcuts the first is 0.0002 (the text: 0.00002)."""
    gradients = {False: [0.00020173587, 0.00012011159, 0.00071520399, 0.00139887363, 0.00504964543],
                 True: [0.22169792, 0.20694106, 0.32896995, 0.26657322, 1.32585406]}
    for shortcut in (False, True):
        torch.manual_seed(123)
        layers, x = [nn.Linear(3, out) for out in (3, 3, 3, 3, 1)], torch.tensor([[1., 0., -1.]])
        for layer in layers:
            y = plain_gelu(layer(x))
            x = x + y if shortcut and x.shape == y.shape else y
        x.square().mean().backward()
        for i, layer in enumerate(layers):
            check(f"{'with' if shortcut else 'without'} shortcuts, layer {i}",
                  layer.weight.grad.abs().mean().item(), gradients[shortcut][i], digits=6)


def test_I_4_block_and_parameters():
    """What is called 124M has 163M parameters: its head is not the embedding, as it is in GPT-2."""
    x, block = torch.rand(2, 4, 768), Block(GPT2Config(qkv_bias=False))
    check('in, out of a block', shapes(x, block(x)), [(2, 4, 768)] * 2)
    with torch.device('meta'):
        tied, chapters = GPT2(GPT2Config()), chapters_gpt2()
    check("OpenAI's GPT-2, the chapter's", [f'{n_parameters(model):,}' for model in (tied, chapters)],
          ['124,439,808', '163,009,536'])
    check('of it the head', f'{n_parameters(chapters.lm_head):,}', '38,597,376')


@torch.no_grad()
def test_I_4_text_of_the_untrained_model():
    """Random weights of seed 123, greedy decoding: the chapter's own words."""
    torch.manual_seed(123)
    model = chapters_gpt2()
    batch = torch.tensor([gpt2().encode(text) for text in ('Every effort moves you', 'Every day holds a')])
    check('batch', batch, [[6109, 3626, 6100, 345], [6109, 1110, 6622, 257]])
    check('logits', shapes(model(batch)[0]), [(2, 4, 50257)])
    ids = gpt2().encode('Hello, I am')
    ids += [token.item() for token in generate(model, torch.tensor([ids]), max_new_tokens=6, temperature=0)]
    check('output', ids, [15496, 11, 314, 716, 27018, 24086, 47843, 30961, 42348, 7267])
    check('text', gpt2().decode(ids), 'Hello, I am Featureiman Byeswickattribute argue')


# ---- I-5 pretraining ----

def verdict_splits():
    cut = int(0.9 * len(story()))
    return [as_split(gpt2().encode(part)) for part in (story()[:cut], story()[cut:])]


def test_I_5_data():
    """Rows of 256 tokens, two in a batch: 10 batches of 20 rows (called 10 samples)."""
    train, val = verdict_splits()
    check('tokens', [len(gpt2().encode(story())), len(train.tokens), len(val.tokens)], [5145, 4612, 534])
    rows, val_rows = (window_starts(len(part.tokens), 256, 0, epoch=0, stride=256) for part in (train, val))
    check('rows', [len(rows), len(val_rows)], [18, 2])
    check('batches of two', [len(rows) // 2, len(val_rows) // 2], [9, 1])
    check('x, y', shapes(*batch_at(train, rows[:2], 256)), [(2, 256), (2, 256)])
    again = window_starts(len(train.tokens), 256, seed=0, epoch=1, stride=256)
    check('another order in the next epoch', rows.tolist() != again.tolist())
    check('tokens of ten epochs', 10 * len(rows) * 256, 46080)


@torch.no_grad()
def test_I_5_loss_before_training():
    """It is ln 50,257, and 1/6 more, as PyTorch's initial head gives logits of variance 1/3."""
    torch.manual_seed(123)
    model = chapters_gpt2(n_positions=256)
    check('ln 50257', math.log(50257), 10.82, digits=2)
    for name, part, chapters in zip(('training', 'held-out'), verdict_splits(), (10.989, 10.965)):
        check(f'{name}, a row', model(*batch_at(part, [0], 256))[1].item(), chapters, digits=1)
    check('ln 50257 + 1/6', math.log(50257) + 1 / 6, 10.99, digits=2)


def test_I_5_learned_by_heart():
    """What the trained model says, 'mostly grammatical', stands in the story word by word."""
    said = ('insensible to the irony. She wanted him vindicated--and by me!"\n\nHe laughed again, and threw '
            'back his head to look up at the sketch of the donkey. "There were days when I')
    check('in the story', said in story())
    check('tokens', len(gpt2().encode(said)), 43)


# ---- I-6 decoding ----

WORDS = 'closer every effort forward inches moves pizza toward you'.split()
LOGITS = torch.tensor([[4.51, 0.89, -1.90, 6.75, 1.63, -1.62, -1.89, 6.28, 1.79]])


def likely(**how):
    """{word: probability} of the words that can be drawn, the likeliest first."""
    p = distribution(LOGITS, **how)[0]
    return {WORDS[i]: round(p[i].item(), 4) for i in p.argsort(descending=True) if p[i] > 0}


def test_I_6_greedy_and_drawing():
    """The largest; or probabilities laid end to end, where 0.35 falls on index 1."""
    check('greedy', WORDS[choose(LOGITS, temperature=0)], 'forward')
    p = torch.tensor([0.1, 0.3, 0.4, 0.2])
    check('cumulated', p.cumsum(0), [0.1, 0.4, 0.8, 1.0])
    check('0.35 is', torch.searchsorted(p.cumsum(0), 0.35).item(), 1)
    check('shares of 200,000 draws', choose(p.log().expand(200_000, 4)).bincount() / 200_000, p, digits=2)


def test_I_6_temperature():
    """The same logits at three temperatures."""
    for t, p in ((1, [0.0609, 0.0016, 0.0001, 0.5721, 0.0034, 0.0001, 0.0001, 0.3576, 0.0040]),
                 (0.1, [0, 0, 0, 0.9910, 0, 0, 0, 0.0090, 0]),
                 (5, [0.1546, 0.0750, 0.0429, 0.2421, 0.0869, 0.0454, 0.0430, 0.2203, 0.0898])):
        check(f'temperature {t}', distribution(LOGITS, temperature=t)[0], p)
    check('likeliest at 5', [*likely(temperature=5)][:3], ['forward', 'toward', 'closer'])


def test_I_6_top_k():
    """Three words remain; of 9 words 10 are all; a batch is no problem. (The listings fail at both)."""
    check('top_k = 3', likely(top_k=3), dict(forward=0.5775, toward=0.3610, closer=0.0615))
    check('top_k = 10 of 9', len(likely(top_k=10)), 9)
    check('in a batch', (distribution(torch.cat([LOGITS, LOGITS.flip(1)]), top_k=1) > 0).sum(dim=1), [1, 1])


def test_I_6_top_p():
    """The likeliest words that reach 0.9, with the one that crosses it, which the chapter drops."""
    ordered = LOGITS.softmax(dim=-1).sort(descending=True).values.cumsum(dim=-1)
    check('cumulated', ordered[0, :3], [0.5721, 0.9297, 0.9906])
    check('top_p = 0.9', likely(top_p=0.9), dict(forward=0.6154, toward=0.3846))
    check("left by the chapter's mask", (ordered <= 0.9).sum().item(), 1)


def test_I_6_all_together():
    """Temperature first, then the filters: the order matters. 0 is greedy (there it is read as 1)."""
    check('temperature 5, then top_p 0.9', len(likely(temperature=5, top_p=0.9)), 7)
    check('top_p 0.9 of what was there', len(likely(top_p=0.9)), 2)
    check('with top_k', likely(temperature=5, top_k=2, top_p=0.9), dict(forward=0.5235, toward=0.4765))
    check('temperature 0', {WORDS[choose(LOGITS, temperature=0, top_p=0.9)] for _ in range(20)}, {'forward'})


# ---- I-7 spam ----

def test_I_7_balancing():
    """As many of one label as of the other, 70 / 10 / 20; no text twice (the chapter has repeated ones)."""
    check('of 2 x 747 texts', [int(1494 * 0.7), int(1494 * 0.1), 1494 - int(1494 * 0.7) - int(1494 * 0.1)],
          [1045, 149, 300])
    pieces = prepare.read_labelled(str(ROOT / 'data' / 'spam.csv'))
    counts = Counter((piece.split, piece.label) for piece in pieces)
    check('of the set that ships', counts, {(split, label): n for label in ('ham', 'spam') for split, n in (
        ('train', 263), ('val', 38), ('test', 75))})
    check('different texts', len({' '.join(piece.content.lower().split()) for piece in pieces}), len(pieces))


def tiny_classifier():
    sizes = dict(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
    return finetune_cls.add_head(GPT2(GPT2Config(**sizes)), n_labels=2).eval()


def test_I_7_what_learns():
    """The new head, the last block, the last norm. The chapter freezes the head it has just made."""
    model = tiny_classifier()
    block, norm, head = model.transformer.h[-1], model.transformer.ln_f, model.lm_head
    finetune_cls.freeze(model, 'last')
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    check('of two labels', shapes(head.weight), [(2, 32)])
    check('these three learn', learning, sum(map(n_parameters, (block, norm, head))))
    model.requires_grad_(False)                             # the chapter's order: the head is there already
    for module in (block, norm):
        module.requires_grad_(True)
    check("the head, in the chapter's order", head.weight.requires_grad, False)


@torch.no_grad()
def test_I_7_where_the_label_is_read():
    """At the last real token. The chapter reads the last of 120, mostly padding."""
    model = tiny_classifier()
    rows = [torch.tensor([[5, 9, 2, 7] + [49] * padding]) for padding in (0, 10, 20)]
    here = torch.cat([finetune_cls.label_logits(model, x, torch.tensor([4])) for x in rows])
    there = torch.cat([model(x)[0][:, -1] for x in rows])
    check('at token 4, with 0, 10, 20 of padding', here, here[:1].expand(3, 2))
    check("at the row's end, too", [same(a, b) for a, b in zip(there, here)], [True, False, False])


# ---- I-8 instruction tuning ----

def instructions():
    return json.loads(tutorial_file('instruction-data.json', 'instruction'))


def test_I_8_data():
    """1,100 instructions in three parts. (The entry that is shown is number 50, not 5)."""
    data = instructions()
    train, test = int(0.85 * len(data)), int(0.1 * len(data))
    check('entries, parts', [len(data), train, test, len(data) - train - test], [1100, 935, 110, 55])
    check('entry 50', data[50], dict(instruction='Identify the correct spelling of the following word.',
                                     input='Ocassion', output="The correct spelling is 'Occasion.'"))
    check('answers 935 and 937', [data[935]['output'], data[937]['output']],
          ['The car is as fast as lightning.', 'Jane Austen.'])


def test_I_8_prompt_layout():
    """The Alpaca layout, with material and without; ids in pieces are those of the whole."""
    for material in ('', 'The car is very fast.'):
        record = dict(instruction='Rewrite it using a simile.', input=material, output='Fast as light.')
        ids, _ = encode_chat(gpt2(), prepare.messages_of(record))
        text = (f"{ALPACA_PREFACE}\n\n### Instruction:\n{record['instruction']}"
                + (f'\n\n### Input:\n{material}' if material else '') + '\n\n### Response:\nFast as light.')
        check('text', gpt2().decode(ids), text + '<|endoftext|>')
        check('in pieces as in one', ids == [*gpt2().encode(text), gpt2().eot])


def test_I_8_collate():
    """Two rows, their targets and padding: three columns, where the chapter works it out with four."""
    documents = [[1, 2, 3, 50256], [4, 5, 50256]]
    rows = Rows(as_split(sum(documents, []), map(len, documents)), [0, 1], block_size=8, layout='bucketed')
    x, y, _ = rows.batch([[0], [1]])
    check('inputs', x, [[1, 2, 3], [4, 5, 0]])              # what pads them is never looked at
    check('targets', y, [[2, 3, 50256], [5, 50256, -100]])


def test_I_8_the_loss_is_on_answers():
    """Targets are answers, 23% of the tokens; the chapter's loss counts the prompts, too."""
    documents = [encode_chat(gpt2(), prepare.messages_of(record)) for record in instructions()]
    print_mask(gpt2(), *(part[-14:] for part in documents[0]))
    lengths = [len(ids) - 1 for ids, _ in documents]
    targets = sum(sum(mask[1:]) for _, mask in documents)
    check('answer tokens, all', [targets, sum(lengths)], [14439, 62025])
    check('share', targets / sum(lengths), 0.233, digits=3)
    check('shortest and longest row', [min(lengths), max(lengths)], [40, 91])


# ---- II-1 training a tokenizer ----

TALK = [dict(role='system', content='守灯人每年春天都要大声朗读规则才能继续守在灯塔'),
        dict(role='user', content='谁守着灯塔？'), dict(role='assistant', content='老守灯人。')]


def test_II_1_an_exhausted_generator():
    """259 tokens, 133 ids: list(texts) had read the generator to its end, so training saw no text."""
    used = (text for text in ['the light of the keeper'] * 100)
    list(used)                                              # as the chapter does, to look at one text
    nothing = Tokenizer(train_bpe(used, 6400))
    check('tokens: 256 bytes, 3 special', nothing.vocab_size, 259)
    ids, _ = encode_chat(nothing, TALK)
    check('characters of three turns', [len(turn['content']) for turn in TALK], [23, 6, 5])
    check('ids', len(ids), 133)
    check('6 special, 3 a character, roles', 6 + 3 * (23 + 6 + 5) + len('system  user  assistant  '), 133)
    check('back', nothing.decode(ids).count(TALK[2]['content'] + '<|im_end|>\n'), 1)


# ---- II-2 RMSNorm ----

def test_II_2_rms_norm_beside_layer_norm():
    """[1, 2, 3, 4], divided by the root of the mean square; at mean 0 it is LayerNorm."""
    x = torch.tensor([[[1., 2, 3, 4], [5, 6, 7, 8]]])
    rms, layer = RMSNorm(4, 1e-5), nn.LayerNorm(4)
    check('root mean square', x.square().mean(dim=-1).sqrt(), [[2.7386, 6.5955]])
    check('shape', shapes(rms(x)), [(1, 2, 4)])
    check('RMSNorm', rms(x).detach(), [[[0.3651, 0.7303, 1.0954, 1.4606], [0.7581, 0.9097, 1.0613, 1.2130]]])
    check('LayerNorm', layer(x).detach(), [[[-1.3416, -0.4472, 0.4472, 1.3416]] * 2])
    check('parameters', [n_parameters(rms), n_parameters(layer)], [4, 8])
    check('at mean 0 they agree', same(rms(x - x.mean(dim=-1, keepdim=True)), layer(x)))


# ---- II-3 sinusoidal positions ----

def test_II_3_the_table():
    """d_model 8: the divisors, and position 2. cos(0.002) is 1.0000 (written: 0.9999)."""
    table = sinusoidal_positions(120, 8)
    check('shape', shapes(table), [(120, 8)])
    check('divisors', 10000 ** (torch.arange(0, 8, 2) / 8), [1., 10, 100, 1000], digits=2)
    check('position 2', table[2], [0.9093, -0.4161, 0.1987, 0.9801, 0.0200, 0.9998, 0.0020, 1.0000])


def test_II_3_neighbours_differ_equally_everywhere():
    """Far neighbours are as far apart as near ones: 9.95e-5 in one sine (written: 0.0000003)."""
    check('sin(0.1001) - sin(0.1000)', math.sin(0.1001) - math.sin(0.1), 9.95e-5, digits=7)
    table = sinusoidal_positions(4000, 512).double()
    steps = (table[1:] - table[:-1]).norm(dim=-1)[[0, 1000, 3998]]
    check('distance of neighbours at 0, 1000, 3998', steps, steps[:1].expand(3), digits=3)


def test_II_3_what_decays_with_distance():
    """The product of two positions depends on their distance only, and falls with it."""
    table = sinusoidal_positions(1200, 128).double()
    for p in (0, 500, 1000):
        products = table[p + torch.tensor([0, 1, 10, 100])] @ table[p]
        check(f'{p}, at distance 0, 1, 10, 100', products, [64.0, 62.1, 42.8, 30.5], digits=1)


# ---- II-4 RoPE ----

def rope(x, position):
    """x (D,) as a query or key at a position."""
    config = MiniMindConfig(hidden_size=len(x), num_attention_heads=1, num_key_value_heads=1, rope_theta=1e4,
                            max_position_embeddings=1024)
    return apply_rope(torch.as_tensor(x).float(), *rope_table(config)[:, position])


def rope_of_neighbours(x, position):
    """The paper's layout: x_0 and x_1 are a pair, x_2 and x_3, ..."""
    angles = position * 1e4 ** (-torch.arange(0, len(x), 2) / len(x))
    a, b = torch.as_tensor(x).float().view(-1, 2).unbind(-1)
    c, s = angles.cos(), angles.sin()
    return torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten()


def test_II_4_a_rotation_and_a_score():
    """q at position 1, k at 2: one score of two whole vectors. Tables are as wide as a head."""
    right = torch.tensor(math.pi / 2)
    check('turned', apply_rope(torch.tensor([1., 0.]), right.cos(), right.sin()), [0., 1.])
    check('score', (rope([1., 2], 1) @ rope([3., 4], 2)).item(), 7.62626733416533)
    check('at 501 and 502', (rope([1., 2], 501) @ rope([3., 4], 502)).item(), 7.6263, digits=3)
    check('at 1 and 3', (rope([1., 2], 1) @ rope([3., 4], 3)).item(), -2.7590)
    cos, sin = rope_table(MiniMindConfig(hidden_size=8, num_attention_heads=2))
    q = torch.tensor([1., 2, 3, 4]).expand(1, 2, 3, 4)      # (B, heads, T, D): two heads at three positions
    check('table, rotated', shapes(cos, apply_rope(q, cos[:3], sin[:3])), [(32768, 4), (1, 2, 3, 4)])


def test_II_4_two_layouts():
    """Pairs of neighbours, the paper's, and of halves, MiniMind's: one permutation apart."""
    check('frequencies', 10000 ** (-torch.arange(0, 4, 2) / 4), [1.0, 0.01])
    check('neighbours as pairs', rope_of_neighbours([1., 0, 0, 1], 2), [-0.4161, 0.9093, -0.0200, 0.9998])
    check('halves as pairs', rope([1., 0, 0, 1], 2), [-0.4161, -0.0200, 0.9093, 0.9998])
    x, order = torch.arange(1., 7), torch.tensor([0, 2, 4, 1, 3, 5])
    check('a right turn of [1 .. 6], neighbours', torch.stack([-x[1::2], x[::2]], -1).flatten(),
          [-2., 1, -4, 3, -6, 5])
    check('halves', apply_rope(x, torch.tensor(0.), torch.tensor(1.)), [-4., -5, -6, 1, 2, 3])
    check('permuted, the layouts agree', same(rope(x[order], 9), rope_of_neighbours(x, 9)[order]))
    check('as they stand', same(rope(x, 9), rope_of_neighbours(x, 9)), False)


def test_II_4_longer_texts():
    """Beyond the trained length slow pairs meet unseen angles: RoPE does not extrapolate, YaRN helps."""
    config = dict(hidden_size=64, num_attention_heads=1, num_key_value_heads=1, rope_theta=1e4)
    turns = 1024 * 1e4 ** (-torch.arange(0, 64, 2) / 64) / (2 * math.pi)
    check('pairs with a full turn in training', (turns >= 1).sum().item(), 18)
    for n, angle in ((1024, 0.1364), (4096, 0.5461)):
        sines = rope_table(MiniMindConfig(**config, max_position_embeddings=n))[1]
        check(f'slowest pair at {n - 1}, radians', sines[-1, -1].asin().item(), angle)
    model = tiny_minimind(**config, max_position_embeddings=1024)
    model.extend_context(factor=4)
    check('with YaRN', math.asin(model.table[1, -1, -1].item() / (0.1 * math.log(4) + 1)), 0.1365)


# ---- II-5 KV cache, GQA, flash attention ----

@torch.no_grad()
def test_II_5_cache_shapes():
    """511 tokens held, one new: 8 query heads, 2 of keys and values, 64 wide."""
    model, tokens = tiny_minimind(), torch.randint(64, (1, 512))
    cache = model.make_cache(batch_size=1, max_tokens=512)
    model(tokens[:, :511], cache=cache)
    check('held', cache.length, 511)
    k_proj = model.model.layers[0].self_attn.k_proj
    check('keys of one token', shapes(k_proj(torch.zeros(1, 1, 512))), [(1, 1, 128)])
    logits = model(tokens[:, 511:], cache=cache)[0]
    check('held', [cache.length, *shapes(cache.keys[0], cache.values[0])], [512, *[(1, 2, 512, 64)] * 2])
    check('logits as without a cache', same(logits[:, -1], model(tokens)[0][:, -1]))


def test_II_5_cache_bytes():
    """4,096 wide, 1,024 tokens, float32: twice the chapter's figures, which are of the keys alone."""
    for heads, keys in ((32, 16_777_216), (8, 4_194_304), (1, 524_288)):
        config = MiniMindConfig(hidden_size=4096, num_hidden_layers=1, num_attention_heads=32,
                                num_key_value_heads=heads)
        check(f'heads {heads}, bytes', model_minimind.kv_cache_bytes(config, tokens=1024), 2 * keys)


def test_II_5_query_heads_share_keys():
    """Eight query heads on two of keys and values: less cache, but as many scores."""
    q, (k, v) = torch.randn(1, 8, 6, 64), torch.randn(2, 1, 2, 6, 64)
    y = model_minimind.plain_attention(q, k, v, CAUSAL)
    heads = [plain_attention(q[:, h], k[:, h // 4], v[:, h // 4], CAUSAL) for h in range(8)]
    check('head h reads h // 4', same(y, torch.stack(heads, dim=1)))
    kernel = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    check('the kernel repeats nothing', same(y, kernel))
    for kv_heads, n in ((8, 262144), (2, 65536), (1, 32768)):
        attention = model_minimind.Attention(MiniMindConfig(num_key_value_heads=kv_heads))
        check(f'heads {kv_heads}, parameters of k', n_parameters(attention.k_proj), n)


@torch.no_grad()
def test_II_5_several_tokens_after_a_cache():
    """2 new tokens, 3 in the cache: is_causal, as the chapter has it, counts from the wrong end."""
    q, (k, v), ones = torch.randn(1, 1, 2, 8), torch.randn(2, 1, 1, 5, 8), torch.ones(2, 5, dtype=torch.bool)
    kernel, left, right = (F.scaled_dot_product_attention(q, k, v, **how) for how in (
        dict(is_causal=True), dict(attn_mask=ones.tril()), dict(attn_mask=ones.tril(3))))
    check("the kernel's is_causal: from the left, from the right", [same(kernel, left), same(kernel, right)],
          [True, False])
    model, tokens = tiny_minimind(), torch.randint(64, (1, 9))
    cache = model.make_cache(1, 9)
    pieces = torch.cat([model(part, cache=cache)[0] for part in tokens.split([4, 5], dim=1)], dim=1)
    check('here, in pieces as at once', same(pieces, model(tokens)[0]))


# ---- II-6 mixture of experts ----

def moe_layer(**changes):
    mlp = model_minimind.MoEFeedForward(MiniMindConfig(hidden_size=16, use_moe=True, moe_intermediate_size=8,
                                                       **changes))
    for p in mlp.parameters():
        nn.init.normal_(p, std=0.3)
    return mlp


def test_II_6_gated_feed_forward():
    """Three matrices of 8/3 are as large as two of 4. The gate is not confined to 0 .. 1."""
    gated = model_minimind.FeedForward(MiniMindConfig(), MiniMindConfig().intermediate_size)
    check('8/3, inside', [int(512 * 8 / 3), gated.up_proj.out_features], [1365, 1408])
    check('out', shapes(gated(torch.randn(2, 16, 512))), [(2, 16, 512)])
    check('parameters, gated and plain', [n_parameters(gated), 2 * 512 * 2048], [2162688, 2097152])
    check('least SiLU', F.silu(torch.linspace(-6, 6, 1201)).min().item(), -0.2785)


def test_II_6_dispatch():
    """Two visits a token: expert 1 gets 0, 1, 3 and expert 2 gets 1, 2 (there: 0, 1, 2 and 1, 3)."""
    order, ends = model_minimind.sort_by_expert(torch.tensor([[0, 1], [1, 2], [0, 2], [0, 1]]), 3)
    weights = torch.tensor([0.9, 0.1, 0.3, 0.7, 0.4, 0.6, 0.5, 0.5])
    check('visits by expert', order, [0, 4, 6, 1, 2, 7, 3, 5])
    check('their tokens', order // 2, [0, 2, 3, 0, 1, 3, 1, 2])
    check('where each expert ends', ends, [3, 6, 8])
    for e, (tokens, its_weights) in enumerate((([0, 2, 3], [0.9, 0.4, 0.5]), ([0, 1, 3], [0.1, 0.3, 0.5]),
                                               ([1, 2], [0.7, 0.6]))):
        visits = order[0 if e == 0 else ends[e - 1]:ends[e]]
        check(f'expert {e}, tokens', visits // 2, tokens)
        check('    weights', weights[visits], its_weights)
    check('weights of each token', torch.zeros(4).index_add(0, order // 2, weights[order]), [1.0] * 4)


def test_II_6_balance():
    """The auxiliary loss: 1 where four experts get the same, 4 where one gets all, and learns alone."""
    x = torch.eye(16)[None, :4]                             # four tokens
    for name, gate, loss, visits in (('even', torch.eye(16)[:4], 1.0, [0.25] * 4),
                                     ('collapsed', torch.eye(4)[:, :1].expand(4, 16), 4.0, [1.0, 0, 0, 0])):
        mlp = moe_layer(num_experts=4, num_experts_per_tok=1, router_aux_loss_coef=1.0)
        mlp.gate.weight.data = 20 * gate
        mlp.train()(x).sum().backward()
        check(f'{name}, loss', mlp.auxiliary_loss(torch.ones(1, 4)).item(), loss)
        check('    visits', mlp.load.detach(), visits)
        learning = mlp.experts['down'].grad.abs().sum((1, 2)) > 0
        check('    experts that learn', learning, [n > 0 for n in visits])


# ---- II-7 the model ----

def test_II_7_parameters():
    """MiniMind's small model, part by part; and the teacher of II-12."""
    with torch.device('meta'):
        small, teacher = tiny_minimind(vocab_size=6400, num_hidden_layers=8), tiny_minimind(
            vocab_size=6400, hidden_size=768, num_hidden_layers=16)
    block = small.model.layers[0]
    check('embedding, attention, feed-forward, norm', [n_parameters(part) for part in (
        small.model.embed_tokens, block.self_attn, block.mlp, block.input_layernorm)],
        [6400 * 512, 655360, 2162688, 512])
    check('8 layers of 512, 16 of 768', [f'{n_parameters(model):,}' for model in (small, teacher)],
          ['25,829,888', '104,030,976'])
    check('the head is the embedding', small.lm_head.weight is small.model.embed_tokens.weight)
    hidden = torch.zeros(2, 7, 512)
    check('logits_to_keep 0, 1', shapes(hidden[:, slice(-0, None)], hidden[:, slice(-1, None)]),
          [(2, 7, 512), (2, 1, 512)])


# ---- II-8 pretraining MiniMind ----

def test_II_8_rows():
    """511 inputs, 511 targets. The end of a text is one, though there its id is the padding's, and masked."""
    split = as_split([*range(3, 303), 0, *range(3, 800)])   # two texts, <|endoftext|> between
    x, y = batch_at(split, [0, 301], block_size=511)
    check('inputs, targets', shapes(x, y), [(2, 511), (2, 511)])
    check('targets are one ahead', torch.equal(x[:, 1:], y[:, :-1]))
    check('the end of a text is a target', y[0, 299].item(), 0)


def test_II_8_loss_over_micro_batches():
    """One target of loss 3 and nine of loss 1 are 1.2; loss / accumulation_steps makes it 2."""
    logits, targets = torch.zeros(2, 9, 2), torch.zeros(2, 9, dtype=torch.long)
    for row, loss in enumerate((3.0, 1.0)):
        logits[row, :, 1] = math.log(math.exp(loss) - 1)
    targets[0, 1:] = -100
    parts = [plain_loss(logits[i:i + 1], targets[i:i + 1]).item() for i in (0, 1)]
    check('each', torch.tensor(parts), [3.0, 1.0])
    check('over all ten targets', plain_loss(logits, targets).item(), 1.2)
    check('no target at all', plain_loss(logits, torch.full((2, 9), -100)).item(), 0.0)


# ---- II-9 instruction tuning MiniMind ----

def searched_mask(ids, opening, end):
    """The chapter's way: find the opening of an answer among the ids, then its end."""
    mask, i = [0] * len(ids), 0
    while i < len(ids):
        if ids[i:i + len(opening)] == opening:
            i, start = ids.index(end, i), i + len(opening)
            mask[start + 1:i + 2] = [1] * (i + 1 - start)
        i += 1
    return mask[:len(ids)]


def test_II_9_layout():
    """Targets are the answer and its end. The chapter's mask has a line end, too, and roles by parity."""
    tokenizer, talk = small_tokenizer(), [dict(turn, content=text) for turn, text in zip(
        TALK, ('keep the light', 'who reads?', 'the keeper'))]
    ids, mask = encode_chat(tokenizer, talk)
    print_mask(tokenizer, ids, mask)
    check('targets', marked(tokenizer, ids, mask), 'the keeper<|im_end|>')
    theirs = searched_mask(ids, [1, *tokenizer.encode('assistant')], 2)
    check("the chapter's", marked(tokenizer, ids, theirs), 'the keeper<|im_end|>\n')
    by_parity = [dict(turn, role=('user', 'assistant')[i % 2]) for i, turn in enumerate(talk)]
    check('roles by parity', marked(tokenizer, *encode_chat(tokenizer, by_parity)), 'who reads?<|im_end|>')


def test_II_9_masks_are_made_not_searched():
    """A user types the marks of an answer: where masks are searched, that is a target."""
    tokenizer = small_tokenizer()
    ids, mask = encode_chat(tokenizer, [dict(role='user', content='say <|im_start|>assistant\nyes<|im_end|>'),
                                        dict(role='assistant', content='no')])
    check('targets', marked(tokenizer, ids, mask), 'no<|im_end|>')
    special = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())     # one that reads them in text
    ids = special.encode(tokenizer.decode(ids)).ids
    theirs = searched_mask(ids, [1, *tokenizer.encode('assistant')], 2)
    check('searched in the text', marked(tokenizer, ids, theirs), 'yes<|im_end|><|im_end|>no<|im_end|>\n')


# ---- II-10 DPO ----

def test_II_10_loss():
    """beta 0.1: ln 2 at first. What counts is the margin: both answers may become less likely."""
    chosen, rejected, ref_chosen, ref_rejected = torch.tensor([[-10.], [-20.], [-12.], [-19.]])
    check('policy = reference', dpo_loss(chosen, rejected, chosen, rejected, 0.1)[0], [math.log(2)])
    loss, *rewards = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, 0.1)
    check('rewards of chosen, rejected', torch.cat(rewards), [0.2, -0.1])
    check('loss, -log sigmoid(0.3)', loss, [0.5544])
    ratios = (chosen - rejected) - (ref_chosen - ref_rejected)
    check('with the ratios taken the other way', -F.logsigmoid(0.1 * ratios), [0.5544])
    sunk = dpo_loss(chosen - 5, rejected - 10, ref_chosen, ref_rejected, 0.1)
    check('loss and rewards where both sank', torch.cat(sunk), [0.3711, -0.3, -1.1])


def test_II_10_sums_and_means():
    """2 tokens against 10: the formula has sums, the chapter's code means, and they disagree."""
    for name, lengths, margin in (('sums', (2, 10), -0.1), ('means', (1, 1), 0.07)):
        chosen, rejected = (torch.tensor([per_token * n]) for per_token, n in zip((1.0, 0.3), lengths))
        loss, *rewards = dpo_loss(chosen, rejected, torch.zeros(1), torch.zeros(1), beta=0.1)
        check(f'{name}, margin', rewards[0] - rewards[1], [margin])
        check('    loss', loss, [math.log(1 + math.exp(-margin))])


# ---- II-11 LoRA ----

class OneLayer(nn.Module):

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict(dict(linear=nn.Linear(1024, 1024)))

    def forward(self, x):
        return self.layers.linear(x)


def test_II_11_injection():
    """A linear layer, and the adapter around it; saved is the adapter alone."""
    model, x = OneLayer(), torch.randn(2, 1024)
    print(model)
    before = model(x)
    inject(model, rank=16, alpha=16, targets='linear')
    print(model)
    check('at the start it changes nothing', torch.equal(model(x), before))
    learning = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    check('learning', learning, {'layers.linear.lora_A': (16, 1024), 'layers.linear.lora_B': (1024, 16)})
    check('r (in + out), in x out', [16 * (1024 + 1024), 1024 * 1024], [32768, 1048576])
    nn.init.normal_(model.layers.linear.lora_B)
    state = adapter_state(model)
    check('saved', {name: tuple(value.shape) for name, value in state.items()}, learning)
    again = OneLayer()
    again.layers.linear.load_state_dict(model.layers.linear.base.state_dict())
    load_adapter_state(inject(again, rank=16, alpha=16, targets='linear'), state)
    check('loaded over the same base', torch.equal(again(x), model(x)))


def test_II_11_parameters_of_minimind():
    """Rank 16 on the square layers: one percent, of a total with the adapters in it."""
    with torch.device('meta'):
        model = tiny_minimind(vocab_size=6400, num_hidden_layers=8)
        square = {name.split('.')[-1] for name, layer in model.named_modules()
                  if isinstance(layer, nn.Linear) and layer.in_features == layer.out_features}
        base = n_parameters(inject(model, rank=16, alpha=16, targets=','.join(square)))
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    check('square layers', sorted(square), ['o_proj', 'q_proj'])
    check('all, learning', [base, learning], [26_092_032, 262_144])
    check('share', f'{learning / base:.2%}', '1.00%')
    check('without adapters', base - learning, 25_829_888)


# ---- II-12 distillation ----

# <think>, </think>, <answer>, </answer> in MiniMind2's tokenizer
TAG_IDS = [[30, 450, 1573, 32], [5540, 450, 1573, 32], [30, 662, 89, 275, 32], [5540, 662, 89, 275, 32]]


def test_II_12_divergence():
    """Teacher and student at temperatures 1 and 2. (The chapter trains with alpha = 0: no data)."""
    student, teacher, rest = torch.zeros(1, 3), torch.tensor([[2., 1, 0]]), (torch.tensor([0]), torch.ones(1))
    for t, p, kl in ((1, [0.6652, 0.2447, 0.0900], 0.2662), (2, [0.5065, 0.3072, 0.1863], 0.0784)):
        check(f'temperature {t}, teacher', (teacher / t).softmax(dim=-1)[0], p)
        loss, ce, divergence = distillation_loss(student, teacher, *rest, alpha=0.5, temperature=t)
        check('    KL', divergence.item(), kl)
        check('    half of ln 3, half of T^2 KL', loss.item(), 0.5 * math.log(3) + 0.5 * t * t * kl, digits=3)
    check('of the teacher itself', distillation_loss(teacher, teacher, *rest, 0.0, 2.0)[0].item(), 0.0)


def test_II_12_tags_are_sequences():
    """Tags weigh ten times, as sequences; torch.isin finds their pieces anywhere, prompts included."""
    targets = torch.tensor([[*TAG_IDS[0], 7, 30, 8, 32, *TAG_IDS[1]]])      # <think> . < . > </think>
    check('by sequence', tag_weights(targets, TAG_IDS, 10.0), [[10.0] * 4 + [1] * 4 + [10] * 4])
    found = torch.isin(targets, torch.tensor(sum(TAG_IDS, [])))
    check('by torch.isin', found, [[True] * 4 + [False, True, False, True] + [True] * 4])
    mask = torch.tensor([[0] * 4 + [1] * 8])                # the first tag stands in a prompt
    check("the chapter's mask", mask.masked_fill(found, 10), [[10] * 4 + [1, 10, 1, 10] + [10] * 4])
    check('what an answer says', parse_answer('<think>\n6, less 2\n</think>\n<answer>\n4\n</answer>'), '4')


# ---- for a reader ----

def test_a_chapter_is_shown_by_its_name():
    from conftest import run_here                           # which a reader's call does without
    shown, unknown = run_here([__file__, 'II-2']), run_here([__file__, 'II-13'])
    assert shown.returncode == 0 and 'RMSNorm' in shown.stdout
    assert unknown.returncode == 2 and unknown.stderr.count('\n') == 1 and 'I-1, I-2, I-3' in unknown.stderr


if __name__ == '__main__':
    sys.excepthook = functools.partial(last_words, ())      # a reader that has gone (`| head`) is no fault
    torch.set_printoptions(sci_mode=False)
    chapters = {}
    for name, function in [*globals().items()]:
        if name.startswith('test_I'):
            chapters.setdefault('-'.join(name.split('_')[1:3]), []).append(function)
    for name in sys.argv[1:]:
        if name not in chapters:
            fail(f"there is no chapter {name!r}; there are {', '.join(chapters)}")
    for name in sys.argv[1:] or chapters:
        for function in chapters[name]:
            print(f"\n{name}  {function.__doc__}  ({function.__name__})")
            torch.manual_seed(0)
            try:
                function()
            except SkipTest as e:
                print(f"  not shown: {e}")
