"""What nanoGPT and MiniMind call their settings, and what these do: epochs, the context, rates for weights of
others, nanoGPT's config files and its train.bin (configurator.py, pretrain.py, prepare.py)."""
import json
import math
import re
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, TEXT, numbers
from test_training import CONFIG, make_training

import configurator
import pretrain
import sample
from configurator import load_checkpoint, start_run
from model_gpt2 import GPT2, GPT2Config
from prepare import Piece, read_meta, read_split, write_data
from pretrain import flops_per_token, peak_flops
from sample import known_length, load_run

STAGES = ['pretrain', 'sft', 'dpo', 'lora', 'distill', 'finetune_cls']
TINY = ['--n_layer=1', '--n_head=2', '--n_kv_head=1', '--n_embd=32', '--block_size=32', '--batch_size=4',
        '--dtype=float32', '--device=cpu', '--eval_iters=1', '--prompt=The', '--out_dir=run']


@pytest.fixture
def data(tokenizer, tmp_path):
    write_data(str(tmp_path / 'rules'), tokenizer, [Piece('train', TEXT * 9), Piece('val', TEXT)], 'test')
    return f"--dataset={tmp_path / 'rules'}"


@pytest.fixture
def chats(tokenizer, tmp_path):
    turns = [dict(role='user', content='Who reads?'), dict(role='assistant', content=TEXT)]
    pieces = [Piece(split, (turns,)) for split in ('train', 'train', 'val')]
    write_data(str(tmp_path / 'chats'), tokenizer, pieces, 'test', 'sft')
    return f"--dataset={tmp_path / 'chats'}"


def settings_of(folder):
    return load_checkpoint(str(folder))['settings']


# ---- epochs ----

def test_epochs_say_how_many_steps(script, data, tmp_path):
    rows = (len(read_split(data[10:], 'train').tokens) - 1) // 32 - 1
    steps = [math.ceil(n * rows / 4) for n in (0, 1, 1.5)]
    out = script('pretrain.py', *TINY, data, '--epochs=1').stdout
    assert f'epochs in {steps[1]} steps (by epochs=1.0)' in out
    again = ['--init_from=resume', '--out_dir=run']
    line = script('pretrain.py', *again, code=2).stderr
    assert f'at step {steps[1]}, and ends at {steps[1]}: raise --epochs' in line
    (tmp_path / 'long.py').write_text('epochs = 9.0')
    few = script('pretrain.py', 'long.py', *TINY, data, '--max_iters=2', '--out_dir=few').stdout
    assert 'in 2 steps on' in few                                           # what is typed wins over a file
    script('pretrain.py', *again, '--epochs=1.5')
    assert load_checkpoint(str(tmp_path / 'run'))['step'] == steps[2]
    script('pretrain.py', *again, f'--max_iters={steps[2] + 1}')            # which then counts
    assert load_checkpoint(str(tmp_path / 'run'))['step'] == steps[2] + 1


def test_a_run_of_epochs_that_was_cut_goes_on_to_the_same_end(tmp_path):
    run, config = start_run('cpu', 'float32'), dict(CONFIG, epochs=3.0, out_dir=str(tmp_path))
    whole = make_training(run, config)                                      # an epoch is ten rows, a step two
    assert whole.last == 15
    half = dict(optimizers=[o.state_dict() for o in whole.optimizers], step=7, position=14, counted=0,
                lowest=1.0, scaler={}, rng=[[torch.get_rng_state()]])
    for batch_size, last in ((2, 15), (4, 7 + 4)):
        resumed = dict(config, init_from='resume', batch_size=batch_size)
        assert make_training(run, resumed, half).last == last


@pytest.mark.parametrize('stage', STAGES)
def test_each_stage_has_epochs(stage):
    text = (ROOT / f'{stage}.py').read_text(encoding='utf-8')
    assert re.search(r'^max_iters = .*\nepochs = 0\.0  ', text, re.MULTILINE)


# ---- the learning rate ----

