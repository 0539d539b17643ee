"""
GPT-2 (Radford et al. 2019), a decoder-only transformer (chapters I-2 to I-5).

    tokens -> embedding + position -> n x [ x + Attention(LayerNorm(x)); x + FeedForward(LayerNorm(x)) ]
           -> LayerNorm -> logits

Read it from the top: formulas, parts, model, formats of the weights. Where PyTorch has a kernel, the model
uses it; the formula beside it is to be read, and a test holds the two equal. Parameter names are Hugging
Face's. From configurator.py come only the functions that read, check and write files of weights.

    model = GPT2(GPT2Config())                            # GPT-2 small: 124,439,808 parameters
    logits, _ = model(tokens)                             # (B, T) -> (B, T, V)
    _, loss = model(tokens, targets)                      # a scalar; in training it has no logits
    cache = model.make_cache(batch_size=1, max_tokens=512)
    logits, _ = model(tokens, cache=cache)                # the prompt, in pieces or whole; then new tokens
    model = GPT2.from_pretrained('gpt2')                  # OpenAI's weights, or a Hugging Face folder
    model.save_pretrained('folder')                       # transformers loads it

    python model_gpt2.py                                  # the number of parameters, part by part
"""
import importlib.util
import math
import os
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import build_model, check_sizes, read_file, read_json, read_weights, write_model

OFFICIAL = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')         # 124M, 355M, 774M, 1.6B parameters
GELU = dict(gelu_new='tanh', gelu_pytorch_tanh='tanh', gelu='none')     # transformers' names, PyTorch's


@dataclass
class GPT2Config:
    """Sizes under Hugging Face's names; the defaults are OpenAI's small model (chapter I-4)."""
    vocab_size: int = 50257
    n_positions: int = 1024                # the context: how many positions there are
    trained_length: int = 0                # tokens of the longest rows it was trained on; 0 is unknown
    n_embd: int = 768                      # C, the width of the residual stream
    n_layer: int = 12
    n_head: int = 12
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02        # of new weights; 0: PyTorch's initialisation, as in chapter I-4
    dropout: float = 0.0                   # on embeddings, attention weights, and what each part adds
    bias: bool = True                      # False: no biases anywhere, in LayerNorm neither
    qkv_bias: bool = True                  # False: query, key and value are purely linear, as in the chapters
    activation_function: str = 'gelu_new'  # GELU in OpenAI's approximation, or exact: 'gelu' (nanoGPT)
    tie_word_embeddings: bool = True       # False: the output head has its own weights, as in the chapters
    unseen = ('activation_function',)                          # by nanoGPT's ckpt.pt; these 4 are no fields
    model_type = 'gpt2'
    use_moe = False                                            # GPT-2 has no experts
    context = property(lambda self: self.n_positions)          # the longest sequence it can read, in tokens

    def __post_init__(self):
        check_sizes(self, n_layer=1000, dropout=1)
        self.qkv_bias = self.qkv_bias and self.bias
        if self.activation_function not in GELU:
            raise ValueError(f"GPT-2 has no activation_function={self.activation_function!r}: {[*GELU]}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")


# ---- the formulas ----

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

    keys, values: one (B, H, max_tokens, D) tensor per layer. length: tokens held, the same for every row; as
    a tensor it is for a step that is recorded, see sample.py, and all of the cache is looked at, masked.
    padding (B,): how many tokens at the left of each row are padding, None for none; set it before the first
    call. Rows of different length are padded there, so that all end together. Padding is never looked at, and
    positions count from the first real token. like: a tensor on the device and of the dtype to store them in.
    """

    def __init__(self, config, batch_size, max_tokens, like):
        if max_tokens > config.context:
            raise ValueError(f"a cache of {max_tokens} tokens is larger than the context of {config.context}")
        shape = (batch_size, config.n_head, max_tokens, config.n_embd // config.n_head)
        self.keys = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.values = [like.new_zeros(shape) for _ in range(config.n_layer)]
        self.max_tokens, self.length, self.padding = max_tokens, 0, None

    def layer(self, i):
        """Keys and values of layer i, (B, H, max_tokens, D), and how many tokens they hold."""
        return self.keys[i], self.values[i], self.length


def append(past, k, v):
    """Store k, v (B, H, T, D) behind what a layer of the cache holds; all of it is (B, H, length + T, D)."""
    keys, values, length = past
    if torch.is_tensor(length):                         # always the same memory: a mask hides what is empty
        at = length + torch.arange(k.size(2), device=k.device)
        keys[:, :, at], values[:, :, at] = k, v
        return keys, values
    end = length + k.size(2)
    keys[:, :, length:end], values[:, :, length:end] = k, v
    return keys[:, :, :end], values[:, :, :end]


class Attention(nn.Module):
    """Causal multi-head self-attention (chapter I-3).

    One head       three matrices, side by side in c_attn, turn each token of x into a query, a key and a
                   value. All three come from the same tokens: *self*-attention.
    Causal         a query looks at its own token and those before it; else it would see what it must predict.
    Multi-head     H heads of width D = C / H, each with its own attention weights. Their results, side by
                   side, are C wide again, and c_proj mixes them. The cost is that of one head of width C.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, allowed=None, past=None):
        """x (B, T, C) -> (B, T, C). allowed: what each query may look at; None is plain causal order. past:
        the layer of the cache, to which keys and values are added."""
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2)        # (B, T, C) -> (B, H, T, D)
                   for part in self.c_attn(x).split(C, dim=-1))
        if past is not None:
            k, v = append(past, k, v)                                      # (B, H, S, D), S = length + T
        # plain_attention, in a kernel that never stores the scores; dropout falls on the softmax
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=T > 1 and allowed is None,
                                           dropout_p=self.dropout if self.training else 0.0)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))             # (B, H, T, D) -> (B, T, C)


