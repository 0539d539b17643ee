"""lora.py: adapters are nothing at the start, small, alone on disk, and the same model merged or not."""
import importlib.util
import json
import os
import shutil
import warnings

import pytest
import torch
from conftest import numbers
import lora
from configurator import Run, load_checkpoint, read_weights, save_checkpoint
from lora import (adapter_state, adapters, export_peft, inject, load_adapted, load_adapter_state, load_plain,
                  merge, read_peft)
from model_gpt2 import GPT2, GPT2Config
from model_minimind import MiniMind, MiniMindConfig
from sample import load_run

RUN = Run(torch.device('cpu'), torch.float32, 0, 1)
SMALL = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)


def small_model(kind='llama'):
    torch.manual_seed(1)
    if kind == 'gpt2':
        return GPT2(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    return MiniMind(MiniMindConfig(**SMALL, qk_norm=kind == 'qwen3')).eval()


def trained(model):
    """Adapters as after training, ours or PEFT's: B is no longer zero."""
    for name, p in model.named_parameters():
        if 'lora_' in name:
            torch.nn.init.normal_(p, std=0.3)
    return model


@pytest.fixture
def tokens():
    return torch.randint(300, (3, 20))


def test_the_base_may_lie_on_another_drive(run_folder, monkeypatch):
    config = dict(vars(lora), init_from=str(run_folder), out_dir=str(run_folder.parent / 'a' / 'b'))
    assert load_plain(RUN, config)[2]['base'] == f'../../{run_folder.name}'
    with monkeypatch.context() as other_drive:                  # there relpath raises
        other_drive.setattr(os.path, 'relpath', lambda *paths: int('no'))
        assert load_plain(RUN, config)[2]['base'] == str(run_folder)


def test_adapters_are_the_identity_at_the_start(tokens):
    model = small_model()
    before = model(tokens)[0]
    assert torch.equal(inject(model, rank=4, alpha=8)(tokens)[0], before)


def test_the_layer_is_the_formula():
    layer = inject(small_model(), rank=4, alpha=8).model.layers[0].mlp.up_proj
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 32)
    wanted = x @ layer.base.weight.T + 8 / 4 * (layer.lora_B @ layer.lora_A @ x.T).T
    torch.testing.assert_close(layer(x), wanted)


def test_only_adapters_train(tokens):
    model = inject(small_model(), rank=4, alpha=8)
    frozen = {name: p.clone() for name, p in model.named_parameters() if '.lora_' not in name}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for _ in range(2):          # A has no gradient while B is zero
        model(tokens, tokens)[1].backward()
        optimizer.step()
    after = dict(model.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in frozen.items())
    assert all(p.abs().sum() > 0 and p.grad.abs().sum() > 0 for name, p in after.items() if '.lora_' in name)