def test_the_cosine_ends_where_lr_decay_iters_says_or_there_is_none(tmp_path):
    run, config = start_run('cpu', 'float32'), dict(CONFIG, out_dir=str(tmp_path), warmup_iters=2)
    assert make_training(run, dict(config, lr_decay_iters=3)).rate(3) == pytest.approx(1e-3)
    flat = make_training(run, dict(config, decay_lr=False))
    assert [flat.rate(step) for step in range(6)] == [1e-2] * 6
    betas = make_training(run, dict(config, beta1=0.8, beta2=0.99)).optimizers[0].defaults['betas']
    assert betas == (0.8, 0.99)


@pytest.mark.parametrize('stage', STAGES)
def test_weights_of_others_get_rates_of_their_own(script, run_folder, tmp_path, stage):
    script('sample.py', f'--out_dir={run_folder}', '--export_dir=hf')
    teacher = ['--teacher='] if stage == 'distill' else []
    for start, other in (('hf', True), (run_folder, False)):
        out = script(f'{stage}.py', *teacher, f'--init_from={start}', '--dataset=nowhere', code=2).stdout
        rate = {'lora': '0.0002', 'dpo': '5e-06'}.get(stage, '5e-05')
        words = f"{'' if stage == 'lora' else 'optimizer=adamw, '}learning_rate={rate}"
        assert (f'is no run of ours: {words}\n' in out) == ('is no run of ours' in out) == other
    out = script(f'{stage}.py', *teacher, '--init_from=hf', '--dataset=nowhere', '--learning_rate=1e-6',
                 code=2).stdout
    assert 'learning_rate' not in out


def test_what_learned_slowly_goes_on_slowly(script, data, run_folder):
    script('sample.py', f'--out_dir={run_folder}', '--export_dir=hf')
    script('pretrain.py', *TINY[4:], data, '--init_from=hf', '--max_iters=1')
    script('pretrain.py', '--init_from=resume', '--out_dir=run', '--max_iters=2')
    out = script('sft.py', '--init_from=run', '--dataset=nowhere', code=2).stdout
    assert 'run learned at 5e-05: optimizer=adamw, learning_rate=5e-05' in out


def test_restarted_by_torchrun_it_keeps_its_rates(script, data, run_folder, monkeypatch):
    script('sample.py', f'--out_dir={run_folder}', '--export_dir=hf')
    whole = [*TINY[4:], data, '--init_from=hf', '--max_iters=4', '--eval_interval=2']
    with pytest.raises(InterruptedError), monkeypatch.context() as patch:
        patch.setattr(configurator.MetricsLog, 'write', lambda log, step, **_: die(step))
        script('pretrain.py', *whole)
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '1')
    assert 'step      0 ' not in script('pretrain.py', *whole).stdout


def die(step):
    if step == 3:
        raise InterruptedError


@pytest.mark.parametrize('stage', ['sft', 'lora'])
def test_eval_only_in_a_later_stage(script, chats, run_folder, tmp_path, stage):
    out = script(f'{stage}.py', f'--init_from={run_folder}', chats, '--eval_only', '--out_dir=later',
                 '--batch_size=1').stdout
    assert out.count('held-out loss') == 1 and not (tmp_path / 'later').exists()


# ---- only looking ----

def test_eval_only_measures_and_writes_nothing(script, data, tmp_path):
    out = script('pretrain.py', *TINY, data, '--eval_only').stdout
    assert len(numbers(r'held-out loss (\S+)', out)) == 1 and not (tmp_path / 'run').exists()
    script('pretrain.py', *TINY, data, '--max_iters=2')
    before = {file.name: file.read_bytes() for file in (tmp_path / 'run').iterdir()}
    out = script('pretrain.py', '--init_from=resume', '--out_dir=run', '--eval_only').stdout
    assert 'step      2  held-out loss' in out and 'nothing is written' in out
    assert {file.name: file.read_bytes() for file in (tmp_path / 'run').iterdir()} == before


