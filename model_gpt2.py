"""
GPT-2 (Radford et al. 2019), a decoder-only transformer, from its parts to OpenAI's weights (tutorial chapters
I-2 to I-5; sinusoidal positions: II-3).

    tokens -> embedding + position -> n x [ x + Attention(LayerNorm(x)); x + FeedForward(LayerNorm(x)) ]
           -> LayerNorm -> logits

Read it downwards: the formulas, attention, feed-forward, block, model, weights. Where PyTorch has a kernel,
the model uses that; the formula is there to be read, and for the test that holds the two equal. Parameter
names are Hugging Face's.

    model = GPT2(GPT2Config())                            # GPT-2 small: 124,439,808 parameters
    logits, loss = model(tokens, targets)                 # (B, T) -> (B, T, V) and a scalar
    cache = model.make_cache(batch_size=1, max_tokens=512)
    logits, _ = model(prompt, cache=cache)                # prefill, in one piece or several
    logits, _ = model(next_token, cache=cache)            # then one token at a time
    model = GPT2.from_pretrained('gpt2')                  # OpenAI's weights, or a Hugging Face folder
    model.save_pretrained('folder')                       # transformers loads it

    python model_gpt2.py                                  # the model's size, part by part
    python model_gpt2.py --out_dir=out/verdict --export_dir=out/hf      # a run -> a Hugging Face folder
"""
import functools
import glob
import json
import math
import os
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

OFFICIAL = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')         # 124M, 355M, 774M, 1.6B parameters


@dataclass
class GPT2Config:
    """Sizes under Hugging Face's names; the defaults are OpenAI's small model (chapter I-4)."""
    vocab_size: int = 50257
    n_positions: int = 1024                # the context: how many positions there are
    n_embd: int = 768                      # C, the width of the residual stream
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02        # of new weights; 0: PyTorch's initialisation, as in chapter I-4
    dropout: float = 0.0                   # on embeddings, attention weights, and what each part adds
    qkv_bias: bool = True                  # False: query, key and value are purely linear, as in the chapters
    tie_word_embeddings: bool = True       # False: the output head has its own weights, as in the chapters
    positions: str = 'learned'             # or 'sinusoidal'

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        if self.positions not in ('learned', 'sinusoidal'):
            raise ValueError(f"positions must be 'learned' or 'sinusoidal', not {self.positions!r}")
        if self.positions == 'sinusoidal' and self.n_embd % 2:
            raise ValueError(f"n_embd {self.n_embd} is odd, but sinusoidal positions fill it with pairs")

    @property
    def context(self):
        """The longest sequence the model can read, in tokens."""
        return self.n_positions


# ---- the formulas ----

def sinusoidal_positions(positions, dim):
    """(positions, dim): sin(p / 10000^(2i/dim)) at 2i, the cosine of it at 2i + 1 (Vaswani et al. 2017,
    section 3.5; chapter II-3). Low dimensions turn fast, high ones slowly; nothing is learned."""
    frequencies = 10000 ** (-torch.arange(0, dim, 2).float() / dim)                    # (dim/2,)
    angles = torch.outer(torch.arange(positions).float(), frequencies)                 # (positions, dim/2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)                # (positions, dim)


def plain_layer_norm(x, weight, bias, eps=1e-5):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension (Ba et al. 2016; chapter
    I-4): each token by itself, so neither the batch nor the length of a text matters."""
    mean = x.mean(dim=-1, keepdim=True)
    variance = x.var(dim=-1, keepdim=True, correction=0)
    return (x - mean) / torch.sqrt(variance + eps) * weight + bias


def plain_gelu(x):
    """x times the probability that a standard normal number is below x, a smooth ReLU (Hendrycks & Gimpel
    2016; chapter I-4), in the tanh approximation that OpenAI used."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))


