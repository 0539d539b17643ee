"""Weights that other people bring: MiniMind's .pth and nanoGPT's ckpt.pt, in every stage, and loaded once."""
import json
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ONE_THREAD, ROOT, TEXT
from torch.nn import functional as F

import configurator
from configurator import Run, read_weights, save_checkpoint
from model_gpt2 import GPT2, GPT2Config
from model_minimind import MiniMind, MiniMindConfig, weights_to_hf
from prepare import Piece, write_data
from sample import load_run
from train_tokenizer import Tokenizer, train_bpe

CPU = Run(torch.device('cpu'), torch.float32, 0, 1)
FAST = ['--device=cpu', '--dtype=float32', '--batch_size=2', '--block_size=32', '--max_iters=1',
        '--report_size=0', '--eval_iters=1']


def minimind(tokenizer, **changes):
    torch.manual_seed(0)
    return MiniMind(MiniMindConfig(**{**dict(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, rms_norm_eps=1e-5), **changes})).eval()


@pytest.fixture
def minimind_folder(tmp_path, tokenizer):
    """A folder as MiniMind's repository: the weights in out/, half precision, the tokenizer in model/."""
    model = minimind(tokenizer).half()
    (tmp_path / 'theirs' / 'out').mkdir(parents=True)
    tokenizer.save(tmp_path / 'theirs' / 'model')
    torch.save(weights_to_hf(model.state_dict()), tmp_path / 'theirs' / 'out' / 'full_sft_32.pth')
    return tmp_path / 'theirs'


@pytest.fixture
def data(tmp_path, tokenizer):
    """data(task): a small data set, prepared."""
    def make(task):
        chat = (dict(role='user', content='Who?'), dict(role='assistant', content='A keeper.'))
        rejected = dict(role='assistant', content='The sea.')
        content = dict(pretrain=TEXT, cls='The light', sft=(chat,), dpo=(chat, rejected))[task]
        pieces = [Piece(split, content, label=label) for split in ('train', 'val', 'test')
                  for label in ('ab' if task == 'cls' else ['', ''])]
        write_data(str(tmp_path / task), tokenizer, pieces, task, task)
        return f'--dataset=./{task}'
    return make


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- MiniMind's .pth ----

@pytest.mark.parametrize('stage, task', [('pretrain', 'pretrain'), ('sft', 'sft'), ('lora', 'sft'),
                                         ('finetune_cls', 'cls')])
def test_a_pth_is_what_a_stage_starts_from(script, tmp_path, minimind_folder, data, stage, task):
    """And the run's folder needs neither the setting nor MiniMind's tokenizer from then on."""
    fast = FAST[:dict(finetune_cls=-2, pretrain=-2).get(stage)]
    done = script(f'{stage}.py', '--init_from=theirs/out/full_sft_32.pth', data(task), '--out_dir=run', *fast,
                  '--weights_config=rope_theta=5e4')
    assert 'num_attention_heads=8' in done.stderr and 'rope_theta' not in done.stderr
    assert f"tokenizer={minimind_folder / 'model'}" in done.stderr
    shutil.rmtree(minimind_folder / 'model')
    if stage == 'finetune_cls':
        script('finetune_cls.py', '--out_dir=run', '--classify=The light')
        return
    model, _, _ = load_run(str(tmp_path / 'run'))
    assert model.config.rope_theta == 5e4
    script(f'{stage}.py', '--init_from=resume', '--out_dir=run', '--max_iters=2')


def test_a_pth_as_reference_and_as_teacher(script, tmp_path, minimind_folder, data):
    weights = 'theirs/out/full_sft_32.pth'
    script('dpo.py', f'--init_from={weights}', data('dpo'), '--out_dir=run', *FAST[:-2])
    shutil.copytree('theirs/model', 'words')
    script('distill.py', f'--teacher={weights}', data('sft'), '--out_dir=student', *FAST, '--n_layer=1',
           '--n_embd=32', '--weights_config=tokenizer=words')
    assert load_run(str(tmp_path / 'student'))[0].config.num_hidden_layers == 1
    shutil.rmtree(minimind_folder / 'model')
    script('dpo.py', '--init_from=resume', '--out_dir=run', '--max_iters=2')


