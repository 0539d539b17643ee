"""
MiniMind: a Llama-style decoder, to be read from the top (chapters II-2 to II-7).

    tokens -> embedding -> n x [ x + Attention(RMSNorm(x)); x + FeedForward(RMSNorm(x)) ] -> RMSNorm -> logits

What separates it from GPT-2: RMSNorm for LayerNorm, rotary positions (RoPE) for learned ones, grouped-query
attention for multi-head, SwiGLU for GELU, no biases; with use_moe a mixture of experts for the feed-forward.
Parameter names are MiniMind's own, which are also Llama's and Qwen3's. From configurator.py come only the
functions that read, check and write files of weights.

    model = MiniMind(MiniMindConfig())                    # MiniMind's default: 25,829,888 parameters
    logits, _ = model(tokens)                             # (B, T) -> (B, T, V)
    _, loss = model(tokens, targets)                      # a scalar; in training it has no logits
    cache = model.make_cache(batch_size=1, max_tokens=512)
    logits, _ = model(tokens, cache=cache)                # the prompt, in pieces or whole; then new tokens
    model = MiniMind.from_pretrained('full_sft_768.pth')  # MiniMind's own weights, or a Hugging Face folder
    model.save_pretrained('folder')                       # transformers and vLLM read it; see sample.py

    python model_minimind.py                              # sizes, part by part, and the bytes of a KV cache
"""
import math
import os
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import build_model, check_sizes, read_json, read_weights, write_model

POSITIONS = ('rope', 'learned', 'sinusoidal', 'none')


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
    trained_length: int = 0                # tokens of the longest rows it was trained on; 0 is unknown
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    qk_norm: bool = False                  # RMSNorm on each head's query and key (MiniMind-3, Qwen3)
    tie_word_embeddings: bool = True
    dropout: float = 0.0
    attention_bias: bool = False           # biases on query, key and value (Qwen2)
    positions: str = 'rope'                # or, to compare, 'learned', 'sinusoidal' or 'none' (chapter II-3)
    rope_scaling: dict | None = None       # YaRN, as `extend_context` writes it, or Llama 3's; see rope_table
    # mixture of experts (chapter II-6); all that follows is ignored without use_moe
    use_moe: bool = False
    num_experts: int = 4                   # E, routed experts per layer
    num_experts_per_tok: int = 2           # k, how many of them each token visits
    n_shared_experts: int = 0              # experts that every token visits besides (MiniMind2)
    moe_intermediate_size: int = 0         # width inside one expert; 0 is intermediate_size
    norm_topk_prob: bool = True            # weights of a token's experts sum to 1
    router_aux_loss_coef: float = 0.01     # weight of the load-balancing loss; 0 is none
    seq_aux: bool = True                   # balance within each row, not over the batch as a whole
    # what neither names nor shapes of weights show; these three are no fields
    unseen = ('num_attention_heads', 'rope_theta', 'rms_norm_eps', 'max_position_embeddings',
              'num_experts_per_tok', 'norm_topk_prob', 'router_aux_loss_coef', 'seq_aux')
    model_type = 'minimind'
    context = property(lambda self: self.max_position_embeddings)      # the longest sequence it can read

    def __post_init__(self):
        def check(key, divisor, name):
            if getattr(self, key) % divisor:
                raise ValueError(f"{key} {getattr(self, key)} is not a multiple of {name} {divisor}")

        check_sizes(self, num_hidden_layers=1000, num_experts=1024, n_shared_experts=64, dropout=1)
        # 8/3, because SwiGLU has three matrices where a feed-forward of width 4C has two: 3 x 8/3 = 2 x 4
        self.intermediate_size = self.intermediate_size or 64 * math.ceil(self.hidden_size * 8 / 3 / 64)
        self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
        if not self.head_dim:
            check('hidden_size', self.num_attention_heads, 'num_attention_heads')
            self.head_dim = self.hidden_size // self.num_attention_heads
        check('head_dim', 2, "RoPE's pairs of")
        check('num_attention_heads', self.num_key_value_heads, 'num_key_value_heads')
        if self.positions not in POSITIONS:
            raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, not {self.positions!r}")
        if self.positions == 'sinusoidal':
            check('hidden_size', 2, "sinusoidal positions' pairs of")
        width = self.head_dim if self.positions == 'rope' else self.hidden_size
        if self.context * width > 1 << 27 or self.rope_theta <= 1:
            raise ValueError(f"the table of positions: rope_theta {self.rope_theta} must be above 1, and "
                             f"positions x width {self.context} x {width} at most {1 << 27}, which is 1 GB")
        scaling = self.rope_scaling or {}
        if scaling and self.positions != 'rope':
            raise ValueError(f"rope_scaling is for positions='rope', not {self.positions!r}")
        llama3 = scaling.get('rope_type') == 'llama3'
        keys = dict(factor=None, original_max_position_embeddings=None, **(             # and their defaults
            dict(low_freq_factor=None, high_freq_factor=None) if llama3 else
            dict(beta_fast=32, beta_slow=1, attention_factor=1)))
        for key, default in keys.items() if scaling else ():
            value = scaling.get(key) or default
            if type(value) not in (int, float) or not 0 < value < 1e12:
                raise ValueError(f"rope_scaling: {key} must be a number above 0, not {value!r}")
        if llama3 and scaling['low_freq_factor'] >= scaling['high_freq_factor']:
            raise ValueError("rope_scaling: low_freq_factor must be below high_freq_factor")
        if self.use_moe:
            check('hidden_size', 8, "grouped_mm's blocks of")
            check('moe_intermediate_size', 8, "grouped_mm's blocks of")
            if not 1 <= self.num_experts_per_tok <= self.num_experts:
                raise ValueError(f"num_experts_per_tok must lie between 1 and num_experts {self.num_experts}")


