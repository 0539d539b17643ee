"""
Generate text from a trained model (tutorial chapter I-6).

    python sample.py --start="def is_"                      # from out/pretrain
    python sample.py --init_from=gpt2 --start="Every effort moves you" --temperature=0
    python sample.py --out_dir=out/verdict --start=FILE:prompts.txt --lines --stop="##|Mrs"
    echo "class Queue" | python sample.py --start=- --num_samples=3 --seed=7 --show_probs
    python sample.py --out_dir=out/sft --chat                       # a conversation (chapters I-8 and II-9)
    python sample.py --out_dir=out/sft --export_dir=hf          # a run -> a folder that transformers loads
    python sample.py --out_dir=out/sft --export_gguf=model.gguf             # a run -> a file for llama.cpp

A model gives each token a number, its logit; softmax turns them into the distribution of the next token.
Decoding picks from it: the likeliest token each time (greedy, temperature=0), or one drawn at random, after
    repetition_penalty  makes what the text has already less likely (Keskar et al. 2019, section 4.1)
    temperature         divides the logits: below 1 sharper, above 1 flatter
    top_k               only the k likeliest tokens remain
    top_p               only the likeliest that together reach probability p remain (Holtzman et al. 2020)
    min_p               only tokens min_p times as likely as the likeliest remain (Nguyen et al. 2024)
"""
import difflib
import functools
import importlib.util
import math
import os
import re
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace

from configurator import (FULL, at_least, bare_weights, between, build_model, check_weights, configure, draw,
                          fail, fingerprint, load_checkpoint, make_folder, one_of, parse, partial_folder,
                          read_file, read_json, refuse_model, replacing, start_run, tell)

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model_gpt2 import GPT2, OFFICIAL, TRANSPOSED, GPT2Config
from model_minimind import EXPERT_KEYS, MiniMind, MiniMindConfig, rope_table
from train_tokenizer import encode_chat, gguf_words, load_tokenizer

# the model
out_dir = 'out/pretrain'    # folder of the run whose model speaks
init_from = ''              # instead of out_dir: a Hugging Face folder, a .pth, or 'gpt2', 'gpt2-medium', ...
weights_config = ''         # of a .pth, what it cannot say: 'tokenizer=FOLDER,num_attention_heads=16'
yarn_factor = 1.0           # minimind: read texts so many times longer than in training (chapter II-4)
export_dir = ''             # write the model here as a Hugging Face folder, and stop
export_gguf = ''            # write it into this file, which llama.cpp and Ollama load, and stop
# the text
start = 'def '              # prompt, or FILE:path, or '-' for standard input
lines = False               # each line of start, with --chat of standard input, is a prompt of its own
num_samples = 1             # how many texts for each prompt; with --chat, answers to each question
max_new_tokens = 200        # longest continuation, in tokens
stop = ''                   # a text at which a sample ends, or several with | between; '"\n"' is a line end
on_full = 'stop'            # when the context is full: 'stop', or 'slide' and forget the older half
# the conversation
chat = False                # talk with the model; a line that ends in \ goes on, /reset forgets, /exit ends
system = ''                 # what the model is told before the conversation
thinking = False            # let it think before each answer, if it has learned that
# the choice
temperature = 0.7           # 0 is greedy: always the likeliest token
top_k = 0                   # keep only the k likeliest tokens; 0 keeps all
top_p = 0.95                # keep only the likeliest tokens up to this total probability; 1 keeps all
min_p = 0.0                 # keep only tokens this many times as likely as the likeliest; 0 keeps all
repetition_penalty = 1.0    # above 1, tokens that the text holds become less likely; 1 is none
seed = 1337                 # same seed, same text
# what to see of it
show_probs = False          # print the candidates for each token, and which filter removed them
plot = False                # draw the first token's distribution at several temperatures: next_token.png
use_cache = True            # False reads the whole text anew for each token, to see what the KV cache saves
# the machine
device = 'auto'             # 'auto' takes cuda, then mps, then cpu
dtype = 'auto'              # 'float32', 'bfloat16', 'float16', on a CPU 'int8'; 'auto': bfloat16 where fast
compile = False             # torch.compile: seconds to start, then faster; most with int8 and on a GPU

SPEAKING = ('chat start lines num_samples max_new_tokens stop on_full temperature top_k top_p min_p '
            'repetition_penalty seed show_probs plot use_cache compile')    # settings that no export asks for
GREEDY = 1e-5               # a temperature below is 0: float32 could not tell them apart
MODELS = dict(gpt2=(GPT2, GPT2Config), minimind=(MiniMind, MiniMindConfig))
HUGGING_FACE = dict(gpt2=GPT2, minimind=MiniMind, llama=MiniMind, qwen2=MiniMind, qwen3=MiniMind,
                    qwen3_moe=MiniMind)


# ---- from logits to a token ----

def penalize(logits, seen, repetition_penalty):
    """Divide the logits (B, V) of tokens in seen (B, S) by the penalty; multiply those below 0."""
    old = logits.gather(1, seen)                                            # (B, S)
    new = torch.where(old > 0, old / repetition_penalty, old * repetition_penalty)
    return logits.scatter(1, seen, new)


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """The probabilities to draw from, (B, V) -> (B, V): temperature, then the filters in turn."""
    # less the largest, so that a small temperature makes no infinities
    logits = (logits - logits.amax(dim=-1, keepdim=True)).float() / temperature
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]                             # (B, 1), the smallest that stays
        logits = logits.masked_fill(logits < kth, float('-inf'))
    if top_p < 1:
        p = logits.softmax(dim=-1)
        # all that are rarer are together less than 1 - top_p: out, without being sorted, which takes long
        n = (p > (1 - top_p) / p.size(-1)).sum(dim=-1).max().item()
        p, index = p.topk(max(1, n))                                        # (B, n), the likeliest first
        drop = p.cumsum(dim=-1) - p >= top_p                                # what stands before reaches top_p
        drop[:, 0] = False                                                  # the likeliest always stays
        drop = torch.ones_like(logits, dtype=torch.bool).scatter(1, index, drop)
        logits = logits.masked_fill(drop, float('-inf'))
    p = logits.softmax(dim=-1)
    if min_p > 0:
        p = p.masked_fill(p < min_p * p.amax(dim=-1, keepdim=True), 0.0)
        p = p / p.sum(dim=-1, keepdim=True)
    return p