@pytest.mark.parametrize('package', ['wandb', 'swanlab'])
def test_a_run_is_logged_under_its_names(script, data, monkeypatch, package):
    told = []
    run = types.SimpleNamespace(log=lambda numbers, step: told.append(step))
    module = types.SimpleNamespace(init=lambda **how: told.append((how['project'], how['name'])) or run)
    monkeypatch.setitem(sys.modules, package, module)
    monkeypatch.setattr(configurator.importlib.util, 'find_spec', lambda name: name == package or None)
    script('pretrain.py', *TINY, data, '--max_iters=1', '--wandb_log', '--wandb_project=sea')
    assert told[0] == ('sea', 'run') and set(told[1:]) == {0, 1}


# ---- the context ----

def test_the_context_is_apart_from_the_length_of_rows(script, data, chats, tmp_path):
    script('pretrain.py', *TINY, data, '--max_iters=1', '--context=64')
    config = load_run(str(tmp_path / 'run'))[0].config
    assert (config.context, config.trained_length) == (64, 32)
    again = ['--max_iters=1', '--eval_iters=1', '--report_size=1', '--batch_size=2', '--device=cpu', chats]
    out = script('sft.py', *again, '--init_from=run', '--out_dir=sft', '--block_size=96').stdout
    assert 'run grows from 64 to 96 tokens' in out
    script('lora.py', *again, '--init_from=sft', '--out_dir=lora', '--block_size=128')
    script('lora.py', '--init_from=resume', '--out_dir=lora', '--max_iters=2')
    for name, length in (('sft', 96), ('lora', 128)):
        script('sample.py', f'--out_dir={name}', f'--export_dir={name}_hf')
        for folder in (name, f'{name}_hf'):
            config = load_run(str(tmp_path / folder))[0].config
            assert (config.context, config.trained_length) == (length, length)
    line = script('pretrain.py', *TINY, data, '--context=16', code=2).stderr
    assert '--context=16 is less than --block_size=32' in line


def test_a_text_beyond_the_trained_length_is_said_once(script, data, tmp_path):
    script('pretrain.py', *TINY, data, '--max_iters=1', '--context=128')
    long = ['--out_dir=run', '--max_new_tokens=60', '--num_samples=2', '--start=The']
    sample.warn.cache_clear()
    assert script('sample.py', *long).stderr.count('longer than the 32 tokens') == 1
    script('sample.py', '--out_dir=run', '--yarn_factor=2', '--export_dir=hf')
    config = json.loads((tmp_path / 'hf' / 'config.json').read_text())
    assert config['rope_scaling']['original_max_position_embeddings'] == 32
    assert config['max_position_embeddings'] == 128
    assert known_length(load_run(str(tmp_path / 'hf'))[0].config) == 64


def test_a_stage_trains_what_yarn_lengthens(script, data, chats, tmp_path):
    script('pretrain.py', *TINY, data, '--max_iters=1')
    script('sft.py', '--max_iters=1', '--report_size=0', '--eval_iters=1', '--batch_size=1', chats,
           '--init_from=run', '--out_dir=sft', '--yarn_factor=4', '--block_size=128')
    script('sft.py', '--init_from=resume', '--out_dir=sft', '--max_iters=2')
    config = load_run(str(tmp_path / 'sft'))[0].config
    assert config.context == config.trained_length == 128 and config.rope_scaling['factor'] == 4
    assert 'extended already' in script('sample.py', '--out_dir=sft', '--yarn_factor=2', code=2).stderr


# ---- MiniMind's names ----

def test_minimind_s_command_lines_are_understood(script, data, tmp_path):
    out = script('pretrain.py', *(
        f'--hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 --num_key_value_heads 1 '
        f'--max_seq_len 32 --accumulation_steps 2 --batch_size 4 --from_weight none --from_resume 0 '
        f'--save_interval 5 --use_moe 0 --use_compile 0 --num_workers 8 --data_path {data[10:]} --epochs 1 '
        f'--save_dir run --device cpu --learning_rate 5e-4 --warmup_iters 0').split()).stdout
    assert '--num_workers=8: num_workers changes nothing here' in out
    config, model = settings_of(tmp_path / 'run'), load_checkpoint(str(tmp_path / 'run'))['model_config']
    assert (model['hidden_size'], model['num_hidden_layers'], model['num_attention_heads']) == (32, 1, 2)
    expected = dict(n_kv_head=1, block_size=32, gradient_accumulation_steps=2, init_from='scratch',
                    epochs=1.0, eval_interval=5, use_moe=False, compile=False, learning_rate=5e-4)
    assert {key: config[key] for key in expected} == expected
    script('pretrain.py', *'--save_dir run --from_resume 1 --from_weight pretrain --epochs 2'.split())


