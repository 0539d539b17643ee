"""
Generate text from a trained model (tutorial chapter I-6).

    python sample.py --start="def is_"                      # from out/pretrain
    python sample.py --out_dir=out/pretrain --start=FILE:prompt.txt --temperature=0
    echo "class Queue" | python sample.py --start=- --num_samples=3 --seed=7

A model gives each token a number, its logit; softmax turns them into the distribution of the next token.
Decoding picks from it: the likeliest token each time (greedy, temperature=0), or one at random, after
    temperature   divides the logits: below 1 sharper, above 1 flatter
    top_k         only the k likeliest tokens remain
    top_p         only the likeliest tokens that together reach probability p remain (Holtzman et al. 2020)
"""
import sys

import torch

from configurator import configure, fail, load_checkpoint, start_run
from model_minimind import MiniMind, MiniMindConfig
from prepare import load_tokenizer

out_dir = 'out/pretrain'    # folder of the run whose model speaks
start = 'def '              # prompt, or FILE:path, or '-' for standard input
num_samples = 1             # how many texts
max_new_tokens = 200        # longest continuation, in tokens
temperature = 0.7           # 0 is greedy: always the likeliest token
top_k = 0                   # keep only the k likeliest tokens; 0 keeps all
top_p = 0.95                # keep only the likeliest tokens up to this total probability; 1 keeps all
seed = 1337                 # same seed, same text
device = 'auto'             # 'auto' takes cuda, then mps, then cpu
dtype = 'auto'              # 'float32', 'bfloat16' or 'float16'; 'auto' is bfloat16 where that is fast


def choose(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Pick the next token of each row: logits (B, V) -> tokens (B,)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        kth = logits.topk(top_k).values[:, -1:]                             # (B, 1), the smallest that stays
        logits = logits.masked_fill(logits < kth, float('-inf'))
    if top_p < 1:
        ordered, index = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(dim=-1)
        drop = p.cumsum(dim=-1) - p >= top_p                                # what stands before reaches top_p
        drop[:, 0] = False                                                  # the likeliest always stays
        logits = logits.masked_fill(drop.scatter(1, index, drop), float('-inf'))
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).squeeze(1)


@torch.no_grad()
def generate(model, tokens, max_new_tokens, stop=(), generator=None, **how):
    """Continue a batch of prompts of equal length; yield the next token of every row, (B,), as it comes.

    tokens  (B, T) int64, at least one token; T must fit the model's context
    stop    ids at which a row ends; an ended row repeats its last token until all rows have ended
    how     temperature, top_k, top_p, as for `choose`
    Ends early when every row has met a stop id, or when the context is full.
    """
    B, T = tokens.shape
    cache = model.make_cache(B, min(T + max_new_tokens, model.config.max_position_embeddings))
    ended = torch.zeros(B, dtype=torch.bool, device=tokens.device)
    stop = torch.tensor(sorted(stop), dtype=torch.long, device=tokens.device)
    for _ in range(max_new_tokens):
        logits, _ = model(tokens, cache=cache)                          # first the prompt, then the new token
        new = torch.where(ended, tokens[:, -1], choose(logits[:, -1], generator=generator, **how))
        yield new
        ended = ended | torch.isin(new, stop)
        if ended.all() or cache.length == cache.max_tokens:
            return
        tokens = new[:, None]                                               # (B,) -> (B, 1)


def load_run(folder, device='cpu'):
    """The model of a run's folder, in evaluation mode, its tokenizer, and its checkpoint."""
    checkpoint = load_checkpoint(folder)
    tokenizer = load_tokenizer(folder)
    if tokenizer.fingerprint != checkpoint['tokenizer']:
        fail(f"{folder} holds another tokenizer than its model was trained with")
    model = MiniMind(MiniMindConfig(**checkpoint['model_config']))
    model.load_state_dict(checkpoint['model'])
    return model.to(device).eval(), tokenizer, checkpoint


def read_prompt(start):
    """The text of a prompt: itself, or from FILE:path or standard input ('-'), less one final newline."""
    if start != '-' and not start.startswith('FILE:'):
        return start
    where = 'standard input' if start == '-' else start[5:]
    try:
        if start == '-':
            text = sys.stdin.buffer.read()
        else:
            with open(where, 'rb') as f:
                text = f.read()
        return text.decode().removesuffix('\n')
    except OSError as e:
        fail(f"--start={start}: {e.strerror}")
    except UnicodeDecodeError as e:
        fail(f"{where}:{text[:e.start].count(10) + 1}: not UTF-8 (byte 0x{text[e.start]:02x})")


def stop_ids(tokenizer):
    """The ids that end a text: <|endoftext|> and, where there is one, <|im_end|>."""
    return {tokenizer.eot, tokenizer.im_end} - {None}


if __name__ == '__main__':
    configure(globals(), num_samples=1, max_new_tokens=1, temperature=0, top_k=0, top_p=[0, 1])
    run = start_run(device, dtype, seed)
    model, tokenizer, checkpoint = load_run(out_dir, run.device)
    model.to(run.dtype)
    # a prompt opens a document, so the token that ends the one before stands first, as it did in training
    ids = [tokenizer.eot, *tokenizer.encode(read_prompt(start))]
    context = model.config.max_position_embeddings
    if len(ids) > context:
        fail(f"the prompt has {len(ids):,} tokens, but the context of {out_dir} is {context:,}: shorten it")
    generator = torch.Generator(run.device).manual_seed(seed)
    for i in range(num_samples):
        print('-' * 40 + '\n' if i else '', end='')
        new, shown = [], tokenizer.decode(ids[1:])
        print(shown, end='', flush=True)
        for token in generate(model, torch.tensor([ids], device=run.device), max_new_tokens,
                              stop_ids(tokenizer), generator, temperature=temperature, top_k=top_k,
                              top_p=top_p):
            if token.item() in stop_ids(tokenizer):
                break
            new.append(token.item())
            text = tokenizer.decode(ids[1:] + new)
            # a character may take several tokens: until its last byte is there, it decodes as U+FFFD
            if not text.endswith('\ufffd'):
                print(text[len(shown):], end='', flush=True)
                shown = text
        print(tokenizer.decode(ids[1:] + new)[len(shown):])
        if len(ids) + len(new) > context:
            print(f"(stopped: the context of {context:,} tokens is full)", file=sys.stderr)