def plain_attention(q, k, v, allowed):
    """softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1; chapter I-3): each query takes a weighted mean
    of the values, and weighs a value by how well its key fits. The variance of the scores grows with D;
    divided by sqrt(D) it stays 1, and softmax does not saturate.

    q (..., T, D); k, v (..., S, D); allowed broadcasts to (..., T, S), True where a query may look.
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))                           # (..., T, S)
    return scores.masked_fill(~allowed, float('-inf')).softmax(dim=-1) @ v             # (..., T, D)


# ---- the parts ----

class KVCache:
    """Keys and values of the tokens already read, preallocated (chapter II-5).

    keys, values: one (B, H, max_tokens, D) tensor a layer. length: tokens held, the same for every row.
    padding (B,): how many tokens at the left of each row are padding. Rows of different length are padded on
    the left, so that all end together; what is hidden there is never looked at, and positions count from
    the first real token. Set it before the first call.
    """

    def __init__(self, config, batch_size, max_tokens, device, dtype):
        shape = (batch_size, config.n_head, max_tokens, config.n_embd // config.n_head)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.max_tokens = max_tokens
        self.length = 0
        self.padding = torch.zeros(batch_size, dtype=torch.long, device=device)

    def append(self, layer, k, v):
        """Store k, v (B, H, T, D) behind what is held; return all of them, (B, H, length + T, D)."""
        end = self.length + k.size(2)
        self.keys[layer][:, :, self.length:end] = k
        self.values[layer][:, :, self.length:end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Attention(nn.Module):
    """Causal multi-head self-attention (chapter I-3).

    One head       every token of x is turned into a query, a key and a value by three matrices: c_attn holds
                   them side by side. All three come from the same tokens: *self*-attention.
    Causal         a query looks at its own token and those before it; else it would see what it must predict.
    Multi-head     H heads of width D = C / H, each with its own weights of attention; their results, side by
                   side, are C wide again, and c_proj mixes them. It costs what one head of width C does.
    """

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, allowed=None, cache=None):
        """x (B, T, C) -> (B, T, C). allowed: what each query may look at; None is plain causal order."""
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2)        # (B, T, C) -> (B, H, T, D)
                   for part in self.c_attn(x).split(C, dim=-1))
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                          # (B, H, S, D), S = past + T
        # plain_attention, in a kernel that never stores the scores; dropout falls on the softmax
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))             # (B, H, T, D) -> (B, T, C)


class FeedForward(nn.Module):
    """Each token by itself: four times wider, GELU, and back (chapter I-4)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate='tanh'))