def test_targets_are_named_not_guessed():
    names = {name.split('.')[-1] for name in adapters(inject(small_model(), 2, 2))}
    assert names == {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'}
    model = MiniMind(MiniMindConfig(**{**SMALL, 'num_key_value_heads': 4}))         # k and v are square now
    assert {n.split('.')[-1] for n in adapters(inject(model, 2, 2, targets='q_proj'))} == {'q_proj'}
    for name in ('query', 'proj', 'lm_head'):                   # the end of a path, from a dot on
        with pytest.raises(ValueError, match=f"no linear layer is called '{name}'; there are down_proj, "):
            inject(small_model(), 2, 2, targets=f'q_proj,{name}')


@pytest.mark.parametrize('targets, layers', [
    ('attn.c_proj', ['transformer.h.0.attn.c_proj', 'transformer.h.1.attn.c_proj']),
    ('transformer.h.1.mlp.c_fc,0.attn.c_attn', ['transformer.h.0.attn.c_attn', 'transformer.h.1.mlp.c_fc'])])
def test_a_target_is_the_path_of_a_layer_or_its_end(targets, layers):
    assert [*adapters(inject(small_model('gpt2'), 2, 2, targets=targets))] == layers


def test_merged_equals_unmerged_and_merging_twice_is_refused(tokens):
    model = trained(inject(small_model(), rank=4, alpha=8))
    unmerged = model(tokens)[0]
    plain = merge(model)
    assert (plain(tokens)[0] - unmerged).abs().max() < 1e-5
    assert plain.state_dict().keys() == small_model().state_dict().keys()
    with pytest.raises(ValueError, match='no adapters'):
        merge(plain)
    with pytest.raises(ValueError, match='adapters already'):
        inject(inject(plain, 2, 2), 2, 2)


def test_adapters_travel_alone(tokens):
    model = trained(inject(small_model(), rank=4, alpha=8))
    state = adapter_state(model)
    assert sum(t.numel() for t in state.values()) == sum(p.numel() for p in model.parameters()
                                                         if p.requires_grad)
    other = inject(small_model(), rank=4, alpha=8)
    load_adapter_state(other, state)
    assert torch.equal(other(tokens)[0], model(tokens)[0])
    with pytest.raises(ValueError, match='in the file alone'):
        load_adapter_state(inject(small_model(), 4, 8, targets='q_proj'), state)
    with pytest.raises(ValueError, match=r'is \(4, 32\), not \(2, 32\)'):
        load_adapter_state(inject(small_model(), rank=2, alpha=8), state)


# ---- PEFT and MiniMind ----

@pytest.fixture
def twin(tmp_path):
    """twin(kind): the same weights in transformers' model."""
    transformers = pytest.importorskip('transformers')

    def make(kind):
        small_model(kind).save_pretrained(tmp_path / 'twin')
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'twin').eval()
    return make


@pytest.fixture
def adapted_run(tmp_path):
    """adapted_run(base, targets) writes a run's folder with adapters, and returns its model."""
    def make(base, targets='all'):
        config = dict(vars(lora), init_from=str(base), out_dir=str(tmp_path / 'a'))
        model, tokenizer, about = load_plain(RUN, config)
        how = dict(rank=4, alpha=8.0, dropout=0.0, targets=targets)
        trained(inject(model, **how))
        (tmp_path / 'a').mkdir()
        save_checkpoint(RUN, tmp_path / 'a', tokenizer, model.config, adapters=adapter_state(model),
                        step=0, settings={}, lora=how, **about)
        return model
    return make


@pytest.mark.parametrize('kind, targets', [('minimind', 'all'), ('gpt2', 'all'), ('gpt2', 'attn.c_proj')])
def test_peft_loads_what_is_exported_from_any_folder(script, tiny_run, adapted_run, tokens, tmp_path,
                                                     monkeypatch, kind, targets):
    """GPT-2's layers are wide (c_attn), of one name twice (c_proj), and transposed in its layout."""
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    model, tokens = adapted_run(tiny_run(kind), targets), tokens % 250
    assert 'peft/base' in script('lora.py', '--out_dir=a', '--to_peft=peft').stdout
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)             # as of a missing adapter
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / 'peft').eval()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens)[0], atol=1e-4, rtol=1e-4)
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / 'peft')) == model.config.vocab_size
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'peft' / 'base')
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / 'peft').eval()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens)[0], atol=1e-4, rtol=1e-4)
    shutil.rmtree(tmp_path / 'peft')
    shutil.copytree(tmp_path / 'a', tmp_path / 'peft' / 'base')
    assert 'peft/base holds ckpt.pt' in script('lora.py', '--out_dir=a', '--to_peft=peft', code=2).stderr