def plain_rms_norm(x, weight, eps=1e-5):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, eq. 4; chapter II-2): a
    LayerNorm without the mean and the bias. On input of zero mean the two agree."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


class RMSNorm(nn.RMSNorm):
    """plain_rms_norm in one kernel, always in float32: half-precision squares overflow or vanish."""

    def forward(self, x):
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).type_as(x)


def sinusoidal_positions(positions, dim):
    """(positions, dim): sin(p / 10000^(2i/dim)) at 2i, the cosine of it at 2i + 1 (Vaswani et al. 2017,
    section 3.5; chapter II-3). Low dimensions turn fast, high ones slowly; nothing is learned."""
    frequencies = 10000 ** (-torch.arange(0, dim, 2).float() / dim)                    # (dim/2,)
    angles = torch.outer(torch.arange(positions).float(), frequencies)                 # (positions, dim/2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)                # (positions, dim)


def rope_table(config):
    """cos and sin of position x frequency, (2, positions, head_dim), float32.
    Pair i turns at theta^(-2i/D) radians per position (Su et al. 2021, section 3.2.2; chapter II-4).
    With rope_scaling it is YaRN (Peng et al. 2023, section 3.2). Pairs that turned more than beta_fast times
    within the trained length know relative positions and keep their frequency. Those that turned fewer than
    beta_slow times never saw a full circle, and are slowed down by `factor`: so the longer context looks like
    the trained one. Between the two it is a ramp. As attention spreads over more tokens, cos and sin grow by
    attention_factor, and the scores by its square.
    Llama 3.1 does the same with another ramp, over the turns themselves (from low_freq_factor to
    high_freq_factor of them) and not over the number of the pair; and nothing grows."""
    D, theta, scaling = config.head_dim, config.rope_theta, config.rope_scaling
    frequencies = theta ** (-torch.arange(0, D, 2).float() / D)                        # (D/2,)
    grow = 1.0
    if scaling:
        length = scaling['original_max_position_embeddings']
        if scaling.get('rope_type') == 'llama3':
            low, high = scaling['low_freq_factor'], scaling['high_freq_factor']
            slow = (high - length * frequencies / (2 * math.pi)) / (high - low)
        else:
            def pair(turns):    # the pair that turns so often within the trained length
                return D * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
            low = max(math.floor(pair(scaling.get('beta_fast') or 32)), 0)
            high = min(math.ceil(pair(scaling.get('beta_slow') or 1)), D - 1)
            slow = (torch.arange(D // 2).float() - low) / max(high - low, 0.001)
            grow = scaling.get('attention_factor') or 0.1 * math.log(max(scaling['factor'], 1)) + 1
        slow = slow.clamp(0, 1)
        frequencies = frequencies * (1 - slow + slow / scaling['factor'])
    angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
    angles = torch.cat([angles, angles], dim=-1)                                       # (positions, D)
    return torch.stack([angles.cos(), angles.sin()]) * grow


def position_table(config):
    """What tells where a token stands and is computed: RoPE's table; sinusoids (positions, C) to be added to
    embeddings, in the size of new ones, as larger ones would drown them; else None."""
    if config.positions == 'sinusoidal':
        return 0.02 * sinusoidal_positions(config.context, config.hidden_size)
    return rope_table(config) if config.positions == 'rope' else None


def apply_rope(x, cos, sin):
    """Rotate each pair (x_i, x_{i+D/2}) of x by its angle: R(m)q . R(n)k depends only on n - m.
    x (B, heads, T, D); cos, sin (B or 1, 1, T, D). As in Llama, the two halves of a head form the
    pairs, where the paper pairs neighbours: that only permutes the weights, and needs no interleaving."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).type_as(x)


def plain_attention(q, k, v, allowed):
    """softmax(q k^T / sqrt(D)) v, written out (Vaswani et al. 2017, eq. 1; chapter II-5).
    q (B, H, T, D); k, v (B, H_kv, S, D); allowed (T, S) or (B, 1, T, S), True where a query may look."""
    group = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)        # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))                           # (B, H, T, S)
    return scores.masked_fill(~allowed, float('-inf')).softmax(dim=-1) @ v             # (B, H, T, D)


class KVCache:
    """Keys and values of the tokens already read, preallocated (chapter II-5).
    keys, values: one (B, H_kv, max_tokens, D) tensor per layer. length: tokens held, the same for every row;
    as a tensor it is for a step that is recorded, see sample.py, and all of the cache is looked at, masked.
    padding (B,): how many tokens at the left of each row are padding, None for none; set it before the first
    call. Rows of different length are padded there, so that all end together. Padding is never looked at, and
    positions count from the first real token. like: a tensor on the device and of the dtype to store in."""

    def __init__(self, config, batch_size, max_tokens, like):
        if max_tokens > config.context:
            raise ValueError(f"a cache of {max_tokens} tokens is larger than the context of {config.context}")
        shape = (batch_size, config.num_key_value_heads, max_tokens, config.head_dim)
        self.keys = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.values = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.max_tokens, self.length, self.padding = max_tokens, 0, None

    def layer(self, i):
        """Keys and values of layer i, (B, H_kv, max_tokens, D), and how many tokens they hold."""
        return self.keys[i], self.values[i], self.length


def append(past, k, v):
    """Store k, v (B, H_kv, T, D) behind what a layer of the cache holds; all is (B, H_kv, length + T, D)."""
    keys, values, length = past
    if torch.is_tensor(length):                         # always the same memory: a mask hides what is empty
        at = length + torch.arange(k.size(2), device=k.device)
        keys[:, :, at], values[:, :, at] = k, v
        return keys, values
    end = length + k.size(2)
    keys[:, :, length:end], values[:, :, length:end] = k, v
    return keys[:, :, :end], values[:, :, :end]


def kv_cache_bytes(config, tokens, batch_size=1, bytes_per_number=4):
    """Bytes of the keys *and* the values of all layers (chapter II-5, whose table counts only the keys)."""
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return numbers * batch_size * tokens * bytes_per_number


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share one key and value head (Ainslie et al. 2023;
    chapter II-5): num_attention_heads / num_key_value_heads times less cache than multi-head attention."""

    def __init__(self, config):
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.dropout
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        norm = RMSNorm if config.qk_norm else nn.Identity
        self.q_norm = norm(self.head_dim, config.rms_norm_eps)
        self.k_norm = norm(self.head_dim, config.rms_norm_eps)

    def forward(self, x, cos, sin, allowed=None, past=None):
        """x (B, T, C) -> (B, T, C). cos, sin: of RoPE, None without it. allowed: what each query may look at;
        None is plain causal order. past: the layer of the cache, to which keys and values are added."""
        B, T, _ = x.shape
        q, k, v = (project(x).view(B, T, -1, self.head_dim).transpose(1, 2)    # (B, T, C) -> (B, heads, T, D)
                   for project in (self.q_proj, self.k_proj, self.v_proj))     # H heads of q, H_kv of k and v
        q, k = self.q_norm(q), self.k_norm(k)
        if cos is not None:
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if past is not None:
            k, v = append(past, k, v)                                      # (B, H_kv, S, D), S = length + T
        if T == 1:      # the queries of a group see the same keys: as its rows they read them once
            q = q.view(B, k.size(1), -1, self.head_dim)                    # (B, H_kv, H / H_kv, D)
        elif not q.is_cpu and (allowed is not None or q.dtype == torch.float32):
            # a GPU's kernel for masks or float32 knows no groups; without it all scores would be stored
            k, v = (part.repeat_interleave(q.size(1) // k.size(1), dim=1) for part in (k, v))
        # plain_attention, in a kernel that never stores the scores
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=T > 1 and allowed is None,
                                           dropout_p=self.dropout if self.training else 0.0, enable_gqa=True)
        y = y.reshape(B, -1, T, self.head_dim).transpose(1, 2).reshape(B, T, -1)       # (B, T, H D)
        return self.o_proj(y)                                              # (B, H, T, D) -> (B, T, C)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6)."""

    def __init__(self, config, width):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def plain_moe(mlp, x):
    """A mixture of experts: y = sum over the k likeliest experts e of p_e(x) FeedForward_e(x), with
    p = softmax(gate(x)) (Shazeer et al. 2017; chapter II-6): the parameters of many experts, the cost of k.
    x (B, T, C) -> (B, T, C). mlp: the MoEFeedForward with the weights; it computes the same, but faster."""
    rows = x.flatten(0, 1)                                                             # (B T, C)
    weights, chosen = mlp.gate(rows).softmax(dim=-1).topk(mlp.config.num_experts_per_tok)      # (B T, k)
    if mlp.config.norm_topk_prob:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    y = torch.zeros_like(rows)
    for e in range(mlp.config.num_experts):
        token, choice = (chosen == e).nonzero(as_tuple=True)                           # (n,): visits of e
        gate, up = (rows[token] @ mlp.experts.gate_up[e]).chunk(2, dim=-1)             # (n, width)
        out = (F.silu(gate) * up) @ mlp.experts.down[e]                                # (n, C)
        y.index_add_(0, token, out * weights[token, choice, None])
    for expert in mlp.shared_experts:
        y = y + expert(rows)
    return y.view_as(x)


# ---- the same, fast ----

# rows of each group times the matrix of that group, in one kernel; torch 2.9 has it under its older name
grouped_mm = getattr(F, 'grouped_mm', None) or torch._grouped_mm


def sort_by_expert(chosen, num_experts):
    """Bring the visits of one expert together: chosen (..., k), the experts each of N tokens visits.
    Visit v is that of token v // k. Returns order (N k), the visits sorted by expert, and ends (num_experts,)
    int32, where in that order each expert's visits end. On a GPU nothing here waits for the host.
    >>> order, ends = sort_by_expert(torch.tensor([[0, 1], [1, 2], [0, 2], [0, 1]]), 3)
    >>> order.tolist(), ends.tolist()                   # chapter II-6: four tokens, three experts
    ([0, 4, 6, 1, 2, 7, 3, 5], [3, 6, 8])
    """
    experts, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(num_experts, device=chosen.device)
    return order, torch.searchsorted(experts, numbers, right=True, out_int32=True)


def padded_rows(ends, size):
    """How many rows each expert gets if all get the same, padding included; 0 where that does not pay.
    On a CPU grouped_mm goes from expert to expert, and products so small occupy one core. Padded to one shape
    they are one batched product. That pays while an expert's padding is less than 2^22 multiplications, as
    measured, and no more experts are read than there are visits. size: numbers in the matrix of an expert."""
    if ends.is_cuda or torch.compiler.is_compiling() or torch.get_num_threads() == 1:
        return 0
    visits, most = ends[-1].item(), ends.diff(prepend=ends.new_zeros(1)).max().item()
    return most if visits >= len(ends) and (most - visits / len(ends)) * size < 2**22 else 0


def fast_experts(x, chosen, weights, gate_up, down, untraced):
    """What the routed experts compute, in two products: x (B, T, C); chosen (B, T, k), the experts each token
    visits, and their weights (B, T, k); gate_up (E, C, 2 width), down (E, width, C) -> (B, T, C). untraced:
    grouped_mm, kept out of torch.compile, which traces it only in bfloat16."""
    E, k, S = len(down), chosen.size(-1), chosen.numel()
    autocast = torch.is_autocast_enabled(x.device.type)                    # it does not know grouped products
    dtype = torch.get_autocast_dtype(x.device.type) if autocast else down.dtype
    kernel = untraced if torch.compiler.is_compiling() and dtype != torch.bfloat16 else grouped_mm
    # each visit gets one of S slots; those of one expert stand side by side
    order, ends = sort_by_expert(chosen, E)
    slot = torch.empty_like(order).index_copy(0, order, torch.arange(S, device=x.device))
    rows = padded_rows(ends, down[0].numel())
    if rows:                                                           # the same number for each expert
        shift = torch.arange(E, device=x.device) * rows - F.pad(ends[:-1], (1, 0))
        slot, S = slot + shift[chosen.flatten()], E * rows

    def product(h, matrices):                                          # (S, in), (E, in, out) -> (S, out)
        if rows:
            return (h.view(E, rows, -1) @ matrices.to(dtype)).flatten(0, 1)
        return kernel(h, matrices.to(dtype), offs=ends)

    h = x.to(dtype).flatten(0, 1).repeat_interleave(k, dim=0)          # (B, T, C) -> (B T k, C)
    h = h.new_zeros(S, x.size(-1)).index_copy(0, slot, h)              # (B T k, C) -> (S, C)
    weight = h.new_zeros(S).index_copy(0, slot, weights.to(dtype).flatten())
    gate, up = product(h, gate_up).chunk(2, dim=-1)
    h = product(F.silu(gate) * up * weight[:, None], down)             # (S, width) -> (S, C)
    return h.index_select(0, slot).view(*chosen.shape, -1).sum(2).to(x.dtype)      # (S, C) -> (B, T, C)


class MoEFeedForward(nn.Module):
    """plain_moe, and the loss that balances its router. Without it a router sends ever more tokens to the
    experts that happened to learn first. The loss is coef x E x sum_e f_e P_e, with f_e the share of the
    visits that e got, and P_e its mean probability (Fedus et al. 2021, eq. 4). It is lowest, coef, when all
    get the same. f has no gradient, so it pushes P down where f is high. With seq_aux f and P are taken in
    each row, as in DeepSeek-V2, and a row weighs as many tokens as it counts; that is stricter, and the same
    however rows are cut into micro-batches."""
    routed = None       # p and chosen of the last forward, if it was in training

    def __init__(self, config):
        super().__init__()
        self.config = config
        E, C, width = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate = nn.Linear(C, E, bias=False)                                        # the router
        # (in, out) each, where nn.Linear has (out, in): their gradients come so, and need not be turned
        self.experts = nn.ParameterDict([('gate_up', torch.empty(E, C, 2 * width)),
                                         ('down', torch.empty(E, width, C))])
        self.untraced = torch.compiler.disable(grouped_mm)          # not at import: it takes a second
        shared = range(config.n_shared_experts)
        self.shared_experts = nn.ModuleList(FeedForward(config, width) for _ in shared)

    def forward(self, x):
        # in float32: which experts win must not depend on rounding (Fedus et al. 2021, section 2.4)
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(x.float(), self.gate.weight.float()).softmax(dim=-1)          # (B, T, E)
        weights, chosen = p.topk(self.config.num_experts_per_tok, dim=-1)              # (B, T, k)
        if self.config.norm_topk_prob:      # with k = 1 always 1: only the auxiliary loss moves the router
            weights = weights / weights.sum(dim=-1, keepdim=True)
        y = fast_experts(x, chosen, weights, **self.experts, untraced=self.untraced)
        for expert in self.shared_experts:
            y = y + expert(x)
        self.routed = (p, chosen) if self.training else None
        return y

    def auxiliary_loss(self, counted):
        """The loss above of the last forward, in training, over the tokens where counted (B, T) is True.
        Leaves in `load` (E,), without gradient, the share of the visits that each expert got."""
        p, chosen = self.routed                                                        # (B, T, E), (B, T, k)
        visits = torch.zeros_like(p).scatter(2, chosen, 1)                             # (B, T, E)
        counted = counted[..., None].to(p.dtype)                                       # (B, T, 1)
        n = counted.sum(dim=1)                                                         # (B, 1)
        f = (visits * counted).sum(dim=1) / (n * chosen.size(-1)).clamp(min=1)         # (B, E)
        P = (p * counted).sum(dim=1) / n.clamp(min=1)                                  # (B, E)
        weight = n / n.sum().clamp(min=1)                                              # (B, 1)
        self.load = (weight * f).sum(dim=0)
        balance = weight * f * P if self.config.seq_aux else self.load * (weight * P).sum(dim=0)
        return self.config.router_aux_loss_coef * self.config.num_experts * balance.sum()


# ---- the model ----

class Block(nn.Module):
    """One layer. All that changes the residual stream x is what attention and feed-forward add to it."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x, cos, sin, allowed=None, past=None):
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin, allowed, past))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


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
    ignored, and with nothing else it is 0 (chapter II-7)."""
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


class MiniMind(nn.Module):

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            dropout=nn.Dropout(config.dropout),
            layers=nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)]),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps),
        ))
        if config.positions == 'learned':
            self.model.embed_positions = nn.Embedding(config.context, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        with torch.device('cpu'):                       # computed, so not saved; there on a meta model too
            self.register_buffer('table', position_table(config), persistent=False)
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                # matrices that write into the residual stream start smaller, as 2 x layers of them add up
                # there (Radford et al. 2019, section 2.3)
                into_stream = 'o_proj' in name or 'down' in name
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.num_hidden_layers if into_stream else 1))

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
        x, cos, sin = self.model.embed_tokens(tokens), None, None                      # (B, T) -> (B, T, C)
        if self.config.positions == 'rope':
            cos, sin = self.table[:, positions].unsqueeze(2)                           # (B, 1, T, D) each
        elif self.config.positions == 'learned':
            x = x + self.model.embed_positions(positions)
        elif self.config.positions == 'sinusoidal':
            x = x + self.table[positions]
        x = self.model.dropout(x)
        for i, block in enumerate(self.model.layers):
            x = block(x, cos, sin, allowed, cache and cache.layer(i))
        x = self.model.norm(x)
        if cache is not None:
            cache.length += tokens.size(1)
        loss = None if targets is None else head_loss(x, self.lm_head.weight, targets)
        if self.training and loss is not None:
            return None, loss
        return self.lm_head(x) if head else x, loss                                    # (B, T, V)

    def auxiliary_loss(self, counted):
        """The load-balancing losses of all layers in the last forward, over the tokens where counted (B, T)
        is True: those with a target, no padding. 0 if it was not in training, or the model is dense."""
        moe = [block.mlp for block in self.model.layers if self.config.use_moe and block.mlp.routed]
        return sum((mlp.auxiliary_loss(counted) for mlp in moe), 0.0)

    def expert_load(self):
        """(layers, E): the share of the counted visits each expert got in that loss; 1 / E is fair."""
        return torch.stack([block.mlp.load for block in self.model.layers])

    def extend_context(self, factor=1.0, length=1):
        """Read texts of `length` tokens, for which RoPE needs a longer table but no parameters; with a
        factor, texts so many times longer than the model was trained on, by YaRN. ValueError where the
        positions cannot."""
        config = self.config
        if config.positions == 'learned' and length > config.context:
            raise ValueError(f"its learned positions end at {config.context}: it cannot read {length} tokens")
        if factor > 1:
            if config.positions != 'rope':
                raise ValueError(f"YaRN slows down RoPE, which positions={config.positions!r} have not")
            if config.rope_scaling:
                raise ValueError(f"the context is extended already: {config.rope_scaling}")
            trained = config.trained_length or config.context
            length = max(length, int(trained * factor))
            config = replace(config, rope_scaling=dict(rope_type='yarn', factor=float(factor),
                                                       original_max_position_embeddings=trained))
        self.config = replace(config, max_position_embeddings=max(config.context, length))
        if self.table is not None:
            self.table = position_table(self.config).to(self.table)

    def make_cache(self, batch_size, max_tokens):
        """An empty KV cache for `max_tokens` tokens, prompt and answer together."""
        return KVCache(self.config, batch_size, max_tokens, like=self.model.embed_tokens.weight)

    @classmethod
    def from_pretrained(cls, source, **changes):
        """The model of a Hugging Face folder (Llama, Qwen2, Qwen3, Qwen3-MoE, MiniMind) or of a .pth of
        MiniMind's: on the CPU, float32, in evaluation mode. changes: of its config, whose fields in `unseen`
        are guessed for a .pth. Raises OSError, ImportError or ValueError with one line."""
        try:
            state = weights_from_hf(read_weights(source))
            if os.path.isdir(source):
                config = config_from_hf(read_json(os.path.join(source, 'config.json')), state, source)
            elif 'model.embed_tokens.weight' in state:
                config = config_of_official(state, changes.get('num_attention_heads', 8))
            else:
                adapters = '.lora' in str([*state])
                what = "adapters alone, for lora.py --from_peft" if adapters else "no MiniMind"
                raise ValueError(f"{source} holds {what}, {min(state, default='nothing')!r} for one")
            return build_model(cls, replace(config, **changes), state, source)
        except (KeyError, IndexError, TypeError, ZeroDivisionError, RuntimeError) as e:
            raise ValueError(f"{source} is no model that can be read ({type(e).__name__}: {e})") from None

    def save_pretrained(self, folder, **extra):
        """Write a folder that transformers loads: as Llama, Qwen2 with attention_bias, Qwen3 with qk_norm,
        Qwen3-MoE if there are experts too; ValueError where none computes the same. extra: more for its
        config.json."""
        config, state = self.to_hf()
        write_model(folder, {**config, **extra}, state)

    def to_hf(self):
        """(config.json as a dict, {name: tensor}) as transformers has them; ValueError: see above."""
        state = weights_to_hf(self.state_dict())
        if self.config.tie_word_embeddings:             # transformers takes it from embed_tokens
            del state['lm_head.weight']
        return config_to_hf(self.config), state