@pytest.mark.parametrize('prefix', ['', '_orig_mod.', 'module.', 'module._orig_mod.'])
@pytest.mark.parametrize('whole', [False, True])
def test_of_a_checkpoint_to_resume_from_the_model_in_it(tmp_path, tokenizer, prefix, whole):
    model, optimizer = minimind(tokenizer), torch.optim.AdamW([torch.ones(1, requires_grad=True)])
    state = {prefix + name: value for name, value in weights_to_hf(model.state_dict()).items()}
    if whole:
        state = dict(model=state, optimizer=optimizer.state_dict(), epoch=1, step=9, wandb_id=None)
    torch.save(state, tmp_path / 'full_sft_32_resume.pth')
    tokenizer.save(tmp_path)
    again, words, checkpoint = load_run(str(tmp_path / 'full_sft_32_resume.pth'))
    assert same(again, model) and words.fingerprint == tokenizer.fingerprint and checkpoint is None


def test_what_a_pth_cannot_say_is_said(script, tmp_path, tokenizer, capsys):
    model = minimind(tokenizer, num_attention_heads=4, use_moe=True, num_experts_per_tok=1, rope_theta=1e4)
    torch.save(weights_to_hf(model.state_dict()), tmp_path / 'a.pth')
    tokenizer.save(tmp_path / 'words')
    how = dict(num_attention_heads=4, num_experts_per_tok=1, rope_theta=1e4)
    again = load_run(str(tmp_path / 'a.pth'), given=dict(how, tokenizer=str(tmp_path / 'words')))[0]
    guessed = capsys.readouterr().err
    assert 'rms_norm_eps=1e-05' in guessed and 'seq_aux=True' in guessed
    assert not any(key in guessed for key in how)
    x = torch.randint(tokenizer.vocab_size, (2, 9))
    torch.testing.assert_close(again(x)[0], model(x)[0])
    torch.save(minimind(tokenizer).state_dict(), tmp_path / 'dense.pth')
    useless = '--weights_config=num_experts_per_tok=1,tokenizer=words'
    line = script('sample.py', '--init_from=dense.pth', useless, code=2).stderr
    assert 'num_experts_per_tok does nothing' in line
    refused = {'': 'name a folder, --weights_config=tokenizer=FOLDER',
               'rope_thet=1e4': "'rope_thet' is nothing to say of a.pth; did you mean 'rope_theta'?",
               'wide=3': 'there are tokenizer, num_attention_heads',
               **{f'tokenizer=words,num_attention_heads={n}': 'must be a whole number that divides 32'
                  for n in ('two', 0, 6)},
               'tokenizer=words,rope_theta=low': "rope_theta must be a number",
               'tokenizer=none': 'no tokenizer none', 'tokenizer=large': 'its tokenizer has 358 ids'}
    Tokenizer(train_bpe([TEXT] * 5, 360)).save(tmp_path / 'large')
    for text, words in refused.items():
        line = script('sample.py', '--init_from=a.pth', f'--weights_config={text}', code=2).stderr
        assert words in line.replace(str(tmp_path) + '/', ''), line


@pytest.mark.parametrize('stage, args', [
    ('pretrain', []), ('sft', ['--init_from=words']), ('dpo', ['--init_from=gpt2']), ('sample', []),
    ('distill', ['--teacher=words']), ('lora', ['--init_from=nowhere.pth']),
    ('finetune_cls', ['--classify=a'])])
def test_what_a_folder_says_itself_is_not_told(script, tokenizer_folder, tmp_path, stage, args):
    shutil.copytree(tokenizer_folder, tmp_path / 'words')
    line = script(f'{stage}.py', *args, '--weights_config=tokenizer=words', code=2).stderr
    assert "weights_config is for a .pth file, or nanoGPT's ckpt.pt" in line


# ---- nanoGPT's ckpt.pt ----

SIZES = dict(n_layer=2, n_head=2, n_embd=32, block_size=24, dropout=0.1)


