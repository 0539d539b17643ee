"""
MiniMind: a Llama-style decoder, read top to bottom (tutorial chapters II-2 to II-7).

    tokens -> embedding -> n x [ x + Attention(RMSNorm(x)); x + FeedForward(RMSNorm(x)) ] -> RMSNorm -> logits

What separates it from GPT-2: RMSNorm for LayerNorm, rotary positions (RoPE) for learned ones, grouped-query
attention for multi-head, SwiGLU for GELU, no biases, and an output head that shares the embedding's weights.
Parameter names are MiniMind's own, which are also Llama's.

    model = MiniMind(MiniMindConfig())                    # MiniMind's default: 25,829,888 parameters
    logits, loss = model(tokens, targets)                 # (B, T) -> (B, T, V) and a scalar
    cache = model.make_cache(batch_size=1, max_tokens=512)
    logits, _ = model(prompt, cache=cache)                # prefill, in one piece or several
    logits, _ = model(next_token, cache=cache)            # then one token at a time

`python model_minimind.py` prints the model's size, part by part.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F


@dataclass
class MiniMindConfig:
    """Sizes under Hugging Face's names; the defaults are MiniMind's small model (chapter II-7)."""
    vocab_size: int = 6400
    hidden_size: int = 512                 # C, the width of the residual stream
    intermediate_size: int = 0             # width inside the feed-forward; 0 is 8/3 x hidden_size, up to 64
    num_hidden_layers: int = 8
    num_attention_heads: int = 8           # query heads
    num_key_value_heads: int = 2           # as many as query heads: multi-head; 1: multi-query; else grouped
    head_dim: int = 0                      # D; 0 is hidden_size / num_attention_heads
    max_position_embeddings: int = 32768   # the context: how many positions RoPE is prepared for
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    qk_norm: bool = False                  # RMSNorm on each head's query and key (MiniMind-3, Qwen3)
    tie_word_embeddings: bool = True
    dropout: float = 0.0

    def __post_init__(self):
        # 8/3, because SwiGLU has three matrices where a feed-forward of width 4C has two: 3 x 8/3 = 2 x 4
        self.intermediate_size = self.intermediate_size or 64 * math.ceil(self.hidden_size * 8 / 3 / 64)
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                                 f"{self.num_attention_heads}")
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, but RoPE turns numbers in pairs")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")

    @property
    def context(self):
        """The longest sequence the model can read, in tokens."""
        return self.max_position_embeddings


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, eq. 4; chapter II-2).

    It is LayerNorm without the mean and the bias: on input of zero mean the two agree.
    """

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        # in float32 whatever x is: squares of half-precision numbers overflow or vanish
        h = x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.eps)
        return (h * self.weight).type_as(x)


def rope_table(head_dim, positions, theta):
    """cos and sin of position x frequency, each (positions, head_dim), float32.

    Pair i turns at theta^(-2i/D) radians per position (Su et al. 2021, section 3.2.2; chapter II-4).
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2).float() / head_dim)          # (D/2,)
    angles = torch.outer(torch.arange(positions).float(), frequencies)                 # (positions, D/2)
    angles = torch.cat([angles, angles], dim=-1)                                       # (positions, D)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate each pair (x_i, x_{i+D/2}) of x by its angle: R(m)q . R(n)k depends on n - m alone.

    x (B, heads, T, D); cos, sin broadcast to (B, 1, T, D). Llama's layout: the two halves of a head form the
    pairs, where the paper pairs neighbours. That only permutes the weights, and needs no interleaving.
    """
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).type_as(x)


def plain_attention(q, k, v, allowed):
    """softmax(q k^T / sqrt(D)) v, written out (Vaswani et al. 2017, eq. 1). It is here to be read, and for
    the test that holds the fused kernel equal to it; the kernel never stores the (T, S) scores.

    q (B, H, T, D); k, v (B, H_kv, S, D); allowed (T, S) or (B, 1, T, S), True where a query may look.
    """
    group = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)        # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))                           # (B, H, T, S)
    return scores.masked_fill(~allowed, float('-inf')).softmax(dim=-1) @ v             # (B, H, T, D)