def test_a_base_that_transformers_opens_is_named(script, tiny_run, adapted_run, tokens, tmp_path,
                                                 monkeypatch):
    peft = pytest.importorskip('peft')
    script('sample.py', f"--out_dir={tiny_run('minimind')}", '--export_dir=hf')
    model = adapted_run(tmp_path / 'hf')
    script('lora.py', '--out_dir=a', '--to_peft=peft')
    assert not (tmp_path / 'peft' / 'base').exists()
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / 'peft').eval()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens)[0], atol=1e-4, rtol=1e-4)
    script('sample.py', '--out_dir=a', '--max_new_tokens=3')
    script('lora.py', '--out_dir=a', '--merge_to=merged')
    merged = load_run(str(tmp_path / 'merged'))[0]
    torch.testing.assert_close(merged(tokens)[0], model(tokens)[0], atol=1e-5, rtol=1e-4)
    # MiniMind's own config.json names code that transformers has not
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    (tmp_path / 'hf' / 'config.json').write_text(json.dumps(dict(config, model_type='minimind')))
    script('lora.py', '--out_dir=a', '--to_peft=again')
    assert json.loads((tmp_path / 'again' / 'base' / 'config.json').read_text())['model_type'] != 'minimind'
    # an official model is named as in the hub
    model = inject(small_model('gpt2'), rank=4, alpha=8)
    monkeypatch.setattr(lora, 'load_adapted', lambda *run: (model, 'gpt2'))
    export_peft(str(tmp_path / 'a'), str(tmp_path / 'official'))
    named = json.loads((tmp_path / 'official' / 'adapter_config.json').read_text())['base_model_name_or_path']
    assert named == 'openai-community/gpt2'


Q, C = dict(target_modules=['q_proj', 'down_proj']), dict(target_modules=['c_attn', 'c_proj'])


@pytest.mark.filterwarnings('ignore')                   # PEFT has a word on many of these
@pytest.mark.parametrize('kind, method, options, key', [
    *(('llama', 'Lora', dict(Q, init_lora_weights=value), '') for value in (
        True, False, 'gaussian', 'orthogonal', 'eva', 'mica')),
    *(('llama', 'Lora', dict(Q, init_lora_weights=value), f"init_lora_weights='{value}'") for value in (
        'pissa', 'pissa_niter_4', 'olora', 'lora_ga')),
    ('qwen3', 'Lora', Q, ''), ('gpt2', 'Lora', C, ''), ('gpt2', 'Lora', dict(C, fan_in_fan_out=True), ''),
    ('gpt2', 'Lora', dict(target_modules=['attn.c_proj']), ''),
    ('gpt2', 'Lora', dict(target_modules=['transformer.h.0.attn.c_proj']), ''),
    ('gpt2', 'Lora', dict(target_modules='all-linear'), ''),
    ('llama', 'Lora', dict(target_modules='all-linear'), ''),
    ('llama', 'Lora', dict(target_modules=r'.*\.1\..*q_proj'), ''),
    ('llama', 'Lora', dict(Q, layers_to_transform=[1]), ''),
    ('llama', 'Lora', dict(Q, layers_to_transform=0), ''),
    ('llama', 'Lora', dict(Q, exclude_modules=['layers.0.self_attn.q_proj']), ''),
    ('llama', 'Lora', dict(Q, ensure_weight_tying=True, task_type=None), ''),
    ('llama', 'Lora', dict(Q, use_rslora=True), ''), ('llama', 'Lora', dict(Q, lora_alpha=-3), ''),
    ('llama', 'Lora', dict(Q, use_dora=True), 'use_dora'),
    ('llama', 'Lora', dict(Q, rank_pattern=dict(q_proj=2)), 'rank_pattern'),
    ('llama', 'Lora', dict(Q, alpha_pattern=dict(q_proj=2)), 'alpha_pattern'),
    ('llama', 'Lora', dict(Q, modules_to_save=['lm_head']), 'modules_to_save'),
    ('llama', 'Lora', dict(Q, alora_invocation_tokens=[5, 6]), 'alora_invocation_tokens'),
    ('llama', 'Lora', dict(Q, trainable_token_indices=[1, 2]), 'trainable_token_indices'),
    ('llama', 'Lora', dict(target_modules=[], target_parameters=['q_proj.weight']), 'target_parameters'),
    ('llama', 'Lora', dict(Q, task_type='FEATURE_EXTRACTION'), 'task_type'),
    ('llama', 'Lora', dict(target_modules=['q_proj', 'lm_head']), "called 'lm_head'"),
    ('gpt2', 'Lora', dict(target_modules=['wte']), "called 'transformer.wte'"),
    ('gpt2', 'Lora', dict(C, bias='all'), 'bias'), ('gpt2', 'Lora', dict(C, lora_bias=True), 'lora_bias'),
    ('llama', 'IA3', dict(Q, feedforward_modules=['down_proj']), "peft_type='IA3'"),
    ('llama', 'LoHa', Q, "peft_type='LOHA'"), ('llama', 'Vera', Q, "peft_type='VERA'"),
    ('llama', 'PrefixTuning', dict(num_virtual_tokens=2), "peft_type='PREFIX_TUNING'")])
