"""lora.py: adapters are nothing at the start, small, alone on disk, and the same model merged or not."""
import json
import os
import shutil

import pytest
import torch
from conftest import numbers
from configurator import Run
from lora import (adapter_state, adapters, inject, load_adapted, load_adapter_state, load_plain, merge,
                  read_peft, write_peft)
from model_gpt2 import GPT2, GPT2Config
from model_minimind import MiniMind, MiniMindConfig
from sample import load_run

SMALL = dict(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)


def small_model():
    torch.manual_seed(1)
    return MiniMind(MiniMindConfig(**SMALL)).eval()


def trained(model):
    """Adapters as after training: B is no longer zero."""
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.1)
    return model


@pytest.fixture
def tokens():
    return torch.randint(300, (3, 20))


def test_the_base_may_lie_on_another_drive(run_folder, monkeypatch):
    run = Run(torch.device('cpu'), torch.float32, 0, 1)
    config = dict(init_from=str(run_folder), out_dir=str(run_folder.parent / 'a' / 'b'), block_size=64)
    assert load_plain(run, config)[2]['base'] == f'../../{run_folder.name}'
    with monkeypatch.context() as other_drive:                  # there relpath raises
        other_drive.setattr(os.path, 'relpath', lambda *paths: int('no'))
        assert load_plain(run, config)[2]['base'] == str(run_folder)


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


def test_the_chapters_numbers():
    """Chapter II-11 adapts MiniMind's square layers, q and o, at rank 16: of 26,092,032 it trains 262,144."""
    model = inject(MiniMind(MiniMindConfig()), rank=16, alpha=16, targets='q_proj,o_proj')
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert (total, trainable, f'{trainable / total:.2%}') == (26_092_032, 262_144, '1.00%')


def test_targets_are_named_not_guessed():
    names = {name.split('.')[-1] for name in adapters(inject(small_model(), 2, 2))}
    assert names == {'q_proj', 'k_proj', 'v_proj', 'o_proj', 'gate_proj', 'up_proj', 'down_proj'}
    model = MiniMind(MiniMindConfig(**{**SMALL, 'num_key_value_heads': 4}))         # k and v are square now
    assert {n.split('.')[-1] for n in adapters(inject(model, 2, 2, targets='q_proj'))} == {'q_proj'}
    with pytest.raises(ValueError, match="no linear layer is called 'query'; there are down_proj, "):
        inject(small_model(), 2, 2, targets='q_proj,query')


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


def hugging_face_twin(model):
    """The same weights in transformers' Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM
    names = ('vocab_size', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads',
             'num_key_value_heads', 'max_position_embeddings', 'rms_norm_eps', 'rope_theta',
             'tie_word_embeddings')
    twin = LlamaForCausalLM(LlamaConfig(**{name: getattr(model.config, name) for name in names}))
    twin.load_state_dict(model.state_dict())
    return twin.eval()


def test_peft_loads_what_is_exported(tokens, tmp_path):
    peft = pytest.importorskip('peft')
    twin = hugging_face_twin(small_model())
    model = trained(inject(small_model(), rank=4, alpha=8, dropout=0.1))
    write_peft(model, tmp_path, base='somewhere', model_type='minimind')
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path).eval()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens)[0], atol=1e-5, rtol=1e-4)


def test_peft_loads_what_is_exported_for_gpt2(tokens, tmp_path):
    """Its layers are wide (c_attn), of one name twice (c_proj), and transposed in Hugging Face's layout."""
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    model = GPT2(GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()
    model.save_pretrained(tmp_path / 'base')
    twin = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / 'base').eval()
    trained(inject(model, rank=4, alpha=8))
    write_peft(model, tmp_path / 'peft', base='somewhere', model_type='gpt2')
    theirs = peft.PeftModel.from_pretrained(twin, tmp_path / 'peft').eval()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens)[0], atol=1e-5, rtol=1e-4)


def test_what_peft_saved_is_imported(tokens, tmp_path):
    peft = pytest.importorskip('peft')
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=['q_proj', 'down_proj'],
                             init_lora_weights=False, task_type='CAUSAL_LM')
    theirs = peft.get_peft_model(hugging_face_twin(small_model()), config).eval()
    theirs.save_pretrained(tmp_path)
    model = small_model()
    how = read_peft(model, tmp_path)
    assert how == dict(rank=4, alpha=16.0, dropout=0.0, targets='down_proj,q_proj')
    torch.testing.assert_close(model(tokens)[0], theirs(tokens).logits, atol=1e-5, rtol=1e-4)


# ---- the run ----

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

    for arguments, words in ((['--out_dir=merged', '--merge_to=twice'], 'merged already'),
                             (['--out_dir=a', '--merge_to=a'], 'would overwrite'),
                             (['--init_from=a', *FAST], 'merge them first'),
                             ([f'--init_from={run_folder}', '--targets=query', *FAST], "called 'query'"),
                             ([f'--init_from={run_folder}', '--from_peft=nowhere'], 'adapter_config.json')):
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
