"""model_gpt2.py against its own formulas and transformers; GPT-2 in pretrain.py."""
import json
import math
import sys
import time

import pytest
import torch
import torch.nn as nn
from conftest import TEXT, numbers, read
from torch.nn import functional as F

from configurator import read_weights
from model_gpt2 import GPT2, GPT2Config, plain_attention, plain_gelu, plain_layer_norm, weights_to_hf
from prepare import Piece, write_data
from pretrain import make_optimizers
from sample import generate, load_run

SIZES = [dict(vocab_size=211, n_positions=96, n_embd=48, n_layer=3, n_head=4),
         dict(vocab_size=503, n_positions=128, n_embd=128, n_layer=2, n_head=2)]


def random_model(size=SIZES[0], std=0.2, **options):
    """A model with all weights random, and so large that every part matters."""
    model = GPT2(GPT2Config(**size, **options)).eval()
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=std)
    return model


# ---- the formulas, the cache and the mask ----

def test_kernels_are_the_formulas():
    x, weight, bias = torch.randn(2, 5, 48), torch.randn(48), torch.randn(48)
    torch.testing.assert_close(F.layer_norm(x, (48,), weight, bias), plain_layer_norm(x, weight, bias))
    torch.testing.assert_close(F.gelu(x, approximate='tanh'), plain_gelu(x))
    attention = random_model().transformer.h[0].attn
    q, k, v = (t.view(2, 5, 4, 12).transpose(1, 2) for t in attention.c_attn(x).split(48, dim=-1))
    plain = plain_attention(q, k, v, torch.ones(5, 5, dtype=torch.bool).tril())
    plain = attention.c_proj(plain.transpose(1, 2).reshape(2, 5, 48))
    torch.testing.assert_close(attention(x), plain)


@pytest.mark.parametrize('options', [dict(), dict(qkv_bias=False, tie_word_embeddings=False)])
def test_cached_in_chunks_is_uncached_and_the_future_is_unseen(options):
    model = random_model(**options)
    tokens = torch.randint(211, (2, 40))
    with torch.no_grad():
        whole, cache = model(tokens)[0], model.make_cache(2, 40)
        parts = tokens.split([7, 1, 20, 12], dim=1)
        chunks = torch.cat([model(part, cache=cache)[0] for part in parts], dim=1)
        torch.testing.assert_close(chunks, whole, atol=1e-4, rtol=1e-4)
        recorded = read(model, model.make_cache(2, 40), parts, recorded=True)
        torch.testing.assert_close(recorded, whole, atol=1e-4, rtol=1e-4)
        changed = tokens.clone()
        changed[:, 25] = (changed[:, 25] + 1) % 211
        assert torch.equal(model(changed)[0][:, :25], whole[:, :25])
        assert not torch.allclose(model(changed)[0][:, 25:], whole[:, 25:])
    with pytest.raises(ValueError, match='exceed the cache of 40'):
        model(tokens[:, :1], cache=cache)
    with pytest.raises(ValueError, match='exceed the context of 96'):
        model(torch.zeros(1, 97, dtype=torch.long))


@pytest.mark.parametrize('recorded', [False, True])
def test_a_padded_row_is_the_row_alone(recorded):
    model, tokens = random_model(), torch.randint(211, (3, 20))
    cache = model.make_cache(3, 30)
    cache.padding = torch.tensor([0, 6, 19])
    with torch.no_grad():
        together = read(model, cache, tokens.split([12, 8], dim=1), recorded)
        for row, pad in enumerate(cache.padding.tolist()):
            alone = model(tokens[row:row + 1, pad:])[0][0]
            torch.testing.assert_close(together[row, pad:], alone, atol=1e-4, rtol=1e-4)


def test_dropout_is_for_training_and_muon_takes_the_matrices_of_the_blocks():
    model, tokens = random_model(dropout=0.5), torch.randint(211, (1, 9))
    assert torch.equal(model(tokens)[0], model(tokens)[0])
    model.train()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    muon = make_optimizers(model, 'muon', 1e-3, 0.1)[1]
    assert sum(len(g['params']) for g in muon.param_groups) == 3 * 4


def test_generation_with_the_cache_is_the_same_and_much_faster():
    model = GPT2(GPT2Config(vocab_size=1000, n_positions=512, n_embd=256, n_layer=4, n_head=4)).eval()
    texts, seconds = [], []
    for use_cache in (True, False):
        start = time.time()
        texts.append([new.item() for new in generate(model, torch.tensor([[7, 8]]), 384, temperature=0,
                                                     use_cache=use_cache)])
        seconds.append(time.time() - start)
    assert texts[0] == texts[1] and len(texts[0]) == 384
    assert seconds[1] > 2 * seconds[0], seconds