def test_what_peft_saved_is_imported_or_refused_by_name(tokens, tmp_path, twin, capsys, kind, method, options,
                                                        key):
    peft = pytest.importorskip('peft')
    make = getattr(peft, f'{method}Config')
    if options.keys() - make.__dataclass_fields__.keys():
        pytest.skip("this peft is older")
    options = dict(dict(r=4, lora_alpha=16) if method == 'Lora' else {}, task_type='CAUSAL_LM') | options
    trained(peft.get_peft_model(twin(kind), make(**options))).save_pretrained(tmp_path / 'peft')
    model = small_model(kind)
    capsys.readouterr()
    if key:
        with pytest.raises(SystemExit):
            read_peft(model, str(tmp_path / 'peft'))
        line = capsys.readouterr().err
        assert key in line and len(line.splitlines()) == 1, line
        return
    theirs = peft.PeftModel.from_pretrained(twin(kind), tmp_path / 'peft').eval()
    how, (path, *_) = read_peft(model, str(tmp_path / 'peft')), (tmp_path / 'peft').glob('*.safetensors')
    torch.testing.assert_close(model(tokens)[0], theirs(tokens).logits, atol=1e-4, rtol=1e-4)
    assert (model(tokens)[0] - small_model(kind)(tokens)[0]).abs().max() > 1e-2
    # older files of PEFT's are pickled
    torch.save(read_weights(path), path.with_suffix('.bin'))
    path.unlink()
    assert read_peft(again := small_model(kind), str(tmp_path / 'peft')) == how
    assert torch.equal(again(tokens)[0], model(tokens)[0])


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.module.'])
def test_a_pth_of_minimind_is_imported(tokens, tmp_path, prefix):
    model, state, wanted = small_model('qwen3'), {}, small_model('qwen3')
    for name in ('model.layers.0.self_attn.q_proj', 'model.layers.1.self_attn.o_proj'):
        A, B = torch.randn(4, 32).half(), torch.randn(32, 4).half()
        state |= {f'{prefix}{name}.lora.A.weight': A, f'{prefix}{name}.lora.B.weight': B}
        wanted.get_parameter(f'{name}.weight').data += B.float() @ A.float()
    torch.save(state, tmp_path / 'lora_identity_512.pth')
    how = read_peft(model, str(tmp_path / 'lora_identity_512.pth'))
    assert (how['rank'], how['alpha'], how['dropout']) == (4, 4.0, 0.0)
    torch.testing.assert_close(model(tokens)[0], wanted(tokens)[0], atol=1e-5, rtol=1e-4)


# ---- the run ----

Q0 = 'model.layers.0.self_attn.q_proj'
FAST = ['--device=cpu', '--dtype=float32', '--dataset=./chats', '--batch_size=2', '--block_size=64',
        '--rank=4', '--log_interval=1', '--max_iters=8', '--eval_interval=4', '--report_size=4',
        '--max_new_tokens=8']


@pytest.fixture
def chats_folder(tmp_path, script, run_folder):
    with open(tmp_path / 'chats.jsonl', 'w') as f:
        for i in range(40):
            f.write(json.dumps(dict(instruction=f'Say {i} twice.', input='', output=f'{i} {i}')) + '\n')
    script('prepare.py', '--input=chats.jsonl', f'--tokenizer={run_folder}', '--dataset=./chats',
           '--val_fraction=0.2')