class KVCache:
    """Keys and values of the tokens already read, preallocated (chapter II-5).

    keys, values: one (B, H_kv, max_tokens, D) tensor a layer. length: tokens held, the same for every row.
    padding (B,): how many tokens at the left of each row are padding. Rows of different length are padded on
    the left, so that all end together; what is hidden there is never looked at, and positions count from
    the first real token. Set it before the first call.
    """

    def __init__(self, config, batch_size, max_tokens, device, dtype):
        shape = (batch_size, config.num_key_value_heads, max_tokens, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.values = [torch.zeros(shape, device=device, dtype=dtype) for _ in layers]
        self.max_tokens = max_tokens
        self.length = 0
        self.padding = torch.zeros(batch_size, dtype=torch.long, device=device)

    def append(self, layer, k, v):
        """Store k, v (B, H_kv, T, D) behind what is held; return all of them, (B, H_kv, length + T, D)."""
        end = self.length + k.size(2)
        self.keys[layer][:, :, self.length:end] = k
        self.values[layer][:, :, self.length:end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share one key and value head (Ainslie et al. 2023;
    chapter II-5): num_attention_heads / num_key_value_heads times less cache than multi-head attention."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.head_dim, self.dropout = config.head_dim, config.dropout
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, x, cos, sin, allowed=None, cache=None):
        """x (B, T, C) -> (B, T, C). allowed: what each query may look at; None is plain causal order."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)   # (B, T, C) -> (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)   # (B, T, C) -> (B, H_kv, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k = apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)                          # (B, H_kv, S, D), S = past + T
        # plain_attention, in a kernel that never stores the scores
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=allowed is None,
                                           dropout_p=self.dropout if self.training else 0.0, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))            # (B, H, T, D) -> (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer. The norms stand before attention and feed-forward, so the residual stream x runs through
    the whole model untouched but for what each part adds to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, allowed=None, cache=None):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, allowed, cache))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class MiniMind(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            dropout=nn.Dropout(config.dropout),
            layers=nn.ModuleList([Block(config, layer) for layer in range(config.num_hidden_layers)]),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        ))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        cos, sin = rope_table(config.head_dim, config.max_position_embeddings, config.rope_theta)
        self.register_buffer('rope_cos', cos, persistent=False)   # (positions, D), computed, so not saved
        self.register_buffer('rope_sin', sin, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # matrices that write into the residual stream start smaller, as 2 x layers of them add up
                # there (Radford et al. 2019, section 2.3)
                into_stream = name.endswith(('o_proj.weight', 'down_proj.weight'))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.num_hidden_layers if into_stream else 1))

    def forward(self, tokens, targets=None, cache=None):
        """Logits for the token after each token, and their mean loss.

        tokens   (B, T) int64
        targets  (B, T) int64, the token that follows each; -100 is ignored. With none at all the loss is 0.
        cache    a KVCache: `tokens` continue what it holds, and are added to it
        returns  logits (B, T, V); loss, the mean negative log-likelihood in nats over targets, or None
        """
        B, T = tokens.shape
        past = cache.length if cache else 0
        limit = cache.max_tokens if cache else self.config.max_position_embeddings
        if past + T > limit:
            raise ValueError(f"{past + T} tokens exceed the {'cache' if cache else 'context'} of {limit}")

        positions = torch.arange(past, past + T, device=tokens.device)                 # (T,)
        if cache is None:
            allowed, cos, sin = None, self.rope_cos[positions], self.rope_sin[positions]     # (T, D)
        else:
            keys = torch.arange(past + T, device=tokens.device)
            own = keys == positions[:, None]                                           # (T, S)
            real = keys >= cache.padding[:, None]                                      # (B, S)
            # itself, and what stands before it unless that is padding; a padding token must have something to
            # look at too, or its softmax is NaN
            allowed = (own | (keys < positions[:, None]) & real[:, None])[:, None]     # (B, 1, T, S)
            rows = (positions - cache.padding[:, None]).clamp(min=0)                   # (B, T)
            cos, sin = self.rope_cos[rows][:, None], self.rope_sin[rows][:, None]      # (B, 1, T, D)

        x = self.model.dropout(self.model.embed_tokens(tokens))                        # (B, T) -> (B, T, C)
        for block in self.model.layers:
            x = block(x, cos, sin, allowed, cache)
        logits = self.lm_head(self.model.norm(x))                                      # (B, T, V)
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
        if max_tokens > self.config.max_position_embeddings:
            raise ValueError(f"a cache of {max_tokens} tokens is larger than the context of "
                             f"{self.config.max_position_embeddings}")
        weight = self.lm_head.weight
        return KVCache(self.config, batch_size, max_tokens, weight.device, weight.dtype)


if __name__ == '__main__':
    parts, model = {}, MiniMind(MiniMindConfig())
    for name, p in model.named_parameters():
        part = name.split('.')[3] if '.layers.' in name else name.split('.')[1]
        parts[part] = parts.get(part, 0) + p.numel()
    for part, count in [*parts.items(), ('total', sum(parts.values()))]:
        print(f"{part:25}{count:12,}")