class Block(nn.Module):
    """One layer. What attention and feed-forward find is added to x, so the gradient reaches every layer
    undiminished along the sum (residual connections, He et al. 2015; chapter I-4)."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, allowed=None, cache=None):
        x = x + self.dropout(self.attn(self.ln_1(x), allowed, cache))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT2(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.n_positions, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, config.layer_norm_epsilon),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        for name, p in self.named_parameters() if config.initializer_range else ():
            if name.endswith('bias'):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                # matrices that write into the residual stream start smaller, as 2 x layers of them add up
                # there (Radford et al. 2019, section 2.3)
                shrink = math.sqrt(2 * config.n_layer) if name.endswith('c_proj.weight') else 1
                nn.init.normal_(p, std=config.initializer_range / shrink)
        if config.positions == 'sinusoidal':
            # of the size that token embeddings start with, which would drown beside much larger ones
            size = config.initializer_range or 1.0
            table = size * sinusoidal_positions(config.n_positions, config.n_embd)
            self.transformer.wpe = nn.Embedding.from_pretrained(table, freeze=True)

    def forward(self, tokens, targets=None, cache=None, segments=None):
        """Logits for the token after each token, and their mean loss.

        tokens    (B, T) int64
        targets   (B, T) int64, the token that follows each; -100 is ignored. With none at all the loss is 0.
        cache     a KVCache: `tokens` continue what it holds, and are added to it
        segments  (B, T) int64, the document each token of a packed row belongs to, ascending: attention stays
                  inside it and positions start anew in each, as if every document had a row of its own
        returns   logits (B, T, V); loss, the mean negative log-likelihood in nats over targets, or None
        """
        assert cache is None or segments is None, "a cache holds one document a row"
        B, T = tokens.shape
        past = cache.length if cache else 0
        limit = cache.max_tokens if cache else self.config.context
        if past + T > limit:
            raise ValueError(f"{past + T} tokens exceed the {'cache' if cache else 'context'} of {limit}")

        positions = torch.arange(past, past + T, device=tokens.device)                 # (T,)
        allowed = None
        if segments is not None:
            starts = torch.cat([torch.ones_like(segments[:, :1]), segments.diff(dim=1)], dim=1) != 0
            same = segments[:, :, None] == segments[:, None, :]                        # (B, T, T)
            allowed = (same & (positions <= positions[:, None]))[:, None]              # (B, 1, T, T)
            positions = positions - torch.where(starts, positions, 0).cummax(dim=1).values     # (B, T)
        elif cache is not None:
            keys = torch.arange(past + T, device=tokens.device)
            own = keys == positions[:, None]                                           # (T, S)
            real = keys >= cache.padding[:, None]                                      # (B, S)
            # itself, and what stands before it unless that is padding; a padding token must have something to
            # look at too, or its softmax is NaN
            allowed = (own | (keys < positions[:, None]) & real[:, None])[:, None]     # (B, 1, T, S)
            positions = (positions - cache.padding[:, None]).clamp(min=0)              # (B, T)

        x = self.transformer.wte(tokens) + self.transformer.wpe(positions)             # (B, T) -> (B, T, C)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, allowed, cache)
        logits = self.lm_head(self.transformer.ln_f(x))                                # (B, T, V)
        if cache is not None:
            cache.length += T
        if targets is None:
            return logits, None
        # in float32, but a piece at a time: a copy of all logits would be the largest tensor of the step, and
        # on a CPU the fresh memory for it costs more time than the sum itself
        loss = sum(F.cross_entropy(piece.float(), target, ignore_index=-100, reduction='sum')
                   for piece, target in zip(logits.flatten(0, 1).chunk(8), targets.flatten().chunk(8)))
        return logits, loss / (targets != -100).sum().clamp(min=1)

    def make_cache(self, batch_size, max_tokens):
        """An empty KV cache for `max_tokens` tokens, prompt and answer together."""
        if max_tokens > self.config.context:
            raise ValueError(f"a cache of {max_tokens} tokens is larger than the context of "
                             f"{self.config.context}")
        weight = self.lm_head.weight
        return KVCache(self.config, batch_size, max_tokens, weight.device, weight.dtype)

    # ---- weights in Hugging Face's layout ----

    @classmethod
    def from_pretrained(cls, source):
        """The model of a Hugging Face folder (config.json; .safetensors or .bin), or one of OFFICIAL, which
        are downloaded once. On the CPU, float32, in evaluation mode.

        Raises OSError, ImportError or ValueError with one line if it cannot be had or is no such GPT-2.
        """
        folder = download_official(source) if source in OFFICIAL else source
        with open(os.path.join(folder, 'config.json'), encoding='utf-8') as f:
            config = config_from_hf(json.load(f), folder)
        with torch.device('meta'):                      # shapes alone: no memory, no random numbers
            model = cls(config)
        state = {}
        for name, value in read_weights(folder).items():
            name = name if name.startswith(('transformer.', 'lm_head.')) else f'transformer.{name}'
            # the causal mask was stored as a buffer once; zero biases stand in for none; a tied head is wte
            if not (name.endswith(('.attn.bias', '.attn.masked_bias'))
                    or name.endswith('.c_attn.bias') and not config.qkv_bias
                    or name == 'lm_head.weight' and config.tie_word_embeddings):
                state[name] = (value.T if is_conv1d(name) else value).float().contiguous()
        if config.tie_word_embeddings and 'transformer.wte.weight' in state:
            state['lm_head.weight'] = state['transformer.wte.weight']
        for name, p in model.state_dict().items():
            if name not in state or state[name].shape != p.shape:
                found = tuple(state[name].shape) if name in state else 'missing'
                raise ValueError(f"{folder}: {name} is {found}, but config.json asks for {tuple(p.shape)}")
        if unknown := sorted(set(state) - set(model.state_dict())):
            raise ValueError(f"{folder}: {unknown[0]} has no place in a GPT-2 of {config.n_layer} layers")
        model.load_state_dict(state, assign=True)
        if config.tie_word_embeddings:
            model.lm_head.weight = model.transformer.wte.weight
        return model.eval()

    def save_pretrained(self, folder, **extra):
        """Write config.json, with `extra` in it, and the weights as GPT2LMHeadModel of transformers loads
        them: model.safetensors where that package is installed, else pytorch_model.bin."""
        os.makedirs(folder, exist_ok=True)
        config = asdict(self.config)
        config.update(dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), self.config.dropout),
                      model_type='gpt2', architectures=['GPT2LMHeadModel'], activation_function='gelu_new',
                      **extra)
        with open(os.path.join(folder, 'config.json'), 'w', encoding='utf-8') as f:
            json.dump(config, f, indent=2)
        state = {name: (value.T if is_conv1d(name) else value).detach().cpu().contiguous()
                 for name, value in self.state_dict().items()
                 if not (name == 'lm_head.weight' and self.config.tie_word_embeddings)}
        if not self.config.qkv_bias:                    # transformers always has them: zeros are the same
            state.update({f'transformer.h.{i}.attn.c_attn.bias': torch.zeros(3 * self.config.n_embd)
                          for i in range(self.config.n_layer)})
        try:
            from safetensors.torch import save_file
        except ImportError:
            torch.save(state, os.path.join(folder, 'pytorch_model.bin'))
        else:
            save_file(state, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})


def is_conv1d(name):
    """Whether Hugging Face keeps this matrix as (in, out), the transpose of nn.Linear's (out, in)."""
    return name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))