# ---- Hugging Face's layout ----

@pytest.fixture(scope='module')
def transformers():
    return pytest.importorskip('transformers')


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('file', ['model.safetensors', 'pytorch_model.bin'])
def test_transformers_weights_give_its_logits_and_its_text(transformers, tmp_path, size, file):
    config = transformers.GPT2Config(**size, bos_token_id=0, eos_token_id=0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.1)
    theirs.save_pretrained(tmp_path)
    if file == 'pytorch_model.bin':                     # as OpenAI's are: no prefix, and buffers within
        state = {k.removeprefix('transformer.'): v for k, v in theirs.transformer.state_dict().items()}
        state['h.0.attn.bias'] = torch.ones(1, 1, 96, 96).tril()
        state['h.0.attn.masked_bias'] = torch.tensor(-1e4)
        (tmp_path / 'model.safetensors').unlink()
        torch.save(state, tmp_path / file)
    ours = GPT2.from_pretrained(tmp_path)
    assert not ours.training and ours.lm_head.weight is ours.transformer.wte.weight
    tokens = torch.randint(size['vocab_size'], (2, 30))
    with torch.no_grad():
        expected, cache = theirs(tokens).logits, ours.make_cache(2, 30)
        cached = torch.cat([ours(part, cache=cache)[0] for part in tokens.split([25, 1, 4], dim=1)], dim=1)
        assert (ours(tokens)[0] - expected).abs().max() < 1e-4
        assert (cached - expected).abs().max() < 1e-4
    text = torch.stack(list(generate(ours, tokens[:1], 64, temperature=0)), dim=1)
    expected = theirs.generate(tokens[:1], max_new_tokens=64, do_sample=False, eos_token_id=None)
    assert text.tolist() == expected[:, 30:].tolist()


@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('options', [dict(), dict(qkv_bias=False, tie_word_embeddings=False)])
def test_our_weights_give_our_logits_in_transformers(transformers, tmp_path, size, options):
    model, tokens = random_model(size, std=0.1, **options), torch.randint(size['vocab_size'], (2, 40))
    model.save_pretrained(tmp_path, bos_token_id=0, eos_token_id=0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = GPT2.from_pretrained(tmp_path)
    assert again.config == model.config
    with torch.no_grad():
        assert (theirs(tokens).logits - model(tokens)[0]).abs().max() < 1e-4
        assert torch.equal(again(tokens)[0], model(tokens)[0])


def test_without_safetensors_there_are_bins(tmp_path, monkeypatch):
    model, tokens = random_model(), torch.randint(211, (1, 9))
    model.save_pretrained(tmp_path / 'safe')
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)
    model.save_pretrained(tmp_path / 'bin')
    assert (tmp_path / 'bin' / 'pytorch_model.bin').exists()
    assert torch.equal(GPT2.from_pretrained(tmp_path / 'bin')(tokens)[0], model(tokens)[0])
    with pytest.raises(ImportError, match='pip install safetensors'):
        GPT2.from_pretrained(tmp_path / 'safe')


@pytest.mark.parametrize('change, words', [
    (dict(n_embd=24), r'wte.weight is \(211, 48\), but its config asks for \(211, 24\)'),
    (dict(n_layer=4), 'h.3.ln_1.weight is missing'),
    (dict(n_layer=2), 'h.2.attn.c_attn.bias has no place in this model'),
    (dict(activation_function='relu'), "activation_function='relu'"),
    (dict(n_inner=100), 'n_inner=100'),
    (dict(model_type='bert'), "describes a 'bert'"),
])
def test_weights_that_do_not_fit_are_named(tmp_path, change, words):
    random_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, **change}))
    with pytest.raises(ValueError, match=words):
        GPT2.from_pretrained(tmp_path)
    (tmp_path / 'model.safetensors').write_bytes((tmp_path / 'model.safetensors').read_bytes()[:5000])
    with pytest.raises(ValueError, match='model.safetensors holds no weights'):
        read_weights(tmp_path)
    with pytest.raises(FileNotFoundError, match='neither model.safetensors nor pytorch_model.bin'):
        read_weights(tmp_path / 'nothing')