class FeedForward(nn.Module):
    """Each token by itself: four times wider, GELU, and back (chapter I-4)."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.approximate = GELU[config.activation_function]

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    """One layer. What attention and feed-forward find is added to x, so the gradient reaches every layer
    undiminished along the sum (residual connections, He et al. 2015; chapter I-4)."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, allowed=None, past=None):
        x = x + self.dropout(self.attn(self.ln_1(x), allowed, past))
        return x + self.dropout(self.mlp(self.ln_2(x)))


# ---- the model ----

def positions_and_mask(tokens, cache, segments, context):
    """The position of each token, (1, T) or (B, T), and what each query may look at, (B, 1, T, S) bool; None
    is plain causal order, in which a single token sees all before it. S counts the tokens in the cache too.
    tokens, cache, segments: as in forward."""
    assert cache is None or segments is None, "a cache holds one document per row"
    past, limit = (cache.length, cache.max_tokens) if cache else (0, context)
    recorded = torch.is_tensor(past)
    end = limit if recorded else past + tokens.size(1)
    if end > limit:
        raise ValueError(f"{end} tokens exceed the {'cache' if cache else 'context'} of {limit}")
    positions = past + torch.arange(tokens.size(1), device=tokens.device)[None]        # (1, T)
    padding = cache.padding if cache else None
    if segments is None and padding is None and not recorded and (past == 0 or tokens.size(1) == 1):
        return positions, None
    keys = torch.arange(end, device=tokens.device)                                     # (S,)
    itself, before = keys == positions.mT, keys < positions.mT                         # (T, S)
    if segments is not None:
        seen = segments[:, :, None] == segments[:, None, :]                            # (B, T, S), S = T
        starts = F.pad(segments.diff(dim=1), (1, 0), value=1) != 0                     # (B, T)
        first = torch.where(starts, positions, 0).cummax(dim=1).values                 # (B, T)
    else:
        first = positions.new_zeros(1, 1) if padding is None else padding[:, None]     # (B or 1, 1)
        seen = (keys >= first)[:, None]                                                # (B or 1, 1, S)
    # each token sees itself, padding too, or its softmax would be NaN
    return (positions - first).clamp(min=0), (itself | before & seen)[:, None]


def plain_loss(logits, targets):
    """Mean negative log-likelihood, in nats, of targets (B, T) under logits (B, T, V), in float32; -100 is
    ignored, and with nothing else it is 0 (chapter I-5)."""
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction='sum')
    return total / (targets != -100).sum().clamp(min=1)