# ---- formats of the weights ----

# config.json: model_type and its class in transformers; what keys must be where they are given; other names
CLASSES = dict(llama='LlamaForCausalLM', qwen2='Qwen2ForCausalLM', qwen3='Qwen3ForCausalLM',
               qwen3_moe='Qwen3MoeForCausalLM')
REQUIRED = dict(hidden_act='silu', attention_bias=False, mlp_bias=False, use_sliding_window=False,
                decoder_sparse_step=1, mlp_only_layers=[], scoring_func='softmax')
SYNONYMS = dict(num_local_experts='num_experts', n_routed_experts='num_experts',
                aux_loss_alpha='router_aux_loss_coef')
OURS = ('dropout', 'qk_norm', 'use_moe', 'n_shared_experts', 'attention_bias',     # no keys there
        'positions')
EXPERT_KEYS = ('num_experts', 'num_experts_per_tok', 'moe_intermediate_size', 'norm_topk_prob',
               'router_aux_loss_coef', 'seq_aux')
MINIMIND2 = dict(rms_norm_eps=1e-5, num_experts_per_tok=2, router_aux_loss_coef=0.01, seq_aux=True)
MINIMIND3 = dict(rms_norm_eps=1e-6, num_experts_per_tok=1, router_aux_loss_coef=5e-4, seq_aux=False)
COMPUTED = ('freqs_cos', 'freqs_sin', 'pos_cis', 'rotary_emb.inv_freq')     # RoPE tables in older files