def draw_token(p, generator=None):
    """Draw a token of each row of p (B, V) -> (B,): the one at which the cumulated probability passes a
    random number between 0 and 1 (chapter I-6)."""
    cumulated = p.cumsum(dim=-1)
    if p.is_cuda:       # there a sum of pieces may grow where p is 0, too
        cumulated = cumulated.masked_fill(p == 0, 0).cummax(dim=-1).values
    u = torch.rand(len(p), 1, generator=generator, device=p.device) * (1 - 2**-22)     # 1 even if rounded: no
    return torch.searchsorted(cumulated, u * cumulated[:, -1:], right=True).squeeze(1)


def choose(logits, seen=None, temperature=1.0, generator=None, repetition_penalty=1.0, **filters):
    """Pick the next token of each row: logits (B, V) -> tokens (B,). The penalty is for seen (B, S)."""
    if repetition_penalty != 1 and seen is not None:
        logits = penalize(logits, seen, repetition_penalty)
    if not logits.amax(dim=-1).isfinite().all():        # any token would do for one
        fail("the model's logits are not finite: try --dtype=float32, or --dtype=bfloat16", code=1)
    if temperature < GREEDY:
        return logits.argmax(dim=-1)
    return draw_token(distribution(logits, temperature, **filters), generator)


def candidates(logits, seen, n=10, also=(), temperature=1.0, repetition_penalty=1.0, **filters):
    """The n likeliest next tokens of the first row, and `also`: a list of (id, probability, that after the
    filters, name of the filter that removed it or ''). At temperature 0, which has none, that of 1."""
    logits = penalize(logits, seen, repetition_penalty)[:1]
    temperature = temperature if temperature >= GREEDY else 1.0
    removed_by, used = {}, {}
    after = before = distribution(logits, temperature)[0]
    for name, value in filters.items():
        used[name] = value
        after = distribution(logits, temperature, **used)[0]
        for i in ((after == 0) & (before > 0)).nonzero()[:, 0].tolist():
            removed_by.setdefault(i, name)
    return [(i, before[i].item(), after[i].item(), removed_by.get(i, ''))
            for i in dict.fromkeys([*before.topk(min(n, before.numel())).indices.tolist(), *also])]


# ---- from prompts to texts ----

def left_pad(prompts, device='cpu'):
    """Id lists of any lengths -> tokens (B, T), and how much of each row's left is padding (B,)."""
    T = max(map(len, prompts))
    padding = [T - len(ids) for ids in prompts]
    rows = [ids[:1] * pad + ids for ids, pad in zip(prompts, padding)]
    return torch.tensor(rows, device=device), torch.tensor(padding, device=device)


def next_logits(model, cache, tokens):
    """Logits of the token after tokens (B, T), which continue what the cache holds: (B, V)."""
    hidden, _ = model(tokens, cache=cache, head=False)                     # only the last one needs a head
    return model.lm_head(hidden[:, -1])


class RecordedStep:
    """next_logits for one token of each row, recorded once as a CUDA graph and then started as a whole: it is
    hundreds of small kernels, each of which takes the host longer to start than the GPU to run."""

    def __init__(self, model, cache, tokens):
        self.tokens, self.graph, length = tokens.clone(), torch.cuda.CUDAGraph(), cache.length
        cache.length = torch.tensor(length, device=tokens.device)           # what is recorded counts it up
        # a kernel that stores no scores goes through the keys one after another: for one query it waits
        with sdpa_kernel(SDPBackend.MATH):
            next_logits(model, cache, self.tokens)              # libraries load and blocks compile beforehand
            cache.length.fill_(length)
            with torch.cuda.graph(self.graph):
                self.logits = next_logits(model, cache, self.tokens)

    def __call__(self, tokens):
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits


@torch.inference_mode()
def generate(model, tokens, max_new_tokens, stop=(), generator=None, padding=None, on_full='stop',
             vocab_size=None, use_cache=True, watch=None, **how):
    """Continue a batch of prompts; yield the next token of every row, (B,), as it comes.

    tokens      (B, T) int64, at least one token
    stop        ids at which a row ends; an ended row repeats its last token until all rows have ended
    padding     (B,), for prompts of different length: how much of each row's left is padding, see left_pad
    on_full     when the rows fill the model's context: 'stop', or 'slide': go on with the later half of it
    vocab_size  only smaller ids are chosen: the tokenizer's size, where the model's is rounded up
    watch       called as watch(logits, seen, new) for each token; seen (B, S) is what the model has read, and
                logits (B, V) are on a GPU overwritten by the next: keep a copy
    how         temperature, top_k, ...: see `choose`
    """
    B, T = tokens.shape
    context = model.config.context
    ended = torch.zeros(B, dtype=torch.bool, device=tokens.device)
    stop = torch.tensor(sorted(stop), dtype=torch.long, device=tokens.device)
    padding = padding if padding is not None and padding.any() else None       # none is faster than zeros
    # what a row is padded with is no part of its text, but its last token is
    seen = tokens if padding is None else torch.where(
        torch.arange(T, device=tokens.device) < padding[:, None], tokens[:, -1:], tokens)
    # a mixture's products may wait for the host, and hooks, of weights shared out, use other streams
    records = tokens.is_cuda and not model.config.use_moe and not model._forward_pre_hooks
    cache = None
    for _ in range(max_new_tokens):
        if seen.size(1) > context:
            if on_full == 'stop':
                return
            half = max(1, context // 2)
            if padding is not None:
                padding = (padding - (seen.size(1) - half)).clamp(min=0)
            seen, cache = seen[:, -half:], None         # positions start again, so all is read again
        if cache is None or not use_cache:
            cache = model.make_cache(B, min(seen.size(1) + max_new_tokens, context))
            cache.padding = padding
            tokens, step = seen, functools.partial(next_logits, model, cache)       # first all, then a token
        elif records and not isinstance(step, RecordedStep):
            step = RecordedStep(model, cache, tokens)
        logits = step(tokens)[:, :vocab_size]                               # (B, V)
        new = torch.where(ended, tokens[:, -1], choose(logits, seen, generator=generator, **how))
        if watch:
            watch(logits, seen, new)
        yield new
        if stop.numel():                                # asking whether all have ended makes a GPU wait
            ended = ended | torch.isin(new, stop)
            if ended.all():
                return
        tokens = new[:, None]                                               # (B,) -> (B, 1)
        seen = torch.cat([seen, tokens], dim=1)                             # (B, S) -> (B, S + 1)


def known_length(config):
    """Tokens of the longest texts that a model was trained to read, or that YaRN makes look like them."""
    scaling = getattr(config, 'rope_scaling', None)
    stretched = scaling['factor'] * scaling['original_max_position_embeddings'] if scaling else 0
    return max(config.trained_length, int(stretched)) or config.context


@functools.cache
def warn(line):
    """A line on stderr, once."""
    print(f"\n{line}", file=sys.stderr)


class Stream:
    """The text of one row while its tokens come: whole characters only, and nothing from a stop text on.

    A character may take several tokens; until its last byte is there, it decodes as U+FFFD. What could be the
    beginning of a stop text is held back until it is certain.
    """

    def __init__(self, tokenizer, prompt, stop=(), known=float('inf')):
        """prompt: the ids before the first new token. stop: the texts at which this one ends. known: tokens
        from which on the text is longer than the model has learned to read."""
        self.tokenizer, self.known, self.stop = tokenizer, known, [s for s in stop if s]
        self.new, self.text, self.whole, self.shown, self.ended = [], '', 0, 0, False
        # a token is decoded behind the last ones that made whole characters: some decoders drop a first space
        self.window, self.old, self.length = list(prompt), len(prompt), len(prompt)
        self.before = len(tokenizer.decode(self.window))

    def add(self, token):
        """Take the next token, and return the text it makes certain."""
        if self.ended:
            return ''
        if token in self.tokenizer.ends:
            return self.finish()
        self.new.append(token)
        if self.length + len(self.new) > self.known:
            warn(f"(from here on the text is longer than the {self.known:,} tokens the model is trained on)")
        self.window.append(token)
        piece = self.tokenizer.decode(self.window)[self.before:]
        self.text = self.text[:self.whole] + piece
        found = [at for s in self.stop if (at := self.text.find(s, self.shown)) >= 0]
        if found:
            self.text = self.text[:min(found)]
            return self.finish()
        if not piece or piece.endswith('\ufffd'):
            return ''
        self.window, self.whole = self.window[self.old:], len(self.text)
        self.old, self.before = len(self.window), len(self.tokenizer.decode(self.window))
        held = max((n for s in self.stop for n in range(len(s)) if self.text.endswith(s[:n])), default=0)
        return self.show(len(self.text) - held)

    def show(self, end):
        piece = self.text[self.shown:end]
        self.shown = max(end, self.shown)
        return piece

    def finish(self):
        """End the row, and return the rest of its text."""
        self.ended = True
        return self.show(len(self.text))


def answers(model, tokenizer, prompts, max_new_tokens, batch_size=16, generator=None, temperature=0.0, **how):
    """Texts that continue prompts (id lists of any length): [(text, whether it ended by itself), ...].
    Greedy, or without a generator with the same random numbers each time, so that texts compare."""
    device, results, stop = next(model.parameters()).device, [], tokenizer.ends
    generator = generator or torch.Generator(device).manual_seed(0)
    with evaluating(model):
        for i in range(0, len(prompts), batch_size):
            tokens, padding = left_pad(prompts[i:i + batch_size], device)
            new = list(generate(model, tokens, max_new_tokens, stop, generator, padding,
                                vocab_size=tokenizer.vocab_size, temperature=temperature, **how))
            for row in torch.stack(new, dim=1).tolist() if new else [[]] * len(tokens):
                ends = [j for j, token in enumerate(row) if token in stop]
                results.append((tokenizer.decode(row[:ends[0]] if ends else row), bool(ends)))
    return results


# ---- the model and the prompt ----

def blocks(model):
    """The layers of a model of either kind, in their order."""
    return model.transformer.h if model.config.model_type == 'gpt2' else model.model.layers


def load_own(folder):
    """(checkpoint, tokenizer) of a run's folder, which must belong together."""
    checkpoint, tokenizer = load_checkpoint(folder), load_tokenizer(folder)
    if tokenizer.fingerprint != checkpoint['tokenizer']:
        fail(f"{folder} holds another tokenizer than its model was trained with")
    return checkpoint, tokenizer


def load_run(source, device='cpu', dropout=0.0, block_size=1, yarn_factor=1.0, given=()):
    """(model, tokenizer, checkpoint) of a run's folder; of a Hugging Face folder, a file of weights alone or
    an official name ('gpt2', ...), which have no checkpoint. In evaluation mode; dropout is for when it is
    trained. One line if there is no such model. A MiniMind with a context shorter than block_size gets a
    longer one, if its positions are no parameters; yarn_factor: see extend_context; given: see load_bare."""
    checkpoint, guessed, path = None, '', os.path.join(source, 'config.json')
    try:
        if source in OFFICIAL:
            model, tokenizer = GPT2.from_pretrained(source, dropout=dropout), load_tokenizer('gpt2')
        elif file := bare_weights(source):
            model, tokenizer, guessed = load_bare(file, dropout, dict(given))
        elif os.path.isfile(path) and not os.path.isfile(os.path.join(source, 'ckpt.pt')):
            hf = read_json(path)
            kind = hf.get('model_type')
            if head := re.search(r'\w+For(?!CausalLM)\w+', str(hf.get('architectures'))):
                fail(f"{source} holds a {head[0]}, which is no language model")
            if kind not in [*HUGGING_FACE]:
                fail(f"{source}: a model of type {kind!r}; these can be read: {', '.join(HUGGING_FACE)}")
            model = HUGGING_FACE[kind].from_pretrained(source, dropout=dropout)
            tokenizer = load_tokenizer(source)
        elif os.path.isfile(os.path.join(source, 'adapter_config.json')):
            fail(f"{source} holds adapters alone: `python lora.py --from_peft={source} --init_from=BASE`")
        else:
            if not os.path.exists(source) and difflib.get_close_matches(source, OFFICIAL):
                fail(f"{source} is neither a folder nor a model by name, which are {', '.join(OFFICIAL)}: "
                     f"{OFFICIAL[0]} is the small one")
            checkpoint, tokenizer = load_own(source)
            if 'labels' in checkpoint:
                fail(f"{source} is a classifier: `python finetune_cls.py --out_dir={source} --classify=TEXT`")
            if 'adapters' in checkpoint:
                model = load_base(source, checkpoint, dropout)[0]
                add_adapters(model, checkpoint)
            else:
                model = model_of(checkpoint, source, dropout=dropout)
        if yarn_factor > 1 and model.config.model_type != 'minimind':
            fail("--yarn_factor slows down RoPE, which GPT-2 does not have")
        context = model.config.context
        if model.config.model_type == 'minimind' and (yarn_factor > 1 or block_size > context):
            model.extend_context(yarn_factor, block_size)
            if block_size > context:
                tell(f"the context of {source} grows from {context} to {block_size} tokens")
    except (OSError, ValueError, ImportError) as e:     # what from_pretrained and build_model raise
        fail(str(e) if str(source) in str(e) else f"{source}: {e}")
    if tokenizer.vocab_size > model.config.vocab_size:
        fail(f"{source}: its tokenizer has {tokenizer.vocab_size} ids, its model {model.config.vocab_size}")
    if block_size > model.config.context:
        fail(f"rows of {block_size} tokens are longer than the context of {source}: the longest --block_size "
             f"is {model.config.context}")
    if guessed:
        tell(f"{source} does not say, so guessed: {guessed}; --weights_config corrects it", sys.stderr)
    return model.to(device), tokenizer, checkpoint


def parse_given(text):
    """'tokenizer=FOLDER,rope_theta=1e4' -> {'tokenizer': 'FOLDER', 'rope_theta': 1e4}."""
    pairs = [pair.partition('=') for pair in text.split(',') if pair]
    return {key.strip(): parse(value, '' if key.strip() == 'tokenizer' else 0) for key, _, value in pairs}


def left_open(config):
    """Names in the dict of a model's config that a file of its weights leaves open."""
    dense, shown = not config.get('use_moe'), config.get('qk_norm')     # q_norm is as wide as a head
    return [name for name in MiniMindConfig.unseen + GPT2Config.unseen if name in config
            and not (dense and name in EXPERT_KEYS) and not (shown and name == 'num_attention_heads')]


def load_bare(file, dropout, given):
    """(model, tokenizer, what was guessed) of a file of weights alone: a .pth of MiniMind's, or a ckpt.pt of
    nanoGPT's. given: {name: value} of what it cannot say, --weights_config."""
    model_class, config_class = MODELS['gpt2' if 'model_args' in read_file(file) else 'minimind']
    names = 'tokenizer', *config_class.unseen
    if unknown := given.keys() - {*names}:
        near = difflib.get_close_matches(min(unknown), names, n=1)
        fail(f"--weights_config: {min(unknown)!r} is nothing to say of {file}; " + (
            f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"))
    where = given.pop('tokenizer', '')
    model = model_class.from_pretrained(file, **given, dropout=dropout)
    config, guessed = model.config, []
    if not where:
        beside = os.path.dirname(os.path.abspath(file))
        paths = [os.path.normpath(os.path.join(beside, name)) for name in ('.', '../model', 'model')]
        paths = [path for path in paths if os.path.isfile(os.path.join(path, 'tokenizer.json'))]
        if config.vocab_size in (50257, 50304):         # nanoGPT rounds it up
            paths.append('gpt2')
        where = paths[0] if paths else fail(
            f"{file} comes without a tokenizer: name a folder, --weights_config=tokenizer=FOLDER (for "
            f"nanoGPT's characters `python prepare.py --input=FOLDER_OF_TRAIN.BIN` makes one)")
        guessed.append(f'tokenizer={where}')
    open_names = left_open(asdict(config))
    if useless := given.keys() - {*open_names}:
        fail(f"--weights_config: {min(useless)} does nothing, as {file} shows it or has no experts")
    guessed += [f'{name}={getattr(config, name)}' for name in open_names if name not in given]
    tokenizer, rows = load_tokenizer(where), model.config.vocab_size
    if tokenizer.vocab_size == rows + 2 and tokenizer.special_ids['eos_token'] == rows:     # characters
        model = with_special_tokens(model)
        guessed.append('two more rows for <|endoftext|> and <|unk|>')
    return model, tokenizer, ', '.join(guessed)


@torch.no_grad()
def with_special_tokens(model):
    """nanoGPT's model of characters with a row each for <|endoftext|> and <|unk|>: that of the token which it
    finds least likely, so that they are chosen no more often."""
    tokens = torch.arange(min(model.config.vocab_size, model.config.context))[None]
    least = model(tokens)[0].mean(dim=(0, 1)).argmin()
    state = {name: torch.cat([value, value[least].expand(2, -1)]) if name in (
        'transformer.wte.weight', 'lm_head.weight') else value for name, value in model.state_dict().items()}
    config = replace(model.config, vocab_size=model.config.vocab_size + 2)
    return build_model(type(model), config, state, 'the model')


def model_of(checkpoint, source, weights='model', head=lambda model: model, **changes):
    """The model in a checkpoint, in evaluation mode; one line if there is none.
    head: a function that puts another output head on it; changes: of its config"""
    try:
        model_class, config_class = MODELS[checkpoint['model_type']]
        config = config_class(**{**checkpoint['model_config'], **changes})
        return build_model(lambda config: head(model_class(config)), config, checkpoint[weights], source)
    except (KeyError, TypeError, ValueError) as e:
        fail(f"{source}: its checkpoint does not describe a model ({type(e).__name__}: {e})")


def given_by(checkpoint, folder):
    """What a run's folder says of the file of weights that it started from, see load_bare."""
    config = checkpoint['model_config']
    return {'tokenizer': folder, **{name: config[name] for name in left_open(config)}}


def load_base(folder, checkpoint, dropout=0.0):
    """(model, its path): what the adapters in a run's folder were trained on. The path is kept relative to
    the folder, so that both may move together."""
    path = os.path.normpath(os.path.join(folder, checkpoint['base']))
    path = path if os.path.exists(path) else checkpoint['base']
    model = load_run(path, given=given_by(checkpoint, folder))[0]
    if fingerprint(model.state_dict()) != checkpoint['base_fingerprint']:
        fail(f"{folder} holds adapters for another base than {path}: its weights are not those they were "
             f"trained on")
    # its context may be longer
    return model_of(dict(checkpoint, model=model.state_dict()), folder, dropout=dropout), path


@torch.no_grad()
def add_adapters(model, checkpoint):
    """Add the adapters of a checkpoint to the weights: W + alpha/rank * B A (lora.py, chapter II-11)."""
    how, adapters, weights = checkpoint['lora'], checkpoint['adapters'], dict(model.named_parameters())
    rank = how['rank'] or 1
    check_weights(adapters, 'the adapters')
    for layer in {name.rpartition('.')[0] for name in adapters}:
        A, B, W = (part.get(f'{layer}.{name}') for part, name in (
            (adapters, 'lora_A'), (adapters, 'lora_B'), (weights, 'weight')))
        if A is None or B is None or W is None or (*B.shape, *A.shape) != (len(W), rank, rank, W.size(-1)):
            raise ValueError(f"the adapter of {layer} does not fit its base")
        W += how['alpha'] / rank * B.to(W) @ A.to(W)


class PackedLinear(nn.Module):
    """A linear layer whose weights lie in memory in the order in which the CPU's kernel (oneDNN) reads them:
    nn.Linear brings them into it again for each product, which for few rows takes longer than the product."""

    def __init__(self, linear):
        super().__init__()
        self.weight, self.bias = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach()), linear.bias
        self.width = linear.out_features

    def forward(self, x):
        if torch.compiler.is_compiling():
            return torch.ops.from_scratch.packed_linear(x, self.weight, self.bias, self.width)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')


class Int8Linear(nn.Module):
    """A linear layer in a quarter of the bytes (weight-only int8): each output has a scale of its own, and
    its weights are whole numbers of it, from -127 to 127. x (..., in) in bfloat16 -> (..., out)."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()                                        # (out, in)
        scale = weight.abs().amax(dim=1).clamp(min=1e-9) / 127                         # (out,)
        self.register_buffer('weight', (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer('scale', scale.bfloat16())
        self.bias = linear.bias

    def forward(self, x):
        rows = x.flatten(0, -2)
        # for few rows reading the weights takes longer than the product. The kernel reads 32 at a time
        if len(rows) <= 16 and x.size(-1) % 32 == 0:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def compile_blocks(model):
    """Compile what all blocks are alike, once for all of them; twice, for a prompt and for one new token."""
    if not hasattr(torch.ops.from_scratch, 'packed_linear'):
        # the compiler has a kernel of its own for this product, but only for weights that are constants
        @torch.library.custom_op('from_scratch::packed_linear', mutates_args=())
        def packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
                          width: int) -> torch.Tensor:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
        packed_linear.register_fake(lambda x, weight, bias, width: x.new_empty(*x.shape[:-1], width))
    for block in blocks(model):
        block.compile()


def for_decoding(model, dtype, int8=False):
    """The model in dtype, once for all tokens; on a CPU its linear layers become the faster ones above. With
    int8 these are in int8. Embeddings stay, those that are the head's, too; and routers and their experts."""
    packs = (model.lm_head.weight.is_cpu and torch.backends.cpu.get_cpu_capability().startswith('AVX')
             and torch.backends.mkldnn.is_available() and (dtype == torch.float32 or (
                 dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())))
    for parent in list(model.modules()) if packs or int8 else ():
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear) and name != 'gate':
                setattr(parent, name, Int8Linear(layer) if int8 else PackedLinear(layer.to(dtype)))
    return model.to(dtype)


def load_start(run, config):
    """What load_run finds in init_from, where a stage starts, or to resume in out_dir."""
    length = max(config['block_size'], config.get('eval_block_size', 0))
    how = run.device, config.get('dropout', 0.0), length
    if config['init_from'] == 'resume':
        return load_run(config['out_dir'], *how)
    return load_run(config['init_from'], *how, config.get('yarn_factor', 1.0),
                    parse_given(config.get('weights_config', '')))


@contextmanager
def evaluating(model):
    """The model in evaluation mode, without gradients. And without torch.compile: texts of all lengths would
    compile it again and again."""
    training, compiled, model._compiled_call_impl = model.training, model._compiled_call_impl, None
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model._compiled_call_impl = compiled
        model.train(training)


def read_prompt(start):
    """The text of a prompt: itself, or from FILE:path or standard input ('-'), less one final newline."""
    if start != '-' and not start.startswith('FILE:'):
        return start
    if start == '-':
        return decoded(standard_input().buffer.read(), 'standard input').removesuffix('\n')
    try:
        with open(start[5:], 'rb') as f:
            return decoded(f.read(), start[5:]).removesuffix('\n')
    except OSError as e:
        fail(f"--start={start}: {e.strerror}")


def decoded(data, where, line=1):
    """UTF-8 as text, less a byte order mark. One line on what is none, which begins on that line."""
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError as e:
        fail(f"{where}:{line + data[:e.start].count(10)}: not UTF-8 (byte 0x{data[e.start]:02x})")


def standard_input():
    return sys.stdin or fail("standard input is closed")


# ---- conversation ----

def typed_lines():
    """The lines that a user types, or those of a file or a pipe as they come."""
    if not standard_input().isatty():
        for number, line in enumerate(sys.stdin.buffer, 1):
            yield decoded(line, 'standard input', number).rstrip('\r\n')
        return
    sys.stdin.reconfigure(errors='replace')
    with suppress(EOFError):
        while True:
            yield input('> ')


def messages_of(lines):
    """What the user says: a line, or several where all but the last end in a backslash."""
    message = []
    for line in lines:
        message.append(line.removesuffix('\\'))
        if not line.endswith('\\'):
            yield '\n'.join(message)
            message = []
    if message:
        yield '\n'.join(message)


def prompt_that_fits(tokenizer, messages, room, thinking=False):
    """The prompt for the next answer, in at most `room` ids: the oldest turns leave `messages` until
    it fits, the system message never. None if the last one alone does not fit."""
    first = 1 if messages[0]['role'] == 'system' else 0
    while len(ids := encode_chat(tokenizer, messages, True, thinking)[0]) > room:
        if len(messages) == first + 1:
            return None
        del messages[first:first + 2]                   # a question and its answer
    return ids


def print_answers(model, tokenizer, questions, prompts, num_samples, max_new_tokens, generator, **how):
    """Several answers to each of many questions, 64 at a time: question, answer and a line between."""
    asked = [pair for pair in zip(questions, prompts) for _ in range(num_samples)]
    cut, context = 0, model.config.context
    for i in range(0, len(asked), 64):
        some, ids = zip(*asked[i:i + 64])
        found = answers(model, tokenizer, ids, max_new_tokens, 64, generator, **how)
        if max(map(len, ids)) + max_new_tokens > context + 1:               # the longest ends them all
            cut += sum(not ended for _, ended in found)
        for question, (answer, _) in zip(some, found):
            print(question, answer, '-' * 40, sep='\n', flush=True)
    if cut:
        print(f"({cut:,} of {len(asked):,} answers are cut: the context of {context:,} tokens is full)",
              file=sys.stderr)


def converse(model, tokenizer, system, thinking, num_samples, max_new_tokens, generator=None, lines=False,
             **how):
    """Answer what is typed, on and on. All of it is text: "<|im_end|>" typed by a user ends nothing. With
    several answers to each question none is remembered, and none of `lines`, which are answered together."""
    tokenizer.take_own_layout()
    lead = tokenizer.layout.lead if tokenizer.layout else '<think>\n'
    if thinking and not lead and tokenizer.layout.thinks == 'given':
        fail("--thinking: the chat template of this model has no place for thoughts: leave it out")
    device, context = next(model.parameters()).device, model.config.context
    room, full = context - min(max_new_tokens, context // 2), f"share a context of {context:,} tokens"
    opening = [dict(role='system', content=system)] if system else []
    if system and prompt_that_fits(tokenizer, [*opening, dict(role='user', content='')], room) is None:
        fail(f"--system is too long: it, a question and its answer {full}")
    if lines:
        questions = [text.strip() for text in typed_lines() if text.strip()]
        asked = [[*opening, dict(role='user', content=text)] for text in questions]
        prompts = [prompt_that_fits(tokenizer, messages, room, thinking) for messages in asked]
        if not prompts or None in prompts:
            fail(f"--lines: question {prompts.index(None) + 1} is too long: it and its answer {full}"
                 if prompts else "--lines: standard input has no line with text in it")
        print_answers(model, tokenizer, questions, prompts, num_samples, max_new_tokens, generator, **how)
        return
    messages, unanswered = list(opening), 0
    for text in messages_of(typed_lines()):
        if text == '/exit':
            break
        if text == '/reset':
            messages = list(opening)
        if text == '/reset' or not text.strip():
            continue
        messages.append(dict(role='user', content=text.strip()))
        before = len(messages)
        ids = prompt_that_fits(tokenizer, messages, room, thinking)
        if ids is None:
            messages.pop()
            unanswered += 1
            print(f"(too long: question and answer {full})", file=sys.stderr)
            continue
        if len(messages) < before:
            print(f"(the context is full: {before - len(messages)} turns are forgotten)", file=sys.stderr)
        if num_samples > 1:
            print_answers(model, tokenizer, [text.strip()], [ids], num_samples, max_new_tokens, generator,
                          **how)
            messages = list(opening)
            continue
        stream = Stream(tokenizer, ids, known=known_length(model.config))
        for new in generate(model, torch.tensor([ids], device=device), max_new_tokens, tokenizer.ends,
                            generator, vocab_size=tokenizer.vocab_size, **how):
            print(stream.add(new.item()), end='', flush=True)
        is_full = not stream.ended and len(stream.new) < max_new_tokens
        print(stream.finish())
        if is_full:
            print(f"(stopped: the context of {context:,} tokens is full)", file=sys.stderr)
        thought, content = '', stream.text
        if thinking and (lead + content).startswith('<think>'):             # without an end, all is thought
            thought, _, content = (lead + content).removeprefix('<think>').partition('</think>')
        messages.append(dict(role='assistant', content=content.strip(), reasoning_content=thought.strip()))
    if unanswered and not sys.stdin.isatty():
        fail(f"{unanswered:,} questions have no answer: they are too long", code=1)


# ---- pictures ----

def print_candidates(tokenizer, logits, seen, new, **how):
    print(f"{'token':>24}  {'softmax':>8}  {'filtered':>8}")
    for i, before, after, removed_by in candidates(logits, seen, also=[int(new[0])], **how):
        note = f"removed by {removed_by}" if removed_by else '<- chosen' if i == new[0] else ''
        print(f"{tokenizer.decode([i])!r:>24}  {before:8.4f}  {after:8.4f}  {note}")


def token_label(tokenizer, i):
    """A token as a picture can show it: the font has no Chinese, so it's escaped, and $ is no mathematics."""
    return ascii(tokenizer.decode([i])).replace('$', r'\$')


def plot_distribution(path, logits, tokenizer, temperatures=(1, 0.1, 5), n=9):
    """Draw the n likeliest next tokens of logits (1, V) with their probability at each temperature."""
    top = logits[0].topk(min(n, logits.size(-1))).indices
    for axes in draw(path):
        for i, t in enumerate(temperatures):
            bars = torch.arange(len(top)) + 0.25 * (i - 1)
            axes.bar(bars, distribution(logits, t)[0, top].cpu(), width=0.25, label=f"temperature {t}")
        axes.set_xticks(range(len(top)), [token_label(tokenizer, j) for j in top.tolist()], rotation=60)
        axes.set_ylabel('probability')
        axes.legend()


# ---- out: a folder for transformers, a file for llama.cpp ----

def write_folder(model, tokenizer, folder):
    """Write a folder that AutoModelForCausalLM and AutoTokenizer of transformers load. ValueError if none of
    its models computes the same."""
    ids, ends = {f'{name}_id': i for name, i in tokenizer.special_ids.items()}, sorted(tokenizer.ends)
    ids['eos_token_id'] = ends if len(ends) > 1 else ends[0]
    tokenizer.generation.update(ids)
    tokenizer.words['model_max_length'] = model.config.context
    partial = partial_folder(folder)
    model.save_pretrained(partial, **ids)
    tokenizer.save(partial)
    make_folder(folder)
    for name in os.listdir(partial):
        os.replace(os.path.join(partial, name), os.path.join(folder, name))
    os.rmdir(partial)


# sizes: config.json's names of them, and GGUF's
SIZES = dict(
    n_layer='block_count', num_hidden_layers='block_count', n_positions='context_length',
    max_position_embeddings='context_length', n_embd='embedding_length', hidden_size='embedding_length',
    n_head='attention.head_count', num_attention_heads='attention.head_count', num_experts='expert_count',
    num_key_value_heads='attention.head_count_kv', layer_norm_epsilon='attention.layer_norm_epsilon',
    rms_norm_eps='attention.layer_norm_rms_epsilon', intermediate_size='feed_forward_length',
    num_experts_per_tok='expert_used_count', moe_intermediate_size='expert_feed_forward_length')


def gguf_sizes(config, arch):
    """What a GGUF file says of a model, {key: value}. ValueError if llama.cpp would compute anything else."""
    scaling = config.get('rope_scaling') or {}
    able = dict(activation_function=('gelu_new', 'gelu_pytorch_tanh'), norm_topk_prob=(True,),
                rope_type=('yarn', 'llama3') if arch == 'llama' else ('yarn',),
                beta_fast=(None, 32), beta_slow=(None, 1))
    for key, value in {**config, **scaling}.items():
        if key in able and value not in able[key]:
            raise ValueError(f"llama.cpp's {arch} knows no {key}={value!r}")
    sizes = {SIZES[key]: value for key, value in config.items() if key in SIZES}
    if arch == 'gpt2':
        sizes['feed_forward_length'] = 4 * config['n_embd']
    else:
        sizes.update(dict.fromkeys(('attention.key_length', 'attention.value_length', 'rope.dimension_count'),
                                   config['head_dim']))
        sizes['rope.freq_base'] = float(config['rope_theta'])
    if scaling and scaling.get('rope_type') != 'llama3':
        usual = 0.1 * math.log(max(scaling['factor'], 1)) + 1
        sizes.update({f'rope.scaling.{key}': value for key, value in dict(
            type='yarn', factor=float(scaling['factor']),
            attn_factor=(scaling.get('attention_factor') or usual) / usual,
            original_context_length=int(scaling['original_max_position_embeddings'])).items()})
    return {f'{arch}.{key}': value for key, value in sizes.items()}


def write_gguf(model, tokenizer, path):
    """Write one file that llama.cpp loads: matrices in the model's dtype, vectors in float32, as it wants
    them. ValueError if it would compute anything else than this model and its tokenizer."""
    import gguf
    config, state = model.to_hf()
    arch, D = config['model_type'].replace('_', ''), config.get('head_dim')
    about = {**gguf_sizes(config, arch), **gguf_words(tokenizer, config['vocab_size'])}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], about[f'{arch}.block_count'])
    if (config.get('rope_scaling') or {}).get('rope_type') == 'llama3':     # what divides each frequency
        (cos, sin), pairs = rope_table(model.config)[:, 1, :D // 2], torch.arange(0, D, 2) / D
        state['rope_freqs.weight'] = config['rope_theta'] ** -pairs / torch.atan2(sin, cos)
    stacks = {}                                         # {name: its tensors}: a mixture has one per expert
    for name, value in state.items():
        stacks.setdefault(re.sub(r'experts\.\d+', 'experts', name), []).append(value)
    with replacing(path) as new:
        writer, kinds = gguf.GGUFWriter(new, arch), gguf.GGUFValueType
        for key, value in about.items():
            writer.add_key_value(key, value, kinds.UINT32 if type(value) is int else kinds.get_type(value))
        for name, values in stacks.items():
            value, (layer, _, part) = values[0], name.rpartition('.')
            if '.experts.' in name:
                value = torch.stack(values)
            elif name.endswith(TRANSPOSED):
                value = value.T
            elif arch == 'llama' and layer.endswith(('q_proj', 'k_proj')):  # its RoPE pairs neighbours
                value = value.unflatten(0, (-1, 2, D // 2)).transpose(1, 2).flatten(0, 2)
            kind = {torch.bfloat16: 'BF16', torch.float16: 'F16'}.get(value.dtype)
            kind = gguf.GGMLQuantizationType[kind if kind and value.dim() > 1 else 'F32']
            array = gguf.quantize(value.float().cpu().numpy(), kind)
            writer.add_tensor(f'{names.get_name(layer) or layer}.{part}', array, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def export(model, tokenizer, target, write=write_folder):
    """Write a model and its tokenizer for others to load. One line if that cannot be."""
    try:
        check_weights(model.state_dict(), f"{target} in {next(model.parameters()).dtype}")
        write(model, tokenizer, target)
    except ValueError as e:
        fail(str(e))
    except OSError as e:
        fail(f"cannot write {target}: {e.strerror}", code=1 if e.errno in FULL else 2)


if __name__ == '__main__':
    configure(globals(), {
        'chat': 'system thinking', '!init_from': 'out_dir',
        '!export_dir': SPEAKING, '!export_gguf': f'{SPEAKING} export_dir',
        '!chat': 'start stop show_probs plot on_full use_cache'},
        num_samples=at_least(1), temperature=at_least(0), top_k=at_least(0), top_p=between(0, 1),
        min_p=between(0, 1), repetition_penalty=between(0.1, 10), on_full=one_of('stop', 'slide'))
    if export_dir:
        refuse_model(export_dir, 'export_dir')
    if os.path.exists(export_gguf):
        fail(f"--export_gguf={export_gguf} is there already: choose another name, or remove that")
    if export_gguf and not importlib.util.find_spec('gguf'):
        fail("--export_gguf needs a package: pip install gguf")
    int8 = dtype == 'int8'
    run = start_run(device, 'bfloat16' if int8 else dtype, seed)
    if int8 and (export_dir or export_gguf or run.device.type != 'cpu'):
        fail("--dtype=int8 is a way to decode on a CPU: for an export or a GPU choose --dtype=bfloat16")
    source = init_from or out_dir
    model, tokenizer, checkpoint = load_run(source, run.device, yarn_factor=yarn_factor,
                                            given=parse_given(weights_config))
    if target := export_dir or export_gguf:
        if dtype != 'auto':
            model.to(run.dtype)
        export(model, tokenizer, target, write_folder if export_dir else write_gguf)
        merged = ", its adapters merged" if 'adapters' in (checkpoint or {}) else ""
        print(f"wrote {target}{merged}, which {'transformers' if export_dir else 'llama.cpp'} loads")
        sys.exit()
    if int8 and model.config.use_moe:
        fail(f"--dtype=int8 is for dense models, {source} is a mixture of experts: choose --dtype=bfloat16")
    model = for_decoding(model, run.dtype, int8)
    if compile:
        compile_blocks(model)
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
               repetition_penalty=repetition_penalty)
    generator = torch.Generator(run.device).manual_seed(seed)
    if chat:
        converse(model, tokenizer, system, thinking, num_samples, max_new_tokens, generator, lines, **how)
        sys.exit()
    context = model.config.context
    text = read_prompt(start)
    texts = [line.rstrip('\r') for line in text.split('\n') if line.strip()] if lines else [text]
    if not texts:
        fail("--lines: the prompt has no line with text in it")
    if show_probs and len(texts) > 1:
        fail("--show_probs looks at one prompt; leave out --lines")
    # a prompt opens a document, so the token that did in training stands first
    prompts = [[tokenizer.bos, *tokenizer.encode(t)] for t in texts]
    longest = max(map(len, prompts))
    if longest > context and on_full == 'stop':
        which = f" {[*map(len, prompts)].index(longest) + 1} of --lines" if lines else ''
        fail(f"the prompt{which} has {longest:,} tokens, but the context of {source} is {context:,}: shorten "
             f"it, or let --on_full=slide cut it")
    tokens, padding = left_pad(prompts, run.device)
    if plot and not importlib.util.find_spec('matplotlib'):
        fail("--plot needs a package: pip install matplotlib")
    if plot:
        ids = prompts[0] if longest <= context else prompts[0][-max(1, context // 2):]      # as generate does
        with torch.no_grad():
            logits = model(torch.tensor([ids], device=run.device))[0][:, -1, :tokenizer.vocab_size]
        plot_distribution('next_token.png', logits, tokenizer)
        print("wrote next_token.png", file=sys.stderr)

    watch = (lambda *step: print_candidates(tokenizer, *step, **how)) if show_probs else None
    live = len(prompts) == 1 and not show_probs         # one text can be shown while it grows
    for i in range(num_samples):
        began = time.time()
        streams = [Stream(tokenizer, ids[1:], stop.split('|'), known_length(model.config)) for ids in prompts]
        if live:
            print('-' * 40 + '\n' if i else '', texts[0], sep='', end='', flush=True)
        steps = 0
        for new in generate(model, tokens, max_new_tokens, (), generator, padding, on_full,
                            tokenizer.vocab_size, use_cache, watch, **how):
            steps += 1
            for stream, token in zip(streams, new.tolist()):
                piece = stream.add(token)
                if live:
                    print(piece, end='', flush=True)
            if all(stream.ended for stream in streams):
                break
        full = steps < max_new_tokens and not all(stream.ended for stream in streams)
        for j, (stream, prompt) in enumerate(zip(streams, texts)):
            rest = stream.finish()
            print(rest if live else ('-' * 40 + '\n' if i or j else '') + prompt + stream.text)
        seconds = time.time() - began
        count = sum(len(stream.new) for stream in streams)
        note = f"; stopped: the context of {context:,} tokens is full" if full else ""
        print(f"({count:,} tokens in {seconds:.1f} s: {count / seconds:.1f} a second{note})", file=sys.stderr)