@pytest.mark.parametrize('stage, args, words', [
    ('sft', ['--hidden_size', '768'], "--hidden_size=768: does not apply here, as the model brings its own"),
    ('pretrain', ['--epochs=2', '--max_iters=20'], 'does not apply beside --epochs=2: give one of the two'),
    ('pretrain', ['--load_from=minimind'], 'a model is named by --init_from=FOLDER'),
    ('sft', ['--save_weight=full_sft'], 'a run is a folder: --out_dir=out/NAME'),
    ('pretrain', ['--data_path=some.jsonl'], 'python prepare.py --input=some.jsonl --dataset=NAME'),
    ('distill', ['--teacher_hidden_size=768'], 'the model brings its own'),
    ('pretrain', ['--beta2=1'], 'beta2 must lie in [0, 1)'),
    ('pretrain', ['--wombat=1'], "unknown setting 'wombat'; --help lists all"),
    ('pretrain', ['--batch_size', 'many'], "--batch_size=many: batch_size takes a whole number, not 'many'"),
])
def test_what_is_not_ours_gets_a_hint(script, stage, args, words):
    line = script(f'{stage}.py', *args, code=2).stderr
    assert words in line and len(line) < 250


@pytest.mark.parametrize('stage', STAGES)
def test_each_stage_lists_the_settings_of_the_loop(script, stage):
    text = script(f'{stage}.py', '--help').stdout
    assert all(f'  {key}=' in text for key in configurator.LOOP)


def test_micro_batches_of_one_rank_are_shared_out_over_all(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '4')
    assert configurator.in_our_words('accumulation_steps', 2, '') == {'gradient_accumulation_steps': 8}


@pytest.mark.parametrize('name, start', [('none', 'scratch'), ('full_sft', str(ROOT / 'out' / 'sft')),
                                         ('some/folder', 'some/folder')])
def test_minimind_names_weights_by_their_stage(name, start):
    assert configurator.in_our_words('from_weight', name, '') == {'init_from': start}


# ---- nanoGPT's config files ----

def write_config(path, **settings):
    lines = [f'{key} = {value!r}  # nanoGPT\n' for key, value in settings.items()]
    path.write_text('import time\n' + ''.join(lines))


SHAKESPEARE = dict(out_dir='out-char', eval_interval=250, eval_iters=1, log_interval=10, wandb_log=False,
                   always_save_checkpoint=False, wandb_project='shakespeare-char', wandb_run_name='mini-gpt',
                   dataset='shakespeare_char', gradient_accumulation_steps=1, batch_size=2, block_size=32,
                   n_layer=1, n_head=2, n_embd=32, dropout=0.2, learning_rate=1e-3, max_iters=2,
                   lr_decay_iters=5000, min_lr=1e-4, beta2=0.99, warmup_iters=100)


def test_shakespeare_char_is_a_set_of_characters(script, tmp_path):
    (tmp_path / 'input.txt').write_text(TEXT)
    script('prepare.py', '--input=input.txt', '--dataset=./shakespeare_char')
    meta, train = read_meta('./shakespeare_char'), read_split('./shakespeare_char', 'train')
    assert meta['vocab_size'] == len(set(TEXT)) + 2
    letters = sorted(set(TEXT))
    assert ''.join(letters[i] for i in train.tokens) == TEXT[:len(train.tokens)]
    assert len(train.tokens) / len(TEXT) == pytest.approx(0.9, abs=0.03)
    again = ['--input=input.txt', '--dataset=./shakespeare_char', '--tokenizer=gpt2']
    line = script('prepare.py', *again, code=2).stderr
    assert 'has a tokenizer of its own' in line