def weights_from_hf(state):
    """{name: tensor} as this model has them: experts.0.gate_proj.weight, ... of each layer, or transformers'
    experts.gate_up_proj and down_proj, become the two stacks of Experts. KeyError if one is missing."""
    state = {name: value for name, value in state.items() if not name.endswith(COMPUTED)}
    for name in list(state):
        if name.endswith(('.experts.gate_up_proj', '.experts.down_proj')):
            state[name.removesuffix('_proj')] = state.pop(name).mT
        elif name.endswith('.experts.0.gate_proj.weight'):
            layer = name.removesuffix('.0.gate_proj.weight')
            E = len([n for n in state if n.startswith(layer) and n.endswith('.gate_proj.weight')])
            gate, up, down = ([state.pop(f'{layer}.{e}.{part}_proj.weight') for e in range(E)]     # (out, in)
                              for part in ('gate', 'up', 'down'))
            state[f'{layer}.gate_up'] = torch.stack([torch.cat(pair).mT for pair in zip(gate, up)])
            state[f'{layer}.down'] = torch.stack([matrix.mT for matrix in down])           # (E, in, out)
    return state


def weights_to_hf(state):
    """The reverse of weights_from_hf, with experts one by one, as MiniMind and Qwen3-MoE have them."""
    theirs = dict(state)
    for name in [name for name in state if '.experts.' in name]:
        layer, _, part = name.rpartition('.')
        parts = ('down',) if part == 'down' else ('gate', 'up')
        for part, matrices in zip(parts, theirs.pop(name).mT.chunk(len(parts), dim=1)):     # (E, out, in)
            theirs.update({f'{layer}.{e}.{part}_proj.weight': matrix for e, matrix in enumerate(matrices)})
    return theirs


