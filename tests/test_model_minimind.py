"""MiniMind against its formulas, and transformers' Llama, Qwen3 and Qwen3-MoE."""
import json
import math
from dataclasses import asdict

import pytest
import torch
from conftest import read
from torch import nn
from torch.nn import functional as F

import model_minimind
import pretrain
from configurator import Run, read_config_file, save_checkpoint
from model_minimind import (POSITIONS, Attention, MiniMind, MiniMindConfig, RMSNorm, apply_rope,
                            kv_cache_bytes, plain_attention, plain_rms_norm, rope_table)
from train_tokenizer import encode_chat

TINY = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=64)
MOE = dict(qk_norm=True, use_moe=True, num_experts=4, moe_intermediate_size=24, norm_topk_prob=True)
YARN = dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
OTHERS = [kind for kind in POSITIONS if kind != 'rope']


def tiny(**changes):
    """A tiny model in evaluation mode, norms too with random weights, so that none can be left out unseen."""
    model = MiniMind(MiniMindConfig(**{**TINY, **changes})).eval()
    for p in model.parameters():
        nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    return model


def tokens(B=2, T=24):
    return torch.randint(TINY['vocab_size'], (B, T))


# ---- parts (chapters II-2, II-4, II-5) ----

def test_rmsnorm_is_layernorm_on_zero_mean():
    x = torch.randn(3, 16)
    x -= x.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(RMSNorm(16, 1e-5)(x), nn.functional.layer_norm(x, (16,), eps=1e-5))
    assert not torch.allclose(RMSNorm(16, 1e-5)(x + 1), nn.functional.layer_norm(x + 1, (16,)), atol=0.1)


@pytest.mark.parametrize('dtype, tolerance', [(torch.float32, 1e-6), (torch.bfloat16, 0)])
def test_rmsnorm_is_its_formula(dtype, tolerance):
    norm, x = RMSNorm(48, 1e-5), torch.randn(3, 7, 48).to(dtype).requires_grad_()
    nn.init.normal_(norm.weight, mean=1, std=0.2)
    results = []
    for y in (norm(x), plain_rms_norm(x.float(), norm.weight, 1e-5).to(dtype)):
        y.float().square().sum().backward()
        results.append([y, x.grad, norm.weight.grad])
        x.grad = norm.weight.grad = None
    for fused, plain in zip(*results):
        torch.testing.assert_close(fused, plain, atol=tolerance, rtol=tolerance)
    assert norm(100 * torch.ones(48, dtype=torch.float16)).isfinite().all()     # though 100^2 x 48 is not


def rope(x, position):
    config = MiniMindConfig(hidden_size=len(x), num_attention_heads=1, num_key_value_heads=1, rope_theta=1e4,
                            max_position_embeddings=1024)
    cos, sin = rope_table(config)
    return apply_rope(torch.tensor(x)[None, None, None], cos[position:position + 1],
                      sin[position:position + 1]).flatten()


def test_a_score_depends_on_the_distance_alone():
    q, k = torch.randn(2, 8).tolist()
    scores = [(rope(q, m) @ rope(k, m + 7)).item() for m in (0, 1, 100, 900)]
    assert scores == pytest.approx([scores[0]] * 4, abs=1e-4)
    assert (rope(q, 0) @ rope(k, 8)).item() != pytest.approx(scores[0], abs=1e-4)


@pytest.mark.parametrize('kv_heads', [4, 2, 1], ids=['multi-head', 'grouped-query', 'multi-query'])
def test_attention_is_its_formula(kv_heads, monkeypatch):
    model, x = tiny(num_key_value_heads=kv_heads), tokens()
    fused = model(x)[0]

    def formula(q, k, v, attn_mask, is_causal, **_):
        T = q.size(2)
        return plain_attention(q, k, v, torch.ones(T, T, dtype=torch.bool).tril() if is_causal else attn_mask)
    monkeypatch.setattr(model_minimind.F, 'scaled_dot_product_attention', formula)
    torch.testing.assert_close(model(x)[0], fused, atol=1e-4, rtol=1e-4)