def test_a_config_file_of_nanogpt_means_what_it_means_there(script, tmp_path):
    (tmp_path / 'input.txt').write_text(TEXT * 3)
    script('prepare.py', '--input=input.txt', '--dataset=./shakespeare_char')
    write_config(tmp_path / 'char.py', **{**SHAKESPEARE, 'backend': 'nccl'})
    out = script('pretrain.py', 'char.py', '--dataset=./shakespeare_char', '--device=cpu').stdout
    assert out.startswith("char.py is nanoGPT's, as it sets wandb_project")
    assert 'backend changes nothing' in out
    config = settings_of(tmp_path / 'out-char')
    left_open = dict(model='gpt2', optimizer='adamw', bias=False, grad_clip=1.0, weight_decay=0.1, beta1=0.9)
    expected = {**SHAKESPEARE, **left_open, 'dataset': config['dataset']}
    assert {key: config[key] for key in expected} == expected
    model = load_run(str(tmp_path / 'out-char'))[0]
    assert isinstance(model, GPT2) and not any(name.endswith('bias') for name, _ in model.named_parameters())


def test_a_file_of_ours_is_no_file_of_nanogpt(script, data, tmp_path):
    write_config(tmp_path / 'ours.py', model='minimind', beta2=0.99)
    out = script('pretrain.py', 'ours.py', *TINY, data, '--max_iters=1').stdout
    assert 'nanoGPT' not in out and settings_of(tmp_path / 'run')['optimizer'] == 'muon'


def test_nanogpt_starts_from_official_weights(script, tmp_path, monkeypatch, byte_tokenizer):
    sizes = dict(vocab_size=byte_tokenizer.vocab_size, n_positions=64, n_embd=32, n_layer=1, n_head=2)
    GPT2(GPT2Config(**sizes)).save_pretrained(tmp_path / 'xl')
    monkeypatch.setattr('model_gpt2.download_official', lambda name: str(tmp_path / name[5:]))
    monkeypatch.setattr('sample.load_tokenizer', lambda source: byte_tokenizer)
    write_data(str(tmp_path / 'plays'), byte_tokenizer, [Piece('train', TEXT), Piece('val', TEXT)], 'test')
    small = ['--dataset=./plays', '--device=cpu', '--dtype=float32', '--block_size=64']
    write_config(tmp_path / 'eval.py', batch_size=8, eval_iters=500, eval_only=True, wandb_log=False,
                 init_from='gpt2-xl')
    out = script('pretrain.py', 'eval.py', *small).stdout
    assert len(numbers(r'held-out loss (\S+)', out)) == 1 and not (tmp_path / 'out').exists()
    write_config(tmp_path / 'tune.py', out_dir='tuned', eval_interval=5, eval_iters=40, wandb_log=False,
                 wandb_project='shakespeare', dataset='shakespeare', init_from='gpt2-xl',
                 always_save_checkpoint=False, batch_size=1, gradient_accumulation_steps=2, max_iters=2,
                 learning_rate=3e-5, decay_lr=False)
    out = script('pretrain.py', 'tune.py', *small, '--warmup_iters=1').stdout
    assert numbers(r'lr (\S+)', out) == [3e-5, 3e-5] and 'warmup_iters not used' in out
    assert settings_of(tmp_path / 'tuned')['optimizer'] == 'adamw'


def test_openwebtext_is_brought_in_a_line(script, tmp_path):
    write_config(tmp_path / 'owt.py', wandb_project='owt', batch_size=12)
    line = script('pretrain.py', 'owt.py', code=2).stderr
    assert '--dataset=openwebtext' in line and '--input=FOLDER_OF_TRAIN.BIN --tokenizer=gpt2' in line


# ---- nanoGPT's train.bin ----

@pytest.fixture
def bins(tmp_path, tokenizer_folder, tokenizer):
    folder = tmp_path / 'bins'
    folder.mkdir()
    for split, texts in (('train', [TEXT, TEXT]), ('val', [TEXT])):
        ids = [i for text in texts for i in [*tokenizer.encode(text), tokenizer.eot]]
        np.array(ids, dtype=np.uint16).tofile(folder / f'{split}.bin')
    return folder