def config_from_hf(hf, state, source):
    """The MiniMindConfig of a config.json and its weights; ValueError for what this model does not do."""
    kind = hf.get('model_type')
    if kind not in (*CLASSES, 'minimind'):
        raise ValueError(f"{source}: config.json describes a {kind!r}, not {', '.join(CLASSES)} or minimind")
    for key, value in REQUIRED.items():
        if hf.get(key) not in (value, None):
            raise ValueError(f"{source}: config.json has {key}={hf[key]!r}, this model only {value!r}")
    own = dict(num_key_value_heads=hf['num_attention_heads'], rope_theta=10000.0,
               tie_word_embeddings='lm_head.weight' not in state)
    third = any(name.endswith('q_norm.weight') for name in state)
    if kind == 'minimind':          # its older versions left out what they took for granted
        own.update(MINIMIND3 if third else MINIMIND2, rope_theta=MiniMindConfig.rope_theta,
                   tie_word_embeddings=True)
    own.update({SYNONYMS.get(key, key): value for key, value in hf.items() if value is not None})
    for key in ('rms_norm_eps', *(('num_experts_per_tok', 'norm_topk_prob') if kind == 'qwen3_moe' else ())):
        if key not in own:          # each library has another default, and a wrong one is not seen
            raise ValueError(f"{source}: config.json has no {key}")
    # transformers 5 has all of RoPE in one dictionary; before, theta stood apart
    rope = dict(hf.get('rope_scaling') or {}, **hf.get('rope_parameters') or {})
    own['rope_theta'] = rope.pop('rope_theta', own['rope_theta'])
    rope['rope_type'] = rope.pop('type', rope.get('rope_type', 'default'))
    kinds, unknown = ('default', 'yarn', 'llama3'), {'mscale', 'mscale_all_dim', 'truncate'}
    if rope['rope_type'] not in kinds or rope.keys() & unknown:
        raise ValueError(f"{source}: config.json scales RoPE by {rope}, this model only by plain YaRN or "
                         f"as Llama 3")
    if rope['rope_type'] == 'yarn':
        rope.setdefault('original_max_position_embeddings', hf['max_position_embeddings'])
    own['rope_scaling'] = None if rope['rope_type'] == 'default' else rope
    own['qk_norm'], own['attention_bias'] = third, kind == 'qwen2'
    own['use_moe'] = kind == 'qwen3_moe' or own.get('use_moe', False)
    return MiniMindConfig(**{key: own[key] for key in MiniMindConfig.__dataclass_fields__ if key in own})