def test_a_run_its_folder_and_the_merged_model(script, chats_folder, run_folder, tmp_path, tokens):
    """Train, sample, merge, export, import: the same model all along, and the base untouched."""
    before = (run_folder / 'ckpt.pt').read_bytes()
    done = script('lora.py', f'--init_from={run_folder}', '--out_dir=a', *FAST)
    losses = numbers(r'held-out loss (\S+)', done.stdout)
    assert losses[0] > losses[1] > losses[2]
    # two ranks of one row are one of two
    cut = script('lora.py', f'--init_from={run_folder}', '--out_dir=cut', *FAST, '--batch_size=1',
                 '--gradient_accumulation_steps=2', '--report_size=0', torchrun=2)
    one, two = (numbers(r'(?:held-out )?loss (\S+)', some.stdout) for some in (done, cut))
    assert len(one) == 3 + 8 and two == pytest.approx(one, abs=2e-4)
    # rank 4 in two layers; in + out of q, k, v, o, and of gate, up, down
    trained = 4 * 2 * (128 + 96 + 96 + 128 + 3 * 256)
    assert f'parameters, {trained:,} of them trained' in done.stdout
    saved = torch.load(tmp_path / 'a' / 'ckpt.pt')
    assert 'model' not in saved and (tmp_path / 'a' / 'ckpt.pt').stat().st_size < len(before) * 1.5
    assert (run_folder / 'ckpt.pt').read_bytes() == before

    adapted, _ = load_adapted(str(tmp_path / 'a'), saved)
    script('sample.py', '--out_dir=a', '--max_new_tokens=3')
    script('lora.py', '--out_dir=a', '--merge_to=merged', '--to_peft=peft')
    merged, _, _ = load_run(str(tmp_path / 'merged'))
    assert (merged(tokens)[0] - adapted(tokens)[0]).abs().max() < 1e-5
    script('sample.py', '--out_dir=merged', '--max_new_tokens=3')
    script('lora.py', '--from_peft=peft', f'--init_from={run_folder}', '--out_dir=again')
    again, plain = load_run(str(tmp_path / 'again'))[0], load_run(str(tmp_path / 'a'))[0]
    assert torch.equal(again(tokens)[0], plain(tokens)[0]) and not adapters(plain)

    (tmp_path / 'words').mkdir()
    shutil.copy(tmp_path / 'a' / 'tokenizer.json', tmp_path / 'words')
    for arguments, words in ((['--out_dir=merged', '--merge_to=twice'], 'merged already'),
                             (['--out_dir=a', '--merge_to='], '--merge_to=: merge_to is empty'),
                             (['--out_dir=a', '--merge_to=words'], 'words holds tokenizer.json already'),
                             (['--out_dir=a', '--to_peft=words'], 'words holds tokenizer.json already'),
                             (['--out_dir=words', *FAST], 'words holds a tokenizer'),
                             (['--out_dir=a', '--merge_to=a'], 'would overwrite'),
                             (['--init_from=a', *FAST], 'merge them first'),
                             ([f'--init_from={run_folder}', '--targets=query', *FAST], "called 'query'"),
                             ([f'--init_from={run_folder}', '--from_peft=nowhere', '--out_dir=new'],
                              'adapter_config.json')):
        assert words in script('lora.py', *arguments, code=2).stderr
    # the base changes under its adapters
    shutil.copytree(run_folder, tmp_path / 'base')
    saved['base'] = '../base'
    torch.save(saved, tmp_path / 'a' / 'ckpt.pt')
    script('sample.py', '--out_dir=a', '--max_new_tokens=3')
    base = torch.load(tmp_path / 'base' / 'ckpt.pt')
    base['model']['model.norm.weight'] += 1e-3
    torch.save(base, tmp_path / 'base' / 'ckpt.pt')
    assert 'for another base' in script('sample.py', '--out_dir=a', code=2).stderr


