"""
MiniMind: a Llama-style decoder, read top to bottom (tutorial chapters II-2 to II-7).

    tokens -> embedding -> n x [ x + Attention(RMSNorm(x)); x + FeedForward(RMSNorm(x)) ] -> RMSNorm -> logits

What separates it from GPT-2: RMSNorm for LayerNorm, rotary positions (RoPE) for learned ones, grouped-query
attention for multi-head, SwiGLU for GELU, no biases, and an output head that shares the embedding's weights.
With use_moe the feed-forward becomes a mixture of experts. Parameter names are MiniMind's own, which are also
Llama's and Qwen3's.

    model = MiniMind(MiniMindConfig())                    # MiniMind's default: 25,829,888 parameters
    logits, loss = model(tokens, targets)                 # (B, T) -> (B, T, V) and a scalar
    cache = model.make_cache(batch_size=1, max_tokens=512)
    logits, _ = model(prompt, cache=cache)                # prefill, in one piece or several
    logits, _ = model(next_token, cache=cache)            # then one token at a time
    model = MiniMind.from_pretrained('full_sft_768.pth')  # MiniMind's own weights, or a Hugging Face folder
    model.save_pretrained('folder')                       # transformers, vLLM and llama.cpp read it

    python model_minimind.py                              # sizes, part by part, and the bytes of a KV cache
    python model_minimind.py --out_dir=out/pretrain --export_dir=out/hf     # a run -> a Hugging Face folder
"""
import functools
import glob
import json
import math
import os
import re
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

# rows of each group times the matrix of that group, in one kernel; torch 2.9 has it under its older name.
# It is kept out of torch.compile, which traces it in bfloat16 alone
grouped_mm = torch.compiler.disable(getattr(F, 'grouped_mm', None) or torch._grouped_mm)


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
    rope_scaling: dict | None = None       # YaRN, as `extend_context` writes it; it holds the trained length
    # mixture of experts (chapter II-6); all that follows is ignored without use_moe
    use_moe: bool = False
    num_experts: int = 4                   # E, routed experts a layer
    num_experts_per_tok: int = 2           # k, how many of them each token visits
    n_shared_experts: int = 0              # experts that every token visits besides (MiniMind2)
    moe_intermediate_size: int = 0         # width inside one expert; 0 is intermediate_size
    norm_topk_prob: bool = True            # weights of a token's experts sum to 1
    router_aux_loss_coef: float = 0.01     # weight of the load-balancing loss; 0 is none
    seq_aux: bool = True                   # balance within each row, not over the batch as a whole

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
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
        if self.use_moe:
            if not 1 <= self.num_experts_per_tok <= self.num_experts:
                raise ValueError(f"num_experts_per_tok {self.num_experts_per_tok} must lie between 1 and "
                                 f"num_experts {self.num_experts}")
            if self.hidden_size % 8 or self.moe_intermediate_size % 8:
                raise ValueError(f"hidden_size and moe_intermediate_size of experts must be multiples of 8, "
                                 f"not {self.hidden_size} and {self.moe_intermediate_size}")

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