class HeadLoss(torch.autograd.Function):
    """The sum in plain_loss, from the rows (N, C) that the head is given and its weight (V, C). All logits at
    once would be the largest tensor of a step: they exist for 1,024 rows at a time, and their gradient,
    softmax - one-hot, is made in their place and used up at once, on the way forward. On a CPU new memory
    takes longer than the sum, so pieces share theirs. The gradient of the weight is a sum in float32."""

    @staticmethod
    def forward(ctx, rows, weight, targets, dtype, train):
        into_rows, into_weight = (torch.zeros_like(tensor) if train and needed else None
                                  for tensor, needed in zip((rows, weight), ctx.needs_input_grad))
        V, total = len(weight), weight.new_zeros((), dtype=torch.float32)
        weight = weight.to(dtype)
        if V % 64:                                  # a GPU multiplies fast in multiples of 64, see nanoGPT
            weight = F.pad(weight, (0, 0, 0, -V % 64))
        full = weight.new_empty(min(1024, len(rows)), len(weight), dtype=torch.float32)
        half = full if dtype == torch.float32 else weight.new_empty(full.shape)
        for i in range(0, len(rows), 1024):
            piece, own = rows[i:i + 1024].to(dtype), targets[i:i + 1024, None]         # (n, C), (n, 1)
            counted, own = own != -100, own.clamp(min=0)
            logits = torch.mm(piece, weight.mT, out=half[:len(piece)])                 # (n, V and padding)
            logits[:, V:].fill_(-math.inf)
            x = full[:len(piece)].copy_(logits)
            top, mine = x.amax(1, keepdim=True), x.gather(1, own)                      # (n, 1)
            s = x.sub_(top).exp_().sum(1, keepdim=True)
            total = total + ((top + s.log() - mine) * counted).sum()
            if into_rows is not None or into_weight is not None:
                slope = logits.copy_(x.div_(s).scatter_add_(1, own, -torch.ones_like(s)))
            if into_rows is not None:
                into_rows[i:i + 1024] = slope @ weight * counted
            if into_weight is not None:
                into_weight += (slope.mT @ (piece * counted))[:V]
        ctx.save_for_backward(into_rows, into_weight)
        return total

    @staticmethod
    def backward(ctx, slope):
        rows, weight = (gradient if gradient is None else gradient.mul_(slope)
                        for gradient in ctx.saved_tensors)
        return rows, weight, None, None, None


def head_loss(x, weight, targets):
    """plain_loss of the logits x @ weight.T, for x (B, T, C). On a CPU only tokens that are targets are given
    to the head: a GPU would have to be waited for, to know how many those are."""
    device, rows, targets = x.device.type, x.flatten(0, 1), targets.flatten()
    n = (targets != -100).sum()
    if device == 'cpu' and not torch.compiler.is_compiling():
        found = (targets != -100).nonzero()[:, 0]
        rows, targets = rows.index_select(0, found), targets.index_select(0, found)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return HeadLoss.apply(rows, weight, targets, dtype, torch.is_grad_enabled()) / n.clamp(min=1)


class GPT2(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.n_positions, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
            ln_f=nn.LayerNorm(config.n_embd, config.layer_norm_epsilon, bias=config.bias),
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

    def forward(self, tokens, targets=None, cache=None, segments=None, head=True):
        """Logits for the token after each token, and their mean loss.

        tokens    (B, T) int64
        targets   (B, T) int64, the token that follows each; -100 is ignored. With none at all the loss is 0.
        cache     a KVCache: `tokens` continue what it holds, and are added to it
        segments  (B, T) int64, the document of each token in a packed row, ascending: attention stays inside
                  it and positions start anew in each, as if every document had a row of its own
        head      False: return what the output head would be given, (B, T, C), in place of logits
        returns   logits (B, T, V), None in training with targets, where they never exist as a whole; loss,
                  the mean negative log-likelihood in nats over targets, or None
        """
        positions, allowed = positions_and_mask(tokens, cache, segments, self.config.context)
        x = self.transformer.wte(tokens) + self.transformer.wpe(positions)             # (B, T) -> (B, T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h):
            x = block(x, allowed, cache and cache.layer(i))
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.length += tokens.size(1)
        loss = None if targets is None else head_loss(x, self.lm_head.weight, targets)
        if self.training and loss is not None:
            return None, loss
        return self.lm_head(x) if head else x, loss                                    # (B, T, V)

    def auxiliary_loss(self, counted):
        """0.0: only a mixture of experts, as in MiniMind, has routers to balance."""
        return 0.0

    def make_cache(self, batch_size, max_tokens):
        """An empty KV cache for `max_tokens` tokens, prompt and answer together."""
        return KVCache(self.config, batch_size, max_tokens, like=self.transformer.wte.weight)

    @classmethod
    def from_pretrained(cls, source, **changes):
        """The model of a Hugging Face folder, of a ckpt.pt of nanoGPT's, or one of OFFICIAL, which are
        downloaded once: on the CPU, float32, in evaluation mode. changes: of its config. Raises OSError,
        ImportError or ValueError with one line."""
        folder = download_official(source) if source in OFFICIAL else source
        state = read_weights(folder)
        if os.path.isfile(folder):
            config = config_from_nanogpt(read_file(folder).get('model_args'), state, folder)
            state = {name: value for name, value in state.items() if not name.endswith(MASKS)}
        else:
            config = config_from_hf(read_json(os.path.join(folder, 'config.json')), folder)
            state = weights_from_hf(state, config)
        return build_model(cls, replace(config, **changes), state, folder)

    def save_pretrained(self, folder, **extra):
        """Write a folder that GPT2LMHeadModel of transformers loads. extra: more for its config.json."""
        config, state = self.to_hf()
        write_model(folder, {**config, **extra}, state)

    def to_hf(self):
        """(config.json as a dict, {name: tensor}) as transformers has them."""
        dropouts = dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), self.config.dropout)
        config = {**asdict(self.config), **dropouts, **FIXED_KEYS, 'n_ctx': self.config.context}
        return config, weights_to_hf(self.state_dict(), self.config)