def test_resumed_is_uninterrupted(script, chats_folder, run_folder, tmp_path):
    start = [f'--init_from={run_folder}', *FAST, '--dropout=0.1', '--min_lr=5e-3', '--report_size=0']
    script('lora.py', '--out_dir=whole', *start)
    script('lora.py', '--out_dir=parts', *start, '--max_iters=4')
    script('lora.py', '--out_dir=parts', '--init_from=resume', '--max_iters=8')
    whole, parts = (torch.load(tmp_path / name / 'ckpt.pt')['adapters'] for name in ('whole', 'parts'))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_imported_adapters_train_on(script, chats_folder, run_folder, tmp_path):
    name, start = 'model.layers.1.self_attn.o_proj', [option for option in FAST if 'rank' not in option]
    torch.save({f'{name}.lora.A.weight': torch.randn(3, 64).half() / 8,
                f'{name}.lora.B.weight': torch.zeros(64, 3).half()}, tmp_path / 'lora.pth')
    script('lora.py', '--from_peft=lora.pth', f'--init_from={run_folder}', '--out_dir=a', *start)
    done = script('lora.py', '--init_from=resume', '--out_dir=a')
    losses = numbers(r'held-out loss (\S+)', done.stdout)
    assert losses[0] > losses[1] > losses[2]
    saved = load_checkpoint(str(tmp_path / 'a'))
    assert saved['step'] == 8 and [*saved['adapters']] == [f'{name}.lora_A', f'{name}.lora_B']
    assert saved['adapters'][f'{name}.lora_B'].abs().sum() > 0
    assert 'has targets=model.layers' in script('lora.py', '--init_from=resume', '--out_dir=a',
                                                '--targets=q_proj', code=2).stderr


@pytest.mark.parametrize('state, words', [
    ({'model.norm.weight': torch.ones(2)}, 'no name in it ends in .lora.A.weight'),
    ({'q.lora.A.weight': torch.tensor(1.)}, 'no name in it ends in .lora.A.weight'),
    ({'q.lora.A.weight': torch.ones(2, 64), 'q.lora.B.weight': torch.ones(64, 2)}, "layer is called 'q'"),
    ({f'{Q0}.lora.A.weight': torch.ones(2, 64)}, 'q_proj.lora_B is in the model alone'),
    ({f'{Q0}.lora.A.weight': torch.ones(2, 64), f'{Q0}.lora.B.weight': torch.ones(64, 3)},
     'q_proj.lora_B is (64, 3), not (64, 2)'),
    ({f'{Q0}.lora.A.weight': torch.ones(2, 9), f'{Q0}.lora.B.weight': torch.ones(64, 2)}, 'is (2, 9), not'),
    ({f'{Q0}.lora.A.weight': torch.full((2, 64), torch.nan)}, 'NaN'), ([1], 'holds no weights')])
def test_a_pth_that_does_not_fit_is_one_line(script, run_folder, tmp_path, state, words):
    torch.save(state, tmp_path / 'lora.pth')
    done = script('lora.py', '--from_peft=lora.pth', f'--init_from={run_folder}', '--out_dir=a', code=2)
    assert 'lora.pth' in done.stderr and words in done.stderr and not (tmp_path / 'a').exists()


def test_gpt2_is_trained_at_a_path(script, chats_folder, tiny_run, tmp_path):
    script('prepare.py', '--input=chats.jsonl', f"--tokenizer={tiny_run('gpt2')}", '--dataset=./chats_gpt2')
    script('lora.py', '--init_from=tiny_gpt2', '--out_dir=a', *FAST, '--dataset=./chats_gpt2',
           '--targets=attn.c_proj', '--max_iters=2', '--report_size=0', '--block_size=256')
    names = {name.rpartition('.')[0] for name in load_checkpoint(str(tmp_path / 'a'))['adapters']}
    assert names == {'transformer.h.0.attn.c_proj', 'transformer.h.1.attn.c_proj'}


def test_without_safetensors_nothing_is_written(script, tiny_run, adapted_run, tmp_path, monkeypatch):
    adapted_run(tiny_run('gpt2'))
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name != 'safetensors' and there(name))
    assert 'pip install safetensors' in script('lora.py', '--out_dir=a', '--to_peft=peft', code=2).stderr
    assert not (tmp_path / 'peft').exists()