def rope_table(config):
    """cos and sin of position x frequency, each (positions, head_dim), float32.

    Pair i turns at theta^(-2i/D) radians per position (Su et al. 2021, section 3.2.2; chapter II-4).

    With rope_scaling it is YaRN (Peng et al. 2023, section 3.2): pairs that turned more than beta_fast times
    within the trained length know relative positions and keep their frequency; those that turned fewer than
    beta_slow times never saw their full circle and are slowed down by `factor`, so that the longer context
    looks to them like the trained one; between the two it is a ramp. As attention spreads over more tokens,
    cos and sin, and by their square the scores, grow by attention_factor.
    """
    D, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    frequencies = theta ** (-torch.arange(0, D, 2).float() / D)                        # (D/2,)
    grow = 1.0
    if scaling:
        def pair(turns):        # the pair that turns so often within the trained length
            return D * math.log(scaling['original_max_position_embeddings'] / (turns * 2 * math.pi)) / (
                2 * math.log(theta))
        low = max(math.floor(pair(scaling.get('beta_fast') or 32)), 0)
        high = min(math.ceil(pair(scaling.get('beta_slow') or 1)), D - 1)
        slow = ((torch.arange(D // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
        frequencies = frequencies * (1 - slow + slow / scaling['factor'])
        grow = scaling.get('attention_factor') or 0.1 * math.log(max(scaling['factor'], 1)) + 1
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
    angles = torch.cat([angles, angles], dim=-1)                                       # (positions, D)
    return angles.cos() * grow, angles.sin() * grow


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


def kv_cache_bytes(config, tokens, batch_size=1, bytes_per_number=4):
    """Bytes of the keys *and* the values of all layers (chapter II-5, whose table counts the keys alone)."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * batch_size * tokens * bytes_per_number


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

    def __init__(self, config, width):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def sort_by_expert(chosen, num_experts):
    """Bring the visits of one expert together: chosen (N, k), the experts each of N tokens visits.

    Visit v is that of token v // k. Returns order (N k), the visits sorted by expert, and ends (num_experts,)
    int32, where in that order each expert's visits end. On a GPU nothing here waits for the host.

    >>> order, ends = sort_by_expert(torch.tensor([[0, 1], [1, 2], [0, 2], [0, 1]]), 3)
    >>> order.tolist(), ends.tolist()                   # chapter II-6: four tokens, three experts
    ([0, 4, 6, 1, 2, 7, 3, 5], [3, 6, 8])
    """
    experts, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(num_experts, device=chosen.device)
    return order, torch.searchsorted(experts, numbers, right=True, out_int32=True)


@torch.compiler.disable
def padded_rows(ends, size):
    """How many rows each expert gets if all get the same, padding included; 0 where that does not pay.

    On a CPU grouped_mm goes from expert to expert, and products so small occupy one core. Padded to one shape
    they are one batched product, until the padding costs an expert more than the calls it saves: about 2^22
    multiplications, as measured. With fewer visits than experts it would read some that nobody visits.

    ends as sort_by_expert gives it; size: numbers in the matrix of an expert.
    """
    if ends.is_cuda or torch.get_num_threads() == 1:
        return 0
    visits, most = ends[-1].item(), ends.diff(prepend=ends.new_zeros(1)).max().item()
    return most if visits >= len(ends) and (most - visits / len(ends)) * size < 2**22 else 0


class Dispatch(torch.autograd.Function):
    """x (N, C) -> (S, C): into each slot the token that visits there. Its gradient is Collect, so both ways
    are plain gathers; autograd's own would add rows one by one, slowly and in no fixed order."""

    @staticmethod
    def forward(ctx, x, token, slot):
        ctx.save_for_backward(token, slot)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx, grad):
        return Collect.apply(grad, *ctx.saved_tensors), None, None


class Collect(torch.autograd.Function):
    """h (S, C) -> (N, C): for each token the sum over its slots (N, k)."""

    @staticmethod
    def forward(ctx, h, token, slot):
        ctx.save_for_backward(token, slot)
        return h.index_select(0, slot.flatten()).view(*slot.shape, -1).sum(1)      # (N k, C) -> (N, k, C)

    @staticmethod
    def backward(ctx, grad):
        return Dispatch.apply(grad, *ctx.saved_tensors), None, None


class Experts(nn.Module):
    """All routed experts of a layer, each a SwiGLU, their matrices stacked so that one product serves all.
    An expert without a visit gets a gradient of zero."""

    def __init__(self, config):
        super().__init__()
        E, C, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        # (in, out) each, where nn.Linear has (out, in): their gradients come so, and need not be turned
        self.gate_up = nn.Parameter(torch.empty(E, C, 2 * width))
        self.down = nn.Parameter(torch.empty(E, width, C))

    def forward(self, x, chosen, weights):
        """x (N, C); chosen (N, k), the experts each token visits, and their weights (N, k) -> (N, C)."""
        E, dtype, device = len(self.down), self.down.dtype, x.device
        if torch.is_autocast_enabled(device.type):                         # it does not know grouped products
            dtype = torch.get_autocast_dtype(device.type)
        # a slot for each visit, those of one expert side by side
        order, ends = sort_by_expert(chosen, E)
        visits = torch.arange(len(order), device=device)
        slot, slots = torch.empty_like(order), len(order)
        slot[order] = visits
        rows = padded_rows(ends, self.down[0].numel())
        if rows:                                                           # the same number for each expert
            starts = torch.cat([ends.new_zeros(1), ends[:-1]])
            slot += (torch.arange(E, device=device) * rows - starts)[chosen.flatten()]
            slots = E * rows
        # slots that stay empty hold token 0 with a weight of 0, so no gradient leaves them
        token = visits.new_zeros(slots).index_copy(0, slot, visits // chosen.size(1))
        weight = x.new_zeros(slots, dtype=dtype).index_copy(0, slot, weights.to(dtype).flatten())
        slot = slot.view_as(chosen)

        def product(h, matrices):                                          # (S, in), (E, in, out) -> (S, out)
            if rows:
                return (h.view(E, rows, -1) @ matrices.to(dtype)).flatten(0, 1)
            return grouped_mm(h, matrices.to(dtype), offs=ends)

        h = Dispatch.apply(x.to(dtype), token, slot)                       # (N, C) -> (S, C)
        gate, up = product(h, self.gate_up).chunk(2, dim=-1)
        h = product(F.silu(gate) * up * weight[:, None], self.down)        # (S, width) -> (S, C)
        return Collect.apply(h, token, slot).to(x.dtype)                   # (S, C) -> (N, C)


class MoEFeedForward(nn.Module):
    """A mixture of experts: y = sum over the k likeliest experts e of p_e(x) FeedForward_e(x), with
    p = softmax(gate(x)) (Shazeer et al. 2017; chapter II-6). Parameters of many experts, the cost of k.

    Left alone a router sends ever more tokens to the experts that happened to learn first. The auxiliary loss

        aux = coef x E x sum_e f_e P_e        f_e: share of the visits that e got; P_e: its mean probability

    is lowest, coef, when all get the same (Fedus et al. 2021, eq. 4). f has no gradient, so it pushes P down
    where f is high. With seq_aux f and P are taken in each row, as in DeepSeek-V2, and a row weighs as many
    tokens as it counts; that is stricter, and the same however rows are cut into micro-batches.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)      # the router
        self.experts = Experts(config)
        self.shared_experts = nn.ModuleList([FeedForward(config, config.moe_intermediate_size)
                                             for _ in range(config.n_shared_experts)])

    def forward(self, x):
        B, T, C = x.shape
        # in float32: which experts win must not hang on rounding (Fedus et al. 2021, section 2.4)
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(x.float(), self.gate.weight.float()).softmax(dim=-1)          # (B, T, E)
        weights, chosen = p.topk(self.config.num_experts_per_tok, dim=-1)              # (B, T, k)
        if self.config.norm_topk_prob:      # with k = 1 always 1: the auxiliary loss alone moves the router
            weights = weights / weights.sum(dim=-1, keepdim=True)
        y = self.experts(x.reshape(B * T, C), chosen.flatten(0, 1), weights.flatten(0, 1)).view(B, T, C)
        for expert in self.shared_experts:
            y = y + expert(x)
        if self.training:
            self.routed = p, chosen
        return y

    def auxiliary_loss(self, counted):
        """The loss above for the last forward in training, over the tokens where counted (B, T) alone. Leaves
        in `load` (E,), without gradient, the share of their visits that each expert got."""
        p, chosen = self.routed
        counted = counted[..., None].to(p.dtype)                                       # (B, T, 1)
        n = counted.sum(dim=1)                                                         # (B, 1)
        visits = counted.expand(chosen.shape).flatten(1)                               # (B, T k)
        f = torch.zeros_like(p[:, 0]).scatter_add_(1, chosen.flatten(1), visits)       # (B, E)
        f, P = f / (n * chosen.size(-1)).clamp(min=1), (p * counted).sum(dim=1) / n.clamp(min=1)
        weight = n / n.sum().clamp(min=1)
        self.load = (weight * f).sum(dim=0)
        scale = self.config.router_aux_loss_coef * self.config.num_experts
        if self.config.seq_aux:
            return scale * (weight * f * P).sum()
        return scale * (self.load * (weight * P).sum(dim=0)).sum()


class Block(nn.Module):
    """One layer. The norms stand before attention and feed-forward, so the residual stream x runs through
    the whole model untouched but for what each part adds to it."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config, config.intermediate_size)
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
        cos, sin = rope_table(config)
        self.register_buffer('rope_cos', cos, persistent=False)   # (positions, D), computed, so not saved
        self.register_buffer('rope_sin', sin, persistent=False)
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                # matrices that write into the residual stream start smaller, as 2 x layers of them add up
                # there (Radford et al. 2019, section 2.3)
                into_stream = 'o_proj' in name or 'down' in name
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.num_hidden_layers if into_stream else 1))

    def forward(self, tokens, targets=None, cache=None, segments=None):
        """Logits for the token after each token, and their mean loss.

        tokens    (B, T) int64
        targets   (B, T) int64, the token that follows each; -100 is ignored. With none at all the loss is 0.
        cache     a KVCache: `tokens` continue what it holds, and are added to it
        segments  (B, T) int64, the document each token of a packed row belongs to, ascending: attention stays
                  inside it and positions start anew in each, as if every document had a row of its own
        returns   logits (B, T, V); loss, the mean negative log-likelihood in nats over targets, or None. In
                  training a mixture of experts adds its auxiliary loss to it, and leaves that in `aux_loss`.
        """
        assert cache is None or segments is None, "a cache holds one document a row"
        B, T = tokens.shape
        past = cache.length if cache else 0
        limit = cache.max_tokens if cache else self.config.max_position_embeddings
        if past + T > limit:
            raise ValueError(f"{past + T} tokens exceed the {'cache' if cache else 'context'} of {limit}")

        positions = torch.arange(past, past + T, device=tokens.device)                 # (T,)
        if segments is not None:
            starts = torch.cat([torch.ones_like(segments[:, :1]), segments.diff(dim=1)], dim=1) != 0
            rows = positions - torch.where(starts, positions, 0).cummax(dim=1).values  # (B, T)
            cos, sin = self.rope_cos[rows][:, None], self.rope_sin[rows][:, None]      # (B, 1, T, D)
            same = segments[:, :, None] == segments[:, None, :]                        # (B, T, T)
            allowed = (same & (positions <= positions[:, None]))[:, None]              # (B, 1, T, T)
        elif cache is None:
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
        loss = loss / (targets != -100).sum().clamp(min=1)
        if self.training and self.config.use_moe:
            aux_loss = self.auxiliary_loss(targets != -100)     # padding, which is no target, has no part
            self.aux_loss = aux_loss.detach()                   # its share of the loss below, for a log
            loss = loss + aux_loss
        return logits, loss

    def auxiliary_loss(self, counted):
        """The load-balancing losses of all layers in the last training forward, over the tokens where
        counted (B, T) is True."""
        return sum(block.mlp.auxiliary_loss(counted) for block in self.model.layers)

    def expert_load(self):
        """(layers, E): the share of the counted visits each expert got in that loss; 1 / E is fair."""
        return torch.stack([block.mlp.load for block in self.model.layers])

    def extend_context(self, factor):
        """Read `factor` times longer texts than the model was trained on, by YaRN."""
        if self.config.rope_scaling:
            raise ValueError(f"the context is extended already: {self.config.rope_scaling}")
        trained = self.config.max_position_embeddings
        self.config.rope_scaling = dict(rope_type='yarn', factor=float(factor),
                                        original_max_position_embeddings=trained)
        self.config.max_position_embeddings = int(trained * factor)
        cos, sin = rope_table(self.config)
        self.rope_cos, self.rope_sin = cos.to(self.rope_cos), sin.to(self.rope_sin)

    def make_cache(self, batch_size, max_tokens):
        """An empty KV cache for `max_tokens` tokens, prompt and answer together."""
        if max_tokens > self.config.max_position_embeddings:
            raise ValueError(f"a cache of {max_tokens} tokens is larger than the context of "
                             f"{self.config.max_position_embeddings}")
        weight = self.lm_head.weight
        return KVCache(self.config, batch_size, max_tokens, weight.device, weight.dtype)

    # ---- weights on disk ----

    @classmethod
    def from_pretrained(cls, source):
        """The model of a Hugging Face folder (config.json of Llama, Qwen3, Qwen3-MoE or MiniMind, and weights
        in .safetensors or .bin), or of a .pth of MiniMind's. On the CPU, float32, in evaluation mode.

        Raises OSError, ImportError or ValueError with one line if it cannot be had or is no such model.
        """
        state = stack_experts({name: value for name, value in read_weights(source).items()
                               if not name.endswith(LEGACY_BUFFERS)})
        if os.path.isdir(source):
            with open(os.path.join(source, 'config.json'), encoding='utf-8') as f:
                hf = json.load(f)
            try:
                model = cls(config_from_hf(hf, state, source))
            except (KeyError, TypeError, ZeroDivisionError, RuntimeError) as e:
                raise ValueError(f"{source}: config.json is no model's ({type(e).__name__}: {e})") from None
        else:
            model = cls(config_of_official(state, source))
        embedding = state.get('model.embed_tokens.weight')
        if model.config.tie_word_embeddings and embedding is not None:
            if not torch.equal(state.setdefault('lm_head.weight', embedding), embedding):
                raise ValueError(f"{source}: head and embedding should be one matrix, but differ")
        for name, p in model.state_dict().items():
            if name not in state or state[name].shape != p.shape:
                found = tuple(state[name].shape) if name in state else 'missing'
                raise ValueError(f"{source}: {name} is {found}, but its config asks for {tuple(p.shape)}")
        if unknown := sorted(set(state) - set(model.state_dict())):
            raise ValueError(f"{source}: {unknown[0]} has no place in this model")
        model.load_state_dict(state)
        return model.eval()

    def save_pretrained(self, folder, **extra):
        """Write a folder that transformers loads: as Llama without qk_norm, Qwen3 with it, Qwen3-MoE if there
        are experts too; ValueError where none of the three computes the same. config.json and
        generation_config.json take `extra`, the ids of special tokens; the weights go to model.safetensors,
        or to pytorch_model.bin where that package is not installed."""
        config = dict(config_to_hf(self.config), **extra)
        os.makedirs(folder, exist_ok=True)
        for name, content in (('config.json', config), ('generation_config.json', extra)):
            with open(os.path.join(folder, name), 'w', encoding='utf-8') as f:
                json.dump(content, f, indent=2)
        state = unstack_experts({name: value.detach().cpu() for name, value in self.state_dict().items()
                                 if not (name == 'lm_head.weight' and self.config.tie_word_embeddings)})
        try:
            from safetensors.torch import save_file
        except ImportError:
            torch.save(state, os.path.join(folder, 'pytorch_model.bin'))
        else:
            save_file(state, os.path.join(folder, 'model.safetensors'), metadata={'format': 'pt'})


# RoPE tables that older checkpoints carry along: computed here
LEGACY_BUFFERS = ('freqs_cos', 'freqs_sin', 'pos_cis', 'rotary_emb.inv_freq')


def read_weights(source):
    """{name: tensor} of a .pth file, or of all weight files in a folder."""
    if os.path.isfile(source):
        files = [source]
    else:
        folder = glob.escape(source)
        files = sorted(glob.glob(os.path.join(folder, 'model*.safetensors'))
                       or glob.glob(os.path.join(folder, 'pytorch_model*.bin')))
    if not files:
        raise FileNotFoundError(f"{source} holds neither model.safetensors nor pytorch_model.bin")
    weights = {}
    for file in files:
        if file.endswith('.safetensors'):
            try:
                from safetensors.torch import load_file as load
            except ImportError:
                raise ImportError(f"{file} needs a package: pip install safetensors") from None
        else:
            load = functools.partial(torch.load, map_location='cpu', weights_only=True)
        try:
            weights.update(load(file))
        except Exception as e:                          # each library has kinds of its own for a broken file
            reason = f"{type(e).__name__}: {str(e).partition(chr(10))[0][:80]}"
            raise ValueError(f"{file} holds no weights ({reason})") from None
    if others := [name for name, value in weights.items() if not torch.is_tensor(value)]:
        raise ValueError(f"{source} holds more than weights: {others[0]}, for one")
    return weights


def stack_experts(state):
    """Replace experts.0.gate_proj.weight, ... of each layer, as checkpoints have them, by the two stacks of
    Experts. Those of transformers, experts.gate_up_proj and down_proj, are their transposes."""
    state, experts = dict(state), {}
    for name in list(state):
        if found := re.fullmatch(r'(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight', name):
            layer, expert, part = found.groups()
            experts.setdefault(layer, {})[int(expert), part] = state.pop(name)
        elif found := re.fullmatch(r'(.*\.experts\.(gate_up|down))_proj', name):
            state[found[1]] = state.pop(name).mT
    for layer, parts in experts.items():
        numbers = sorted({expert for expert, _ in parts})
        if len(parts) != 3 * len(numbers):
            raise ValueError(f"{layer}: an expert lacks its gate, up or down matrix")
        pairs = [torch.cat([parts[e, 'gate'], parts[e, 'up']]) for e in numbers]
        state[f'{layer}.gate_up'] = torch.stack(pairs).mT
        state[f'{layer}.down'] = torch.stack([parts[e, 'down'] for e in numbers]).mT
    return state


def unstack_experts(state):
    """The reverse of stack_experts."""
    out = {}
    for name, value in state.items():
        layer, experts, part = name.rpartition('.experts.')
        if not experts:
            out[name] = value
        for e, matrix in enumerate(value) if experts else ():
            named = zip(('gate', 'up'), matrix.T.chunk(2)) if part == 'gate_up' else [('down', matrix.T)]
            out.update({f'{layer}.experts.{e}.{kind}_proj.weight': m.contiguous() for kind, m in named})
    return out


def config_from_hf(hf, state, source):
    """The MiniMindConfig of a config.json and its weights; ValueError for what this model does not do."""
    kind = hf.get('model_type')
    kinds = ('llama', 'qwen3', 'qwen3_moe', 'minimind')
    if kind not in kinds:
        raise ValueError(f"{source}: config.json describes a {kind!r}; this model is {', '.join(kinds)}")
    known = dict(hidden_act='silu', attention_bias=False, mlp_bias=False, use_sliding_window=False,
                 decoder_sparse_step=1, mlp_only_layers=[], scoring_func='softmax')
    for key, value in known.items():
        if hf.get(key) not in (value, None):
            raise ValueError(f"{source}: config.json has {key}={hf[key]!r}, this model {value!r} alone")
    for key in ('rms_norm_eps', *(('num_experts_per_tok', 'norm_topk_prob') if kind == 'qwen3_moe' else ())):
        if key not in hf:           # each library has another default, and a wrong one is not seen
            raise ValueError(f"{source}: config.json has no {key}")
    own = {key: hf[key] for key in MiniMindConfig.__dataclass_fields__ if hf.get(key) is not None}
    own.setdefault('num_key_value_heads', hf['num_attention_heads'])
    # transformers 5 has all of RoPE in one dictionary; before, theta stood apart
    rope = dict(hf.get('rope_scaling') or {}, **hf.get('rope_parameters') or {})
    own['rope_theta'] = float(rope.pop('rope_theta', hf.get('rope_theta') or 10000.0))
    rope['rope_type'] = rope.pop('type', rope.get('rope_type', 'default'))
    if rope['rope_type'] not in ('default', 'yarn') or rope.keys() & {'mscale', 'mscale_all_dim', 'truncate'}:
        raise ValueError(f"{source}: config.json scales RoPE by {rope}, this model by plain YaRN alone")
    if rope['rope_type'] == 'yarn':
        rope.setdefault('original_max_position_embeddings', hf['max_position_embeddings'])
    own['rope_scaling'] = rope if rope['rope_type'] == 'yarn' else None
    own['qk_norm'] = any(name.endswith('q_norm.weight') for name in state)
    own['use_moe'] = kind == 'qwen3_moe' or bool(hf.get('use_moe'))
    own.setdefault('tie_word_embeddings', 'lm_head.weight' not in state)
    for other in ('num_local_experts', 'n_routed_experts'):
        if hf.get(other):
            own['num_experts'] = hf[other]
    if hf.get('aux_loss_alpha') is not None:
        own['router_aux_loss_coef'] = hf['aux_loss_alpha']
    return MiniMindConfig(**own)


def config_of_official(state, source):
    """The MiniMindConfig behind a .pth of MiniMind's, which holds weights alone: sizes from their shapes, the
    rest from the generation, MiniMind-3 if there are q_norm and k_norm, else MiniMind2."""
    shape = {name: tuple(value.shape) for name, value in state.items()}
    first = 'model.layers.0.'
    try:
        V, C = shape['model.embed_tokens.weight']
        kv_width = shape[first + 'self_attn.k_proj.weight'][0]
        third = first + 'self_attn.q_norm.weight' in shape
        head_dim = shape[first + 'self_attn.q_norm.weight'][0] if third else C // 8
        moe = first + 'mlp.gate.weight' in shape
        width = shape[first + ('mlp.experts.down' if moe else 'mlp.down_proj.weight')][1]
    except KeyError as e:
        raise ValueError(f"{source} is no checkpoint of MiniMind: it has no {e.args[0]}") from None
    return MiniMindConfig(
        vocab_size=V, hidden_size=C, intermediate_size=width, head_dim=head_dim, qk_norm=third,
        num_hidden_layers=len([name for name in shape if name.endswith('input_layernorm.weight')]),
        num_attention_heads=shape[first + 'self_attn.q_proj.weight'][0] // head_dim,
        num_key_value_heads=kv_width // head_dim, rms_norm_eps=1e-6 if third else 1e-5, use_moe=moe,
        num_experts=shape[first + 'mlp.gate.weight'][0] if moe else 4, num_experts_per_tok=1 if third else 2,
        n_shared_experts=len([name for name in shape if name.startswith(first + 'mlp.shared_experts.')]) // 3,
        router_aux_loss_coef=5e-4 if third else 0.01, seq_aux=not third)


def config_to_hf(config):
    """The config.json of the transformers model that computes the same; ValueError if there is none."""
    if config.use_moe and (config.n_shared_experts or not config.qk_norm):
        what = 'with shared experts' if config.n_shared_experts else 'without qk_norm'
        raise ValueError(f"transformers has no model of experts {what}: Qwen3-MoE computes otherwise")
    kind, name = (('qwen3_moe', 'Qwen3MoeForCausalLM') if config.use_moe else
                  ('qwen3', 'Qwen3ForCausalLM') if config.qk_norm else ('llama', 'LlamaForCausalLM'))
    hf = {key: value for key, value in asdict(config).items()
          if key not in ('dropout', 'qk_norm', 'use_moe', 'n_shared_experts')
          and (config.use_moe or key not in ('num_experts', 'num_experts_per_tok', 'moe_intermediate_size',
                                             'norm_topk_prob', 'router_aux_loss_coef', 'seq_aux'))}
    return dict(hf, model_type=kind, architectures=[name], hidden_act='silu', attention_bias=False,
                attention_dropout=config.dropout, torch_dtype='float32')


# settings of the export
out_dir = ''            # folder of the run to export; '' prints the sizes of MiniMind's small model
export_dir = ''         # folder to write for transformers: config.json, weights, tokenizer
yarn_factor = 1.0       # how many times longer than in training the exported model's context is

if __name__ == '__main__':
    from configurator import configure, fail
    from sample import load_run, stop_ids
    configure(globals(), yarn_factor=1)
    if bool(out_dir) != bool(export_dir):
        fail("an export takes both --out_dir=RUN and --export_dir=FOLDER")
    if export_dir:
        model, tokenizer, _ = load_run(out_dir)
        try:
            if yarn_factor > 1:
                model.extend_context(yarn_factor)
            model.save_pretrained(export_dir, bos_token_id=tokenizer.eot, pad_token_id=tokenizer.eot,
                                  eos_token_id=sorted(stop_ids(tokenizer)))
            tokenizer.save(export_dir)
        except ValueError as e:
            fail(f"{out_dir}: {e}")
        except OSError as e:
            fail(f"cannot write {export_dir}: {e.strerror}")
        print(f"wrote {export_dir}, which AutoModelForCausalLM.from_pretrained of transformers loads")
    else:
        parts, model = {}, MiniMind(MiniMindConfig())
        for name, p in model.named_parameters():
            part = name.split('.')[3] if '.layers.' in name else name.split('.')[1]
            parts[part] = parts.get(part, 0) + p.numel()
        for part, count in [*parts.items(), ('total', sum(parts.values()))]:
            print(f"{part:25}{count:12,}")
        print("\nKV cache of one layer, 4096 wide, 32 heads, 1024 tokens, float32 (chapter II-5)")
        for kind, kv_heads in (('multi-head', 32), ('grouped-query', 8), ('multi-query', 1)):
            config = MiniMindConfig(hidden_size=4096, num_hidden_layers=1, num_attention_heads=32,
                                    num_key_value_heads=kv_heads)
            print(f"{kind:17}{kv_heads:3} heads{kv_cache_bytes(config, tokens=1024):17,} bytes")