def config_to_hf(config):
    """The config.json of the transformers model that computes the same; ValueError if there is none."""
    if config.use_moe and (config.n_shared_experts or not config.qk_norm):
        raise ValueError("transformers has no mixture with shared experts or without qk_norm")
    if config.positions != 'rope':
        raise ValueError(f"transformers has this model with RoPE, not with positions={config.positions!r}")
    if config.attention_bias and config.qk_norm:
        raise ValueError("transformers has no model with both attention_bias and qk_norm")
    kind = ('qwen3_moe' if config.use_moe else 'qwen3' if config.qk_norm else
            'qwen2' if config.attention_bias else 'llama')
    unused = OURS if config.use_moe else OURS + EXPERT_KEYS
    bias = {} if kind == 'qwen2' else dict(attention_bias=False)            # Qwen2 knows no other case
    return dict({key: value for key, value in asdict(config).items() if key not in unused}, **bias,
                model_type=kind, architectures=[CLASSES[kind]], hidden_act='silu',
                attention_dropout=config.dropout)


def config_of_official(state, heads):
    """The MiniMindConfig behind a .pth of MiniMind's, which holds only weights: sizes from their shapes, what
    no shape shows from the generation, MiniMind-3 if there are q_norm and k_norm, else MiniMind2. heads: how
    many of queries, where no q_norm shows their width."""
    shape = {name.removeprefix('model.layers.0.'): value.shape for name, value in state.items()}
    third, moe = 'self_attn.q_norm.weight' in shape, 'mlp.gate.weight' in shape
    V, C = shape['model.embed_tokens.weight']
    width = shape['self_attn.q_proj.weight'][0]
    if not third and (type(heads) is not int or heads < 1 or width % heads):
        raise ValueError(f"num_attention_heads must be a whole number that divides {width}, not {heads!r}")
    head_dim = shape['self_attn.q_norm.weight'][0] if third else width // heads
    embeddings, head = state['model.embed_tokens.weight'], state.get('lm_head.weight')
    return MiniMindConfig(
        vocab_size=V, hidden_size=C, head_dim=head_dim, qk_norm=third, use_moe=moe,
        intermediate_size=shape['mlp.experts.down' if moe else 'mlp.down_proj.weight'][1],
        num_hidden_layers=len([name for name in shape if name.endswith('input_layernorm.weight')]),
        num_attention_heads=width // head_dim, attention_bias='self_attn.q_proj.bias' in shape,
        tie_word_embeddings=head is None or torch.equal(head, embeddings),
        num_key_value_heads=shape['self_attn.k_proj.weight'][0] // head_dim,
        num_experts=shape['mlp.gate.weight'][0] if moe else 4,
        n_shared_experts=len([name for name in shape if name.startswith('mlp.shared_experts.')]) // 3,
        **(MINIMIND3 if third else MINIMIND2))


if __name__ == '__main__':
    parts = {}
    for name, p in MiniMind(MiniMindConfig()).named_parameters():
        part = name.split('.')[3] if '.layers.' in name else name.split('.')[1]
        parts[part] = parts.get(part, 0) + p.numel()
    for part, count in [*parts.items(), ('total', sum(parts.values()))]:
        print(f"{part:25}{count:12,}")
    print("\nKV cache of one layer, 4096 wide, 32 heads, 1024 tokens, float32 (chapter II-5)")
    for kind, kv_heads in (('multi-head', 32), ('grouped-query', 8), ('multi-query', 1)):
        config = MiniMindConfig(hidden_size=4096, num_hidden_layers=1, num_attention_heads=32,
                                num_key_value_heads=kv_heads)
        print(f"{kind:17}{kv_heads:3} heads{kv_cache_bytes(config, tokens=1024):17,} bytes")