# ---- formats of the weights ----

FIXED_KEYS = dict(model_type='gpt2', architectures=['GPT2LMHeadModel'])
# config.json: what these may be, the first if they are missing; this model does nothing else
REQUIRED = dict(scale_attn_weights=(True,), scale_attn_by_inverse_layer_idx=(False,),
                add_cross_attention=(False,))
TRANSPOSED = ('c_attn.weight', 'c_proj.weight', 'c_fc.weight')      # (in, out) in files, here (out, in)
MASKS = ('.attn.bias', '.attn.masked_bias')                         # causal masks in older files


def config_from_hf(config, folder):
    """The GPT2Config of a config.json; ValueError for what this model does not do."""
    if config.get('model_type') != 'gpt2':
        raise ValueError(f"{folder}: config.json describes a {config.get('model_type')!r}, not a 'gpt2'")
    given = {key: config[key] for key in GPT2Config.__dataclass_fields__ if key in config}
    own = GPT2Config(**{'dropout': config.get('resid_pdrop', 0.1), **given})
    for key, values in dict(REQUIRED, n_inner=(None, 4 * own.n_embd)).items():
        if config.get(key, values[0]) not in values:
            raise ValueError(f"{folder}: config.json has {key}={config[key]!r}, GPT-2 has {values[0]!r}")
    return own


def config_from_nanogpt(sizes, state, file):
    """The GPT2Config of the model_args and weights of nanoGPT's ckpt.pt, which has our names and layout."""
    try:
        return GPT2Config(
            **{key: sizes[key] for key in ('vocab_size', 'n_embd', 'n_layer', 'n_head')},
            n_positions=sizes['block_size'], bias='transformer.ln_f.bias' in state,
            activation_function='gelu')                 # since May 2023
    except (KeyError, TypeError) as e:
        raise ValueError(f"{file}: its model_args describe no GPT-2 ({type(e).__name__}: {e})") from None


def weights_from_hf(state, config):
    """{name: tensor} as this model has them, from a file's."""
    # OpenAI's files also hold the causal mask; zeros stand in for a bias that the model has not
    zeros = ('.c_attn.bias',) * (not config.qkv_bias) + ('.bias',) * (not config.bias)
    named = {name if name.startswith(('transformer.', 'lm_head.')) else f'transformer.{name}': value
             for name, value in state.items() if not name.endswith(MASKS)
             and not (name.endswith(zeros) and not value.any())}
    return {name: value.T if name.endswith(TRANSPOSED) and value.dim() == 2 else value
            for name, value in named.items()}


def weights_to_hf(state, config):
    """The reverse of weights_from_hf. A tied head is left out: transformers takes it from wte."""
    theirs = {name: value.T if name.endswith(TRANSPOSED) else value for name, value in state.items()
              if not (name == 'lm_head.weight' and config.tie_word_embeddings)}
    for name, value in state.items():                   # transformers always has biases: zeros are the same
        if '.ln_' in name or '.c_' in name:
            theirs.setdefault(f"{name.rpartition('.')[0]}.bias", torch.zeros(len(value)))
    return theirs


def download_official(name):
    """The folder of OpenAI's weights in Hugging Face's cache, downloaded when missing."""
    import huggingface_hub
    huggingface_hub.logging.set_verbosity_error()       # it logs each retry; the error below says it once
    weights = 'model.safetensors' if importlib.util.find_spec('safetensors') else 'pytorch_model.bin'
    repo = f'openai-community/{name}'
    try:
        paths = [huggingface_hub.hf_hub_download(repo, file) for file in ('config.json', weights)]
    except OSError as e:
        raise OSError(f"cannot download {name} ({type(e).__name__}): put config.json, {weights} and "
                      f"tokenizer.json of huggingface.co/{repo} into a folder, and name that instead") from e
    return os.path.dirname(paths[0])


if __name__ == '__main__':
    parts = {}
    for name, p in GPT2(GPT2Config()).named_parameters():
        part = name.split('.')[3] if '.h.' in name else name.split('.')[1]
        parts[part] = parts.get(part, 0) + p.numel()
    for part, count in [*parts.items(), ('total', sum(parts.values()))]:
        print(f"{part:25}{count:12,}")