def test_kv_cache_bytes(script):
    sizes = [kv_cache_bytes(MiniMindConfig(hidden_size=4096, num_attention_heads=32, num_hidden_layers=1,
                                           num_key_value_heads=heads), tokens=1024) for heads in (32, 8, 1)]
    cache = tiny().make_cache(3, 10)
    assert sum(t.nbytes for t in cache.keys + cache.values) == kv_cache_bytes(MiniMindConfig(**TINY), 10, 3)
    printed = script('model_minimind.py').stdout
    assert '25,829,888' in printed and all(f'{size:,} bytes' in printed for size in sizes)


# ---- the model as a whole ----

@pytest.mark.parametrize('name, count', [
    ('minimind2_small', 25_829_888), ('minimind2', 104_030_976), ('minimind2_moe', 145_029_760),
    ('minimind3', 63_912_192), ('minimind3_moe', 198_416_640)])
def test_the_presets_are_the_official_sizes(name, count):
    settings = {key: value for key, (value, _) in read_config_file(f'config/{name}.py').items()}
    assert settings.keys() <= vars(pretrain).keys()
    named = dict(n_embd='hidden_size', n_layer='num_hidden_layers', n_head='num_attention_heads',
                 n_kv_head='num_key_value_heads')
    sizes = {named.get(key, key): value for key, value in settings.items()}
    with torch.device('meta'):
        model = MiniMind(MiniMindConfig(**{key: value for key, value in sizes.items()
                                           if key in MiniMindConfig.__dataclass_fields__}))
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize('kind', [dict(), MOE], ids=['dense', 'moe'])
def test_the_future_changes_nothing(kind):
    model, x = tiny(**kind), tokens()
    y = x.clone()
    y[:, 15:] = (y[:, 15:] + 1) % 64
    torch.testing.assert_close(model(x)[0][:, :15], model(y)[0][:, :15])


@pytest.mark.parametrize('kind', [dict(), dict(num_key_value_heads=1), MOE, *(
    dict(positions=positions) for positions in OTHERS)], ids=['gqa', 'mqa', 'moe', *OTHERS])