def config_from_hf(config, folder):
    """The GPT2Config of a config.json; ValueError for what this model does not do."""
    if config.get('model_type') != 'gpt2':
        raise ValueError(f"{folder}: config.json describes a {config.get('model_type')!r}, not a 'gpt2'")
    known = dict(activation_function=('gelu_new', 'gelu_pytorch_tanh'), n_inner=(None, 4 * config['n_embd']),
                 scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,),
                 add_cross_attention=(False,))
    for key, values in known.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f"{folder}: config.json has {key}={config[key]!r}, GPT-2 has {values[0]!r}")
    own = {key: config[key] for key in GPT2Config.__dataclass_fields__ if key in config}
    return GPT2Config(**{'dropout': config.get('resid_pdrop', 0.1), **own})


def read_weights(folder):
    """{name: tensor} of all weight files in a folder, mapped into memory rather than read."""
    folder = os.fspath(folder)
    files = sorted(glob.glob(os.path.join(glob.escape(folder), 'model*.safetensors')))
    load = functools.partial(torch.load, map_location='cpu', mmap=True, weights_only=True)
    if files:
        try:
            from safetensors.torch import load_file as load
        except ImportError:
            raise ImportError(f"{files[0]} needs a package: pip install safetensors") from None
    files = files or sorted(glob.glob(os.path.join(glob.escape(folder), 'pytorch_model*.bin')))
    if not files:
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin")
    weights = {}
    for file in files:
        try:
            weights.update(load(file))
        except Exception as e:                          # each library has kinds of its own for a broken file
            raise ValueError(f"{file} cannot be read ({type(e).__name__}: {str(e)[:80]})") from e
    return weights


def download_official(name):
    """The folder of OpenAI's weights in Hugging Face's cache, downloaded when missing."""
    import huggingface_hub
    huggingface_hub.logging.set_verbosity_error()       # it logs each retry; the error below says it once
    try:
        import safetensors  # noqa: F401  (is it there?)
        weights = 'model.safetensors'
    except ImportError:
        weights = 'pytorch_model.bin'
    repo, files = f'openai-community/{name}', ('config.json', weights)
    try:
        paths = [huggingface_hub.hf_hub_download(repo, file) for file in files]
    except OSError as e:
        raise OSError(f"cannot download {name} ({type(e).__name__}): put config.json, {weights} and "
                      f"tokenizer.json of huggingface.co/{repo} into a folder, and name that instead") from e
    return os.path.dirname(paths[0])


# settings of the export
out_dir = ''            # folder of the run to export; '' prints the sizes of GPT-2 small
export_dir = ''         # folder to write for transformers: config.json, weights, tokenizer

if __name__ == '__main__':
    from configurator import configure, fail
    from sample import load_run
    configure(globals())
    if bool(out_dir) != bool(export_dir):
        fail("an export takes both --out_dir=RUN and --export_dir=FOLDER")
    if export_dir:
        model, tokenizer, _ = load_run(out_dir)
        try:
            model.save_pretrained(export_dir, bos_token_id=tokenizer.eot, eos_token_id=tokenizer.eot)
            tokenizer.save(export_dir)
        except OSError as e:
            fail(f"cannot write {export_dir}: {e.strerror}")
        print(f"wrote {export_dir}, which AutoModelForCausalLM.from_pretrained of transformers loads")
    else:
        parts, model = {}, GPT2(GPT2Config())
        for name, p in model.named_parameters():
            part = name.split('.')[3] if '.h.' in name else name.split('.')[1]
            parts[part] = parts.get(part, 0) + p.numel()
        for part, count in [*parts.items(), ('total', sum(parts.values()))]:
            print(f"{part:25}{count:12,}")