def nanogpt(folder, vocab_size, bias, prefix=''):
    """Write a ckpt.pt with random weights as nanoGPT does, and return its forward pass, written anew."""
    C = SIZES['n_embd']
    shapes = {'wte': (vocab_size, C), 'wpe': (SIZES['block_size'], C), 'ln_f': (C,)}
    for layer in range(SIZES['n_layer']):
        shapes.update({f'h.{layer}.{name}': shape for name, shape in {
            'ln_1': (C,), 'attn.c_attn': (3 * C, C), 'attn.c_proj': (C, C), 'ln_2': (C,),
            'mlp.c_fc': (4 * C, C), 'mlp.c_proj': (C, 4 * C)}.items()})
    w = {f'transformer.{name}.weight': torch.randn(shape) * 0.2 for name, shape in shapes.items()}
    if bias:
        w.update({f'transformer.{name}.bias': torch.randn(shape[0]) for name, shape in shapes.items()
                  if name[:2] != 'wt' and name != 'wpe'})
    w['lm_head.weight'] = w['transformer.wte.weight']

    def logits(tokens):
        def part(name, x, f=F.linear):
            name = f'transformer.{name}'
            if f is F.layer_norm:
                return f(x, (C,), w[f'{name}.weight'], w.get(f'{name}.bias'))
            return f(x, w[f'{name}.weight'], w.get(f'{name}.bias'))
        T, D = tokens.size(1), C // SIZES['n_head']
        x = w['transformer.wte.weight'][tokens] + w['transformer.wpe.weight'][:T]
        for layer in range(SIZES['n_layer']):
            h = f'h.{layer}'
            q, k, v = (t.unflatten(-1, (-1, D)).transpose(1, 2) for t in part(
                f'{h}.attn.c_attn', part(f'{h}.ln_1', x, F.layer_norm)).split(C, dim=-1))
            scores = (q @ k.mT / D ** 0.5).masked_fill(~torch.ones(T, T).tril().bool(), -torch.inf)
            x = x + part(f'{h}.attn.c_proj', (scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
            x = x + part(f'{h}.mlp.c_proj', F.gelu(part(f'{h}.mlp.c_fc', part(f'{h}.ln_2', x, F.layer_norm))))
        return part('ln_f', x, F.layer_norm) @ w['lm_head.weight'].T

    state = {**w, 'transformer.h.0.attn.bias': torch.ones(1, 1, 24, 24).tril()}         # of old torch
    folder.mkdir(exist_ok=True)
    torch.save(dict(model={prefix + name: value for name, value in state.items()}, optimizer={}, iter_num=5,
                    model_args=dict(SIZES, vocab_size=vocab_size, bias=bias), best_val_loss=torch.tensor(3.0),
                    config=dict(dataset='openwebtext', bias=bias)), folder / 'ckpt.pt')
    return logits


@pytest.mark.parametrize('bias, prefix', [(True, ''), (False, '_orig_mod.')])
def test_nanogpt_computes_the_same_and_so_does_its_export(tmp_path, tokenizer, script, bias, prefix):
    theirs = nanogpt(tmp_path / 'nano', tokenizer.vocab_size + 14, bias, prefix)
    tokenizer.save(tmp_path / 'nano')
    x = torch.randint(tokenizer.vocab_size, (2, 20))
    for source in ('nano', 'nano/ckpt.pt'):
        ours, _, checkpoint = load_run(str(tmp_path / source), dropout=0.2)
        assert ours.config.bias == bias == ours.config.qkv_bias and ours.config.dropout == 0.2
        torch.testing.assert_close(ours(x)[0], theirs(x), atol=1e-5, rtol=1e-5)
    script('sample.py', '--init_from=nano', '--export_dir=hf')
    again = load_run(str(tmp_path / 'hf'))[0]
    assert again.config == type(ours.config)(**{**vars(ours.config), 'dropout': 0.0}) and same(again, ours)
    transformers = pytest.importorskip('transformers')
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'hf').eval()
    torch.testing.assert_close(hf(x).logits, theirs(x), atol=1e-5, rtol=1e-5)


def test_nanogpt_before_may_2023_and_its_tokenizer(script, tmp_path, gpt2, capsys):
    nanogpt(tmp_path / 'nano', 50304, True)
    model, words, _ = load_run(str(tmp_path / 'nano'), given=dict(activation_function='gelu_new'))
    assert words.fingerprint == gpt2.fingerprint and model.config.activation_function == 'gelu_new'
    assert 'guessed: tokenizer=gpt2' in capsys.readouterr().err


def test_a_stage_goes_on_from_nanogpt(script, tmp_path, tokenizer, data):
    nanogpt(tmp_path / 'nano', tokenizer.vocab_size, False)
    tokenizer.save(tmp_path / 'nano')
    shutil.copytree(tmp_path / 'nano', tmp_path / 'again')
    arguments = ['--init_from=nano', data('pretrain'), *FAST[:-2], '--block_size=16', '--out_dir=run']
    assert 'guessed: tokenizer=' in script('pretrain.py', *arguments).stderr
    assert load_run(str(tmp_path / 'run'))[0].config.activation_function == 'gelu'
    line = script('pretrain.py', '--init_from=resume', '--out_dir=again', code=2).stderr
    assert "nanoGPT's: start from it, with --init_from=again and another --out_dir" in line


def test_nanogpts_characters_speak_and_train_on(script, tmp_path):
    """Its first example: 65 characters, to which the tokenizer here adds <|endoftext|> and <|unk|>."""
    (tmp_path / 'input.txt').write_text(TEXT * 3)
    script('prepare.py', '--input=input.txt', '--dataset=./shakespeare_char')
    characters = len(set(TEXT))
    theirs = nanogpt(tmp_path / 'nano', characters, False)
    given = '--weights_config=tokenizer=shakespeare_char'
    path = str(tmp_path / 'shakespeare_char')
    model, tokenizer, _ = load_run(str(tmp_path / 'nano'), given=dict(tokenizer=path))
    assert tokenizer.vocab_size == model.config.vocab_size == characters + 2
    x = torch.arange(8)[None]
    ours = model(x)[0]
    torch.testing.assert_close(ours[..., :characters], theirs(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(ours[..., -1], ours[..., -2]) and ours[..., -1].mean() < ours[..., :-2].mean()
    script('sample.py', '--init_from=nano', given, '--start=T', '--max_new_tokens=3')
    script('pretrain.py', '--init_from=nano', given, '--dataset=./shakespeare_char', *FAST[:-2],
           '--block_size=16', '--out_dir=run')


def test_a_bias_that_is_not_zero_is_not_left_out(tmp_path, tokenizer):
    model = GPT2(GPT2Config(vocab_size=350, n_positions=8, n_embd=16, n_layer=1, n_head=2, bias=False))
    model.save_pretrained(tmp_path)
    assert same(GPT2.from_pretrained(tmp_path), model)
    (tmp_path / 'model.safetensors').rename(tmp_path / 'weights.safetensors')
    state = {**read_weights(str(tmp_path / 'weights.safetensors')), 'transformer.ln_f.bias': torch.ones(16)}
    torch.save(state, tmp_path / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='ln_f.bias has no place'):
        GPT2.from_pretrained(tmp_path)


# ---- a model given to the wrong script ----

def test_what_is_no_language_model_is_one_line(script, tmp_path, tokenizer):
    model = minimind(tokenizer)
    model.save_pretrained(tmp_path / 'cls')
    tokenizer.save(tmp_path / 'cls')
    config = json.loads((tmp_path / 'cls' / 'config.json').read_text())
    config['architectures'] = ['LlamaForSequenceClassification']
    (tmp_path / 'cls' / 'config.json').write_text(json.dumps(config))
    (tmp_path / 'peft').mkdir()
    (tmp_path / 'peft' / 'adapter_config.json').write_text('{}')
    torch.save({'model.layers.0.self_attn.q_proj.lora.A.weight': torch.ones(8, 32)}, tmp_path / 'lora_32.pth')
    torch.save({'layer4.conv.weight': torch.ones(8, 32)}, tmp_path / 'resnet.pth')
    (tmp_path / 'model.gguf').write_bytes(b'GGUF1234')
    save_checkpoint(CPU, str(tmp_path / 'run'), tokenizer, model.config, step=0, settings={},
                    model=model.state_dict())
    for source, words in {'cls': 'holds a LlamaForSequenceClassification', 'peft': 'holds adapters alone',
                          'lora_32.pth': 'holds adapters alone, for', 'run/ckpt.pt': 'name its folder, ',
                          'resnet.pth': "no MiniMind, 'layer4.conv.weight'",
                          'model.gguf': 'holds no weights'}.items():
        for stage in ('sample', 'sft'):
            assert words in script(f'{stage}.py', f'--init_from={source}', code=2).stderr


def test_a_damaged_pth_is_one_line(script, minimind_folder):
    path = minimind_folder / 'out' / 'full_sft_32.pth'
    state, whole = torch.load(path), path.read_bytes()
    path.write_bytes(whole[:5000])
    assert 'holds no weights' in script('sample.py', f'--init_from={path}', code=2).stderr
    for change, words in (({'model.norm.weight': torch.full((32,), torch.nan)}, 'holds NaN'),
                          ({'model.norm.weight': 3}, 'holds more than weights'),
                          ({'model': 3}, 'holds more than weights'),
                          ({'model_args': 3}, 'holds more than weights'),
                          ({'model': {}, 'model_args': 3}, 'its model_args describe no GPT-2')):
        torch.save({**state, **change}, path)
        assert words in script('sample.py', f'--init_from={path}', code=2).stderr


# ---- memory ----

@pytest.mark.parametrize('kind', ['run', 'hf'])
def test_loading_needs_the_weights_once(tmp_path, tokenizer, kind):
    """100 MB of weights; in a run's folder 200 MB of an optimizer's lie beside them, and are not read."""
    resource = pytest.importorskip('resource')
    assert resource
    model = minimind(tokenizer, hidden_size=1024, intermediate_size=2816, max_position_embeddings=64)
    if kind == 'run':
        moments = [torch.zeros_like(p) for p in model.parameters() for _ in range(2)]
        save_checkpoint(CPU, str(tmp_path), tokenizer, model.config, step=0, settings={},
                        model=model.state_dict(), optimizers=[dict(state=dict(enumerate(moments)))])
    else:
        pytest.importorskip('safetensors')
        model.save_pretrained(tmp_path)
        tokenizer.save(tmp_path)
    code = ("import sys; sys.path.insert(0, sys.argv[1])\n"
            "from resource import RUSAGE_SELF, getrusage\n"
            "import sample\n"
            "before = getrusage(RUSAGE_SELF).ru_maxrss\n"
            "model = sample.load_run(sys.argv[2], dropout=0.1)[0]\n"
            "print(getrusage(RUSAGE_SELF).ru_maxrss - before)")
    done = subprocess.run([sys.executable, '-c', code, ROOT, tmp_path], capture_output=True, text=True,
                          check=True, env=ONE_THREAD)
    unit = 1 if sys.platform == 'darwin' else 1024
    weights = sum(p.nbytes for p in model.parameters())
    assert weights > 9e7 and int(done.stdout) * unit < 1.3 * weights


def test_a_file_is_mapped_and_the_model_is_built_of_it(tmp_path, tokenizer, monkeypatch):
    """No second build and no random numbers: what the model holds are the tensors of the file."""
    model, built, states = minimind(tokenizer), [], []
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    read, init = configurator.read_weights, MiniMind.__init__
    monkeypatch.setattr('model_minimind.read_weights', lambda path: states.append(read(path)) or states[0])
    monkeypatch.setattr(MiniMind, '__init__', lambda self, config: built.append(0) or init(self, config))
    before = torch.get_rng_state()
    again = load_run(str(tmp_path), dropout=0.1)[0]
    assert len(built) == 1 and again.config.dropout == 0.1 and torch.equal(before, torch.get_rng_state())
    name = 'model.layers.0.mlp.up_proj.weight'
    assert again.get_parameter(name).data_ptr() == states[0][name].data_ptr()