def test_train_bin_is_an_input(script, bins, tokenizer, tokenizer_folder):
    for source in (bins, bins / 'train.bin'):
        script('prepare.py', f'--input={source}', '--dataset=./owt', f'--tokenizer={tokenizer_folder}')
        meta, train = read_meta('./owt'), read_split('./owt', 'train')
        assert train.tokens.tolist() == np.fromfile(bins / 'train.bin', np.uint16).tolist()
        assert meta['train']['documents'] == 2 and meta['train']['bytes'] == 2 * len(TEXT)
        assert meta['tokenizer'] == tokenizer.fingerprint


@pytest.mark.parametrize('spoil, words', [
    (lambda folder: (folder / 'val.bin').unlink(), 'val.bin is missing'),
    (lambda folder: (folder / 'val.bin').write_bytes(b'abc'), 'holds 3 bytes, not a whole number'),
    (lambda folder: (folder / 'val.bin').write_bytes(b''), 'holds 0 bytes'),
    (lambda folder: np.array([1, 900], np.uint16).tofile(folder / 'val.bin'), 'val.bin holds the id 900'),
])
def test_a_bin_that_is_none_is_one_line(script, bins, tokenizer_folder, spoil, words):
    spoil(bins)
    assert words in script('prepare.py', f'--input={bins}', f'--tokenizer={tokenizer_folder}', code=2).stderr


def test_meta_pkl_is_never_opened(script, bins, tmp_path):
    """It may run any code; characters come from input.txt."""
    (bins / 'meta.pkl').write_bytes(b"cos\nsystem\n(S'touch opened'\ntR.")
    assert 'pickles are not opened' in script('prepare.py', f'--input={bins}', code=2).stderr
    (bins / 'input.txt').write_text(TEXT)
    assert 'does not begin with the characters' in script('prepare.py', f'--input={bins}', code=2).stderr
    letters = sorted(set(TEXT))
    for split, text in (('train', TEXT[:200]), ('val', TEXT[200:])):
        np.array([letters.index(c) for c in text], np.uint16).tofile(bins / f'{split}.bin')
    assert 'meta.pkl is not opened' in script('prepare.py', f'--input={bins}', '--dataset=./letters').stdout
    assert read_split('./letters', 'val').tokens.tolist() == [letters.index(c) for c in TEXT[200:]]
    assert not list(tmp_path.glob('**/opened'))


# ---- model flops utilization ----

def test_mfu_is_of_the_peak_that_is_known(tmp_path, monkeypatch, capsys):
    gpu = types.SimpleNamespace(device=torch.device('cuda:0'), world_size=2, dtype=torch.bfloat16)
    for name, peak in (('NVIDIA H100 80GB HBM3', 989e12), ('NVIDIA GeForce RTX 4090', 165e12),
                       ('NVIDIA GeForce RTX 4090 Laptop GPU', 0), ('NVIDIA A100-SXM4-80GB', 312e12)):
        monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device, name=name: name)
        assert peak_flops(gpu) == 2 * peak
    run = start_run('cpu', 'float32')
    assert peak_flops(run) == 0
    model = GPT2(GPT2Config())
    assert flops_per_token(model, 1024) == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    monkeypatch.setattr(pretrain, 'peak_flops', lambda run: 1e3)
    training = make_training(run, dict(CONFIG, out_dir=str(tmp_path)))
    next(iter(training))
    training.total_weight = 1
    training.backward(training.model(torch.arange(8)[None], torch.arange(1, 9)[None])[1])
    training.update(tokens=8)
    assert 'mfu ' in capsys.readouterr().out
    line = json.loads((tmp_path / 'metrics.jsonl').read_text())
    assert line['mfu'] == pytest.approx(line['tokens_per_second'] * training.flops / 1e3)


def test_of_a_folder_that_is_not_there_nothing_is_said_but_that(script):
    done = script('sft.py', '--init_from=nowhere', '--out_dir=run', code=2)
    assert done.stdout == '' and 'no checkpoint nowhere' in done.stderr