def test_a_folder_is_rewritten_while_its_weights_are_mapped(tmp_path):
    model, tokens = random_model(), torch.randint(211, (1, 9))
    model.save_pretrained(tmp_path, eos_token_id=7)
    assert json.loads((tmp_path / 'config.json').read_text())['eos_token_id'] == 7
    again = GPT2.from_pretrained(tmp_path)
    with torch.no_grad():
        again.lm_head.weight.mul_(2)                    # tied, and writable though mapped
    again.save_pretrained(tmp_path)
    assert torch.equal(GPT2.from_pretrained(tmp_path).transformer.wte.weight, 2 * model.lm_head.weight)
    assert not list(tmp_path.glob('*.tmp'))
    # a file as torch before 1.6 wrote it cannot be mapped; a head that should be tied but is not is refused
    (tmp_path / 'model.safetensors').unlink()
    state = weights_to_hf(model.state_dict(), model.config)
    torch.save(state, tmp_path / 'pytorch_model.bin', _use_new_zipfile_serialization=False)
    assert torch.equal(GPT2.from_pretrained(tmp_path)(tokens)[0], model(tokens)[0])
    torch.save({**state, 'lm_head.weight': torch.zeros(211, 48)}, tmp_path / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='lm_head.weight and transformer.wte.weight should be one matrix'):
        GPT2.from_pretrained(tmp_path)


def test_what_the_head_is_given():
    model, tokens = random_model(), torch.randint(211, (2, 9))
    hidden, loss = model(tokens, head=False)
    assert hidden.shape == (2, 9, 48) and loss is None
    assert torch.equal(model.lm_head(hidden), model(tokens)[0])
    assert model.auxiliary_loss(torch.ones_like(tokens)) == 0.0 and not model.config.use_moe


def test_offline_official_weights_say_which_files_to_put_where(script, tmp_path):
    offline = dict(HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path))
    error = script('sample.py', '--init_from=gpt2', code=2, env=offline).stderr
    assert 'put config.json, model.safetensors and tokenizer.json of huggingface.co' in error


# ---- training and exporting ----

TINY = ['--n_layer=2', '--n_head=2', '--n_embd=64', '--block_size=32', '--batch_size=8', '--device=cpu',
        '--dtype=float32', '--log_interval=1', '--eval_iters=2', '--prompt=The keeper', '--warmup_iters=5']


def test_a_run_of_older_code_is_one_line(script, tiny_run):
    file = tiny_run('gpt2') / 'ckpt.pt'
    state = torch.load(file, weights_only=True)
    state['model_config']['positions'] = 'sinusoidal'
    torch.save(state, file)
    line = script('sample.py', '--out_dir=tiny_gpt2', code=2).stderr
    assert "does not describe a model" in line and "'positions'" in line


def test_a_run_of_gpt2_from_scratch_to_transformers_and_back(script, tmp_path, tokenizer, transformers):
    data = tmp_path / 'rules'
    pieces = [Piece('train', TEXT * 20), Piece('val', TEXT)]
    write_data(str(data), tokenizer, pieces, 'test')
    common = [*TINY, f'--dataset={data}']
    out = script('pretrain.py', *common, '--model=gpt2', '--out_dir=run', '--stride=8', '--dropout=0.1',
                 '--qkv_bias=False', '--tie_word_embeddings=False', '--max_iters=100').stdout
    held_out = numbers(r'held-out loss (\S+)', out)
    assert held_out[0] == pytest.approx(math.log(tokenizer.vocab_size), abs=0.2) and held_out[-1] < 0.5

    # going on keeps the shape, and says so
    again = ['--out_dir=run', '--init_from=resume', '--n_layer=3', '--max_iters=101']
    assert 'a resumed run keeps that' in script('pretrain.py', *again, code=2).stderr
    script('pretrain.py', '--out_dir=run', '--init_from=resume', '--max_iters=101')
    assert load_run(tmp_path / 'run')[2]['step'] == 101

    # the export is the run, for transformers, for sample.py and as the start of another run
    script('sample.py', '--out_dir=run', '--export_dir=hf')
    model, _, _ = load_run(tmp_path / 'run')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf')
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / 'hf')
    ids = words('Read the rules', return_tensors='pt')['input_ids']
    assert ids[0].tolist() == tokenizer.encode('Read the rules')
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids)[0]).abs().max() < 1e-4
    how = ['--start=Read the rules', '--temperature=0', '--max_new_tokens=25', '--dtype=float32']
    texts = [script('sample.py', *where, *how).stdout for where in (['--out_dir=run'], ['--init_from=hf'])]
    assert texts[0] == texts[1] and texts[0].startswith('Read the rules of the light')
    start = [f'--dataset={data}', '--init_from=hf', '--batch_size=2', '--max_iters=1', '--learning_rate=0']
    script('pretrain.py', *start, '--min_lr=0', '--block_size=16', '--out_dir=more')
    again, _, checkpoint = load_run(tmp_path / 'more')
    assert checkpoint['model_type'] == 'gpt2' and again.config.context == 32
    assert all(torch.equal(w, model.state_dict()[name]) for name, w in again.state_dict().items())
    assert 'longer than the context' in script('pretrain.py', *start, '--block_size=64', code=2).stderr