@pytest.mark.parametrize('pieces', [[24], [10, 14], [1] * 24, [5, 1, 1, 17]])
def test_cached_is_uncached(kind, pieces):
    model, x = tiny(**kind), tokens()
    for recorded in (False, True):
        logits = read(model, model.make_cache(2, 24), x.split(pieces, dim=1), recorded)
        torch.testing.assert_close(logits, model(x)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('recorded', [False, True])
@pytest.mark.parametrize('positions', POSITIONS)
def test_a_padded_row_is_the_row_alone(positions, recorded):
    model, x = tiny(positions=positions), tokens()
    cache = model.make_cache(2, 30)
    cache.padding = torch.tensor([0, 9])
    logits = read(model, cache, x.split([12, 1, 11], dim=1), recorded)
    torch.testing.assert_close(logits[1:, 9:], model(x[1:, 9:])[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize('positions', POSITIONS)
def test_packed_documents_are_documents_alone(positions):
    model, x = tiny(positions=positions), tokens()
    segments = torch.tensor([[0] * 5 + [1] * 12 + [2] * 7, [3] * 23 + [4]])
    targets = x.clone()
    logits, loss = model(x, targets, segments=segments)
    total = 0
    for row in range(2):
        for document in segments[row].unique():
            own = segments[row] == document
            alone, own_loss = model(x[row, own][None], targets[row, own][None])
            torch.testing.assert_close(logits[row, own], alone[0], atol=1e-4, rtol=1e-4)
            total += own_loss * own.sum()
    assert loss.item() == pytest.approx(total.item() / x.numel(), rel=1e-4)
    torch.testing.assert_close(model(x, segments=torch.zeros_like(x))[0], model(x)[0], atol=1e-4, rtol=1e-4)


def test_too_long_is_refused():
    with pytest.raises(ValueError, match='65 tokens exceed the context of 64'):
        tiny()(tokens(T=65))
    with pytest.raises(ValueError, match='larger than the context'):
        tiny().make_cache(1, 65)


@pytest.mark.parametrize('changes, name', [
    (dict(hidden_size=30), 'num_attention_heads'), (dict(num_key_value_heads=3), 'num_key_value_heads'),
    (dict(head_dim=7), 'head_dim'), (dict(use_moe=True, num_experts_per_tok=5), 'num_experts_per_tok'),
    (dict(use_moe=True, moe_intermediate_size=20), 'moe_intermediate_size'),
    (dict(positions='rotary'), 'one of rope, learned, sinusoidal, none')])
def test_impossible_sizes_are_named(changes, name):
    with pytest.raises(ValueError, match=name):
        MiniMindConfig(**{**TINY, **changes})


# ---- transformers (chapter II-7) ----

def same_logits(ours, theirs, x):
    """Whether the two agree on x, in one piece and with transformers' own cache."""
    with torch.no_grad():
        expected = theirs(x).logits
        torch.testing.assert_close(ours(x)[0], expected, atol=1e-5, rtol=1e-5)
        cache, past = ours.make_cache(len(x), x.size(1)), None
        for piece in x.split([15, 1, 8], dim=1):
            out = theirs(piece, past_key_values=past, use_cache=True)
            past = out.past_key_values
            torch.testing.assert_close(ours(piece, cache=cache)[0], out.logits, atol=1e-5, rtol=1e-5)


KINDS = {
    'Llama': dict(), 'Llama-multi-head': dict(num_key_value_heads=4), 'Llama-yarn': dict(rope_scaling=YARN),
    'Llama-llama3': dict(rope_scaling=LLAMA3, rope_theta=500.0), 'Qwen2': dict(attention_bias=True),
    'Llama-untied': dict(tie_word_embeddings=False), 'Qwen3': dict(qk_norm=True, head_dim=16),
    'Qwen3-yarn': dict(qk_norm=True, rope_scaling=dict(YARN, attention_factor=1.1, beta_fast=8, beta_slow=2)),
    'Qwen3Moe': dict(MOE, num_experts_per_tok=2), 'Qwen3Moe-top1': dict(MOE, num_experts_per_tok=1),
    'Qwen3Moe-not-renormalised': dict(MOE, norm_topk_prob=False)}


@pytest.mark.parametrize('kind', KINDS)
def test_transformers_computes_the_same(kind, tmp_path):
    transformers = pytest.importorskip('transformers')
    ours = tiny(**KINDS[kind])
    ours.save_pretrained(tmp_path / 'ours', eos_token_id=2)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'ours', dtype=torch.float32).eval()
    assert type(theirs).__name__ == kind.split('-')[0] + 'ForCausalLM'
    same_logits(ours, theirs, tokens())
    # and back, from what transformers writes; other weights, so that nothing can be left over
    for p in theirs.parameters():
        nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    theirs.save_pretrained(tmp_path / 'theirs')
    again = MiniMind.from_pretrained(str(tmp_path / 'theirs'))
    same_logits(again, theirs, tokens())
    assert asdict(again.config) == {**asdict(ours.config), 'rope_scaling': again.config.rope_scaling,
                                    'router_aux_loss_coef': again.config.router_aux_loss_coef}


def test_stacked_experts_load_too(tmp_path):
    transformers = pytest.importorskip('transformers')
    ours = tiny(**MOE)
    ours.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    state = theirs.state_dict()                         # since transformers 5, with experts stacked
    (tmp_path / 'model.safetensors').unlink(missing_ok=True)
    torch.save(state, tmp_path / 'pytorch_model.bin')
    same_logits(MiniMind.from_pretrained(str(tmp_path)), theirs, tokens())


def test_yarn_frequencies_are_transformers(tmp_path):
    utils = pytest.importorskip('transformers.modeling_rope_utils')
    from transformers import LlamaConfig
    scaling = dict(YARN, factor=16.0, original_max_position_embeddings=2048, beta_fast=32, beta_slow=1)
    config = MiniMindConfig(max_position_embeddings=32768, rope_scaling=scaling)
    theirs = LlamaConfig(hidden_size=512, num_attention_heads=8, max_position_embeddings=32768,
                         rope_parameters=dict(scaling, rope_theta=1e6))
    frequencies, factor = utils.ROPE_INIT_FUNCTIONS['yarn'](theirs, torch.device('cpu'))
    cos, sin = rope_table(config)
    for position in (1, 100, 30000):
        angles = position * frequencies.double()
        torch.testing.assert_close(cos[position, :32].double(), angles.cos() * factor, atol=5e-3, rtol=0)
        torch.testing.assert_close(sin[position, :32].double(), angles.sin() * factor, atol=5e-3, rtol=0)
    # the fastest pair keeps its frequency, the slowest is slowed down by the whole factor
    plain = rope_table(MiniMindConfig(max_position_embeddings=64))[1]
    grow = 0.1 * math.log(16) + 1
    assert sin[1, 0].item() == pytest.approx(plain[1, 0].item() * grow, rel=1e-5)
    assert sin[16, 31].item() == pytest.approx(plain[1, 31].item() * grow, rel=1e-3)


def test_a_longer_context_keeps_the_trained_length(tmp_path):
    model = tiny()
    model.extend_context(4)
    assert model.config.context == 256 and model.config.rope_scaling['original_max_position_embeddings'] == 64
    x = tokens(T=200)
    assert model(x)[0].isfinite().all()
    model.save_pretrained(tmp_path)
    again = MiniMind.from_pretrained(str(tmp_path))
    assert again.config == model.config
    torch.testing.assert_close(again(x)[0], model(x)[0])
    with pytest.raises(ValueError, match='extended already'):
        model.extend_context(2)


# ---- positions to compare with (chapters II-3, II-4) ----

@pytest.mark.parametrize('positions', POSITIONS)
def test_positions_tell_order_where_there_are_any(positions):
    """One layer sees no order in what it looks at, but for positions: swap two tokens before the last."""
    model, x = tiny(positions=positions, num_hidden_layers=1), tokens(B=1, T=8)
    x[0, :2] = torch.tensor([5, 9])
    last, swapped = model(x)[0][0, -1], model(x[:, [1, 0, 2, 3, 4, 5, 6, 7]])[0][0, -1]
    assert torch.allclose(last, swapped, atol=1e-4) == (positions == 'none')
    assert sum('embed_positions' in name for name, _ in model.named_parameters()) == (positions == 'learned')


def test_a_longer_context_is_computed_or_refused(tmp_path):
    for positions in OTHERS:
        model, x = tiny(positions=positions), tokens(T=80)
        with pytest.raises(ValueError, match="YaRN slows down RoPE"):
            model.extend_context(4)
        if positions == 'learned':
            with pytest.raises(ValueError, match='learned positions end at 64: it cannot read 80 tokens'):
                model.extend_context(length=80)
            continue
        before = model(x[:, :64])[0]
        model.extend_context(length=80)
        torch.testing.assert_close(model(x)[0][:, :64], before, atol=1e-4, rtol=1e-4)
        with pytest.raises(ValueError, match=f"RoPE, not with positions='{positions}'"):
            model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="rope_scaling is for positions='rope'"):
        MiniMindConfig(**TINY, positions='none', rope_scaling=YARN)


def test_a_run_of_other_positions_is_kept_and_refused_by_others(script, tmp_path, tokenizer):
    for positions in OTHERS:
        config = MiniMindConfig(**{**TINY, 'vocab_size': tokenizer.vocab_size}, positions=positions)
        run = Run(torch.device('cpu'), torch.float32, 0, 1)
        save_checkpoint(run, tmp_path / positions, tokenizer, config, step=0, settings={},
                        model=MiniMind(config).state_dict())
        script('sample.py', f'--out_dir={positions}', '--start=The', '--max_new_tokens=3')
        for option, words in (('--export_dir=hf', 'transformers has this model with RoPE'),
                              ('--yarn_factor=2', 'YaRN slows down RoPE')):
            assert words in script('sample.py', f'--out_dir={positions}', option, code=2).stderr


# ---- MiniMind's own checkpoints ----

OFFICIAL = {
    'full_sft_512.pth': dict(num_attention_heads=8, head_dim=4, rms_norm_eps=1e-5),
    'full_sft_640_moe.pth': dict(num_attention_heads=8, head_dim=4, rms_norm_eps=1e-5, use_moe=True,
                                 num_experts_per_tok=2, n_shared_experts=1),
    'full_sft_768.pth': dict(num_attention_heads=4, qk_norm=True, rms_norm_eps=1e-6),
    'full_sft_768_moe.pth': dict(num_attention_heads=4, qk_norm=True, rms_norm_eps=1e-6, use_moe=True,
                                 num_experts_per_tok=1)}


@pytest.mark.parametrize('name', OFFICIAL)
def test_official_weights_load_by_name(name, tmp_path):
    model = tiny(**OFFICIAL[name]).half()
    state = model_minimind.weights_to_hf(model.state_dict())          # MiniMind names experts one by one
    assert 'lm_head.weight' in state and 'model.embed_tokens.weight' in state
    # half precision, and the tables which old checkpoints carry
    state.update({'model.freqs_cos': torch.ones(8, 4), 'model.freqs_sin': torch.zeros(8, 4)})
    torch.save(state, tmp_path / name)
    again, x = MiniMind.from_pretrained(str(tmp_path / name)), tokens()
    for key, value in OFFICIAL[name].items():
        assert getattr(again.config, key) == value, key
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert again.lm_head.weight.dtype == torch.float32
    reference = tiny(**OFFICIAL[name])
    reference.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    torch.testing.assert_close(again(x)[0], reference(x)[0])


def test_the_config_of_minimind_itself(tmp_path):
    """A folder as MiniMind's own PretrainedConfig writes it, second generation, with experts."""
    model = tiny(use_moe=True, n_shared_experts=1, num_attention_heads=8)
    torch.save(model_minimind.weights_to_hf(model.state_dict()), tmp_path / 'pytorch_model.bin')
    (tmp_path / 'config.json').write_text(json.dumps(dict(
        model_type='minimind', architectures=['MiniMindForCausalLM'], hidden_act='silu', hidden_size=32,
        intermediate_size=None, max_position_embeddings=64, num_attention_heads=8, num_hidden_layers=2,
        num_key_value_heads=2, vocab_size=64, rms_norm_eps=1e-5, rope_theta=1000000.0, rope_scaling=None,
        use_moe=True, num_experts_per_tok=2, n_routed_experts=4, n_shared_experts=1, scoring_func='softmax',
        aux_loss_alpha=0.1, seq_aux=True, norm_topk_prob=True, flash_attn=True)))
    again, x = MiniMind.from_pretrained(str(tmp_path)), tokens()
    assert again.config.router_aux_loss_coef == 0.1
    torch.testing.assert_close(again(x)[0], model(x)[0])


@pytest.mark.parametrize('kind, expected', [
    (dict(n_shared_experts=1), model_minimind.MINIMIND2), (dict(qk_norm=True), model_minimind.MINIMIND3)])
@pytest.mark.parametrize('head', [True, False])
def test_a_folder_of_minimind_is_what_its_generation_takes_for_granted(tmp_path, kind, expected, head):
    """Tied, whether the head is stored or not, and a router that is balanced as its own."""
    model = tiny(use_moe=True, num_experts_per_tok=expected['num_experts_per_tok'], num_attention_heads=8,
                 rms_norm_eps=expected['rms_norm_eps'], **kind)
    state = model_minimind.weights_to_hf(model.state_dict())
    if not head:
        del state['lm_head.weight']
    torch.save(state, tmp_path / 'pytorch_model.bin')
    (tmp_path / 'config.json').write_text(json.dumps(dict(
        model_type='minimind', hidden_size=32, num_attention_heads=8, num_hidden_layers=2, vocab_size=64,
        num_key_value_heads=2, max_position_embeddings=64, use_moe=True, intermediate_size=128, **kind)))
    again, x = MiniMind.from_pretrained(str(tmp_path)), tokens()
    assert again.lm_head.weight is again.model.embed_tokens.weight and again.config.norm_topk_prob
    assert expected.items() <= asdict(again.config).items() and again.config.rope_theta == 1e6
    torch.testing.assert_close(again(x)[0], model(x)[0])


def test_theta_of_rope_in_all_spellings(tmp_path):
    """transformers 4.57 has rope_theta and rope_scaling, 5 has rope_parameters; older ones wrote 'type'."""
    model, x = tiny(rope_theta=77.0, rope_scaling=LLAMA3), tokens()
    model.save_pretrained(tmp_path)
    hf = json.loads((tmp_path / 'config.json').read_text())
    del hf['rope_theta'], hf['rope_scaling']
    old = {'type' if key == 'rope_type' else key: value for key, value in LLAMA3.items()}
    for rope in (dict(rope_parameters=dict(LLAMA3, rope_theta=77.0)), dict(rope_theta=77.0, rope_scaling=old),
                 dict(rope_theta=77.0, rope_parameters=LLAMA3)):
        (tmp_path / 'config.json').write_text(json.dumps({**hf, **rope}))
        torch.testing.assert_close(MiniMind.from_pretrained(str(tmp_path))(x)[0], model(x)[0])


def test_what_does_not_fit_is_refused(tmp_path):
    model = tiny()
    state = model.state_dict()

    def refused(match, weights=state, **config):
        model.save_pretrained(tmp_path)
        hf = json.loads((tmp_path / 'config.json').read_text())
        (tmp_path / 'config.json').write_text(json.dumps({**hf, **config}))
        (tmp_path / 'model.safetensors').unlink(missing_ok=True)
        torch.save(weights, tmp_path / 'pytorch_model.bin')
        with pytest.raises(ValueError, match=match) as e:
            MiniMind.from_pretrained(str(tmp_path))
        assert len(str(e.value).splitlines()) == 1

    refused("'mistral'", model_type='mistral')
    refused("attention_bias=True", attention_bias=True)
    refused("scales RoPE", rope_scaling=dict(rope_type='longrope', factor=8))
    refused("low_freq_factor must be a number", rope_scaling=dict(
        rope_type='llama3', factor=8, original_max_position_embeddings=16))
    refused("low_freq_factor must be below", rope_scaling={**LLAMA3, 'low_freq_factor': 4.0})
    refused(r'embed_tokens.weight is \(64, 32\)', vocab_size=65)
    refused('has no place', {**state, 'model.extra': torch.ones(1)})
    refused('norm.weight is missing', {k: v for k, v in state.items() if k != 'model.norm.weight'})
    refused('should be one matrix', {**state, 'lm_head.weight': torch.zeros(64, 32)})
    (tmp_path / 'text.pth').write_text('no weights')
    with pytest.raises(ValueError, match='holds no weights'):
        MiniMind.from_pretrained(str(tmp_path / 'text.pth'))
    with pytest.raises(OSError, match='neither'):
        MiniMind.from_pretrained(str(tmp_path / 'nowhere'))


@pytest.mark.parametrize('kind, reason', [(dict(use_moe=True), 'without qk_norm'),
                                          (dict(MOE, n_shared_experts=1), 'shared experts'),
                                          (dict(qk_norm=True, attention_bias=True), 'attention_bias')])
def test_what_transformers_cannot_compute_is_not_exported(kind, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        tiny(**kind).save_pretrained(tmp_path / 'hf')
    assert not (tmp_path / 'hf').exists()


@pytest.mark.parametrize('change, reason', [
    (dict(num_attention_heads='four'), "num_attention_heads must be a whole number from 1 .*, not 'four'"),
    (dict(num_key_value_heads=0), 'num_key_value_heads must be .* not 0'),
    (dict(num_hidden_layers=1.5), 'not 1.5'), (dict(num_hidden_layers=2**63), 'from 1 to 1000, not 9223'),
    (dict(num_experts='4'), "not '4'"), (dict(num_experts=True), 'not True'),
    (dict(rms_norm_eps='x'), "not 'x'"), (dict(rms_norm_eps=math.nan), 'not nan'),
    (dict(head_dim=1 << 20, max_position_embeddings=1 << 20), '1048576 x 1048576 at most'),
    (dict(rope_parameters=dict(rope_type='yarn')), 'factor must be a number above 0, not None'),
    (dict(norm_topk_prob=None), 'no norm_topk_prob'), (dict(rms_norm_eps=None), 'no rms_norm_eps')])
def test_a_damaged_config_is_refused(tmp_path, change, reason):
    tiny(**MOE).save_pretrained(tmp_path)
    hf = {**json.loads((tmp_path / 'config.json').read_text()), **change}
    (tmp_path / 'config.json').write_text(json.dumps({k: v for k, v in hf.items() if v is not None}))
    with pytest.raises(ValueError, match=reason):
        MiniMind.from_pretrained(str(tmp_path))


def test_cut_weights_are_refused(tmp_path):
    pytest.importorskip('safetensors')
    tiny().save_pretrained(tmp_path)
    file = tmp_path / 'model.safetensors'
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match='model.safetensors holds no weights'):
        MiniMind.from_pretrained(str(tmp_path))


def test_export_of_a_run(script, tmp_path, tokenizer):
    transformers = pytest.importorskip('transformers')
    model = tiny(vocab_size=tokenizer.vocab_size, qk_norm=True)
    tokenizer.save(tmp_path / 'run')
    save_checkpoint(Run(torch.device('cpu'), torch.float32, 0, 1), str(tmp_path / 'run'), tokenizer,
                    model.config, step=1, settings={}, model=model.state_dict())
    script('sample.py', '--out_dir=run', '--export_dir=hf', '--yarn_factor=2')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf', dtype=torch.float32).eval()
    model.extend_context(2)
    same_logits(model, theirs, tokens())
    assert theirs.generation_config.eos_token_id == [tokenizer.eot, tokenizer.im_end]
    chat = [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Who is <|im_end|>?\n'}]
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    text = auto.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = encode_chat(tokenizer, chat, add_generation_prompt=True)[0]
    assert tokenizer.decode(ids) == text
    chat[1]['content'] = 'Who reads the rules?\n'       # no special token typed in: equal ids too
    ids = encode_chat(tokenizer, chat, add_generation_prompt=True)[0]
    assert auto.apply_chat_template(chat, add_generation_prompt=True)['input_ids'] == ids
    assert auto.encode('The keeper reads') == tokenizer.encode('The keeper reads')
    line = script('sample.py', '--out_dir=run', '--export_dir=run/ckpt.pt', code=2).stderr
    assert 'cannot make the folder run/ckpt.pt' in line


@pytest.mark.parametrize('tokens, mask, dtype, heads', [
    (4, True, torch.bfloat16, (4, 4)), (4, False, torch.float32, (4, 4)),
    (4, False, torch.bfloat16, (4, 2)), (1, True, torch.bfloat16, (2, 2))], ids=str)
def test_on_a_gpu_a_fast_kernel_fits(monkeypatch, tokens, mask, dtype, heads):
    """Flash attention knows groups, but neither masks nor float32: then there are as many keys as queries.
    Tensors without numbers, on the device meta, stand in for a GPU's."""
    seen = []

    def kernel(q, k, v, **how):
        seen.append((q.size(1), k.size(1)))
        return torch.empty_like(q)
    monkeypatch.setattr(F, 'scaled_dot_product_attention', kernel)
    config = MiniMindConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2)
    with torch.device('meta'):
        x, cos, sin = torch.empty(2, tokens, 32, dtype=dtype), *torch.empty(2, 1, 1, tokens, 8)
        allowed = torch.empty(2, 1, tokens, tokens, dtype=torch.bool) if mask else None
        y = Attention(config).to(dtype)(x, cos, sin, allowed)
    assert y.shape == x.shape and seen == [heads]
